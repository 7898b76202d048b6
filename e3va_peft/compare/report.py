"""Findings of a comparison, as a table for the terminal, Markdown, JSON and plots."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from e3va_peft.compare.plots import draw_tradeoff
from e3va_peft.files import write_whole
from e3va_peft.meter.step import MIB
from e3va_peft.training.config import RunConfig
from e3va_peft.training.results import plain
from e3va_peft.training.run import versions

TABLE, JSON = "compare.md", "compare.json"
MEMORY_PLOT, TIME_PLOT = "metric-memory.png", "metric-time.png"

HEADER = ("method", "score", "trained", "kept for backward", "backbone share", "peak", "ms per step", "learning rate")
CACHED = "ms per step from the cache"  # one more column, where a method was trained so
SHORT = {  # in a terminal of 80 columns, which has no place for the learning rate
    "kept for backward": "kept",
    "backbone share": "share",
    "ms per step": "ms/step",
    CACHED: "cached",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """Findings for a method.

    Attributes:
        method: Its name.
        metric: Name of the scores.
        seeds: One per run.
        scores: Of each run, at the end of training.
        mean: Of the scores.
        deviation: Sample standard deviation of the scores; None for one run.
        learning_rate: Learning rate of its training.
        trained_parameters: Number of trained parameters, head included.
        steps: Optimizer steps of a run.
        epochs: Epochs of a run.
        training_seconds: Of each run, as the clock on the wall says.
        saved_bytes: Kept for backward in one training step.
        peak_bytes: Peak of live tensor bytes in one training step.
        backbone_share: (saved_bytes - head only) / (full - head only); None where one of the two was not compared.
        step_seconds: Median time of a training step over all rounds.
        step_rounds: Time of a training step in each round.
        cached_step_seconds: Median time of a training step from the cache, where the method was trained from it.
        cache_seconds: Of each run, to fill the cache, or to look at one that is filled.
    """

    method: str
    metric: str
    seeds: list[int]
    scores: list[float]
    mean: float
    deviation: float | None
    learning_rate: float
    trained_parameters: int
    steps: int
    epochs: float
    training_seconds: list[float]
    saved_bytes: int
    peak_bytes: int
    backbone_share: float | None
    step_seconds: float
    step_rounds: list[float]
    cached_step_seconds: float | None = None
    cache_seconds: list[float] | None = None

    @property
    def trained_by(self) -> float:
        """Seconds of a step as it was trained: from the cache, where there was one."""
        return self.step_seconds if self.cached_step_seconds is None else self.cached_step_seconds

    def cells(self) -> list[str]:
        """Return the row as text, in the order of `HEADER`, and what a step from the cache takes."""
        spread = f" ± {self.deviation:.3f}" if self.deviation is not None else ""
        return [
            self.method,
            f"{self.mean:.3f}{spread}",
            f"{self.trained_parameters / 1e6:.2f} M",
            f"{self.saved_bytes / MIB:.0f} MiB",
            f"{100 * self.backbone_share:.1f} %" if self.backbone_share is not None else "-",
            f"{self.peak_bytes / MIB:.0f} MiB",
            f"{1000 * self.step_seconds:.0f}",
            f"{self.learning_rate:g}",
            f"{1000 * self.cached_step_seconds:.0f}" if self.cached_step_seconds is not None else "-",
        ]


def table_of(rows: Sequence[Row]) -> list[list[str]]:
    """Return rows as text, with the names of the columns first."""
    read = any(row.cached_step_seconds is not None for row in rows)
    header = [rows[0].metric if name == "score" else name for name in (*HEADER, CACHED)]
    return [line if read else line[:-1] for line in (header, *(row.cells() for row in rows))]


def write_report(output: Path, rows: Sequence[Row], config: RunConfig, console: Console) -> None:
    """Write `compare.md`, `compare.json` and two plots into a folder, and print the table.

    Args:
        output: The folder.
        rows: One per method.
        config: The task.
        console: Where to print.
    """
    record = {
        "task": config.task,
        "model": config.model,
        "config": config.to_dict(),
        "versions": versions(),
        "python": platform.python_version(),
        "machine": machine(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    write_whole(output / JSON, json.dumps(plain(record), indent=2) + "\n")
    write_whole(output / TABLE, markdown(rows, config))
    places = [(row.method, row.mean, row.deviation) for row in rows]
    memory, seconds = [row.peak_bytes / MIB for row in rows], [1000 * row.trained_by for row in rows]
    draw_tradeoff(places, memory, output / MEMORY_PLOT, "peak memory of a training step in MiB", rows[0].metric)
    draw_tradeoff(places, seconds, output / TIME_PLOT, "time of a training step in ms", rows[0].metric)
    console.print(terminal_table(rows))
    console.print(escape(f"saved: {', '.join(str(output / name) for name in (TABLE, JSON, MEMORY_PLOT, TIME_PLOT))}"))


def terminal_table(rows: Sequence[Row]) -> Table:
    """Lay out rows for the terminal: short headers, and nothing is cut, only folded where a terminal is too narrow."""
    header, *lines = table_of(rows)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    shown = [i for i, name in enumerate(header) if name != "learning rate"]
    for i in shown:
        table.add_column(SHORT.get(header[i], header[i]), justify="right" if i else "left", overflow="fold")
    for line in lines:
        table.add_row(*(escape(line[i]) for i in shown))
    return table


def machine() -> dict[str, Any]:
    """The machine that a result was measured on: kind of CPU, threads, GPU."""
    return {
        "cpu": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def markdown(rows: Sequence[Row], config: RunConfig) -> str:
    """Lay out rows as a Markdown table, with what its columns mean."""
    header, *body = table_of(rows)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
    first = rows[0]
    seeds = f"{len(first.seeds)} seeds, ± one standard deviation" if len(first.seeds) > 1 else "one seed"
    epochs = "1 epoch" if first.epochs == 1 else f"{first.epochs:g} epochs"
    notes = (
        f"{config.task}, {config.model}: {epochs} ({first.steps} steps), {seeds}. Same head, data "
        "order and epochs for all; parameters include the head. *Kept for backward* and *peak*: bytes of one training "
        "step, counted from its tensors. *Backbone share*: (method - head only) / (full - head only) of what is kept."
    )
    if len(header) > len(HEADER):
        cached = [row.method for row in rows if row.cached_step_seconds is not None]
        assert config.cache is not None
        notes += (
            f" Trained from a cache of the frozen backbone ({config.cache.storage}, views: {config.cache.views}): "
            f"{', '.join(cached)}; the others ran it on the same views. *{CACHED}*: without the reading of records, "
            "as *ms per step* is without that of images."
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{notes}\n"
