"""COCO's and Pascal VOC's average precision against their reference evaluators."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import pickle

import numpy as np
import pytest
import torch
from pycocotools import mask as reference_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from e3va_peft.data.objects import Detections, Objects, decode_mask, encode_masks
from e3va_peft.training.average_precision import coco_scores, voc_scores
from e3va_peft.training.tasks.detection import InstanceSegmentation, ObjectDetection

K = 5
SIZE = 160, 200


def assert_equal(scores, expected, tolerance=1e-7):  # torchmetrics rounds to float32
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=0, abs=tolerance, nan_ok=True), name
        assert all(type(item) is float for item in (scores[name] if isinstance(value, list) else [scores[name]])), name


def mean(values):
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


# Images to score


def random_boxes(random, count):
    """Boxes of COCO's three sizes, in an image of SIZE."""
    sides = random.uniform(8, np.array(SIZE[::-1]) * 0.9, (count, 2)) * random.choice([0.2, 0.5, 1], (count, 1))
    corners = random.uniform(0, 1, (count, 2)) * (np.array(SIZE[::-1]) - sides)
    return np.concatenate([corners, corners + sides], axis=1)


def box_masks(boxes):
    """Ellipses in the boxes."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    distances = [((x - c[0]) / h[0]) ** 2 + ((y - c[1]) / h[1]) ** 2 for c, h in zip(centre, half, strict=True)]
    return np.array(distances).reshape(-1, *SIZE) <= 1


def objects_of(boxes, labels, crowd=(), difficult=(), masks=True, image_id=0):
    boxes, count = np.array(boxes, dtype=float).reshape(-1, 4), len(labels)
    rles = encode_masks(box_masks(boxes)) if masks else None
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return Objects(
        image_id=image_id,
        size=SIZE,
        boxes=boxes,
        labels=np.array(labels, dtype=np.int64),
        areas=np.array([float(reference_masks.area(dict(mask))) for mask in rles]) if masks else areas,
        crowd=np.isin(np.arange(count), crowd),
        difficult=np.isin(np.arange(count), difficult),
        masks=rles,
    )


def detections_of(boxes, scores, labels, masks=True):
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    rles = encode_masks(box_masks(boxes)) if masks else None
    return Detections(boxes, np.array(scores, dtype=float), np.array(labels, dtype=np.int64), rles)


def images(seed=0, count=12, masks=True, difficult=True, most=9):
    """Random images: class 3 never occurs and is detected, class 4 occurs and is not; one image is empty."""
    random = np.random.default_rng(seed)
    predictions, references = [], []
    for index in range(count):
        truth = random_boxes(random, 0 if index == 2 else random.integers(1, most))
        labels = random.choice([0, 1, 2, 4], len(truth))
        rare = [random.random(len(truth)) < share for share in (0.15, 0.15 * difficult)]
        # Found twice, each time a little off, some as another class; and some found where nothing is.
        near = np.concatenate([truth, truth]) + random.normal(0, 3, (2 * len(truth), 4))
        near = np.concatenate([near[:, :2].clip(0), np.maximum(near[:, 2:], near[:, :2] + 2)], axis=1)
        found = np.concatenate([near, random_boxes(random, 0 if index == 4 else 6)])
        guesses = np.concatenate([labels, labels, random.integers(0, 4, len(found) - len(near))])
        guesses = np.where((random.random(len(found)) < 0.1) | (guesses == 4), random.integers(0, 4), guesses)
        scores = random.permutation(len(found)) / len(found) + index * 1e-4  # no ties
        references.append(objects_of(truth, labels, *(np.flatnonzero(r) for r in rare), masks, image_id=7 * index))
        predictions.append(detections_of(found, scores.clip(0, 1), guesses, masks))
    return predictions, references


# Reference evaluators


def reference_coco(predictions, references, kind, num_labels=K):
    """Score with pycocotools, which has no difficult objects: an area in no range stands for them."""
    annotations, results = [], []
    for image, (found, truth) in enumerate(zip(predictions, references, strict=True)):
        for index, (x1, y1, x2, y2) in enumerate(truth.boxes):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(truth.labels[index]),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": 1e12 if truth.difficult[index] else truth.areas[index],
                    "iscrowd": int(truth.crowd[index]),
                    "segmentation": dict(truth.masks[index]) if truth.masks else None,
                }
            )
        for index, (x1, y1, x2, y2) in enumerate(found.boxes):
            shape = {"segmentation": dict(found.masks[index])} if kind == "mask" else {}
            shape |= {"bbox": [x1, y1, x2 - x1, y2 - y1]} if kind == "box" else {}
            label, score = int(found.labels[index]), found.scores[index]
            results.append({"image_id": image, "category_id": label, "score": score} | shape)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": image, "height": SIZE[0], "width": SIZE[1]} for image in range(len(references))],
            "categories": [{"id": label} for label in range(num_labels)],
            "annotations": annotations,
        }
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(results), {"box": "bbox", "mask": "segm"}[kind])
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    known = [math.nan if value == -1 else float(value) for value in evaluator.stats]
    per_class = evaluator.eval["precision"][:, :, :, 0, 2].reshape(-1, num_labels).T
    names = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
    return {
        **{f"{kind}_{name}": value for name, value in zip(names, known[:6], strict=True)},
        f"{kind}_ar100": known[8],
        f"per_class_{kind}_ap": [float(row[row > -1].mean()) if (row > -1).any() else math.nan for row in per_class],
    }


def girshick_ap(recall, precision):
    mrec, mpre = np.concatenate(([0.0], recall, [1.0])), np.concatenate(([0.0], precision, [0.0]))
    for i in range(mpre.size - 1, 0, -1):
        mpre[i - 1] = np.maximum(mpre[i - 1], mpre[i])
    i = np.where(mrec[1:] != mrec[:-1])[0]
    return np.sum((mrec[i + 1] - mrec[i]) * mpre[i + 1])


def girshick_eval(predictions, references, label):
    """`voc_eval` of py-faster-rcnn for one class, in continuous coordinates."""
    records, npos = {}, 0
    for image, truth in enumerate(references):
        of_class = truth.labels == label
        difficult = (truth.difficult | truth.crowd)[of_class]
        records[image] = {"bbox": truth.boxes[of_class], "difficult": difficult, "det": [False] * of_class.sum()}
        npos += (~difficult).sum()
    if npos == 0:
        return math.nan
    rows = [
        (score, image, box)
        for image, found in enumerate(predictions)
        for score, box, guess in zip(found.scores, found.boxes, found.labels, strict=True)
        if guess == label
    ]
    rows.sort(key=lambda row: -row[0])
    tp, fp = np.zeros(len(rows)), np.zeros(len(rows))
    for d, (_, image, bb) in enumerate(rows):
        record, ovmax = records[image], -np.inf
        truth = record["bbox"]
        if truth.size > 0:
            iw = np.maximum(np.minimum(truth[:, 2], bb[2]) - np.maximum(truth[:, 0], bb[0]), 0.0)
            ih = np.maximum(np.minimum(truth[:, 3], bb[3]) - np.maximum(truth[:, 1], bb[1]), 0.0)
            inters = iw * ih
            uni = (bb[2] - bb[0]) * (bb[3] - bb[1]) + (truth[:, 2] - truth[:, 0]) * (truth[:, 3] - truth[:, 1])
            overlaps = inters / (uni - inters)
            ovmax, jmax = np.max(overlaps), np.argmax(overlaps)
        if ovmax > 0.5:
            if not record["difficult"][jmax]:
                if not record["det"][jmax]:
                    tp[d] = 1.0
                    record["det"][jmax] = True
                else:
                    fp[d] = 1.0
        else:
            fp[d] = 1.0
    fp, tp = np.cumsum(fp), np.cumsum(tp)
    return float(girshick_ap(tp / npos, tp / np.maximum(tp + fp, np.finfo(np.float64).eps)))


def reference_voc(predictions, references, num_labels=K):
    values = [girshick_eval(predictions, references, label) for label in range(num_labels)]
    return {"voc_ap50": mean(values), "per_class_voc_ap50": values}


# COCO


@pytest.mark.parametrize("seed", range(4))
def test_coco_scores_equal_those_of_pycocotools(seed):
    predictions, references = images(seed)
    expected = reference_coco(predictions, references, "box")
    assert 0 < expected["box_ap"] < 1 and not any(math.isnan(expected[f"box_ap_{s}"]) for s in ("small", "large"))
    assert math.isnan(expected["per_class_box_ap"][3]) and expected["per_class_box_ap"][4] == 0
    assert_equal(coco_scores(predictions, references, K), expected)
    expected |= reference_coco(predictions, references, "mask")
    assert expected["box_ap"] != expected["mask_ap"] > 0
    assert_equal(coco_scores(predictions, references, K, masks=True), expected)


def test_coco_scores_without_crowds_and_difficult_objects_equal_those_of_pycocotools():
    predictions, references = images(1, difficult=False)
    references = [dataclasses.replace(truth, crowd=np.zeros_like(truth.crowd)) for truth in references]
    expected = reference_coco(predictions, references, "box") | reference_coco(predictions, references, "mask")
    assert_equal(coco_scores(predictions, references, K, masks=True), expected)


def test_of_more_than_100_detections_of_a_class_the_best_100_count():
    predictions, references = images(3, count=2, masks=False, most=60)
    random = np.random.default_rng(0)
    many = [
        detections_of(random_boxes(random, 150), random.permutation(150) / 300 + 0.4, [0] * 150, masks=False)
        for _ in references
    ]
    both = [
        Detections(*(np.concatenate([getattr(p, name) for p in pair]) for name in ("boxes", "scores", "labels")))
        for pair in zip(predictions, many, strict=True)
    ]
    expected = reference_coco(both, references, "box")
    assert expected["per_class_box_ap"][0] < reference_coco(predictions, references, "box")["per_class_box_ap"][0]
    assert_equal(coco_scores(both, references, K), expected)


def test_equal_scores_rank_as_in_pycocotools():
    predictions, references = images(2, count=20)
    predictions = [dataclasses.replace(found, scores=found.scores.round(1)) for found in predictions]
    expected = reference_coco(predictions, references, "box") | reference_coco(predictions, references, "mask")
    assert_equal(coco_scores(predictions, references, K, masks=True), expected)


def test_difficult_objects_are_neither_found_nor_missed():
    boxes = [[10, 10, 60, 60], [80, 80, 140, 140]]
    references = [objects_of(boxes, [0, 0], difficult=[1])]
    for found in (boxes, boxes[:1]):
        scores = coco_scores([detections_of(found, [0.5, 0.9][: len(found)], [0] * len(found))], references, 1, True)
        assert scores["box_ap"] == scores["mask_ap"] == pytest.approx(1)


@pytest.mark.parametrize("area", [100.0, 0.0])
def test_areas_of_the_annotation_say_how_large_an_object_is(area):
    box = [[10, 10, 60, 60]]
    references = [dataclasses.replace(objects_of(box, [0]), areas=np.array([area]))]
    scores = coco_scores([detections_of(box, [0.9], [0])], references, 1, masks=True)
    assert scores["box_ap_small"] == scores["mask_ap_small"] == pytest.approx(1)
    assert math.isnan(scores["box_ap_medium"]) and math.isnan(scores["mask_ap_medium"])


def test_nothing_is_printed(capfd):
    coco_scores(*images(), K, masks=True)
    assert capfd.readouterr() == ("", "")


def test_what_is_scored_is_left_as_it_is():
    predictions, references = images()
    before = pickle.dumps((predictions, references))
    coco_scores(predictions, references, K, masks=True)
    assert pickle.dumps((predictions, references)) == before


def test_a_process_scores_what_it_is_given_and_waits_for_no_other(tmp_path, monkeypatch):
    expected = coco_scores(*images(), K, masks=True)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr(torch.distributed, "barrier", None)
        assert_equal(coco_scores(*images(), K, masks=True), expected)
    finally:
        torch.distributed.destroy_process_group()


# Pascal VOC


@pytest.mark.parametrize("seed", range(4))
def test_voc_scores_equal_those_of_girshick(seed):
    predictions, references = images(seed, count=30, masks=False)
    expected = reference_voc(predictions, references)
    assert 0 < expected["voc_ap50"] < 1 and math.isnan(expected["per_class_voc_ap50"][3])
    assert_equal(voc_scores(predictions, references, K), expected, tolerance=1e-12)


def voc_of(found, scores, truth, **kwargs):
    prediction = detections_of(found, scores, [0] * len(found), masks=False)
    reference = objects_of(truth, [0] * len(truth), masks=False, **kwargs)
    return voc_scores([prediction], [reference], 1)["voc_ap50"]


A, B, FAR = [0, 0, 10, 10], [50, 50, 70, 70], [100, 100, 120, 120]


def test_voc_ap_by_hand():
    assert voc_of([A, B], [0.9, 0.8], [A, B]) == pytest.approx(1)
    assert voc_of([A], [0.9], [A, B]) == pytest.approx(1 / 2)
    assert voc_of([FAR, A], [0.9, 0.8], [A]) == pytest.approx(1 / 2)
    assert voc_of([A, FAR, B], [0.9, 0.8, 0.7], [A, B]) == pytest.approx(1 / 2 + 1 / 3)
    assert voc_of([], [], [A]) == 0


def test_a_second_detection_of_an_object_is_false():
    assert voc_of([A, A, B], [0.9, 0.8, 0.7], [A, B]) == pytest.approx(1 / 2 + 1 / 3)
    # Also where it would be near enough to another object: the one that it overlaps most is taken.
    other = [0, 0, 10, 7]
    assert voc_of([A, [0, 0, 10, 9.5]], [0.9, 0.8], [A, other]) == pytest.approx(1 / 2)


def test_the_best_detection_of_an_object_is_the_one_with_the_highest_score():
    assert voc_of([[0, 0, 10, 8], A], [0.8, 0.9], [A]) == pytest.approx(1)


def test_an_iou_of_one_half_is_enough():
    assert voc_of([[0, 0, 10, 5]], [0.9], [A]) == 1
    assert voc_of([[0, 0, 10, 4.99]], [0.9], [A]) == 0


@pytest.mark.parametrize("flag", ["difficult", "crowd"])
def test_voc_does_not_count_difficult_objects_nor_detections_of_them(flag):
    assert voc_of([B, B, A], [0.9, 0.8, 0.7], [A, B], **{flag: [1]}) == pytest.approx(1)
    assert voc_of([A], [0.7], [A, B], **{flag: [1]}) == pytest.approx(1)
    assert math.isnan(voc_of([B], [0.7], [B], **{flag: [0]}))


def test_three_of_ten_objects_are_a_recall_of_three_tenths():
    truth = [[20 * i, 0, 20 * i + 10, 10] for i in range(10)]
    pair = [detections_of(truth[:3], [0.9, 0.8, 0.7], [0] * 3)], [objects_of(truth, [0] * 10)]
    assert coco_scores(*pair, 1)["box_ap50"] == pytest.approx(31 / 101)  # of the recalls 0, 0.01, ..., 1


def test_detections_of_another_class_do_not_hit():
    prediction, reference = detections_of([A], [0.9], [1], masks=False), objects_of([A], [0], masks=False)
    scores = voc_scores([prediction], [reference], 2)
    assert scores["voc_ap50"] == 0 and math.isnan(scores["per_class_voc_ap50"][1])


# Laws of all scores


every_score = pytest.mark.parametrize(
    "score", [lambda p, r: coco_scores(p, r, K, masks=True), lambda p, r: voc_scores(p, r, K)], ids=["coco", "voc"]
)


def all_nan(scores):
    return all(math.isnan(x) for value in scores.values() for x in (value if isinstance(value, list) else [value]))


@every_score
def test_the_order_of_images_and_of_objects_does_not_matter(score):
    predictions, references = images()
    random = np.random.default_rng(0)

    def shuffled(example):
        order = random.permutation(len(example))
        arrays = {k: v[order] for k, v in vars(example).items() if isinstance(v, np.ndarray)}
        return dataclasses.replace(example, **arrays, masks=tuple(example.masks[i] for i in order))

    order = random.permutation(len(references))
    again = score([shuffled(predictions[i]) for i in order], [shuffled(references[i]) for i in order])
    assert_equal(again, score(predictions, references))


@every_score
def test_without_any_object_there_is_no_score(score):
    found, nothing_found = detections_of([A], [0.9], [0]), detections_of([], [], [])
    nothing = objects_of([], [])
    assert all_nan(score([found, nothing_found], [nothing, nothing]))
    assert all_nan(score([nothing_found], [nothing]))
    assert all_nan(score([nothing_found], [dataclasses.replace(nothing, masks=None)]))


@every_score
def test_objects_that_are_not_found_score_zero(score):
    scores = score([detections_of([], [], [])] * 2, [objects_of([A], [1]), objects_of([], [])])
    assert [scores.get("box_ap", 0), scores.get("mask_ar100", 0), scores.get("voc_ap50", 0)] == [0, 0, 0]


@every_score
def test_perfect_detections_score_one(score):
    _, references = images()
    found = [detections_of(truth.boxes, np.full(len(truth), 0.9), truth.labels) for truth in references]
    scores = score(found, references)
    assert all(v == pytest.approx(1) for v in scores.values() if isinstance(v, float))
    assert all(v == pytest.approx([1, 1, 1, math.nan, 1], nan_ok=True) for v in scores.values() if type(v) is list)


# Masks


def test_masks_come_back_from_their_encoding():
    masks = np.random.default_rng(0).random((3, 17, 9)) > 0.5
    for given in (masks, torch.from_numpy(masks)):
        encoded = encode_masks(given)
        assert all(np.array_equal(decode_mask(rle), mask) for rle, mask in zip(encoded, masks, strict=True))
        assert all(rle == reference_masks.encode(np.asfortranarray(m)) for rle, m in zip(encoded, masks, strict=True))
    assert encode_masks(np.zeros((0, 4, 4), dtype=bool)) == ()


def test_masks_that_are_no_masks_are_refused():
    with pytest.raises(TypeError, match=r"masks .*float64"):
        encode_masks(np.zeros((1, 4, 4)))
    with pytest.raises(ValueError, match=r"masks .*\(n, H, W\).*\(4, 4\)"):
        encode_masks(np.zeros((4, 4), dtype=bool))


# Errors


FOUND, TRUTH = detections_of([A, B], [0.9, 0.8], [0, 1]), objects_of([A, B], [0, 1])


@every_score
def test_numbers_of_images_that_differ_are_refused(score):
    with pytest.raises(ValueError, match="zip"):
        score([FOUND], [TRUTH, TRUTH])


def test_masks_that_are_missing_are_refused():
    without = dataclasses.replace(FOUND, masks=None), dataclasses.replace(TRUTH, masks=None)
    for found, truth in ((without[0], TRUTH), (FOUND, without[1])):
        with pytest.raises(ValueError, match=r"2 labels.*0 masks.*masks=False"):
            coco_scores([found], [truth], 2, masks=True)
    assert coco_scores([without[0]], [without[1]], 2)["box_ap"] == pytest.approx(1)


def numbers(scores):
    return {name for name, value in scores.items() if isinstance(value, float)}


def test_the_metrics_that_detection_says_it_has_are_its_scores():
    evidence = list(zip(*images(), strict=True))
    for task in (ObjectDetection, InstanceSegmentation):
        assert numbers(task(None).scores(evidence, K)) == set(task.metrics) and task.main_metric in task.metrics
