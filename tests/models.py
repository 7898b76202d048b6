"""Tiny random models of every supported family: each law of the test suite holds for each of them.

A new family is tested by adding its models to `CASES`; `test_architecture` fails as long as a registered family has
none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from e3va_peft import Backbone, registered_backbones
from e3va_peft.detection import CascadeMaskRCNN, CascadeMaskRCNNConfig, RetinaNet, RetinaNetConfig

STAGES = ["stage1", "stage2", "stage3"]
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 2, 1],
    "num_heads": [1, 2, 2],
    "window_size": 4,
}
PLAIN = {
    "image_size": 28,
    "patch_size": 7,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}


@dataclass(frozen=True)
class Case:
    """A tiny model, and what a batch for it looks like."""

    name: str
    family: str
    build: Callable[[], nn.Module]
    labels: Callable[[int, int, int], dict[str, Any]]
    size: tuple[int, int] = (32, 32)
    blocks: tuple[str, ...] = ()

    def base(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = self.build().eval()
        perturb(model, seed)
        return model

    def batch(self, batch_size: int = 2, size: tuple[int, int] | None = None, seed: int = 1) -> dict[str, Any]:
        """Inputs without labels."""
        generator = torch.Generator().manual_seed(seed)
        height, width = size or self.size
        return {"pixel_values": torch.randn(batch_size, 3, height, width, generator=generator)}

    def training_batch(self, batch_size: int = 2, seed: int = 1) -> dict[str, Any]:
        """Inputs with labels."""
        return self.batch(batch_size, seed=seed) | self.labels(batch_size, *self.size)


def perturb(model: nn.Module, seed: int) -> None:
    """Move norms, biases and LayerScale away from their trivial initial values, as pretraining does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


class HeadOnModel(nn.Module):
    """A user's own head on a bare backbone, with a pooler in the backbone."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
        outputs = self.backbone(pixel_values, **kwargs)
        logits = self.head(outputs.pooler_output)
        result = dict(outputs.items()) | {"logits": logits}
        if labels is not None:
            result["loss"] = nn.functional.cross_entropy(logits, labels)
        return result


class HeadOnMaps(nn.Module):
    """A user's own dense head on a backbone that returns feature maps."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.lateral = nn.ModuleList(nn.Conv2d(channels, 4, 1) for channels in backbone.channels)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
        outputs = self.backbone(pixel_values, **kwargs)
        maps = [conv(x) for conv, x in zip(self.lateral, outputs.feature_maps, strict=True)]
        logits = sum(nn.functional.interpolate(x, size=pixel_values.shape[-2:]) for x in maps)
        result = dict(outputs.items()) | {"logits": logits}
        if labels is not None:
            result["loss"] = nn.functional.cross_entropy(logits, labels)
        return result


def classes(batch_size: int, height: int, width: int) -> dict[str, Any]:
    return {"labels": torch.arange(batch_size) % 3}


def label_map(batch_size: int, height: int, width: int) -> dict[str, Any]:
    return {"labels": torch.arange(batch_size * height * width).reshape(batch_size, height, width) % 3}


def instance_masks(batch_size: int, height: int, width: int) -> dict[str, Any]:
    masks = torch.zeros(2, height, width)
    masks[0, : height // 2], masks[1, height // 2 :] = 1, 1
    return {"mask_labels": [masks] * batch_size, "class_labels": [torch.tensor([0, 2])] * batch_size}


def objects(batch_size: int, height: int, width: int) -> dict[str, Any]:
    masks = torch.zeros(2, height, width)
    masks[0, : height // 2, : width // 2], masks[1, height // 4 :, width // 2 :] = 1, 1
    boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.625, 0.5, 0.75]])
    return {"labels": [{"class_labels": torch.tensor([0, 2]), "boxes": boxes, "masks": masks}] * batch_size}


def swin_backbone(out_features: list[str]) -> SwinBackbone:
    return SwinBackbone(SwinConfig(**SWIN, drop_path_rate=0.3, out_features=out_features))


def upernet(backbone_config: Any) -> UperNetForSemanticSegmentation:
    config = UperNetConfig(
        backbone_config=backbone_config, hidden_size=8, pool_scales=[1, 2], num_labels=3, auxiliary_channels=4,
        auxiliary_in_channels=backbone_config.hidden_size if "dinov2" in backbone_config.model_type else 32,
    )  # fmt: skip
    return UperNetForSemanticSegmentation(config)


def mask2former() -> Mask2FormerForUniversalSegmentation:
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(**(SWIN | {"depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2]}),
                                   out_features=["stage1", "stage2", "stage3", "stage4"]),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=4, num_labels=3,
        train_num_points=32, dropout=0.0,
    )  # fmt: skip
    return Mask2FormerForUniversalSegmentation(config)


def retinanet(backbone_config: Any, **kwargs: Any) -> RetinaNet:
    """A RetinaNet that drops no detection and scores them apart: a little change of it little changes its outputs."""
    config = RetinaNetConfig(
        backbone_config=backbone_config, num_labels=3, fpn_channels=8, anchor_scales=[4], aspect_ratios=[1.0],
        score_thresh=0.0, nms_thresh=1.0, detections_per_img=1000, **kwargs,
    )  # fmt: skip
    model = RetinaNet(config)
    with torch.no_grad():
        for conv in model.dense_heads.head.modules():
            if isinstance(conv, nn.Conv2d):
                conv.weight.mul_(0.1 / conv.weight.std())  # at first all places score nearly the same
    return model


def cascade(backbone_config: Any, **kwargs: Any) -> CascadeMaskRCNN:
    """A Cascade Mask R-CNN that samples and drops little: its losses are no matter of chance."""
    config = CascadeMaskRCNNConfig(
        backbone_config=backbone_config, num_labels=3, fpn_channels=8, box_head_dim=16, mask_dim=8,
        anchor_scales=[2], aspect_ratios=[1.0], score_thresh=0.0, nms_thresh=1.0, rpn_nms_thresh=1.0,
        rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=20, **kwargs,
    )  # fmt: skip
    return CascadeMaskRCNN(config)


def dinov2_config(**kwargs: Any) -> Dinov2Config:
    return Dinov2Config(**(PLAIN | {"layerscale_value": 0.5, "drop_path_rate": 0.3} | kwargs))


_SWIN_BLOCKS = ("SwinLayer",)
_PLAIN: dict[str, Any] = {"size": (28, 28)}

CASES = [
    Case("swin-classifier", "swin", lambda: SwinForImageClassification(SwinConfig(**SWIN, **DROPOUT, num_labels=3)),
         classes, blocks=_SWIN_BLOCKS),
    Case("swin-in-own-head", "swin", lambda: HeadOnModel(SwinModel(SwinConfig(**SWIN)), 32), classes,
         blocks=_SWIN_BLOCKS),
    Case("swin-maps-in-own-head", "swin", lambda: HeadOnMaps(swin_backbone(STAGES)), label_map, blocks=_SWIN_BLOCKS),
    Case("swin-early-maps", "swin", lambda: HeadOnMaps(swin_backbone(["stage2"])), label_map, blocks=_SWIN_BLOCKS),
    Case("swin-upernet", "swin", lambda: upernet(SwinConfig(**SWIN, out_features=STAGES)), label_map,
         blocks=_SWIN_BLOCKS),
    Case("swin-mask2former", "swin", mask2former, instance_masks, blocks=_SWIN_BLOCKS),
    Case("vit-classifier", "vit", lambda: ViTForImageClassification(ViTConfig(**PLAIN, **DROPOUT, num_labels=3)),
         classes, blocks=("ViTLayer",), **_PLAIN),
    Case("vit-in-own-head", "vit", lambda: HeadOnModel(ViTModel(ViTConfig(**PLAIN)), 16), classes,
         blocks=("ViTLayer",), **_PLAIN),
    Case("deit-classifier", "vit", lambda: DeiTForImageClassification(DeiTConfig(**PLAIN, num_labels=3)), classes,
         blocks=("DeiTLayer",), **_PLAIN),
    Case("dinov2-classifier", "dinov2", lambda: Dinov2ForImageClassification(dinov2_config(num_labels=3)), classes,
         size=(28, 28), blocks=("Dinov2Layer",)),
    Case("dinov2-registers-classifier", "dinov2",
         lambda: Dinov2WithRegistersForImageClassification(
             Dinov2WithRegistersConfig(**PLAIN, num_labels=3, layerscale_value=0.5)), classes,
         size=(28, 28), blocks=("Dinov2WithRegistersLayer",)),
    Case("dinov2-early-maps", "dinov2",
         lambda: HeadOnMaps(Dinov2Backbone(dinov2_config(out_features=["stage1", "stage2"]))), label_map,
         size=(28, 28), blocks=("Dinov2Layer",)),
    Case("dinov2-maps-without-norm", "dinov2",
         lambda: HeadOnMaps(Dinov2Backbone(dinov2_config(out_features=["stage3"], apply_layernorm=False))), label_map,
         size=(28, 28), blocks=("Dinov2Layer",)),
    Case("dinov2-upernet", "dinov2", lambda: upernet(dinov2_config(out_features=STAGES)), label_map,
         size=(28, 28), blocks=("Dinov2Layer",)),
    Case("swin-retinanet", "swin", lambda: retinanet(SwinConfig(**SWIN, drop_path_rate=0.3, out_features=STAGES[1:])),
         objects, blocks=_SWIN_BLOCKS),
    Case("swin-cascade", "swin", lambda: cascade(SwinConfig(**SWIN, drop_path_rate=0.3, out_features=["stage3"])),
         objects, blocks=_SWIN_BLOCKS),
    Case("vit-retinanet", "vit", lambda: retinanet(ViTConfig(**PLAIN | DROPOUT | {"patch_size": 14})), objects,
         blocks=("ViTLayer",), **_PLAIN),
    Case("dinov2-cascade", "dinov2", lambda: cascade(dinov2_config(out_features=["stage3"])), objects,
         size=(28, 28), blocks=("Dinov2Layer",)),
]  # fmt: skip

BY_NAME = {case.name: case for case in CASES}
DETECTORS = ("swin-retinanet", "swin-cascade", "vit-retinanet", "dinov2-cascade")
every_model = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def every_model_but(*names: str) -> pytest.MarkDecorator:
    """Parametrise over all models but these; the comment at the call says why."""
    assert set(names) <= BY_NAME.keys()
    return pytest.mark.parametrize("case", [c for c in CASES if c.name not in names], ids=lambda case: case.name)


def registered(name: str) -> Backbone:
    """A supported family."""
    return registered_backbones()[name]


def tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Iterate over every tensor of an output, with its path."""
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors(item, f"{prefix}[{index}]")


def train_steps(model: nn.Module, batch: dict[str, Any], steps: int = 3, lr: float = 0.05) -> None:
    """Take a few optimizer steps, large enough to move every output."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model(**batch)).backward()
        optimizer.step()
    model.eval()


def loss_of(outputs: Any) -> Tensor:
    return outputs["loss"]
