"""The pieces that answers are made of, in OpenAI's shapes: choices' log-probabilities and usage.

Used by answers.py (whole answers) and chunks.py (streams).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moeless.core.generation import GenerationDelta, TokenLogprob
from moeless.gateway.admission import AdmittedRequest

_LEAST_LOGPROB = -9999.0
"""What OpenAI writes for "very unlikely"; JSON has no minus infinity."""


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
    return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(data)}


def completion_logprobs(tokens: Sequence[TokenLogprob], first_offset: int) -> dict[str, Any]:
    """`choices[].logprobs` of /v1/completions; offsets count characters of the generated text.

    Args:
        tokens: in the order of their generation.
        first_offset: characters of the tokens that earlier chunks of a stream had.
    """
    offsets = []
    for token in tokens:
        offsets.append(first_offset)
        first_offset += len(token.token)
    return {
        "text_offset": offsets,
        "token_logprobs": [max(token.logprob, _LEAST_LOGPROB) for token in tokens],
        "tokens": [token.token for token in tokens],
        "top_logprobs": [_top_of(token) for token in tokens],
    }


def _top_of(token: TokenLogprob) -> dict[str, float]:
    top: dict[str, float] = {}
    for _, text, _, logprob in token.top:
        # Two tokens may have one text (parts of a character); the likelier comes first and stays.
        top.setdefault(text, max(logprob, _LEAST_LOGPROB))
    return top


@dataclass(slots=True)
class Usage:
    """Counts an answer's tokens while it comes."""

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
        """`usage` of an answer."""
        return {
            "prompt_tokens": self.request.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.request.num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached_tokens.values())},
        }
