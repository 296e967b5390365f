"""Static expert parallelism, EPLB, the MoEless paper's system and moeless on the same requests: latency and cost.

`python -m benchmarks --all policies` simulates prefill-heavy and decode-heavy requests at three loads (shares of what
static expert parallelism can serve) on the routing of models: recorded ones where their files are given, made up ones
of the same shapes otherwise; then arrivals thinned to 5 %; then the MoEless paper's setting. docs/simulator.md says
what is assumed. Every figure is a ratio or a share of two simulations of the same requests:

- gap closed: of what static expert parallelism, or the better of two EPLBs, has above perfect balance (work like sand,
  which calls of experts are not), how much less there is. Of the mean MoE layer's time, and of the mean request's from
  its arrival to its last token: a faster system makes more steps of fewer tokens, so that its layers compare badly;
- billed and resident memory x time, both by the same rule for all policies.
"""

from __future__ import annotations

import argparse
import json
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
from moeless.simulate.results import Latency, PolicyResult
from moeless.simulate.scenario import Scenario
from moeless.simulate.simulation import simulate
from moeless.simulate.standard import StandardConfig, standard_policies
from moeless.simulate.workload import thinned
from moeless_predictors.traces import ArrivalTrace, import_trace

COMPARED = ("static", "eplb-vllm", "eplb-sglang", "moeless-paper", "moeless", "foresight", "limit")
MOST_TTFT, MOST_TPOT = 1.5, 1.2
"""Of everything resident, at the 99th percentile: a saving counts only within both."""
THINNED = 0.05
LEAN = {"defaults": {"keepAliveSeconds": 2.0, "scaleDownStabilizationSeconds": 2.0}}
"""A policy for traffic with long gaps."""
PAPER_MODELS = ("a6000-mixtral-8x7b", "a6000-phi-3.5-moe", "a6000-llama-4-scout")
PUBLISHED = {"latency": (-0.43, -0.22), "cost": (-0.93, -0.95)}
"""Against static expert parallelism and EPLB (arXiv 2603.06350)."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One policy on one scenario, beside others on the same requests."""

    setting: str
    shape: str
    level: str
    policy: str
    layer_us: float
    layer_gap_to_static: float
    layer_gap_to_eplb: float
    """Closed, of the better EPLB's layer time above the limit's."""
    request_gap_to_static: float
    request_gap_to_eplb: float
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
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="few requests, one load, the two smaller models")
    arguments = parser.parse_args(argv)
    num_requests = 60 if arguments.quick else arguments.requests
    wanted = arguments.only or (("gpt-oss", "paper") if arguments.quick else ("gpt-oss", "deepseek", "large", "paper"))
    levels = {"middle": LEVELS["middle"]} if arguments.quick else LEVELS
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
            rows += _rows(setting, shape.name, level, _results(setting.scenario(arrivals), COMPARED))
        rows += _thin(setting, shape, LEVELS["middle"] * saturated, num_requests)
    show(f"{setting.name}", rows)
    return rows


def _thin(setting: Setting, shape: Shape, rate_per_s: float, num_requests: int) -> list[Row]:
    arrivals = thinned(arrivals_of(shape, rate_per_s=rate_per_s, num_requests=4 * num_requests), THINNED, seed=1)
    scenario = setting.scenario(arrivals)
    results = _results(scenario, ("static", "eplb-sglang", "moeless-paper", "moeless", "foresight", "limit"))
    (lean,) = standard_policies(scenario, names=["moeless"], config=StandardConfig(document=parse_policy(LEAN)))
    results["moeless, lean"] = simulate(scenario, replace(lean, name="moeless, lean"))
    return _rows(setting, shape.name, f"thinned to {THINNED:.0%}", results)


def compare_in_paper(setting: Setting, arrivals: ArrivalTrace | None, num_requests: int) -> list[Row]:
    """The MoEless paper's: conversation arrivals in batches of a second."""
    if arrivals is None:
        arrivals = arrivals_of(
            Shape(name="conversation", prompt_tokens=1150, output_tokens=210), rate_per_s=5.4, num_requests=num_requests
        )
    scenario = setting.scenario(by_the_second(arrivals, num_requests=num_requests))
    results = _results(scenario, COMPARED)
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


def _results(scenario: Scenario, names: tuple[str, ...]) -> dict[str, PolicyResult]:
    return {policy.name: simulate(scenario, policy) for policy in standard_policies(scenario, names=list(names))}


def _rows(setting: Setting, shape: str, level: str, results: dict[str, PolicyResult]) -> list[Row]:
    static, limit, foresight = results["static"], results["limit"], results["foresight"]
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
                policy=name,
                layer_us=result.layer_s.mean * 1e6,
                layer_gap_to_static=_closed(static.layer_s, result.layer_s, limit.layer_s),
                layer_gap_to_eplb=_closed(eplb.layer_s, result.layer_s, limit.layer_s),
                request_gap_to_static=_closed(static.request_s, result.request_s, limit.request_s),
                request_gap_to_eplb=_closed(eplb.request_s, result.request_s, limit.request_s),
                to_foresight=result.request_s.mean / foresight.request_s.mean - 1,
                billed=result.billed_byte_s / static.billed_byte_s,
                resident=result.resident_byte_s / static.resident_byte_s,
                ttft_p99=ttft,
                tpot_p99=tpot,
                is_fast_enough=ttft <= MOST_TTFT and tpot <= MOST_TPOT,
                cold_starts=result.num_cold_starts,
            )
        )
    return rows


def _closed(before: Latency, after: Latency, bound: Latency) -> float:
    return (before.mean - after.mean) / (before.mean - bound.mean)


def show(title: str, rows: list[Row]) -> None:
    """A row for each policy."""
    table = Table(
        *("requests", "load", "policy", "layer µs", "layer gap", "to EPLB", "request gap", "to EPLB", "to foresight"),
        *("billed", "resident", "TTFT p99", "TPOT p99", "cold"),
        title=title,
    )
    last = ""
    for row in rows:
        begins = row.shape + row.level != last
        last = row.shape + row.level
        slow = "" if row.is_fast_enough else " (slow)"
        table.add_row(
            row.shape if begins else "",
            row.level if begins else "",
            row.policy,
            f"{row.layer_us:.0f}",
            f"{row.layer_gap_to_static:+.0%}",
            f"{row.layer_gap_to_eplb:+.0%}",
            f"{row.request_gap_to_static:+.0%}",
            f"{row.request_gap_to_eplb:+.0%}",
            f"{row.to_foresight:+.0%}",
            f"{row.billed:.2f}",
            f"{row.resident:.2f}{slow}",
            f"{row.ttft_p99:.2f}",
            f"{row.tpot_p99:.2f}",
            f"{row.cold_starts}",
        )
    Console(width=170).print(table)


def show_published(setting: Setting, results: dict[str, PolicyResult], *, num_layers: int) -> None:
    """moeless's and the paper's system's reductions beside the published ones."""
    columns = ("measure", "policy", "against static", "against EPLB")
    table = Table(*columns, title=f"{setting.name}: reductions beside the paper's")
    static = results["static"]
    eplb = min((results["eplb-vllm"], results["eplb-sglang"]), key=lambda result: result.layer_s.mean)
    for policy in ("moeless-paper", "moeless"):
        result = results[policy]
        table.add_row(
            "MoE layer latency",
            policy,
            f"{result.layer_s.mean / static.layer_s.mean - 1:+.0%}",
            f"{result.layer_s.mean / eplb.layer_s.mean - 1:+.0%}",
        )
        table.add_row(
            "billed memory x time, one rule",
            policy,
            f"{result.billed_byte_s / static.billed_byte_s - 1:+.0%}",
            f"{result.billed_byte_s / eplb.billed_byte_s - 1:+.0%}",
        )
        # A system that is not serverless holds every layer's experts while one of them runs.
        table.add_row(
            "the same, others billed for all layers at once",
            policy,
            f"{result.billed_byte_s / (num_layers * static.billed_byte_s) - 1:+.0%}",
            f"{result.billed_byte_s / (num_layers * eplb.billed_byte_s) - 1:+.0%}",
        )
    table.add_row("MoE layer latency", "published", *(f"{value:+.0%}" for value in PUBLISHED["latency"]))
    table.add_row("cost", "published", *(f"{value:+.0%}" for value in PUBLISHED["cost"]))
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
