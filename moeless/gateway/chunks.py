"""Server-sent events of a stream, made from prepared pieces: for a step's text only the text is encoded.

Called by completions.py for every write to a client, that is up to once a token and stream.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from moeless.core.generation import GenerationDelta, TokenLogprob
from moeless.gateway.admission import AdmittedRequest
from moeless.gateway.shapes import Usage, chat_logprobs, completion_logprobs
from moeless.gateway.streams import Batch

DONE = b"data: [DONE]\n\n"

_to_json = msgspec.json.Encoder().encode


def event(data: bytes) -> bytes:
    """One event of a stream."""
    return b"data: " + data + b"\n\n"


class ChunkEncoder(Protocol):
    """Turns deltas into events in one endpoint's shape."""

    def opening(self) -> bytes:
        """Events that come before anything is generated."""
        ...

    def encode(self, batch: Batch) -> bytes:
        """Events for what came since the last call; empty if it has no text yet."""
        ...

    def closing(self) -> bytes:
        """The last events."""
        ...


class _Chunks:
    """What both shapes share: the frame around `choices`, merging of deltas, usage."""

    def __init__(self, kind: str, request: AdmittedRequest, created_unix_s: int) -> None:
        self._request = request
        self._usage = Usage(request)
        frame = {"id": request.request_id, "object": kind, "created": created_unix_s, "model": request.model_id}
        self._head = b"data: " + _to_json(frame)[:-1] + b',"choices":['
        # With include_usage, OpenAI writes a null usage into every chunk but the last.
        self._tail = b'],"usage":null}\n\n' if request.include_usage else b"]}\n\n"

    def _events(self, index: int, deltas: list[GenerationDelta]) -> bytes:
        raise NotImplementedError

    def encode(self, batch: Batch) -> bytes:
        add_usage = self._usage.add
        if len(batch) == 1:
            index, delta = batch[0]
            add_usage(index, delta)
            return self._events(index, [delta])
        deltas_of: dict[int, list[GenerationDelta]] = {}
        for index, delta in batch:
            add_usage(index, delta)
            deltas_of.setdefault(index, []).append(delta)
        return b"".join(self._events(index, deltas) for index, deltas in deltas_of.items())

    def closing(self) -> bytes:
        if not self._request.include_usage:
            return DONE
        return self._head + b'],"usage":' + _to_json(self._usage.body()) + b"}\n\n" + DONE


class ChatChunks(_Chunks):
    """`chat.completion.chunk`: a role first, then content, then the reason why it ended."""

    def __init__(self, request: AdmittedRequest, created_unix_s: int) -> None:
        super().__init__("chat.completion.chunk", request, created_unix_s)
        self._content_heads = [
            self._head + b'{"index":%d,"delta":{"content":' % index for index in range(len(request.sequences))
        ]
        self._content_tail = b'},"logprobs":null,"finish_reason":null}' + self._tail

    def opening(self) -> bytes:
        return b"".join(
            self._head
            + b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}' % index
            + self._tail
            for index in range(len(self._request.sequences))
        )

    def _events(self, index: int, deltas: list[GenerationDelta]) -> bytes:
        text = deltas[0].text if len(deltas) == 1 else "".join(delta.text for delta in deltas)
        events = b""
        if self._request.wants_logprobs:
            tokens = _logprobs_of(deltas)
            if text or tokens:
                events = (
                    self._content_heads[index] + _to_json(text)
                    + b'},"logprobs":' + _to_json(chat_logprobs(tokens)) + b',"finish_reason":null}' + self._tail
                )  # fmt: skip
        elif text:
            events = self._content_heads[index] + _to_json(text) + self._content_tail
        reason = deltas[-1].finish_reason
        if reason is not None:
            events += (
                self._head + b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%s"}'
                % (index, reason.encode()) + self._tail
            )  # fmt: skip
        return events


class CompletionChunks(_Chunks):
    """`text_completion`, whose chunks have the shape of the whole answer."""

    def __init__(self, request: AdmittedRequest, created_unix_s: int) -> None:
        super().__init__("text_completion", request, created_unix_s)
        self._text_heads = [self._head + b'{"index":%d,"text":' % index for index in range(len(request.sequences))]
        self._offsets = [0] * len(request.sequences)

    def opening(self) -> bytes:
        return b""

    def _events(self, index: int, deltas: list[GenerationDelta]) -> bytes:
        text = deltas[0].text if len(deltas) == 1 else "".join(delta.text for delta in deltas)
        reason = deltas[-1].finish_reason
        logprobs = b"null"
        if self._request.wants_logprobs:
            tokens = _logprobs_of(deltas)
            if not (text or tokens or reason):
                return b""
            logprobs = _to_json(completion_logprobs(tokens, self._offsets[index]))
            self._offsets[index] += sum(len(token.token) for token in tokens)
        elif not (text or reason):
            return b""
        return (
            self._text_heads[index] + _to_json(text) + b',"logprobs":' + logprobs
            + b',"finish_reason":' + _to_json(reason) + b"}" + self._tail
        )  # fmt: skip


def _logprobs_of(deltas: list[GenerationDelta]) -> list[TokenLogprob]:
    return [token for delta in deltas for token in delta.logprobs]
