"""The bodies of POST /v1/chat/completions and /v1/completions: types and fixed ranges.

Strict: a string is no number, and a field that is not here is refused by name unless it is null. Fields of OpenAI's
and vLLM's APIs that would change the output and are not served are listed as Unsupported, so that the error can say
so; harmless ones are marked with NO_EFFECT, and named in the response. Limits that an operator sets,
and what depends on the model, are admission.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError


def _refuse_value(value: object) -> None:
    if value is not None:
        raise PydanticCustomError("unsupported", "is not supported by this server")


def _refuse_true(value: bool | None) -> bool | None:
    if value:
        raise PydanticCustomError("unsupported", "is not supported by this server, only false is")
    return value


def _refuse_false(value: bool | None) -> bool | None:
    if value is False:
        raise PydanticCustomError("unsupported", "is not supported by this server, only true is")
    return value


def _refuse_entries(value: list[Any] | None) -> list[Any] | None:
    if value:
        raise PydanticCustomError("unsupported", "is not supported by this server, only an empty list is")
    return value


def _refuse_other_than(neutral: float) -> Callable[[float | None], float | None]:
    def check(value: float | None) -> float | None:
        if value is not None and value != neutral:
            raise PydanticCustomError("unsupported", f"is not supported by this server, only {neutral:g} is")
        return value

    return check


def _refuse_forced_tools(value: Any) -> Any:
    if value is not None and value not in ("none", "auto"):
        raise PydanticCustomError("unsupported", "is not supported by this server, only 'none' and 'auto' are")
    return value


def _as_whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_as_whole)
"""Makes an integer what JSON Schema calls one: 3.0 too, but neither "3" nor true."""

NO_EFFECT = "no effect"
"""Marks fields that are accepted and change nothing in the output."""

Unsupported = Annotated[Any, AfterValidator(_refuse_value), WithJsonSchema({"type": "null"})]
"""Known to OpenAI's API, refused here unless null."""
OnlyFalse = Annotated[bool | None, AfterValidator(_refuse_true), WithJsonSchema({"enum": [False, None]})]
OnlyTrue = Annotated[bool | None, AfterValidator(_refuse_false), WithJsonSchema({"enum": [True, None]})]
OnlyEmptyList = Annotated[
    list[Any] | None,
    AfterValidator(_refuse_entries),
    WithJsonSchema({"anyOf": [{"type": "array", "maxItems": 0}, {"type": "null"}]}),
]
OnlyZero = Annotated[int | None, AfterValidator(_refuse_other_than(0)), WithJsonSchema({"enum": [0, None]})]
OnlyOne = Annotated[float | None, AfterValidator(_refuse_other_than(1)), WithJsonSchema({"enum": [1, None]})]
NoForcedTools = Annotated[Any, AfterValidator(_refuse_forced_tools), WithJsonSchema({"enum": ["none", "auto", None]})]


class StrictBody(BaseModel):
    """Types are taken as they are, and what is not known must be null."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    __pydantic_extra__: dict[str, None] = Field(init=False)
    """A field that is not known must be null, which is the same as leaving it out."""


class StreamOptions(StrictBody):
    """`stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Extension, as in vLLM: usage so far in every chunk; needs include_usage."""
    include_obfuscation: OnlyFalse = None


class TextFormat(StrictBody):
    """`response_format`: text is the only one."""

    type: Literal["text"]


class TextPart(StrictBody):
    """A content part; text is the only kind."""

    type: Literal["text"]
    text: str
    cache_control: Annotated[dict[str, Any] | None, NO_EFFECT] = None


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


class CalledFunction(StrictBody):
    """Function that an earlier answer called; the arguments are JSON text, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(StrictBody):
    """One call of an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Annotated[int | None, NO_EFFECT] = None
    """Streams number calls."""


class Message(StrictBody):
    """One message of a chat. The null-only fields are what clients send back from an earlier answer."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None
    content: Annotated[Content, Field(validate_default=True)] = None
    """Stands behind the fields that its validator looks at."""
    refusal: Unsupported = None
    annotations: OnlyEmptyList = None
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


class SamplingFields(StrictBody):
    """Fields of both endpoints."""

    model: str
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31), WHOLE] | None = None
    """Extension, as in vLLM: 0 and -1 mean no limit. So are the next seven."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0), WHOLE] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0), WHOLE]], Field(fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0), WHOLE] | None = None
    ignore_eos: bool | None = None
    """Generate max_tokens tokens whatever the model says. For benchmarks."""
    n: Annotated[int, Field(ge=1), WHOLE] | None = None
    stop: Stop = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    length_penalty: Annotated[OnlyOne, NO_EFFECT] = None
    metadata: Annotated[dict[str, Any] | None, NO_EFFECT] = None
    priority: Annotated[OnlyZero, NO_EFFECT] = None
    prompt_cache_key: Annotated[str | None, NO_EFFECT] = None
    safety_identifier: Annotated[str | None, NO_EFFECT] = None
    service_tier: Annotated[str | None, NO_EFFECT] = None
    skip_special_tokens: Annotated[OnlyTrue, NO_EFFECT] = None
    spaces_between_special_tokens: Annotated[bool | None, NO_EFFECT] = None
    """Special tokens are never in the text, so neither are spaces between them."""
    store: Annotated[bool | None, NO_EFFECT] = None
    use_beam_search: Annotated[OnlyFalse, NO_EFFECT] = None
    user: Annotated[str | None, NO_EFFECT] = None


class ChatCompletionRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0), WHOLE] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """For chat templates that name it, as is verbosity."""
    verbosity: Literal["low", "medium", "high"] | None = None
    add_generation_prompt: bool | None = None
    """Extension, as in vLLM: true by default. So are the next two."""
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    function_call: Annotated[NoForcedTools, NO_EFFECT] = None
    functions: Annotated[OnlyEmptyList, NO_EFFECT] = None
    parallel_tool_calls: Annotated[bool | None, NO_EFFECT] = None
    prompt_cache_options: Annotated[dict[str, Any] | None, NO_EFFECT] = None
    prompt_cache_retention: Annotated[str | None, NO_EFFECT] = None
    tool_choice: Annotated[NoForcedTools, NO_EFFECT] = None
    tools: Annotated[OnlyEmptyList, NO_EFFECT] = None

    audio: Unsupported = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None


def _as_whole_tokens(value: object) -> object:
    """A look at the types first, since a prompt may have hundreds of thousands of token ids."""
    if isinstance(value, list) and float in set(map(type, value)):
        return [_as_whole(item) for item in value]
    return value


def _prompt_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    first = value[0] if value else None
    if isinstance(first, int | float):
        return "<tokens>"
    return "<token lists>" if isinstance(first, list) else "<texts>"


TokenIds = Annotated[
    list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True), BeforeValidator(_as_whole_tokens)
]
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
    max_tokens: Annotated[int, Field(ge=0), WHOLE] | None = None
    """0 only scores or repeats the prompt."""
    best_of: Annotated[int, Field(ge=1), WHOLE] | None = None
    logprobs: Annotated[int, Field(ge=0), WHOLE] | None = None
    echo: bool | None = None
    suffix: Unsupported = None


def fields_without_effect(body: SamplingFields) -> list[str]:
    """Paths of the fields that the client sent, other than null, and that change nothing."""
    names = [
        name
        for name, field in type(body).model_fields.items()
        if NO_EFFECT in field.metadata and getattr(body, name) is not None
    ]
    options = body.stream_options
    if options is not None and options.continuous_usage_stats and not options.include_usage:
        names.append("stream_options.continuous_usage_stats")
    return names
