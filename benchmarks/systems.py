"""Static expert parallelism, EPLB, the MoEless paper's system and moeless on the same requests: latency and cost.

`python -m benchmarks --all systems` simulates prefill-heavy and decode-heavy requests at four loads (shares of what
static expert parallelism can serve, and all at once) on the routing of models: recorded ones where their files are
given, made up ones of the same shapes otherwise; then arrivals thinned to 5 %; then the MoEless paper's setting.
docs/simulator.md says what is assumed. Every figure is a ratio or a share of two simulations of the same requests:

- gap closed: of the time that a mean request takes under static expert parallelism, or under the better of two EPLBs,
  above that under a bound, how much less it is. Two bounds: perfect balance, of work that is divided like sand; and
  what whole experts allow, whose calls read all their weights. With --json also of the mean MoE layer's time, though a
  faster system makes more steps of fewer tokens, so that its layers compare badly;
- billed and resident memory x time, both by the same rule for all systems.

First plans of moeless, the paper's system and SGLang's EPLB are for the load of other sequences: those that predictors
are fitted on, or (made-up routing) that came earlier. vLLM's EPLB begins with equal loads, as it does.

Besides moeless's default system: `moeless, once` makes no replicas; `moeless, twice` keeps two instances of every
function, so that each step can choose; `moeless, lean` is for traffic with gaps: instances go half a second after their
last token, but for the first layers', behind whose work the other layers' cold starts hide.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks._scenarios import (
    LEVELS,
    SHAPES,
    Setting,
    Shape,
    arrivals_of,
    by_the_second,
    large,
    paper,
    recorded,
    saturation_per_s,
)
from moeless.core.policy import parse_policy
from moeless.simulate.report.results import Latency, SystemResult
from moeless.simulate.scenario import Scenario
from moeless.simulate.simulation import simulate
from moeless.simulate.systems import SystemConfig, make_systems
from moeless.simulate.workload import thinned
from moeless_predictors.traces import ArrivalTrace, import_trace

COMPARED = ("static", "eplb-vllm", "eplb-sglang", "moeless-paper", "moeless", "foresight", "whole-experts", "limit")
MAX_TTFT, MAX_TPOT = 1.5, 1.2
"""Of everything resident, at the 99th percentile: a saving counts only within both."""
THINNED = 0.05
ONCE: dict[str, object] = {"defaults": {"scaler": {"name": "minMax", "maxExtraShare": 0.0}}}
TWICE: dict[str, object] = {"defaults": {"minReplicas": 2}}
LEAN: dict[str, object] = {
    "defaults": {
        "keepAliveSeconds": 0.5,
        "scaleDownStabilizationSeconds": 0.5,
        "scaler": {"name": "minMax", "maxExtraShare": 0.0},
    },
    "rules": [{"layers": "0-3", "scaleToZero": False}],
}
PAPER_MODELS = ("a6000-mixtral-8x7b", "a6000-phi-3.5-moe", "a6000-llama-4-scout")
PUBLISHED = {"latency": (-0.43, -0.22), "cost": (-0.93, -0.95)}
"""Against static expert parallelism and EPLB (arXiv 2603.06350)."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Shares that are closed, of what static expert parallelism or the better EPLB have above a bound."""

    static_to_limit: float
    static_to_whole: float
    eplb_to_limit: float
    eplb_to_whole: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One system on one scenario, beside others on the same requests."""

    setting: str
    shape: str
    level: str
    system: str
    layer_us: float
    layer_gap: Gap
    request_gap: Gap
    to_foresight: float
    """Mean request time over foresight's, less 1."""
    billed: float
    """Over static's, as are the next three."""
    resident: float
    ttft_p99: float
    tpot_p99: float
    is_fast_enough: bool
    cold_starts: int


def main(argv: list[str] | None = None) -> None:
    """Print a table for each setting; with --json, write all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpt-oss", type=Path, nargs="*", default=[], help="recorded routing of gpt-oss-20b")
    parser.add_argument("--deepseek", type=Path, nargs="*", default=[], help="recorded routing of DeepSeek-V2-Lite")
    parser.add_argument("--arrivals", type=Path, help="conversation arrivals, for the paper's setting")
    parser.add_argument("--requests", type=int, default=400, help="of each scenario")
    parser.add_argument("--only", nargs="*", choices=("gpt-oss", "deepseek", "large", "paper"), default=None)
    parser.add_argument("--levels", nargs="*", choices=list(LEVELS), default=None, help="loads; default: all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few requests, one load, the two smaller models")
    arguments = parser.parse_args(argv)
    num_requests = 60 if arguments.quick else arguments.requests
    wanted = arguments.only or (("gpt-oss", "paper") if arguments.quick else ("gpt-oss", "deepseek", "large", "paper"))
    chosen = arguments.levels or (["middle"] if arguments.quick else list(LEVELS))
    levels = {level: LEVELS[level] for level in chosen}
    rows: list[Row] = []
    makers = {
        "gpt-oss": lambda: recorded("gpt-oss-20b", "a6000-gpt-oss-20b", arguments.gpt_oss),
        "deepseek": lambda: recorded("DeepSeek-V2-Lite", "a6000-deepseek-v2-lite", arguments.deepseek),
        "large": large,
    }
    for name, make in makers.items():
        if name in wanted:
            rows += compare(make(), levels, num_requests, quick=arguments.quick)
    if "paper" in wanted:
        arrivals = arrivals_file(arguments.arrivals)
        for model in PAPER_MODELS[: 1 if arguments.quick else None]:
            rows += compare_in_paper(paper(model), arrivals, num_requests)
    if arguments.json:
        arguments.json.write_text(json.dumps([msgspec.to_builtins(row) for row in rows], indent=2))


def compare(setting: Setting, levels: dict[str, float], num_requests: int, *, quick: bool) -> list[Row]:
    """Both shapes at every load, and the middle one thinned."""
    rows = []
    for shape in SHAPES:
        saturated = saturation_per_s(setting, shape, quick=quick)
        for level, share in levels.items():
            arrivals = arrivals_of(shape, rate_per_s=share * saturated, num_requests=num_requests)
            results = _results(setting, setting.scenario(arrivals), COMPARED, once=ONCE, twice=TWICE)
            rows += _rows(setting, shape.name, level, results)
        rows += _thin(setting, shape, LEVELS["low"] * saturated, num_requests)
    show(f"{setting.name}", rows)
    return rows


def _thin(setting: Setting, shape: Shape, rate_per_s: float, num_requests: int) -> list[Row]:
    arrivals = thinned(arrivals_of(shape, rate_per_s=rate_per_s, num_requests=4 * num_requests), THINNED, seed=1)
    names = tuple(name for name in COMPARED if name != "eplb-vllm")  # which would not have planned once
    results = _results(setting, setting.scenario(arrivals), names, lean=LEAN)
    return _rows(setting, shape.name, f"{THINNED:.0%} of low", results)


def compare_in_paper(setting: Setting, arrivals: ArrivalTrace | None, num_requests: int) -> list[Row]:
    """The MoEless paper's: conversation arrivals in batches of a second."""
    if arrivals is None:
        arrivals = arrivals_of(
            Shape(name="conversation", prompt_tokens=1150, output_tokens=210), rate_per_s=5.4, num_requests=num_requests
        )
    scenario = setting.scenario(by_the_second(arrivals, num_requests=num_requests))
    results = _results(setting, scenario, COMPARED, twice=TWICE)
    rows = _rows(setting, "conversation", "1 s batches", results)
    show(setting.name, rows)
    show_published(setting, results, num_layers=scenario.profile.model.num_layers)
    return rows


def arrivals_file(path: Path | None) -> ArrivalTrace | None:
    """Raises SystemExit if it holds something else."""
    if path is None:
        return None
    trace = import_trace(path).trace
    if not isinstance(trace, ArrivalTrace):
        raise SystemExit(f"--arrivals must be a file of arrivals, got {path}")
    return trace


def _results(
    setting: Setting, scenario: Scenario, names: tuple[str, ...], **policies: dict[str, object]
) -> dict[str, SystemResult]:
    """Of the policies named, and of moeless by other policy policies."""
    config = SystemConfig(prior_LE=setting.prior_LE)
    systems = make_systems(scenario, names=list(names), config=config)
    results = {system.name: simulate(scenario, system) for system in systems}
    for suffix, policy in policies.items():
        (system,) = make_systems(scenario, names=["moeless"], config=replace(config, policy=parse_policy(policy)))
        name = f"moeless, {suffix}"
        results[name] = simulate(scenario, replace(system, name=name))
    return results


def _rows(setting: Setting, shape: str, level: str, results: dict[str, SystemResult]) -> list[Row]:
    static, foresight = results["static"], results["foresight"]
    eplb = min((r for name, r in results.items() if name.startswith("eplb")), key=lambda r: r.request_s.mean)
    rows = []
    for name, result in results.items():
        ttft = result.ttft_s.p99 / static.ttft_s.p99
        tpot = result.tpot_s.p99 / static.tpot_s.p99
        rows.append(
            Row(
                setting=setting.name,
                shape=shape,
                level=level,
                system=name,
                layer_us=result.layer_s.mean * 1e6,
                layer_gap=_gap(results, eplb, result, lambda of: of.layer_s),
                request_gap=_gap(results, eplb, result, lambda of: of.request_s),
                to_foresight=result.request_s.mean / foresight.request_s.mean - 1,
                billed=result.billed_byte_s / static.billed_byte_s,
                resident=result.resident_byte_s / static.resident_byte_s,
                ttft_p99=ttft,
                tpot_p99=tpot,
                is_fast_enough=ttft <= MAX_TTFT and tpot <= MAX_TPOT,
                cold_starts=result.num_cold_starts,
            )
        )
    return rows


def _gap(
    results: dict[str, SystemResult], eplb: SystemResult, after: SystemResult, of: Callable[[SystemResult], Latency]
) -> Gap:
    def closed(before: SystemResult, bound: str) -> float:
        return (of(before).mean - of(after).mean) / (of(before).mean - of(results[bound]).mean)

    static = results["static"]
    return Gap(
        static_to_limit=closed(static, "limit"),
        static_to_whole=closed(static, "whole-experts"),
        eplb_to_limit=closed(eplb, "limit"),
        eplb_to_whole=closed(eplb, "whole-experts"),
    )


def show(title: str, rows: list[Row]) -> None:
    """A row for each system."""
    table = Table(
        *("requests", "load", "system", "layer µs", "static→limit", "→whole", "EPLB→limit", "→whole", "to foresight"),
        *("billed", "resident", "TTFT p99", "TPOT p99", "cold"),
        title=f"{title}: shares of the gaps in request time that are closed, and ratios to static",
    )
    last = ""
    for row in rows:
        begins = row.shape + row.level != last
        last = row.shape + row.level
        slow = "" if row.is_fast_enough else " (slow)"
        table.add_row(
            row.shape if begins else "",
            row.level if begins else "",
            row.system,
            f"{row.layer_us:.0f}",
            f"{row.request_gap.static_to_limit:+.0%}",
            f"{row.request_gap.static_to_whole:+.0%}",
            f"{row.request_gap.eplb_to_limit:+.0%}",
            f"{row.request_gap.eplb_to_whole:+.0%}",
            f"{row.to_foresight:+.0%}",
            f"{row.billed:.2f}",
            f"{row.resident:.2f}{slow}",
            f"{row.ttft_p99:.2f}",
            f"{row.tpot_p99:.2f}",
            f"{row.cold_starts}",
        )
    Console(width=170).print(table)


def show_published(setting: Setting, results: dict[str, SystemResult], *, num_layers: int) -> None:
    """moeless's and the paper's system's reductions beside the published ones."""
    columns = ("measure", "system", "against static", "against EPLB")
    table = Table(*columns, title=f"{setting.name}: reductions beside the paper's")
    static = results["static"]
    eplb = min((results["eplb-vllm"], results["eplb-sglang"]), key=lambda result: result.layer_s.mean)
    for system in ("moeless-paper", "moeless", "moeless, twice", "whole-experts", "limit"):
        result = results[system]
        table.add_row(
            "MoE layer latency",
            system,
            f"{result.layer_s.mean / static.layer_s.mean - 1:+.0%}",
            f"{result.layer_s.mean / eplb.layer_s.mean - 1:+.0%}",
        )
        table.add_row(
            "billed memory x time, one rule",
            system,
            f"{result.billed_byte_s / static.billed_byte_s - 1:+.0%}",
            f"{result.billed_byte_s / eplb.billed_byte_s - 1:+.0%}",
        )
        # A system that is not serverless holds every layer's experts while one of them runs.
        table.add_row(
            "the same, others billed for all layers at once",
            system,
            f"{result.billed_byte_s / (num_layers * static.billed_byte_s) - 1:+.0%}",
            f"{result.billed_byte_s / (num_layers * eplb.billed_byte_s) - 1:+.0%}",
        )
    table.add_row("MoE layer latency", "published", *(f"{value:+.0%}" for value in PUBLISHED["latency"]))
    table.add_row("cost", "published", *(f"{value:+.0%}" for value in PUBLISHED["cost"]))
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
