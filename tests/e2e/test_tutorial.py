"""Every command of docs/tutorial.md runs as it stands there, in its order, on a port that is free."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from moeless.deployments.runtime import free_port
from tests.support.served import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
_BLOCK = re.compile(r'^```bash title="(?P<where>[^"]+)"\n(?P<commands>.*?)^```$', re.MULTILINE | re.DOTALL)
_PORT_OF_THE_PAGE = "8000"


@dataclass(frozen=True)
class Block:
    """Commands of the page and the terminal that they are typed into."""

    where: str
    commands: str


def blocks(port: int) -> list[Block]:
    found = _BLOCK.finditer(PAGE.read_text(encoding="utf-8"))
    return [Block(match["where"], match["commands"].replace(_PORT_OF_THE_PAGE, str(port))) for match in found]


@dataclass
class Terminals:
    """Terminal 1 keeps a server in the foreground; terminal 2 runs one command after the other."""

    folder: Path
    url: str
    server: subprocess.Popen[bytes] | None = None

    def serve(self, commands: str) -> None:
        self.interrupt()
        # exec: Ctrl-C goes to the server, as it does in a terminal
        self.server = subprocess.Popen(["bash", "-c", f"exec {commands}"], cwd=self.folder, env=environment())
        wait_until(self._is_ready, timeout_s=150, what="the tutorial's server is ready")

    def run(self, commands: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=self.folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    def interrupt(self) -> None:
        if self.server is None:
            return
        children = psutil.Process(self.server.pid).children(recursive=True)
        self.server.send_signal(signal.SIGINT)
        self.server.wait(timeout=60)
        self.server = None
        psutil.wait_procs(children, timeout=20)

    def _is_ready(self) -> bool:
        assert self.server is not None
        assert self.server.poll() is None, f"the tutorial's server ended with {self.server.returncode}"
        try:
            return httpx.get(f"{self.url}/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False


def environment() -> dict[str, str]:
    """The environment after `source .venv/bin/activate`."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "160"}


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[Terminals]:
    opened = Terminals(folder=tmp_path, url=f"http://127.0.0.1:{free_port()}")
    yield opened
    opened.interrupt()


def test_every_command_of_the_tutorial_runs(terminals: Terminals) -> None:
    port = int(terminals.url.rsplit(":", 1)[1])
    outputs = []
    for block in blocks(port):
        if block.where == "terminal 1":
            terminals.serve(block.commands)
        elif block.where == "terminal 2":
            outputs.append(terminals.run(block.commands))
    shown = "\n".join(outputs)
    assert '"object":"chat.completion"' in shown.replace(" ", "")
    assert "policy.yaml: a valid policy" in shown
    assert "recommended:" in shown
    for name in ("chats.trace", "load.png", "predictors.safetensors", "report.html", "plan.json"):
        assert (terminals.folder / name).stat().st_size > 0, name


def test_the_page_has_no_command_that_the_test_does_not_run() -> None:
    fences = re.findall(r"^```(.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {fence for fence in fences if not re.fullmatch(r'bash title="(once|terminal [12])"', fence)} == set()
    assert [block.where for block in blocks(8000)].count("once") == 1  # make demo has a test of its own
