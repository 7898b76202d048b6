"""Loss and metric over the steps, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # not pyplot: it keeps figures alive and wants a display


def draw_curves(history: Sequence[Mapping[str, Any]], path: Path, metric: str) -> None:
    """Draw training loss, evaluation loss and a metric over the steps into a PNG.

    Args:
        history: `TrainerState.log_history`.
        path: The PNG; replaced where it exists.
        metric: Name of the metric, without `eval_`.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    for key, label, style in (("loss", "training loss", "-"), ("eval_loss", "evaluation loss", "o-")):
        steps, values = _series(history, key)
        if steps:
            axes.plot(steps, values, style, label=label, markersize=4)
    axes.set_ylim(bottom=0)
    lines = axes.get_lines()
    steps, values = _series(history, f"eval_{metric}")
    if steps:
        right = axes.twinx()
        right.set_ylabel(metric)
        lines = [*lines, *right.plot(steps, values, "s--", color="tab:green", label=metric, markersize=4)]
    if lines:
        figure.legend(lines, [str(line.get_label()) for line in lines], loc="outside upper center", ncols=3)
    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, format="png", dpi=120)
    draft.replace(path)


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points: dict[float, float] = {}
    for entry in history:
        if key in entry:
            points.setdefault(entry["step"], entry[key])  # the best model is scored again at the last step
    return list(points), list(points.values())
