"""Memory of the backbone's process and two workers with a model of 367 million parameters.

`python -m benchmarks memory` starts the backbone in one process and the experts in two workers, computes a few batches,
and compares the pools' accounts with the memory that each process alone holds (USS).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks._models import CONFIGS, random_model
from moeless.core.routing_table import spread_evenly
from moeless.packages.packed_model import PackedModel
from tests.support import backbone_process
from tests.support.workers import WorkerProcess

_MIB = 1 << 20


def main(argv: list[str] | None = None) -> None:
    """Print the table; with --json, write the figures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(CONFIGS), default="367m")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to keep the random model; a temporary folder by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a small model")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.shape = "mixtral"
    with random_model(arguments.shape, arguments.folder) as model:
        figures = measure(model.packed, arguments.workers)
    _print(f"{arguments.shape}, float32", figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


def measure(packed: PackedModel, num_workers: int) -> dict[str, Any]:
    """Bytes of each process, before and after it has loaded its part, and what it accounts for."""
    manifest = packed.manifest
    names = tuple(f"worker-{index}" for index in range(num_workers))
    table = spread_evenly(num_layers=manifest.num_moe_layers, num_experts=manifest.num_experts, workers=names)
    figures: dict[str, Any] = {"expert_bytes": manifest.function_bytes, "processes": {}}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(WorkerProcess()) for name in names}
        for name, worker in workers.items():
            worker.host(f"empty-{name}", packed)
            before = worker.unique_bytes()
            worker.host(name, packed, [f for f in packed.functions if table.instances[f][0].worker == name])
            figures["processes"][name] = {"unique_before": before}
        task = {
            "packed": str(packed.path),
            "endpoints": {name: msgspec.to_builtins(worker.endpoint(name)) for name, worker in workers.items()},
        }
        answer = subprocess.run(
            [sys.executable, "-m", backbone_process.__name__],
            input=json.dumps(task),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        engine = json.loads(answer.stdout)
        held: list[str] = []
        for name, worker in workers.items():
            report = worker.report(name)
            held += report.states
            figures["processes"][name] |= {
                "unique_after": worker.unique_bytes(),
                "backbone": 0,
                "experts": report.resident_bytes,
            }
    figures["processes"]["engine"] = {
        "unique_before": engine["unique_bytes_before"],
        "unique_after": engine["unique_bytes_after"],
        "backbone": engine["backbone_bytes"],
        "experts": engine["pool_resident_bytes"] + engine["expert_bytes_in_model"],
    }
    figures["each_expert_once"] = sorted(held) == [entry.name for entry in manifest.functions]
    return figures


def _print(title: str, figures: dict[str, Any]) -> None:
    table = Table(title=f"{title}, MiB")
    for column in ("process", "backbone", "experts", "unique before", "unique after", "growth"):
        table.add_column(column, justify="left" if column == "process" else "right")
    for name, bytes_of in figures["processes"].items():
        growth = bytes_of["unique_after"] - bytes_of["unique_before"]
        columns = ("backbone", "experts", "unique_before", "unique_after")
        table.add_row(name, *(f"{bytes_of[column] / _MIB:.1f}" for column in columns), f"{growth / _MIB:.1f}")
    Console().print(table)
    once = "each expert is held once" if figures["each_expert_once"] else "experts are missing or held twice"
    Console().print(f"experts: {figures['expert_bytes'] / _MIB:.1f} MiB; {once}")


if __name__ == "__main__":
    main()
