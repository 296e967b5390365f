"""Transport between GPUs of different machines: headers and pairs over TCP, rows over NCCL.

The TCP channel of tcp.py says that a call or an answer comes and, by its end, that a process died; then the process
group is aborted, so that no kernel waits for ever. The handshake carries the address of the group's store to the
engine. Neither NCCL nor the store know the run secret: as with every use of NCCL, the network between the nodes must be
trusted.
"""

from __future__ import annotations

import socket
import time

import torch

from moeless.core.errors import HandshakeError, TransportError
from moeless.dispatch.channel import ChannelConfig, ServerConfig, WorkerEndpoint, has_hung_up
from moeless.dispatch.handshake import Ask, TransportKind, rows_bytes_of
from moeless.dispatch.pair_group import ENGINE_RANK, WORKER_RANK, PairGroup, backend_of, join_store, open_store
from moeless.dispatch.socket_channel import frame_bytes_without_rows
from moeless.dispatch.tcp import TcpChannel, TcpServerChannel
from moeless.dispatch.wire import (
    LayerCall,
    ReceivedCall,
    answer_length,
    gather_rows,
    read_answer_head,
    read_call_head,
    receive_call,
    routing_bytes,
    write_answer_head,
    write_routing,
)

_ROWS_TIMEOUT_S = 2.0
"""Time that a worker waits for the rows of an announced call: they are under way, or the engine is stuck."""


class CollectiveChannel(TcpChannel):
    """An engine's channel to a worker on another machine, both with their rows on GPUs (or, for tests, on the CPU)."""

    kind: TransportKind = "nccl"

    def __init__(self, endpoint: WorkerEndpoint, config: ChannelConfig, device: torch.device) -> None:
        """Connect and meet. Raises HandshakeError or TransportError."""
        self._device = device
        self._address = endpoint.tcp_host
        self._group: PairGroup | None = None
        super().__init__(endpoint, config)

    def _frame_bytes(self, config: ChannelConfig) -> tuple[int, int]:
        return frame_bytes_without_rows(config)

    def _offer(self, config: ChannelConfig) -> dict[str, str]:
        return {"rows_bytes": str(config.rows_bytes), "backend": backend_of(self._device)}

    def _take_offer(self, detail: dict[str, str]) -> None:
        store = join_store(self._address, detail)
        own_address = self._socket.getsockname()[0]
        self._group = PairGroup(store, rank=ENGINE_RANK, device=self._device, address=own_address)

    def _put(self, call: LayerCall) -> int:
        return write_routing(self._call, call, self._sequence)

    def _wanted_bytes(self) -> int:
        return answer_length(self._answer.buffer, rows_inside=False)

    def _send_rows(self, call: LayerCall) -> None:
        assert self._group is not None
        self._group.send(gather_rows(call).contiguous())

    def _take(self, deadline_s: float) -> torch.Tensor:
        assert self._group is not None
        dtype = read_answer_head(self._answer, self._sequence, self._shape)
        answer_RH = torch.empty(self._shape, dtype=dtype, device=self._device)
        self._group.receive(answer_RH, deadline_s=deadline_s, is_gone=lambda: has_hung_up(self._socket))
        return answer_RH

    def _release(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None


class CollectiveServerChannel(TcpServerChannel):
    """A worker's end of one engine's channel.

    Args:
        device: where the rows of calls are put.
        Others as for TcpServerChannel.
    """

    kind: TransportKind = "nccl"

    def __init__(self, sock: socket.socket, ask: Ask, config: ServerConfig, device: torch.device) -> None:
        """Accept and meet. Raises HandshakeError for a bad size, TransportError or OSError."""
        self._device = device
        self._group: PairGroup | None = None
        super().__init__(sock, ask, config)

    def _offer(self, ask: Ask) -> dict[str, str]:
        self._rows_bytes = rows_bytes_of(ask)
        ours, theirs = backend_of(self._device), ask.detail.get("backend")
        if ours != theirs:
            raise HandshakeError(f"backend must be {ours} for a worker on {self._device}, got {theirs}")
        self._address = self.socket.getsockname()[0]
        self._store, detail = open_store(self._address)
        return detail

    def _meet(self) -> None:
        self._group = PairGroup(self._store, rank=WORKER_RANK, device=self._device, address=self._address)

    def _wanted_bytes(self) -> int:
        return routing_bytes(read_call_head(self._call.buffer).num_pairs)

    def _take(self) -> ReceivedCall:
        assert self._group is not None
        head = read_call_head(self._call.buffer)
        num_bytes = head.num_rows * head.hidden_size * head.dtype.itemsize
        if head.num_rows > self._config.max_rows or num_bytes > self._rows_bytes:
            raise TransportError(
                f"a call may have {self._config.max_rows} rows in {self._rows_bytes} bytes, "
                f"got {head.num_rows} in {num_bytes}"
            )
        x_RH = torch.empty((head.num_rows, head.hidden_size), dtype=head.dtype, device=self._device)
        call = receive_call(self._call, head, x_RH, num_experts=self._config.num_experts)
        deadline_s = time.monotonic() + _ROWS_TIMEOUT_S
        self._group.receive(x_RH, deadline_s=deadline_s, is_gone=lambda: has_hung_up(self.socket))
        return call

    def _put(self, sequence: int, partial_RH: torch.Tensor) -> int:
        return write_answer_head(self._answer, sequence, partial_RH)

    def _send_rows(self, partial_RH: torch.Tensor) -> None:
        assert self._group is not None
        self._group.send(partial_RH.to(self._device).contiguous())

    def _release(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None
