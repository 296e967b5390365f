"""Results side by side, as text: what the terminal and the report show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moeless.simulate.results import Latency, PolicyResult

REFERENCE = "static"


class TextTable(NamedTuple):
    """Of cells; the first column names the policy. Headers may have two lines."""

    title: str
    note: str
    headers: list[str]
    rows: list[list[str]]


def comparison_tables(results: Sequence[PolicyResult]) -> list[TextTable]:
    """Requests, layers and cost; changes are against static expert parallelism, or the first policy without it."""
    reference = next((result for result in results if result.policy == REFERENCE), results[0])
    return [_requests(results), _layers(results, reference), _costs(results, reference)]


def _requests(results: Sequence[PolicyResult]) -> TextTable:
    names = ("TTFT\nms", "TPOT\nms", "request\ns")
    headers = ["policy", *(f"{name} p{percentile}" for name in names for percentile in (50, 90, 99))]
    rows = [
        [
            result.policy,
            *_percentiles(result.ttft_s, 1e3),
            *_percentiles(result.tpot_s, 1e3),
            *_percentiles(result.request_s, 1),
        ]
        for result in results
    ]
    note = "TTFT: arrival to first token; TPOT: each token after it; request: arrival to last token."
    return TextTable("Requests", note, headers, rows)


def _layers(results: Sequence[PolicyResult], reference: PolicyResult) -> TextTable:
    headers = ["policy", "layer\nµs mean", "\nchange", *(f"layer\nµs p{percentile}" for percentile in (50, 90, 99))]
    headers += ["busiest\n/ mean", "tokens\n/ s"]
    note = (
        f"layer: an MoE layer from dispatch to combine; changes are against {reference.policy}. busiest / mean: pairs "
        "of token and expert on a worker, averaged over layers and steps."
    )
    rows = [
        [
            result.policy,
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


def _costs(results: Sequence[PolicyResult], reference: PolicyResult) -> TextTable:
    headers = ["policy", "billed\nGB·s", "\nchange", "resident\nGB·s", "\nchange", "instan-\nces", "moved\nGB"]
    headers += ["plans\nmade", "cold\nstarts", "stalled\ns"]
    note = (
        "billed: bytes of a layer's instances times its execution's duration. resident: all bytes on workers over all "
        f"the time. Changes are against {reference.policy}. instances: mean over time. stalled: engines waited for "
        "weights to move."
    )
    rows = [
        [
            result.policy,
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


def _percentiles(latency: Latency, scale: float) -> list[str]:
    return [_short(value * scale) for value in (latency.p50, latency.p90, latency.p99)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _change(value: float, reference: float) -> str:
    return f"{value / reference - 1:+.0%}" if reference else "-"
