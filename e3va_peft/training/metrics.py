"""Accuracy and mean IoU: plain functions that count on the device, and `evaluate` metrics over them.

The metrics are classes to construct, not names to `evaluate.load`: nothing is downloaded. Both reduce what they are
given at once, so that an evaluation over a whole dataset keeps neither scores nor label maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import evaluate
import numpy as np
import torch
from datasets import Features, List, Value
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

TOP = 5

Scores: TypeAlias = dict[str, float | list[float]]


def confusion_matrix(
    predictions: Tensor, references: Tensor, num_labels: int, ignore_index: int | None = 255
) -> Tensor:
    """Count pixels by true and predicted class, `(..., H, W) -> (K, K)`, on the device of the maps.

    The counts of several images add up: sum their matrices, then call `segmentation_scores` once.

    Args:
        predictions: Predicted class of each pixel, integers of shape (..., H, W).
        references: True class of each pixel, integers of the same shape.
        num_labels: Number of classes K.
        ignore_index: Pixels with this reference are not counted, also if it is a class (255 is one of 256 classes).
            None counts every pixel.

    Returns:
        Counts in int64; row: the true class, column: the predicted class.

    Raises:
        TypeError: A map holds floating-point numbers.
        ValueError: The shapes differ; a counted pixel's class is outside 0..K-1; or `num_labels` is below 1.
    """
    return _count(predictions, references, num_labels, ignore_index)


def segmentation_scores(confusion: Tensor) -> Scores:
    """Turn the counts of `confusion_matrix` into scores between 0 and 1, `(K, K) -> dict`.

    A class that occurs neither in a reference nor in a prediction has IoU nan, one that occurs in no reference has
    accuracy nan; means leave out nan. That is the convention of mmsegmentation and of Hugging Face's `mean_iou`.

    Args:
        confusion: Counts; row: the true class, column: the predicted class.

    Returns:
        `mean_iou`, `mean_accuracy` (means over classes), `overall_accuracy` (share of pixels), and with one value per
        class `per_class_iou` (intersection / union) and `per_class_accuracy` (the share found of a class's pixels).

    Raises:
        ValueError: `confusion` is not a square matrix.
    """
    if confusion.dim() != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(
            f"confusion must be a square matrix (K, K), got shape {tuple(confusion.shape)}: sum the matrices of "
            "several images first"
        )
    hits, truth, predicted = _totals(confusion)
    iou, accuracy = hits / (truth + predicted - hits), hits / truth
    return {
        "mean_iou": iou.nanmean().item(),
        "mean_accuracy": accuracy.nanmean().item(),
        "overall_accuracy": (hits.sum() / truth.sum()).item(),
        "per_class_iou": iou.tolist(),
        "per_class_accuracy": accuracy.tolist(),
    }


def accuracy_scores(scores: Tensor, references: Tensor) -> Scores:
    """Score a classifier, `(N, K), (N,) -> dict` of values between 0 and 1.

    Of equal scores the lower class ranks first, as for `argmax`.

    Args:
        scores: Logits or probabilities, (N, K).
        references: True classes, integers of shape (N,).

    Returns:
        `accuracy`; for more than 5 classes `accuracy_top5`, the share with the true class among the five highest
        scores; `accuracy_per_class`, one value per class, nan where a class never occurs; and `mean_class_accuracy`,
        the mean over the classes that occur.

    Raises:
        TypeError: `references` holds floating-point numbers.
        ValueError: `scores` is not (N, K), `references` is not (N,), or a reference is outside 0..K-1.
    """
    if scores.dim() != 2:
        raise ValueError(
            f"scores must have shape (N, K), got {tuple(scores.shape)}: for class ids use Accuracy(num_labels=K)"
        )
    return _accuracy(_ranked(scores), references, scores.shape[1])


class _Reducing(evaluate.Metric):
    """What both metrics share: one example is a batch of one, and what is kept is small enough for memory.

    Kept in memory there is no cache file, so nothing that processes could clash over and nothing to lock or to clean
    up. Several processes that score together (`num_process`) do need the files of `evaluate` to meet.
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("keep_in_memory", kwargs.get("num_process", 1) == 1)
        super().__init__(**kwargs)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one prediction and its reference; `predictions=` and `references=` name the same."""
        example = {"predictions": prediction, "references": reference} | kwargs
        self.add_batch(**{name: [value] for name, value in example.items()})

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> Scores | None:
        """Score what was added before and what is passed here, then start afresh.

        Raises:
            ValueError: There is nothing to score, or what `add_batch` refuses.
        """
        # One of several processes may have nothing to add.
        if self.num_process == 1 and predictions is None and references is None and not len(self):
            raise ValueError(
                "there is nothing to score: call add or add_batch before compute, or pass predictions and references"
            )
        result: Scores | None = super().compute(predictions=predictions, references=references, **kwargs)
        return result


class Accuracy(_Reducing):
    """Top-1, top-5 and per-class accuracy of a classifier, as `accuracy_scores` gives them.

    Predictions are scores (N, K), logits or probabilities, or class ids (N,), which have no top-5. Of each example
    only its five best classes are kept.

    Args:
        num_labels: Number of classes K. Scores know it; class ids do not.
        kwargs: Arguments of `evaluate.Metric`. With one process nothing is written to disk by default.
    """

    def __init__(self, num_labels: int | None = None, **kwargs: Any) -> None:
        self.num_labels = num_labels
        self._columns: int | None = None  # of the examples added so far: K for scores, 0 for class ids
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-1, top-5 and per-class accuracy of a classifier.",
            citation="",
            inputs_description="predictions: scores (N, K) or class ids (N,); references: class ids (N,)",
            # What is kept, not what is passed in: the best classes, best first.
            features=Features({"predictions": List(Value("int64")), "references": Value("int64")}),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add predictions, (N, K) scores or (N,) class ids, and their references (N,).

        Raises:
            TypeError: Class ids are floating-point numbers.
            ValueError: `num_labels` is unknown or not the number of columns; scores and class ids are mixed in one
                evaluation; the shapes do not fit; or a class is outside 0..num_labels-1.
        """
        values, labels = _tensor("predictions", predictions), _tensor("references", references)
        if values.dim() not in (1, 2):
            raise ValueError(
                f"predictions must be scores (N, K) or class ids (N,), got shape {tuple(values.shape)}: flatten the "
                "batch dimensions"
            )
        columns = values.shape[1] if values.dim() == 2 else 0
        if not len(self):
            self._columns = None
        num_labels = self._labels(columns)
        # On the CPU: labels often come from there when scores do not, and five columns are quickly moved.
        ranked, labels = (_ranked(values) if columns else values.unsqueeze(1)).cpu(), labels.cpu()
        _checked(ranked[:, 0], labels, num_labels, None)
        super().add_batch(predictions=ranked.tolist(), references=labels.tolist(), **kwargs)
        self._columns = columns

    def _labels(self, columns: int) -> int:
        """Return the number of classes: of scores their number of columns; of class ids (0 columns) as was passed."""
        if columns and self.num_labels not in (None, columns):
            raise ValueError(
                f"num_labels is {self.num_labels}, but predictions have {columns} columns: pass num_labels={columns}"
            )
        if self._columns not in (None, columns):
            before, now = (f"scores of {n} classes" if n else "class ids" for n in (self._columns, columns))
            raise ValueError(f"predictions were {before}, now they are {now}: call compute in between")
        if not columns and self.num_labels is None:
            raise ValueError("num_labels is None, and predictions that are class ids do not tell it: pass num_labels")
        return columns or self.num_labels or 0

    def _compute(self, *, predictions: list[list[int]], references: list[int]) -> Scores:
        return _accuracy(torch.tensor(predictions), torch.tensor(references), self._labels(self._columns or 0))


class MeanIoU(_Reducing):
    """Mean IoU and pixel accuracies over label maps, as `segmentation_scores` gives them.

    Predictions and references are lists (or arrays) of integer maps (H, W), whose size may differ from image to image.
    Of each image only the non-zero cells of its confusion matrix are kept.

    Args:
        num_labels: Number of classes K.
        ignore_index: Pixels with this reference are not counted. None counts every pixel.
        kwargs: Arguments of `evaluate.Metric`. With one process nothing is written to disk by default.
    """

    def __init__(self, num_labels: int | None = None, ignore_index: int | None = 255, **kwargs: Any) -> None:
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean intersection over union and pixel accuracies of label maps.",
            citation="",
            inputs_description="predictions, references: integer label maps (H, W), one per image",
            # What is kept, not what is passed in: of each occupied cell of an image's confusion matrix the number of
            # pixels, and its index, K * true class + predicted class.
            features=Features({"predictions": List(Value("int64")), "references": List(Value("int64"))}),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add predicted label maps and their references, integers (H, W), one per image.

        Raises:
            TypeError: A map holds floating-point numbers.
            ValueError: `num_labels` is unknown; the numbers of maps or their sizes differ; a map is not (H, W); or a
                counted pixel's class is outside 0..num_labels-1. The message names image and pixel.
        """
        if predictions is None or references is None or len(predictions) != len(references):
            counts = [0 if maps is None else len(maps) for maps in (predictions, references)]
            raise ValueError(
                f"predictions are {counts[0]} maps, references {counts[1]}: pass one prediction and one reference per "
                "image"
            )
        cells, pixels = [], []
        for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            confusion = self._count(prediction, reference, f"[{index}]").flatten()
            occupied = confusion.nonzero().squeeze(1)
            cells.append(occupied.tolist())
            pixels.append(confusion[occupied].tolist())
        super().add_batch(predictions=pixels, references=cells, **kwargs)

    def _count(self, prediction: Any, reference: Any, where: str) -> Tensor:
        """Count one image, `(H, W), (H, W) -> (K, K)`."""
        predictions, references = _tensor(f"predictions{where}", prediction), _tensor(f"references{where}", reference)
        for name, labels in (("predictions", predictions), ("references", references)):
            if labels.dim() != 2:
                raise ValueError(
                    f"{name}{where} must be a label map (H, W), got shape {tuple(labels.shape)}: take the argmax of "
                    "logits over their classes, and pass a single map as [map]"
                )
        # Labels often come from the CPU when predictions do not.
        references = references.to(predictions.device)
        return _count(predictions, references, self._labels(), self.ignore_index, where)

    def _labels(self) -> int:
        if self.num_labels is None:
            raise ValueError("num_labels is None, and label maps do not tell it: pass num_labels to the constructor")
        return self.num_labels

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> Scores | None:
        """Score what was added before and what is passed here, then start afresh.

        `num_labels` and `ignore_index` can be passed here too, as to Hugging Face's `mean_iou`; they hold for this
        call, in which all maps must then be passed.

        Raises:
            ValueError: There is nothing to score; maps were added before `num_labels` or `ignore_index` came; or what
                `add_batch` refuses.
        """
        own = self.num_labels, self.ignore_index
        passed = kwargs.pop("num_labels", own[0]), kwargs.pop("ignore_index", own[1])
        if passed != own and len(self):
            raise ValueError(
                f"(num_labels, ignore_index) = {passed} came after {len(self)} maps were counted with {own}: pass "
                "them to the constructor"
            )
        self.num_labels, self.ignore_index = passed
        try:
            return super().compute(predictions=predictions, references=references, **kwargs)
        finally:
            self.num_labels, self.ignore_index = own

    def _compute(self, *, predictions: list[list[int]], references: list[list[int]]) -> Scores:
        num_labels = self._labels()
        confusion = torch.zeros(num_labels**2, dtype=torch.int64)
        for pixels, cells in zip(predictions, references, strict=True):
            confusion[torch.tensor(cells, dtype=torch.int64)] += torch.tensor(pixels, dtype=torch.int64)
        return segmentation_scores(confusion.reshape(num_labels, num_labels))


def _count(
    predictions: Tensor, references: Tensor, num_labels: int, ignore_index: int | None, where: str = ""
) -> Tensor:
    """Check, then count `(...), (...) -> (K, K)`."""
    predictions, references = _checked(predictions, references, num_labels, ignore_index, where)
    with _in_any_order():
        # Its own checks only count distinct values: classes {0, 1, 7} of 3 would pass, and crash or be miscounted.
        return multiclass_confusion_matrix(
            predictions, references, num_labels, ignore_index=ignore_index, validate_args=False
        )


@contextmanager
def _in_any_order() -> Iterator[None]:
    """Lift torch's deterministic mode: integers count alike in any order.

    In that mode (`TrainingArguments(full_determinism=True)`) torchmetrics counts with a table (pixels, K²) in place of
    `torch.bincount`: 47 GB for one image of 512 x 512 pixels and 150 classes.
    """
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _checked(
    predictions: Tensor, references: Tensor, num_labels: int, ignore_index: int | None, where: str = ""
) -> tuple[Tensor, Tensor]:
    """Return both in int64, once every counted class is known to be in 0..num_labels-1."""
    if num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, got {num_labels}: pass the number of classes")
    for name, ids in (("predictions", predictions), ("references", references)):
        if ids.is_floating_point():
            raise TypeError(f"{name}{where} must be class ids in integers, got {ids.dtype}: take the argmax of scores")
    if predictions.shape != references.shape:
        raise ValueError(
            f"predictions{where} and references{where} must have the same shape, got {tuple(predictions.shape)} and "
            f"{tuple(references.shape)}: resize the scores before their argmax, never the references"
        )
    predictions, references = predictions.long(), references.long()
    counted = torch.ones_like(references, dtype=torch.bool) if ignore_index is None else references != ignore_index
    for name, ids in (("predictions", predictions), ("references", references)):
        wrong = counted & ((ids < 0) | (ids >= num_labels))
        if wrong.any():
            position = tuple(wrong.nonzero()[0].tolist())
            also = "" if ignore_index is None or name == "predictions" else f" or ignore_index {ignore_index}"
            raise ValueError(
                f"{name}{where} must be 0..{num_labels - 1}{also}, got {int(ids[position])} at {position} and "
                f"{int(wrong.sum()) - 1} more places: relabel, raise num_labels, or set the references there to "
                "ignore_index"
            )
    return predictions, references


def _totals(confusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return right, true and predicted counts per class, (K,) each, in float64 on the CPU: some devices have none."""
    confusion = confusion.cpu().double()
    return confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)


def _ranked(scores: Tensor) -> Tensor:
    """Return the best classes, best first, `(N, K) -> (N, min(K, 5))`; stable, so that ties rank as for argmax."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :TOP]


def _accuracy(ranked: Tensor, references: Tensor, num_labels: int) -> Scores:
    """Score classes that are ranked best first: five of them, or fewer and no top-5."""
    hits, truth, _ = _totals(_count(ranked[:, 0], references, num_labels, None))
    per_class = hits / truth
    scores: Scores = {"accuracy": (hits.sum() / truth.sum()).item()}
    if num_labels > TOP == ranked.shape[1]:
        found = (ranked == references.unsqueeze(1)).any(dim=1).sum().cpu()
        scores["accuracy_top5"] = (found / truth.sum()).item()
    return scores | {"accuracy_per_class": per_class.tolist(), "mean_class_accuracy": per_class.nanmean().item()}


def _tensor(name: str, values: Any) -> Tensor:
    """Make a tensor of a tensor, a list of tensors, an array, an image or nested lists."""
    if values is None:
        raise ValueError(f"{name} is None: pass both predictions and references")
    if isinstance(values, Tensor):
        return values.detach()
    if isinstance(values, list | tuple) and values and all(isinstance(value, Tensor) for value in values):
        return torch.stack([value.detach() for value in values])
    return torch.from_numpy(np.array(values))  # a copy, because an image's memory is read-only
