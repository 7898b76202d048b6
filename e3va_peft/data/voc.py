"""Pascal VOC: an XML file for each image, lists of images for splits, and VOCdevkits of several years."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import datasets

from e3va_peft.data.config import DataConfig, LabelKind
from e3va_peft.data.images import IMAGE_SUFFIXES
from e3va_peft.data.names import class_id, class_names, names_of, refuse_names
from e3va_peft.data.records import Record, finite_number, make_record, make_rows
from e3va_peft.data.splits import refuse_empty, refuse_overlap
from e3va_peft.errors import UserError, read_text, reason, shown

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def voc_folders(root: Path) -> dict[str, Path]:
    """Find the folders of Pascal VOC's layout: the folder itself, or, in a VOCdevkit, its sub-folders by `NAME/`."""
    if (root / "Annotations").is_dir():
        return {"": root}
    parts = sorted(root.iterdir()) if root.is_dir() else []
    return {f"{part.name}/": part for part in parts if (part / "Annotations").is_dir()}


def find_voc(config: DataConfig, folders: Mapping[str, Path]) -> dict[str, list[tuple[Path, str]]]:
    """Find the splits, each a list of folders and names of images; also those that a config joins by `+`.

    Raises:
        UserError: There are none.
    """
    found: dict[str, list[tuple[Path, str]]] = {}
    for prefix, folder in folders.items():
        for path in sorted(folder.glob("ImageSets/Main/*.txt")):
            lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
            of_one_class = lines and all(line.split()[1:] in (["-1"], ["0"], ["1"]) for line in lines)
            if not of_one_class or (folder / "Annotations" / f"{lines[0]}.xml").is_file():
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


def read_voc(
    config: DataConfig, kind: LabelKind, chosen: Mapping[str, list[tuple[Path, str]]], model: Sequence[str] | None
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Read Pascal VOC's XML.

    Its boxes are 1-based indices of the first and the last pixel inside. As torchvision and Detectron2 users expect,
    they become x1 - 1, y1 - 1, x2, y2, the edges of these pixels.

    Raises:
        UserError: A file is malformed or missing, or the task needs masks.
    """
    if kind == "instances":
        raise UserError(
            f"data.source={config.source!r}: is Pascal VOC, whose XML has no masks of objects. Set task: "
            "object-detection, or use COCO JSON: data.images and data.annotations."
        )
    refuse_overlap(chosen)
    parsed: dict[str, list[Record]] = {}
    for split, entries in chosen.items():
        refuse_empty(config, split, entries)
        paths = [folder / "Annotations" / f"{name}.xml" for folder, name in entries]
        absent = [str(path) for path in paths if not os.path.isfile(path)]  # which takes names too long for a file
        if absent:
            raise UserError(
                f"{config.source}, split {split!r}: {len(absent)} of {len(paths)} images have no annotations: "
                f"{shown(absent)}. Add them, or remove the names from ImageSets/Main."
            )
        parsed[split] = [_voc_record(i, path) for i, path in enumerate(paths)]
    names = list(model or class_names(config, None) or _voc_names(next(iter(parsed.values()))))
    refuse_names(names, 1)
    numbers = {name: i for i, name in enumerate(names)}
    for record in (record for records in parsed.values() for record in records):
        for item in record["objects"]:
            item["label"] = class_id(item["label"], None, numbers, f"{record['where']}, {item['name']}")
    return {
        split: make_rows(_voc_images(config, split, chosen[split]), records) for split, records in parsed.items()
    }, names


def _voc_names(records: Iterable[Record]) -> list[str]:
    names = names_of(item["label"] for record in records for item in record["objects"]) or []
    return list(VOC_CLASSES) if names and set(names) <= set(VOC_CLASSES) else names


class _Plain(ElementTree.TreeBuilder):
    """Builds a tree of XML without a document type, which could define entities that grow without end."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        """Refuse it."""
        raise ValueError(f"it has a DOCTYPE, {name}, which Pascal VOC's files have not")


def _voc_record(number: int, path: Path) -> Record:
    try:
        root = ElementTree.parse(path, ElementTree.XMLParser(target=_Plain())).getroot()
    except (ElementTree.ParseError, OSError, LookupError, ValueError) as error:
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
    return make_record(number, str(path), size, "voc", objects)


def _voc_number(item: ElementTree.Element, key: str, where: str) -> float:
    text = item.findtext(key)
    if text is None:
        raise UserError(f"{where}: has no {key}. Add it.")
    return finite_number(text, f"{where}: has the {key}")


def _voc_images(config: DataConfig, split: str, entries: Sequence[tuple[Path, str]]) -> list[Path]:
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
            f"{shown(absent)}, with any suffix. Add them, or remove the names from ImageSets/Main."
        )
    for entry in entries:
        if len(found[entry]) > 1:
            raise UserError(f"{found[entry][1]}: has the name of {found[entry][0].name}. Rename or remove one.")
    return [found[entry][0] for entry in entries]
