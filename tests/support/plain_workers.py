"""Workers in processes of their own, with experts simple enough to check by hand."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import msgspec
import numpy as np
import psutil
import torch

from moeless.core.errors import FunctionUnavailableError
from moeless.core.expert import FunctionId
from moeless.dispatch.channel import ChannelConfig, WorkerEndpoint
from moeless.dispatch.cuda_ipc import DeviceMemory
from moeless.dispatch.server import DataPlaneServer
from moeless.dispatch.wire import LayerCall, ReceivedCall

RUN_SECRET = "the secret of this run"
HIDDEN_SIZE = 64
NUM_EXPERTS = 8
TOP_K = 2
MAX_ROWS = 128

PLAIN_LAYER, HANGING_LAYER, UNAVAILABLE_LAYER, FAILING_LAYER = range(4)


def compute(call: ReceivedCall) -> torch.Tensor:
    """Expert e of a plain layer turns x into (e + 1) x + e; other layers misbehave as their names say."""
    if call.layer == HANGING_LAYER:
        threading.Event().wait()
    if call.layer == UNAVAILABLE_LAYER:
        name = FunctionId(call.layer, int(call.experts_n[0]))
        raise FunctionUnavailableError(f"function {name} does not fit")
    if call.layer == FAILING_LAYER:
        raise ZeroDivisionError("a bug")
    device = call.x_RH.device
    out_RH = torch.zeros(call.x_RH.shape, dtype=torch.float32, device=device)
    rows = torch.from_numpy(call.rows_n).to(device)
    experts_n1 = torch.from_numpy(call.experts_n).to(device).float().unsqueeze(1)
    y_nH = (experts_n1 + 1) * call.x_RH[rows].float() + experts_n1
    return out_RH.index_add_(0, rows, call.weights_n.to(device).unsqueeze(1) * y_nH).to(call.x_RH.dtype)


def expected(call: LayerCall) -> torch.Tensor:
    """Compute a worker's right answer, one pair after the other in float64."""
    out_RH = torch.zeros((len(call.tokens_R), call.x_TH.shape[1]), dtype=torch.float64)
    x_RH = call.x_TH.cpu()[torch.from_numpy(call.tokens_R)].double()
    for row, expert, weight in zip(call.rows_n.tolist(), call.experts_n.tolist(), call.weights_n.tolist(), strict=True):
        out_RH[row] += weight * ((expert + 1) * x_RH[row] + expert)
    return out_RH.to(call.x_TH.dtype)


def random_call(
    seed: int,
    *,
    num_tokens: int = 8,
    num_rows: int = 5,
    layer: int = PLAIN_LAYER,
    hidden_size: int = HIDDEN_SIZE,
    top_k: int = TOP_K,
    dtype: torch.dtype = torch.float32,
) -> LayerCall:
    """A call with some of the tokens and `top_k` pairs for each."""
    rng = np.random.default_rng(seed)
    experts_n = np.sort(rng.integers(0, NUM_EXPERTS, num_rows * top_k))
    rows_n = rng.permutation(np.repeat(np.arange(num_rows), top_k))
    return LayerCall(
        layer=layer,
        x_TH=torch.from_numpy(rng.standard_normal((num_tokens, hidden_size), dtype=np.float32)).to(dtype),
        tokens_R=np.sort(rng.choice(num_tokens, num_rows, replace=False)),
        rows_n=rows_n,
        experts_n=experts_n,
        weights_n=rng.random(num_rows * top_k, dtype=np.float32),
    )


def channel_config(**changes: Any) -> ChannelConfig:
    """Make the config with which an engine opens a channel to a plain worker."""
    settings = {
        "run_secret": RUN_SECRET,
        "engine": "engine-0",
        "hidden_size": HIDDEN_SIZE,
        "top_k": TOP_K,
        "dtype": torch.float32,
        "max_rows": MAX_ROWS,
    }
    return ChannelConfig(**settings | changes)


@dataclass(frozen=True)
class PlainWorker:
    """A running worker."""

    endpoint: WorkerEndpoint
    process: BaseProcess

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def num_fds(self) -> int:
        return psutil.Process(self.process.pid).num_fds()


@contextmanager
def running_worker(
    name: str = "worker-0",
    *,
    run_secret: str = RUN_SECRET,
    max_rows: int = MAX_ROWS,
    memory: DeviceMemory | None = None,
    device: str = "cpu",
) -> Iterator[PlainWorker]:
    """A worker in a process of its own, gone at the end whatever happened to it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.plain_workers"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, name, run_secret, max_rows, memory, device))
    process.start()
    theirs.close()
    try:
        assert ours.poll(60), "the worker did not start"
        yield PlainWorker(msgspec.json.decode(ours.recv_bytes(), type=WorkerEndpoint), process)
    finally:
        ours.close()
        process.join(10)
        process.close()


def _serve(
    pipe: Connection, name: str, run_secret: str, max_rows: int, memory: DeviceMemory | None, device: str
) -> None:
    torch.set_num_threads(1)
    server = DataPlaneServer(
        compute,
        worker=name,
        run_secret=run_secret,
        max_rows=max_rows,
        num_experts=[NUM_EXPERTS] * 4,
        memory=memory,
        device=device,
    )
    server.start()
    pipe.send_bytes(msgspec.json.encode(server.endpoint))
    pipe.poll(None)  # until the test is over or its process is gone
    os._exit(0)  # without waiting for a call that hangs
