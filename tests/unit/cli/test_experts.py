"""`moeless experts` against a server on the loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner, Result

from moeless.cli.app import app
from moeless.core.errors import ConfigError, MoelessError

ROWS = [
    {"name": f"L00.E00{i}", "state": "warm", "replicas": 1, "workers": ["local"], "bytes": 2000, "tokens_served": i}
    for i in range(3)
]


class Server(ThreadingHTTPServer):
    paths: list[str]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        known = self.headers.get("Authorization") == "Bearer secret"
        body = json.dumps({"data": ROWS} if known else {"error": {"message": "the key is wrong"}}).encode()
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.paths = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def experts(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["experts", *arguments])


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_address_is_taken_with_and_without_v1(server: Server, suffix: str) -> None:
    url = f"http://127.0.0.1:{server.server_port}{suffix}"
    result = experts("--url", url, "--api-key", "secret", "--top", "2")
    assert result.exit_code == 0, result.output
    assert server.paths == ["/v1/experts"]
    assert "L00.E002" in result.output
    assert "L00.E000" not in result.output


def test_a_wrong_key_is_refused_with_how_to_give_one(server: Server) -> None:
    error = experts("--url", f"http://127.0.0.1:{server.server_port}").exception
    assert isinstance(error, MoelessError)
    assert "401: the key is wrong" in str(error)
    assert "--api-key or MOELESS_API_KEY" in str(error)


def test_no_server_says_how_to_start_one() -> None:
    error = experts("--url", "http://127.0.0.1:9").exception
    assert isinstance(error, MoelessError)
    assert "http://127.0.0.1:9" in str(error)
    assert "`moeless serve MODEL`" in str(error)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://x", "http://", "http://[::1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    error = experts("--url", url).exception
    assert isinstance(error, ConfigError)
    assert "--url must be the address of a server" in str(error)
    assert repr(url) in str(error)


@pytest.mark.parametrize("key", ["two words", "schlüssel"])
def test_a_key_that_cannot_be_one_is_refused_without_showing_it(key: str) -> None:
    error = experts("--api-key", key).exception
    assert isinstance(error, ConfigError)
    assert "--api-key must be printable ASCII" in str(error)
    assert key not in str(error)
