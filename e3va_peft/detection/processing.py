"""The image processor of the detectors: the only place that resizes, on the way in and on the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from faster_coco_eval.core import mask as rle
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import box_convert
from transformers import DetrImageProcessor

from e3va_peft.detection.annotations import LEAST_SIDE, encode_segmentation, is_set

Sizes = Sequence[tuple[int, int]] | Tensor


class DetectionImageProcessor(DetrImageProcessor):
    """DETR's way in: shorter side 800 and longer side at most 1333 pixels, COCO annotations to labels, padding.

    Its way out are `post_process_object_detection` and `post_process_instance_segmentation`.
    """

    do_convert_rgb = True  # DETR's fails on grey, palette and RGBA images

    def prepare_annotation(self, image: Tensor, target: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Turn one image's COCO annotations into labels, without crowds and boxes without area in the image.

        Masks may be polygons or run lengths, as numbers or text. DETR's own reads no text, wants pycocotools, and
        stacks the masks of an image without objects, and those of crowds with those of objects.

        Raises:
            ValueError: A flag is neither 0 nor 1; an object lacks its box, class or area, or, with
                `return_segmentation_masks`, has no segmentation, or one that cannot be right.
        """
        if "annotations" not in target:
            return super().prepare_annotation(image, target, *args, **kwargs)
        height, width = image.shape[-2:]
        objects = [{**item, "iscrowd": 0} for i, item in enumerate(target["annotations"]) if _is_object(item, i)]
        boxes = torch.tensor([item["bbox"] for item in objects], dtype=torch.float32).reshape(-1, 4)
        corners = (boxes[:, :2] + boxes[:, 2:]).minimum(torch.tensor([width, height]))  # as DETR drops and rounds
        kept = (corners - boxes[:, :2].clip(min=0) > LEAST_SIDE).all(1).tolist()
        objects = [item for item, keep in zip(objects, kept, strict=True) if keep]
        with_masks = kwargs.pop("return_segmentation_masks", False)
        labels: dict[str, Any] = super().prepare_annotation(
            image, {**target, "annotations": objects}, *args, return_segmentation_masks=False, **kwargs
        )
        if with_masks:
            masks = [_mask(item, (height, width)) for item in objects]
            empty = torch.zeros(0, height, width, dtype=torch.bool)
            labels["masks"] = (torch.stack(masks) if masks else empty).to(image.device)
        return labels

    def resize_annotation(
        self, annotation: dict[str, Any], orig_size: Any, target_size: tuple[int, int], **kwargs: Any
    ) -> dict[str, Any]:
        """Resize labels with their image; also those of an image without objects, whose masks DETR's own stacks."""
        empty = "masks" in annotation and not len(annotation["masks"])
        given = {name: value for name, value in annotation.items() if not (empty and name == "masks")}
        resized: dict[str, Any] = super().resize_annotation(given, orig_size, target_size, **kwargs)
        if empty:
            resized["masks"] = annotation["masks"].new_zeros(0, *target_size)
        return resized

    def post_process_object_detection(
        self, outputs: Any, threshold: float = 0.5, target_sizes: Sizes | None = None
    ) -> list[dict[str, Tensor]]:
        """Return the boxes of each image.

        Args:
            outputs: `DetectionOutput` of a detector in eval mode.
            threshold: Only detections that score more.
            target_sizes: Height and width of each image in pixels. Without it boxes stay shares of the image.

        Returns:
            For each image `scores` (n,), `labels` (n,) and `boxes` (n, 4), x1 y1 x2 y2, the best first.

        Raises:
            ValueError: `outputs` hold no detections, or more or fewer sizes than images.
        """
        return [
            {"scores": found["scores"], "labels": found["labels"], "boxes": found["boxes"]}
            for found in _detections(outputs, threshold, target_sizes)
        ]

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        target_sizes: Sizes | None = None,
    ) -> list[dict[str, Tensor]]:
        """Return boxes and masks of each image; instances may overlap.

        Args:
            outputs: `DetectionOutput` of a detector in eval mode.
            threshold: Only detections that score more.
            mask_threshold: Pixels that are more likely than this belong to the instance.
            target_sizes: Height and width of each image in pixels.

        Returns:
            For each image `scores` (n,), `labels` (n,), `boxes` (n, 4), x1 y1 x2 y2, and `masks` (n, H, W) bool, the
            best first.

        Raises:
            ValueError: `outputs` hold no masks, or no size for each image.
        """
        if outputs.pred_masks is None or target_sizes is None:
            what = "outputs.pred_masks=None: a model without masks has none. Use post_process_object_detection."
            raise ValueError(what if target_sizes is not None else "target_sizes=None: masks need a size in pixels.")
        results = _detections(outputs, threshold, target_sizes)
        for found, (height, width) in zip(results, _as_list(target_sizes), strict=True):
            pasted = [  # one by one: all at once are 4 bytes a pixel and object
                paste_masks_in_image(mask[None, None], box[None], (height, width))[0, 0] > mask_threshold
                for mask, box in zip(found.pop("masks"), found["boxes"], strict=True)
            ]
            empty = torch.zeros(0, height, width, dtype=torch.bool, device=found["boxes"].device)
            found["masks"] = torch.stack(pasted) if pasted else empty
        return results


def _is_object(item: dict[str, Any], index: int) -> bool:
    """Whether an annotation is of one object, not of a crowd, and then has what labels are made of."""
    try:
        if is_set(item.get("iscrowd"), "iscrowd"):
            return False
    except ValueError as error:
        raise ValueError(f"annotations[{index}] {error}") from None
    missing = [key for key in ("bbox", "category_id", "area") if item.get(key) is None]
    if missing:
        raise ValueError(f"annotations[{index}] has no {', '.join(missing)}. Add what a COCO annotation has.")
    return True


def _mask(item: dict[str, Any], size: tuple[int, int]) -> Tensor:
    """Decode an object's mask, `(H, W)` bool."""
    try:
        if not item.get("segmentation"):
            raise ValueError("has no segmentation (polygons or RLE). Add it, or leave out return_segmentation_masks.")
        return torch.from_numpy(rle.decode(encode_segmentation(item["segmentation"], size))).bool()
    except ValueError as error:
        raise ValueError(f"annotations: the object with the bbox {item['bbox']} {error}") from None


def _detections(outputs: Any, threshold: float, target_sizes: Sizes | None) -> list[dict[str, Tensor]]:
    if outputs.scores is None:
        raise ValueError("outputs.scores=None: a detector in training mode detects nothing. Call model.eval() first.")
    sizes = None if target_sizes is None else _as_list(target_sizes)
    if sizes is not None and len(sizes) != len(outputs.scores):
        raise ValueError(f"target_sizes: has {len(sizes)} sizes for {len(outputs.scores)} images. Give one for each.")
    results = []
    for i, (scores, labels) in enumerate(zip(outputs.scores, outputs.labels, strict=True)):
        keep = (labels >= 0) & (scores > threshold)
        boxes = box_convert(outputs.pred_boxes[i][keep], "cxcywh", "xyxy")
        if sizes is not None:
            height, width = sizes[i]
            boxes = boxes * boxes.new_tensor([width, height, width, height])
        found = {"scores": scores[keep], "labels": labels[keep], "boxes": boxes}
        if getattr(outputs, "pred_masks", None) is not None:
            found["masks"] = outputs.pred_masks[i][keep]
        results.append(found)
    return results


def _as_list(sizes: Sizes) -> list[tuple[int, int]]:
    values = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    return [(int(height), int(width)) for height, width in values]
