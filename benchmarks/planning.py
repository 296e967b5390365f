"""Time to make a plan, and its balance on the next window beside EPLB's.

`python -m benchmarks.planning` times moeless's planner, with its default policy, on a layer of 256 experts on 64
workers and on all 58 layers of such a model: the first plan, and plans of later ticks, whose load has drifted. Times
are of one thread, medians over the ticks.

Then each of some windows of routing is planned for from the window before it, which is all that either planner knows:
by moeless, whose plan is changed where that pays, and by EPLB, which plans anew. Each may have one instance of every
expert and one more for every worker in each layer, and time is in proportion to tokens. Imbalance is the busiest
worker's tokens over the mean of all, averaged over layers and windows. Moved instances are those that a window's plan
has and the one before did not. With files, `--traces FILE ...`, recorded routing is measured besides made-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from moeless.core.arrays import FloatArray
from moeless.core.cluster import even_cluster
from moeless.core.plan import Plan
from moeless.core.policy import Policy, parse_policy, resolve
from moeless.planning.baselines.eplb import eplb_global
from moeless.planning.observation import Observation
from moeless.planning.planner import MoelessPlanner, PlanningContext
from moeless.planning.profiles import builtin_profiles
from moeless.simulate.generator import MadeUpRouting, make_routing
from moeless_predictors.traces import ImportOptions, RoutingTrace, import_trace
from moeless_predictors.traces.statistics import expert_loads

TICK_S = 1.0
SPENDING = {"name": "minMax", "workerShare": 0.1, "maxExtraShare": 1.0}
"""Default scaler, but with the budget for its only limit, as EPLB has."""
PLACER = {"name": "minimalMoves", "maxImbalance": 1.02}
WINDOW_STEPS = 1000
"""Engine steps that a plan is for: the window that EPLB looks back on, in vLLM and SGLang."""
TOKENS_PER_WINDOW = 1024
"""Tokens in a window of made-up routing."""
STEP_TOKENS = 16384
QUANTILE_Z = 1.28
"""Standard deviations of a Poisson load that the upper forecast lies above the mean: nine times in ten."""


@dataclass(frozen=True, kw_only=True)
class TimeFigure:
    """Milliseconds of a plan."""

    num_layers: int
    first_ms: float
    tick_ms: float
    slowest_ms: float
    moved: float
    """Instances that a later tick's plan starts, on average."""


@dataclass(frozen=True, kw_only=True)
class BalanceFigure:
    """One planner on one trace."""

    trace: str
    num_windows: int
    planner: str
    instances: float
    """A layer, on average."""
    fit_imbalance: float
    """On the window planned from."""
    next_imbalance: float
    next_imbalances: list[float]
    """Imbalance on each next window."""
    moved: int
    """Over all windows but the first."""


def main(argv: list[str] | None = None) -> None:
    """Print two tables; with --json, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--traces", type=Path, nargs="*", default=[], help="recorded routing, each of a model of its own"
    )
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--ticks", type=int, default=60, help="plans that are timed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few windows and ticks")
    arguments = parser.parse_args(argv)
    num_windows, num_ticks = (6, 8) if arguments.quick else (arguments.windows, arguments.ticks)
    with threadpool_limits(1):
        large = made_up_windows(num_windows=num_ticks + 1)
        times = [time_plans(large[:, :num_layers]) for num_layers in (1, large.shape[1])]
        show_times(times)
        balances = balance("made up, 58 x 256, top-8", large[: num_windows + 1], top_k=8, num_workers=64)
        for path in arguments.traces:
            trace = import_trace(path, ImportOptions(model=path.stem)).trace
            assert isinstance(trace, RoutingTrace), f"{path} must hold routing"
            windows = windows_of(trace, num_windows + 1)
            balances += balance(path.stem, windows, top_k=trace.top_k, num_workers=8)
    show_balances(balances)
    if arguments.json:
        figures = {"times": [asdict(figure) for figure in times], "balance": [asdict(figure) for figure in balances]}
        arguments.json.write_text(json.dumps(figures, indent=2))


def made_up_windows(*, num_windows: int) -> FloatArray:
    """Loads of a large model's prefill, shape (windows, L, E): drawn anew, and drifting as was measured."""
    trace = make_routing(MadeUpRouting(num_sequences=num_windows, tokens_per_sequence=TOKENS_PER_WINDOW))
    loads = [expert_loads(trace.take_sequences([window])) for window in range(num_windows)]
    return STEP_TOKENS / TOKENS_PER_WINDOW * np.array(loads, dtype=np.float64)


def windows_of(trace: RoutingTrace, num_windows: int) -> FloatArray:
    """The trace's tokens in their order, in windows of equal size: loads of shape (windows, L, E)."""
    experts_TLk, size = np.asarray(trace.experts_TLk), trace.num_tokens // num_windows
    loads = np.zeros((num_windows, trace.num_layers, trace.num_experts))
    for window in range(num_windows):
        rows = experts_TLk[window * size : (window + 1) * size]
        for layer in range(trace.num_layers):
            loads[window, layer] = np.bincount(rows[:, layer].ravel(), minlength=trace.num_experts)
    return loads


def system_for(shape: tuple[int, int], *, top_k: int, num_workers: int, instances: int) -> PlanningContext:
    """Workers of H800 class with room for the same number of instances of each layer; time in proportion to tokens."""
    profile = builtin_profiles()["h800-deepseek-v3"]
    model = replace(profile.model, num_layers=shape[0], num_experts=shape[1], top_k=top_k)
    memory = -(-instances // num_workers) * shape[0] * model.expert_bytes
    cluster = even_cluster(num_workers, memory_bytes=memory, workers_per_node=8)
    return PlanningContext(model=model, cluster=cluster, horizon_steps=WINDOW_STEPS)


def with_expert_times(system: PlanningContext) -> PlanningContext:
    """Plan as a server does: an expert's time is flat up to the tokens that take as long as its weights."""
    profile = builtin_profiles()["h800-deepseek-v3"]
    cost = profile.expert_time.call_cost()
    return replace(system, seconds=profile.expert_time.averaged(), floor_tokens=cost.floor_tokens)


def observed(load_LE: FloatArray, tick: int) -> Observation:
    """The window that was, taken for the one to come."""
    return Observation(
        time_s=tick * TICK_S,
        mean_LE=load_LE,
        upper_LE=load_LE + QUANTILE_Z * np.sqrt(load_LE),
        window_LE=load_LE,
        last_used_s_LE=np.where(load_LE > 0, tick * TICK_S, -np.inf),
        num_steps=100 * tick,
    )


def time_plans(windows: FloatArray) -> TimeFigure:
    """Plan for one window after the other, as a server does."""
    shape: tuple[int, int] = windows.shape[1:]
    system = with_expert_times(system_for(shape, top_k=8, num_workers=64, instances=2 * shape[1]))
    warm, planner = (MoelessPlanner(resolve(Policy(), system.model), system) for _ in range(2))
    for load_LE in windows[:8]:  # what is compiled is compiled now
        warm.plan(observed(load_LE, 0), warm.plan(observed(windows[0], 0), None))
    plan: Plan | None = None
    took_ms, moved = [], []
    for tick, load_LE in enumerate(windows):
        observation, before = observed(load_LE, tick), plan
        started = time.thread_time_ns()
        plan = planner.plan(observation, before)
        took_ms.append((time.thread_time_ns() - started) / 1e6)
        if before is not None:
            moved.append(len(plan.started_since(before)))
    return TimeFigure(
        num_layers=windows.shape[1],
        first_ms=took_ms[0],
        tick_ms=statistics.median(took_ms[1:]),
        slowest_ms=max(took_ms[1:]),
        moved=statistics.mean(moved),
    )


def balance(name: str, windows: FloatArray, *, top_k: int, num_workers: int) -> list[BalanceFigure]:
    """Both planners, each window but the last planned from and each but the first met."""
    shape: tuple[int, int] = windows.shape[1:]
    slots = shape[1] + num_workers
    system = system_for(shape, top_k=top_k, num_workers=num_workers, instances=slots)
    policy = parse_policy(
        {"defaults": {"layerMemoryBudget": slots * system.model.expert_bytes, "scaler": SPENDING, "placer": PLACER}}
    )
    planner = MoelessPlanner(resolve(policy, system.model), system)
    plans: list[Plan] = []
    for tick, load_LE in enumerate(windows[:-1]):
        plans.append(planner.plan(observed(load_LE, tick), plans[-1] if plans else None))
    counts_LE = np.ones(shape, dtype=np.int64)
    counts_LE[:, 0] += num_workers
    theirs = [eplb_global(counts_LE, load_LE, system.cluster, system.model) for load_LE in windows[:-1]]
    return [measured(name, "EPLB", windows, theirs), measured(name, "moeless", windows, plans)]


def measured(name: str, planner: str, windows: FloatArray, plans: list[Plan]) -> BalanceFigure:
    """Measure one plan for each window but the last."""
    met = [_imbalance(plan, load_LE) for plan, load_LE in zip(plans, windows[1:], strict=True)]
    return BalanceFigure(
        trace=name,
        num_windows=len(plans),
        planner=planner,
        instances=statistics.mean(plan.num_instances / plan.num_layers for plan in plans),
        fit_imbalance=statistics.mean(map(_imbalance, plans, windows[:-1])),
        next_imbalance=statistics.mean(met),
        next_imbalances=met,
        moved=sum(len(after.started_since(before)) for before, after in pairwise(plans)),
    )


def _ratio(ours: list[float], theirs: list[float]) -> str:
    """Format the ratio of the means with its 95 % bootstrap interval over windows."""
    ours_w, theirs_w = np.array(ours), np.array(theirs)
    drawn = np.random.default_rng(0).integers(0, len(ours), (2000, len(ours)))
    low, high = np.quantile(ours_w[drawn].mean(axis=1) / theirs_w[drawn].mean(axis=1), [0.025, 0.975])
    return f"{ours_w.mean() / theirs_w.mean():.3f} ({low:.3f}-{high:.3f})"


def _imbalance(plan: Plan, load_LE: FloatArray) -> float:
    load_LW = plan.worker_load_LW(load_LE)
    return float((load_LW.max(axis=1) / load_LW.mean(axis=1)).mean())


def show_times(figures: list[TimeFigure]) -> None:
    """A row for each number of layers."""
    table = Table("layers", "first plan", "a tick's plan", "a layer", "slowest", "moved a tick", title="ms of one core")
    for figure in figures:
        table.add_row(
            str(figure.num_layers),
            f"{figure.first_ms:.2f}",
            f"{figure.tick_ms:.2f}",
            f"{figure.tick_ms / figure.num_layers:.2f}",
            f"{figure.slowest_ms:.2f}",
            f"{figure.moved:.0f}",
        )
    Console().print(table)


def show_balances(figures: list[BalanceFigure]) -> None:
    """Two rows for each trace."""
    headers = (
        "routing",
        "windows",
        "planner",
        "instances",
        "fit",
        "next window",
        "over EPLB's",
        "moved",
        "EPLB's / ours",
    )
    table = Table(*headers, title="busiest worker over mean")
    for theirs, ours in zip(figures[::2], figures[1::2], strict=True):
        for figure in (theirs, ours):
            is_ours = figure is ours
            table.add_row(
                "" if is_ours else figure.trace,
                "" if is_ours else str(figure.num_windows),
                figure.planner,
                f"{figure.instances:.1f}",
                f"{figure.fit_imbalance:.3f}",
                f"{figure.next_imbalance:.3f}",
                _ratio(ours.next_imbalances, theirs.next_imbalances) if is_ours else "",
                f"{figure.moved:,}",
                f"{theirs.moved / max(1, ours.moved):.1f}" if is_ours else "",
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
