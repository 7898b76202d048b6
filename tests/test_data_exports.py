"""COCO files as Roboflow, CVAT and Label Studio export them, taken as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from e3va_peft.data.config import DataConfig
from e3va_peft.data.examples import Split
from e3va_peft.data.formats import load_eval_split, load_splits
from e3va_peft.data.verify import verify_split
from e3va_peft.errors import UserError

WIDTH, HEIGHT = 20, 10
SQUARE = [2.0, 1.0, 12.0, 1.0, 12.0, 7.0, 2.0, 7.0]
CELLS = [
    {"id": 0, "name": "cells", "supercategory": "none"},
    {"id": 1, "name": "RBC", "supercategory": "cells"},
    {"id": 2, "name": "WBC", "supercategory": "cells"},
]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(path)


def content(name: str, categories: list[dict[str, Any]], category: int, **annotation: Any) -> dict[str, Any]:
    """A COCO file of one image with one object."""
    thing = {"id": 0, "image_id": 0, "category_id": category, "bbox": [2, 1, 10, 6], "area": 60, "iscrowd": 0}
    thing["segmentation"] = []
    image = {"id": 0, "file_name": name, "width": WIDTH, "height": HEIGHT}
    return {"info": {}, "categories": categories, "images": [image], "annotations": [thing | annotation]}


def roboflow(root: Path, categories: list[dict[str, Any]] = CELLS, **used: int) -> DataConfig:
    """Roboflow's COCO export: in each split the images, and beside them the file of annotations."""
    for split, category in used.items():
        name = f"{split}_jpg.rf.0123.jpg"
        picture(root / split / name)
        (root / split / "_annotations.coco.json").write_text(json.dumps(content(name, categories, category)))
    return DataConfig(source=str(root))


def boxes(split: Split | None) -> list[list[float]]:
    assert split is not None
    return split[0][1].boxes.tolist()


# --- Roboflow --------------------------------------------------------------------------------------------------------


def test_roboflow_has_its_splits_in_folders_and_a_group_that_is_not_a_class(tmp_path):
    train, evaluation = load_splits(roboflow(tmp_path, train=1, valid=2, test=1), "boxes")
    assert train.labels == ("RBC", "WBC") and evaluation is not None and "valid" in evaluation.name
    assert train[0][1].labels.tolist() == [0] and evaluation[0][1].labels.tolist() == [1]
    assert boxes(train) == [[2, 1, 12, 7]] and verify_split(train).tolist() == [1, 0]


def test_one_folder_of_roboflow_is_for_training(tmp_path):
    roboflow(tmp_path, train=1)
    split, none = load_splits(DataConfig(source=str(tmp_path / "train")), "boxes")
    assert none is None and len(split) == 1


def test_roboflow_works_by_images_and_annotations_too(tmp_path):
    roboflow(tmp_path, train=1, valid=2)
    pattern = str(tmp_path / "{split}")
    train, evaluation = load_splits(
        DataConfig(images=pattern, annotations=f"{pattern}/_annotations.coco.json"), "boxes"
    )
    assert evaluation is not None and boxes(train) == boxes(evaluation)


@pytest.mark.parametrize("used", [{"train": 0, "valid": 1}, {"train": 1, "valid": 0}], ids=str)
def test_a_group_with_objects_in_any_split_is_a_class(used, tmp_path):
    assert load_splits(roboflow(tmp_path, **used), "boxes")[0].labels == ("cells", "RBC", "WBC")


def test_a_class_without_objects_that_groups_nothing_but_itself_stays(tmp_path):
    person = [{"id": 1, "name": "person", "supercategory": "person"}, {"id": 2, "name": "dog", "supercategory": "x"}]
    assert load_splits(roboflow(tmp_path, person, train=2), "boxes")[0].labels == ("person", "dog")


def test_a_group_may_have_the_name_of_its_only_class(tmp_path):
    categories = [
        {"id": 0, "name": "cell", "supercategory": "none"},
        {"id": 1, "name": "cell", "supercategory": "cell"},
    ]
    train, _ = load_splits(roboflow(tmp_path, categories, train=1), "boxes")
    assert train.labels == ("cell",) and train[0][1].labels.tolist() == [0]


def test_a_model_is_evaluated_on_roboflow_by_names(tmp_path):
    config = roboflow(tmp_path, test=2)
    split = load_eval_split(config, "boxes", ["WBC", "RBC"])
    assert split is not None and split[0][1].labels.tolist() == [0]
    with pytest.raises(UserError, match=r"test.*_annotations\.coco\.json: .*\['WBC'\]"):
        load_eval_split(config, "boxes", ["RBC"])


def test_renamed_classes_keep_the_group_that_was_trained_as_one(tmp_path):
    config = roboflow(tmp_path, test=2)
    config.labels = ["Zellen", "rot", "weiss"]
    split = load_eval_split(config, "boxes", config.labels)
    assert split is not None and split[0][1].labels.tolist() == [2]


# --- CVAT ------------------------------------------------------------------------------------------------------------


def cvat(root: Path, folder: str = "images/{split}", splits: tuple[str, ...] = ("default",)) -> DataConfig:
    """CVAT's COCO 1.0 export: annotations/instances_SUBSET.json; a polygon, and a mask as run lengths of numbers."""
    (root / "annotations").mkdir()
    for split in splits:
        picture(root / folder.format(split=split) / f"{split}.png")
        categories = [{"id": 1, "name": "cat", "supercategory": ""}, {"id": 2, "name": "dog", "supercategory": ""}]
        file = content(f"{split}.png", categories, 2, id=1, segmentation=[SQUARE], attributes={"occluded": False})
        runs = {"counts": [0, HEIGHT * WIDTH], "size": [HEIGHT, WIDTH]}
        file["annotations"].append({**file["annotations"][0], "id": 2, "iscrowd": 1, "segmentation": runs})
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(file))
    return DataConfig(source=str(root))


@pytest.mark.parametrize("folder", ["images/{split}", "images", "{split}"])
def test_cvat_calls_its_only_subset_default_and_it_is_trained_on(folder, tmp_path):
    split, none = load_splits(cvat(tmp_path, folder), "instances")
    assert none is None and split.labels == ("cat", "dog")
    objects = split[0][1]
    assert objects.labels.tolist() == [1, 1] and objects.crowd.tolist() == [False, True]
    assert len(objects.masks) == 2


def test_subsets_of_cvat_are_splits(tmp_path):
    train, evaluation = load_splits(cvat(tmp_path, splits=("train", "val")), "boxes")
    assert evaluation is not None and "val" in evaluation.name and len(train) == 1


def test_a_lone_split_to_evaluate_on_keeps_its_name(tmp_path):
    split = load_eval_split(cvat(tmp_path, splits=("test",)), "boxes", ["cat", "dog"])
    assert split is not None and "test" in split.name


# --- Label Studio ----------------------------------------------------------------------------------------------------


def label_studio(root: Path, name: str, file: str = "images/0a1b-x.jpg") -> DataConfig:
    """Label Studio's COCO export: result.json and images; categories from 0 and without supercategory."""
    picture(root / file)
    found = content(name, [{"id": 0, "name": "car"}, {"id": 1, "name": "bus"}], 0, ignore=0, segmentation=[SQUARE])
    (root / "result.json").write_text(json.dumps(found))
    return DataConfig(source=str(root))


NAMES = [
    "images/0a1b-x.jpg",
    "images\\0a1b-x.jpg",
    "images/3/0a1b-x.jpg",
    "../../label-studio/data/media/upload/3/0a1b-x.jpg",
    "http://localhost:8080/data/upload/3/0a1b-x.jpg",
]


@pytest.mark.parametrize("name", NAMES)
def test_label_studio_names_images_by_paths_of_its_server(name, tmp_path):
    source = label_studio(tmp_path, name)
    pair = DataConfig(images=str(tmp_path / "images"), annotations=str(tmp_path / "result.json"))
    for config in (source, pair):
        split, _ = load_splits(config, "instances")
        assert split.labels == ("car", "bus") and boxes(split) == [[2, 1, 12, 7]]


def test_an_image_is_not_guessed_among_several_of_its_name(tmp_path):
    config = label_studio(tmp_path, "../upload/x.jpg", "images/1/x.jpg")
    assert len(load_splits(config, "boxes")[0]) == 1
    picture(tmp_path / "images" / "2" / "x.jpg")
    with pytest.raises(UserError, match=r"result\.json: 1 of its 1 .*\.\./upload/x\.jpg.*data\.images"):
        load_splits(config, "boxes")


def test_an_image_that_is_missing_where_its_folder_is_there_is_not_taken_from_another_split(tmp_path):
    label_studio(tmp_path, "train/x.jpg", "images/val/x.jpg")
    config = DataConfig(images=str(tmp_path / "images"), annotations=str(tmp_path / "result.json"))
    assert len(load_splits(config, "boxes")[0]) == 1
    (tmp_path / "images" / "train").mkdir()
    with pytest.raises(UserError, match=r"1 of its 1 images are not in .*train/x\.jpg"):
        load_splits(config, "boxes")
    picture(tmp_path / "images" / "val" / "deeper" / "y.jpg")
    (tmp_path / "images" / "val" / "x.jpg").unlink()
    for name in ("val/y.jpg", str(tmp_path / "images" / "train" / "y.jpg")):  # as on another machine
        found = json.loads((tmp_path / "result.json").read_text())
        found["images"][0]["file_name"] = name
        (tmp_path / "result.json").write_text(json.dumps(found))
        assert len(load_splits(config, "boxes")[0]) == 1


def test_two_entries_do_not_share_an_image_by_its_name(tmp_path):
    config = label_studio(tmp_path, "../upload/1/x.jpg", "images/x.jpg")
    found = json.loads((tmp_path / "result.json").read_text())
    found["images"].append({**found["images"][0], "id": 1, "file_name": "../upload/2/x.jpg"})
    (tmp_path / "result.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"2 of its 2 images"):
        load_splits(config, "boxes")
