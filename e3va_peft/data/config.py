"""Where the images and labels of a run are: the `data` section of its YAML file."""

import errno
import os  # no annotations from __future__: `check_fields` checks no types that are text
from dataclasses import dataclass
from typing import Literal, TypeAlias

from e3va_peft.errors import Rule, UserError, check_fields

LabelKind: TypeAlias = Literal["class", "label-map", "boxes", "instances"]
"""Labels of an image: its class, the class of each pixel, its objects' boxes, or these and their masks."""


MOST_CLASSES = 1_000_000
"""Most classes that are made of a number."""

_COUNT: Rule = (lambda count: count >= 1, "must be a whole number of at least 1, or left out for all.")
_RULES: dict[str, Rule] = {
    "eval_fraction": (lambda share: 0 < share < 1, "must be between 0 and 1, e.g. 0.1."),
    "labels": (
        lambda labels: not isinstance(labels, int) or labels <= MOST_CLASSES,
        f"must be names, or a number up to {MOST_CLASSES}. Quote it as a name: YAML reads true and 1.5 as values.",
    ),
    "ignore_index": (lambda index: 0 <= index <= 65535, "must be a whole number that a mask can hold, 0 to 65535."),
    "train_samples": _COUNT,
    "eval_samples": _COUNT,
}


@dataclass
class DataConfig:
    """Where images and labels are.

    Attributes:
        source: Hub id of a dataset, folder of images in one sub-folder per class or with a metadata.jsonl or
            metadata.csv, parquet file or folder, what `save_to_disk` of datasets wrote, folder in the layout of Pascal
            VOC (also a VOCdevkit), a data.yaml of YOLO or its folder, or folder that Roboflow, CVAT or Label Studio
            exported as COCO or YOLO.
        images: Folder of images, instead of `source`: with one sub-folder per split (ADE20K layout) and `masks`, or
            with `annotations`.
        masks: Folder of label maps as PNG, with the sub-folders and file names of `images`.
        annotations: COCO JSON of the objects in `images`. Both may hold {split}, e.g. instances_{split}2017.json;
            without it, there is one split, train. An image that is not where the JSON says is taken from anywhere in
            `images`, if one file alone has its name.
        name: Configuration of a Hub dataset.
        revision: Revision of a Hub dataset.
        train_split: Split to train on. None: train or training.
        eval_split: Split to evaluate on. None: validation, val, valid, test or testing, whichever comes first; without
            any, no evaluation. Both may join splits of Pascal VOC: VOC2007/trainval+VOC2012/trainval.
        eval_fraction: Evaluate on this share of the training split, set aside, e.g. 0.1, instead of an eval_split.
        image_column: Column of the images. None: the only one with images.
        label_column: Column of the classes or label maps. None: label, labels, fine_label, annotation, mask, ...
        objects_column: Column of the objects. None: objects, or the only one with boxes and classes.
        box_format: Of the boxes in `objects_column`: xywh (corner and size, as COCO), xyxy (two corners), or cxcywh
            (centre and size as shares of the image, as YOLO).
        labels: Class names in the order of their ids; or a text file of one name a line (also ADE20K's
            objectInfo150.txt); or just their number. None: what the dataset says.
        reduce_labels: Label maps count from 1 and 0 means "ignore", as in ADE20K: subtract one.
        ignore_index: Value in label maps that no loss and no metric counts.
        train_samples: Train on that many examples, drawn with `training.seed`.
        eval_samples: Evaluate on that many examples, the same for every seed.
        verify: Decode every image and its labels once before training, so that a broken one stops no long run, and
            warn of images that are in both splits.
    """

    source: str | None = None
    images: str | None = None
    masks: str | None = None
    annotations: str | None = None
    name: str | None = None
    revision: str | None = None
    train_split: str | None = None
    eval_split: str | None = None
    eval_fraction: int | float | None = None
    image_column: str | None = None
    label_column: str | None = None
    objects_column: str | None = None
    box_format: Literal["xywh", "xyxy", "cxcywh"] = "xywh"
    labels: list[str | int] | str | int | None = None
    reduce_labels: bool = False
    ignore_index: int = 255
    train_samples: int | None = None
    eval_samples: int | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "data.", _RULES)
        for name in ("source", "images", "masks", "annotations", "labels"):
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, os.path.expanduser(value))
                _refuse_too_long(name, value)


def _refuse_too_long(name: str, value: str) -> None:
    try:
        os.stat(os.path.expanduser(value))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # which pathlib raises wherever it is asked for such a file
            raise UserError(
                f"data.{name}={value[:40] + '...'!r}: has {len(value)} letters, too many for a path."
            ) from None
    except ValueError:  # a zero byte, which is in the name of no file
        pass


def source_of(config: DataConfig) -> str:
    """Name the data in a message: by where its images are."""
    return str(config.source if config.images is None else config.images)
