"""Scores as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

_SHOWN = 30  # classes


def class_metric(name: str) -> str:
    """`accuracy_per_class` -> `accuracy`, `per_class_iou` -> `iou`."""
    return name.replace("_per_class", "").replace("per_class_", "")


def metrics_table(scores: Mapping[str, Any], labels: Sequence[str]) -> Group:
    """Lay out scores: the overall ones on top, one row per class below.

    Args:
        scores: Metrics by name; per-class ones are lists in the order of `labels`.
        labels: Class names.
    """
    per_class = {name: values for name, values in scores.items() if isinstance(values, list)}
    table = Table("class")
    for name in per_class:
        table.add_column(class_metric(name), justify="right")
    for i, label in enumerate(labels[:_SHOWN]):
        cells = ["-" if math.isnan(values[i]) else f"{values[i]:.4f}" for values in per_class.values()]
        table.add_row(escape(label), *cells)
    if len(labels) > _SHOWN:
        table.add_row(f"... and {len(labels) - _SHOWN} more in metrics.json", *["" for _ in per_class])
    overall = "  ".join(f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, float))
    return Group(f"[bold]{overall}[/bold]", table)
