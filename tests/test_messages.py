"""A newcomer's mistakes: each is one error, before any work, that names what was written and what to write instead."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import DINOv3ViTConfig
from typer.testing import CliRunner

from e3va_peft.cli import app
from e3va_peft.errors import UserError
from e3va_peft.training.config import parse_config, read_config
from e3va_peft.training.predict import load_trained
from e3va_peft.training.run import train
from tests.inputs import classify, segment, write


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A tiny model, and a folder of images for each mistake."""
    root = tmp_path_factory.mktemp("inputs")
    classify(root)
    red = root / "colors" / "train" / "red"
    (root / "empty").mkdir()
    for name in "ab":
        (root / "sweep" / name).mkdir(parents=True)
        (root / "sweep" / name / "config.yaml").touch()
    shutil.copytree(red, root / "flat")
    shutil.copytree(red, root / "one" / "train" / "red")
    shutil.copytree(red, root / "one-unsplit" / "red")
    for split, name in (("train", "red"), ("train", "green"), ("val", "Red")):
        shutil.copytree(red, root / "spelt" / split / name)
    for split in ("train", "val"):
        shutil.copytree(red, root / "flat-splits" / split)
    (root / "table").mkdir()
    (root / "table" / "labels.csv").write_text("file,label\na.png,red\n")
    shutil.copytree(red, root / "flat-with-table")
    for folder in (root, root / "flat-with-table"):
        (folder / "labels.csv").write_text("file,label\n0.png,red\n")
    with zipfile.ZipFile(root / "photos.zip", "w") as archive:
        archive.write(red / "0.png")
    (root / "runs" / "there").mkdir(parents=True)
    DINOv3ViTConfig().save_pretrained(root / "dinov3")
    return root


DATA = {
    "no-such-name": ("photoz", ["data.source='photoz'", "no such file or folder (from "]),
    "no-such-path": ("./photoz", ["data.source='./photoz'", "no such file or folder (from "]),
    "beside-a-folder": ("runs/photoz", ["data.source='runs/photoz'", "no such file or folder", "no folder runs"]),
    "empty": ("empty", ["data.source='empty'", "nothing that is read", "SPLIT/CLASS/image.jpg"]),
    "flat": ("flat", ["data.source='flat'", "in it directly", "CLASS/image.jpg"]),
    "flat-splits": ("flat-splits", ["directly in train and val", "SPLIT/CLASS/image.jpg"]),
    "one-class": ("one", ["one class alone", "'red' of train"]),
    "one-class-unsplit": ("one-unsplit", ["one class alone", "'red'"]),
    "csv": ("labels.csv", ["data.source='labels.csv'", "is a list", "metadata.csv", "file_name"]),
    "folder-with-csv": ("table", ["holds no image", "labels.csv", "metadata.csv"]),
    "flat-with-csv": ("flat-with-table", ["in it directly", "labels.csv", "metadata.csv"]),
    "two-spellings": ("spelt", ["spelt: has ", "the classes 'Red' and 'red'", "data.labels"]),
    "zip": ("photos.zip", ["is an archive", "Unpack it"]),
}


FIELDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "task": ({"task": "classification"}, ["task='classification'", "Did you mean image-classification"]),
    "section": ({"traning": {}}, ["traning", "Did you mean training"]),
    "method": ({"method": "qlora"}, ["method='qlora'", "Did you mean lora"]),
    "head": ({"task": "object-detection", "head": "mask-rcnn"}, ["head='mask-rcnn'", "instance-segmentation"]),
    "model-path": ({"model": "./swin"}, ["model='./swin'", "no such file or folder (from "]),
    "model-beside": ({"model": "runs/swin"}, ["model='runs/swin'", "no such file or folder (from "]),
    "lr": ({"training": {"lr": 1e-3}}, ["training.lr", "learning_rate: 0.001"]),
    "epochs": ({"training": {"epochs": 3}}, ["training.epochs", "num_train_epochs: 3"]),
    "top-epochs": ({"epochs": 3}, ["epochs: no such field", "training: {num_train_epochs: 3}"]),
    "batch_size": ({"batch_size": 8}, ["batch_size: no such field", "training: {per_device_train_batch_size: 8}"]),
    "training.batch_size": (
        {"training": {"batch_size": 8}},
        ["training.batch_size", "per_device_train_batch_size: 8"],
    ),
    "top-learning_rate": ({"learning_rate": 1e-3}, ["learning_rate: no such", "training: {learning_rate: 0.001}"]),
    "max_steps": ({"training": {"max_steps": 0}}, ["training.max_steps=0", "at least 1"]),
    "no-epochs": ({"training": {"num_train_epochs": 0}}, ["training.num_train_epochs=0", "more than 0"]),
    "logger": ({"training": {"report_to": "neptune"}}, ["training.report_to='neptune'", "pip install neptune"]),
    "no-logger": ({"training": {"report_to": ["wand"]}}, ["training.report_to='wand'", "wandb"]),
    "image_size": ({"image_size": 5}, ["image_size=5", "5 x 5 pixels"]),
    "rank": ({"method": {"name": "e3va", "rank": 8}}, ["method.rank", "called method.r."]),
    "masks": ({"data": {"images": "a", "labels_dir": "b"}}, ["data.labels_dir", "called data.masks."]),
    "model": ({"model": "swin"}, ["model='swin'", "no such folder (from ", "on the Hub it cannot be loaded"]),
    "no-classifier": (
        {"model": "dinov3"},
        ["model='dinov3': is a dinov3_vit", "no image classifier", "facebook/dinov2-base", "another task"],
    ),
    "voc-as-coco": (
        {"task": "object-detection", "data": {"images": "colors", "annotations": "colors/train"}},
        ["data.annotations='colors/train'", "is a folder", "source: 'colors'"],
    ),
    "bf16": ({"training": {"bf16": True, "use_cpu": False}}, ["training.bf16=True", "bf16: false", "use_cpu: true"]),
    "classes-for-segmenter": ({"task": "semantic-segmentation"}, ["needs a label map", "images:", "masks:"]),
    **{name: ({"data": {"source": source}}, words) for name, (source, words) in DATA.items()},
}


@pytest.mark.parametrize(("fields", "words"), FIELDS.values(), ids=FIELDS)
def test_a_mistake_is_named_with_what_to_write(fields, words, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    values = classify(inputs, eval_strategy="no") | {"output": str(tmp_path / "run")}
    more = {"training": values["training"] | fields["training"]} if "training" in fields else {}
    with pytest.raises(UserError) as error:
        train(read_config(write(tmp_path / "config.yaml", values | fields | more)))
    assert all(word in str(error.value) for word in words), error.value
    assert "Name one" not in str(error.value)  # which helps nobody who has no columns
    assert not list((tmp_path / "run").glob("*")), "nothing was begun"


def test_masks_of_0_and_255_are_not_trained_on_as_background(tmp_path):
    values = segment(tmp_path)
    values["data"] |= {"reduce_labels": False}
    for path in (tmp_path / "discs" / "masks").rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(path)) // 2 * 255).save(path)
    with pytest.raises(UserError, match=r"hold 'ground' and, at \d+ pixels, 255.*data\.verify: false"):
        train(parse_config(values))
    assert not (tmp_path / "run" / "adapter").exists()


def test_text_that_yaml_reads_otherwise_is_told_to_go_in_quotes(tmp_path):
    (tmp_path / "config.yaml").write_text("task: image-classification\noutput: {method}-photos\n")
    with pytest.raises(UserError, match=r"(?s)config\.yaml: is not valid YAML.*in quotes"):
        read_config(str(tmp_path / "config.yaml"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "labels.csv"], ["labels.csv: is a file", "e3va eval RUN"]),
        (["eval", "sweep/a", "--set", "image_size=32"], ["--set image_size=32: has no say", "data.eval_split=test"]),
        (["eval", "runs/nope"], ["runs/nope: no such folder (from "]),
        (["predict", "colors", "colors"], ["colors: is not a run", "the run comes first"]),
        (["predict", "sweep", "colors"], ["sweep: is not a run", "It holds the runs a, b; name one"]),
    ],
)
def test_what_stands_in_the_place_of_a_run_is_named(words, said, inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    result = CliRunner().invoke(app, words)
    message = " ".join(result.output.split())
    assert result.exit_code == 1 and all(each in message for each in said), message


def test_a_large_folder_that_is_no_run_is_not_walked_to_its_end(tmp_path, monkeypatch):
    def many(folder: Path, pattern: str) -> Iterator[Path]:
        yield from (folder / f"{i}.txt" for i in range(5000))
        pytest.fail("walked to the end")

    monkeypatch.setattr(Path, "rglob", many)
    with pytest.raises(UserError, match=r"is not a run, adapter or model: .* is there\.$"):
        load_trained(str(tmp_path))


@pytest.mark.parametrize("source", ["runs/nope", "./nope"])
def test_a_run_that_is_not_there_is_not_looked_for_on_the_hub(source, inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    hub: Callable[..., Any] = lambda *args, **kwargs: pytest.fail("asked the Hub")  # noqa: E731
    monkeypatch.setattr("e3va_peft.loading.snapshot_download", hub)
    with pytest.raises(UserError, match=rf"run='{source}': no such file or folder \(from {inputs}\)"):
        load_trained(source)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "my.yaml"], ["'--output'", "For example: e3va compare my.yaml --output runs/compare"]),
        (["predict", "runs/first"], ["'images", "For example: e3va predict runs/first photo.jpg more-photos/"]),
        (["export", "runs/first", "--nope"], ["--nope", "For example: e3va export runs/first model.onnx"]),
        (["plan", "--batch-size", "x"], ["--batch-size", "integer", "For example: e3va plan my.yaml"]),
    ],
)
def test_a_command_that_is_called_wrongly_shows_a_right_call(words, said):
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    output = result.output.lower()  # typer writes arguments in capitals or not
    assert result.exit_code == 2 and all(each.lower() in output for each in said), output
