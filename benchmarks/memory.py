"""Memory of one training step: full fine-tuning, head only, LoRA with and without checkpointing, E3VA and its modes.

    python benchmarks/memory.py [swin-b] [vit-b] [upernet-swin-b]

fp32, AdamW, a CPU's kernels, counted on tensors that have no memory; `plan.py` records that the peaks of real ones are
the same.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import get_peft_model
from record import save
from torch import nn
from transformers import (
    SwinConfig,
    SwinForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
)

from e3va_peft import E3VAConfig
from e3va_peft.exits import find_exits
from e3va_peft.measure.blueprint import SHORT_NAMES
from e3va_peft.measure.prediction import FakeStep, Method
from e3va_peft.measure.step import MIB
from e3va_peft.training.methods import checkpointed, head_only, lora_config

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


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "full": lambda model: model,
    "LoRA": lambda model: get_peft_model(model, lora_config(model, lora_alpha=8)),
    "LoRA + checkpointing": lambda model: checkpointed(METHODS["LoRA"](model)),
    "LoRA + checkpointing, blocks only": lambda model: blocks_only(METHODS["LoRA + checkpointing"](model)),
    "E3VA": lambda model: get_peft_model(model, E3VAConfig()),
    "E3VA, one tap a block": lambda model: get_peft_model(model, E3VAConfig(taps=("block",))),
    "E3VA, int8": lambda model: get_peft_model(model, E3VAConfig(tap_storage="int8")),
    "E3VA, int4": lambda model: get_peft_model(model, E3VAConfig(tap_storage="int4")),
    "E3VA, one tap a block, int8": lambda model: get_peft_model(
        model, E3VAConfig(taps=("block",), tap_storage="int8")
    ),
    "E3VA, recompute": lambda model: get_peft_model(model, E3VAConfig(tap_storage="recompute")),
    "E3VA, 1 live": lambda model: live(model, 1),
    "E3VA, 2 live": lambda model: live(model, 2),
    "E3VA, 4 live": lambda model: live(model, 4),
    "E3VA, half live": lambda model: live(model, blocks_of(model) // 2),
    "E3VA, all live": lambda model: live(model, blocks_of(model)),
    "E3VA, 2 live, int8": lambda model: live(model, 2, "int8"),
    "E3VA, 2 live, recompute": lambda model: live(model, 2, "recompute"),
    "head only": head_only,
}


def live(model: nn.Module, blocks: int, tap_storage: str = "exact") -> nn.Module:
    """Adapt a model by E3VA with its last blocks live."""
    return get_peft_model(model, E3VAConfig(live_blocks=blocks, tap_storage=tap_storage))


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
    step = FakeStep(setting.build, Method(method, "", METHODS[method]), task, setting.size, dtype=None, autocast="cpu")
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
    warnings.filterwarnings("ignore", category=FutureWarning)
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
