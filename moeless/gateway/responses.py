"""Bodies of the generating endpoints in OpenAI's shapes: whole responses, and the server-sent events of a stream.

Called by completions.py. A stream's events are made from prepared pieces, so that for each step's text only the text
is encoded: an event is written up to once a token and stream.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from msgspec import structs

from moeless.core.generation import FinishReason, GenerationDelta, TokenLogprob
from moeless.gateway.admission import AdmittedRequest, EchoedPrompt
from moeless.gateway.streams import Batch, SequenceStreams

_CONTENT_TAIL = b'},"logprobs":null,"finish_reason":null}'

DONE = b"data: [DONE]\n\n"

_MIN_LOGPROB = -9999.0
"""OpenAI's number for "very unlikely"; JSON has no minus infinity."""

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


def completion_logprobs(tokens: Sequence[TokenLogprob], first_offset: int) -> dict[str, Any]:
    """`choices[].logprobs` of /v1/completions.

    Args:
        first_offset: characters of the choice's text before the generated text.
    """
    return {
        "text_offset": [first_offset + token.text_offset for token in tokens],
        "token_logprobs": [max(token.logprob, _MIN_LOGPROB) for token in tokens],
        "tokens": [token.token for token in tokens],
        "top_logprobs": [_top_of(token) for token in tokens],
    }


def _top_of(token: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens and the token itself: one entry more than requested where it is not among them."""
    top: dict[str, float] = {}
    for _, text, _, logprob in token.top:
        # Two tokens may have one text (parts of a character); the likelier comes first and stays.
        top.setdefault(text, max(logprob, _MIN_LOGPROB))
    top.setdefault(token.token, max(token.logprob, _MIN_LOGPROB))
    return top


def prompt_logprobs(tokens: Iterable[TokenLogprob]) -> list[dict[str, Any] | None]:
    """`prompt_logprobs` as vLLM has it: for each prompt token what was likely there, by token id; null for the first.

    Args:
        tokens: the prompt's tokens from the second on.
    """
    return [None, *(_by_token_id(token) for token in tokens)]


def _by_token_id(token: TokenLogprob) -> dict[str, Any]:
    entries = {
        str(token_id): {"logprob": max(logprob, _MIN_LOGPROB), "rank": rank, "decoded_token": text}
        for rank, (token_id, text, _, logprob) in enumerate(token.top, start=1)
    }
    own = {"logprob": max(token.logprob, _MIN_LOGPROB), "rank": token.rank, "decoded_token": token.token}
    entries.setdefault(str(token.token_id), own)
    return entries


def echoed_logprobs(echo: EchoedPrompt, tokens: Sequence[TokenLogprob], num_top: int) -> dict[str, Any]:
    """`choices[].logprobs` of an echoed prompt, whose first token has none.

    Args:
        tokens: the prompt's tokens from the second on.
    """
    tokens = [structs.replace(token, top=token.top[:num_top]) for token in tokens]
    texts = [echo.first_token, *(token.token for token in tokens)]
    return {
        "text_offset": _offsets_in(echo, [token.token_bytes for token in tokens]),
        "token_logprobs": [None, *(max(token.logprob, _MIN_LOGPROB) for token in tokens)],
        "tokens": texts,
        "top_logprobs": [None, *(_top_of(token) for token in tokens)],
    }


def _offsets_in(echo: EchoedPrompt, later_tokens: list[bytes]) -> list[int]:
    """Return each token's start in the echoed text, in characters. Special tokens that the text lacks take no room."""
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    offset, offsets = 0, []
    for data in (echo.first_token.encode(), *later_tokens):
        offsets.append(offset)
        text = utf8.decode(data)
        if echo.text.startswith(text, offset):
            offset += len(text)
        elif offset == 0 and echo.text.startswith(text.lstrip(" ")):
            offset = len(text.lstrip(" "))  # SentencePiece writes a space before the first word
    return offsets


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
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


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
                    choice.prompt_logprobs.extend(delta.prompt_logprobs)
                    choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
                    response.usage.add(index, delta)
        return response


def chat_response(response: WholeResponse, created_unix_s: int) -> bytes:
    """Body of POST /v1/chat/completions."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
            "logprobs": chat_logprobs(choice.logprobs) if response.request.num_logprobs is not None else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        for index, choice in enumerate(response.choices)
    ]
    more = {}
    if response.request.wants_prompt_logprobs:
        more["prompt_logprobs"] = prompt_logprobs(response.choices[0].prompt_logprobs)
    return _encode("chat.completion", response, choices, created_unix_s, more)


def completion_response(response: WholeResponse, created_unix_s: int) -> bytes:
    """Body of POST /v1/completions."""
    choices = [_completion_choice(response.request, index, choice) for index, choice in enumerate(response.choices)]
    return _encode("text_completion", response, choices, created_unix_s)


def _completion_choice(request: AdmittedRequest, index: int, choice: _Choice) -> dict[str, Any]:
    echo = request.echo_of(index)
    logprobs = None
    if request.num_logprobs is not None:
        logprobs = completion_logprobs(choice.logprobs, len(echo.text) if echo else 0)
        if echo is not None:
            echoed = echoed_logprobs(echo, choice.prompt_logprobs, request.num_logprobs)
            logprobs = {name: echoed[name] + values for name, values in logprobs.items()}
    body = {
        "index": index,
        "text": (echo.text if echo else "") + "".join(choice.texts),
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
    if request.wants_prompt_logprobs:
        body["prompt_logprobs"] = prompt_logprobs(choice.prompt_logprobs)
    return body


def _encode(
    kind: str,
    response: WholeResponse,
    choices: list[dict[str, Any]],
    created_unix_s: int,
    more: Mapping[str, Any] | None = None,
) -> bytes:
    return msgspec.json.encode(
        {
            "id": response.request.request_id,
            "object": kind,
            "created": created_unix_s,
            "model": response.request.model_id,
            "choices": choices,
            "usage": response.usage.body(),
            **(more or {}),
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
        self._constant_tail = b'],"usage":null}\n\n' if request.include_usage else b"]}\n\n"

    @property
    def _tail(self) -> bytes:
        if not self._request.wants_continuous_usage:
            return self._constant_tail
        return b'],"usage":' + _to_json(self._usage.body()) + b"}\n\n"

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
        if self._request.num_logprobs is not None:
            tokens = _logprobs_of(deltas)
            if text or tokens:
                events = (
                    self._content_heads[index] + _to_json(text)
                    + b'},"logprobs":' + _to_json(chat_logprobs(tokens)) + b',"finish_reason":null}' + self._tail
                )  # fmt: skip
        elif text:
            events = self._content_heads[index] + _to_json(text) + _CONTENT_TAIL + self._tail
        reason = deltas[-1].finish_reason
        if reason is not None:
            events += (
                self._head + b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%s","stop_reason":%s}'
                % (index, reason.encode(), _to_json(deltas[-1].stop_reason)) + self._tail
            )  # fmt: skip
        return events


class CompletionChunks(_Chunks):
    """`text_completion`, whose chunks have the shape of the whole response."""

    def __init__(self, request: AdmittedRequest, created_unix_s: int) -> None:
        super().__init__("text_completion", request, created_unix_s)
        self._text_heads = [self._head + b'{"index":%d,"text":' % index for index in range(len(request.sequences))]
        echoes = [request.echo_of(index) for index in range(len(request.sequences))]
        self._first_offsets = [len(echo.text) if echo else 0 for echo in echoes]
        self._prompt_logprobs: dict[int, list[TokenLogprob]] = {}
        """Log-probabilities received so far of prompts that are still to be echoed with them."""
        if request.num_logprobs is not None:
            self._prompt_logprobs = {index: [] for index, echo in enumerate(echoes) if echo}

    def opening(self) -> bytes:
        if self._request.num_logprobs is not None:
            return b""
        echoes = ((index, self._request.echo_of(index)) for index in range(len(self._request.sequences)))
        return b"".join(self._event(index, echo.text, b"null", None) for index, echo in echoes if echo)

    def _events(self, index: int, deltas: list[GenerationDelta]) -> bytes:
        text = deltas[0].text if len(deltas) == 1 else "".join(delta.text for delta in deltas)
        last = deltas[-1]
        logprobs = b"null"
        echoed = b""
        if self._request.num_logprobs is not None:
            echoed = self._echo(index, deltas) if index in self._prompt_logprobs else b""
            tokens = _logprobs_of(deltas)
            if not (text or tokens or last.finish_reason):
                return echoed
            logprobs = _to_json(completion_logprobs(tokens, self._first_offsets[index]))
        elif not (text or last.finish_reason):
            return b""
        return echoed + self._event(index, text, logprobs, last)

    def _echo(self, index: int, deltas: list[GenerationDelta]) -> bytes:
        """The prompt's own event, once all its log-probabilities are there."""
        tokens = self._prompt_logprobs[index]
        for delta in deltas:
            tokens.extend(delta.prompt_logprobs)
        if len(tokens) + 1 < len(self._request.sequences[index].prompt_token_ids):
            return b""
        del self._prompt_logprobs[index]
        echo, num_top = self._request.echo_of(index), self._request.num_logprobs
        assert echo is not None
        assert num_top is not None
        return self._event(index, echo.text, _to_json(echoed_logprobs(echo, tokens, num_top)), None)

    def _event(self, index: int, text: str, logprobs: bytes, last: GenerationDelta | None) -> bytes:
        reason, stop_reason = (last.finish_reason, last.stop_reason) if last else (None, None)
        return (
            self._text_heads[index] + _to_json(text) + b',"logprobs":' + logprobs
            + b',"finish_reason":' + _to_json(reason)
            + (b',"stop_reason":' + _to_json(stop_reason) if reason else b"") + b"}" + self._tail
        )  # fmt: skip


def _logprobs_of(deltas: list[GenerationDelta]) -> list[TokenLogprob]:
    return [token for delta in deltas for token in delta.logprobs]
