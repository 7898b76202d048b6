"""From any backbone of transformers to a feature pyramid: torchvision's FPN, or ViTDet's for a plain ViT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock
from torchvision.ops.poolers import initLevelMapper
from transformers import AutoBackbone, AutoModel, TimmBackboneConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

_PLAIN_SCALES = (4.0, 2.0, 1.0, 0.5)


def build_backbone(config: Any) -> nn.Module:
    """Build a backbone from its config: one with feature maps, or a plain transformer without its pooler."""
    if isinstance(config, TimmBackboneConfig):
        return _timm_backbone(config)
    if type(config) in MODEL_FOR_BACKBONE_MAPPING:
        return AutoBackbone.from_config(config)
    return AutoModel.from_config(config, add_pooling_layer=False)


def _timm_backbone(config: TimmBackboneConfig) -> nn.Module:
    """Build a model of timm's for images of any size, which its transformers have to be asked for."""
    try:
        return AutoBackbone.from_config(config, dynamic_img_size=True)
    except TypeError:  # a model that knows no such argument, because it takes any size anyway
        return AutoBackbone.from_config(config)


def is_plain(config: Any) -> bool:
    """Whether a backbone keeps one resolution in all blocks, as a ViT does."""
    if isinstance(config, TimmBackboneConfig):
        return len(set(_timm_strides(config.backbone, config.output_stride))) == 1
    return not hasattr(config, "depths")


@lru_cache
def _timm_strides(name: str | None, output_stride: int | None) -> tuple[float, ...]:
    """Return the strides of all feature maps of a model of timm's, of which its config tells nothing."""
    with torch.device("meta"):
        model: Any = AutoBackbone.from_config(TimmBackboneConfig(backbone=name, output_stride=output_stride))
    return tuple(float(info["reduction"]) for info in model._backbone.feature_info.info)


def backbone_strides(config: Any) -> list[float]:
    """Work out how many pixels lie between neighbours of each feature map of a backbone.

    Args:
        config: Config of the backbone.

    Raises:
        ValueError: It has neither stages nor a patch size.
    """
    if isinstance(config, TimmBackboneConfig):
        strides = _timm_strides(config.backbone, config.output_stride)
        return [strides[0]] if is_plain(config) else [strides[index] for index in config.out_indices]
    patch = getattr(config, "patch_stride", None) or getattr(config, "patch_size", None)
    if patch is None and not is_plain(config):
        patch = 4  # the stem of a ResNet
    if patch is None:
        raise ValueError(
            f"backbone_config={type(config).__name__}: has no patch_size, so its strides are unknown. Give "
            "strides=[...]."
        )
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    if is_plain(config):
        return [float(patch)]
    names = stage_names(config)
    return [float(patch * 2 ** names.index(name)) for name in config.out_features]


def cut_into(config: Any) -> int:
    """Return the side in pixels of the squares that a backbone cuts an image into; 1 where it fills a rest up.

    What is left over at the right and lower sides a plain ViT and ConvNeXt do not see. Swin pads.

    Args:
        config: Config of the backbone.

    Raises:
        ValueError: See `backbone_strides`.
    """
    return int(max(backbone_strides(config))) if is_plain(config) or "convnext" in config.model_type else 1


def stage_names(config: Any) -> list[str]:
    """Return the names of a backbone's stages, without the stem that most have in front of them."""
    return [name for name in config.stage_names if name != "stem"]


def feature_maps(backbone: nn.Module, pixel_values: Tensor, strides: Sequence[float]) -> list[Tensor]:
    """Run a backbone, `(B, 3, H, W)` to one map `(B, C, h, w)` per stage, or to the one map of a plain ViT.

    `strides` are those of the maps. Maps whose channels are last, as those of timm's Swin, are turned.

    A plain ViT needs whole patches: the image is padded with zeros on its right and lower sides.
    """
    config: Any = backbone.config
    if not is_plain(config):
        return _channels_first(backbone, backbone(pixel_values).feature_maps)
    patch = int(strides[0])
    height, width = pixel_values.shape[-2:]
    right, below = -width % patch, -height % patch
    pixels = F.pad(pixel_values, (0, right, 0, below)) if right or below else pixel_values
    if hasattr(backbone, "channels"):
        return _channels_first(backbone, backbone(pixels).feature_maps[-1:])
    h, w = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    hidden = backbone(pixels, interpolate_pos_encoding=True).last_hidden_state[:, -h * w :]  # (B, h * w, C)
    return [hidden.transpose(1, 2).unflatten(2, (h, w))]


def _channels_first(backbone: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
    """Return maps as (B, C, h, w). Some models of timm, its Swin among them, say that theirs are (B, h, w, C)."""
    last = getattr(getattr(backbone, "_backbone", None), "output_fmt", None) == "NHWC"
    return [x.movedim(-1, 1) if last else x for x in maps]


def backbone_channels(backbone: nn.Module) -> list[int]:
    """Return the channels of each feature map."""
    config: Any = backbone.config
    channels = list(getattr(backbone, "channels", None) or [config.hidden_size])
    return channels[-1:] if is_plain(config) else channels


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's feature pyramid: four scales of the one map of a plain ViT, `(B, C, h, w)` to strides p/4 .. 2 p.

    Source: Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", section 3.

    Args:
        in_channels: C.
        out_channels: Channels of every level.
        extra_blocks: torchvision's block for coarser levels.
    """

    def __init__(self, in_channels: int, out_channels: int, extra_blocks: ExtraFPNBlock | None = None) -> None:
        super().__init__()
        half, quarter = in_channels // 2, in_channels // 4
        self.scales = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(in_channels, half, 2, 2),
                    LayerNorm2d(half),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, 2),
                ),
                nn.ConvTranspose2d(in_channels, half, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )
        self.outputs = nn.ModuleList(
            nn.Sequential(
                Conv2dNormActivation(channels, out_channels, 1, norm_layer=LayerNorm2d, activation_layer=None),
                Conv2dNormActivation(out_channels, out_channels, 3, norm_layer=LayerNorm2d, activation_layer=None),
            )
            for channels in (quarter, half, in_channels, in_channels)
        )
        self.extra_blocks = extra_blocks

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the levels by name, the finest first."""
        (source,) = x.values()
        levels = [output(scale(source)) for scale, output in zip(self.scales, self.outputs, strict=True)]
        names = [str(i) for i in range(len(levels))]
        if self.extra_blocks is not None:
            levels, names = self.extra_blocks(levels, [source], names)
        return dict(zip(names, levels, strict=True))


def build_pyramid(config: Any, channels: Sequence[int], extra_blocks: ExtraFPNBlock) -> nn.Module:
    """Build the feature pyramid for a detector's backbone.

    Args:
        config: Config of the detector.
        channels: Channels of each feature map.
        extra_blocks: torchvision's block for coarser levels.
    """
    if is_plain(config.backbone_config):
        return SimpleFeaturePyramid(channels[0], config.fpn_channels, extra_blocks)
    return FeaturePyramidNetwork(list(channels), config.fpn_channels, extra_blocks=extra_blocks)


def map_strides(config: Any) -> list[float]:
    """Return the strides of a detector's feature maps: its config's, or what its backbone's config tells."""
    if config.strides is not None:
        return [float(stride) for stride in config.strides]
    return backbone_strides(config.backbone_config)


def check_strides(maps: Sequence[Tensor], strides: Sequence[float], size: Sequence[int]) -> None:
    """Check feature maps against the strides that anchors and pooling go by.

    Raises:
        ValueError: A map is not of the size that its stride gives.
    """
    sizes = [tuple(x.shape[-2:]) for x in maps]
    fits = len(maps) == len(strides) and all(
        abs(side / stride - found) <= 1
        for found_size, stride in zip(sizes, strides, strict=False)
        for side, found in zip(size, found_size, strict=True)
    )
    if not fits:
        raise ValueError(
            f"strides={list(strides)}: the backbone's feature maps of {tuple(size)} pixels are {sizes}. Give "
            "the detector's config strides=[...], the pixels between neighbours of each map."
        )


def pyramid_strides(config: Any, extra: int) -> list[float]:
    """Return the stride of each level of a detector's pyramid, coarser levels included."""
    strides = map_strides(config)
    if is_plain(config.backbone_config):
        strides = [strides[0] / scale for scale in _PLAIN_SCALES]
    return strides + [strides[-1] * 2**i for i in range(1, extra + 1)]


class PyramidAnchors(AnchorGenerator):
    """torchvision's anchors, at strides that are known and in fp32 whatever the precision of the feature maps.

    torchvision divides the image's size by the map's, which is the stride only where the image was padded to a
    multiple of it, and lays anchors in the maps' dtype: in bf16 a coordinate of 1333 pixels is off by 4.

    Args:
        strides: Pixels between neighbours of each level.
        scales: Sides of the anchors, as multiples of the stride.
        ratios: Height to width.
    """

    def __init__(self, strides: Sequence[float], scales: Sequence[float], ratios: Sequence[float]) -> None:
        sizes = tuple(tuple(scale * stride for scale in scales) for stride in strides)
        super().__init__(sizes, (tuple(ratios),) * len(sizes))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of each image, `(N, 4)`, all levels in one."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = [tuple(level.shape[-2:]) for level in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [[stride, stride] for stride in self.strides]))
        return [anchors] * len(image_list.image_sizes)


class PyramidRoIAlign(MultiScaleRoIAlign):
    """torchvision's RoIAlign over levels whose strides are known and need be no powers of two (a DINOv2 has 14).

    Args:
        strides: Pixels between neighbours of each level.
        output_size: Side of what is pooled.
    """

    def __init__(self, strides: Sequence[float], output_size: int) -> None:
        super().__init__([str(i) for i in range(len(strides))], output_size, sampling_ratio=2)
        first = round(math.log2(strides[0]))
        self.scales = [1 / stride for stride in strides]
        self.map_levels = initLevelMapper(
            first, first + len(strides) - 1, canonical_scale=self.canonical_scale, canonical_level=self.canonical_level
        )

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Pool boxes, `(N, 4)` per image, to `(sum of N, C, s, s)` in the dtype of the levels."""
        dtype = next(iter(x.values())).dtype
        levels = {name: in_full_precision(level) for name, level in x.items()}  # it has no kernels for bf16
        return super().forward(levels, boxes, image_shapes).to(dtype)


def in_full_precision(x: Tensor) -> Tensor:
    """Return half-precision tensors in fp32: boxes of a large image need more than eight bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
