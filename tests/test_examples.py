"""The scripts of `examples/` run, from tiny models and pictures to adapters that load and find something."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import Mask2FormerImageProcessor, SegformerImageProcessor, pipeline

from e3va_peft import load_adapter
from tests.inputs import save_colors, save_discs, save_shapes, save_swin
from tests.models import BY_NAME

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def run(name: str, output: Path, **options) -> tuple:
    """Run a script, and load the adapter that it saved."""
    options = {"output": output, "epochs": 1, "batch-size": 4} | options
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [name, *(f"--{key.replace('_', '-')}={value}" for key, value in options.items())])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return load_adapter(str(output / "adapter"))


@pytest.mark.parametrize("name", ["classify.py", "accelerate_loop.py", "lightning_trainer.py"])
def test_a_classifier_names_the_colour_of_a_picture(name, tmp_path):
    if name == "lightning_trainer.py":
        pytest.importorskip("lightning")
    data = save_colors(tmp_path / "colors")
    model, processor = run(name, tmp_path / "run", model=save_swin(tmp_path / "model"), data=data, epochs=3)
    classify = pipeline("image-classification", model=model, image_processor=processor)
    assert {found["label"] for found in classify(str(data / "test" / "red" / "0.png"))} == {"green", "red"}


def test_upernet_finds_regions(tmp_path):
    data = save_discs(tmp_path / "discs")
    BY_NAME["swin-upernet"].base().save_pretrained(tmp_path / "model")
    SegformerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    options = {"data": data, "labels": "ground,disc", "first": 1}
    model, processor = run("segment.py", tmp_path / "run", model=tmp_path / "model", **options)
    segment = pipeline("image-segmentation", model=model, image_processor=processor)
    image = Image.open(data / "images" / "val" / "0.jpg").convert("RGB")
    found = segment(image)
    assert {each["label"] for each in found} <= {"ground", "disc"}
    assert all(each["mask"].size == image.size for each in found) and found


def test_mask2former_finds_masks(tmp_path):
    shapes = save_shapes(tmp_path / "shapes") / "coco"
    content = json.loads((shapes / "train.json").read_text())
    for item in content["annotations"]:
        x, y, width, height = item["bbox"]
        item["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    (shapes / "train.json").write_text(json.dumps(content))
    BY_NAME["swin-mask2former"].base().save_pretrained(tmp_path / "model")
    Mask2FormerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    options = {"data": shapes / "train", "annotations": shapes / "train.json"}
    model, processor = run("mask2former.py", tmp_path / "run", model=tmp_path / "model", **options)
    segment = pipeline("image-segmentation", model=model, image_processor=processor)
    found = segment(str(shapes / "val" / "val0.png"), subtask="instance", threshold=0.0)
    assert {each["label"] for each in found} <= {"square", "disc"} and found


def test_a_detector_finds_boxes(tmp_path):
    shapes = save_shapes(tmp_path / "shapes") / "coco"
    options = {"data": shapes / "train", "annotations": shapes / "train.json", "image_size": 32}
    model, processor = run("detect.py", tmp_path / "run", model=save_swin(tmp_path / "model"), **options)
    image = Image.open(shapes / "val" / "val0.png").convert("RGB")
    for module in model.modules():  # after a few steps every score is low
        if hasattr(module, "score_thresh"):
            module.score_thresh = 0.0
    found = pipeline("object-detection", model=model, image_processor=processor)(image, threshold=0.0)
    assert {each["label"] for each in found} <= {"square", "disc"} and found
    assert model.config.id2label == {0: "square", 1: "disc"}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 80
