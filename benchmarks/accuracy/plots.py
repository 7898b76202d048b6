"""Draw the score against what it costs, of every task of the protocol that has scores and costs.

python benchmarks/accuracy/plots.py  # writes results/accuracy/TASK.png, and TASK-epochs.png where epochs are scored
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from e3va_peft.compare.plots import label, widen

sys.path.insert(0, str(Path(__file__).parents[1]))
from readme_tables import MIB, RESULTS, TWINS, firsts, protocol

STYLES = {"e3va": ("#D55E00", "*"), "head-only": ("#000000", "D"), "full": ("#000000", "s")}
OTHERS = ("#0072B2", "o")
ALONG = [f"e3va-plus{live}" for live in ("", "-4", "-8")]  # along live blocks
COSTS: dict[str, Callable[[dict[str, Any]], float]] = {
    "MiB kept for backward (log)": lambda row: row["saved_bytes"] / MIB,
    "seconds of training": lambda row: row["all_seconds"],
}


def draw(task: str, found: Sequence[dict[str, Any]]) -> Figure:
    """Draw score against bytes kept, and against seconds, with a line along E3VA+'s live blocks."""
    figure = Figure(figsize=(11, 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for place, (name, cost) in zip(axes, COSTS.items(), strict=True):
        for row in found:
            color, marker = style_of(row["method"])
            place.errorbar(cost(row), row["mean"], row["deviation"], fmt=marker, color=color, markersize=7, capsize=2)
        own = sorted((cost(row), row["mean"]) for row in found if row["method"] in ALONG)
        if own:
            place.plot(*zip(*own, strict=True), color=STYLES["e3va"][0], linewidth=0.8, alpha=0.5)
        place.set_xlabel(name)
        place.grid(color="0.92", which="both")
        place.set_axisbelow(True)
        place.margins(x=0.12)
    axes[0].set_xscale("log")
    axes[0].set_ylabel(f"{task}: {found[0]['metric'].replace('_', ' ')}")
    axes[1].set_xlim(left=0)
    widen(axes[0])
    for place, cost in zip(axes, COSTS.values(), strict=True):
        label(place, [(row["method"], cost(row), row["mean"], style_of(row["method"])[0]) for row in found])
    return figure


def draw_epochs(task: str, found: Sequence[dict[str, Any]]) -> Figure:
    """Draw the score after each epoch, one line per method."""
    figure = Figure(figsize=(6, 4.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ends = []
    for row in found:
        color, marker = style_of(row["method"])
        epochs, scores = zip(*((each["epoch"], each["score"]) for each in row["curve"]), strict=True)
        axes.plot(epochs, scores, color=color, marker=marker, linewidth=1)
        ends.append((row["method"], epochs[-1], scores[-1], color))
    axes.set_xlabel("epochs")
    axes.set_ylabel(f"{task}: {found[0]['metric'].replace('_', ' ')}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="0.92")
    axes.margins(x=0.2)
    widen(axes)
    label(axes, ends)
    return figure


def style_of(method: str) -> tuple[str, str]:
    """Return colour and marker of a method."""
    return STYLES.get("e3va" if method.startswith("e3va") else method.removesuffix("-cached"), OTHERS)


def main() -> None:
    """Draw what there is."""
    for path in sorted((RESULTS / "accuracy").glob("*-cost.json")):
        task = path.stem.removesuffix("-cost")
        found = protocol(task)
        draw(task, found).savefig(RESULTS / "accuracy" / f"{task}.png")
        if curves := [row for row in found if "curve" in row and row["method"] not in TWINS]:
            draw_epochs(task, curves).savefig(RESULTS / "accuracy" / f"{task}-epochs.png")
        print(f"{task}: {firsts(found)}")


if __name__ == "__main__":
    main()
