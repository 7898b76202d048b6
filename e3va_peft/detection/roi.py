"""Regions of interest: one stage is Faster or Mask R-CNN, several are a cascade. The parts are torchvision's."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import clip_boxes_to_image

from e3va_peft.detection.pyramid import PyramidAnchors, PyramidRoIAlign, in_full_precision

_BOX, _MASK = 7, 14  # sides of what is pooled

Targets = Sequence[dict[str, Tensor]]
Sizes = list[tuple[int, int]]


class ProposalHead(RPNHead):
    """torchvision's, with scores and boxes in full precision."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return objectness and box deltas of each level."""
        objectness, deltas = super().forward(x)
        return [in_full_precision(level) for level in objectness], [in_full_precision(level) for level in deltas]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's, which has a loss whenever it is given targets, and not in training mode only."""

    def forward(
        self, images: Any, features: dict[str, Tensor], targets: Targets | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return proposals `(N, 4)` of each image, and losses where there are targets."""
        asked = copy.copy(self)  # not itself: another thread may be in the middle of it
        asked.training = targets is not None  # torchvision asks this flag alone; no module below has a mode
        return RegionProposalNetwork.forward(asked, images, features, targets)


def build_proposal_network(config: Any, strides: Sequence[float]) -> ProposalNetwork:
    """Build the proposal network over all levels of a pyramid.

    Args:
        config: Config of the detector.
        strides: Stride of each level.
    """
    anchors = PyramidAnchors(strides, config.anchor_scales, config.aspect_ratios)
    return ProposalNetwork(
        anchors,
        ProposalHead(config.fpn_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=config.rpn_fg_iou_thresh,
        bg_iou_thresh=config.rpn_bg_iou_thresh,
        batch_size_per_image=config.rpn_batch_size_per_image,
        positive_fraction=config.rpn_positive_fraction,
        pre_nms_top_n={"training": config.rpn_pre_nms_top_n_train, "testing": config.rpn_pre_nms_top_n_test},
        post_nms_top_n={"training": config.rpn_post_nms_top_n_train, "testing": config.rpn_post_nms_top_n_test},
        nms_thresh=config.rpn_nms_thresh,
    )


class BoxPredictor(FastRCNNPredictor):
    """torchvision's classes and boxes, in full precision; class-agnostic, one box is tiled over the classes.

    Args:
        in_channels: Width of the box head.
        num_classes: Number of classes, background included.
        class_agnostic: Whether all classes share a box.
    """

    def __init__(self, in_channels: int, num_classes: int, class_agnostic: bool) -> None:
        super().__init__(in_channels, num_classes)
        self.tiles = num_classes if class_agnostic else 1
        if class_agnostic:
            self.bbox_pred = nn.Linear(in_channels, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `(N, K + 1)` and box deltas `(N, 4 (K + 1))`."""
        logits, deltas = super().forward(x)
        return in_full_precision(logits), in_full_precision(deltas).repeat(1, self.tiles)


class MaskPredictor(MaskRCNNPredictor):
    """torchvision's, in full precision."""

    def forward(self, x: Tensor) -> Tensor:
        """Return mask logits `(N, K + 1, 28, 28)`."""
        return in_full_precision(super().forward(x))


class CascadeRoIHeads(nn.Module):
    """Box and mask heads in stages: each classifies and refines the boxes of the one before.

    In training, later stages match the refined boxes again and draw no new sample, as in detectron2's cascade. At test
    time the class probabilities of all stages are averaged, and so are those of their masks; the last stage's boxes
    count.

    Source: Cai and Vasconcelos, "Cascade R-CNN: High Quality Object Detection and Instance Segmentation".

    Args:
        config: `MaskRCNNConfig`.
        strides: Stride of each level that is pooled from.
    """

    def __init__(self, config: Any, strides: Sequence[float]) -> None:
        super().__init__()
        self.loss_weights = tuple(config.loss_weights)
        pool = PyramidRoIAlign(strides, _BOX)
        mask_pool = PyramidRoIAlign(strides, _MASK) if config.masks else None
        self.stages = nn.ModuleList(
            _stage(config, threshold, weights, pool, mask_pool)
            for threshold, weights in zip(config.iou_thresholds, config.box_weights, strict=True)
        )

    @property
    def _stages(self) -> list[RoIHeads]:
        return list(self.stages)

    def losses(
        self, features: dict[str, Tensor], proposals: list[Tensor], sizes: Sizes, targets: Targets
    ) -> dict[str, Tensor]:
        """Return the losses of all stages by name, weighted.

        Args:
            features: Levels of the pyramid that are pooled from.
            proposals: `(N, 4)` of each image.
            sizes: Height and width of each image.
            targets: `boxes` (n, 4), `labels` (n,) from 1, and where there are masks `masks` (n, H, W).
        """
        losses: dict[str, Tensor] = {}
        first = self._stages[0]
        proposals, matched, labels, regression = first.select_training_samples(list(proposals), targets)
        for i, (stage, weight) in enumerate(zip(self._stages, self.loss_weights, strict=True)):
            if i > 0:
                matched, labels, regression = _match(stage, proposals, targets)
            logits, deltas = _predict(stage, features, proposals, sizes)
            loss_classifier, loss_box = fastrcnn_loss(logits, deltas, labels, regression)
            found = {"loss_classifier": loss_classifier, "loss_box_reg": loss_box}
            if stage.has_mask():
                found["loss_mask"] = _mask_loss(stage, features, proposals, sizes, targets, matched, labels)
            suffix = f"_stage{i + 1}" if len(self.stages) > 1 else ""
            losses |= {f"{name}{suffix}": weight * loss for name, loss in found.items()}
            if i + 1 < len(self.stages):
                proposals = _refine(stage, logits, deltas, proposals, sizes)
        return losses

    def detections(
        self, features: dict[str, Tensor], proposals: list[Tensor], sizes: Sizes
    ) -> list[dict[str, Tensor]]:
        """Return `boxes`, `scores`, `labels` (from 1) and `masks` (n, 28, 28) of each image, the best first."""
        probabilities = []
        for stage in self._stages:
            logits, deltas = _predict(stage, features, proposals, sizes)
            probabilities.append(logits.softmax(-1))
            if stage is not self._stages[-1]:
                proposals = _refine(stage, logits, deltas, proposals, sizes)
        mean = torch.stack(probabilities).mean(0)
        # of logarithms its softmax gives the mean back
        boxes, scores, labels = stage.postprocess_detections(mean.log(), deltas, proposals, sizes)
        found = [
            {"boxes": box, "scores": score, "labels": label}
            for box, score, label in zip(boxes, scores, labels, strict=True)
        ]
        if stage.has_mask():
            for each, masks in zip(found, self._masks(features, boxes, labels, sizes), strict=True):
                each["masks"] = masks
        return found

    def _masks(
        self, features: dict[str, Tensor], boxes: list[Tensor], labels: list[Tensor], sizes: Sizes
    ) -> list[Tensor]:
        stages = [
            torch.cat(maskrcnn_inference(_mask_logits(stage, features, boxes, sizes), labels))
            for stage in self._stages
        ]
        mean = torch.stack(stages).mean(0).squeeze(1)
        return list(mean.split([len(found) for found in boxes]))


def _stage(config: Any, threshold: float, weights: Sequence[float], pool: nn.Module, mask_pool: Any) -> RoIHeads:
    channels, classes = config.fpn_channels, config.num_labels + 1
    masks: dict[str, Any] = {}
    if config.masks:
        masks = {
            "mask_roi_pool": mask_pool,
            "mask_head": MaskRCNNHeads(channels, [config.mask_dim] * 4, 1),
            "mask_predictor": MaskPredictor(config.mask_dim, config.mask_dim, classes),
        }
    return RoIHeads(
        pool,
        _box_head(config),
        BoxPredictor(config.box_head_dim, classes, config.class_agnostic),
        fg_iou_thresh=threshold,
        bg_iou_thresh=threshold,
        batch_size_per_image=config.box_batch_size_per_image,
        positive_fraction=config.box_positive_fraction,
        bbox_reg_weights=tuple(weights),
        score_thresh=config.score_thresh,
        nms_thresh=config.nms_thresh,
        detections_per_img=config.detections_per_img,
        **masks,
    )


def _box_head(config: Any) -> nn.Module:
    channels = config.fpn_channels
    if not config.box_head_convs:
        return TwoMLPHead(channels * _BOX * _BOX, config.box_head_dim)
    norm = partial(nn.GroupNorm, math.gcd(32, channels))  # of one image as of many
    convs = [channels] * config.box_head_convs
    return FastRCNNConvFCHead((channels, _BOX, _BOX), convs, [config.box_head_dim], norm)


def _predict(
    stage: RoIHeads, features: dict[str, Tensor], proposals: list[Tensor], sizes: Sizes
) -> tuple[Tensor, Tensor]:
    pooled = stage.box_roi_pool(features, proposals, sizes)
    return stage.box_predictor(stage.box_head(pooled))


def _match(
    stage: RoIHeads, proposals: list[Tensor], targets: Targets
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Match boxes with objects by a stage's own threshold."""
    objects = [target["boxes"] for target in targets]
    matched, labels = stage.assign_targets_to_proposals(proposals, objects, [target["labels"] for target in targets])
    some = [boxes if len(boxes) else boxes.new_zeros(1, 4) for boxes in objects]  # an image without objects
    wanted = [boxes[indices] for boxes, indices in zip(some, matched, strict=True)]
    return matched, labels, list(stage.box_coder.encode(wanted, proposals))


@torch.no_grad()
def _refine(stage: RoIHeads, logits: Tensor, deltas: Tensor, proposals: list[Tensor], sizes: Sizes) -> list[Tensor]:
    """Move each box by the deltas of its most likely class, and back into the image."""
    boxes = stage.box_coder.decode(deltas, proposals)  # (N, K + 1, 4)
    best = logits[:, 1:].argmax(1) + 1
    refined = boxes[torch.arange(len(boxes), device=boxes.device), best].split([len(each) for each in proposals])
    return [clip_boxes_to_image(each, size) for each, size in zip(refined, sizes, strict=True)]


def _mask_logits(stage: RoIHeads, features: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes) -> Tensor:
    return stage.mask_predictor(stage.mask_head(stage.mask_roi_pool(features, boxes, sizes)))


def _mask_loss(
    stage: RoIHeads,
    features: dict[str, Tensor],
    proposals: list[Tensor],
    sizes: Sizes,
    targets: Targets,
    matched: list[Tensor],
    labels: list[Tensor],
) -> Tensor:
    """Return the loss of the masks in those boxes that are of an object."""
    positive = [each > 0 for each in labels]
    boxes = [each[keep] for each, keep in zip(proposals, positive, strict=True)]
    indices = [each[keep] for each, keep in zip(matched, positive, strict=True)]
    logits = _mask_logits(stage, features, boxes, sizes)
    masks, classes = [target["masks"] for target in targets], [target["labels"] for target in targets]
    return maskrcnn_loss(logits, boxes, masks, classes, indices)
