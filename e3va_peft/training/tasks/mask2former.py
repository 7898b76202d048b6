"""Mask2Former, for semantic and for instance segmentation: model, image processor, labels."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

from e3va_peft.detection.pyramid import backbone_strides, is_plain
from e3va_peft.errors import UserError
from e3va_peft.training.tasks.base import Task, load_backbone, load_weights, make_processor

LONGEST = 1333 / 800
"""Longer side to shorter side of an image, at most: that of COCO's usual sizes."""

NEW = ("class_predictor", "criterion", "model.pixel_level_module.decoder", "model.transformer_module")


def new_config(backbone: Any, model: str) -> Mask2FormerConfig:
    """Return the config of a new Mask2Former on a backbone with four stages.

    Raises:
        UserError: The backbone has one resolution only.
    """
    if is_plain(backbone):
        raise UserError(
            f"head=mask2former: wants a backbone of several resolutions, and {model} is a {backbone.model_type}. "
            "Use Swin, or another head."
        )
    strides = [int(stride) for stride in backbone_strides(backbone)]
    return Mask2FormerConfig(backbone_config=backbone, feature_strides=strides, common_stride=strides[0])


def build(config: Any, task: str, source: str, new: bool) -> Mask2FormerForUniversalSegmentation:
    """Load a Mask2Former, or build a new one with the weights of its pretrained backbone.

    Args:
        config: Config of the model. Notes the task, which no other part of the model tells.
        task: Name of the task.
        source: Hub id or folder of the model, or of the backbone alone.
        new: Whether the source is the backbone alone.
    """
    config.task = task
    if not new:
        return load_weights(Mask2FormerForUniversalSegmentation, source, new=NEW, config=config)
    model = Mask2FormerForUniversalSegmentation(config)
    pixel_level = model.model.pixel_level_module
    pixel_level.encoder = load_backbone(type(pixel_level.encoder), source, config.backbone_config)
    return model


def is_meant(task: Task) -> bool:
    """Whether the model of a run's task is a Mask2Former, or gets one as its head."""
    head = task.config.head
    return isinstance(task.found_config, Mask2FormerConfig) if head is None else head == "mask2former"


def owns(processor: Any) -> bool:
    """Whether an image processor is Mask2Former's, and so the model."""
    return isinstance(processor, Mask2FormerImageProcessor)


def processor(options: Mapping[str, Any]) -> Mask2FormerImageProcessor:
    """Build the image processor."""
    return make_processor(Mask2FormerImageProcessor, options)


def refuse_padding(inputs: Mapping[str, Any]) -> None:
    """Refuse a batch with padding: Mask2Former's image processor would stretch it over the image.

    Raises:
        UserError: The images of a batch differ in size.
    """
    mask = inputs["pixel_mask"]
    if not bool(mask.all()):
        raise UserError(
            f"training.per_device_eval_batch_size={len(mask)}: the images of a batch differ in size, and "
            "Mask2Former's masks cannot be scored with padding. Set it to 1."
        )


def on_cpu(outputs: Any) -> Any:
    """Return outputs whose queries are on the CPU, where the image processor makes its maps."""
    names = ("class_queries_logits", "masks_queries_logits")
    return SimpleNamespace(**{name: getattr(outputs, name).float().cpu() for name in names})


def map_labels(label_map: Tensor, ignore_index: int) -> dict[str, Tensor]:
    """Turn a label map `(H, W)` into one mask per class that occurs, `(n, H, W)`, and its class, `(n,)`."""
    classes = label_map.unique()
    classes = classes[classes != ignore_index]
    return {"mask_labels": (label_map == classes[:, None, None]).float(), "class_labels": classes}
