"""Workers as processes of their own, without Ray: an instance pool behind a data plane, and a pipe to steer them by.

The processes are forked from a server that has imported torch once, so that each costs milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

import msgspec
import psutil
import torch

from moeless.core.errors import MoelessError
from moeless.core.expert import FunctionId
from moeless.dispatch.channel import Channel, WorkerEndpoint
from moeless.dispatch.connect import connect
from moeless.dispatch.server import DataPlaneServer
from moeless.dispatch.wire import ReceivedCall
from moeless.functions.feed_forward import FeedForward
from moeless.functions.pool import InstancePool
from moeless.packages.packed_model import PackedModel

RUN_SECRET = "the secret of this test run"
MAX_ROWS = 512
_REPLY_TIMEOUT_S = 60.0

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch", "moeless.dispatch.server", "moeless.functions.feed_forward"])


class WorkerReport(NamedTuple):
    states: dict[str, str]
    resident_bytes: int
    tokens_served: int
    calls_begun: int


class WorkerProcess:
    """One process that hosts any number of workers, each a pool and a data plane of its own."""

    def __init__(self) -> None:
        self._pipe, theirs = _processes.Pipe()
        self.process = _processes.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self._endpoints: dict[str, WorkerEndpoint] = {}
        self._packed: dict[str, PackedModel] = {}

    def host(
        self, worker: str, packed: PackedModel, functions: Iterable[FunctionId] = (), *, dtype: str = "float32"
    ) -> None:
        """Begin a worker and start `functions` on it."""
        names = [str(function) for function in functions]
        endpoint = self._ask("host", worker, str(packed.path), names, dtype)
        self._endpoints[worker] = msgspec.json.decode(endpoint, type=WorkerEndpoint)
        self._packed[worker] = packed

    def open(
        self,
        worker: str,
        *,
        transport: Literal["shm", "tcp"] = "shm",
        dtype: torch.dtype = torch.float32,
        max_rows: int = MAX_ROWS,
    ) -> Channel:
        """Open a channel to a worker; over TCP as if it were on another machine."""
        endpoint, manifest = self._endpoints[worker], self._packed[worker].manifest
        if transport == "tcp":
            endpoint = msgspec.structs.replace(endpoint, host_id="another machine")
        channel = connect(
            endpoint,
            run_secret=RUN_SECRET,
            engine="test",
            hidden_size=manifest.layers[0].layout.hidden_size,
            top_k=manifest.top_k,
            dtype=dtype,
            max_rows=max_rows,
        )
        assert channel.kind == transport
        return channel

    def endpoint(self, worker: str) -> WorkerEndpoint:
        return self._endpoints[worker]

    def report(self, worker: str) -> WorkerReport:
        return WorkerReport(*self._ask("report", worker))

    def hold(self, worker: str) -> None:
        """Let calls wait before they compute, until `release`."""
        self._ask("hold", worker)

    def release(self, worker: str) -> None:
        self._ask("release", worker)

    def unique_bytes(self) -> int:
        """Memory that would be free if the process ended."""
        return int(psutil.Process(self.process.pid).memory_full_info().uss)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def pause(self) -> None:
        """Stop every thread; the process stays and answers nothing."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def close(self) -> None:
        self._pipe.close()
        self.process.kill()  # a paused one takes no notice of its pipe
        self.process.join()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, command: str, *arguments: Any) -> Any:
        self._pipe.send((command, arguments))
        assert self._pipe.poll(_REPLY_TIMEOUT_S), f"the worker process did not answer {command}"
        ok, answer = self._pipe.recv()
        assert ok, f"the worker process failed at {command}: {answer}"
        return answer


class _Worker:
    """In the worker's process: what one endpoint serves."""

    def __init__(self, name: str, path: str, functions: list[str], dtype: str) -> None:
        self.pool = InstancePool(PackedModel.open(path), dtype=getattr(torch, dtype))
        self._feed_forward = FeedForward(self.pool)
        self.pool.start_many(FunctionId.parse(function) for function in functions)
        self.may_compute = threading.Event()
        self.may_compute.set()
        self._calls_begun = 0
        self.server = DataPlaneServer(
            self._compute, worker=name, run_secret=RUN_SECRET, max_rows=MAX_ROWS, num_experts=self.pool.num_experts
        )
        self.server.start()

    def _compute(self, call: ReceivedCall) -> torch.Tensor:
        self._calls_begun += 1
        if not self.may_compute.wait(_REPLY_TIMEOUT_S):
            raise MoelessError("nobody released the held calls")
        x_RH = call.x_RH.to(self.pool.dtype)
        out_RH = self._feed_forward.partial_sums(call.layer, x_RH, call.rows_n, call.experts_n, call.weights_n)
        return out_RH.to(call.x_RH.dtype)

    def report(self) -> WorkerReport:
        tokens = sum(int(self.pool.tokens_served(layer).sum()) for layer in range(self.pool.num_layers))
        states = {str(function): state.value for function, state in self.pool.states().items()}
        return WorkerReport(states, self.pool.stats().resident_bytes, tokens, self._calls_begun)


def _serve(pipe: Connection) -> None:
    """The worker process: answers commands until the pipe closes."""
    torch.set_num_threads(1)
    workers: dict[str, _Worker] = {}

    def handle(command: str, name: str, *arguments: Any) -> Any:
        if command == "host":
            workers[name] = _Worker(name, *arguments)
            return msgspec.json.encode(workers[name].server.endpoint)
        if command == "hold":
            return workers[name].may_compute.clear()
        if command == "release":
            return workers[name].may_compute.set()
        assert command == "report"
        return tuple(workers[name].report())

    while True:
        try:
            command, arguments = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            pipe.send((True, handle(command, *arguments)))
        except Exception as error:
            pipe.send((False, repr(error)))
