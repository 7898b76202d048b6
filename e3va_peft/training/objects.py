"""What is in an image: objects as they are annotated, decoded, and as they are detected. One convention for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from faster_coco_eval.core import mask as mask_api
from torch import Tensor

from e3va_peft.detection.coco import LEAST_SIDE, are_numbers, encode_segmentation, is_set
from e3va_peft.errors import UserError

RLE: TypeAlias = Mapping[str, Any]
"""A mask in COCO's compressed run-length encoding: `{"size": [H, W], "counts": bytes}`."""

Record: TypeAlias = dict[str, Any]
"""One image's annotations, undecoded; kept pickled in a table, of which worker processes need no copy.

`id`: of the image. `where`: what to call it in an error. `size`: height and width for which it was annotated, or None.
`format`: of the boxes. `objects`: one mapping each of `name`, `label` (class id), `box` and, where known, `area`,
`crowd`, `difficult`, `mask` (COCO's `segmentation`).
"""


@dataclass(frozen=True)
class Objects:
    """The annotated objects of one image, at the size of its file (turned as its EXIF tag says).

    Attributes:
        image_id: Id of the image: COCO's own, or its row in the split.
        size: Height and width in pixels.
        boxes: `(n, 4)` float64, x1 y1 x2 y2 in pixels, inside of the image, of positive width and height.
        labels: `(n,)` int64, class ids 0..K-1.
        areas: `(n,)` float64, in pixels: what the annotation says, else of the mask, else of the box.
        crowd: `(n,)` bool: many objects in one annotation (COCO's `iscrowd`): not trained on, detections in it do not
            count.
        difficult: `(n,)` bool: Pascal VOC's `difficult`: not trained on, neither found nor missed in the score.
        masks: One RLE per object; None where there are only boxes.
    """

    image_id: int
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray
    masks: tuple[RLE, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Detections:
    """What a model found in one image, at the size of its file.

    Attributes:
        boxes: `(n, 4)` float64, x1 y1 x2 y2 in pixels.
        scores: `(n,)` float64, between 0 and 1.
        labels: `(n,)` int64, class ids 0..K-1.
        masks: One RLE per object; None where the model finds boxes only.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: tuple[RLE, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Decoded:
    """The objects of one image, and what was done to its annotations.

    Attributes:
        objects: What is left.
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


def decode(record: Record, size: tuple[int, int], with_masks: bool) -> Decoded:
    """Decode the annotations of one image.

    Boxes are clipped to the image. An object whose box or mask then is empty is dropped.

    Args:
        record: What is annotated.
        size: Height and width of the image.
        with_masks: Every object must have a mask; else masks only stand in for missing boxes and areas.

    Raises:
        UserError: A box or mask is malformed, or made for another size.
    """
    kept: list[tuple[np.ndarray, float, Record, RLE | None]] = []
    crowd, difficult = [], []
    dropped, clipped, outside = [], [], []
    limits = np.array([size[1], size[0]] * 2, dtype=np.float64)
    for item in record["objects"]:
        where = f"{record['where']}, {item['name']}"
        mask = _mask(item.get("mask"), size, where)
        if mask is None and with_masks:
            raise UserError(f"{where}: has no segmentation (polygons or RLE). Add it, or remove the annotation.")
        drawn = _drawn(item["box"], mask, record["format"], size, where)
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
        image_id=record["id"],
        size=size,
        boxes=np.array([box for box, *_ in kept], dtype=np.float64).reshape(-1, 4),
        labels=np.array([item["label"] for _, _, item, _ in kept], dtype=np.int64),
        areas=np.array([area for _, area, *_ in kept], dtype=np.float64),
        crowd=np.array(crowd, dtype=bool),
        difficult=np.array(difficult, dtype=bool),
        masks=tuple(mask for *_, mask in kept if mask is not None) if with_masks else None,
    )
    return Decoded(objects, dropped, clipped, outside, record["format"])


def _drawn(box: Any, mask: RLE | None, form: str, size: tuple[int, int], where: str) -> np.ndarray:
    """Return x1 y1 x2 y2 of a box as it is annotated, else of a mask."""
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
    if form == "cxcywh":
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
        raise UserError(f"{where}: has the area {value!r}, no number of pixels. Correct or remove it.")
    return float(value)


def _flag(value: Any, what: str, where: str) -> bool:
    try:
        return is_set(value, what)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _mask(value: Any, size: tuple[int, int], where: str) -> RLE | None:
    """Turn COCO's `segmentation` into one compressed RLE; None where there is none."""
    if not value:
        return None
    try:
        return encode_segmentation(value, size)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def encode_masks(masks: np.ndarray | Tensor) -> tuple[RLE, ...]:
    """Encode masks, `(n, H, W) bool -> n RLEs`.

    Raises:
        TypeError: `masks` are not booleans: probabilities must be thresholded first.
        ValueError: `masks` are not (n, H, W).
    """
    array = masks.detach().cpu().numpy() if isinstance(masks, Tensor) else masks
    if array.dtype != bool:
        raise TypeError(f"masks must be booleans, got {array.dtype}: pass masks > 0.5")
    if array.ndim != 3:
        raise ValueError(f"masks must have shape (n, H, W), got {array.shape}: pass one mask as mask[None]")
    return tuple(mask_api.encode(np.asfortranarray(array.transpose(1, 2, 0), dtype=np.uint8)))


def decode_mask(mask: RLE) -> np.ndarray:
    """Decode one mask, `RLE -> (H, W) bool`."""
    return np.asarray(mask_api.decode(dict(mask)), dtype=bool)
