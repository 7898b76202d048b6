"""Draw the score against what it costs, of every task of the protocol that has scores and costs.

python benchmarks/accuracy/plots.py  # writes results/accuracy/TASK.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from readme_tables import MIB, RESULTS, firsts, protocol

STYLES = {"e3va": ("#D55E00", "*"), "head-only": ("#000000", "D"), "full": ("#000000", "s")}
OTHERS = ("#0072B2", "o")
ALONG = [f"e3va-plus{live}" for live in ("", "-4", "-8")]  # along live blocks


def draw(task: str, found: Sequence[dict[str, Any]]) -> None:
    """Draw score against bytes kept, and against seconds, with a line along E3VA+'s live blocks."""
    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    costs = {
        "MiB kept for backward (log)": lambda row: row["saved_bytes"] / MIB,
        "seconds of training": lambda row: row["all_seconds"],
    }
    for place, (name, cost) in zip(axes, costs.items(), strict=True):
        for row in found:
            method = row["method"]
            kind = "e3va" if method.startswith("e3va") else method.removesuffix("-cached")
            color, marker = STYLES.get(kind, OTHERS)
            place.errorbar(cost(row), row["mean"], row["deviation"], fmt=marker, color=color, markersize=7, capsize=2)
            place.annotate(method, (cost(row), row["mean"]), xytext=(6, 3), textcoords="offset points", fontsize=7,
                           color=color)  # fmt: skip
        own = sorted((cost(row), row["mean"]) for row in found if row["method"] in ALONG)
        if own:
            place.plot(*zip(*own, strict=True), color=STYLES["e3va"][0], linewidth=0.8, alpha=0.5)
        place.set_xlabel(name)
        place.grid(color="0.92", which="both")
        place.set_axisbelow(True)
        place.margins(x=0.18)
    axes[0].set_xscale("log")
    axes[0].set_ylabel(f"{task}: {found[0]['metric'].replace('_', ' ')}")
    figure.savefig(RESULTS / "accuracy" / f"{task}.png")


def main() -> None:
    """Draw what there is."""
    for path in sorted((RESULTS / "accuracy").glob("*-cost.json")):
        task = path.stem.removesuffix("-cost")
        found = protocol(task)
        draw(task, found)
        print(f"{task}: {firsts(found)}")


if __name__ == "__main__":
    main()
