"""Fit a model's predictors to a routing trace: every kind for every layer and distance, and choose.

Sequences are divided, never tokens: the kinds learn from one part; the other part measures them, decides which to use
and calibrates its bound. `fit_kinds` is the inner step, which evaluation.py uses, too.

Shapes: n tokens, E experts, F features, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from moeless_predictors.arrays import FloatArray
from moeless_predictors.base import LoadPredictor, one_hot
from moeless_predictors.costs import CostMeter
from moeless_predictors.features import FeatureConfig, TraceFeatures, choice_values
from moeless_predictors.history import HistoryPredictor
from moeless_predictors.popularity import OnlinePopularity, PopularityPredictor
from moeless_predictors.predictor_set import KINDS, PairPredictor, PredictorSet
from moeless_predictors.quantile import LoadBatches, LoadQuantile, draw_batches
from moeless_predictors.selector import Candidate, Choice, choose
from moeless_predictors.threads import one_blas_thread
from moeless_predictors.traces import PREFILL, RoutingTrace
from moeless_predictors.transition import TransitionPredictor


class Gate(Protocol):
    """A layer's router, as far as the gate predictor copies it: its `fit`'s weight, bias and scoring."""

    @property
    def weight(self) -> FloatArray: ...
    @property
    def bias(self) -> FloatArray | None: ...
    @property
    def scoring(self) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Raises ValueError for a value out of range."""

    distances: tuple[int, ...] = (1, 2, 3, 4, 5)
    kinds: tuple[str, ...] = KINDS
    """Kinds to choose from. The gate predictor is left out where the trace has no hidden states of a layer."""
    tolerance: float = 0.01
    """Recall that a cheaper predictor may give up."""
    quantile: float = 0.9
    """Quantile of the load that the bound is calibrated to."""
    validation_share: float = 0.1
    """Share of the sequences that decide and calibrate, and are not learned from."""
    max_tokens: int = 100_000
    """Tokens to learn from; of longer traces, sequences are drawn at random."""
    gate_threshold: float = 0.8
    """Recall under which the copy of a gate is fine-tuned."""
    prefill_share: float = 0.15
    """Share of the tokens shown once more to the history predictor as in a prefill: without a past."""
    history: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of HistoryPredictor."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64, 256)
    """Tokens of the batches that the bound is calibrated on."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.distances or min(self.distances) < 1:
            raise ValueError(f"distances must be at least 1, got {self.distances}")
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise ValueError(f"kinds must be among {', '.join(KINDS)}, got {', '.join(unknown)}")
        if not self.kinds:
            raise ValueError("kinds must hold at least one")
        for name in ("validation_share", "quantile"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.prefill_share <= 1:
            raise ValueError(f"prefill_share must be from 0 to 1, got {self.prefill_share}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")


class LayerInputs:
    """Inputs of each kind of predictor for a trace's tokens at one source layer."""

    def __init__(self, trace: RoutingTrace, layer: int, history: Callable[[int], FloatArray] | None) -> None:
        self.layer = layer
        self._trace = trace
        self._history = history
        self._made: tuple[int, FloatArray] | None = None

    def features(self, kind: str, target: int) -> FloatArray:
        """X for a predictor of this kind, shape (T, F)."""
        if kind == "gate":
            hidden_TH: FloatArray = np.asarray(self._trace.hidden[self.layer])
            return hidden_TH
        if kind == "history":
            assert self._history is not None, "history must be among the configured kinds"
            if self._made is None or self._made[0] != target:
                self._made = (target, self._history(target))
            return self._made[1]
        experts_Tk, weights_Tk = self._trace.experts_TLk[:, self.layer], self._trace.weights_TLk[:, self.layer]
        return one_hot(np.asarray(experts_Tk), self._trace.num_experts, values_nk=choice_values(weights_Tk))

    def routing(self, target: int) -> FloatArray:
        """y: 1 where a token went to an expert of `target`, shape (T, E)."""
        return one_hot(np.asarray(self._trace.experts_TLk[:, target]), self._trace.num_experts)


def inputs_by_layer(trace: RoutingTrace, config: FitConfig) -> Iterator[LayerInputs]:
    """The inputs of each source layer, in order. Those of a layer are valid until the iterator advances."""
    if "history" in config.kinds:
        for layer, features in TraceFeatures(trace, config.features):
            yield LayerInputs(trace, layer, features)
    else:
        for layer in range(trace.num_layers):
            yield LayerInputs(trace, layer, None)


def fit_predictors(
    trace: RoutingTrace,
    config: FitConfig,
    *,
    gates: Mapping[int, Gate] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PredictorSet:
    """Fit, measure, choose and calibrate for every layer and distance.

    Args:
        gates: by MoE layer, the model's routers; the gate predictor starts from zero where one is not given.
        on_progress: called with the number of pairs done and of all pairs.
    Raises: ValueError if the trace has fewer than two sequences or too few layers for any distance.
    """
    learning, held_out = divide(trace, config)
    pairs_of = [
        (layer, distance)
        for layer in range(trace.num_layers)
        for distance in sorted(set(config.distances))
        if layer + distance < trace.num_layers
    ]
    if not pairs_of:
        raise ValueError(f"distances must hold one below the {trace.num_layers} layers, got {config.distances}")
    costs = CostMeter(config.features, num_layers=trace.num_layers, num_experts=trace.num_experts, top_k=trace.top_k)
    pairs: dict[tuple[int, int], PairPredictor] = {}
    with one_blas_thread():
        for ours, theirs in zip(inputs_by_layer(learning, config), inputs_by_layer(held_out, config), strict=True):
            for distance in sorted(set(config.distances)):
                target = ours.layer + distance
                if target >= trace.num_layers:
                    continue
                fitted = fit_kinds(learning, ours, target, config, gate=(gates or {}).get(target))
                pairs[ours.layer, distance] = choose_and_calibrate(fitted, theirs, target, config, costs)
                if on_progress is not None:
                    on_progress(len(pairs), len(pairs_of))
    return PredictorSet(
        model=trace.metadata.model,
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        features=config.features,
        pairs=pairs,
    )


def divide(trace: RoutingTrace, config: FitConfig) -> tuple[RoutingTrace, RoutingTrace]:
    """The sequences to learn from and those to measure on, of at most `max_tokens` in all."""
    if trace.num_sequences < 2:
        raise ValueError(f"trace must have at least 2 sequences, got {trace.num_sequences}")
    if trace.num_tokens > config.max_tokens:
        order = np.random.default_rng(config.seed).permutation(trace.num_sequences)
        lengths = np.diff(trace.sequence_starts_S1)[order]
        num_kept = max(2, int(np.searchsorted(np.cumsum(lengths), config.max_tokens, side="right")))
        trace = trace.take_sequences(np.sort(order[:num_kept]))
    return trace.split(test_share=config.validation_share, seed=config.seed)


def fit_kinds(
    trace: RoutingTrace, inputs: LayerInputs, target: int, config: FitConfig, *, gate: Gate | None = None
) -> dict[str, LoadPredictor]:
    """A fitted predictor of each kind that the trace allows; popularity always, as the baseline."""
    routing_TE = inputs.routing(target)
    fitted: dict[str, LoadPredictor] = {}
    for kind in KINDS:
        if kind not in config.kinds and kind != "popularity":
            continue
        if kind == "gate" and inputs.layer not in trace.hidden:
            continue
        features_TF = inputs.features(kind, target)
        if kind == "popularity":
            fitted[kind] = PopularityPredictor(top_k=trace.top_k).fit_recording(features_TF, routing_TE)
        elif kind == "transition":
            fitted[kind] = TransitionPredictor(top_k=trace.top_k).fit(features_TF, routing_TE)
        elif kind == "history":
            features_TF, labels_TE = _with_prefill(features_TF, routing_TE, trace, inputs.layer, config)
            history = HistoryPredictor(**{"top_k": trace.top_k, "random_state": config.seed, **config.history})
            fitted[kind] = history.fit(features_TF, labels_TE)
        else:
            fitted[kind] = _fit_gate(features_TF, routing_TE, trace, gate, config)
    return fitted


def measured(
    fitted: Mapping[str, LoadPredictor], inputs: LayerInputs, target: int, costs: CostMeter
) -> tuple[Candidate, ...]:
    """Recall on held-out tokens and cost of each fitted kind. Popularity learns on while it is measured."""
    routing_TE = inputs.routing(target)
    return tuple(
        Candidate(
            name=kind,
            score=_recall(kind, predictor, inputs, target, routing_TE),
            cost_us=costs.microseconds(kind, predictor, inputs.layer),
        )
        for kind, predictor in fitted.items()
    )


def _recall(kind: str, predictor: LoadPredictor, inputs: LayerInputs, target: int, routing_TE: FloatArray) -> float:
    if isinstance(predictor, PopularityPredictor):
        return OnlinePopularity(predictor).recall(routing_TE)
    return predictor.score(inputs.features(kind, target), routing_TE)


def choose_among(candidates: tuple[Candidate, ...], layer: int, config: FitConfig) -> Choice:
    """Choose among the configured kinds. Raises ValueError if the trace allowed none of them."""
    candidates = tuple(candidate for candidate in candidates if candidate.name in config.kinds)
    if not candidates:
        raise ValueError(f"kinds must hold one that layer {layer} of the trace allows, got {', '.join(config.kinds)}")
    return choose(candidates, config.tolerance)


def choose_and_calibrate(
    fitted: Mapping[str, LoadPredictor], inputs: LayerInputs, target: int, config: FitConfig, costs: CostMeter
) -> PairPredictor:
    """Measure each predictor on held-out tokens, choose among the configured kinds, calibrate choice and baseline."""
    candidates = measured(fitted, inputs, target, costs)
    choice = choose_among(candidates, inputs.layer, config)
    chosen = fitted[choice.name]
    popularity = fitted["popularity"]
    assert isinstance(popularity, PopularityPredictor)
    return PairPredictor(
        layer=inputs.layer,
        distance=target - inputs.layer,
        choice=choice,
        candidates=candidates,
        predictor=chosen,
        popularity=popularity,
        quantile=calibrate(choice.name, chosen, inputs, target, config),
        popularity_quantile=calibrate("popularity", popularity, inputs, target, config),
    )


def calibrate(kind: str, predictor: LoadPredictor, inputs: LayerInputs, target: int, config: FitConfig) -> LoadQuantile:
    """The bound of the load of batches drawn from held-out tokens."""
    routing_TE = inputs.routing(target)
    sizes = [size for size in config.batch_sizes if size <= len(routing_TE)]
    probabilities_TE = predictor.predict_proba(inputs.features(kind, target))
    batches = draw_batches(probabilities_TE, routing_TE, sizes=sizes, seed=config.seed)
    if isinstance(predictor, PopularityPredictor):
        batches = online_batches(predictor, batches)
    return LoadQuantile(config.quantile).fit(batches)


def online_batches(popularity: PopularityPredictor, batches: LoadBatches) -> LoadBatches:
    """The same batches as popularity forecasts them when it learns from each before the next."""
    mean_BE = OnlinePopularity(popularity).loads(batches.load_BE, batches.num_tokens_B)
    variance_BE = mean_BE * (1 - mean_BE / batches.num_tokens_B[:, np.newaxis])
    return LoadBatches(
        mean_BE=mean_BE,
        variance_BE=np.maximum(variance_BE, 0),
        load_BE=batches.load_BE,
        num_tokens_B=batches.num_tokens_B,
    )


def _with_prefill(
    features_TF: FloatArray, routing_TE: FloatArray, trace: RoutingTrace, layer: int, config: FitConfig
) -> tuple[FloatArray, FloatArray]:
    """The tokens, and a part of them once more without a past, as the tokens of a prompt are."""
    decoded = np.flatnonzero(np.asarray(trace.phase_T) != PREFILL)
    random = np.random.default_rng(config.seed)
    again = random.permutation(decoded)[: round(config.prefill_share * len(decoded))]
    blank_nF = features_TF[again]
    blank_nF[:, config.features.num_above(layer, num_experts=trace.num_experts, top_k=trace.top_k) :] = 0
    return np.concatenate([features_TF, blank_nF]), np.concatenate([routing_TE, routing_TE[again]])


def _fit_gate(
    hidden_TH: FloatArray, routing_TE: FloatArray, trace: RoutingTrace, gate: Gate | None, config: FitConfig
) -> LoadPredictor:
    from moeless_predictors.gate import GatePredictor  # the one kind that needs torch

    predictor = GatePredictor(threshold=config.gate_threshold, top_k=trace.top_k, random_state=config.seed)
    copied = {} if gate is None else {"weight": gate.weight, "bias": gate.bias, "scoring": gate.scoring}
    return predictor.fit(hidden_TH, routing_TE, groups=trace.sequence_of_T, **copied)
