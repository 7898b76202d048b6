"""Accuracy and mean IoU: plain functions that count on the device, and `evaluate` metrics over them.

The metrics are classes to construct, not names to `evaluate.load`: nothing is downloaded.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import evaluate
import torch
from datasets import Features, List, Value
from torch import Tensor

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
    predictions, references = _counted(predictions, references, num_labels, ignore_index)
    pairs = references * num_labels + predictions
    return torch.bincount(pairs, minlength=num_labels**2).view(num_labels, num_labels)


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
        raise ValueError(f"scores must have shape (N, K), got {tuple(scores.shape)}: pass one score for each class")
    ranked = scores.argsort(dim=1, descending=True, stable=True)[:, :TOP]  # stable: ties rank as for argmax
    hits, truth, _ = _totals(confusion_matrix(ranked[:, 0], references, scores.shape[1], ignore_index=None))
    per_class = hits / truth
    found: Scores = {"accuracy": (hits.sum() / truth.sum()).item()}
    if scores.shape[1] > TOP:
        found["accuracy_top5"] = ((ranked == references.unsqueeze(1)).any(dim=1).sum().cpu() / truth.sum()).item()
    return found | {"accuracy_per_class": per_class.tolist(), "mean_class_accuracy": per_class.nanmean().item()}


class Accuracy(evaluate.Metric):
    """Top-1, top-5 and per-class accuracy of a classifier, as `accuracy_scores` gives them.

    Predictions are scores (N, K), logits or probabilities; references are classes (N,).
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-1, top-5 and per-class accuracy of a classifier.",
            citation="",
            inputs_description="predictions: scores (N, K); references: class ids (N,)",
            features=Features({"predictions": List(Value("float32")), "references": Value("int64")}),
        )

    def _compute(self, *, predictions: list[list[float]], references: list[int]) -> Scores:
        return accuracy_scores(torch.tensor(predictions), torch.tensor(references))


class MeanIoU(evaluate.Metric):
    """Mean IoU and pixel accuracies over label maps, as `segmentation_scores` gives them.

    Predictions and references are lists of integer maps (H, W), whose size may differ from image to image. Of each
    image the confusion matrix is kept, without the cells that are 0.

    Args:
        num_labels: Number of classes K.
        ignore_index: Pixels with this reference are not counted. None counts every pixel.
        kwargs: Arguments of `evaluate.Metric`.
    """

    def __init__(self, num_labels: int, ignore_index: int | None = 255, **kwargs: Any) -> None:
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        super().__init__(**kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean intersection over union and pixel accuracies of label maps.",
            citation="",
            inputs_description="predictions, references: integer label maps (H, W), one per image",
            # What is kept, not what is passed in: the pixels of a cell, and K * true class + predicted class.
            features=Features({"predictions": List(Value("int64")), "references": List(Value("int64"))}),
        )

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Add one map and its reference."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Add maps and their references; raises what `confusion_matrix` does."""
        counts = [
            confusion_matrix(torch.as_tensor(map_), torch.as_tensor(truth), self.num_labels, self.ignore_index)
            .flatten()
            .cpu()
            for map_, truth in zip(predictions, references, strict=True)
        ]
        cells = [count.nonzero().squeeze(1) for count in counts]
        pixels = [count[cell].tolist() for count, cell in zip(counts, cells, strict=True)]
        super().add_batch(predictions=pixels, references=[cell.tolist() for cell in cells], **kwargs)

    def _compute(self, *, predictions: list[list[int]], references: list[list[int]]) -> Scores:
        confusion = torch.zeros(self.num_labels**2, dtype=torch.int64)
        for pixels, cells in zip(predictions, references, strict=True):
            confusion[torch.tensor(cells, dtype=torch.int64)] += torch.tensor(pixels, dtype=torch.int64)
        return segmentation_scores(confusion.reshape(self.num_labels, self.num_labels))


def _counted(
    predictions: Tensor, references: Tensor, num_labels: int, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """Those that count, in int64, once the shapes are equal and every counted class is in 0..num_labels-1."""
    if num_labels < 1:
        raise ValueError(f"num_labels must be at least 1, got {num_labels}: pass the number of classes")
    if predictions.shape != references.shape:
        raise ValueError(
            f"predictions and references must have the same shape, got {tuple(predictions.shape)} and "
            f"{tuple(references.shape)}: resize the scores before their argmax, never the references"
        )
    for name, ids in (("predictions", predictions), ("references", references)):
        if ids.is_floating_point():
            raise TypeError(f"{name} must be class ids in integers, got {ids.dtype}: take the argmax of scores")
    predictions, references = predictions.long(), references.long()
    counted = torch.ones_like(references, dtype=torch.bool) if ignore_index is None else references != ignore_index
    for name, ids in (("predictions", predictions), ("references", references)):
        wrong = counted & ((ids < 0) | (ids >= num_labels))
        if wrong.any():
            position = tuple(wrong.nonzero()[0].tolist())
            also = "" if ignore_index is None or name == "predictions" else f" or ignore_index {ignore_index}"
            raise ValueError(
                f"{name} must be 0..{num_labels - 1}{also}, got {int(ids[position])} at {position} and "
                f"{int(wrong.sum()) - 1} more places: relabel, raise num_labels, or set the references there to "
                "ignore_index"
            )
    return predictions[counted], references[counted]


def _totals(confusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Right, true and predicted counts per class, (K,) each, in float64 on the CPU: some devices have none."""
    confusion = confusion.cpu().double()
    return confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
