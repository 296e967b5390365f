"""Request bodies: from bytes to a model, or a RequestError that names the field, the rule and the value.

The routes call `read_body` themselves, so that errors are worded here; api_document.py describes the bodies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from moeless.core.errors import RequestError

if TYPE_CHECKING:  # text processes parse bodies, and start in a third of the time without FastAPI
    from fastapi import Request

Body = TypeVar("Body", bound=BaseModel)

_MAX_SMALL_BYTES = 16 * 1024
_MAX_VALUE_CHARS = 80
"""Characters of a wrong value that an error message quotes."""


async def read_body(request: Request, model: type[Body]) -> Body:
    """Read and check a small JSON body. Large ones are checked elsewhere (text_pool.py): it holds up everything here.

    Raises: UnsupportedMediaTypeError (415), BodyTooLargeError (413), RequestError (400).
    """
    from moeless.gateway.errors import BodyTooLargeError

    body = await read_json(request)
    if len(body) > _MAX_SMALL_BYTES:
        raise BodyTooLargeError(f"The body may have at most {_MAX_SMALL_BYTES} bytes here, got {len(body)}.")
    return parse_body(body, model)


async def read_json(request: Request) -> bytes:
    """Read a body that is announced as JSON.

    Raises: UnsupportedMediaTypeError (415), BodyTooLargeError (413, from the middleware), RequestError (400) if the
        body was lost.
    """
    from moeless.gateway.errors import UnsupportedMediaTypeError

    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaTypeError(
            f"The Content-Type header must be application/json, got {media_type or 'none'}.",
            code="unsupported_media_type",
        )
    # Unlike `request.body`, this leaves no copy in the request, which lives as long as its answer is generated.
    body = b"".join([chunk async for chunk in request.stream()])
    if not body and "upgrade" in request.headers:
        # The HTTP server expects another protocol behind the head, and so drops the body.
        raise RequestError(
            "A request with an Upgrade header must have no body; leave the header out.", code="unsupported_upgrade"
        )
    return body


def parse_body(body: bytes, model: type[Body]) -> Body:
    """Raises RequestError for the first thing that is wrong, in the order of the model's fields."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise _request_error(error.errors(include_url=False)[0]) from None


def _request_error(details: ErrorDetails) -> RequestError:
    param = _path(details["loc"])
    rule = details["msg"].removeprefix("Input ").removeprefix("Value error, ")
    match details["type"]:
        case "json_invalid":
            return RequestError(f"The body is not valid JSON: {details['ctx']['error']}.", code="invalid_json")
        case "missing":
            return RequestError(f"'{param}' is required.", param=param, code="missing_required_parameter")
        case "extra_forbidden" | "none_required":  # an extra field must be null, see schemas.py
            return RequestError(f"'{param}' is not known here.", param=param, code="unknown_parameter")
        case "unsupported":
            return RequestError(f"'{param}' {rule}.", param=param, code="unsupported_parameter")
        case "too_short":
            return RequestError(f"'{param}' must not be empty.", param=param, code="invalid_value")
        case "model_type":
            return RequestError(f"{_subject(param)} must be a JSON object.", param=param, code="invalid_type")
    value = _quote(details["input"])
    return RequestError(f"{_subject(param)} {rule}, got {value}.", param=param, code="invalid_value")


def _subject(param: str | None) -> str:
    return f"'{param}'" if param else "The body"


def _path(loc: tuple[int | str, ...]) -> str | None:
    """`messages[0].content[1].type`; union tags (in angle brackets, see schemas.py) are left out."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):
            path += f".{part}" if path else part
    return path or None


def _quote(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_VALUE_CHARS]}…"
