"""Records: the annotations of one image in the form that every format is brought to, and their decoding."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
from faster_coco_eval.core import mask as mask_api

from e3va_peft.data.objects import RLE, Objects
from e3va_peft.detection.annotations import LEAST_SIDE, are_numbers, encode_segmentation, is_set
from e3va_peft.errors import UserError

Record: TypeAlias = dict[str, Any]
"""Undecoded annotations of one image. A table keeps them as JSON, which worker processes share without a copy.

`id`: of the image. `where`: what to call it in an error. `size`: height and width for which it was annotated, or None.
`format`: of the boxes; with yolo, masks are shares of the image too. `objects`: one mapping each of `name`, `label`
(class id), `box` and, where known, `area`, `crowd`, `difficult`, `mask` (COCO's `segmentation`).
"""

JSON = datasets.Value("large_string")
"""The type of a table's column of records."""

_BROKEN = 10  # broken files to name at once


def make_record(number: int, where: str, size: list[int] | None, form: str, objects: list[Record]) -> Record:
    """Put the annotations of one image together. See `Record`."""
    known = size if size and any(size) else None  # some tools write zeros
    return {"id": number, "where": where, "size": known, "format": form, "objects": objects}


def make_rows(images: Sequence[Path], records: Iterable[Record]) -> datasets.Dataset:
    """Make a table of images and their records, with the columns `image` and `label`."""
    features = {"image": datasets.Image(decode=False), "label": JSON}
    files = [{"path": str(path), "bytes": None} for path in images]
    columns = {"image": files, "label": list(map(to_json, records))}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def to_json(content: Record) -> str:
    """Encode a record; numbers are exact, and the bytes of run lengths become text."""
    return json.dumps(content, default=_text)


def from_json(text: str) -> Record:
    """Decode what `to_json` encoded."""
    content: Record = json.loads(text)
    return content


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def finite_number(text: str, has: str) -> float:
    """Read a finite number.

    Raises:
        UserError: The text is not one. The message begins with `has`.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{has} {text!r}, which is not a number. Correct or remove it.")
    return number


def refuse_broken(errors: Sequence[str], total: int, what: str) -> None:
    """Raise a UserError that names the first ten errors, if there are any."""
    if errors:
        more = f"\n... and {len(errors) - _BROKEN} more" if len(errors) > _BROKEN else ""
        raise UserError(f"{len(errors)} of {total} {what}:\n" + "\n".join(errors[:_BROKEN]) + more)


@dataclass(frozen=True)
class Decoded:
    """The objects of one image, and what was done to its annotations.

    Attributes:
        objects: The remaining objects.
        dropped: Names of annotations whose box or mask has no area inside of the image.
        clipped: Names of boxes that left the image by more than a pixel.
        outside: Those of both lists whose box is the reason.
        box_format: How the boxes were read.
    """

    objects: Objects
    dropped: list[str]
    clipped: list[str]
    outside: list[str]
    box_format: str


def decode(content: Record, size: tuple[int, int], with_masks: bool) -> Decoded:
    """Decode the annotations of one image.

    Boxes are clipped to the image. An object whose box or mask then is empty is dropped.

    Args:
        content: The record.
        size: Height and width of the image.
        with_masks: Every object must have a mask; else masks only stand in for missing boxes and areas.

    Raises:
        UserError: A box or mask is malformed, or made for another size.
    """
    kept: list[tuple[np.ndarray, float, Record, RLE | None]] = []
    crowd, difficult = [], []
    dropped, clipped, outside = [], [], []
    limits = np.array([size[1], size[0]] * 2, dtype=np.float64)
    for item in content["objects"]:
        where = f"{content['where']}, {item['name']}"
        mask = _mask(item.get("mask"), content["format"], size, where)
        if mask is None and with_masks:
            raise UserError(f"{where}: has no segmentation (polygons or RLE). Add it, or remove the annotation.")
        drawn = _drawn(item["box"], mask, content["format"], size, where)
        box = drawn.clip(0, limits)
        sides = box[2:] - box[:2]
        extent = float(np.prod(sides)) if sides.min() >= LEAST_SIDE else 0.0
        covered = extent if mask is None else float(mask_api.area(mask))
        leaves = bool(np.abs(box - drawn).max() > 1)
        if not extent or leaves:
            outside.append(where)
        if not extent or not covered:
            dropped.append(where)
            continue
        if leaves:
            clipped.append(where)
        kept.append((box, _area(item.get("area"), covered, where), item, mask))
        crowd.append(_flag(item.get("crowd"), "crowd", where))
        difficult.append(_flag(item.get("difficult"), "difficult", where))
    objects = Objects(
        image_id=content["id"],
        size=size,
        boxes=np.array([box for box, *_ in kept], dtype=np.float64).reshape(-1, 4),
        labels=np.array([item["label"] for _, _, item, _ in kept], dtype=np.int64),
        areas=np.array([area for _, area, *_ in kept], dtype=np.float64),
        crowd=np.array(crowd, dtype=bool),
        difficult=np.array(difficult, dtype=bool),
        masks=tuple(mask for *_, mask in kept if mask is not None) if with_masks else None,
    )
    return Decoded(objects, dropped, clipped, outside, content["format"])


def _drawn(box: Any, mask: RLE | None, form: str, size: tuple[int, int], where: str) -> np.ndarray:
    """Find x1 y1 x2 y2 of a box as it is annotated, else of a mask."""
    if box is not None:
        return _corners(box, form, size, where)
    if mask is None:
        raise UserError(f"{where}: has no bbox and no segmentation. Add one, or remove the annotation.")
    x, y, width, height = mask_api.toBbox(mask)
    return np.array([x, y, x + width, y + height], dtype=np.float64)


def _corners(box: Any, form: str, size: tuple[int, int], where: str) -> np.ndarray:
    """Turn a box of any format into x1 y1 x2 y2 in pixels."""
    if not are_numbers(box) or len(box) != 4:
        raise UserError(f"{where}: has the box {box!r}, not four numbers. Correct or remove it.")
    a, b, c, d = box
    if form in ("cxcywh", "yolo"):
        if max(box) > 1 or min(box) < 0:
            raise UserError(
                f"{where}: has the box {box!r}; centre, width and height are shares of the image, 0 to 1. Set "
                "data.box_format to what it is: xywh or xyxy."
            )
        corners = np.array([a - c / 2, b - d / 2, a + c / 2, b + d / 2]) * (size[1], size[0], size[1], size[0])
    elif form == "xywh":
        corners = np.array([a, b, a + c, b + d], dtype=np.float64)
    else:
        first = 1 if form == "voc" else 0
        corners = np.array([a - first, b - first, c, d], dtype=np.float64)
    if (corners[2:] < corners[:2]).any():
        hint = "" if form == "voc" else f", or data.box_format, if it is not {form}"
        raise UserError(f"{where}: has the box {box!r}, of negative width or height. Correct or remove it{hint}.")
    return corners


def _area(value: Any, covered: float, where: str) -> float:
    if value is None:
        return covered
    if not are_numbers([value]) or value < 0:
        raise UserError(f"{where}: has the area {value!r}, not a number of pixels. Correct or remove it.")
    return float(value)


def _flag(value: Any, what: str, where: str) -> bool:
    try:
        return is_set(value, what)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _mask(value: Any, form: str, size: tuple[int, int], where: str) -> RLE | None:
    """Turn COCO's `segmentation`, or YOLO's polygon, into one compressed RLE; None where there is none."""
    if not value:
        return None
    if form == "yolo":
        sides = (size[1], size[0])
        value = [[share * sides[i % 2] for i, share in enumerate(polygon)] for polygon in value]
    try:
        return encode_segmentation(value, size)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
