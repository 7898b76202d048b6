"""Memory of one training step: full fine-tuning, head only, LoRA with and without checkpointing, E3VA and its modes.

    python benchmarks/memory.py [swin-b] [vit-b] [upernet-swin-b]

fp32, AdamW, a CPU's kernels, counted on tensors that have no memory; `plan.py` records that the peaks of real ones are
the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from record import quiet, save
from torch import nn
from transformers import (
    SwinConfig,
    SwinForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
)

from e3va_peft.exits import find_exits
from e3va_peft.meter.step import MIB
from e3va_peft.methods import adapt
from e3va_peft.plan.blueprint import SHORT_NAMES
from e3va_peft.plan.estimate import FakeStep

SWIN_B = SHORT_NAMES["swin-b"]
STAGES = ["stage1", "stage2", "stage3", "stage4"]


@dataclass(frozen=True)
class Setting:
    """A model and its batch."""

    title: str
    build: Callable[[], nn.Module]
    size: int
    batch: int
    dense: bool = False

    def inputs(self) -> dict[str, torch.Tensor]:
        """Draw a batch."""
        shape = (self.batch, self.size, self.size) if self.dense else (self.batch,)
        return {
            "pixel_values": torch.randn(self.batch, 3, self.size, self.size),
            "labels": torch.randint(0, 100, shape),
        }


def upernet() -> nn.Module:
    """Build UperNet over Swin-B, as on ADE20K."""
    backbone = SwinConfig(**SWIN_B, out_features=STAGES)
    return UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=backbone, num_labels=150, auxiliary_in_channels=512)
    )


SETTINGS = {
    "swin-b": Setting(
        "Swin-B classifier, 224 px, batch 8",
        lambda: SwinForImageClassification(SwinConfig(**SWIN_B, image_size=224, num_labels=100)), 224, 8,
    ),
    "vit-b": Setting(
        "ViT-B classifier, 224 px, batch 8", lambda: ViTForImageClassification(ViTConfig(num_labels=100)), 224, 8
    ),
    "upernet-swin-b": Setting("UperNet + Swin-B, 512 px, batch 2", upernet, 512, 2, dense=True),
}  # fmt: skip


def by(name: str, **options: Any) -> Callable[[nn.Module], nn.Module]:
    """The function that makes a model trainable by a method."""
    return lambda model: adapt(model, {"name": name, **options})


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "full": by("full"),
    "LoRA": by("lora", lora_alpha=8),
    "LoRA + checkpointing": by("lora-checkpointing", lora_alpha=8),
    "LoRA + checkpointing, blocks only": lambda model: blocks_only(METHODS["LoRA + checkpointing"](model)),
    "AdaptFormer": by("adaptformer"),
    "Mona": by("mona"),
    "E3VA": by("e3va"),
    "E3VA, one tap a block": by("e3va", taps=("block",)),
    "E3VA, int8": by("e3va", tap_storage="int8"),
    "E3VA, int4": by("e3va", tap_storage="int4"),
    "E3VA, one tap a block, int8": by("e3va", taps=("block",), tap_storage="int8"),
    "E3VA, recompute": by("e3va", tap_storage="recompute"),
    "E3VA, 1 live": by("e3va", live_blocks=1),
    "E3VA, 2 live": by("e3va", live_blocks=2),
    "E3VA, 4 live": by("e3va", live_blocks=4),
    "E3VA, half live": lambda model: by("e3va", live_blocks=blocks_of(model) // 2)(model),
    "E3VA, all live": lambda model: by("e3va", live_blocks=blocks_of(model))(model),
    "E3VA, 2 live, int8": by("e3va", live_blocks=2, tap_storage="int8"),
    "E3VA, 2 live, recompute": by("e3va", live_blocks=2, tap_storage="recompute"),
    "E3VA+": by("e3va-plus"),
    "E3VA+, recompute": by("e3va-plus", tap_storage="recompute"),
    "head only": by("head-only"),
}


def blocks_of(model: nn.Module) -> int:
    """Return the number of blocks to adapt in a model."""
    return sum(depth for found in find_exits(model) for depth in found.site.depth)


def blocks_only(model: nn.Module) -> nn.Module:
    """Take checkpointing back from Swin's stages, which transformers checkpoints together with their blocks."""
    for found in find_exits(model):
        for stage in getattr(found.module, "layers", ()):
            if hasattr(stage, "blocks"):
                stage.gradient_checkpointing = False
    return model


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Return an AdamW over what a model trains."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def count(setting: Setting, method: str) -> dict[str, int]:
    """Count the bytes of one training step."""
    task = "semantic-segmentation" if setting.dense else "image-classification"
    step = FakeStep(setting.build, METHODS[method], task, setting.size, dtype=None, autocast="cpu")
    trace = step.trace(setting.batch)
    return {
        "saved_bytes": step.saved_bytes(setting.batch),
        "peak_bytes": trace.peak,
        **{f"peak_{kind}": found for kind, found in trace.split.items()},
        "trainable_parameters": step.trainable_parameters,
    }


def methods_of(setting: Setting) -> list[str]:
    """Return the methods that differ on a model: a ViT has no stages to leave out of checkpointing."""
    return [name for name in METHODS if not (name.endswith("blocks only") and "Swin" not in setting.title)]


def main() -> None:
    """Measure the settings named on the command line, all by default."""
    quiet()
    rows = []
    for key in sys.argv[1:] or SETTINGS:
        setting = SETTINGS[key]
        for method in methods_of(setting):
            rows.append({"setting": setting.title, "method": method, **count(setting, method)})
            saved, peak = (rows[-1][name] / MIB for name in ("saved_bytes", "peak_bytes"))
            print(f"{setting.title}: {method}: {saved:.0f} MiB saved, {peak:.0f} MiB peak", flush=True)
    save("memory", rows)


if __name__ == "__main__":
    main()
