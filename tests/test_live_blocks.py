"""Blocks that gradient passes through, against references written apart from them. The laws are in `test_laws`."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from e3va_peft import E3VALayer
from e3va_peft.backbones import TapPoint
from e3va_peft.backbones.base import STREAM
from e3va_peft.storage import NORMS, ROUNDED
from tests.helpers import adapted, assert_same, double, gradients, layers, outputs, saved_bytes, step, written_out
from tests.models import BY_NAME, every_model_but, loss_of, registered, tensors


def written_into(base: nn.Module, layer: E3VALayer) -> None:
    """Write a highway into all blocks of a base model, each answer where its tap is read."""
    stages = layer.e3va_highway["default"].stages
    exit = base.get_submodule(next(name for name, m in base.named_modules() if layer.family.matches(m)))
    for spec, depth, factors in zip(layer.stages, layer.depth, stages, strict=False):
        for j, block in enumerate(spec.blocks[:depth]):
            points = layer.family.tap_points(exit, block) | {
                STREAM: TapPoint(exit.get_submodule(block), "input", None)
            }
            for k, point in enumerate(points[tap] for tap in layer.taps):
                index = j * len(layer.taps) + k

                def change(x: Tensor, factors=factors, index=index) -> Tensor:
                    first = layer.family.channels == "first"
                    answer = written_out(x.movedim(1, -1) if first else x, factors, index)
                    return x + (answer.movedim(-1, 1) if first else answer)

                def after(module, args, output, change=change):
                    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

                if point.read == "input":
                    point.module.register_forward_pre_hook(lambda m, args, c=change: (c(args[0]), *args[1:]))
                else:
                    point.module.register_forward_hook(after)


@pytest.mark.parametrize(("norm", "stream"), [*((norm, False) for norm in NORMS), ("layer", True)])
@pytest.mark.parametrize(
    "name", ["swin-classifier", "vit-classifier", "dinov2-classifier", "swinv2-classifier", "convnext-classifier"]
)
def test_with_all_blocks_live_it_is_an_adapter_in_every_block(name, norm, stream):
    case = BY_NAME[name]
    base = case.base().double()
    depth = sum(layers(adapted(case))[0].depth)
    taps = (STREAM, *registered(case.family).branches) if stream else None
    model = adapted(case, init_weights=False, live_blocks=depth, tap_norm=norm, taps=taps).double()
    twin = copy.deepcopy(model)
    written_into(base, layers(twin)[0])
    batch = {"pixel_values": case.batch()["pixel_values"].double()}
    left = model(**batch, output_hidden_states=True)
    right = base(**batch, output_hidden_states=True)
    assert_same(dict(tensors(left)), dict(tensors(right)), rtol=1e-9, atol=1e-9)
    left.logits.square().sum().backward(), right.logits.square().sum().backward()
    expected = gradients(layers(twin)[0].e3va_highway)
    assert_same(gradients(layers(model)[0].e3va_highway), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["vit-classifier", "dinov2-classifier", "dinov3-vit-in-own-head", "timm-vit"])
def test_in_front_of_the_live_blocks_all_is_as_without_them(name):
    case = BY_NAME[name]
    paper = adapted(case, init_weights=False, modules_to_save=[]).double()
    live = adapted(case, init_weights=False, modules_to_save=[], live_blocks=1).double()
    live.load_state_dict(paper.state_dict())
    batch = double(case.batch())
    before, after = outputs(paper, batch), outputs(live, batch)
    *states, last = [key for key in before if "hidden_states[" in key]
    for key in states:
        torch.testing.assert_close(after[key], before[key], rtol=1e-10, atol=1e-10)
    assert states and not torch.allclose(after[last], before[last])


@torch.no_grad()
@pytest.mark.parametrize("taps", [("attention", "mlp"), ("stream", "mlp")])
def test_the_lane_enters_the_first_live_block(taps):
    """Where the answers of the last block are zero, it is the frozen block on x + z."""
    case = BY_NAME["vit-classifier"]
    base, models = case.base().double(), []
    for live in (0, 1):
        models.append(adapted(case, init_weights=False, modules_to_save=[], live_blocks=live, taps=taps).double())
        models[live].load_state_dict(models[0].state_dict())
        for factor in ("v2", "bias2"):
            layers(models[live])[0].e3va_highway["default"].stages[0].get_parameter(factor)[-2:] = 0
    batch = double(case.batch())
    adapted_states, states = (model(**batch, output_hidden_states=True).hidden_states for model in models)
    expected = base.vit.layers[-1](adapted_states[-2])
    torch.testing.assert_close(states[-1], expected[0] if isinstance(expected, tuple) else expected)
    assert not torch.allclose(states[-1], adapted_states[-1])


@pytest.mark.parametrize("name", ["swin-classifier", "vit-classifier", "dinov2-classifier", "convnext-classifier"])
def test_taps_of_the_stream_alone_read_live_blocks_as_their_sum(name):
    case = BY_NAME[name]
    depth = sum(layers(adapted(case))[0].depth)
    for blocks, other, live in ((depth, "block", depth), (2, "stream", 0)):
        left = adapted(case, init_weights=False, modules_to_save=[], taps=("stream",), live_blocks=blocks).double()
        right = adapted(case, init_weights=False, modules_to_save=[], taps=(other,), live_blocks=live).double()
        right.load_state_dict(left.state_dict())
        found, expected = (outputs(model, double(case.batch())) for model in (left, right))
        states = [key for key in found if "hidden_states[" in key]
        same = [key for key in states if torch.allclose(found[key], expected[key], rtol=1e-10, atol=1e-10)]
        assert same == states if other == "block" else 0 < len(same) < len(states)


@every_model_but("swin-mask2former")  # its loss samples points in fp32
def test_checkpointing_changes_no_gradient_and_keeps_less(case):
    found, kept = {}, {}
    for checkpoint in (True, False):
        torch.manual_seed(0)
        model = adapted(case, init_weights=False, live_blocks=2, checkpoint_live_blocks=checkpoint)
        found[checkpoint] = step(copy.deepcopy(model).double(), case)
        kept[checkpoint] = saved_bytes(model, case)
    assert_same(found[True], found[False], rtol=1e-8, atol=1e-10)
    assert kept[True] < kept[False]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("storage", ("exact", *ROUNDED))
def test_live_blocks_say_the_same_in_training_and_in_inference(storage, norm):
    case = BY_NAME["vit-classifier"]
    model = adapted(case, init_weights=False, live_blocks=2, tap_storage=storage, tap_norm=norm).double().eval()
    batch = double(case.batch())
    with torch.no_grad():
        used = model(**batch).logits
    torch.testing.assert_close(model(**batch).logits.detach(), used, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["swin-classifier", "vit-classifier"])
def test_backward_can_run_twice(name):
    case = BY_NAME[name]
    for way in ({"live_blocks": 2}, {"tap_storage": "recompute"}, {"live_blocks": 1, "tap_storage": "recompute"}):
        model = adapted(case, init_weights=False, **way).double()
        once = step(model, case)
        model.zero_grad()
        loss = loss_of(model(**double(case.training_batch())))
        loss.backward(retain_graph=True), loss.backward()
        assert_same(gradients(model), {key: 2 * value for key, value in once.items()}, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["swin-classifier", "vit-classifier", "convnext-classifier"])
def test_the_checkpoint_has_the_same_keys_whatever_is_live_and_comes_back(name, tmp_path):
    case = BY_NAME[name]
    keys = [adapted(case, live_blocks=live).state_dict().keys() for live in (0, 1, 2)]
    assert keys[0] == keys[1] == keys[2]
    model = adapted(case, init_weights=False, live_blocks=2, tap_norm="relative").eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.base(), tmp_path).eval()
    assert again.peft_config["default"].live_blocks == 2
    assert_same(outputs(again, case.batch()), outputs(model, case.batch()), rtol=1e-5, atol=1e-6)
    paper = {key: value for key, value in outputs(adapted(case), case.batch()).items() if "logits" in key}
    assert any(not torch.allclose(outputs(again, case.batch())[key], value) for key, value in paper.items())


@pytest.mark.parametrize("name", ["swin-classifier", "vit-classifier"])
def test_more_live_blocks_than_there_are_is_an_error_with_their_number(name):
    case = BY_NAME[name]
    depth = layers(adapted(case))[0].depth
    with pytest.raises(ValueError, match=rf"live_blocks=9: .*{sum(depth)}"):
        adapted(case, live_blocks=9)


def test_checkpointing_of_timms_own_is_refused_with_live_blocks():
    case = BY_NAME["timm-vit"]
    model = adapted(case, live_blocks=2).train()
    layers(model)[0].exit.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match=r"set_grad_checkpointing\(False\)"):
        model(**case.training_batch())
    with torch.no_grad():
        model(**case.batch())


def test_a_live_block_that_raises_ends_its_checkpoint():
    case = BY_NAME["vit-classifier"]
    model = adapted(case, live_blocks=2).train()

    def fail(module, args, output):
        raise RuntimeError("out of memory")

    layer = layers(model)[0]
    handle = layer.exit.get_submodule(layer.stages[0].blocks[-1]).mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**case.training_batch())
    handle.remove()
    seen = []
    with saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        torch.ones(2, requires_grad=True).square()
    assert len(seen) == 1  # and not a hook of the block's on top of it
    loss_of(model(**case.training_batch())).backward()


def test_training_with_live_blocks_changes_the_highway_and_the_head_only():
    case = BY_NAME["swin-upernet"]
    model = adapted(case, live_blocks=2, tap_storage="recompute")
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_of(model(**case.training_batch()))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("e3va_" in name or ".modules_to_save." in name for name in changed)
