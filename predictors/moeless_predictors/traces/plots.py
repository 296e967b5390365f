"""The heat map of a routing trace: which experts of which layers take the load. Needs matplotlib."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from moeless_predictors.traces.routing import RoutingTrace
from moeless_predictors.traces.statistics import expert_loads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_COLOUR_PERCENTILE = 99.5


def load_heatmap(trace: RoutingTrace) -> Figure:
    """Layers × experts; the colour is the expert's load over the layer's mean: 1 is an even share.

    The scale ends at 2 or, if that is more, where all but the highest 0.5 % of the cells are below.

    Raises: ModuleNotFoundError that says how to install matplotlib.
    """
    try:
        from matplotlib.colors import TwoSlopeNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"plots need matplotlib: pip install 'moeless[plot]' ({error})") from error
    load_LE = expert_loads(trace)
    relative_LE = load_LE / load_LE.mean(axis=1, keepdims=True)
    top = max(2.0, float(np.percentile(relative_LE, _MAX_COLOUR_PERCENTILE)))
    width, height = np.clip(2.5 + 0.16 * trace.num_experts, 7, 18), np.clip(1.8 + 0.16 * trace.num_layers, 3.5, 12)
    figure = Figure(figsize=(float(width), float(height)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        relative_LE,
        norm=TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=top),
        cmap="RdBu_r",
        aspect="auto",
        interpolation="nearest",
        origin="lower",
    )
    for axis, count in ((axes.xaxis, trace.num_experts), (axes.yaxis, trace.num_layers)):
        axis.set_major_locator(
            MaxNLocator(nbins=min(count, 16), integer=True, min_n_ticks=1, steps=[1, 2, 4, 5, 8, 10])
        )
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer")
    axes.set_title(
        f"{trace.metadata.model}: load of {trace.num_experts} experts, top-{trace.top_k}, {trace.num_tokens:,} tokens"
    )
    is_cut = relative_LE.max() > top
    bar = figure.colorbar(image, ax=axes, extend="max" if is_cut else "neither", pad=0.01)
    bar.set_label("load / even load")
    bar.set_ticks([0.0, 0.5, 1.0, *np.linspace(1, top, 5)[1:]], labels=None)
    bar.ax.yaxis.set_major_formatter("{x:.1f}")
    return figure


def save_load_heatmap(trace: RoutingTrace, path: str | os.PathLike[str]) -> None:
    """Draw the heat map into a PNG."""
    load_heatmap(trace).savefig(path, format="png", dpi=140)
