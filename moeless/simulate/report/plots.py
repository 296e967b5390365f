"""The plots of a report, as SVG that follows the page's colours. Needs matplotlib.

Text is drawn in a stand-in colour that becomes the page's own, so that plots are legible on light and dark alike.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moeless.simulate.report.results import Latency, SimulationReport, SystemResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TEXT, _GRID = "#012345", "#543210"
"""Stand-ins, in no colour map."""
_COLOURS = {
    "static": "#8a8f98",
    "eplb-vllm": "#d98324",
    "eplb-sglang": "#b8860b",
    "moeless-paper": "#c2559d",
    "moeless": "#12957f",
    "foresight": "#3f87d9",
    "whole-experts": "#e08a5a",
    "limit": "#d64545",
}
_STYLES = {"limit": "--", "whole-experts": (0, (5, 1)), "foresight": "-.", "eplb-sglang": ":"}
_GIB = 2**30


class Plot(NamedTuple):
    """One figure of the report."""

    name: str
    title: str
    caption: str
    svg: str


def report_plots(report: SimulationReport) -> list[Plot]:
    """Latency, instances and memory, load against capacity, imbalance.

    Raises: ModuleNotFoundError that says how to install matplotlib.
    """
    results = report.results
    return [
        Plot(
            "latency",
            "Latency",
            "Share of requests (left, middle) and of MoE layers (right) that took at most so long; the axis is "
            "logarithmic and ends at twice the largest p99. The steeper and the further left, the better.",
            _svg("latency", 3, lambda axes: _draw_latency(axes, results)),
        ),
        Plot(
            "replicas",
            "Instances and memory",
            "Instances of experts on all workers (left) and the memory that they take (right), those that are being "
            "loaded among them; the thin line is what fits the workers.",
            _svg("replicas", 2, lambda axes: _draw_instances(axes, report)),
        ),
        Plot(
            "load",
            "Load against capacity",
            "Tokens that arrive and tokens that are computed (left); the share of the workers' time that they compute "
            "(middle), 1 being all that they can; requests that wait (right).",
            _svg("load", 3, lambda axes: _draw_load(axes, results)),
        ),
        Plot(
            "imbalance",
            "Imbalance",
            "Pairs of token and expert on the busiest worker over the mean of all workers, averaged over the layers "
            "and steps of each interval; 1 is perfect balance.",
            _svg("imbalance", 1, lambda axes: _draw_imbalance(axes[0], results)),
        ),
    ]


def _draw_latency(axes: Sequence[Axes], results: Sequence[SystemResult]) -> None:
    kinds: list[tuple[str, float, Callable[[SystemResult], Latency]]] = [
        ("time to first token, ms", 1e3, lambda result: result.ttft_s),
        ("time per token after it, ms", 1e3, lambda result: result.tpot_s),
        ("MoE layer, µs", 1e6, lambda result: result.layer_s),
    ]
    for panel, (label, scale, latency_of) in zip(axes, kinds, strict=True):
        cdfs = [(result, np.array(latency_of(result).cdf) * scale) for result in results if latency_of(result).cdf]
        for result, cdf in cdfs:
            panel.plot(cdf, np.linspace(0, 1, len(cdf)), **_style(result))
        panel.set_xscale("log")
        if cdfs:
            _limit_latency(panel, min(cdf[0] for _, cdf in cdfs), 2 * max(cdf[99] for _, cdf in cdfs))
        panel.set_xlabel(label)
        panel.set_ylim(0, 1)
    axes[0].set_ylabel("share")


def _limit_latency(panel: Axes, low: float, high: float) -> None:
    """Show what nearly all took, with as many labels as have room."""
    panel.set_xlim(low, high)
    labelled = "25" if high / low < 60 else "3" if high / low < 1000 else ""
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in labelled else "")


def _draw_instances(axes: Sequence[Axes], report: SimulationReport) -> None:
    for panel, label, scale in (
        (axes[0], "instances", 1.0),
        (axes[1], "GiB", report.expert_bytes / _GIB),
    ):
        for result in report.results:
            panel.plot(result.series.time_s, np.array(result.series.instances) * scale, **_style(result))
        panel.axhline(report.capacity_instances * scale, color=_TEXT, linewidth=0.6)
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        _label_time(panel)


def _draw_load(axes: Sequence[Axes], results: Sequence[SystemResult]) -> None:
    arrived, busy, waiting = axes
    first = results[0].series
    arrived.fill_between(
        first.time_s, first.arrived_tokens_per_s, color=_GRID, alpha=0.6, linewidth=0, label="arriving"
    )
    for result in results:
        series = result.series
        arrived.plot(series.time_s, series.served_tokens_per_s, **_style(result))
        busy.plot(series.time_s, series.busy_share, **_style(result))
        waiting.plot(series.time_s, series.waiting_requests, **_style(result))
    for panel, label in ((arrived, "tokens a second"), (busy, "share of time"), (waiting, "requests waiting")):
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        _label_time(panel)
    busy.axhline(1.0, color=_TEXT, linewidth=0.6)


def _draw_imbalance(panel: Axes, results: Sequence[SystemResult]) -> None:
    for result in results:
        imbalance = np.array(result.series.imbalance, dtype=np.float64)
        imbalance[imbalance == 0] = np.nan  # nothing was computed
        panel.plot(result.series.time_s, imbalance, **_style(result))
    panel.axhline(1.0, color=_TEXT, linewidth=0.6)
    panel.set_ylabel("busiest / mean")
    panel.set_ylim(bottom=0.9)
    _label_time(panel)


def _label_time(panel: Axes) -> None:
    panel.set_xlabel("virtual time, s")


def _style(result: SystemResult) -> dict[str, Any]:
    return {
        "label": result.system,
        "color": _COLOURS.get(result.system, "#7a6ff0"),
        "linestyle": _STYLES.get(result.system, "-"),
        "linewidth": 1.6,
    }


def _svg(name: str, num_panels: int, draw: Callable[[Sequence[Axes]], None]) -> str:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"plots need matplotlib: pip install 'moeless[plot]' ({error})") from error
    settings: dict[Any, Any] = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _TEXT),
        "grid.color": _GRID,
        "axes.facecolor": "none",
        "legend.framealpha": 0.0,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(settings):
        figure = Figure(figsize=(11, 4.0), layout="constrained")
        axes = figure.subplots(1, num_panels, squeeze=False)[0]
        draw(list(axes))
        for panel in axes:
            panel.grid(alpha=0.7, linewidth=0.5)
        _add_legend(figure, axes)
        text = io.StringIO()
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return _inlined(text.getvalue(), name)


def _add_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    handles = {
        label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), fontsize="small")


def _inlined(svg: str, name: str) -> str:
    """The element alone, its names its own on the page, its stand-in colours the page's."""
    element = svg[svg.index("<svg") :].strip()
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'\bid="', f'id="{name}-', element)
    element = re.sub(r'href="#', f'href="#{name}-', element)
    element = element.replace("url(#", f"url(#{name}-")
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    return element.replace(_TEXT, "currentColor").replace(_GRID, "var(--grid)")
