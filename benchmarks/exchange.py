"""Microseconds of one MoE layer's exchange with workers on this machine, over each transport.

`python -m benchmarks exchange` sends 1, 4 and 16 rows of hidden size 1024 (float32, top-2) to one worker process and
to four in parallel, over shared memory, over TCP, and through a Ray Serve handle with the same frames as bytes. The
workers return the weighted rows, so that what is measured is the exchange: making the call, sending, waking the
worker, its checks, the way back, and adding the answer up.

Wanted on two quiet cores over shared memory: one worker, median at most 150 µs and p99 at most 1 ms; four workers,
median at most 300 µs.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing as mp
import os
import secrets
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

HIDDEN_SIZE, NUM_EXPERTS, TOP_K, MAX_ROWS = 1024, 16, 2, 64
NUM_WORKERS = 4
TIMEOUT_S = 30.0


class Case(NamedTuple):
    """Transport and shape that are timed together."""

    workers: int
    rows: int
    transport: str


class Figure(NamedTuple):
    """Microseconds."""

    median: float
    """Median of the repeats' medians."""
    least: float
    most: float
    p99: float
    """Over all exchanges."""


def main(argv: list[str] | None = None) -> None:
    """Print the table; with --json, write the figures too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--exchanges", type=int, default=1000, help="of each repeat; a tenth of it over Serve")
    parser.add_argument("--without-serve", action="store_true", help="start no Ray")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few repeats and exchanges")
    options = parser.parse_args(argv)
    if options.quick:
        options.repeats, options.exchanges = 3, 300
    figures = measure(options)
    _print(figures)
    if options.json:
        rows = [case._asdict() | figure._asdict() for case, figure in figures.items()]
        options.json.write_text(json.dumps(rows, indent=2))


def measure(options: argparse.Namespace) -> dict[Case, Figure]:
    """Time every case in turns, repeat by repeat."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    seconds: dict[Case, list[list[float]]] = {}
    with ExitStack() as stack:
        lines = stack.enter_context(_open_lines())
        if not options.without_serve:
            lines["serve"] = stack.enter_context(_open_serve())
        cases = [
            Case(workers, rows, transport)
            for workers in (1, NUM_WORKERS)
            for rows in options.rows
            for transport in lines
        ]
        for repeat in range(options.repeats + 1):
            for case in cases:
                count = max(20, options.exchanges // (10 if case.transport == "serve" else 1))
                taken_s = _exchange(lines[case.transport][: case.workers], case.rows, count)
                if repeat:  # the first one warms up
                    seconds.setdefault(case, []).append(taken_s)
    return {case: _figure(repeats) for case, repeats in seconds.items()}


def _exchange(channels: list[Any], num_rows: int, count: int) -> list[float]:
    """Seconds of each of `count` layers whose rows all go to every one of `channels`."""
    import numpy as np
    import torch

    from moeless.dispatch.wire import LayerCall

    rng = np.random.default_rng(num_rows)
    x_TH = torch.randn(num_rows, HIDDEN_SIZE)
    weights_n = rng.random(num_rows * TOP_K, dtype=np.float32)
    tokens_R, rows_n = np.arange(num_rows), rng.permutation(np.repeat(np.arange(num_rows), TOP_K))
    experts_n = np.sort(rng.integers(0, NUM_EXPERTS, num_rows * TOP_K))
    pairs_n = np.arange(num_rows * TOP_K)
    taken_s = []
    with torch.inference_mode():
        for _ in range(count):
            started_s = time.perf_counter()
            out_TH = torch.zeros(num_rows, HIDDEN_SIZE)
            for channel in channels:
                channel.submit(
                    LayerCall(
                        layer=0,
                        x_TH=x_TH,
                        tokens_R=tokens_R,
                        rows_n=rows_n,
                        experts_n=experts_n,
                        weights_n=weights_n[pairs_n],
                    )
                )
            for channel in channels:
                out_TH.add_(channel.collect(TIMEOUT_S))
            taken_s.append(time.perf_counter() - started_s)
        weights_R = torch.zeros(num_rows).index_add_(0, torch.from_numpy(rows_n), torch.from_numpy(weights_n))
        torch.testing.assert_close(out_TH, len(channels) * x_TH * weights_R.unsqueeze(1))
    return taken_s


def _weighted_rows(call: Any) -> Any:
    """The workers' part: each row times the sum of its pairs' weights."""
    import numpy as np
    import torch

    x_RH = call.x_RH.numpy()
    weights_R = np.bincount(call.rows_n, call.weights_n.numpy(), minlength=len(x_RH))
    return torch.from_numpy(x_RH * weights_R.astype(np.float32)[:, None])


@contextmanager
def _open_lines() -> Iterator[dict[str, list[Any]]]:
    """Worker processes, and a line to each over each transport."""
    import torch

    from moeless.dispatch.channel import ChannelConfig
    from moeless.dispatch.shared_memory import SharedMemoryChannel
    from moeless.dispatch.tcp import TcpChannel

    run_secret = secrets.token_hex(16)
    config = ChannelConfig(
        run_secret=run_secret,
        engine="benchmark",
        hidden_size=HIDDEN_SIZE,
        top_k=TOP_K,
        dtype=torch.float32,
        max_rows=MAX_ROWS,
    )
    context = mp.get_context("spawn")
    pipes: list[Connection] = []
    children = []
    lines: dict[str, list[Any]] = {"shm": [], "tcp": []}
    try:
        for number in range(NUM_WORKERS):
            ours, theirs = context.Pipe()
            child = context.Process(target=_work, args=(theirs, f"worker-{number}", run_secret), daemon=True)
            child.start()
            theirs.close()
            pipes.append(ours)
            children.append(child)
        for pipe in pipes:
            endpoint = pipe.recv()
            for transport in (SharedMemoryChannel, TcpChannel):
                channel = transport(endpoint, config)
                lines[channel.kind].append(channel)
        yield lines
    finally:
        for channel in [*lines["shm"], *lines["tcp"]]:
            channel.close()
        for pipe in pipes:
            pipe.close()
        for child in children:
            child.join(timeout=10)
            if child.is_alive():
                child.kill()


def _work(line: Connection, name: str, run_secret: str) -> None:
    """In a child process: a worker's data plane until the line closes."""
    import torch

    from moeless.dispatch.server import DataPlaneServer

    torch.set_num_threads(1)
    server = DataPlaneServer(
        _weighted_rows, worker=name, run_secret=run_secret, max_rows=MAX_ROWS, num_experts=[NUM_EXPERTS]
    )
    server.start()
    line.send(server.endpoint)
    line.poll(None)
    server.stop()


class _ServeAnswer:
    """A call of a Serve handle under way."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def result(self, timeout_s: float) -> bytes:
        frame: bytes = self._response.result(timeout_s=timeout_s)
        return frame

    def cancel(self) -> None:
        self._response.cancel()


@contextmanager
def _open_serve() -> Iterator[list[Any]]:
    """Serve deployments that answer the same frames, and a line to each through its handle."""
    from moeless.deployments.runtime import prepare_environment

    prepare_environment()
    import ray
    from ray import serve

    from moeless.dispatch.call import CallChannel, answer_call

    class Worker:
        """A worker whose calls come through Serve."""

        def __call__(self, frame: bytes) -> bytes:
            return answer_call(frame, _weighted_rows, max_rows=MAX_ROWS, num_experts=[NUM_EXPERTS])

    def open_channel(number: int) -> CallChannel:
        deploy = serve.deployment(name=f"worker-{number}", ray_actor_options={"num_cpus": 0})
        handle = serve.run(deploy(Worker).bind(), name=f"worker-{number}", route_prefix=None)
        return CallChannel(lambda frame: _ServeAnswer(handle.remote(frame)), max_rows=MAX_ROWS, patience_s=math.inf)

    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield [open_channel(number) for number in range(NUM_WORKERS)]
    finally:
        serve.shutdown()
        ray.shutdown()


def _figure(repeats_s: list[list[float]]) -> Figure:
    medians_us = [statistics.median(taken_s) * 1e6 for taken_s in repeats_s]
    every_us = sorted(taken_s * 1e6 for repeat_s in repeats_s for taken_s in repeat_s)
    return Figure(
        median=statistics.median(medians_us),
        least=min(medians_us),
        most=max(medians_us),
        p99=every_us[int(len(every_us) * 0.99)],
    )


def _print(figures: dict[Case, Figure]) -> None:
    table = Table(title="one layer's exchange in µs: median of the repeats' medians (least to most)")
    for column in ("workers", "rows", "transport", "median", "p99", "serve is slower by"):
        table.add_column(column, justify="left" if column == "transport" else "right")
    for case, figure in figures.items():
        through_serve = figures.get(case._replace(transport="serve"))
        ratio = f"{through_serve.median / figure.median:.0f} ×" if through_serve else ""
        table.add_row(
            str(case.workers),
            str(case.rows),
            case.transport,
            f"{figure.median:.0f} ({figure.least:.0f} to {figure.most:.0f})",
            f"{figure.p99:.0f}",
            "" if case.transport == "serve" else ratio,
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
