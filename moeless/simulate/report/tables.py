"""Results side by side, as text: what the terminal and the report show, of `moeless simulate` and `moeless plan`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moeless.core.expert import FunctionId
from moeless.simulate.recommend import Alternative, CapacityReport, Recommendation
from moeless.simulate.report.results import BOUNDS, Latency, SystemResult

REFERENCE = "static"
FORESIGHT = "foresight"
FORECASTING = ("moeless", "moeless-window", "moeless-popularity")
"""moeless with other forecasts."""
_CLOSE = 0.005
"""Share of the requests: a size that misses by no more may keep the SLO with another random draw."""


class TextTable(NamedTuple):
    """Table of cells; the first column names the system. Headers may have two lines."""

    title: str
    note: str
    headers: list[str]
    rows: list[list[str]]


def comparison_tables(results: Sequence[SystemResult]) -> list[TextTable]:
    """Requests, layers and cost; changes are against static expert parallelism, or the first system without it."""
    reference = next((result for result in results if result.system == REFERENCE), results[0])
    tables = [_requests(results), _layers(results, reference), _costs(results, reference)]
    foresight = next((result for result in results if result.system == FORESIGHT), None)
    of_moeless = [result for result in results if result.system in FORECASTING]
    return [*tables, _forecasts(of_moeless, foresight)] if foresight is not None and of_moeless else tables


def result_sentence(results: Sequence[SystemResult]) -> str:
    """The result in one sentence: the fastest system that can be run, and how it compares with the reference."""
    able = [result for result in results if result.system not in BOUNDS] or list(results)
    reference = next((result for result in able if result.system == REFERENCE), able[0])
    fastest = min(able, key=lambda result: result.layer_s.mean)
    if fastest is reference:
        others = f", the shortest of {len(able)} systems" if len(able) > 1 else ""
        said = f"{reference.system} takes {fastest.layer_s.mean * 1e6:,.0f} µs for an MoE layer on average{others}"
    else:
        said = (
            f"{fastest.system} has the fastest MoE layers: {fastest.layer_s.mean * 1e6:,.0f} µs on average, "
            f"{_change(fastest.layer_s.mean, reference.layer_s.mean)} against {reference.system}, with "
            f"{_change(fastest.resident_byte_s, reference.resident_byte_s)} memory held"
        )
    limit = next((result for result in results if result.system == "limit"), None)
    if limit is not None:
        said += f"; the limit of every plan is {limit.layer_s.mean * 1e6:,.0f} µs"
    return f"{said}."


def _requests(results: Sequence[SystemResult]) -> TextTable:
    names = ("TTFT\nms", "TPOT\nms", "request\ns")
    headers = ["system", *(f"{name} p{percentile}" for name in names for percentile in (50, 90, 99))]
    rows = [
        [
            result.system,
            *_percentiles(result.ttft_s, 1e3),
            *_percentiles(result.tpot_s, 1e3),
            *_percentiles(result.request_s, 1),
        ]
        for result in results
    ]
    note = "TTFT: arrival to first token; TPOT: each token after it; request: arrival to last token."
    return TextTable("Requests", note, headers, rows)


def _forecasts(results: Sequence[SystemResult], foresight: SystemResult) -> TextTable:
    headers = ["system", "request\ns mean", "over\nforesight", "layer\nµs mean", "over\nforesight"]
    rows = [
        [
            result.system,
            f"{result.request_s.mean:.3g}",
            _change(result.request_s.mean, foresight.request_s.mean),
            f"{result.layer_s.mean * 1e6:,.0f}",
            _change(result.layer_s.mean, foresight.layer_s.mean),
        ]
        for result in (*results, foresight)
    ]
    note = "What a perfect forecast would gain over each that moeless can have."
    return TextTable("Forecasts", note, headers, rows)


def _layers(results: Sequence[SystemResult], reference: SystemResult) -> TextTable:
    headers = ["system", "layer\nµs mean", "\nchange", *(f"layer\nµs p{percentile}" for percentile in (50, 90, 99))]
    headers += ["busiest\n/ mean", "tokens\n/ s"]
    note = (
        f"layer: an MoE layer from dispatch to combine; changes are against {reference.system}. busiest / mean: pairs "
        "of token and expert on a worker, averaged over layers and steps."
    )
    rows = [
        [
            result.system,
            f"{result.layer_s.mean * 1e6:,.0f}",
            _change(result.layer_s.mean, reference.layer_s.mean),
            *_percentiles(result.layer_s, 1e6),
            f"{result.imbalance:.2f}",
            f"{result.tokens_per_s:,.0f}",
        ]
        for result in results
    ]
    if reference.goodput_per_s is not None:
        headers += ["goodput\n/ s", "within\nSLO"]
        note += " goodput: requests that keep the SLO."
        for row, result in zip(rows, results, strict=True):
            row += [f"{result.goodput_per_s:.2f}", f"{result.slo_share:.1%}"]
    return TextTable("MoE layers", note, headers, rows)


def _costs(results: Sequence[SystemResult], reference: SystemResult) -> TextTable:
    headers = ["system", "billed\nGB·s", "\nchange", "resident\nGB·s", "\nchange", "instan-\nces", "moved\nGB"]
    headers += ["plans\nmade", "cold\nstarts", "stalled\ns"]
    note = (
        "billed: bytes of a layer's instances times its execution's duration. resident: all bytes on workers over all "
        f"the time. Changes are against {reference.system}. instances: mean over time. stalled: engines waited for "
        "weights to move."
    )
    rows = [
        [
            result.system,
            _short(result.billed_byte_s / 1e9),
            _change(result.billed_byte_s, reference.billed_byte_s),
            _short(result.resident_byte_s / 1e9),
            _change(result.resident_byte_s, reference.resident_byte_s),
            f"{result.mean_instances:,.0f}",
            _short(result.moved_bytes / 1e9),
            f"{result.num_plans:,}",
            f"{result.num_cold_starts:,}",
            f"{result.stall_s:.2f}",
        ]
        for result in results
    ]
    return TextTable("Cost", note, headers, rows)


def capacity_tables(found: CapacityReport) -> list[TextTable]:
    """Sizes with their latencies, and costs, of every system that fits at all."""
    shown = [alternative for alternative in found.alternatives if alternative.result is not None]
    return [_sizes(shown), _capacity_costs(shown)] if shown else []


def capacity_notes(found: CapacityReport) -> list[str]:
    """Write the notes below the tables: systems that keep the SLO at no size, and plans that needed more memory."""
    notes = []
    for alternative in found.alternatives:
        tried = ", ".join(str(probe.workers) for probe in alternative.probes)
        if alternative.result is None:
            notes.append(f"{alternative.system}: the experts fit no size of {tried}: {alternative.probes[-1].why_not}")
            continue
        result = alternative.result
        if alternative.workers is None:
            notes.append(
                f"{alternative.system}: keeps the SLO at no size of {tried}; nearest is {_share(result.slo_share)} "
                f"with {alternative.shown_workers}, which is shown"
            )
        fewer = alternative.one_fewer
        if fewer is not None and fewer.slo_share is not None:
            short = math.ceil((found.attainment - fewer.slo_share) * result.num_requests - 1e-9)
            if short <= _CLOSE * result.num_requests:
                notes.append(
                    f"{alternative.system}: {fewer.workers} workers fall short by {short} of {result.num_requests:,} "
                    "requests; see what another --seed says"
                )
        if result.num_plans_over_memory:
            notes.append(
                f"{alternative.system}: {result.num_plans_over_memory} of {result.num_plans} plans had more instances "
                "than fit while old and new ones lay side by side"
            )
    return notes


def _sizes(alternatives: Sequence[Alternative]) -> TextTable:
    headers = ["system", "\nworkers", "within\nSLO", "one\nfewer", "TTFT\nms p50", "TTFT\nms p99"]
    headers += ["TPOT\nms p50", "TPOT\nms p99", "layer\nµs mean", "busiest\n/ mean"]
    note = (
        "workers: fewest that keep the SLO. one fewer: requests within it with one worker less. layer: an MoE layer "
        "from dispatch to combine. busiest / mean: pairs of token and expert on a worker."
    )
    rows = []
    for alternative in alternatives:
        result = alternative.result
        assert result is not None
        rows.append(
            [
                alternative.system,
                str(alternative.workers or "none"),
                _share(result.slo_share),
                _one_fewer(alternative),
                *(_short(seconds * 1e3) for seconds in (result.ttft_s.p50, result.ttft_s.p99)),
                *(_short(seconds * 1e3) for seconds in (result.tpot_s.p50, result.tpot_s.p99)),
                f"{result.layer_s.mean * 1e6:,.0f}",
                f"{result.imbalance:.2f}",
            ]
        )
    return TextTable("Workers and latency", note, headers, rows)


def _one_fewer(alternative: Alternative) -> str:
    probe = alternative.one_fewer
    if probe is None:
        return "-"
    return "no room" if probe.slo_share is None else _share(probe.slo_share)


def _share(share: float | None) -> str:
    """Rounded down: what falls short of 99 % is not shown as 99."""
    assert share is not None
    return f"{math.floor(share * 1000 + 1e-9) / 10:.1f}%"


def _capacity_costs(alternatives: Sequence[Alternative]) -> TextTable:
    headers = ["system", "\nworkers", "instances\nmean", "\npeak", "billed\nGB·s", "resident\nGB·s", "worker\nhours"]
    note = (
        "instances: resident on all workers. billed: bytes of a layer's instances times its execution's duration. "
        "resident: all bytes on workers over all the time."
    )
    rows = []
    for alternative in alternatives:
        result, cost = alternative.result, alternative.cost
        assert result is not None
        assert cost is not None
        rows.append(
            [
                alternative.system,
                f"{cost.mean_workers:.4g}",
                f"{result.mean_instances:,.0f}",
                f"{result.peak_instances:,}",
                _short(result.billed_byte_s / 1e9),
                _short(result.resident_byte_s / 1e9),
                f"{cost.worker_hours:.3g}",
            ]
        )
        if cost.dollars_per_hour is not None and cost.dollars_per_million_tokens is not None:
            rows[-1] += [f"{cost.dollars_per_hour:,.2f}", f"{cost.dollars_per_million_tokens:,.3f}"]
    if any(alternative.cost and alternative.cost.dollars_per_hour is not None for alternative in alternatives):
        headers += ["$\n/ hour", "$\n/ M tokens"]
        note += " tokens: of prompts and outputs."
    return TextTable("Cost", note, headers, rows)


def plan_table(found: Recommendation, *, memory_per_worker: int, max_workers: int = 16) -> TextTable:
    """The workers of a plan; of many, the first."""
    headers = ["worker", "\ninstances", "\nGB", "of its\nmemory", "of a layer\nleast", "\nmost", "load\n/ mean"]
    num_workers = len(found.plan)
    instances_LW = np.zeros((len(found.layers), num_workers), dtype=np.int64)
    for index, worker in enumerate(found.plan):
        for name in worker.functions:
            instances_LW[FunctionId.parse(name).layer, index] += 1
    rows = [
        [
            worker.name,
            f"{worker.instances:,}",
            f"{worker.instance_bytes / 1e9:.2f}",
            f"{worker.instance_bytes / memory_per_worker:.0%}",
            str(instances_LW[:, index].min()),
            str(instances_LW[:, index].max()),
            f"{worker.load_share * num_workers:.2f}",
        ]
        for index, worker in enumerate(found.plan[:max_workers])
    ]
    note = "load / mean: tokens of all layers. "
    if num_workers > max_workers:
        note += f"{num_workers - max_workers} workers more are in the JSON file. "
    return TextTable("Plan", note.strip(), headers, rows)


def plan_notes(found: Recommendation, *, top_k: int, max_functions: int = 6) -> list[str]:
    """Summarize the plan in sentences."""
    hosts: dict[str, list[str]] = {}
    for index, worker in enumerate(found.plan):
        for name in worker.functions:
            hosts.setdefault(name, []).append(str(index))
    replicated = sorted((name for name in hosts if len(hosts[name]) > 1), key=lambda name: (-len(hosts[name]), name))
    listed = "; ".join(f"{name} on {', '.join(hosts[name])}" for name in replicated[:max_functions])
    instances_L = [layer.instances for layer in found.layers]
    worst = max(found.layers, key=lambda layer: layer.imbalance)
    notes = [
        f"for steps of {found.step_tokens:,.0f} tokens, spread over functions as in the routing: {found.instances:,} "
        f"instances of {len(hosts):,} functions, {min(instances_L)} to {max(instances_L)} in a layer",
        f"busiest worker / mean: {found.imbalance:.2f} over layers, {worst.imbalance:.2f} in the worst ({worst.layer})",
        f"workers that a token touches in a layer: {found.workers_touched:.2f}, for {top_k} experts",
        f"replicated functions: {len(replicated)}" + (f"; the most on workers: {listed}" if replicated else ""),
    ]
    if found.exact is not None:
        exact = found.exact
        what = "workers that a token touches" if exact.objective == "workers" else "hops between layers"
        notes.append(
            f"exact: {what} {exact.before:.3f} -> {exact.after:.3f}, at most {exact.gap:.1%} above the optimum in the "
            f"worst layer; {exact.layers} of {len(found.layers)} layers solved"
        )
    if found.num_without_instance:
        notes.append(f"functions that start only when they are needed: {found.num_without_instance}")
    return notes


def _percentiles(latency: Latency, scale: float) -> list[str]:
    return [_short(value * scale) for value in (latency.p50, latency.p90, latency.p99)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _change(value: float, reference: float) -> str:
    return f"{value / reference - 1:+.0%}" if reference else "-"
