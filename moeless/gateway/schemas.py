"""The bodies of POST /v1/chat/completions and /v1/completions, as far as types and fixed ranges go.

Strict: a string is no number, and a field that is not here is refused by name. Fields of OpenAI's API that we do
not serve are listed as Unsupported, so that the answer can say so. Limits that an operator sets, and what depends
on the model, are admission.py's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError


def _refuse_value(value: object) -> None:
    if value is not None:
        raise PydanticCustomError("unsupported", "is not supported by this server")


def _refuse_true(value: bool | None) -> bool | None:
    if value:
        raise PydanticCustomError("unsupported", "is not supported by this server, only false is")
    return value


Unsupported = Annotated[Any, AfterValidator(_refuse_value)]
"""Known to OpenAI's API, refused here unless null."""
OnlyFalse = Annotated[bool | None, AfterValidator(_refuse_true)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: OnlyFalse = None


class TextFormat(_Body):
    """`response_format`: text is the only one."""

    type: Literal["text"]


class TextPart(_Body):
    """A content part; text is the only kind."""

    type: Literal["text"]
    text: str


def _content_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "<text>"
    return "<parts>" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("<parts>")],
    Discriminator(
        _content_kind,
        custom_error_type="content_type",
        custom_error_message="must be a string or a list of parts of type text",
    ),
]
"""The tags stand in angle brackets so that body.py can drop them from error paths."""


class Message(_Body):
    """One message of a chat. The null-only fields are what clients send back from an earlier answer."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Unsupported = None
    refusal: Unsupported = None
    annotations: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None
    tool_calls: Unsupported = None
    tool_call_id: Unsupported = None

    def text(self) -> str:
        """The content as one string; parts are joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


def _stop_kind(value: object) -> str | None:
    if value is None:
        return "<none>"
    if isinstance(value, str):
        return "<text>"
    return "<texts>" if isinstance(value, list) else None


Stop = Annotated[
    Annotated[None, Tag("<none>")]
    | Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(fail_fast=True), Tag("<texts>")],
    Discriminator(
        _stop_kind,
        custom_error_type="stop_type",
        custom_error_message="must be a string or a list of strings",
    ),
]


class SamplingFields(_Body):
    """What both endpoints have in common."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """Extension, as in vLLM: 0 and -1 mean no limit."""
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Stop = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool | None = None
    """Extension, as in vLLM: generate max_tokens tokens whatever the model says. For benchmarks."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted; it names the end user and changes nothing in the answer. So do the next two."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatCompletionRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    store: OnlyFalse = None
    service_tier: Literal["auto", "default"] | None = None

    audio: Unsupported = None
    function_call: Unsupported = None
    functions: Unsupported = None
    metadata: Unsupported = None
    moderation: Unsupported = None
    parallel_tool_calls: Unsupported = None
    prediction: Unsupported = None
    prompt_cache_options: Unsupported = None
    prompt_cache_retention: Unsupported = None
    reasoning_effort: Unsupported = None
    tool_choice: Unsupported = None
    tools: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None


def _prompt_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    first = value[0] if value else None
    if isinstance(first, int):
        return "<tokens>"
    return "<token lists>" if isinstance(first, list) else "<texts>"


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
"""Failing fast, because a body has room for half a million errors."""

Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[list[str], Field(min_length=1, fail_fast=True), Tag("<texts>")]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag("<token lists>")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="must be a string, a list of strings, a list of token ids or a list of such lists",
    ),
]


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    prompt: Prompt
    best_of: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: OnlyFalse = None
    suffix: Unsupported = None
