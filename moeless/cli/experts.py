"""`moeless experts`: the expert functions of a running server. docs/serving.md."""

from __future__ import annotations

from typing import Annotated

import httpx
import typer
from rich.table import Table

from moeless.cli._console import stdout
from moeless.core.errors import MoelessError


def experts_command(
    url: Annotated[str, typer.Option(help="Where moeless serves.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="MOELESS_API_KEY", help="Key, if one is asked for.")] = None,
    top: Annotated[int | None, typer.Option(help="Only so many functions, those with the most tokens.")] = None,
) -> None:
    """Show each expert function: state, replicas, worker, bytes, tokens served."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(f"{url}/v1/experts", headers=headers, timeout=10.0)
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise MoelessError(f"{url}/v1/experts: {error}") from error
    stdout.print(experts_table(response.json()["data"], top=top))


def experts_table(functions: list[dict[str, object]], *, top: int | None = None) -> Table:
    """Rows of GET /v1/experts as a table, by name or, with `top`, by tokens served."""
    rows = list(functions)
    if top is not None:
        rows = sorted(rows, key=lambda row: -int(str(row["tokens_served"])))[:top]
    table = Table("function", "state", "replicas", "worker", "KB", "tokens", title="expert functions")
    for row in rows:
        workers = row["workers"]
        assert isinstance(workers, list)
        kilobytes = f"{int(str(row['bytes'])) / 1e3:.0f}"
        table.add_row(
            str(row["name"]),
            str(row["state"]),
            str(row["replicas"]),
            ", ".join(map(str, workers)),
            kilobytes,
            str(row["tokens_served"]),
        )
    return table
