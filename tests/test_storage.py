"""How taps are kept: what rounding costs, and that the highway's gradient is that of what it read."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.models.swin.modeling_swin import SwinPatchMerging

from e3va_peft import E3VAConfig
from e3va_peft.frozen_pass import FrozenPass, MergingCall
from e3va_peft.highway import Highway, Stage
from e3va_peft.lane import Lane
from e3va_peft.storage import NORMS, ROUNDED, coarser, keep, normalized, pack, read, read_at_once, unpack
from tests.helpers import lane_of, saved_bytes
from tests.models import BY_NAME, every_model, loss_of, tensors


def with_outliers(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Taps as vision transformers have them: one channel is far larger than the rest."""
    tap = torch.randn(2, 9, width)
    tap[..., 3] *= 50
    return tap.to(dtype)


@pytest.mark.parametrize("width", [8, 33, 64, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("storage", ("exact", *ROUNDED))
def test_rounding_is_off_by_half_a_step_at_most(storage, dtype, width):
    tap = with_outliers(width, dtype)
    read = unpack(pack(tap, storage), width, torch.float32)
    assert read.shape == tap.shape and read.dtype == torch.float32
    largest = tap.float().abs().amax(-1, keepdim=True)
    if storage == "int4":
        groups = torch.nn.functional.pad(tap.float(), (0, -width % 32)).unflatten(-1, (-1, 32))
        largest = groups.abs().amax(-1, keepdim=True).expand(groups.shape).flatten(-2)[..., :width]
    step = {"exact": 0, "int8": largest / 127, "int4": largest / 7}[storage]
    # the scale of int4 is rounded to bf16 itself
    assert ((read - tap.float()).abs() <= step * 0.5 * 1.01 + largest * 4e-3 * (storage == "int4") + 1e-6).all()


@pytest.mark.parametrize("storage, worst", [("int8", 0.02), ("int4", 0.15)])
@pytest.mark.parametrize("size", [1e-30, 1e-5, 1, 1e30])
def test_rounding_is_as_good_for_small_taps_as_for_large_ones(storage, worst, size):
    tap = torch.randn(1, 50, 64)
    read = unpack(pack(size * tap, storage), 64, torch.float32) / size
    assert (read - tap).norm() < worst * tap.norm()


@pytest.mark.parametrize("storage", ("exact", *ROUNDED))
def test_a_relative_tap_is_read_as_its_norm_and_its_deviation(storage):
    tap = 3 + 5 * torch.randn(2, 9, 64)
    normed, deviation = read(keep(tap, storage, "relative"), 64, torch.float32, "relative")
    expected, own = normalized(tap), tap.std(-1, correction=0, keepdim=True)
    torch.testing.assert_close(deviation, own)
    assert (normed - expected).norm() < 0.15 * expected.norm()


def test_bytes_kept_are_those_of_the_docstring():
    tap = torch.randn(2, 50, 128)
    kept = {storage: sum(t.nbytes for t in pack(tap, storage)) for storage in ("exact", *ROUNDED)}
    tokens = 2 * 50
    assert kept == {"exact": tokens * 512, "int8": tokens * (128 + 2), "int4": tokens * (64 + 2 * 4)}


@pytest.mark.parametrize("width", [8, 33, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_bits_keep_the_length_of_every_token_and_what_is_beside_an_outlier(width, dtype):
    stream = with_outliers(width, dtype)
    kept = pack(stream, "int3")
    read = unpack(kept, width, torch.float32)
    torch.testing.assert_close(read.norm(dim=-1), stream.float().norm(dim=-1), rtol=1e-2, atol=0)
    others = [i for i in range(width) if i != 3]
    assert (read - stream.float())[..., others].norm() < 0.5 * stream.float()[..., others].norm()
    words = -(-width // 32) * 12  # 32 channels are 12 bytes
    assert [part[0].nbytes for part in kept] == [9 * words, 9 * 2, 2 * width]


def test_patch_merging_of_the_lane_sees_little_of_what_three_bits_change():
    merging = SwinPatchMerging(64)
    x, z, weights = torch.randn(2, 64, 64), torch.randn(2, 64, 64), torch.randn(2, 16, 128)
    x[..., 3] *= 50
    found = []
    for stream in (x, unpack(pack(x, "int3"), 64, torch.float32)):
        z = z.detach().requires_grad_()
        lane = merging(stream + z, (8, 8)) - merging(stream, (8, 8))
        found.append((lane.detach(), torch.autograd.grad((lane * weights).sum(), z)[0]))
    for rounded, exact in zip(found[1], found[0], strict=True):
        assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_a_tap_of_zeros_is_read_as_zeros(storage):
    assert not unpack(pack(torch.zeros(1, 2, 32), storage), 32, torch.float32).any()


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_gradients_are_exact_for_the_taps_that_were_read(storage):
    stage = Stage(width=40, num_adapters=3, r=4, bottleneck=20, init_weights=False)
    kept = [pack(with_outliers(40), storage) for _ in range(3)]
    weights = torch.randn(2, 9, 40)
    got = stage(kept)
    (got * weights).sum().backward()
    rounded = {name: p.grad.clone() for name, p in stage.named_parameters()}
    stage.zero_grad()
    read = [unpack(tap, 40, torch.float32) for tap in kept]
    hidden = [torch.nn.functional.gelu(t @ stage.u1[i] @ stage.v1[i] + stage.bias1[i]) for i, t in enumerate(read)]
    expected = sum(h @ stage.u2[i] @ stage.v2[i] + stage.bias2[i] for i, h in enumerate(hidden))
    (expected * weights).sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in stage.named_parameters():
        assert (parameter.grad - rounded[name]).norm() < 1e-5 * rounded[name].norm(), name


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_lean_merging_has_the_exact_value_and_nearly_the_exact_gradient(storage):
    merging = BY_NAME["swin-maps-in-own-head"].base().backbone.swin.encoder.layers[0].downsample
    nn.init.normal_(merging.reduction.weight), nn.init.normal_(merging.norm.weight)
    x, z, weights = torch.randn(2, 15, 8), torch.randn(2, 15, 8), torch.randn(2, 6, 16)
    x[..., 3] *= 100  # as one channel of a trained stream is
    results = {}
    for kind in ("exact", storage):
        lane = lane_of(leaf := z.clone().requires_grad_(), merging, kind)
        lane.frozen.mergings[0] = MergingCall(x, ((3, 5),), {}, merging(x, (3, 5)).detach())
        lane.leave(0)
        merged = lane.ahead(0)
        (merged * weights).sum().backward()
        results[kind] = merged, leaf.grad
    torch.testing.assert_close(results[storage][0], results["exact"][0], rtol=0, atol=0)
    error = (results[storage][1] - results["exact"][1]).norm() / results["exact"][1].norm()
    assert 0 < error < 1e-2  # 32 wide here: the outlier is a larger part of the norm than in a real model


@every_model
def test_rounded_taps_train_all_and_keep_less(case):
    kept = {}
    for storage in ("exact", *ROUNDED):
        model = get_peft_model(case.base(), E3VAConfig(r=4, tap_storage=storage)).train()
        wanted = [p for p in model.parameters() if p.requires_grad]
        kept[storage] = saved_bytes(model, case)
        loss_of(model(**case.training_batch())).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in wanted)
    assert kept["int8"] < kept["exact"] and kept["int4"] < kept["exact"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["swin-upernet", "vit-classifier"])
def test_what_was_trained_is_what_is_used(name, norm):
    case = BY_NAME[name]
    found = {}
    for storage in ("exact", *ROUNDED, "recompute"):
        torch.manual_seed(0)
        config = E3VAConfig(r=4, tap_storage=storage, tap_norm=norm, init_weights=False)
        model = get_peft_model(case.base(), config).eval()
        with torch.no_grad():
            used = dict(tensors(model(**case.batch())))
        found[storage] = used
        torch.testing.assert_close(used, dict(tensors(model(**case.batch()))), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["recompute"], found["exact"])
    for storage in ("int8", "int4"):
        assert any(not torch.allclose(value, found["exact"][key]) for key, value in found[storage].items())


@pytest.mark.parametrize("others", [["exact", "int8"], ["recompute"]])
def test_an_adapter_reads_alone_as_it_does_beside_others(others):
    case = BY_NAME["swin-classifier"]
    own = {"r": 4, "modules_to_save": []}
    config = E3VAConfig(tap_storage="int4", init_weights=False, **own)
    model = get_peft_model(case.base(), config).eval()
    alone = gradients_of(model, case, "default")
    for i, storage in enumerate(others):  # which add nothing yet
        model.add_adapter(f"other{i}", E3VAConfig(tap_storage=storage, **own))
    model.base_model.set_adapter(["default", *(f"other{i}" for i in range(len(others)))])
    torch.testing.assert_close(gradients_of(model, case, "default"), alone, rtol=1e-2, atol=1e-4)


def gradients_of(model, case, adapter):
    model.zero_grad()
    loss_of(model(**case.training_batch())).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if f"highway.{adapter}" in n and p.grad is not None}


@pytest.mark.parametrize("norm", NORMS)
def test_a_tap_that_is_kept_more_exactly_is_read_as_the_adapter_reads(norm):
    tap = with_outliers(40)
    for storage in ("int8", "int4"):
        expected = read(keep(tap, storage, norm), 40, torch.float32, norm)
        for kept in ("exact", "fp16", storage):
            found = read(coarser(keep(tap, kept, norm), storage, 40, norm), 40, torch.float32, norm)
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=0.2 if kept == "fp16" else 1e-6)
        torch.testing.assert_close(read_at_once(tap, storage, torch.float32, norm), expected, rtol=1e-6, atol=0)


def test_what_highways_that_are_active_together_keep_is_what_the_most_exact_wants():
    highways = [Highway([8], [1], tap_storage=storage) for storage in ("int4", "exact", "int8")]
    assert Lane(highways, FrozenPass(), [1]).storage == "exact"
    assert Lane(highways[::2], FrozenPass(), [1]).storage == "int8"


def test_storage_is_saved_with_the_adapter(tmp_path):
    model = get_peft_model(BY_NAME["vit-classifier"].base(), E3VAConfig(r=4, tap_storage="int8", taps=("block",)))
    model.save_pretrained(tmp_path)
    config = E3VAConfig.from_pretrained(tmp_path)
    assert config.tap_storage == "int8" and config.taps == ("block",)
