"""`check_backbone`: it finds nothing wrong with what is right, and names what is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PvtV2Backbone, PvtV2Config, PvtV2ForImageClassification

from e3va_peft import Backbone, Branch, Host, Merging, check_backbone
from e3va_peft import backbones as registry
from e3va_peft.backbones import splices
from tests.models import BY_NAME, HeadOnMaps, classes, every_model, label_map, perturb, registered


@every_model
def test_every_law_holds_for_every_supported_model(case):
    model = case.base()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = check_backbone(model, case.training_batch() | {"output_hidden_states": True})
    assert report.ok, str(report)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "holds" in str(report) and "BROKEN" not in str(report)


SWIN = registered("swin")


def twice(outputs: Any, lane: Any, call: Any) -> Any:
    return splices.stages_of_tokens(splices.stages_of_tokens(outputs, lane, call), lane, call)


def regardless(modules: Any, x: Tensor, grid: Any, *args: Any) -> Tensor:
    return modules[0](x.detach() * 0, *args)  # equal for any x: nothing of the lane gets through


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (replace(SWIN, blocks="stages.{stage}.blocks.{block}"), "The backbone is found"),
        (replace(SWIN, width="norm"), "The backbone is found"),
        (replace(SWIN, branches=SWIN.branches | {"mlp": Branch("mlp", "input")}), "The branches of a block add up"),
        (replace(SWIN, branches={"attention": SWIN.branches["attention"]}), "The branches of a block add up"),
        (replace(SWIN, splice=lambda outputs, lane, call: outputs), "The highway moves every output"),
        (replace(SWIN, splice=twice), "Every output is that of the base"),
        (replace(SWIN, merging=Merging(("layers.{stage}.downsample",), run=regardless)), "Every output is that of"),
        (replace(SWIN, hosts=(Host(frozen=("../embeddings",)),)), None),  # the norms are trained as parts of the head
        (replace(SWIN, grid=lambda source: (1, 1)), "The grid of every stage is known"),
        (replace(SWIN, prefix=lambda exit: 1), "The grid of every stage is known"),
    ],
)
def test_a_wrong_declaration_breaks_the_law_that_says_so(wrong, law, monkeypatch):
    monkeypatch.setitem(registry._FAMILIES, "swin", wrong)
    case = BY_NAME["swin-classifier"]
    report = check_backbone(case.base(), case.training_batch())
    broken = [found.name for found in report.laws if not found.holds]
    assert any(name.startswith(law) for name in broken) if law else not broken


def test_a_model_without_a_backbone_is_said_to_have_none():
    report = check_backbone(nn.Linear(2, 2), {"input": torch.ones(1, 2)})
    assert not report.ok and len(report.laws) == 1
    assert "holds no exit of a registered family" in str(report)


def merge(modules: Any, x: Tensor, grid: Any, *args: Any, **kwargs: Any) -> Tensor:
    norm, patch_embedding = modules
    return patch_embedding(norm(x).mT.unflatten(2, (grid.height, grid.width)))[0]


def splice(outputs: Any, lane: Any, call: Any) -> Any:
    def end(stage: int, output: Tensor) -> Tensor:
        x = splices.add(call.ends[stage], lane.behind(stage, call.depth[stage]))
        return splices.in_own_dtype(call.exit.layers[stage].layer_norm, x).mT.reshape(output.shape)

    changes = {"last_hidden_state": end(len(call.depth) - 1, outputs.last_hidden_state)}
    if outputs.hidden_states is not None:
        changes["hidden_states"] = tuple(end(i, output) for i, output in enumerate(outputs.hidden_states))
    return splices.replaced(outputs, **changes)


PVT = Backbone(
    name="pvt-v2",
    about="a family from outside whose stages end in norms",
    exits=("transformers.models.pvt_v2.modeling_pvt_v2.PvtV2Encoder",),
    blocks="layers.{stage}.blocks.{block}",
    width="layer_norm_1",
    branches={"attention": Branch("attention"), "mlp": Branch("mlp")},
    merging=Merging(("layers.{stage}.layer_norm", "layers.{next}.patch_embedding"), run=merge),
    grid=lambda source: source.args[1:3],
    ends="layers.{stage}.layer_norm",
    splice=splice,
)
PVT_CONFIG: dict[str, Any] = {
    "image_size": 64, "depths": [1, 2, 1, 1], "hidden_sizes": [8, 12, 16, 24], "num_attention_heads": [1, 2, 2, 2],
    "sr_ratios": [4, 2, 1, 1], "drop_path_rate": 0.3, "num_labels": 3,
}  # fmt: skip


def pvt(maps: bool) -> nn.Module:
    torch.manual_seed(0)
    config = PvtV2Config(**PVT_CONFIG, out_features=["stage1", "stage2", "stage3", "stage4"])
    model = HeadOnMaps(PvtV2Backbone(config)) if maps else PvtV2ForImageClassification(config)
    perturb(model, 0)
    return model.eval()


@pytest.mark.parametrize("maps", [False, True])
def test_a_family_from_outside_may_norm_at_the_end_of_each_stage(maps, monkeypatch):
    monkeypatch.setitem(registry._FAMILIES, PVT.name, PVT)
    batch = {"pixel_values": torch.randn(2, 3, 64, 96)}
    report = check_backbone(pvt(maps), batch | (label_map if maps else classes)(2, 64, 96))
    assert report.ok, str(report)


def test_the_end_of_a_stage_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(registry._FAMILIES, PVT.name, replace(PVT, ends="layers.{stage}.norm"))
    report = check_backbone(pvt(maps=False), {"pixel_values": torch.randn(2, 3, 64, 96)})
    assert not report.ok and "has no layers.0.norm, where the family 'pvt-v2' expects the end" in str(report)
