"""Every command of docs/cluster.md runs as it stands there, on two machines made out of this one."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.served import wait_until

pytestmark = [pytest.mark.nodes, pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(420)]

PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"
_BLOCK = re.compile(r'^```bash title="(?P<where>[^"]+)"\n(?P<commands>.*?)^```$', re.MULTILINE | re.DOTALL)
_NETWORK_OF_THE_PAGE = "10.0.0"


@dataclass
class Cluster:
    """Two machines, and terminals on them."""

    folder: Path
    name: str = field(default_factory=lambda: f"ml{secrets.randbelow(1000)}")
    network: str = field(default_factory=lambda: f"10.{100 + secrets.randbelow(100)}.{secrets.randbelow(250)}")
    exports: str = ""
    foreground: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def nodes(self, *arguments: str) -> None:
        subprocess.run([os.environ["MOELESS_NODES"], *arguments], env=self._environment(), check=True, timeout=60)

    def run(self, node: str, commands: str, *, timeout_s: float = 90) -> str:
        done = subprocess.run(
            self._command(node, commands),
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout[-4000:]}"
        return done.stdout

    def stay(self, node: str, commands: str) -> None:
        """Run what stays in the foreground."""
        with (self.folder / "serve.log").open("wb") as log:
            process = subprocess.Popen(
                self._command(node, f"exec {commands}"), env=self._environment(), stdout=log, stderr=subprocess.STDOUT
            )
        self.foreground.append(process)

    def answers(self, path: str) -> bool:
        for process in self.foreground:
            log = (self.folder / "serve.log").read_text()[-4000:]
            assert process.poll() is None, f"it ended with {process.returncode}: {log}"
        url = f"http://{self.network}.1:8000{path}"
        return "200" in self.run("1", f"curl -s -o /dev/null -m 20 -w '%{{http_code}}' {url} || true")

    def _command(self, node: str, commands: str) -> list[str]:
        # Files are shared, so that each machine's Ray needs a folder of its own.
        own = f"export RAY_TMPDIR={self.folder}/{node}; mkdir -p $RAY_TMPDIR; {self.exports}"
        shell = ["bash", "-euo", "pipefail", "-c", f"{own}\n{commands.replace(_NETWORK_OF_THE_PAGE, self.network)}"]
        return [os.environ["MOELESS_NODES"], "run", node, *shell]

    def _environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        cache = str(self.folder / "cache")  # holds the run's secrets, and goes with the folder
        return os.environ | {
            "NODES_NAME": self.name,
            "NODES_NET": self.network,
            "PATH": path,
            "MOELESS_CACHE": cache,
        }


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    folder = Path(f"/tmp/ml-{secrets.token_hex(3)}")  # short: Ray's sockets are in it
    folder.mkdir()
    made = Cluster(folder)
    made.nodes("up", "2")
    try:
        yield made
    finally:
        made.nodes("down")
        for process in made.foreground:
            process.wait(timeout=30)
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def test_the_commands_of_the_page_serve_on_two_machines_and_one_may_die(cluster: Cluster) -> None:
    blocks = [(match["where"], match["commands"]) for match in _BLOCK.finditer(PAGE.read_text(encoding="utf-8"))]
    assert [where for where, _ in blocks] == [
        "every node",
        "node 1",
        "node 2",
        "node 1, stays in the foreground",
        "node 2",
    ]
    cluster.exports = blocks[0][1]
    for where, commands in blocks[1:3]:
        cluster.run(where.removeprefix("node "), commands)
    cluster.stay("1", blocks[3][1])
    wait_until(lambda: cluster.answers("/ready"), timeout_s=180, what="the cluster serves")
    shown = cluster.run("2", blocks[4][1])
    assert '"finish_reason":"length"' in shown
    assert "worker-" in shown

    cluster.nodes("kill", "2")
    completion = blocks[4][1].partition("moeless experts")[0]

    def is_served() -> bool:
        try:
            return '"finish_reason":"length"' in cluster.run("1", completion, timeout_s=60)
        except (AssertionError, subprocess.TimeoutExpired):
            return False

    wait_until(is_served, timeout_s=150, what="node 1 serves alone")
