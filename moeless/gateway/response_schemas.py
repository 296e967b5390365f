"""Schemas of the answers, for the OpenAPI document. api_document.py puts them into it."""

from __future__ import annotations

from typing import Any

import msgspec

from moeless.core.generation import FunctionStatus, PredictionStatus, WorkerStatus
from moeless.core.recording import RecordingStatus

_REF = "#/components/schemas/{name}"
_STRING = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_NUMBER_OR_NULL = {"type": ["number", "null"]}
_STRING_OR_NULL = {"type": ["string", "null"]}


def _object(**properties: Any) -> dict[str, Any]:
    """An object that has all of these properties, and may have others."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": _REF.format(name=name)}


_TOKEN = _object(token=_STRING, logprob={"type": "number"}, bytes=_list(_COUNT))
_CHAT_LOGPROBS = _object(content=_list({"allOf": [_TOKEN, _object(top_logprobs=_list(_TOKEN))]}))
_COMPLETION_LOGPROBS = _object(
    text_offset=_list(_COUNT),
    token_logprobs=_list(_NUMBER_OR_NULL),
    tokens=_list(_STRING),
    top_logprobs=_list(_nullable({"type": "object", "additionalProperties": {"type": "number"}})),
)
_ENDS = {
    "finish_reason": {"enum": ["stop", "length", None]},
    "stop_reason": {"type": ["string", "integer", "null"]},
}
_CHAT_CHOICE = _object(
    index=_COUNT, message=_object(role={"const": "assistant"}, content=_STRING), logprobs=_nullable(_CHAT_LOGPROBS),
    **_ENDS,
)  # fmt: skip
_COMPLETION_CHOICE = _object(index=_COUNT, text=_STRING, logprobs=_nullable(_COMPLETION_LOGPROBS), **_ENDS)
_USAGE = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)
_MODEL = _object(id=_STRING, object={"const": "model"}, created=_COUNT, owned_by=_STRING, max_model_len=_COUNT)


def _generated(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    return _object(
        id=_STRING, object={"const": kind}, created=_COUNT, model=_STRING, choices=_list(choice), usage=_USAGE
    )


def _structs() -> dict[str, Any]:
    """The schemas of structs that are sent as they are; what is not a number yet is sent as null."""
    types = [FunctionStatus, PredictionStatus, RecordingStatus, WorkerStatus]
    _, schemas = msgspec.json.schema_components(types, ref_template=_REF)
    for name in ("recall", "load_error", "popularity_error", "coverage"):
        schemas["PredictionStatus"]["properties"][name] = _NUMBER_OR_NULL
    return schemas


JSON_SCHEMAS: dict[str, Any] = {
    "Error": _object(error=_object(message=_STRING, type=_STRING, param=_STRING_OR_NULL, code=_STRING_OR_NULL)),
    "ChatCompletion": _generated("chat.completion", _CHAT_CHOICE),
    "Completion": _generated("text_completion", _COMPLETION_CHOICE),
    "Event": {**_object(data=_STRING), "description": "Data is a chunk as JSON; the last event's is [DONE]."},
    "Model": _MODEL,
    "Models": _object(object={"const": "list"}, data=_list(_ref("Model"))),
    "Experts": _object(
        object={"const": "list"}, model=_STRING, data=_list(_ref("FunctionStatus")), totals={"type": "object"},
        workers=_list(_ref("WorkerStatus")),
    ),
    "Predictors": _object(object={"const": "list"}, model=_STRING, data=_list(_ref("PredictionStatus"))),
    "Status": _object(status=_STRING),
    "Version": _object(version=_STRING),
    "Text": _STRING,
    "File": {"type": "string", "format": "binary"},
    "Recording": {"allOf": [_object(object={"const": "trace.recording"}), _ref("RecordingStatus")]},
    **_structs(),
}  # fmt: skip
