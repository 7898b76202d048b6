"""Which classes are taken for which, as a table and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure  # not pyplot: it keeps figures alive and wants a display
from torch import Tensor

from e3va_peft.files import save_figure, write_whole

_DRAWN = 40  # classes at most
_NUMBERED = 12  # classes at most whose cells hold their share in words


def write_confusion(confusion: Tensor, labels: Sequence[str], table: Path, picture: Path) -> None:
    """Write how often each class was taken for each: counts as CSV and, up to 40 classes, shares as a PNG.

    Args:
        confusion: Counts, `(K, K)`; row: the true class, column: the predicted class.
        labels: The K class names.
        table: The CSV.
        picture: The PNG.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["true class", *labels])
    rows.writerows([name, *counts] for name, counts in zip(labels, confusion.tolist(), strict=True))
    write_whole(table, text.getvalue())
    if len(labels) <= _DRAWN:
        save_figure(draw_confusion(confusion, labels), picture, dpi=120)


def draw_confusion(confusion: Tensor, labels: Sequence[str]) -> Figure:
    """Draw the shares of each true class that were taken for each class.

    Args:
        confusion: See `write_confusion`.
        labels: See `write_confusion`.
    """
    shares = (confusion.double() / confusion.sum(1, keepdim=True)).nan_to_num(0)  # a class may not occur
    side = 3 + 0.35 * len(labels)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", fraction=0.05)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_xticks(range(len(labels)), labels, rotation=90, parse_math=False)
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    for row, column in torch.nonzero(shares >= 0.005).tolist() if len(labels) <= _NUMBERED else ():
        share = float(shares[row, column])
        color = "white" if share > 0.5 else "black"
        axes.text(column, row, f"{share:.2f}", ha="center", va="center", color=color, fontsize="small")
    return figure
