"""COCO's annotations, brought to one form: polygons or run lengths, flags; and how thin a box may be."""

from __future__ import annotations

from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle

LEAST_SIDE = 1e-2  # pixels; of a thinner box rounding leaves nothing, and a loss of infinity

_MOST = 1e15  # beyond any pixel

_FAR = 10  # image sides that a polygon may lead away from its image: it is drawn edge by edge


def are_numbers(values: Any) -> bool:
    """Whether a value is a list of numbers that can be pixels: finite, and no integer that no float can hold."""
    return isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and -_MOST < value < _MOST for value in values
    )


def is_set(value: Any, what: str) -> bool:
    """Read a flag: 0, 1, true or false, as a number or text; nothing is false.

    Args:
        value: The flag.
        what: Its name.

    Raises:
        ValueError: It is something else. The message begins where its object is named.
    """
    given = value.strip().lower() if isinstance(value, str) else value
    if given in (None, "", 0, "0", "false"):
        return False
    if given in (1, "1", "true"):
        return True
    raise ValueError(f"has {value!r} for {what}, neither 0 nor 1. Correct it.")


def encode_segmentation(value: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Turn polygons, or run lengths as numbers or text, into one compressed RLE.

    Args:
        value: List of polygons, x and y of each point in pixels, or `{"size": [H, W], "counts": ...}`. Polygons of one
            or two points cover nothing.
        size: Height and width of the image.

    Raises:
        ValueError: It is malformed, or made for another size. The message begins where its object is named.
    """
    if isinstance(value, dict):
        return _runs(value, size)
    if not isinstance(value, list) or not all(isinstance(polygon, list) for polygon in value):
        raise ValueError("has a segmentation that is neither a list of polygons nor an RLE. Convert it.")
    for polygon in value:
        if not are_numbers(polygon) or len(polygon) % 2:
            raise ValueError(
                f"has a polygon of {len(polygon)} values; it takes the numbers x and y of each point. "
                "Correct or remove it."
            )
        if max(map(abs, polygon), default=0) > _FAR * max(size):
            raise ValueError("has a polygon that leads far away from its image. Correct or remove it.")
    areas = [polygon for polygon in value if len(polygon) >= 6]
    if not areas:
        empty: dict[str, Any] = rle.encode(np.zeros(size, dtype=np.uint8, order="F"))
        return empty
    merged: dict[str, Any] = rle.merge(rle.frPyObjects(areas, *size))
    return merged


def _runs(value: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    found, counts = value.get("size"), value.get("counts")
    if not are_numbers(found) or tuple(found or ()) != size:
        raise ValueError(
            f"has an RLE of the size {found} (height, width), its image has {list(size)}. Export it in the size of "
            "its image; if the image is rotated by its EXIF tag, rotate its pixels and drop the tag."
        )
    try:
        mask = {"size": list(size), "counts": counts.encode()} if isinstance(counts, str) else value
        if isinstance(counts, list):
            mask = rle.frPyObjects(value, *size)
        rle.decode(mask)  # which checks that its runs fill the image
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"has a broken RLE ({why}). Export it again or remove it.") from None
    return mask
