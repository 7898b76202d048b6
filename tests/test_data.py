"""Images and labels from every source, and what is said of each thing that can be wrong with them."""

from __future__ import annotations

import json
import shutil
import struct
import sys
import warnings
import zlib
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import EpsImagePlugin, Image
from rich.console import Console

from e3va_peft.data import verify as verifying
from e3va_peft.data.config import DataConfig, LabelKind
from e3va_peft.data.examples import Split
from e3va_peft.data.formats import load_splits
from e3va_peft.data.images import _warn_of_dark_images, open_image, open_label_map
from e3va_peft.data.verify import missing_classes, verify_split
from e3va_peft.errors import UserError
from e3va_peft.training.run import verify
from tests.inputs import save_shapes

LABELS = ["wall", "sky", "tree"]
ROTATED = 6  # EXIF: turn by 90 degrees clockwise to see it upright


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def picture(height: int = 12, width: int = 8, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def label_map(height: int = 12, width: int = 8, count: int = 3) -> np.ndarray:
    return (np.arange(height * width, dtype=np.uint8) % count).reshape(height, width)


def image_folder(root: Path, splits: tuple[str, ...] = ("train", "val"), count: int = 3) -> Path:
    for split in splits:
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(seed=i).save(root / split / name / f"{i}.png")
    return root


def mask_folder(root: Path, splits: tuple[str, ...] = ("training", "validation"), count: int = 3) -> DataConfig:
    """The layout of ADE20K: sub-folders and names of images and label maps agree."""
    for split in splits:
        for kind in ("images", "annotations"):
            (root / kind / split / "scene").mkdir(parents=True)
        for i in range(count):
            picture(seed=i).save(root / "images" / split / "scene" / f"{i}.jpg")
            Image.fromarray(label_map()).save(root / "annotations" / split / "scene" / f"{i}.png")
    return DataConfig(images=str(root / "images"), masks=str(root / "annotations"), labels=LABELS)


def table(label: list[Any], kind: Any = None, images: list[Image.Image] | None = None, **columns: Any) -> Any:
    features = {"image": datasets.Image(), "label": kind or datasets.Value("int64")}
    rows = {"image": images or [picture(seed=i) for i in range(len(label))], "label": label}
    if columns:
        return datasets.Dataset.from_dict(rows | columns)
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def parquet(root: Path, **splits: Any) -> DataConfig:
    (root / "tables").mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        rows.to_parquet(root / "tables" / f"{name}.parquet")
    return DataConfig(source=str(root / "tables"))


def loaded(config: DataConfig, kind: LabelKind = "class", **kwargs: Any) -> tuple[Split, Split]:
    train, evaluation = load_splits(config, kind, **kwargs)
    assert evaluation is not None
    return train, evaluation


def single(config: DataConfig, kind: LabelKind = "class") -> Split:
    return load_splits(config, kind)[0]


def refused(config: DataConfig, *parts: str, kind: LabelKind = "class") -> str:
    with pytest.raises(UserError) as error:
        load_splits(config, kind)
    assert all(part in str(error.value) for part in parts), error.value
    return str(error.value)


def broken(split: Split, *parts: str) -> str:
    """Assert that `verify_split` finds the split broken and that its message holds each of these parts."""
    with pytest.raises(UserError) as error:
        verify_split(split)
    assert all(part in str(error.value) for part in parts), error.value
    return str(error.value)


def replace(config: DataConfig, **fields: Any) -> DataConfig:
    return DataConfig(**(vars(config) | fields))


def drawn(split: Split) -> list[str]:
    return [row["image"]["path"] for row in split.rows]


def of(image: Image.Image, form: str = "PNG", **options: Any) -> dict[str, Any]:
    """An image as a dataset holds it."""
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return {"bytes": buffer.getvalue(), "path": None}


# --- sources ---------------------------------------------------------------------------------------------------------


def test_an_image_folder_has_a_class_per_sub_folder(tmp_path):
    train, evaluation = loaded(DataConfig(source=str(image_folder(tmp_path / "photos"))))
    assert train.labels == evaluation.labels == ("cat", "dog")
    assert (len(train), len(evaluation)) == (6, 6)
    image, label = train[4]
    assert label == 1 and np.array_equal(image, picture(seed=1))
    assert verify_split(train).tolist() == [3, 3]


def test_words_in_paths_are_no_splits_and_the_first_folder_is_the_class(tmp_path):
    for split in ("train", "dev"):
        for name in ("car", "train", "test strip"):
            (tmp_path / "photos" / split / name / "day 1").mkdir(parents=True)
            picture().save(tmp_path / "photos" / split / name / "a_test_1.png")
            picture().save(tmp_path / "photos" / split / name / "day 1" / "0.png")
    train, evaluation = loaded(DataConfig(source=str(tmp_path / "photos"), eval_split="validation"))
    assert train.labels == ("car", "test strip", "train")
    for split, rows in (("train", train), ("dev", evaluation)):
        assert all(Path(path).relative_to(tmp_path / "photos").parts[0] == split for path in drawn(rows))
        assert [rows[i][1] for i in range(6)] == [0, 0, 1, 1, 2, 2]
    without = DataConfig(source=str(tmp_path / "photos" / "train"))
    assert single(without).labels == train.labels and len(single(without)) == 6


def test_folders_that_may_be_splits_or_classes_and_images_beside_folders_are_refused(tmp_path):
    image_folder(tmp_path / "folds", splits=("a", "b"))
    refused(DataConfig(source=str(tmp_path / "folds")), "a, b hold folders of the same names, cat, dog", "train_split")
    assert len(single(DataConfig(source=str(tmp_path / "folds"), train_split="a", eval_split="b"))) == 6
    image_folder(tmp_path / "photos")
    picture().save(tmp_path / "photos" / "train" / "stray.png")
    refused(DataConfig(source=str(tmp_path / "photos")), "directly in train, stray.png, beside")


def test_folders_around_the_splits_are_gone_through_and_doubled_ones_are_refused(tmp_path):
    image_folder(tmp_path / "a" / "data")
    train, evaluation = loaded(DataConfig(source=str(tmp_path / "a")))
    assert train.labels == ("cat", "dog") and len(train) == len(evaluation) == 6
    (tmp_path / "b" / "default").mkdir(parents=True)
    parquet(tmp_path / "b" / "default", train=table([0, 1], datasets.Value("int64")))
    assert len(single(DataConfig(source=str(tmp_path / "b")))) == 2
    image_folder(tmp_path / "c" / "photos", splits=("seg_train/seg_train", "seg_test/seg_test"))
    config = DataConfig(source=str(tmp_path / "c"), train_split="seg_train", eval_split="seg_test")
    refused(config, "one folder of the same name each", "seg_test/seg_test up into seg_test", "data.train_split")
    refused(DataConfig(source=str(tmp_path / "c")), "one folder of the same name each")
    for split in ("seg_train", "seg_test"):
        for name in ("cat", "dog"):
            (tmp_path / "c" / "photos" / split / split / name).rename(tmp_path / "c" / "photos" / split / name)
        (tmp_path / "c" / "photos" / split / split).rmdir()
    assert len(loaded(config)[1]) == 6
    for name in ("cat", "dog"):
        image_folder(tmp_path / "d" / name, splits=("images",))
    assert single(DataConfig(source=str(tmp_path / "d"))).labels == ("cat", "dog")


def test_hidden_files_are_no_images_and_names_with_an_underscore_are_classes(tmp_path):
    photos = image_folder(tmp_path / "photos")
    for split in ("train", "val"):
        (photos / split / "dog").rename(photos / split / "_negative_")
    for junk in ("train/cat/.ipynb_checkpoints", "train/.git", "__MACOSX", "train/__MACOSX"):
        (photos / junk).mkdir()
        picture().save(photos / junk / "0-checkpoint.png")
    for junk in ("._a.png", "train/._a.png", "train/cat/._0.png"):
        (photos / junk).write_bytes(b"a resource fork")
    for suffix, kind in (("jfif", "JPEG"), ("gif", "GIF")):
        picture().save(photos / "train" / "cat" / f"more.{suffix}", kind)
    train, _ = loaded(DataConfig(source=str(photos)))
    assert train.labels == ("_negative_", "cat") and len(train) == 8


def test_images_of_a_split_that_nobody_asks_for_need_no_classes(tmp_path):
    photos = image_folder(tmp_path / "photos", splits=("train",))
    (photos / "test").mkdir()
    picture().save(photos / "test" / "0.png")
    refused(DataConfig(source=str(photos)), "directly in test")
    assert len(loaded(DataConfig(source=str(photos), eval_fraction=0.5))[0]) == 3
    image_folder(tmp_path / "photos", splits=("val",))
    train, evaluation = loaded(DataConfig(source=str(photos)))
    assert len(train) == len(evaluation) == 6


def test_a_class_that_cannot_be_read_or_is_not_trained_on_is_refused(tmp_path):
    photos = image_folder(tmp_path / "photos")
    (photos / "val" / "notes").mkdir()
    (photos / "val" / "notes" / "a.txt").write_text("no image")
    assert loaded(DataConfig(source=str(photos)))[0].labels == ("cat", "dog")
    (photos / "val" / "images").mkdir()
    picture().save(photos / "val" / "images" / "0.png")
    refused(DataConfig(source=str(photos)), "split 'validation'", "['images']", "does not have")
    assert loaded(DataConfig(source=str(photos), eval_fraction=0.5))[0].labels == ("cat", "dog")
    (photos / "train" / "fox").mkdir()
    (photos / "train" / "fox" / "0.heic").write_bytes(b"")
    refused(DataConfig(source=str(photos), eval_fraction=0.5), "fox", ".heic", "Convert")


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege")
def test_links_to_folders_are_followed_once(tmp_path):
    image_folder(tmp_path / "elsewhere", splits=("",))
    (tmp_path / "photos").mkdir()
    for name, place in (("cat", "cat"), ("fox", "dog")):
        (tmp_path / "photos" / name).symlink_to(tmp_path / "elsewhere" / place, target_is_directory=True)
    (tmp_path / "elsewhere" / "cat" / "loop").symlink_to(tmp_path / "elsewhere" / "cat", target_is_directory=True)
    split = single(DataConfig(source=str(tmp_path / "photos")))
    assert split.labels == ("cat", "fox") and len(split) == 6
    config = mask_folder(tmp_path / "maps", splits=("training",))
    for kind in ("images", "annotations"):
        (tmp_path / "maps" / kind / "training" / "scene").rename(tmp_path / kind)
        (tmp_path / "maps" / kind / "training" / "scene").symlink_to(tmp_path / kind, target_is_directory=True)
    assert len(single(config, kind="label-map")) == 3


def test_an_image_folder_without_splits_is_all_for_training(tmp_path):
    config = DataConfig(source=str(image_folder(tmp_path / "photos", splits=("",))))
    train, evaluation = load_splits(config, kind="class")
    assert len(train) == 6 and evaluation is None


@pytest.mark.parametrize(
    ("label", "kind", "names"),
    [
        ([0, 1, 1], datasets.ClassLabel(names=["cat", "dog"]), ("cat", "dog")),
        ([0, 1, 1], datasets.Value("int64"), ("0", "1")),
        ([0, 2, 2], datasets.Value("uint8"), ("0", "1", "2")),
        (["dog", "cat", "dog"], datasets.Value("string"), ("cat", "dog")),
        ([True, False, True], datasets.Value("bool"), ("0", "1")),
    ],
    ids=["ClassLabel", "int64", "uint8", "string", "bool"],
)
def test_parquet_with_classes_of_any_type(label, kind, names, tmp_path):
    train, evaluation = loaded(parquet(tmp_path, train=table(label, kind), test=table(label, kind)))
    assert train.labels == evaluation.labels == names
    expected = [names.index(value) if isinstance(value, str) else int(value) for value in label]
    assert [train[i][1] for i in range(3)] == [evaluation[i][1] for i in range(3)] == expected
    assert np.array_equal(train[2][0], picture(seed=2))


def test_a_single_parquet_file_is_a_training_split(tmp_path):
    config = parquet(tmp_path, any_name=table([0, 1]))
    train, evaluation = load_splits(replace(config, source=f"{config.source}/any_name.parquet"), kind="class")
    assert len(train) == 2 and evaluation is None


def test_loading_parquet_keeps_one_copy_of_the_images(tmp_path):
    loaded(parquet(tmp_path, train=table([0, 1]), test=table([0, 1])))
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 2


@pytest.mark.parametrize("column", ["annotation", "mask", "anything"])
def test_parquet_with_label_maps_in_a_second_image_column(column, tmp_path):
    features = datasets.Features({column: datasets.Image(), "image": datasets.Image(), "id": datasets.Value("int64")})
    rows = {"image": [picture()], column: [Image.fromarray(label_map())], "id": [7]}
    config = parquet(tmp_path, train=datasets.Dataset.from_dict(rows, features=features))
    if column == "anything":
        refused(config, "data.image_column", "Name one", kind="label-map")
        config = replace(config, label_column=column)
    image, mask = single(replace(config, labels=LABELS), kind="label-map")[0]
    assert np.array_equal(image, picture()) and np.array_equal(mask, label_map())


def test_what_save_to_disk_wrote_of_several_splits_or_of_one(tmp_path):
    rows = table([0, 1, 1], datasets.ClassLabel(names=["cat", "dog"]))
    datasets.DatasetDict(train=rows, validation=rows.select([1])).save_to_disk(tmp_path / "several")
    rows.save_to_disk(tmp_path / "one")
    train, evaluation = loaded(DataConfig(source=str(tmp_path / "several")))
    assert train.labels == ("cat", "dog") and len(train) == 3 and evaluation[0][1] == 1
    assert len(single(DataConfig(source=str(tmp_path / "one")))) == 3


def test_ade20k_folders_with_reduced_labels_and_the_names_of_object_info(tmp_path):
    config = mask_folder(tmp_path)
    info = tmp_path / "objectInfo150.txt"
    info.write_text("Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t9\t1\twall\n2\t0.1\t9\t1\tbuilding, edifice\n\n")
    train, evaluation = loaded(replace(config, labels=str(info), reduce_labels=True), kind="label-map")
    assert train.labels == evaluation.labels == ("wall", "building, edifice")
    expected = np.array([255, 0, 1])[label_map()]
    assert np.array_equal(train[0][1], expected) and np.array_equal(evaluation[2][1], expected)
    assert train[0][1].dtype == np.int64
    assert verify_split(train).tolist() == [3 * 32, 3 * 32]


@pytest.mark.parametrize("text", ["wall\nsky\n\ntree\n", "\ufeffwall\r\nsky\r\ntree"])
def test_class_names_from_a_text_file(text, tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes(text.encode())
    assert single(replace(mask_folder(tmp_path), labels=str(path)), kind="label-map").labels == tuple(LABELS)


def test_class_names_by_their_number(tmp_path):
    assert single(replace(mask_folder(tmp_path), labels=4), kind="label-map").labels == ("0", "1", "2", "3")


def test_folders_of_images_and_masks_without_splits_are_all_for_training(tmp_path):
    config = mask_folder(tmp_path, splits=("",))
    for kind in ("images", "annotations"):
        for path in (tmp_path / kind / "scene").iterdir():
            path.rename(tmp_path / kind / path.name)
        (tmp_path / kind / "scene").rmdir()
    train, evaluation = load_splits(config, kind="label-map")
    assert len(train) == 3 and evaluation is None


def test_a_test_split_without_label_maps_is_left_alone(tmp_path):
    config = mask_folder(tmp_path)
    (tmp_path / "images" / "test").mkdir()
    picture().save(tmp_path / "images" / "test" / "0.jpg")
    assert len(loaded(config, kind="label-map")[0]) == 3
    refused(
        replace(config, eval_split="test"), "no label map", str(tmp_path / "annotations" / "test"), kind="label-map"
    )


def test_folders_that_are_no_splits_do_not_hide_the_images_beside_them(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder / ".ipynb_checkpoints").mkdir(parents=True)
        for name in "ab":
            Image.new("L", (8, 6)).save(tmp_path / folder / f"{name}.png")
    config = DataConfig(images=str(tmp_path / "images"), masks=str(tmp_path / "masks"), labels=["x", "y"])
    assert len(single(config, kind="label-map")) == 2
    for folder in ("images", "masks"):
        (tmp_path / folder / "train").mkdir()
        Image.new("L", (8, 6)).save(tmp_path / folder / "train" / "c.png")
    refused(config, "directly in it, a.png, b.png", "train", kind="label-map")


def test_a_table_of_a_test_split_without_label_maps_is_left_alone(tmp_path):
    rows = {"train": ["image", "label"], "validation": ["image", "label"], "test": ["image"]}
    for name, columns in rows.items():
        features = datasets.Features({column: datasets.Image() for column in columns})
        part = datasets.Dataset.from_dict({column: [Image.new("L", (8, 6))] * 2 for column in columns}, features)
        part.save_to_disk(tmp_path / "set" / name)
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps({"splits": list(rows)}))
    config = DataConfig(source=str(tmp_path / "set"), labels=["x", "y"])
    assert [len(split) for split in loaded(config, kind="label-map")] == [2, 2]
    refused(replace(config, eval_split="test"), "split 'test' has the columns ['image']", kind="label-map")


def test_an_archive_beside_the_folders_that_it_held_is_left_alone(tmp_path):
    for name in ("cat", "dog", "test dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        picture().save(tmp_path / "photos" / name / "train.png")
    for suffix in ("zip", "tar.gz"):
        (tmp_path / "photos" / f"photos.{suffix}").write_bytes(b"never opened")
    train = single(DataConfig(source=str(tmp_path / "photos")))
    assert len(train) == 3 and train.labels == ("cat", "dog", "test dog")


def test_classes_are_matched_by_name_where_a_split_numbers_them_in_another_way(tmp_path):
    rows = {
        "train": table([0, 1], datasets.ClassLabel(names=["cat", "dog"])),
        "test": table([0, 1], datasets.ClassLabel(names=["dog", "cat"])),
    }
    for name, part in rows.items():
        part.save_to_disk(tmp_path / "set" / name)
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    train, evaluation = loaded(DataConfig(source=str(tmp_path / "set")))
    assert [train[i][1] for i in (0, 1)] == [0, 1] and [evaluation[i][1] for i in (0, 1)] == [1, 0]
    renamed = loaded(DataConfig(source=str(tmp_path / "set"), labels=["tom", "rex"]))
    assert [[split[i][1] for i in (0, 1)] for split in renamed] == [[0, 1], [1, 0]]


def test_columns_are_found_or_named(tmp_path):
    rows = {"picture": [picture(), picture(seed=1)], "kind": [1, 0], "other": [0, 0]}
    config = parquet(tmp_path, train=datasets.Dataset.from_dict(rows))
    refused(config, "data.label_column", "['picture', 'kind', 'other']", "Name one")
    split = single(replace(config, label_column="kind"))
    assert [split[i][1] for i in (0, 1)] == [1, 0]
    refused(replace(config, label_column="kinds"), "data.label_column='kinds'", "no such column")
    refused(replace(config, label_column="kind", image_column="kind"), "no images")


# --- splits and samples ----------------------------------------------------------------------------------------------


def test_splits_are_named_or_found_and_never_the_same(tmp_path):
    config = DataConfig(source=str(image_folder(tmp_path / "photos", splits=("train", "valid", "test"))))
    train, evaluation = loaded(config)
    assert train.name.endswith(", train") and "valid" in evaluation.name
    refused(replace(config, train_split="trian"), "data.train_split='trian'", "['test', 'train', 'validation']")
    refused(replace(config, eval_split="train"), "data.eval_split='train'", "what is trained on")


def test_one_split_in_two_folders_is_refused_unless_one_is_chosen(tmp_path):
    folders = {"train": 1, "val": 2, "valid": 3, "test": 1, "eval": 1}
    for name, count in folders.items():
        image_folder(tmp_path / "photos", splits=(name,), count=count)
    config = DataConfig(source=str(tmp_path / "photos"))
    refused(config, "folders val and valid, which both mean 'validation'", "data.eval_split")
    refused(replace(config, eval_split="test"), "folders eval and test")
    for name in ("val", "valid", "eval"):
        assert len(loaded(replace(config, eval_split=name))[1]) == 2 * folders[name]
    image_folder(tmp_path / "photos", splits=("training",), count=4)
    refused(replace(config, eval_split="val"), "folders train and training", "data.train_split")
    assert len(loaded(replace(config, train_split="training", eval_split="val"))[0]) == 8


def test_a_source_without_a_training_split_lists_what_there_is(tmp_path):
    refused(
        replace(mask_folder(tmp_path, ("fold1", "fold2"))), "data.train_split", "['fold1', 'fold2']", kind="label-map"
    )


def test_samples_to_train_on_are_drawn_by_the_seed_and_those_to_score_on_are_the_same_for_all(tmp_path):
    config = DataConfig(source=str(image_folder(tmp_path / "photos", count=10)), train_samples=5, eval_samples=4)
    (train, evaluation), (again, _), (other, same) = (loaded(config, seed=seed) for seed in (1, 1, 2))
    assert (len(train), len(evaluation)) == (5, 4)
    assert drawn(train) == drawn(again) and len(set(drawn(train))) == 5
    assert drawn(train) != drawn(other) and drawn(evaluation) == drawn(same)  # scores of seeds are compared
    assert len(loaded(replace(config, train_samples=99))[0]) == 20


def test_a_fraction_set_aside_is_the_same_each_time_and_in_no_other_split(tmp_path):
    config = DataConfig(source=str(image_folder(tmp_path / "photos", splits=("",), count=10)), eval_fraction=0.25)
    train, evaluation = loaded(config, seed=1)
    assert (len(train), len(evaluation)) == (15, 5)
    assert set(drawn(train)) | set(drawn(evaluation)) == {str(p) for p in (tmp_path / "photos").rglob("*.png")}
    assert drawn(evaluation) == drawn(loaded(config, seed=2)[1])


def test_a_fraction_of_too_few_examples_is_refused(tmp_path):
    config = parquet(tmp_path, train=table([0, 1]))
    refused(replace(config, eval_fraction=0.9), "data.eval_fraction=0.9", "of 2 examples")


# --- what cannot work ------------------------------------------------------------------------------------------------


def test_a_missing_folder_is_named_with_the_place_it_was_looked_for(tmp_path):
    refused(DataConfig(source=str(tmp_path / "nowhere")), str(tmp_path / "nowhere"), "no such file or folder", "from ")
    config = mask_folder(tmp_path)
    for field in ("images", "masks"):
        refused(replace(config, **{field: "nowhere"}), f"data.{field}='nowhere'", "no such folder", kind="label-map")
    refused(replace(config, labels="nowhere.txt"), "data.labels='nowhere.txt'", "no such file", kind="label-map")


@pytest.mark.parametrize("field", ["source", "images", "masks", "annotations", "labels"])
def test_a_path_that_is_too_long_for_one_is_named(field):
    with pytest.raises(UserError, match=rf"data\.{field}='a+\.\.\.': has 5000 letters"):
        DataConfig(**{field: "a" * 5000})


@pytest.mark.parametrize("name", ["../outside.png", "{root}/outside.png"])
def test_a_metadata_file_names_images_of_its_folder_alone(name, tmp_path):
    name = name.format(root=tmp_path)
    picture().save(tmp_path / "outside.png")
    (tmp_path / "photos").mkdir()
    picture().save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "metadata.csv").write_text(f"file_name,label\na.png,cat\n{name},dog\n")
    refused(DataConfig(source=str(tmp_path / "photos")), "photos", name)


def test_a_table_holds_its_images_or_names_files_beside_it(tmp_path):
    inside, elsewhere = tmp_path / "tables" / "deep" / "a.png", tmp_path / "outside.png"
    inside.parent.mkdir(parents=True)
    picture(seed=1).save(inside)
    picture().save(elsewhere)
    whole, *named = of(picture()), *({"path": str(path), "bytes": None} for path in (inside, elsewhere))
    configs = [DataConfig(source=str(tmp_path / name)) for name in ("tables", "tables/train.parquet")]
    file = tmp_path / "tables" / "train.parquet"
    pq.write_table(table([0, 1], images=[whole, named[0]]).data.table, file)  # to_parquet would read the files
    assert all(np.array_equal(single(config)[1][0], picture(seed=1)) for config in configs)
    pq.write_table(table([0, 1, 1], images=[whole, *named]).data.table, file)
    for config in configs:
        refused(config, f"{config.source}, split 'train', row 2: has the image {str(elsewhere)!r}, a file outside of")


def test_a_hub_id_without_network_is_explained():
    refused(DataConfig(source="nobody/nothing"), "data.source='nobody/nothing'", "on the Hub", "the network")


def test_a_source_without_images_or_classes_is_explained(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(DataConfig(source=str(tmp_path / "empty")), "data.source=", "SPLIT/CLASS/image.jpg")
    (tmp_path / "flat").mkdir()
    picture().save(tmp_path / "flat" / "0.png")
    refused(DataConfig(source=str(tmp_path / "flat")), "Give each class a sub-folder")
    (tmp_path / "table.parquet").write_bytes(b"no parquet at all")
    refused(DataConfig(source=str(tmp_path / "table.parquet")), "table.parquet", "cannot be loaded")


def test_an_empty_split_is_named(tmp_path):
    config = mask_folder(tmp_path)
    for path in tmp_path.glob("*/validation/scene/*"):
        path.unlink()
    refused(config, "split 'validation' is empty", str(tmp_path / "images"), kind="label-map")


def test_label_maps_without_names_show_their_values(tmp_path):
    refused(replace(mask_folder(tmp_path), labels=None), "data.labels: is missing", "[0, 1, 2]", kind="label-map")


@pytest.mark.parametrize("label", [10_000_000, 2**40])
def test_one_class_id_that_is_far_from_the_others_makes_no_classes(label, tmp_path):
    config = parquet(tmp_path, train=table([0, 1, label]))
    refused(config, "3 different numbers", str(label), "data.labels")
    with pytest.raises(UserError, match=r"data\.labels=100000000: .* up to 1000000"):
        replace(config, labels=100_000_000)


@pytest.mark.parametrize(
    ("labels", "stored"), [(["1", "2"], [1, 2]), (["1", "2", "3"], [3, 1, 2]), (["1", "0"], [0, 1])]
)
def test_numbers_are_not_taken_for_ids_where_other_classes_have_them_for_names(labels, stored, tmp_path):
    rows = table(stored)
    refused(replace(parquet(tmp_path / "ids", train=rows), labels=labels), "row 0: has the label", "counted from 0")
    text = rows.cast_column("label", datasets.Value("string"))
    split = single(replace(parquet(tmp_path / "names", train=text), labels=labels))
    assert [split.labels[label] for label in split.rows["label"]] == [str(label) for label in stored]
    counted = single(replace(parquet(tmp_path / "ids", train=rows), labels=4))
    assert counted.rows["label"] == stored


def test_images_of_more_pixels_than_a_limit_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    split = single(DataConfig(source=str(image_folder(tmp_path / "photos"))))
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    for limit in (95, 40):  # of 96 pixels; Pillow itself warns of the first, and fails at twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        broken(split, "photos", ".png", "pixels")


def test_a_check_holds_few_examples_at_a_time_whatever_the_number_of_processors(tmp_path, monkeypatch):
    config = parquet(tmp_path, train=table([i % 2 for i in range(60)]))
    split, running, most = single(config), [], []
    read = Split.read

    def counted(self: Split, index: int) -> Any:
        running.append(index)
        most.append(len(running))
        try:
            return read(self, index)
        finally:
            running.remove(index)

    monkeypatch.setattr(Split, "read", counted)
    monkeypatch.setattr(verifying, "usable_processors", lambda: 64)
    assert verify_split(split).tolist() == [30, 30]
    assert len(most) == 60 and max(most) <= 8


def test_the_fingerprint_of_rows_is_of_names_sizes_and_labels_and_not_of_the_place(tmp_path):
    first = single(DataConfig(source=str(image_folder(tmp_path / "photos")))).rows_fingerprint()
    shutil.copytree(tmp_path / "photos", tmp_path / "copy")
    assert single(DataConfig(source=str(tmp_path / "copy"))).rows_fingerprint() == first
    assert single(DataConfig(source=str(tmp_path / "copy"), labels=["x", "y"])).rows_fingerprint() != first
    tables = parquet(tmp_path, train=table([0, 1, 1]))
    before = single(tables).rows_fingerprint()
    assert single(parquet(tmp_path, train=table([0, 1, 0]))).rows_fingerprint() != before
    assert before.startswith("3 images (")


@pytest.mark.parametrize("labels", [["cat"], ["cat", "cat"], 1, []])
def test_names_must_be_two_or_more_and_different(labels, tmp_path):
    refused(replace(mask_folder(tmp_path), labels=labels), "data.labels=", "two or more names", kind="label-map")


@pytest.mark.parametrize("labels", [["dog", "cat"], ["dog", "wolf"], ["bird", "cat"]])
def test_a_class_does_not_get_the_name_of_another_one(labels, tmp_path):
    config = DataConfig(source=str(image_folder(tmp_path / "photos")), labels=labels)
    refused(config, "data.labels: calls class", "in the dataset that is class", "['cat', 'dog']", "rename them")
    assert single(replace(config, labels=["cat", "wolf"])).labels == ("cat", "wolf")


def test_the_number_of_names_must_be_that_of_the_dataset(tmp_path):
    config = DataConfig(source=str(image_folder(tmp_path / "photos")), labels=["cat", "dog", "cow"])
    refused(config, "data.labels: has 3 names", "2 classes: ['cat', 'dog']")
    assert single(replace(config, labels=["Katze", "Hund"])).labels == ("Katze", "Hund")


@pytest.mark.parametrize(
    ("label", "kind", "labels", "said"),
    [
        ([0, 2, 1], datasets.Value("int64"), ["cat", "dog"], "row 1: has the label 2"),
        ([0, 1, -1], datasets.Value("int64"), None, "row 2: has the label -1"),
        ([-1, -1], datasets.ClassLabel(names=["cat", "dog"]), None, "-1 means that the split has no labels"),
        ([0, None, 1], datasets.Value("int64"), None, "row 1: has no label"),
        (["cat", "cow"], datasets.Value("string"), ["cat", "dog"], "row 1: has the label 'cow'"),
        ([[0], [1]], datasets.List(datasets.Value("int64")), None, "data.label_column: holds List"),
        ([0.0, 1.0], datasets.Value("float32"), None, "data.label_column: holds Value('float32')"),
    ],
    ids=["out of range", "-1", "-1 of a ClassLabel", "none", "unknown name", "several", "float"],
)
def test_a_class_that_is_none_of_the_names_is_refused_with_its_row(label, kind, labels, said, tmp_path):
    refused(replace(parquet(tmp_path, train=table(label, kind)), labels=labels), said)


def test_a_class_of_the_evaluation_split_that_training_never_has_is_refused(tmp_path):
    config = parquet(
        tmp_path, train=table(["a", "b"], datasets.Value("string")), test=table([*"abc"], datasets.Value("string"))
    )
    refused(config, "split 'test', row 2: has the label 'c'", "data.labels")
    assert loaded(replace(config, labels=["a", "b", "c"]))[1][2][1] == 2


def test_an_image_without_mask_and_a_mask_without_image_are_named(tmp_path):
    config = mask_folder(tmp_path)
    lonely = tmp_path / "annotations" / "training" / "scene" / "1.png"
    lonely.rename(lonely.with_name("other.png"))
    image = lonely.parent.parent.parent.parent / "images" / "training" / "scene" / "1.jpg"
    refused(config, "1 of 3 files have no label map", str(image), "Add or remove", kind="label-map")
    image.unlink()
    refused(config, "1 of 3 files have no image", str(lonely.with_name("other.png")), kind="label-map")


def test_two_images_of_one_name_are_refused_not_dropped(tmp_path):
    config = mask_folder(tmp_path)
    picture().save(tmp_path / "images" / "training" / "scene" / "1.png")
    refused(config, "1.png", "1.jpg", "Rename or remove one", kind="label-map")


def test_names_with_dots_find_their_label_maps(tmp_path):
    config = mask_folder(tmp_path)
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        for i in range(3):
            path = tmp_path / kind / "training" / "scene" / f"{i}.{suffix}"
            path.rename(path.with_name(f"v1.{i}.{suffix}"))
    assert len(single(config, kind="label-map")) == 3


def test_a_mask_value_out_of_range_is_named_as_it_is_in_the_file(tmp_path):
    config = replace(mask_folder(tmp_path), labels=["wall", "sky"])
    path = str(tmp_path / "annotations" / "training" / "scene" / "0.png")
    broken(
        single(config, kind="label-map"), path, "has the label 2", "for the values 0 to 1", "data.ignore_index is 255"
    )
    reduced = replace(config, reduce_labels=True)
    verify_split(single(reduced, kind="label-map"))
    Image.fromarray(label_map(count=4)).save(path)
    broken(single(reduced, kind="label-map"), path, "has the label 3", "for the values 1 to 2", "data.reduce_labels")


def test_an_ignore_index_other_than_255_is_ignored_alone(tmp_path):
    config = replace(mask_folder(tmp_path), labels=["wall", "sky"], ignore_index=2)
    assert verify_split(single(config, kind="label-map")).tolist() == [96, 96]
    Image.fromarray(np.full((12, 8), 255, np.uint8)).save(tmp_path / "annotations" / "training" / "scene" / "0.png")
    broken(single(config, kind="label-map"), "has the label 255", "data.ignore_index is 2")


def test_an_ignore_index_in_the_file_stays_where_labels_are_reduced_and_255_is_then_no_label(tmp_path):
    config = replace(mask_folder(tmp_path), labels=["wall", "sky"], reduce_labels=True, ignore_index=254)
    path = tmp_path / "annotations" / "training" / "scene" / "0.png"
    Image.fromarray(np.array([254, 1, 2], dtype=np.uint8)[label_map()]).save(path)
    split = single(config, kind="label-map")
    assert np.array_equal(split[0][1], np.array([254, 0, 1])[label_map()])
    Image.fromarray(np.array([255, 1, 2], dtype=np.uint8)[label_map()]).save(path)
    broken(split, str(path), "has the label 255", "data.ignore_index is 254")


def test_an_ignore_index_above_255_is_found_in_a_16_bit_mask(tmp_path):
    config = replace(mask_folder(tmp_path), ignore_index=65535)
    wide = np.array([65535, 1, 2], dtype=np.uint16)[label_map()]
    Image.fromarray(wide).save(tmp_path / "annotations" / "training" / "scene" / "0.png")
    assert verify_split(single(config, kind="label-map")).tolist() == [64, 96, 96]


def test_an_ignore_index_that_reduced_labels_make_a_class_is_refused(tmp_path):
    config = replace(mask_folder(tmp_path), reduce_labels=True, ignore_index=0)
    refused(config, "data.ignore_index=0", "data.reduce_labels", kind="label-map")
    assert verify_split(single(replace(config, reduce_labels=False), kind="label-map")).tolist() == [0, 96, 96]


@pytest.mark.parametrize("size", [(6, 4), (8, 12), (13, 8)], ids=["smaller", "turned", "one row more"])
def test_a_mask_of_another_size_is_refused_with_both_sizes(size, tmp_path):
    split = single(mask_folder(tmp_path), kind="label-map")
    path = tmp_path / "annotations" / "training" / "scene" / "1.png"
    Image.fromarray(label_map(*size)).save(path)
    sizes = f"is {size[1]} x {size[0]} pixels, its image", "8 x 12", "Export the label map in the size of its image"
    broken(split, str(path), str(tmp_path / "images" / "training" / "scene" / "1.jpg"), *sizes)


def test_a_file_removed_after_the_scan_is_named(tmp_path):
    split = single(mask_folder(tmp_path), kind="label-map")
    for kind, name in (("images", "0.jpg"), ("annotations", "1.png")):
        (tmp_path / kind / "training" / "scene" / name).unlink()
    broken(split, "2 of 3 examples", "0.jpg", "1.png", "is not there any more")


def test_a_row_without_image_or_label_map_is_named(tmp_path):
    rows = table([0, 1, 0], images=[picture(), None, picture()])
    broken(single(parquet(tmp_path, train=rows)), "1 of 3 examples", "row 1: has no image")
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [picture()], "mask": [None]}, features=features)
    config = replace(parquet(tmp_path, train=rows), labels=LABELS)
    broken(single(config, kind="label-map"), "row 0: has no label")


def damaged(path: Path, damage: str) -> None:
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "garbage":
        path.write_bytes(b"\x00\x17 no image" * 20)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(data[: len(data) // 2] + bytes(20) + data[len(data) // 2 + 20 :])


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp"])
def test_a_broken_image_is_named_with_what_to_do(damage, suffix, tmp_path):
    image_folder(tmp_path / "photos")
    path = tmp_path / "photos" / "train" / "dog" / f"broken.{suffix}"
    picture(100, 80).save(path)
    damaged(path, damage)
    broken(single(DataConfig(source=str(tmp_path / "photos"))), "1 of 7 examples", str(path), "Replace it")


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "zeros"])
def test_a_broken_mask_is_named_with_what_to_do(damage, tmp_path):
    split = single(mask_folder(tmp_path), kind="label-map")
    path = tmp_path / "annotations" / "training" / "scene" / "2.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 3, (12, 8), dtype=np.uint8)).save(path)
    damaged(path, damage)
    broken(split, "1 of 3 examples", str(path), "Replace it")


def test_a_broken_image_inside_parquet_is_named_by_split_and_row(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [of(picture()), {"bytes": b"junk", "path": "x.png"}], "label": [0, 1]}
    config = parquet(tmp_path, train=datasets.Dataset.from_dict(rows, features=features))
    broken(single(config), f"{config.source}, train, row 1 (x.png): cannot be read as an image")


def test_a_tiff_whose_directory_is_damaged_is_named(tmp_path):
    image_folder(tmp_path / "photos")
    path = sorted((tmp_path / "photos" / "train").rglob("*.png"))[0]
    with BytesIO() as file:
        Image.new("RGB", (5, 4)).save(file, format="TIFF")
        damaged = bytearray(file.getvalue())
    damaged[damaged.index(b"\x11\x01") + 2] = 2  # StripOffsets are text
    path.write_bytes(damaged)
    broken(single(DataConfig(source=str(tmp_path / "photos"))), str(path), "cut short or corrupt", "Replace it")


@pytest.mark.parametrize("form", ["EPS", "PPM", "ICO"])
def test_a_file_of_another_format_is_refused_whatever_it_is_called(form, tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("it was run"))
    image_folder(tmp_path / "photos")
    path = sorted((tmp_path / "photos" / "train").rglob("*.png"))[0]
    Image.new("RGB", (16, 16)).save(path, format=form)
    split = single(DataConfig(source=str(tmp_path / "photos")))
    broken(split, str(path), "cannot be read as an image", "save it as one of BMP, GIF, JPEG")


def test_a_jpeg_of_several_pictures_is_read_as_the_first(tmp_path):
    first, file = picture(), tmp_path / "x.jpg"
    first.save(file, format="MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    assert open_image({"bytes": file.read_bytes()}, "x").size == first.size


def test_all_broken_files_are_named_at_once_up_to_ten(tmp_path):
    image_folder(tmp_path / "photos", count=8)
    paths = sorted((tmp_path / "photos" / "train").rglob("*.png"))
    for path in paths[:3]:
        path.write_bytes(b"junk")
    split = single(DataConfig(source=str(tmp_path / "photos")))
    message = broken(split, "3 of 16 examples", *map(str, paths[:3]))
    assert "more" not in message
    for path in paths[:12]:
        path.write_bytes(b"junk")
    message = broken(split, "12 of 16 examples", *map(str, paths[:10]), "... and 2 more")
    assert str(paths[10]) not in message


def test_classes_that_never_occur_are_warned_of(tmp_path):
    split = single(replace(mask_folder(tmp_path), labels=[*LABELS, "car"]), kind="label-map")
    assert missing_classes(verify_split(split), split.labels) == ["car"]
    said = StringIO()
    verify((split, None), Console(file=said, width=500))
    assert "warning: the class 'car' never occurs in" in said.getvalue() and said.getvalue().count("warning") == 1
    assert split.name in said.getvalue()


def test_class_255_of_many_is_counted(tmp_path):
    split = single(replace(parquet(tmp_path, train=table([0, 255, 256])), labels=300))
    assert verify_split(split)[[0, 254, 255, 256]].tolist() == [1, 0, 1, 1]


def classes_again(root: Path) -> tuple[Split, Split]:
    for split, form, seeds in (("train", "png", (0, 1, 2)), ("test", "bmp", (5, 1, 2))):
        for i, seed in enumerate(seeds):
            place = root / split / ("cat" if i < 2 else "dog")
            place.mkdir(parents=True, exist_ok=True)
            picture(seed=seed).save(place / f"{split}{i}.{form}")
    return loaded(DataConfig(source=str(root)))


def masks_again(root: Path) -> tuple[Split, Split]:
    config = mask_folder(root)
    picture(seed=9).save(root / "images" / "validation" / "scene" / "0.jpg")
    return loaded(config, "label-map")


def tables_again(root: Path) -> tuple[Split, Split]:
    root.mkdir()
    images = [picture(seed=i) for i in (7, 1, 2)]
    return loaded(parquet(root, train=table([0, 1, 0]), test=table([0, 1, 1], images=images)))


def coco_again(root: Path) -> tuple[Split, Split]:
    files = save_shapes(root) / "coco"
    for i in (1, 2):
        shutil.copy(files / "train" / f"train{i}.png", files / "val" / f"val{i}.png")
    return loaded(DataConfig(images=f"{files}/{{split}}", annotations=f"{files}/{{split}}.json"), "boxes")


@pytest.mark.parametrize("splits", [classes_again, masks_again, tables_again, coco_again])
def test_images_that_are_in_both_splits_are_warned_of_whatever_their_names(splits, tmp_path):
    train, evaluation = splits(tmp_path / "set")
    said = StringIO()
    verify((train, evaluation), Console(file=said, width=2000))
    (warning,) = [line for line in said.getvalue().splitlines() if "images of" in line]
    assert f": 2 of the 3 images of {evaluation.name} are images of {train.name}, too" in warning
    assert f": {evaluation.where(1)} is {train.where(1)}. " in warning


def test_an_image_that_is_twice_in_one_split_is_not_warned_of(tmp_path):
    split, said = single(parquet(tmp_path, train=table([0, 1], images=[picture()] * 2))), StringIO()
    verify((split, None), Console(file=said))
    assert said.getvalue().strip() == ""


def test_verify_reports_each_example(tmp_path):
    split, calls = single(mask_folder(tmp_path), kind="label-map"), []
    verify_split(split, lambda: calls.append(1))
    assert len(calls) == 3


# --- kinds of images -------------------------------------------------------------------------------------------------


def test_16_bit_greyscale_is_scaled_not_clipped():
    values = np.array([[0, 257, 32895, 65535]], dtype=np.uint16)
    for form in ("PNG", "TIFF"):
        image = open_image(of(Image.fromarray(values), form), "x")
        assert np.asarray(image)[0].tolist() == [[0] * 3, [1] * 3, [127] * 3, [255] * 3]


def test_images_of_12_bits_in_16_are_warned_of_once():
    dark = of(Image.fromarray(np.array([[0, 4095]], dtype=np.uint16)), "PNG")
    _warn_of_dark_images.cache_clear()
    with pytest.warns(UserWarning, match="camera of 12 or 14 bits"):
        open_image(dark, "x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_image(dark, "y")


def test_32_bit_values_beyond_16_bits_are_refused():
    image = of(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "TIFF")
    with pytest.raises(UserError, match=r"x: .*70000"):
        open_image(image, "x")


def test_floating_point_pixels_are_refused():
    image = of(Image.fromarray(np.array([[0.0, 0.5]], dtype=np.float32)), "TIFF")
    with pytest.raises(UserError, match=r"x: .*floating-point"):
        open_image(image, "x")
    with pytest.raises(UserError, match=r"x: .*F image"):
        open_label_map(image, "x")


def test_a_palette_image_shows_its_colours():
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert np.asarray(open_image(of(image), "x")).tolist() == [[[255, 0, 0], [0, 0, 255]]]


@pytest.mark.parametrize(
    ("mode", "form"), [("CMYK", "JPEG"), ("RGBA", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("RGB", "GIF")]
)
def test_every_mode_becomes_rgb_of_nearly_the_same_colours(mode, form):
    grey = Image.new("RGB", (16, 16), (255, 255, 255))
    grey.paste((0, 0, 0), (0, 0, 8, 16))
    options = {"quality": 95} if form == "JPEG" else {}
    opened = open_image(of(grey.convert(mode), form, **options), "x")
    assert opened.mode == "RGB"
    assert np.abs(np.asarray(opened).astype(int) - np.asarray(grey)).mean() < 5


def rotated(path: Path, image: Image.Image, orientation: int = ROTATED) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    image.save(path, exif=exif)


def test_an_image_is_turned_as_its_exif_tag_says(tmp_path):
    rotated(tmp_path / "x.png", picture())
    opened = open_image({"path": str(tmp_path / "x.png")}, "x")
    assert np.array_equal(opened, np.rot90(np.asarray(picture()), k=-1))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_square_image_that_is_turned_is_refused_with_its_label_map(suffix, tmp_path):
    config = mask_folder(tmp_path, count=1)
    image = tmp_path / "images" / "training" / "scene" / "0.jpg"
    image.unlink()
    rotated(image.with_suffix(f".{suffix}"), picture(8, 8), orientation=3)
    Image.fromarray(label_map(8, 8)).save(tmp_path / "annotations" / "training" / "scene" / "0.png")
    broken(single(config, kind="label-map"), "is turned by its EXIF tag, and nothing says whether the label map is")


def test_a_broken_exif_block_does_not_matter():
    data = of(picture(), "JPEG", exif=b"Exif\x00\x00junk, not a TIFF header")
    assert open_image(data, "x").size == (8, 12)


def test_a_mask_in_the_orientation_one_sees_is_accepted_and_in_the_raw_one_refused(tmp_path):
    config = mask_folder(tmp_path)
    split = single(config, kind="label-map")
    image = tmp_path / "images" / "training" / "scene" / "0.jpg"
    mask = tmp_path / "annotations" / "training" / "scene" / "0.png"
    rotated(image, picture())
    broken(split, str(mask), str(image), "is rotated by its EXIF tag, the label map is not")
    turned = np.rot90(label_map(), k=-1)
    Image.fromarray(turned).save(mask)
    assert np.array_equal(split[0][1], turned)
    image.unlink()
    rotated(image.with_suffix(".tif"), picture())  # Pillow turns it by itself
    assert np.array_equal(single(config, kind="label-map")[0][1], turned)


def test_the_indices_of_a_palette_mask_are_the_classes():
    mask = Image.fromarray(label_map(), mode="P")
    mask.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    assert np.array_equal(open_label_map(of(mask), "x"), label_map())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, bool])
def test_label_maps_of_any_depth_keep_their_values(dtype):
    values = (np.arange(96).reshape(12, 8) * 600 % 65536).astype(dtype)
    opened = open_label_map(of(Image.fromarray(values)), "x")
    assert opened.dtype == np.int64 and np.array_equal(opened, values)


@pytest.mark.parametrize("bits", [2, 4])
def test_label_maps_of_few_bits_keep_their_values(bits):
    values = np.arange(2**bits, dtype=np.uint8).repeat(8).reshape(2**bits, 8)
    rows = np.packbits(np.unpackbits(values[..., None], axis=2)[..., 8 - bits :].reshape(2**bits, -1), axis=1)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))  # Pillow writes none of these
    header = struct.pack(">IIBBBBB", 8, 2**bits, bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", content), (b"IEND", b""))
    written = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    opened = open_label_map({"bytes": b"\x89PNG\r\n\x1a\n" + b"".join(written)}, "x")
    assert np.array_equal(opened, values)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_mask_of_colours_is_refused(mode):
    with pytest.raises(UserError, match=f"x: .*{mode}"):
        open_label_map(of(Image.fromarray(label_map()).convert(mode)), "x")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF"])
def test_no_damage_to_a_file_is_more_than_a_clear_error(form):
    whole = of(picture(30, 20), form)["bytes"]
    random = np.random.default_rng(0)
    clear = 0
    for _ in range(60):
        data = bytearray(whole[: random.integers(len(whole))] if random.random() < 0.5 else whole)
        for position in random.integers(0, max(len(data), 1), 5) if data else ():
            data[position] = random.integers(256)
        for read in (open_image, open_label_map):
            try:
                read({"bytes": bytes(data)}, "x")
            except UserError as error:
                clear += str(error).startswith("x: ")
    assert clear > 30
