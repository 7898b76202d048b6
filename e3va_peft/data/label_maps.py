"""Label maps, one class id for each pixel: in folders beside the images', or in an image column of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from e3va_peft.data.config import DataConfig, LabelKind, source_of
from e3va_peft.data.hub import column, load_dataset, two_columns, undecoded
from e3va_peft.data.images import is_hidden, is_picture, open_label_map, pictures_in
from e3va_peft.data.names import class_names, refuse_names
from e3va_peft.data.splits import EVAL, TRAIN, refuse_empty
from e3va_peft.errors import UserError, shown

_MASK_COLUMNS = ("label", "labels", "annotation", "mask", "masks", "semantic_mask", "segmentation_mask")


def find_label_maps(config: DataConfig) -> dict[str, datasets.Dataset]:
    """Find the splits of two folders, or of a table.

    Raises:
        UserError: There are none, or an image or label map stands alone.
    """
    if config.images is not None:
        return _folder_pair(config)
    return load_dataset(config)


def read_label_maps(
    config: DataConfig, kind: LabelKind, chosen: Mapping[str, datasets.Dataset], model: Sequence[str] | None
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Choose the columns of images and label maps, and the names of the classes.

    Raises:
        UserError: A column or the names are missing, or a class has the value that is ignored.
    """
    for name, rows in chosen.items():
        refuse_empty(config, name, rows)
        pictures = sum(isinstance(feature, datasets.Image) for feature in rows.features.values())
        if pictures < 2 and Path(str(config.source)).is_dir():
            raise UserError(
                f"data.source={config.source!r}: split {name!r} has the columns {list(rows.features)}, and "
                "semantic-segmentation needs a label map for each image. Write images: and masks:, two folders with "
                "the same file names, instead of source:. For folders of classes, set task: image-classification."
            )
    parts = {name: _columns(config, name, rows) for name, rows in chosen.items()}
    labels = _labels(config, next(iter(parts.values()))) if model is None else list(model)
    if config.reduce_labels and config.ignore_index < len(labels):
        raise UserError(
            f"data.ignore_index={config.ignore_index}: is one of the {len(labels)} classes, once data.reduce_labels "
            "has subtracted one from the label maps. Set it higher, e.g. 255 or 65535."
        )
    return parts, labels


def _folder_pair(config: DataConfig) -> dict[str, datasets.Dataset]:
    """Pair the images and label maps of two folders with equal sub-folders and file names (ADE20K layout)."""
    images, masks = Path(str(config.images)), Path(str(config.masks))
    for name, folder in (("images", images), ("masks", masks)):
        if not folder.is_dir():
            raise UserError(f"data.{name}={str(folder)!r}: no such folder (from {Path.cwd()}).")
    needed = (*TRAIN, *EVAL[:3], config.train_split, config.eval_split)  # others, as test, often have no label maps
    entries = sorted(images.iterdir())
    parts = [entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name)]
    splits = [name for name in parts if name in needed or (masks / name).is_dir()]
    direct = [entry.name for entry in entries if is_picture(entry.name)]
    if splits and direct:
        raise UserError(
            f"data.images={str(images)!r}: has images directly in it, {shown(direct)}, beside those of the splits "
            f"{shown(splits)}. Move them into one."
        )
    if direct or not parts:
        return {"train": _pairs(images, masks)}
    return {name: _pairs(images / name, masks / name) for name in splits}


def _pairs(images: Path, masks: Path) -> datasets.Dataset:
    pictures, maps = _by_name(images), _by_name(masks)
    for what, there, here, other in (("label map", pictures, maps, masks), ("image", maps, pictures, images)):
        lonely = sorted(set(there) - set(here))
        if lonely:
            paths = shown([str(there[name]) for name in lonely])
            raise UserError(
                f"{len(lonely)} of {len(there)} files have no {what} of the same name in {other}: {paths}. Add or "
                "remove them."
            )
    names = sorted(pictures)
    columns = {"image": [str(pictures[name]) for name in names], "label": [str(maps[name]) for name in names]}
    features = datasets.Features({key: datasets.Image(decode=False) for key in columns})
    return datasets.Dataset.from_dict(columns, features=features)


def _by_name(folder: Path) -> dict[Path, Path]:
    """Find images by their path below a folder, without suffix."""
    found: dict[Path, Path] = {}
    for path in pictures_in(folder):
        name = path.relative_to(folder).with_suffix("")
        if name in found:
            raise UserError(
                f"{path}: has the name of {found[name].name}, and images find their label maps by name. Rename or "
                "remove one."
            )
        found[name] = path
    return found


def _columns(config: DataConfig, split: str, rows: datasets.Dataset) -> datasets.Dataset:
    """Keep two columns, `image` and `label`, neither decoded."""
    pictures = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    candidates = [name for name in pictures if name not in (*_MASK_COLUMNS, config.label_column)] or pictures
    image = column("image_column", config.image_column, candidates, rows, split)
    others = [name for name in pictures if name != image]
    usual = [name for name in _MASK_COLUMNS if name in others]
    label = column("label_column", config.label_column, usual or others, rows, split)
    return two_columns(undecoded(undecoded(rows, image, split), label, split), image, label)


def _labels(config: DataConfig, rows: datasets.Dataset) -> list[str]:
    labels = class_names(config, None)
    if labels is None:
        values = sorted({int(v) for i in range(min(20, len(rows))) for v in _values(rows[i]["label"])})
        raise UserError(
            "data.labels: is missing. Label maps do not know the names of their classes; the first 20 of "
            f"{source_of(config)} hold the values {values}. Write labels: [first, second, ...], or a text file of "
            "names, or their number; with reduce_labels: true if 0 means nothing."
        )
    refuse_names(labels, 2)
    return labels


def _values(item: dict[str, Any]) -> np.ndarray:
    return np.unique(open_label_map(item, item.get("path") or "a label map"))
