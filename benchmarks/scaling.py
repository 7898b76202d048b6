"""Memory and time of a training step as the work grows: batch, image size and backbone, as JSON and a plot.

    python benchmarks/scaling.py         # on a quiet machine
    python benchmarks/scaling.py --plot  # draw again what was recorded

A Swin classifier with random weights, fp32, AdamW, two threads. Bytes are counted on the meta device, where nothing is
allocated (for Swin they are those of the CPU); times are medians over rounds that take one step of every method in
turn, after one round to warm up.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from memory import METHODS, adamw
from record import RESULTS, quiet, save
from speed import interleaved, step
from torch import Tensor, nn
from transformers import SwinConfig, SwinForImageClassification

from e3va_peft.meter import measure_step
from e3va_peft.plan.blueprint import SHORT_NAMES

GIB = 2**30
COMPARED = ("full", "LoRA + checkpointing", "E3VA", "E3VA, one tap a block, int8", "head only")
COLORS = (("k", "s"), ("#0072B2", "o"), ("#D55E00", "*"), ("#CC79A7", "^"), ("0.5", "D"))  # with markers
STYLES = dict(zip(COMPARED, COLORS, strict=True))
SWINS = ("Swin-T", "Swin-S", "Swin-B", "Swin-L")


def points() -> Iterator[tuple[str, Any, str, int, int]]:
    """Iterate over (what grows, its value, backbone, batch, image size)."""
    for batch in (1, 2, 4, 8, 16, 32):
        yield "batch of 224 px images, Swin-T", batch, "Swin-T", batch, 224
    for size in (224, 384, 512, 768, 1024):
        yield "image size in px, Swin-T, batch 1", size, "Swin-T", 1, size
    for name in SWINS:
        yield "backbone, 224 px, batch 2", name, name, 2, 224


def build(method: str, backbone: str, size: int, device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build a model for a method, and its optimizer."""
    with torch.device(device):
        config = SwinConfig(**SHORT_NAMES[backbone.lower()], image_size=size, num_labels=100)
        model = METHODS[method](SwinForImageClassification(config)).to(device).train()
    return model, adamw(model)


def inputs(batch: int, size: int, device: str) -> dict[str, Tensor]:
    """Draw a batch."""
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    return {"pixel_values": torch.randn(batch, 3, size, size, device=device), "labels": labels}


def measure(grows: str, value: Any, backbone: str, batch: int, size: int) -> list[dict[str, Any]]:
    """Measure all methods at one point."""
    models = {method: build(method, backbone, size, "cpu") for method in COMPARED}
    real = inputs(batch, size, "cpu")
    rounds = interleaved(
        {method: lambda m=m, o=o: step(lambda: m(**real).loss, o) for method, (m, o) in models.items()}
    )
    rows = []
    for method in COMPARED:
        model, optimizer = build(method, backbone, size, "meta")
        report = measure_step(model, inputs(batch, size, "meta"), optimizer, repeats=1)
        row = {"grows": grows, "value": value, "method": method, "seconds": statistics.median(rounds[method])}
        rows.append(
            row | {"saved_bytes": report.saved_bytes, "peak_bytes": report.peak_bytes, "rounds": rounds[method]}
        )
        print({name: found for name, found in rows[-1].items() if name != "rounds"}, flush=True)
    return rows


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw memory above and time below, one column for each thing that grows, into `results/scaling.png`."""
    columns = list(dict.fromkeys(row["grows"] for row in rows))
    figure = Figure(figsize=(4.2 * len(columns), 6.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(columns), squeeze=False)
    for axes, (field, unit) in zip(grid, (("peak_bytes", GIB), ("seconds", 1)), strict=True):
        for place, grows in zip(axes, columns, strict=True):
            for method in COMPARED:
                mine = [row for row in rows if row["grows"] == grows and row["method"] == method]
                color, marker = STYLES[method]
                place.plot(
                    [str(row["value"]) for row in mine],
                    [row[field] / unit for row in mine],
                    color=color,
                    marker=marker,
                    label=method,
                )
            place.set_xlabel(grows)
            place.set_ylim(bottom=0)
            place.grid(color="0.9")
        axes[0].set_ylabel({"peak_bytes": "peak in GiB", "seconds": "seconds per step, 2 CPU threads"}[field])
    grid[0][0].legend(frameon=False)
    figure.savefig(RESULTS / "scaling.png")


def main() -> None:
    """Measure, record and draw."""
    quiet()
    torch.set_num_threads(2)
    if "--plot" not in sys.argv:
        save("scaling", [row for point in points() for row in measure(*point)])
    draw(json.loads((RESULTS / "scaling.json").read_text())["rows"])


if __name__ == "__main__":
    main()
