"""Step from the cache: time beside that of the head alone without one, and bytes of an image in the cache.

    python benchmarks/cache.py [vit-b] [swin-b] [upernet-swin-b]  # on a quiet machine

Interleaved rounds in one process take a whole training step each (forward, loss, backward, AdamW) of: the head alone,
the frozen backbone's forward (whose share of the former says what the head costs), E3VA with int8 taps, and E3VA from
the cache, whose batch is read from its file in every round. Random weights and images, fp32, two threads, medians of
five rounds after one to warm up.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from memory import METHODS, SETTINGS, Setting, adamw, by
from record import quiet, save
from speed import interleaved, step
from torch import nn
from torch.utils.data import Dataset
from transformers import default_data_collator

from e3va_peft import cached
from e3va_peft.cache.layout import STORAGES
from e3va_peft.cache.taking import RECORD

TAPS: dict[str, dict[str, Any]] = {"two taps a block": {}, "one tap a block": {"taps": ("block",)}}


class Images(Dataset):
    """The images of one batch."""

    def __init__(self, setting: Setting) -> None:
        batch = setting.inputs()
        self.examples = [{name: value[i] for name, value in batch.items()} for i in range(setting.batch)]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return dict(self.examples[index])


def forward(backbone: nn.Module, pixel_values: torch.Tensor) -> float:
    """Run a backbone without gradient and return its seconds."""
    start = time.perf_counter()
    with torch.no_grad():
        backbone(pixel_values)
    return time.perf_counter() - start


def time_rows(setting: Setting) -> list[dict[str, Any]]:
    """Time one setting."""
    images = Images(setting)
    batch = default_data_collator(list(images))
    models = {}
    for name, build in {"head only": METHODS["head only"], "E3VA, int8": by("e3va", tap_storage="int8")}.items():
        torch.manual_seed(0)
        model = build(setting.build()).train()
        models[name] = model, adamw(model)
    tasks = {name: lambda m=m, o=o: step(lambda: m(**batch).loss, o) for name, (m, o) in models.items()}
    base = models["head only"][0]
    backbone = getattr(base, "backbone", None) or base.base_model
    tasks["backbone, forward"] = lambda: forward(backbone, batch["pixel_values"])
    for title, options in TAPS.items():
        torch.manual_seed(0)
        model = by("e3va", **options)(setting.build()).train()
        folder = tempfile.mkdtemp()
        read = cached(images, model, storage="int8", folder=f"{folder}/cache", batch_size=setting.batch)
        optimizer = adamw(model)
        collate = lambda read=read: default_data_collator([read[i] for i in range(len(read))])  # noqa: E731
        tasks[f"E3VA from the cache, int8, {title}"] = lambda m=model, o=optimizer, c=collate: step(
            lambda: m(**c()).loss, o
        )
    return [
        {"setting": setting.title, "method": name, "seconds": statistics.median(times), "rounds": times}
        for name, times in interleaved(tasks).items()
    ]


def byte_rows(setting: Setting) -> list[dict[str, Any]]:
    """Count the bytes of an image in every storage."""
    images, rows = Images(setting), []
    for title, options in TAPS.items():
        for storage in STORAGES:
            reads = {"tap_storage": "int4"} if storage == "int4" else {}
            model = by("e3va", **options, **reads)(setting.build())
            read = cached(images, model, storage=storage, batch_size=1)
            rows.append(
                {"setting": setting.title, "taps": title, "storage": storage, "bytes": read[0][RECORD].numel()}
            )
    return rows


def main() -> None:
    """Measure the settings named on the command line, all by default."""
    quiet()
    torch.set_num_threads(2)
    rows = []
    for key in sys.argv[1:] or SETTINGS:
        found = time_rows(SETTINGS[key])
        head = found[0]["seconds"]
        for row in found:
            print(
                f"{row['setting']}: {row['method']}: {row['seconds']:.3f} s, {row['seconds'] / head:.2f} x head only"
            )
        found += byte_rows(SETTINGS[key])
        for row in found[-len(TAPS) * len(STORAGES) :]:
            print(f"{row['setting']}: {row['taps']}, {row['storage']}: {row['bytes'] / 1e6:.2f} MB an image")
        rows += found
        save("cache", rows)  # after each, because UperNet's head takes long


if __name__ == "__main__":
    main()
