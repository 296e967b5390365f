"""The instances of one process: states, bytes, eviction, draining, and all of it from several threads at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from moeless.core.errors import ChecksumError, FunctionUnavailableError, MoelessError
from moeless.core.expert import FunctionId
from moeless.functions.feed_forward import FeedForward
from moeless.functions.pool import InstancePool, InstanceState
from moeless.packages.packed_model import PackedModel
from tests.support.dense import dense_layer
from tests.support.packed import damage, layout, write_packed
from tests.support.waiting import wait_until

NUM_EXPERTS = 4
INSTANCE_BYTES = 4 * 3 * 32 * 48
"""Of `layout()` in float32."""
MIB = 1 << 20


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return write_packed(tmp_path_factory.mktemp("pool") / "packed", [layout()] * 2, num_experts=NUM_EXPERTS)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def make_pool(packed: PackedModel, *, instances: int | None = None, clock: Callable[[], float] = time.monotonic):
    capacity = None if instances is None else instances * INSTANCE_BYTES
    return InstancePool(packed, dtype=torch.float32, capacity_bytes=capacity, clock=clock)


def function(expert: int, layer: int = 0) -> FunctionId:
    return FunctionId(layer, expert)


def hold(pool: InstancePool, *experts: int, layer: int = 0) -> Callable[[], None]:
    """Begin a call of `experts`; returns what ends it."""
    numbers = np.array(experts)
    pool.acquire(layer, numbers)
    return lambda: pool.release(layer, numbers)


# ---- states and bytes -------------------------------------------------------------------------------------------


def test_a_function_is_cold_until_it_is_started_and_warm_from_then_on(packed: PackedModel) -> None:
    pool = make_pool(packed)
    assert pool.state(function(1)) is InstanceState.COLD

    assert pool.start(function(1)) is True
    assert pool.state(function(1)) is InstanceState.WARM
    assert pool.start(function(1)) is False
    assert pool.stats().cold_starts == 1


def test_a_function_is_loading_while_its_package_is_read(packed: PackedModel) -> None:
    package = SlowPackage(packed)
    pool = make_pool(package)
    with ThreadPoolExecutor(1) as threads:
        started = threads.submit(pool.start, function(2))
        package.wait_for_load()
        assert pool.state(function(2)) is InstanceState.STARTING
        assert pool.states() == {function(2): InstanceState.STARTING}
        package.let_go()
        assert started.result(10) is True
    assert pool.state(function(2)) is InstanceState.WARM


def test_a_call_starts_what_is_cold_and_counts_what_was_warm(packed: PackedModel) -> None:
    pool = make_pool(packed)
    pool.start(function(0))

    hold(pool, 0, 1, 3)()

    assert set(pool.states()) == {function(0), function(1), function(3)}
    assert (pool.stats().cold_starts, pool.stats().warm_starts) == (3, 1)


def test_bytes_are_accounted_for_to_the_last_one(packed: PackedModel) -> None:
    pool = make_pool(packed)
    assert pool.stats().resident_bytes == 0
    assert pool.instance_bytes(0) == 0

    pool.start_many([function(0), function(3), function(2, layer=1)])
    assert pool.stats().resident_bytes == 3 * INSTANCE_BYTES == 3 * packed.function_bytes(function(0))
    assert pool.instance_bytes(0) == INSTANCE_BYTES

    pool.drain(function(3))
    assert pool.stats().resident_bytes == 2 * INSTANCE_BYTES
    assert pool.stats().num_instances == 2


def test_bytes_are_those_of_the_dtype_that_computes(packed: PackedModel) -> None:
    pool = InstancePool(packed, dtype=torch.bfloat16)
    pool.start(function(0))
    assert pool.stats().resident_bytes == INSTANCE_BYTES // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_goes_to_the_system_when_an_instance_goes(dtype: torch.dtype, tmp_path: Path) -> None:
    large = layout(hidden_size=512, intermediate_size=1500)  # 9 MiB, not a whole number of pages
    packed = write_packed(tmp_path / "packed", [large], num_experts=4, dtype=dtype)
    pool = InstancePool(packed, dtype=dtype)
    size = packed.function_bytes(function(0))
    pool.start(function(0))
    before = anonymous_bytes()

    pool.start_many([function(1), function(2), function(3)])
    loaded = anonymous_bytes()
    pool.drain(function(2))
    pool.evict_idle(keep_alive_s=-1.0, keep=frozenset({function(0)}))
    after = anonymous_bytes()

    noise = MIB  # what else the process does
    assert 3 * size - noise < loaded - before < 3 * size + noise
    assert after - before < noise
    assert pool.stats().resident_bytes == size


def test_the_neighbours_of_a_released_slot_keep_their_weights(tmp_path: Path) -> None:
    """Slots are not whole pages here: what a slot shares with its neighbours must stay."""
    packed = write_packed(tmp_path / "packed", [layout(hidden_size=100, intermediate_size=70)], num_experts=5)
    pool = InstancePool(packed, dtype=torch.float32)
    pool.start_many(packed.functions)
    pool.drain(function(1))
    pool.drain(function(3))
    hidden_TH = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    experts_n = np.repeat([0, 2, 4], 2)

    out_TH = FeedForward(pool).partial_sums(0, hidden_TH, np.arange(6), experts_n, torch.ones(6))

    expected_TH = dense_layer(packed, 0, hidden_TH, torch.from_numpy(experts_n)[:, None], torch.ones(6, 1))
    assert torch.allclose(out_TH.double(), expected_TH, atol=1e-5)


# ---- capacity ---------------------------------------------------------------------------------------------------


def test_a_start_beyond_the_capacity_evicts_what_idled_longest(packed: PackedModel) -> None:
    clock = Clock()
    pool = make_pool(packed, instances=2, clock=clock)
    for expert in (0, 1):
        clock.now_s += 1
        pool.start(function(expert))
    clock.now_s += 1
    hold(pool, 0)()

    pool.start(function(2, layer=1))

    assert set(pool.states()) == {function(0), function(2, layer=1)}
    assert pool.stats().evictions == 1
    assert pool.stats().resident_bytes == 2 * INSTANCE_BYTES


def test_busy_instances_are_never_evicted_and_the_error_names_function_and_numbers(packed: PackedModel) -> None:
    pool = make_pool(packed, instances=2)
    release = hold(pool, 0, 1)

    with pytest.raises(FunctionUnavailableError) as refused:
        pool.start(function(3))
    for part in ("L00.E003", str(INSTANCE_BYTES), str(2 * INSTANCE_BYTES)):
        assert part in str(refused.value)
    assert set(pool.states()) == {function(0), function(1)}

    release()
    assert pool.start(function(3)) is True


def test_a_call_that_could_not_hold_all_its_functions_holds_none(packed: PackedModel) -> None:
    pool = make_pool(packed, instances=2)
    with pytest.raises(FunctionUnavailableError, match=r"L00\.E002"):
        pool.acquire(0, np.array([0, 1, 2]))

    assert len(pool.evict_idle(keep_alive_s=-1.0)) == 2


@pytest.mark.parametrize("instances", [1, 2, 3])
def test_a_layer_larger_than_the_capacity_is_computed_in_parts(instances: int, packed: PackedModel) -> None:
    pool = make_pool(packed, instances=instances)
    hidden_TH = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    experts_n, weights_n = np.repeat(np.arange(NUM_EXPERTS), 3), torch.linspace(0.1, 1, 12)

    out_TH = FeedForward(pool).partial_sums(0, hidden_TH, np.arange(12), experts_n, weights_n)

    expected_TH = dense_layer(packed, 0, hidden_TH, torch.from_numpy(experts_n)[:, None], weights_n[:, None])
    assert torch.allclose(out_TH.double(), expected_TH, atol=1e-5)
    assert pool.tokens_served(0).tolist() == [3] * NUM_EXPERTS
    assert pool.stats().resident_bytes <= instances * INSTANCE_BYTES


def test_a_single_token_whose_experts_do_not_fit_together_is_computed_in_parts(packed: PackedModel) -> None:
    """Its pairs come in the router's order."""
    pool = make_pool(packed, instances=1)
    hidden_TH = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    experts_n, weights_n = np.array([3, 0, 2]), torch.tensor([0.5, 0.3, 0.2])

    out_TH = FeedForward(pool).partial_sums(0, hidden_TH, np.zeros(3, dtype=np.int64), experts_n, weights_n)

    expected_TH = dense_layer(packed, 0, hidden_TH, torch.from_numpy(experts_n)[None], weights_n[None])
    assert torch.allclose(out_TH.double(), expected_TH, atol=1e-5)


def test_a_function_larger_than_the_capacity_is_refused(packed: PackedModel) -> None:
    pool = InstancePool(packed, dtype=torch.float32, capacity_bytes=INSTANCE_BYTES - 1)
    with pytest.raises(FunctionUnavailableError, match=rf"L00\.E000 needs {INSTANCE_BYTES} bytes"):
        pool.start(function(0))
    assert pool.stats().num_instances == 0


@pytest.mark.parametrize("wanted", [FunctionId(0, NUM_EXPERTS), FunctionId(2, 0), FunctionId(0, -1)])
def test_a_function_that_the_model_does_not_have_is_refused(wanted: FunctionId, packed: PackedModel) -> None:
    with pytest.raises(FunctionUnavailableError, match="does not exist in random-experts"):
        make_pool(packed).start(wanted)


# ---- draining and keep-alive ------------------------------------------------------------------------------------


def test_draining_waits_for_running_calls_and_takes_no_new_ones(packed: PackedModel) -> None:
    pool = make_pool(packed)
    release = hold(pool, 0)
    with ThreadPoolExecutor(2) as threads:
        drained = threads.submit(pool.drain, function(0))
        wait_until(lambda: pool.state(function(0)) is InstanceState.DRAINING)
        next_call = threads.submit(hold, pool, 0)
        assert not drained.done()
        assert not next_call.done()
        release()
        assert drained.result(10) is True
        next_call.result(10)()
    assert pool.stats().cold_starts == 2  # the next call found it cold
    assert pool.state(function(0)) is InstanceState.WARM


def test_a_call_that_began_before_draining_computes_with_its_weights(packed: PackedModel) -> None:
    pool = make_pool(packed)
    release = hold(pool, 2)
    with ThreadPoolExecutor(1) as threads:
        drained = threads.submit(pool.drain, function(2))
        wait_until(lambda: pool.state(function(2)) is InstanceState.DRAINING)
        slot = pool.arena_rows_LE[0][2]
        assert torch.equal(pool.arena(0).down_SIH[slot].T, packed.read_function(function(2)).down)
        release()
        assert drained.result(10) is True
    assert pool.arena_rows_LE[0][2] == -1


def test_draining_that_takes_too_long_ends_warm_again(packed: PackedModel) -> None:
    pool = make_pool(packed)
    release = hold(pool, 0)

    with pytest.raises(MoelessError, match=r"L00\.E000 still has 1 calls after 0\.01 s"):
        pool.drain(function(0), timeout_s=0.01)

    assert pool.state(function(0)) is InstanceState.WARM
    hold(pool, 0)()
    release()
    assert pool.drain(function(0)) is True


def test_draining_what_is_cold_does_nothing(packed: PackedModel) -> None:
    assert make_pool(packed).drain(function(0)) is False


def test_idle_instances_go_after_keep_alive_but_for_those_kept_and_those_busy(packed: PackedModel) -> None:
    clock = Clock()
    pool = make_pool(packed, clock=clock)
    pool.start_many(map(function, range(NUM_EXPERTS)))
    release = hold(pool, 2)
    clock.now_s += 5
    hold(pool, 3)()
    clock.now_s += 5

    evicted = pool.evict_idle(keep_alive_s=10.0, keep=frozenset({function(1)}))

    assert evicted == [function(0)]
    assert set(pool.states()) == {function(1), function(2), function(3)}
    release()


# ---- threads ----------------------------------------------------------------------------------------------------


def test_starts_of_one_function_at_the_same_time_load_it_once(packed: PackedModel) -> None:
    package = SlowPackage(packed)
    pool = make_pool(package)
    with ThreadPoolExecutor(4) as threads:
        starts = [threads.submit(pool.start, function(0)) for _ in range(4)]
        package.wait_for_load()
        package.let_go()
        assert sorted(start.result(10) for start in starts) == [False, False, False, True]
    assert package.loads == 1


def test_a_failed_start_lets_the_next_one_try(packed: PackedModel) -> None:
    package = SlowPackage(packed, failures=1)
    pool = make_pool(package)
    with ThreadPoolExecutor(2) as threads:
        starts = [threads.submit(pool.start, function(0)) for _ in range(2)]
        package.let_go()
        outcomes = {type(start.exception(10)) for start in starts}
    assert outcomes == {OSError, type(None)}
    assert pool.state(function(0)) is InstanceState.WARM
    assert pool.stats().resident_bytes == INSTANCE_BYTES


def test_starting_and_draining_beside_a_computing_thread_changes_no_result(packed: PackedModel) -> None:
    pool = make_pool(packed)
    feed_forward = FeedForward(pool)
    hidden_TH = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    experts_n, weights_n = np.repeat(np.arange(NUM_EXPERTS), 2), torch.ones(8)
    expected_TH = feed_forward.partial_sums(0, hidden_TH, np.arange(8), experts_n, weights_n)
    stop = threading.Event()

    def churn(seed: int) -> int:
        rng = np.random.default_rng(seed)
        count = 0
        while not stop.is_set():
            expert = int(rng.integers(NUM_EXPERTS))
            pool.start(function(expert)) if rng.random() < 0.3 else pool.drain(function(expert))
            count += 1
        return count

    with ThreadPoolExecutor(2) as threads:
        churned = [threads.submit(churn, seed) for seed in range(2)]
        try:
            wrong = 0
            for _ in range(400):
                out_TH = feed_forward.partial_sums(0, hidden_TH, np.arange(8), experts_n, weights_n)
                wrong += not torch.equal(out_TH, expected_TH)
        finally:
            stop.set()
        assert min(count.result(10) for count in churned) > 0
    assert wrong == 0
    assert pool.stats().resident_bytes == len(pool.states()) * INSTANCE_BYTES


# ---- packages ---------------------------------------------------------------------------------------------------


def test_a_damaged_package_is_refused_by_name_and_harms_nothing_else(tmp_path: Path) -> None:
    packed = write_packed(tmp_path / "packed", [layout()], num_experts=3)
    damage(packed, function(1))
    pool = make_pool(packed)

    with pytest.raises(ChecksumError, match=r"L00\.E001"):
        pool.start(function(1))
    with pytest.raises(ChecksumError, match=r"L00\.E001"):
        pool.acquire(0, np.array([0, 1, 2]))

    assert pool.state(function(1)) is InstanceState.COLD
    hold(pool, 0, 2)()
    assert pool.stats().resident_bytes == 2 * INSTANCE_BYTES
    assert len(pool.evict_idle(keep_alive_s=-1.0)) == 2


class SlowPackage(PackedModel):
    """A packed model whose loads wait until they are let go."""

    def __init__(self, packed: PackedModel, *, failures: int = 0) -> None:
        super().__init__(packed.path, packed.manifest)
        self.loads = 0
        self._failures = failures
        self._loading = threading.Event()
        self._may_go = threading.Event()

    def read_function(self, wanted: FunctionId, **options):
        self.loads += 1
        self._loading.set()
        assert self._may_go.wait(10)
        if self._failures:
            self._failures -= 1
            raise OSError("the disk is away")
        return super().read_function(wanted, **options)

    def wait_for_load(self) -> None:
        assert self._loading.wait(10)

    def let_go(self) -> None:
        self._may_go.set()


def anonymous_bytes() -> int:
    """Memory of this process that is no file's, as the kernel has it."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Anonymous in smaps_rollup")
