"""Both ends of a new connection prove that they know the run secret, without sending it.

server → client: nonce; client → server: its proof, a nonce, what it asks for; server → client: its proof (and, for
shared memory, descriptors). Proofs are HMAC-SHA256. Messages are length-prefixed JSON of at most 4 KiB.
"""

from __future__ import annotations

import array
import hmac
import os
import secrets
import socket
import struct
import time
from typing import Literal, TypeVar

import msgspec

from moeless.core.errors import HandshakeError
from moeless.dispatch.wire import ANSWER_HEADER, CALL_HEADER, PROTOCOL_VERSION

_LENGTH = struct.Struct("<I")
_MAX_MESSAGE_BYTES = 4096
HANDSHAKE_TIMEOUT_S = 5.0
MAX_AREA_BYTES = 4 << 30

TransportKind = Literal["shm", "tcp", "cuda-ipc", "nccl"]
_Message = TypeVar("_Message", bound=msgspec.Struct)


class Hello(msgspec.Struct, frozen=True):
    """Server's first message."""

    version: int
    nonce: str


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """Client's message: proof and what it wants."""

    proof: str
    nonce: str
    kind: TransportKind
    engine: str
    """Name of the calling engine, for the log."""
    call_bytes: int = 0
    answer_bytes: int = 0
    """Sizes of the largest call and answer."""
    detail: dict[str, str] = {}
    """Further data of a transport (CUDA IPC handles, NCCL's unique id)."""


class Accept(msgspec.Struct, frozen=True, kw_only=True):
    """Server's answer."""

    proof: str = ""
    max_rows: int = 0
    error: str = ""
    detail: dict[str, str] = {}


def prove(run_secret: str, role: Literal["client", "server"], nonce: str) -> str:
    """Proof that `role` knows the run secret, for the side that chose `nonce`."""
    return hmac.digest(run_secret.encode(), f"{role}:{nonce}".encode(), "sha256").hex()


def _is_proof(proof: str, run_secret: str, role: Literal["client", "server"], nonce: str) -> bool:
    return hmac.compare_digest(proof.encode(), prove(run_secret, role, nonce).encode())


def send_message(sock: socket.socket, message: msgspec.Struct, fds: list[int] | None = None) -> None:
    """Send one message, and descriptors with it. Raises OSError."""
    frame = _frame(message)
    if fds:
        socket.send_fds(sock, [frame], fds)
    else:
        sock.sendall(frame)


def _frame(message: msgspec.Struct) -> bytes:
    body = msgspec.json.encode(message)
    return _LENGTH.pack(len(body)) + body


def _check_length(length: int) -> None:
    if length > _MAX_MESSAGE_BYTES:
        raise HandshakeError(f"a handshake message may have {_MAX_MESSAGE_BYTES} bytes, got {length}")


def _decode(body: bytes, type_: type[_Message]) -> _Message:
    try:
        return msgspec.json.decode(body, type=type_)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError, and no DecodeError
        raise HandshakeError(f"handshake failed: {error}") from error


def receive_message(sock: socket.socket, type_: type[_Message], max_fds: int = 0) -> tuple[_Message, list[int]]:
    """One message and the descriptors that came with it. Raises HandshakeError for anything else."""
    fds: list[int] = []
    deadline_s = time.monotonic() + HANDSHAKE_TIMEOUT_S
    try:
        head = _receive_exactly(sock, _LENGTH.size, deadline_s, fds, max_fds)
        (length,) = _LENGTH.unpack(head)
        _check_length(length)
        return _decode(_receive_exactly(sock, length, deadline_s, fds, 0), type_), fds
    except HandshakeError:
        close_all(fds)
        raise
    except OSError as error:
        close_all(fds)
        raise HandshakeError(f"handshake failed: {error}") from error


def _receive_exactly(sock: socket.socket, length: int, deadline_s: float, fds: list[int], max_fds: int) -> bytes:
    """Bytes; descriptors that come with the first of them go into `fds`.

    The deadline holds for all of them, so that a client that sends a byte now and then is given up too.
    """
    room = socket.CMSG_LEN(max_fds * array.array("i").itemsize) if max_fds else 0
    data = b""
    while len(data) < length:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        sock.settimeout(left_s)
        chunk, ancillary, _, _ = sock.recvmsg(length - len(data), room, socket.MSG_CMSG_CLOEXEC)
        for _, _, packed in ancillary:
            numbers = array.array("i")
            numbers.frombytes(packed[: len(packed) // numbers.itemsize * numbers.itemsize])
            fds.extend(numbers)
        if not chunk:
            raise HandshakeError("the other side hung up during the handshake")
        data += chunk
    return data


def close_all(fds: list[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)


class ProofCheck:
    """The server's side up to the client's proof, without input or output: feed it bytes as they come."""

    def __init__(self, run_secret: str, *, nonce: str) -> None:
        self._run_secret = run_secret
        self._nonce = nonce
        self._data = bytearray()
        self.hello = _frame(Hello(version=PROTOCOL_VERSION, nonce=nonce))
        """First message to send."""
        self.refusal = b""
        """Message to send before closing on a client that `feed` refused; may be empty."""

    @property
    def num_wanted_bytes(self) -> int:
        """Bytes that the client's message still lacks, as far as is known."""
        if len(self._data) < _LENGTH.size:
            return _LENGTH.size - len(self._data)
        return _LENGTH.size + self._length - len(self._data)

    @property
    def _length(self) -> int:
        return int(_LENGTH.unpack_from(self._data)[0])

    def feed(self, data: bytes) -> Ask | None:
        """The client's message once it is whole and proves the run secret. Raises HandshakeError."""
        self._data += data
        if len(self._data) < _LENGTH.size:
            return None
        _check_length(self._length)
        if self.num_wanted_bytes:
            return None
        ask = _decode(bytes(self._data[_LENGTH.size :]), Ask)
        if not _is_proof(ask.proof, self._run_secret, "client", self._nonce):
            self.refusal = _frame(Accept(error="the run secret is not this run's"))
            raise HandshakeError(f"engine {ask.engine!r:.100} did not prove the run secret")
        return ask


def check_sizes(sock: socket.socket, ask: Ask) -> None:
    """Refuse sizes that no honest engine asks for. Raises HandshakeError, after telling the client why."""
    for name, least in (("call_bytes", CALL_HEADER.size), ("answer_bytes", ANSWER_HEADER.size)):
        size = getattr(ask, name)
        if not least <= size <= MAX_AREA_BYTES:
            reason = f"{name} must be from {least} to {MAX_AREA_BYTES}, got {size}"
            send_message(sock, Accept(error=reason))
            raise HandshakeError(reason)


def rows_bytes_of(ask: Ask) -> int:
    """Size of the rows of the largest call, for transports that move rows apart. Raises HandshakeError."""
    text = ask.detail.get("rows_bytes", "")
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= MAX_AREA_BYTES:
        raise HandshakeError(f"rows_bytes must be from 1 to {MAX_AREA_BYTES}, got {text!r}")
    return int(text)


def ask_for(
    sock: socket.socket,
    run_secret: str,
    *,
    kind: TransportKind,
    engine: str,
    call_bytes: int,
    answer_bytes: int,
    detail: dict[str, str] | None = None,
    max_fds: int = 0,
) -> tuple[Accept, list[int]]:
    """Client side, whole. Raises HandshakeError if refused or if the server does not know the run secret."""
    sock.settimeout(HANDSHAKE_TIMEOUT_S)
    hello, _ = receive_message(sock, Hello)
    if hello.version != PROTOCOL_VERSION:
        raise HandshakeError(f"worker speaks protocol {hello.version}, this engine {PROTOCOL_VERSION}")
    nonce = secrets.token_hex(16)
    try:
        send_message(
            sock,
            Ask(
                proof=prove(run_secret, "client", hello.nonce),
                nonce=nonce,
                kind=kind,
                engine=engine,
                call_bytes=call_bytes,
                answer_bytes=answer_bytes,
                detail=detail or {},
            ),
        )
    except OSError as error:
        raise HandshakeError(f"handshake failed: {error}") from error
    accept, fds = receive_message(sock, Accept, max_fds)
    reason = ""
    if accept.error:
        reason = f"worker refused: {accept.error}"
    elif not _is_proof(accept.proof, run_secret, "server", nonce):
        reason = "the worker did not prove the run secret"
    elif len(fds) != max_fds:
        reason = f"the worker passed {len(fds)} descriptors instead of {max_fds}"
    if reason:
        close_all(fds)
        raise HandshakeError(reason)
    return accept, fds
