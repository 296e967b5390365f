"""`moeless experts`: the expert functions of a running server. docs/serving.md."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from moeless.cli._console import stdout
from moeless.cli._options import from_to
from moeless.cli._server import DEFAULT_URL, open_server, refusal, server_errors


def experts_command(
    url: Annotated[str, typer.Option(help="Address of the server, with or without /v1.")] = DEFAULT_URL,
    api_key: Annotated[
        str | None, typer.Option(envvar="MOELESS_API_KEY", help="Key, if the server requires one.")
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(callback=from_to(1), help="Show only this number of functions, those with the most tokens."),
    ] = None,
) -> None:
    """Show each expert function: state, replicas, worker, bytes, tokens served."""
    with open_server(url, api_key, timeout_s=10.0) as client:
        with server_errors(client):
            response = client.get("/v1/experts")
        if response.status_code != 200:
            raise refusal(response)
        functions = response.json()["data"]
    stdout.print(experts_table(functions, top=top))


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
