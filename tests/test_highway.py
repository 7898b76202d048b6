"""The method itself, against references written independently of it."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.swin.modeling_swin import SwinPatchMerging

from e3va_peft import E3VAConfig, E3VALayer, fused
from e3va_peft.backbones.base import in_turn
from e3va_peft.backbones.swin import SWIN
from e3va_peft.backbones.swinv2 import SWINV2
from e3va_peft.frozen_pass import FrozenPass, Grid, MergingCall
from e3va_peft.highway import Highway, Stage, adapter, answer, merge, sum_of_adapters
from e3va_peft.hooks import Note
from e3va_peft.lane import Lane
from e3va_peft.recorder import CURRENT, Recorder
from e3va_peft.storage import NORMS, ROUNDED, deviation_of, keep, normalized
from tests.helpers import lane_of, written_out
from tests.models import BY_NAME, registered


def branches(base: nn.Module, batch: dict, points: list[tuple[nn.Module, bool]]) -> list[Tensor]:
    """What the branches of a frozen model yield: the input of a module, or its output."""
    seen: dict[int, Tensor] = {}
    handles = []
    for i, (module, read_input) in enumerate(points):
        if read_input:
            handles.append(module.register_forward_pre_hook(lambda m, args, i=i: seen.__setitem__(i, args[0])))
        else:
            handles.append(
                module.register_forward_hook(
                    lambda m, args, out, i=i: seen.__setitem__(i, out[0] if isinstance(out, tuple) else out)
                )
            )
    with torch.no_grad():
        base(**batch)
    for handle in handles:
        handle.remove()
    return [seen[i] for i in range(len(points))]


def highway_of(model: nn.Module) -> Highway:
    return next(m for m in model.modules() if isinstance(m, E3VALayer)).e3va_highway["default"]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in highway_of(model).named_parameters()}


def test_highway_on_swin_matches_a_ten_line_reference_in_value_and_gradient():
    case = BY_NAME["swin-maps-in-own-head"]
    base = case.base().double()
    batch = {"pixel_values": case.batch(size=(33, 41))["pixel_values"].double()}
    model = get_peft_model(case.base().double(), E3VAConfig(r=4, init_weights=False)).eval()
    maps = []
    for norm in model.base_model.model.backbone.hidden_states_norms.values():
        norm.register_forward_hook(lambda m, args, out: maps.append(out))
    model(**batch)["logits"].square().sum().backward()
    got, got_gradients = maps, gradients(model)
    model.zero_grad()

    layers = base.backbone.swin.encoder.layers
    points = [(p, i) for s in layers for b in s.blocks for p, i in ((b.drop_path, True), (b.mlp, False))]
    reads = iter(branches(base, batch, points))
    merging_inputs = {}
    for i, stage in enumerate(layers[:-1]):
        stage.downsample.register_forward_pre_hook(lambda m, args, i=i: merging_inputs.__setitem__(i, args))
    with torch.no_grad():
        frozen = base.backbone(**batch, output_hidden_states=True)
    z, expected = 0, []
    for i, (stage, factors) in enumerate(zip(layers, highway_of(model).stages, strict=True)):
        for j in range(2 * len(stage.blocks)):
            z = z + written_out(next(reads), factors, j)
        x = frozen.hidden_states[i + 1].flatten(2).transpose(1, 2)
        expected.append(base.backbone.hidden_states_norms[f"stage{i + 1}"](x + z))
        if i in merging_inputs:
            x, size = merging_inputs[i]
            z = stage.downsample(x + z, size) - stage.downsample(x, size)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left.detach(), right.detach(), rtol=1e-9, atol=1e-9)

    reshaped = [e.transpose(1, 2).reshape(m.shape) for e, m in zip(expected, frozen.feature_maps, strict=True)]
    logits = sum(F.interpolate(conv(x), size=(33, 41)) for conv, x in zip(base.lateral, reshaped, strict=True))
    logits.square().sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(got_gradients[name], gradient, rtol=1e-8, atol=1e-9, msg=name)


def test_highway_on_vit_matches_a_ten_line_reference_at_every_hidden_state():
    case = BY_NAME["vit-classifier"]
    base = case.base().double()
    batch = {"pixel_values": case.batch()["pixel_values"].double()}
    model = get_peft_model(case.base().double(), E3VAConfig(r=4, init_weights=False)).eval()
    outputs = model(**batch, output_hidden_states=True)
    sum((i + 1) * h.square().sum() for i, h in enumerate((*outputs.hidden_states, outputs.logits))).backward()
    got = gradients(model)
    model.zero_grad()

    points = [(part, False) for block in base.vit.layers for part in (block.attention, block.mlp)]
    reads = branches(base, batch, points)
    with torch.no_grad():
        frozen = base(**batch, output_hidden_states=True).hidden_states
    stage, z, states = highway_of(model).stages[0], 0, [frozen[0]]
    for j in range(len(base.vit.layers)):
        z = z + written_out(reads[2 * j], stage, 2 * j) + written_out(reads[2 * j + 1], stage, 2 * j + 1)
        states.append(frozen[j + 1] + z)
    logits = base.classifier(base.vit.layernorm(states[-1])[:, 0])
    for left, right in zip((*outputs.hidden_states, outputs.logits), (*states, logits), strict=True):
        torch.testing.assert_close(left.detach(), right.detach(), rtol=1e-9, atol=1e-9)
    sum((i + 1) * h.square().sum() for i, h in enumerate((*states, logits))).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("grad", [True, False])
def test_one_tap_per_block_reads_the_sum_of_its_branches(grad):
    case = BY_NAME["vit-classifier"]
    base, batch = case.base(), case.batch()
    model = get_peft_model(case.base(), E3VAConfig(r=4, init_weights=False, taps=("block",))).eval()
    with torch.set_grad_enabled(grad):
        states = model(**batch, output_hidden_states=True).hidden_states
    reads = branches(
        base, batch, [(part, False) for block in base.vit.layers for part in (block.attention, block.mlp)]
    )
    with torch.no_grad():
        frozen = base(**batch, output_hidden_states=True).hidden_states
    stage, z = highway_of(model).stages[0], 0
    for j in range(len(base.vit.layers)):
        z = z + written_out(reads[2 * j] + reads[2 * j + 1], stage, j)
        torch.testing.assert_close(states[j + 1], frozen[j + 1] + z)


@pytest.mark.parametrize("grad", [True, False])
def test_a_stream_tap_reads_what_enters_the_block(grad):
    case = BY_NAME["vit-classifier"]
    base, batch = case.base(), case.batch()
    model = get_peft_model(case.base(), E3VAConfig(r=4, init_weights=False, taps=("mlp", "stream"))).eval()
    assert model.peft_config["default"].taps == ("stream", "mlp")  # in the order in which they run
    with torch.set_grad_enabled(grad):
        states = model(**batch, output_hidden_states=True).hidden_states
    reads = branches(base, batch, [(block.mlp, False) for block in base.vit.layers])
    with torch.no_grad():
        frozen = base(**batch, output_hidden_states=True).hidden_states
    stage, z = highway_of(model).stages[0], 0
    for j in range(len(base.vit.layers)):
        z = z + written_out(frozen[j], stage, 2 * j) + written_out(reads[j], stage, 2 * j + 1)
        torch.testing.assert_close(states[j + 1], frozen[j + 1] + z)


def test_sum_of_adapters_passes_gradcheck():
    stage = Stage(width=6, num_adapters=3, r=2, bottleneck=3, init_weights=False).double()
    taps = [torch.randn(2, 5, 6, dtype=torch.double) for _ in range(3)]
    names, values = zip(*stage.named_parameters(), strict=True)
    inputs = tuple(value.detach().requires_grad_() for value in values)
    assert torch.autograd.gradcheck(
        lambda *v: torch.func.functional_call(stage, dict(zip(names, v, strict=True)), ([(t,) for t in taps],)),
        inputs,
    )


def test_a_stage_keeps_nothing_but_its_taps_for_backward():
    stage = Stage(width=8, num_adapters=4, r=2, bottleneck=4)
    taps = [torch.randn(2, 9, 8) for _ in range(4)]
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        stage([(tap,) for tap in taps]).sum().backward()
    own = {p.data_ptr() for p in stage.parameters()}
    kept = [t for t in saved if t.data_ptr() not in own]
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in taps]


@pytest.mark.parametrize("norm", ["layer", "relative"])
def test_a_stage_that_norms_keeps_two_numbers_a_token_beside_its_taps(norm):
    stage = Stage(width=8, num_adapters=4, r=2, bottleneck=4, norm=norm)
    taps = [torch.randn(2, 9, 8) for _ in range(4)]
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        stage([(tap,) for tap in taps]).sum().backward()
    known = {t.data_ptr() for t in [*stage.parameters(), *taps]}
    assert [t.shape for t in saved if t.data_ptr() not in known] == [(2, 9, 1)] * 8


@pytest.mark.parametrize("norm", ["layer", "relative"])
@pytest.mark.parametrize("tokens", [1, 3, 4, 37])
def test_backward_with_statistics_has_the_gradient_of_the_plain_formula_also_far_from_zero(norm, tokens):
    stage = Stage(width=24, num_adapters=2, r=3, bottleneck=8, norm=norm, init_weights=False)
    taps = [20 + torch.randn(1, tokens, 24) for _ in range(2)]
    stage([(tap,) for tap in taps]).square().sum().backward()
    got = [p.grad.clone() for p in stage.parameters()]
    exact = copy.deepcopy(stage).double()
    exact.zero_grad()
    sum(written_out(tap.double(), exact, i) for i, tap in enumerate(taps)).square().sum().backward()
    for own, p in zip(got, exact.parameters(), strict=True):
        assert (own - p.grad).norm() <= 2e-5 * p.grad.norm()


def test_saved_taps_are_unpacked_once_and_can_be_checkpointed():
    stage = Stage(width=8, num_adapters=3, r=2, bottleneck=4, init_weights=False)
    taps = [torch.randn(2, 5, 8) for _ in range(3)]
    unpacked: list[int] = []
    with saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(1) or t):
        stage([(tap,) for tap in taps]).sum().backward()
    assert len(unpacked) == 6 + 3
    direct = stage.u1.grad.clone()
    stage.zero_grad()
    checkpoint(lambda: stage([(tap,) for tap in taps]).sum(), use_reentrant=False).backward()
    torch.testing.assert_close(stage.u1.grad, direct)


def test_a_stage_is_one_autograd_node_however_deep():
    for depth in (2, 36):
        stage = Stage(width=8, num_adapters=depth, r=2, bottleneck=4)
        node = stage([(torch.randn(1, 4, 8),) for _ in range(depth)]).grad_fn
        assert type(node).__name__ == "_SumOfAdaptersBackward"


def stage_of(norm: str, width: int = 40, r: int = 4, dtype: torch.dtype = torch.float32) -> Stage:
    """Three adapters at random values."""
    return Stage(width, 3, r, width // 2, init_weights=False, norm=norm).to(dtype)


OPTIONS = [
    (norm, storage, dtype, autocast)
    for norm in NORMS
    for storage in ("exact", *ROUNDED)
    for dtype in (torch.float32, torch.float64)
    for autocast in (False, True)
]


@pytest.mark.parametrize("norm, storage, dtype, autocast", OPTIONS)
def test_what_runs_equals_the_plain_formula_in_value_and_gradient(norm, storage, dtype, autocast):
    stage = stage_of(norm, dtype=dtype)
    kept = [keep(1 + 3 * torch.randn(2, 9, 40, dtype=dtype), storage, norm) for _ in range(3)]
    weights = torch.randn(2, 9, 40, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        runs = stage(kept)
    plain = sum_of_adapters(stage.factors, kept, norm)
    tolerance = 0.05 if autocast else 1e-5 if dtype == torch.float32 else 1e-11
    assert (runs - plain).norm() <= tolerance * plain.norm()
    got = torch.autograd.grad((runs * weights).sum(), stage.factors)
    expected = torch.autograd.grad((plain * weights).sum(), stage.factors)
    for left, right in zip(got, expected, strict=True):
        assert (left - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start, count", [(0, 3), (1, 1), (1, 2)])
def test_the_halves_of_inference_equal_the_plain_formula(start, count, norm):
    stage = stage_of(norm, 8, 2, torch.float64)
    taps = [torch.randn(2, 9, 8, dtype=torch.double) for _ in range(count)]
    with torch.no_grad():
        reduced = [stage([tap], start + i, "reduce") for i, tap in enumerate(taps)]
        together = stage(reduced, start, "expand")
    factors = [factor[start : start + count] for factor in stage.factors]
    expected = sum_of_adapters(factors, [(tap,) for tap in taps], norm)
    torch.testing.assert_close(together, expected.detach())


def test_an_adapter_is_the_formula():
    stage, tap = Stage(width=8, num_adapters=2, r=2, bottleneck=4, init_weights=False), torch.randn(2, 9, 8)
    torch.testing.assert_close(
        adapter(tap, *(f[1] for f in stage.factors)), written_out(tap, stage, 1), rtol=0, atol=0
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype, autocast", [(torch.float64, False), (torch.float32, False), (torch.float32, True)])
def test_an_answer_in_a_live_block_is_the_formula_in_value_and_in_every_gradient(norm, dtype, autocast):
    stage = stage_of(norm, 40, 4, dtype)
    tap = (1 + 3 * torch.randn(2, 9, 40, dtype=dtype)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        runs = stage([tap], 1, "answer")
    plain = answer(tap, [factor[1] for factor in stage.factors], norm)
    tolerance = 0.05 if autocast else 1e-5 if dtype == torch.float32 else 1e-11
    assert (runs - plain).norm() <= tolerance * plain.norm()
    got, expected = (torch.autograd.grad(y.square().sum(), (tap, *stage.factors)) for y in (runs, plain))
    for left, right in zip(got, expected, strict=True):
        assert left.dtype == dtype and (left - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("norm", NORMS)
def test_an_answer_passes_gradcheck_and_keeps_what_it_read(norm):
    stage = stage_of(norm, 6, 2, torch.float64)
    tap = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    own = [factor[1].detach().requires_grad_() for factor in stage.factors]
    assert torch.autograd.gradcheck(lambda tap, *factors: fused.answer(tap, factors, norm), (tap, *own))
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused.answer(tap, own, norm)
    factors = {p.data_ptr() for p in own}
    assert sum(t.nbytes for t in saved if t.data_ptr() not in factors) <= tap.nbytes + 8 * 2 * 5


def test_a_normalised_tap_has_mean_0_and_deviation_1_also_where_it_is_small():
    for size in (1e-3, 1.0, 1e3):
        tap = size * (3 + torch.randn(4, 5, 64))
        normed = normalized(tap)
        torch.testing.assert_close(normed.std(-1, correction=0), torch.ones(4, 5), rtol=1e-2, atol=0)
        torch.testing.assert_close(normed.mean(-1), torch.zeros(4, 5), atol=1e-4, rtol=0)
        torch.testing.assert_close(deviation_of(tap)[..., 0], tap.std(-1, correction=0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patch_merging_that_runs_equals_the_plain_formula_in_value_and_gradient(dtype, lean):
    module = BY_NAME["swin-maps-in-own-head"].base().backbone.swin.encoder.layers[0].downsample
    x, z = torch.randn(2, 15, 8), torch.randn(2, 15, 8, requires_grad=True)
    x, exact = x.to(dtype), module.to(dtype)
    frozen = exact(x, (3, 5)).detach()
    call = MergingCall(x, ((3, 5),), {}, frozen)
    runs, entered, left = fused.merge(fused.Merging([exact], in_turn), call, z, None, lean)
    (got,) = torch.autograd.grad(runs.square().sum(), z)
    plain = merge(fused.Merging([module.float()], in_turn), x.float(), z, None, (3, 5))
    (expected,) = torch.autograd.grad(plain.square().sum(), z)
    torch.testing.assert_close(runs, plain)
    assert torch.equal(entered, x + z) and (left is None) is (dtype is torch.bfloat16)
    assert left is None or torch.equal(left - frozen, runs)
    assert (got - expected).norm() <= (1e-2 if lean else 1e-5) * expected.norm()


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (4, 5)])
@pytest.mark.parametrize("family", [SWIN, SWINV2], ids=lambda family: family.name)
def test_patch_merging_of_a_family_is_that_of_its_backbone_to_the_bit(family, grid):
    encoder = BY_NAME[f"{family.name}-classifier"].base().get_submodule(family.name).encoder
    (stage, *_), (height, width) = family.stages(encoder), grid
    names, run = family.runner(stage)
    x = torch.randn(2, height * width, stage.width, requires_grad=True)
    expected = encoder.get_submodule(stage.merging[0])(x, grid)
    found = run([encoder.get_submodule(name) for name in names], x, Grid(0, height, width), grid)
    assert len(names) == 2
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)))


class Doubled(SwinPatchMerging):
    """Patch merging of another kind."""

    def forward(self, *args):
        return twice(super().forward, *args)


def twice(function, *args):
    return 2 * function(*args)


@pytest.mark.parametrize("patched", [False, True])
def test_patch_merging_that_is_not_that_of_the_family_runs_as_it_is(patched):
    case = BY_NAME["swin-classifier"]
    base = case.base().eval()
    for layer in base.swin.encoder.layers[:-1]:
        if patched:
            layer.downsample.forward = partial(twice, layer.downsample.forward)
        else:
            layer.downsample.__class__ = Doubled
    batch = case.batch()
    with torch.no_grad():
        expected = base(**batch).logits
        found = get_peft_model(base, E3VAConfig()).eval()(**batch).logits
    assert torch.equal(found, expected)  # a lane of zeros stays one


def test_one_forward_serves_whatever_wraps_a_stage_with_gradient_and_without():
    calls = []
    highway = Highway(widths=[8], num_adapters=[2], r=2)
    for name, module in highway.named_modules():
        if isinstance(module, Highway | Stage):
            module.register_forward_pre_hook(lambda m, args, name=name: calls.append(name))
    for grad in (True, False):
        lane = Lane([highway], FrozenPass(), [2], grad=grad)
        with torch.set_grad_enabled(grad):
            for i in range(2):
                lane.frozen.taps[0, i] = lane.keep(0, i, torch.randn(1, 4, 8))
            lane.behind(0, 2)
    assert calls == ["", "stages.0"] * (1 + 3)


def test_inference_reduces_each_tap_at_once():
    highway = Highway(widths=[8], num_adapters=[2], r=2, init_weights=False)
    tap = torch.randn(2, 9, 8)
    with torch.no_grad():
        lane = Lane([highway], FrozenPass(), [2], grad=False)
        for i in range(2):
            lane.frozen.taps[0, i] = lane.keep(0, i, tap)
        assert [kept.shape for reads in lane.frozen.taps.values() for kept in reads] == [(2, 9, 2), (2, 9, 2)]
        got = lane.behind(0, 2)
    expected = sum(written_out(tap, highway.stages[0], i) for i in range(2))
    torch.testing.assert_close(got, expected.detach())
    assert not lane.frozen.taps


@pytest.mark.parametrize("storage", ("exact", *ROUNDED))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_zero_lane_stays_exactly_zero_through_patch_merging(dtype, storage):
    case = BY_NAME["swin-maps-in-own-head"]
    merging = case.base().backbone.swin.encoder.layers[0].downsample.to(dtype)
    x = torch.randn(2, 15, 8).to(dtype)
    lane = lane_of(torch.zeros(2, 15, 8, requires_grad=True), merging, storage)
    lane.frozen.mergings[0] = MergingCall(x, ((3, 5),), {}, merging(x, (3, 5)).detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lane.leave(0)
    assert lane.ahead(0).dtype == torch.float32 and lane.ahead(0).shape == (2, 6, 16)
    assert not lane.ahead(0).any()


def test_inference_under_bf16_autocast_is_close_to_fp32():
    stage = Stage(width=16, num_adapters=2, r=4, bottleneck=8, init_weights=False)
    taps = [torch.randn(2, 30, 16) for _ in range(2)]
    found = {}
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found[autocast] = stage([stage([tap], i, "reduce") for i, tap in enumerate(taps)], 0, "expand")
    assert found[True].dtype == torch.bfloat16
    assert (found[True] - found[False]).norm() < 0.05 * found[False].norm()


def test_gradients_under_bf16_autocast_are_close_to_fp32():
    stage = Stage(width=16, num_adapters=4, r=4, bottleneck=8, init_weights=False)
    taps = [torch.randn(2, 30, 16) for _ in range(4)]
    stage([(tap,) for tap in taps]).square().sum().backward()
    exact = {name: p.grad.clone() for name, p in stage.named_parameters()}
    stage.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = stage([(tap,) for tap in taps])
        assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for name, parameter in stage.named_parameters():
        assert parameter.grad.dtype == torch.float32
        error = (parameter.grad - exact[name]).norm() / exact[name].norm()
        assert error < 0.05, name


def test_highway_starts_at_zero_and_its_first_factors_do_not():
    highway = Highway(widths=[8, 16], num_adapters=[2, 4], r=2)
    for stage in highway.stages:
        assert not stage.v2.any() and not stage.bias2.any() and not stage.bias1.any()
        for factor in (stage.u1, stage.v1, stage.u2):
            assert factor.std().item() == pytest.approx((2 / factor.shape[1]) ** 0.5, rel=0.3)


class OddMerging(nn.Module):
    """Patch merging as a family of a user's own may have it: it takes a keyword and returns fp32 under autocast."""

    def __init__(self):
        super().__init__()
        self.reduction = nn.Linear(8, 16)

    def forward(self, x, *, scale=1.0):
        return (scale * self.reduction(x)[:, ::2]).float()


def recorder_of(lane: Lane) -> Recorder:
    return Recorder(lane.frozen, nn.Identity(), registered("swin"), lane.keep, lane.leave)


@pytest.mark.parametrize("storage", ["exact", "int8"])
@pytest.mark.parametrize("autocast", [False, True])
def test_patch_merging_runs_in_the_lane_as_it_ran_in_the_backbone(storage, autocast):
    merging, x, z = OddMerging().requires_grad_(False), torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    merging.register_forward_pre_hook(Note(Recorder.enter_merging, 0, "merging"), with_kwargs=True)
    merging.register_forward_hook(Note(Recorder.leave_merging, 0, "merging"))
    lanes = []
    for start in (torch.zeros_like(z), z):
        lane = lane_of(start.requires_grad_(), merging, storage)
        autocasting = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
        with (
            CURRENT.set(recorder_of(lane)),
            autocasting,
            torch.no_grad(),
        ):  # the lane passes with gradient all the same
            merging(x, scale=3.0)
        lanes.append(lane.ahead(0))
    assert not lanes[0].any()
    expected = merging(x + z, scale=3.0) - merging(x, scale=3.0)
    torch.testing.assert_close(lanes[1], expected)
    lanes[1].sum().backward()
    torch.testing.assert_close(
        z.grad, torch.autograd.grad(merging(leaf := z.detach().requires_grad_(), scale=3.0).sum(), leaf)[0]
    )


def test_patch_merging_that_cannot_carry_the_lane_is_an_error_that_names_it():
    lane = lane_of(torch.ones(1), nn.Linear(1, 1))
    with CURRENT.set(recorder_of(lane)):
        with pytest.raises(TypeError, match=r"layers.2: .*stage 2.*by position"):
            Note(Recorder.enter_merging, 2, "layers.2")(nn.Linear(1, 1), (), {"x": torch.ones(1)})
        with pytest.raises(TypeError, match=r"layers.2: .*stage 2.*returned"):
            Note(Recorder.leave_merging, 2, "layers.2")(nn.Linear(1, 1), (), {"x": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"stage 0: .*patch merging"):
        lane.behind(1, 1)


def test_parts_of_a_tap_add_up_whichever_comes_first():
    lane = Lane([Highway([8], [1])], FrozenPass(), [1])
    recorder = recorder_of(lane)
    first, second = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    recorder.read(0, 0, 2, first, "a")
    with pytest.raises(RuntimeError, match=r"taps \[0\]"):
        lane.behind(0, 1)
    recorder.read(0, 0, 2, second, "b")
    torch.testing.assert_close(lane.frozen.take(0, 0, 1)[0][0], first + second)


def test_a_missing_tap_is_an_error_that_says_so():
    lane = Lane([Highway(widths=[8], num_adapters=[2], r=2)], FrozenPass(), [1], taps_per_block=2)
    lane.frozen.taps[0, 0] = lane.keep(0, 0, torch.randn(1, 4, 8))
    with pytest.raises(RuntimeError, match=r"stage 0: .*taps \[1\]"):
        lane.behind(0, 1)


def test_the_lane_moves_forward_only():
    lane = Lane([Highway(widths=[8], num_adapters=[3], r=2)], FrozenPass(), [3])
    for i in range(3):
        lane.frozen.taps[0, i] = lane.keep(0, i, torch.randn(1, 4, 8))
    second = lane.behind(0, 2)
    for stage, block in ((0, 1), (0, 0)):
        with pytest.raises(RuntimeError, match="block 2 of stage 0"):
            lane.behind(stage, block)
    assert lane.behind(0, 2) is second and lane.behind(0, 3) is not second
    with pytest.raises(RuntimeError, match=r"stage 0: .*patch merging"):
        lane.ahead(0)


def test_a_stage_that_is_not_shown_is_not_kept_and_asking_for_it_says_so():
    merging = BY_NAME["swin-maps-in-own-head"].base().backbone.swin.encoder.layers[0].downsample
    lane = lane_of(torch.zeros(2, 15, 8), merging)
    lane.keep_stages = False
    lane.frozen.mergings[0] = MergingCall(torch.randn(2, 15, 8), ((3, 5),), {}, None)
    lane.leave(0)
    assert not lane.passed
    with pytest.raises(RuntimeError, match=r"block 1 of stage 0.*Backbone\.shown"):
        lane.behind(0, 1)


def test_an_answer_in_fp16_has_a_finite_gradient_for_a_small_tap():
    stage = stage_of("relative")
    tap = (1e-3 * torch.randn(2, 9, 40)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        runs = stage([tap], 1, "answer")
    plain = answer(tap, [factor[1] for factor in stage.factors], "relative")
    weights = 1000 * torch.randn(2, 9, 40)  # as a gradient scaler's are
    got, expected = (torch.autograd.grad((y * weights).sum(), tap)[0] for y in (runs, plain))
    assert (got - expected).norm() <= 0.02 * expected.norm()
