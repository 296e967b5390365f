"""A process group of two, an engine and a worker, that moves rows from GPU to GPU: NCCL, and gloo as its CPU twin."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from moeless.core.errors import TransportError, WorkerTimeoutError

ENGINE_RANK, WORKER_RANK = 0, 1
_SETUP_TIMEOUT = timedelta(seconds=30)
"""NCCL takes seconds to find its way the first time."""
_LOOK_FOR_DEATH_EVERY = 256
"""Looks at a transfer between two looks at whether the other side is alive."""


class PairGroup:
    """One side of the pair. Used by one thread at a time.

    Args:
        store: where the two find each other; shared by nobody else.
        rank: ENGINE_RANK or WORKER_RANK.
        device: of the rows; chooses NCCL or gloo.
        address: this side's own, for gloo.
    """

    def __init__(self, store: Store, *, rank: int, device: torch.device, address: str) -> None:
        """Meet the other side and move a first number both ways. Raises TransportError if that fails."""
        self._device = device
        self._other = WORKER_RANK if rank == ENGINE_RANK else ENGINE_RANK
        self._sending: tuple[torch.Tensor, Any] | None = None
        try:
            self._group = _make_group(store, rank, device, address)
            number = torch.full((1,), float(rank), device=device)
            # The first transfer makes NCCL's communicator: now, and not under a call's deadline.
            deadline_s = time.monotonic() + _SETUP_TIMEOUT.total_seconds()
            if rank == ENGINE_RANK:
                self.send(number)
                self.receive(number, deadline_s=deadline_s, is_gone=lambda: False)
            else:
                self.receive(number, deadline_s=deadline_s, is_gone=lambda: False)
                self.send(torch.full((1,), float(rank), device=device))
        except RuntimeError as error:
            raise TransportError(f"the process group could not be set up: {error}") from error
        if number.item() != self._other:
            raise TransportError(f"the process group is mixed up: rank {self._other} sent {number.item()}")

    def send(self, tensor: torch.Tensor) -> None:
        """Begin to send `tensor` (contiguous), which must not change until the other side has answered."""
        try:
            if self._sending is not None:
                self._sending[1].wait()
            self._sending = (tensor, self._group.send([tensor], self._other, 0))
        except RuntimeError as error:
            raise TransportError(f"rows could not be sent: {error}") from error

    def receive(self, tensor: torch.Tensor, *, deadline_s: float, is_gone: Callable[[], bool]) -> None:
        """Fill `tensor` (contiguous).

        Args:
            deadline_s: on the monotonic clock.
            is_gone: whether the other side is known to be dead.
        Raises: WorkerTimeoutError after the deadline; TransportError if the other side is gone. Neither side can use
        the group after that.
        """
        try:
            work = self._group.recv([tensor], self._other, 0)
            if self._device.type == "cuda":
                _look_until_done(work, deadline_s, is_gone)
                work.wait()
            else:
                work.wait(timedelta(seconds=max(0.001, deadline_s - time.monotonic())))
        except RuntimeError as error:
            if time.monotonic() >= deadline_s:
                raise WorkerTimeoutError(f"rows did not come in time: {error}") from error
            raise TransportError(f"rows could not be received: {error}") from error

    def abort(self) -> None:
        """End all that is under way, on the device too, and the group."""
        self._group.abort()
        self._sending = None


def backend_of(device: torch.device) -> str:
    """Return the backend that moves rows of `device`. Raises TransportError if torch was built without it."""
    if device.type != "cuda":
        return "gloo"
    if not dist.is_nccl_available():
        raise TransportError("torch was built without NCCL")
    return "nccl"


def open_store(address: str) -> tuple[Store, dict[str, str]]:
    """The worker's store, on a free port of `address` only, and what the engine must know to join it.

    Raises: TransportError.
    """
    prefix = secrets.token_hex(16)
    try:
        listener = socket.create_server((address, 0))
        port = int(listener.getsockname()[1])
        store = TCPStore(
            address,
            port,
            world_size=2,
            is_master=True,
            wait_for_workers=False,
            timeout=_SETUP_TIMEOUT,
            master_listen_fd=listener.detach(),
        )
    except (OSError, RuntimeError) as error:
        raise TransportError(f"no store for a process group at {address}: {error}") from error
    return PrefixStore(prefix, store), {"port": str(port), "prefix": prefix}


def join_store(address: str, detail: dict[str, str]) -> Store:
    """The engine's view of the worker's store. Raises TransportError."""
    try:
        store = TCPStore(
            address,
            int(detail["port"]),
            world_size=2,
            is_master=False,
            wait_for_workers=False,
            timeout=_SETUP_TIMEOUT,
        )
        return PrefixStore(detail["prefix"], store)
    except (KeyError, ValueError, RuntimeError) as error:
        raise TransportError(f"the worker's store cannot be reached: {error}") from error


def _look_until_done(work: Any, deadline_s: float, is_gone: Callable[[], bool]) -> None:
    """Wait on the host: a stream that waits for the transfer of a process that died would wait for ever."""
    num_looks = 0
    while not work.is_completed():
        num_looks += 1
        if num_looks % _LOOK_FOR_DEATH_EVERY == 0:
            if is_gone():
                raise TransportError("the other side of the process group hung up")
            if time.monotonic() > deadline_s:
                raise WorkerTimeoutError("rows did not come in time")
        os.sched_yield()


def _make_group(store: Store, rank: int, device: torch.device, address: str) -> Any:
    if backend_of(device) == "nccl":
        # A transfer that hangs is aborted by us; the group's own watchdog would end the whole process.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        with torch.cuda.device(device):
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = _SETUP_TIMEOUT
            return dist.ProcessGroupNCCL(store, rank, 2, options)
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = _SETUP_TIMEOUT
    options._devices = [gloo.create_device(hostname=address)]
    return gloo(store, rank, 2, options)
