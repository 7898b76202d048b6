"""Semantic segmentation: one class per pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from transformers import (
    AutoModelForSemanticSegmentation,
    Mask2FormerConfig,
    PreTrainedModel,
    SegformerImageProcessor,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_BACKBONE_MAPPING,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
)

from e3va_peft.detection.pyramid import cut_into, stage_names
from e3va_peft.errors import UserError
from e3va_peft.training.batchnorm import allow_single_values
from e3va_peft.training.metrics import confusion_matrix, segmentation_scores
from e3va_peft.training.tasks import mask2former
from e3va_peft.training.tasks.base import (
    MasksInPlace,
    Task,
    View,
    grey,
    kept_options,
    load_backbone,
    load_weights,
    make_processor,
    name_classes,
    normalized,
    pad_batch,
    prepare,
    side,
)

_HEADS = ("decode_head", "auxiliary_head", "classifier", "head", "neck")
_AT_A_TIME = 8  # classes
_TRIES = 10  # crops to try until one has a labelled pixel: the loss of a batch without any is not a number


class SemanticSegmentation(Task):
    """One class per pixel; scored by intersection over union at the size of the label maps."""

    label_kind = "label-map"
    main_metric = "mean_iou"
    metrics = ("mean_iou", "mean_accuracy", "overall_accuracy")
    default_scale = (0.5, 2.0)
    default_training: ClassVar = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 1}

    def build_model(self, labels: Sequence[str]) -> PreTrainedModel:
        """Load a segmenter, or put UperNet onto a backbone; its BatchNorms take a batch of one image."""
        found = self.load_config(labels)
        config = segmenter_config(found, self.config.model, self.config.head)
        name_classes(config, labels)
        self.apply_options(config)
        self._set_ignore_index(config)
        if isinstance(config, Mask2FormerConfig):
            config.first_label = int(self.config.data.reduce_labels)  # its image processor does not reduce labels
            return mask2former.build(config, self.config.task, self.config.model, new=config is not found)
        if config is found:
            model = load_weights(AutoModelForSemanticSegmentation, self.config.model, new=_HEADS, config=config)
        else:
            model = self._upernet(config, found)
        return allow_single_values(model)

    def _upernet(self, config: Any, backbone: Any) -> PreTrainedModel:
        """Build a new UperNet with the weights of its pretrained backbone."""
        model = UperNetForSemanticSegmentation(config)
        cls = MODEL_FOR_BACKBONE_MAPPING[type(backbone)]  # AutoBackbone asks the Hub first, for a folder too
        model.backbone = load_backbone(cls, self.config.model, backbone)
        return model

    def _set_ignore_index(self, config: Any) -> None:
        value = self.config.data.ignore_index
        if isinstance(config, Mask2FormerConfig):
            return  # its labels leave out what does not count
        name = next((n for n in ("loss_ignore_index", "semantic_loss_ignore_index") if hasattr(config, n)), None)
        if name is not None:
            setattr(config, name, value)
        elif value != 255:
            raise UserError(f"data.ignore_index={value}: {config.model_type} ignores 255 only. Leave it out.")

    def build_processor(self) -> Any:
        """Return an image processor that keeps the aspect ratio, with the model's mean and std.

        `size_divisor`, which it keeps, is the patch of a backbone that sees whole patches only: see `prepare`.
        """
        found = self.found_processor
        options = kept_options(found)
        size = self.config.image_size or (side(found) if found is not None else 512)
        options |= {"size": {"shortest_edge": size}, "do_reduce_labels": self.config.data.reduce_labels}
        if mask2former.is_meant(self):
            longest = round(size * mask2former.LONGEST)
            options |= {"size": {"shortest_edge": size, "longest_edge": longest}, "do_reduce_labels": False}
            return mask2former.processor(options | self.config.processor)
        processor = make_processor(SegformerImageProcessor, options | self.config.processor)
        config = getattr(self.found_config, "backbone_config", None) or self.found_config
        with suppress(ValueError):  # a backbone whose strides are unknown
            divisor = 1 if config is None else cut_into(config)
            if divisor > 1:
                processor.size_divisor = divisor
        return processor

    def collator(
        self, model: PreTrainedModel, processor: Any
    ) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
        """The collator that stacks images; for Mask2Former, pads them."""
        return pad_batch if mask2former.owns(processor) else super().collator(model, processor)

    def training_view(self, processor: Any) -> View:
        """Return a random scale, crop, flips and colours as the run says; without augmentation, a centre crop."""
        size, ignored = side(processor), self.config.data.ignore_index
        fill = {tv_tensors.Image: grey(processor), tv_tensors.Mask: ignored, "others": 0}
        if self.config.augment is None:
            steps: list[v2.Transform] = [_Resize(size), v2.CenterCrop(size)]
        else:
            low, high = (round(factor * size) for factor in self.scale())
            resize = _RandomResize(low, high + 1) if high > low else _Resize(low)
            crop = v2.RandomCrop(self.config.augment.crop or size, pad_if_needed=True, fill=fill)
            steps = [resize, crop, *self.flips(), *self.colors()]
        transform = v2.Compose([v2.ToImage(), *steps, *normalized(processor)[1:]])
        return partial(_augmented, transform, ignored, mask2former.owns(processor))

    def evaluation_view(self, processor: Any) -> View:
        """The image processor's view, and the label map in that size and in its own."""
        return partial(_prepared, processor, self.config.data.ignore_index)

    def evidence(self, outputs: Any, inputs: Mapping[str, Any], processor: Any) -> list[Tensor]:
        """Confusion matrix `(K, K)` of each image, at the size of its label map."""
        sizes = [tuple(truth.shape) for truth in inputs["truth"]]
        if mask2former.owns(processor):
            mask2former.refuse_padding(inputs)
            num_labels = outputs.class_queries_logits.shape[-1] - 1
        else:
            num_labels = outputs.logits.shape[1]
        return [
            confusion_matrix(found, truth.to(found.device), num_labels, self.config.data.ignore_index).cpu()
            for found, truth in zip(label_maps(outputs, processor, sizes), inputs["truth"], strict=True)
        ]

    def add(self, evidence: Tensor | None, items: list[Tensor]) -> Tensor:
        """Sum the matrices: one is held, `(K, K)`, however many images there are."""
        total = torch.stack(items).sum(0)
        return total if evidence is None else evidence + total

    def scores(self, evidence: Tensor, num_labels: int) -> dict[str, Any]:
        """Mean IoU, mean accuracy, pixel accuracy, and IoU and accuracy per class."""
        return segmentation_scores(evidence)

    def confusion(self, evidence: Tensor, num_labels: int) -> Tensor:
        """Pixels by their true and their predicted class."""
        return evidence


def label_maps(outputs: Any, processor: Any, sizes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Turn a segmenter's outputs into a class for each pixel, `(H, W)` for each image, at the images' own sizes."""
    if mask2former.owns(processor):
        return processor.post_process_semantic_segmentation(outputs, target_sizes=list(sizes))
    return [_best_class(scores, size) for scores, size in zip(outputs.logits, sizes, strict=True)]


def _best_class(scores: Tensor, size: tuple[int, ...]) -> Tensor:
    """Scores (K, h, w) -> the best class of each pixel, (H, W); a few classes are as large as the image at a time."""
    best = torch.full(size, -torch.inf, device=scores.device)
    ids = torch.zeros(size, dtype=torch.long, device=scores.device)
    for first in range(0, len(scores), _AT_A_TIME):
        part = F.interpolate(scores[None, first : first + _AT_A_TIME].float(), size, mode="bilinear")[0]
        value, index = part.max(0)
        higher = value > best
        best, ids = torch.where(higher, value, best), torch.where(higher, index + first, ids)
    return ids


def segmenter_config(found: Any, model: str, head: str | None = None) -> Any:
    """Return a segmenter's config as it is; for a backbone, that of a new UperNet or Mask2Former on it.

    UperNet reads all stages of a pyramid, and four blocks of a plain ViT.

    Args:
        found: Config of the model.
        model: Its name, for the error.
        head: `upernet`, the default, or `mask2former`.

    Raises:
        UserError: The model is neither a segmenter nor a backbone.
    """
    if type(found) in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING or isinstance(found, Mask2FormerConfig):
        return found
    if type(found) not in MODEL_FOR_BACKBONE_MAPPING:
        raise UserError(
            f"model={model!r}: is a {found.model_type}, which is neither a segmenter nor a backbone with feature "
            "maps. Use Swin, DINOv2 or a UperNet, e.g. microsoft/swin-base-patch4-window7-224."
        )
    names = stage_names(found)
    found.out_features = names if len(names) <= 4 else [names[len(names) * i // 4 - 1] for i in (1, 2, 3, 4)]
    if head == "mask2former":
        return mask2former.new_config(found, model)
    return UperNetConfig(backbone_config=found, use_auxiliary_head=len(found.out_features) > 2)  # it reads the third


class _Resize(MasksInPlace, v2.Resize):
    pass


class _RandomResize(MasksInPlace, v2.RandomResize):
    pass


def _augmented(
    transform: v2.Transform, ignore_index: int, universal: bool, image: Image.Image, label: np.ndarray
) -> dict[str, Tensor]:
    for _ in range(_TRIES):
        pixels, mask = transform(image, tv_tensors.Mask(label))
        if (mask != ignore_index).any():
            break
    labels = _labels(mask.as_subclass(Tensor).long(), ignore_index, universal)
    return {"pixel_values": pixels.as_subclass(Tensor), **labels}


def _prepared(processor: Any, ignore_index: int, image: Image.Image, label: np.ndarray) -> dict[str, Tensor]:
    pixels = prepare(processor, image)["pixel_values"][0]
    truth = torch.from_numpy(label)
    resized = v2.functional.resize(truth[None], list(pixels.shape[-2:]), InterpolationMode.NEAREST_EXACT)[0]
    return {"pixel_values": pixels, **_labels(resized, ignore_index, mask2former.owns(processor)), "truth": truth}


def _labels(label_map: Tensor, ignore_index: int, universal: bool) -> dict[str, Tensor]:
    """The labels of the loss: the label map, or for Mask2Former the mask of each class."""
    return mask2former.map_labels(label_map, ignore_index) if universal else {"labels": label_map}
