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
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    SwinConfig,
    SwinForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
)

from e3va_peft import E3VAConfig
from e3va_peft.measure.blueprint import give_fake_memory
from e3va_peft.measure.step import MIB, _peak, _saved_bytes, _step
from e3va_peft.resolve import find_exits
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
    "head only": head_only,
}


def blocks_only(model: nn.Module) -> nn.Module:
    """Take checkpointing back from Swin's stages, which transformers checkpoints together with their blocks."""
    for found in find_exits(model):
        for stage in getattr(found.module, "layers", ()):
            if hasattr(stage, "blocks"):
                stage.gradient_checkpointing = False
    return model


def prepare(method: str, build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model for one method. All but full fine-tuning train the same head and output norms."""
    torch.manual_seed(0)
    return METHODS[method](build())


def count(setting: Setting, method: str) -> dict[str, int]:
    """Count the bytes of one training step."""
    with torch.device("meta"):
        model = prepare(method, setting.build)
    with FakeTensorMode():
        give_fake_memory(model, "cpu").train()
        parameters = list(model.parameters())
        fixed = [*parameters, *model.buffers()]
        trained = [p for p in parameters if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        batch = setting.inputs()

        def forward() -> torch.Tensor:
            return model(**batch).loss

        _step(forward, optimizer, parameters, set())  # the optimizer's state comes with the first step
        saved = _saved_bytes(forward, fixed)
        meter = _peak(lambda: _step(forward, optimizer, parameters, set()), parameters, fixed, optimizer, batch)
    split = {f"peak_{kind}": found for kind, found in meter.split().items()}
    trainable = sum(p.numel() for p in trained)
    return {
        "saved_bytes": saved, "peak_bytes": sum(split.values()), **split, "trainable_parameters": trainable
    }  # fmt: skip


def main() -> None:
    """Measure the settings named on the command line, all by default."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    rows = []
    for key in sys.argv[1:] or SETTINGS:
        setting = SETTINGS[key]
        for method in METHODS:
            if method.endswith("blocks only") and "Swin" not in setting.title:
                continue  # a ViT has no stages: the same as the row before
            rows.append({"setting": setting.title, "method": method, **count(setting, method)})
            saved, peak = (rows[-1][name] / MIB for name in ("saved_bytes", "peak_bytes"))
            print(f"{setting.title}: {method}: {saved:.0f} MiB saved, {peak:.0f} MiB peak", flush=True)
    save("memory", rows)


if __name__ == "__main__":
    main()
