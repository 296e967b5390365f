"""The transports between GPUs, on GPUs. Their CPU twins are tested in test_cuda_ipc.py and test_collective.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import msgspec
import pytest
import torch

from moeless.core.errors import TransportError, WorkerTimeoutError
from moeless.dispatch.channel import Channel, WorkerEndpoint
from moeless.dispatch.connect import connect
from moeless.dispatch.cuda_memory import CudaMemory
from tests.support.plain_workers import (
    HANGING_LAYER,
    HIDDEN_SIZE,
    MAX_ROWS,
    RUN_SECRET,
    TOP_K,
    UNAVAILABLE_LAYER,
    expected,
    random_call,
    running_worker,
)

pytestmark = pytest.mark.gpu
LONG_S = 60.0


def open_channel(endpoint: WorkerEndpoint, *, dtype: torch.dtype = torch.bfloat16) -> Channel:
    return connect(
        endpoint,
        run_secret=RUN_SECRET,
        engine="engine-0",
        hidden_size=HIDDEN_SIZE,
        top_k=TOP_K,
        dtype=dtype,
        max_rows=MAX_ROWS,
        device="cuda:0",
    )


def assert_answers(channel: Channel, *, dtype: torch.dtype = torch.bfloat16, num_calls: int = 20) -> None:
    for seed in range(num_calls):
        num_rows = 1 + seed * 6 % MAX_ROWS
        call = random_call(seed, num_tokens=MAX_ROWS, num_rows=num_rows, dtype=dtype)
        channel.submit(call._replace(x_TH=call.x_TH.to("cuda:0")))
        answer = channel.collect(LONG_S)
        assert answer.is_cuda
        torch.testing.assert_close(answer.cpu(), expected(call))


def need_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL takes one process on a GPU; torch sees only one GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_worker_on_the_same_gpu_shares_memory(dtype: torch.dtype) -> None:
    with running_worker(device="cuda:0") as worker, closing(open_channel(worker.endpoint, dtype=dtype)) as channel:
        assert channel.kind == "cuda-ipc"
        assert_answers(channel, dtype=dtype)


def test_a_worker_on_another_gpu_shares_memory() -> None:
    need_two_gpus()
    with running_worker(device="cuda:1") as worker, closing(open_channel(worker.endpoint)) as channel:
        assert channel.kind == "cuda-ipc"
        assert_answers(channel)


def test_a_worker_on_another_machine_is_reached_by_nccl() -> None:
    need_two_gpus()
    with running_worker(device="cuda:1") as worker:
        elsewhere = msgspec.structs.replace(worker.endpoint, host_id="another machine")
        with closing(open_channel(elsewhere)) as channel:
            assert channel.kind == "nccl"
            assert_answers(channel)


def test_a_worker_on_the_cpu_is_reached_from_a_gpu() -> None:
    with running_worker() as worker, closing(open_channel(worker.endpoint)) as channel:
        assert channel.kind == "shm"
        call = random_call(0, dtype=torch.bfloat16)
        channel.submit(call._replace(x_TH=call.x_TH.to("cuda:0")))
        torch.testing.assert_close(channel.collect(LONG_S).cpu(), expected(call))


def test_several_engines_share_a_worker() -> None:
    with running_worker(device="cuda:0") as worker:

        def converse() -> None:
            with closing(open_channel(worker.endpoint)) as channel:
                assert_answers(channel)

        with ThreadPoolExecutor(3) as engines:
            for conversation in [engines.submit(converse) for _ in range(3)]:
                conversation.result()


def test_a_worker_says_why_it_failed_and_goes_on() -> None:
    with running_worker(device="cuda:0") as worker, closing(open_channel(worker.endpoint)) as channel:
        call = random_call(0, layer=UNAVAILABLE_LAYER, dtype=torch.bfloat16)
        channel.submit(call._replace(x_TH=call.x_TH.to("cuda:0")))
        with pytest.raises(TransportError, match=r"function L02\.E\d{3} does not fit"):
            channel.collect(LONG_S)
        assert_answers(channel, num_calls=3)


def test_a_killed_worker_is_noticed_at_once_and_the_gpu_stays_usable() -> None:
    with (
        running_worker(device="cuda:0") as doomed,
        closing(open_channel(doomed.endpoint)) as channel,
        ThreadPoolExecutor(1) as engine,
    ):
        call = random_call(0, layer=HANGING_LAYER, dtype=torch.bfloat16)
        channel.submit(call._replace(x_TH=call.x_TH.to("cuda:0")))
        answer = engine.submit(channel.collect, 10 * LONG_S)
        doomed.kill()
        with pytest.raises(TransportError, match="hung up") as raised:
            answer.result(timeout=LONG_S)
        assert not isinstance(raised.value, WorkerTimeoutError)
    with (
        running_worker("worker-1", device="cuda:0") as next_worker,
        closing(open_channel(next_worker.endpoint)) as line,
    ):
        assert_answers(line, num_calls=3)


def test_lines_give_their_device_memory_back() -> None:
    with running_worker(device="cuda:0") as worker:
        with closing(open_channel(worker.endpoint)) as channel:
            assert_answers(channel, num_calls=1)
        torch.cuda.synchronize()
        free_bytes, _ = torch.cuda.mem_get_info()
        for _ in range(20):
            with closing(open_channel(worker.endpoint)) as channel:
                assert_answers(channel, num_calls=1)
        torch.cuda.synchronize()
        assert torch.cuda.mem_get_info()[0] >= free_bytes - (4 << 20)


def test_an_area_is_what_torch_sees() -> None:
    area = CudaMemory(torch.device("cuda:0")).allocate(1000)
    area.tensor.fill_(7)
    assert area.tensor.device == torch.device("cuda:0")
    assert area.tensor.cpu().tolist() == [7] * 1000
    area.close()


def test_a_handle_of_nobody_is_a_transport_error() -> None:
    memory = CudaMemory(torch.device("cuda:0"))
    with pytest.raises(TransportError, match="cudaIpcOpenMemHandle failed"):
        memory.open("00" * 64, 1000)
    with pytest.raises(TransportError, match="a CUDA handle must have 64 bytes, got 2"):
        memory.open("abcd", 1000)
