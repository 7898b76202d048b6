"""Objects of an image, as they are annotated and as they are detected, in one convention for all formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from faster_coco_eval.core import mask as mask_api
from torch import Tensor

RLE: TypeAlias = Mapping[str, Any]
"""A mask in COCO's compressed run-length encoding: `{"size": [H, W], "counts": bytes}`."""


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
    """The objects that a model found in one image, at the size of its file.

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
