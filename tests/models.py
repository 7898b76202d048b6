"""Tiny random models of every supported family: each law of the test suite holds for each of them.

A new family is tested by adding its models to `CASES`; `test_architecture` fails as long as a registered family has
none.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import (
    ConvNextBackbone,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    DINOv3ConvNextBackbone,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTBackbone,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
    Swinv2Backbone,
    Swinv2Config,
    Swinv2ForImageClassification,
    TimmBackbone,
    TimmBackboneConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.modeling_outputs import BackboneOutput
from transformers.models.upernet.modeling_upernet import UperNetHead

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
SWIN_B = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 7}
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
    sizes: tuple[tuple[int, int], ...] = ((32, 32), (33, 47), (61, 40))
    """Of images that one model takes one after the other; none where it has one size."""
    embeddings: str = "patch_embeddings"
    """The end of the name of a frozen module in front of the blocks."""
    stem: bool = True
    """The first hidden state is in front of every block."""
    beyond: frozenset[str] = frozenset()
    """Outputs behind the last adapted block, and those that see no image."""
    pickles: bool = True
    """False where transformers hooks its backbones with closures as it builds them, which no pickle takes."""
    as_tuple: bool = True
    """It takes return_dict=False and gives all of its outputs in a tuple."""
    lora: str = r".*\.(q_proj|v_proj)"
    """Targets of LoRA in it, to compare with."""

    def base(self, seed: int = 0) -> nn.Module:
        """A model of its own, and the random state behind its making."""
        again, state = _built(self, seed)
        torch.set_rng_state(state)
        return again()

    def batch(self, batch_size: int = 2, size: tuple[int, int] | None = None, seed: int = 1) -> dict[str, Any]:
        """Inputs without labels."""
        generator = torch.Generator().manual_seed(seed)
        height, width = size or self.size
        return {"pixel_values": torch.randn(batch_size, 3, height, width, generator=generator)}

    def training_batch(self, batch_size: int = 2, seed: int = 1) -> dict[str, Any]:
        """Inputs with labels."""
        return self.batch(batch_size, seed=seed) | self.labels(batch_size, *self.size)


@cache
def _built(case: Case, seed: int) -> tuple[Callable[[], nn.Module], Tensor]:
    """Build a model once: a copy of it takes a fraction of the time."""
    torch.manual_seed(seed)
    model = case.build().eval()
    perturb(model, seed)
    return copier(model), torch.get_rng_state()


class _Pickler(pickle.Pickler):
    """Pickles all but the tensors, and what deep copies share."""

    def __init__(self, file: io.BytesIO, kept: list[Any]) -> None:
        super().__init__(file)
        self.kept = kept

    def reducer_override(self, item: Any) -> Any:
        if item is _copied or not isinstance(item, Tensor | FunctionType | type):
            return NotImplemented
        self.kept.append(item)
        return _copied, (len(self.kept) - 1,)


_kept: list[Any] = []


def _copied(index: int) -> Any:
    item = _kept[index]
    if type(item) is nn.Parameter:
        return nn.Parameter(item.detach().clone(), item.requires_grad)
    return copy.deepcopy(item) if isinstance(item, Tensor) else item


def copier(model: nn.Module) -> Callable[[], nn.Module]:
    """What makes deep copies of a model, much faster than `copy.deepcopy`; tensors are to share no memory."""
    file = io.BytesIO()
    _Pickler(file, _kept).dump(model)
    return partial(pickle.loads, file.getvalue())


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
        auxiliary_in_channels=backbone_config.hidden_size if "dino" in backbone_config.model_type else 32,
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
    """A Cascade Mask R-CNN that samples and drops little: its losses do not depend on chance."""
    config = CascadeMaskRCNNConfig(
        backbone_config=backbone_config, num_labels=3, fpn_channels=8, box_head_dim=16, mask_dim=8,
        anchor_scales=[2], aspect_ratios=[1.0], score_thresh=0.0, nms_thresh=1.0, rpn_nms_thresh=1.0,
        rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=20, **kwargs,
    )  # fmt: skip
    return CascadeMaskRCNN(config)


def dinov2_config(**kwargs: Any) -> Dinov2Config:
    return Dinov2Config(**(PLAIN | {"layerscale_value": 0.5, "drop_path_rate": 0.3} | kwargs))


class TimmClassifier(nn.Module):
    """A user's own model around a plain timm model, whose outputs it names."""

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__()
        self.model = timm.create_model(name, num_classes=3, **kwargs)

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states: bool = False
    ) -> dict[str, Any]:
        if output_hidden_states:
            features, maps = self.model.forward_intermediates(pixel_values)
            result = {"logits": self.model.forward_head(features), "features": features, "hidden_states": maps}
        else:
            result = {"logits": self.model(pixel_values)}
        if labels is not None:
            result["loss"] = nn.functional.cross_entropy(result["logits"], labels)
        return result


class ChannelsLastMaps(nn.Module):
    """A backbone whose maps are (B, H, W, C), as timm's Swin gives them, turned as heads want them."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels = backbone.channels

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BackboneOutput:
        outputs = self.backbone(pixel_values)
        return BackboneOutput(feature_maps=tuple(x.movedim(-1, 1) for x in outputs.feature_maps))


TIMM_VIT = {"img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 3, "num_heads": 2, "dynamic_img_size": True}
TIMM_SWIN = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": (1, 2, 1),
    "num_heads": (1, 2, 2),
    "window_size": 4,
    "dynamic_img_size": True,
    "drop_path_rate": 0.3,
}


def timm_wrapper(name: str, **kwargs: Any) -> TimmWrapperForImageClassification:
    config = {"architecture": name, "num_classes": 3, "label_names": ["a", "b", "c"], "model_args": kwargs}
    return TimmWrapperForImageClassification(TimmWrapperConfig.from_dict(config))


def timm_backbone(name: str, out_indices: list[int], **kwargs: Any) -> TimmBackbone:
    return TimmBackbone(TimmBackboneConfig(backbone=name, features_only=True, out_indices=out_indices), **kwargs)


def upernet_over(backbone: nn.Module) -> UperNetForSemanticSegmentation:
    """UperNet whose backbone is put in its place, as users of timm do."""
    model = upernet(SwinConfig(**SWIN, out_features=STAGES))
    config = UperNetConfig(backbone_config=backbone.config, hidden_size=8, pool_scales=[1, 2], num_labels=3,
                           use_auxiliary_head=False)  # fmt: skip
    model.backbone = backbone
    model.decode_head = UperNetHead(config, in_channels=backbone.channels)
    model.auxiliary_head = None
    return model


_MAPS: dict[str, Any] = {"pickles": False, "as_tuple": False}
_SWIN: dict[str, Any] = {"blocks": ("SwinLayer",)}
_PLAIN: dict[str, Any] = {"size": (28, 28), "sizes": ((35, 42), (28, 28), (49, 35))}
_VIT: dict[str, Any] = {"size": (28, 28), "sizes": (), "blocks": ("ViTLayer",)}
_DINOV2: dict[str, Any] = {**_PLAIN, "blocks": ("Dinov2Layer",)}
_DINOV3: dict[str, Any] = {**_PLAIN, "blocks": ("DINOv3ViTLayer",)}
_SWINV2: dict[str, Any] = {"blocks": ("Swinv2Layer",), "lora": r".*\.(query|value)"}
_CONVNEXT: dict[str, Any] = {"blocks": ("ConvNextLayer", "ConvNextV2Layer"), "lora": r".*\.pwconv[12]"}
_DINOV3_CONVNEXT: dict[str, Any] = {
    "blocks": ("DINOv3ConvNextLayer",),
    "lora": r".*\.pointwise_conv[12]",
    "embeddings": "stages.0.downsample_layers.0",
}
_TIMM: dict[str, Any] = {"lora": r".*\.qkv", "embeddings": "patch_embed", "stem": False}
_TIMM_VIT: dict[str, Any] = {**_TIMM, **_PLAIN, "blocks": ("Block",)}
_TIMM_SWIN: dict[str, Any] = {**_TIMM, "blocks": ("SwinTransformerBlock",), "sizes": ((32, 32), (34, 46), (60, 40))}
_BEHIND_STAGE_2 = frozenset({"hidden_states[3]"})


def convnext_config(cls: Any, **kwargs: Any) -> Any:
    sizes = {"hidden_sizes": [8, 12, 16], "depths": [1, 2, 1], "drop_path_rate": 0.3}
    more = {ConvNextConfig: {"layer_scale_init_value": 0.5}, ConvNextV2Config: {}}
    if cls in more:
        return cls(**sizes, **more[cls], num_stages=3, patch_size=2, **kwargs)
    return cls(**sizes, layer_scale_init_value=0.5, **kwargs)


def dinov3_config(**kwargs: Any) -> DINOv3ViTConfig:
    more = {"layerscale_value": 0.5, "drop_path_rate": 0.3, "num_register_tokens": 2}
    return DINOv3ViTConfig(**(PLAIN | more | kwargs))


def swinv2_config(**kwargs: Any) -> Swinv2Config:
    return Swinv2Config(**SWIN, drop_path_rate=0.3, **kwargs)


CASES = [
    Case("swin-classifier", "swin", lambda: SwinForImageClassification(SwinConfig(**SWIN, **DROPOUT, num_labels=3)),
         classes, **_SWIN),
    Case("swin-in-own-head", "swin", lambda: HeadOnModel(SwinModel(SwinConfig(**SWIN)), 32), classes, as_tuple=False,
         **_SWIN),
    Case("swin-maps-in-own-head", "swin", lambda: HeadOnMaps(swin_backbone(STAGES)), label_map, **_SWIN, **_MAPS),
    Case("swin-early-maps", "swin", lambda: HeadOnMaps(swin_backbone(["stage2"])), label_map, beyond=_BEHIND_STAGE_2,
         **_SWIN, **_MAPS),
    Case("swin-upernet", "swin", lambda: upernet(SwinConfig(**SWIN, out_features=STAGES)), label_map, pickles=False,
         **_SWIN),
    # its tuple leaves out outputs by rules of its own; its learned queries have not seen the image yet
    Case("swin-mask2former", "swin", mask2former, instance_masks, lora=r".*encoder\.layers.*(q_proj|v_proj)", **_SWIN,
         **_MAPS),
    Case("vit-classifier", "vit", lambda: ViTForImageClassification(ViTConfig(**PLAIN, **DROPOUT, num_labels=3)),
         classes, **_VIT),
    Case("vit-in-own-head", "vit", lambda: HeadOnModel(ViTModel(ViTConfig(**PLAIN)), 16), classes, as_tuple=False,
         **_VIT),
    Case("deit-classifier", "vit", lambda: DeiTForImageClassification(DeiTConfig(**PLAIN, num_labels=3)), classes,
         **{**_VIT, "blocks": ("DeiTLayer",)}),
    Case("dinov2-classifier", "dinov2", lambda: Dinov2ForImageClassification(dinov2_config(num_labels=3)), classes,
         **_DINOV2),
    Case("dinov2-registers-classifier", "dinov2",
         lambda: Dinov2WithRegistersForImageClassification(
             Dinov2WithRegistersConfig(**PLAIN, num_labels=3, layerscale_value=0.5)), classes,
         blocks=("Dinov2WithRegistersLayer",), **_PLAIN),
    Case("dinov2-early-maps", "dinov2",
         lambda: HeadOnMaps(Dinov2Backbone(dinov2_config(out_features=["stage1", "stage2"]))), label_map,
         beyond=_BEHIND_STAGE_2, **_DINOV2, **_MAPS),
    Case("dinov2-maps-without-norm", "dinov2",
         lambda: HeadOnMaps(Dinov2Backbone(dinov2_config(out_features=["stage3"], apply_layernorm=False))), label_map,
         **_DINOV2, **_MAPS),
    Case("dinov2-upernet", "dinov2", lambda: upernet(dinov2_config(out_features=STAGES)), label_map, pickles=False,
         **_DINOV2),
    Case("swin-retinanet", "swin", lambda: retinanet(SwinConfig(**SWIN, drop_path_rate=0.3, out_features=STAGES[1:])),
         objects, pickles=False, **_SWIN),
    Case("swin-cascade", "swin", lambda: cascade(SwinConfig(**SWIN, drop_path_rate=0.3, out_features=["stage3"])),
         objects, pickles=False, **_SWIN),
    Case("vit-retinanet", "vit", lambda: retinanet(ViTConfig(**PLAIN | DROPOUT | {"patch_size": 14})), objects,
         **_VIT),
    Case("dinov2-cascade", "dinov2", lambda: cascade(dinov2_config(out_features=["stage3"])), objects, pickles=False,
         **_DINOV2),
    Case("swinv2-classifier", "swinv2", lambda: Swinv2ForImageClassification(swinv2_config(num_labels=3)), classes,
         **_SWINV2),
    Case("swinv2-early-maps", "swinv2",
         lambda: HeadOnMaps(Swinv2Backbone(swinv2_config(out_features=["stage1", "stage2"]))), label_map,
         beyond=_BEHIND_STAGE_2, **_SWINV2, **_MAPS),
    Case("swinv2-upernet", "swinv2", lambda: upernet(swinv2_config(out_features=STAGES)), label_map, pickles=False,
         **_SWINV2),
    Case("dinov3-vit-in-own-head", "dinov3-vit", lambda: HeadOnModel(DINOv3ViTModel(dinov3_config()), 16), classes,
         as_tuple=False, **_DINOV3),
    Case("dinov3-vit-early-maps", "dinov3-vit",
         lambda: HeadOnMaps(DINOv3ViTBackbone(dinov3_config(out_features=["stage1", "stage2"]))), label_map,
         beyond=_BEHIND_STAGE_2, **_DINOV3, **_MAPS),
    Case("dinov3-vit-upernet", "dinov3-vit", lambda: upernet(dinov3_config(out_features=STAGES)), label_map,
         pickles=False, **_DINOV3),
    Case("convnext-classifier", "convnext",
         lambda: ConvNextForImageClassification(convnext_config(ConvNextConfig, num_labels=3)), classes, **_CONVNEXT),
    Case("convnextv2-classifier", "convnext",
         lambda: ConvNextV2ForImageClassification(convnext_config(ConvNextV2Config, num_labels=3)), classes,
         **_CONVNEXT),
    Case("convnext-early-maps", "convnext",
         lambda: HeadOnMaps(ConvNextBackbone(convnext_config(ConvNextConfig, out_features=["stage2"]))), label_map,
         beyond=_BEHIND_STAGE_2, **_CONVNEXT, **_MAPS),
    Case("convnext-retinanet", "convnext",
         lambda: retinanet(convnext_config(ConvNextConfig, out_features=STAGES[1:])), objects, pickles=False,
         **_CONVNEXT),
    Case("dinov3-convnext-in-own-head", "dinov3-convnext",
         lambda: HeadOnModel(DINOv3ConvNextModel(convnext_config(DINOv3ConvNextConfig)), 16), classes, as_tuple=False,
         **_DINOV3_CONVNEXT),
    Case("dinov3-convnext-maps", "dinov3-convnext",
         lambda: HeadOnMaps(DINOv3ConvNextBackbone(convnext_config(DINOv3ConvNextConfig, out_features=STAGES))),
         label_map, **_DINOV3_CONVNEXT, **_MAPS),
    Case("timm-vit", "timm-vit", lambda: TimmClassifier("vit_tiny_patch16_224", init_values=0.5, **TIMM_VIT), classes,
         as_tuple=False, **_TIMM_VIT),
    Case("timm-vit-averaged", "timm-vit",
         lambda: timm_wrapper("vit_tiny_patch16_224", global_pool="avg", reg_tokens=2, **TIMM_VIT), classes,
         **_TIMM_VIT),
    Case("timm-vit-upernet", "timm-vit",
         lambda: upernet_over(timm_backbone("vit_tiny_patch16_224", [0, 1, 2], **TIMM_VIT)), label_map,
         **{**_TIMM_VIT, **_MAPS, "pickles": True}),
    Case("timm-swin", "timm-swin", lambda: TimmClassifier("swin_tiny_patch4_window7_224", **TIMM_SWIN), classes,
         as_tuple=False, **_TIMM_SWIN),
    Case("timm-swin-wrapper", "timm-swin", lambda: timm_wrapper("swin_tiny_patch4_window7_224", **TIMM_SWIN), classes,
         **_TIMM_SWIN),
    Case("timm-swin-features", "timm-swin-features",
         lambda: HeadOnMaps(ChannelsLastMaps(timm_backbone("swin_tiny_patch4_window7_224", [0, 1, 2], **TIMM_SWIN))),
         label_map, **{**_TIMM_SWIN, **_MAPS, "pickles": True}),
]  # fmt: skip

BY_NAME = {case.name: case for case in CASES}
DETECTORS = ("swin-retinanet", "swin-cascade", "vit-retinanet", "dinov2-cascade", "convnext-retinanet")
every_model = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
first_of = {case.family: case for case in reversed(CASES)}
every_family = pytest.mark.parametrize("case", first_of.values(), ids=lambda case: case.name)  # by one model of each


def every_model_that(**has: Any) -> pytest.MarkDecorator:
    """Parametrise over all models whose fields have these values."""
    cases = [case for case in CASES if all(getattr(case, name) == value for name, value in has.items())]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


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
