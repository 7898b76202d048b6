"""Configs of the detectors. Fields that torchvision has too carry torchvision's names and defaults."""

from typing import Any  # no annotations from __future__: @strict checks no types that are text

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

_OCTAVE = tuple(4 * 2 ** (i / 3) for i in range(3))


@strict
class DetectorConfig(PreTrainedConfig):
    """Common part of all detectors: a backbone, a feature pyramid on it, anchors on the pyramid.

    Attributes:
        backbone_config: Config of any backbone of transformers that yields feature maps, timm's in a `TimmBackbone`
            among them, or of a plain ViT or DeiT.
        strides: Pixels between neighbours of each feature map of the backbone. None: worked out from its patch size.
        fpn_channels: Channels of the feature pyramid.
        anchor_scales: Sides of a level's anchors, as multiples of its stride.
        aspect_ratios: Height to width of the anchors.
        score_thresh: Detections below are dropped, before non-maximum suppression.
        nms_thresh: IoU from which of two boxes of a class the lower one is dropped.
        detections_per_img: The best so many are kept.
    """

    sub_configs_defaults = {  # noqa: RUF012  # transformers' own form
        "backbone_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="swin",
            init_kwargs={"out_features": ["stage1", "stage2", "stage3", "stage4"]},
        )
    }

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    strides: list[int | float] | tuple[int | float, ...] | None = None
    fpn_channels: int = 256
    anchor_scales: list[int | float] | tuple[int | float, ...] = (8,)
    aspect_ratios: list[int | float] | tuple[int | float, ...] = (0.5, 1.0, 2.0)
    score_thresh: int | float = 0.05
    nms_thresh: int | float = 0.5
    detections_per_img: int = 100

    def validate_anchors(self) -> None:
        """Check that every level has anchors."""
        for name in ("anchor_scales", "aspect_ratios"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one or more numbers above 0.")


@strict
class RetinaNetConfig(DetectorConfig):
    """Config of `RetinaNet`. Source: Lin et al., "Focal Loss for Dense Object Detection", with torchvision's values.

    Attributes:
        topk_candidates: Candidates of each level that enter non-maximum suppression.
        fg_iou_thresh: An anchor of at least this IoU with an object is to find it.
        bg_iou_thresh: An anchor below this IoU with every object is background.
    """

    model_type = "e3va_retinanet"

    anchor_scales: list[int | float] | tuple[int | float, ...] = _OCTAVE
    topk_candidates: int = 1000
    fg_iou_thresh: int | float = 0.5
    bg_iou_thresh: int | float = 0.4


@strict
class MaskRCNNConfig(DetectorConfig):
    """Config of `MaskRCNN`. Source: He et al., "Mask R-CNN", with torchvision's values.

    Attributes:
        masks: Find masks too; without them it is Faster R-CNN.
        iou_thresholds: One stage for each: the IoU from which a proposal is of an object.
        box_weights: Scale of the four regression targets, one row for each stage.
        loss_weights: Weight of each stage's loss.
        class_agnostic: One box for all classes instead of one for each.
        box_head_dim: Width of the two linear layers of a box head.
        box_head_convs: 3x3 convolutions with GroupNorm in front of one linear layer, instead of two linear layers.
        mask_dim: Channels of the four convolutions of a mask head.
        box_batch_size_per_image: Proposals that are trained on.
        box_positive_fraction: At most this share of them is of objects.
        rpn_pre_nms_top_n_train: Proposals of each level that enter non-maximum suppression, where there are labels.
        rpn_pre_nms_top_n_test: The same without labels.
        rpn_post_nms_top_n_train: Proposals that leave it, where there are labels.
        rpn_post_nms_top_n_test: The same without labels.
        rpn_nms_thresh: Its IoU.
        rpn_fg_iou_thresh: An anchor of at least this IoU with an object is to find it.
        rpn_bg_iou_thresh: An anchor below this IoU with every object is background.
        rpn_batch_size_per_image: Anchors that are trained on.
        rpn_positive_fraction: At most this share of them is of objects.
    """

    model_type = "e3va_mask_rcnn"

    masks: bool = True
    iou_thresholds: list[int | float] | tuple[int | float, ...] = (0.5,)
    box_weights: list[Any] | tuple[Any, ...] = ((10.0, 10.0, 5.0, 5.0),)
    loss_weights: list[int | float] | tuple[int | float, ...] = (1.0,)
    class_agnostic: bool = False
    box_head_dim: int = 1024
    box_head_convs: int = 0
    mask_dim: int = 256
    box_batch_size_per_image: int = 512
    box_positive_fraction: int | float = 0.25
    rpn_pre_nms_top_n_train: int = 2000
    rpn_pre_nms_top_n_test: int = 1000
    rpn_post_nms_top_n_train: int = 2000
    rpn_post_nms_top_n_test: int = 1000
    rpn_nms_thresh: int | float = 0.7
    rpn_fg_iou_thresh: int | float = 0.7
    rpn_bg_iou_thresh: int | float = 0.3
    rpn_batch_size_per_image: int = 256
    rpn_positive_fraction: int | float = 0.5

    def validate_architecture(self) -> None:
        """Check that every stage has its threshold, box weights and loss weight."""
        counts = [len(self.iou_thresholds), len(self.box_weights), len(self.loss_weights)]
        if len(set(counts)) > 1 or not counts[0]:
            raise ValueError(
                f"iou_thresholds={self.iou_thresholds!r}, box_weights={self.box_weights!r}, "
                f"loss_weights={self.loss_weights!r}: name {counts} stages. Give one of each for every stage."
            )
        for row in self.box_weights:
            if len(row) != 4 or not all(isinstance(weight, int | float) and weight > 0 for weight in row):
                raise ValueError(f"box_weights={self.box_weights!r}: must be four numbers above 0 for each stage.")


@strict
class CascadeMaskRCNNConfig(MaskRCNNConfig):
    """Config of `CascadeMaskRCNN`: three stages, each asking for more overlap, on boxes that the one before refined.

    Source: Cai and Vasconcelos, "Cascade R-CNN: High Quality Object Detection and Instance Segmentation".
    """

    model_type = "e3va_cascade_mask_rcnn"

    iou_thresholds: list[int | float] | tuple[int | float, ...] = (0.5, 0.6, 0.7)
    box_weights: list[Any] | tuple[Any, ...] = (
        (10.0, 10.0, 5.0, 5.0),
        (20.0, 20.0, 10.0, 10.0),
        (30.0, 30.0, 15.0, 15.0),
    )
    loss_weights: list[int | float] | tuple[int | float, ...] = (1.0, 0.5, 0.25)
    class_agnostic: bool = True
