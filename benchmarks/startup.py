"""Seconds from `moeless serve` to ready, and where they go.

`python -m benchmarks startup` starts the bundled model with two workers several times and prints the median of each
phase, with the seconds between a replica's process being made and the application running.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

_CHILD = """
import json, sys, time
marks = [("importing packages, opening the packed model", time.time())]
from moeless.deployments.runtime import prepare_environment
from moeless.deployments.run_secrets import RunSecrets
from moeless.deployments.settings import ServeSettings
from moeless.packages.source import resolve_model
packed = resolve_model(sys.argv[1])
marks.append(("importing ray, engine and gateway", time.time()))
prepare_environment()
from moeless.cli.serve import wait_until_ready
from moeless.deployments.application import running
settings = ServeSettings(
    packed_path=str(packed.path),
    model_id="bench",
    num_workers=int(sys.argv[2]),
    port=int(sys.argv[3]),
)
run_secrets = RunSecrets(run_secret="bench")
with running(packed.manifest, settings, run_secrets, on_phase=lambda phase: marks.append((phase, time.time()))):
    marks.append(("engine reaches its workers", time.time()))
    wait_until_ready(f"http://127.0.0.1:{settings.port}", lambda: False)
    marks.append(("ready", time.time()))
    print("MARKS " + json.dumps(marks), flush=True)
    sys.stdin.readline()
"""


def main(argv: list[str] | None = None) -> None:
    """Print the phases; with --json, write them too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="moeless-mini")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--port", type=int, default=18431)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="two repeats")
    arguments = parser.parse_args(argv)
    runs = [
        _run(arguments.model, arguments.workers, arguments.port)
        for _ in range(2 if arguments.quick else arguments.repeats)
    ]
    table = Table("phase", "seconds (median)", "spread", title=f"moeless serve, {arguments.workers} workers, to ready")
    for phase in runs[0]:
        values = [run[phase] for run in runs]
        table.add_row(phase, f"{statistics.median(values):.1f}", f"{min(values):.1f}-{max(values):.1f}")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(runs, indent=2))


def _run(model: str, workers: int, port: int) -> dict[str, float]:
    """One start. Returns seconds by phase, in order, and the total under "ready"."""
    started = time.time()
    command = [sys.executable, "-c", _CHILD, model, str(workers), str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        lines = iter(child.stdout.readline, b"")
        marks_line = next((line for line in lines if line.startswith(b"MARKS ")), None)
        if marks_line is None:
            raise RuntimeError("the server did not become ready")
        marks = json.loads(marks_line.removeprefix(b"MARKS "))
        replicas = _replica_starts(child.pid)
        child.stdin.write(b"stop\n")
        child.stdin.flush()
        child.wait(timeout=120)
    phases = {"starting Python": marks[0][1] - started}
    for (phase, begins), (_, ends) in pairwise(marks):
        phases[phase] = ends - begins
    at = dict(marks)
    for name, created in replicas.items():
        phases[f"  of it {name}, from its process on"] = at["engine reaches its workers"] - created
    phases["total, command to ready"] = at["ready"] - started
    return phases


def _replica_starts(pid: int) -> dict[str, float]:
    starts = {}
    for process in psutil.Process(pid).children(recursive=True):
        name = " ".join(process.cmdline())
        if "ServeReplica:moeless:" in name:
            starts[name.split("ServeReplica:moeless:")[1].split(":")[0].strip()] = process.create_time()
    return starts


if __name__ == "__main__":
    main()
