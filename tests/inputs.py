"""Tiny models and pictures on disk, for what reads them from there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
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


def save_shapes(folder: Path, train: int = 6, val: int = 3) -> Path:
    """Bright squares and dark discs on grey, as COCO, Pascal VOC and YOLO; the last image of each is empty."""
    generator = np.random.default_rng(0)
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / "voc" / name).mkdir(parents=True)
    categories = [{"id": 3, "name": "square"}, {"id": 7, "name": "disc"}]
    for split, count in (("train", train), ("val", val)):
        (folder / "coco" / split).mkdir(parents=True)
        images, annotations = [], []
        for i in range(count):
            height, width, name = 44 + 4 * (i % 2), 40, f"{split}{i}"
            y, x = np.mgrid[:height, :width]
            pixels = generator.integers(90, 130, (height, width, 3), dtype=np.uint8)
            masks = [(y >= 2) & (y < 16) & (2 + i <= x) & (x < 16 + i), (y - 30) ** 2 + (x - 24 + i) ** 2 < 64]
            entries = []
            for category, mask in zip(categories, masks if i + 1 < count else [], strict=False):
                pixels[mask] = (250, 250, 200) if category["name"] == "square" else (10, 10, 60)
                rows, columns = np.where(mask)
                x1, y1, x2, y2 = (int(v) for v in (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
                runs = np.flatnonzero(np.diff(np.r_[0, mask.T.ravel(), 0])).tolist()
                counts = np.diff([0, *runs, mask.size]).tolist()
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": i,
                        "category_id": category["id"],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": int(mask.sum()),
                        "iscrowd": 0,
                        "segmentation": {"size": [height, width], "counts": counts},
                    }
                )
                entries.append(
                    f"<object><name>{category['name']}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin>"
                    f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
                )
            images.append({"id": i, "file_name": f"{name}.png", "height": height, "width": width})
            for place in (folder / "coco" / split / f"{name}.png", folder / "voc" / "JPEGImages" / f"{name}.jpg"):
                Image.fromarray(pixels).save(place)
            (folder / "voc" / "Annotations" / f"{name}.xml").write_text(
                f"<annotation><filename>{name}.jpg</filename><size><width>{width}</width><height>{height}</height>"
                f"<depth>3</depth></size>{''.join(entries)}</annotation>"
            )
        listed = "\n".join(f"{split}{i}" for i in range(count))
        (folder / "voc" / "ImageSets" / "Main" / f"{split}.txt").write_text(listed)
        (folder / "coco" / f"{split}.json").write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": categories})
        )
        save_yolo(folder / "coco" / split, folder / "yolo")
    return folder


def save_yolo(images: Path, folder: Path) -> None:
    """A split of COCO's layout in YOLO's: the boxes as polygons of four points, in shares of their image."""
    content = json.loads(images.with_suffix(".json").read_text())
    (folder / "labels" / images.name).mkdir(parents=True)
    shutil.copytree(images, folder / "images" / images.name)
    for image in content["images"]:
        width, height, lines = image["width"], image["height"], ""
        for item in content["annotations"]:
            if item["image_id"] == image["id"]:
                left, top = item["bbox"][0] / width, item["bbox"][1] / height
                right, bottom = left + item["bbox"][2] / width, top + item["bbox"][3] / height
                number = [category["id"] for category in content["categories"]].index(item["category_id"])
                lines += f"{number} {left} {top} {right} {top} {right} {bottom} {left} {bottom}\n"
        (folder / "labels" / images.name / image["file_name"]).with_suffix(".txt").write_text(lines)
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [square, disc]\n")


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


_SMALL_HEADS: dict[str, dict[str, Any]] = {
    "retinanet": {"fpn_channels": 16},
    "mask2former": {
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "encoder_feedforward_dim": 16,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_attention_heads": 2,
        "dim_feedforward": 16,
        "num_queries": 5,
        "train_num_points": 32,
    },
}
_SMALL_RCNN = {
    "fpn_channels": 16,
    "box_head_dim": 16,
    "mask_dim": 8,
    "rpn_pre_nms_top_n_train": 50,
    "rpn_post_nms_top_n_train": 50,
    "rpn_pre_nms_top_n_test": 50,
    "rpn_post_nms_top_n_test": 20,
    "box_batch_size_per_image": 16,
}


def small_head(head: str) -> dict[str, Any]:
    """The options of a config that make a head small."""
    return _SMALL_HEADS.get(head, _SMALL_RCNN)


def detect(root: Path, head: str = "retinanet", layout: str = "voc", output: str = "run", **training: Any) -> Any:
    """The values of a config that finds shapes with a small head over the tiny Swin; with masks where the head has."""
    if not (root / "model").exists():
        save_swin(root / "model")
    if not (root / "shapes").exists():
        save_shapes(root / "shapes")
    data = {
        "coco": {"images": str(root / "shapes/coco/{split}"), "annotations": str(root / "shapes/coco/{split}.json")},
        "voc": {"source": str(root / "shapes/voc"), "labels": ["square", "disc"]},
        "yolo": {"source": str(root / "shapes/yolo")},
    }
    return {
        "task": "instance-segmentation" if "mask" in head else "object-detection",
        "model": str(root / "model"),
        "head": head,
        "data": data[layout],
        "output": str(root / output),
        "image_size": 32,
        "model_options": small_head(head),
        "training": QUICK | {"per_device_train_batch_size": 2} | training,
    }


def write(path: Path, values: dict[str, Any]) -> Path:
    """Write a config as YAML."""
    path.write_text(json.dumps(values))  # which is YAML, too
    return path
