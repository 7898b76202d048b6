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
MIB = 2**20


def rows(name: str) -> list[dict[str, Any]]:
    """Read the rows of a recorded benchmark."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
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


def training() -> str:
    """Table of `training.py`: both settings, one row per method."""
    titles = {"nuclei": "nuclei, mean IoU", "cifar10": "CIFAR-10, accuracy"}
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
    """Table of `e3va compare` on objects: one block for each `results/dense-*.json` that is recorded."""
    titles = {
        "dense-nuclei-cascade": "nuclei, Cascade Mask R-CNN, mask AP",
        "dense-nuclei-mask2former": "nuclei, Mask2Former, mask AP",
        "dense-blood-cells-retinanet": "blood cells, RetinaNet, box AP",
        "dense-blood-cells-cascade": "blood cells, Cascade R-CNN, box AP",
    }
    body = []
    for name, title in titles.items():
        if not (ROOT / "benchmarks" / "results" / f"{name}.json").is_file():
            continue
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
