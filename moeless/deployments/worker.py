"""Deployments that host expert functions: a worker with many, or a deployment of a single one.

One runtime under both: an instance pool and its feed-forward. A worker opens a data plane of its own, because Serve
is the control plane and not the token path; a single function is called through its Serve handle, so that Serve
scales it by its own load.
"""

from __future__ import annotations

import logging
import threading
import time

import msgspec
import torch

from moeless.core.errors import MoelessError
from moeless.core.expert import FunctionId
from moeless.deployments.run_secrets import read_secrets
from moeless.deployments.runtime import bind_to, node_address
from moeless.deployments.settings import ServeSettings
from moeless.dispatch.call import answer_call
from moeless.dispatch.server import DataPlaneServer
from moeless.dispatch.wire import ReceivedCall
from moeless.functions.feed_forward import FeedForward
from moeless.functions.pool import InstancePool
from moeless.packages.packed_model import PackedModel
from moeless.packages.tensor_files import dtype_of_name

logger = logging.getLogger(__name__)

MAX_ROWS = 4096
"""Maximum rows of one call; longer ones are sent in parts."""


class WorkerReport(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's report on its instances."""

    worker: str
    states: dict[str, str]
    """Function name → state, for the functions that have an instance."""
    instance_bytes: dict[str, int]
    resident_bytes: int
    cold_starts: int
    evictions: int
    warm_starts: int


class ExpertHost:
    """The runtime of both deployments.

    Args:
        settings: of the run.
        name: the worker's, or the function's.
        functions: names of those to start at once.
        threads: torch threads.
    """

    def __init__(self, settings: ServeSettings, name: str, functions: list[str], *, threads: int) -> None:
        torch.set_num_threads(threads)
        self.name = name
        packed = PackedModel.open(settings.packed_path)
        self.pool = InstancePool(
            packed,
            device=settings.device,
            dtype=dtype_of_name(settings.dtype or packed.manifest.dtype),
            capacity_bytes=settings.worker_memory_bytes,
        )
        self.feed_forward = FeedForward(self.pool)
        started_s = time.perf_counter()
        self.pool.start_many(FunctionId.parse(function) for function in functions)
        seconds = time.perf_counter() - started_s
        logger.info("started functions worker=%s num=%d seconds=%.2f", name, len(functions), seconds)

    def compute(self, call: ReceivedCall) -> torch.Tensor:
        """A call's partial sums, where the call's rows are."""
        device, dtype = self.pool.device, self.pool.dtype
        x_RH = call.x_RH.to(device=device, dtype=dtype, non_blocking=True)
        partial_RH = self.feed_forward.partial_sums(
            call.layer, x_RH, call.rows_n, call.experts_n, call.weights_n.to(device)
        )
        return partial_RH.to(device=call.x_RH.device, dtype=call.x_RH.dtype)

    def report(self) -> WorkerReport:
        stats = self.pool.stats()
        states = self.pool.states()
        return WorkerReport(
            worker=self.name,
            states={str(function): state.value for function, state in states.items()},
            instance_bytes={str(function): self.pool.instance_bytes(function.layer) for function in states},
            resident_bytes=stats.resident_bytes,
            cold_starts=stats.cold_starts,
            evictions=stats.evictions,
            warm_starts=stats.warm_starts,
        )


class WorkerDeployment:
    """One worker: a process bound to one GPU or one share of the CPU. Its deployment has one replica."""

    def __init__(self, settings: ServeSettings, name: str, functions: list[str]) -> None:
        bind_to(settings.worker_cores(name))
        self._host = ExpertHost(settings, name, functions, threads=settings.worker_threads)
        self._server = DataPlaneServer(
            self._host.compute,
            worker=name,
            run_secret=read_secrets(settings.secrets_file).run_secret,
            max_rows=MAX_ROWS,
            num_experts=self._host.pool.num_experts,
            tcp_host=node_address(),
            device=settings.device,
        )
        self._server.start()

    def endpoint(self) -> bytes:
        """The data plane's WorkerEndpoint, as JSON."""
        return msgspec.json.encode(self._server.endpoint)

    def report(self) -> bytes:
        """A WorkerReport, as JSON."""
        return msgspec.json.encode(self._host.report())

    def check_health(self) -> None:
        """Called by Serve; a worker whose data plane died is replaced."""
        if not self._server.is_alive:
            raise MoelessError(f"the data plane of {self._host.name} died")

    def close(self) -> None:
        """Hang up on every engine."""
        if self._server.is_alive:
            self._server.stop()


class FunctionDeployment:
    """One expert function as a Serve deployment of its own, scaled by Serve from zero and back."""

    def __init__(self, settings: ServeSettings, function: str) -> None:
        self._host = ExpertHost(settings, function, [function], threads=settings.num_threads or 1)
        self._lock = threading.Lock()

    def __call__(self, frame: bytes) -> bytes:
        """A call's frame in, an answer's frame out (dispatch.wire)."""
        with self._lock, torch.inference_mode():
            return answer_call(frame, self._host.compute, max_rows=MAX_ROWS, num_experts=self._host.pool.num_experts)
