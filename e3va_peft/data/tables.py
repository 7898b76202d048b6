"""Tables with a column of objects: datasets of the Hub, parquet and image folders with a metadata.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from e3va_peft.data.config import DataConfig, LabelKind, source_of
from e3va_peft.data.hub import column, undecoded
from e3va_peft.data.names import class_id, class_names, names_of, own_names, refuse_names
from e3va_peft.data.records import JSON, Record, make_record, to_json
from e3va_peft.data.splits import refuse_empty
from e3va_peft.errors import UserError

_OBJECT_COLUMN = "objects"
_BOX_KEYS = ("bbox", "bboxes", "boxes")
_CLASS_KEYS = ("category", "category_id", "categories", "label", "labels", "class")
_OTHER_KEYS = {
    "area": ("area",),
    "crowd": ("iscrowd", "is_crowd"),
    "difficult": ("difficult",),
    "mask": ("segmentation", "segmentations"),
}


@dataclass(frozen=True)
class _Column:
    """A column of objects: by name, the keys of what is in it, and the names of its classes where it knows them."""

    name: str
    keys: dict[str, str]
    classes: list[str] | None


def read_tables(
    config: DataConfig, kind: LabelKind, chosen: Mapping[str, datasets.Dataset], model: Sequence[str] | None
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Read datasets with a column of objects, each a mapping of lists or a list of mappings.

    Raises:
        UserError: A column or a field is missing, or a row is malformed.
    """
    columns: dict[str, _Column] = {}
    for split, rows in chosen.items():
        refuse_empty(config, split, rows)
        columns[split] = _object_column(config, rows, split, kind)
    train = next(iter(chosen))
    names = list(model) if model is not None else class_names(config, columns[train].classes)
    if names is None:
        names = names_of(
            item.get(columns[train].keys["label"])
            for _, items, _ in _entries(config, chosen[train], train, columns[train])
            for item in items
        )
    if names is None:
        raise UserError(f"data.objects_column: {columns[train].name!r} holds classes that are neither ids nor names.")
    refuse_names(names, 1)
    numbers = {name: i for i, name in enumerate(names)}
    own = own_names(config, {split: each.classes for split, each in columns.items()}, model, names)
    return {
        split: _table(config, kind, rows, split, columns[split], own[split], numbers) for split, rows in chosen.items()
    }, names


def _object_column(config: DataConfig, rows: datasets.Dataset, split: str, kind: LabelKind) -> _Column:
    fields = {name: _fields(feature) for name, feature in rows.features.items()}
    fitting = [name for name, keys in fields.items() if _key(keys, _BOX_KEYS) and _key(keys, _CLASS_KEYS)]
    usual = [name for name in fitting if name == _OBJECT_COLUMN]
    name = column("objects_column", config.objects_column, usual or fitting, rows, split)
    keys = {"box": _key(fields[name], _BOX_KEYS), "label": _key(fields[name], _CLASS_KEYS)}
    keys |= {what: _key(fields[name], usual_keys) for what, usual_keys in _OTHER_KEYS.items()}
    needed = {"box": _BOX_KEYS, "label": _CLASS_KEYS} | ({"mask": _OTHER_KEYS["mask"]} if kind == "instances" else {})
    for what, usual_keys in needed.items():
        if keys[what] is None:
            raise UserError(
                f"column {name!r} of split {split!r}: has the fields {list(fields[name])}, and needs one of "
                f"{list(usual_keys)}. Rename it, or set data.objects_column."
            )
    known = {what: key for what, key in keys.items() if key is not None}
    label = _item(fields[name][known["label"]])
    if not isinstance(label, datasets.ClassLabel | datasets.Value):
        raise UserError(f"column {name!r} of split {split!r}: holds the classes {label}, not one for each object.")
    return _Column(name, known, list(label.names) if isinstance(label, datasets.ClassLabel) else None)


def _item(feature: Any) -> Any:
    return feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else feature


def _fields(feature: Any) -> dict[str, Any]:
    inner = _item(feature)
    return inner if isinstance(inner, dict) else {}


def _key(fields: Mapping[str, Any], usual: Sequence[str]) -> str | None:
    return next((key for key in usual if key in fields), None)


def _entries(
    config: DataConfig, rows: datasets.Dataset, split: str, objects: _Column
) -> Iterator[tuple[str, list[Record], list[int] | None]]:
    """Iterate over what to call each row in errors, its objects, and its size where it says."""
    sides = [name for name in ("height", "width") if name in rows.features]
    for i, row in enumerate(rows.select_columns([objects.name, *sides])):
        where = f"{source_of(config)}, split {split!r}, row {i}"
        size = [row[side] for side in sides]
        known = len(size) == 2 and all(isinstance(side, int) for side in size)
        yield where, _list_of_mappings(row[objects.name], where), size if known else None


def _list_of_mappings(value: Any, where: str) -> list[Record]:
    if not value:
        return []
    if isinstance(value, list):
        return value
    lists = {key: items for key, items in value.items() if items is not None}
    lengths = {key: len(items) if isinstance(items, list) else None for key, items in lists.items()}
    if len(set(lengths.values())) > 1 or None in lengths.values():
        raise UserError(f"{where}: has lists of the lengths {lengths} in one row, one per object each. Correct it.")
    return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]


def _table(
    config: DataConfig,
    kind: LabelKind,
    rows: datasets.Dataset,
    split: str,
    objects: _Column,
    own: Sequence[str] | None,
    numbers: Mapping[str, int],
) -> datasets.Dataset:
    pictures = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    image = column("image_column", config.image_column, pictures, rows, split)
    images = undecoded(rows, image, split).select_columns([image])
    records = []
    for i, (where, items, size) in enumerate(_entries(config, rows, split, objects)):
        found = [_table_object(item, f"object {j} of {len(items)}", objects, kind) for j, item in enumerate(items, 1)]
        for item in found:
            item["label"] = class_id(item["label"], own, numbers, f"{where}, {item['name']}")
        records.append(to_json(make_record(i, where, size, config.box_format, found)))
    images = images.rename_column(image, "image") if image != "image" else images
    return images.add_column("label", records, feature=JSON)


def _table_object(item: Record, name: str, objects: _Column, kind: LabelKind) -> Record:
    found = {what: item.get(key) for what, key in objects.keys.items()} | {"name": name}
    found["box"] = found["box"] or None
    if kind == "boxes" and found["box"] is not None and found.get("area") is not None:
        found.pop("mask", None)
    return found
