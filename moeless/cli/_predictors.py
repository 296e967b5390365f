"""Shared by the commands of `moeless predict`: their options, and the table of chosen predictors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from moeless.cli._console import say, stdout
from moeless.cli._options import from_to, input_file
from moeless.core.errors import ConfigError

if TYPE_CHECKING:
    from moeless_predictors.fitting import FitConfig, Gate
    from moeless_predictors.predictor_set import PredictorSet

Trace = Annotated[Path, typer.Argument(callback=input_file, help="Routing trace that `moeless trace` wrote.")]
Distances = Annotated[str, typer.Option(help="MoE layers ahead, as 1,3 or 1-5.")]
Kinds = Annotated[
    str, typer.Option(help="Kinds to choose from; gate needs a trace with hidden states. Default: all there can be.")
]
Packed = Annotated[
    str | None, typer.Option(help="Model whose gates the gate predictor copies, as `moeless serve` takes it.")
]
Tolerance = Annotated[float, typer.Option(help="Recall that a cheaper predictor may give up.")]
Quantile = Annotated[float, typer.Option(help="Quantile of the load that the bound covers.")]
GateThreshold = Annotated[float, typer.Option(help="Recall under which a copied gate is fine-tuned.")]
MaxTokens = Annotated[
    int, typer.Option(callback=from_to(1), help="Maximum of tokens to learn from; sequences are drawn at random.")
]
Seed = Annotated[int, typer.Option(callback=from_to(0), help="Seed of the division into sequences, and of training.")]

ALL_KINDS = "popularity,transition,gate,history"


def show_choices(predictors: PredictorSet) -> None:
    """Print the predictor chosen for each layer and distance, and why."""
    table = Table("layer", "distance", "chosen, and why", title=f"predictors of {predictors.model}")
    for (layer, distance), pair in sorted(predictors.pairs.items()):
        table.add_row(f"{layer} to {pair.target}", str(distance), pair.choice.reason)
    stdout.print(table)
    counts = Counter(pair.kind for pair in predictors.pairs.values())
    say("chosen: " + ", ".join(f"{kind} {count} times" for kind, count in counts.most_common()))
    tuned = [getattr(pair.predictor, "was_tuned_", None) for pair in predictors.pairs.values()]
    if any(was_tuned is not None for was_tuned in tuned):
        say(f"gates fine-tuned: {tuned.count(True)} of {tuned.count(True) + tuned.count(False)}")


def fit_config(
    distances: str, kinds: str, tolerance: float, quantile: float, gate_threshold: float, max_tokens: int, seed: int
) -> FitConfig:
    """The options of fitting, checked."""
    from moeless_predictors.fitting import FitConfig

    return FitConfig(
        distances=numbers("distances", distances),
        kinds=tuple(kind.strip() for kind in kinds.split(",")),
        tolerance=tolerance,
        quantile=quantile,
        gate_threshold=gate_threshold,
        max_tokens=max_tokens,
        seed=seed,
    )


def numbers(option: str, text: str) -> tuple[int, ...]:
    """1,3 or 1-5 as numbers."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            numbers += range(int(first), int(last) + 1) if dash else [int(first)]
        except ValueError as error:
            raise ConfigError(f"--{option} must be numbers such as 1,3 or 1-5, got {text!r}") from error
    return tuple(sorted(set(numbers)))


def copied_gates(packed: str | None) -> dict[int, Gate]:
    """The gates of a model by MoE layer; none without a model."""
    if packed is None:
        return {}
    from moeless.packages.routers import read_routers
    from moeless.packages.source import resolve_model

    return dict(enumerate(read_routers(resolve_model(packed))))
