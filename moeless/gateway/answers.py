"""Whole (not streamed) answers of both endpoints. Called by completions.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from moeless.core.generation import FinishReason, TokenLogprob
from moeless.gateway.admission import AdmittedRequest
from moeless.gateway.shapes import Usage, chat_logprobs, completion_logprobs
from moeless.gateway.streams import SequenceStreams


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class Answer:
    """What all sequences of a request generated."""

    request: AdmittedRequest
    choices: list[_Choice]
    usage: Usage

    @classmethod
    async def collect(cls, request: AdmittedRequest, streams: SequenceStreams) -> Answer:
        """Read the streams to their end. Raises: what made a sequence fail."""
        answer = cls(request, [_Choice() for _ in request.sequences], Usage(request))
        async with streams:
            while batch := await streams.take():
                for index, delta in batch:
                    choice = answer.choices[index]
                    choice.texts.append(delta.text)
                    choice.logprobs.extend(delta.logprobs)
                    choice.finish_reason = delta.finish_reason
                    answer.usage.add(index, delta)
        return answer


def chat_answer(answer: Answer, created_unix_s: int) -> bytes:
    """Body of POST /v1/chat/completions."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
            "logprobs": chat_logprobs(choice.logprobs) if answer.request.wants_logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(answer.choices)
    ]
    return _encode("chat.completion", answer, choices, created_unix_s)


def completion_answer(answer: Answer, created_unix_s: int) -> bytes:
    """Body of POST /v1/completions."""
    choices = [
        {
            "index": index,
            "text": "".join(choice.texts),
            "logprobs": completion_logprobs(choice.logprobs, 0) if answer.request.wants_logprobs else None,
            "finish_reason": choice.finish_reason,
        }
        for index, choice in enumerate(answer.choices)
    ]
    return _encode("text_completion", answer, choices, created_unix_s)


def _encode(kind: str, answer: Answer, choices: list[dict[str, Any]], created_unix_s: int) -> bytes:
    return msgspec.json.encode(
        {
            "id": answer.request.request_id,
            "object": kind,
            "created": created_unix_s,
            "model": answer.request.model_id,
            "choices": choices,
            "usage": answer.usage.body(),
        }
    )
