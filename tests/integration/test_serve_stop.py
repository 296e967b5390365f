"""`moeless serve` under signals: the same end for all of them, at any moment, with an error for what is cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from moeless.deployments.runtime import free_port
from tests.support.served import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

MODEL = "moeless-mini"
LONG = {"model": MODEL, "prompt": "KING HENRY:", "max_tokens": 900, "ignore_eos": True}


@contextmanager
def started(log: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server that starts; every process of it is killed if the test fails."""
    port = free_port()
    command = [sys.executable, "-m", "moeless.cli", "serve", MODEL, "--workers", "1", "--port", str(port)]
    # The tests may run under nohup, whose children ignore SIGHUP, as moeless then does, too.
    command = ["env", "--default-signal=HUP", *command]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True
        )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def assert_nothing_left(children: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive, [child.cmdline() for child in alive]


def assert_quiet(log: Path) -> None:
    """No line of Ray's, and no traceback."""
    text = log.read_text()
    for word in ("Traceback", "(raylet)", "(Serve", "INFO 20", "SIGTERM", "graceful_shutdown", "\x1b"):
        assert word not in text, text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_runs_ends_with_an_error_and_every_process_goes(number: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "log"
    streamed: list[str] = []
    whole: list[httpx.Response] = []
    with started(log) as (process, url):
        wait_until(lambda: "\nserving " in log.read_text(), timeout_s=200, what="the command says that it serves")

        def stream() -> None:
            with httpx.stream("POST", f"{url}/v1/completions", json=LONG | {"stream": True}, timeout=120) as response:
                streamed.extend(line for line in response.iter_lines() if line)

        def ask() -> None:
            whole.append(httpx.post(f"{url}/v1/completions", json=LONG, timeout=120))

        threads = [threading.Thread(target=stream), threading.Thread(target=ask)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(streamed) > 3, timeout_s=60, what="tokens come")
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        assert process.wait(timeout=120) == 0, log.read_text()
        assert_nothing_left(children)
        for thread in threads:
            thread.join(timeout=30)
    events = [json.loads(line.removeprefix("data: ")) for line in streamed if line.startswith("data: {")]
    assert "error" in events[-1], streamed[-3:]
    assert not any(choice.get("finish_reason") for event in events for choice in event.get("choices", []))
    (response,) = whole
    assert response.status_code == 503, response.text
    assert "stopping" in log.read_text()
    assert "logs of Ray and of every process: " in log.read_text()
    assert_quiet(log)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", ["starting Ray ...", "starting Ray Serve ...", "starting engine"])
def test_a_start_is_broken_off_by_either_signal(number: signal.Signals, phase: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(log) as (process, _):
        wait_until(lambda: phase in log.read_text(), timeout_s=120, what=phase)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        assert process.wait(timeout=90) == 130, log.read_text()
        assert_nothing_left(children)
    assert log.read_text().splitlines()[-2:] == ["stopping", "moeless: interrupted"]
    assert_quiet(log)


def test_a_signal_to_the_whole_group_as_a_terminal_sends_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(log) as (process, url):
        wait_until(lambda: is_ready(url), timeout_s=200, what="the server is ready")
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=120) == 0, log.read_text()
        assert_nothing_left(children)
    assert_quiet(log)


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        ((), {"RAY_TMPDIR": "/proc/nowhere"}, ("RAY_TMPDIR=/proc/nowhere must be writable", "set RAY_TMPDIR")),
        (("--ray-address", "127.0.0.1:9"), {}, ("--ray-address", "127.0.0.1:9", "ray start --head")),
    ],
)
def test_a_ray_that_cannot_start_is_one_line(
    options: tuple[str, ...], environment: dict[str, str], words: tuple[str, ...]
) -> None:
    command = [sys.executable, "-m", "moeless.cli", "serve", MODEL, "--port", str(free_port()), *options]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    for word in words:
        assert word in line
