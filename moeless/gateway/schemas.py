"""The bodies of POST /v1/chat/completions and /v1/completions, as far as types and fixed ranges go.

Strict: a string is no number, and a field that is not here is refused by name. Fields of OpenAI's API that we do
not serve are listed as Unsupported, so that the answer can say so. Limits that an operator sets, and what depends
on the model, are admission.py's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


def _refuse_value(value: object) -> None:
    if value is not None:
        raise PydanticCustomError("unsupported", "is not supported by this server")


def _refuse_true(value: bool | None) -> bool | None:
    if value:
        raise PydanticCustomError("unsupported", "is not supported by this server, only false is")
    return value


def _refuse_nonempty(value: list[Any] | None) -> list[Any] | None:
    if value:
        raise PydanticCustomError("unsupported", "is not supported by this server unless it is empty")
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
    cache_control: dict[str, Any] | None = None
    """Accepted without effect."""


def _content_kind(value: object) -> str | None:
    if value is None:
        return "<none>"
    if isinstance(value, str):
        return "<text>"
    return "<parts>" if isinstance(value, list) else None


Content = Annotated[
    Annotated[None, Tag("<none>")]
    | Annotated[str, Tag("<text>")]
    | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("<parts>")],
    Discriminator(
        _content_kind,
        custom_error_type="content_type",
        custom_error_message="must be a string or a list of parts of type text",
    ),
]
"""The tags stand in angle brackets so that body.py can drop them from error paths."""


class CalledFunction(_Body):
    """What an earlier answer called; the arguments are JSON text, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(_Body):
    """One call of an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """Accepted without effect; streams number calls."""


class Message(_Body):
    """One message of a chat. The null-only fields are what clients send back from an earlier answer."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    content: Annotated[Content, Field(validate_default=True)] = None
    """Stands behind the fields that its validator looks at."""
    refusal: Unsupported = None
    annotations: Annotated[list[Any] | None, AfterValidator(_refuse_nonempty)] = None
    audio: Unsupported = None
    function_call: Unsupported = None

    @field_validator("content")
    @classmethod
    def _check_content(cls, content: Content, info: ValidationInfo) -> Content:
        if content is None and "tool_calls" in info.data and not info.data["tool_calls"]:
            raise PydanticCustomError(
                "content_missing", "is required; only an assistant's message with tool_calls may lack it"
            )
        return content

    @field_validator("tool_calls", "tool_call_id")
    @classmethod
    def _check_role(cls, value: object, info: ValidationInfo) -> object:
        owner = "tool" if info.field_name == "tool_call_id" else "assistant"
        if value and info.data.get("role", owner) != owner:
            raise PydanticCustomError("message_role", "may only stand in a message of role {owner}", {"owner": owner})
        return value

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it: fields that were not sent are absent, but for content."""
        # OpenAI renamed the role; templates know it by its first name.
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        if isinstance(self.content, list):
            message["content"] = [{"type": "text", "text": part.text} for part in self.content]
        else:
            message["content"] = self.content
        for field in ("name", "reasoning_content", "tool_call_id"):
            value = getattr(self, field)
            if value is not None:
                message[field] = value
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude={"index"}, exclude_none=True) for call in self.tool_calls]
        return message


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
