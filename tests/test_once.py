"""The backbone once for several adapters: what each says is what it says alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from peft import get_peft_model
from torch import nn

from e3va_peft import E3VAConfig, backbone_once
from e3va_peft.backbones.base import adapted_blocks
from e3va_peft.cache.once import have_same_backbone, hold_once
from tests.helpers import assert_same, layers, outputs, step, ways
from tests.models import BY_NAME, Case, every_model, loss_of

NAMES = ("first", "second")
with_and_without_live_blocks = ways("", "live")


def two_adapters(case: Case, **options) -> nn.Module:
    """A model with two adapters, both with random highways and heads."""
    torch.manual_seed(0)
    model = get_peft_model(case.base(), E3VAConfig(r=4, init_weights=False, **options), adapter_name="first")
    model.add_adapter("second", E3VAConfig(r=2, init_weights=False, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".second." in name and "e3va_highway" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def by_adapter(model: nn.Module, batch: dict) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for name in NAMES:
        model.set_adapter(name)
        found[name] = outputs(model, batch)
    return found


def in_front(model: nn.Module) -> list[nn.Module]:
    """What is inside of the frozen blocks in front of the live ones."""
    parts = []
    for layer in layers(model):
        adapted = list(adapted_blocks(layer.stages, layer.depth))
        for name in adapted[: len(adapted) - layer.live_blocks]:
            parts += list(layer.exit.get_submodule(name).modules())[1:]
    return parts


@contextmanager
def runs_of(modules: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Note which modules run."""
    runs: list[nn.Module] = []
    hooks = [module.register_forward_hook(lambda own, args, output: runs.append(own)) for module in modules]
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()


@with_and_without_live_blocks
@every_model
def test_each_adapter_says_what_it_says_alone_and_the_blocks_run_once(case, way):
    model = two_adapters(case, **way)
    batches = [case.batch(), case.batch(seed=5)]
    expected = [by_adapter(model, batch) for batch in batches]
    assert any(not torch.equal(value, expected[0]["second"][key]) for key, value in expected[0]["first"].items())
    frozen = in_front(model)  # empty where all blocks are live
    with runs_of(frozen) as runs, backbone_once(model):
        for batch, own in zip(batches, expected, strict=True):
            for i, name in enumerate(NAMES):
                model.set_adapter(name)
                runs.clear()
                assert_same(outputs(model, batch), own[name], rtol=1e-5, atol=1e-6)
                assert bool(runs) == (i == 0 and bool(frozen))


FEW = ["swin-upernet", "vit-classifier", "dinov2-maps-without-norm", "convnext-retinanet", "timm-vit-averaged"]
few_models = pytest.mark.parametrize("case", [BY_NAME[name] for name in FEW], ids=FEW)


@pytest.mark.parametrize("storage", ["exact", "recompute", "int8"])
@with_and_without_live_blocks
@few_models
def test_gradients_are_those_of_the_adapter_alone(case, way, storage):
    model = two_adapters(case, tap_storage=storage, **way).double()
    frozen = in_front(model)

    def of_adapter(name: str) -> dict[str, torch.Tensor]:
        model.set_adapter(name)
        return step(model, case)

    expected = {name: of_adapter(name) for name in NAMES}
    with backbone_once(model), runs_of(frozen) as runs:
        for i, name in enumerate(NAMES):
            runs.clear()
            assert_same(of_adapter(name), expected[name], rtol=1e-6, atol=1e-8)
            assert bool(runs) == (i == 0)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_a_record_made_in_one_mode_is_not_read_in_another(grad):
    case = BY_NAME["swin-classifier"]
    model, batch = two_adapters(case), case.training_batch()
    with backbone_once(model), grad():
        model(**batch)
        with torch.inference_mode(False), torch.enable_grad():
            loss_of(model(**batch)).backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = model(**batch).logits
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(found, model(**batch).logits, rtol=0, atol=0)


@few_models
def test_images_that_are_changed_in_place_and_other_arguments_make_the_backbone_run_again(case):
    model, batch = two_adapters(case), case.batch()
    other = case.batch(seed=5)
    expected = by_adapter(model, other)
    with torch.no_grad(), backbone_once(model):
        model(**batch)
        batch["pixel_values"].copy_(other["pixel_values"])
        model(**batch)
        found = by_adapter(model, batch)  # with all hidden states
    for name in NAMES:
        assert_same(found[name], expected[name], rtol=1e-5, atol=1e-6)


@with_and_without_live_blocks
@few_models
def test_outputs_that_are_changed_in_place_do_not_change_what_follows(case, way):
    model, batch = two_adapters(case, **way), case.batch()
    expected = by_adapter(model, batch)
    with backbone_once(model):
        for name in NAMES:
            model.set_adapter(name)
            found = outputs(model, batch)
            assert_same(found, expected[name], rtol=1e-5, atol=1e-6)
            for value in found.values():
                value.zero_()


def test_the_base_model_runs_as_it_is():
    case = BY_NAME["vit-classifier"]
    model, batch = two_adapters(case), case.batch()
    with model.disable_adapter():
        expected = outputs(model, batch)
    with backbone_once(model):
        outputs(model, batch)
        with model.disable_adapter():
            assert_same(outputs(model, batch), expected, rtol=0, atol=0)


def test_a_compiled_model_reads_the_record():
    case = BY_NAME["vit-classifier"]
    model, batch = two_adapters(case), case.batch()
    expected = by_adapter(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(**batch)
        with runs_of(in_front(model)) as runs, backbone_once(compiled):
            for i, name in enumerate(NAMES):
                model.set_adapter(name)
                runs.clear()
                torch.testing.assert_close(compiled(**batch).logits, expected[name]["logits"])
                assert bool(runs) == (i == 0)


@with_and_without_live_blocks
def test_models_of_one_base_share_a_run(way):
    case = BY_NAME["swin-upernet"]
    models, batch = [two_adapters(case, **way) for _ in NAMES], case.batch()
    models[1].set_adapter("second")
    expected = [outputs(model, batch) for model in models]
    for _ in range(2):
        with runs_of(in_front(models[0])) as runs, runs_of(in_front(models[1])) as others, backbone_once(*models):
            for model, own in zip(models, expected, strict=True):
                assert_same(outputs(model, batch), own, rtol=1e-5, atol=1e-6)
        assert runs and not others
        hold_once(*models)
    weight = next(iter(in_front(models[0])[0].parameters()))
    assert weight.data_ptr() == next(iter(in_front(models[1])[0].parameters())).data_ptr()
    assert have_same_backbone(*models)


@pytest.mark.parametrize(("field", "value", "same"), [("layer_norm_eps", 0.1, False), ("id2label", {0: "a"}, True)])
def test_models_of_equal_weights_that_compute_something_else_share_no_run(field, value, same):
    models = [two_adapters(BY_NAME["swin-classifier"]) for _ in NAMES]
    setattr(layers(models[1])[0].exit.config, field, value)
    assert have_same_backbone(*models) == same
    with nullcontext() if same else pytest.raises(ValueError, match="or another config"), backbone_once(*models):
        pass


def test_models_that_read_other_taps_run_each_for_itself():
    case = BY_NAME["swin-classifier"]
    models = [two_adapters(case), two_adapters(case, taps=("block",)), two_adapters(case, live_blocks=1)]
    batch = case.batch()
    expected = [outputs(model, batch) for model in models]
    with backbone_once(*models):
        for _ in range(2):
            for model, own in zip(models, expected, strict=True):
                assert_same(outputs(model, batch), own, rtol=1e-5, atol=1e-6)


def test_models_without_a_highway_or_with_other_frozen_weights_are_refused():
    case = BY_NAME["vit-classifier"]
    model = two_adapters(case)
    other = get_peft_model(case.base(seed=1), E3VAConfig(r=4))
    with pytest.raises(ValueError, match=r"models\[1\]=PeftModel.*weights.*models\[0\]"):
        backbone_once(model, other).__enter__()
    with pytest.raises(ValueError, match=r"models\[0\]=ViTForImageClassification.*get_peft_model"):
        backbone_once(case.base()).__enter__()
