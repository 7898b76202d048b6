"""Tiny models and pictures on disk, for what reads them from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from transformers import BitImageProcessor, SwinForImageClassification

from tests.models import BY_NAME


def save_swin(folder: Path) -> Path:
    """A tiny Swin classifier with an image processor for 32 px."""
    torch.manual_seed(0)
    SwinForImageClassification(BY_NAME["swin-classifier"].base().config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_colors(folder: Path, train: int = 6, test: int = 4) -> Path:
    """An image folder of two classes that differ in colour."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for channel, name in enumerate(("red", "green")):
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 80, (40, 36, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def save_discs(folder: Path, train: int = 6, val: int = 3) -> Path:
    """Bright discs on dark ground with label maps: 1 ground, 2 disc, 0 at the border, as in ADE20K."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            height, width = 44 + 4 * (i % 2), 40
            y, x = np.mgrid[:height, :width]
            disc = (y - generator.integers(12, 30)) ** 2 + (x - generator.integers(12, 28)) ** 2 < 90
            pixels = generator.integers(0, 60, (height, width, 3), dtype=np.uint8) + 170 * disc[..., None]
            mask = np.where(disc, 2, 1).astype(np.uint8)
            mask[0] = 0
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / split / f"{i}.jpg")
            Image.fromarray(mask).save(folder / "masks" / split / f"{i}.png")
    return folder


QUICK: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_num_workers": 0,
    "seed": 1,
}


def classify(root: Path, output: str = "run", **training: Any) -> dict[str, Any]:
    """The values of a config that classifies colours; model and data are made where they are missing."""
    if not (root / "model").exists():
        save_swin(root / "model")
    if not (root / "colors").exists():
        save_colors(root / "colors")
    return {
        "task": "image-classification",
        "model": str(root / "model"),
        "data": {"source": str(root / "colors")},
        "output": str(root / output),
        "augment": False,
        "training": QUICK | training,
    }


def segment(root: Path, output: str = "run", **training: Any) -> dict[str, Any]:
    """The values of a config that segments discs with a small UperNet over the tiny Swin."""
    if not (root / "model").exists():
        save_swin(root / "model")
    if not (root / "discs").exists():
        save_discs(root / "discs")
    return {
        "task": "semantic-segmentation",
        "model": str(root / "model"),
        "data": {
            "images": str(root / "discs" / "images"),
            "masks": str(root / "discs" / "masks"),
            "labels": ["ground", "disc"],
            "reduce_labels": True,
        },
        "output": str(root / output),
        "image_size": 32,
        "model_options": {"hidden_size": 16, "auxiliary_channels": 8},
        "training": QUICK | {"per_device_train_batch_size": 2} | training,
    }


def write(path: Path, values: dict[str, Any]) -> Path:
    """Write a config as YAML."""
    path.write_text(yaml.safe_dump(values))
    return path
