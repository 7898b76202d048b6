"""Object detection and instance segmentation by `e3va train`: views, batches, scores, runs, drawings."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert

from e3va_peft.data.examples import Examples
from e3va_peft.data.formats import load_splits
from e3va_peft.data.objects import Detections, Objects, decode_mask, encode_masks
from e3va_peft.errors import UserError
from e3va_peft.training.config import HEADS, parse_config
from e3va_peft.training.drawing import draw_objects
from e3va_peft.training.predict import evaluate, load_trained, predict
from e3va_peft.training.run import train
from e3va_peft.training.tasks import task_of
from e3va_peft.training.tasks.base import pad_batch
from tests.helpers import Stop, adapter_weights, stop_after
from tests.inputs import detect, save_swin, segment, small_head
from tests.models import BY_NAME

EVERY_HEAD = sorted({*HEADS["object-detection"], *HEADS["instance-segmentation"]})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    detect(folder)
    return folder


def task(root: Path, head: str, **fields: Any) -> Any:
    return task_of(parse_config(detect(root, head, layout="coco") | fields))


def splits(run: Any) -> tuple[Any, Any]:
    return load_splits(run.config.data, run.label_kind)


@pytest.mark.parametrize("layout", ["coco", "voc", "yolo"])
def test_every_layout_holds_the_same_objects(layout, root):
    run = task_of(parse_config(detect(root, "retinanet", layout)))
    for split in splits(run):
        assert split.labels == ("square", "disc")
        objects = [split[i][1] for i in range(len(split))]
        assert [each.labels.tolist() for each in objects] == [[0, 1]] * (len(split) - 1) + [[]]
        np.testing.assert_array_equal(objects[0].boxes.round(9), [[2, 2, 16, 16], [17, 23, 32, 38]])


@pytest.mark.parametrize("augment", [False, {"flip": True}, {"crop": 24, "scale": [0.8, 1.4]}], ids=str)
def test_image_boxes_and_masks_stay_aligned(augment, root):
    run = task(root, "mask-rcnn", augment=augment)
    split, _ = splits(run)
    view = run.training_view(run.build_processor())
    torch.manual_seed(0)
    seen = 0
    for _ in range(8):
        example = view(*split[0])
        height, width = example["pixel_values"].shape[-2:]
        labels = example["labels"]
        assert labels["masks"].shape == (len(labels["class_labels"]), height, width)
        corners = box_convert(labels["boxes"], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
        for label, box, mask in zip(labels["class_labels"], corners, labels["masks"].bool(), strict=True):
            rows, columns = torch.where(mask)
            around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            exact = 1e-3 if augment and "crop" in augment else 0.6  # a mask has whole pixels, a box need not
            assert box.tolist() == pytest.approx([int(v) for v in around], abs=exact)
            inside = example["pixel_values"].mean(0)[mask].median()
            assert (inside > 0.5) == (label == 0), "a bright square, a dark disc"
            seen += 1
    assert seen > 8


def test_training_draws_the_shorter_side_within_its_bounds_and_flips_half_of_the_time(root):
    size = {"shortest_edge": 32, "longest_edge": 40}
    run = task(root, "retinanet", augment={"scale": [0.5, 1.0], "flip": True}, processor={"size": size})
    split, _ = splits(run)
    view = run.training_view(run.build_processor())
    image, objects = split[0]
    torch.manual_seed(0)
    sides, left = [], []
    for _ in range(60):
        example = view(image, objects)
        sides.append(min(example["pixel_values"].shape[-2:]))
        left.append(bool(example["labels"]["boxes"][0, 0] < 0.5))  # the square is left in the file
    assert (min(sides), max(sides)) == (16, 32) and len(set(sides)) > 8
    assert 15 < sum(left) < 45
    assert max(view(Image.new("RGB", (400, 40)), replace(objects, size=(40, 400)))["pixel_values"].shape[-2:]) == 40


def test_an_image_that_is_resized_to_nothing_is_named(tmp_path):
    run = task(tmp_path, "retinanet")
    path = tmp_path / "shapes" / "coco" / "train.json"
    content = json.loads(path.read_text())
    content["images"][0] |= {"width": 4000, "height": 1}
    others = [item for item in content["annotations"] if item["image_id"] != content["images"][0]["id"]]
    path.write_text(json.dumps(content | {"annotations": others}))
    Image.new("RGB", (4000, 1)).save(path.with_suffix("") / "train0.png")
    split, _ = splits(run)
    processor = run.build_processor()
    for view in (run.training_view(processor), run.evaluation_view(processor)):
        with pytest.raises(UserError, match=r"train0\.png: 4000 x 1"):
            Examples(split, view)[0]


def test_training_leaves_out_crowds_and_difficult_objects(root):
    run = task(root, "retinanet")
    image = Image.new("RGB", (40, 40))
    boxes = np.array([[0, 0, 20, 20], [20, 20, 40, 40], [5, 5, 9, 9]], dtype=float)
    flags = {"crowd": np.array([True, False, False]), "difficult": np.array([False, True, False])}
    objects = Objects(0, (40, 40), boxes, np.array([0, 1, 1]), np.ones(3), **flags)
    for view in (run.training_view(run.build_processor()), run.evaluation_view(run.build_processor())):
        assert view(image, objects)["labels"]["class_labels"].tolist() == [1]


@pytest.mark.parametrize("head", ["mask-rcnn", "mask2former"])
def test_evaluation_keeps_the_aspect_ratio_and_the_truth(head, root):
    run = task(root, head)
    _, split = splits(run)
    processor = run.build_processor()
    for i in range(len(split)):
        image, objects = split[i]
        example = run.evaluation_view(processor)(image, objects)
        assert example["truth"] is objects or len(example["truth"]) == len(objects)
        height, width = example["pixel_values"].shape[-2:]
        assert min(height, width) == 32
        masks = example["labels"]["masks"] if head == "mask-rcnn" else example["mask_labels"]
        assert masks.shape == (len(objects), height, width)


def test_a_padded_batch_moves_boxes_and_masks_along():
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0]])
    label = {"class_labels": torch.tensor([0]), "boxes": boxes, "masks": torch.ones(1, 10, 20)}
    small = {"pixel_values": torch.ones(3, 10, 20), "labels": label, "truth": "a"}
    none = {"class_labels": torch.zeros(0), "boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 40, 10)}
    batch = pad_batch([small, {"pixel_values": torch.ones(3, 40, 10), "labels": none, "truth": "b"}])
    assert batch["pixel_values"].shape == (2, 3, 40, 20) and batch["truth"] == ["a", "b"]
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [200, 400]
    moved = batch["labels"][0]
    torch.testing.assert_close(box_convert(moved["boxes"], "cxcywh", "xyxy"), torch.tensor([[0, 0, 1, 0.25]]))
    assert moved["masks"].shape == (1, 40, 20) and moved["masks"].sum() == 200
    assert batch["labels"][1]["masks"].shape == (0, 40, 20)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"masks": False}, "model_options.masks: .*task.*head"),
        ({"num_labels": 7}, "model_options.num_labels: .*classes"),
        ({"iou_thresholds": [0.5]}, "model_options=.*iou_thresholds"),
        ({"fpn_channels": "many"}, "model_options=.*fpn_channels"),
        ({"anchor_scales": []}, "model_options=.*anchor_scales"),
        ({"box_weights": [[10, 10, 5]] * 3}, "model_options=.*box_weights"),
    ],
)
def test_options_that_something_else_decides_or_that_contradict_each_other_are_refused(options, match, tmp_path):
    values = detect(tmp_path, "cascade-mask-rcnn", "coco")
    values["model_options"] = options
    with pytest.raises(UserError, match=f"(?s){match}"):
        task_of(parse_config(values)).build_model(["square", "disc"])


@pytest.mark.parametrize(
    "size",
    [{"shortest_edge": 64}, {"shortest_edge": 64, "longest_edge": 32}, {"height": 64, "width": 64}, 64],
    ids=str,
)
def test_a_size_that_does_not_keep_the_aspect_ratio_within_bounds_is_refused(size, root):
    with pytest.raises(UserError, match=r"processor\.size=.*shortest_edge.*longest_edge.*image_size"):
        task(root, "retinanet", processor={"size": size}).build_processor()


def test_heads_of_boxes_may_have_convolutions(root):
    values = {"model_options": small_head("faster-rcnn") | {"box_head_convs": 2}}
    model = task(root, "faster-rcnn", **values).build_model(["a", "b"])
    convs = [m for m in model.roi_heads.stages[0].box_head.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == 2


def test_mask2formers_strides_are_those_of_its_backbone(root):
    config = task(root, "mask2former").build_model(["a", "b"]).config
    assert config.feature_strides == [2, 4, 8] and config.common_stride == 2


def test_mask2former_refuses_to_be_scored_with_padding(root):
    run = task(root, "mask2former", processor={"size_divisor": 1})  # 32 would make the two of one size
    _, split = splits(run)
    processor = run.build_processor()
    model = run.build_model(split.labels).eval()
    view = run.evaluation_view(processor)
    inputs = run.collator(model, processor)([view(*split[i]) for i in (0, 1)])  # of two sizes
    with pytest.raises(UserError, match="per_device_eval_batch_size=2"):
        run.evidence(model(inputs["pixel_values"]), inputs, processor)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["retinanet", "mask2former"])
def test_a_run_that_was_cut_off_resumes_and_ends_where_a_whole_one_does(head, tmp_path, monkeypatch):
    arguments = {"load_best_model_at_end": False, "num_train_epochs": 4}
    values = {name: detect(tmp_path, head, "coco", name, **arguments) for name in ("whole", "cut")}
    for config in values.values():
        config["augment"] = False
    whole = train(parse_config(values["whole"]))
    with monkeypatch.context() as patch:
        stop_after(7, patch)
        with pytest.raises(Stop):
            train(parse_config(values["cut"]))
    resumed = train(parse_config(values["cut"]))
    assert resumed["resumed"] and resumed["steps"] == whole["steps"] == 12
    first, second = adapter_weights(tmp_path / "whole"), adapter_weights(tmp_path / "cut")
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["coco", "voc", "yolo"])
def test_a_run_is_scored_where_only_the_images_to_evaluate_on_are(layout, tmp_path):
    record = train(parse_config(detect(tmp_path, "retinanet", layout, num_train_epochs=1)))
    shapes = tmp_path / "shapes"
    for path in [
        *shapes.glob("coco/train/*"),
        *shapes.glob("voc/JPEGImages/train*"),
        *shapes.glob("yolo/images/train/*"),
    ]:
        path.unlink()
    for path in (shapes / "coco" / "train.json", shapes / "voc" / "ImageSets" / "Main" / "train.txt"):
        scores, labels = evaluate(str(tmp_path / "run"))
        assert labels == ("square", "disc")
        assert scores["box_ap"] == pytest.approx(record["metrics"]["box_ap"], abs=1e-4)
        path.unlink()  # after the images, what lists them


@pytest.mark.slow
def test_classes_of_the_data_to_score_on_are_matched_by_name(tmp_path):
    options = {"num_train_epochs": 12, "learning_rate": 1e-2, "eval_strategy": "no", "save_strategy": "no"}
    record = train(parse_config(detect(tmp_path, "retinanet", "coco", **options)))
    path = tmp_path / "shapes" / "coco" / "val.json"
    content = json.loads(path.read_text())
    for category in content["categories"]:  # numbered the other way round
        category["id"] = 10 - category["id"]
    for item in content["annotations"]:
        item["category_id"] = 10 - item["category_id"]
    path.write_text(json.dumps(content))
    scores, _ = evaluate(str(tmp_path / "run"))
    assert scores["box_ap"] == pytest.approx(record["metrics"]["box_ap"], abs=1e-4) and scores["box_ap"] > 0.01
    content["categories"][0]["name"] = "triangle"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"val\.json: .*\['triangle'\]"):
        evaluate(str(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("head", EVERY_HEAD)
def test_every_head_trains_is_scored_and_is_scored_again_from_its_folder(head, tmp_path):
    options = {"num_train_epochs": 4, "learning_rate": 2e-3, "eval_strategy": "no", "save_strategy": "no"}
    record = train(parse_config(detect(tmp_path, head, "coco", **options)))
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])  # the last epoch, the first
    scores, labels = evaluate(str(tmp_path / "run"))
    assert labels == ("square", "disc")
    name = "mask_ap" if "mask" in head else "box_ap"
    assert scores[name] == pytest.approx(record["metrics"][name], abs=1e-4)
    assert ("voc_ap50" in scores) == (name == "box_ap")
    photo = str(next((tmp_path / "shapes").rglob("*.jpg")))
    (found,) = predict(str(tmp_path / "run"), [photo], tmp_path / "sure", threshold=1.0)
    assert not found["objects"] and 0 < found["best_below"]["score"] < 1
    kind = load_trained(str(tmp_path / "run")).task
    assert kind == ("instance-segmentation" if "mask" in head else "object-detection")


@pytest.mark.parametrize("method", ["head-only", "lora", "full"])
def test_every_method_adapts_a_detector(method, tmp_path):
    values = detect(tmp_path, "cascade-mask-rcnn", "coco", num_train_epochs=1) | {"method": method}
    record = train(parse_config(values))
    scores, _ = evaluate(str(tmp_path / "run"))
    assert scores["loss"] > 0 and record["method"] == method


def test_an_instance_segmenter_trains_on_polygons_of_yolo(tmp_path):
    record = train(parse_config(detect(tmp_path, "mask-rcnn", "yolo", num_train_epochs=1)))
    assert list(record["per_class"]["mask_ap"]) == ["square", "disc"] and record["metrics"]["mask_ap"] >= 0


@pytest.mark.slow
def test_a_run_finds_the_shapes_and_draws_them(tmp_path):
    values = detect(tmp_path, "cascade-mask-rcnn", "coco", num_train_epochs=45, learning_rate=1e-2)
    values["training"] |= {"eval_strategy": "no", "save_strategy": "no"}
    values["model_options"] |= {"fpn_channels": 32, "box_head_dim": 64, "mask_dim": 32, "anchor_scales": [4]}
    values |= {"augment": False}
    record = train(parse_config(values))
    assert record["metrics"]["box_ap50"] > 0.5 and record["metrics"]["mask_ap50"] > 0.5
    shown = tmp_path / "shapes" / "coco" / "val"
    entries = predict(str(tmp_path / "run"), [str(shown)], tmp_path / "found", threshold=0.3)
    assert json.loads((tmp_path / "found" / "predictions.json").read_text()) == entries
    Image.new("RGB", (4000, 1)).save(tmp_path / "sliver.png")
    (sliver,) = predict(str(tmp_path / "run"), [str(tmp_path / "sliver.png")], tmp_path / "sliver")
    assert "4000 x 1 pixels cannot be prepared" in sliver["error"]
    scores = [each["score"] for entry in entries for each in entry["objects"]]
    every = predict(str(tmp_path / "run"), [str(shown)], tmp_path / "every", threshold=0.0)
    assert min(scores) > 0.3 and len(scores) < sum(len(entry["objects"]) for entry in every)
    found = {each["label"] for entry in entries for each in entry["objects"]}
    assert found == {"square", "disc"}
    first = entries[0]["objects"][0]
    assert first["mask"]["size"] == [44, 40] and len(first["box"]) == 4 and 0.3 < first["score"] <= 1
    drawing = np.asarray(Image.open(entries[0]["overlay"]))
    assert drawing.shape == (44, 40, 3)
    assert (drawing != np.asarray(Image.open(shown / "val0.png"))).any()


def test_the_documented_python_goes_from_a_coco_file_to_masks(root, tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "objects.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n((?:(?!```).)*CascadeMaskRCNN\(.*?)```", page, re.DOTALL)
    options = ", ".join(f"{name}={value!r}" for name, value in small_head("cascade-mask-rcnn").items())
    for theirs, ours in {
        "coco/train2017": f"{root}/shapes/coco/train",
        "coco/annotations/instances_train2017.json": f"{root}/shapes/coco/train.json",
        "microsoft/swin-base-patch4-window7-224-in22k": str(save_swin(tmp_path / "model")),
        "num_labels=len(number)": f"num_labels=len(number), {options}",
        "DetectionImageProcessor()": "DetectionImageProcessor(size={'shortest_edge': 32, 'longest_edge': 64})",
        '"stage3", "stage4"': '"stage3"',
        "per_device_train_batch_size=1": "per_device_train_batch_size=1, max_steps=2",
    }.items():
        assert theirs in code
        code = code.replace(theirs, ours)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    assert (tmp_path / "runs" / "python" / "adapter" / "adapter_model.safetensors").is_file()
    assert names["found"]["masks"].shape == (len(names["found"]["scores"]), *names["sizes"][0])


@pytest.mark.parametrize("box", [(0, 0, 90, 60), (740, 0, 799, 60), (740, 390, 799, 399), (-60, 380, 5, 450)], ids=str)
def test_a_name_is_whole_where_its_box_touches_the_edge_of_the_picture(box):
    def letters(box: tuple[int, ...]) -> int:
        found = Detections(np.array([box], dtype=float), np.array([0.5]), np.array([1]))
        drawn = draw_objects(Image.new("RGB", (800, 400), (127, 127, 127)), found, ["cell", "nucleus"])
        return int((np.asarray(drawn).max(-1) < 60).sum())  # black on the plate's colour

    assert letters(box) == pytest.approx(letters((200, 200, 360, 320)), rel=0.15) and letters(box) > 100


def test_drawings_mark_masks_and_boxes_and_leave_an_empty_image_alone():
    image = Image.new("RGB", (30, 20))
    mask = np.zeros((1, 20, 30), dtype=bool)
    mask[0, 5:15, 10:20] = True
    found = Detections(np.array([[10.0, 5, 20, 15]]), np.array([0.9]), np.array([0]), encode_masks(mask))
    drawn = np.asarray(draw_objects(image, found, ["thing"])).any(-1)
    assert drawn[5:15, 10:20].all() and not drawn[:4].any()
    nothing = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=int), ())
    assert not np.asarray(draw_objects(image, nothing, ["thing"])).any()


def test_lines_and_names_grow_with_the_image():
    def share(side: int) -> float:
        boxes = np.array([[0.1, 0.1, 0.9, 0.9]]) * side
        found = Detections(boxes, np.array([0.9]), np.array([0]))
        return np.asarray(draw_objects(Image.new("RGB", (side, side)), found, ["thing", "other"])).any(-1).mean()

    assert share(4000) == pytest.approx(share(800), rel=0.25)


@pytest.mark.parametrize("scores", [[0.3, 0.9], [0.9, 0.3]])
def test_where_masks_overlap_the_better_one_is_seen(scores):
    masks = np.zeros((2, 60, 30), dtype=bool)
    masks[0, 35:55, 5:20], masks[1, 35:55, 10:25] = True, True
    boxes, labels = np.array([[0.0, 0, 30, 60], [0, 0, 30, 60]]), np.array([0, 1])
    found = Detections(boxes, np.array(scores), labels, encode_masks(masks))
    drawn = np.asarray(draw_objects(Image.new("RGB", (30, 60)), found, ["one", "other"]))
    first, shared, second = (tuple(drawn[45, x].tolist()) for x in (7, 15, 22))
    assert any(first) and any(second) and first != second
    assert shared == (first if scores[0] > scores[1] else second)


def test_evidence_of_a_batch_is_that_of_each_image(root):
    run = task(root, "mask-rcnn")
    split, _ = splits(run)
    processor = run.build_processor()
    model = run.build_model(split.labels).eval()
    view = run.evaluation_view(processor)
    examples = [view(*split[i]) for i in (0, 2)]  # of one size
    rows = []
    for batch in (examples, examples[:1], examples[1:]):
        inputs = run.collator(model, processor)(batch)
        truth = inputs.pop("truth")
        with torch.no_grad():
            rows += run.evidence(model(**inputs), inputs | {"truth": truth}, processor)
    for i in (0, 1):
        (together, truth), (alone, _) = rows[i], rows[2 + i]
        np.testing.assert_allclose(together.boxes, alone.boxes, atol=1e-2)
        np.testing.assert_array_equal(truth.boxes, split[2 * i][1].boxes)
        assert together.masks is not None and decode_mask(truth.masks[0]).shape == split[2 * i][1].size


def test_mask2former_segments_semantically(tmp_path):
    values = segment(tmp_path, num_train_epochs=2)
    values |= {"head": "mask2former", "model_options": detect(tmp_path, "mask2former")["model_options"]}
    record = train(parse_config(values))
    scores, labels = evaluate(str(tmp_path / "run"))
    assert labels == ("ground", "disc") and scores["mean_iou"] == pytest.approx(record["metrics"]["mean_iou"])
    assert load_trained(str(tmp_path / "run")).task == "semantic-segmentation"
    (entry,) = predict(str(tmp_path / "run"), [str(tmp_path / "discs/images/val/0.jpg")], tmp_path / "found")
    with Image.open(entry["mask"]) as mask:
        assert mask.size == (40, 44)


def test_a_pretrained_detector_gets_a_new_head_for_other_classes(root, tmp_path):
    first = task(root, "mask-rcnn").build_model(["a", "b"])
    first.save_pretrained(tmp_path / "detector")
    values = detect(root, "mask-rcnn", "coco") | {"model": str(tmp_path / "detector"), "head": None}
    second = task_of(parse_config(values)).build_model(["a", "b", "c"])
    assert second.config.num_labels == 3
    for name, parameter in second.backbone.named_parameters():
        torch.testing.assert_close(parameter, first.backbone.get_parameter(name))
    kept = "rpn.head.cls_logits.weight"
    torch.testing.assert_close(second.get_parameter(kept), first.get_parameter(kept))


@pytest.mark.parametrize("name", ["vit-classifier", "dinov2-classifier"])
def test_plain_transformers_become_detectors(name, root, tmp_path):
    BY_NAME[name].base().save_pretrained(tmp_path / "plain")
    values = detect(root, "retinanet") | {"model": str(tmp_path / "plain")}
    model = task_of(parse_config(values)).build_model(["a", "b"])
    loss = model.train()(
        torch.randn(1, 3, 30, 44), labels=[{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5] * 4])}]
    ).loss
    assert torch.isfinite(loss)


def test_a_head_of_another_task_is_refused(root):
    with pytest.raises(UserError, match=r"head='upernet': .*semantic-segmentation.*object"):
        parse_config(detect(root) | {"head": "upernet"})
    with pytest.raises(UserError, match=r"head='mask2former': .*semantic-segmentation.*instance-seg"):
        parse_config(detect(root) | {"head": "mask2former"})
    with pytest.raises(UserError, match=r"head='yolo': .*retinanet"):
        parse_config(detect(root) | {"head": "yolo"})


def test_a_detector_of_the_other_task_is_refused(root, tmp_path):
    task(root, "mask-rcnn").build_model(["a", "b"]).save_pretrained(tmp_path / "detector")
    values = detect(root, "retinanet") | {"model": str(tmp_path / "detector"), "head": None}
    with pytest.raises(UserError, match=r"detector.*object-detection"):
        task_of(parse_config(values)).build_model(["a", "b"])


def test_what_is_no_backbone_is_refused_with_those_that_are(root, tmp_path):
    BY_NAME["swin-upernet"].base().save_pretrained(tmp_path / "segmenter")
    with pytest.raises(UserError, match=r"upernet.*Swin, ViT"):
        task(root, "retinanet", model=str(tmp_path / "segmenter")).build_model(["a", "b"])


def test_mask2former_wants_several_resolutions(root, tmp_path):
    BY_NAME["dinov2-classifier"].base().save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match="head=mask2former"):
        task(root, "mask2former", model=str(tmp_path / "plain")).build_model(["a", "b"])
