"""The dispatcher with real worker processes: the same sums wherever they are computed, whoever fails meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from moeless.core.errors import FunctionUnavailableError
from moeless.core.expert import FunctionId
from moeless.core.routing_table import LOCAL_WORKER, InstanceShare, RoutingTable, spread_evenly
from moeless.dispatch.channel import Channel
from moeless.dispatch.config import DispatchConfig
from moeless.dispatch.dispatcher import Dispatcher
from moeless.functions.feed_forward import FeedForward
from moeless.functions.pool import InstancePool
from moeless.packages.packed_model import PackedModel
from tests.support.dense import dense_layer
from tests.support.packed import damage, layout, write_packed
from tests.support.waiting import wait_until
from tests.support.workers import WorkerProcess

NUM_LAYERS, NUM_EXPERTS, TOP_K, HIDDEN = 2, 8, 3, 32
PATIENT, HURRIED = DispatchConfig(call_timeout_s=60.0), DispatchConfig(call_timeout_s=0.5)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return pack(tmp_path_factory.mktemp("dispatch") / "packed")


def pack(folder: Path) -> PackedModel:
    return write_packed(folder, [layout()] * NUM_LAYERS, num_experts=NUM_EXPERTS, top_k=TOP_K)


@pytest.fixture(scope="module")
def shared_workers(packed: PackedModel) -> Iterator[dict[str, WorkerProcess]]:
    """Two that no test may harm."""
    with WorkerProcess() as a, WorkerProcess() as b:
        for name, process in (("a", a), ("b", b)):
            process.host(name, packed)
        yield {"a": a, "b": b}


@pytest.fixture
def workers(packed: PackedModel) -> Iterator[dict[str, WorkerProcess]]:
    """Two to kill, pause and hold."""
    with WorkerProcess() as a, WorkerProcess() as b:
        for name, process in (("a", a), ("b", b)):
            process.host(name, packed)
        yield {"a": a, "b": b}


@pytest.fixture
def make_dispatcher(packed: PackedModel) -> Iterator[Callable[..., Dispatcher]]:
    made = []

    def make(
        table: RoutingTable,
        processes: dict[str, WorkerProcess],
        *,
        config: DispatchConfig = PATIENT,
        local: PackedModel = packed,
        transports: tuple[str, ...] = ("shm", "tcp"),
        **options: object,
    ) -> Dispatcher:
        dispatcher = Dispatcher(FeedForward(InstancePool(local, dtype=torch.float32)), table, config)
        dispatcher.set_channels(
            {
                name: process.open(name, transport=transport, **options)
                for (name, process), transport in zip(processes.items(), transports, strict=False)
            }
        )
        made.append(dispatcher)
        return dispatcher

    yield make
    for dispatcher in made:
        dispatcher.close()


def evenly(*names: str, version: int = 1) -> RoutingTable:
    return spread_evenly(num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, workers=names, version=version)


def replicated(*shares: InstanceShare, version: int = 1) -> RoutingTable:
    """Every function on each of the workers."""
    functions = [FunctionId(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]
    return RoutingTable(version=version, instances=dict.fromkeys(functions, shares))


ON_BOTH = replicated(InstanceShare("a", 0.5), InstanceShare("b", 0.5))


def routing(num_tokens: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(num_tokens, HIDDEN, generator=generator)
    weights_Tk, experts_Tk = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).topk(TOP_K)
    return hidden_TH, experts_Tk, weights_Tk


def assert_right(packed: PackedModel, out_TH: torch.Tensor, call: tuple[torch.Tensor, ...], *, layer: int = 0) -> None:
    assert torch.allclose(out_TH.double(), dense_layer(packed, layer, *call), rtol=1e-4, atol=1e-5)


# ---- where functions run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 200])
@pytest.mark.parametrize(
    "table",
    [
        pytest.param(evenly(LOCAL_WORKER), id="here"),
        pytest.param(evenly("a", "b"), id="on workers"),
        pytest.param(evenly("a", LOCAL_WORKER, "b"), id="here and on workers"),
        pytest.param(ON_BOTH, id="replicated"),
        pytest.param(RoutingTable(version=1), id="nowhere"),
    ],
)
def test_the_sum_is_the_same_wherever_functions_run(
    table: RoutingTable,
    num_tokens: int,
    packed: PackedModel,
    shared_workers: dict[str, WorkerProcess],
    make_dispatcher: Callable[..., Dispatcher],
) -> None:
    dispatcher = make_dispatcher(table, shared_workers)
    for layer in range(NUM_LAYERS):
        call = routing(num_tokens, seed=layer)
        assert_right(packed, dispatcher.forward(layer, *call), call, layer=layer)
    pairs = NUM_LAYERS * num_tokens * TOP_K
    assert sum(dispatcher.metrics.tokens_per_worker.values()) == pairs
    assert (dispatcher.metrics.retries, dispatcher.metrics.fallbacks) == (0, 0)


class Told:
    """An observer that keeps what it is told, and may look at the world meanwhile."""

    def __init__(self, look: Callable[[], object] = lambda: None) -> None:
        self.is_watching = True
        self.layers: list[tuple[int, torch.Tensor, list[list[int]], list[list[float]]]] = []
        self.seen: list[object] = []
        self.kept: list[tuple[Any, Any]] = []
        self._look = look

    def observe_layer(self, layer: int, hidden_TH: torch.Tensor, experts_Tk: Any, weights_Tk: Any) -> None:
        self.layers.append((layer, hidden_TH, experts_Tk.tolist(), weights_Tk.tolist()))
        self.kept.append((experts_Tk, weights_Tk))
        self.seen.append(self._look())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "table",
    [
        pytest.param(evenly(LOCAL_WORKER), id="here"),
        pytest.param(evenly("a", LOCAL_WORKER, "b"), id="here and on workers"),
        pytest.param(RoutingTable(version=1), id="nowhere"),
    ],
)
def test_an_observer_that_watches_is_told_what_is_routed(
    table: RoutingTable,
    dtype: torch.dtype,
    shared_workers: dict[str, WorkerProcess],
    make_dispatcher: Callable[..., Dispatcher],
) -> None:
    dispatcher, told = make_dispatcher(table, shared_workers), Told()
    dispatcher.set_observer(told)
    hidden_TH, experts_Tk, weights_Tk = routing(7)
    dispatcher.forward(1, hidden_TH, experts_Tk, weights_Tk.to(dtype))
    told.is_watching = False
    dispatcher.forward(1, hidden_TH, experts_Tk, weights_Tk)
    ((layer, seen_TH, experts, weights),) = told.layers
    assert (layer, experts) == (1, experts_Tk.tolist())
    assert seen_TH is hidden_TH
    assert weights == weights_Tk.to(dtype).float().tolist()
    ((kept_experts, kept_weights),) = told.kept  # nobody writes to what was told
    assert (kept_experts.tolist(), kept_weights.tolist()) == (experts, weights)


def test_an_observer_is_told_once_the_work_is_on_its_way_and_before_any_of_it_is_waited_for(
    packed: PackedModel, workers: dict[str, WorkerProcess], make_dispatcher: Callable[..., Dispatcher]
) -> None:
    dispatcher = make_dispatcher(evenly("a", LOCAL_WORKER, "b"), workers)
    workers["a"].hold("a")
    before = workers["a"].report("a").calls_begun

    def look() -> tuple[bool, int]:
        wait_until(lambda: workers["a"].report("a").calls_begun > before)
        workers["a"].release("a")
        return True, dispatcher.metrics.tokens_per_worker.get(LOCAL_WORKER, 0)

    told = Told(look)
    dispatcher.set_observer(told)
    call = routing(20)
    assert_right(packed, dispatcher.forward(0, *call), call)
    assert told.seen == [(True, 0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_travels_as_it_is(
    dtype: torch.dtype, packed: PackedModel, make_dispatcher: Callable[..., Dispatcher]
) -> None:
    with WorkerProcess() as process:
        process.host("a", packed, dtype=str(dtype).removeprefix("torch."))
        dispatcher = make_dispatcher(evenly("a"), {"a": process}, dtype=dtype)
        hidden_TH, experts_Tk, weights_Tk = routing(9)

        out_TH = dispatcher.forward(0, hidden_TH.to(dtype), experts_Tk, weights_Tk)

    expected_TH = dense_layer(packed, 0, hidden_TH.to(dtype), experts_Tk, weights_Tk, dtype=dtype)
    assert out_TH.dtype == dtype
    assert float((out_TH.double() - expected_TH).abs().max()) < 0.03 * float(expected_TH.abs().max())


def test_replicas_share_the_tokens_of_a_call_by_their_shares(
    packed: PackedModel, shared_workers: dict[str, WorkerProcess], make_dispatcher: Callable[..., Dispatcher]
) -> None:
    dispatcher = make_dispatcher(replicated(InstanceShare("a", 0.25), InstanceShare("b", 0.75)), shared_workers)
    call = routing(400)

    assert_right(packed, dispatcher.forward(0, *call), call)

    share = dispatcher.metrics.tokens_per_worker["a"] / (400 * TOP_K)
    assert abs(share - 0.25) < 0.02


def test_replicas_take_turns_at_single_tokens(
    shared_workers: dict[str, WorkerProcess], make_dispatcher: Callable[..., Dispatcher]
) -> None:
    dispatcher = make_dispatcher(ON_BOTH, shared_workers)
    for seed in range(20):
        dispatcher.forward(0, *routing(1, seed=seed))

    served = dispatcher.metrics.tokens_per_worker
    assert abs(served["a"] - served["b"]) < 0.2 * 20 * TOP_K


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_calls_longer_than_a_line_takes_are_sent_in_parts(
    transport: str,
    packed: PackedModel,
    shared_workers: dict[str, WorkerProcess],
    make_dispatcher: Callable[..., Dispatcher],
) -> None:
    dispatcher = make_dispatcher(evenly("a"), {"a": shared_workers["a"]}, transports=(transport,), max_rows=16)
    before = shared_workers["a"].report("a").calls_begun
    call = routing(50)

    assert_right(packed, dispatcher.forward(0, *call), call)

    assert shared_workers["a"].report("a").calls_begun - before == 4
    assert dispatcher.metrics.tokens_per_worker == {"a": 50 * TOP_K}


class Patience:
    """A channel that keeps how long each call was waited for."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.timeouts_s: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def collect(self, timeout_s: float) -> torch.Tensor:
        self.timeouts_s.append(timeout_s)
        return self._channel.collect(timeout_s)


def test_a_call_of_more_rows_is_waited_for_longer(
    packed: PackedModel, shared_workers: dict[str, WorkerProcess], make_dispatcher: Callable[..., Dispatcher]
) -> None:
    config = DispatchConfig(call_timeout_s=30.0, call_timeout_per_row_s=0.5)
    dispatcher = make_dispatcher(evenly("a"), {"a": shared_workers["a"]}, config=config)
    patience = Patience(dispatcher.channels["a"])
    dispatcher.set_channels({"a": cast("Channel", patience)})
    dispatcher._retired.clear()  # the channel is still in use, inside the other

    for num_tokens in (1, 40):
        call = routing(num_tokens)
        assert_right(packed, dispatcher.forward(0, *call), call)

    assert patience.timeouts_s == [30.5, 50.0]


# ---- tables and lines -------------------------------------------------------------------------------------------


def test_a_newer_table_is_used_from_the_next_layer_on(
    shared_workers: dict[str, WorkerProcess], make_dispatcher: Callable[..., Dispatcher]
) -> None:
    dispatcher = make_dispatcher(evenly("a"), shared_workers)
    dispatcher.forward(0, *routing(2))

    dispatcher.set_table(evenly("b", version=2))
    dispatcher.forward(1, *routing(2))

    assert dispatcher.metrics.tokens_per_worker == {"a": 2 * TOP_K, "b": 2 * TOP_K}


@pytest.mark.parametrize("version", [1, 2])
def test_a_table_that_is_not_newer_is_refused(
    version: int, shared_workers: dict[str, WorkerProcess], make_dispatcher: Callable[..., Dispatcher]
) -> None:
    dispatcher = make_dispatcher(evenly("a", version=2), shared_workers)

    with pytest.raises(ValueError, match=f"version must be above 2, got {version}"):
        dispatcher.set_table(evenly("b", version=version))

    assert dispatcher.table.version == 2


def test_a_worker_without_a_line_is_not_used(
    packed: PackedModel, shared_workers: dict[str, WorkerProcess], make_dispatcher: Callable[..., Dispatcher]
) -> None:
    """Its replicas elsewhere are; a function that has none is computed here."""
    only_b = {FunctionId(0, 0): (InstanceShare("b"),)}
    table = RoutingTable(version=1, instances=dict(ON_BOTH.instances) | only_b)
    dispatcher = make_dispatcher(table, {"a": shared_workers["a"]})
    call = routing(40)

    assert_right(packed, dispatcher.forward(0, *call), call)

    of_expert_0 = int((call[1] == 0).sum())
    assert dispatcher.metrics.tokens_per_worker == {"a": 40 * TOP_K - of_expert_0, LOCAL_WORKER: of_expert_0}
    assert (dispatcher.metrics.retries, dispatcher.metrics.fallbacks) == (0, 0)


def test_lines_that_are_replaced_are_closed(
    shared_workers: dict[str, WorkerProcess], make_dispatcher: Callable[..., Dispatcher]
) -> None:
    dispatcher = make_dispatcher(evenly("a", "b"), shared_workers)
    old = dict(dispatcher.channels)

    dispatcher.set_channels({"b": old["b"]})
    dispatcher.forward(0, *routing(4))

    assert old["a"].is_broken
    assert not old["b"].is_broken


def test_lines_may_change_while_layers_are_computed(
    packed: PackedModel, shared_workers: dict[str, WorkerProcess], make_dispatcher: Callable[..., Dispatcher]
) -> None:
    dispatcher = make_dispatcher(evenly("a", LOCAL_WORKER, "b"), shared_workers)
    call = routing(6)
    expected_TH = dispatcher.forward(0, *call)
    stop = threading.Event()

    def change_lines() -> int:
        rounds = 0
        while not stop.is_set():
            dispatcher.set_channels({})
            names = ("a", "b", "ab")[rounds % 3]
            dispatcher.set_channels({name: shared_workers[name].open(name) for name in names})
            rounds += 1
        return rounds

    with ThreadPoolExecutor(1) as threads:
        changes = threads.submit(change_lines)
        try:
            off = max(float((dispatcher.forward(0, *call) - expected_TH).abs().max()) for _ in range(300))
        finally:
            stop.set()
        assert changes.result(30) > 0
    assert off < 1e-5


# ---- failures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transports", [("shm", "shm"), ("tcp", "tcp")], ids="-".join)
def test_a_worker_killed_during_a_call_is_replaced_by_the_second_instance(
    transports: tuple[str, str],
    packed: PackedModel,
    workers: dict[str, WorkerProcess],
    make_dispatcher: Callable[..., Dispatcher],
) -> None:
    dispatcher = make_dispatcher(ON_BOTH, workers, transports=transports)
    call = routing(12)

    out_TH = forward_while(dispatcher, call, held=workers["a"], name="a", then=workers["a"].kill)

    assert_right(packed, out_TH, call)
    assert dispatcher.metrics.retries == 1
    assert dispatcher.metrics.fallbacks == 0
    assert dispatcher.metrics.tokens_per_worker == {"b": 12 * TOP_K}
    assert dispatcher.channels["a"].is_broken


def test_a_killed_worker_is_replaced_by_our_own_copies_where_no_other_has_them(
    packed: PackedModel, workers: dict[str, WorkerProcess], make_dispatcher: Callable[..., Dispatcher]
) -> None:
    dispatcher = make_dispatcher(evenly("a", "b"), workers)
    call = routing(12)

    out_TH = forward_while(dispatcher, call, held=workers["b"], name="b", then=workers["b"].kill)

    assert_right(packed, out_TH, call)
    assert (dispatcher.metrics.retries, dispatcher.metrics.fallbacks) == (0, 1)
    assert set(dispatcher.metrics.tokens_per_worker) == {"a", LOCAL_WORKER}
    # From here on the line is known to be broken, until somebody sets another.
    assert_right(packed, dispatcher.forward(1, *call), call, layer=1)
    assert dispatcher.metrics.fallbacks == 2


def test_a_replica_in_our_own_process_takes_over_too(
    packed: PackedModel, workers: dict[str, WorkerProcess], make_dispatcher: Callable[..., Dispatcher]
) -> None:
    dispatcher = make_dispatcher(replicated(InstanceShare("a", 0.5), InstanceShare(LOCAL_WORKER, 0.5)), workers)
    workers["a"].kill()
    call = routing(12)

    assert_right(packed, dispatcher.forward(0, *call), call)
    assert (dispatcher.metrics.retries, dispatcher.metrics.fallbacks) == (0, 1)
    assert dispatcher.metrics.tokens_per_worker == {LOCAL_WORKER: 12 * TOP_K}


def test_a_local_failure_names_the_functions_and_leaves_the_lines_usable(
    packed: PackedModel,
    workers: dict[str, WorkerProcess],
    make_dispatcher: Callable[..., Dispatcher],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dispatcher = make_dispatcher(evenly("a", LOCAL_WORKER), workers)
    call = routing(12)

    def out_of_memory(*_: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(dispatcher.local, "partial_sums", out_of_memory)
        with pytest.raises(FunctionUnavailableError, match=r"L00\.E\d{3}.*out of memory"):
            dispatcher.forward(0, *call)

    for layer in (0, 1):
        assert_right(packed, dispatcher.forward(layer, *call), call, layer=layer)
    assert not dispatcher.channels["a"].is_broken
    assert (dispatcher.metrics.retries, dispatcher.metrics.fallbacks) == (0, 0)


@pytest.mark.parametrize("transports", [("shm", "shm"), ("tcp", "tcp")], ids="-".join)
@pytest.mark.parametrize(
    ("table", "counted"), [(ON_BOTH, (1, 0)), (evenly("a", "b"), (0, 1))], ids=["second instance", "own copy"]
)
def test_a_worker_that_hangs_is_given_up_in_time(
    table: RoutingTable,
    counted: tuple[int, int],
    transports: tuple[str, str],
    packed: PackedModel,
    workers: dict[str, WorkerProcess],
    make_dispatcher: Callable[..., Dispatcher],
) -> None:
    dispatcher = make_dispatcher(table, workers, config=HURRIED, transports=transports)
    workers["a"].pause()
    call = routing(12)

    with ThreadPoolExecutor(1) as threads:
        out_TH = threads.submit(dispatcher.forward, 0, *call).result(30)

    assert_right(packed, out_TH, call)
    assert (dispatcher.metrics.retries, dispatcher.metrics.fallbacks) == counted
    assert dispatcher.channels["a"].is_broken


def test_a_worker_that_cannot_compute_says_so_and_stays_connected(
    tmp_path: Path, packed: PackedModel, make_dispatcher: Callable[..., Dispatcher]
) -> None:
    theirs = pack(tmp_path / "packed")
    damage(theirs, FunctionId(0, 4))
    with WorkerProcess() as process:
        process.host("a", theirs)
        dispatcher = make_dispatcher(evenly("a"), {"a": process})
        call = routing(30)

        assert_right(packed, dispatcher.forward(0, *call), call)
        assert dispatcher.metrics.fallbacks == 1
        assert not dispatcher.channels["a"].is_broken

        assert_right(packed, dispatcher.forward(1, *call), call, layer=1)
        assert dispatcher.metrics.tokens_per_worker == {LOCAL_WORKER: 30 * TOP_K, "a": 30 * TOP_K}


@pytest.mark.parametrize("how", ["damaged", "absent"])
def test_a_function_that_nobody_can_compute_is_named(
    how: str, tmp_path: Path, workers: dict[str, WorkerProcess], make_dispatcher: Callable[..., Dispatcher]
) -> None:
    ours = pack(tmp_path / "packed")
    for expert in (2, 5):
        if how == "damaged":
            damage(ours, FunctionId(0, expert))
        else:
            (ours.path / "functions" / f"L00.E{expert:03d}.safetensors").unlink()
    dispatcher = make_dispatcher(ON_BOTH, workers, local=ours)
    for process in workers.values():
        process.kill()
    hidden_TH, _, weights_Tk = routing(2)

    with pytest.raises(FunctionUnavailableError, match=r"no instance could compute .*L00\.E002"):
        dispatcher.forward(0, hidden_TH, torch.tensor([[2, 0, 1], [2, 3, 4]]), weights_Tk)
    fine = (hidden_TH, torch.tensor([[0, 1, 3], [4, 6, 7]]), weights_Tk)
    assert_right(ours, dispatcher.forward(0, *fine), fine)


# ---- order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", ["a", "b"])
def test_the_sum_does_not_depend_on_who_answers_first(
    late: str, workers: dict[str, WorkerProcess], make_dispatcher: Callable[..., Dispatcher]
) -> None:
    dispatcher = make_dispatcher(evenly("a", "b"), workers)
    early = {"a": "b", "b": "a"}[late]
    call = routing(64)
    expected_TH = dispatcher.forward(0, *call)
    before = workers[early].report(early).tokens_served

    def let_go_once_the_other_has_answered() -> None:
        wait_until(lambda: workers[early].report(early).tokens_served > before)
        workers[late].release(late)

    out_TH = forward_while(dispatcher, call, held=workers[late], name=late, then=let_go_once_the_other_has_answered)

    assert torch.equal(out_TH, expected_TH)


def forward_while(
    dispatcher: Dispatcher,
    call: tuple[torch.Tensor, ...],
    *,
    held: WorkerProcess,
    name: str,
    then: Callable[[], None],
) -> torch.Tensor:
    """One layer, during which `held` waits with the call in its hands while `then` happens."""
    held.hold(name)
    before = held.report(name).calls_begun
    with ThreadPoolExecutor(1) as threads:
        result = threads.submit(dispatcher.forward, 0, *call)
        wait_until(lambda: held.report(name).calls_begun > before)
        then()
        return result.result(60)


@pytest.mark.parametrize(
    "table", [evenly("a", "b"), evenly("a", LOCAL_WORKER), ON_BOTH], ids=["a, b", "a, here", "split"]
)
def test_a_row_that_is_nan_leaves_the_others_as_they_are(
    table: RoutingTable, make_dispatcher: Callable[..., Dispatcher], shared_workers: dict[str, WorkerProcess]
) -> None:
    dispatcher = make_dispatcher(table, shared_workers)
    hidden_TH, experts_Tk, weights_Tk = routing(17)
    expected_TH = dispatcher.forward(0, hidden_TH, experts_Tk, weights_Tk)
    hidden_TH[5], weights_Tk[9] = torch.nan, torch.nan
    out_TH = dispatcher.forward(0, hidden_TH, experts_Tk, weights_Tk)
    others = [row for row in range(17) if row not in (5, 9)]
    torch.testing.assert_close(out_TH[others], expected_TH[others])
    assert out_TH[[5, 9]].isnan().all()
    again_TH = dispatcher.forward(0, *routing(17))  # nothing stays in the buffers
    torch.testing.assert_close(again_TH, expected_TH)
