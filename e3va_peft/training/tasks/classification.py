"""Image classification: one class per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from e3va_peft.errors import UserError
from e3va_peft.training.metrics import accuracy_scores, confusion_matrix
from e3va_peft.training.tasks.base import (
    Task,
    View,
    edge,
    load_weights,
    make_processor,
    normalized,
    side,
)


class ImageClassification(Task):
    """One class per image; scored by accuracy."""

    label_kind = "class"
    main_metric = "accuracy"
    metrics = ("accuracy", "accuracy_top5", "mean_class_accuracy")
    default_scale = (0.35, 1.0)
    default_training: ClassVar = {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 32}

    def build_model(self, labels: Sequence[str]) -> PreTrainedModel:
        """Load a classifier; a new linear head where the pretrained one has other classes."""
        config = classifier_config(self.load_config(labels), self.config.model)
        self.apply_options(config)
        return load_weights(
            AutoModelForImageClassification, self.config.model, new=("classifier", "cls_classifier"), config=config
        )

    def build_processor(self) -> Any:
        """Return the model's image processor at the run's image size; ImageNet's mean and std where it has none."""
        found = self.found_processor
        cls = type(found) if found is not None else ViTImageProcessor
        if found is None:
            options: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        else:
            known = cls().to_dict()
            options = {key: value for key, value in found.to_dict().items() if key in known}
        size = self.config.image_size
        if size is not None:
            square = {"height": size, "width": size}
            if found is not None and getattr(found, "do_center_crop", False):
                ratio = edge(found.size) / side(found)
                options |= {"size": {"shortest_edge": round(size * ratio)}, "crop_size": square}
            elif "crop_pct" in options:  # ConvNeXt's, which resizes and crops by itself
                options |= {"size": {"shortest_edge": size}}
            else:
                options |= {"size": square}
        return make_processor(cls, options | self.config.processor)

    def training_view(self, processor: Any) -> View:
        """Return a random crop, flips and colours as the run says; without augmentation, the evaluation view."""
        if self.config.augment is None:
            return self.evaluation_view(processor)
        crop = v2.RandomResizedCrop(side(processor), self.scale(), interpolation=InterpolationMode.BICUBIC)
        return partial(_augmented, v2.Compose([crop, *self.flips(), *self.colors(), *normalized(processor)]))

    def evaluation_view(self, processor: Any) -> View:
        """The view of the image processor."""
        return partial(_prepared, processor)

    def evidence(self, outputs: Any, inputs: Mapping[str, Any], processor: Any) -> list[tuple[np.ndarray, int]]:
        """Logits `(K,)` and class of each image."""
        logits = outputs.logits.float().cpu().numpy()  # of a tensor's row, pickle takes the whole batch along
        return list(zip(logits, inputs["labels"].tolist(), strict=True))

    def scores(self, evidence: list[tuple[np.ndarray, int]], num_labels: int) -> dict[str, Any]:
        """Accuracy, top-5 accuracy, and accuracy per class."""
        logits, classes = zip(*evidence, strict=True)
        return accuracy_scores(torch.from_numpy(np.stack(logits)), torch.tensor(classes))

    def confusion(self, evidence: list[tuple[np.ndarray, int]], num_labels: int) -> Tensor:
        """Images by their true and their most probable class."""
        found = torch.tensor([int(logits.argmax()) for logits, _ in evidence])
        return confusion_matrix(found, torch.tensor([label for _, label in evidence]), num_labels, ignore_index=None)


def classifier_config(found: Any, model: str) -> Any:
    """Return a classifier's config as it is.

    Args:
        found: Config of the model.
        model: Its name, for the error.

    Raises:
        UserError: Transformers has no classifier of that kind.
    """
    if type(found) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"model={model!r}: is a {found.model_type}, of which transformers has no image classifier. Use one of "
            "DINOv2, ViT or Swin, e.g. facebook/dinov2-base, another task, or a head of your own over it, in Python "
            "(E3VAConfig)."
        )
    return found


def _augmented(transform: v2.Transform, image: Image.Image, label: int) -> dict[str, Tensor]:
    return {"pixel_values": transform(image), "labels": torch.tensor(label)}


def _prepared(processor: Any, image: Image.Image, label: int) -> dict[str, Tensor]:
    return {"pixel_values": processor(image, return_tensors="pt")["pixel_values"][0], "labels": torch.tensor(label)}
