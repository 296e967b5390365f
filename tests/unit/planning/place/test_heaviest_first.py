from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.core.arrays import BoolArray, FloatArray, IntArray
from moeless.core.cluster import Cluster, ModelShape
from moeless.core.errors import ConfigError
from moeless.planning.place import InfeasiblePlacementError
from moeless.planning.place.heaviest_first import check_counts, heaviest_first
from tests.support.planning import cluster_of, clusters, fits, min_busiest, model_of


def placed(
    add: list[list[int]], load: list[list[float]], cluster: Cluster, *, has_LEW: BoolArray | None = None
) -> list[list[list[int]]]:
    """The workers of each layer's experts."""
    add_LE, load_LE = np.array(add), np.array(load)
    if has_LEW is None:
        has_LEW = np.zeros((*add_LE.shape, cluster.num_workers), dtype=np.bool_)
    heaviest_first(has_LEW, add_LE, load_LE, cluster, model_of(*add_LE.shape))
    return [[np.flatnonzero(has_W).tolist() for has_W in has_EW] for has_EW in has_LEW]


def in_place(num_workers: int, *layers: list[list[int]]) -> BoolArray:
    has_LEW = np.zeros((len(layers), len(layers[0]), num_workers), dtype=np.bool_)
    for layer, experts in enumerate(layers):
        for expert, workers in enumerate(experts):
            has_LEW[layer, expert, workers] = True
    return has_LEW


def busiest(has_EW: BoolArray, load_E: FloatArray, speed_W: FloatArray) -> float:
    """Compute the loads if a function's tokens are split equally."""
    weight_E = load_E / np.maximum(has_EW.sum(axis=1), 1)
    return float((weight_E @ has_EW / speed_W).max())


@st.composite
def problems(draw: st.DrawFn) -> tuple[BoolArray, IntArray, FloatArray, Cluster, ModelShape]:
    """Some instances in place and others to add, with about as much memory as they need."""
    model = model_of(draw(st.integers(1, 3)), draw(st.integers(1, 4)))
    shape = (model.num_layers, model.num_experts)
    cluster = draw(clusters(min_memory=0, max_memory=model.num_layers * model.num_experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    has_LEW = np.zeros((*shape, cluster.num_workers), dtype=np.bool_)
    for worker, capacity in enumerate(cluster.capacity_W(model).tolist()):
        chosen = rng.permutation(model.num_layers * model.num_experts)[: rng.integers(0, capacity, endpoint=True)]
        has_LEW.reshape(-1, cluster.num_workers)[chosen, worker] = True
    max_LE = cluster.num_workers - has_LEW.sum(axis=2)
    add_LE = rng.integers(0, max_LE, endpoint=True) * (rng.random(shape) < draw(st.sampled_from([0.3, 0.8])))
    return has_LEW, add_LE, rng.lognormal(0.0, 1.0, shape), cluster, model


def test_the_heaviest_goes_first_and_each_to_the_worker_that_it_leaves_least_busy() -> None:
    assert placed([[1, 1, 1, 1]], [[4.0, 5.0, 7.0, 3.0]], cluster_of([9, 9])) == [[[1], [1], [0], [0]]]


def test_ties_go_to_the_lower_expert_and_the_lower_worker() -> None:
    assert placed([[1, 1, 1, 1]], [[2.0, 2.0, 2.0, 2.0]], cluster_of([9, 9, 9])) == [[[0], [1], [2], [0]]]


def test_a_fast_worker_gets_as_much_more() -> None:
    cluster = cluster_of([9, 9], speeds=[1.0, 3.0])
    assert placed([[1, 1, 1, 1]], [[5.0, 4.0, 3.0, 2.0]], cluster) == [[[1], [1], [0], [1]]]


def test_an_instance_weighs_its_part_of_the_functions_load() -> None:
    # 10 in two parts of 5: less than the 6 that goes first.
    assert placed([[2, 1, 1]], [[10.0, 6.0, 2.0]], cluster_of([9, 9, 9])) == [[[1, 2], [0], [1]]]


def test_instances_of_a_function_go_to_different_workers() -> None:
    assert placed([[2, 1]], [[2.0, 9.0]], cluster_of([9, 9])) == [[[0, 1], [0]]]


def test_what_is_in_place_counts_and_stays() -> None:
    has_LEW = in_place(2, [[0], [0], []])
    assert placed([[0, 0, 1]], [[1.0, 1.0, 5.0]], cluster_of([9, 9]), has_LEW=has_LEW) == [[[0], [0], [1]]]


def test_a_worker_without_memory_gets_nothing() -> None:
    assert placed([[1, 1]], [[5.0, 4.0]], cluster_of([0, 2], speeds=[9.0, 1.0])) == [[[1], [1]]]


def test_the_first_layer_leaves_the_others_their_part_of_a_fast_worker() -> None:
    cluster = cluster_of([2, 4], speeds=[100.0, 1.0])
    assert placed([[1, 1], [1, 1]], [[5.0, 4.0], [5.0, 4.0]], cluster) == [[[0], [1]], [[0], [1]]]


def test_a_layer_takes_more_than_its_part_where_it_must() -> None:
    cluster = cluster_of([4, 1], speeds=[1.0, 1.0])
    assert placed([[1, 1, 1], [1, 0, 0]], [[5.0, 4.0, 3.0], [1.0, 0.0, 0.0]], cluster)[0] == [[0], [1], [0]]


def test_instances_make_room_where_memory_is_only_on_workers_that_have_the_function() -> None:
    # The second copy of expert 1 needs w0, where expert 0 is; w1 has memory, and has expert 1 already.
    has_LEW = in_place(2, [[0], [1]])
    assert placed([[0, 1]], [[1.0, 1.0]], cluster_of([1, 2]), has_LEW=has_LEW) == [[[1], [0, 1]]]


def test_room_is_made_along_a_chain() -> None:
    # Of expert 2 only w0 has no copy. Its expert 0 cannot go where memory is free, only expert 1 of w1 can.
    has_LEW = in_place(3, [[0, 2], [1], [1, 2]])
    workers = placed([[0, 0, 1]], [[1.0, 1.0, 1.0]], cluster_of([1, 2, 3]), has_LEW=has_LEW)
    assert workers == [[[1, 2], [2], [0, 1, 2]]]


def test_without_room_for_all_the_function_is_named() -> None:
    # There is memory for four, but w1 can use only two of its three places.
    with pytest.raises(
        InfeasiblePlacementError,
        match="layer 0, expert 1: no worker has memory for another instance, and none can be freed",
    ):
        placed([[2, 2]], [[2.0, 1.0]], cluster_of([1, 3]))


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        ([[1]], ConfigError, "counts_LE must be of 1 layers and 2 experts, got (1, 1)"),
        ([[1, -1]], ConfigError, "counts_LE must be >= 0, got -1"),
        (
            [[1, 3]],
            InfeasiblePlacementError,
            "counts_LE must be at most the 2 workers (a worker hosts a function once), got 3",
        ),
        (
            [[2, 2]],
            InfeasiblePlacementError,
            "counts_LE must sum to at most the 3 instances that fit the workers' memory, got 4",
        ),
    ],
)
def test_counts_that_cannot_be_placed_are_refused(
    counts: list[list[int]], error: type[ConfigError], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_counts(np.array(counts), cluster_of([1, 2]), model_of(1, 2))
    assert (caught.type, str(caught.value)) == (error, message)


def test_counts_that_just_fit_are_accepted() -> None:
    check_counts(np.array([[1, 2]]), cluster_of([1, 2]), model_of(1, 2))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_whatever_fits_is_placed_within_memory_and_nothing_else_is(
    problem: tuple[BoolArray, IntArray, FloatArray, Cluster, ModelShape],
) -> None:
    has_LEW, add_LE, load_LE, cluster, model = problem
    counts_LE, capacity_W = has_LEW.sum(axis=2) + add_LE, cluster.capacity_W(model)
    if not fits(counts_LE, capacity_W):
        with pytest.raises(InfeasiblePlacementError):
            heaviest_first(has_LEW, add_LE, load_LE, cluster, model)
        return
    heaviest_first(has_LEW, add_LE, load_LE, cluster, model)
    np.testing.assert_array_equal(has_LEW.sum(axis=2), counts_LE)
    assert (has_LEW.sum(axis=(0, 1)) <= capacity_W).all()


@settings(max_examples=100, deadline=None)
@given(problems())
def test_nothing_in_place_moves_while_there_is_memory(
    problem: tuple[BoolArray, IntArray, FloatArray, Cluster, ModelShape],
) -> None:
    has_LEW, add_LE, load_LE, cluster, model = problem
    plenty = cluster_of([model.num_layers * model.num_experts] * cluster.num_workers, speeds=cluster.speed_W.tolist())
    after_LEW = has_LEW.copy()
    heaviest_first(after_LEW, add_LE, load_LE, plenty, model)
    assert after_LEW[has_LEW].all()


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_the_order_of_layers_and_experts_does_not_matter(
    problem: tuple[BoolArray, IntArray, FloatArray, Cluster, ModelShape], seed: int
) -> None:
    _, add_LE, load_LE, cluster, model = problem
    plenty = cluster_of([model.num_layers * model.num_experts] * cluster.num_workers, speeds=cluster.speed_W.tolist())
    rng = np.random.default_rng(seed)
    layers, experts = rng.permutation(model.num_layers), rng.permutation(model.num_experts)
    # Nothing is in place: with workers that host the same, rounding would break ties.
    has_LEW, other_LEW = np.zeros((2, *add_LE.shape, cluster.num_workers), dtype=np.bool_)
    heaviest_first(has_LEW, add_LE, load_LE, plenty, model)
    heaviest_first(other_LEW, add_LE[layers][:, experts], load_LE[layers][:, experts], plenty, model)
    np.testing.assert_array_equal(other_LEW, has_LEW[layers][:, experts])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.integers(1, 3))
def test_equal_workers_are_within_grahams_bound_of_the_optimum(loads: list[int], num_workers: int) -> None:
    load_E, speed_W = np.array(loads, dtype=np.float64), np.ones(num_workers)
    has_LEW = np.zeros((1, len(loads), num_workers), dtype=np.bool_)
    cluster, model = cluster_of([len(loads)] * num_workers), model_of(1, len(loads))
    heaviest_first(has_LEW, np.ones((1, len(loads)), dtype=np.int64), load_E[np.newaxis], cluster, model)
    # Graham (1969): heaviest first is at most 4/3 - 1/(3W) times the optimum.
    bound = (4 / 3 - 1 / (3 * num_workers)) * min_busiest(load_E, speed_W)
    assert busiest(has_LEW[0], load_E, speed_W) <= bound + 1e-9


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=6),
    st.lists(st.sampled_from([0.3, 1.0, 1.5, 4.0]), min_size=1, max_size=3),
)
def test_workers_of_different_speeds_are_within_the_bound_of_the_optimum(loads: list[int], speeds: list[float]) -> None:
    load_E, speed_W = np.array(loads, dtype=np.float64), np.array(speeds)
    has_LEW = np.zeros((1, len(loads), len(speeds)), dtype=np.bool_)
    cluster, model = cluster_of([len(loads)] * len(speeds), speeds=speeds), model_of(1, len(loads))
    heaviest_first(has_LEW, np.ones((1, len(loads)), dtype=np.int64), load_E[np.newaxis], cluster, model)
    # Gonzalez, Ibarra and Sahni (1977): at most 2 - 2/(W + 1) times.
    bound = (2 - 2 / (len(speeds) + 1)) * min_busiest(load_E, speed_W)
    assert busiest(has_LEW[0], load_E, speed_W) <= bound + 1e-9
