"""The command line as a user meets it: one line and an exit code for what is wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeless.cli.app import app
from moeless.cli.serve import STOP_SIGNALS, BreakableStart, usage_lines, wait_until_ready
from moeless.core.errors import ConfigError
from moeless.packages.pack import pack_checkpoint
from tests.families import make_checkpoint


def moeless(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moeless.cli", *arguments], capture_output=True, text=True, timeout=100, check=False
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("checkpoint") / "mixtral")


@pytest.fixture(scope="module")
def packed(checkpoint: Path) -> Path:
    out = checkpoint.parent / "packed"
    pack_checkpoint(checkpoint, out)
    return out


def assert_one_line(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("moeless: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("option", ["--allow-tracing", "--no-allow-tracing"])
def test_an_option_of_an_old_name_is_refused_with_the_new_one(option: str) -> None:
    assert_one_line(moeless("serve", "moeless-mini", option), 2, "--allow-tracing", "--allow-recording")


def test_a_model_that_is_nowhere_is_one_line_and_code_2() -> None:
    assert_one_line(moeless("serve", "/nowhere/at/all"), 2, "/nowhere/at/all")


def test_a_checkpoint_that_is_not_moe_is_one_line_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    assert_one_line(moeless("serve", str(tmp_path)), 2)
    assert_one_line(moeless("pack", str(tmp_path), str(tmp_path / "out")), 2)


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("--isolation", "process", "--isolation"),
        ("--dtype", "int4", "--dtype"),
        ("--workers", "-3", "--workers"),
        ("--device", "tpu", "--device"),
        ("--kv-cache-gb", "0", "--kv-cache-gb"),
        ("--kv-cache-gb", "nan", "--kv-cache-gb"),
        ("--worker-memory-gb", "inf", "--worker-memory-gb"),
        ("--max-running", "0", "--max-running"),
        ("--max-waiting", "-1", "--max-waiting"),
        ("--max-model-len", "0", "--max-model-len"),
        ("--max-model-len", "513", "--max-model-len must be at most 512, the context length of the model,"),
        ("--threads", "0", "--threads"),
        ("--call-timeout", "nan", "--call-timeout"),
        ("--function-idle", "-1", "--function-idle"),
        ("--function-max-replicas", "0", "--function-max-replicas"),
        ("--predict-distance", "0", "--predict-distance"),
        ("--predict-overhead", "1.5", "--predict-overhead"),
        ("--port", "65536", "--port"),
        ("--route-prefix", "v1", "--route-prefix"),
        ("--app-name", "", "--app-name"),
        ("--served-model-name", " ", "--served-model-name"),
        ("--host", "", "--host"),
        ("--cors-allow-origin", "", "--cors-allow-origin"),
        ("--predictors", "/nowhere", "--predictors"),
    ],
)
def test_a_bad_option_is_refused_by_its_name(packed: Path, option: str, value: str, word: str) -> None:
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        error = CliRunner().invoke(app, ["serve", str(packed), option, value]).exception
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert isinstance(error, ConfigError)
    assert str(error).startswith(f"{word} ")
    assert value in str(error)


def test_a_port_that_is_taken_is_one_line_before_anything_starts(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        assert_one_line(moeless("serve", str(checkpoint), "--port", port), 2, "127.0.0.1", port)


def test_a_key_with_a_space_is_refused_without_showing_it(checkpoint: Path) -> None:
    result = moeless("serve", str(checkpoint), "--api-key", "two words")
    assert_one_line(result, 2, "api-key")
    assert "two words" not in result.stderr


class Recorder(BaseHTTPRequestHandler):
    """Keeps what a client sends."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, self.headers, json.loads(body)))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_the_printed_curl_works_in_a_shell_as_it_stands() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as server:
        server.requests = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        model_id = 'it\'s; $HOME `x` \\ "é"'
        lines = usage_lines(f"http://127.0.0.1:{server.server_port}", model_id, with_key=True)
        start = next(i for i, line in enumerate(lines) if "curl" in line)
        command = "\n".join(lines[start : start + 2])
        subprocess.run(["bash", "-c", command], env=os.environ | {"MOELESS_API_KEY": "sesame"}, check=True, timeout=30)
        server.shutdown()
        thread.join()
        ((path, headers, body),) = server.requests  # type: ignore[attr-defined]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sesame"
    assert headers["Content-Type"] == "application/json"
    assert body["model"] == model_id


def test_without_a_key_the_curl_sends_none() -> None:
    lines = usage_lines("http://h:1", "m", with_key=False)
    assert "Authorization" not in "".join(lines)


def test_readiness_is_not_looked_for_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        waiting = threading.Thread(
            target=wait_until_ready, args=(f"http://127.0.0.1:{server.server_port}", lambda: False), daemon=True
        )
        waiting.start()
        waiting.join(20)
        server.shutdown()
    assert not waiting.is_alive()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_every_stop_signal_is_the_same(number: signal.Signals) -> None:
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        start = BreakableStart(lambda phase: None, is_serving=lambda: False)
        start.begin_phase("starting Ray")
        signal.raise_signal(number)
        assert start.is_asked_to_stop
        with pytest.raises(KeyboardInterrupt):
            start.begin_phase("starting Ray Serve")
        start.begin_phase("stopping")
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        BreakableStart(lambda phase: None, is_serving=lambda: False)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


@pytest.mark.parametrize(("is_serving", "breaks"), [(False, True), (True, False)])
def test_an_interrupt_breaks_off_a_start_but_not_a_server_that_answers(is_serving: bool, breaks: bool) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        start = BreakableStart(lambda phase: None, is_serving=lambda: is_serving)
        start.begin_phase("starting engine, workers and gateway")
        with pytest.raises(KeyboardInterrupt) if breaks else nullcontext():
            signal.raise_signal(signal.SIGINT)
        assert start.is_asked_to_stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
