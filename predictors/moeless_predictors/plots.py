"""The plot of an evaluation: recall by layer, and load error by batch size. Needs matplotlib."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from moeless_predictors.evaluation import FROZEN, SELECTED, Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {
    "popularity": "#8c8c8c",
    FROZEN: "#d0d0d0",
    "transition": "#1f77b4",
    "gate": "#d95f02",
    "history": "#1b9e77",
}


def evaluation_plot(evaluation: Evaluation) -> Figure:
    """Above, for each distance, the recall of each kind by source layer; below, its load error by batch size.

    Raises: ModuleNotFoundError that says how to install matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"plots need matplotlib: pip install 'moeless[plot]' ({error})") from error
    distances = evaluation.distances
    kinds = [kind for kind in evaluation.kinds if kind != SELECTED]
    figure = Figure(figsize=(max(6.0, 3.4 * len(distances)), 6.4), layout="constrained")
    panels = figure.subplots(2, len(distances), sharey="row", squeeze=False)
    for column, distance in enumerate(distances):
        above, below = panels[0][column], panels[1][column]
        for kind in kinds:
            measures = evaluation.of(kind, distance)
            if not measures:
                continue
            style = {"color": _COLOURS[kind], "marker": "o", "markersize": 3.5, "linewidth": 1.4}
            above.plot([m.layer for m in measures], [m.recall for m in measures], label=kind, **style)
            sizes = sorted({batch.size for m in measures for batch in m.batches})
            errors = [evaluation.mean_of_batches(kind, distance, size, "relative_l1") for size in sizes]
            below.plot(sizes, errors, label=kind, **style)
        above.set_title(f"{distance} layer{'s' if distance > 1 else ''} ahead")
        above.set_xlabel("source layer")
        above.set_ylim(0, 1)
        above.xaxis.set_major_locator(MaxNLocator(integer=True))
        below.set_xscale("log", base=2)
        below.set_xticks([batch.size for batch in evaluation.of(kinds[0], distance)[0].batches])
        below.xaxis.set_major_formatter("{x:g}")
        below.set_ylim(bottom=0)
        below.set_xlabel("tokens in the batch")
        for axes in (above, below):
            axes.grid(alpha=0.3)
    panels[0][0].set_ylabel(f"recall of the top {evaluation.top_k}")
    panels[1][0].set_ylabel("relative L1 error of the load")
    panels[1][0].legend(loc="upper right", fontsize="small")
    figure.suptitle(
        f"{evaluation.model}: {evaluation.num_experts} experts, top-{evaluation.top_k}; "
        f"{evaluation.num_test_tokens:,} tokens in {evaluation.num_test_sequences:,} sequences tested"
    )
    return figure


def save_evaluation_plot(evaluation: Evaluation, path: str | os.PathLike[str]) -> None:
    """Draw the plot into a PNG."""
    evaluation_plot(evaluation).savefig(path, format="png", dpi=140)
