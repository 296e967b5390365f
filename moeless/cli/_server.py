"""Calls of a running server, for the commands that take --url and --api-key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from moeless.core.errors import ConfigError, MoelessError

DEFAULT_URL = "http://127.0.0.1:8000"


def base_url(url: str) -> str:
    """The address that the API's paths are appended to: without the /v1 that OpenAI clients are given.

    Raises: ConfigError that names --url.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"--url must be the address of a server, got {url!r}: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"--url must be the address of a server, such as {DEFAULT_URL}, got {url!r}")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


@contextmanager
def open_server(url: str, api_key: str | None, *, timeout_s: float) -> Iterator[httpx.Client]:
    """A client of the server at `url`. Raises ConfigError for an address or a key that cannot be one."""
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise ConfigError("--api-key must be printable ASCII without spaces and not empty")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(base_url=base_url(url), headers=headers, timeout=timeout_s) as client:
        yield client


@contextmanager
def server_errors(client: httpx.Client) -> Iterator[None]:
    """Turn what goes wrong on the way into one line; where nobody listens, it says how to start a server."""
    try:
        yield
    except httpx.ConnectError as error:
        raise MoelessError(
            f"--url: no server answers at {client.base_url} ({error}); start one with `moeless serve MODEL`, or give "
            "the address of one that runs"
        ) from error
    except httpx.TimeoutException as error:
        raise MoelessError(f"{client.base_url}: no answer within {client.timeout.read:g} s") from error
    except httpx.HTTPError as error:
        raise MoelessError(f"{client.base_url}: {error or type(error).__name__}") from error


def refusal(response: httpx.Response) -> MoelessError:
    """The server's own words from its error body, or its status."""
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = "no moeless server answers there"
    if response.status_code == 401:
        message += "; give the server's key with --api-key or MOELESS_API_KEY"
    return MoelessError(f"{response.request.url}: {response.status_code}: {message}")
