"""Draw what every method keeps for backward against what it takes, from `memory.json` and `speed.json`.

    python benchmarks/frontier.py  # writes results/frontier.png, and frontier-more.png of further models

One point a method: the share of the backbone's bytes that is kept, (method - head only) / (full - head only), and the
time of the backbone part of a step as a multiple of head-only training's.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from readme_tables import rows
from record import RESULTS

from e3va_peft.compare.plots import label

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
    """Draw one backbone, but for the names of its points."""
    axes.axhline(1, color="0.6", linestyle=":", linewidth=1, label="head only, nothing kept")
    for kind, (color, marker, size) in STYLES.items():
        mine = [place for method, place in found.items() if kind_of(method) == kind]
        if mine:
            axes.plot(*zip(*mine, strict=True), linestyle="", color=color, marker=marker, markersize=size, label=kind)
    axes.set_xscale("log")
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("kept of the backbone's bytes, % (log)")
    axes.set_ylabel("time of a step, head only = 1")
    axes.grid(color="0.92", which="both")
    axes.set_axisbelow(True)
    axes.margins(x=0.16)
    axes.set_ylim(0, 1.25 * max(time for _, time in found.values()))  # the legend is on top


def name_points(axes: Axes, found: dict[str, tuple[float, float]]) -> None:
    """Write the names of the points of a backbone, the upper ones first."""
    points = [
        (method.removeprefix("E3VA, ").replace(" + checkpointing", " + ckpt"), *place, STYLES[kind_of(method)][0])
        for method, place in found.items()
    ]
    label(axes, sorted(points, key=lambda point: -point[2]))
    for text in axes.texts:
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])  # over the line of head only


def picture(recorded: dict[str, dict[str, tuple[float, float]]]) -> Figure:
    """Draw backbones, one below the other, as wide as a page."""
    figure = Figure(figsize=(9, 5.4 * len(recorded)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(recorded), 1, squeeze=False)[:, 0]
    for axes, (title, found) in zip(grid, recorded.items(), strict=True):
        draw(axes, title, found)
    grid[0].legend(frameon=False, fontsize=9, ncols=2, loc="upper right")
    for axes, found in zip(grid, recorded.values(), strict=True):
        name_points(axes, found)
    return figure


def main() -> None:
    """Draw the pictures."""
    first, *more = points().items()
    picture(dict([first])).savefig(RESULTS / "frontier.png")
    picture(dict(more)).savefig(RESULTS / "frontier-more.png")


if __name__ == "__main__":
    main()
