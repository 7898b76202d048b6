"""YOLO's text files: Ultralytics' layout, exports of Roboflow, CVAT and Label Studio, and what is refused by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from e3va_peft.data.config import DataConfig
from e3va_peft.data.examples import Split
from e3va_peft.data.formats import load_eval_split, load_splits
from e3va_peft.data.objects import decode_mask
from e3va_peft.data.verify import verify_split
from e3va_peft.errors import UserError

WIDTH, HEIGHT = 20, 10
BOX = "1 0.35 0.4 0.5 0.6"  # x 2 to 12, y 1 to 7 of 20 x 10 pixels
POLYGON = "0 0.1 0.1 0.6 0.1 0.6 0.7 0.1 0.7"  # the same rectangle
CORNERS = [[2, 1, 12, 7]]


def example(root: Path, name: str, labels: str | None = None) -> None:
    """An image, by its path below the root, and its label file, if any, in the parallel folder."""
    image = root / name
    image.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(image)
    if labels is not None:
        label = root / name.replace("images/", "labels/")
        label.parent.mkdir(parents=True, exist_ok=True)
        label.with_suffix(".txt").write_text(labels)


def described(root: Path, text: str = "train: images/train\nval: images/val\nnames: [cat, dog]\n") -> DataConfig:
    (root / "data.yaml").write_text(text)
    return DataConfig(source=str(root))


def ultralytics(root: Path, labels: str = BOX, **yaml: str) -> DataConfig:
    """The layout of the documentation: images/train and labels/train, images/val and labels/val."""
    example(root, "images/train/a.jpg", labels)
    example(root, "images/val/b.jpg", BOX)
    return described(root, **yaml)


def both(config: DataConfig, kind: Any = "boxes") -> tuple[Split, Split]:
    train, evaluation = load_splits(config, kind)
    assert evaluation is not None
    return train, evaluation


def refused(config: DataConfig, *parts: str, kind: Any = "boxes") -> None:
    with pytest.raises(UserError) as error:
        load_splits(config, kind)
    assert all(part in str(error.value) for part in parts), error.value


# --- what is read ----------------------------------------------------------------------------------------------------


def test_boxes_are_shares_of_the_image(tmp_path):
    train, evaluation = both(ultralytics(tmp_path))
    image, objects = train[0]
    assert image.size == (WIDTH, HEIGHT) and train.labels == ("cat", "dog")
    np.testing.assert_allclose(objects.boxes, CORNERS)
    assert objects.labels.tolist() == [1] and objects.masks is None and objects.areas.round(6).tolist() == [60]
    assert "val" in evaluation.name and verify_split(train).tolist() == [0, 1]


@pytest.mark.parametrize("place", ["data.yaml", "other.yml"])
def test_the_yaml_itself_may_be_the_source(place, tmp_path):
    config = ultralytics(tmp_path)
    (tmp_path / "data.yaml").rename(tmp_path / place)
    config.source = str(tmp_path / place)
    assert [len(split) for split in both(config)] == [1, 1]


def test_polygons_are_masks_and_give_boxes(tmp_path):
    config = ultralytics(tmp_path, POLYGON)
    example(tmp_path, "images/val/b.jpg", POLYGON)
    objects = both(config, "instances")[0][0][1]
    np.testing.assert_allclose(objects.boxes, CORNERS)
    (mask,) = objects.masks
    expected = np.zeros((HEIGHT, WIDTH), dtype=bool)
    expected[1:7, 2:12] = True
    np.testing.assert_array_equal(decode_mask(mask), expected)
    assert objects.areas.tolist() == [60]


def test_polygons_and_boxes_may_be_mixed_where_boxes_are_wanted(tmp_path):
    objects = both(ultralytics(tmp_path, f"{POLYGON}\n\n{BOX}\n"))[0][0][1]
    np.testing.assert_allclose(objects.boxes, CORNERS * 2)
    assert objects.labels.tolist() == [0, 1] and objects.masks is None


def test_an_image_without_label_file_or_with_an_empty_one_has_no_objects(tmp_path):
    config = ultralytics(tmp_path)
    example(tmp_path, "images/train/empty.png", " \n")
    example(tmp_path, "images/train/none.png")
    train, _ = both(config)
    assert [len(train[i][1]) for i in range(3)] == [1, 0, 0]
    assert train[2][1].boxes.shape == (0, 4) and verify_split(train).tolist() == [0, 1]


def test_numbers_a_little_beyond_the_image_are_taken_for_its_edge(tmp_path):
    objects = both(ultralytics(tmp_path, "0 1.004 0.5 0.5 1.0000001\n1.0 0.5 -0.009 0.1 1"))[0][0][1]
    assert objects.boxes.min() == 0 and objects.boxes.max() == WIDTH and objects.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    "names", ["[cat, dog]", "{0: cat, 1: dog}", "{1: dog, 0: cat}", "{'0': cat, '1': dog}"], ids=str
)
def test_names_are_a_list_or_by_id(names, tmp_path):
    text = f"train: images/train\nval: images/val\nnc: 2\nnames: {names}\n"
    assert both(ultralytics(tmp_path, text=text))[0].labels == ("cat", "dog")


def test_names_come_from_the_config_where_the_yaml_has_none_or_others(tmp_path):
    config = ultralytics(tmp_path, text="train: images/train\nval: images/val\n")
    refused(config, "data.yaml: has no names", "data.labels")
    config.labels = ["Katze", "Hund"]
    assert both(config)[0].labels == ("Katze", "Hund")
    described(tmp_path)
    assert both(config)[0].labels == ("Katze", "Hund")
    config.labels = ["Katze"]
    refused(config, "data.labels: has 1 names, the dataset 2")


def test_splits_are_folders_lists_of_folders_or_lists_of_images(tmp_path):
    for name in ("images/a/1.png", "images/a/deep/2.png", "images/b/3.png", "images/c/4.png", "images/c/5.png"):
        example(tmp_path, name, BOX)
    (tmp_path / "some.txt").write_text("./images/c/4.png\n\nimages/c/5.png\n./images/c/4.png\n")
    train, evaluation = both(described(tmp_path, "train: [images/a, images/b]\nval: some.txt\nnames: [x, y]"))
    assert [Path(row["image"]["path"]).name for row in train.rows] == ["1.png", "2.png", "3.png"]
    assert len(evaluation) == 2 and all(len(evaluation[i][1]) == 1 for i in range(2))


@pytest.mark.parametrize("path", [".", "{}", "/content/elsewhere", "coco8"])
def test_a_path_that_is_not_there_is_the_folder_of_the_yaml(path, tmp_path):
    text = f"path: {path.format(tmp_path)}\ntrain: images/train\nval: images/val\nnames: [cat, dog]"
    assert len(both(ultralytics(tmp_path, text=text))[0]) == 1


def test_a_path_beside_the_yaml_is_where_images_are(tmp_path):
    ultralytics(tmp_path / "set")
    config = described(tmp_path, "path: set\ntrain: images/train\nval: images/val\nnames: [cat, dog]")
    assert len(both(config)[0]) == 1


def test_labels_lie_beside_the_last_folder_called_images(tmp_path):
    both(ultralytics(tmp_path / "images" / "set"))
    example(tmp_path / "flat", "train/a.png")
    (tmp_path / "flat" / "train" / "a.txt").write_text(BOX)
    flat = described(tmp_path / "flat", "train: train\nnames: [cat, dog]")
    assert len(load_splits(flat, "boxes")[0][0][1]) == 1, "beside the image, where no folder is called images"


def test_a_model_is_evaluated_by_the_names_of_its_classes(tmp_path):
    config = ultralytics(tmp_path)
    split = load_eval_split(config, "boxes", ["bird", "dog", "cat"])
    assert split is not None and split.labels == ("bird", "dog", "cat") and split[0][1].labels.tolist() == [1]
    with pytest.raises(UserError, match=r"data\.yaml: .*\['cat'\]"):
        load_eval_split(config, "boxes", ["bird", "dog"])
    config.labels = ["Katze", "Hund"]
    split = load_eval_split(config, "boxes", ["Katze", "Hund"])
    assert split is not None and split[0][1].labels.tolist() == [1]


def test_a_share_can_be_set_aside(tmp_path):
    config = ultralytics(tmp_path)
    example(tmp_path, "images/train/c.jpg", BOX)
    config.eval_fraction = 0.5
    assert [len(split) for split in both(config)] == [1, 1]


# --- exports ---------------------------------------------------------------------------------------------------------


def test_roboflow_writes_paths_that_begin_beside_its_folder(tmp_path):
    root = tmp_path / "cells-1"
    for split in ("train", "valid", "test"):
        example(root, f"{split}/images/{split}_jpg.rf.01.jpg", POLYGON)
    places = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
    text = f"{places}\nnc: 2\nnames: ['cat', 'dog']\n\nroboflow:\n  version: 1\n"
    train, evaluation = both(described(root, text), "instances")
    assert "valid_jpg" in evaluation.where(0) and train[0][1].labels.tolist() == [0]


def test_roboflow_paths_that_are_there_as_written_are_taken(tmp_path):
    example(tmp_path, "train/images/right.jpg", BOX)
    example(tmp_path / "yaml", "train/images/wrong.jpg", BOX)
    config = described(tmp_path / "yaml", "train: ../train/images\nnames: [cat, dog]")
    assert "right.jpg" in load_splits(config, "boxes")[0].where(0)


@pytest.mark.parametrize("prefix", ["", "data/"])
def test_cvat_lists_the_images_of_its_subsets(prefix, tmp_path):
    for name in ("frame_1", "frame_2"):
        example(tmp_path, f"images/train/{name}.png", BOX)
    example(tmp_path, "images/train/not_listed.png", BOX)
    (tmp_path / "train.txt").write_text("".join(f"{prefix}images/train/frame_{i}.png\n" for i in (2, 1)))
    split, none = load_splits(described(tmp_path, "names:\n  0: cat\n  1: dog\npath: .\ntrain: train.txt\n"), "boxes")
    assert none is None and len(split) == 2 and "frame_2" in split.where(0)


def test_label_studio_has_classes_and_no_yaml(tmp_path):
    example(tmp_path, "images/0a1b-x.jpg", BOX)
    example(tmp_path, "images/2c3d-y.jpg")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "notes.json").write_text(json.dumps({"categories": [{"id": 0, "name": "cat"}]}))
    split, none = load_splits(DataConfig(source=str(tmp_path)), "boxes")
    assert none is None and split.labels == ("cat", "dog") and len(split) == 2
    np.testing.assert_allclose(split[0][1].boxes, CORNERS)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("2 0.5 0.5 0.1 0.1", ["class 2", "0 to 1"]),
        ("-1 0.5 0.5 0.1 0.1", ["class -1"]),
        ("0.5 0.5 0.5 0.1 0.1", ["class 0.5"]),
        ("dog 0.5 0.5 0.1 0.1", ["'dog'", "not a number"]),
        ("0 nan 0.5 0.1 0.1", ["'nan'", "not a number"]),
        ("0 0.5 0.5 0.1 inf", ["'inf'", "not a number"]),
        ("0 0.5 0.5 0.1", ["4 numbers", "A box has 5"]),
        ("0 0.5 0.5 0.1 0.1 0.9", ["6 numbers"]),
        ("0 0.5 0.5 0.1 0.1 0.9 0.9 0.8", ["8 numbers"]),
        ("0 10 5 4 4", ["has 10", "Divide pixels"]),
        ("0 0.5 0.5 -0.1 0.1", ["has -0.1"]),
        ("0 0.1 0.1 0.6 0.1 0.6 1.2", ["has 1.2"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_line_is_named_with_its_file(line, parts, tmp_path):
    config = ultralytics(tmp_path, f"{BOX}\n\n{line}\n")
    refused(config, str(Path("labels", "train", "a.txt")), "line 3", "1 of 1 label files", *parts)


def test_ten_malformed_files_are_named_at_once(tmp_path):
    config = ultralytics(tmp_path)
    for i in range(12):
        example(tmp_path, f"images/train/x{i:02}.png", "7 0.5 0.5 0.1 0.1")
    refused(config, "12 of 13 label files", "x00.txt", "x09.txt", "and 2 more")


@pytest.mark.parametrize("labels", [BOX, f"{POLYGON}\n{BOX}"], ids=["boxes", "both"])
def test_boxes_are_refused_where_masks_are_needed(labels, tmp_path):
    line = len(labels.splitlines())
    refused(ultralytics(tmp_path, labels), "a.txt", f"line {line}: is a box", "needs polygons", kind="instances")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: [", ["data.yaml: is not valid YAML"]),
        ("- train", ["is a list", "names:"]),
        ("names: [cat, dog]", ["neither train nor val"]),
        ("train: images/train\nnc: 3\nnames: [cat, dog]", ["nc is 3", "names has 2"]),
        ("train: images/train\nnames: {0: cat, 2: dog}", ["ids [0, 2]", "0 to 1"]),
        ("train: images/train\nnames: [true, false]", ["[True, False]", "quoted"]),
        ("train: images/train\nnames: cat", ["names 'cat'"]),
        ("train: images/train\nnames: [cat, cat]", ["all different"]),
        ("train: 7\nnames: [cat, dog]", ["has 7 for train"]),
        ("path: 7\ntrain: images/train\nnames: [cat, dog]", ["path 7"]),
        ("train: images/trian\nnames: [cat, dog]", ["train: images/trian", "not there"]),
        ("train: images/train\nkpt_shape: [17, 3]\nnames: [cat, dog]", ["kpt_shape", "keypoints"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_yaml_that_cannot_work_is_named(text, parts, tmp_path):
    refused(ultralytics(tmp_path, text=text), *parts)


def test_a_list_may_name_images_of_its_data_set_alone_as_it_is_written_or_by_their_full_path(tmp_path):
    config = ultralytics(tmp_path / "set", text="train: lists/train.txt\nnames: [cat, dog]")
    (tmp_path / "set" / "lists").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "set")
    inside = tmp_path / "set" / "images" / "train" / "a.jpg"
    for line in (inside, "../images/train/a.jpg", tmp_path / "link" / "images" / "train" / "a.jpg"):
        (tmp_path / "set" / "lists" / "train.txt").write_text(f"{line}\n")
        assert len(load_splits(config, "boxes")[0]) == 1
    example(tmp_path, "other/images/b.jpg", BOX)
    for line in (tmp_path / "other" / "images" / "b.jpg", "../../other/images/b.jpg"):
        (tmp_path / "set" / "lists" / "train.txt").write_text(f"{inside}\n{line}\n")
        refused(config, "train.txt: 1 of its 2 images lie outside of ", f": {line}. ", "path:")
    described(tmp_path / "set", f"path: {tmp_path}\ntrain: set/lists/train.txt\nnames: [cat, dog]")
    assert len(load_splits(config, "boxes")[0]) == 2


def test_names_that_are_too_long_for_a_file_are_not_there(tmp_path):
    long = "a" * 5000
    config = ultralytics(tmp_path, text=f"path: {long}\ntrain: {long}\nnames: [cat, dog]")
    refused(config, "data.yaml: has train: aaa", "which is not there")
    described(tmp_path, "train: train.txt\nnames: [cat, dog]")
    (tmp_path / "train.txt").write_text(f"images/train/a.jpg\n{long}\n")
    refused(config, "train.txt: 1 of its 2 images are not there: aaa")
    described(tmp_path, "train: /dev/null\nnames: [cat, dog]")
    refused(config, "data.yaml: has train: /dev/null, which is not there")


def test_images_of_a_list_that_are_not_there_are_named(tmp_path):
    config = ultralytics(tmp_path, text="train: train.txt\nnames: [cat, dog]")
    (tmp_path / "train.txt").write_text("images/train/a.jpg\nimages/train/gone.jpg\n")
    refused(config, "train.txt: 1 of its 2 images are not there", "gone.jpg")


def test_a_split_without_any_label_file_is_refused(tmp_path):
    config = ultralytics(tmp_path)
    (tmp_path / "labels" / "train").rename(tmp_path / "labels" / "other")
    refused(config, "none of the 1 images of train has a label file", str(Path("labels", "train", "a.txt")))


def test_a_folder_without_yaml_is_told_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    ultralytics(tmp_path / "set")
    (tmp_path / "set" / "data.yaml").unlink()
    refused(DataConfig(source=str(tmp_path / "set")), "data.objects_column", "YOLO's text files need a data.yaml")


def test_two_images_do_not_share_a_label_file(tmp_path):
    config = ultralytics(tmp_path)
    example(tmp_path, "images/train/a.png")
    refused(config, "a.png: has the label file of a.jpg")


def test_training_images_are_not_scored_on(tmp_path):
    config = ultralytics(tmp_path, text="train: images/train\nval: ./images/../images/train\nnames: [cat, dog]")
    refused(config, "data.eval_split='val': 1 of its 1 images are trained on")


def test_an_empty_folder_is_named(tmp_path):
    config = ultralytics(tmp_path, text="train: images/none\nnames: [cat, dog]")
    (tmp_path / "images" / "none").mkdir()
    refused(config, "split 'train' is empty")
