"""Loss and metric over the steps, as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # not pyplot: it keeps figures alive and wants a display

from e3va_peft.files import save_figure
from e3va_peft.training.drawing import palette

_TRAINING, _EVALUATION, _METRIC = palette(3) / 255


def draw_curves(
    history: Sequence[Mapping[str, Any]], path: Path, metric: str, judge: str | None = None, higher: bool = True
) -> None:
    """Draw the curves of a run into a PNG. See `curves`.

    Args:
        history: `TrainerState.log_history`.
        path: The PNG; replaced where it exists.
        metric: See `curves`.
        judge: See `curves`.
        higher: See `curves`.
    """
    save_figure(curves(history, metric, judge, higher), path, dpi=120)


def curves(history: Sequence[Mapping[str, Any]], metric: str, judge: str | None = None, higher: bool = True) -> Figure:
    """Draw training loss, evaluation loss and a metric over the steps, and mark the best epoch.

    Both axes begin at 0 and the metric's ends at 1, so that a small gain looks small.

    Args:
        history: `TrainerState.log_history`.
        metric: Name of a metric between 0 and 1, without `eval_`.
        judge: Name of the measure that says which epoch is the best; the metric by default.
        higher: More of it is better.
    """
    figure = Figure(figsize=(7, 4))
    figure.subplots_adjust(left=0.1, right=0.9, bottom=0.13, top=0.88)  # a layout engine takes half of the time
    axes = figure.add_subplot()
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    styles = (("loss", "training loss", "-", _TRAINING), ("eval_loss", "evaluation loss", "o-", _EVALUATION))
    for key, label, style, color in styles:
        steps, values = _series(history, key)
        if steps:
            axes.plot(steps, values, style, label=label, markersize=4, color=color)
    axes.set_ylim(bottom=0)
    lines = axes.get_lines()
    steps, values = _series(history, f"eval_{metric}")
    if steps:
        right = axes.twinx()
        right.set_ylabel(metric)
        right.set_ylim(0, 1)
        lines = [*lines, *right.plot(steps, values, "s--", color=_METRIC, label=metric, markersize=4, clip_on=False)]
    name = (judge or metric).removeprefix("eval_")
    best = best_entry(history, f"eval_{name}", higher)
    if best is not None:
        label = f"best: epoch {best['epoch']:.4g}, {name} {best[f'eval_{name}']:.3g}"
        lines = [*lines, axes.axvline(best["step"], color="0.4", linewidth=1, linestyle=":", label=label)]
    if lines:
        names = [str(line.get_label()) for line in lines]
        figure.legend(lines, names, loc="upper center", ncols=4, fontsize="small", frameon=False, columnspacing=1.5)
    return figure


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points: dict[float, float] = {}
    for entry in history:
        if key in entry:
            points.setdefault(entry["step"], entry[key])  # the best model is scored again at the last step
    return list(points), list(points.values())


def best_entry(history: Sequence[Mapping[str, Any]], key: str, higher: bool) -> Mapping[str, Any] | None:
    """Find the entry that Trainer keeps: the first of the best; None where none has the key, or a number in it."""
    scored = [entry for entry in history if key in entry and not math.isnan(entry[key])]
    return max(scored, key=lambda entry: entry[key] if higher else -entry[key], default=None)
