"""Bad input gets an error that names the argument, the value and the remedy, before anything is changed."""

from __future__ import annotations

import copy
import re
import types
import warnings
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftType, TaskType, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import Dinov2Backbone, Dinov2Config, ResNetConfig, ResNetForImageClassification, ViTConfig, ViTModel

from e3va_peft import Backbone, E3VAConfig, E3VALayer, register_backbone, registered_backbones
from e3va_peft.hooks import Hook
from tests.helpers import assert_same, layers, outputs, ways
from tests.models import BY_NAME, PLAIN, HeadOnMaps, every_model, loss_of


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("r", value) for value in (0, 2.5, True)),
        *(("bottleneck_ratio", value) for value in (0, float("nan"), "half")),
        *(("taps", value) for value in ([], ["attention", "attention"], "attention", ["mlp", 1], ["block", "mlp"])),
        ("tap_storage", "fp8"),
        *(("live_blocks", value) for value in (-1, 1.5, True, "2")),
        *(("target_modules", value) for value in ("all-linear", 3)),
        ("exclude_modules", [""]),
        *(("modules_to_save", value) for value in ("classifier", [3])),
        ("init_weights", "zeros"),
    ],
)
def test_config_refuses_by_name_and_value(argument, value):
    with pytest.raises(ValueError, match=re.escape(f"{argument}={value!r}")):
        E3VAConfig(**{argument: value})


@pytest.mark.parametrize("argument", ["bias", "lora_alpha", "rank"])
def test_config_has_no_argument_of_another_method(argument):
    with pytest.raises(TypeError, match=argument):
        E3VAConfig(**{argument: 1})


@pytest.mark.parametrize("task", [*TaskType, "IMAGE_CLASSIFICATION"])
def test_config_refuses_every_task_type(task):
    with pytest.raises(ValueError, match=r"task_type=.*Leave it None"):
        E3VAConfig(task_type=task)


def test_config_keeps_what_it_was_given_in_a_normal_form():
    config = E3VAConfig(taps=["mlp", "attention"], target_modules={"b", "a"}, bottleneck_ratio=1)
    assert config.taps == ("mlp", "attention")
    assert config.target_modules == ["a", "b"]
    assert config.peft_type == PeftType.E3VA


def test_the_setting_of_e3va_plus_takes_further_fields_and_other_values(tmp_path):
    plus = E3VAConfig.plus(live_blocks=2, tap_storage="recompute")
    assert plus == E3VAConfig(taps=("stream",), r=64, bottleneck_ratio=1, tap_storage="recompute", live_blocks=2)
    assert E3VAConfig.plus().tap_storage == "int4"
    plus.save_pretrained(tmp_path)
    assert E3VAConfig.from_pretrained(tmp_path).taps == ("stream",)
    with pytest.raises(TypeError, match="rank"):
        E3VAConfig.plus(rank=8)


def test_every_field_of_the_config_has_help():
    own = set(E3VAConfig.__dataclass_fields__) - set(E3VAConfig.__mro__[1].__dataclass_fields__)
    assert own == {
        "r",
        "bottleneck_ratio",
        "taps",
        "tap_norm",
        "tap_storage",
        "live_blocks",
        "checkpoint_live_blocks",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "init_weights",
    }
    assert all(len(E3VAConfig.__dataclass_fields__[name].metadata["help"]) > 30 for name in own)


def test_one_config_serves_many_models():
    config = E3VAConfig(r=4)
    before = copy.deepcopy(config)
    first = get_peft_model(BY_NAME["swin-classifier"].base(), config)
    second = get_peft_model(BY_NAME["vit-classifier"].base(), config)
    assert first.peft_config["default"].target_modules == ["swin.encoder"]
    assert second.peft_config["default"].target_modules == ["vit"]
    assert config.target_modules == before.target_modules is None
    assert config.modules_to_save is None


def refused(model: nn.Module, match: str, **config) -> None:
    """The model is refused, and left as it was."""
    modules = {name: type(module) for name, module in model.named_modules()}
    hooks = {name: (*m._forward_hooks, *m._forward_pre_hooks) for name, m in model.named_modules()}
    wants = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=match):
        get_peft_model(model, E3VAConfig(r=4, **config))
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert {name: (*m._forward_hooks, *m._forward_pre_hooks) for name, m in model.named_modules()} == hooks
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wants


def test_a_bare_root_is_refused_with_what_to_do_instead():
    refused(
        ViTModel(ViTConfig(**PLAIN)),
        "model=ViTModel: .*ViTForImageClassification",
    )


def test_an_unknown_architecture_is_refused_with_what_is_supported():
    model = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]))
    refused(model, r"model=ResNetForImageClassification.*swin \(SwinEncoder\).*vit .*dinov2 .*register_backbone")
    refused(model, "`e3va backbones` lists them. Use the nearest, e.g. microsoft/swin-tiny-patch4-window7-224")
    refused(nn.Sequential(nn.Linear(2, 2)), "e.g. facebook/dinov2-base")


def test_target_modules_that_are_no_exit_are_refused():
    case = BY_NAME["swin-classifier"]
    refused(
        case.base(),
        r"target_modules=\['q_proj'\]: no exit.*'q_proj'; its .*\['swin.encoder'\]",
        target_modules=["q_proj"],
    )
    refused(case.base(), r"target_modules='.*layers.*'", target_modules=r".*layers.*")
    refused(case.base(), r"target_modules=\['swin.encoder', 'nope'\]", target_modules=["swin.encoder", "nope"])
    refused(case.base(), r"exclude_modules=\['encoder'\]", exclude_modules=["encoder"])


def test_exit_names_may_be_given():
    for target in (["swin.encoder"], ["encoder"], r".*encoder"):
        model = get_peft_model(BY_NAME["swin-classifier"].base(), E3VAConfig(r=4, target_modules=target))
        assert model.peft_config["default"].target_modules == ["swin.encoder"]


def test_one_of_two_backbones_can_be_excluded():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = BY_NAME["swin-classifier"].base()
            self.right = BY_NAME["dinov2-classifier"].base()

    model = get_peft_model(Two(), E3VAConfig(r=4))
    assert model.peft_config["default"].target_modules == ["left.swin.encoder", "right.dinov2.encoder"]
    for config in ({"exclude_modules": ["right.dinov2.encoder"]}, {"target_modules": ["left.swin.encoder"]}):
        model = get_peft_model(Two(), E3VAConfig(r=4, **config))
        assert model.peft_config["default"].target_modules == ["left.swin.encoder"]
        trained = [name for name, p in model.named_parameters() if p.requires_grad and ".right." in name]
        assert trained and all("right.classifier" in name for name in trained)  # its backbone stays frozen


@every_model
def test_modules_to_save_inside_the_frozen_backbone_are_refused(case):
    model = case.base()
    inside = next(name for name, m in model.named_modules() if type(m).__name__ in case.blocks)
    refused(model, f"modules_to_save='{inside}'.*never train", modules_to_save=[inside])
    embeddings = next(name for name, _ in model.named_modules() if name.endswith(case.embeddings))
    refused(model, f"modules_to_save='{embeddings}'.*never train", modules_to_save=[embeddings])


def test_modules_to_save_that_do_not_exist_are_refused_with_a_guess():
    refused(
        BY_NAME["swin-classifier"].base(), "modules_to_save='clasifier'.*'classifier'", modules_to_save=["clasifier"]
    )


def test_modules_to_save_that_hold_the_backbone_or_are_containers_are_refused():
    refused(BY_NAME["swin-classifier"].base(), "modules_to_save='swin': contains", modules_to_save=["swin"])
    refused(
        BY_NAME["swin-maps-in-own-head"].base(), r"'lateral': is a ModuleList.*lateral\.0", modules_to_save=["lateral"]
    )


def test_a_name_that_is_the_ending_of_another_is_refused():
    model = BY_NAME["swin-upernet"].base()
    model.head = nn.Linear(3, 3)
    refused(model, "modules_to_save='head': PEFT matches.*'decode_head'", modules_to_save=["head"])
    adapted = get_peft_model(model, E3VAConfig(r=4))  # meant are all three: nothing is caught by mistake
    assert {"head", "decode_head", "auxiliary_head"} <= set(adapted.peft_config["default"].modules_to_save)


def test_a_module_in_front_of_the_backbone_that_wants_a_gradient_is_refused():
    for name in ("swin-in-own-head", "vit-in-own-head"):
        case = BY_NAME[name]
        model = case.base()
        model.register_forward_pre_hook(
            lambda m, args, kwargs: (args, kwargs | {"pixel_values": m.stem(kwargs["pixel_values"])}), with_kwargs=True
        )
        model.stem = nn.Conv2d(3, 3, 1)
        adapted = get_peft_model(model, E3VAConfig(r=4)).train()
        with pytest.raises(ValueError, match=r"in front of the backbone.*modules_to_save"):
            adapted(**case.training_batch())
        frozen = get_peft_model(adapted.unload(), E3VAConfig(r=4, modules_to_save=["head"])).train()
        loss_of(frozen(**case.training_batch())).backward()


def test_a_module_under_two_names_and_a_part_of_a_saved_module_are_refused():
    model = BY_NAME["swin-in-own-head"].base()
    model.alias = model.head
    with pytest.raises(ValueError, match=r"'head'.*'alias'"):
        get_peft_model(model, E3VAConfig(r=4))
    case = BY_NAME["swin-upernet"]
    refused(case.base(), "is a part of 'decode_head'", modules_to_save=["decode_head", "decode_head.classifier"])


def test_a_head_that_holds_a_module_of_its_own_name_is_wrapped_once():
    model = BY_NAME["swin-in-own-head"].base()
    model.head = nn.Sequential(OrderedDict(norm=nn.LayerNorm(32), head=nn.Linear(32, 3)))
    adapted = get_peft_model(model, E3VAConfig(r=4))
    assert adapted.peft_config["default"].modules_to_save == ["backbone.layernorm", "head"]
    wrappers = [n for n, m in adapted.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    assert [name.removeprefix("base_model.model.") for name in wrappers] == ["backbone.layernorm", "head"]


def test_a_name_that_several_modules_have_means_all_of_them():
    model = get_peft_model(BY_NAME["swin-upernet"].base(), E3VAConfig(r=4, modules_to_save=["classifier"]))
    assert model.peft_config["default"].modules_to_save == ["decode_head.classifier", "auxiliary_head.classifier"]


def test_another_adapter_inside_the_backbone_is_refused():
    model = get_peft_model(BY_NAME["swin-classifier"].base(), LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="second time"):
        refused(model.base_model.model, "q_proj is already adapted by Linear.*never train")


@pytest.mark.parametrize("name", ["vit-classifier", "swin-classifier", "timm-vit"])
def test_a_backbone_that_two_models_share_is_adapted_once(name):
    model = BY_NAME[name].base()
    first, second = nn.Sequential(model), nn.Sequential(model)
    first = get_peft_model(first, E3VAConfig(modules_to_save=[]))
    state = {key: value.clone() for key, value in first.state_dict().items()}
    with pytest.raises(ValueError, match=r"copy\.deepcopy"):
        get_peft_model(second, E3VAConfig(modules_to_save=[], r=2))
    assert all(torch.equal(value, state[key]) for key, value in first.state_dict().items())
    first.unload()
    get_peft_model(second, E3VAConfig(modules_to_save=[], r=2))


@pytest.mark.parametrize("name", ["vit-classifier", "timm-vit"])
def test_a_model_of_several_backbones_is_adapted_whole_or_not_at_all(name, monkeypatch):
    shared = BY_NAME[name].base()
    several = nn.ModuleList([BY_NAME[name].base(), shared])
    other = get_peft_model(nn.Sequential(shared), E3VAConfig(modules_to_save=[]))
    before = [name for name, _ in several.named_modules()]
    with pytest.raises(ValueError, match=r"copy\.deepcopy"):
        get_peft_model(several, E3VAConfig(modules_to_save=[]))
    assert [name for name, _ in several.named_modules()] == before
    other.unload()
    before = [name for name, _ in several.named_modules()]
    update, calls = E3VALayer.update_layer, []

    def second_time(layer, *args):
        calls.append(layer)
        if len(calls) == 2:
            raise torch.OutOfMemoryError
        update(layer, *args)

    def stops(adapt, *args):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(E3VALayer, "update_layer", second_time)
            with pytest.raises(torch.OutOfMemoryError):
                adapt(*args)

    stops(get_peft_model, several, E3VAConfig(modules_to_save=[]))
    assert [name for name, _ in several.named_modules()] == before
    assert not any(isinstance(hook, Hook) for part in several.modules() for hook in part._forward_pre_hooks.values())
    model = get_peft_model(several, E3VAConfig(modules_to_save=[]))
    before = [name for name, _ in model.named_parameters()]
    stops(model.add_adapter, "second", E3VAConfig(modules_to_save=[]))
    assert [name for name, _ in model.named_parameters()] == before and list(model.peft_config) == ["default"]
    model.add_adapter("second", E3VAConfig(modules_to_save=[]))
    assert [list(layer.adapters()) for layer in layers(model)] == [["default", "second"]] * 2


@pytest.mark.parametrize("name", ["vit-classifier", "timm-vit"])
def test_an_adapter_that_was_interrupted_leaves_nothing_of_it_behind(name, monkeypatch):
    case = BY_NAME[name]
    model, expected = case.base().eval(), outputs(case.base().eval(), case.batch())

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("e3va_peft.layer.Highway", stop)
        with pytest.raises(KeyboardInterrupt):
            get_peft_model(model, E3VAConfig())
    assert_same(outputs(model, case.batch()), expected)
    get_peft_model(model, E3VAConfig())(**case.batch())


def test_an_output_in_front_of_every_block_is_refused():
    model = HeadOnMaps(Dinov2Backbone(Dinov2Config(**PLAIN, out_features=["stem"])))
    refused(model, "backbone.encoder: the deepest output that is asked for is the stem.*out_features")


@every_model
def test_requires_grad_set_by_hand_in_the_frozen_region_is_refused_at_the_next_step(case):
    model = get_peft_model(case.base(), E3VAConfig(r=4)).train()
    for name in (case.embeddings, case.blocks):
        frozen = next(m for n, m in model.named_modules() if n.endswith(name) or type(m).__name__ in name)
        parameter_name, parameter = next(iter(frozen.named_parameters()))
        parameter.requires_grad = True
        with pytest.raises(ValueError, match=f"{parameter_name} .*requires_grad"):
            model(**case.training_batch())
        parameter.requires_grad = False
    model(**case.training_batch())


@ways("", "live")
@every_model
def test_a_gradient_for_the_input_warns_and_stays_none(case, way):
    model = get_peft_model(case.base(), E3VAConfig(r=4, **way)).train()
    batch = case.training_batch()
    batch["pixel_values"].requires_grad_()
    with pytest.warns(UserWarning, match="input.*disable_adapter"):
        loss_of(model(**batch)).backward()
    assert batch["pixel_values"].grad is None


@every_model
def test_merging_is_refused_with_what_to_do_instead(case):
    model = get_peft_model(case.base(), E3VAConfig(r=4))
    for attempt in (model.merge_and_unload, model.merge_adapter, model.unmerge_adapter):
        with pytest.raises(NotImplementedError, match=r"unload\(\)"):
            attempt()
    model(**case.batch())


def test_adapter_names_is_refused():
    case = BY_NAME["swin-classifier"]
    model = get_peft_model(case.base(), E3VAConfig(r=4))
    with pytest.raises(ValueError, match=r"adapter_names=.*set_adapter\(\)"):
        model(**case.batch(), adapter_names=["default", "__base__"])


def test_mixed_is_refused():
    with pytest.raises(ValueError, match="'E3VA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(BY_NAME["swin-classifier"].base(), E3VAConfig(r=4), mixed=True)


def test_bare_parameters_beside_the_backbone_stay_frozen_and_that_is_said():
    model = BY_NAME["swin-in-own-head"].base()
    model.temperature = nn.Parameter(torch.ones(1))
    with pytest.warns(UserWarning, match=r"\['temperature'\].*HeadOnModel"):
        adapted = get_peft_model(model, E3VAConfig(r=4))
    assert not adapted.base_model.model.temperature.requires_grad


@pytest.mark.parametrize("name", ["swin-classifier", "dinov2-classifier", "vit-classifier"])
def test_gradient_checkpointing_before_or_after_does_no_harm(name):
    case = BY_NAME[name]
    for before in (True, False):
        model = case.base()
        if before:
            model.gradient_checkpointing_enable()
        adapted = get_peft_model(model, E3VAConfig(r=4)).train()
        if not before:
            adapted.gradient_checkpointing_enable()
            adapted.enable_input_require_grads()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            loss_of(adapted(**case.training_batch())).backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        assert "enable_input_require_grads" not in adapted.unload().__dict__


def test_input_gradients_that_were_on_are_on_again_after_unload():
    case = BY_NAME["vit-classifier"]
    model = case.base()
    model.enable_input_require_grads()
    adapted = get_peft_model(model, E3VAConfig(r=4))
    assert not model._require_grads_hooks
    assert adapted.unload()._require_grads_hooks


def test_taps_that_the_backbone_does_not_have_are_refused_with_those_it_has():
    refused(
        BY_NAME["swin-classifier"].base(),
        r"taps=\('attn',\): \['attn'\] is not a branch of a swin block.*\('attention', 'mlp'\)",
        taps=("attn",),
    )
    model = get_peft_model(BY_NAME["swin-classifier"].base(), E3VAConfig(r=4, taps=["mlp", "attention"]))
    assert model.peft_config["default"].taps == ("attention", "mlp")  # in the order in which they run


def test_register_backbone_refuses_what_it_cannot_take():
    with pytest.raises(TypeError, match="must be an"):
        register_backbone(Backbone)
    swin = registered_backbones()["swin"]
    with pytest.raises(ValueError, match=r"name='swin': .*SwinEncoder"):
        register_backbone(replace(swin, exits=("mine.MyEncoder",)))
    with pytest.raises(ValueError, match=r"exits=\['.*SwinEncoder'\]: .*'swin'"):
        register_backbone(replace(swin, name="mine"))


def test_a_backbone_under_two_names_is_refused():
    model = BY_NAME["vit-in-own-head"].base()
    model.other = model.backbone
    refused(model, "the backbone 'backbone' is registered again as 'other'")


class PromptInFront(nn.Module):
    """A host that trains something between the embeddings and the encoder."""

    def __init__(self):
        super().__init__()
        dinov2 = BY_NAME["dinov2-classifier"].base().dinov2
        self.embeddings, self.encoder, self.layernorm = dinov2.embeddings, dinov2.encoder, dinov2.layernorm
        self.prompt, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, pixel_values, labels):
        states = self.encoder(self.prompt(self.embeddings(pixel_values))).last_hidden_state
        return {"loss": nn.functional.cross_entropy(self.head(self.layernorm(states)[:, 0]), labels)}


def test_a_module_between_embeddings_and_exit_that_wants_a_gradient_is_refused():
    model = get_peft_model(PromptInFront(), E3VAConfig(r=4)).train()
    batch = BY_NAME["dinov2-classifier"].training_batch()
    with pytest.raises(ValueError, match=r"in front of the backbone.*modules_to_save"):
        model(**batch)
    model.base_model.model.prompt.requires_grad_(False)
    loss_of(model(**batch)).backward()


@every_model
def test_disabled_the_base_gives_gradients_to_its_input(case):
    model = get_peft_model(case.base(), E3VAConfig(r=4))
    batch = case.training_batch()
    batch["pixel_values"].requires_grad_()
    image = batch["pixel_values"] * 1.0  # as of a loop that makes adversarial examples
    with model.disable_adapter(), warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model(**batch | {"pixel_values": image})).backward()
    assert batch["pixel_values"].grad is not None
    model(**case.batch())  # and nothing of it is remembered


def test_bare_parameters_of_a_method_s_module_are_held_frozen():
    case = BY_NAME["timm-vit"]
    model = get_peft_model(case.base(), E3VAConfig(r=4)).train()
    model.base_model.model.model.pos_embed.requires_grad = True
    with pytest.raises(ValueError, match=r"VisionTransformer\.pos_embed"):
        model(**case.training_batch())


def test_a_method_of_the_user_s_own_on_the_instance_is_refused_and_stays():
    model = BY_NAME["timm-vit"].base()
    own = model.model.forward_features = types.MethodType(type(model.model).forward_features, model.model)
    refused(model, "model.forward_features: VisionTransformer has a forward_features of its own")
    assert model.model.forward_features is own


def test_training_that_is_refused_leaves_the_frozen_stream_in_eval_mode():
    model = get_peft_model(BY_NAME["timm-swin"].base(), E3VAConfig(r=4))
    layer = next(module for module in model.modules() if isinstance(module, E3VALayer))
    layer.exit.patch_embed.requires_grad_(True)
    with pytest.raises(ValueError, match="requires_grad=True"):
        model.train()
    assert not any(module.training for part in layer.frozen for module in part.modules())
    layer.exit.patch_embed.requires_grad_(False)
    layer.exit.layers.train()  # by hand
    model(**BY_NAME["timm-swin"].training_batch())
    assert not any(module.training for part in layer.frozen for module in part.modules())


def test_blocks_that_share_a_module_which_is_read_are_refused():
    case = BY_NAME["dinov2-classifier"]
    model = case.base()
    model.dinov2.encoder.layer[1] = model.dinov2.encoder.layer[0]
    adapted = get_peft_model(model, E3VAConfig(r=4)).train()
    with pytest.raises(RuntimeError, match=r"layer\.\d: attention: .*twice"):
        adapted(**case.training_batch())
