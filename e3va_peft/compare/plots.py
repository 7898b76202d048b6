"""A metric against what it costs, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure  # not pyplot: it keeps figures alive and wants a display
from matplotlib.transforms import Bbox

from e3va_peft.files import save_figure

# Okabe and Ito's colours, which the colour-blind tell apart; the markers say the same.
_OURS = ("#D55E00", "*", 13)
_STYLES = {"e3va": _OURS, "e3va-plus": _OURS, "full": ("#000000", "s", 7), "head-only": ("#000000", "D", 6)}
_OTHERS = ("#0072B2", "o", 7)
_SPAN = 0.1  # of the metric at least: a small gain shall look small
_DISTANCES = (9, 20, 32, 46)  # points between a marker and its label: near first
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))


def draw_tradeoff(
    places: Sequence[tuple[str, float, float | None]], costs: Sequence[float], path: Path, cost: str, metric: str
) -> None:
    """Draw a metric against a cost into a PNG, one labelled point per method; up and left is better.

    The metric's axis spans at least 0.1.

    Args:
        places: Name, mean and standard deviation (None: not known) of each method.
        costs: Where each method is on the x axis, which begins at 0.
        path: The PNG; replaced where it exists.
        cost: Name of the costs, with their unit.
        metric: Name of the metric, which is between 0 and 1.
    """
    figure = Figure(figsize=(7.5, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(cost)
    axes.set_ylabel(metric)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    for (name, mean, deviation), x in zip(places, costs, strict=True):
        color, marker, size = _style(name)
        axes.errorbar(x, mean, deviation, fmt=marker, color=color, markersize=size, capsize=3, elinewidth=1)
    axes.set_xlim(0, 1.12 * max(costs))
    widen(axes)
    colors = [_style(name)[0] for name, _, _ in places]
    label(axes, [(name, x, mean, color) for (name, mean, _), x, color in zip(places, costs, colors, strict=True)])
    save_figure(figure, path)


def _style(name: str) -> tuple[str, str, float]:
    """Colour, marker and size of a method, whatever its options."""
    return _STYLES.get(name.partition(":")[0], _OTHERS)


def widen(axes: Axes) -> None:
    """Let the axis of a metric span at least 0.1, around what is drawn."""
    axes.margins(y=0.12)
    low, high = axes.get_ylim()
    spare = max(0.0, _SPAN - (high - low)) / 2
    axes.set_ylim(low - spare, high + spare)


def label(axes: Axes, points: Sequence[tuple[str, float, float, str]], size: float = 9) -> None:
    """Write each point's name where it covers neither a marker, another name nor the legend, near before far.

    Args:
        axes: Where the points are drawn. Their limits, and the layout of the figure, are fixed from here on.
        points: Name, x, y and colour of each.
        size: Of the letters, in points.
    """
    figure: Any = axes.figure
    figure.draw_without_rendering()  # fixes the axes, on which positions in pixels depend
    figure.set_layout_engine("none")
    centres = [axes.transData.transform((x, y)) for _, x, y, _ in points]
    taken = [Bbox.from_extents(x - 12, y - 12, x + 12, y + 12) for x, y in centres]
    if (legend := axes.get_legend()) is not None:
        taken.append(legend.get_window_extent())
    for name, x, y, color in points:
        text = axes.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=size, color=color)
        choices = [
            (_place(text, dx * distance, dy * distance), (dx * distance, dy * distance))
            for distance in _DISTANCES
            for dx, dy in _DIRECTIONS
        ]
        frame = axes.get_window_extent()
        costs = [_covered(box, taken, frame) for box, _ in choices]
        box, offset = choices[costs.index(min(costs))]
        _place(text, *offset)
        if max(abs(value) for value in offset) > _DISTANCES[0]:
            axes.annotate(
                "", (x, y), xytext=offset, textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4},
            )  # fmt: skip
        taken.append(box)


def _place(text: Any, dx: float, dy: float) -> Bbox:
    """Move a label, and return the box that it covers in pixels."""
    text.set_position((dx, dy))
    text.set_horizontalalignment("left" if dx > 0 else "right" if dx < 0 else "center")
    text.set_verticalalignment("bottom" if dy > 0 else "top" if dy < 0 else "center")
    box: Bbox = text.get_window_extent()
    return box


def _covered(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
    """Return the area in square pixels that a label shares with others or that sticks out of the frame."""
    shared = (Bbox.intersection(box, other) for other in taken)
    inside = Bbox.intersection(box, frame)
    outside = box.width * box.height - (inside.width * inside.height if inside is not None else 0)
    return sum(overlap.width * overlap.height for overlap in shared if overlap is not None) + outside
