"""Draw the pictures of docs/architecture.md: the way of one request, and one tick.

`python -m scripts.draw_diagrams` writes docs/images/*.svg. A test draws them again and compares.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FOLDER = Path(__file__).parents[1] / "docs" / "images"
_INK, _PAPER, _PROCESS, _BOX = "#1b2a2f", "#ffffff", "#eef4f4", "#d3e6e4"
_ROW, _COLUMN, _GAP = 1.15, 3.7, 1.15
"""Distance of rows and columns, and the room between boxes of a row, in inches."""


@dataclass(frozen=True)
class Box:
    """A step: what happens, and the file where."""

    name: str
    what: str
    file: str
    column: float
    row: float


@dataclass(frozen=True)
class Frame:
    """A process around boxes, from one corner to the other, in columns and rows."""

    title: str
    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Arrow:
    """From one box to another, and what goes along it."""

    start: str
    end: str
    label: str = ""
    bend: float = 0.0


@dataclass(frozen=True)
class Diagram:
    """A picture with a title for readers who cannot see it."""

    name: str
    title: str
    frames: tuple[Frame, ...]
    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]


REQUEST = Diagram(
    name="request",
    title="The way of one request",
    frames=(
        Frame("gateway process", 0, 0, 0, 3),
        Frame("engine process", 1, 0, 1, 4),
        Frame("worker process", 2, 1, 2, 3),
    ),
    boxes=(
        Box("in", "HTTP request: key, size", "gateway/middleware.py", 0, 0),
        Box("checked", "fields, limits, template, tokens", "gateway/admission.py", 0, 1),
        Box("streams", "one stream per sequence", "gateway/streams.py", 0, 2),
        Box("out", "events or a whole answer", "gateway/responses.py", 0, 3),
        Box("submit", "queue, or refuse when full", "deployments/engine.py", 1, 0),
        Box("step", "batch sequences, run a step", "engine/transformers/continuous.py", 1, 1),
        Box("layer", "at each MoE layer: gate's choice", "engine/transformers/experts.py", 1, 2),
        Box("dispatch", "split tokens over instances", "dispatch/dispatcher.py", 1, 3),
        Box("sample", "pick the next tokens", "engine/transformers/sampling.py", 1, 4),
        Box("serve calls", "take calls of all engines", "dispatch/server.py", 2, 1),
        Box("pool", "instances, cold starts", "functions/pool.py", 2, 2),
        Box("compute", "experts' feed-forward", "functions/feed_forward.py", 2, 3),
    ),
    arrows=(
        Arrow("in", "checked"),
        Arrow("checked", "streams"),
        Arrow("streams", "submit", "Serve handle"),
        Arrow("submit", "step"),
        Arrow("step", "layer"),
        Arrow("layer", "dispatch"),
        Arrow("dispatch", "serve calls", "one message per\nlayer and worker"),
        Arrow("serve calls", "pool"),
        Arrow("pool", "compute"),
        Arrow("compute", "dispatch", "partial sums", 0.25),
        Arrow("dispatch", "sample", "after the last layer"),
        Arrow("sample", "out", "token channel:\none message per step"),
    ),
)

TICK = Diagram(
    name="tick",
    title="One tick: from what was seen to a new plan",
    frames=(
        Frame("pure: no clock, no input or output", 0, 0, 2, 1),
        Frame("applied in this order", 0, 2.35, 2, 2.35),
    ),
    boxes=(
        Box("observe", "load of past windows", "planning/observation.py", 0, 0),
        Box("forecast", "load of the coming window", "planning/forecasts.py", 1, 0),
        Box("policy", "bounds, targets, budget", "core/policy/tree.py", 2, 0),
        Box("scale", "instances of each function", "planning/scale/replicas.py", 2, 1),
        Box("place", "a worker for each instance", "planning/place/place.py", 1, 1),
        Box("plan", "counts, workers, shares", "core/plan.py", 0, 1),
        Box("start", "start what is new", "planning/rollout.py", 0, 2.35),
        Box("publish", "publish the routing table", "core/routing_table.py", 1, 2.35),
        Box("drain", "drain, then evict", "planning/rollout.py", 2, 2.35),
    ),
    arrows=(
        Arrow("observe", "forecast"),
        Arrow("forecast", "scale"),
        Arrow("policy", "scale"),
        Arrow("scale", "place"),
        Arrow("place", "plan"),
        Arrow("plan", "start"),
        Arrow("start", "publish"),
        Arrow("publish", "drain", "acknowledged\nby engines"),
    ),
)

DIAGRAMS = (REQUEST, TICK)


def draw(diagram: Diagram) -> str:
    """The picture as SVG; the same text each time, whatever the machine's fonts."""
    columns = max(frame.right for frame in diagram.frames) + 1
    rows = max(frame.bottom for frame in diagram.frames) + 1
    width, height = columns * _COLUMN, rows * _ROW + 0.35
    settings: dict[Any, Any] = {
        "svg.hashsalt": diagram.name,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(width, height), facecolor=_PAPER)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        axes.axis("off")
        for frame in diagram.frames:
            _draw_frame(axes, frame)
        centres = {box.name: _draw_box(axes, box) for box in diagram.boxes}
        for arrow in diagram.arrows:
            _draw_arrow(axes, centres[arrow.start], centres[arrow.end], arrow)
        text = io.StringIO()
        FigureCanvasSVG(figure)
        figure.savefig(text, format="svg", metadata={"Title": diagram.title, "Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _draw_frame(axes: mpl.axes.Axes, frame: Frame) -> None:
    left, top = frame.left * _COLUMN + 0.4, frame.top * _ROW + 0.08
    right, bottom = (frame.right + 1) * _COLUMN - 0.4, (frame.bottom + 1) * _ROW + 0.22
    axes.add_patch(
        FancyBboxPatch(
            (left, top), right - left, bottom - top, boxstyle="round,pad=0,rounding_size=0.08", fc=_PROCESS, ec="none"
        )
    )
    axes.text(left + 0.12, top + 0.17, frame.title, color=_INK, ha="left", va="center", weight="bold")


def _draw_box(axes: mpl.axes.Axes, box: Box) -> tuple[float, float]:
    x, y = (box.column + 0.5) * _COLUMN, (box.row + 0.5) * _ROW + 0.25
    width, height = _COLUMN - _GAP, _ROW - 0.45
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.06",
            fc=_BOX,
            ec=_INK,
            lw=0.6,
        )
    )
    axes.text(x, y - 0.13, box.what, color=_INK, ha="center", va="center")
    axes.text(x, y + 0.15, box.file, color=_INK, ha="center", va="center", family="monospace", fontsize=7)
    return x, y


def _draw_arrow(axes: mpl.axes.Axes, start: tuple[float, float], end: tuple[float, float], arrow: Arrow) -> None:
    half_width, half_height = (_COLUMN - _GAP) / 2, (_ROW - 0.45) / 2
    (x0, y0), (x1, y1) = start, end
    if abs(x1 - x0) > _COLUMN / 2:  # sideways: from edge to edge
        side = 1 if x1 > x0 else -1
        tail, head = (x0 + side * half_width, y0), (x1 - side * half_width, y1)
    else:
        side = 1 if y1 > y0 else -1
        tail, head = (x0, y0 + side * half_height), (x1, y1 - side * half_height)
    axes.add_patch(
        FancyArrowPatch(
            tail,
            head,
            arrowstyle="-|>",
            mutation_scale=9,
            connectionstyle=f"arc3,rad={arrow.bend}",
            color=_INK,
            lw=0.8,
            shrinkA=0,
            shrinkB=0,
        )
    )
    if arrow.label:
        x, y = (tail[0] + head[0]) / 2, (tail[1] + head[1]) / 2 + arrow.bend * 1.2
        axes.text(
            x,
            y,
            arrow.label,
            color=_INK,
            ha="center",
            va="center",
            fontsize=7,
            bbox={"facecolor": _PAPER, "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
        )


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for diagram in DIAGRAMS:
        (FOLDER / f"{diagram.name}.svg").write_text(draw(diagram), encoding="utf-8")


if __name__ == "__main__":
    main()
