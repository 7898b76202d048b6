"""A dense-prediction model that leaves the work to the backbone: any plain ViT backbone and a linear decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Dinov2Backbone, Dinov2Config, Dinov2PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput


class Dinov2ForSemanticSegmentation(Dinov2PreTrainedModel):
    """DINOv2 with a linear decoder: one 1x1 convolution and a pixel shuffle.

    The decoder is that of transformers' `ViTForMaskedImageModeling`: each token predicts all pixels of its patch, so
    the label map has the image's own resolution. `pixel_values` (B, 3, H, W), both multiples of the patch size ->
    `logits` (B, classes, H, W); with `labels` (B, H, W) also the cross-entropy.
    """

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__(config)
        self.backbone = Dinov2Backbone(config)
        self.decode_head = nn.Sequential(
            nn.Conv2d(sum(self.backbone.channels), config.num_labels * config.patch_size**2, kernel_size=1),
            nn.PixelShuffle(config.patch_size),
        )
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> SemanticSegmenterOutput:
        """Predict a label map, and its loss where labels are given."""
        maps = self.backbone(pixel_values, **kwargs).feature_maps
        logits = self.decode_head(torch.cat(maps, dim=1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SemanticSegmenterOutput(loss=loss, logits=logits)
