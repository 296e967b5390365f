from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless_predictors.features import FeatureConfig, TraceFeatures, experts_as_bits
from moeless_predictors.live_features import LiveFeatures, StepRows
from moeless_predictors.traces import DECODE, PREFILL, RoutingTrace
from moeless_predictors.traces.synthetic import synthetic_trace


def _with_prefill(trace: RoutingTrace, num_prompt_tokens: int) -> RoutingTrace:
    starts = trace.sequence_starts_S1
    within_T = np.arange(trace.num_tokens) - np.repeat(starts[:-1], np.diff(starts))
    return RoutingTrace.from_arrays(
        trace.metadata,
        experts_TLk=trace.experts_TLk,
        weights_TLk=trace.weights_TLk,
        sequence_lengths_S=np.diff(starts),
        phase_T=np.where(within_T < num_prompt_tokens, PREFILL, DECODE),
    )


def _replay(
    trace: RoutingTrace, config: FeatureConfig, distance: int, *, chunk: int, is_followed: Callable[[int], bool]
) -> dict[int, np.ndarray]:
    """Features as a server computes them: all sequences side by side, prompts in chunks. By source layer.

    NaN for the tokens of steps that are not followed.
    """
    live = LiveFeatures(
        config, num_layers=trace.num_layers, num_experts=trace.num_experts, top_k=trace.top_k, num_slots=1
    )
    sources = range(trace.num_layers - distance)
    found = {
        layer: np.full(
            (trace.num_tokens, config.num_features(layer, num_experts=trace.num_experts, top_k=trace.top_k)),
            np.nan,
            np.float32,
        )
        for layer in sources
    }
    next_row = trace.sequence_starts_S1[:-1].tolist()
    ends = trace.sequence_starts_S1[1:].tolist()
    step = -1
    while any(row < end for row, end in zip(next_row, ends, strict=True)):
        spans, rows = [], []
        for sequence, (row, end) in enumerate(zip(next_row, ends, strict=True)):
            if row == end:
                continue
            is_prefill = bool(trace.phase_T[row] == PREFILL)
            count = 1
            while is_prefill and count < chunk and row + count < end and trace.phase_T[row + count] == PREFILL:
                count += 1
            spans.append(StepRows(str(sequence), count, int(trace.positions_T[row]), is_prefill))
            rows += range(row, row + count)
            next_row[sequence] = row + count
        step += 1
        live.begin_step(spans, is_followed=is_followed(step))
        for layer in range(trace.num_layers):
            live.observe(layer, trace.experts_TLk[rows, layer], trace.weights_TLk[rows, layer])
            if layer in sources and is_followed(step):
                found[layer][rows] = live.features(layer, layer + distance)
        live.end_step()
        for sequence, (row, end) in enumerate(zip(next_row, ends, strict=True)):
            if row == end:
                live.forget(str(sequence))
    return found


@pytest.mark.parametrize(("num_experts", "window", "prompt", "chunk"), [(8, 6, 0, 1), (8, 64, 9, 4), (70, 5, 3, 8)])
def test_live_features_are_those_of_the_trace(num_experts: int, window: int, prompt: int, chunk: int) -> None:
    trace = synthetic_trace(
        num_sequences=5, tokens_per_sequence=23, num_layers=4, num_experts=num_experts, top_k=3, seed=1
    )
    trace = _with_prefill(trace, prompt)
    config = FeatureConfig(window=window, layers_above=2, first_layers=1, ranked_layers=1)
    live = _replay(trace, config, 2, chunk=chunk, is_followed=lambda step: True)
    checked = 0
    for layer, features in TraceFeatures(trace, config):
        if layer in live:
            np.testing.assert_allclose(live[layer], features(layer + 2), atol=2e-5)
            checked += 1
    assert checked == 2


@settings(max_examples=25, deadline=None)
@given(
    followed=st.lists(st.booleans(), min_size=1, max_size=12),
    num_experts=st.sampled_from([8, 70]),
    window=st.integers(1, 30),
    prompt=st.integers(0, 6),
    chunk=st.integers(1, 4),
    lengths=st.lists(st.integers(7, 40), min_size=1, max_size=4),
)
def test_steps_that_were_not_followed_are_part_of_the_past(
    followed: list[bool], num_experts: int, window: int, prompt: int, chunk: int, lengths: list[int]
) -> None:
    whole = synthetic_trace(num_sequences=1, tokens_per_sequence=sum(lengths), num_layers=3, num_experts=num_experts)
    trace = RoutingTrace.from_arrays(
        whole.metadata, experts_TLk=whole.experts_TLk, weights_TLk=whole.weights_TLk, sequence_lengths_S=lengths
    )
    trace = _with_prefill(trace, prompt)
    config = FeatureConfig(window=window, layers_above=2)
    all_steps = _replay(trace, config, 1, chunk=chunk, is_followed=lambda step: True)
    some_steps = _replay(trace, config, 1, chunk=chunk, is_followed=lambda step: followed[step % len(followed)])
    for layer, features in some_steps.items():
        is_known = ~np.isnan(features).all(axis=1)
        np.testing.assert_allclose(features[is_known], all_steps[layer][is_known], atol=2e-5)
        assert is_known.any() == any(followed) or len(followed) > max(lengths)


def test_what_is_kept_of_steps_that_are_not_followed_is_bounded() -> None:
    live = LiveFeatures(FeatureConfig(), num_layers=2, num_experts=4, top_k=1)
    for position in range(200):
        live.begin_step([StepRows("a", 1, position)], is_followed=False)
        for layer in range(2):
            live.observe(layer, np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32))
        live.end_step()
        assert len(live._skipped) < 64


def test_a_row_of_a_prompt_knows_nothing_of_its_sequence() -> None:
    trace = _with_prefill(
        synthetic_trace(num_sequences=2, tokens_per_sequence=10, num_layers=2, num_experts=4, top_k=2, seed=0), 6
    )
    config = FeatureConfig(layers_above=1, first_layers=0, ranked_layers=0)
    layer, features = next(iter(TraceFeatures(trace, config)))
    features_TF = features(layer + 1)
    assert not features_TF[trace.phase_T == PREFILL, trace.num_experts :].any()
    assert features_TF[trace.phase_T == DECODE, trace.num_experts :].any(axis=1).all()


def test_features_do_not_depend_on_the_order_of_sequences() -> None:
    trace = synthetic_trace(num_sequences=4, tokens_per_sequence=12, num_layers=3, num_experts=6, top_k=2, seed=3)
    turned = trace.take_sequences([3, 2, 1, 0])
    rows = np.concatenate([np.arange(s * 12, (s + 1) * 12) for s in (3, 2, 1, 0)])
    config = FeatureConfig(window=5)
    for (layer, ours), (_, theirs) in zip(TraceFeatures(trace, config), TraceFeatures(turned, config), strict=True):
        if layer + 1 < 3:
            np.testing.assert_allclose(ours(layer + 1)[rows], theirs(layer + 1), atol=1e-6)


def test_a_token_that_occurs_again_retrieves_what_followed_the_first_time() -> None:
    random = np.random.default_rng(0)
    tokens = [np.stack([random.permutation(16)[:2] for _ in range(3)]) for _ in range(6)]
    experts_TLk = np.stack([tokens[i] for i in (0, 1, 2, 3, 4, 5, 1)])
    trace = RoutingTrace.from_arrays(
        synthetic_trace(num_sequences=1, tokens_per_sequence=1, num_layers=3, num_experts=16, top_k=2).metadata,
        experts_TLk=experts_TLk,
        weights_TLk=np.full(experts_TLk.shape, 0.5),
        sequence_lengths_S=[7],
    )
    features = TraceFeatures(trace, FeatureConfig(context_weight=0.0))
    _, at_first = next(iter(features))
    retrieved_E = at_first(1)[-1, -16:]
    assert sorted(np.argsort(-retrieved_E)[:2].tolist()) == sorted(tokens[1][1].tolist())


def test_bit_sets_hold_the_experts() -> None:
    bits = experts_as_bits(np.array([[0, 63, 64, 129]]), 130)
    assert bits.tolist() == [[1 | 1 << 63, 1, 2]]


@pytest.mark.parametrize(
    ("name", "value"), [("window", 0), ("layer_decay", 0.0), ("sharpness", -1.0), ("sharpness", 60.0)]
)
def test_a_setting_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"features.{name} must be .* got {value}"):
        FeatureConfig(**{name: value})
