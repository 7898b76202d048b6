"""Accuracy and mean IoU against loops in numpy, and as `evaluate` metrics."""

from __future__ import annotations

import math

import evaluate
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.functional.classification import multiclass_accuracy

from e3va_peft.training.metrics import Accuracy, MeanIoU, accuracy_scores, confusion_matrix, segmentation_scores
from e3va_peft.training.tasks.classification import ImageClassification
from e3va_peft.training.tasks.segmentation import SemanticSegmentation

K, IGNORED = 5, 255
SIZES = [(7, 9), (4, 4), (1, 12), (7, 9)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep `evaluate` out of the home folder, and off the network."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    monkeypatch.setattr(evaluate, "load", None)
    return tmp_path


def assert_equal(scores, expected):
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=1e-12, nan_ok=True), name
        assert all(type(item) is float for item in (scores[name] if isinstance(value, list) else [scores[name]])), name


def mean(values):
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def ratio(part, whole):
    return part / whole if whole else math.nan


# Label maps


def label_maps(seed=0, absent=(1, 3)):
    """Random maps: class 3 occurs nowhere, class 1 in predictions only, and pixels with every label are ignored."""
    random = np.random.default_rng(seed)
    predictions, references = [], []
    for size in SIZES:
        predictions.append(random.choice([0, 1, 2, 4], size))
        references.append(random.choice([c for c in range(K) if c not in absent] + [IGNORED], size))
    return predictions, references


def reference_scores(predictions, references, num_labels=K, ignore_index=IGNORED):
    hits, truth, predicted = ([0] * num_labels for _ in range(3))
    for prediction, reference in zip(predictions, references, strict=True):
        for row in range(reference.shape[0]):
            for column in range(reference.shape[1]):
                t, p = int(reference[row, column]), int(prediction[row, column])
                if t == ignore_index:
                    continue
                truth[t] += 1
                predicted[p] += 1
                hits[t] += t == p
    iou = [ratio(h, t + p - h) for h, t, p in zip(hits, truth, predicted, strict=True)]
    accuracy = [ratio(h, t) for h, t in zip(hits, truth, strict=True)]
    return {
        "mean_iou": mean(iou),
        "mean_accuracy": mean(accuracy),
        "overall_accuracy": ratio(sum(hits), sum(truth)),
        "per_class_iou": iou,
        "per_class_accuracy": accuracy,
    }


@pytest.mark.parametrize("seed", range(3))
def test_mean_iou_matches_loops_in_numpy(seed):
    predictions, references = label_maps(seed)
    expected = reference_scores(predictions, references)
    assert math.isnan(expected["per_class_iou"][3]) and math.isnan(expected["per_class_accuracy"][1])
    assert expected["per_class_iou"][1] == 0  # predicted and never true: wrong, not absent
    assert_equal(MeanIoU(K).compute(predictions=predictions, references=references), expected)


def test_confusion_matrices_of_images_add_up():
    predictions, references = label_maps()
    pairs = [(torch.from_numpy(p), torch.from_numpy(r)) for p, r in zip(predictions, references, strict=True)]
    matrices = [confusion_matrix(p, r, K) for p, r in pairs]
    assert_equal(segmentation_scores(torch.stack(matrices).sum(0)), reference_scores(predictions, references))
    # Images of one size can be counted as one batch.
    batch = [torch.stack([a, b]) for a, b in zip(pairs[0], pairs[3], strict=True)]
    assert torch.equal(confusion_matrix(*batch, K), matrices[0] + matrices[3])


def test_rows_of_the_confusion_matrix_are_the_truth():
    confusion = confusion_matrix(torch.tensor([[0, 2, 2]]), torch.tensor([[0, 1, IGNORED]]), 3)
    assert confusion.dtype == torch.int64
    assert confusion.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_what_is_predicted_where_the_reference_is_ignored_does_not_matter():
    assert confusion_matrix(torch.tensor([[-7, 1]]), torch.tensor([[IGNORED, 1]]), 2).tolist() == [[0, 0], [0, 1]]


def test_without_an_ignore_index_class_255_is_a_class():
    ids = torch.tensor([[255, 299]])
    assert confusion_matrix(ids, ids, 300, ignore_index=None).sum() == 2


def test_an_ignored_class_can_still_be_predicted_and_is_then_wrong():
    predictions, references = label_maps(absent=(1, 3))
    references = [np.where(values == IGNORED, 0, values) for values in references]
    expected = reference_scores(predictions, references, ignore_index=0)
    assert expected["per_class_iou"][0] == 0 and math.isnan(expected["per_class_accuracy"][0])
    assert_equal(MeanIoU(K, ignore_index=0).compute(predictions=predictions, references=references), expected)


def test_nothing_but_ignored_pixels_scores_nan():
    scores = MeanIoU(2).compute(predictions=[[[0, 1]]], references=[[[IGNORED, IGNORED]]])
    assert math.isnan(scores["mean_iou"]) and math.isnan(scores["overall_accuracy"])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64"])
def test_maps_may_have_any_integer_dtype(dtype):
    predictions, references = label_maps()
    cast = [[values.astype(dtype) for values in maps] for maps in (predictions, references)]
    scores = MeanIoU(K).compute(predictions=cast[0], references=cast[1])
    assert_equal(scores, reference_scores(predictions, references))


@pytest.mark.parametrize(
    "convert",
    [
        lambda maps: [torch.from_numpy(values) for values in maps],
        lambda maps: [values.tolist() for values in maps],
        lambda maps: np.stack([maps[0], maps[3]]),
        lambda maps: torch.from_numpy(np.stack([maps[0], maps[3]])),
    ],
    ids=["tensors", "lists", "array", "tensor"],
)
def test_maps_may_come_in_any_container(convert):
    predictions, references = label_maps()
    given = convert(predictions), convert(references)
    expected = reference_scores(*([np.asarray(values) for values in maps] for maps in given))
    assert_equal(MeanIoU(K).compute(predictions=given[0], references=given[1]), expected)


def test_deterministic_mode_counts_alike_and_without_a_table_of_pixels_times_cells():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.numel = max(self.numel, result.numel() if isinstance(result, Tensor) else 0)
            return result

    predictions, references = torch.randint(20, (2, 32, 32))
    expected = confusion_matrix(predictions, references, 20)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with Largest() as largest:
            assert torch.equal(confusion_matrix(predictions, references, 20), expected)
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert largest.numel <= 2 * 32 * 32  # the table has 400 times as many


# Classifiers


def classified(seed=0, labels=7, count=40):
    """Random scores without ties, and references; the last class never occurs."""
    random = np.random.default_rng(seed)
    return random.standard_normal((count, labels)).astype("float32"), random.integers(0, labels - 1, count)


def reference_accuracy(scores, references):
    count, labels = scores.shape
    hits, hits5, right, truth = 0, 0, [0] * labels, [0] * labels
    for row, t in zip(scores, references, strict=True):
        better = sum(row[c] > row[t] for c in range(labels))
        hits += better == 0
        hits5 += better < 5
        right[t] += better == 0
        truth[t] += 1
    per_class = [ratio(r, t) for r, t in zip(right, truth, strict=True)]
    top5 = {"accuracy_top5": hits5 / count} if labels > 5 else {}
    return {"accuracy": hits / count, **top5, "accuracy_per_class": per_class, "mean_class_accuracy": mean(per_class)}


@pytest.mark.parametrize("labels", [2, 5, 6, 7, 30])
def test_accuracy_matches_loops_in_numpy(labels):
    scores, references = classified(labels=labels)
    expected = reference_accuracy(scores, references)
    assert ("accuracy_top5" in expected) == (labels > 5) and math.isnan(expected["accuracy_per_class"][-1])
    assert_equal(accuracy_scores(torch.from_numpy(scores), torch.from_numpy(references)), expected)
    assert_equal(Accuracy().compute(predictions=scores, references=references), expected)


def test_accuracy_matches_torchmetrics():
    scores, references = map(torch.from_numpy, classified(labels=12, count=200))
    ours = accuracy_scores(scores, references)
    for name, k in (("accuracy", 1), ("accuracy_top5", 5)):
        theirs = multiclass_accuracy(scores, references, num_classes=12, average="micro", top_k=k)
        assert ours[name] == pytest.approx(theirs.item(), rel=1e-6)


def test_probabilities_score_as_logits():
    scores, references = map(torch.from_numpy, classified())
    assert_equal(accuracy_scores(scores.softmax(1), references), accuracy_scores(scores, references))


def test_of_equal_scores_the_lower_class_ranks_first():
    scores = accuracy_scores(torch.zeros(7, 7), torch.arange(7))
    assert (scores["accuracy"], scores["accuracy_top5"]) == (1 / 7, 5 / 7)


def test_bf16_scores_with_a_gradient_are_taken():
    scores = torch.eye(3, dtype=torch.bfloat16, requires_grad=True)
    assert Accuracy().compute(predictions=scores, references=[0, 1, 1])["accuracy"] == 2 / 3


# As `evaluate` metrics


def accuracy_case():
    return Accuracy, *classified()


def iou_case():
    return (lambda **kwargs: MeanIoU(K, **kwargs)), *label_maps()


@pytest.mark.parametrize("case", [accuracy_case, iou_case])
@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_and_single_examples_score_as_all_at_once(case, in_memory):
    build, predictions, references = case()
    expected = build().compute(predictions=predictions, references=references)
    metric = build(keep_in_memory=in_memory)
    for _ in range(2):  # compute starts afresh
        metric.add_batch(predictions=predictions[:2], references=references[:2])
        metric.add(prediction=predictions[2], reference=references[2])
        assert len(metric) == 3
        assert_equal(metric.compute(predictions=predictions[3:], references=references[3:]), expected)


def test_what_is_kept_of_an_image_is_small():
    predictions, references = torch.randint(3, (2, 4, 64, 64))
    metric = MeanIoU(3, keep_in_memory=False)
    metric.add_batch(predictions=predictions, references=references)
    metric._finalize()
    assert all(len(row) <= 9 for row in metric.data["references"])


# Errors


def test_ids_that_are_no_class_are_refused_with_their_place():
    with pytest.raises(ValueError, match=r"references .*ignore_index 255.*7 at \(0, 1\)"):
        MeanIoU(3).compute(predictions=[[[0, 0]]], references=[[[0, 7]]])
    with pytest.raises(ValueError, match=r"references .*-1 at \(0, 1\)"):
        confusion_matrix(torch.zeros(1, 3).long(), torch.tensor([[0, -1, -1]]), 3)
    with pytest.raises(ValueError, match=r"references .*3 at \(1,\)"):
        accuracy_scores(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"predictions .*255 at \(0, 1\)"):
        MeanIoU(3).add(prediction=[[0, 255]], reference=[[0, 1]])


def test_no_class_at_all_is_refused():
    with pytest.raises(ValueError, match=r"num_labels .*0"):
        confusion_matrix(torch.zeros(1, 1).long(), torch.zeros(1, 1).long(), 0)


def test_floating_point_labels_are_refused():
    with pytest.raises(TypeError, match=r"predictions .*torch\.float64"):
        MeanIoU(3).add(prediction=np.zeros((2, 2)), reference=np.zeros((2, 2), int))
    with pytest.raises(TypeError, match=r"references .*torch\.float32"):
        accuracy_scores(torch.eye(2), torch.tensor([0.2, 0.7]))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"predictions and references .*\(1, 2\).*\(2, 1\)"):
        MeanIoU(3).add(prediction=[[0, 1]], reference=[[0], [1]])
    with pytest.raises(ValueError, match=r"\(2,\).*\(1,\)"):
        accuracy_scores(torch.zeros(2, 3), torch.zeros(1).long())
    with pytest.raises(ValueError, match=r"scores .*\(N, K\).*\(2,\)"):
        accuracy_scores(torch.zeros(2), torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"confusion .*\(K, K\).*\(2, 3\)"):
        segmentation_scores(torch.zeros(2, 3))


def test_the_metrics_that_a_task_says_it_has_are_its_scores():
    classes = ImageClassification(None).scores([(np.arange(7.0), 3), (np.arange(7.0), 6)], 7)
    pixels = SemanticSegmentation(None).scores(torch.eye(K, dtype=torch.int64), K)
    for task, scores in ((ImageClassification, classes), (SemanticSegmentation, pixels)):
        found = {name for name, value in scores.items() if isinstance(value, float)}
        assert found == set(task.metrics) and task.main_metric in found
