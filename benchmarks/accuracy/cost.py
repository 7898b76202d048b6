"""Cost of a training step, on a task, of every method that has scores: bytes, and seconds from interleaved rounds.

    python benchmarks/accuracy/cost.py nuclei --data DATA --model MODEL --runs RUNS

The batch is the first one of the training images, for `-cached` as their cache holds it. Results go to
`results/accuracy/TASK-cost.json`, with the seconds that a batch takes to load (to read, augment and collate, in one
process) and those that a cache takes to fill, all views of all images. Measure on a quiet machine: two threads, the
median of five rounds.
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from run import CACHED, HERE, RECORDS, SETTINGS, Protocol, read_task, summary
from torch import nn
from torch.utils.data import Dataset, Subset, default_collate
from transformers import set_seed

from e3va_peft import cached
from e3va_peft.data.examples import Examples
from e3va_peft.data.formats import load_splits
from e3va_peft.demo.data import mni152_slices
from e3va_peft.demo.run import BATCH, build_base
from e3va_peft.demo.weights import focus_vit
from e3va_peft.meter import measure_step
from e3va_peft.methods import adapt
from e3va_peft.training.tasks import task_of

sys.path.insert(0, str(Path(__file__).parents[1]))
from readme_tables import TWINS
from record import quiet, save

ROUNDS = 5
METHODS = SETTINGS | {
    "lora-checkpointing": {"name": "lora-checkpointing", "lora_alpha": 8},
    "e3va-plus-recompute": SETTINGS["e3va-plus"] | {"tap_storage": "recompute"},
    "e3va-8-recompute": SETTINGS["e3va-8"] | {"tap_storage": "recompute"},
}

Collator = Callable[[list[Any]], Any]


def parts(protocol: Protocol) -> tuple[Callable[[], nn.Module], Dataset[Any], Collator, int, torch.dtype | None]:
    """Return the base model's builder, the training examples, their collator, the batch size, autocast's dtype."""
    if protocol.task.recipe == "demo":
        vit, slices = focus_vit(), mni152_slices()[0]
        slices = slices.augmented() if protocol.task.moved else slices
        return lambda: build_base(vit), slices, default_collate, BATCH, None
    config = protocol.config("cost", "head-only", 1e-3, 0)
    task = task_of(config)
    split, _ = load_splits(config.data, task.label_kind)
    processor = task.build_processor()
    collator = task.collator(task.build_model(split.labels), processor)
    examples = Examples(split, task.training_view(processor))
    dtype = torch.bfloat16 if config.training.get("bf16") else None
    return (
        lambda: task.build_model(split.labels),
        examples,
        collator,
        config.training["per_device_train_batch_size"],
        dtype,
    )


def measure(protocol: Protocol) -> list[dict[str, Any]]:
    """Measure a step of every method, in rounds."""
    build, examples, collator, size, dtype = parts(protocol)
    models, filling = {}, {}
    sources: dict[str, Any] = {}
    scored = {row["method"] for row in summary(protocol.task.name)}
    for method, options in METHODS.items():
        if not {method, TWINS.get(method)} & scored:
            continue
        set_seed(0)
        models[method] = adapt(build(), options)
        sources[method] = examples
        if method.endswith(CACHED):
            how = {"storage": protocol.storage(method), "data_collator": collator, "autocast": dtype}  # as in its runs
            fill = partial(cached, model=models[method], **how)
            fill(Subset(examples, range(size)))
            start = time.perf_counter()
            sources[method] = fill(examples, views=protocol.task.views)
            filling[method] = time.perf_counter() - start
    optimizers = {
        method: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for method, model in models.items()
    }
    reports: dict[str, list[Any]] = {method: [] for method in models}
    loading: dict[str, list[float]] = {method: [] for method in models}
    for turn in range(ROUNDS):
        for method, model in models.items():
            set_seed(turn)  # the same augmentation for all, and the same draws of boxes while they find the same
            start = time.perf_counter()
            batch = collator([sources[method][i] for i in range(size)])
            loading[method].append(time.perf_counter() - start)
            report = measure_step(model, batch, optimizers[method], autocast_dtype=dtype, repeats=1)
            reports[method].append(report)
    return [
        {
            "method": method,
            **{key: getattr(own[0], key) for key in ("saved_bytes", "peak_bytes", "trainable_parameters")},
            "step_seconds": statistics.median(report.step_ms for report in own) / 1000,
            "step_rounds": [report.step_ms / 1000 for report in own],
            "load_seconds": statistics.median(loading[method]),
            "images": len(examples),  # type: ignore[arg-type]
            "batch": size,
            "views": protocol.task.views,
            "fill_seconds": filling.get(method, 0.0),
        }
        for method, own in reports.items()
    ]


def main() -> None:
    """Measure and record."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(path.stem for path in HERE.glob("*.yaml")))
    for name, about in (("data", "folder of the data"), ("model", "folder of the pretrained backbone")):
        parser.add_argument(f"--{name}", help=about)
    parser.add_argument("--runs", required=True, help="folder for what is temporary")
    args: Namespace = parser.parse_args(namespace=Namespace(quick=False))
    quiet()
    torch.set_num_threads(2)
    rows = measure(Protocol(read_task(args.task), args))
    save(f"{args.task}-cost", rows, folder=RECORDS)
    for row in rows:
        mib = f"{row['saved_bytes'] / 2**20:.0f} MiB kept, peak {row['peak_bytes'] / 2**20:.0f} MiB"
        print(f"{row['method']}: {row['step_seconds']:.3f} s a step, {mib}")


if __name__ == "__main__":
    main()
