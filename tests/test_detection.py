"""Detectors over a backbone of transformers, held against torchvision's own, trained, saved, and fed what is wrong."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as rle
from huggingface_hub.errors import StrictDataclassClassValidationError
from peft import PeftModel, get_peft_model
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models import detection as torchvision_models
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, box_convert, box_iou, clip_boxes_to_image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    BertConfig,
    ConvNextConfig,
    Dinov2Config,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    ResNetConfig,
    SwinBackbone,
    SwinConfig,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
    pipeline,
)

import e3va_peft
from e3va_peft import E3VAConfig
from e3va_peft.data.objects import Detections, Objects, encode_masks
from e3va_peft.detection import (
    CascadeMaskRCNN,
    CascadeMaskRCNNConfig,
    DetectionImageProcessor,
    Detector,
    MaskRCNN,
    MaskRCNNConfig,
    RetinaNet,
    RetinaNetConfig,
    roi,
)
from e3va_peft.detection.pyramid import PyramidAnchors, feature_maps, map_strides, pyramid_strides
from e3va_peft.detection.roi import CascadeRoIHeads
from e3va_peft.training.average_precision import coco_scores
from e3va_peft.training.tasks import mask2former
from e3va_peft.training.tasks.detection import detections
from tests.helpers import StopAt, assert_same
from tests.models import PLAIN, STAGES, SWIN

SIZE = 64
SMALL = {"num_labels": 3, "fpn_channels": 16}
HEADS = SMALL | {
    "box_head_dim": 32, "mask_dim": 8, "rpn_post_nms_top_n_train": 60, "rpn_post_nms_top_n_test": 30,
    "rpn_batch_size_per_image": 64, "box_batch_size_per_image": 32,
}  # fmt: skip


def swin(**kwargs: Any) -> SwinConfig:
    return SwinConfig(**SWIN | {"out_features": STAGES, "drop_path_rate": 0.0} | kwargs)


def retinanet(**kwargs: Any) -> RetinaNet:
    return RetinaNet(RetinaNetConfig(**{"backbone_config": swin()} | SMALL | kwargs))


def mask_rcnn(**kwargs: Any) -> MaskRCNN:
    return MaskRCNN(MaskRCNNConfig(**{"backbone_config": swin()} | HEADS | kwargs))


def cascade(**kwargs: Any) -> CascadeMaskRCNN:
    return CascadeMaskRCNN(CascadeMaskRCNNConfig(**{"backbone_config": swin()} | HEADS | kwargs))


every_detector = pytest.mark.parametrize("build", [retinanet, mask_rcnn, cascade])


def perturbed(model: nn.Module) -> nn.Module:
    """Move every weight so far that detections score apart and boxes leave their anchors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def objects(index: int, height: int = SIZE, width: int = SIZE) -> dict[str, Tensor]:
    """Labels of an image: a few boxes and the masks that fill them."""
    generator = torch.Generator().manual_seed(index)
    count = 2 + index % 2
    corner = torch.rand(count, 2, generator=generator) * 0.4
    boxes = torch.cat([corner, corner + 0.25 + 0.3 * torch.rand(count, 2, generator=generator)], 1)
    masks = torch.zeros(count, height, width)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.tolist(), strict=True):
        mask[round(y1 * height) : round(y2 * height), round(x1 * width) : round(x2 * width)] = 1
    classes = torch.randint(3, (count,), generator=generator)
    return {"class_labels": classes, "boxes": box_convert(boxes, "xyxy", "cxcywh"), "masks": masks}


def nothing(height: int = SIZE, width: int = SIZE) -> dict[str, Tensor]:
    """Labels of an image without objects."""
    return {
        "class_labels": torch.zeros(0, dtype=torch.long),
        "boxes": torch.zeros(0, 4),
        "masks": torch.zeros(0, height, width),
    }


def batch(count: int = 2) -> dict[str, Any]:
    return {"pixel_values": torch.randn(count, 3, SIZE, SIZE), "labels": [objects(i) for i in range(count)]}


def targets(labels: list[dict[str, Tensor]], background: int = 1, size: int = SIZE) -> list[dict[str, Tensor]]:
    """Labels in torchvision's form."""
    return [
        {
            "boxes": box_convert(each["boxes"], "cxcywh", "xyxy") * size,
            "labels": each["class_labels"] + background,
            "masks": each["masks"].to(torch.uint8),
        }
        for each in labels
    ]


def detect(model: nn.Module, pixel_values: Tensor, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model.eval()(pixel_values, **kwargs)


def assert_equal_losses(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert_same(ours, {f"loss_{name.removeprefix('loss_')}": loss.detach() for name, loss in theirs.items()})


# Equal to torchvision


@pytest.fixture
def pooled_from() -> dict[str, Any]:
    """Feature maps at strides 2, 4 and 8, proposals, sizes and targets of two images."""
    labels = [objects(0), objects(1)]
    proposals = []
    for target in targets(labels):
        near = target["boxes"].repeat(8, 1) + 4 * torch.randn(8 * len(target["boxes"]), 4)
        corner = torch.rand(30, 2) * 40
        far = torch.cat([corner, corner + 4 + 20 * torch.rand(30, 2)], 1)
        proposals.append(clip_boxes_to_image(torch.cat([near, far]), (SIZE, SIZE)))
    return {
        "features": {str(i): torch.randn(2, 16, SIZE // s, SIZE // s) for i, s in enumerate((2, 4, 8))},
        "proposals": proposals,
        "sizes": [(SIZE, SIZE)] * 2,
        "targets": targets(labels),
    }


@pytest.mark.parametrize("masks", [False, True], ids=["", "masks"])
@pytest.mark.parametrize("class_agnostic", [False, True], ids=["", "class-agnostic"])
def test_a_cascade_of_one_stage_equals_torchvisions_heads(class_agnostic, masks, pooled_from):
    config = MaskRCNNConfig(backbone_config=swin(), **HEADS | {"masks": masks, "class_agnostic": class_agnostic})
    ours = perturbed(CascadeRoIHeads(config, [2, 4, 8]))
    levels = ["0", "1", "2"]
    mask_heads = {
        "mask_roi_pool": MultiScaleRoIAlign(levels, 14, 2),
        "mask_head": MaskRCNNHeads(16, [8] * 4, 1),
        "mask_predictor": MaskRCNNPredictor(8, 8, 4),
    }
    theirs = RoIHeads(
        MultiScaleRoIAlign(levels, 7, 2), TwoMLPHead(16 * 7 * 7, 32), FastRCNNPredictor(32, 4), 0.5, 0.5, 32, 0.25,
        None, 0.05, 0.5, 100, **mask_heads if masks else {},
    )  # fmt: skip
    weights = ours.stages[0].state_dict()
    if class_agnostic:
        for name in ("box_predictor.bbox_pred.weight", "box_predictor.bbox_pred.bias"):
            weights[name] = torch.cat([weights[name]] * 4)
    theirs.load_state_dict(weights)
    features, proposals, sizes = pooled_from["features"], pooled_from["proposals"], pooled_from["sizes"]
    torch.manual_seed(1)
    losses = ours.losses(features, proposals, sizes, pooled_from["targets"])
    torch.manual_seed(1)
    _, wanted = theirs.train()(features, proposals, sizes, pooled_from["targets"])
    assert losses.keys() == {"loss_classifier", "loss_box_reg"} | ({"loss_mask"} if masks else set())
    assert_same(losses, wanted)
    with torch.no_grad():
        found = ours.detections(features, proposals, sizes)
        wanted, _ = theirs.eval()(features, proposals, sizes)
    for left, right in zip(found, wanted, strict=True):
        assert len(left["scores"]) > 10
        if masks:
            right["masks"] = right["masks"].squeeze(1)
        assert_same(left, right)


class Body(nn.Module):
    """Backbone and pyramid of a detector, as torchvision wants them."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.parts = (detector.backbone, detector.pyramid)
        self.out_channels = detector.config.fpn_channels
        self.strides = map_strides(detector.config)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        backbone, pyramid = self.parts
        return pyramid({str(i): level for i, level in enumerate(feature_maps(backbone, x, self.strides))})


UNCHANGED = {"min_size": SIZE, "max_size": SIZE, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}


@pytest.mark.parametrize("masks", [False, True], ids=["", "masks"])
def test_mask_rcnn_equals_torchvisions_whole_model(masks):
    ours = perturbed(mask_rcnn(masks=masks)).eval()
    pools = {"box_roi_pool": MultiScaleRoIAlign(["0", "1", "2"], 7, 2)}
    if masks:
        pools |= {
            "mask_roi_pool": MultiScaleRoIAlign(["0", "1", "2"], 14, 2),
            "mask_head": MaskRCNNHeads(16, [8] * 4, 1),
            "mask_predictor": MaskRCNNPredictor(8, 8, 4),
        }
    theirs = (torchvision_models.MaskRCNN if masks else torchvision_models.FasterRCNN)(
        Body(ours), rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 4),
        box_head=TwoMLPHead(16 * 7 * 7, 32), box_predictor=FastRCNNPredictor(32, 4), rpn_post_nms_top_n_train=60,
        rpn_post_nms_top_n_test=30, rpn_batch_size_per_image=64, box_batch_size_per_image=32, **UNCHANGED, **pools,
    )  # fmt: skip
    theirs.transform.torch_choice = lambda sizes: sizes[0]  # draws no random number
    theirs.rpn.load_state_dict(ours.rpn.state_dict())
    theirs.roi_heads.load_state_dict(ours.roi_heads.stages[0].state_dict())
    inputs = batch()
    torch.manual_seed(1)
    losses = ours.train()(**inputs).loss_dict
    torch.manual_seed(1)
    assert_equal_losses(losses, theirs.train()(list(inputs["pixel_values"]), targets(inputs["labels"])))
    outputs = detect(ours, inputs["pixel_values"])
    with torch.no_grad():
        wanted = theirs.eval()(list(inputs["pixel_values"]))
    processor, sizes = DetectionImageProcessor(), [(SIZE, SIZE)] * 2
    found = (
        processor.post_process_instance_segmentation(outputs, 0, target_sizes=sizes)
        if masks
        else processor.post_process_object_detection(outputs, 0, target_sizes=sizes)
    )
    for left, right in zip(found, wanted, strict=True):
        assert len(left["scores"]) > 10
        right["labels"] -= 1
        if masks:
            right["masks"] = right["masks"].squeeze(1)
            assert (left["masks"] != (right["masks"] > 0.5)).float().mean() < 1e-4  # a pixel may be at 0.5
            left["masks"] = right["masks"]
        assert_same(left, right, rtol=1e-4, atol=1e-4)


def test_retinanet_equals_torchvisions_whole_model():
    ours = perturbed(retinanet(score_thresh=0.0)).eval()
    sizes = tuple(tuple(scale * stride for scale in ours.config.anchor_scales) for stride in (2, 4, 8, 16, 32))
    theirs = torchvision_models.RetinaNet(
        Body(ours),
        3,
        anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
        score_thresh=0.0,
        detections_per_img=100,
        **UNCHANGED,
    )
    theirs.head.load_state_dict(ours.dense_heads.head.state_dict())
    inputs = batch()
    wanted = theirs.train()(list(inputs["pixel_values"]), targets(inputs["labels"], background=0))
    assert_equal_losses(ours.train()(**inputs).loss_dict, wanted)
    outputs = detect(ours, inputs["pixel_values"])
    with torch.no_grad():
        wanted = theirs.eval()(list(inputs["pixel_values"]))
    found = DetectionImageProcessor().post_process_object_detection(outputs, 0, [(SIZE, SIZE)] * 2)
    for left, right in zip(found, wanted, strict=True):
        assert len(left["scores"]) > 10
        assert_same(left, right, rtol=1e-4, atol=1e-4)


# The cascade


def test_a_cascade_averages_the_stages_scores_and_masks_and_keeps_the_last_boxes(pooled_from):
    config = CascadeMaskRCNNConfig(
        backbone_config=swin(), **HEADS, score_thresh=0.0, nms_thresh=1.0, detections_per_img=1000
    )
    heads = perturbed(CascadeRoIHeads(config, [2, 4, 8])).eval()
    features = {name: level[:1] for name, level in pooled_from["features"].items()}
    boxes, size = pooled_from["proposals"][0], (SIZE, SIZE)
    probabilities = []
    with torch.no_grad():
        (found,) = heads.detections(features, [boxes], [size])
        for stage in heads.stages:
            logits, deltas = stage.box_predictor(stage.box_head(stage.box_roi_pool(features, [boxes], [size])))
            probabilities.append(logits.softmax(-1)[:, 1:])
            boxes = clip_boxes_to_image(stage.box_coder.decode(deltas, [boxes])[:, 1], size)
        scores, order = torch.stack(probabilities).mean(0).flatten().sort(descending=True)
        masks = [
            stage.mask_predictor(stage.mask_head(stage.mask_roi_pool(features, [found["boxes"]], [size]))).sigmoid()
            for stage in heads.stages
        ]
    torch.testing.assert_close(found["scores"], scores)
    torch.testing.assert_close(found["labels"], order % 3 + 1)
    torch.testing.assert_close(found["boxes"], boxes[order // 3])
    picked = torch.stack(masks).mean(0)[torch.arange(len(order)), found["labels"]]
    torch.testing.assert_close(found["masks"], picked)


def test_a_box_that_is_no_longer_agnostic_is_refined_as_its_most_likely_class(pooled_from):
    config = CascadeMaskRCNNConfig(backbone_config=swin(), **HEADS, class_agnostic=False)
    stage = CascadeRoIHeads(config, [2, 4, 8]).stages[0]
    proposals = [torch.tensor([[10.0, 10, 30, 30]] * 3)]
    logits = torch.eye(4)[1:] + torch.tensor([5.0, 0, 0, 0])  # background is the most likely of all, and no class
    deltas = torch.zeros(3, 4, 4)
    deltas[:, :, 0] = torch.tensor([0.0, 1, 2, 3])  # each class moves its box further
    (refined,) = roi._refine(stage, logits, deltas.flatten(1), proposals, [(SIZE, SIZE)])
    torch.testing.assert_close(refined[:, 0], 10 + 20 * torch.tensor([1.0, 2, 3]) / 10)


def test_masks_of_each_stage_are_those_of_the_objects_that_it_matches(pooled_from, monkeypatch):
    heads = CascadeRoIHeads(CascadeMaskRCNNConfig(backbone_config=swin(), **HEADS), [2, 4, 8])
    for stage in heads.stages:
        nn.init.normal_(stage.box_predictor.bbox_pred.bias)
    seen = []
    loss = roi.maskrcnn_loss

    def spy(logits, boxes, masks, classes, indices):
        seen.append((boxes, indices))
        return loss(logits, boxes, masks, classes, indices)

    monkeypatch.setattr(roi, "maskrcnn_loss", spy)
    truth = pooled_from["targets"]
    heads.losses(pooled_from["features"], pooled_from["proposals"], [(SIZE, SIZE)] * 2, truth)
    for threshold, (boxes, indices) in zip((0.5, 0.6, 0.7), seen, strict=True):
        for each, chosen, target in zip(boxes, indices, truth, strict=True):
            overlap, nearest = box_iou(each, target["boxes"]).max(1)
            assert (overlap >= threshold).all()
            torch.testing.assert_close(chosen, nearest)
    assert len({len(torch.cat(boxes)) for boxes, _ in seen}) > 1, "the stages match alike, and this tests nothing"


def test_refined_boxes_stay_in_the_image(pooled_from):
    config = CascadeMaskRCNNConfig(backbone_config=swin(), **HEADS | {"masks": False})
    heads = CascadeRoIHeads(config, [2, 4, 8])
    seen = []
    heads.stages[0].box_roi_pool.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    for stage in heads.stages:
        nn.init.constant_(stage.box_predictor.bbox_pred.bias, 20.0)
    heads.detections(pooled_from["features"], pooled_from["proposals"], [(SIZE, SIZE - 10)] * 2)
    heads.losses(pooled_from["features"], pooled_from["proposals"], [(SIZE, SIZE - 10)] * 2, pooled_from["targets"])
    assert len(seen) == 6
    for boxes in (*seen[1], *seen[2], *seen[4], *seen[5]):
        assert boxes.min() >= 0 and boxes[:, 0::2].max() == SIZE - 10 and boxes[:, 1::2].max() == SIZE
        assert not boxes.requires_grad


def test_each_stage_of_a_cascade_asks_for_more_overlap_and_scales_boxes_by_its_own_weights(monkeypatch):
    config = CascadeMaskRCNNConfig(backbone_config=swin(), **HEADS | {"masks": False})
    heads = CascadeRoIHeads(config, [2, 4, 8])
    for stage in heads.stages:  # boxes stay where they are
        nn.init.zeros_(stage.box_predictor.bbox_pred.weight), nn.init.zeros_(stage.box_predictor.bbox_pred.bias)
    truth = torch.tensor([[0.0, 0.0, 40.0, 40.0]])
    proposals = torch.tensor([[0.0, 0.0, 40.0, 40 * overlap] for overlap in (0.55, 0.65, 0.75)])
    torch.testing.assert_close(box_iou(truth, proposals), torch.tensor([[0.55, 0.65, 0.75]]))
    seen = []

    def spy(logits, deltas, labels, regression):
        seen.append((labels[0].tolist(), regression[0]))
        return logits.sum(), deltas.sum()

    monkeypatch.setattr(roi, "fastrcnn_loss", spy)
    features = {str(i): torch.randn(1, 16, SIZE // s, SIZE // s) for i, s in enumerate((2, 4, 8))}
    for stage in heads.stages:
        stage.fg_bg_sampler.positive_fraction = 1.0
    heads.losses(features, [proposals], [(SIZE, SIZE)], [{"boxes": truth, "labels": torch.tensor([2])}])
    assert [labels for labels, _ in seen] == [[2, 2, 2, 2], [0, 2, 2, 2], [0, 0, 2, 2]]
    torch.testing.assert_close(seen[1][1], 2 * seen[0][1])
    torch.testing.assert_close(seen[2][1], 3 * seen[0][1])


def test_the_loss_of_a_cascade_weighs_its_stages():
    torch.manual_seed(0)
    plain = cascade(loss_weights=(1.0, 1.0, 1.0)).train()
    weighted = cascade(loss_weights=(1.0, 0.5, 0.25)).train()
    weighted.load_state_dict(plain.state_dict())
    inputs = batch()
    losses = []
    for model in (plain, weighted):
        torch.manual_seed(1)
        losses.append(model(**inputs).loss_dict)
    weights = {"1": 1.0, "2": 0.5, "3": 0.25}
    assert len(losses[0]) == 2 + 3 * 3
    expected = {name: loss * weights.get(name[-1], 1.0) for name, loss in losses[0].items()}
    assert_same(losses[1], expected)


# Pyramids


BACKBONES = {
    "swin": swin(),
    "swin-two-stages": swin(out_features=STAGES[1:]),
    "resnet": ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage1", "stage2"]
    ),
    "convnext": ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, out_features=["stage1", "stage2"]),
    "vit": ViTConfig(**PLAIN | {"patch_size": 16, "image_size": 32}),
    "dinov2": Dinov2Config(**PLAIN | {"patch_size": 14}, out_features=["stage3"]),
}
FINEST = {"swin": 2, "swin-two-stages": 4, "resnet": 4, "convnext": 4, "vit": 4, "dinov2": 3.5}


@pytest.mark.parametrize("channels", [8, 16])
@pytest.mark.parametrize("build", [retinanet, mask_rcnn])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_level_has_the_stride_that_its_anchors_have(name, build, channels):
    model = build(backbone_config=copy.deepcopy(BACKBONES[name]), fpn_channels=channels, num_labels=3).eval()
    extra = 2 if build is retinanet else 1
    strides = pyramid_strides(model.config, extra)
    assert strides[0] == FINEST[name] and strides == [strides[0] * 2**i for i in range(len(strides))]
    height, width = (112, 224) if name == "dinov2" else (128, 256)
    with torch.no_grad():
        levels = list(Body(model)(torch.randn(1, 3, height, width)).values())
    assert [tuple(level.shape) for level in levels] == [
        (1, channels, math.ceil(height / stride), math.ceil(width / stride)) for stride in strides
    ]


@pytest.mark.parametrize("size", [(50, 70), (33, 95)])
@pytest.mark.parametrize("name", BACKBONES)
@every_detector
def test_images_of_odd_sizes_are_detected_in_and_trained_on(build, name, size):
    model = build(backbone_config=copy.deepcopy(BACKBONES[name]), score_thresh=0.0)
    inputs = {"pixel_values": torch.randn(2, 3, *size), "labels": [objects(i, *size) for i in range(2)]}
    assert detect(model, inputs["pixel_values"]).pred_boxes.max() <= 1 + 1e-6
    assert model.train()(**inputs).loss.isfinite()


def test_anchors_are_laid_in_full_precision_whatever_the_maps_have():
    anchors = PyramidAnchors([8.0, 16.0], [4], [0.5, 1.0])
    images = ImageList(torch.zeros(1, 3, 16, 2000), [(16, 2000)])
    full, half = (
        anchors(images, [torch.zeros(1, 1, 2, 250, dtype=dtype), torch.zeros(1, 1, 1, 125, dtype=dtype)])[0]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32 and torch.equal(half, full)
    centres = (full[: 2 * 250 * 2 : 2, 0] + full[: 2 * 250 * 2 : 2, 2]) / 2
    assert centres.max() == 1992 and len(centres.unique()) == 250


@every_detector
def test_bf16_autocast_follows_fp32_also_beyond_pixel_1000(build):
    model = perturbed(build(score_thresh=0.0)).train()
    width = 1344
    inputs = {"pixel_values": torch.randn(1, 3, 32, width), "labels": [objects(0, 32, width)]}
    losses = {}
    for half in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses[half] = model(**inputs).loss_dict
    assert all(loss.dtype == torch.float32 for loss in losses[True].values())
    assert_same(losses[True], losses[False], rtol=0.1, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = detect(model, inputs["pixel_values"])
    assert outputs.scores.dtype == outputs.pred_boxes.dtype == torch.float32
    corners = box_convert(outputs.pred_boxes, "cxcywh", "xyxy")[..., 0] * width
    far = corners[corners > 1000]
    assert len(far) and (far != far.bfloat16().float()).any()  # no multiples of 8


# Losses and detections


@every_detector
def test_there_is_a_loss_in_either_mode_and_there_are_detections_in_eval_mode_only(build):
    model, inputs = build().train(), batch()
    outputs = model(**inputs)
    assert outputs.loss.requires_grad and outputs.scores is outputs.pred_boxes is outputs.pred_masks is None
    torch.testing.assert_close(outputs.loss.detach(), torch.stack(list(outputs.loss_dict.values())).sum())
    torch.manual_seed(1)
    trained = model(**inputs).loss_dict
    torch.manual_seed(1)
    outputs = model.eval()(**inputs)
    assert_same(outputs.loss_dict, trained)
    assert len(outputs.scores) == len(outputs.labels) == len(outputs.pred_boxes) == 2
    assert not outputs.scores.requires_grad
    assert (outputs.pred_masks is None) == (build is retinanet)
    without = model(inputs["pixel_values"])
    assert without.loss is without.loss_dict is None
    torch.testing.assert_close(without.scores, outputs.scores)


@every_detector
def test_images_without_objects_give_a_finite_loss_and_gradients(build):
    model = build().train()
    pixels = torch.randn(2, 3, SIZE, SIZE)
    for labels in ([nothing()], [nothing(), nothing()], [nothing(), objects(1)], [objects(0)]):
        model.zero_grad()
        loss = model(pixels[: len(labels)], labels=labels).loss
        loss.backward()
        assert loss.isfinite()
        gradients = {name: p.grad for name, p in model.named_parameters() if "swin.layernorm" not in name}
        assert not [name for name, gradient in gradients.items() if gradient is None]
        assert all(gradient.isfinite().all() for gradient in gradients.values())


@every_detector
def test_an_image_in_which_nothing_is_found_gives_empty_detections(build):
    model = build(score_thresh=0.99999)
    outputs = detect(model, torch.randn(2, 3, SIZE, SIZE))
    assert outputs.scores.shape == outputs.labels.shape == (2, 0) and outputs.pred_boxes.shape == (2, 0, 4)
    (found, _) = DetectionImageProcessor().post_process_object_detection(outputs, target_sizes=[(5, 7)] * 2)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "scores": (0,), "labels": (0,), "boxes": (0, 4),
    }  # fmt: skip
    if build is not retinanet:
        (found, _) = DetectionImageProcessor().post_process_instance_segmentation(outputs, target_sizes=[(5, 7)] * 2)
        assert found["masks"].shape == (0, 5, 7) and found["masks"].dtype == torch.bool


@every_detector
def test_boxes_are_shares_of_the_image_without_its_padding_and_are_clipped_there(build):
    model = perturbed(build(score_thresh=0.0))
    pixels, mask = torch.randn(2, 3, SIZE, SIZE), torch.ones(2, SIZE, SIZE)
    pixels[1, :, 40:], pixels[1, :, :, 52:], mask[1, 40:], mask[1, :, 52:] = 0, 0, 0, 0
    outputs = detect(model, pixels, pixel_mask=mask)
    whole = detect(model, pixels)
    first = outputs.labels[0] >= 0
    torch.testing.assert_close(outputs.pred_boxes[0][first], whole.pred_boxes[0][whole.labels[0] >= 0])
    boxes = box_convert(outputs.pred_boxes[1][outputs.labels[1] >= 0], "cxcywh", "xyxy")
    assert boxes.min() > -1e-6 and 1 - 1e-6 < boxes.max() < 1 + 1e-6
    beyond = box_convert(whole.pred_boxes[1][whole.labels[1] >= 0], "cxcywh", "xyxy") * SIZE
    assert (beyond[:, 2:] > torch.tensor([52, 40])).any(), "without the mask they reach into the padding"
    (_, found) = DetectionImageProcessor().post_process_object_detection(outputs, 0, [(SIZE, SIZE), (40, 52)])
    assert found["boxes"][:, 0::2].max().item() == pytest.approx(52, abs=1e-3)
    assert found["boxes"][:, 1::2].max().item() < 40 + 1e-3


# Learning


COLORS = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])


def pictures(count: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Two rectangles on noise in each picture, side by side; their classes are their colours."""
    generator = torch.Generator().manual_seed(0)
    pixels, labels = 0.2 * torch.randn(count, 3, SIZE, SIZE, generator=generator), []
    for picture in pixels:
        masks, corners = torch.zeros(2, SIZE, SIZE), []
        for label in range(2):
            width, height = torch.randint(20, 33, (2,), generator=generator).tolist()
            x = 32 * label + int(torch.randint(33 - width, (), generator=generator))
            y = int(torch.randint(SIZE + 1 - height, (), generator=generator))
            masks[label, y : y + height, x : x + width] = 1
            picture[:, y : y + height, x : x + width] = COLORS[label][:, None, None]
            corners.append([x, y, x + width, y + height])
        boxes = box_convert(torch.tensor(corners) / SIZE, "xyxy", "cxcywh")
        labels.append({"class_labels": torch.tensor([0, 1]), "boxes": boxes, "masks": masks})
    return pixels, labels


def score(found: list[Detections], labels: list[dict[str, Tensor]], masks: bool = True) -> dict[str, Any]:
    """COCO's scores of what was found in pictures."""
    truth = []
    for i, label in enumerate(labels):
        boxes = box_convert(label["boxes"], "cxcywh", "xyxy").double().numpy() * SIZE
        areas, none = label["masks"].sum((1, 2)).double().numpy(), np.zeros(len(boxes), dtype=bool)
        encoded = encode_masks(label["masks"].bool())
        truth.append(Objects(i, (SIZE, SIZE), boxes, label["class_labels"].numpy(), areas, none, none, encoded))
    return coco_scores(found, truth, 2, masks)


def learn(model: nn.Module, inputs: dict[str, Any], steps: int, lr: float) -> list[float]:
    """Train on one batch, and return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step()
        losses.append(loss.item())
    return losses


FEW = {
    "box_head_dim": 64, "mask_dim": 16, "anchor_scales": [4, 8], "rpn_pre_nms_top_n_train": 100,
    "rpn_post_nms_top_n_train": 100, "box_positive_fraction": 0.5,
}  # fmt: skip
LEARNERS = {
    "retinanet": (retinanet, 100, 3e-3, {"fpn_channels": 48, "anchor_scales": [4, 6]}),
    "mask_rcnn": (mask_rcnn, 180, 6e-3, FEW | {"fpn_channels": 32, "box_batch_size_per_image": 32}),
    "cascade": (cascade, 200, 6e-3, FEW | {"fpn_channels": 24, "box_batch_size_per_image": 12}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_a_detector_that_e3va_trains_learns_pictures_by_heart_and_finds_them_in_padding_too(name):
    build, steps, lr, options = LEARNERS[name]
    backbone = swin(embed_dim=16, out_features=STAGES[1:])
    base = build(backbone_config=backbone, num_labels=2, aspect_ratios=[1.0], **options)
    model = get_peft_model(base, E3VAConfig(r=8)).train()
    pixels, labels = pictures(2)
    losses = learn(model, {"pixel_values": pixels, "labels": labels}, steps, lr)
    assert losses[-1] < losses[0] / 2
    for right, below, least in ((0, 0, 0.9), (20, 8, 0.6)):  # in padding a box is found as well, not as exactly
        padded, mask = (nn.functional.pad(x, (0, right, 0, below)) for x in (pixels, torch.ones_like(pixels[:, 0])))
        outputs = detect(model, pixel_values=padded, pixel_mask=mask)
        found = detections(outputs, DetectionImageProcessor(), [(SIZE, SIZE)] * len(labels), threshold=0.05)
        scores = score(found, labels, masks=name != "retinanet")
        assert scores["box_ap"] > least and scores["box_ap50"] > 0.95
        assert name == "retinanet" or (scores["mask_ap"] > least and scores["mask_ap50"] > 0.95)


@pytest.mark.slow
def test_mask2former_that_e3va_trains_learns_pictures_by_heart():
    backbone = swin(embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 2, 2], out_features=[*STAGES, "stage4"])
    config = mask2former.new_config(backbone, "swin")
    small = {
        "num_labels": 2, "feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32,
        "encoder_layers": 1, "decoder_layers": 3, "num_attention_heads": 4, "dim_feedforward": 64, "num_queries": 6,
        "train_num_points": 256, "dropout": 0.0,
    }  # fmt: skip
    for name, value in small.items():
        setattr(config, name, value)
    model = get_peft_model(Mask2FormerForUniversalSegmentation(config), E3VAConfig(r=8)).train()
    pixels, labels = pictures(2)
    kinds = {"mask_labels": [each["masks"].float() for each in labels],
             "class_labels": [each["class_labels"] for each in labels]}  # fmt: skip
    losses = learn(model, {"pixel_values": pixels} | kinds, steps=110, lr=3e-3)
    assert losses[-1] < losses[0] / 2
    processor = Mask2FormerImageProcessor()
    scores = score(detections(detect(model, pixels), processor, [(SIZE, SIZE)] * len(labels)), labels)
    assert scores["mask_ap"] > 0.9 and scores["box_ap50"] > 0.95


# Refusals


def refused(model: Detector, match: str, **changes: Any) -> None:
    inputs = batch() | changes
    with pytest.raises(ValueError, match=match):
        model(**inputs)


def relabelled(**fields: Any) -> list[dict[str, Tensor]]:
    """Labels of two images; fields of the second are other ones, or missing where None is given."""
    changed = {name: value for name, value in (objects(1) | fields).items() if value is not None}
    return [objects(0), changed]


@every_detector
def test_wrong_labels_are_refused_with_place_and_remedy(build):
    model = build().train()
    refused(model, r"labels=None.*model\.eval\(\)", labels=None)
    refused(model, r"labels: .*1 .*2 ", labels=[objects(0)])
    refused(model, r"labels\[1\]: .*class_labels.*\['boxes', 'masks'\]", labels=relabelled(class_labels=None))
    refused(model, r"labels\[1\]: .*boxes", labels=relabelled(boxes=None))
    refused(model, r"labels\[1\]\['boxes'\]: .*30", labels=relabelled(boxes=objects(1)["boxes"] * 0 + 30))
    refused(model, r"labels\[1\]\['boxes'\]: .*\(2, 4\).*\(3, 4\)", labels=relabelled(boxes=torch.ones(2, 4)))
    refused(model, "0 to 3.*0 to 2",
            labels=relabelled(class_labels=torch.tensor([0, 3, 1])))  # fmt: skip
    refused(model, "-1 to 2", labels=relabelled(class_labels=torch.tensor([0, -1, 2])))
    if build is retinanet:
        assert model(**batch() | {"labels": relabelled(masks=None)}).loss.isfinite()
    else:
        refused(model, r"labels\[1\]: .*masks.*RCNN", labels=relabelled(masks=None))
        refused(model, r"labels\[1\]\['masks'\]: .*\(3, 32, 32\).*\(3, 64, 64\)",
                labels=relabelled(masks=torch.ones(3, 32, 32)))  # fmt: skip


def test_a_model_without_masks_needs_none():
    model = mask_rcnn(masks=False).train()
    assert "loss_mask" not in model(**batch() | {"labels": relabelled(masks=None)}).loss_dict


@pytest.mark.parametrize("field", ["iou_thresholds", "box_weights", "loss_weights"])
def test_stages_that_are_named_unequally_often_are_refused(field):
    with pytest.raises(StrictDataclassClassValidationError, match=f"{field}="):
        CascadeMaskRCNNConfig(backbone_config=swin(), **{field: [0.5, 0.6]})
    with pytest.raises(StrictDataclassClassValidationError, match="iou_thresholds="):
        CascadeMaskRCNNConfig(backbone_config=swin(), iou_thresholds=[], box_weights=[], loss_weights=[])


def test_a_backbone_of_unknown_stride_is_refused():
    with pytest.raises(ValueError, match=r"backbone_config=BertConfig: .*patch_size.*strides="):
        pyramid_strides(RetinaNetConfig(backbone_config=BertConfig()), 2)


def test_outputs_that_cannot_be_processed_are_refused():
    processor, model = DetectionImageProcessor(), mask_rcnn(masks=False)
    training = model.train()(**batch())
    for process in (processor.post_process_object_detection, processor.post_process_instance_segmentation):
        with pytest.raises(ValueError, match=r"outputs\.(scores|pred_masks)=None"):
            process(training, target_sizes=[(5, 5)] * 2)
    outputs = detect(model, batch()["pixel_values"])
    with pytest.raises(ValueError, match=r"outputs\.pred_masks=None.*post_process_object_detection"):
        processor.post_process_instance_segmentation(outputs, target_sizes=[(5, 5)] * 2)
    with pytest.raises(ValueError, match=r"target_sizes: .*1.*2"):
        processor.post_process_object_detection(outputs, target_sizes=[(5, 5)])
    with_masks = detect(mask_rcnn(), batch()["pixel_values"])
    with pytest.raises(ValueError, match="target_sizes=None"):
        processor.post_process_instance_segmentation(with_masks)


# The image processor


def photo(height: int = 60, width: int = 40) -> tuple[Image.Image, dict[str, Any]]:
    """A picture with two objects, annotated as in COCO: a rectangle and a triangle."""
    polygons = [[4, 6, 24, 6, 24, 36, 4, 36], [20, 50, 36, 50, 36, 30]]
    annotations = [
        {"id": i, "image_id": 7, "category_id": i, "bbox": box, "area": 1.0, "iscrowd": 0, "segmentation": [polygon]}
        for i, (box, polygon) in enumerate(zip([[4, 6, 20, 30], [20, 30, 16, 20]], polygons, strict=True))
    ]
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels), {"image_id": 7, "annotations": annotations}


def processor_of(size: int = 48) -> DetectionImageProcessor:
    return DetectionImageProcessor(size={"shortest_edge": size, "longest_edge": 2 * size})


def test_an_image_without_objects_and_one_with_a_crowd_become_labels():
    image, annotation = photo()
    crowd = copy.deepcopy(annotation)
    crowd["annotations"][0]["iscrowd"] = 1
    nothing = annotation | {"annotations": []}
    encoded = processor_of()(
        images=[image] * 2, annotations=[crowd, nothing], return_segmentation_masks=True, return_tensors="pt"
    )
    some, none = encoded["labels"]
    assert some["class_labels"].tolist() == [annotation["annotations"][1]["category_id"]]
    assert len(some["masks"]) == 1 and some["masks"].any()
    assert none["boxes"].shape == (0, 4) and none["masks"].shape == (0, *encoded["pixel_values"].shape[-2:])


@pytest.mark.parametrize("form", ["numbers", "text"])
def test_masks_may_be_run_lengths(form):
    image, annotation = photo()
    packed = copy.deepcopy(annotation)
    for item in packed["annotations"]:
        (found,) = rle.frPyObjects(item["segmentation"], 60, 40)
        flat = rle.decode(found).ravel(order="F")
        edges = np.flatnonzero(np.diff(np.r_[0, flat]))
        counts = np.diff(np.r_[0, edges, flat.size]).tolist() if form == "numbers" else found["counts"].decode()
        item["segmentation"] = {"size": [60, 40], "counts": counts}
    encoded = processor_of()(
        images=[image] * 2, annotations=[annotation, packed], return_segmentation_masks=True, return_tensors="pt"
    )
    drawn, run_lengths = (label["masks"] for label in encoded["labels"])
    assert drawn.any() and torch.equal(drawn, run_lengths)


@pytest.mark.parametrize("key", ["bbox", "category_id", "area"])
def test_an_annotation_without_what_it_takes_is_named(key):
    whole = {"bbox": [2, 1, 9, 9], "category_id": 0, "area": 81, "iscrowd": "0"}
    broken = whole | {key: None}
    crowd = broken | {"iscrowd": "True"}  # is not an object, and needs nothing
    images = np.zeros((20, 20, 3), dtype=np.uint8)
    labels = DetectionImageProcessor()(images, annotations={"image_id": 1, "annotations": [whole, crowd]})["labels"]
    assert len(labels[0]["class_labels"]) == 1
    with pytest.raises(ValueError, match=rf"annotations\[1\] .*{key}"):
        DetectionImageProcessor()(images, annotations={"image_id": 1, "annotations": [whole, broken]})


def test_a_box_outside_of_its_image_is_left_out_with_its_mask():
    image, annotation = photo()
    annotation["annotations"][0]["bbox"] = [50, 6, 20, 30]
    label = processor_of()(image, annotation, return_segmentation_masks=True, return_tensors="pt")["labels"][0]
    assert label["class_labels"].tolist() == [1] and len(label["masks"]) == 1
    assert label["masks"][0, 54, 40] and not label["masks"][0, 10, 10]  # the triangle


def labels_of(annotation: dict[str, Any]) -> dict[str, Tensor]:
    image, _ = photo()
    encoded = processor_of()(image, annotation, return_segmentation_masks=True, return_tensors="pt")
    return encoded["labels"][0]


def test_a_line_beside_a_polygon_adds_nothing_and_alone_covers_nothing():
    _, annotation = photo()
    alone = labels_of(annotation)["masks"]
    for item in annotation["annotations"]:
        item["segmentation"] = [[], [1, 2, 30, 40], *item["segmentation"]]
    assert torch.equal(labels_of(annotation)["masks"], alone)
    annotation["annotations"][0]["segmentation"] = [[1, 2, 30, 40]]
    assert labels_of(annotation)["masks"].flatten(1).any(1).tolist() == [False, True]


@pytest.mark.parametrize("left", [33.0, 20.3])  # in float32 without width, and of a width that rounding loses
def test_a_sliver_of_a_box_takes_its_mask_along(left):
    _, annotation = photo()
    annotation["annotations"][0]["bbox"] = [left, 2, 1e-6, 10]
    label = labels_of(annotation)
    assert len(label["boxes"]) == len(label["masks"]) == 1


@pytest.mark.parametrize(
    ("segmentation", "match"),
    [
        (None, "segmentation"),
        ([[1, 2, 3]], "polygon.* 3 "),
        ({"size": [30, 20], "counts": [600]}, r"RLE.*\[30, 20\].*\[60, 40\]"),
        ({"size": [60, 40], "counts": "no"}, "RLE"),
    ],
    ids=["none", "odd", "size", "broken"],
)
def test_a_segmentation_that_cannot_be_right_is_refused_by_the_box_of_its_object(segmentation, match):
    _, annotation = photo()
    annotation["annotations"][1]["segmentation"] = segmentation
    with pytest.raises(ValueError, match=r"bbox \[20, 30, 16, 20\] .*" + match):
        labels_of(annotation)


@every_detector
def test_coco_annotations_become_labels_that_a_detector_takes(build):
    image, annotation = photo()
    wide, other = photo(40, 60)
    other["annotations"].pop()
    encoded = processor_of()(
        images=[image, wide], annotations=[annotation, other], return_segmentation_masks=True,
        return_tensors="pt",
    )  # fmt: skip
    assert encoded["pixel_values"].shape == (2, 3, 72, 72)
    assert encoded["pixel_mask"].sum((1, 2)).tolist() == [72 * 48, 48 * 72]
    label = encoded["labels"][0]
    corners = box_convert(label["boxes"], "cxcywh", "xyxy") * 72  # shares of the padded image
    wanted = 1.2 * torch.tensor([[4.0, 6.0, 24.0, 36.0], [20.0, 30.0, 36.0, 50.0]])
    torch.testing.assert_close(corners, wanted, rtol=0, atol=1e-3)
    inside = label["masks"][0, round(1.2 * 6) + 1 : round(1.2 * 36) - 1, round(1.2 * 4) + 1 : round(1.2 * 24) - 1]
    assert inside.all() and label["masks"][0].sum() < 1.1 * 1.44 * 600
    outputs = build().eval()(**encoded)
    assert outputs.loss.isfinite()


def test_masks_are_pasted_where_their_boxes_are_and_boxes_come_back_at_the_images_size():
    outputs = detect(mask_rcnn(num_labels=2), torch.randn(1, 3, SIZE, SIZE))
    outputs.scores = torch.tensor([[0.9, 0.8, 0.0]])
    outputs.labels = torch.tensor([[1, 0, -1]])
    outputs.pred_boxes = torch.tensor([[[0.5, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]])
    outputs.pred_masks = torch.ones(1, 3, 28, 28)
    outputs.pred_masks[0, 1, :, :14] = 0
    for sizes in ([(40, 80)], torch.tensor([[40, 80]])):
        (found,) = DetectionImageProcessor().post_process_instance_segmentation(outputs, target_sizes=sizes)
        assert found["labels"].tolist() == [1, 0]
        assert found["boxes"].tolist() == [[20, 0, 60, 20], [40, 20, 80, 40]]
        wanted = torch.zeros(2, 40, 80, dtype=torch.bool)
        wanted[0, :20, 20:60], wanted[1, 20:, 60:] = True, True
        overlap = (found["masks"] & wanted).sum((1, 2)) / (found["masks"] | wanted).sum((1, 2))
        assert (overlap > 0.9).all()  # edges are interpolated
    (shares,) = DetectionImageProcessor().post_process_object_detection(outputs, threshold=0.85)
    torch.testing.assert_close(shares["boxes"], torch.tensor([[0.25, 0.0, 0.75, 0.5]]))


@every_detector
def test_a_folder_makes_a_pipeline(build, tmp_path):
    perturbed(build(score_thresh=0.0, id2label={0: "cat", 1: "dog", 2: "owl"})).save_pretrained(tmp_path)
    processor_of().save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is DetectionImageProcessor and processor.size["shortest_edge"] == 48
    model = AutoModelForObjectDetection.from_pretrained(tmp_path)
    image, _ = photo()
    found = pipeline("object-detection", model=model, image_processor=processor)(image, threshold=0.001)
    assert found and {each["label"] for each in found} <= {"cat", "dog", "owl"}
    assert all(0 <= each["box"]["xmin"] <= each["box"]["xmax"] <= 40 for each in found)
    assert all(0 <= each["box"]["ymin"] <= each["box"]["ymax"] <= 60 for each in found)


# Through the disk


@every_detector
def test_a_detector_comes_back_from_the_disk_equal_to_the_bit(build, tmp_path):
    model, inputs = perturbed(build(score_thresh=0.0)).eval(), batch()
    model.save_pretrained(tmp_path)
    kinds = [type(model), AutoModelForObjectDetection] + [AutoModelForInstanceSegmentation] * (build is not retinanet)
    for kind in kinds:
        again = kind.from_pretrained(tmp_path)
        assert type(again) is type(model) and not again.training
        assert_same(again.state_dict(), model.state_dict(), rtol=0, atol=0)
        left, right = detect(again, inputs["pixel_values"]), detect(model, inputs["pixel_values"])
        assert_same(dict(left.items()), dict(right.items()), rtol=0, atol=0)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config) and config.backbone_config.model_type == "swin"
    assert (config.fpn_channels, config.num_labels, config.score_thresh) == (16, 3, 0.0)


@every_detector
def test_another_number_of_classes_begins_as_a_fresh_model_does(build, tmp_path):
    model = perturbed(build())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    fresh, new = build(num_labels=5).state_dict(), again.state_dict()
    kept = {name for name, value in model.state_dict().items() if value.shape == fresh[name].shape}
    assert all(torch.equal(new[name], model.state_dict()[name]) for name in kept)
    renewed = fresh.keys() - kept
    assert renewed and all("cls" in name or "bbox_pred" in name or "mask_fcn_logits" in name for name in renewed)
    for name in renewed:
        if name.endswith("weight"):
            assert 0.6 < new[name].std() / fresh[name].std() < 1.6, name
        elif "dense_heads" not in name:
            assert new[name].abs().max() <= (0 if "mask" in name else 1 / math.sqrt(32)), name
    if build is retinanet:
        bias = new["dense_heads.head.classification_head.cls_logits.bias"]
        torch.testing.assert_close(bias, torch.full_like(bias, -math.log(99)))


@pytest.mark.parametrize("channels", [16, 256])
def test_heads_begin_with_outputs_of_one_size_whatever_their_width(channels):
    rpn = mask_rcnn(fpn_channels=channels).rpn.head.conv[0][0].weight
    tower = retinanet(fpn_channels=channels).dense_heads.head.regression_head.conv[0][0].weight
    for weight in (rpn, tower):
        assert weight.std().item() == pytest.approx(0.01 * (256 / channels) ** 0.5, rel=0.1)  # torchvision's for 256


@every_detector
def test_a_detector_that_finds_only_a_backbone_on_the_disk_begins_as_a_fresh_model_does(build, tmp_path):
    fresh = build()
    trimmed = {name: value for name, value in fresh.state_dict().items() if name.startswith("backbone.")}
    fresh.save_pretrained(tmp_path, state_dict=trimmed)
    torch.manual_seed(5)
    again = type(fresh).from_pretrained(tmp_path)
    for name, value in fresh.state_dict().items():
        got = again.state_dict()[name]
        if name in trimmed:
            assert torch.equal(got, value)
        elif value.numel() > 100:
            torch.testing.assert_close(got.std(), value.std(), rtol=0.2, atol=1e-6, msg=name)
        elif "box_" not in name and name.endswith("bias"):
            torch.testing.assert_close(got, value, rtol=0, atol=0, msg=name)


@every_detector
@pytest.mark.parametrize(
    "box", [[0.5, 0.5, 0, 0.2], [0.5, 0.5, -0.1, 0.2], [float("nan"), 0.5, 0.1, 0.1], [-3, -3, 0.1, 0.1]]
)
def test_a_box_without_area_is_refused_and_makes_no_loss_of_infinity(build, box):
    inputs = batch()
    inputs["labels"][1]["boxes"][1] = torch.tensor(box)
    with pytest.raises(ValueError, match=r"labels\[1\]\['boxes'\]\[1\]"):
        build()(**inputs)


def test_evaluation_loss_leaves_the_mode_of_the_proposal_network_alone():
    model = mask_rcnn().eval()
    seen = []
    model.rpn.head.register_forward_hook(lambda *_: seen.append(model.rpn.training))
    assert model(**batch()).loss.isfinite()
    assert seen == [False, False]  # for the loss, and for what is found


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_the_processor_takes_images_that_are_not_rgb(mode):
    inputs = DetectionImageProcessor()(Image.new(mode, (40, 30)), return_tensors="pt")
    assert inputs["pixel_values"].shape[:2] == (1, 3)


# E3VA


def trained(base: Detector) -> PeftModel:
    model = get_peft_model(base, E3VAConfig(r=4, init_weights=False)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(**batch()).loss.backward()
    optimizer.step()
    return model.eval()


def assert_rebuilt(model: PeftModel, folder: Any) -> None:
    model.save_pretrained(folder)
    again, _ = e3va_peft.load_adapter(folder)
    assert again.state_dict().keys() == model.state_dict().keys()
    pixels = batch()["pixel_values"]
    left, right = detect(again, pixels), detect(model, pixels)
    assert len(left.scores[0]) > 10
    assert_same(dict(left.items()), dict(right.items()), rtol=0, atol=0)


@every_detector
def test_load_adapter_rebuilds_a_detector_that_was_saved(build, tmp_path):
    perturbed(build(score_thresh=0.0)).save_pretrained(tmp_path / "base")
    assert_rebuilt(trained(AutoModelForObjectDetection.from_pretrained(tmp_path / "base")), tmp_path / "adapter")


@every_detector
def test_load_adapter_rebuilds_a_detector_over_a_backbone_that_was_saved(build, tmp_path):
    SwinBackbone(swin()).save_pretrained(tmp_path / "swin")
    base = build(score_thresh=0.0)
    base.backbone = SwinBackbone.from_pretrained(tmp_path / "swin")
    model = trained(base)
    assert model.peft_config["default"].target_modules == ["backbone.swin.encoder"]
    assert_rebuilt(model, tmp_path / "adapter")


@every_detector
def test_load_adapter_rebuilds_a_detector_whose_backbone_is_a_plain_vit(build, tmp_path):
    config = ViTConfig(**PLAIN | {"patch_size": 16, "image_size": SIZE})
    ViTModel(config).save_pretrained(tmp_path / "vit")  # with a pooler, which a detector has not
    base = build(backbone_config=config, score_thresh=0.0)
    base.backbone = ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False)
    model = trained(base)
    assert model.peft_config["default"].target_modules == ["backbone"]
    assert_rebuilt(model, tmp_path / "adapter")


# The Trainer


class Pictures(Dataset):
    """Random images of two sizes."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(count, 3, 32, 32, generator=generator)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index], "labels": objects(index, 32, 32)}


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "pixel_values": torch.stack([each["pixel_values"] for each in examples]),
        "labels": [each["labels"] for each in examples],
    }


def trainer(build: Any, folder: Any, **kwargs: Any) -> Trainer:
    torch.manual_seed(0)
    arguments = TrainingArguments(
        folder, num_train_epochs=3, per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True, report_to="none",
        learning_rate=1e-3, logging_strategy="epoch", remove_unused_columns=False, **{"save_strategy": "no"} | kwargs,
    )  # fmt: skip
    model = get_peft_model(build(), E3VAConfig(r=4))
    return Trainer(model, arguments, train_dataset=Pictures(6), eval_dataset=Pictures(3), data_collator=collate)


@every_detector
def test_trainer_trains_evaluates_saves_and_resumes(build, tmp_path):
    whole = trainer(build, tmp_path / "whole")
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert math.isfinite(whole.evaluate()["eval_loss"])
    steps = {"save_strategy": "steps", "save_steps": 4}
    cut = trainer(build, tmp_path / "cut", **steps)
    cut.add_callback(StopAt(4))
    cut.train()
    resumed = trainer(build, tmp_path / "cut", **steps)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 9
    assert_same(resumed.model.state_dict(), whole.model.state_dict(), rtol=1e-6, atol=1e-7)


def test_strides_that_do_not_fit_the_feature_maps_are_refused():
    config = RetinaNetConfig(
        backbone_config=SwinConfig(**SWIN, out_features=["stage2", "stage3"]), fpn_channels=8, strides=[8, 16]
    )
    with pytest.raises(ValueError, match=r"strides=\[8.0, 16.0\]: .*\[\(16, 16\), \(8, 8\)\]"):
        RetinaNet(config).eval()(torch.randn(1, 3, 64, 64))
