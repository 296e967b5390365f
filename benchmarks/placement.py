"""Affinity-aware placement: workers touched per token and hops between layers, beside EPLB's, and proved optima.

`python -m benchmarks.placement --traces FILE [FILE ...]` imports routing files as `moeless trace import` does, each of
a model of its own, fits every placement on some of their sequences and measures it on the others. Made-up routing is
measured besides. All candidates of one table have the same number of instances. A bound on imbalance is of the fit: in
each layer the busiest worker gets at most a given multiple of the mean, or EPLB's busiest load where that is more.

Times are of one thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from threadpoolctl import threadpool_limits

from moeless.core.arrays import FloatArray
from moeless.core.cluster import Cluster, ModelShape, even_cluster
from moeless.core.plan import Plan
from moeless.planning.affinity.groups import num_groups
from moeless.planning.affinity.hops_bound import min_hops_bound
from moeless.planning.affinity.metrics import balance_L, hops_L, workers_touched_L
from moeless.planning.affinity.offline import ProgrammeConfig, min_hops_plan, min_workers_plan
from moeless.planning.affinity.online import AffinityConfig, Objective, layer_bounds, place_by_affinity
from moeless.planning.affinity.programme import SolverLimits
from moeless.planning.affinity.search import LayerBounds
from moeless.planning.affinity.statistics import AffinityStatistics, gather_statistics
from moeless.planning.baselines.eplb import eplb_global
from moeless.planning.baselines.static import round_robin
from moeless.planning.place import min_max_shares
from moeless_predictors.traces import ImportOptions, RoutingTrace, import_trace
from moeless_predictors.traces.synthetic import synthetic_trace

_MAX_GROUPS = 300_000


@dataclass(frozen=True, kw_only=True)
class Row:
    """One placement, on the sequences that it was not fitted on where not said otherwise."""

    name: str
    workers: float
    """Touched by a token in a layer, mean over layers."""
    hops: float
    """Share of pairs of experts in consecutive layers, mean over layers."""
    imbalance: float
    """Busiest worker over mean, mean over layers."""
    fit_imbalance: float
    moved: int
    """Instances that EPLB has elsewhere."""
    seconds: float
    proved: str
    """Proven bound of the placement's objective, on the sequences it was fitted on."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A routing and the workers to place it on."""

    fit: AffinityStatistics
    test: AffinityStatistics
    cluster: Cluster
    model: ModelShape
    eplb: Plan


def main(argv: list[str] | None = None) -> None:
    """Print a table for each trace, number of replicas and bound; with --json, write them too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", nargs="*", type=Path, default=[], metavar="FILE")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--replicas", type=int, nargs="+", default=[0, 8], help="instances beyond one each, of a layer")
    parser.add_argument("--max-imbalance", type=float, nargs="+", default=[1.0, 1.05, 1.1])
    parser.add_argument("--max-instances", type=int, help="of a layer on a worker; as many as EPLB's by default")
    parser.add_argument(
        "--kicks",
        type=int,
        default=20,
        help="of each layer, in the longer of the local searches; 5 times as many for hops",
    )
    parser.add_argument("--time-limit", type=float, default=20.0, help="seconds for the programme of one layer")
    parser.add_argument("--test-share", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, help="to fit on, evenly spaced; all by default")
    parser.add_argument(
        "--synthetic", type=int, nargs=3, default=[12, 32, 4], metavar=("L", "E", "K"), help="layers, experts and top-k"
    )
    parser.add_argument("--no-programmes", action="store_true", help="only what is fast")
    parser.add_argument("--no-synthetic", action="store_true", help="only the traces given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a small made-up routing, one bound")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.max_imbalance, arguments.replicas, arguments.kicks = [1.05], [0, 4], 5
        arguments.synthetic = [4, 16, 4]
    results = {}
    with threadpool_limits(1):
        for name, trace in _traces(arguments):
            for replicas in arguments.replicas:
                case = _case(trace, arguments, replicas)
                for imbalance in arguments.max_imbalance:
                    title = (
                        f"{name}: {trace.num_layers} layers, {case.fit.num_tokens:,} tokens fitted, "
                        f"{case.test.num_tokens:,} measured; {arguments.workers} workers, {replicas} replicas, "
                        f"imbalance <= {imbalance:g}"
                    )
                    rows = _measure(case, arguments, imbalance)
                    _print(title, rows)
                    results[title] = [asdict(row) for row in rows]
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


def _traces(arguments: argparse.Namespace) -> list[tuple[str, RoutingTrace]]:
    found = []
    for file in arguments.traces:
        trace = import_trace(file, ImportOptions(model=file.stem)).trace
        if not isinstance(trace, RoutingTrace):
            raise SystemExit(f"{file}: must hold routing, got arrivals")
        found.append((file.stem, trace))
    if not arguments.no_synthetic or not found:
        num_layers, num_experts, top_k = arguments.synthetic
        size = {"num_layers": num_layers, "num_experts": num_experts, "top_k": top_k}
        num_sequences = 20 if arguments.quick else 200
        found.append(("synthetic", synthetic_trace(num_sequences=num_sequences, **size, seed=arguments.seed)))
    return found


def _case(trace: RoutingTrace, arguments: argparse.Namespace, replicas: int) -> Case:
    train, rest = trace.split(test_share=arguments.test_share, seed=arguments.seed)
    fit = gather_statistics(train.experts_TLk, num_experts=trace.num_experts, max_tokens=arguments.max_tokens)
    test = gather_statistics(rest.experts_TLk, num_experts=trace.num_experts)
    model = ModelShape(
        num_layers=trace.num_layers, num_experts=trace.num_experts, top_k=trace.top_k, expert_bytes=1, hidden_bytes=1
    )
    room = model.num_layers * (model.num_experts + replicas)
    cluster = even_cluster(arguments.workers, memory_bytes=room)
    counts_LE = np.ones((model.num_layers, model.num_experts), dtype=np.int64)
    counts_LE[:, 0] += replicas  # EPLB takes their sum and chooses itself
    eplb = eplb_global(counts_LE, fit.load_LE, cluster, model)
    return Case(fit=fit, test=test, cluster=cluster, model=model, eplb=eplb)


def _measure(case: Case, arguments: argparse.Namespace, imbalance: float) -> list[Row]:
    fit, load_LE, system = case.fit, case.fit.load_LE, (case.cluster, case.model)
    has_replicas = case.eplb.num_instances > load_LE.size
    rows = []

    def add(name: str, make: Callable[[], Plan], prove: Callable[[Plan], str] = lambda _: "") -> Plan:
        begin = perf_counter()
        plan = make()
        seconds = perf_counter() - begin
        rows.append(_row(name, case, plan, seconds, prove(plan)))
        return plan

    def searched(objective: Objective, *, kicks: int = 0, max_moves: int | None = None) -> Plan:
        config = AffinityConfig(
            objective=objective,
            max_imbalance=imbalance,
            max_instances=arguments.max_instances,
            max_moves=max_moves,
            num_kicks=kicks,
            seed=arguments.seed,
        )
        plan = place_by_affinity(case.eplb, fit, load_LE, *system, config=config)
        if not has_replicas:
            return plan
        share_N = min_max_shares(
            plan.layer_N, plan.expert_N, plan.worker_N, load_LE, case.cluster.speed_W, start_N=plan.share_N
        )
        return plan.with_shares(share_N)

    add("round robin", lambda: round_robin(case.eplb.counts_LE, load_LE, *system))
    add("EPLB", lambda: eplb_global(case.eplb.counts_LE, load_LE, *system))
    best = {}
    # A kick takes a fifth of the time where hops count: no sets of experts have to be looked at.
    kicks: dict[Objective, int] = {"workers": arguments.kicks, "hops": 5 * arguments.kicks}
    objectives: tuple[Objective, ...] = ("workers", "hops")
    for objective in objectives:
        add(f"{objective}: 64 moves from EPLB", lambda o=objective: searched(o, max_moves=64))  # type: ignore[misc]
        best[objective] = add(f"{objective}: local search", lambda o=objective: searched(o))  # type: ignore[misc]
        if arguments.kicks:
            best[objective] = add(
                f"{objective}: local search, {kicks[objective]} kicks",
                lambda o=objective: searched(o, kicks=kicks[o]),  # type: ignore[misc]
            )
    if arguments.no_programmes:
        return rows
    affinity = AffinityConfig(max_imbalance=imbalance, max_instances=arguments.max_instances)
    bounds = layer_bounds(case.eplb, load_LE, case.cluster.speed_W, affinity)
    config = ProgrammeConfig(limits=SolverLimits(time_limit_s=arguments.time_limit), max_groups=_MAX_GROUPS)
    if not has_replicas:
        proved_L = np.zeros(case.model.num_layers)

        def optimal() -> Plan:
            found = min_workers_plan(
                best["workers"], fit, load_LE, *system, affinity=affinity, config=config, bounds=bounds
            )
            assert found.bound_L is not None
            proved_L[:] = found.bound_L
            return found.plan

        def excess(plan: Plan) -> str:
            searched_over = workers_touched_L(best["workers"], fit).mean() / proved_L.mean() - 1
            own = workers_touched_L(plan, fit).mean() / proved_L.mean() - 1
            return f">= {proved_L.mean():.4f}: this {own:+.2%}, local search {searched_over:+.2%}"

        add("workers: integer programme", optimal, excess)

    def optimal_hops() -> Plan:
        # A layer is solved several times, and what is left of a gap in one sweep may be found in the next.
        limits = SolverLimits(time_limit_s=arguments.time_limit / 4, gap=0.003)
        return min_hops_plan(
            best["hops"], fit, load_LE, *system, affinity=replace(affinity, objective="hops"),
            config=replace(config, limits=limits), bounds=None if has_replicas else bounds,
        ).plan  # fmt: skip

    add("hops: programme layer by layer", optimal_hops, lambda plan: _hops_proved(case, plan, best, bounds))
    return rows


def _hops_proved(case: Case, plan: Plan, best: dict[Objective, Plan], bounds: list[LayerBounds]) -> str:
    """Compute a lower bound of all placements without replicas, where there are few enough groups of experts."""
    is_small = all(num_groups(case.model.num_experts, layer) <= _MAX_GROUPS // 4 for layer in bounds)
    if plan.num_instances > case.fit.load_LE.size or not is_small:
        return ""
    proved = []
    worker_pLE = [found.worker_N.reshape(case.fit.load_LE.shape) for found in (plan, best["hops"], case.eplb)]
    with Progress(transient=True) as bar:
        for layer in bar.track(range(case.model.num_layers - 1), description="proving"):
            known = [(worker_LE[layer], worker_LE[layer + 1]) for worker_LE in worker_pLE]
            proved.append(
                min_hops_bound(case.fit.transitions_LEE[layer], bounds[layer], bounds[layer + 1], known=known)
            )
    bound = float(np.mean(proved))
    own, searched = (hops_L(found, case.fit).mean() / bound - 1 for found in (plan, best["hops"]))
    return f">= {bound:.4f}: this {own:+.2%}, local search {searched:+.2%}"


def _row(name: str, case: Case, plan: Plan, seconds: float, proved: str) -> Row:
    speed_W = case.cluster.speed_W
    return Row(
        name=name,
        workers=float(workers_touched_L(plan, case.test).mean()),
        hops=float(hops_L(plan, case.test).mean()) if case.model.num_layers > 1 else 0.0,
        imbalance=float(_imbalance(plan, case.test.load_LE, speed_W)),
        fit_imbalance=float(_imbalance(plan, case.fit.load_LE, speed_W)),
        moved=len(plan.started_since(case.eplb)),
        seconds=seconds,
        proved=proved,
    )


def _imbalance(plan: Plan, load_LE: FloatArray, speed_W: FloatArray) -> float:
    return float(balance_L(plan, load_LE, speed_W).mean())


def _print(title: str, rows: list[Row]) -> None:
    eplb = next(row for row in rows if row.name == "EPLB")
    table = Table(title=title, title_justify="left")
    for column in ("placement", "workers", "to EPLB", "hops", "to EPLB", "imbalance", "on the fit", "moved", "time"):
        table.add_column(column, justify="left" if column == "placement" else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.workers:.3f}",
            f"{row.workers / eplb.workers - 1:+.1%}",
            f"{row.hops:.3f}",
            f"{row.hops / max(eplb.hops, 1e-12) - 1:+.1%}",
            f"{row.imbalance:.3f}",
            f"{row.fit_imbalance:.3f}",
            str(row.moved),
            f"{row.seconds:.2f} s",
        )
    console = Console(width=120)
    console.print(table)
    for row in rows:
        if row.proved:
            console.print(f"  {row.name}: no placement within the bounds has on the fit {row.proved}")


if __name__ == "__main__":
    main()
