"""YOLO's text files: Ultralytics' data.yaml, a label file for each image; also as CVAT and others export them.

A line of a label file is `class cx cy width height`, or `class x1 y1 x2 y2 x3 y3 ...`, the points of a polygon, in
shares of the image, turned as its EXIF tag says. An image without a label file, or with an empty one, has no objects.

Source: docs.ultralytics.com/datasets/detect and /datasets/segment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from e3va_peft.data.config import DataConfig, LabelKind
from e3va_peft.data.images import outside, pictures_in
from e3va_peft.data.names import class_names, match_names, refuse_names
from e3va_peft.data.records import Record, finite_number, make_record, make_rows, refuse_broken
from e3va_peft.data.splits import EVAL, TRAIN, refuse_empty, refuse_overlap
from e3va_peft.data.yaml import parse_yaml
from e3va_peft.errors import UserError, read_text, shown

_YAML = ("data.yaml", "data.yml")
_CLASSES = "classes.txt"  # of Label Studio, which writes no data.yaml
_BEYOND = 0.01  # share of the image by which a number may leave it; rounding, and what Ultralytics allows


@dataclass(frozen=True)
class YoloSplit:
    """A split as it is found.

    Attributes:
        file: Where it is described, and the names of the classes.
        names: Class names in the order of their ids; None where the file has none.
        entry: Folders of images, and text files that list images.
        roots: Folders that paths are relative to, the first that fits.
    """

    file: Path
    names: tuple[str, ...] | None
    entry: tuple[str, ...]
    roots: tuple[Path, ...]


def find_yolo(config: DataConfig) -> dict[str, YoloSplit]:
    """Find the splits of a data.yaml, or of Label Studio's folder with classes.txt; nothing where there is neither.

    Raises:
        UserError: The file is malformed, or says nothing of images.
    """
    source = Path(str(config.source))
    if source.is_file() and source.suffix in (".yaml", ".yml"):
        return _described(source, config)
    file = next((source / name for name in _YAML if (source / name).is_file()), None)
    if file is not None:
        return _described(file, config)
    if (source / _CLASSES).is_file() and (source / "labels").is_dir():
        names = tuple(line.strip() for line in read_text(source / _CLASSES).splitlines() if line.strip())
        return {"train": YoloSplit(source / _CLASSES, names, ("images",), (source,))}
    return {}


def read_yolo(
    config: DataConfig, kind: LabelKind, chosen: Mapping[str, YoloSplit], model: Sequence[str] | None
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Read the images and label files of splits.

    Raises:
        UserError: An image or a folder is missing, or label files are malformed; the message names the first ten.
    """
    split = next(iter(chosen.values()))  # all are of one file
    own = split.names if model is not None and split.names else class_names(config, split.names)
    if own is None:
        raise UserError(f"{split.file}: has no names. Write names: [first, second, ...], or set data.labels.")
    refuse_names(own, 1)
    names = list(own if model is None else model)
    ids = [names.index(name) for name in (own if model is None else match_names(config, own, model, str(split.file)))]
    images = {name: _images(found, name) for name, found in chosen.items()}
    refuse_overlap(images)
    tables: dict[str, datasets.Dataset] = {}
    for name, paths in images.items():
        refuse_empty(config, name, paths)
        tables[name] = make_rows(paths, _records(paths, ids, kind, name, split.file))
    return tables, names


def _described(file: Path, config: DataConfig) -> dict[str, YoloSplit]:
    """Read a data.yaml."""
    content = parse_yaml(read_text(file), str(file))
    if not isinstance(content, dict):
        raise UserError(f"{file}: is a {type(content).__name__}. Write train:, val: and names:, as Ultralytics does.")
    if "kpt_shape" in content:
        raise UserError(f"{file}: has kpt_shape: its labels are keypoints. Export boxes or polygons.")
    base, path = file.parent, content.get("path") or "."
    if not isinstance(path, str):
        raise UserError(f"{file}: has the path {path!r}. Write a folder, or leave it out.")
    roots = tuple(dict.fromkeys(root for root in (base / path, base) if os.path.isdir(root)))
    names = _names(content, file)
    keys = dict.fromkeys(key for key in (config.train_split, config.eval_split, *TRAIN, *EVAL) if key in content)
    entries = {str(key): _entry(content[key], str(key), file) for key in keys if content[key]}
    if not entries:
        raise UserError(f"{file}: has neither train nor val. Write train: images/train and val: images/val.")
    return {key: YoloSplit(file, names, entry, roots) for key, entry in entries.items()}


def _entry(value: Any, key: str, file: Path) -> tuple[str, ...]:
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise UserError(f"{file}: has {value!r} for {key}. Write a folder, a list of folders, or a .txt of images.")
    return tuple(parts)


def _names(content: Mapping[str, Any], file: Path) -> tuple[str, ...] | None:
    given, count = content.get("names"), content.get("nc")
    if given is None:
        return None
    if isinstance(given, dict):
        numbers = [int(key) if isinstance(key, str) and key.isdecimal() else key for key in given]
        if set(numbers) != set(range(len(given))):
            raise UserError(f"{file}: names has the ids {list(given)}. Number them from 0 to {len(given) - 1}.")
        given = [name for _, name in sorted(zip(numbers, given.values(), strict=True), key=lambda item: item[0])]
    plain = isinstance(given, list) and all(isinstance(name, str | int | float) for name in given)
    if not plain or any(isinstance(name, bool) for name in given):
        raise UserError(f"{file}: has the names {given!r}. Write a list of texts, quoted: YAML reads true as a value.")
    if count is not None and count != len(given):
        raise UserError(f"{file}: nc is {count!r}, and names has {len(given)}. Correct one.")
    return tuple(map(str, given))


def _images(split: YoloSplit, name: str) -> list[Path]:
    """Find the images of a split, each once."""
    found: dict[Path, None] = {}
    for entry in split.entry:
        place = _place(entry, split.roots)
        if place is None:
            raise UserError(
                f"{split.file}: has {name}: {entry}, which is not there. It was looked for in "
                f"{', '.join(map(str, split.roots))}. Put the images there, or correct the path."
            )
        if place.is_dir():
            found |= dict.fromkeys(pictures_in(place))
        else:
            found |= dict.fromkeys(_listed(place, split.roots))
    return list(found)


def _place(entry: str, roots: Sequence[Path]) -> Path | None:
    """Find the folder or file that an entry means. Roboflow writes ../train/images for what lies beside data.yaml."""
    tails = (entry, entry.removeprefix("../"))
    places = (Path(os.path.normpath(root / tail)) for tail in tails for root in roots)
    return next((place for place in places if os.path.isdir(place) or os.path.isfile(place)), None)


def _listed(file: Path, roots: Sequence[Path]) -> list[Path]:
    """Read a list of images, one a line. CVAT writes data/images/train/a.jpg for images/train/a.jpg.

    A data.yaml may name folders wherever they are; its lists, images in these folders and beside the list alone.
    """
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    places = tuple(dict.fromkeys((file.parent, *roots)))
    found = {line: _place(line, places) or _place(line.removeprefix("data/"), places) for line in lines}
    absent = [line for line, path in found.items() if path is None]
    if absent:
        raise UserError(
            f"{file}: {len(absent)} of its {len(found)} images are not there: {shown(absent)}. They were looked for "
            f"in {', '.join(map(str, places))}. Add them, or remove them from the list."
        )
    images = [path for path in found.values() if path is not None]
    elsewhere = set(outside(map(str, images), places))
    if elsewhere:
        lines = [line for line, path in found.items() if str(path) in elsewhere]
        raise UserError(
            f"{file}: {len(lines)} of its {len(found)} images lie outside of {' and '.join(map(str, places))}: "
            f"{shown(lines)}. Move them there, or write path: into the data.yaml, a folder that holds them."
        )
    return images


def _label_file(image: Path) -> Path:
    """Name the label file of an image: the last folder `images` of its path becomes `labels`."""
    parts = list(image.with_suffix(".txt").parts)
    folders = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    return Path(*parts)


def _records(paths: Sequence[Path], ids: Sequence[int], kind: LabelKind, name: str, file: Path) -> list[Record]:
    """Read the label files of a split's images."""
    owners: dict[Path, Path] = {}
    for path in paths:
        other = owners.setdefault(_label_file(path), path)
        if other != path:
            raise UserError(f"{path}: has the label file of {other.name}, {_label_file(path)}. Rename or remove one.")
    if not any(label.is_file() for label in owners):
        raise UserError(
            f"{file}: none of the {len(owners)} images of {name} has a label file, such as {next(iter(owners))}. Put "
            "them there, in the folder labels beside images."
        )
    records, errors = [], []
    for number, label in enumerate(owners):
        objects, wrong = _objects(label, ids, kind) if label.is_file() else ([], None)
        records.append(make_record(number, str(label), None, "yolo", objects))
        errors += [wrong] if wrong else []
    refuse_broken(errors, len(owners), "label files")
    return records


def _objects(label: Path, ids: Sequence[int], kind: LabelKind) -> tuple[list[Record], str | None]:
    """Read a label file: its objects, and what is wrong with the first line that is malformed."""
    objects: list[Record] = []
    for number, line in enumerate(read_text(label).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            objects.append({"name": f"line {number}", **_object(line.split(), ids, kind)})
        except ValueError as error:
            return objects, f"{label}, line {number}: {error}"
    return objects, None


def _object(words: Sequence[str], ids: Sequence[int], kind: LabelKind) -> Record:
    """Read a line: a box, or a polygon and its box.

    Raises:
        ValueError: It is malformed. The message begins where the line is named.
    """
    numbers = [finite_number(word, "has") for word in words]
    if len(numbers) != 5 and (len(numbers) < 7 or len(numbers) % 2 == 0):
        raise ValueError(
            f"has {len(numbers)} numbers. A box has 5, class cx cy width height; a polygon the class, and x and y of "
            "three or more points. Correct or remove it."
        )
    label, shares = numbers[0], numbers[1:]
    if not label.is_integer() or not 0 <= label < len(ids):
        raise ValueError(f"has the class {words[0]}, but the classes are 0 to {len(ids) - 1}. Add its name.")
    beyond = [word for word, share in zip(words[1:], shares, strict=True) if not -_BEYOND <= share <= 1 + _BEYOND]
    if beyond:
        raise ValueError(
            f"has {beyond[0]}, and a share of the image is 0 to 1. Divide pixels by the image's width and height."
        )
    shares = [min(max(share, 0.0), 1.0) for share in shares]
    if len(shares) > 4:
        xs, ys = shares[::2], shares[1::2]
        box = [(min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)]
        return {"label": ids[int(label)], "box": box, "mask": [shares]}
    if kind == "instances":
        raise ValueError(
            "is a box, and instance-segmentation needs polygons. Draw one, or set task: object-detection."
        )
    return {"label": ids[int(label)], "box": shares}
