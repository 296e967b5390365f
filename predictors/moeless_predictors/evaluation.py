"""Measure predictors on sequences that they did not learn from, by layer and distance.

`evaluate` divides a trace by sequence, fits on one part and measures on the other; `evaluate_set` measures what was
fitted before on another trace. A batch is drawn from the tested tokens without replacement, as decoding many
sequences side by side mixes them.

Shapes: T tokens, E experts, B batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean

import numpy as np

from moeless_predictors.arrays import FloatArray
from moeless_predictors.base import LoadPredictor
from moeless_predictors.costs import CostMeter
from moeless_predictors.fitting import (
    FitConfig,
    Gate,
    LayerInputs,
    calibrate,
    choose_among,
    divide,
    fit_kinds,
    inputs_by_layer,
    measured,
    online_batches,
)
from moeless_predictors.metrics import bound_width, coverage, relative_l1, straggler_hit_rate
from moeless_predictors.popularity import OnlinePopularity, PopularityPredictor
from moeless_predictors.predictor_set import PredictorSet
from moeless_predictors.quantile import LoadBatches, LoadQuantile, draw_batches
from moeless_predictors.selector import Candidate
from moeless_predictors.threads import one_blas_thread
from moeless_predictors.traces import RoutingTrace

SELECTED = "selected"
"""Stands among the kinds for whichever was chosen."""
FROZEN = "frozen popularity"
"""Popularity that stops learning once fitted, for comparison: what a placement from a profile knows."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Raises ValueError for a value out of range."""

    fit: FitConfig = field(default_factory=FitConfig)
    test_share: float = 0.2
    """Share of the sequences to test on; of the labels with `split_by_label`."""
    split_by_label: bool = False
    """Test on the sequences of labels (subjects) that are not learned from."""
    layers: tuple[int, ...] | None = None
    """Source layers to measure; None: all."""
    batch_sizes: tuple[int, ...] = (1, 16, 64, 256)
    batches_per_size: int = 200
    seed: int = 0
    """Seed of the division into sequences to learn from and to test on, and of the batches."""

    def __post_init__(self) -> None:
        if not 0 < self.test_share < 1:
            raise ValueError(f"test_share must be between 0 and 1, got {self.test_share}")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch_sizes must be at least 1, got {self.batch_sizes}")
        if self.batches_per_size < 1:
            raise ValueError(f"batches_per_size must be at least 1, got {self.batches_per_size}")


@dataclass(frozen=True, kw_only=True)
class BatchMeasures:
    """Measures for batches of one size."""

    size: int
    relative_l1: float
    """Mean over batches of sum |forecast - load| / sum load."""
    straggler_top_tenth: float
    """Share of batches whose most loaded expert is in the tenth of experts with the highest forecasts, rounded up."""
    straggler_top_tenth_rounded_down: float
    """The same with a tenth rounded down, at least one."""
    coverage: float
    """Share of the loads at or under the bound, which learns from batch to batch as it does in a server."""
    bound_width: float
    """Mean over batches of sum bound / sum load. Coverage says little without it: compare it with popularity's."""


@dataclass(frozen=True, kw_only=True)
class PairMeasures:
    """Measures of one kind for one layer and distance."""

    layer: int
    distance: int
    kind: str
    recall: float
    """Share of the tested tokens' true experts among the predicted top k."""
    cost_us: float
    """Time to forecast a batch of 32, in microseconds."""
    batches: tuple[BatchMeasures, ...]
    chosen: str = ""
    """Only for SELECTED: the chosen kind; `reason` says why."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measures, and the data that they were taken on."""

    model: str
    num_layers: int
    num_experts: int
    top_k: int
    num_train_tokens: int
    num_test_tokens: int
    num_test_sequences: int
    measures: tuple[PairMeasures, ...]

    @property
    def kinds(self) -> list[str]:
        """In the order of the measures, SELECTED last."""
        kinds = dict.fromkeys(measure.kind for measure in self.measures)
        kinds.pop(SELECTED, None)
        return [*kinds, SELECTED]

    @property
    def distances(self) -> list[int]:
        return sorted({measure.distance for measure in self.measures})

    def of(self, kind: str, distance: int) -> list[PairMeasures]:
        """Measures of all layers, in order."""
        found = [m for m in self.measures if m.kind == kind and m.distance == distance]
        return sorted(found, key=lambda measure: measure.layer)

    def mean_recall(self, kind: str, distance: int) -> float:
        """Averaged over layers."""
        return fmean(measure.recall for measure in self.of(kind, distance))

    def mean_of_batches(self, kind: str, distance: int, size: int, name: str) -> float:
        """A field of BatchMeasures, averaged over layers."""
        return fmean(
            getattr(batch, name)
            for measure in self.of(kind, distance)
            for batch in measure.batches
            if batch.size == size
        )


def evaluate(
    trace: RoutingTrace,
    config: EvaluationConfig,
    *,
    gates: Mapping[int, Gate] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Fit on some sequences of `trace`, choose and calibrate on others, and measure on the rest.

    Args:
        gates: by MoE layer, the model's routers, for the gate predictor.
        on_progress: called with the number of pairs done and of all pairs.
    Raises: ValueError if there are too few sequences, or no layer for any distance.
    """
    if trace.num_sequences < 3:
        raise ValueError(f"trace must have at least 3 sequences, got {trace.num_sequences}")
    rest, test = trace.split(test_share=config.test_share, seed=config.seed, by_label=config.split_by_label)
    learning, held_out = divide(rest, config.fit)
    pairs = _pairs(trace.num_layers, config.fit.distances, config.layers)
    costs = CostMeter(
        config.fit.features, num_layers=trace.num_layers, num_experts=trace.num_experts, top_k=trace.top_k
    )
    measures: list[PairMeasures] = []
    done = 0
    with one_blas_thread():
        for ours, others, tested in zip(
            *(inputs_by_layer(part, config.fit) for part in (learning, held_out, test)), strict=True
        ):
            if len(pairs) == done:
                break
            for distance in sorted({d for layer, d in pairs if layer == ours.layer}):
                target = ours.layer + distance
                fitted = fit_kinds(learning, ours, target, config.fit, gate=(gates or {}).get(target))
                candidates = measured(fitted, others, target, costs)
                choice = choose_among(candidates, ours.layer, config.fit)
                found: dict[str, PairMeasures] = {}
                for candidate in candidates:
                    predictor = fitted[candidate.name]
                    quantile = calibrate(candidate.name, predictor, others, target, config.fit)
                    found[candidate.name] = _measure(candidate, predictor, tested, distance, quantile, config)
                    if candidate.name == "popularity":
                        found[FROZEN] = _measure(
                            replace(candidate, name=FROZEN), predictor, tested, distance, quantile, config
                        )
                measures += found.values()
                measures.append(_selected(found[choice.name], choice.reason))
                done += 1
                if on_progress is not None:
                    on_progress(done, len(pairs))
    return _evaluation(trace, learning.num_tokens, test, measures)


def evaluate_set(
    predictors: PredictorSet,
    trace: RoutingTrace,
    config: EvaluationConfig,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure fitted predictors, and popularity as fitted beside them, on every sequence of `trace`.

    Raises: ValueError if the trace is of another shape, or lacks the hidden states that a gate predictor reads.
    """
    for name in ("num_layers", "num_experts", "top_k"):
        if getattr(predictors, name) != getattr(trace, name):
            raise ValueError(
                f"{name} of the trace must be {getattr(predictors, name)} as of the predictors, "
                f"got {getattr(trace, name)}"
            )
    kinds = tuple(dict.fromkeys(pair.kind for pair in predictors.pairs.values()))
    layers = config.layers
    wanted = [key for key in sorted(predictors.pairs) if layers is None or key[0] in layers]
    missing = {layer for layer, d in wanted if predictors.pairs[layer, d].kind == "gate"} - set(trace.hidden)
    if missing:
        raise ValueError(f"trace must have the hidden states of layers {', '.join(map(str, sorted(missing)))}")
    if not wanted:
        raise ValueError(f"layers must hold one that something is predicted from, got {layers}")
    measures: list[PairMeasures] = []
    fit = FitConfig(kinds=kinds, distances=predictors.distances, features=predictors.features)
    done = 0
    for tested in inputs_by_layer(trace, fit):
        for distance in [d for layer, d in wanted if layer == tested.layer]:
            pair = predictors.pairs[tested.layer, distance]
            by_name = {candidate.name: candidate for candidate in pair.candidates}
            baseline = by_name.get("popularity", Candidate(name="popularity", score=0.0, cost_us=0.0))
            found = _measure(by_name[pair.kind], pair.predictor, tested, distance, pair.quantile, config)
            measures += [
                _measure(candidate, pair.popularity, tested, distance, pair.popularity_quantile, config)
                for candidate in (baseline, replace(baseline, name=FROZEN))
            ]
            if pair.kind != "popularity":
                measures.append(found)
            measures.append(_selected(found, pair.choice.reason))
            done += 1
            if on_progress is not None:
                on_progress(done, len(wanted))
    return _evaluation(trace, 0, trace, measures)


def _pairs(num_layers: int, distances: Iterable[int], layers: tuple[int, ...] | None) -> list[tuple[int, int]]:
    wanted = range(num_layers) if layers is None else layers
    if layers is not None and (not layers or min(layers) < 0 or max(layers) >= num_layers):
        raise ValueError(f"layers must be from 0 to {num_layers - 1}, got {layers}")
    pairs = [(layer, d) for layer in wanted for d in sorted(set(distances)) if layer + d < num_layers]
    if not pairs:
        raise ValueError(f"distances must hold one that stays below the {num_layers} layers, got {tuple(distances)}")
    return pairs


def _measure(
    candidate: Candidate,
    predictor: LoadPredictor,
    inputs: LayerInputs,
    distance: int,
    quantile: LoadQuantile,
    config: EvaluationConfig,
) -> PairMeasures:
    """Measures of a predictor as a server runs it: popularity learns on from batch to batch, unless the candidate is
    FROZEN, and the drift of other predictors is corrected with what the batches before showed."""
    target = inputs.layer + distance
    routing_TE = inputs.routing(target)
    features_TF = inputs.features("popularity" if candidate.name == FROZEN else candidate.name, target)
    probabilities_TE = predictor.predict_proba(features_TF)
    online = predictor if isinstance(predictor, PopularityPredictor) and candidate.name != FROZEN else None
    num_experts = routing_TE.shape[1]
    rounded_down = max(1, num_experts // 10) / num_experts
    rows = []
    for size in config.batch_sizes:
        if size > len(routing_TE):
            continue
        batches = draw_batches(
            probabilities_TE, routing_TE, sizes=[size], batches_per_size=config.batches_per_size, seed=config.seed
        )
        if online is not None:
            batches = online_batches(online, batches)
        upper_BE, corrected_BE = _with_drift(quantile, batches)
        forecast_BE = batches.mean_BE if isinstance(predictor, PopularityPredictor) else corrected_BE
        rows.append(
            BatchMeasures(
                size=size,
                relative_l1=relative_l1(forecast_BE, batches.load_BE),
                straggler_top_tenth=straggler_hit_rate(forecast_BE, batches.load_BE),
                straggler_top_tenth_rounded_down=straggler_hit_rate(forecast_BE, batches.load_BE, share=rounded_down),
                coverage=coverage(upper_BE, batches.load_BE),
                bound_width=bound_width(upper_BE, batches.load_BE),
            )
        )
    return PairMeasures(
        layer=inputs.layer,
        distance=distance,
        kind=candidate.name,
        recall=(
            predictor.score(features_TF, routing_TE) if online is None else OnlinePopularity(online).recall(routing_TE)
        ),
        cost_us=candidate.cost_us,
        batches=tuple(rows),
    )


def _with_drift(quantile: LoadQuantile, batches: LoadBatches) -> tuple[FloatArray, FloatArray]:
    """Bound and drift-corrected mean of each batch, before its true load is learned from; both of shape (B, E)."""
    learning = copy.deepcopy(quantile)
    bounds, corrected = [], []
    for mean_E, variance_E, load_E, num_tokens in zip(
        batches.mean_BE, batches.variance_BE, batches.load_BE, batches.num_tokens_B.tolist(), strict=True
    ):
        corrected.append(learning.corrected_mean(mean_E, num_tokens))
        bounds.append(learning.upper(mean_E, variance_E, num_tokens))
        learning.update(mean_E, variance_E, load_E, num_tokens)
    return np.array(bounds), np.array(corrected)


def _selected(measures: PairMeasures, reason: str) -> PairMeasures:
    return PairMeasures(
        layer=measures.layer,
        distance=measures.distance,
        kind=SELECTED,
        recall=measures.recall,
        cost_us=measures.cost_us,
        batches=measures.batches,
        chosen=measures.kind,
        reason=reason,
    )


def _evaluation(
    trace: RoutingTrace, num_train_tokens: int, test: RoutingTrace, measures: list[PairMeasures]
) -> Evaluation:
    return Evaluation(
        model=trace.metadata.model,
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        num_train_tokens=num_train_tokens,
        num_test_tokens=test.num_tokens,
        num_test_sequences=test.num_sequences,
        measures=tuple(measures),
    )
