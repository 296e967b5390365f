from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless.core.plan import Plan
from moeless.planning.rollout import Phase, Rollout, RolloutOrderError, TableVersion, rollout_steps
from tests.support.planning import plan_of

BEFORE = plan_of(3, [{0: 1.0}, {0: 1.0}], version=4)
AFTER = plan_of(3, [{0: 0.5, 1: 0.5}, {2: 1.0}], version=5)
# Keys are expert × 3 + worker.
STARTED, DROPPED = [1, 5], [3]


def rollout(before: Plan = BEFORE, after: Plan = AFTER) -> Rollout:
    return Rollout(before, after, epoch=2)


def test_the_steps_are_start_publish_acknowledge_drain_in_this_order() -> None:
    steps = rollout_steps(BEFORE, AFTER)
    assert [step.phase for step in steps] == [
        Phase.START,
        Phase.PUBLISH,
        Phase.ACKNOWLEDGE,
        Phase.DRAIN,
        Phase.DONE,
    ]
    assert (steps[0].keys.tolist(), steps[3].keys.tolist()) == (STARTED, DROPPED)


def test_a_rollout_goes_through_the_steps() -> None:
    change = rollout()
    assert (change.phase, change.start_keys.tolist()) == (Phase.START, STARTED)
    change.mark_warm(np.array([1]))
    assert change.phase is Phase.START
    change.mark_warm(np.array([5]))
    assert change.phase is Phase.PUBLISH
    table = change.publish(["a", "b"], in_force=BEFORE)
    assert (table, change.phase) == ((2, 5), Phase.ACKNOWLEDGE)
    change.acknowledge("a", table)
    assert (change.phase, change.drain_keys.tolist()) == (Phase.ACKNOWLEDGE, [])
    change.acknowledge("b", table)
    assert (change.phase, change.drain_keys.tolist()) == (Phase.DRAIN, DROPPED)
    change.evict(np.array(DROPPED))
    assert change.phase is Phase.DONE


def test_a_plan_is_not_published_before_its_instances_are_warm() -> None:
    change = rollout()
    change.mark_warm(np.array([1]))
    with pytest.raises(RolloutOrderError, match=r"before table \(2, 5\) is published, got L00.E001 cold on worker 2"):
        change.publish([], in_force=BEFORE)
    assert change.phase is Phase.START


def test_an_instance_of_the_plan_that_was_evicted_meanwhile_is_cold() -> None:
    change = rollout()
    change.mark_warm(np.array(STARTED))
    without_expert_0 = plan_of(3, [{}, {0: 1.0}])
    with pytest.raises(RolloutOrderError, match=r"got L00.E000 cold on worker 0"):
        change.publish([], in_force=without_expert_0)


def test_what_was_started_meanwhile_and_is_left_out_is_drained_too() -> None:
    change = rollout()
    change.mark_warm(np.array(STARTED))
    change.publish([], in_force=plan_of(3, [{0: 1.0}, {0: 0.5, 1: 0.5}]))
    assert change.drain_keys.tolist() == [3, 4]


def test_what_was_started_for_the_plan_and_is_left_out_after_all_is_drained_too() -> None:
    change = rollout()
    change.mark_warm(np.array([1]))
    change.publish([], in_force=BEFORE, plan=plan_of(3, [{0: 1.0}, {0: 1.0}]))
    assert change.drain_keys.tolist() == STARTED


def test_an_acknowledgement_of_an_older_table_does_not_count() -> None:
    change = rollout()
    change.mark_warm(np.array(STARTED))
    change.publish(["a"], in_force=BEFORE)
    for older in (TableVersion(2, 4), TableVersion(1, 99)):
        change.acknowledge("a", older)
        assert change.phase is Phase.ACKNOWLEDGE
    change.acknowledge("a", TableVersion(3, 1))
    assert change.phase is Phase.DRAIN


def test_an_engine_that_died_is_not_waited_for() -> None:
    change = rollout()
    change.mark_warm(np.array(STARTED))
    change.publish(["a"], in_force=BEFORE)
    change.remove_engine("a")
    assert change.phase is Phase.DRAIN


def test_nothing_is_evicted_before_every_engine_has_acknowledged() -> None:
    change = rollout()
    change.mark_warm(np.array(STARTED))
    change.publish(["a"], in_force=BEFORE)
    with pytest.raises(RolloutOrderError, match=r"drained before they are evicted, got 1 in phase acknowledge"):
        change.evict(np.array(DROPPED))


def test_a_table_is_acknowledged_after_it_is_published_and_published_once() -> None:
    change = rollout()
    with pytest.raises(RolloutOrderError, match="published before it is acknowledged"):
        change.acknowledge("a", TableVersion(2, 5))
    change.mark_warm(np.array(STARTED))
    change.publish([], in_force=BEFORE)
    with pytest.raises(RolloutOrderError, match="published once"):
        change.publish([], in_force=BEFORE)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans for 2 layers of 3 experts on 3 workers; functions may have no instance."""
    has_LEW = np.array(draw(st.lists(st.booleans(), min_size=18, max_size=18))).reshape(2, 3, 3)
    shares_LEW = has_LEW / np.maximum(has_LEW.sum(axis=2, keepdims=True), 1)
    return Plan.from_dense(has_LEW, shares_LEW, version=draw(st.integers(1, 9)))


@given(plans(), plans())
def test_between_any_two_plans_the_steps_add_up(before: Plan, after: Plan) -> None:
    start, publish, _, drain, _ = rollout_steps(before, after)
    held = np.union1d(before.keys_N, start.keys)
    assert set(publish.keys) <= set(held)
    assert np.setdiff1d(held, drain.keys).tolist() == after.keys_N.tolist()
    change = rollout(before, after)
    change.mark_warm(start.keys)
    change.publish([], in_force=before)
    assert change.drain_keys.tolist() == drain.keys.tolist()
