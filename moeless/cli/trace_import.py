"""`moeless trace import`: make a trace of a routing or arrival file in another format. docs/traces.md."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moeless.cli._console import one_line_errors, say, say_aside
from moeless.cli._extras import require_extra
from moeless.cli._options import from_to, input_path, not_empty, output_file
from moeless.cli.trace_info import summary
from moeless.core.errors import ConfigError


class Phase(StrEnum):
    """Whether a token was routed while reading a prompt or while generating."""

    DECODE = "decode"
    PREFILL = "prefill"


def import_command(
    source: Annotated[
        Path,
        typer.Argument(callback=input_path, help="NPZ, CSV, JSON lines or a folder of ESFT logs: see docs/traces.md."),
    ],
    out: Annotated[Path, typer.Argument(callback=output_file, help="Trace to write.")],
    model: Annotated[
        str | None, typer.Option(callback=not_empty, help="Name of the model; default: the source's name.")
    ] = None,
    phase: Annotated[Phase, typer.Option(help="Phase of the tokens where the source does not say.")] = Phase.DECODE,
    num_experts: Annotated[
        int | None,
        typer.Option(callback=from_to(1), help="Experts of a layer; default: by the highest that the source names."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            callback=from_to(1), help="Experts of a token in ESFT's logs; default: inferred from their lines."
        ),
    ] = None,
    origin: Annotated[
        str | None, typer.Option(help="Where the source comes from, in words, kept in the trace; default: its name.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Write over OUT if it exists.")] = False,
) -> None:
    """Import routing or arrivals; the format is recognised by content. Unknown files are refused by their columns."""
    require_extra("plan", "moeless trace import")
    from moeless_predictors.traces import DECODE, PREFILL, ImportOptions, import_trace

    if out.exists() and not overwrite:
        raise ConfigError(f"OUT must not exist unless --overwrite is given, got {out}")
    options = ImportOptions(
        model=model,
        phase=PREFILL if phase is Phase.PREFILL else DECODE,
        num_experts=num_experts,
        top_k=top_k,
        source=origin,
    )
    with one_line_errors():
        imported = import_trace(source, options)
        imported.trace.save(out)
    for notice in imported.notices:
        say_aside(f"note: {notice}")
    say(f"{out}: {summary(imported.trace)}")
