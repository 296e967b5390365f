"""`moeless predict eval`: measure load predictors on a routing trace. docs/predictors.md."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from moeless.cli._console import one_line_errors, progress_of, say, stdout
from moeless.cli._extras import require_extra
from moeless.cli._options import from_to, input_file, output_file
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

_MIN_WIDTH = 130
"""Columns that the table needs; a narrower terminal wraps its lines instead of cutting figures off."""


def evaluate_command(
    trace: Trace,
    predictors: Annotated[
        Path | None,
        typer.Option(callback=input_file, help="Measure these, fitted on other sequences, instead of fitting."),
    ] = None,
    distances: Distances = "1-5",
    kinds: Kinds = ALL_KINDS,
    layers: Annotated[str | None, typer.Option(help="Source layers to measure, as 0,4 or 0-7; default: all.")] = None,
    test_share: Annotated[float, typer.Option(help="Share of the sequences, or labels, to test on.")] = 0.2,
    split_by_label: Annotated[
        bool, typer.Option("--split-by-label", help="Test on labels (subjects) that are not learned from.")
    ] = False,
    batches: Annotated[int, typer.Option(callback=from_to(1), help="Batches of each size.")] = 200,
    packed: Packed = None,
    tolerance: Tolerance = 0.01,
    quantile: Quantile = 0.9,
    gate_threshold: GateThreshold = 0.8,
    max_tokens: MaxTokens = 100_000,
    seed: Seed = 0,
    by_layer: Annotated[bool, typer.Option(help="A row for every layer, with the choice's reason.")] = False,
    json_: Annotated[
        Path | None, typer.Option("--json", callback=output_file, help="Write the figures to this file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(callback=output_file, help="Draw recall and load error into this PNG.")
    ] = None,
) -> None:
    """Measure predictors on sequences that they did not learn from."""
    require_extra("plan", "moeless predict eval")
    if plot is not None:
        require_extra("plot", "--plot")
    from moeless_predictors.evaluation import EvaluationConfig, evaluate, evaluate_set
    from moeless_predictors.predictor_set import PredictorSet
    from moeless_predictors.traces import RoutingTrace

    with one_line_errors():
        routing = RoutingTrace.open(trace)
        config = EvaluationConfig(
            fit=fit_config(distances, kinds, tolerance, quantile, gate_threshold, max_tokens, seed),
            test_share=test_share,
            split_by_label=split_by_label,
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
        table = _table_by_layer(found) if by_layer else evaluation_table(found)
        stdout.print(table, width=max(stdout.width, _MIN_WIDTH), crop=False)
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
        caption=f"d: layers ahead. L1: relative error of the load, by tokens in the batch. For batches of {shown}: "
        "L1/pop, L1 over popularity's; top, how often the most loaded expert is in the forecast's top tenth; cover, "
        "share of loads within the bound; width, the bound's sum over the load's; width/pop, width over popularity's. "
        "Popularity learns online and fades; frozen popularity stops learning once fitted. µs: to forecast 32 tokens.",
    )
    columns = ("d", "kind", "recall", *(f"L1 {size}" for size in sizes))
    for name in (*columns, "L1/pop", "top", "cover", "width", "width/pop", "µs"):
        table.add_column(name, no_wrap=True, justify="left" if name == "kind" else "right")
    for distance in evaluation.distances:
        for kind in evaluation.kinds:
            if evaluation.of(kind, distance):
                row = _evaluation_row(evaluation, kind, distance, sizes, shown)
                table.add_row(str(distance), kind, *row, end_section=kind == evaluation.kinds[-1])
    return table


def _evaluation_row(evaluation: Evaluation, kind: str, distance: int, sizes: list[int], shown: int) -> list[str]:
    def mean(name: str, size: int = shown, kind: str = kind) -> float:
        return evaluation.mean_of_batches(kind, distance, size, name)

    def over_popularity(name: str) -> str:
        return f"{mean(name) / baseline:.2f}" if (baseline := mean(name, kind="popularity")) else "-"

    costs = [measure.cost_us for measure in evaluation.of(kind, distance)]
    return [
        f"{evaluation.mean_recall(kind, distance):.3f}",
        *(f"{mean('relative_l1', size):.3f}" for size in sizes),
        over_popularity("relative_l1"),
        f"{mean('straggler_top_tenth'):.3f}",
        f"{mean('coverage'):.3f}",
        f"{mean('bound_width'):.2f}",
        over_popularity("bound_width"),
        f"{sum(costs) / len(costs):.0f}",
    ]


def _table_by_layer(evaluation: Evaluation) -> Table:
    from moeless_predictors.evaluation import FROZEN, SELECTED

    kinds = [kind for kind in evaluation.kinds if kind not in (FROZEN, SELECTED)]
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
