"""From a checked body to what the engine is asked: limits, tokens, context, sampling parameters.

Called by text_process.py; raises RequestError (400) with the field, the rule and the value, or ModelNotFoundError
(404).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from msgspec import structs

from moeless.core.errors import ContextLengthError, ModelNotFoundError, RequestError
from moeless.core.generation import GenerationRequest, ModelInfo, SamplingParams
from moeless.gateway.config import GatewayConfig
from moeless.gateway.schemas import ChatCompletionRequest, CompletionRequest, SamplingFields, fields_without_effect
from moeless.gateway.template_options import template_options
from moeless.text.template_probe import TemplateTraits
from moeless.text.tokenizer import TextTooLongError, Tokenizer

DEFAULT_COMPLETION_TOKENS = 16
"""Tokens that /v1/completions generates when max_tokens is absent, as OpenAI's does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """Facts about the engine's model that the gateway needs."""

    info: ModelInfo
    tokenizer: Tokenizer
    traits: TemplateTraits


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """A prompt that the completion begins with."""

    text: str
    first_token: str
    """Text of the first token, which has no log-probability."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmittedRequest:
    """One HTTP request as the engine will see it: a sequence for each choice, in the order of the choices."""

    request_id: str
    model_id: str
    sequences: list[GenerationRequest]
    num_choices: int
    """n: choices for each prompt."""
    num_prompt_tokens: int
    """Each prompt once, however many choices it gets."""
    num_logprobs: int | None
    """None: no log-probabilities."""
    is_stream: bool
    include_usage: bool
    wants_continuous_usage: bool = False
    wants_prompt_logprobs: bool = False
    echoes: list[EchoedPrompt] | None = None
    """By prompt; None where prompts are not repeated."""
    ignored_fields: tuple[str, ...] = ()
    """Fields of the body that were accepted without effect."""

    def echo_of(self, index: int) -> EchoedPrompt | None:
        """Prompt that the choice `index` begins with."""
        return None if self.echoes is None else self.echoes[index // self.num_choices]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Draft:
    """Fields whose names differ between the two endpoints."""

    prompts: list[list[int]]
    prompt_field: str
    max_tokens: int | None
    max_tokens_field: str
    default_max_tokens: int | None
    """None: whatever the context leaves."""
    logprobs: int | None
    continues_prompt: bool = True
    end_of_turn_ids: tuple[int, ...] = ()
    echoes: list[EchoedPrompt] | None = None
    ignored_fields: tuple[str, ...] = ()


class Admission:
    """Checks requests against the model and the configured limits."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config

    def admit_chat(
        self,
        body: ChatCompletionRequest,
        model: ServedModel,
        request_id: str,
        render_limit: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> AdmittedRequest:
        """Render the messages and tokenize them; without a limit the answer may fill the context.

        Args:
            render_limit: what the chat template runs in.
        """
        _check_model(body.model, model.info)
        _check_at_most(len(body.messages), self._config.max_messages, "messages", "messages")
        max_tokens, max_tokens_field = _chat_max_tokens(body)
        logprobs = self._chat_logprobs(body)
        messages = [message.for_template() for message in body.messages]
        options = template_options(body, model.tokenizer.chat_template)
        with render_limit():
            rendered = model.tokenizer.render_chat(messages, model.traits, **options.arguments())
        draft = _Draft(
            prompts=[_encode(model.tokenizer.encode_chat, rendered, model.info, "messages")],
            prompt_field="messages",
            max_tokens=max_tokens,
            max_tokens_field=max_tokens_field,
            default_max_tokens=None,
            logprobs=logprobs,
            continues_prompt=options.continue_final_message,
            end_of_turn_ids=model.traits.end_of_turn_ids,
            ignored_fields=options.unread_fields,
        )
        return self._admit(body, model.info, request_id, draft)

    def admit_completion(self, body: CompletionRequest, model: ServedModel, request_id: str) -> AdmittedRequest:
        """Tokenize the prompts; token ids are taken as they are."""
        _check_model(body.model, model.info)
        num_choices = body.n or 1
        if body.best_of is not None and body.best_of != num_choices:
            raise RequestError(
                f"'best_of' must equal 'n' ({num_choices}) here, got {body.best_of}.",
                param="best_of",
                code="unsupported_parameter",
            )
        if body.logprobs is not None:
            _check_at_most(body.logprobs, self._config.max_logprobs, "logprobs", "log-probabilities a token")
        prompts = self._prompts(body, model)
        draft = _Draft(
            prompts=prompts,
            prompt_field="prompt",
            max_tokens=body.max_tokens,
            max_tokens_field="max_tokens",
            default_max_tokens=DEFAULT_COMPLETION_TOKENS,
            logprobs=body.logprobs,
            echoes=self._echoes(body, prompts, model) if body.echo else None,
        )
        if body.max_tokens == 0 and not body.echo and body.prompt_logprobs is None:
            raise RequestError(
                "'max_tokens' must be at least 1 unless 'echo' or 'prompt_logprobs' is set, got 0.",
                param="max_tokens",
                code="invalid_value",
            )
        return self._admit(body, model.info, request_id, draft)

    def _admit(self, body: SamplingFields, info: ModelInfo, request_id: str, draft: _Draft) -> AdmittedRequest:
        num_choices = body.n or 1
        _check_at_most(num_choices, self._config.max_n, "n", "choices")
        num_sequences = len(draft.prompts) * num_choices
        _check_at_most(num_sequences, self._config.max_sequences, "n", "sequences (prompts × n)")
        _check_stream(body)
        sequences: list[GenerationRequest] = []
        for prompt in draft.prompts:
            _check_prompt(prompt, info, draft.prompt_field)
            sampling = self._sampling(body, info, draft, _max_tokens_within_context(prompt, info, draft))
            for choice in range(num_choices):
                seed = None if body.seed is None else seed_of_choice(body.seed, choice)
                sequence = GenerationRequest(
                    request_id=f"{request_id}-{len(sequences)}",
                    prompt_token_ids=prompt,
                    sampling=structs.replace(sampling, seed=seed),
                    continues_prompt=draft.continues_prompt,
                    end_of_turn_ids=draft.end_of_turn_ids,
                )
                sequences.append(sequence)
        options = body.stream_options
        return AdmittedRequest(
            request_id=request_id,
            model_id=info.model_id,
            sequences=sequences,
            num_choices=num_choices,
            num_prompt_tokens=sum(map(len, draft.prompts)),
            num_logprobs=draft.logprobs,
            is_stream=bool(body.stream),
            include_usage=bool(options and options.include_usage),
            wants_continuous_usage=bool(options and options.include_usage and options.continuous_usage_stats),
            wants_prompt_logprobs=body.prompt_logprobs is not None,
            echoes=draft.echoes,
            ignored_fields=(*fields_without_effect(body), *draft.ignored_fields),
        )

    def _sampling(self, body: SamplingFields, info: ModelInfo, draft: _Draft, max_tokens: int) -> SamplingParams:
        """Sampling parameters without the seed, which choices do not share."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(0, body.top_k or 0),
            min_p=body.min_p or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            min_tokens=_min_tokens(body, max_tokens),
            stop=self._stop(body),
            stop_token_ids=self._stop_token_ids(body, info),
            include_stop_string=bool(body.include_stop_str_in_output),
            logprobs=draft.logprobs,
            prompt_logprobs=self._prompt_logprobs(body, draft),
            ignore_eos=bool(body.ignore_eos),
            logit_bias=self._logit_bias(body, info),
        )

    def _prompts(self, body: CompletionRequest, model: ServedModel) -> list[list[int]]:
        prompt = body.prompt
        if isinstance(prompt, str):
            prompt = [prompt]
        texts = [part for part in prompt if isinstance(part, str)]
        lists = [part for part in prompt if isinstance(part, list)]
        if not texts and not lists:
            return [[part for part in prompt if isinstance(part, int)]]
        _check_at_most(len(prompt), self._config.max_prompts, "prompt", "prompts")
        if lists:
            return lists
        return [_encode(model.tokenizer.encode_prompt, text, model.info, "prompt") for text in texts]

    def _echoes(self, body: CompletionRequest, prompts: list[list[int]], model: ServedModel) -> list[EchoedPrompt]:
        """Prompts that came as text are repeated as they are, token ids as their text without special tokens."""
        decode = model.tokenizer.decode
        parts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        given = [part for part in parts if isinstance(part, str)]
        for prompt in prompts:
            _check_prompt(prompt, model.info, "prompt")
        texts = given or [decode(prompt) for prompt in prompts]
        return [
            EchoedPrompt(text, decode(prompt[:1], with_special_tokens=True))
            for text, prompt in zip(texts, prompts, strict=True)
        ]

    def _chat_logprobs(self, body: ChatCompletionRequest) -> int | None:
        if body.top_logprobs is None:
            return 0 if body.logprobs else None
        if not body.logprobs:
            raise RequestError(
                "'top_logprobs' is only allowed when 'logprobs' is true.",
                param="top_logprobs",
                code="invalid_value",
            )
        _check_at_most(body.top_logprobs, self._config.max_logprobs, "top_logprobs", "log-probabilities a token")
        return body.top_logprobs

    def _stop(self, body: SamplingFields) -> tuple[str, ...]:
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        _check_at_most(len(stop), self._config.max_stop, "stop", "stop strings")
        for text in stop:
            if not 1 <= len(text) <= self._config.max_stop_chars:
                raise RequestError(
                    f"A string in 'stop' must have 1 to {self._config.max_stop_chars} characters, got {len(text)}.",
                    param="stop",
                    code="invalid_value",
                )
        return stop

    def _stop_token_ids(self, body: SamplingFields, info: ModelInfo) -> tuple[int, ...]:
        token_ids = tuple(body.stop_token_ids or ())
        _check_at_most(len(token_ids), self._config.max_stop_token_ids, "stop_token_ids", "token ids")
        if token_ids and max(token_ids) >= info.vocab_size:
            raise RequestError(
                f"A token id in 'stop_token_ids' must be below the vocabulary's size {info.vocab_size}, "
                f"got {max(token_ids)}.",
                param="stop_token_ids",
                code="invalid_value",
            )
        return token_ids

    def _prompt_logprobs(self, body: SamplingFields, draft: _Draft) -> int | None:
        """Return how many the engine must compute, for the field itself and for an echo with log-probabilities."""
        wanted = [] if body.prompt_logprobs is None else [body.prompt_logprobs]
        num_wanted = body.prompt_logprobs or 0
        _check_at_most(num_wanted, self._config.max_logprobs, "prompt_logprobs", "log-probabilities a token")
        if draft.echoes is not None and draft.logprobs is not None:
            wanted.append(draft.logprobs)
        return max(wanted, default=None)

    def _logit_bias(self, body: SamplingFields, info: ModelInfo) -> dict[int, float]:
        entries = body.logit_bias or {}
        _check_at_most(len(entries), self._config.max_logit_bias, "logit_bias", "entries")
        biases = {}
        for key, bias in entries.items():
            # isdecimal alone would let digits of other scripts pass.
            token_id = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else -1
            if not 0 <= token_id < info.vocab_size:
                raise RequestError(
                    f"A key of 'logit_bias' must be a token id from 0 to {info.vocab_size - 1}, got {key[:40]!r}.",
                    param="logit_bias",
                    code="invalid_value",
                )
            biases[token_id] = float(bias)
        return biases


def seed_of_choice(seed: int, choice: int) -> int:
    """The seed of one of n choices: choice 0 keeps the request's, the others get their own; 63 bits, not negative."""
    mask = 2**63 - 1
    if choice == 0:
        return seed & mask
    digest = hashlib.blake2b(f"{seed}:{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & mask


def _check_model(name: str, info: ModelInfo) -> None:
    if name != info.model_id:
        raise ModelNotFoundError(
            f"The model {name[:200]!r} does not exist here; this server has {info.model_id!r}.",
            param="model",
            code="model_not_found",
        )


def _check_at_most(value: int, limit: int, field: str, what: str) -> None:
    if value > limit:
        raise RequestError(
            f"'{field}' may ask for at most {limit} {what}, got {value}.", param=field, code="limit_exceeded"
        )


def _check_stream(body: SamplingFields) -> None:
    if body.stream_options is not None and not body.stream:
        raise RequestError(
            "'stream_options' is only allowed when 'stream' is true.", param="stream_options", code="invalid_value"
        )
    if body.prompt_logprobs is not None and body.stream:
        raise RequestError(
            "'prompt_logprobs' is only allowed when 'stream' is false.", param="prompt_logprobs", code="invalid_value"
        )


def _min_tokens(body: SamplingFields, max_tokens: int) -> int:
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise RequestError(
            f"'min_tokens' may be at most the number of tokens to generate, {max_tokens}, got {min_tokens}.",
            param="min_tokens",
            code="invalid_value",
        )
    return min_tokens


def _encode(encode: Callable[..., list[int]], text: str, info: ModelInfo, field: str) -> list[int]:
    """Raises: ContextLengthError for a text that does not fit the context."""
    try:
        return encode(text, max_tokens=info.max_context_tokens)
    except TextTooLongError as error:
        raise _too_long(info, field, error.num_tokens, is_exact=error.is_exact) from None


def _too_long(info: ModelInfo, field: str, num_tokens: int, *, is_exact: bool = True) -> ContextLengthError:
    number = str(num_tokens) if is_exact else f"at least {num_tokens}"
    return ContextLengthError(
        f"This model's maximum context length is {info.max_context_tokens} tokens. "
        f"However, your '{field}' has {number} tokens, which leaves none for an answer.",
        param=field,
        code="context_length_exceeded",
    )


def _check_prompt(prompt: list[int], info: ModelInfo, field: str) -> None:
    if not prompt:
        raise RequestError(f"'{field}' must give at least one token.", param=field, code="invalid_value")
    if max(prompt) >= info.vocab_size:
        raise RequestError(
            f"A token id in '{field}' must be below the vocabulary's size {info.vocab_size}, got {max(prompt)}.",
            param=field,
            code="invalid_value",
        )


def _chat_max_tokens(body: ChatCompletionRequest) -> tuple[int | None, str]:
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise RequestError(
            "'max_tokens' and 'max_completion_tokens' mean the same; send one of them.",
            param="max_tokens",
            code="invalid_value",
        )
    if body.max_completion_tokens is not None:
        return body.max_completion_tokens, "max_completion_tokens"
    return body.max_tokens, "max_tokens"


def _max_tokens_within_context(prompt: list[int], info: ModelInfo, draft: _Draft) -> int:
    left = info.max_context_tokens - len(prompt)
    limit = f"This model's maximum context length is {info.max_context_tokens} tokens."
    if left < 1:
        raise _too_long(info, draft.prompt_field, len(prompt))
    if draft.max_tokens is None:
        return left if draft.default_max_tokens is None else min(left, draft.default_max_tokens)
    if draft.max_tokens > left:
        raise ContextLengthError(
            f"{limit} However, you requested {len(prompt) + draft.max_tokens} tokens ({len(prompt)} in "
            f"'{draft.prompt_field}' and {draft.max_tokens} in '{draft.max_tokens_field}').",
            param=draft.max_tokens_field,
            code="context_length_exceeded",
        )
    return draft.max_tokens
