"""Objects as COCO JSON, Pascal VOC and datasets annotate them, brought to one form, which `objects` decodes."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from xml.etree import ElementTree

import datasets

from e3va_peft.errors import UserError, read_text, reason
from e3va_peft.training.config import DataConfig, LabelKind
from e3va_peft.training.objects import Record
from e3va_peft.training.sources import (
    EVAL,
    IMAGE_SUFFIXES,
    TRAIN,
    class_id,
    class_names,
    column,
    load_dataset,
    match_names,
    names_of,
    own_names,
    refuse_empty,
    refuse_names,
    source_of,
    undecoded,
)

Reader: TypeAlias = Callable[
    [DataConfig, LabelKind, Mapping[str, Any], Sequence[str] | None], tuple[dict[str, datasets.Dataset], list[str]]
]
"""Reads the chosen splits: columns `image` and `label`, numbered by class names, which it returns too.

They are a model's where it is given any, else those of the first split, which is the one to train on.
"""

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

_OBJECT_COLUMN = "objects"
_BOX_KEYS = ("bbox", "bboxes", "boxes")
_CLASS_KEYS = ("category", "category_id", "categories", "label", "labels", "class")
_OTHER_KEYS = {
    "area": ("area",),
    "crowd": ("iscrowd", "is_crowd"),
    "difficult": ("difficult",),
    "mask": ("segmentation", "segmentations"),
}
_SHOWN = 3  # missing files to name at once


def find_objects(config: DataConfig) -> tuple[dict[str, Any], Reader]:
    """Find the splits that a config's annotations have, and how to read them.

    Raises:
        UserError: There are none.
    """
    if config.annotations is not None:
        return _coco_files(config), _read_coco
    folders = _voc_folders(Path(str(config.source)))
    if folders:
        return _voc_lists(config, folders), _read_voc
    return load_dataset(config), _read_tables


# --- COCO JSON -------------------------------------------------------------------------------------------------------


def _coco_files(config: DataConfig) -> dict[str, tuple[Path, Path]]:
    """Find the annotation file and the folder of images of each split."""
    annotations, images = str(config.annotations), str(config.images)
    if "{split}" not in annotations:
        if not Path(annotations).is_file():
            raise UserError(f"data.annotations={annotations!r}: no such file (from {Path.cwd()}).")
        return {"train": _coco_split(annotations, images)}
    names = [name for name in (config.train_split, config.eval_split, *TRAIN, *EVAL) if name is not None]
    found = {
        name: _coco_split(annotations.replace("{split}", name), images.replace("{split}", name)) for name in names
    }
    there = {name: paths for name, paths in found.items() if paths[0].is_file()}
    if not there:
        raise UserError(
            f"data.annotations={annotations!r}: there is no such file for any of the splits {list(found)} (from "
            f"{Path.cwd()}). Correct it, or name the split with data.train_split."
        )
    return there


def _coco_split(annotations: str, images: str) -> tuple[Path, Path]:
    return Path(annotations), Path(images)


def _read_coco(
    config: DataConfig, kind: LabelKind, chosen: Mapping[str, tuple[Path, Path]], model: Sequence[str] | None
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Read COCO's detection files. Classes are numbered in the order of their ids, which may have gaps."""
    rows: dict[str, datasets.Dataset] = {}
    known = list(model or ())
    for name, (path, images) in chosen.items():
        content = _load_coco(path)
        categories = _categories(content["categories"], path)
        known = known or list(categories.values())
        if model is not None:
            matched = match_names(config, list(categories.values()), model, str(path))
            categories = dict(zip(categories, matched, strict=True))
        elif set(categories.values()) != set(known):
            odd = sorted(set(categories.values()) ^ set(known))
            raise UserError(
                f"{path}: has other categories than what is trained on; only one of the two has {odd[:10]}. Give "
                "both files the same."
            )
        labels = {number: known.index(category) for number, category in categories.items()}
        rows[name] = _coco_rows(content, labels, path, images, kind)
        refuse_empty(config, name, rows[name])
    names = known if model is not None else class_names(config, known) or known
    refuse_names(names, 1)
    return rows, names


def _load_coco(path: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is no valid JSON ({reason(error)}). Export it again.") from None
    wanted = "images, annotations and categories, each a list"
    if not isinstance(content, dict):
        raise UserError(f"{path}: is a {type(content).__name__}, no COCO detection file, which has {wanted}.")
    missing = [key for key in ("images", "annotations", "categories") if not isinstance(content.get(key), list)]
    if missing:
        raise UserError(f"{path}: has no {', '.join(missing)}; a COCO detection file has {wanted}.")
    for key in ("images", "annotations", "categories"):
        for i, item in enumerate(content[key]):
            if not isinstance(item, dict):
                raise UserError(f"{path}: {key}[{i}] is {item!r}; a COCO detection file has mappings there.")
    if any("segments_info" in item for item in content["annotations"][:1]):
        raise UserError(f"{path}: is a COCO panoptic file. Take a detection file, such as instances_train2017.json.")
    return content


def _categories(items: list[Record], path: Path) -> dict[int, str]:
    """Return class names by id, in the order of the ids."""
    found: dict[int, str] = {}
    for i, item in enumerate(items):
        number, name = _whole(item, "id", f"{path}: categories[{i}]"), item.get("name")
        if not isinstance(name, str):
            raise UserError(f"{path}: categories[{i}] has the name {name!r}, no text. Name it.")
        if number in found or name in found.values():
            raise UserError(f"{path}: has the category {name!r}, id {number}, twice. Rename or remove one.")
        found[number] = name
    return dict(sorted(found.items()))


def _coco_rows(
    content: dict[str, list[Any]], labels: Mapping[int, int], path: Path, folder: Path, kind: LabelKind
) -> datasets.Dataset:
    images = _coco_images(content["images"], path)
    _refuse_absent([name for name, _ in images.values()], folder, path)
    seen: set[str] = set()
    for i, item in enumerate(content["annotations"]):
        name = f"annotation {item['id']}" if "id" in item else f"annotations[{i}]"
        where = f"{path}, {name}"
        number, category = _whole(item, "image_id", where), _whole(item, "category_id", where)
        if number not in images:
            raise UserError(f"{where}: is of the image {number}, which is not in images. Add it, or remove this.")
        if category not in labels:
            raise UserError(f"{where}: has the category_id {category}, but there are only {list(labels)}. Add it.")
        if name in seen:  # pycocotools would read the last of them twice
            raise UserError(f"{where}: has an id that was there before. Number the annotations anew.")
        seen.add(name)
        images[number][1]["objects"].append(_coco_object(item, name, labels[category], kind))
    files = [{"path": str(folder / name), "bytes": None} for name, _ in images.values()]
    return _rows(files, [record for _, record in images.values()])


def _coco_images(items: list[Record], path: Path) -> dict[int, tuple[str, Record]]:
    """Return file names and records, still empty, by the id of the image."""
    found: dict[int, tuple[str, Record]] = {}
    for i, item in enumerate(items):
        number, name = _whole(item, "id", f"{path}: images[{i}]"), item.get("file_name")
        if not isinstance(name, str):
            raise UserError(f"{path}: images[{i}] has the file_name {name!r}, no text. Name its file.")
        where = f"{path}, image {name!r}"
        if number in found:
            raise UserError(f"{where}: has the id {number}, as {found[number][0]!r} has. Number the images anew.")
        sides = [side for side in ("height", "width") if item.get(side) is not None]
        size = [_whole(item, side, where) for side in sides] if len(sides) == 2 else None
        found[number] = (name, _record(number, where, size, "xywh", []))
    return found


def _coco_object(item: Record, name: str, label: int, kind: LabelKind) -> Record:
    found = {"name": name, "label": label, "box": item.get("bbox") or None}
    found |= {new: item[old] for new, old in (("area", "area"), ("crowd", "iscrowd")) if item.get(old) is not None}
    if kind == "instances" or found["box"] is None or "area" not in found:
        found["mask"] = item.get("segmentation")
    return found


def _whole(item: Record, key: str, where: str) -> int:
    value = item.get(key)
    if not isinstance(value, int):
        raise UserError(
            f"{where}: has the {key} {value!r}, no whole number, as COCO detection files have. Correct it."
        )
    return value


def _refuse_absent(files: Sequence[str], folder: Path, path: Path) -> None:
    """Raise a UserError if files are not in a folder."""
    if not folder.is_dir():
        raise UserError(f"data.images={str(folder)!r}: no such folder (from {Path.cwd()}).")
    there = {entry.name for entry in folder.iterdir()}  # one look, not one for each of 118,000 files
    absent = [name for name in files if name not in there and not (folder / name).is_file()]
    if absent:
        raise UserError(
            f"{path}: {len(absent)} of its {len(files)} images are not in {folder}: {_shown(absent)}. Set data.images "
            "to where they are, or remove them from the file."
        )


# --- Pascal VOC ------------------------------------------------------------------------------------------------------


def _voc_folders(root: Path) -> dict[str, Path]:
    """Find the folders of Pascal VOC's layout: the folder itself, or, in a VOCdevkit, its sub-folders by `NAME/`."""
    if (root / "Annotations").is_dir():
        return {"": root}
    parts = sorted(root.iterdir()) if root.is_dir() else []
    return {f"{part.name}/": part for part in parts if (part / "Annotations").is_dir()}


def _voc_lists(config: DataConfig, folders: Mapping[str, Path]) -> dict[str, list[tuple[Path, str]]]:
    """Find the splits, each a list of folders and names of images; also those that a config joins by `+`."""
    found: dict[str, list[tuple[Path, str]]] = {}
    for prefix, folder in folders.items():
        for path in sorted(folder.glob("ImageSets/Main/*.txt")):
            lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
            if not lines or lines[0].split()[1:] not in (["-1"], ["0"], ["1"]):  # such lists are of one class
                found[prefix + path.stem] = [(folder, line) for line in lines]
    if not found:
        raise UserError(
            f"data.source={config.source!r}: has Annotations, but no ImageSets/Main/*.txt, which say what is trained "
            "on. Write train.txt and val.txt there, one name of an image a line, without its suffix."
        )
    for wanted in (config.train_split, config.eval_split):
        names = (wanted or "").split("+")
        if len(names) > 1 and all(name in found for name in names):
            found["+".join(names)] = list(dict.fromkeys(entry for name in names for entry in found[name]))
    return found


def _read_voc(
    config: DataConfig, kind: LabelKind, chosen: Mapping[str, list[tuple[Path, str]]], model: Sequence[str] | None
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Read Pascal VOC's XML.

    Its boxes are 1-based indices of the first and the last pixel inside. As torchvision and Detectron2 users expect,
    they become x1 - 1, y1 - 1, x2, y2, the edges of these pixels.
    """
    if kind == "instances":
        raise UserError(
            f"data.source={config.source!r}: is Pascal VOC, whose XML has no masks of objects. Set task: "
            "object-detection, or use COCO JSON: data.images and data.annotations."
        )
    _refuse_overlap(chosen)
    parsed: dict[str, list[Record]] = {}
    for split, entries in chosen.items():
        refuse_empty(config, split, entries)
        paths = [folder / "Annotations" / f"{name}.xml" for folder, name in entries]
        absent = [str(path) for path in paths if not path.is_file()]
        if absent:
            raise UserError(
                f"{config.source}, split {split!r}: {len(absent)} of {len(paths)} images have no annotations: "
                f"{_shown(absent)}. Add them, or remove the names from ImageSets/Main."
            )
        parsed[split] = [_voc_record(i, path) for i, path in enumerate(paths)]
    names = list(model or class_names(config, None) or _voc_names(next(iter(parsed.values()))))
    refuse_names(names, 1)
    numbers = {name: i for i, name in enumerate(names)}
    for record in (record for records in parsed.values() for record in records):
        for item in record["objects"]:
            item["label"] = class_id(item["label"], None, numbers, f"{record['where']}, {item['name']}")
    return {
        split: _rows(_voc_images(config, split, chosen[split]), records) for split, records in parsed.items()
    }, names


def _refuse_overlap(chosen: Mapping[str, list[tuple[Path, str]]]) -> None:
    """Raise a UserError if what is evaluated on is trained on too, as `val` is in `trainval`."""
    (train_name, trained), *others = chosen.items()
    for name, entries in others:
        both = set(entries) & set(trained)
        if both:
            raise UserError(
                f"data.eval_split={name!r}: {len(both)} of its {len(entries)} images are trained on, in "
                f"{train_name!r}. Choose another, e.g. test, or train on train."
            )


def _voc_names(records: Iterable[Record]) -> list[str]:
    names = names_of(item["label"] for record in records for item in record["objects"]) or []
    return list(VOC_CLASSES) if names and set(names) <= set(VOC_CLASSES) else names


def _voc_record(number: int, path: Path) -> Record:
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as XML ({reason(error)}). Correct or replace it.") from None
    sides = ("height", "width") if root.find("size") is not None else ()
    size = [int(_voc_number(root, f"size/{side}", str(path))) for side in sides]
    items = root.findall("object")
    objects = []
    for i, item in enumerate(items, start=1):
        where = f"{path}, object {i} of {len(items)}"
        label = item.findtext("name", "").strip()
        if not label:
            raise UserError(f"{where}: has no name. Add its class, or remove it.")
        box = [_voc_number(item, f"bndbox/{side}", where) for side in ("xmin", "ymin", "xmax", "ymax")]
        objects.append(
            {
                "name": f"object {i} of {len(items)}",
                "label": label,
                "box": box,
                "difficult": item.findtext("difficult"),
            }
        )
    return _record(number, str(path), size, "voc", objects)


def _voc_number(item: ElementTree.Element, key: str, where: str) -> float:
    text = item.findtext(key)
    if text is None:
        raise UserError(f"{where}: has no {key}. Add it.")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: has the {key} {text!r}, no number. Correct it.")
    return number


def _voc_images(config: DataConfig, split: str, entries: Sequence[tuple[Path, str]]) -> list[Record]:
    """Find the images by name, whatever their suffix."""
    found: dict[tuple[Path, str], list[Path]] = {}
    for folder in dict.fromkeys(folder for folder, _ in entries):
        pictures = folder / "JPEGImages"
        for path in sorted(pictures.iterdir()) if pictures.is_dir() else ():
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            found.setdefault((folder, path.stem), []).append(path)
    absent = [str(folder / "JPEGImages" / name) for folder, name in entries if (folder, name) not in found]
    if absent:
        raise UserError(
            f"{config.source}, split {split!r}: {len(absent)} of {len(entries)} images are not there: "
            f"{_shown(absent)}, with any suffix. Add them, or remove the names from ImageSets/Main."
        )
    for entry in entries:
        if len(found[entry]) > 1:
            raise UserError(f"{found[entry][1]}: has the name of {found[entry][0].name}. Rename or remove one.")
    return [{"path": str(found[entry][0]), "bytes": None} for entry in entries]


# --- datasets with a column of objects -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """A column of objects: by name, the keys of what is in it, and the names of its classes where it knows them."""

    name: str
    keys: dict[str, str]
    classes: list[str] | None


def _read_tables(
    config: DataConfig, kind: LabelKind, chosen: Mapping[str, datasets.Dataset], model: Sequence[str] | None
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Read datasets with a column of objects, each a mapping of lists or a list of mappings."""
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
        raise UserError(f"data.objects_column: {columns[train].name!r} holds classes that are no ids or names.")
    refuse_names(names, 1)
    numbers = {name: i for i, name in enumerate(names)}
    own = {split: own_names(config, each.classes, model, split) for split, each in columns.items()}
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
        records.append(pickle.dumps(_record(i, where, size, config.box_format, found)))
    images = images.rename_column(image, "image") if image != "image" else images
    return images.add_column("label", records, feature=datasets.Value("large_binary"))


def _table_object(item: Record, name: str, objects: _Column, kind: LabelKind) -> Record:
    found = {what: item.get(key) for what, key in objects.keys.items()} | {"name": name}
    found["box"] = found["box"] or None
    if kind == "boxes" and found["box"] is not None and found.get("area") is not None:
        found.pop("mask", None)
    return found


# --- shared ----------------------------------------------------------------------------------------------------------


def _record(number: int, where: str, size: list[int] | None, form: str, objects: list[Record]) -> Record:
    known = size if size and any(size) else None  # some tools write zeros
    return {"id": number, "where": where, "size": known, "format": form, "objects": objects}


def _rows(images: list[dict[str, Any]], records: Iterable[Record]) -> datasets.Dataset:
    features = {"image": datasets.Image(decode=False), "label": datasets.Value("large_binary")}
    columns = {"image": images, "label": list(map(pickle.dumps, records))}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
