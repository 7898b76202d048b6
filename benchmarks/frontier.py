"""Draw what every method keeps for backward against what it takes, from `memory.json` and `speed.json`.

    python benchmarks/frontier.py  # writes results/frontier.png

One point a method: the share of the backbone's bytes that is kept, (method - head only) / (full - head only), and the
time of the backbone part of a step as a multiple of head-only training's.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from readme_tables import rows
from record import RESULTS

# Okabe and Ito's colours, which the colour-blind tell apart; the markers say the same.
STYLES = {
    "E3VA, no live block": ("#D55E00", "*", 12),
    "E3VA, live blocks": ("#E69F00", "P", 8),
    "LoRA": ("#0072B2", "o", 7),
    "AdaptFormer, Mona": ("#009E73", "^", 7),
    "full": ("#000000", "s", 7),
}


def kind_of(method: str) -> str:
    """Return the group that a method is drawn in."""
    if method.startswith("E3VA"):
        return "E3VA, live blocks" if "live" in method else "E3VA, no live block"
    return next((kind for kind in STYLES if method.split(" +")[0] in kind), "full")


def points() -> dict[str, dict[str, tuple[float, float]]]:
    """Return for each backbone: method -> (share kept in %, time over head only's)."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    memory, speed = rows("memory"), [row for row in rows("speed") if row["setting"] != "inference"]
    titles = [list(dict.fromkeys(row["setting"] for row in recorded)) for recorded in (memory, speed)]
    for kept, timed in zip(*titles, strict=True):
        saved = {row["method"]: row["saved_bytes"] for row in memory if row["setting"] == kept}
        seconds = {row["method"]: row["seconds"] for row in speed if row["setting"] == timed}
        whole = saved["full"] - saved["head only"]
        found[timed] = {
            method: (100 * (saved[method] - saved["head only"]) / whole, seconds[method] / seconds["head only"])
            for method in seconds
            if method != "head only"
        }
    return found


def draw(axes: Axes, title: str, found: dict[str, tuple[float, float]]) -> None:
    """Draw one backbone."""
    axes.axhline(1, color="0.6", linestyle=":", linewidth=1)
    axes.annotate("head only, nothing kept", (0.01, 1), xycoords=("axes fraction", "data"), fontsize=7, color="0.4",
                  xytext=(0, 3), textcoords="offset points")  # fmt: skip
    for kind, (color, marker, size) in STYLES.items():
        mine = {method: place for method, place in found.items() if kind_of(method) == kind}
        axes.plot(
            *zip(*mine.values(), strict=True), linestyle="", color=color, marker=marker, markersize=size, label=kind
        )
        for method, place in mine.items():
            text: Any = method.removeprefix("E3VA, ").replace(" + checkpointing", " + ckpt")
            below = place[1] < 1.3 and "live" not in method  # many are there
            options: Any = {"rotation": -40, "va": "top", "xytext": (1, -5)} if below else {"xytext": (6, 1)}
            axes.annotate(text, place, textcoords="offset points", fontsize=6.5, color=color, **options)
    axes.set_xscale("log")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("kept of the backbone's bytes, % (log)")
    axes.grid(color="0.92", which="both")
    axes.set_axisbelow(True)
    axes.margins(0.15)
    axes.set_ylim(bottom=0.4)


def main() -> None:
    """Draw the picture."""
    recorded = points()
    figure = Figure(figsize=(5.4 * len(recorded), 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, len(recorded), squeeze=False)[0]
    for axes, (title, found) in zip(grid, recorded.items(), strict=True):
        draw(axes, title, found)
    grid[0].set_ylabel("time of a step, head only = 1")
    grid[0].legend(frameon=False, fontsize=8)
    figure.savefig(RESULTS / "frontier.png")


if __name__ == "__main__":
    main()
