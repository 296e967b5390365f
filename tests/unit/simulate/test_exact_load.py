from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeless.core.arrays import FloatArray
from moeless.core.call_cost import CallCost
from moeless.simulate.exact_load import exact_parts

FREE = CallCost()
FLOOR = CallCost(floor_tokens=100)


def busy_W(
    tokens: list[int], *, max_instances: int, cost: CallCost = FREE, speed_W: FloatArray | None = None
) -> list[float]:
    """Cost on each of some workers, by default four."""
    speeds = np.ones(4) if speed_W is None else speed_W
    tokens_LI, worker_LI = exact_parts(np.array([tokens]), speeds, cost, max_instances=max_instances)
    work_I = np.array([cost(float(part)) for part in tokens_LI[0]])
    found: list[float] = (np.bincount(worker_LI[0], weights=work_I, minlength=len(speeds)) / speeds).tolist()
    return found


def test_without_replicas_the_largest_call_decides() -> None:
    assert max(busy_W([400, 0, 0, 0], max_instances=4)) == 400
    assert sorted(busy_W([40, 30, 20, 10, 5], max_instances=5)) == [15, 20, 30, 40]


def test_replicas_split_what_is_large_as_evenly_as_there_are_instances() -> None:
    assert busy_W([400, 0, 0, 0], max_instances=7) == pytest.approx([100] * 4, rel=0.01)
    assert max(busy_W([400, 0, 0, 0], max_instances=5)) == 200


def test_calls_that_only_read_weights_are_not_split() -> None:
    assert sorted(busy_W([90, 80, 70, 60, 50], max_instances=20, cost=FLOOR)) == [100, 100, 100, 200]


def test_a_fast_worker_gets_more() -> None:
    speeds = np.array([3.0, 1.0])
    assert busy_W([400, 0], max_instances=4, speed_W=speeds) == pytest.approx([100, 100], rel=0.01)


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(0, 500), min_size=1, max_size=12),
    extra=st.integers(0, 8),
    floor=st.sampled_from([0.0, 50.0]),
)
def test_every_token_is_computed_within_the_instances(tokens: list[int], extra: int, floor: float) -> None:
    cost = CallCost(floor_tokens=floor)
    counts_LE = np.array([tokens, tokens[::-1]])
    tokens_LI, worker_LI = exact_parts(counts_LE, np.ones(4), cost, max_instances=len(tokens) + extra)
    assert tokens_LI.shape == worker_LI.shape == (2, len(tokens) + extra)
    assert tokens_LI.sum(axis=1).tolist() == [sum(tokens)] * 2
    assert (tokens_LI >= 0).all()
    assert 0 <= worker_LI.min() <= worker_LI.max() < 4
    assert max(busy_W(tokens, max_instances=len(tokens) + extra, cost=cost)) >= sum(map(cost, tokens)) / 4 - 1e-9


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 500), min_size=4, max_size=12))
def test_more_instances_are_never_worse(tokens: list[int]) -> None:
    few, many = (max(busy_W(tokens, max_instances=size, cost=FLOOR)) for size in (len(tokens), 3 * len(tokens)))
    assert many <= few
