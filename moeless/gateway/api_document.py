"""The OpenAPI document under /openapi.json: bodies with this server's limits, and the answers of every route.

The routes read their bodies and write their answers themselves, so FastAPI knows neither. Each route states both with
`describes`; `install_document` completes the document. Rules between fields that JSON Schema cannot say (`best_of`
equals `n`, prompt and answer fit the context) stand in docs/api.md alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from moeless.gateway.response_schemas import JSON_SCHEMAS

_REF = "#/components/schemas/{model}"
_RESPONSES = "x-responses"
_ERROR = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
_MEANINGS = {
    200: "The answer.",
    400: "The body breaks a rule; `param` is the field.",
    401: "The API key is missing or wrong.",
    403: "The server does not allow recording.",
    404: "There is no such model.",
    409: "The recording is not in the state that the request needs.",
    413: "The body is too large.",
    415: "The Content-Type is not application/json.",
    429: "The engine's queue is full.",
    500: "An internal error; the message has the id under which the log has the details.",
    503: "There is no engine, or it could not compute the answer.",
}
_RETRY_AFTER = {"description": "Seconds after which to try again.", "schema": {"type": "string", "pattern": "^[0-9]+$"}}

Limits = Callable[[dict[str, Any]], None]
"""Writes a server's limits into the document's schemas of bodies."""


def describes(
    content: Mapping[str, str],
    *errors: int,
    body: type[BaseModel] | None = None,
    more: Mapping[int, Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """`openapi_extra` of a route.

    Args:
        content: media type → schema's name, of status 200.
        errors: statuses whose body is an error.
        body: model of the request's body.
        more: content of further statuses that are no errors.
    """
    answers = {200: content, **(more or {})}
    responses: dict[str, Any] = {
        str(status): {"description": _MEANINGS[status], "content": _content(types)} for status, types in answers.items()
    }
    for status in errors:
        responses[str(status)] = {"description": _MEANINGS[status], "content": _ERROR}
        if status in (429, 503):
            responses[str(status)]["headers"] = {"Retry-After": _RETRY_AFTER}
    description: dict[str, Any] = {_RESPONSES: responses}
    if body is not None:
        schema = {"$ref": _REF.format(model=body.__name__)}
        description["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return description


def _content(types: Mapping[str, str]) -> dict[str, Any]:
    return {media_type: {"schema": {"$ref": _REF.format(model=name)}} for media_type, name in types.items()}


def install_document(
    app: FastAPI, bodies: list[type[BaseModel]], *, limits: Limits, open_paths: frozenset[str] | None
) -> None:
    """Make `app` answer /openapi.json with the whole document.

    Args:
        limits: called for each document, since some limits are the model's.
        open_paths: paths that need no API key; None: no path does.
    """

    def openapi() -> dict[str, Any]:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, definitions = models_json_schema([(body, "validation") for body in bodies], ref_template=_REF)
        schemas = definitions["$defs"]
        limits(schemas)
        document["components"] = {"schemas": schemas | JSON_SCHEMAS}
        for path, operations in document["paths"].items():
            for operation in operations.values():
                # FastAPI's own responses hold a 422 for parameters and JSON for every 200.
                operation["responses"] = operation.pop(_RESPONSES)
                if open_paths is not None and path not in open_paths:
                    operation["responses"]["401"] = {"description": _MEANINGS[401], "content": _ERROR}
                    operation["security"] = [{"key": []}]
        if open_paths is not None:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return document

    app.openapi = openapi  # type: ignore[method-assign]
