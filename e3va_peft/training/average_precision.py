"""Average precision of detections, as COCO (by torchmetrics) and as Pascal VOC define it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from e3va_peft.data.objects import Detections, Objects
from e3va_peft.training.metrics import Scores

_COCO = {
    "ap": "map",
    "ap50": "map_50",
    "ap75": "map_75",
    "ap_small": "map_small",
    "ap_medium": "map_medium",
    "ap_large": "map_large",
    "ar100": "mar_100",
}
BOX_METRICS, MASK_METRICS = (tuple(f"{kind}_{name}" for name in _COCO) for kind in ("box", "mask"))
VOC_METRIC = "voc_ap50"
_NOWHERE = 1e12  # an area that is in none of COCO's ranges, which end at 1e10 pixels


def coco_scores(
    predictions: Sequence[Detections], references: Sequence[Objects], num_labels: int, masks: bool = False
) -> Scores:
    """Score detections as COCO does, one prediction and one reference per image, with values between 0 and 1.

    AP is the mean, over the classes that occur and over the IoU thresholds 0.50, 0.55, ..., 0.95, of the precision at
    101 recalls. Of each image and class the 100 best detections count. Small, medium and large objects have an area
    of at most 32², at most 96², and more pixels; `Objects.areas` says so for boxes and masks alike.

    A crowd is neither found nor missed, and no detection in it counts. COCO knows no `difficult` objects: they are
    ignored like objects of another size, neither found nor missed, and one detection of each does not count.

    Of equal scores in one image the first detection ranks first, and of equal scores in two images the first image's.

    Args:
        predictions: The detections of each image.
        references: The objects of each image, in the same order.
        num_labels: Number of classes K.
        masks: Score masks as well as boxes.

    Returns:
        `box_ap`, `box_ap50` and `box_ap75` (at IoU 0.5 and 0.75 only), `box_ap_small`, `box_ap_medium`,
        `box_ap_large`, `box_ar100` (the share of objects found among 100 detections, a mean as AP is), and with one
        value per class `per_class_box_ap`. With `masks` the same of masks: `mask_ap`, ..., `per_class_mask_ap`. A
        value is nan where there is no such object. All are rounded to float32.

    Raises:
        ValueError: The numbers of predictions and references differ, or one of boxes, scores, labels and masks has
            another length than the others.

    Source: `torchmetrics.detection.MeanAveragePrecision` over faster-coco-eval.
    """
    kinds = {"box": "bbox", "mask": "segm"} if masks else {"box": "bbox"}
    metric = MeanAveragePrecision(
        iou_type=tuple(kinds.values()),  # type: ignore[arg-type]
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),  # its own are rounded to float32: 3 of 10 objects, whose
        rec_thresholds=np.linspace(0, 1, 101).tolist(),  # recall is 0.3, would not reach 0.3
        class_metrics=True,
        backend="faster_coco_eval",
        sync_on_compute=False,  # every process has all images
    )
    metric.warn_on_many_detections = False
    for found, truth in zip(predictions, references, strict=True):
        metric.update([_detected(found)], [_annotated(truth)])
    if masks:
        metric.detection_mask = [_encoded(found) for found in predictions]
        metric.groundtruth_mask = [_encoded(truth) for truth in references]
    results = metric.compute()
    classes = results["classes"].reshape(-1).long()
    scores: Scores = {}
    for kind, prefix in kinds.items():
        prefix = f"{prefix}_" if masks else ""
        scores |= {f"{kind}_{ours}": _known(results[prefix + theirs]).item() for ours, theirs in _COCO.items()}
        per_class = torch.full((num_labels,), torch.nan)
        per_class[classes] = _known(results[f"{prefix}map_per_class"])
        scores[f"per_class_{kind}_ap"] = per_class.tolist()
    return scores


def _detected(found: Detections) -> dict[str, Tensor]:
    return _tensors(found) | {"scores": torch.from_numpy(found.scores)}


def _annotated(truth: Objects) -> dict[str, Tensor]:
    areas = np.where(truth.difficult, _NOWHERE, truth.areas.clip(min=1e-9))  # an area of 0 would be an unknown one
    return _tensors(truth) | {"area": torch.from_numpy(areas), "iscrowd": torch.from_numpy(truth.crowd).int()}


def _tensors(example: Detections | Objects) -> dict[str, Tensor]:
    """Convert an image for torchmetrics, with masks of one pixel for those that `_encoded` then gives it."""
    masks = torch.zeros(len(example), 1, 1, dtype=torch.uint8)
    return {"boxes": torch.from_numpy(example.boxes), "labels": torch.from_numpy(example.labels), "masks": masks}


def _encoded(example: Detections | Objects) -> Any:
    """Masks as torchmetrics keeps them: to decode and encode 100 of 640 x 480 pixels takes half a second."""
    masks = example.masks or ()
    if len(masks) != len(example):
        raise ValueError(f"an image has {len(example)} labels and {len(masks)} masks: pass one each, or masks=False")
    return tuple((tuple(mask["size"]), mask["counts"]) for mask in masks)


def _known(values: Tensor) -> Tensor:
    """Replace COCO's -1, which stands for a score without objects, by nan."""
    return values.where(values > -1, torch.nan)


def voc_scores(predictions: Sequence[Detections], references: Sequence[Objects], num_labels: int) -> Scores:
    """Score boxes as Pascal VOC does from 2010 on at IoU 0.5, one prediction and one reference per image.

    In the order of their scores, each detection is compared with the object of its class that it overlaps most. From
    an IoU of 0.5 that object is found; found already, the detection is false; `difficult` or a crowd, the detection
    does not count. Such objects are not missed either. AP is the area under the precision made monotone.

    Boxes are continuous, x2 - x1 wide. VOC's devkit counts pixels, x2 - x1 + 1, for coordinates that are indices of
    pixels: its IoU differs a little, most for small objects.

    Args:
        predictions: The detections of each image.
        references: The objects of each image, in the same order.
        num_labels: Number of classes K.

    Returns:
        `voc_ap50`, the mean over the classes that occur, and `per_class_voc_ap50`, nan where a class never occurs.
        Objects that are difficult or a crowd do not make a class occur.

    Raises:
        ValueError: The numbers of predictions and references differ.

    Source: VOCdevkit, `VOCevaldet.m` and `VOCap.m` (2010); py-faster-rcnn, `voc_eval.py`, which asks for an IoU above
        0.5 where the devkit and we ask for 0.5.
    """
    pairs = list(zip(predictions, references, strict=True))
    scores, labels = (np.concatenate([getattr(found, name) for found in predictions]) for name in ("scores", "labels"))
    hits, counted = (np.concatenate(flags) for flags in zip(*(_hits(*pair) for pair in pairs), strict=True))
    objects = np.concatenate([truth.labels[~_ignored(truth)] for truth in references])
    order = np.argsort(-scores, kind="stable")
    order = order[counted[order]]
    precisions = [
        _voc_ap(hits[order][labels[order] == label], int((objects == label).sum())) for label in range(num_labels)
    ]
    known = [value for value in precisions if not np.isnan(value)]
    return {VOC_METRIC: float(np.mean(known)) if known else float("nan"), "per_class_voc_ap50": precisions}


def _hits(found: Detections, truth: Objects) -> tuple[np.ndarray, np.ndarray]:
    """Say of each detection of an image, (n,), whether it is the first to hit an object, and whether it counts."""
    if not len(truth):
        return np.zeros(len(found), dtype=bool), np.ones(len(found), dtype=bool)
    overlaps = np.where(found.labels[:, None] == truth.labels, _iou(found, truth), -1)  # (n, m)
    best = overlaps.argmax(axis=1)
    near = overlaps.max(axis=1) >= 0.5
    counted = ~(near & _ignored(truth)[best])
    order = np.argsort(-found.scores, kind="stable")
    order = order[(near & counted)[order]]
    _, first = np.unique(best[order], return_index=True)
    hits = np.zeros(len(found), dtype=bool)
    hits[order[first]] = True
    return hits, counted


def _ignored(truth: Objects) -> np.ndarray:
    return truth.difficult | truth.crowd


def _iou(found: Detections, truth: Objects) -> np.ndarray:
    """Overlaps of boxes, `(n, m)`; 0 of two empty ones."""
    return box_iou(torch.from_numpy(found.boxes), torch.from_numpy(truth.boxes)).nan_to_num(0).numpy()


def _voc_ap(hits: np.ndarray, objects: int) -> float:
    """AP of one class: of its detections that count, best first, whether each is a hit."""
    if not objects:
        return float("nan")
    found = hits.cumsum()
    recall, precision = found / objects, found / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or above
    return float((np.diff(recall, prepend=0) * best).sum())
