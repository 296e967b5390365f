"""The interface of a transport: a channel from an engine to a worker, with an end on each side."""

from __future__ import annotations

import select
import socket
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import torch

from moeless.dispatch.wire import LayerCall, ReceivedCall


class Channel(Protocol):
    """Carries one call at a time. Used by the engine's compute thread only, except `close`."""

    max_rows: int
    """Most rows of one call."""

    @property
    def kind(self) -> str:
        """in-process, shm, tcp, cuda-ipc, nccl or serve."""
        ...

    def submit(self, call: LayerCall) -> None:
        """Send and return at once. Raises TransportError if the worker is gone."""
        ...

    def collect(self, timeout_s: float) -> torch.Tensor:
        """Wait for the answer to the last submit: partial sums (R, H), valid until the next submit.

        Raises: WorkerTimeoutError after `timeout_s` seconds; TransportError if the worker hung up or failed. After
        a WorkerTimeoutError or a hang-up the channel is broken and must be closed, after a WorkerStartingError it is
        not.
        """
        ...

    @property
    def is_broken(self) -> bool:
        """True once no further call can be made; looks whether the worker hung up. May be called from any thread."""
        ...

    def close(self) -> None:
        """Hang up and release memory. May be called from any thread, and twice."""
        ...


class ServerChannel(Protocol):
    """A worker's end of a channel, as the data plane uses it."""

    @property
    def kind(self) -> str: ...

    engine: str
    socket: socket.socket
    """Tells by its end that the engine is gone."""
    bell: int
    """Descriptor that becomes readable when there is something to receive."""

    @property
    def has_unsent(self) -> bool:
        """Whether a part of an answer waits for room in the socket."""
        ...

    def receive(self) -> ReceivedCall | None:
        """The next call, or None while it is incomplete.

        Raises: TransportError when the engine hung up, or for nonsense.
        """
        ...

    def answer(self, sequence: int, partial_RH: torch.Tensor) -> None: ...

    def fail(self, sequence: int, status: int, message: str) -> None: ...

    def flush(self) -> None:
        """Send what is unsent as far as there is room. Raises TransportError when the engine hung up."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelConfig:
    """Settings of an engine's end."""

    run_secret: str = field(repr=False)
    """The run secret."""
    engine: str
    """Name of the calling engine, for the worker's log."""
    hidden_size: int
    top_k: int
    """Most pairs of a row."""
    dtype: torch.dtype
    """Type of the rows."""
    max_rows: int
    """Most rows of one call; the worker may allow fewer."""

    @property
    def max_pairs(self) -> int:
        """Most pairs of one call."""
        return self.max_rows * self.top_k

    @property
    def rows_bytes(self) -> int:
        """Size of the rows of the largest call, which are as large as its answer."""
        return self.max_rows * self.hidden_size * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Settings of a worker's end."""

    run_secret: str = field(repr=False)
    """The run secret."""
    max_rows: int
    """Most rows of one call."""
    num_experts: tuple[int, ...]
    """Experts of each layer, to check calls by."""


class WorkerEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Addresses of a worker's data plane."""

    worker: str
    host_id: str
    """Equal for processes of one machine."""
    unix_address: str
    """Name in the abstract socket namespace (without the leading NUL): it leaves nothing behind when a process dies."""
    tcp_host: str
    tcp_port: int
    device: str = "cpu"


def has_hung_up(sock: socket.socket) -> bool:
    """Return whether the other side closed its end; takes nothing from the socket."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def host_id() -> str:
    """Names this machine's running kernel; containers of one machine share it."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
