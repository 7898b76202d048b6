"""COCO's detection files: JSON of images, annotations and categories."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import datasets

from e3va_peft.data.config import DataConfig, LabelKind
from e3va_peft.data.images import pictures_in
from e3va_peft.data.names import class_names, match_names, refuse_names
from e3va_peft.data.records import Record, make_record, make_rows
from e3va_peft.data.splits import EVAL, TRAIN, refuse_empty, refuse_overlap
from e3va_peft.errors import UserError, read_text, reason, shown

_ROBOFLOW = "_annotations.coco.json"


def find_coco(config: DataConfig) -> dict[str, tuple[Path, Path]]:
    """Find the file of `data.annotations` and the folder of `data.images` of each split.

    Raises:
        UserError: There are none.
    """
    annotations, images = str(config.annotations), str(config.images)
    if "{split}" not in annotations:
        if Path(annotations).is_dir():
            raise UserError(
                f"data.annotations={annotations!r}: is a folder, and COCO's annotations are a JSON file. For Pascal "
                f"VOC write data: {{source: {str(Path(annotations).parent)!r}}}, the folder above it, alone."
            )
        if not Path(annotations).is_file():
            raise UserError(f"data.annotations={annotations!r}: no such file (from {Path.cwd()}).")
        return {"train": (Path(annotations), Path(images))}
    names = [name for name in (config.train_split, config.eval_split, *TRAIN, *EVAL) if name is not None]
    found = {
        name: (Path(annotations.replace("{split}", name)), Path(images.replace("{split}", name))) for name in names
    }
    there = {name: paths for name, paths in found.items() if os.path.isfile(paths[0])}
    if not there:
        raise UserError(
            f"data.annotations={annotations!r}: there is no such file for any of the splits {list(found)} (from "
            f"{Path.cwd()}). Correct it, or name the split with data.train_split."
        )
    return there


def find_coco_export(config: DataConfig) -> dict[str, tuple[Path, Path]]:
    """Find the files that an annotation tool exported into `data.source`; nothing where there are none.

    Roboflow: SPLIT/_annotations.coco.json beside its images. CVAT: annotations/instances_SPLIT.json, and images in
    images/SPLIT, or images. Label Studio: result.json and images. A lone file is for training, unless its split has
    the name of one to evaluate on or the config names it: CVAT calls it default.
    """
    root = Path(str(config.source))
    found = {path.parent.name: (path, path.parent) for path in sorted(root.glob(f"*/{_ROBOFLOW}"))}
    for path in sorted(root.glob("annotations/instances_*.json")):
        split = path.stem.removeprefix("instances_")
        folders = (root / "images" / split, root / split, root / "images", root)
        found[split] = (path, next(folder for folder in folders if folder.is_dir()))
    if not found and (root / _ROBOFLOW).is_file():
        return {"train": (root / _ROBOFLOW, root)}
    if not found and (root / "result.json").is_file() and (root / "images").is_dir():
        return {"train": (root / "result.json", root)}
    if len(found) == 1 and not set(found) & {*TRAIN, *EVAL, config.train_split, config.eval_split}:
        return {"train": next(iter(found.values()))}
    return found


def read_coco(
    config: DataConfig, kind: LabelKind, chosen: Mapping[str, tuple[Path, Path]], model: Sequence[str] | None
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Read COCO's detection files. Classes are numbered in the order of their ids, which may have gaps.

    A category that is the supercategory of others and has no object in any of the files is not a class: Roboflow's
    exports have one, of id 0.

    Raises:
        UserError: A file is malformed, or its images are not there.
    """
    contents = {name: _load_coco(path) for name, (path, _) in chosen.items()}
    groups = _groups(list(contents.values()))
    tables: dict[str, datasets.Dataset] = {}
    places: dict[str, list[Path]] = {}
    known = list(model or ())
    for name, (path, images) in chosen.items():
        content = contents.pop(name)
        renamed = model is not None and config.labels is not None and len(content["categories"]) == len(model)
        categories = _categories(content["categories"], set() if renamed else groups, path)
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
        places[name], records = _coco_rows(content, labels, path, images, kind)
        refuse_empty(config, name, records)
        if not content["annotations"]:
            raise UserError(
                f"{path}: has {len(records)} images and no annotation. Annotate them, or name another file."
            )
        tables[name] = make_rows(places[name], records)
    refuse_overlap(places)
    names = known if model is not None else class_names(config, known) or known
    refuse_names(names, 1)
    return tables, names


def _groups(contents: Sequence[dict[str, list[Any]]]) -> set[tuple[int, str]]:
    """Find the categories, as id and name, that are the supercategory of others and have no object."""
    groups: set[tuple[int, str]] = set()
    used: set[tuple[int, str]] = set()
    for content in contents:
        ids = {number for item in content["annotations"] if isinstance(number := item.get("category_id"), int)}
        parents = {parent for item in content["categories"] if isinstance(parent := item.get("supercategory"), str)}
        for item in content["categories"]:
            number, name = item.get("id"), item.get("name")
            if isinstance(number, int) and isinstance(name, str):
                if name in parents and item.get("supercategory") != name:
                    groups.add((number, name))
                if number in ids:
                    used.add((number, name))
    return groups - used


def _load_coco(path: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is not valid JSON ({reason(error)}). Export it again.") from None
    wanted = "images, annotations and categories, each a list"
    if not isinstance(content, dict):
        raise UserError(f"{path}: is a {type(content).__name__}, not a COCO detection file, which has {wanted}.")
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


def _categories(items: list[Record], groups: set[tuple[int, str]], path: Path) -> dict[int, str]:
    """Read the class names by id, in the order of the ids, without those of groups."""
    found: dict[int, str] = {}
    for i, item in enumerate(items):
        number, name = _whole(item, "id", f"{path}: categories[{i}]"), item.get("name")
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{path}: categories[{i}] has the name {name!r}, not text. Name it.")
        if (number, name) in groups:
            continue
        if number in found or name in found.values():
            raise UserError(f"{path}: has the category {name!r}, id {number}, twice. Rename or remove one.")
        found[number] = name
    return dict(sorted(found.items()))


def _coco_rows(
    content: dict[str, list[Any]], labels: Mapping[int, int], path: Path, folder: Path, kind: LabelKind
) -> tuple[list[Path], list[Record]]:
    """Read the images of a file, and a record for each."""
    images = _coco_images(content["images"], path)
    files = _locate([name for name, _ in images.values()], folder, path)
    twice = [str(file) for file, count in Counter(files).items() if count > 1]
    if twice:
        raise UserError(f"{path}: has {shown(twice)} under more than one id. Join their annotations under one.")
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
            raise UserError(f"{where}: has an id that was there before. Renumber the annotations.")
        seen.add(name)
        images[number][1]["objects"].append(_coco_object(item, name, labels[category], kind))
    return files, [record for _, record in images.values()]


def _coco_images(items: list[Record], path: Path) -> dict[int, tuple[str, Record]]:
    """Read the file names, and make records without objects, by the id of the image."""
    found: dict[int, tuple[str, Record]] = {}
    for i, item in enumerate(items):
        number, name = _whole(item, "id", f"{path}: images[{i}]"), item.get("file_name")
        if not isinstance(name, str):
            raise UserError(f"{path}: images[{i}] has the file_name {name!r}, not text. Name its file.")
        where = f"{path}, image {name!r}"
        if number in found:
            raise UserError(f"{where}: has the id {number}, as {found[number][0]!r} has. Renumber the images.")
        sides = [side for side in ("height", "width") if item.get(side) is not None]
        size = [_whole(item, side, where) for side in sides] if len(sides) == 2 else None
        found[number] = (name, make_record(number, where, size, "xywh", []))
    return found


def _coco_object(item: Record, name: str, label: int, kind: LabelKind) -> Record:
    found = {"name": name, "label": label, "box": item.get("bbox") or None}
    found |= {new: item[old] for new, old in (("area", "area"), ("crowd", "iscrowd")) if item.get(old) is not None}
    if kind == "instances" or found["box"] is None or "area" not in found:
        found["mask"] = item.get("segmentation")
    return found


def _whole(item: Record, key: str, where: str) -> int:
    value = item.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(
            f"{where}: has the {key} {value!r}, not a whole number, as COCO detection files have. Correct it."
        )
    return value


def _is_below(folder: Path, name: str) -> bool:
    """Whether a name is of a file in a folder, and does not climb out of it. Links in the folder are the user's."""
    if ".." in PureWindowsPath(name).parts:
        return False
    absolute = Path(name).is_absolute()
    inside = Path(name).is_relative_to(folder.absolute()) if absolute else not PureWindowsPath(name).is_absolute()
    return inside and os.path.isfile(folder / name)  # which, unlike Path's, takes a name that is too long for no file


def _locate(names: Sequence[str], folder: Path, path: Path) -> list[Path]:
    """Find the images of an annotation file: where it says, else by base name, where both it and the folder have one.

    Label Studio writes the paths of its own server, such as ../../label-studio/data/media/upload/1/a.jpg.

    Raises:
        UserError: An image is not there, or several could be meant.
    """
    if not folder.is_dir():
        raise UserError(f"data.images={str(folder)!r}: no such folder (from {Path.cwd()}).")
    there = {entry.name for entry in folder.iterdir()}  # one look, not one for each of 118,000 files
    found = {name: folder / name for name in names if name in there or _is_below(folder, name)}
    if len(found) < len(set(names)):
        wanted = Counter(PureWindowsPath(name).name for name in set(names))  # which splits at / and \
        below: dict[str, list[Path]] = {}
        for file in pictures_in(folder):
            below.setdefault(file.name, []).append(file)
        for name in set(names) - set(found):
            base, place = PureWindowsPath(name).name, (folder / name).parent
            files = below.get(base, [])
            named = "/" in name and not os.path.isabs(name) and place.is_dir()
            other = named and not all(file.is_relative_to(place) for file in files)  # of another split
            if wanted[base] == 1 and len(files) == 1 and not other:
                found[name] = files[0]
    absent = [name for name in names if name not in found]
    if absent:
        raise UserError(
            f"{path}: {len(absent)} of its {len(names)} images are not in {folder}: {shown(absent)}. Set data.images "
            "to where they are, or remove them from the file."
        )
    return [found[name] for name in names]
