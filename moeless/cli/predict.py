"""`moeless predict`: measure load predictors on a routing trace, fit what `moeless serve` loads. docs/predictors.md."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from moeless.cli._console import told_in_one_line
from moeless.core.errors import ConfigError

if TYPE_CHECKING:
    from moeless_predictors.evaluation import Evaluation
    from moeless_predictors.fitting import FitConfig, Gate
    from moeless_predictors.predictor_set import PredictorSet

predict_app = typer.Typer(no_args_is_help=True, help="Predictors of expert load: measure, fit, look inside.")
_stdout = Console()
_stderr = Console(stderr=True)

_Trace = Annotated[Path, typer.Argument(help="Routing trace that `moeless trace` wrote.")]
_Distances = Annotated[str, typer.Option(help="MoE layers ahead, as 1,3 or 1-5.")]
_Kinds = Annotated[
    str, typer.Option(help="Kinds to choose from; gate needs a trace with hidden states. Default: all there can be.")
]
_Packed = Annotated[
    str | None, typer.Option(help="Model whose gates the gate predictor copies, as `moeless serve` takes it.")
]
_Tolerance = Annotated[float, typer.Option(help="Recall that a cheaper predictor may give up.")]
_Quantile = Annotated[float, typer.Option(help="Of the load, that the bound is to cover.")]
_GateThreshold = Annotated[float, typer.Option(help="Recall under which a copied gate is fine-tuned.")]
_MaxTokens = Annotated[int, typer.Option(help="Most tokens to learn from; sequences are drawn at random.")]
_Seed = Annotated[int, typer.Option(help="Of the division into sequences, and of training.")]

ALL_KINDS = "popularity,transition,gate,history"


@predict_app.command("eval")
def evaluate_command(
    trace: _Trace,
    predictors: Annotated[
        Path | None, typer.Option(help="Measure these, fitted on other sequences, instead of fitting.")
    ] = None,
    distances: _Distances = "1-5",
    kinds: _Kinds = ALL_KINDS,
    layers: Annotated[str | None, typer.Option(help="Source layers to measure, as 0,4 or 0-7; default: all.")] = None,
    test_share: Annotated[float, typer.Option(help="Of the sequences, to test on.")] = 0.2,
    batches: Annotated[int, typer.Option(help="Batches of each size.")] = 200,
    packed: _Packed = None,
    tolerance: _Tolerance = 0.01,
    quantile: _Quantile = 0.9,
    gate_threshold: _GateThreshold = 0.8,
    max_tokens: _MaxTokens = 100_000,
    seed: _Seed = 0,
    by_layer: Annotated[bool, typer.Option(help="A row for every layer, with the choice's reason.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw recall and load error into this PNG.")] = None,
) -> None:
    """Measure predictors on sequences that they did not learn from."""
    from moeless_predictors.evaluation import EvaluationConfig, evaluate, evaluate_set
    from moeless_predictors.predictor_set import PredictorSet
    from moeless_predictors.traces import RoutingTrace

    with told_in_one_line():
        routing = RoutingTrace.open(trace)
        config = EvaluationConfig(
            fit=_fit_config(distances, kinds, tolerance, quantile, gate_threshold, max_tokens, seed),
            test_share=test_share,
            layers=None if layers is None else _numbers("layers", layers),
            batches_per_size=batches,
            seed=seed,
        )
        with _progress("measuring") as on_progress:
            if predictors is None:
                found = evaluate(routing, config, gates=_gates(packed), on_progress=on_progress)
            else:
                found = evaluate_set(PredictorSet.load(predictors), routing, config, on_progress=on_progress)
        learned = f"{found.num_train_tokens:,} tokens learned from, " if predictors is None else ""
        _say(
            f"{found.model}: {found.num_layers} MoE layers x {found.num_experts} experts, top-{found.top_k}; {learned}"
            f"{found.num_test_tokens:,} tokens in {found.num_test_sequences:,} sequences tested"
        )
        _stdout.print(_table_by_layer(found) if by_layer else evaluation_table(found))
        if json_ is not None:
            json_.write_text(json.dumps(asdict(found), indent=2) + "\n")
            _say(f"figures: {json_}")
        if plot is not None:
            from moeless_predictors.plots import save_evaluation_plot

            save_evaluation_plot(found, plot)
            _say(f"plot: {plot}")


@predict_app.command()
def fit(
    trace: _Trace,
    out: Annotated[Path, typer.Argument(help="File to write, for `moeless serve --predictors`.")],
    distances: _Distances = "1-3",
    kinds: _Kinds = ALL_KINDS,
    packed: _Packed = None,
    tolerance: _Tolerance = 0.01,
    quantile: _Quantile = 0.9,
    gate_threshold: _GateThreshold = 0.8,
    max_tokens: _MaxTokens = 100_000,
    seed: _Seed = 0,
    overwrite: Annotated[bool, typer.Option(help="Write over OUT if it exists.")] = False,
) -> None:
    """Fit, choose and calibrate a predictor for every layer and distance."""
    from moeless_predictors.fitting import fit_predictors
    from moeless_predictors.traces import RoutingTrace

    if out.exists() and not overwrite:
        raise ConfigError(f"OUT must not exist unless --overwrite is given, got {out}")
    with told_in_one_line():
        routing = RoutingTrace.open(trace)
        config = _fit_config(distances, kinds, tolerance, quantile, gate_threshold, max_tokens, seed)
        with _progress("fitting") as on_progress:
            predictors = fit_predictors(routing, config, gates=_gates(packed), on_progress=on_progress)
        predictors.save(out)
    _tell(predictors)
    _say(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


@predict_app.command()
def info(predictors: Annotated[Path, typer.Argument(help="File that `moeless predict fit` wrote.")]) -> None:
    """Print which predictor was chosen for each layer and distance, and why."""
    from moeless_predictors.predictor_set import PredictorSet

    with told_in_one_line():
        _tell(PredictorSet.load(predictors))


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


def _tell(predictors: PredictorSet) -> None:
    table = Table("layer", "distance", "chosen, and why", title=f"predictors of {predictors.model}")
    for (layer, distance), pair in sorted(predictors.pairs.items()):
        table.add_row(f"{layer} to {pair.target}", str(distance), pair.choice.reason)
    _stdout.print(table)
    counts = Counter(pair.kind for pair in predictors.pairs.values())
    _say("chosen: " + ", ".join(f"{kind} {count} times" for kind, count in counts.most_common()))
    tuned = [getattr(pair.predictor, "was_tuned_", None) for pair in predictors.pairs.values()]
    if any(was_tuned is not None for was_tuned in tuned):
        _say(f"gates fine-tuned: {tuned.count(True)} of {tuned.count(True) + tuned.count(False)}")


def _fit_config(
    distances: str, kinds: str, tolerance: float, quantile: float, gate_threshold: float, max_tokens: int, seed: int
) -> FitConfig:
    from moeless_predictors.fitting import FitConfig

    return FitConfig(
        distances=_numbers("distances", distances),
        kinds=tuple(kind.strip() for kind in kinds.split(",")),
        tolerance=tolerance,
        quantile=quantile,
        gate_threshold=gate_threshold,
        max_tokens=max_tokens,
        seed=seed,
    )


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """1,3 or 1-5 as numbers."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            numbers += range(int(first), int(last) + 1) if dash else [int(first)]
        except ValueError as error:
            raise ConfigError(f"--{option} must be numbers such as 1,3 or 1-5, got {text!r}") from error
    return tuple(sorted(set(numbers)))


def _gates(packed: str | None) -> dict[int, Gate]:
    if packed is None:
        return {}
    from moeless.packages.routers import read_routers
    from moeless.packages.source import resolve_model

    return dict(enumerate(read_routers(resolve_model(packed))))


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_stderr, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _say(text: str) -> None:
    _stdout.print(text, highlight=False, markup=False, soft_wrap=True)
