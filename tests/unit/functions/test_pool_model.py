"""The pool against a model of it that fits a dictionary: any sequence of starts, calls, drains and evictions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from moeless.core.errors import ChecksumError, FunctionUnavailableError, MoelessError
from moeless.core.expert import FunctionId
from moeless.functions.pool import InstancePool, InstanceState
from moeless.packages.packed_model import PackedModel
from tests.support.packed import damage, layout, write_packed

NUM_LAYERS, NUM_EXPERTS, CAPACITY = 2, 3, 4
INSTANCE_BYTES = 4 * 3 * 8 * 16
DAMAGED = FunctionId(1, 2)

functions = st.builds(FunctionId, st.integers(0, NUM_LAYERS - 1), st.integers(0, NUM_EXPERTS - 1))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    small = layout(hidden_size=8, intermediate_size=16)
    packed = write_packed(tmp_path_factory.mktemp("model") / "packed", [small] * NUM_LAYERS, num_experts=NUM_EXPERTS)
    damage(packed, DAMAGED)
    return packed


def test_any_history_leaves_the_pool_as_the_model_says(packed: PackedModel) -> None:
    def machine() -> PoolMachine:
        return PoolMachine(packed)

    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None))


class PoolMachine(RuleBasedStateMachine):
    """`warm` maps each warm function to when it was last used; `busy` counts its calls."""

    def __init__(self, packed: PackedModel) -> None:
        super().__init__()
        self.now_s = 0.0
        self.pool = InstancePool(
            packed, dtype=torch.float32, capacity_bytes=CAPACITY * INSTANCE_BYTES, clock=lambda: self.now_s
        )
        self.warm: dict[FunctionId, float] = {}
        self.busy: dict[FunctionId, int] = {}
        self.calls: list[tuple[list[FunctionId], Callable[[], None]]] = []
        self.cold_starts = self.evictions = 0

    @rule(seconds=st.integers(1, 5))
    def time_passes(self, seconds: int) -> None:
        self.now_s += seconds

    @rule(wanted=functions)
    def start(self, wanted: FunctionId) -> None:
        expected = self.expect_start(wanted)
        if isinstance(expected, bool):
            assert self.pool.start(wanted) is expected
        else:
            with pytest.raises(expected, match=str(wanted)):
                self.pool.start(wanted)

    @rule(layer=st.integers(0, NUM_LAYERS - 1), experts=st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1))
    def begin_call(self, layer: int, experts: set[int]) -> None:
        numbers = np.array(sorted(experts))
        wanted = [FunctionId(layer, expert) for expert in sorted(experts)]
        held = [function for function in wanted if function in self.warm]
        failure = None
        self.hold(held, 1)
        for function in [function for function in wanted if function not in held]:
            outcome = self.expect_start(function)
            if not isinstance(outcome, bool):
                failure = outcome
                break
            held.append(function)
            self.hold([function], 1)
        if failure is not None:
            with pytest.raises(failure):
                self.pool.acquire(layer, numbers)
            self.hold(held, -1)
            return
        self.pool.acquire(layer, numbers)
        self.calls.append((wanted, lambda: self.pool.release(layer, numbers)))

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def end_call(self, data: st.DataObject) -> None:
        wanted, end = self.calls.pop(data.draw(st.integers(0, len(self.calls) - 1)))
        end()
        self.hold(wanted, -1)

    @rule(wanted=functions)
    def drain(self, wanted: FunctionId) -> None:
        if wanted not in self.warm:
            assert self.pool.drain(wanted) is False
        elif self.busy.get(wanted):
            with pytest.raises(MoelessError, match=f"{wanted} still has {self.busy[wanted]} calls"):
                self.pool.drain(wanted, timeout_s=0.0)
        else:
            assert self.pool.drain(wanted) is True
            self.evict(wanted)

    @rule(keep_alive_s=st.integers(0, 6), keep=st.frozensets(functions, max_size=2))
    def evict_idle(self, keep_alive_s: int, keep: frozenset[FunctionId]) -> None:
        expected = {f for f in self.idle() if f not in keep and self.now_s - self.warm[f] >= keep_alive_s}
        assert set(self.pool.evict_idle(keep_alive_s=keep_alive_s, keep=keep)) == expected
        for function in expected:
            self.evict(function)

    @invariant()
    def pool_agrees(self) -> None:
        assert self.pool.states() == dict.fromkeys(self.warm, InstanceState.WARM)
        stats = self.pool.stats()
        assert stats.resident_bytes == len(self.warm) * INSTANCE_BYTES <= CAPACITY * INSTANCE_BYTES
        assert (stats.cold_starts, stats.evictions) == (self.cold_starts, self.evictions)

    def expect_start(self, wanted: FunctionId) -> bool | type[MoelessError]:
        """What a start does, on the model: whether it is cold, or the error that it meets."""
        if wanted in self.warm:
            return False
        if len(self.warm) == CAPACITY:
            idle = self.idle()
            if not idle:
                return FunctionUnavailableError
            self.evict(min(idle, key=lambda function: (self.warm[function], function)))
        if wanted == DAMAGED:
            return ChecksumError
        self.warm[wanted] = self.now_s
        self.cold_starts += 1
        return True

    def idle(self) -> list[FunctionId]:
        return [function for function in self.warm if not self.busy.get(function)]

    def evict(self, function: FunctionId) -> None:
        del self.warm[function]
        self.evictions += 1

    def hold(self, wanted: list[FunctionId], count: int) -> None:
        for function in wanted:
            self.busy[function] = self.busy.get(function, 0) + count
            if count < 0:
                self.warm[function] = self.now_s
