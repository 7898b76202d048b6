"""COCO's and Pascal VOC's average precision against their reference evaluators, as metrics, and packed in tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math

import evaluate
import numpy as np
import pytest
import torch
from accelerate.utils import operations
from pycocotools import mask as reference_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import DetrImageProcessor
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput
from transformers.trainer_pt_utils import nested_concat, nested_numpify

from e3va_peft.data.objects import Detections, Objects, decode_mask, encode_masks
from e3va_peft.training.average_precision import CocoAP, VocAP50, coco_scores, voc_scores
from e3va_peft.training.packing import pack, unpack

K = 5
SIZE = 160, 200


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep `evaluate` out of the home folder, and off the network."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))
    monkeypatch.setattr(evaluate, "load", None)


def assert_equal(scores, expected, tolerance=1e-12):
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


def girshick_ap(recall, precision, use_07_metric):
    if use_07_metric:
        ap = 0.0
        for t in np.arange(11) / 10:  # his np.arange(0, 1.1, 0.1) is above 0.3, 0.6 and 0.7
            p = 0 if np.sum(recall >= t) == 0 else np.max(precision[recall >= t])
            ap = ap + p / 11.0
        return ap
    mrec, mpre = np.concatenate(([0.0], recall, [1.0])), np.concatenate(([0.0], precision, [0.0]))
    for i in range(mpre.size - 1, 0, -1):
        mpre[i - 1] = np.maximum(mpre[i - 1], mpre[i])
    i = np.where(mrec[1:] != mrec[:-1])[0]
    return np.sum((mrec[i + 1] - mrec[i]) * mpre[i + 1])


def girshick_eval(predictions, references, label, use_07_metric):
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
    return float(girshick_ap(tp / npos, tp / np.maximum(tp + fp, np.finfo(np.float64).eps), use_07_metric))


def reference_voc(predictions, references, interpolation="area", num_labels=K):
    old = interpolation == "11-point"
    values = [girshick_eval(predictions, references, label, old) for label in range(num_labels)]
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


def test_areas_of_the_annotation_say_how_large_an_object_is():
    box = [[10, 10, 60, 60]]
    references = [dataclasses.replace(objects_of(box, [0]), areas=np.array([100.0]))]
    scores = coco_scores([detections_of(box, [0.9], [0])], references, 1, masks=True)
    assert scores["box_ap_small"] == scores["mask_ap_small"] == pytest.approx(1)
    assert math.isnan(scores["box_ap_medium"]) and math.isnan(scores["mask_ap_medium"])


def test_nothing_is_printed(capfd):
    coco_scores(*images(), K, masks=True)
    assert capfd.readouterr() == ("", "")


def test_what_is_scored_is_left_as_it_is():
    predictions, references = images()
    before = pack(predictions), pack(references)
    coco_scores(predictions, references, K, masks=True)
    assert torch.equal(pack(predictions), before[0]) and torch.equal(pack(references), before[1])


# Pascal VOC


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("interpolation", ["area", "11-point"])
def test_voc_scores_equal_those_of_girshick(seed, interpolation):
    predictions, references = images(seed, count=30, masks=False)
    expected = reference_voc(predictions, references, interpolation)
    assert 0 < expected["voc_ap50"] < 1 and math.isnan(expected["per_class_voc_ap50"][3])
    assert_equal(voc_scores(predictions, references, K, interpolation), expected)


def voc_of(found, scores, truth, **kwargs):
    prediction = detections_of(found, scores, [0] * len(found), masks=False)
    reference = objects_of(truth, [0] * len(truth), masks=False, **kwargs)
    return [voc_scores([prediction], [reference], 1, name)["voc_ap50"] for name in ("area", "11-point")]


A, B, FAR = [0, 0, 10, 10], [50, 50, 70, 70], [100, 100, 120, 120]


def test_voc_ap_by_hand():
    assert voc_of([A, B], [0.9, 0.8], [A, B]) == pytest.approx([1, 1])
    assert voc_of([A], [0.9], [A, B]) == pytest.approx([1 / 2, 6 / 11])  # recalls 0 to 0.5 are reached
    assert voc_of([FAR, A], [0.9, 0.8], [A]) == pytest.approx([1 / 2, 1 / 2])
    assert voc_of([A, FAR, B], [0.9, 0.8, 0.7], [A, B]) == pytest.approx([1 / 2 + 1 / 3, (6 + 5 * 2 / 3) / 11])
    assert voc_of([], [], [A]) == [0, 0]


def test_a_second_detection_of_an_object_is_false():
    assert voc_of([A, A, B], [0.9, 0.8, 0.7], [A, B])[0] == pytest.approx(1 / 2 + 1 / 3)
    # Also where it would be near enough to another object: the one that it overlaps most is taken.
    other = [0, 0, 10, 7]
    assert voc_of([A, [0, 0, 10, 9.5]], [0.9, 0.8], [A, other])[0] == pytest.approx(1 / 2)


def test_the_best_detection_of_an_object_is_the_one_with_the_highest_score():
    assert voc_of([[0, 0, 10, 8], A], [0.8, 0.9], [A])[0] == pytest.approx(1)


def test_an_iou_of_one_half_is_enough():
    assert voc_of([[0, 0, 10, 5]], [0.9], [A])[0] == 1
    assert voc_of([[0, 0, 10, 4.99]], [0.9], [A])[0] == 0


@pytest.mark.parametrize("flag", ["difficult", "crowd"])
def test_voc_does_not_count_difficult_objects_nor_detections_of_them(flag):
    assert voc_of([B, B, A], [0.9, 0.8, 0.7], [A, B], **{flag: [1]}) == pytest.approx([1, 1])
    assert voc_of([A], [0.7], [A, B], **{flag: [1]}) == pytest.approx([1, 1])
    assert all(math.isnan(value) for value in voc_of([B], [0.7], [B], **{flag: [0]}))


def test_three_of_ten_objects_are_a_recall_of_three_tenths():
    truth = [[20 * i, 0, 20 * i + 10, 10] for i in range(10)]
    assert voc_of(truth[:3], [0.9, 0.8, 0.7], truth)[1] == pytest.approx(4 / 11)


def test_detections_of_another_class_do_not_hit():
    prediction, reference = detections_of([A], [0.9], [1], masks=False), objects_of([A], [0], masks=False)
    scores = voc_scores([prediction], [reference], 2)
    assert scores["voc_ap50"] == 0 and math.isnan(scores["per_class_voc_ap50"][1])


# Laws of all scores


def coco_case(**kwargs):
    return CocoAP(K, masks=True, **kwargs), lambda p, r: coco_scores(p, r, K, masks=True)


def voc_case(**kwargs):
    return VocAP50(K, **kwargs), lambda p, r: voc_scores(p, r, K)


def old_voc_case(**kwargs):
    return VocAP50(K, "11-point", **kwargs), lambda p, r: voc_scores(p, r, K, "11-point")


every_score = pytest.mark.parametrize("case", [coco_case, voc_case, old_voc_case])


def all_nan(scores):
    return all(math.isnan(x) for value in scores.values() for x in (value if isinstance(value, list) else [value]))


@every_score
def test_the_order_of_images_and_of_objects_does_not_matter(case):
    _, score = case()
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
def test_without_any_object_there_is_no_score(case):
    _, score = case()
    found, nothing_found = detections_of([A], [0.9], [0]), detections_of([], [], [])
    nothing = objects_of([], [])
    assert all_nan(score([found, nothing_found], [nothing, nothing]))
    assert all_nan(score([nothing_found], [nothing]))
    assert all_nan(score([nothing_found], [dataclasses.replace(nothing, masks=None)]))


@every_score
def test_objects_that_are_not_found_score_zero(case):
    _, score = case()
    scores = score([detections_of([], [], [])] * 2, [objects_of([A], [1]), objects_of([], [])])
    assert [scores.get("box_ap", 0), scores.get("mask_ar100", 0), scores.get("voc_ap50", 0)] == [0, 0, 0]


@every_score
def test_perfect_detections_score_one(case):
    _, score = case()
    _, references = images()
    found = [detections_of(truth.boxes, np.full(len(truth), 0.9), truth.labels) for truth in references]
    scores = score(found, references)
    assert all(v == pytest.approx(1) for v in scores.values() if isinstance(v, float))
    assert all(v == pytest.approx([1, 1, 1, math.nan, 1], nan_ok=True) for v in scores.values() if type(v) is list)


# As `evaluate` metrics


@every_score
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_metric_scores_batches_as_its_function_does_all_at_once(case, in_memory):
    metric, score = case(keep_in_memory=in_memory)
    predictions, references = images()
    expected = score(predictions, references)
    for _ in range(2):  # compute starts afresh
        metric.add_batch(predictions=predictions[:5], references=references[:5])
        metric.add(prediction=predictions[5], reference=references[5])
        metric.add_batch(predictions=[], references=[])
        assert len(metric) == 6
        assert_equal(metric.compute(predictions=predictions[6:], references=references[6:]), expected)
    assert_equal(metric.compute(predictions=predictions, references=references), expected)


@every_score
def test_nothing_is_written_to_disk(case, tmp_path):
    metric, _ = case()
    predictions, references = images()
    metric.compute(predictions=predictions, references=references)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def as_dicts(predictions, references):
    found = [
        {"boxes": torch.tensor(p.boxes), "scores": torch.tensor(p.scores), "labels": torch.tensor(p.labels)}
        | {"masks": torch.tensor(np.array([decode_mask(mask) for mask in p.masks]).reshape(-1, *SIZE)).bool()}
        for p in predictions
    ]
    truth = [
        {"boxes": r.boxes.tolist(), "labels": r.labels.tolist(), "area": r.areas, "masks": list(r.masks)}
        | {"iscrowd": r.crowd.astype(int).tolist(), "difficult": torch.tensor(r.difficult)}
        for r in references
    ]
    return found, truth


@every_score
def test_dicts_score_as_detections_and_objects(case):
    metric, score = case()
    predictions, references = images()
    found, truth = as_dicts(predictions, references)
    assert_equal(metric.compute(predictions=found, references=truth), score(predictions, references))


def test_of_a_dict_without_areas_the_mask_or_else_the_box_has_the_area():
    prediction = {"boxes": [[0, 0, 35, 35]], "scores": [0.9], "labels": [0]}
    reference = {"boxes": [[0, 0, 35, 35]], "labels": [0]}
    metric = CocoAP(1)
    assert metric.compute(predictions=[prediction], references=[reference])["box_ap_medium"] == pytest.approx(1)
    masks = np.zeros((1, 35, 35), dtype=bool)
    masks[:, :20] = True
    reference["masks"] = masks
    assert metric.compute(predictions=[prediction], references=[reference])["box_ap_small"] == pytest.approx(1)


def test_dicts_of_images_without_objects_are_taken():
    nothing = {"boxes": [], "scores": [], "labels": []}
    found = {"boxes": [A], "scores": [0.9], "labels": [0], "masks": np.ones((1, 16, 16), dtype=bool)}
    scores = CocoAP(1, masks=True).compute(predictions=[found, nothing, found], references=[nothing, found, found])
    assert scores["box_ap50"] == scores["mask_ap50"] and 0 < scores["box_ap50"] < 1


def test_what_hugging_face_makes_of_a_models_output_can_be_scored():
    centre = torch.tensor([[[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]]], dtype=torch.bfloat16)
    logits = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 8.0, 0.0]]])  # the last class is "no object"
    output = DetrObjectDetectionOutput(logits=logits, pred_boxes=centre)
    found = DetrImageProcessor().post_process_object_detection(output, threshold=0.5, target_sizes=[(50, 80)])
    truth = [{"boxes": torch.tensor([[0.0, 0, 40, 50], [40, 0, 80, 50]]), "labels": torch.tensor([0, 1])}]
    assert CocoAP(2).compute(predictions=found, references=truth)["per_class_box_ap"] == pytest.approx([1, 1])
    assert VocAP50(2).compute(predictions=found, references=truth)["per_class_voc_ap50"] == [1, 1]


# Masks


def test_masks_come_back_from_their_encoding():
    masks = np.random.default_rng(0).random((3, 17, 9)) > 0.5
    for given in (masks, torch.from_numpy(masks)):
        encoded = encode_masks(given)
        assert all(np.array_equal(decode_mask(rle), mask) for rle, mask in zip(encoded, masks, strict=True))
        assert all(rle == reference_masks.encode(np.asfortranarray(m)) for rle, m in zip(encoded, masks, strict=True))
    assert encode_masks(np.zeros((0, 4, 4), dtype=bool)) == ()


def test_masks_that_are_no_masks_are_refused():
    with pytest.raises(TypeError, match=r"masks must be booleans, got float64: pass masks > 0\.5"):
        encode_masks(np.zeros((1, 4, 4)))
    with pytest.raises(ValueError, match=r"masks must have shape \(n, H, W\), got \(4, 4\): pass one mask as"):
        encode_masks(np.zeros((4, 4), dtype=bool))


# Packed in tensors


def assert_same(examples, expected):
    assert len(examples) == len(expected)
    for one, other in zip(examples, expected, strict=True):
        assert type(one) is type(other)
        for name, value in vars(other).items():
            got = getattr(one, name)
            if isinstance(value, np.ndarray):
                assert got.dtype == value.dtype and np.array_equal(got, value) and got.shape == value.shape, name
            else:
                assert got == value, name


def test_what_is_packed_comes_back_to_the_last_bit():
    for masks in (True, False):
        for examples in images(masks=masks):
            rows = pack(examples)
            assert rows.dtype == torch.int8 and rows.dim() == 2
            assert_same(unpack(rows), examples)
            assert_same(unpack(rows.numpy()), examples)
    assert unpack(pack([])) == []


def test_rows_survive_the_trainers_padding_and_concatenation():
    examples = [example for pair in zip(*images(), strict=True) for example in pair]
    batches = [pack(examples[start : start + 5]) for start in range(0, len(examples), 5)]
    assert len({batch.shape[1] for batch in batches}) > 1
    gathered, on_cpu = batches[0], nested_numpify(batches[0])
    for batch in batches[1:]:
        gathered, on_cpu = nested_concat(gathered, batch), nested_concat(on_cpu, nested_numpify(batch))
    assert gathered.dtype == torch.int8
    assert_same(unpack(gathered), examples)
    assert_same(unpack(on_cpu), examples)
    assert_same(unpack(gathered[:7]), examples[:7])  # without the last batch's duplicates


def test_rows_survive_padding_across_processes(monkeypatch):
    _, references = images()
    rows = pack(references)
    longer = torch.tensor([[len(rows), rows.shape[1]], [len(rows), rows.shape[1] + 50]])
    monkeypatch.setattr(operations, "gather", lambda size: longer)
    pad = operations.pad_across_processes.__wrapped__  # as if there were two processes
    padded = pad(rows, dim=1, pad_index=-100)
    assert padded.shape[1] == rows.shape[1] + 50 and padded.dtype == torch.int8
    assert_same(unpack(padded), references)


def test_rows_are_gathered_over_processes(tmp_path):
    rows = pack(images()[1])
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        gathered = [torch.empty_like(rows)]
        torch.distributed.all_gather(gathered, rows)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(gathered[0], rows)


def test_rows_that_are_not_packed_are_refused():
    rows = pack([objects_of([A], [0])])
    with pytest.raises(ValueError, match=r"rows must be \(B, L\) int8, got \(1, \d+\) int64: pass what pack returned"):
        unpack(rows.long())
    with pytest.raises(ValueError, match=r"rows must be \(B, L\) int8, got \(\d+,\) int8"):
        unpack(rows[0])
    with pytest.raises(ValueError, match=r"rows\[1\] does not come from pack"):
        unpack(torch.cat([rows, rows.roll(1)]))
    with pytest.raises(ValueError, match=r"rows\[0\] does not come from pack"):
        unpack(rows[:, :20])


# Errors


FOUND, TRUTH = detections_of([A, B], [0.9, 0.8], [0, 1]), objects_of([A, B], [0, 1])


@every_score
@pytest.mark.parametrize(
    ("side", "changes", "error", "message"),
    [
        ("p", {"labels": np.array([0, 9])}, ValueError, r"labels with 9 at 1; they must be 0\.\.4: relabel"),
        ("r", {"labels": np.array([-1, 0])}, ValueError, r"labels with -1 at 0; they must be 0\.\.4: relabel"),
        ("r", {"labels": np.array([0.0, 1.0])}, TypeError, "labels in float64: pass class ids in integers"),
        ("p", {"scores": np.array([0.1, 7.5])}, ValueError, "scores with 7.5 at 1; .* pass probabilities, not logits"),
        ("p", {"scores": np.array([math.nan, 0.5])}, ValueError, "scores with nan at 0; they must be 0 to 1"),
        ("p", {"scores": np.array([0.5])}, ValueError, r"scores of shape \(1,\), not \(2,\): pass one for each"),
        ("p", {"boxes": np.zeros((2, 5))}, ValueError, r"boxes of shape \(2, 5\), not \(2, 4\): pass one for each"),
        ("r", {"boxes": np.zeros(4)}, ValueError, r"boxes of shape \(4,\), not \(2, 4\): pass one for each"),
        ("p", {"boxes": np.array([A, [9, 9, 2, 2]])}, ValueError, r"boxes with \[9, 9, 2, 2\] at 1; .* x1 y1 x2 y2"),
        ("p", {"boxes": np.full((2, 4), math.nan)}, ValueError, r"boxes with \[nan, .* at 0; .* x1 y1 x2 y2"),
        ("r", {"crowd": np.array([False])}, ValueError, r"crowd of shape \(1,\), not \(2,\): pass one for each"),
        ("r", {"masks": TRUTH.masks[:1]}, ValueError, "1 masks: pass one for each of its 2 labels"),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(case, side, changes, error, message):
    metric, score = case()
    found = dataclasses.replace(FOUND, **changes) if side == "p" else FOUND
    truth = dataclasses.replace(TRUTH, **changes) if side == "r" else TRUTH
    where = rf"{'predictions' if side == 'p' else 'references'}\[1\] has "
    with pytest.raises(error, match=where + message):
        score([FOUND, found], [TRUTH, truth])
    with pytest.raises(error, match=where + message):
        metric.compute(predictions=[FOUND, found], references=[TRUTH, truth])


@every_score
def test_numbers_of_images_that_differ_are_refused(case):
    metric, score = case()
    with pytest.raises(ValueError, match="predictions are 1 images, references 2: pass one prediction and one"):
        score([FOUND], [TRUTH, TRUTH])
    with pytest.raises(ValueError, match="predictions are 1 images, references 0: pass one prediction and one"):
        metric.compute(predictions=[FOUND])


@every_score
def test_no_images_are_refused(case):
    metric, score = case()
    with pytest.raises(ValueError, match="references are 0 images: pass at least one image"):
        score([], [])
    with pytest.raises(ValueError, match="there is nothing to score: call add or add_batch"):
        metric.compute()


def test_masks_that_are_missing_are_refused():
    without = dataclasses.replace(FOUND, masks=None), dataclasses.replace(TRUTH, masks=None)
    with pytest.raises(ValueError, match=r"predictions\[0\] has 2 objects and no masks: pass masks, or masks=False"):
        coco_scores([without[0]], [TRUTH], 2, masks=True)
    with pytest.raises(ValueError, match=r"references\[0\] has 2 objects and no masks"):
        CocoAP(2, masks=True).add(prediction=FOUND, reference=without[1])
    assert coco_scores([without[0]], [without[1]], 2)["box_ap"] == pytest.approx(1)


def test_masks_of_several_sizes_are_refused():
    small = dataclasses.replace(FOUND, masks=encode_masks(np.ones((2, 8, 8), dtype=bool)))
    with pytest.raises(ValueError, match=r"masks of several sizes \[\(8, 8\), \(160, 200\)\]: resize the predicted"):
        coco_scores([small], [TRUTH], 2, masks=True)


def test_dicts_that_lack_something_are_refused():
    metric, truth = VocAP50(2), {"boxes": [A], "labels": [0]}
    with pytest.raises(
        ValueError, match=r"predictions\[0\] has no 'scores', only \['boxes', 'labels'\]: pass 'scores'"
    ):
        metric.add(prediction=truth, reference=truth)
    with pytest.raises(TypeError, match=r"references\[0\] has masks that are no RLEs: pass RLEs, or booleans as one"):
        metric.add(prediction=FOUND, reference=truth | {"masks": [np.ones((4, 4), dtype=bool)]})
    with pytest.raises(TypeError, match=r"references\[0\] must be a dict, Detections or Objects, got str: pass one"):
        metric.add(prediction=FOUND, reference="boxes")


def test_settings_that_are_none_are_refused():
    for build in (lambda: VocAP50(2, "10-point"), lambda: voc_scores([FOUND], [TRUTH], 2, "10-point")):
        with pytest.raises(ValueError, match=r"interpolation is '10-point': pass 'area' .* or '11-point'"):
            build()
    with pytest.raises(ValueError, match="num_labels must be at least 1, got 0: pass the number of classes"):
        coco_scores([FOUND], [TRUTH], 0)
