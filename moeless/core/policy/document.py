"""Reading a policy: YAML or a mapping becomes the tree, or an error that names the place in the document."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from moeless.core.errors import ConfigError
from moeless.core.policy.tree import Policy

RESOURCE_KIND = "ExpertScalingPolicy"
_RENAMED_FIELDS = {"goodEnough": "maxImbalance"}
"""Old names, which are refused, and the new ones."""


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """The policy of a YAML (or JSON) file.

    Raises: ConfigError that names the file and the place; OSError if it cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        try:
            document = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{os.fspath(path)}: must be YAML, got {' '.join(str(error).split())}") from error
    try:
        return parse_policy({} if document is None else document)
    except ConfigError as error:
        raise ConfigError(f"{os.fspath(path)}: {error}") from error


def parse_policy(document: object) -> Policy:
    """The policy of a document: the tree itself, or a Kubernetes resource whose `spec` it is.

    Raises: ConfigError whose message names the path of what is wrong, such as spec.rules[2].maxReplicas.
    """
    if not isinstance(document, Mapping):
        raise ConfigError(f"policy must be a mapping of fields, got {_shown(document)}")
    prefix, tree = "", document
    if "spec" in document:
        if document.get("kind", RESOURCE_KIND) != RESOURCE_KIND:
            raise ConfigError(f"kind must be {RESOURCE_KIND}, got {_shown(document['kind'])}")
        unknown = sorted(map(str, set(document) - {"apiVersion", "kind", "metadata", "spec", "status"}))
        if unknown:
            raise ConfigError(f"{unknown[0]} must not be given beside spec")
        prefix, tree = "spec", document["spec"]
    try:
        return Policy.model_validate(tree, by_alias=True, by_name=False)
    except ValidationError as error:
        raise ConfigError("; ".join(_told(details, tree, prefix) for details in error.errors())) from error


def policy_schema() -> dict[str, Any]:
    """JSON schema of the document."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Policy.model_json_schema(by_alias=True)}


def _told(details: ErrorDetails, tree: object, prefix: str) -> str:
    path = _path(details["loc"], tree, prefix)
    got = _shown(details["input"])
    kind, message = details["type"], details["msg"]
    match kind:
        case "extra_forbidden" if details["loc"][-1] in _RENAMED_FIELDS:
            return f"{path} must not be given: the field is now {_RENAMED_FIELDS[str(details['loc'][-1])]}"
        case "extra_forbidden":
            return f"{path} must not be given: no such field"
        case "missing":
            return f"{path} must be given"
        case "union_tag_not_found":
            return f"{path}.name must be given"
        case "union_tag_invalid":
            return f"{path}.name must be one of {details['ctx']['expected_tags']}, got {details['ctx']['tag']!r}"
        case "value_error":
            # Raised by the tree's own validators; those of a whole rule begin with the field.
            said = message.removeprefix("Value error, ")
            return f"{path} {said}" if said.startswith("must") else f"{path}.{said}".lstrip(".")
        case "string_pattern_mismatch":
            return f"{path} must look like '0-3,7,20-', got {got}"
        case "too_short":
            return f"{path} must hold at least {details['ctx']['min_length']}, got {got}"
        case "tuple_type":
            return f"{path} must be a list, got {got}"
        case "model_type" | "model_attributes_type":
            return f"{path or 'policy'} must be a mapping of fields, got {got}"
    return f"{path} {message.replace('Input should', 'must', 1)}, got {got}"


def _path(location: tuple[int | str, ...], tree: object, prefix: str) -> str:
    path, node = prefix, tree
    for step in location:
        if isinstance(node, Mapping) and step not in node and node.get("name") == step:
            continue  # pydantic names the member of a union too
        if isinstance(step, int):
            path += f"[{step}]"
            node = node[step] if isinstance(node, list | tuple) and step < len(node) else None
        else:
            path += f".{step}" if path else step
            node = node.get(step) if isinstance(node, Mapping) else None
    return path


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
