"""`moeless predict eval`: measure load predictors on a routing trace. docs/predictors.md."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from moeless.cli._console import one_line_errors, progress_of, say, stdout
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
    numbers,
)

if TYPE_CHECKING:
    from moeless_predictors.evaluation import Evaluation


def evaluate_command(
    trace: Trace,
    predictors: Annotated[
        Path | None, typer.Option(help="Measure these, fitted on other sequences, instead of fitting.")
    ] = None,
    distances: Distances = "1-5",
    kinds: Kinds = ALL_KINDS,
    layers: Annotated[str | None, typer.Option(help="Source layers to measure, as 0,4 or 0-7; default: all.")] = None,
    test_share: Annotated[float, typer.Option(help="Of the sequences, to test on.")] = 0.2,
    batches: Annotated[int, typer.Option(help="Batches of each size.")] = 200,
    packed: Packed = None,
    tolerance: Tolerance = 0.01,
    quantile: Quantile = 0.9,
    gate_threshold: GateThreshold = 0.8,
    max_tokens: MaxTokens = 100_000,
    seed: Seed = 0,
    by_layer: Annotated[bool, typer.Option(help="A row for every layer, with the choice's reason.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw recall and load error into this PNG.")] = None,
) -> None:
    """Measure predictors on sequences that they did not learn from."""
    from moeless_predictors.evaluation import EvaluationConfig, evaluate, evaluate_set
    from moeless_predictors.predictor_set import PredictorSet
    from moeless_predictors.traces import RoutingTrace

    with one_line_errors():
        routing = RoutingTrace.open(trace)
        config = EvaluationConfig(
            fit=fit_config(distances, kinds, tolerance, quantile, gate_threshold, max_tokens, seed),
            test_share=test_share,
            layers=None if layers is None else numbers("layers", layers),
            batches_per_size=batches,
            seed=seed,
        )
        with progress_of("measuring") as on_progress:
            if predictors is None:
                found = evaluate(routing, config, gates=copied_gates(packed), on_progress=on_progress)
            else:
                found = evaluate_set(PredictorSet.load(predictors), routing, config, on_progress=on_progress)
        learned = f"{found.num_train_tokens:,} tokens learned from, " if predictors is None else ""
        say(
            f"{found.model}: {found.num_layers} MoE layers x {found.num_experts} experts, top-{found.top_k}; {learned}"
            f"{found.num_test_tokens:,} tokens in {found.num_test_sequences:,} sequences tested"
        )
        stdout.print(_table_by_layer(found) if by_layer else evaluation_table(found))
        if json_ is not None:
            json_.write_text(json.dumps(asdict(found), indent=2) + "\n")
            say(f"figures: {json_}")
        if plot is not None:
            from moeless_predictors.plots import save_evaluation_plot

            save_evaluation_plot(found, plot)
            say(f"plot: {plot}")


def evaluation_table(evaluation: Evaluation) -> Table:
    """A row for each distance and kind, averaged over layers."""
    sizes = sorted({batch.size for measure in evaluation.measures for batch in measure.batches})
    shown = 64 if 64 in sizes else sizes[-1]
    table = Table(
        title="means over layers",
        caption=f"d: layers ahead. L1: relative error of the load of batches of so many tokens. Of batches of {shown}: "
        "/pop, L1 over popularity's; top, how often the most loaded expert is in the predicted top tenth; cover, loads "
        "within the bound. µs: of forecasting 32 tokens.",
    )
    for name in ("d", "kind", "recall", *(f"L1 {size}" for size in sizes), "/pop", "top", "cover", "µs"):
        table.add_column(name, no_wrap=True, justify="left" if name == "kind" else "right")
    for distance in evaluation.distances:
        for kind in evaluation.kinds:
            if not evaluation.of(kind, distance):
                continue

            def mean(name: str, size: int, kind: str = kind, distance: int = distance) -> float:
                return evaluation.mean_of_batches(kind, distance, size, name)

            baseline = (
                evaluation.mean_of_batches("popularity", distance, shown, "relative_l1")
                if (evaluation.of("popularity", distance))
                else None
            )
            costs = [measure.cost_us for measure in evaluation.of(kind, distance)]
            table.add_row(
                str(distance),
                kind,
                f"{evaluation.mean_recall(kind, distance):.3f}",
                *(f"{mean('relative_l1', size):.3f}" for size in sizes),
                "-" if not baseline else f"{mean('relative_l1', shown) / baseline:.2f}",
                f"{mean('straggler_top_tenth', shown):.3f}",
                f"{mean('coverage', shown):.3f}",
                f"{sum(costs) / len(costs):.0f}",
                end_section=kind == evaluation.kinds[-1],
            )
    return table


def _table_by_layer(evaluation: Evaluation) -> Table:
    from moeless_predictors.evaluation import SELECTED

    kinds = [kind for kind in evaluation.kinds if kind != SELECTED]
    table = Table("distance", "layer", *kinds, "chosen, and why", title="recall by layer")
    for distance in evaluation.distances:
        for selected in evaluation.of(SELECTED, distance):
            by_kind = {
                m.kind: m.recall for kind in kinds for m in evaluation.of(kind, distance) if m.layer == selected.layer
            }
            table.add_row(
                str(distance),
                f"{selected.layer} to {selected.layer + distance}",
                *(f"{by_kind[kind]:.3f}" if kind in by_kind else "-" for kind in kinds),
                selected.reason,
            )
    return table
