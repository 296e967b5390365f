"""Messages between the gateway (text_pool.py) and its text processes (text_process.py): msgpack frames on sockets.

No pickle: a text process renders a stranger's template, and what it sends back must not run code here.
"""

from __future__ import annotations

import socket
import struct
from typing import Literal

import msgspec

from moeless.core.generation import ModelInfo
from moeless.gateway.admission import AdmittedRequest
from moeless.gateway.config import GatewayConfig
from moeless.text.template_probe import TemplateTraits

Endpoint = Literal["chat", "completion"]
HEADER = struct.Struct("<I")
"""Length of the frame that follows."""


class Load(msgspec.Struct, frozen=True, tag=True):
    """Gateway to parent: read this model's tokenizer. Answered by Done."""

    info: ModelInfo
    config: GatewayConfig
    """Without API keys, which no text process needs."""


class SetTraits(msgspec.Struct, frozen=True, tag=True):
    """Gateway to parent: how the chat template reads messages, for children that are forked later."""

    traits: TemplateTraits


class Fork(msgspec.Struct, frozen=True, tag=True):
    """Gateway to parent: fork a child that serves the socket that comes with this. Answered by Done with its pid."""


class Reap(msgspec.Struct, frozen=True, tag=True):
    """Gateway to parent: kill this child if it runs. Answered by Done with the signal that ended it, or 0."""

    pid: int


Command = Load | SetTraits | Fork | Reap


class Done(msgspec.Struct, frozen=True):
    """Parent to gateway."""

    number: int = 0
    error: str | None = None


class Probe(msgspec.Struct, frozen=True, tag=True):
    """Gateway to child: find out how the chat template reads messages."""


class Admit(msgspec.Struct, frozen=True, tag=True):
    """Gateway to child: the body of a request."""

    endpoint: Endpoint
    request_id: str
    body: bytes
    is_large: bool
    """The child takes lower priority and ends after its answer, and its memory goes back."""


Job = Probe | Admit


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An error of ours, by its class, or another with its traceback."""

    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    traceback: str | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Child to gateway: exactly one of the first three. A frame with the ids of each different prompt follows."""

    admitted: AdmittedRequest | None = None
    """Its sequences lack their prompts."""
    traits: TemplateTraits | None = None
    failure: Failure | None = None
    prompt_of: list[int] = []
    """Index of each sequence's prompt among the frames."""
    num_prompts: int = 0
    is_last: bool = False
    """The child ends after this answer."""


def send_frame(sock: socket.socket, payload: bytes) -> None:
    """On a blocking socket."""
    sock.sendall(HEADER.pack(len(payload)))
    sock.sendall(payload)


def receive_frame(sock: socket.socket) -> tuple[bytes, list[int]] | None:
    """The next frame and the file descriptors that came with it, from a blocking socket; None at the end."""
    head, descriptors, _, _ = socket.recv_fds(sock, HEADER.size, 1)
    while 0 < len(head) < HEADER.size:
        head += sock.recv(HEADER.size - len(head))
    if not head:
        return None
    payload = bytearray()
    (size,) = HEADER.unpack(head)
    while len(payload) < size:
        chunk = sock.recv(min(1 << 20, size - len(payload)))
        if not chunk:
            return None
        payload += chunk
    return bytes(payload), list(descriptors)
