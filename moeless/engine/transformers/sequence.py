"""One request on its way through an engine: what it has generated, its text, and why it ended."""

from __future__ import annotations

import logging
import math

from moeless.core.errors import LogitsError, MoelessError
from moeless.core.generation import FinishReason, GenerationDelta, GenerationRequest, TokenLogprob
from moeless.engine.text import StopMatcher, TokenTexts
from moeless.engine.transformers.row_sampler import RowSampler
from moeless.engine.transformers.sampling import RawLogprobs, Sampled

logger = logging.getLogger(__name__)


class Sequence:
    """Takes the sampled tokens one by one, decides when the sequence ends and hands out deltas.

    Belongs to the generation thread.
    """

    __slots__ = (
        "_decoder",
        "_eos_ids",
        "_fault",
        "_includes_stop",
        "_logprobs",
        "_matcher",
        "_min_tokens",
        "_new_tokens",
        "_num_chars",
        "_stop_ids",
        "_stop_reason",
        "_stop_strings",
        "_text",
        "_texts",
        "error",
        "finish_reason",
        "generated_token_ids",
        "max_tokens",
        "next_scored",
        "num_cached_tokens",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "prompt_token_ids",
        "request_id",
        "sampler",
    )

    def __init__(self, request: GenerationRequest, *, eos_ids: frozenset[int], texts: TokenTexts) -> None:
        sampling = request.sampling
        self.request_id = request.request_id
        self.prompt_token_ids = request.prompt_token_ids
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_cached_tokens = 0
        self.num_prompt_logprobs = sampling.prompt_logprobs
        self.next_scored = 1
        """Position of the next prompt token whose log-probability is wanted; the first has none."""
        self._fault: str | None = None
        self.max_tokens = sampling.max_tokens
        self._eos_ids = frozenset() if sampling.ignore_eos else eos_ids.union(request.end_of_turn_ids)
        self._stop_ids = frozenset(sampling.stop_token_ids)
        self.sampler = RowSampler(sampling, prompt=request.prompt_token_ids, ending_ids=self._eos_ids | self._stop_ids)
        self.generated_token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self._min_tokens = sampling.min_tokens
        self._includes_stop = sampling.include_stop_string
        self._texts = texts
        self._stop_strings = {id_: stop for stop in sampling.stop if (id_ := texts.special_id(stop)) is not None}
        """By the special tokens that they are; those add no text in which they could be found."""
        self._decoder = texts.new_decoder(request.prompt_token_ids if request.continues_prompt else ())
        self._matcher = StopMatcher(sampling.stop) if sampling.stop else None
        self._text = ""
        self._new_tokens = 0
        self._num_chars = 0
        """Characters decoded, also those that are held back."""
        self._logprobs: list[TokenLogprob] = []
        self._stop_reason: str | int | None = None

    def take(self, sampled: Sampled, row: int) -> bool:
        """Add what a step sampled for this sequence, its row. Returns True if the sequence has ended.

        Never raises: a fault in one sequence must not fail the whole batch, so it ends this one with an error.
        """
        error = self._fault or sampled.errors.get(row)
        if error is None:
            try:
                return self.advance(sampled.token_ids[row], None if sampled.logprobs is None else sampled.logprobs[row])
            except Exception as fault:
                error = describe(fault)
        logger.warning("sequence failed request=%s error=%s", self.request_id, error)
        self.finish("error", error)
        return True

    def advance(self, token_id: int, logprobs: RawLogprobs | None = None) -> bool:
        """Add a sampled token. Returns True if the sequence has ended.

        A token that ends the sequence counts as generated but adds no log-probabilities, unless the prompt is scored:
        who scores prompts (lm-eval) counts on one entry for each token. It adds text only if `include_stop_string` is
        set. With max_tokens 0 the token is not added: the prompt was all.
        """
        if self.max_tokens == 0:
            self._end("length")
            return True
        self.generated_token_ids.append(token_id)
        self._new_tokens += 1
        self.sampler.commit(token_id)
        if token_id in self._eos_ids or token_id in self._stop_ids:
            if token_id not in self._eos_ids:
                self._stop_reason = token_id
            if logprobs is not None and self.num_prompt_logprobs is not None:
                self._logprobs.append(self._describe(logprobs, text_offset=self._num_chars))
            last = self._decoder.feed(token_id) if self._includes_stop else ""
            if not (last and self._take_text(last)):
                self._end("stop")
            return True
        if token_id in self._stop_strings and self.num_generated > self._min_tokens:
            self._end("stop")
            if self._includes_stop and self._stop_reason is None:
                self._text += self._stop_strings[token_id]
            self._stop_reason = self._stop_reason or self._stop_strings[token_id]
            return True
        if logprobs is not None:
            self._logprobs.append(self._describe(logprobs, text_offset=self._num_chars))
        text = self._decoder.feed(token_id)
        self._num_chars += len(text)
        if text and self._take_text(text):
            return True
        if self.num_generated >= self.max_tokens:
            self._end("length")
            return True
        return False

    @property
    def scores_prompt(self) -> bool:
        """True while log-probabilities of prompt tokens are wanted that are not there yet."""
        return (
            self.num_prompt_logprobs is not None and self.next_scored < self.num_prompt_tokens and self._fault is None
        )

    def take_scores(self, raws: list[RawLogprobs]) -> GenerationDelta:
        """A delta of the log-probabilities of the next prompt tokens. Raises LogitsError if one is not finite."""
        for raw in raws:
            if not math.isfinite(raw.logprob):
                raise LogitsError(
                    f"the log-probability of prompt token {self.next_scored} is not finite ({raw.logprob})"
                )
            self.next_scored += 1
        return GenerationDelta(
            request_id=self.request_id,
            prompt_logprobs=[self._describe(raw, text_offset=0) for raw in raws],
            num_prompt_tokens=self.num_prompt_tokens,
        )

    def fail(self, error: Exception) -> None:
        """Note a fault found while the prompt is computed; the sequence ends with it at its first token."""
        self._fault = describe(error)

    @property
    def num_generated(self) -> int:
        return len(self.generated_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: the prompt's and the generated ones."""
        return self.num_prompt_tokens + self.num_generated

    def token_ids(self, first: int, count: int) -> list[int]:
        """The tokens at positions `first` to `first + count`, of the prompt and what was generated after it."""
        prompt, length = self.prompt_token_ids, self.num_prompt_tokens
        if first >= length:
            return self.generated_token_ids[first - length : first - length + count]
        found = prompt[first : first + count]
        return found + self.generated_token_ids[: count - len(found)]

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """End the sequence from outside: cancelled or failed. Text that was held back is dropped."""
        self.finish_reason = reason
        self.error = error

    def take_delta(self) -> GenerationDelta:
        """Return the tokens and text since the last call."""
        delta = GenerationDelta(
            request_id=self.request_id,
            text=self._text,
            num_tokens=self._new_tokens,
            logprobs=self._logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            error=self.error,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
        )
        self._text = ""
        self._new_tokens = 0
        if self._logprobs:
            self._logprobs = []
        return delta

    def _take_text(self, text: str) -> bool:
        """Pass on decoded text as far as no stop string can begin in it. True if a stop string is complete."""
        if self._matcher is None:
            self._text += text
            return False
        if self.num_generated <= self._min_tokens:
            self._text += self._matcher.skip(text)
            return False
        certain, stop = self._matcher.feed(text)
        self._text += certain
        if stop is None:
            return False
        if self._includes_stop:
            self._text += stop
        self.finish_reason = "stop"
        self._stop_reason = stop
        return True

    def _end(self, reason: FinishReason) -> None:
        rest = self._decoder.flush()
        if rest and self._take_text(rest):
            return
        if self._matcher is not None:
            self._text += self._matcher.flush()
        self.finish_reason = reason

    def _describe(self, raw: RawLogprobs, *, text_offset: int) -> TokenLogprob:
        data = self._texts.bytes_of(raw.token_id)
        top: list[tuple[int, str, bytes, float]] = []
        for token_id, logprob in zip(raw.top_ids, raw.top_logprobs, strict=True):
            other = self._texts.bytes_of(token_id)
            top.append((token_id, other.decode(errors="replace"), other, logprob))
        return TokenLogprob(
            raw.token_id,
            data.decode(errors="replace"),
            data,
            raw.logprob,
            top,
            text_offset=text_offset,
            rank=raw.rank,
        )


def describe(error: Exception) -> str:
    """The message of an error of ours; of others their type too."""
    return str(error) if isinstance(error, MoelessError) else f"{type(error).__name__}: {error}"
