"""Sensitivity of moeless's gain over static expert parallelism to each assumption of the simulator.

One assumption at a time is changed; the others stay as docs/simulator.md has them: the links' speed, what an exchange
takes beside its bytes, the time of splitting a layer, the speed of loading, how long functions are kept, errors of an
assumed forecast, how bursty arrivals
are, and how many spare instances fit. Shown: the share of the gap to perfect balance that moeless closes in the mean
request's time, its TTFT p99 and its resident memory x time over static's. `--plot FILE` draws them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks._scenarios import LEVELS, SHAPES, Setting, arrivals_of, recorded, saturation_per_s, with_settings
from moeless.core.policy import parse_policy
from moeless.planning.cost import CostProfile
from moeless.simulate.scenario import Scenario, System
from moeless.simulate.simulation import simulate
from moeless.simulate.systems import SystemConfig, make_systems
from moeless.simulate.workload import thinned

PREFILL_HEAVY = SHAPES[0]


@dataclass(frozen=True, kw_only=True)
class Point:
    """moeless beside static expert parallelism under one value of one assumption."""

    assumption: str
    value: float
    gap_closed: float
    ttft_p99: float
    resident: float


@dataclass(frozen=True, kw_only=True)
class Change:
    """Changed assumption of one point."""

    settings: dict[str, object]
    profile: Callable[[CostProfile], CostProfile] = lambda profile: profile
    system: Callable[[System], System] = lambda system: system
    policy: dict[str, object] | None = None
    gap_cv: float = 1.0
    thin: float = 1.0


def _exchange(factor: float) -> Callable[[CostProfile], CostProfile]:
    def slower(profile: CostProfile) -> CostProfile:
        exchange = profile.exchange
        return replace(profile, exchange=replace(exchange, hub_s=exchange.hub_s * factor))

    return slower


def _split(seconds: float) -> Callable[[System], System]:
    return lambda system: replace(system, split_s=seconds)


def _recall(recall: float) -> Callable[[System], System]:
    return lambda system: replace(system, forecast=replace(system.forecast, kind="foresight", recall=recall))


def _load_error(relative_l1: float) -> Callable[[System], System]:
    return lambda system: replace(system, forecast=replace(system.forecast, kind="foresight", relative_l1=relative_l1))


def _keep_alive(seconds: float) -> dict[str, object]:
    return {"defaults": {"keepAliveSeconds": seconds, "scaleDownStabilizationSeconds": min(seconds, 10.0)}}


CHANGES: dict[str, dict[float, Change]] = {
    "link between workers, GB/s": {gb_s: Change(settings={"local_gb_s": gb_s}) for gb_s in (14, 28, 56, 112, 400)},
    "fixed time of the hub's exchange, times": {x: Change(settings={}, profile=_exchange(x)) for x in (1, 2, 4, 8)},
    "splitting a layer's tokens, µs": {us: Change(settings={}, system=_split(us * 1e-6)) for us in (0, 28, 75, 150)},
    "loading, GB/s": {gb_s: Change(settings={"fetch_gb_s": gb_s}) for gb_s in (3, 6, 12.4, 24.8, 50)},
    "recall, if the tokens to come were known": {
        recall: Change(settings={}, system=_recall(recall)) for recall in (0, 0.3, 0.6, 0.84, 1)
    },
    "relative L1 error, if they were known": {
        error: Change(settings={}, system=_load_error(error)) for error in (0, 0.15, 0.3, 0.6)
    },
    "CV of the gaps between requests": {cv: Change(settings={}, gap_cv=cv) for cv in (0.5, 1, 2, 4)},
    "memory of a worker, times its part": {
        x: Change(settings={"memory_per_worker": f"{100 * x:.0f}%"}) for x in (1.0, 1.1, 1.25, 1.5, 2)
    },
    "keep-alive at a twentieth of the requests, s": {
        s: Change(settings={}, policy=_keep_alive(s), thin=0.05) for s in (0.5, 1, 2, 5, 10, 30)
    },
}


def main(argv: list[str] | None = None) -> None:
    """Print a table; with --plot and --json, draw and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpt-oss", type=Path, nargs="*", default=[], help="recorded routing of gpt-oss-20b")
    parser.add_argument("--requests", type=int, default=300, help="of each point")
    parser.add_argument("--only", nargs="*", choices=list(CHANGES), default=list(CHANGES), help="of the assumptions")
    parser.add_argument("--plot", type=Path, help="an image: .png or .svg")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few requests, two values of each")
    arguments = parser.parse_args(argv)
    setting = recorded("gpt-oss-20b", "a6000-gpt-oss-20b", arguments.gpt_oss)
    rate_per_s = LEVELS["middle"] * saturation_per_s(setting, PREFILL_HEAVY, quick=arguments.quick)
    num_requests = 40 if arguments.quick else arguments.requests
    points = []
    for assumption in arguments.only:
        changes = CHANGES[assumption]
        for value, change in list(changes.items())[:: len(changes) - 1 if arguments.quick else 1]:
            points.append(measure(setting, assumption, float(value), change, rate_per_s, num_requests))
    show(points)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(point) for point in points], indent=2))
    if arguments.plot:
        draw(points, arguments.plot)


def measure(
    setting: Setting, assumption: str, value: float, change: Change, rate_per_s: float, num_requests: int
) -> Point:
    """Simulate static expert parallelism, moeless and the limit."""
    changed = with_settings(setting, **change.settings)
    arrivals = arrivals_of(
        PREFILL_HEAVY, rate_per_s=rate_per_s, num_requests=round(num_requests / change.thin**0.5), gap_cv=change.gap_cv
    )
    scenario = changed.scenario(thinned(arrivals, change.thin, seed=1))
    scenario = replace(scenario, profile=change.profile(scenario.profile))
    static, limit = (simulate(scenario, _system(scenario, name)) for name in ("static", "limit"))
    config = SystemConfig(prior_LE=setting.prior_LE)
    if change.policy is not None:
        config = replace(config, policy=parse_policy(change.policy))
    result = simulate(scenario, change.system(_system(scenario, "moeless", config)))
    return Point(
        assumption=assumption,
        value=value,
        gap_closed=(static.request_s.mean - result.request_s.mean) / (static.request_s.mean - limit.request_s.mean),
        ttft_p99=result.ttft_s.p99 / static.ttft_s.p99,
        resident=result.resident_byte_s / static.resident_byte_s,
    )


def _system(scenario: Scenario, name: str, config: SystemConfig | None = None) -> System:
    (system,) = make_systems(scenario, names=[name], config=config)
    return system


def show(points: Sequence[Point]) -> None:
    """A row for each point."""
    table = Table("assumption", "value", "gap closed", "TTFT p99 / static's", "resident / static's")
    last = ""
    for point in points:
        table.add_row(
            "" if point.assumption == last else point.assumption,
            f"{point.value:g}",
            f"{point.gap_closed:+.0%}",
            f"{point.ttft_p99:.2f}",
            f"{point.resident:.2f}",
        )
        last = point.assumption
    Console().print(table)


def draw(points: Sequence[Point], path: Path) -> None:
    """A small plot for each assumption."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(point.assumption for point in points))
    figure, axes = pyplot.subplots(2, -(-len(names) // 2), figsize=(14, 6), layout="constrained", sharey=True)
    for name, ax in zip(names, axes.ravel(), strict=False):
        of_name = [point for point in points if point.assumption == name]
        values = [point.value for point in of_name]
        ax.plot(values, [point.gap_closed for point in of_name], "o-", label="gap closed")
        ax.plot(values, [point.ttft_p99 for point in of_name], "s--", label="TTFT p99 / static's")
        ax.plot(values, [point.resident for point in of_name], "^:", label="resident / static's")
        ax.axhline(1, color="grey", linewidth=0.5)
        ax.set_xlabel(name)
        ax.set_ylim(-0.5, 2.5)
    axes.ravel()[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
