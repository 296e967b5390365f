"""`moeless serve` as a user runs it: a process, a port, and nothing left when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from moeless.deployments.runtime import free_port


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """Processes of a deployment's replicas."""
        name = f"ServeReplica:moeless:{deployment}"
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if any(name in part for part in child.cmdline()):
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def experts(self) -> dict[str, dict[str, object]]:
        """Rows of GET /v1/experts by name."""
        response = httpx.get(f"{self.url}/v1/experts", timeout=30)
        response.raise_for_status()
        return {row["name"]: row for row in response.json()["data"]}

    def complete(self, model: str, prompt: str, max_tokens: int = 16, timeout_s: float = 60) -> str:
        """Greedy completion."""
        response = httpx.post(
            f"{self.url}/v1/completions",
            json={"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True},
            timeout=timeout_s,
        )
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    """Return once `condition` holds; fail the test with `what` after the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.1)


@contextmanager
def serving(model: str | Path, *options: str, log: Path, ready_timeout_s: float = 150) -> Iterator[Served]:
    """Run `moeless serve MODEL OPTIONS` until the block ends; check that it ends well and leaves no process."""
    port = free_port()
    command = [sys.executable, "-m", "moeless.cli", "serve", str(model), "--port", str(port), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ))
    served = Served(url=f"http://127.0.0.1:{port}", process=process, log=log)
    try:
        wait_until(lambda: _is_ready(served), timeout_s=ready_timeout_s, what="/ready answers 200")
        yield served
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        code = process.wait(timeout=60)
        assert code == 0, f"moeless serve ended with {code}: {log.read_text()[-4000:]}"
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive, f"left running: {[child.cmdline() for child in alive]}"
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


def _is_ready(served: Served) -> bool:
    if served.process.poll() is not None:
        raise AssertionError(f"moeless serve ended early: {served.log.read_text()[-4000:]}")
    try:
        return httpx.get(f"{served.url}/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
