"""`e3va demo` from end to end, on a tiny ViT and the real slices."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from PIL import Image
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model
from typer.testing import CliRunner

from e3va_peft import load_adapter
from e3va_peft.cli import app
from e3va_peft.demo import run as demo
from e3va_peft.methods import adapt
from tests.helpers import run_python


@pytest.fixture
def tiny_vit(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=12, num_attention_heads=2, mlp_ratio=1, patch_size=14, image_size=56
    )
    Dinov2Model(config).save_pretrained(tmp_path / "vit")
    BitImageProcessor().save_pretrained(tmp_path / "vit")
    monkeypatch.setattr(demo, "focus_vit", lambda: tmp_path / "vit")
    return tmp_path / "vit"


@pytest.mark.slow
def test_demo_runs_the_whole_road(tiny_vit, tmp_path, monkeypatch):
    def run(command: list[str], check: bool) -> None:
        assert command[0] == sys.executable and check
        run_python(command[1:], tmp_path / "said")

    monkeypatch.setattr(demo.subprocess, "run", run)  # in a process that has imported already
    output = tmp_path / "run"
    arguments = ["demo", "--epochs", "1", "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    results = {r["method"]: r for r in json.loads((output / "results.json").read_text())}
    assert results.keys() == {"head only", "LoRA", "E3VA+"}
    assert all(0 < r["mean_iou"] < 1 and r["training_seconds"] > 0 for r in results.values())
    assert results["head only"]["saved_bytes"] < results["E3VA+"]["saved_bytes"] < results["LoRA"]["saved_bytes"]
    picture = Image.open(output / "predictions.png")
    assert picture.width > 1000 and len(picture.convert("RGB").resize((64, 64)).getcolors(4096)) > 200
    model, processor = load_adapter(output / "adapter")
    assert model.config.id2label == {0: "rest", 1: "grey matter", 2: "white matter"} and processor is not None
    assert "| mean_iou |" in (output / "adapter" / "README.md").read_text()

    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1 and "--overwrite" in again.output


def test_methods_start_from_the_same_model_and_train_the_same_head(tiny_vit):
    heads = {}
    for method, *_ in demo.COMPARED:
        torch.manual_seed(0)
        model = adapt(demo.build_base(tiny_vit), method)
        trained = [p for n, p in model.named_parameters() if p.requires_grad and "decode_head" in n]
        heads[method["name"]] = [p.detach().clone() for p in trained]
    for head in heads.values():
        assert len(head) == len(heads["e3va-plus"])
        assert all(torch.equal(a, b) for a, b in zip(head, heads["e3va-plus"], strict=True))


def test_help_teaches():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0 and "e3va demo" in result.output
    result = CliRunner().invoke(app, ["demo", "--help"])
    for text in ("--output", "--epochs", "--seed", "--overwrite", "no download", "Example"):
        assert text in result.output
    result = CliRunner().invoke(app, ["backbones"])
    for text in ("swin", "vit", "dinov2", "SwinEncoder"):
        assert text in result.output
