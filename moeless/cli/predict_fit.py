"""`moeless predict fit`: fit the predictors that `moeless serve --predictors` reads. docs/predictors.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeless.cli._console import one_line_errors, progress_of, say
from moeless.cli._extras import require_extra
from moeless.cli._options import output_file
from moeless.cli._predictors import (
    ALL_KINDS,
    Distances,
    GateThreshold,
    Kinds,
    MaxTokens,
    Packed,
    Quantile,
    Seed,
    Tolerance,
    Trace,
    copied_gates,
    fit_config,
    show_choices,
)
from moeless.core.errors import ConfigError


def fit_command(
    trace: Trace,
    out: Annotated[Path, typer.Argument(callback=output_file, help="File to write, for `moeless serve --predictors`.")],
    distances: Distances = "1-3",
    kinds: Kinds = ALL_KINDS,
    packed: Packed = None,
    tolerance: Tolerance = 0.01,
    quantile: Quantile = 0.9,
    gate_threshold: GateThreshold = 0.8,
    max_tokens: MaxTokens = 100_000,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option(help="Write over OUT if it exists.")] = False,
) -> None:
    """Fit, choose and calibrate a predictor for every layer and distance."""
    require_extra("plan", "moeless predict fit")
    from moeless_predictors.fitting import fit_predictors
    from moeless_predictors.traces import RoutingTrace

    if out.exists() and not overwrite:
        raise ConfigError(f"OUT must not exist unless --overwrite is given, got {out}")
    with one_line_errors():
        routing = RoutingTrace.open(trace)
        config = fit_config(distances, kinds, tolerance, quantile, gate_threshold, max_tokens, seed)
        with progress_of("fitting") as on_progress:
            predictors = fit_predictors(routing, config, gates=copied_gates(packed), on_progress=on_progress)
        predictors.save(out)
    show_choices(predictors)
    say(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
