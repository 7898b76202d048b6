"""Classes of whole images: image folders, and tables with a column of ids or names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets

from e3va_peft.data.config import DataConfig, LabelKind, source_of
from e3va_peft.data.hub import column, two_columns, undecoded
from e3va_peft.data.names import class_id, class_names, names_of, own_names, refuse_alike, refuse_names
from e3va_peft.data.splits import refuse_empty
from e3va_peft.errors import UserError

_CLASS_COLUMNS = ("label", "labels", "fine_label", "class", "target")
_PART = 10_000  # rows whose labels are read at once


def read_classes(
    config: DataConfig, kind: LabelKind, chosen: Mapping[str, datasets.Dataset], model: Sequence[str] | None
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Choose the columns of images and classes, and number the classes.

    Raises:
        UserError: A column is missing, or a label is not one of the classes.
    """
    for name, rows in chosen.items():
        refuse_empty(config, name, rows)
    parts = {name: _columns(config, name, rows) for name, rows in chosen.items()}
    first = next(iter(parts.values()))
    labels = _labels(config, first) if model is None else list(model)
    named = own_names(config, {name: _names(part) for name, part in parts.items()}, model, labels)
    return {name: _class_ids(config, name, part, labels, named[name]) for name, part in parts.items()}, labels


def _names(rows: datasets.Dataset) -> list[str] | None:
    """The names that a dataset gives its own label's numbers."""
    feature = rows.features["label"]
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def _columns(config: DataConfig, split: str, rows: datasets.Dataset) -> datasets.Dataset:
    """Keep two columns, `image`, not decoded, and `label`."""
    pictures = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    candidates = [name for name in pictures if name not in (*_CLASS_COLUMNS, config.label_column)] or pictures
    image = column("image_column", config.image_column, candidates, rows, split)
    usual = [name for name in _CLASS_COLUMNS if name in rows.features][:1]
    classes = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    label = column("label_column", config.label_column, usual or classes, rows, split)
    return two_columns(undecoded(rows, image, split), image, label)


def _labels(config: DataConfig, rows: datasets.Dataset) -> list[str]:
    """Choose the class names: the config's, or the dataset's."""
    feature = rows.features["label"]
    labels = class_names(config, _names(rows))
    if labels is None:
        plain = isinstance(feature, datasets.Value)  # not a list of several labels
        labels = names_of({value for part in _parts(rows) for value in part}) if plain else None
    if labels is None:
        raise UserError(
            f"data.label_column: holds {feature}, no class ids or names. Name another, or clean it. An image has one "
            "class: several of them, and numbers (regression), are not supported."
        )
    refuse_names(labels, 2)
    if config.labels is None:
        refuse_alike(labels, source_of(config))
    return labels


def _parts(rows: datasets.Dataset) -> Iterator[list[Any]]:
    for start in range(0, len(rows), _PART):
        yield rows.select_columns(["label"])[start : start + _PART]["label"]


def _class_ids(
    config: DataConfig, split: str, rows: datasets.Dataset, labels: list[str], own: Sequence[str] | None
) -> datasets.Dataset:
    """Turn the label column into class ids and check each of them."""
    ids: list[int] = []
    numbers = {name: i for i, name in enumerate(labels)}
    for part in _parts(rows):
        for value in part:
            ids.append(class_id(value, own, numbers, f"{source_of(config)}, split {split!r}, row {len(ids)}"))
    return rows.remove_columns("label").add_column("label", ids)  # a cast would write a copy of all images
