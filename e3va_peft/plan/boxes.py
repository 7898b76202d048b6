"""A detector's training step at sizes that no image decides, so that it can run on tensors without values.

How many boxes a detector trains on depends on what it finds. Here it is the most that it samples, evenly over the
levels of the pyramid, a share of them of objects, in every image: a real step of a cascade may have more boxes of
objects in its later stages, and every other one has fewer boxes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import maskrcnn_loss
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import box_iou, roi_align, sigmoid_focal_loss

from e3va_peft.detection import Detector, RetinaNet
from e3va_peft.detection.modeling import DetectionOutput
from e3va_peft.detection.pyramid import in_full_precision

OBJECTS = 20  # in an image; one of COCO has 7 on average


def labels_of(batch_size: int, height: int, width: int, masks: bool) -> list[dict[str, Tensor]]:
    """Make labels as a detector takes them, on the device of the context."""
    label = {"class_labels": torch.zeros(OBJECTS, dtype=torch.long), "boxes": torch.zeros(OBJECTS, 4)}
    if masks:
        label["masks"] = torch.zeros(OBJECTS, height, width, dtype=torch.uint8)
    return [{name: tensor.clone() for name, tensor in label.items()} for _ in range(batch_size)]


def bound(model: nn.Module) -> None:
    """Give a detector in a model a forward that no value decides, within a `FakeTensorMode`."""
    for module in model.modules():
        if isinstance(module, Detector):
            module.forward = partial(_forward, module)
        if isinstance(module, AnchorGenerator):  # its anchors are neither parameters nor buffers
            module.cell_anchors = [torch.empty(anchors.shape) for anchors in module.cell_anchors]


def _forward(
    detector: Any, pixel_values: Tensor, labels: list[dict[str, Tensor]] | None = None, **kwargs: Any
) -> DetectionOutput:
    features = detector.features(pixel_values)
    if labels is None:
        return DetectionOutput()
    images = ImageList(pixel_values, [tuple(pixel_values.shape[-2:])] * len(pixel_values))
    losses = _dense(detector, images, features, labels) if isinstance(detector, RetinaNet) else _two_stage(
        detector, images, features, labels
    )  # fmt: skip
    return DetectionOutput(loss=torch.stack(losses).sum())


def _dense(detector: Any, images: Any, features: dict[str, Tensor], labels: list[dict[str, Tensor]]) -> list[Tensor]:
    levels, heads = list(features.values()), detector.dense_heads
    found = heads.head(levels)
    anchors = heads.anchor_generator(images, levels)
    losses = []
    outputs = zip(found["cls_logits"], found["bbox_regression"], anchors, labels, strict=True)
    for logits, deltas, places, label in outputs:
        box_iou(label["boxes"], places)
        every = torch.arange(len(logits))  # an index, as torchvision takes those that are not between its thresholds
        losses += [sigmoid_focal_loss(logits[every], torch.zeros_like(logits)[every], reduction="sum"), deltas.sum()]
    return losses


def _two_stage(
    detector: Any, images: Any, features: dict[str, Tensor], labels: list[dict[str, Tensor]]
) -> list[Tensor]:
    rpn, levels = detector.rpn, list(features.values())
    objectness, deltas = concat_box_prediction_layers(*rpn.head(levels))
    anchors = rpn.anchor_generator(images, levels)
    # What torchvision holds to the end of the matching: proposals, an image's overlaps till the next one's are there,
    # the object and the label of each anchor.
    held = [rpn.box_coder.decode(deltas.detach(), anchors), *(torch.zeros(len(places)) for places in anchors)]
    matched = []
    for places, label in zip(anchors, labels, strict=True):
        overlaps = box_iou(label["boxes"], places)
        matched.append(label["boxes"][torch.zeros(len(places), dtype=torch.long)])
    rpn.box_coder.encode(matched, anchors)
    del held, overlaps, matched
    losses = [objectness.sum(), deltas.sum()]
    for stage in detector.roi_heads.stages:
        sampler = stage.fg_bg_sampler
        count = sampler.batch_size_per_image * len(labels)
        logits, boxes = stage.box_predictor(stage.box_head(_pooled(stage.box_roi_pool, features, count)))
        losses += [F.cross_entropy(logits, torch.zeros(count, dtype=torch.long)), boxes.sum()]
        if stage.has_mask():
            count = int(sampler.batch_size_per_image * sampler.positive_fraction)
            pooled = _pooled(stage.mask_roi_pool, features, count * len(labels))
            every = [torch.zeros(count, dtype=torch.long)] * len(labels)
            losses.append(
                maskrcnn_loss(
                    stage.mask_predictor(stage.mask_head(pooled)),
                    [torch.zeros(count, 4)] * len(labels),
                    [label["masks"] for label in labels],
                    [label["class_labels"] for label in labels],
                    every,
                )
            )
    return losses


def _pooled(pool: Any, features: dict[str, Tensor], count: int) -> Tensor:
    """Pool `count` boxes, evenly over the levels, as `PyramidRoIAlign` does."""
    levels = [in_full_precision(features[name]) for name in pool.featmap_names]
    dtype = features[pool.featmap_names[0]].dtype
    result = torch.zeros(count, levels[0].shape[1], *pool.output_size, dtype=levels[0].dtype)
    for i, (level, scale) in enumerate(zip(levels, pool.scales, strict=True)):
        places = torch.arange(count * i // len(levels), count * (i + 1) // len(levels))
        rois = torch.zeros(len(places), 5)
        result[places] = roi_align(level, rois, pool.output_size, scale, pool.sampling_ratio)
    return result.to(dtype)
