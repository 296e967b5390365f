"""Requests of a gateway and replies of an engine: plain data that crosses processes, and the protocol.

Only builtin types inside (msgspec encodes them; no pickle is needed). The gateway and the engine know each
other through this file alone.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Literal, Protocol

import msgspec

from moeless.core.errors import RequestError
from moeless.core.recording import RecordingClient

FinishReason = Literal["stop", "length", "cancelled", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Per-request sampling.

    Raises: RequestError for a value that no model could serve; limits of the model are the engine's to check, limits
    of the server the gateway's.
    """

    max_tokens: int
    """0: compute the prompt and generate nothing."""
    temperature: float = 1.0
    """0 means greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 means no limit."""
    min_p: float = 0.0
    """Tokens less likely than `min_p` times the likeliest one are left out; 0 means none."""
    seed: int | None = None
    """With a seed, the token at a position is a function of (seed, position, distribution) alone, whatever else is
    in the batch."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in prompt and output, multiplies negative ones; 1 changes nothing."""
    min_tokens: int = 0
    """No end-of-sequence token, `stop` or `stop_token_ids` ends the sequence before it has this many tokens."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """End the sequence as an end-of-sequence token does, also with `ignore_eos`."""
    include_stop_string: bool = False
    """Keep the stop string at the end of the text."""
    logprobs: int | None = None
    """None: no log-probabilities; n: of the sampled token and the n likeliest."""
    prompt_logprobs: int | None = None
    """None: no log-probabilities of the prompt; n: of each prompt token but the first, and the n likeliest there."""
    ignore_eos: bool = False
    logit_bias: dict[int, float] = {}

    def __post_init__(self) -> None:
        _check_rule("max_tokens", self.max_tokens, self.max_tokens >= 0, "at least 0")
        _check_rule("temperature", self.temperature, 0 <= self.temperature < math.inf, "finite and at least 0")
        _check_rule("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check_rule("top_k", self.top_k, self.top_k >= 0, "at least 0")
        _check_rule("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            _check_rule(name, getattr(self, name), math.isfinite(getattr(self, name)), "finite")
        _check_rule(
            "repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "finite and above 0"
        )
        _check_rule(
            "min_tokens",
            self.min_tokens,
            0 <= self.min_tokens <= self.max_tokens,
            f"from 0 to max_tokens ({self.max_tokens})",
        )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _check_rule(name, count, count is None or count >= 0, "at least 0")
        for token_id in self.stop_token_ids:
            _check_rule("stop_token_ids", token_id, token_id >= 0, "at least 0")
        for bias in self.logit_bias.values():
            _check_rule("logit_bias", bias, math.isfinite(bias), "finite")


def _check_rule(field: str, value: object, is_kept: bool, rule: str) -> None:
    if not is_kept:
        raise RequestError(f"{field} must be {rule}, got {value}", param=field)


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate. A request with n > 1 becomes n of these with ids `<id>-<index>`."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    continues_prompt: bool = True
    """Whether the text goes on from the prompt's, as a completion's does, or begins anew, as a chat's answer does."""
    end_of_turn_ids: tuple[int, ...] = ()
    """Further end-of-sequence tokens: those that end a turn in the model's chat template."""


class TokenLogprob(msgspec.Struct, frozen=True):
    token_id: int
    token: str
    """The token's text; `token_bytes` is exact where the token is not whole UTF-8."""
    token_bytes: bytes
    logprob: float
    top: list[tuple[int, str, bytes, float]] = []
    """(token id, text, bytes, log-probability), likeliest first."""
    text_offset: int = 0
    """Characters of the generated text before this token; those within a character count from its beginning."""
    rank: int = 0
    """1 for the likeliest token, 2 for the next; 0 where it was not determined."""


class GenerationDelta(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens and text that a step added to a sequence. Text may lag (incomplete UTF-8, a possible stop string)."""

    request_id: str
    text: str = ""
    num_tokens: int = 0
    """Tokens that this delta adds (0 when only text is flushed)."""
    logprobs: list[TokenLogprob] = []
    prompt_logprobs: list[TokenLogprob] = []
    """The next prompt tokens in order, beginning with the prompt's second; all of them come before the first text."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """Stop string or id of `stop_token_ids` that ended the sequence; None for an end-of-sequence token."""
    error: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0


class FunctionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `GET /v1/experts`: an expert function as it stands now."""

    name: str
    layer: int
    expert: int
    state: str
    """cold, starting, warm or draining; warm if any instance is."""
    replicas: int
    workers: list[str]
    bytes: int
    tokens_served: int


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    alive: bool
    transport: str
    """in-process, shm, tcp, cuda-ipc, nccl or serve."""
    instances: int
    resident_bytes: int
    tokens_served: int


class PredictionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `GET /v1/predictors`: how the load of one MoE layer is forecast, over the last measured steps.

    A measure is NaN before the first such step.
    """

    layer: int
    distance: int
    """Number of MoE layers by which the forecast is made earlier."""
    kind: str
    reason: str
    """Why this kind was chosen when the predictors were fitted."""
    active: bool
    """False while popularity stands in, because it did better."""
    recall: float
    load_error: float
    """Relative L1 error of the load; `popularity_error` is that of popularity that learns online."""
    popularity_error: float
    coverage: float
    """Share of the experts whose load was at most the calibrated bound."""
    bound_width: float
    """The bound's sum over the load's; `popularity_bound_width` is that of popularity's own bound."""
    popularity_bound_width: float
    forecasts: int
    """Since the start, as is `seconds`, the time they took."""
    seconds: float


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters and gauges that the gateway turns into Prometheus series."""

    requests_running: int
    requests_waiting: int
    kv_cache_usage: float
    """Share of KV pages in use, 0 to 1."""
    cold_starts: int
    evictions: int
    warm_starts: int
    dispatch_seconds_sum: float
    dispatch_seconds_count: int
    dispatch_seconds_buckets: list[tuple[float, int]]
    """(upper bound in seconds, cumulative count), without +Inf."""
    dispatch_retries: int
    dispatch_fallbacks: int
    tokens_per_worker: dict[str, int]
    workers: list[WorkerStatus]
    predictions: list[PredictionStatus] = []
    """Empty where nothing is predicted."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about the model with which the gateway validates, tokenizes and lists it."""

    model_id: str
    created_unix_s: int
    max_context_tokens: int
    vocab_size: int
    tokenizer_path: str
    """Folder with tokenizer.json and the chat template, readable by the gateway."""
    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    dtype: str
    device: str


class EngineClient(Protocol):
    """An engine as the gateway sees it.

    deployments/gateway.py implements it with a Serve handle and the token channel, tests with an engine in process.
    """

    @property
    def recordings(self) -> RecordingClient:
        """Recording what the engine routes."""
        ...

    async def model_info(self) -> ModelInfo: ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        """Submit and stream. Raises QueueFullError, ContextLengthError or EngineStoppedError before the first delta.
        Closing the iterator (aclose) cancels the request and frees its KV pages."""
        ...

    async def stats(self) -> EngineStats: ...

    async def functions(self) -> list[FunctionStatus]: ...

    async def is_ready(self) -> bool:
        """True when a request sent now could be answered."""
        ...

    async def close(self) -> None:
        """Hang up on the engine; open streams end."""
        ...
