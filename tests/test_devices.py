"""Models spread over several devices. Where there is but one, `meta` stands for another."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import PeftModel, get_peft_model
from torch import nn

from e3va_peft import E3VAConfig
from e3va_peft.backbones.base import in_turn
from e3va_peft.backbones.splices import add
from e3va_peft.frozen_pass import FrozenPass, MergingCall
from e3va_peft.fused import Merging
from e3va_peft.highway import Highway
from e3va_peft.lane import Lane
from tests.helpers import adapted, assert_same, base_outputs, layers, outputs
from tests.models import BY_NAME, every_model, loss_of

META = torch.device("meta")


def devices(module: nn.Module) -> set[str]:
    return {parameter.device.type for parameter in module.parameters()}


@pytest.mark.parametrize("elsewhere", [0, 1, 2])
def test_each_stage_of_a_highway_is_on_the_device_of_its_blocks(elsewhere):
    base = BY_NAME["swin-classifier"].base()
    base.swin.encoder.layers[elsewhere].to(META)
    highway = layers(get_peft_model(base, E3VAConfig(r=4)))[0].e3va_highway["default"]
    assert [devices(stage) for stage in highway.stages] == [{"meta" if i == elsewhere else "cpu"} for i in range(3)]


@pytest.mark.parametrize("elsewhere", ["norm", "the rest"])
def test_the_copy_of_an_output_norm_is_on_the_device_of_the_norm(elsewhere):
    base = BY_NAME["vit-classifier"].base()
    for module in base.vit.children():
        if (module is base.vit.layernorm) == (elsewhere == "norm"):
            module.to(META)
    layer = layers(get_peft_model(base, E3VAConfig(r=4)))[0]
    assert devices(layer.e3va_tail["default"]) == {"meta" if elsewhere == "norm" else "cpu"}
    assert devices(layer.e3va_highway["default"]) == {"cpu" if elsewhere == "norm" else "meta"}


def test_saved_modules_are_on_the_device_of_their_originals():
    base = BY_NAME["swin-classifier"].base()
    base.classifier.to(META)
    model = get_peft_model(base, E3VAConfig(r=4)).base_model.model
    assert devices(model.classifier.modules_to_save["default"]) == {"meta"}
    assert devices(model.swin.layernorm.modules_to_save["default"]) == {"cpu"}


def test_a_loaded_adapter_is_spread_like_its_base(tmp_path):
    case = BY_NAME["swin-classifier"]
    adapted(case).save_pretrained(tmp_path)
    base = case.base()
    base.swin.encoder.layers[1].to(META)
    model = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    highway = layers(model)[0].e3va_highway["default"]
    assert [devices(stage) for stage in highway.stages] == [{"cpu"}, {"meta"}, {"cpu"}]


@pytest.mark.parametrize("grad", [True, False])
def test_the_lane_moves_to_where_patch_merging_and_the_next_stage_are(grad):
    highway = Highway([8, 8], [1, 1], r=2)
    highway.stages[1].to(META)
    merging = nn.Linear(8, 8, device=META).requires_grad_(False)
    lane = Lane([highway], FrozenPass(), [1, 1], mergings=[Merging([merging], in_turn)], grad=grad)
    with torch.set_grad_enabled(grad):
        for stage, device in enumerate(("cpu", META)):
            lane.frozen.taps[stage, 0] = lane.keep(stage, 0, torch.zeros(2, 3, 8, device=device))
            if stage == 0:
                lane.frozen.mergings[0] = MergingCall(torch.zeros(2, 3, 8, device=META), (), {}, None)
                lane.leave(0)
                assert lane.ahead(0).is_meta and not lane.passed[0, 1].is_meta
        assert lane.behind(1, 1).is_meta
        assert add(torch.zeros(2, 3, 8, device=META), torch.zeros(2, 3, 8)).is_meta


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tap_storage", ["exact", "int8", "int4"])
def test_the_taps_of_a_stage_that_is_split_meet_on_the_device_of_its_factors(grad, tap_storage):
    highway = Highway([8], [2], r=2, tap_storage=tap_storage).to(META)
    lane = Lane([highway], FrozenPass(), [2], grad=grad)
    with torch.set_grad_enabled(grad):
        for block, device in enumerate((META, "cpu")):
            lane.frozen.taps[0, block] = lane.keep(0, block, torch.zeros(2, 3, 8, device=device))
        assert lane.behind(0, 2).is_meta


def test_a_model_whose_later_stages_are_elsewhere_runs():
    case = BY_NAME["swin-classifier"]
    base = case.base()
    swin = base.swin
    for module in [*swin.encoder.layers[1:], swin.layernorm, swin.pooler, base.classifier]:
        add_hook_to_module(module.to(META), AlignDevicesHook(execution_device=META))
    model = get_peft_model(base, E3VAConfig(r=4)).train()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            shown = model(**case.batch(), output_hidden_states=True)
        assert shown.logits.is_meta and not shown.hidden_states[0].is_meta


@every_model
def test_a_model_dispatched_to_one_device_adapts_like_one_that_is_not(case):
    base = dispatch_model(case.base(), {"": "cpu"}, force_hooks=True)
    model = get_peft_model(base, E3VAConfig(r=4)).eval()
    assert_same(outputs(model, case.batch()), base_outputs(case), rtol=1e-5, atol=1e-6)
    loss_of(model.train()(**case.training_batch())).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def offload_one_stage(base: nn.Module, folder: str) -> nn.Module:
    children = {f"swin.{name}": "cpu" for name in ("embeddings", "layernorm", "pooler")} | {"classifier": "cpu"}
    stages = {f"swin.encoder.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    return dispatch_model(base, children | stages, main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize(
    "offload",
    [
        lambda base, folder: cpu_offload(base, execution_device="cpu"),
        lambda base, folder: disk_offload(base, folder, execution_device="cpu"),
        offload_one_stage,
    ],
    ids=["cpu", "disk", "one stage"],
)
def test_an_offloaded_base_is_refused_before_it_is_changed(offload, tmp_path):
    case = BY_NAME["swin-classifier"]
    base = offload(case.base(), str(tmp_path))
    with pytest.raises(ValueError, match=r"device_map: \d+ .*swin.encoder.layers"):
        get_peft_model(base, E3VAConfig(r=4))
    assert_same(outputs(base, case.batch()), outputs(case.base(), case.batch()), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["swin-classifier", "vit-classifier"])
def test_an_adapted_model_can_be_offloaded_for_inference_only(name):
    case = BY_NAME[name]
    model = adapted(case, init_weights=False)
    expected = outputs(model, case.batch())
    cpu_offload(model, execution_device="cpu")
    assert_same(outputs(model, case.batch()), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="highway"):
        model(**case.training_batch())


def test_offloaded_patch_merging_in_bf16_is_refused():
    case = BY_NAME["swin-classifier"]
    model = get_peft_model(case.base().bfloat16(), E3VAConfig(r=4)).eval()
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"patch merging.*fp32"):
        outputs(model, {"pixel_values": case.batch()["pixel_values"].bfloat16()})
