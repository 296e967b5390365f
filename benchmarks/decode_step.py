"""A decode step of the bundled model with two worker processes against experts in the engine's process.

`python -m benchmarks decode_step` runs the same engine twice in one process, once with its experts in process and
once over shared memory to two workers, and decodes a single sequence with each in turns. One thread in each process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from moeless.core.expert import FunctionId
from moeless.core.generation import GenerationDelta, GenerationRequest, SamplingParams
from moeless.core.routing_table import RoutingTable, spread_evenly
from moeless.deployments.settings import ServeSettings
from moeless.deployments.worker import MAX_ROWS, ExpertHost
from moeless.dispatch.channel import WorkerEndpoint
from moeless.dispatch.connect import connect
from moeless.dispatch.dispatcher import Dispatcher
from moeless.dispatch.server import DataPlaneServer
from moeless.engine.config import EngineConfig
from moeless.engine.protocol import Engine
from moeless.engine.transformers.build import build_engine
from moeless.engine.transformers.experts import attach_dispatcher, register_experts
from moeless.functions.feed_forward import FeedForward
from moeless.functions.pool import InstancePool
from moeless.packages.backbone import load_backbone
from moeless.packages.packed_model import PackedModel
from moeless.packages.source import resolve_model

RUN_SECRET = "benchmark"
"""Run secret of engine and workers."""


def main(argv: list[str] | None = None) -> None:
    """Print the table; with --json, write the figures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="moeless-mini")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few repeats")
    arguments = parser.parse_args(argv)
    packed = resolve_model(arguments.model)
    names = tuple(f"worker-{index}" for index in range(arguments.workers))
    table = spread_evenly(
        num_layers=packed.manifest.num_moe_layers, num_experts=packed.manifest.num_experts, workers=names
    )
    workers = [start_worker(packed, table, name) for name in names]
    in_process = _Decoder(packed, RoutingTable(version=1))
    remote = _Decoder(packed, table, {name: endpoint for name, (_, endpoint) in zip(names, workers, strict=True)})
    steps: dict[int, dict[str, list[float]]] = {}
    for batch in arguments.batches:
        ways: dict[str, Callable[[], float]] = {
            "in process": lambda batch=batch: in_process.step_ms(batch, arguments.tokens),  # type: ignore[misc]
            f"{arguments.workers} workers": lambda batch=batch: remote.step_ms(batch, arguments.tokens),  # type: ignore[misc]
        }
        steps[batch] = {way: [] for way in ways}
        for way in ways.values():
            way()
        for _ in range(4 if arguments.quick else arguments.repeats):
            for name, way in ways.items():
                steps[batch][name].append(way())
    _print(steps)
    in_process.close()
    remote.close()
    for process, _ in workers:
        process.kill()
    if arguments.json:
        arguments.json.write_text(json.dumps(steps, indent=2))


def _print(steps: dict[int, dict[str, list[float]]]) -> None:
    table = Table("batch", "experts", "ms a step (median)", "spread", "ratio to in process", title="decode step")
    for batch, ways in steps.items():
        base = statistics.median(ways["in process"])
        for way, values in ways.items():
            median = statistics.median(values)
            spread = f"{min(values):.2f}-{max(values):.2f}"
            table.add_row(str(batch), way, f"{median:.2f}", spread, f"{median / base:.2f}")
    Console().print(table)


class _Decoder:
    """An engine and the wall-clock time of its steps."""

    def __init__(
        self, packed: PackedModel, table: RoutingTable, endpoints: dict[str, WorkerEndpoint] | None = None
    ) -> None:
        torch.set_num_threads(1)
        register_experts()
        model = load_backbone(packed, dtype=torch.float32)
        pool = InstancePool(packed, dtype=torch.float32)
        if endpoints is None:
            pool.start_many(packed.functions)
        self._dispatcher = Dispatcher(FeedForward(pool), table)
        layout = packed.layout(0)
        self._dispatcher.set_channels(
            {
                name: connect(
                    endpoint,
                    run_secret=RUN_SECRET,
                    engine="benchmark",
                    hidden_size=layout.hidden_size,
                    top_k=packed.manifest.top_k,
                    dtype=torch.float32,
                    max_rows=MAX_ROWS,
                )
                for name, endpoint in (endpoints or {}).items()
            }
        )
        attach_dispatcher(model, self._dispatcher)
        tokenizer: Any = AutoTokenizer.from_pretrained(packed.backbone_path)
        self._prompt: list[int] = tokenizer("The old man looked at the sea.")["input_ids"]
        self._left = 0
        self._done = threading.Event()
        self._moments: list[float] = []
        self._engine: Engine = build_engine(model, tokenizer, EngineConfig(num_threads=1), self._on_step)
        self._engine.start()

    def step_ms(self, batch: int, tokens: int) -> float:
        """Median milliseconds between the steps that decode `batch` sequences together."""
        self._done.clear()
        self._moments, self._left = [], batch
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        for index in range(batch):
            self._engine.submit(
                GenerationRequest(request_id=f"{index}", prompt_token_ids=self._prompt, sampling=sampling)
            )
        self._done.wait()
        gaps = [after - before for before, after in zip(self._moments[4:], self._moments[5:], strict=False)]
        return statistics.median(gaps) * 1e3

    def close(self) -> None:
        self._engine.stop()
        self._dispatcher.close()

    def _on_step(self, deltas: list[GenerationDelta]) -> None:
        self._moments.append(time.perf_counter())
        self._left -= sum(delta.finish_reason is not None for delta in deltas)
        if self._left == 0:
            self._done.set()


def start_worker(packed: PackedModel, table: RoutingTable, name: str) -> tuple[Any, WorkerEndpoint]:
    """A worker in a process of its own, with what the table gives it; kill the process in the end."""
    functions = [str(f) for f, shares in table.instances.items() if shares[0].worker == name]
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, str(packed.path), name, functions), daemon=True)
    process.start()
    return process, msgspec.json.decode(ours.recv_bytes(), type=WorkerEndpoint)


def _work(pipe: Connection, packed_path: str, name: str, functions: list[str]) -> None:
    settings = ServeSettings(packed_path=packed_path, model_id="benchmark", dtype="float32")
    host = ExpertHost(settings, name, functions, threads=1)
    assert host.pool.state(FunctionId.parse(functions[0])).value == "warm"
    server = DataPlaneServer(
        host.compute, worker=name, run_secret=RUN_SECRET, max_rows=MAX_ROWS, num_experts=host.pool.num_experts
    )
    server.start()
    pipe.send_bytes(msgspec.json.encode(server.endpoint))
    threading.Event().wait()


if __name__ == "__main__":
    main()
