"""A dense-prediction model from transformers' own parts: any backbone, DPT's neck, DPT's segmentation head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import DPTConfig, DPTPreTrainedModel
from transformers.backbone_utils import load_backbone
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.dpt.modeling_dpt import DPTNeck, DPTSemanticSegmentationHead


class DPTOverBackboneForSemanticSegmentation(DPTPreTrainedModel):
    """DPT (Ranftl et al., arXiv 2103.13413) for segmentation over a backbone of its own, such as DINOv2.

    transformers has this composition for depth only (`DPTForDepthEstimation`); its `DPTForSemanticSegmentation` brings
    a ViT of its own. `pixel_values` (B, 3, H, W), both multiples of the patch size -> `logits` (B, classes, H', W');
    with `labels` (B, H, W) also the cross-entropy at full resolution.
    """

    def __init__(self, config: DPTConfig) -> None:
        super().__init__(config)
        self.backbone = load_backbone(config)
        self.neck = DPTNeck(config)
        self.decode_head = DPTSemanticSegmentationHead(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> SemanticSegmenterOutput:
        """Predict a label map, and its loss where labels are given."""
        outputs = self.backbone(pixel_values, **kwargs)
        patch = self.config.backbone_config.patch_size
        height, width = (side // patch for side in pixel_values.shape[-2:])
        logits = self.decode_head(self.neck(list(outputs.feature_maps), height, width))
        loss = None
        if labels is not None:
            full = nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
            loss = nn.functional.cross_entropy(full, labels, ignore_index=self.config.semantic_loss_ignore_index)
        return SemanticSegmenterOutput(loss=loss, logits=logits)
