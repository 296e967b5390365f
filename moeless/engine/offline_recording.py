"""The routing of a list of prompts and of what the model writes after them, as one trace.

Called by `moeless trace record --prompts`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from moeless.core.errors import ConfigError, MoelessError, RequestError
from moeless.core.generation import GenerationDelta, GenerationRequest, SamplingParams
from moeless.core.recording import RecordingOptions
from moeless.engine.assemble import engine_in_process
from moeless.engine.config import EngineConfig
from moeless.engine.routing_recorder import RoutingRecorder, check_options
from moeless.packages.packed_model import PackedModel
from moeless.text.tokenizer import Tokenizer
from moeless_predictors.traces import RoutingTrace, TraceMetadata

OnProgress = Callable[[int, int], None]
"""Called in the generation thread with the prompts that are done and their number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRun:
    """Settings of generating from prompts."""

    max_new_tokens: int = 64
    batch: int = 16
    """Sequences that decode together."""
    temperature: float = 1.0
    seed: int = 0
    """Prompt i is sampled with seed + i, whatever else is in its batch."""
    chat: bool = False
    """Whether each prompt is put to the model as a user's message, in its chat template."""
    num_threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"temperature must be from 0 to 2, got {self.temperature}")


def record_prompts(
    packed: PackedModel,
    prompts: list[str],
    run: PromptRun,
    *,
    max_tokens: int | None = None,
    hidden_layers: tuple[int, ...] = (),
    token_ids: bool = True,
    source: str = "",
    on_progress: OnProgress = lambda _, __: None,
) -> RoutingTrace:
    """Generate from every prompt and record it, the prompts in their order.

    Args:
        max_tokens: rows to record at most; default: all there can be.
        source: where the prompts come from, for the trace's metadata.
    Raises: ConfigError or RequestError that names an option, or a prompt that does not fit the model; MoelessError if
        generation fails.
    """
    if not prompts:
        raise ConfigError("prompts must be at least one, got none")
    packed.verify_backbone()  # the tokenizer too is read from it
    tokenizer = Tokenizer.load(packed.backbone_path)
    token_lists = _encode(tokenizer, prompts, chat=run.chat)
    manifest = packed.manifest
    metadata = TraceMetadata(
        model=manifest.model_id,
        num_experts=manifest.num_experts,
        top_k=manifest.top_k,
        num_layers=manifest.num_moe_layers,
        source=source,
        hidden_size=manifest.layers[0].layout.hidden_size,
    )
    most = sum(map(len, token_lists)) + len(prompts) * run.max_new_tokens
    options = RecordingOptions(
        max_tokens=most if max_tokens is None else max_tokens, hidden_layers=hidden_layers, token_ids=token_ids
    )
    check_options(options, metadata)
    config = EngineConfig(
        max_running=run.batch,
        max_waiting=len(prompts),
        max_batch_tokens=max(512, run.batch),
        prefix_sharing=False,  # the trace would lack what is found in shared pages
        num_threads=run.num_threads,
    )
    with engine_in_process(packed, tokenizer, config) as engine:
        recorder = RoutingRecorder(engine.observers, metadata, options)
        answers = _Answers(len(prompts), lambda: recorder.is_full, on_progress)
        engine.set_on_step(answers.on_step)
        recorder.start()
        engine.start()
        for number, tokens in enumerate(token_lists):
            sampling = SamplingParams(
                max_tokens=run.max_new_tokens, temperature=run.temperature, seed=run.seed + number
            )
            request = GenerationRequest(request_id=str(number), prompt_token_ids=tokens, sampling=sampling)
            try:
                engine.submit(request)
            except RequestError as error:
                raise ConfigError(f"prompt {number + 1}: {error}") from error
        answers.wait()
        if recorder.error is not None:
            raise MoelessError(f"recording failed: {recorder.error}")
        if not recorder.num_tokens:
            raise ConfigError(f"max_tokens must hold at least the first step, got {options.max_tokens}")
        return recorder.take_trace()


class _Answers:
    """Waits for all answers, or until nothing more is recorded."""

    def __init__(self, num_prompts: int, is_full: Callable[[], bool], on_progress: OnProgress) -> None:
        self._num_prompts = num_prompts
        self._is_full = is_full
        self._on_progress = on_progress
        self._num_done = 0
        self._error: str | None = None
        self._is_over = threading.Event()

    def on_step(self, deltas: list[GenerationDelta]) -> None:
        """In the generation thread."""
        num_ended = 0
        for delta in deltas:
            num_ended += delta.finish_reason is not None
            if delta.finish_reason == "error":
                self._error = f"prompt {int(delta.request_id) + 1}: {delta.error}"
        self._num_done += num_ended
        if num_ended:
            self._on_progress(self._num_done, self._num_prompts)
        if self._num_done == self._num_prompts or self._error is not None or self._is_full():
            self._is_over.set()

    def wait(self) -> None:
        """Raises MoelessError if a sequence failed."""
        self._is_over.wait()
        if self._error is not None:
            raise MoelessError(self._error)


def _encode(tokenizer: Tokenizer, prompts: list[str], *, chat: bool) -> list[list[int]]:
    if not chat:
        return [tokenizer.encode_prompt(prompt) for prompt in prompts]
    if tokenizer.chat_template is None:
        raise ConfigError("chat needs a model with a chat template, this one has none")
    traits = tokenizer.probe_template()
    chats = ([{"role": "user", "content": prompt}] for prompt in prompts)
    return [tokenizer.encode_chat(tokenizer.render_chat(messages, traits)) for messages in chats]
