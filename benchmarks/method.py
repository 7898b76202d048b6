"""Draw the method, and the memory of a training step, for README.md and docs/: light and dark.

python benchmarks/method.py  # writes docs/pictures/method-{light,dark}.svg
python benchmarks/method.py memory  # and memory-{light,dark}.svg, from steps of Swin-T, in a minute
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
# ink, faint ink, frozen fill, highway, live block, gradient: Okabe and Ito's colours, lighter on dark ground
THEMES = {
    "light": {"ink": "#24292f", "faint": "#6e7781", "frozen": "#e6eaef", "way": "#D55E00", "live": "#0072B2"},
    "dark": {"ink": "#e6edf3", "faint": "#9198a1", "frozen": "#30363d", "way": "#f58a42", "live": "#56B4E9"},
}
BLOCKS = (1.9, 3.7, 5.5, 7.3)  # left edges; the last one is drawn as a live block
WIDTH, HEIGHT = 1.2, 0.8
STREAM, ADAPTERS, LANE = 3.0, 1.5, 0.4  # heights
STYLES = {"full": "-", "LoRA": "--", "LoRA + checkpointing": ":", "E3VA": "-", "E3VA, recompute": "--"}
POINTS = 300  # of a curve of memory


def canvas(size: tuple[float, float]) -> Figure:
    """Begin a picture without a background."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    return figure


def save(figure: Figure, name: str) -> None:
    """Write a picture that is the same bytes each time."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})


class Drawing:
    """The method, in the colours of a theme."""

    def __init__(self, colors: dict[str, str]) -> None:
        self.colors = colors
        self.figure = canvas((10, 3.9))
        self.axes = self.figure.subplots()
        self.axes.set(xlim=(-0.1, 11.9), ylim=(-0.55, 4.35))
        self.axes.set_axis_off()

    def box(self, left: float, middle: float, width: float, height: float, text: str, **style: Any) -> None:
        """Draw a box with a text in it."""
        style = {"facecolor": self.colors["frozen"], "edgecolor": self.colors["faint"], "linewidth": 1.2} | style
        color = style.pop("color", self.colors["ink"])
        corner = (left, middle - height / 2)
        self.axes.add_patch(
            FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.08", zorder=2, **style)
        )
        self.axes.text(left + width / 2, middle, text, ha="center", va="center", color=color, fontsize=12, zorder=3)

    def arrow(self, start: tuple[float, float], end: tuple[float, float], color: str, **style: Any) -> None:
        """Draw an arrow."""
        style = {"arrowstyle": "-|>", "mutation_scale": 11, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0} | style
        self.axes.add_patch(FancyArrowPatch(start, end, color=self.colors[color], zorder=1, **style))

    def text(self, x: float, y: float, text: str, color: str, **style: Any) -> None:
        """Write a text."""
        self.axes.text(x, y, text, color=self.colors[color], **({"fontsize": 12, "va": "center"} | style))

    def plus(self, x: float, y: float, color: str) -> None:
        """Draw a sum."""
        self.axes.plot([x], [y], "o", markersize=13, color=self.colors[color], zorder=4)
        self.axes.text(x, y - 0.015, "+", ha="center", va="center", color="white", fontsize=12, zorder=5)

    def draw(self) -> Figure:
        """Draw the backbone, the highway below it, and the gradient's way back."""
        way = {"facecolor": "none", "edgecolor": self.colors["way"], "linewidth": 1.6, "color": self.colors["way"]}
        self.text(0.1, STREAM, "image", "ink", ha="left")
        self.arrow((0.85, STREAM), (BLOCKS[0], STREAM), "ink")
        for i, left in enumerate(BLOCKS):
            last = i + 1 == len(BLOCKS)
            live = {"edgecolor": self.colors["live"], "linestyle": "--", "linewidth": 2} if last else {}
            self.box(left, STREAM, WIDTH, HEIGHT, "block", **live)
            self.arrow((left + WIDTH, STREAM), (BLOCKS[i + 1] if not last else 9.38, STREAM), "ink")
            middle = left + WIDTH / 2
            self.arrow((middle, STREAM - HEIGHT / 2), (middle, ADAPTERS + 0.3), "way")
            self.box(left + 0.1, ADAPTERS, WIDTH - 0.2, 0.6, "adapter", **way)
            self.arrow((middle, ADAPTERS - 0.3), (middle, LANE + 0.16), "way")
            self.plus(middle, LANE, "way")
            if not last:
                self.arrow((middle + 0.18, LANE), (BLOCKS[i + 1] + WIDTH / 2 - 0.16, LANE), "way", linewidth=2.2)
        self.text(BLOCKS[0] + WIDTH / 2 + 0.1, (STREAM - HEIGHT / 2 + ADAPTERS + 0.3) / 2, "tap", "way")
        end = BLOCKS[-1] + WIDTH / 2
        self.axes.plot([end + 0.18, 9.55, 9.55], [LANE, LANE, 1.2], color=self.colors["way"], linewidth=2.2, zorder=1)
        self.arrow((9.55, 1.1), (9.55, STREAM - 0.2), "way", linewidth=2.2)
        self.plus(9.55, STREAM, "way")
        self.arrow((9.72, STREAM), (10.2, STREAM), "ink")
        self.box(10.2, STREAM, 1.5, HEIGHT, "norm, head", **way)
        self.text(BLOCKS[0], 4.1, "frozen backbone: runs as inference", "faint", ha="left")
        self.text(BLOCKS[-1] + WIDTH / 2, 3.66, "live, if you like", "live", ha="center", fontsize=11)
        self.text(0.1, 0.98, "highway:\ntrained", "way", ha="left")
        self.text(BLOCKS[0] + WIDTH + 0.3, LANE - 0.28, "lane", "way", ha="center")
        self.arrow((10.95, STREAM - 0.55), (2.5, -0.3), "faint", linestyle=":", linewidth=1.8,
                   connectionstyle="angle,angleA=-90,angleB=0,rad=12")  # fmt: skip
        self.text(8.2, -0.02, "gradient: here only", "faint", ha="right")
        return self.figure


def alive(method: str) -> list[float]:
    """MiB beyond the weights in each operation of a step of Swin-T, 224 px, batch 8."""
    import torch
    from transformers import SwinConfig, SwinForImageClassification

    from e3va_peft.meter import live_bytes
    from e3va_peft.methods import adapt, settings

    torch.manual_seed(0)
    model = SwinForImageClassification(SwinConfig(num_labels=10))
    model = adapt(model, settings()[method]).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = {"pixel_values": torch.randn(8, 3, 224, 224), "labels": torch.arange(8)}

    def run() -> None:
        model(**batch).loss.backward()
        optimizer.step()

    run()  # the optimizer's state comes with the first step
    optimizer.zero_grad()
    sizes = live_bytes(run, model)
    places = [i * len(sizes) // POINTS for i in range(POINTS + 1)]
    return [max(sizes[a:b]) / 2**20 for a, b in pairwise(places)]


def memory(colors: dict[str, str], curves: dict[str, list[float]]) -> Figure:
    """Draw what is alive through a step, a line a method."""
    figure = canvas((9, 4))
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    for method, values in curves.items():
        color = colors["way"] if method.startswith("E3VA") else colors["ink" if method == "full" else "live"]
        places = [100 * i / len(values) for i in range(len(values))]
        axes.plot(places, values, STYLES[method], color=color, linewidth=1.4, label=method)
    axes.set_xlabel("operations of the step, %", color=colors["ink"])
    axes.set_ylabel("MiB beyond the weights", color=colors["ink"])
    axes.set(xlim=(0, 100), ylim=(0, None))
    axes.tick_params(colors=colors["ink"])
    for side, spine in axes.spines.items():
        spine.set_color(colors["faint"])
        spine.set_visible(side in ("left", "bottom"))
    axes.legend(frameon=False, labelcolor=colors["ink"])
    return figure


def main() -> None:
    """Draw the pictures."""
    for theme, colors in THEMES.items():
        save(Drawing(colors).draw(), f"method-{theme}")
    if "memory" in sys.argv[1:]:
        curves = {method: alive(method) for method in STYLES}
        for theme, colors in THEMES.items():
            save(memory(colors, curves), f"memory-{theme}")


if __name__ == "__main__":
    main()
