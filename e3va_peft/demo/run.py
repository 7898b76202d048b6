"""`e3va demo`: the whole road on real weights and real MRI, in a few minutes on a CPU."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
import torch
from peft import PeftModel
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex
from transformers import Dinov2Backbone, Dinov2Config, Trainer, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from e3va_peft import cached, record_metrics
from e3va_peft.demo.data import CLASSES, MNI152Slices, mni152_slices
from e3va_peft.demo.segmenter import Dinov2ForSemanticSegmentation
from e3va_peft.demo.weights import focus_vit
from e3va_peft.meter import measure_step
from e3va_peft.meter.step import MIB
from e3va_peft.methods import METHODS, adapt
from e3va_peft.training import training_arguments

MAPS = ["stage3", "stage6", "stage9", "stage12"]
BATCH = 2

# Method, learning rate, epochs for each epoch of the others, and how many views of a slice a cache holds: from there,
# an epoch of E3VA+ costs a third of LoRA's. Memory is not short here, so it reads its taps exactly. Rates, each
# between worse ones, and the strength of the augmentation were chosen on a block of training slices that is set aside
# (`benchmarks/accuracy/run.py tissue-moved`); LoRA is at PEFT's own scale.
COMPARED: tuple[tuple[dict[str, Any], float, float, int], ...] = (
    ({"name": "head-only"}, 6.4e-2, 1, 0),
    ({"name": "lora", "lora_alpha": 8}, 4e-3, 1, 0),
    ({"name": "e3va-plus", "tap_storage": "exact"}, 4e-3, 2.5, 4),
)


@dataclass
class Result:
    """Score and cost of a method: bytes and seconds of a training step on images, mIoU on the test slices."""

    method: str
    trainable: int
    saved_bytes: int
    peak_bytes: int
    step_seconds: float
    mean_iou: float
    epochs: int
    training_seconds: float


def quieten() -> None:
    """Keep the libraries' loading reports and deprecations out of the demo's output."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def build_base(vit: Path) -> nn.Module:
    """Build the base model: the pretrained ViT and a new linear decoder for the tissue classes."""
    config = Dinov2Config.from_pretrained(vit, out_features=MAPS)
    config.id2label = dict(enumerate(CLASSES))
    config.label2id = {name: index for index, name in enumerate(CLASSES)}
    model = Dinov2ForSemanticSegmentation(config)
    model.backbone = Dinov2Backbone.from_pretrained(vit, config=config)
    return model


def predict(model: nn.Module, slices: MNI152Slices) -> torch.Tensor:
    """Predict the label map of each slice, (K, H, W)."""
    model.eval()
    maps = []
    with torch.no_grad():
        for batch in DataLoader(slices, batch_size=BATCH):
            maps.append(model(pixel_values=batch["pixel_values"]).logits.argmax(1))
    return torch.cat(maps)


def mean_iou(predicted: torch.Tensor, slices: MNI152Slices) -> float:
    """Mean over the classes of the intersection over union, counted over all slices."""
    metric = MulticlassJaccardIndex(num_classes=len(CLASSES))
    return float(metric(predicted, slices.labels.long()))


def train(
    method: dict[str, Any], rate: float, vit: Path, slices: MNI152Slices, folder: Path, epochs: float, seed: int,
    views: int = 0, storage: str = "exact",
) -> tuple[nn.Module, float]:  # fmt: skip
    """Train a method from the same head and in the same order of batches; return the model and the seconds.

    With views the backbone runs once for each of them of each slice, within these seconds; `storage` is its cache's.
    """
    set_seed(seed)
    model = adapt(build_base(vit), method)
    arguments = training_arguments(
        folder,
        learning_rate=rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        seed=seed,
        remove_unused_columns=not views,
    )
    start = time.perf_counter()
    dataset = cached(slices, model, views=views, storage=storage) if views else slices
    trainer = Trainer(model, arguments, train_dataset=dataset)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model, time.perf_counter() - start


def measure(method: dict[str, Any], rate: float, vit: Path, slices: MNI152Slices, seed: int) -> Result:
    """Measure one training step of a method."""
    set_seed(seed)
    model = adapt(build_base(vit), method)
    batch = next(iter(DataLoader(slices, batch_size=BATCH)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    report = measure_step(model, batch, optimizer)
    return Result(
        METHODS[method["name"]].title,
        report.trainable_parameters,
        report.saved_bytes,
        report.peak_bytes,
        report.step_ms / 1000,
        float("nan"),
        0,
        float("nan"),
    )


def run_demo(folder: Path, epochs: int = 6, seed: int = 0, overwrite: bool = False) -> list[Result]:
    """Fine-tune the ViT on MRI with each method, save the adapter, load it in a fresh process, draw what it sees.

    Args:
        folder: Where table, adapter and picture go.
        epochs: Passes over the training slices; E3VA+, which reads four views of each from a cache, has 2.5 times
            as many, rounded up.
        seed: Seed of head, highway and batch order.
        overwrite: Write into `folder` though it has results already.

    Raises:
        FileExistsError: `folder` has results and `overwrite` is off.
    """
    if (folder / "results.json").exists() and not overwrite:
        raise FileExistsError(
            f"{folder} holds results of an earlier run. Choose another --output, or --overwrite them."
        )
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    quieten()
    vit = focus_vit()
    train_slices, test_slices = mni152_slices()
    train_slices = train_slices.augmented()
    console.print(
        f"A real ViT (12 layers, 384 wide, {vit.name}) on real MRI (MNI152): {len(train_slices)} slices to train on, "
        f"mirrored, turned, shifted and scaled at random, {len(test_slices)} to test, classes {', '.join(CLASSES)}."
    )
    results, predictions = [], {}
    for method, rate, times, views in COMPARED:
        title, own = METHODS[method["name"]].title, math.ceil(epochs * times)
        views = min(views, own)
        how = f", the backbone once for each of {views} views of a slice" if views else ""
        console.print(f"[bold]{title}[/bold]: measuring one step, then {own} epochs{how}")
        result = measure(method, rate, vit, train_slices, seed)
        result.epochs = own
        model, result.training_seconds = train(method, rate, vit, train_slices, folder / "trainer", own, seed, views)
        predictions[title] = predict(model, test_slices)
        result.mean_iou = mean_iou(predictions[title], test_slices)
        results.append(result)
    adapter = folder / "adapter"
    record_metrics(cast(PeftModel, model), {"mean_iou": results[-1].mean_iou})
    cast(PeftModel, model).save_pretrained(str(adapter))
    size = f"{_megabytes(adapter):.1f} MB"
    console.print(f"saved the adapter to {escape(str(adapter))} ({size}); loading it in a fresh process")
    again = reload_in_a_fresh_process(adapter, folder / "reloaded.npy")
    if not np.array_equal(again, predictions[title].numpy()):
        raise RuntimeError(f"the adapter in {adapter} predicts otherwise in a fresh process than before it was saved.")
    (folder / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=2))
    draw(folder / "predictions.png", test_slices, predictions, results)
    console.print(table(results))
    console.print(escape(f"reloaded adapter: same predictions. Look at {folder / 'predictions.png'}"))
    return results


def reload_in_a_fresh_process(adapter: Path, output: Path) -> np.ndarray:
    """Load an adapter in a new Python process, predict the test slices there, and return the label maps."""
    subprocess.run([sys.executable, "-m", "e3va_peft.demo.reload", str(adapter), str(output)], check=True)
    return np.load(output)


def table(results: list[Result]) -> Table:
    """Lay the results out for the terminal."""
    grid = Table(
        title="One training step: trained, kept for backward, peak, seconds; and mIoU on the test slices",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for column in ("method", "trained", "kept", "peak", "s/step", "mIoU", "epochs", "training"):
        grid.add_column(column, justify="left" if column == "method" else "right")
    for r in results:
        grid.add_row(
            r.method,
            f"{r.trainable / 1e6:.2f} M",
            f"{r.saved_bytes / MIB:.0f} MiB",
            f"{r.peak_bytes / MIB:.0f} MiB",
            f"{r.step_seconds:.2f}",
            f"{r.mean_iou:.3f}",
            str(r.epochs),
            f"{r.training_seconds:.0f} s",
        )
    return grid


def draw(path: Path, slices: MNI152Slices, predictions: dict[str, torch.Tensor], results: list[Result]) -> None:
    """Draw three test slices: MRI, truth, and each method's prediction with its mistakes marked."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = ["#00000000", "#e8a33d", "#5aa9e6"]
    scores = {result.method: result.mean_iou for result in results}
    rows = [len(slices) // 6, len(slices) // 2, 5 * len(slices) // 6]
    columns = ["MRI", "truth", *predictions]
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(2.5 * len(columns), 2.9 * len(rows)), facecolor="black"
    )
    for i, row in enumerate(rows):
        truth = slices.labels[row]
        for axis, column in zip(axes[i], columns, strict=True):
            axis.imshow(slices.images[row].numpy(), cmap="gray", vmin=0, vmax=1)
            axis.axis("off")
            if i == 0:
                title = f"{column}\nmIoU {scores[column]:.3f}" if column in scores else column
                axis.set_title(title, color="white", fontsize=13)
            labels = truth if column == "truth" else predictions.get(column, [None] * len(slices))[row]
            if labels is not None:
                tissue = ListedColormap(colours)
                axis.imshow(labels.numpy(), cmap=tissue, vmin=0, vmax=2, alpha=0.75, interpolation="nearest")
                wrong = np.ma.masked_equal((labels != truth).numpy(), False)
                axis.imshow(wrong, cmap=ListedColormap(["#d7263d"]), alpha=0.9, interpolation="nearest")
        axes[i][0].text(3, 12, f"z = {slices.indices[row] - 72:+d} mm", color="white", fontsize=9)
    legend = [Patch(color=colours[1], label=CLASSES[1]), Patch(color=colours[2], label=CLASSES[2])]
    legend.append(Patch(color="#d7263d", label="wrong"))
    figure.legend(handles=legend, loc="lower center", ncols=3, frameon=False, labelcolor="white", fontsize=12)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=110, facecolor="black")
    plt.close(figure)


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
