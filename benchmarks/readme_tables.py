"""Write the tables of README.md and docs/*.md from `results/`; with `--check` only say whether they are up to date.

    python benchmarks/readme_tables.py [--check]

A page marks a place by `<!-- table: NAME -->` and, below it, `<!-- end of table -->`.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MIB, GIB = 2**20, 2**30
METRICS = {"mean_iou": "mean IoU", "accuracy": "accuracy", "mask_ap": "mask AP", "box_ap": "box AP"}

# A method with the gradients of another one, at another cost.
TWINS = {
    "lora-checkpointing": "lora",
    "e3va-plus-recompute": "e3va-plus-exact",
    "e3va-8-recompute": "e3va-8",
    "e3va-8-cached": "e3va-8-kept-cached",
}

# Training memory in MB as published for E3VA, the frozen backbone and full fine-tuning (V-PETL Bench's table).
PUBLISHED_MEMORY = {"coco-cascade-swin-b": (7639, 7137, 17061), "voc-retinanet-swin-l": (4819, 3967, 15679)}
PAPER_METHODS = {
    "e3va": "E3VA",
    "e3va-bf16": "E3VA, in bf16",
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


def recorded(task: str) -> dict[str, dict[str, Any]]:
    """Read the scores of a task, `accuracy/TASK/*.json`, one file a run: method -> row with `mean` and `deviation`.

    A method is left out until it has as many seeds as the others.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((RESULTS / "accuracy" / task).glob("*.json")):
        run = json.loads(path.read_text())
        if run["part"] == "seed":
            runs.setdefault(run["method"], []).append(run)
    found: dict[str, dict[str, Any]] = {}
    for method, own in runs.items():
        scores = [run["score"] for run in own]
        if len(own) == max(map(len, runs.values())):
            deviation = statistics.stdev(scores) if len(scores) > 1 else None
            found[method] = own[0] | {"mean": statistics.fmean(scores), "deviation": deviation}
    return found


def protocol(task: str) -> list[dict[str, Any]]:
    """Rows of a task of `accuracy/run.py` with scores and costs, the best score first.

    `all_seconds` is what its training takes on a quiet machine: steps x the step of `accuracy/cost.py` and the loading
    of its batch, and filling the cache. Methods with the gradients of another one, at another cost, have its scores.
    """
    costs = {row["method"]: row for row in rows(f"accuracy/{task}-cost")}
    scores = recorded(task)
    twins = {name: same for name, same in TWINS.items() if name in costs and same in scores}
    scores |= {name: scores[same] | {"method": name} for name, same in twins.items()}
    found = []
    for method, row in scores.items():
        cost = costs.get(method)
        if cost is None:
            sys.exit(f"accuracy/{task}-cost.json lacks {method}: record it again with benchmarks/accuracy/cost.py")
        each = cost["step_seconds"] + cost["load_seconds"]
        found.append(row | cost | {"all_seconds": row["steps"] * each + cost["fill_seconds"]})
    return sorted(found, key=lambda row: -row["mean"])


def firsts(found: list[dict[str, Any]]) -> dict[str, str]:
    """The method with the best score at equal epochs, in LoRA's time, and at the peak of LoRA with checkpointing."""
    by_name = {row["method"]: row for row in found}
    time, peak = by_name["lora"]["all_seconds"], by_name["lora-checkpointing"]["peak_bytes"]
    best: dict[str, str] = {}
    for row in found:
        if not row["method"].endswith(("-cached", "-in-time")):
            best.setdefault("equal epochs", row["method"])
        if row["all_seconds"] <= time:
            best.setdefault("LoRA's time", row["method"])
        if row["peak_bytes"] <= peak:
            best.setdefault("LoRA + checkpointing's peak", row["method"])
    return best


def protocol_table(task: str) -> str:
    """Table of `accuracy/run.py TASK`, the best score on top."""
    found = protocol(task)
    best = firsts(found)
    body = [
        [
            row["method"],
            score_of(row),
            f"{row['learning_rate']:g}",
            f"{row['epochs']:g}",
            f"{row['trained_parameters'] / 1e6:.2f} M",
            *(f"{row[kind] / MIB:.0f} MiB" for kind in ("saved_bytes", "peak_bytes")),
            f"{row['step_seconds']:.2f}",
            f"{row['all_seconds']:.0f}",
            ", ".join(name for name, method in best.items() if method == row["method"]),
        ]
        for row in found
    ]
    metric = METRICS[found[0]["metric"]]
    header = ["method", metric, "rate", "epochs", "trained", "kept", "peak", "s a step", "s in all", "first at"]
    return markdown(header, body)


# Rows of the table of means: name there, names in the records.
EQUAL_EPOCHS = {
    "full fine-tuning": ("full",),
    "Mona": ("mona",),
    "AdaptFormer": ("adaptformer",),
    "LoRA": ("lora",),
    "BitFit": ("bitfit",),
    "partial-1": ("partial-1",),
    "head only": ("head-only",),
    "E3VA, as published": ("e3va",),
    "E3VA+": ("e3va-plus", "e3va-plus-exact"),
    "**E3VA, 8 of 12 blocks live**": ("e3va-8", "e3va-plus-8"),
    "**E3VA, all 12 blocks live**": ("e3va-12",),
}
TASKS = {
    "tissue": "MRI tissue",
    "nuclei": "nuclei",
    "nuclei-cascade": "nuclei, Cascade Mask R-CNN",
    "blood-cells-cascade": "blood cells, Cascade R-CNN",
    "count-swin": "red cells counted",
    "nuclei-mask2former": "nuclei in tiles, Mask2Former",
}
MEANT = tuple(TASKS)[:-1]  # that have all methods


def means() -> str:
    """Table of all tasks at equal epochs, and of the mean over those that have all methods."""
    scores = {task: recorded(task) for task in TASKS}
    body = []
    for title, names in EQUAL_EPOCHS.items():
        own = {task: next((found[name] for name in names if name in found), None) for task, found in scores.items()}
        meant = [row["mean"] for task in MEANT if (row := own[task]) is not None]
        mean = f"{statistics.fmean(meant):.3f}" if len(meant) == len(MEANT) else ""
        body.append([title, *map(score_of, own.values()), mean])
    body.sort(key=lambda line: line[-1], reverse=True)
    return markdown(["at equal epochs", *TASKS.values(), f"mean of the first {len(MEANT)}"], body)


def score_of(row: dict[str, Any] | None) -> str:
    """Format a mean and its deviation over seeds."""
    if row is None:
        return ""
    return f"{row['mean']:.3f}" + (f" ± {row['deviation']:.3f}" if row["deviation"] is not None else "")


def markdown(header: list[str], body: list[list[str]]) -> str:
    """Lay out a table."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def demo() -> str:
    """Table of `e3va demo`."""
    header = ["method", "trained", "kept for backward", "peak", "s per step", "mIoU", "epochs", "training"]
    body = [
        [
            row["method"],
            f"{row['trainable'] / 1e6:.2f} M",
            f"{row['saved_bytes'] / MIB:.0f} MiB",
            f"{row['peak_bytes'] / MIB:.0f} MiB",
            f"{row['step_seconds']:.2f}",
            f"{row['mean_iou']:.3f}",
            str(row["epochs"]),
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

    def ratios(method: str, field: str) -> list[str]:
        return [f"{found[batch, method][field] / found[batch, 'base'][field]:.2f}" for batch in batches]

    fields = {"latency, adapted / base": "seconds", "peak beyond the weights": "peak_bytes"}
    methods = [method for method in dict.fromkeys(row["method"] for row in recorded) if method != "base"]
    body = [[f"{method}: {title}", *ratios(method, key)] for method in methods for title, key in fields.items()]
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


def before() -> str:
    """Table of runs from before the protocol, a block for each task of which it lacks methods."""
    body = []
    titles = {
        "cifar10": "CIFAR-10, 2 epochs, accuracy",
        "blood-cells-retinanet": "blood cells, RetinaNet, 12 epochs, box AP",
    }
    for name, title in titles.items():
        for row in rows(name):
            kept = f"{row['saved_bytes'] / MIB:.0f} MiB" if "saved_bytes" in row else ""
            seconds = f"{row['step_seconds']:.2f}" if "step_seconds" in row else ""
            trained = f"{row['trained_parameters'] / 1e6:.2f} M"
            body.append([title, row["method"], score_of(row), trained, kept, seconds])
            title = ""
    return markdown(["task and metric", "method", "score", "trained", "kept for backward", "s per step"], body)


def compare() -> str:
    """Table of `e3va compare`, one row per method."""
    header = ["method", "mean IoU", "trained", "kept for backward", "backbone share", "peak", "s per step"]
    body = []
    for row in rows("compare"):
        body.append(
            [
                row["method"],
                score_of(row),
                f"{row['trained_parameters'] / 1e6:.2f} M",
                f"{row['saved_bytes'] / MIB:.0f} MiB",
                f"{100 * row['backbone_share']:.0f} %",
                f"{row['peak_bytes'] / MIB:.0f} MiB",
                f"{row['step_seconds']:.2f}",
            ]
        )
    return markdown(header, body)


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


def paper_systems(kind: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Return rows of `paper.py` by system and its batch, and in it by method, other precisions than fp32 apart."""
    systems: dict[str, dict[str, dict[str, Any]]] = {}
    for row in sorted(rows("paper"), key=lambda row: (row["title"], row["width"], row["height"])):
        if row["kind"] == kind:
            system = f"{row['title']}, {row['width']} × {row['height']}, batch {row['batch']}"
            method = row["method"] if row["precision"] == "fp32" else f"{row['method']}-{row['precision']}"
            systems.setdefault(system, {})[method] = row
    return systems


def saving(least: float, most: float) -> str:
    """Format how much less is needed."""
    return f"{100 * (least / most - 1):+.1f} %".replace("-", "−")


def paper() -> str:
    """Table of `paper.py`: peaks, what E3VA saves of them, and what was published."""
    systems = paper_systems("memory")
    savings = []
    for found in systems.values():
        ours = memory_savings(*(found[method]["peak_bytes"] for method in ("e3va", "head-only", "full")))
        theirs = memory_savings(*PUBLISHED_MEMORY.get(found["e3va"]["setting"], (None, None, None)))
        savings.append(
            [f"{own} ({published})" if published else own for own, published in zip(ours, theirs, strict=True)]
        )
    body = [
        *paper_methods(systems, lambda row: f"{row['peak_bytes'] / GIB:.2f}"),
        ["of the backbone trained", *(paper_share(found["e3va"]) for found in systems.values())],
        ["E3VA against full", *(against_full for against_full, _ in savings)],
        ["of the backbone's memory left", *(left for _, left in savings)],
    ]
    return markdown(["peak of a training step, GiB", *systems], body)


def paper_methods(
    systems: dict[str, dict[str, dict[str, Any]]], cell: Callable[[dict[str, Any]], str]
) -> list[list[str]]:
    """Lay out a line for each method that is recorded of any system."""
    return [
        [name, *(cell(found[method]) if method in found else "" for found in systems.values())]
        for method, name in PAPER_METHODS.items()
        if any(method in found for found in systems.values())
    ]


def memory_savings(e3va: int | None, head: int | None, full: int | None) -> tuple[str, str]:
    """Format what E3VA saves against full fine-tuning, and what it leaves of what the backbone costs."""
    whole = saving(e3va, full) if e3va and full else ""
    return whole, f"{100 * (e3va - head) / (full - head):.1f} %" if e3va and head and full else ""


def paper_share(row: dict[str, Any]) -> str:
    """Format the share of a backbone that E3VA trains."""
    return f"{100 * row['backbone_trained'] / row['backbone_parameters']:.2f} %"


def paper_time() -> str:
    """Table of `paper.py`: seconds of a whole training step, and what E3VA saves of them."""
    systems = paper_systems("time")
    savings = [saving(found["e3va"]["seconds"], found["full"]["seconds"]) for found in systems.values()]
    body = [*paper_methods(systems, lambda row: f"{row['seconds']:.2f}"), ["E3VA against full", *savings]]
    return markdown(["seconds of a training step", *systems], body)


# Rows of the README's table: name there, name in `memory.json` and `speed.json`, names in the records of scores. A row
# of which nothing is recorded is left out.
METHODS = {
    "full fine-tuning": ("full", "full"),
    "Mona": ("Mona", "mona"),
    "LoRA": ("LoRA", "lora"),
    "LoRA + checkpointing": ("LoRA + checkpointing", "as LoRA"),
    "E3VA, as published": ("E3VA", "e3va"),
    '- `tap_storage="recompute"`': ("E3VA, recompute", "as E3VA"),
    "- half of the blocks live": ("E3VA, half live", "e3va-8 or e3va-6"),
    "**E3VA+**": ("E3VA+", "e3va-plus"),
    "- from a cache, in LoRA's time": ("", "e3va-plus-cached"),
    "head only": ("head only", "head-only"),
}
SCORES = {"nuclei": "nuclei, mean IoU", "tissue": "MRI tissue, mean IoU"}


def costs() -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Read the memory of methods on Swin-B, 224 px, batch 8, and their time as a multiple of head only's."""
    found = {row["method"]: row for row in rows("memory") if row["setting"] == "Swin-B classifier, 224 px, batch 8"}
    seconds = {row["method"]: row["seconds"] for row in rows("speed") if row["setting"] == "Swin-B, 224 px, batch 8"}
    return found, {method: value / seconds["head only"] for method, value in seconds.items()}


def methods() -> str:
    """The README's table: score, memory and time of E3VA's settings and of the methods to choose between."""
    kept, times = costs()
    scores = {title: found for task, title in SCORES.items() if (found := recorded(task))}
    body = []
    for title, (cost, name) in METHODS.items():
        found = [
            name if name.startswith("as ") else score_of(next((own[n] for n in name.split(" or ") if n in own), None))
            for own in scores.values()
        ]
        sizes = ["", ""]
        if cost in kept:
            sizes = [f"{kept[cost][kind] / MIB:.0f} MiB" for kind in ("saved_bytes", "peak_bytes")]
        cells = [*found, *sizes, f"{times[cost]:.2f}" if cost in times else ""]
        if any(cells):
            body.append([title, *cells])
    return markdown(["method", *scores, "kept for backward", "peak", "time of a step"], body)


def when() -> str:
    """The README's list of when to use what."""
    memory, times = costs()
    kept = {method: f"{row['saved_bytes'] / MIB:.0f}" for method, row in memory.items()}
    nuclei, tissue, moved, cifar, masks, boxes = (
        {method: f"{row['mean']:.3f}" for method, row in recorded(task).items()}
        for task in ("nuclei", "tissue", "tissue-moved", "cifar10", "nuclei-cascade", "blood-cells-cascade")
    )
    lines = [
        f"""**Memory is short:** E3VA+. It keeps {kept["E3VA+"]} MiB where LoRA keeps {kept["LoRA"]} and LoRA with
        checkpointing {kept["LoRA + checkpointing"]}, and takes {times["E3VA+"] / times["LoRA + checkpointing"]:.2f} of
        the latter's time. With `tap_storage="recompute"` it keeps {kept["E3VA+, recompute"]}.""",
        f"""**Time is short:** E3VA+, whose step takes {times["E3VA+"]:.2f} of the head alone's; LoRA's takes
        {times["LoRA"]:.2f}, with checkpointing {times["LoRA + checkpointing"]:.2f}.""",
        f"""**The same images for many epochs or runs:** E3VA+ from a [cache](docs/cache.md):
        {moved["e3va-plus-cached"]} on MRI tissue in LoRA's time, LoRA {tissue["lora"]}. From it plain E3VA (int8, two
        taps a block) takes {cached("Swin-B"):.2f} of the head alone's step on Swin-B, {cached("ViT-B"):.2f} on
        ViT-B.""",
        f"""**Few epochs, a plain ViT:** BitFit, Mona or LoRA: {tissue["bitfit"]}, {tissue["mona"]} and
        {tissue["lora"]} on MRI tissue; E3VA+ {tissue["e3va-plus"]}, full {tissue["full"]}.""",
        f"""**Few epochs, a Swin:** E3VA, last two stages live: {nuclei["e3va-8"]} on nuclei; Mona {nuclei["mona"]},
        LoRA {nuclei["lora"]}, full {nuclei["full"]}, head only {nuclei["head-only"]}. Under detectors
        {masks["e3va-8"]}, LoRA {masks["lora"]}, Mona {masks["mona"]} (mask AP of nuclei); {boxes["e3va-8"]}, LoRA
        {boxes["lora"]}, Mona {boxes["mona"]} (box AP of blood cells). By `tap_storage="recompute"` it peaks no
        higher than LoRA with checkpointing.""",
        f"""**Classes far from what the backbone knows:** E3VA, 8 of 12 blocks live, cached:
        {cifar["e3va-8-kept-cached"]} on CIFAR-10, LoRA {cifar["lora"]}.""",
    ]
    return "\n".join(
        fill(" ".join(line.split()), 119, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        for line in lines
    )


def cached(model: str) -> float:
    """Time of a whole step of E3VA from the cache, in int8, as a multiple of head only's."""
    seconds = {row.get("method"): row.get("seconds") for row in rows("cache") if row["setting"].startswith(model)}
    return seconds["E3VA from the cache, int8, two taps a block"] / seconds["head only"]


TABLES = {
    "methods": methods,
    "when": when,
    "demo": demo,
    "memory": memory,
    "speed": speed,
    "inference": inference,
    "storage": storage,
    "quantized": quantized,
    "before": before,
    "compare": compare,
    "tissue": partial(protocol_table, "tissue"),
    "tissue-moved": partial(protocol_table, "tissue-moved"),
    "nuclei": partial(protocol_table, "nuclei"),
    "cifar10": partial(protocol_table, "cifar10"),
    "means": means,
    "nuclei-cascade": partial(protocol_table, "nuclei-cascade"),
    "nuclei-mask2former": partial(protocol_table, "nuclei-mask2former"),
    "blood-cells-cascade": partial(protocol_table, "blood-cells-cascade"),
    "count-swin": partial(protocol_table, "count-swin"),
    "plan": plan,
    "paper": paper,
    "paper-time": paper_time,
}


def main() -> None:
    """Fill in, or check, the marked places; a table without a place is an error, and so is a place without one."""
    pages = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
    shown = [name for text in pages.values() for name in re.findall(r"<!-- table: (.+?) -->", text)]
    if odd := set(shown) ^ set(TABLES):
        sys.exit(f"tables without a place, or places without a table: {', '.join(sorted(odd))}")
    place = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.S)
    for path, old in pages.items():
        text = place.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", old)
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif text != old:
            sys.exit(f"{path.name} is out of date: run python benchmarks/readme_tables.py")


if __name__ == "__main__":
    main()
