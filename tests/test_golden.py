"""An adapter file is a format: adapters that were saved before give the outputs that they gave then.

    python -m tests.test_golden NAME ...  # writes the adapters of these models: only for a new family

Those of Swin, ViT and DINOv2 were written before the core's second edition. Base weights are made by arithmetic and
not drawn, so that they are the same wherever the tests run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from e3va_peft import E3VAConfig, registered_backbones
from tests.models import BY_NAME, Case

FOLDER = Path(__file__).parent / "golden"
GOLDEN = (
    "swin-classifier",
    "vit-classifier",
    "dinov2-classifier",
    "swinv2-classifier",
    "dinov3-vit-in-own-head",
    "convnext-classifier",
    "dinov3-convnext-in-own-head",
    "timm-vit",
    "timm-swin",
    "timm-swin-features",
)


def fill(model: nn.Module, scale: float) -> nn.Module:
    """Give every parameter values by arithmetic: a slow wave, of its own for each; norms stay near one."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.double) * 0.7 + number).view(parameter.shape)
            near = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(near + scale * wave / max(1, parameter[0].numel()) ** 0.5)
    return model


def base(case: Case) -> nn.Module:
    """The base model, in fp64: each processor rounds in its own way."""
    return fill(case.build(), 0.7).double().eval()


def batch(case: Case) -> dict[str, torch.Tensor]:
    height, width = case.size
    pixels = torch.sin(torch.arange(2 * 3 * height * width, dtype=torch.double) * 0.37)
    return {"pixel_values": pixels.view(2, 3, height, width)}


def logits(model: nn.Module, case: Case) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(case))["logits"]


@pytest.mark.parametrize("name", GOLDEN)
def test_an_adapter_of_before_gives_the_outputs_of_before(name):
    case = BY_NAME[name]
    model = PeftModel.from_pretrained(base(case), FOLDER / name).eval()
    saved = load_file(FOLDER / name / "outputs.safetensors")
    torch.testing.assert_close(logits(model, case), saved["adapted"], rtol=1e-6, atol=1e-7)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, case), saved["base"], rtol=1e-6, atol=1e-7)
    assert (saved["adapted"] - saved["base"]).abs().max() > 1e-3


def test_every_family_has_a_golden_adapter():
    assert {BY_NAME[name].family for name in GOLDEN} == registered_backbones().keys()
    assert {path.name for path in FOLDER.iterdir()} == set(GOLDEN)


def write(name: str) -> None:
    case = BY_NAME[name]
    model = get_peft_model(base(case), E3VAConfig(r=4)).eval()
    trained = nn.Module()
    trained.all = nn.ParameterList(p for _, p in sorted(model.named_parameters()) if p.requires_grad)
    fill(trained, 0.3)
    model.save_pretrained(FOLDER / name)
    (FOLDER / name / "README.md").unlink()
    found = {"adapted": logits(model, case), "base": logits(base(case), case)}
    save_file({key: value.contiguous() for key, value in found.items()}, FOLDER / name / "outputs.safetensors")


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        write(wanted)
