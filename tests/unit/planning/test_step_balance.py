from __future__ import annotations

import itertools
from dataclasses import replace
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.core.call_cost import CallCost
from moeless.core.errors import ConfigError
from moeless.planning.step_balance import Replicas, balanced_split

COSTS = st.builds(
    CallCost,
    call_tokens=st.sampled_from([0.0, 2.0, 9.0]),
    floor_tokens=st.sampled_from([0.0, 15.0, 150.0]),
    link_tokens=st.sampled_from([0.0, 0.3, 6.0]),
)


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[int], list[list[int]], list[float]]:
    num_workers = draw(st.integers(2, 6))
    idle = st.just([0.0] * num_workers)
    busy_W = draw(idle | st.lists(st.floats(0, 500), min_size=num_workers, max_size=num_workers))
    workers = st.lists(st.integers(0, num_workers - 1), min_size=2, max_size=num_workers, unique=True)
    workers_F = draw(st.lists(workers, min_size=1, max_size=6))
    most = draw(st.sampled_from([100, 800]))
    tokens_F = draw(st.lists(st.integers(0, most), min_size=len(workers_F), max_size=len(workers_F)))
    return tokens_F, workers_F, busy_W


def split_layer(
    tokens_F: list[int],
    workers_F: list[list[int]],
    shares_F: list[list[float]],
    busy_W: list[float],
    cost: CallCost,
    speed_W: list[float] | None = None,
) -> list[list[int]]:
    """Of one layer, as lists by function; adds to `busy_W`."""
    busy_LW = np.array([busy_W], dtype=np.float64)
    replicas = Replicas.of_one_layer(workers_F, shares_F)
    split_N = balanced_split(
        np.array(tokens_F), replicas, busy_LW, cost, speed_W=None if speed_W is None else np.array(speed_W)
    )
    busy_W[:] = busy_LW[0].tolist()
    return [parts.tolist() for parts in np.split(split_N, replicas.instance_F[1:-1])]


def even(workers_F: list[list[int]]) -> list[list[float]]:
    return [[1 / len(workers)] * len(workers) for workers in workers_F]


def busy(
    split: list[list[int]], workers_F: list[list[int]], busy_W: list[float], cost: CallCost, speed_W: list[float]
) -> list[float]:
    after_W = list(busy_W)
    for parts, workers in zip(split, workers_F, strict=True):
        for tokens, worker in zip(parts, workers, strict=True):
            after_W[worker] += cost(tokens) / speed_W[worker]
    return after_W


@given(layer=layers(), cost=COSTS, speeds=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=6, max_size=6))
def test_every_token_is_computed_once_and_the_workers_times_are_told(
    layer: tuple[list[int], list[list[int]], list[float]], cost: CallCost, speeds: list[float]
) -> None:
    tokens_F, workers_F, busy_W = layer
    speed_W = speeds[: len(busy_W)]
    after_W = list(busy_W)
    split = split_layer(tokens_F, workers_F, even(workers_F), after_W, cost, speed_W=speed_W)
    assert [sum(parts) for parts in split] == tokens_F
    assert [len(parts) for parts in split] == [len(workers) for workers in workers_F]
    assert min(itertools.chain.from_iterable(split)) >= 0
    assert after_W == pytest.approx(busy(split, workers_F, busy_W, cost, speed_W), rel=1e-6, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(layer=layers(), floor=st.sampled_from([0.0, 150.0]))
def test_the_busiest_worker_is_close_to_the_best_that_whole_calls_allow(
    layer: tuple[list[int], list[list[int]], list[float]], floor: float
) -> None:
    tokens_F, workers_F, busy_W = layer
    cost = CallCost(call_tokens=2.0, floor_tokens=floor)
    split = split_layer(tokens_F, workers_F, even(workers_F), list(busy_W), cost)
    ones = [1.0] * len(busy_W)
    best = inf
    for choice in itertools.product(*(range(len(workers)) for workers in workers_F)):
        whole = [
            [tokens if index == chosen else 0 for index in range(len(workers))]
            for tokens, workers, chosen in zip(tokens_F, workers_F, choice, strict=True)
        ]
        best = min(best, max(busy(whole, workers_F, busy_W, cost, ones)))
    # List scheduling of the largest first is within a third of the optimum where all can go anywhere (Graham 1969);
    # here each has its own workers, and a part of a split call is a call.
    assert max(busy(split, workers_F, busy_W, cost, ones)) <= best * 1.5 + 1e-6
    if all(tokens <= floor for tokens in tokens_F) and not any(busy_W):
        assert max(busy(split, workers_F, busy_W, cost, ones)) == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(layer=layers(), cost=COSTS)
def test_a_split_is_no_worse_than_the_shares_where_calls_are_large(
    layer: tuple[list[int], list[list[int]], list[float]], cost: CallCost
) -> None:
    tokens_F, workers_F, busy_W = layer
    tokens_F = [2 * int(cost.floor_tokens) + 2 + tokens for tokens in tokens_F]
    ones = [1.0] * len(busy_W)
    by_shares = []
    for tokens, workers in zip(tokens_F, workers_F, strict=True):
        parts = [tokens // len(workers)] * len(workers)
        parts[0] += tokens - sum(parts)
        by_shares.append(parts)
    split = split_layer(tokens_F, workers_F, even(workers_F), list(busy_W), cost)
    assert max(busy(split, workers_F, busy_W, cost, ones)) <= max(busy(by_shares, workers_F, busy_W, cost, ones)) + 1e-6


@given(found=st.lists(layers(), min_size=1, max_size=3), cost=COSTS)
def test_layers_are_shared_out_together_as_each_alone(
    found: list[tuple[list[int], list[list[int]], list[float]]], cost: CallCost
) -> None:
    num_workers = max(len(busy_W) for _, _, busy_W in found)
    alone = []
    for tokens_F, workers_F, busy_W in found:
        busy_W += [0.0] * (num_workers - len(busy_W))
        alone.append(split_layer(tokens_F, workers_F, even(workers_F), list(busy_W), cost))
    # One layer without such functions stands among them.
    sizes = [len(found[0][0]), 0, *(len(tokens_F) for tokens_F, _, _ in found[1:])]
    workers_F = [workers for _, of_layer, _ in found for workers in of_layer]
    joined = Replicas.of_one_layer(workers_F, even(workers_F))
    replicas = replace(joined, function_L=np.concatenate(([0], np.cumsum(sizes))))
    busy_LW = np.array([found[0][2], [0.0] * num_workers, *(busy_W for _, _, busy_W in found[1:])])
    split_N = balanced_split(np.array([t for tokens, _, _ in found for t in tokens]), replicas, busy_LW, cost)
    assert split_N.tolist() == [part for layer in alone for parts in layer for part in parts]
    assert not busy_LW[1].any()


def test_calls_are_passed_along_to_a_worker_with_room() -> None:
    # Two calls fit only worker 0 and 1, and 1 and 2: the first may have taken what the second needs.
    cost = CallCost(floor_tokens=100)
    busy_W = [0.0, 0.0, 0.0, 0.0]
    workers_F = [[0, 1], [0, 1], [1, 2], [2, 3]]
    split = split_layer([90, 80, 70, 60], workers_F, even(workers_F), busy_W, cost)
    assert busy_W == [100, 100, 100, 100]
    assert all(max(parts) == sum(parts) for parts in split)


def test_a_call_below_the_floor_is_not_split() -> None:
    busy_W = [0.0, 0.0]
    assert split_layer([100], [[0, 1]], [[0.5, 0.5]], busy_W, CallCost(floor_tokens=150)) == [[100, 0]]
    assert busy_W == [150, 0]


def test_tokens_above_the_floor_find_their_level() -> None:
    busy_W = [300.0, 100.0, 0.0]
    split_layer([800], [[0, 1, 2]], [[0.2, 0.3, 0.5]], busy_W, CallCost())
    assert busy_W == pytest.approx([400, 400, 400], rel=0.021)


def test_a_faster_worker_gets_more() -> None:
    busy_W = [0.0, 0.0]
    split_layer([900], [[0, 1]], [[0.5, 0.5]], busy_W, CallCost(), speed_W=[2.0, 1.0])
    assert busy_W == pytest.approx([300, 300], rel=0.021)


def test_what_a_token_costs_its_link_counts() -> None:
    busy_W = [400.0, 0.0]
    # Four more for each token sent: the other functions' 400 weigh as much as 80 tokens.
    split_layer([200], [[0, 1]], [[0.5, 0.5]], busy_W, CallCost(link_tokens=4.0))
    assert busy_W == pytest.approx([700, 700], rel=0.021)


def test_whole_functions_are_dealt_to_the_less_busy() -> None:
    busy_W = [100.0, 0.0, 0.0]
    split = split_layer([5, 5], [[0, 1], [0, 2]], [[1.0, 0.0], [1.0, 0.0]], busy_W, CallCost(floor_tokens=100))
    assert split == [[0, 5], [0, 5]]
    assert busy_W == [100, 100, 100]


@pytest.mark.parametrize("name", ["call_tokens", "floor_tokens", "link_tokens"])
@pytest.mark.parametrize("value", [-1.0, inf, float("nan")])
def test_a_cost_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"call_cost\.{name} must be at least 0 and finite"):
        CallCost(**{name: value})
