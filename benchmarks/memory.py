"""Memory of one training step: full fine-tuning, head only, LoRA with and without checkpointing, E3VA.

    python benchmarks/memory.py [swin-b] [vit-b] [upernet-swin-b]

Random weights: memory does not depend on them. fp32, AdamW, on the CPU with two threads.
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
from e3va_peft.measure import measure_step
from e3va_peft.measure.step import MIB
from e3va_peft.training.methods import checkpointed, head_only, lora_config

SWIN_B = {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 7}
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


def prepare(method: str, build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model for one method. All but full fine-tuning train the same head and output norms."""
    torch.manual_seed(0)
    model = build()
    if method == "full":
        return model
    if method == "E3VA":
        return get_peft_model(model, E3VAConfig())
    if method == "head only":
        return head_only(model)
    adapted = get_peft_model(model, lora_config(model, lora_alpha=8))
    return checkpointed(adapted) if method == "LoRA + checkpointing" else adapted


def main() -> None:
    """Measure the settings named on the command line, all by default."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(2)
    rows = []
    for key in sys.argv[1:] or SETTINGS:
        setting = SETTINGS[key]
        for method in ("full", "LoRA", "LoRA + checkpointing", "E3VA", "head only"):
            model = prepare(method, setting.build)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
            report = measure_step(model, setting.inputs(), optimizer, repeats=1)
            rows.append({"setting": setting.title, "method": method, **report.to_dict()})
            print(
                f"{setting.title}: {method}: {report.saved_bytes / MIB:.0f} MiB saved, "
                f"{report.peak_bytes / MIB:.0f} MiB peak"
            )
    save("memory", rows)


if __name__ == "__main__":
    main()
