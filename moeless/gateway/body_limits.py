"""A server's limits, written into the JSON schemas of request bodies. api_document.py puts those into the document.

admission.py applies the same limits to requests, and words the errors.
"""

from __future__ import annotations

from typing import Any

from moeless.core.generation import ModelInfo
from moeless.core.recording import MAX_RECORDING_BYTES, recorded_row_bytes
from moeless.gateway.config import GatewayConfig

Schema = dict[str, Any]


def write_limits(schemas: dict[str, Schema], config: GatewayConfig, info: ModelInfo | None) -> None:
    """Complete the schemas by name, in place.

    Args:
        info: None while the engine has not been reached; then the model's limits are missing.
    """
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        _limit_sampling(schemas[name]["properties"], config)
        schemas[name]["allOf"] = [
            {
                "anyOf": [
                    {"properties": {"stream": {"const": True}, "prompt_logprobs": _NULL}, "required": ["stream"]},
                    {"properties": {"stream": {"enum": [False, None]}, "stream_options": _NULL}},
                ]
            }
        ]
    schemas["Message"]["allOf"] = [
        _one_of_two(
            {"tool_calls": {"anyOf": [_NULL, {"type": "array", "maxItems": 0}]}}, {"role": {"const": "assistant"}}
        ),
        _one_of_two({"tool_call_id": {"enum": [None, ""]}}, {"role": {"const": "tool"}}),
        {
            "anyOf": [
                {"properties": {"content": {"type": ["string", "array"]}}, "required": ["content"]},
                {"properties": {"tool_calls": {"type": "array", "minItems": 1}}, "required": ["tool_calls"]},
            ]
        },
    ]
    chat, completion = schemas["ChatCompletionRequest"], schemas["CompletionRequest"]
    chat["properties"]["messages"]["maxItems"] = config.max_messages
    _branch(chat["properties"]["top_logprobs"], "integer")["maximum"] = config.max_logprobs
    chat["allOf"] += [
        _one_of_two({"top_logprobs": _NULL}, {"logprobs": {"const": True}}),
        _one_of_two({"max_tokens": _NULL}, {"max_completion_tokens": _NULL}, may_lack=True),
        _one_of_two(
            {"continue_final_message": {"enum": [False, None]}}, {"add_generation_prompt": {"enum": [False, None]}},
            may_lack=True,
        ),
    ]  # fmt: skip
    chat["properties"]["chat_template_kwargs"]["anyOf"][0]["propertyNames"] = {
        "not": {"enum": ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message"]}
    }
    _branch(completion["properties"]["logprobs"], "integer")["maximum"] = config.max_logprobs
    completion["properties"]["best_of"] = {"enum": [1, None], "description": "Only the value of n."}
    completion["allOf"] += [
        _one_of_two({"best_of": _NULL}, {"n": {"enum": [1, None]}}, may_lack=True),
        {
            "anyOf": [
                {"properties": {"max_tokens": {"anyOf": [{"minimum": 1, "type": "integer"}, _NULL]}}},
                {"properties": {"echo": {"const": True}}, "required": ["echo"]},
                {"properties": {"prompt_logprobs": {"type": "integer"}}, "required": ["prompt_logprobs"]},
            ]
        },
    ]
    strings, lists = _prompt_lists(completion)
    strings["maxItems"] = lists["maxItems"] = config.max_prompts
    if info is not None:
        _limit_to_model(schemas, info)


_NULL: Schema = {"type": "null"}


def _one_of_two(first: Schema, second: Schema, *, may_lack: bool = False) -> Schema:
    """At least one of two rules for a field each. `may_lack`: the second also holds where its field is missing."""
    rule: Schema = {"properties": second}
    if not may_lack:
        rule["required"] = list(second)
    return {"anyOf": [{"properties": first}, rule]}


def _limit_sampling(properties: dict[str, Schema], config: GatewayConfig) -> None:
    _branch(properties["n"], "integer")["maximum"] = config.max_n
    text = {"type": "string", "minLength": 1, "maxLength": config.max_stop_chars}
    several = {"type": "array", "items": text, "maxItems": config.max_stop}
    properties["stop"] = {"anyOf": [_NULL, text, several], "default": None}
    _branch(properties["stop_token_ids"], "array")["maxItems"] = config.max_stop_token_ids
    _branch(properties["prompt_logprobs"], "integer")["maximum"] = config.max_logprobs
    _branch(properties["logit_bias"], "object")["maxProperties"] = config.max_logit_bias


def _limit_to_model(schemas: dict[str, Schema], info: ModelInfo) -> None:
    last_id, room = info.vocab_size - 1, info.max_context_tokens - 1
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        properties = schemas[name]["properties"]
        for field in ("max_tokens", "min_tokens", "max_completion_tokens"):
            if field in properties:
                _branch(properties[field], "integer")["maximum"] = room
        _branch(properties["stop_token_ids"], "array")["items"]["maximum"] = last_id
        _branch(properties["logit_bias"], "object")["propertyNames"] = {"pattern": numbers_up_to(last_id)}
    prompt = schemas["CompletionRequest"]["properties"]["prompt"]
    for branch in prompt["anyOf" if "anyOf" in prompt else "oneOf"]:
        tokens = branch.get("items", {})
        tokens = tokens if tokens.get("type") == "integer" else tokens.get("items")
        if tokens is not None:
            tokens["maximum"] = last_id
    _limit_recording(schemas["RecordingRequest"], info)


def _limit_recording(schema: Schema, info: ModelInfo) -> None:
    """A row takes the more memory the more is recorded: a maximum for each number of layers, with and without ids."""
    layers = _branch(schema["properties"]["hidden_layers"], "array")
    layers["uniqueItems"] = True
    layers["items"]["maximum"] = info.num_layers - 1
    schema["anyOf"] = [
        {
            "properties": {
                "token_ids": {"const": True} if token_ids else {"enum": [False, None]},
                "hidden_layers": {"type": "array", "minItems": num_layers, "maxItems": num_layers}
                if num_layers
                else {"anyOf": [{"type": "array", "maxItems": 0}, _NULL]},
                "max_tokens": {"maximum": _max_rows(info, num_layers, token_ids=token_ids)},
            },
            "required": [*(["token_ids"] if token_ids else []), *(["hidden_layers"] if num_layers else [])],
        }
        for num_layers in range(info.num_layers + 1)
        for token_ids in (False, True)
    ]


def _max_rows(info: ModelInfo, num_hidden_layers: int, *, token_ids: bool) -> int:
    return MAX_RECORDING_BYTES // recorded_row_bytes(
        num_layers=info.num_layers,
        num_experts=info.num_experts,
        top_k=info.top_k,
        hidden_size=info.hidden_size,
        num_hidden_layers=num_hidden_layers,
        token_ids=token_ids,
    )


def _prompt_lists(completion: Schema) -> tuple[Schema, Schema]:
    """The branches of `prompt` for several strings and several lists of token ids."""
    prompt = completion["properties"]["prompt"]
    branches = prompt["anyOf" if "anyOf" in prompt else "oneOf"]
    _branch(prompt, "string")["minLength"] = 1
    several = [branch for branch in branches if branch.get("items", {}).get("type") in ("string", "array")]
    strings, lists = sorted(several, key=lambda branch: branch["items"]["type"], reverse=True)
    strings["items"]["minLength"] = 1
    return strings, lists


def _branch(schema: Schema, kind: str) -> Schema:
    """The part of an optional field's schema that has this type."""
    return next(part for part in schema.get("anyOf") or schema.get("oneOf") or [schema] if part.get("type") == kind)


def numbers_up_to(last: int) -> str:
    """A regular expression for the decimal numbers from 0 to `last`, without leading zeros."""
    digits = str(last)
    shorter = [f"[1-9][0-9]{{{length - 1}}}" for length in range(2, len(digits))]
    single = "[0-9]" if len(digits) > 1 else f"[0-{digits}]"
    below = []
    if len(digits) > 1:
        for place, digit in enumerate(digits):
            lowest = 1 if place == 0 else 0
            if int(digit) > lowest:
                below.append(f"{digits[:place]}[{lowest}-{int(digit) - 1}][0-9]{{{len(digits) - place - 1}}}")
        below.append(digits)
    return f"^({'|'.join([single, *shorter, *below])})$"
