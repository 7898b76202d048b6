"""How far `e3va plan` is from a real step: predicted and measured peak, by our meter and by the operating system.

    python benchmarks/plan.py [swin-t-224 ...]

Each method trains one step in a process of its own, AdamW's moments in place. *resident* is how far the peak of its
resident set (VmHWM) rises above what it held before the model was built: nothing of ours counts there. *measured* is
the peak that the meter of `measure_step` sees in another step. Random weights, fused AdamW, one thread of a CPU, and
mixed precision by the rules of the CPU on both sides. glibc is told to give every larger tensor pages of its own, so
that freed memory leaves the resident set.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
if not MALLOC.items() <= os.environ.items():  # glibc reads them when a process starts
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})

import torch  # noqa: E402
from record import save  # noqa: E402
from torch import nn  # noqa: E402
from transformers import ViTConfig, ViTForImageClassification  # noqa: E402

from e3va_peft.meter.step import MIB, count_peak, take_step  # noqa: E402
from e3va_peft.methods import adapt, settings  # noqa: E402
from e3va_peft.plan import Plan, plan  # noqa: E402
from e3va_peft.plan.blueprint import model_builder  # noqa: E402
from e3va_peft.plan.estimate import PRECISIONS, optimizer_in_use  # noqa: E402
from e3va_peft.training.tasks.base import extras_at  # noqa: E402

COMPARED = ("E3VA", "LoRA", "LoRA + checkpointing", "full", "head only")
DENSE = "semantic-segmentation"


@dataclass(frozen=True)
class Setting:
    """A model and its batch."""

    model: str
    image_size: int
    batch_size: int
    precision: str = "fp32"
    task: str = "image-classification"

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return 150 if self.task == DENSE else 1000

    def batch(self) -> dict[str, torch.Tensor]:
        """Draw a batch."""
        shape = (self.batch_size, self.image_size, self.image_size) if self.task == DENSE else (self.batch_size,)
        pixels = torch.randn(self.batch_size, 3, self.image_size, self.image_size)
        return {"pixel_values": pixels, "labels": torch.randint(0, self.num_labels, shape)}


SETTINGS = {
    "swin-t-224": Setting("swin-t", 224, 2),
    "swin-t-384": Setting("swin-t", 384, 1),
    "swin-b-224": Setting("swin-b", 224, 2),
    "vit-b-224": Setting("vit-b", 224, 2),
    "dinov2-s-518": Setting("dinov2-s", 518, 1),
    "upernet-swin-t-128": Setting("swin-t", 128, 2, task=DENSE),
    # small batches: many CPUs compute in bf16 ten times slower than in fp32
    "vit-s-112-bf16": Setting("vit-s", 112, 2, "bf16"),
    "swin-t-224-bf16": Setting("swin-t", 224, 1, "bf16"),
}


def status(name: str) -> int:
    """Read one size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def forward(model: nn.Module, batch: dict[str, Any], precision: str) -> torch.Tensor:
    """Return the loss, as Trainer computes it."""
    dtype = PRECISIONS[precision]
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        return model(**batch).loss


def warm_up(precision: str) -> None:
    """Load what the libraries load at their first step, so that it does not count."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=64, num_labels=2))
    batch = {"pixel_values": torch.randn(2, 3, 64, 64), "labels": torch.tensor([0, 1])}
    take_step(lambda: forward(model, batch, precision), optimizer_in_use(model), list(model.parameters()), set())


def predict(setting: Setting) -> Plan:
    """Plan a setting."""
    # all fields of a setting are arguments of plan, and so is num_labels
    return plan(**asdict(setting), num_labels=setting.num_labels, autocast="cpu")


def measure(setting: Setting, name: str) -> dict[str, int]:
    """Build and train a method in this process; return the live and the resident peak."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warm_up(setting.precision)
    build: Callable[[], Any] = model_builder(setting.model, setting.task, setting.num_labels)
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    base = build()
    batch = setting.batch() | extras_at(base, setting.image_size)
    model = adapt(base, settings()[name]).train()
    optimizer = optimizer_in_use(model)
    parameters = list(model.parameters())
    step = partial(take_step, lambda: forward(model, batch, setting.precision), optimizer, parameters, set())
    step()
    resident = status("VmHWM") - before
    meter = count_peak(step, parameters, [*parameters, *model.buffers()], optimizer, batch)
    return {"measured": sum(meter.split().values()), "resident": resident}


def rows_of(setting: Setting, pool: Pool) -> list[dict[str, Any]]:
    """Predict and measure a setting."""
    rows = []
    for row in pool.apply(predict, (setting,)).methods:
        if row.method not in COMPARED:
            continue
        found = pool.apply(measure, (setting, row.method))
        rows.append({**asdict(setting), "method": row.method, "predicted": row.peak_bytes, **found})
        error, beside = (row.peak_bytes / found[name] - 1 for name in ("measured", "resident"))
        print(
            f"{setting.model} {setting.task} {setting.image_size} px, batch {setting.batch_size}, "
            f"{setting.precision}: {row.method}: predicted {row.peak_bytes / MIB:.0f} MiB, measured "
            f"{found['measured'] / MIB:.0f} ({100 * error:+.2f} %), resident {found['resident'] / MIB:.0f} "
            f"({100 * beside:+.1f} %)",
            flush=True,
        )
    return rows


def main() -> None:
    """Run the settings named on the command line, all by default."""
    torch.set_num_threads(1)
    # A process per task, forked from this one, which has only imported: autograd cannot be forked once it ran.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        rows: list[dict[str, Any]] = []
        for key in sys.argv[1:] or SETTINGS:
            rows += rows_of(SETTINGS[key], pool)
            save("plan", rows)


if __name__ == "__main__":
    main()
