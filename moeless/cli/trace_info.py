"""`moeless trace info`: check a trace and print its statistics. docs/traces.md."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from moeless.cli._console import one_line_errors, say, stdout
from moeless.cli._extras import require_extra
from moeless.cli._options import input_file, output_file
from moeless.core.errors import ConfigError

if TYPE_CHECKING:
    from moeless_predictors.traces import ArrivalTrace, RoutingTrace
    from moeless_predictors.traces.statistics import ArrivalStatistics, RoutingStatistics


def info_command(
    trace: Annotated[Path, typer.Argument(callback=input_file, help="Trace that `import` or `record` wrote.")],
    json_: Annotated[
        Path | None, typer.Option("--json", callback=output_file, help="Write the figures to this file.")
    ] = None,
    heatmap: Annotated[
        Path | None, typer.Option(callback=output_file, help="Draw the load of layers x experts into this PNG.")
    ] = None,
) -> None:
    """Check a trace to the last byte and print its statistics: skew, overlap and dependency, or rate and lengths."""
    require_extra("plan", "moeless trace info")
    if heatmap is not None:
        require_extra("plot", "--heatmap")
    from moeless_predictors.traces import ArrivalTrace, RoutingTrace, kind_of
    from moeless_predictors.traces.statistics import arrival_statistics, routing_statistics

    with one_line_errors():
        figures: dict[str, Any]
        if kind_of(trace) == "arrivals":
            if heatmap is not None:
                raise ConfigError(f"--heatmap needs a routing trace, but {trace} holds arrivals")
            arrivals = ArrivalTrace.open(trace)
            of_arrivals = arrival_statistics(arrivals)
            figures = {"kind": "arrivals", "source": arrivals.source, **asdict(of_arrivals)}
            say(f"{trace}: {summary(arrivals)}")
            stdout.print(arrivals_table(of_arrivals))
        else:
            routing = RoutingTrace.open(trace)
            of_routing = routing_statistics(routing)
            figures = {"kind": "routing", **asdict(routing.metadata), **asdict(of_routing)}
            say(f"{trace}: {summary(routing)}")
            say(_columns_line(routing))
            stdout.print(routing_table(of_routing))
            if heatmap is not None:
                from moeless_predictors.traces.plots import save_load_heatmap

                save_load_heatmap(routing, heatmap)
                say(f"heat map: {heatmap}")
        if json_ is not None:
            json_.write_text(json.dumps(figures, indent=2) + "\n")
            say(f"figures: {json_}")


def routing_table(statistics: RoutingStatistics) -> Table:
    """One row for each layer, and their means."""
    names = ("layer", "max/mean", "CV", "Gini", "unused", "overlap", "by chance", "tells next")
    table = Table(
        *names,
        title="load per expert, and what a token's experts tell of the next token's and the next layer's",
        caption="overlap: share of its experts that a token has in common with the token before, and by chance.\n"
        "tells next: adjusted mutual information of the first choices here and one layer on.",
    )
    rows = [
        (
            layer.max_to_mean,
            layer.cv,
            layer.gini,
            layer.num_unused,
            layer.adjacent_overlap,
            layer.chance_overlap,
            layer.next_layer_dependency,
        )
        for layer in statistics.layers
    ]
    for layer, row in zip(statistics.layers, rows, strict=True):
        table.add_row(str(layer.layer), *map(_cell, row), end_section=layer is statistics.layers[-1])
    known = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
    table.add_row("mean", *(_cell(sum(column) / len(column) if column else None) for column in known))
    return table


def arrivals_table(statistics: ArrivalStatistics) -> Table:
    """Rate, burstiness and the percentiles of the lengths."""
    table = Table("what", "value", title="arrivals")
    table.add_row("requests", str(statistics.num_requests))
    table.add_row("duration", f"{statistics.duration_s:.1f} s")
    table.add_row("requests a second", _cell(statistics.requests_per_s))
    table.add_row("CV of gaps (Poisson: 1)", _cell(statistics.gap_cv))
    for name, percentiles, total in (
        ("prompt", statistics.prompt_tokens, statistics.num_prompt_tokens),
        ("output", statistics.output_tokens, statistics.num_output_tokens),
    ):
        spread = ", ".join(f"p{percent} {value:.0f}" for percent, value in percentiles.items())
        table.add_row(f"{name} tokens", f"{spread}; {total:,} in all")
    if statistics.shared_block_share is not None:
        table.add_row("prompt blocks seen before", f"{statistics.shared_block_share:.1%}")
    return table


def summary(trace: RoutingTrace | ArrivalTrace) -> str:
    """One line on a trace: its model and size, or its number of requests."""
    from moeless_predictors.traces import ArrivalTrace

    if isinstance(trace, ArrivalTrace):
        return f"{trace.num_requests:,} requests in {trace.duration_s:,.1f} s"
    return (
        f"{trace.metadata.model}, {trace.num_layers} MoE layers x {trace.num_experts} experts, top-{trace.top_k}; "
        f"{trace.num_tokens:,} tokens in {trace.num_sequences:,} sequences"
    )


def _columns_line(trace: RoutingTrace) -> str:
    import numpy as np

    from moeless_predictors.traces import PREFILL

    lengths_S = np.diff(trace.sequence_starts_S1)
    num_prefill = int((trace.phase_T == PREFILL).sum())
    optional = [
        name
        for name, column in (("token ids", trace.token_ids_T), ("steps", trace.steps_T), ("labels", trace.labels))
        if column is not None
    ]
    if trace.hidden_layers:
        layers = ", ".join(map(str, trace.hidden_layers))
        optional.append(f"hidden states of {trace.metadata.hidden_size} values at layers {layers}")
    return (
        f"{num_prefill:,} prefill and {trace.num_tokens - num_prefill:,} decode tokens; sequences of {lengths_S.min()} "
        f"to {lengths_S.max()}, median {np.median(lengths_S):.0f}; with {', '.join(optional) or 'no optional columns'}"
        + (f"; source: {trace.metadata.source}" if trace.metadata.source else "")
    )


def _cell(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
