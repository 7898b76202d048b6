"""Cascade Mask R-CNN, Mask R-CNN and RetinaNet as models of transformers: labels in, a loss out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, box_convert, clip_boxes_to_image, nms
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from e3va_peft.detection.config import CascadeMaskRCNNConfig, DetectorConfig, MaskRCNNConfig, RetinaNetConfig
from e3va_peft.detection.pyramid import (
    PyramidAnchors,
    backbone_channels,
    build_backbone,
    build_pyramid,
    check_strides,
    feature_maps,
    in_full_precision,
    is_plain,
    map_strides,
    pyramid_strides,
)
from e3va_peft.detection.roi import CascadeRoIHeads, build_proposal_network

_LARGEST = 1.5  # of a box in shares of its image: cropping and rounding leave it near 1
_PRIOR = 0.01  # probability of an object that RetinaNet begins with


@dataclass
class DetectionOutput(ModelOutput):
    """Output of a detector. Images of a batch find unequally many objects: D is the most, the rest is padding.

    Attributes:
        loss: Sum of the losses, where there are labels.
        loss_dict: The losses by name, without gradient.
        scores: `(B, D)`, 0 in padding, falling; None in training mode.
        labels: `(B, D)`, classes 0..K-1, -1 in padding.
        pred_boxes: `(B, D, 4)`: centre x, centre y, width, height, as shares of the image without its padding.
        pred_masks: `(B, D, 28, 28)`, probabilities within each box; None without masks.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    scores: Tensor | None = None
    labels: Tensor | None = None
    pred_boxes: Tensor | None = None
    pred_masks: Tensor | None = None


class Detector(PreTrainedModel):
    """A detector: a backbone of transformers, a feature pyramid, heads of torchvision's.

    Images come resized and normalised by `DetectionImageProcessor`, which also turns outputs into boxes and masks at
    the image's own size. There is no BatchNorm outside the backbone: a batch of one image is as good as any.
    """

    config_class = DetectorConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] = []  # noqa: RUF012  # transformers' own form
    _background = 0  # how many classes of the heads come before the first of ours

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.strides = map_strides(config)
        self.backbone = build_backbone(config.backbone_config)
        self._build_heads(config, backbone_channels(self.backbone))
        self.post_init()

    def _build_heads(self, config: Any, channels: list[int]) -> None:
        raise NotImplementedError

    def _losses(
        self, images: ImageList, features: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        raise NotImplementedError

    def _detections(self, images: ImageList, features: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        raise NotImplementedError

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: Sequence[Mapping[str, Tensor]] | None = None,
        **kwargs: Any,
    ) -> DetectionOutput:
        """Detect objects, or in training mode compute the loss alone.

        Args:
            pixel_values: `(B, 3, H, W)`, normalised, padded on the right and lower sides.
            pixel_mask: `(B, H, W)`, 1 where there is an image; None where nothing is padded.
            labels: For each image, as DETR's image processors give them: `class_labels` (n,), classes 0..K-1; `boxes`
                (n, 4), centre x, centre y, width, height as shares of H and W, padding included; and for a model with
                masks `masks` (n, H, W). n may be 0.
            kwargs: Ignored; what Trainer may add.

        Raises:
            ValueError: Labels are missing in training mode, or a field, a class or a shape of them is wrong.
        """
        images = ImageList(pixel_values, _image_sizes(pixel_values, pixel_mask))
        if labels is None and self.training:
            raise ValueError(
                "labels=None: a detector in training mode computes its loss alone, and needs labels. Pass labels, or "
                "call model.eval() to detect."
            )
        targets = None if labels is None else [self._target(i, label, pixel_values) for i, label in enumerate(labels)]
        if targets is not None and len(targets) != len(pixel_values):
            raise ValueError(f"labels: has {len(targets)} entries for {len(pixel_values)} images. Give one for each.")
        features = self.features(pixel_values)
        output = DetectionOutput()
        if targets is not None:
            losses = self._losses(images, features, targets)
            output.loss = torch.stack(list(losses.values())).sum()
            output.loss_dict = {name: loss.detach() for name, loss in losses.items()}
        if not self.training:
            with torch.no_grad():
                self._fill(output, self._detections(images, features), images.image_sizes)
        return output

    def features(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """`(B, 3, H, W)` -> the levels of the pyramid by name, the finest first."""
        maps = feature_maps(self.backbone, pixel_values, self.strides)
        check_strides(maps, self.strides, pixel_values.shape[-2:])
        levels: dict[str, Tensor] = self.pyramid({str(i): level for i, level in enumerate(maps)})
        return levels

    def _target(self, index: int, label: Mapping[str, Tensor], pixel_values: Tensor) -> dict[str, Tensor]:
        """Check an image's labels and turn them into torchvision's form."""
        needed = ["class_labels", "boxes"] + (["masks"] if getattr(self.config, "masks", False) else [])
        if missing := [name for name in needed if name not in label]:
            raise ValueError(
                f"labels[{index}]: has no {missing[0]}, only {sorted(label)}. A {type(self).__name__} needs it."
            )
        classes, boxes = label["class_labels"], label["boxes"]
        if boxes.shape != (len(classes), 4):
            raise ValueError(f"labels[{index}]['boxes']: has shape {tuple(boxes.shape)}, not ({len(classes)}, 4).")
        known = self.config.num_labels
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < known:
            raise ValueError(
                f"labels[{index}]['class_labels']: goes from {int(classes.min())} to {int(classes.max())}, the "
                f"model has the classes 0 to {known - 1}. Number classes from 0, without a background."
            )
        if len(boxes) and float(boxes.max()) > _LARGEST:
            raise ValueError(
                f"labels[{index}]['boxes']: go up to {float(boxes.max()):g}. They must be centre x and y, width and "
                "height as shares of pixel_values' width and height, 0 to 1, as DETR's."
            )
        height, width = pixel_values.shape[-2:]
        scale = torch.tensor([width, height, width, height], dtype=torch.float32, device=boxes.device)
        corners = box_convert(boxes.float(), "cxcywh", "xyxy") * scale
        seen = corners.clip(corners.new_zeros(4), scale)
        if wrong := (~(seen[:, 2:] > seen[:, :2]).all(1)).nonzero().flatten().tolist():  # also where it is nan
            raise ValueError(
                f"labels[{index}]['boxes'][{wrong[0]}]: is {boxes[wrong[0]].tolist()}, without area in its image. "
                "Its loss would be infinite or nan. Correct or drop it."
            )
        target = {"boxes": corners, "labels": classes.long() + self._background}
        if "masks" in needed:
            masks = label["masks"]
            if masks.shape != (len(classes), height, width):
                raise ValueError(
                    f"labels[{index}]['masks']: has shape {tuple(masks.shape)}, not {(len(classes), height, width)}, "
                    "one mask per object in the size of pixel_values."
                )
            target["masks"] = masks
        return target

    def _fill(
        self, output: DetectionOutput, found: Sequence[dict[str, Tensor]], sizes: Sequence[tuple[int, int]]
    ) -> None:
        """Write detections into the output, padded to equally many."""
        boxes = [
            box_convert(each["boxes"], "xyxy", "cxcywh") / each["boxes"].new_tensor([width, height, width, height])
            for each, (height, width) in zip(found, sizes, strict=True)
        ]
        output.scores = _pad([each["scores"] for each in found], 0)
        output.labels = _pad([each["labels"] - self._background for each in found], -1)
        output.pred_boxes = _pad(boxes, 0)
        if "masks" in found[0]:
            output.pred_masks = _pad([each["masks"] for each in found], 0)

    def is_custom_code(self) -> bool:
        """Be initialised as transformers' own models: else parts that hold layers, and no parameters, are left out."""
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a new part as torchvision does: also one that `from_pretrained` found no weights for."""
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.LayerNorm | nn.GroupNorm):
            module.reset_parameters()
        for kind, weigh in _INITIAL:
            if isinstance(module, kind):
                for layer in module.modules():
                    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                        weigh(layer.weight)
                        if layer.bias is not None:
                            nn.init.zeros_(layer.bias)
        if isinstance(
            module, MaskRCNNPredictor
        ):  # torchvision's own begin at +-16 with one class; this is detectron2's
            nn.init.normal_(module.mask_fcn_logits.weight, std=0.001)
        if isinstance(module, RetinaNetHead):
            nn.init.constant_(module.classification_head.cls_logits.bias, -math.log((1 - _PRIOR) / _PRIOR))


def _small(weight: Tensor) -> None:
    nn.init.normal_(weight, std=0.01 * math.sqrt(256 / weight.shape[1]))  # torchvision's 0.01 is for 256 channels


def _uniform(weight: Tensor) -> None:
    nn.init.kaiming_uniform_(weight, a=1)


def _normal(weight: Tensor) -> None:
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


_INITIAL = (
    ((RPNHead, RetinaNetHead), _small),
    (FeaturePyramidNetwork, _uniform),
    ((MaskRCNNHeads, MaskRCNNPredictor, FastRCNNConvFCHead), _normal),
)


class MaskRCNN(Detector):
    """Mask R-CNN; without masks Faster R-CNN, with several stages a cascade.

    Source: He et al., "Mask R-CNN". Heads and losses are torchvision's.
    """

    config_class = MaskRCNNConfig
    _background = 1

    def _build_heads(self, config: Any, channels: list[int]) -> None:
        strides = pyramid_strides(config, extra=1)
        self.pyramid = build_pyramid(config, channels, LastLevelMaxPool())
        self.rpn = build_proposal_network(config, strides)
        self.roi_heads = CascadeRoIHeads(config, strides[:-1])

    def _losses(
        self, images: ImageList, features: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        proposals, losses = self.rpn(images, features, targets)
        return losses | self.roi_heads.losses(features, proposals, images.image_sizes, targets)

    def _detections(self, images: ImageList, features: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        proposals, _ = self.rpn(images, features)
        return self.roi_heads.detections(features, proposals, images.image_sizes)


class CascadeMaskRCNN(MaskRCNN):
    """Cascade Mask R-CNN: three stages, each asking for more overlap; without masks Cascade R-CNN.

    Source: Cai and Vasconcelos, "Cascade R-CNN: High Quality Object Detection and Instance Segmentation".
    """

    config_class = CascadeMaskRCNNConfig


class _Head(RetinaNetHead):
    """torchvision's, with scores and boxes in full precision."""

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {name: in_full_precision(value) for name, value in super().forward(x).items()}


class _DenseHeads(TorchvisionRetinaNet):
    """torchvision's RetinaNet behind its pyramid: anchors, head, losses, non-maximum suppression."""

    def __init__(self, config: Any, strides: Sequence[float]) -> None:
        anchors = PyramidAnchors(strides, config.anchor_scales, config.aspect_ratios)
        pyramid = nn.Module()
        pyramid.out_channels = config.fpn_channels
        super().__init__(
            pyramid,
            config.num_labels,
            anchor_generator=anchors,
            head=_Head(config.fpn_channels, anchors.num_anchors_per_location()[0], config.num_labels),
            score_thresh=config.score_thresh,
            nms_thresh=config.nms_thresh,
            detections_per_img=config.detections_per_img,
            fg_iou_thresh=config.fg_iou_thresh,
            bg_iou_thresh=config.bg_iou_thresh,
            topk_candidates=config.topk_candidates,
        )
        del self.backbone, self.transform  # both are the detector's business

    def losses(
        self, images: ImageList, features: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        levels = list(features.values())
        losses = self.compute_loss(list(targets), self.head(levels), self.anchor_generator(images, levels))
        return {f"loss_{name}": loss for name, loss in losses.items()}

    def detections(self, images: ImageList, features: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        levels = list(features.values())
        counts = [level.shape[-2] * level.shape[-1] * self.head.classification_head.num_anchors for level in levels]
        outputs = {name: list(value.split(counts, 1)) for name, value in self.head(levels).items()}
        anchors = [list(each.split(counts)) for each in self.anchor_generator(images, levels)]
        if torch.compiler.is_exporting():
            return [self._traced(outputs, anchors[0], images.image_sizes)]
        return self.postprocess_detections(outputs, anchors, images.image_sizes)

    def _traced(
        self, outputs: dict[str, list[Tensor]], anchors: list[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> dict[str, Tensor]:
        """Find what `postprocess_detections` finds in one image, as a graph: no shape hangs on scores up to the end.

        Boxes below the score's threshold go last here: they suppress none that scores higher.

        Raises:
            ValueError: There are several images.
        """
        if len(sizes) != 1:
            raise ValueError(f"pixel_values: holds {len(sizes)} images. A detector is exported for one at a time.")
        boxes, scores, labels = [], [], []
        for logits, deltas, places in zip(outputs["cls_logits"], outputs["bbox_regression"], anchors, strict=True):
            best, index = logits[0].sigmoid().flatten().topk(min(self.topk_candidates, logits[0].numel()))
            place = index // logits.shape[-1]
            boxes.append(clip_boxes_to_image(self.box_coder.decode_single(deltas[0][place], places[place]), sizes[0]))
            scores.append(best)
            labels.append(index % logits.shape[-1])
        found = {"boxes": torch.cat(boxes), "scores": torch.cat(scores), "labels": torch.cat(labels)}
        apart = found["labels"][:, None] * (max(sizes[0]) + 1)  # so that no class suppresses another
        keep = nms(found["boxes"] + apart, found["scores"], self.nms_thresh)
        keep = keep[found["scores"][keep] > self.score_thresh]
        return {name: value[keep][: self.detections_per_img] for name, value in found.items()}


class RetinaNet(Detector):
    """RetinaNet: classes and boxes at every place of the pyramid, trained by focal loss.

    Source: Lin et al., "Focal Loss for Dense Object Detection". Head and losses are torchvision's.
    """

    config_class = RetinaNetConfig

    def _build_heads(self, config: Any, channels: list[int]) -> None:
        plain = is_plain(config.backbone_config)  # its one map is finer than the pyramid's coarsest level
        source = config.fpn_channels if plain else channels[-1]
        self.pyramid = build_pyramid(config, channels, LastLevelP6P7(source, config.fpn_channels))
        self.dense_heads = _DenseHeads(config, pyramid_strides(config, extra=2))

    def _losses(
        self, images: ImageList, features: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        return self.dense_heads.losses(images, features, targets)

    def _detections(self, images: ImageList, features: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        return self.dense_heads.detections(images, features)


def _image_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> list[tuple[int, int]]:
    """Return height and width of each image without its padding."""
    if pixel_mask is None:
        height, width = pixel_values.shape[-2:]
        return [(height, width)] * len(pixel_values)
    heights, widths = pixel_mask.bool().any(2).sum(1), pixel_mask.bool().any(1).sum(1)
    return list(zip(heights.tolist(), widths.tolist(), strict=True))


def _pad(values: Sequence[Tensor], padding: float) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(values), batch_first=True, padding_value=padding)
