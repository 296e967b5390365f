"""Splitting a layer's tokens over replicas: microseconds of moeless's split, of its grouping, and of a programme.

Each layer of each step of a system that splits by the step's real counts waits for this. `balanced_split` is moeless's,
as the dispatcher calls it; `group_by_worker` is the whole of what the dispatcher does between the router's choice and
the first message, the split included; `linear programme` is the exact split of SGLang's LPLB as the simulator computes
it. Tokens go to experts of log-normal popularity; each worker and layer has spare replicas beyond one of each expert,
placed by EPLB. Medians and 90th percentiles, one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from moeless.core.arrays import FloatArray, Int64Array
from moeless.core.cluster import even_cluster
from moeless.core.expert import FunctionId
from moeless.core.plan import Plan
from moeless.core.routing_table import InstanceShare, RoutingTable
from moeless.dispatch.grouping import CompiledLayer, compile_layer, group_by_worker
from moeless.planning.baselines.eplb import eplb_global
from moeless.planning.baselines.lp import lp_split
from moeless.planning.profiles import builtin_profiles
from moeless.planning.step_balance import Replicas, add_call_costs, balanced_split

SHAPES = {"a6000-gpt-oss-20b": 8, "a6000-deepseek-v2-lite": 8, "h800-deepseek-v3": 64}
"""Profiles and their workers."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Microseconds of one way to split, for one number of tokens."""

    profile: str
    workers: int
    tokens: int
    way: str
    median_us: float
    p90_us: float


def main(argv: list[str] | None = None) -> None:
    """Print a table; with --json, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[8, 64, 512, 2048], help="of a layer")
    parser.add_argument("--spare-replicas", type=int, default=1, help="on each worker and layer")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few repeats, the smaller shapes, two sizes")
    arguments = parser.parse_args(argv)
    shapes = dict(list(SHAPES.items())[:2]) if arguments.quick else SHAPES
    sizes = [8, 512] if arguments.quick else arguments.tokens
    figures: list[Figure] = []
    with threadpool_limits(limits=1):
        for profile, workers in shapes.items():
            for tokens in sizes:
                figures += measure(
                    profile,
                    workers,
                    tokens,
                    spare_replicas=arguments.spare_replicas,
                    repeats=20 if arguments.quick else arguments.repeats,
                )
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=2))


def measure(name: str, workers: int, tokens: int, *, spare_replicas: int, repeats: int) -> list[Figure]:
    """Every way, on `repeats` layers of other tokens."""
    profile = builtin_profiles()[name]
    model, cluster = profile.model, even_cluster(workers, memory_bytes=1 << 60)
    rng = np.random.default_rng(0)
    share_E = rng.lognormal(sigma=0.8, size=model.num_experts)
    counts_LE = np.ones((model.num_layers, model.num_experts), dtype=np.int64)
    counts_LE[:, 0] += spare_replicas * workers
    plan = eplb_global(counts_LE, np.tile(share_E, (model.num_layers, 1)), cluster, model)
    cost = profile.expert_time.call_cost(link_s=profile.link_s(cluster))
    compiled = compile_layer(_table(plan, cost), 0, model.num_experts)
    choices = [_choices(share_E, tokens, model.top_k, rng) for _ in range(repeats)]
    ways: dict[str, Callable[[Int64Array], object]] = {
        "balanced_split": lambda experts_Tk: _balanced(compiled, experts_Tk),
        "group_by_worker": lambda experts_Tk: group_by_worker(compiled, experts_Tk, step=0),
        "linear programme": lambda experts_Tk: _programme(compiled, experts_Tk),
    }
    figures = []
    for way, run in ways.items():
        run(choices[0])  # compiled loops are compiled, or loaded, at the first call
        seconds = []
        for experts_Tk in choices:
            began = time.perf_counter()
            run(experts_Tk)
            seconds.append(time.perf_counter() - began)
        median, p90 = np.percentile(seconds, [50, 90]) * 1e6
        figures.append(
            Figure(profile=name, workers=workers, tokens=tokens, way=way, median_us=float(median), p90_us=float(p90))
        )
    return figures


def _table(plan: Plan, cost: object) -> RoutingTable:
    instances: dict[FunctionId, list[InstanceShare]] = {}
    for layer, expert, worker, share in zip(
        plan.layer_N.tolist(), plan.expert_N.tolist(), plan.worker_N.tolist(), plan.share_N.tolist(), strict=True
    ):
        if layer == 0:
            instances.setdefault(FunctionId(layer, expert), []).append(InstanceShare(f"worker-{worker:02d}", share))
    return RoutingTable(
        version=1,
        instances={function: tuple(shares) for function, shares in instances.items()},
        step_cost=cost,  # type: ignore[arg-type]
    )


def _choices(share_E: FloatArray, tokens: int, top_k: int, rng: np.random.Generator) -> Int64Array:
    """Each token's experts, different ones, by popularity (Gumbel top-k)."""
    keys_TE = np.log(share_E) + rng.gumbel(size=(tokens, len(share_E)))
    chosen: Int64Array = np.argpartition(-keys_TE, top_k - 1, axis=1)[:, :top_k].astype(np.int64)
    return chosen


def _balanced(compiled: CompiledLayer, experts_Tk: Int64Array) -> Int64Array:
    tokens_F, alone_E, replicas = _counted(compiled, experts_Tk)
    busy_W = np.zeros(len(compiled.workers))
    assert compiled.step_cost is not None
    add_call_costs(alone_E, compiled.worker_of_E, compiled.step_cost, busy_W)
    return balanced_split(tokens_F, replicas, busy_W[np.newaxis], compiled.step_cost)


def _programme(compiled: CompiledLayer, experts_Tk: Int64Array) -> Int64Array:
    tokens_F, alone_E, replicas = _counted(compiled, experts_Tk)
    busy_W = np.bincount(compiled.worker_of_E, weights=alone_E, minlength=len(compiled.workers)).astype(np.int64)
    return lp_split(tokens_F, replicas, busy_W[np.newaxis])


def _counted(compiled: CompiledLayer, experts_Tk: Int64Array) -> tuple[Int64Array, Int64Array, Replicas]:
    counts_E = np.bincount(experts_Tk.reshape(-1), minlength=len(compiled.worker_of_E))
    functions = np.fromiter(compiled.shares_of, dtype=np.int64)
    alone_E = counts_E.copy()
    alone_E[functions] = 0
    assert compiled.replicas_F is not None
    return counts_E[functions], alone_E, compiled.replicas_F


def show(figures: list[Figure]) -> None:
    """A row for each shape and number of tokens."""
    table = Table("profile", "workers", "tokens", *dict.fromkeys(figure.way for figure in figures))
    for profile, workers, tokens in dict.fromkeys((f.profile, f.workers, f.tokens) for f in figures):
        cells = [
            f"{figure.median_us:.0f} (p90 {figure.p90_us:.0f})"
            for figure in figures
            if (figure.profile, figure.tokens) == (profile, tokens)
        ]
        table.add_row(profile, str(workers), str(tokens), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
