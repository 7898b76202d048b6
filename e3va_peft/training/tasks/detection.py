"""Object detection and instance segmentation: boxes, and masks in them, for each object of an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_convert, masks_to_boxes
from torchvision.transforms import InterpolationMode, v2
from transformers import Mask2FormerConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from e3va_peft.data.config import LabelKind
from e3va_peft.data.objects import Detections, Objects, decode_mask, encode_masks
from e3va_peft.detection import (
    CascadeMaskRCNN,
    CascadeMaskRCNNConfig,
    DetectionImageProcessor,
    Detector,
    DetectorConfig,
    MaskRCNN,
    MaskRCNNConfig,
    RetinaNet,
    RetinaNetConfig,
)
from e3va_peft.detection.pyramid import is_plain, stage_names
from e3va_peft.errors import UserError
from e3va_peft.training.average_precision import BOX_METRICS, MASK_METRICS, VOC_METRIC, coco_scores, voc_scores
from e3va_peft.training.config import HEADS
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
)

_HEADS: dict[str, tuple[type[DetectorConfig], type[Detector], bool]] = {
    "retinanet": (RetinaNetConfig, RetinaNet, False),
    "faster-rcnn": (MaskRCNNConfig, MaskRCNN, False),
    "cascade-rcnn": (CascadeMaskRCNNConfig, CascadeMaskRCNN, False),
    "mask-rcnn": (MaskRCNNConfig, MaskRCNN, True),
    "cascade-mask-rcnn": (CascadeMaskRCNNConfig, CascadeMaskRCNN, True),
}
_NEW = ("pyramid", "rpn", "roi_heads", "dense_heads")
_PLAIN = ("vit", "deit")  # no feature maps in transformers, and the detectors make do without


class ObjectDetection(Task):
    """A box for each object; scored by COCO's box AP."""

    label_kind: ClassVar[LabelKind] = "boxes"
    main_metric = "box_ap"
    metrics = (*BOX_METRICS, VOC_METRIC)
    default_scale = (0.6, 1.0)
    default_training: ClassVar = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 1}

    def build_model(self, labels: Sequence[str]) -> PreTrainedModel:
        """Load a detector, or put a new one onto a backbone."""
        found = self.load_config(labels)
        config = detector_config(found, self.config.model, self.config.task, self.config.head)
        name_classes(config, labels)
        self.apply_options(config)
        source, new = self.config.model, config is not found
        if isinstance(config, Mask2FormerConfig):
            return mask2former.build(config, self.config.task, source, new)
        cls = detector_class(config)
        return _with_backbone(cls(config), source) if new else load_weights(cls, source, new=_NEW, config=config)

    def build_processor(self) -> Any:
        """Return an image processor that keeps the aspect ratio, with the model's mean and std."""
        found = self.found_processor
        options = kept_options(found)
        edges = getattr(found, "size", None) or {}
        size = self.config.image_size
        if size is None and edges.get("longest_edge"):
            options["size"] = {name: edges[name] for name in ("shortest_edge", "longest_edge")}
        else:
            size = size or 800
            options["size"] = {"shortest_edge": size, "longest_edge": round(size * mask2former.LONGEST)}
        options |= self.config.processor
        sides = options["size"]
        if not _keeps_aspect_ratio(sides):
            raise UserError(
                f"processor.size={sides!r}: wants shortest_edge and longest_edge, in pixels. Give both, the shortest "
                "first, or image_size alone."
            )
        return (
            mask2former.processor(options)
            if mask2former.is_meant(self)
            else make_processor(DetectionImageProcessor, options)
        )

    def training_view(self, processor: Any) -> View:
        """Return a random size, crop, flips and colours as the run says."""
        shortest, longest = processor.size["shortest_edge"], processor.size["longest_edge"]
        steps: list[v2.Transform] = [v2.ToImage()]
        augment = self.config.augment
        if augment is None:
            steps.append(_ShortestSize(shortest, longest))
        else:
            low, high = (round(factor * shortest) for factor in self.scale())
            steps.append(_ShortestSize(list(range(low, high + 1)), round(longest * high / shortest)))
            if augment.crop is not None:
                fill = {tv_tensors.Image: grey(processor), tv_tensors.Mask: 0, "others": 0}
                steps.append(v2.RandomCrop(augment.crop, pad_if_needed=True, fill=fill))
            steps += [*self.flips(), *self.colors()]
        steps += [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1, labels_getter=_classes)]
        transform = v2.Compose([*steps, *normalized(processor)[1:]])
        cropped = augment is not None and augment.crop is not None
        return partial(_augmented, transform, cropped, _labels_for(processor))

    def evaluation_view(self, processor: Any) -> View:
        """The image processor's view, and the objects at the image's own size."""
        return partial(_prepared, processor)

    def collator(
        self, model: PreTrainedModel, processor: Any
    ) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
        """The collator that pads images to a batch."""
        return pad_batch

    def evidence(self, outputs: Any, inputs: Mapping[str, Any], processor: Any) -> list[tuple[Detections, Objects]]:
        """Detections and objects of each image, at its own size."""
        truth: list[Objects] = inputs["truth"]
        if mask2former.owns(processor):
            mask2former.refuse_padding(inputs)
        found = detections(outputs, processor, [objects.size for objects in truth])
        return list(zip(found, truth, strict=True))

    def scores(self, evidence: list[tuple[Detections, Objects]], num_labels: int) -> dict[str, Any]:
        """COCO's AP of boxes, and Pascal VOC's; of instances COCO's AP of boxes and masks."""
        found, truth = zip(*evidence, strict=True)
        if self.label_kind == "instances":
            return coco_scores(found, truth, num_labels, masks=True)
        return coco_scores(found, truth, num_labels) | voc_scores(found, truth, num_labels)


class InstanceSegmentation(ObjectDetection):
    """A mask for each object; scored by COCO's mask AP and box AP."""

    label_kind: ClassVar[LabelKind] = "instances"
    main_metric = "mask_ap"
    metrics = (*MASK_METRICS, *BOX_METRICS)


def _keeps_aspect_ratio(size: Any) -> bool:
    """Whether an image processor's size is a shorter and a longer side, in pixels."""
    if not isinstance(size, Mapping) or set(size) != {"shortest_edge", "longest_edge"}:
        return False
    shortest, longest = size["shortest_edge"], size["longest_edge"]
    return isinstance(shortest, int) and isinstance(longest, int) and 0 < shortest <= longest


def detector_config(found: Any, model: str, task: str, head: str | None = None) -> Any:
    """Return a detector's config as it is; for a backbone, that of a new detector on it.

    RetinaNet reads all stages of a pyramid but the first, the others read all; of a plain ViT the last block is read.

    Args:
        found: Config of the model.
        model: Its name, for the error.
        task: Name of the task.
        head: Name of the head; None: the first that the task has.

    Raises:
        UserError: The model is neither a detector for this task nor a backbone.
    """
    if isinstance(found, DetectorConfig | Mask2FormerConfig):
        masks = isinstance(found, Mask2FormerConfig) or getattr(found, "masks", False)
        if masks != (task == "instance-segmentation"):
            what = "masks" if masks else "boxes only"
            raise UserError(f"model={model!r}: finds {what}, and task is {task}. Change one.")
        return found
    if type(found) not in MODEL_FOR_BACKBONE_MAPPING and found.model_type not in _PLAIN:
        raise UserError(
            f"model={model!r}: is a {found.model_type}, which is neither a detector of e3va_peft, nor Mask2Former, "
            "nor a backbone with feature maps. Use Swin, ViT or DINOv2, e.g. microsoft/swin-base-patch4-window7-224."
        )
    head = head or HEADS[task][0]
    if found.model_type not in _PLAIN:
        names = stage_names(found)
        found.out_features = names[-1:] if is_plain(found) else names[1:] if head == "retinanet" else names
    if head == "mask2former":
        return mask2former.new_config(found, model)
    cls, _, masks = _HEADS[head]
    return cls(backbone_config=found) if cls is RetinaNetConfig else cls(backbone_config=found, masks=masks)


def detector_class(config: DetectorConfig) -> type[Detector]:
    """The class of the detector that a config is of."""
    return next(model for kind, model, _ in _HEADS.values() if kind is type(config))


def _with_backbone(model: Detector, source: str) -> Detector:
    """Give a new detector the weights of its pretrained backbone."""
    backbone = model.backbone
    plain = {} if hasattr(backbone, "channels") else {"add_pooling_layer": False}
    model.backbone = load_backbone(type(backbone), source, backbone.config, **plain)
    return model


def detections(
    outputs: Any, processor: Any, sizes: Sequence[tuple[int, int]], threshold: float = 0.0
) -> list[Detections]:
    """Turn a model's outputs into what it found, at the images' own sizes.

    Args:
        outputs: Of a detector or a Mask2Former, in eval mode.
        processor: Its image processor.
        sizes: Height and width of each image.
        threshold: Only detections that score more.
    """
    if mask2former.owns(processor):
        results = processor.post_process_instance_segmentation(
            mask2former.on_cpu(outputs), threshold=threshold, target_sizes=list(sizes), return_binary_maps=True
        )
        return [_of_segments(result) for result in results]
    masks = outputs.pred_masks is not None
    post_process = processor.post_process_instance_segmentation if masks else processor.post_process_object_detection
    return [_of_boxes(found) for found in post_process(outputs, threshold=threshold, target_sizes=list(sizes))]


def _of_boxes(found: Mapping[str, Tensor]) -> Detections:
    return Detections(
        boxes=found["boxes"].cpu().double().numpy(),
        scores=found["scores"].cpu().double().numpy(),
        labels=found["labels"].cpu().numpy(),
        masks=encode_masks(found["masks"].cpu()) if "masks" in found else None,
    )


def _of_segments(result: Mapping[str, Any]) -> Detections:
    """Turn Mask2Former's segments into detections; a mask's box is the smallest around it."""
    segments = result["segments_info"]
    if not segments:
        return Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, dtype=np.int64), ())
    masks = result["segmentation"].bool().cpu()
    boxes = masks_to_boxes(masks).double()
    boxes[:, 2:] += 1  # its corners are pixels, ours their outer edges
    return Detections(
        boxes=boxes.numpy(),
        scores=np.array([segment["score"] for segment in segments], dtype=np.float64),
        labels=np.array([segment["label_id"] for segment in segments], dtype=np.int64),
        masks=encode_masks(masks),
    )


def _classes(sample: Mapping[str, Any]) -> Tensor:
    """The fields that are dropped along with a box that a crop cut away."""
    return sample["labels"]


def _detector_labels(boxes: Tensor, classes: Tensor, masks: Tensor | None, size: tuple[int, int]) -> dict[str, Any]:
    """Return labels as DETR has them, boxes as shares of the image."""
    height, width = size
    shares = box_convert(boxes.float(), "xyxy", "cxcywh") / torch.tensor([width, height, width, height])
    labels = {"class_labels": classes, "boxes": shares}
    return {"labels": labels if masks is None else labels | {"masks": masks.to(torch.uint8)}}


def _universal_labels(boxes: Tensor, classes: Tensor, masks: Tensor | None, size: tuple[int, int]) -> dict[str, Any]:
    """Return labels as Mask2Former has them."""
    assert masks is not None
    return {"mask_labels": masks.float(), "class_labels": classes}


def _labels_for(processor: Any) -> Callable[..., dict[str, Any]]:
    return _universal_labels if mask2former.owns(processor) else _detector_labels


def _trained_on(objects: Objects) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return boxes, classes and masks of what is trained on: no crowds, no difficult objects."""
    keep = ~(objects.crowd | objects.difficult)
    boxes, classes = torch.from_numpy(objects.boxes[keep]).float(), torch.from_numpy(objects.labels[keep])
    if objects.masks is None:
        return boxes, classes, None
    masks = [decode_mask(mask) for mask, kept in zip(objects.masks, keep, strict=True) if kept]
    stack = np.stack(masks) if masks else np.zeros((0, *objects.size))
    return boxes, classes, torch.from_numpy(stack).to(torch.uint8)


class _ShortestSize(MasksInPlace, v2.RandomShortestSize):
    pass


def _augmented(
    transform: v2.Transform, cropped: bool, labels: Callable[..., dict[str, Any]], image: Image.Image, objects: Objects
) -> dict[str, Any]:
    """Transform image, boxes and masks together, without crowds and difficult objects."""
    boxes, classes, masks = _trained_on(objects)
    sample: dict[str, Any] = {
        "image": image,
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=objects.size),
        "labels": classes,
    }
    if masks is not None:
        sample["masks"] = tv_tensors.Mask(masks)
    out = transform(sample)
    pixels = out["image"].as_subclass(Tensor)
    boxes, classes = out["boxes"].as_subclass(Tensor), out["labels"]
    masks = out["masks"].as_subclass(Tensor) if "masks" in out else None
    if masks is not None and cropped:  # a crop may leave a box and no pixel of its object, or less of it
        there = masks.flatten(1).bool().any(1)
        masks, classes = masks[there], classes[there]
        boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
    return {"pixel_values": pixels, **labels(boxes, classes, masks, tuple(pixels.shape[-2:]))}


def _prepared(processor: Any, image: Image.Image, objects: Objects) -> dict[str, Any]:
    """Resize the image as its processor does, and the labels of the loss along; the truth stays as it is."""
    pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    boxes, classes, masks = _trained_on(objects)
    size = tuple(pixels.shape[-2:])
    scale = torch.tensor([size[1] / objects.size[1], size[0] / objects.size[0]] * 2)
    if masks is not None:
        masks = v2.functional.resize(masks, list(size), InterpolationMode.NEAREST_EXACT)
    return {"pixel_values": pixels, **_labels_for(processor)(boxes * scale, classes, masks, size), "truth": objects}
