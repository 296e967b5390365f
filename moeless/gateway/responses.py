"""Bodies of the generating endpoints in OpenAI's shapes: whole responses, and the server-sent events of a stream.

Called by completions.py. A stream's events are made from prepared pieces, so that for each step's text only the text
is encoded: an event is written up to once a token and stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from moeless.core.generation import FinishReason, GenerationDelta, TokenLogprob
from moeless.gateway.admission import AdmittedRequest
from moeless.gateway.streams import Batch, SequenceStreams

DONE = b"data: [DONE]\n\n"

_MIN_LOGPROB = -9999.0
"""What OpenAI writes for "very unlikely"; JSON has no minus infinity."""

_to_json = msgspec.json.Encoder().encode


def chat_logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any]:
    """`choices[].logprobs` of /v1/chat/completions."""
    return {
        "content": [
            _chat_token(token.token, token.token_bytes, token.logprob)
            | {"top_logprobs": [_chat_token(text, data, logprob) for _, text, data, logprob in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }


def _chat_token(text: str, data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, _MIN_LOGPROB), "bytes": list(data)}


def completion_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """`choices[].logprobs` of /v1/completions; offsets count characters of the generated text."""
    return {
        "text_offset": [token.text_offset for token in tokens],
        "token_logprobs": [max(token.logprob, _MIN_LOGPROB) for token in tokens],
        "tokens": [token.token for token in tokens],
        "top_logprobs": [_top_of(token) for token in tokens],
    }


def _top_of(token: TokenLogprob) -> dict[str, float]:
    top: dict[str, float] = {}
    for _, text, _, logprob in token.top:
        # Two tokens may have one text (parts of a character); the likelier comes first and stays.
        top.setdefault(text, max(logprob, _MIN_LOGPROB))
    return top


@dataclass(slots=True)
class Usage:
    """Counts a response's tokens while they come."""

    request: AdmittedRequest
    num_completion_tokens: int = 0
    _num_cached_tokens: dict[int, int] = field(default_factory=dict)

    def add(self, index: int, delta: GenerationDelta) -> None:
        """Count one delta of the choice `index`."""
        self.num_completion_tokens += delta.num_tokens
        if delta.num_cached_tokens and index % self.request.num_choices == 0:
            # The other choices of a prompt find it in the cache because the first one put it there.
            self._num_cached_tokens[index] = delta.num_cached_tokens

    def body(self) -> dict[str, Any]:
        """The `usage` object."""
        return {
            "prompt_tokens": self.request.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.request.num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached_tokens.values())},
        }


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class WholeResponse:
    """Everything that the sequences of a request generated."""

    request: AdmittedRequest
    choices: list[_Choice]
    usage: Usage

    @classmethod
    async def collect(cls, request: AdmittedRequest, streams: SequenceStreams) -> WholeResponse:
        """Read the streams to their end. Raises: what made a sequence fail."""
        response = cls(request, [_Choice() for _ in request.sequences], Usage(request))
        async with streams:
            while batch := await streams.take():
                for index, delta in batch:
                    choice = response.choices[index]
                    choice.texts.append(delta.text)
                    choice.logprobs.extend(delta.logprobs)
                    choice.finish_reason = delta.finish_reason
                    response.usage.add(index, delta)
        return response


def chat_response(response: WholeResponse, created_unix_s: int) -> bytes:
    """Body of POST /v1/chat/completions."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
            "logprobs": chat_logprobs(choice.logprobs) if response.request.wants_logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(response.choices)
    ]
    return _encode("chat.completion", response, choices, created_unix_s)


def completion_response(response: WholeResponse, created_unix_s: int) -> bytes:
    """Body of POST /v1/completions."""
    choices = [
        {
            "index": index,
            "text": "".join(choice.texts),
            "logprobs": completion_logprobs(choice.logprobs) if response.request.wants_logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(response.choices)
    ]
    return _encode("text_completion", response, choices, created_unix_s)


def _encode(kind: str, response: WholeResponse, choices: list[dict[str, Any]], created_unix_s: int) -> bytes:
    return msgspec.json.encode(
        {
            "id": response.request.request_id,
            "object": kind,
            "created": created_unix_s,
            "model": response.request.model_id,
            "choices": choices,
            "usage": response.usage.body(),
        }
    )


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
    """Shared by both shapes: the frame around `choices`, merging of deltas, usage."""

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
    """`text_completion`, whose chunks have the shape of the whole response."""

    def __init__(self, request: AdmittedRequest, created_unix_s: int) -> None:
        super().__init__("text_completion", request, created_unix_s)
        self._text_heads = [self._head + b'{"index":%d,"text":' % index for index in range(len(request.sequences))]

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
            logprobs = _to_json(completion_logprobs(tokens))
        elif not (text or reason):
            return b""
        return (
            self._text_heads[index] + _to_json(text) + b',"logprobs":' + logprobs
            + b',"finish_reason":' + _to_json(reason) + b"}" + self._tail
        )  # fmt: skip


def _logprobs_of(deltas: list[GenerationDelta]) -> list[TokenLogprob]:
    return [token for delta in deltas for token in delta.logprobs]
