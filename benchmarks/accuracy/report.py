"""What the protocol found: a table and a picture of every task that has scores and costs.

    python benchmarks/accuracy/report.py

Writes `results/accuracy/TASK.md` and `TASK.png`. Three comparisons stand in the table: at equal epochs (all rows but
those from a cache), at equal time (what takes no longer than LoRA), at equal memory (what peaks no higher than LoRA
with checkpointing, whose scores are LoRA's). Seconds are steps x the step that `cost.py` measured, and what filling a
cache takes: those of a quiet machine, whatever else ran beside the training.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from run import CACHED, HERE, RECORDS, summary

sys.path.insert(0, str(Path(__file__).parents[1]))
from readme_tables import MIB, markdown, score_of

HEADER = ["method", "score", "rate", "epochs", "trained", "kept", "peak", "s a step", "s in all", "best of those"]
STYLES = {"e3va": ("#D55E00", "*"), "head-only": ("#000000", "D"), "full": ("#000000", "s")}
OTHERS = ("#0072B2", "o")
TWINS = {"lora-checkpointing": "lora", "e3va-plus-recompute": "e3va-stream"}  # the same gradients at another cost

Row = dict[str, Any]


def rows(task: str) -> list[Row]:
    """Scores and costs of a task's methods, in the order of the protocol."""
    path = RECORDS / f"{task}-cost.json"
    if not path.is_file():
        return []
    costs = {row["method"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    scores = {row["method"]: row for row in summary(task)}
    scores |= {name: scores[same] | {"method": name} for name, same in TWINS.items() if same in scores}
    found = []
    for method, row in scores.items():
        cost = costs[method]
        filling = cost["fill_seconds_per_image"] * cost["images"] * cost["views"]
        found.append(cost | row | {"seconds": row["steps"] * cost["step_seconds"] + filling})
    return sorted(found, key=lambda row: -row["mean"])


def first(found: Sequence[Row], keep: Callable[[Row], bool]) -> str:
    """The method with the best score among some."""
    return max((row for row in found if keep(row)), key=lambda row: row["mean"])["method"]


def winners(found: Sequence[Row]) -> dict[str, str]:
    """Which method is first at equal epochs, at LoRA's time, and at the memory of LoRA with checkpointing."""
    by_name = {row["method"]: row for row in found}
    best = {"equal epochs": first(found, lambda row: not row["method"].endswith(CACHED))}
    if "lora" in by_name:
        time, peak = by_name["lora"]["seconds"], by_name["lora-checkpointing"]["peak_bytes"]
        best["LoRA's time"] = first(found, lambda row: row["seconds"] <= time)
        best["LoRA + checkpointing's peak"] = first(found, lambda row: row["peak_bytes"] <= peak)
    return best


def table(found: Sequence[Row]) -> str:
    """Lay a task out, the best score on top."""
    best = winners(found)
    body = [
        [
            row["method"],
            score_of(row),
            f"{row['learning_rate']:g}",
            f"{row['epochs']:g}",
            f"{row['trained_parameters'] / 1e6:.2f} M",
            f"{row['saved_bytes'] / MIB:.0f} MiB",
            f"{row['peak_bytes'] / MIB:.0f} MiB",
            f"{row['step_seconds']:.3f}",
            f"{row['seconds']:.0f}",
            ", ".join(name for name, method in best.items() if method == row["method"]),
        ]
        for row in found
    ]
    return markdown(HEADER, body)


def draw(task: str, found: Sequence[Row]) -> None:
    """Draw score against bytes kept, and against seconds, with a line along E3VA's settings."""
    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    costs = [("MiB kept for backward", lambda row: row["saved_bytes"] / MIB), ("seconds", lambda row: row["seconds"])]
    for place, (name, cost) in zip(axes, costs, strict=True):
        for row in found:
            method = row["method"]
            kind = "e3va" if method.startswith("e3va") else method.removesuffix(CACHED)
            color, marker = STYLES.get(kind, OTHERS)
            place.errorbar(cost(row), row["mean"], row["deviation"], fmt=marker, color=color, markersize=7, capsize=2)
            place.annotate(method, (cost(row), row["mean"]), xytext=(6, 3), textcoords="offset points", fontsize=7,
                           color=color)  # fmt: skip
        own = sorted((cost(row), row["mean"]) for row in found if row["method"].startswith("e3va"))
        if own:
            place.plot(*zip(*own, strict=True), color=STYLES["e3va"][0], linewidth=0.8, alpha=0.5)
        place.set_xscale("log")
        place.set_xlabel(f"{name} (log)")
        place.grid(color="0.92", which="both")
        place.set_axisbelow(True)
        place.margins(x=0.18)
    axes[0].set_ylabel(f"{task}: {found[0]['metric'].replace('_', ' ')}")
    figure.savefig(RECORDS / f"{task}.png")


def main() -> None:
    """Write what there is."""
    for task in sorted(path.stem for path in HERE.glob("*.yaml")):
        if found := rows(task):
            (RECORDS / f"{task}.md").write_text(table(found) + "\n", encoding="utf-8")
            draw(task, found)
            print(f"{task}: {winners(found)}")


if __name__ == "__main__":
    main()
