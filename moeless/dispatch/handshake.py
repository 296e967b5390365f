"""Both ends of a new connection prove that they know the run's token, without sending it.

server → client: nonce; client → server: its proof, a nonce, what it asks for; server → client: its proof (and, for
shared memory, descriptors). Proofs are HMAC-SHA256. Messages are length-prefixed JSON of at most 4 KiB.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
from typing import Literal, TypeVar

import msgspec

from moeless.core.errors import HandshakeError
from moeless.dispatch.wire import PROTOCOL_VERSION

_LENGTH = struct.Struct("<I")
_MAX_MESSAGE_BYTES = 4096
HANDSHAKE_TIMEOUT_S = 5.0

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
    """Who calls, for the log."""
    call_bytes: int = 0
    answer_bytes: int = 0
    """Sizes of the shared areas."""
    detail: dict[str, str] = {}
    """What a transport needs beyond that (CUDA IPC handles, NCCL's unique id)."""


class Accept(msgspec.Struct, frozen=True, kw_only=True):
    """Server's answer."""

    proof: str = ""
    max_rows: int = 0
    error: str = ""
    detail: dict[str, str] = {}


def prove(token: str, role: Literal["client", "server"], nonce: str) -> str:
    return hmac.digest(token.encode(), f"{role}:{nonce}".encode(), "sha256").hex()


def send_message(sock: socket.socket, message: msgspec.Struct, fds: list[int] | None = None) -> None:
    body = msgspec.json.encode(message)
    frame = _LENGTH.pack(len(body)) + body
    if fds:
        socket.send_fds(sock, [frame], fds)
    else:
        sock.sendall(frame)


def receive_message(sock: socket.socket, type_: type[_Message], max_fds: int = 0) -> tuple[_Message, list[int]]:
    """One message and the descriptors that came with it. Raises HandshakeError for anything else."""
    fds: list[int] = []
    try:
        if max_fds:
            head, fds, _, _ = socket.recv_fds(sock, _LENGTH.size, max_fds)
        else:
            head = sock.recv(_LENGTH.size)
        while 0 < len(head) < _LENGTH.size:
            head += sock.recv(_LENGTH.size - len(head))
        if not head:
            raise HandshakeError("the peer hung up during the handshake")
        (length,) = _LENGTH.unpack(head)
        if length > _MAX_MESSAGE_BYTES:
            raise HandshakeError(f"a handshake message may have {_MAX_MESSAGE_BYTES} bytes, got {length}")
        body = b""
        while len(body) < length:
            chunk = sock.recv(length - len(body))
            if not chunk:
                raise HandshakeError("the peer hung up during the handshake")
            body += chunk
        return msgspec.json.decode(body, type=type_), fds
    except (OSError, msgspec.DecodeError) as error:
        raise HandshakeError(f"handshake failed: {error}") from error


def greet(sock: socket.socket, token: str) -> Ask:
    """Server side, up to the client's proof.

    Raises: HandshakeError if the client does not show the token (it is told so) or stays silent.
    """
    sock.settimeout(HANDSHAKE_TIMEOUT_S)
    nonce = secrets.token_hex(16)
    send_message(sock, Hello(version=PROTOCOL_VERSION, nonce=nonce))
    ask, _ = receive_message(sock, Ask)
    if not hmac.compare_digest(ask.proof, prove(token, "client", nonce)):
        send_message(sock, Accept(error="the token is not this run's"))
        raise HandshakeError(f"engine {ask.engine!r} did not show the run's token")
    return ask


def ask_for(
    sock: socket.socket,
    token: str,
    *,
    kind: TransportKind,
    engine: str,
    call_bytes: int = 0,
    answer_bytes: int = 0,
    detail: dict[str, str] | None = None,
    max_fds: int = 0,
) -> tuple[Accept, list[int]]:
    """Client side, whole. Raises HandshakeError if refused or if the server does not know the token."""
    sock.settimeout(HANDSHAKE_TIMEOUT_S)
    hello, _ = receive_message(sock, Hello)
    if hello.version != PROTOCOL_VERSION:
        raise HandshakeError(f"worker speaks protocol {hello.version}, this engine {PROTOCOL_VERSION}")
    nonce = secrets.token_hex(16)
    send_message(
        sock,
        Ask(
            proof=prove(token, "client", hello.nonce),
            nonce=nonce,
            kind=kind,
            engine=engine,
            call_bytes=call_bytes,
            answer_bytes=answer_bytes,
            detail=detail or {},
        ),
    )
    accept, fds = receive_message(sock, Accept, max_fds)
    if accept.error:
        raise HandshakeError(f"worker refused: {accept.error}")
    if not hmac.compare_digest(accept.proof, prove(token, "server", nonce)):
        raise HandshakeError("the worker did not show the run's token")
    return accept, fds
