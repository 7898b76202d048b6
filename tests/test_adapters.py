"""Several adapters in one model."""

from __future__ import annotations

import re

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from e3va_peft import E3VAConfig, E3VALayer
from tests.helpers import SAME_BACKBONE, assert_same, base_outputs, outputs, ways
from tests.models import BY_NAME, every_family, every_model, every_model_but, train_steps


def layer_of(model: nn.Module) -> E3VALayer:
    return next(module for module in model.modules() if isinstance(module, E3VALayer))


def own_state(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if f".{name}." in key}


@ways("", "live")
@every_model
def test_a_second_adapter_does_not_disturb_the_first(case, way):
    model = get_peft_model(case.base(), E3VAConfig(r=4, **way), adapter_name="first")
    train_steps(model, case.training_batch())
    weights, expected = own_state(model, "first"), outputs(model, case.batch())
    model.add_adapter("second", E3VAConfig(r=2, **way))
    assert_same(outputs(model, case.batch()), expected, rtol=0, atol=0)
    model.set_adapter("second")
    assert_same(outputs(model, case.batch()), base_outputs(case), rtol=1e-5, atol=1e-6)
    train_steps(model, case.training_batch(), steps=2)
    assert_same(own_state(model, "first"), weights, rtol=0, atol=0)
    model.set_adapter("first")
    assert_same(outputs(model, case.batch()), expected, rtol=1e-6, atol=1e-6)
    with pytest.warns(UserWarning, match="first was active which is now deleted"):
        model.delete_adapter("first")
    assert not own_state(model, "first") and own_state(model, "second")
    assert model.active_adapters == ["second"]
    outputs(model, case.batch())


@ways("", "live")  # in forward, "recompute" is the first
@every_model
def test_two_adapters_without_modules_of_their_own_add_up_in_one_lane(case, way):
    config = {"r": 4, "modules_to_save": [], "init_weights": False} | way
    model = get_peft_model(case.base(), E3VAConfig(**config), adapter_name="first")
    model.add_adapter("second", E3VAConfig(**config | {"r": 2}))
    first = outputs(model, case.batch())
    model.base_model.set_adapter(["first", "second"])
    both = outputs(model, case.batch())
    assert any(not torch.equal(first[key], both[key]) for key in first)
    layer = layer_of(model)
    for parameter in layer.e3va_highway["second"].parameters():
        nn.init.zeros_(parameter)
    assert_same(outputs(model, case.batch()), first, rtol=1e-5, atol=1e-6)
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(".first." in name for name in wanted) and any(".second." in name for name in wanted)


def test_two_equal_adapters_double_a_plain_lane():
    case = BY_NAME["dinov2-maps-without-norm"]
    config = {"r": 4, "modules_to_save": [], "init_weights": False}
    base = outputs(case.base(), case.batch())
    model = get_peft_model(case.base(), E3VAConfig(**config), adapter_name="first")
    model.add_adapter("second", E3VAConfig(**config))
    layer = layer_of(model)
    layer.e3va_highway["second"].load_state_dict(layer.e3va_highway["first"].state_dict())
    one = outputs(model, case.batch())
    model.base_model.set_adapter(["first", "second"])
    two = outputs(model, case.batch())
    key = "feature_maps[0]"
    torch.testing.assert_close(two[key] - base[key], 2 * (one[key] - base[key]), rtol=1e-4, atol=1e-5)


@every_model
def test_two_adapters_with_heads_or_norms_of_their_own_are_refused_together(case):
    model = get_peft_model(case.base(), E3VAConfig(r=4), adapter_name="first")
    model.add_adapter("second", E3VAConfig(r=4, modules_to_save=[]))
    with pytest.raises(ValueError, match=r"\['first'\].*modules_to_save=\[\]"):
        model.base_model.set_adapter(["first", "second"])
    assert model.active_adapters == ["first"]
    outputs(model, case.batch())


@pytest.mark.parametrize(
    "field, value",
    [("taps", ("mlp",)), ("tap_norm", "relative"), ("live_blocks", 2), ("checkpoint_live_blocks", False)],
)
def test_adapters_of_one_model_share_how_they_read(field, value):
    case = BY_NAME["swin-classifier"]
    model = get_peft_model(case.base(), E3VAConfig(r=4))
    words = re.escape(f"{field}={value!r}: adapter 'second'")
    with pytest.raises(ValueError, match=words):
        model.add_adapter("second", E3VAConfig(r=4, **{field: value}))
    assert list(model.peft_config) == ["default"]
    outputs(model, case.batch())


@every_model
def test_status_reports_what_peft_expects(case):
    model = get_peft_model(case.base(), E3VAConfig(r=4))
    status = model.get_model_status()
    assert status.enabled is True and status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.peft_types == {"default": "E3VA"}
    assert status.trainable_params == model.get_nb_trainable_parameters()[0]
    layer = next(s for s in model.get_layer_status() if s.module_type == "e3va.E3VALayer")
    assert layer.available_adapters == ["default"] and layer.devices == {"default": ["cpu"]}
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


@every_model_but(*SAME_BACKBONE)
def test_layers_in_different_states_are_irregular_to_peft_until_they_are_set_again(case):
    model = get_peft_model(case.base(), E3VAConfig(r=4, init_weights=False), adapter_name="first").eval()
    model.add_adapter("second", E3VAConfig(r=4))
    expected, layer = outputs(model, case.batch()), layer_of(model)
    layer.enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"
    with pytest.warns(UserWarning, match="enabled and others that are disabled"), model.disable_adapter():
        assert_same(outputs(model, case.batch()), base_outputs(case), rtol=1e-5, atol=1e-6)
    assert model.get_model_status().enabled is True
    layer.set_adapter("second")
    assert model.get_model_status().active_adapters == "irregular"
    model.set_adapter("first")
    assert model.get_model_status().active_adapters == ["first"]
    assert_same(outputs(model, case.batch()), expected, rtol=0, atol=0)
    next(layer.e3va_highway["first"].parameters()).requires_grad = False
    assert model.get_model_status().requires_grad == {"first": "irregular", "second": False}


def test_what_is_active_behind_a_deletion_has_all_modules_that_it_saves():
    case = BY_NAME["swin-classifier"]
    model = get_peft_model(case.base(), E3VAConfig(r=4, modules_to_save=["classifier"]), adapter_name="first").eval()
    model.add_adapter("second", E3VAConfig(r=4, init_weights=False))  # and the output norm
    model.set_adapter("second")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "second" in name:
                parameter.add_(0.1)
    expected = outputs(model, case.batch())
    model.set_adapter("first")
    with pytest.warns(UserWarning, match="second"):
        model.delete_adapter("first")
    assert_same(outputs(model, case.batch()), expected, rtol=0, atol=0)


@every_model_but(*SAME_BACKBONE)
def test_adapters_are_deleted_inactive_unknown_and_down_to_none(case):
    model = get_peft_model(case.base(), E3VAConfig(r=4, init_weights=False), adapter_name="first").eval()
    keys, expected = model.state_dict().keys(), outputs(model, case.batch())
    model.add_adapter("second", E3VAConfig(r=4))
    with pytest.raises(ValueError, match="third"):
        model.delete_adapter("third")
    model.delete_adapter("second")  # which is not active
    assert list(model.peft_config) == ["first"] and model.active_adapters == ["first"]
    assert model.state_dict().keys() == keys
    assert_same(outputs(model, case.batch()), expected, rtol=0, atol=0)
    model.delete_adapter("first")
    assert not model.peft_config and model.active_adapters == [] and not own_state(model, "first")
    assert_same(outputs(model.base_model.model, case.batch()), base_outputs(case), rtol=1e-5, atol=1e-6)


def test_modules_to_save_none_and_empty_and_named():
    case = BY_NAME["vit-classifier"]
    saved = {}
    for wanted in (None, [], ["classifier"], ["vit.layernorm"]):
        model = get_peft_model(case.base(), E3VAConfig(r=4, modules_to_save=wanted))
        saved[str(wanted)] = {
            name for name, p in model.named_parameters() if p.requires_grad and "highway" not in name
        }
    assert len(saved["None"]) == 4 and saved["[]"] == set()
    assert all("classifier" in name for name in saved["['classifier']"]) and len(saved["['classifier']"]) == 2
    assert all("e3va_tail.default.layernorm" in name for name in saved["['vit.layernorm']"])


def test_a_pooler_inside_the_exit_is_frozen_unless_named_and_passes_gradients():
    case = BY_NAME["vit-in-own-head"]
    model = get_peft_model(case.base(), E3VAConfig(r=4))
    assert not [n for n, p in model.named_parameters() if p.requires_grad and "pooler" in n]
    model = get_peft_model(case.base(), E3VAConfig(r=4, modules_to_save=["head", "pooler"]))
    assert model.peft_config["default"].modules_to_save == ["head", "backbone.pooler"]
    before = outputs(model, case.batch())
    train_steps(model, case.training_batch())
    after = outputs(model, case.batch())
    assert not torch.equal(before["pooler_output"], after["pooler_output"])
    pooler = layer_of(model).e3va_tail["default"]["pooler"]
    assert not torch.equal(pooler.dense.weight, layer_of(model).base_layer.pooler.dense.weight)


def test_saved_modules_of_two_adapters_may_not_overlap():
    for first, second in (
        (["decode_head"], ["decode_head.classifier"]),
        (["decode_head.classifier"], ["decode_head"]),
    ):
        case = BY_NAME["swin-upernet"]
        model = get_peft_model(case.base(), E3VAConfig(r=4, modules_to_save=first))
        with pytest.raises(ValueError, match=f"'{second[0]}': .*'{first[0]}'"):
            model.add_adapter("second", E3VAConfig(r=4, modules_to_save=second))
        outputs(model, case.batch())


def test_factors_frozen_by_hand_do_not_stop_the_others():
    for name in ("swin-classifier", "vit-classifier"):
        case = BY_NAME[name]
        model = get_peft_model(case.base(), E3VAConfig(r=4)).train()
        layer_of(model).e3va_highway["default"].stages[0].u1.requires_grad = False
        model(**case.training_batch())["loss"].backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_saved_pooler_over_a_bf16_base():
    case = BY_NAME["vit-in-own-head"]
    config = E3VAConfig(r=4, modules_to_save=["head", "layernorm", "pooler"])
    model = get_peft_model(case.base().to(torch.bfloat16), config).train()
    batch = case.training_batch()
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    model(**batch)["loss"].backward()
    tail = layer_of(model).e3va_tail["default"]
    assert all(p.dtype == torch.float32 and p.grad is not None for p in tail.parameters())


def test_unload_keeps_trained_heads_and_norms_as_peft_does():
    for name, norm in (("swin-classifier", "swin"), ("vit-classifier", "vit")):
        case = BY_NAME[name]
        model = get_peft_model(case.base(), E3VAConfig(r=4))
        train_steps(model, case.training_batch())
        trained = {
            key: value for key, value in model.state_dict().items() if ".default." in key and "highway" not in key
        }
        unloaded = model.unload()
        weight = getattr(unloaded, norm).layernorm.weight
        assert any(torch.equal(weight, value) for value in trained.values())
        assert not torch.equal(weight, getattr(case.base(), norm).layernorm.weight)


def comes_back(case, name, folder):
    model = get_peft_model(case.base(), E3VAConfig(r=4, init_weights=False), adapter_name=name).eval()
    model.save_pretrained(folder)
    for other in (name, "default"):
        again = PeftModel.from_pretrained(case.base(), folder / name, adapter_name=other).eval()
        assert_same(outputs(again, case.batch()), outputs(model, case.batch()), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["swin", "encoder", "classifier", "stages", "weight", "u1", "layernorm", "e3va"])
def test_an_adapter_that_is_named_like_a_part_of_the_model_comes_back(name, tmp_path):
    comes_back(BY_NAME["swin-classifier"], name, tmp_path)


@every_family
def test_an_adapter_that_is_named_like_the_first_module_comes_back(case, tmp_path):
    comes_back(case, next(name for name, _ in case.base().named_children()), tmp_path)
