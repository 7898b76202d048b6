"""Write the README's tables from `results/*.json`; with `--check` only say whether they are up to date.

python benchmarks/readme_tables.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MIB, GIB = 2**20, 2**30

# Training memory in MB as published for E3VA, the frozen backbone and full fine-tuning (V-PETL Bench's table).
PUBLISHED_MEMORY = {"coco-cascade-swin-b": (7639, 7137, 17061), "voc-retinanet-swin-l": (4819, 3967, 15679)}
PAPER_METHODS = {
    "e3va": "E3VA",
    "e3va-int8": "E3VA, int8",
    "e3va-recompute": "E3VA, recompute",
    "e3va-live": "E3VA, recompute, 2 live",
    "head-only": "head only",
    "lora": "LoRA",
    "lora-checkpointing": "LoRA + checkpointing",
    "full": "full",
}


def rows(name: str) -> list[dict[str, Any]]:
    """Read the rows of a recorded benchmark."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        sys.exit(f"{path.name} is missing: record it with benchmarks/{name}.py (see its docstring)")
    return json.loads(path.read_text())["rows"]


def markdown(header: list[str], body: list[list[str]]) -> str:
    """Lay out a table."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demo() -> str:
    """Table of `e3va demo`."""
    header = ["method", "trained", "kept for backward", "peak", "s per step", "mIoU", "training"]
    body = [
        [
            row["method"],
            f"{row['trainable'] / 1e6:.2f} M",
            f"{row['saved_bytes'] / MIB:.0f} MiB",
            f"{row['peak_bytes'] / MIB:.0f} MiB",
            f"{row['step_seconds']:.2f}",
            f"{row['mean_iou']:.3f}",
            f"{row['training_seconds']:.0f} s",
        ]
        for row in rows("demo")
    ]
    return markdown(header, body)


def memory() -> str:
    """Table of `memory.py`: what is kept, and the share of the backbone's bytes that remains."""
    recorded = rows("memory")
    settings = list(dict.fromkeys(row["setting"] for row in recorded))
    saved = {(row["setting"], row["method"]): row["saved_bytes"] for row in recorded}

    def cell(setting: str, method: str) -> str:
        if (setting, method) not in saved:
            return ""
        head, full = saved[setting, "head only"], saved[setting, "full"]
        share = 100 * (saved[setting, method] - head) / (full - head)
        return f"{share:.1f} % ({saved[setting, method] / MIB:.0f} MiB)"

    methods = dict.fromkeys(row["method"] for row in recorded)
    body = [[method, *(cell(setting, method) for setting in settings)] for method in methods]
    return markdown(["backbone share (kept for backward)", *settings], body)


def speed() -> str:
    """Table of `speed.py`: seconds of the backbone part of a training step, and how many times head only."""
    recorded = [row for row in rows("speed") if row["setting"] != "inference"]
    settings = list(dict.fromkeys(row["setting"] for row in recorded))
    seconds = {(row["setting"], row["method"]): row["seconds"] for row in recorded}

    def cell(setting: str, method: str) -> str:
        found = seconds.get((setting, method))
        return "" if found is None else f"{found:.2f} s ({found / seconds[setting, 'head only']:.2f})"

    methods = dict.fromkeys(row["method"] for row in recorded)
    body = [[method, *(cell(setting, method) for setting in settings)] for method in methods]
    return markdown(["seconds per step (head only = 1)", *settings], body)


def inference() -> str:
    """Table of `speed.py`: what an adapted Swin-B costs in inference, against the base."""
    recorded = [row for row in rows("speed") if row["setting"] == "inference"]
    found = {(row["batch"], row["method"]): row for row in recorded}
    batches = list(dict.fromkeys(row["batch"] for row in recorded))

    def ratios(field: str) -> list[str]:
        return [f"{found[batch, 'E3VA'][field] / found[batch, 'base'][field]:.2f}" for batch in batches]

    body = [["latency, adapted / base", *ratios("seconds")], ["peak beyond the weights", *ratios("peak_bytes")]]
    return markdown(["Swin-B, 224 px, batch", *map(str, batches)], body)


def storage() -> str:
    """Table of `storage.py`: accuracy with rounded taps."""
    body = [[row["way"], f"{row['mean']:.3f} ± {row['deviation']:.3f}"] for row in rows("storage")]
    return markdown(["taps", "mean IoU, three seeds"], body)


def quantized() -> str:
    """Table of `quantized.py`."""
    body = []
    setting = ""
    for row in rows("quantized"):
        title = row["setting"] if row["setting"] != setting else ""
        setting = row["setting"]
        sizes = [f"{row[key] / MIB:.0f} MiB" for key in ("peak_parameters", "peak_bytes", "saved_bytes")]
        body.append([title, row["base"], *sizes, f"{row['step_seconds']:.2f}"])
    header = ["one training step of E3VA", "base", "parameters", "peak", "kept for backward", "s per step"]
    return markdown(header, body)


def scored(titles: dict[str, str]) -> str:
    """Table of methods on real data: a block for each recorded file, by its title."""
    body = []
    for name, title in titles.items():
        for row in rows(name):
            spread = f" ± {row['deviation']:.3f}" if row["deviation"] is not None else ""
            body.append(
                [
                    title,
                    row["method"],
                    f"{row['mean']:.3f}{spread}",
                    f"{row['trained_parameters'] / 1e6:.2f} M",
                    f"{row['saved_bytes'] / MIB:.0f} MiB",
                    f"{row['step_seconds']:.2f}",
                ]
            )
            title = ""
    return markdown(["task and metric", "method", "score", "trained", "kept for backward", "s per step"], body)


def training() -> str:
    """Table of `training.py`: both settings, one row per method."""
    titles = {"nuclei": "nuclei, mean IoU", "cifar10": "CIFAR-10, accuracy"}
    return scored(titles)


def compare() -> str:
    """Table of `e3va compare`, one row per method."""
    header = ["method", "mean IoU", "trained", "kept for backward", "backbone share", "peak", "s per step"]
    body = []
    for row in rows("compare"):
        spread = f" ± {row['deviation']:.3f}" if row["deviation"] is not None else ""
        body.append(
            [
                row["method"],
                f"{row['mean']:.3f}{spread}",
                f"{row['trained_parameters'] / 1e6:.2f} M",
                f"{row['saved_bytes'] / MIB:.0f} MiB",
                f"{100 * row['backbone_share']:.0f} %",
                f"{row['peak_bytes'] / MIB:.0f} MiB",
                f"{row['step_seconds']:.2f}",
            ]
        )
    return markdown(header, body)


def dense() -> str:
    """Table of `training.py` on objects: one block for each recorded file."""
    titles = {
        "nuclei-cascade": "nuclei, Cascade Mask R-CNN, 3 epochs, mask AP",
        "nuclei-mask2former": "nuclei in tiles, Mask2Former, 1 epoch, mask AP",
        "blood-cells-retinanet": "blood cells, RetinaNet, 12 epochs, box AP",
        "blood-cells-cascade": "blood cells, Cascade R-CNN, 3 epochs, box AP",
    }
    return scored(titles)


def plan() -> str:
    """Table of `plan.py`: bytes of E3VA and full fine-tuning, and the largest error of all methods."""
    recorded = rows("plan")
    settings: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in recorded:
        key = (row["model"], row["task"], row["image_size"], row["batch_size"], row["precision"])
        settings.setdefault(key, {})[row["method"]] = row
    body = []
    for (model, task, size, batch, precision), methods in settings.items():
        head = " + UperNet" if task == "semantic-segmentation" else ""
        cells = [
            " / ".join(f"{methods[name][kind] / MIB:.0f}" for kind in ("predicted", "measured", "resident"))
            for name in ("E3VA", "full")
        ]
        worst = [
            max((row["predicted"] / row[kind] - 1 for row in methods.values()), key=abs)
            for kind in ("measured", "resident")
        ]
        errors = " / ".join(f"{100 * error:+.1f} %" for error in worst)
        body.append([f"{model}{head}, {size} px, batch {batch}, {precision}", *cells, errors])
    return markdown(["one training step", "E3VA, MiB", "full, MiB", "largest error of five methods"], body)


def paper_rows(kind: str, *fields: str) -> list[dict[str, dict[str, Any]]]:
    """Return rows of `paper.py` by method, in groups that agree in fields, one system after another."""
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows("paper"):
        if row["kind"] == kind:
            groups.setdefault(tuple(row[name] for name in ("title", *fields)), {})[row["method"]] = row
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def paper_title(row: dict[str, Any]) -> str:
    """Name a system of the paper and its batch."""
    return f"{row['title']}, {row['width']} × {row['height']}, batch {row['batch']}"


def saving(least: float, most: float) -> str:
    """Format how much less is needed."""
    return f"{100 * (least / most - 1):+.1f} %".replace("-", "−")


def paper() -> str:
    """Table of `paper.py`: peaks, what E3VA saves of them, and what was published."""
    body = []
    for found in paper_rows("memory", "width", "height", "precision"):
        first = next(iter(found.values()))
        peaks = {method: row["peak_bytes"] for method, row in found.items()}
        ours = memory_savings(*(peaks.get(method) for method in ("e3va", "head-only", "full")))
        theirs = memory_savings(*PUBLISHED_MEMORY.get(first["setting"], (None, None, None)))
        body.append(
            [
                f"{paper_title(first)}, {first['precision']}",
                paper_share(found.get("e3va")),
                *(f"{peaks[method] / GIB:.2f}" if method in peaks else "" for method in PAPER_METHODS),
                *(f"{own} ({published})" if published else own for own, published in zip(ours, theirs, strict=True)),
            ]
        )
    header = ["peak of a training step, GiB", "of the backbone trained", *PAPER_METHODS.values()]
    return markdown([*header, "E3VA against full", "of the backbone's memory left"], body)


def memory_savings(e3va: int | None, head: int | None, full: int | None) -> tuple[str, str]:
    """Format what E3VA saves against full fine-tuning, and what it leaves of what the backbone costs."""
    whole = saving(e3va, full) if e3va and full else ""
    return whole, f"{100 * (e3va - head) / (full - head):.1f} %" if e3va and head and full else ""


def paper_share(row: dict[str, Any] | None) -> str:
    """Format the share of a backbone that E3VA trains."""
    return f"{100 * row['backbone_trained'] / row['backbone_parameters']:.2f} %" if row else ""


def paper_time() -> str:
    """Table of `paper.py`: seconds of a whole training step, and what E3VA saves of them."""
    body = []
    for found in paper_rows("time", "width", "height"):
        seconds = {method: row["seconds"] for method, row in found.items()}
        both = {"e3va", "full"} <= seconds.keys()
        body.append(
            [
                paper_title(next(iter(found.values()))),
                *(f"{seconds[method]:.2f}" if method in seconds else "" for method in PAPER_METHODS),
                saving(seconds["e3va"], seconds["full"]) if both else "",
            ]
        )
    return markdown(["seconds of a training step", *PAPER_METHODS.values(), "E3VA against full"], body)


TABLES = {
    "demo": demo,
    "memory": memory,
    "speed": speed,
    "inference": inference,
    "storage": storage,
    "quantized": quantized,
    "training": training,
    "compare": compare,
    "dense": dense,
    "plan": plan,
    "paper": paper,
    "paper-time": paper_time,
}


def main() -> None:
    """Fill in, or check, the marked places."""
    path = ROOT / "README.md"
    text = old = path.read_text()
    for name, table in TABLES.items():
        place = rf"(<!-- table: {name} -->\n).*?(<!-- end of table -->)"
        text = re.sub(place, lambda match, table=table: f"{match[1]}{table()}\n{match[2]}", text, flags=re.S)
    if "--check" in sys.argv:
        sys.exit(0 if text == old else "README.md is out of date: run python benchmarks/readme_tables.py")
    path.write_text(text)


if __name__ == "__main__":
    main()
