"""Models without weights: from a name or a config to a model on the meta device, where no tensor holds memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    Mask2FormerConfig,
    PreTrainedModel,
)

from e3va_peft.errors import UserError, nearest, one_of
from e3va_peft.plan.boxes import labels_of
from e3va_peft.training.batchnorm import allow_single_values
from e3va_peft.training.config import HEADS, OBJECT_TASKS
from e3va_peft.training.tasks.base import find_config, name_classes
from e3va_peft.training.tasks.classification import classifier_config
from e3va_peft.training.tasks.detection import detector_class, detector_config
from e3va_peft.training.tasks.mask2former import LONGEST
from e3va_peft.training.tasks.segmentation import segmenter_config

CLASSES = {  # of ImageNet, ADE20K and COCO
    "image-classification": 1000, "semantic-segmentation": 150, "object-detection": 80, "instance-segmentation": 80,
}  # fmt: skip


def _swin(width: int, deep: int) -> dict[str, Any]:
    heads = [width // 32 * 2**stage for stage in range(4)]
    return {"model_type": "swin", "embed_dim": width, "depths": [2, 2, deep, 2], "num_heads": heads, "window_size": 7}


def _plain(model_type: str, width: int, layers: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64}
    return {"model_type": model_type, **sizes, **more}


# Sizes that everyone means by these names, so that a question needs no download at all.
SHORT_NAMES: dict[str, dict[str, Any]] = {
    "swin-t": _swin(96, 6),
    "swin-s": _swin(96, 18),
    "swin-b": _swin(128, 18),
    "swin-l": _swin(192, 18),
    "vit-s": _plain("vit", 384, 12, intermediate_size=1536),
    "vit-b": _plain("vit", 768, 12, intermediate_size=3072),
    "vit-l": _plain("vit", 1024, 24, intermediate_size=4096),
    "dinov2-s": _plain("dinov2", 384, 12, image_size=518, patch_size=14),
    "dinov2-b": _plain("dinov2", 768, 12, image_size=518, patch_size=14),
    "dinov2-l": _plain("dinov2", 1024, 24, image_size=518, patch_size=14),
}


def model_config(model: str) -> Any:
    """Return a model's config: of a short name, of a folder, or of a Hub id, of which only config.json is fetched.

    Raises:
        UserError: There is no such model.
    """
    if model in SHORT_NAMES:
        return AutoConfig.for_model(**SHORT_NAMES[model])
    folder = Path(model).expanduser()
    if "/" not in model and not folder.is_dir():
        raise UserError(
            f"model={model!r}: is not a folder, a Hub id (owner/name), or one of {', '.join(SHORT_NAMES)}."
            + nearest(model.lower(), SHORT_NAMES)
        )
    return find_config(str(folder) if folder.is_dir() else model)


def model_builder(
    model: str, task: str, num_labels: int, change: Callable[[Any], None] | None = None, head: str | None = None
) -> Callable[[], PreTrainedModel]:
    """Return a function that builds the model which `e3va train` would train, in fp32, without its weights.

    The model is on the device of the surrounding context: `with torch.device("meta")` for one without memory.

    Args:
        model: Short name, folder or Hub id.
        task: image-classification, semantic-segmentation, object-detection or instance-segmentation.
        num_labels: Number of classes.
        change: Sets options of the model's config.
        head: Head that a backbone alone gets; None: the task's first.

    Raises:
        UserError: There is no such model, or it is of no use for the task.
    """
    if task not in CLASSES:
        raise UserError(f"task={task!r}: must be one of {', '.join(CLASSES)}.{nearest(task, CLASSES)}")
    if head is not None and head not in HEADS[task]:
        raise UserError(f"head={head!r}: {one_of(head, HEADS[task])}")
    config = _config(model_config(model), model, task, head)
    if change is not None:
        change(config)
    name_classes(config, [str(i) for i in range(num_labels)])
    if task in OBJECT_TASKS:
        make: Any = detector_class(config)
    elif task == "semantic-segmentation":
        make = partial(AutoModelForSemanticSegmentation.from_config, dtype=torch.float32)
    else:
        make = partial(AutoModelForImageClassification.from_config, dtype=torch.float32)
    # fp32 whatever the config says of its file: Trainer's mixed precision keeps the weights in fp32
    return lambda: allow_single_values(make(config))


def _config(found: Any, model: str, task: str, head: str | None) -> Any:
    """The config of the model for a task: a backbone alone gets a new head."""
    if head == "mask2former" or isinstance(found, Mask2FormerConfig):
        raise UserError(
            f"model={model!r}: a Mask2Former cannot be planned, because its loss asks the values of its masks which "
            "belong to which object. Measure a step: e3va compare."
        )
    if task in OBJECT_TASKS:
        return detector_config(found, model, task, head)
    return segmenter_config(found, model) if task == "semantic-segmentation" else classifier_config(found, model)


def image_size_of(model: PreTrainedModel, task: str) -> int:
    """Return the side in pixels of the images that a model is trained on, the shorter one of a detector's.

    As `e3va train` has it where neither run nor image processor says: 512 for a segmenter, 800 for a detector.
    """
    if task in OBJECT_TASKS:
        return 800
    size = 512 if task == "semantic-segmentation" else getattr(model.config, "image_size", 224)
    return int(size[0] if isinstance(size, list | tuple) else size)


def make_batch(task: str, batch_size: int, size: int) -> dict[str, Any]:
    """Make a batch of square images and labels, on the device of the context; of a detector as wide as may be."""
    if task in OBJECT_TASKS:
        width = round(size * LONGEST)
        labels = labels_of(batch_size, size, width, masks=task == "instance-segmentation")
        return {"pixel_values": torch.empty(batch_size, 3, size, width), "labels": labels}
    shape = (batch_size, size, size) if task == "semantic-segmentation" else (batch_size,)
    return {
        "pixel_values": torch.empty(batch_size, 3, size, size),
        "labels": torch.empty(shape, dtype=torch.long),
    }


def give_fake_memory(model: nn.Module, device: str) -> nn.Module:
    """Move a model from meta to a device in place, within a `FakeTensorMode`, in which that takes no memory."""
    made: dict[Tensor, Tensor] = {}  # a shared parameter stays shared
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    made.setdefault(tensor, _empty_like(tensor, device))
                    tensors[name] = made[tensor]  # type: ignore[assignment]
    return model


def _empty_like(tensor: Tensor, device: str) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
