"""Average precision of detections, as COCO and as Pascal VOC define it: plain functions, and `evaluate` metrics.

The metrics are classes to construct, not names to `evaluate.load`, as those of `metrics` are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import evaluate
import numpy as np
import torch
from datasets import Features, Value
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as mask_api
from torch import Tensor
from torchvision.ops import box_iou

from e3va_peft.data.objects import RLE, Detections, Objects, encode_masks
from e3va_peft.training.metrics import Scores, _Reducing
from e3va_peft.training.packing import from_bytes, to_bytes

Interpolation = Literal["area", "11-point"]


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
        predictions: What was found in each image.
        references: What is in each image, in the same order.
        num_labels: Number of classes K.
        masks: Score masks as well as boxes.

    Returns:
        `box_ap`, `box_ap50` and `box_ap75` (at IoU 0.5 and 0.75 only), `box_ap_small`, `box_ap_medium`,
        `box_ap_large`, `box_ar100` (the share of objects found among 100 detections, a mean as AP is), and with one
        value per class `per_class_box_ap`. With `masks` the same of masks: `mask_ap`, ..., `per_class_mask_ap`. A
        value is nan where there is no such object.

    Raises:
        TypeError: Labels are floating-point numbers.
        ValueError: There are no images; the numbers of predictions and references differ; an array has another shape
            than `Detections` or `Objects` say; a label is outside 0..K-1, a score outside 0..1; a box is not finite or
            ends before it begins; or `masks` are to be scored and are missing, or differ in size within an image.

    Source: `pycocotools.cocoeval`, computed by faster-coco-eval.
    """
    _check_all(predictions, references, num_labels, masks)
    scores = _coco(predictions, references, num_labels, "box")
    return scores | _coco(predictions, references, num_labels, "mask") if masks else scores


def voc_scores(
    predictions: Sequence[Detections],
    references: Sequence[Objects],
    num_labels: int,
    interpolation: Interpolation = "area",
) -> Scores:
    """Score boxes as Pascal VOC does at IoU 0.5, one prediction and one reference per image.

    In the order of their scores, each detection is held against the object of its class that it overlaps most. From
    an IoU of 0.5 that object is found; found already, the detection is false; `difficult` or a crowd, the detection
    does not count. Such objects are not missed either.

    Boxes are continuous, x2 - x1 wide. VOC's devkit counts pixels, x2 - x1 + 1, for coordinates that are indices of
    pixels: its IoU differs a little, most for small objects.

    Args:
        predictions: What was found in each image.
        references: What is in each image, in the same order.
        num_labels: Number of classes K.
        interpolation: "area": AP is the area under the precision made monotone, VOC's from 2010 on. "11-point": the
            mean of the best precision at the recalls 0, 0.1, ..., 1 and above, VOC's up to 2009 (VOC2007).

    Returns:
        `voc_ap50`, the mean over the classes that occur, and `per_class_voc_ap50`, nan where a class never occurs.
        Objects that are difficult or a crowd do not make a class occur.

    Raises:
        TypeError: Labels are floating-point numbers.
        ValueError: `interpolation` is unknown, or what `coco_scores` refuses of boxes.

    Source: VOCdevkit, `VOCevaldet.m` and `VOCap.m` (2007 and 2010); py-faster-rcnn, `voc_eval.py`, which asks for an
        IoU above 0.5 where the devkit and we ask for 0.5.
    """
    _check_interpolation(interpolation)
    _check_all(predictions, references, num_labels, masks=False)
    scores, labels = (np.concatenate([getattr(found, name) for found in predictions]) for name in ("scores", "labels"))
    hits, counted = (
        np.concatenate(flags)
        for flags in zip(*(_hits(*pair) for pair in zip(predictions, references, strict=True)), strict=True)
    )
    objects = np.concatenate([truth.labels[~_ignored(truth)] for truth in references])
    order = np.argsort(-scores, kind="stable")
    order = order[counted[order]]
    precisions = [
        _voc_ap(hits[order][labels[order] == label], int((objects == label).sum()), interpolation)
        for label in range(num_labels)
    ]
    return {"voc_ap50": _mean(precisions), "per_class_voc_ap50": precisions}


class _AveragePrecision(_Reducing):
    """What both metrics share: an image is kept as the bytes of its objects.

    Args:
        num_labels: Number of classes K.
        masks: Whether masks are scored.
        kwargs: Arguments of `evaluate.Metric`.
    """

    def __init__(self, num_labels: int, masks: bool, **kwargs: Any) -> None:
        self.num_labels = num_labels
        self.masks = masks
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Average precision of detections.",
            citation="",
            inputs_description="predictions: Detections or dicts with boxes, scores, labels; references: Objects or "
            "dicts with boxes, labels",
            # What is kept, not what is passed in.
            features=Features({"predictions": Value("binary"), "references": Value("binary")}),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add what was found in some images, and what is there.

        A prediction is `Detections`, or a dict as `image_processor.post_process_object_detection` returns them for
        given `target_sizes`: `boxes` (n, 4), x1 y1 x2 y2 in pixels, `scores` and `labels` (n,), and `masks`, booleans
        (n, H, W) or RLEs, if there are any. A reference is `Objects`, or a dict of `boxes`, `labels`, and where known
        of `areas` or `area`, `iscrowd`, `difficult` and `masks`. Other keys are ignored.

        Raises:
            TypeError: Labels are floating-point numbers, or masks are neither booleans nor RLEs.
            ValueError: A dict lacks a key, or what the function of the metric refuses. The message names the image.
        """
        _check_counts(predictions, references)
        found = [_detections(f"predictions[{index}]", example) for index, example in enumerate(predictions)]
        truth = [_objects(f"references[{index}]", example, index) for index, example in enumerate(references)]
        _check_images(found, truth, self.num_labels, self.masks)
        super().add_batch(
            predictions=[to_bytes(example) for example in found],
            references=[to_bytes(example) for example in truth],
            **kwargs,
        )

    def _compute(self, *, predictions: Sequence[bytes], references: Sequence[bytes]) -> Scores:
        return self._score(*([from_bytes(data) for data in images] for images in (predictions, references)))

    def _score(self, predictions: list[Any], references: list[Any]) -> Scores:
        """Score `Detections` against `Objects`."""
        raise NotImplementedError


class CocoAP(_AveragePrecision):
    """COCO's average precision of boxes and masks, as `coco_scores` gives it.

    Args:
        num_labels: Number of classes K.
        masks: Score masks as well as boxes.
        kwargs: Arguments of `evaluate.Metric`. With one process nothing is written to disk by default.
    """

    def __init__(self, num_labels: int, masks: bool = False, **kwargs: Any) -> None:
        super().__init__(num_labels, masks, **kwargs)

    def _score(self, predictions: list[Any], references: list[Any]) -> Scores:
        return coco_scores(predictions, references, self.num_labels, self.masks)


class VocAP50(_AveragePrecision):
    """Pascal VOC's average precision of boxes at IoU 0.5, as `voc_scores` gives it.

    Args:
        num_labels: Number of classes K.
        interpolation: "area", VOC's from 2010 on, or "11-point", VOC's before.
        kwargs: Arguments of `evaluate.Metric`. With one process nothing is written to disk by default.

    Raises:
        ValueError: `interpolation` is unknown.
    """

    def __init__(self, num_labels: int, interpolation: Interpolation = "area", **kwargs: Any) -> None:
        _check_interpolation(interpolation)
        self.interpolation = interpolation
        super().__init__(num_labels, masks=False, **kwargs)

    def _score(self, predictions: list[Any], references: list[Any]) -> Scores:
        return voc_scores(predictions, references, self.num_labels, self.interpolation)


# COCO


def _coco(
    predictions: Sequence[Detections], references: Sequence[Objects], num_labels: int, kind: Literal["box", "mask"]
) -> Scores:
    """Score boxes or masks with the evaluator, which logs what others print, on level INFO at most."""
    truth = COCO(
        {
            # The position is the id: the annotation's own need not be distinct in every data set.
            "images": [
                {"id": index, "height": objects.size[0], "width": objects.size[1]}
                for index, objects in enumerate(references)
            ],
            "categories": [{"id": label, "name": str(label)} for label in range(num_labels)],
            # From 1: to the evaluator 0 is no object.
            "annotations": [{"id": id_} | one for id_, one in enumerate(_annotations(references, kind), start=1)],
        }
    )
    found = truth.loadRes(list(_results(predictions, kind)))
    evaluator = COCOeval_faster(truth, found, iouType={"box": "bbox", "mask": "segm"}[kind])
    evaluator.evaluate()
    evaluator.accumulate()
    # By IoU, recall, class and area (all, small, medium, large); of 1, 10 and 100 detections the last.
    precision, recall = evaluator.eval["precision"][..., -1], evaluator.eval["recall"][..., -1]
    return {
        f"{kind}_ap": _coco_mean(precision[..., 0]),
        f"{kind}_ap50": _coco_mean(precision[0, ..., 0]),
        f"{kind}_ap75": _coco_mean(precision[5, ..., 0]),
        f"{kind}_ap_small": _coco_mean(precision[..., 1]),
        f"{kind}_ap_medium": _coco_mean(precision[..., 2]),
        f"{kind}_ap_large": _coco_mean(precision[..., 3]),
        f"{kind}_ar100": _coco_mean(recall[..., 0]),
        f"per_class_{kind}_ap": [_coco_mean(precision[:, :, label, 0]) for label in range(num_labels)],
    }


def _annotations(references: Sequence[Objects], kind: str) -> Iterator[dict[str, Any]]:
    """Yield every object as COCO annotates it.

    The evaluator overwrites `ignore` with `iscrowd`, and overlaps with a crowd are measured in another way. What it
    does ignore is an object whose area is in none of its ranges, also not in "all", which begins at 0.
    """
    for image, objects in enumerate(references):
        areas = np.where(objects.difficult, -1.0, objects.areas)
        for index, shape in enumerate(_shapes(objects, kind)):
            yield {
                "image_id": image,
                "category_id": int(objects.labels[index]),
                "area": float(areas[index]),
                "iscrowd": int(objects.crowd[index]),
                **shape,
            }


def _results(predictions: Sequence[Detections], kind: str) -> Iterator[dict[str, Any]]:
    """Yield every detection in COCO's format of results; of a mask without box, so that its area is the mask's."""
    for image, found in enumerate(predictions):
        for index, shape in enumerate(_shapes(found, kind)):
            label, score = int(found.labels[index]), float(found.scores[index])
            yield {"image_id": image, "category_id": label, "score": score, **shape}


def _shapes(example: Detections | Objects, kind: str) -> list[dict[str, Any]]:
    """Return of each object its box, x y width height, or its mask."""
    if kind == "mask":
        return [{"segmentation": dict(mask)} for mask in example.masks or ()]
    boxes = np.concatenate([example.boxes[:, :2], example.boxes[:, 2:] - example.boxes[:, :2]], axis=1)
    return [{"bbox": box} for box in boxes.tolist()]


def _coco_mean(values: np.ndarray) -> float:
    """Average without COCO's -1, which says that there is no such object."""
    return _mean(np.where(values > -1, values, np.nan))


def _mean(values: np.ndarray | list[float]) -> float:
    known = np.asarray(values)[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


# Pascal VOC


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
    """Return the overlaps of boxes, `(n, m)`; 0 of two empty ones."""
    boxes = [torch.from_numpy(np.array(each.boxes, dtype=np.float64, order="C")) for each in (found, truth)]
    return box_iou(*boxes).nan_to_num(0).numpy()


def _voc_ap(hits: np.ndarray, objects: int, interpolation: Interpolation) -> float:
    """Return the AP of one class: of its detections that count, best first, whether each is a hit."""
    if not objects:
        return float("nan")
    found = hits.cumsum()
    recall, precision = found / objects, found / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or above
    if interpolation == "area":
        return float((np.diff(recall, prepend=0) * best).sum())
    reached = np.searchsorted(recall, np.arange(11) / 10)  # 3 / 10 is the recall of 3 in 10 objects, 3 * 0.1 is not
    return float(np.append(best, 0)[reached].mean())


# From dicts


def _detections(name: str, example: Any) -> Detections:
    if isinstance(example, Detections):
        return example
    boxes, labels = _boxes_and_labels(name, example)
    scores = _array(_required(name, example, "scores"), np.float64)
    return Detections(boxes, scores, labels, _masks(name, example))


def _objects(name: str, example: Any, index: int) -> Objects:
    if isinstance(example, Objects):
        return example
    boxes, labels = _boxes_and_labels(name, example)
    masks = _masks(name, example)
    height, width = masks[0]["size"] if masks else (0, 0)  # of an image without masks nobody asks the size
    areas = example.get("areas", example.get("area"))
    if areas is None:
        areas = mask_api.area([dict(mask) for mask in masks]) if masks else (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    none = np.zeros(len(labels), dtype=bool)
    return Objects(
        image_id=index,
        size=(height, width),
        boxes=boxes,
        labels=labels,
        areas=_array(areas, np.float64),
        crowd=_array(example.get("iscrowd", none), np.bool_),
        difficult=_array(example.get("difficult", none), np.bool_),
        masks=masks,
    )


def _boxes_and_labels(name: str, example: Any) -> tuple[np.ndarray, np.ndarray]:
    boxes = _array(_required(name, example, "boxes"), np.float64)
    labels = _required(name, example, "labels")
    labels = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    labels = labels if labels.size else labels.astype(np.int64)  # an empty list has no dtype
    return boxes if boxes.size else boxes.reshape(0, 4), labels


def _required(name: str, example: Any, key: str) -> Any:
    if not isinstance(example, Mapping):
        raise TypeError(
            f"{name} must be a dict, Detections or Objects, got {type(example).__name__}: pass one per image"
        )
    if key not in example:
        raise ValueError(f"{name} has no {key!r}, only {sorted(example)}: pass {key!r}, one per object")
    return example[key]


def _masks(name: str, example: Mapping[str, Any]) -> tuple[RLE, ...] | None:
    masks = example.get("masks")
    if masks is None:
        return None
    if isinstance(masks, Tensor | np.ndarray):
        return encode_masks(masks)
    if not all(isinstance(mask, Mapping) for mask in masks):
        raise TypeError(f"{name} has masks that are no RLEs: pass RLEs, or booleans as one array (n, H, W)")
    return tuple(masks)


def _array(values: Any, dtype: type[np.generic]) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()  # numpy has no bf16
    return np.asarray(values, dtype=dtype)


# Checks


def _check_all(predictions: Sequence[Detections], references: Sequence[Objects], num_labels: int, masks: bool) -> None:
    _check_counts(predictions, references)
    if not len(references):
        raise ValueError("references are 0 images: pass at least one image, with or without objects in it")
    _check_images(predictions, references, num_labels, masks)


def _check_counts(predictions: Any, references: Any) -> None:
    counts = [0 if images is None else len(images) for images in (predictions, references)]
    if predictions is None or references is None or counts[0] != counts[1]:
        raise ValueError(
            f"predictions are {counts[0]} images, references {counts[1]}: pass one prediction and one reference per "
            "image, without objects if there are none"
        )


def _check_interpolation(interpolation: str) -> None:
    if interpolation not in ("area", "11-point"):
        raise ValueError(f"interpolation is {interpolation!r}: pass 'area' (VOC from 2010 on) or '11-point' (VOC2007)")


def _check_images(
    predictions: Sequence[Detections], references: Sequence[Objects], num_labels: int, masks: bool
) -> None:
    if num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, got {num_labels}: pass the number of classes")
    for index, (found, truth) in enumerate(zip(predictions, references, strict=True)):
        for name, example in ((f"predictions[{index}]", found), (f"references[{index}]", truth)):
            _check_shapes(name, example)
            _check_values(name, example, num_labels)
        if masks:
            _check_masks(index, found, truth)


def _check_shapes(name: str, example: Detections | Objects) -> None:
    count = len(example)
    vectors = ("labels", "scores") if isinstance(example, Detections) else ("labels", "areas", "crowd", "difficult")
    for field, shape in ({"boxes": (count, 4)} | dict.fromkeys(vectors, (count,))).items():
        got = getattr(example, field).shape
        if got != shape:
            raise ValueError(
                f"{name} has {field} of shape {got}, not {shape}: pass one for each of its {count} labels"
            )
    if example.masks is not None and len(example.masks) != count:
        raise ValueError(f"{name} has {len(example.masks)} masks: pass one for each of its {count} labels")


def _check_values(name: str, example: Detections | Objects, num_labels: int) -> None:
    """Refuse labels that are no class, scores that are no probabilities, and boxes that are none."""
    labels, boxes = example.labels, example.boxes
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"{name} has labels in {labels.dtype}: pass class ids in integers")
    _refuse(
        f"{name} has labels",
        labels,
        (labels < 0) | (labels >= num_labels),
        f"0..{num_labels - 1}: relabel, drop them, or raise num_labels",
    )
    ordered = np.isfinite(boxes).all(axis=1) & (boxes[:, :2] <= boxes[:, 2:]).all(axis=1)
    _refuse(f"{name} has boxes", boxes, ~ordered, "x1 y1 x2 y2 in pixels: convert boxes of another format")
    if isinstance(example, Detections):
        probable = (example.scores >= 0) & (example.scores <= 1)
        _refuse(f"{name} has scores", example.scores, ~probable, "0 to 1: pass probabilities, not logits")


def _refuse(what: str, values: np.ndarray, wrong: np.ndarray, rule: str) -> None:
    """Raise ValueError if one of the values, (n,) or (n, 4), is wrong."""
    if wrong.any():
        index = int(wrong.argmax())
        raise ValueError(f"{what} with {values[index].tolist()} at {index}; they must be {rule}")


def _check_masks(index: int, found: Detections, truth: Objects) -> None:
    """Refuse an image without the masks to score, or with masks that cannot lie on each other."""
    for name, example in ((f"predictions[{index}]", found), (f"references[{index}]", truth)):
        if example.masks is None and len(example):
            raise ValueError(f"{name} has {len(example)} objects and no masks: pass masks, or masks=False for boxes")
    sizes = {tuple(mask["size"]) for example in (found, truth) for mask in example.masks or ()}
    if len(sizes) > 1:
        raise ValueError(
            f"predictions[{index}] and references[{index}] have masks of several sizes {sorted(sizes)}: resize the "
            "predicted masks to the size of the image"
        )
