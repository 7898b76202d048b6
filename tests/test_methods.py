"""The methods: what each trains, where it begins, and that it is what its source says."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import SwinBackbone, SwinConfig

from e3va_peft import cli
from e3va_peft.errors import UserError
from e3va_peft.exits import find_exits, trained_inside
from e3va_peft.methods import METHODS, adapt, trained_whole
from e3va_peft.methods.base import Bottleneck
from e3va_peft.methods.lorand import LoRand
from e3va_peft.methods.mona import Enter, Mona
from tests.models import BY_NAME, SWIN_B, every_model, loss_of, registered, train_steps

every_method = pytest.mark.parametrize("method", METHODS)
every_family = pytest.mark.parametrize(
    "case",
    [BY_NAME[name] for name in ("swin-upernet", "vit-classifier", "dinov2-classifier")],
    ids=lambda case: case.name,
)
inserting = pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.saves == "inserted"])


def adapted(case, method: str, seed: int = 0) -> nn.Module:
    base = case.base(seed)
    torch.manual_seed(seed)
    return adapt(base, {"name": method})


def wanting(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@every_model
def test_what_is_trained_gets_a_gradient_and_nothing_else_does(case):
    # full and LoRA take blocks along that nobody reads; E3VA and the head alone have tests of their own
    mlp = registered(case.family).branches.get("mlp")
    for method in ("partial-1", "bitfit", "norm-tuning", "adapter", "adaptformer", "lorand", "mona"):
        if method == "adaptformer" and (mlp is None or mlp.computed_by is None):
            with pytest.raises(UserError, match="no one module of a"):
                adapted(case, method)
            continue
        model = adapted(case, method).train()
        loss_of(model(**case.training_batch())).backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == wanting(model), method


@every_method
def test_every_method_trains_head_and_output_norms_whole(method):
    case = BY_NAME["swin-upernet"]
    whole = trained_whole(case.base())
    assert "decode_head" in whole and "backbone.hidden_states_norms.stage1" in whole
    model = adapted(case, method)
    counts = [
        sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and re.search(rf"\b{part}\b", name))
        for part in whole
    ]
    assert counts == [sum(p.numel() for p in case.base().get_submodule(part).parameters()) for part in whole]


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("head-only", "nothing"),
        ("partial-1", r"encoder\.layers\.2\.blocks\.0\."),
        ("bitfit", r"bias"),
        ("norm-tuning", r"norm.*\.ln_tuning_layers\."),
        ("adapter", r"(drop_path|mlp)\.baseline_adapter\.(down|up)\."),
        ("adaptformer", r"\.mlp\.baseline_adapter\.(down|up)\."),
        ("lorand", r"(drop_path|mlp)\.baseline_adapter\."),
        ("mona", r"(drop_path|mlp)\.baseline_adapter\."),
        ("lora", r"(q|v)_proj\.lora_(A|B)\."),
        ("lora-checkpointing", r"(q|v)_proj\.lora_(A|B)\."),
        ("e3va", r"e3va_highway"),
        ("full", r"."),
    ],
)
def test_in_the_backbone_a_method_trains_what_its_name_says(method, pattern):
    model = adapted(BY_NAME["swin-upernet"], method)
    inside = {name for name in wanting(model) if "swin" in name}
    assert all(re.search(pattern, name) for name in inside)
    assert bool(inside) == (method != "head-only")


@every_model
def test_adapters_are_trained_inside_the_backbone_and_heads_outside(case):
    exits = find_exits(case.base())
    behind = tuple(f"{name}." for found in exits for name in (*found.site.unused, *found.tail))
    for method in ("e3va", "adapter", "full", "head-only"):
        model = adapted(case, method)
        inside = {id(parameter) for parameter in trained_inside(model)}
        names = {name for name, parameter in model.named_parameters() if id(parameter) in inside}
        if method == "full":
            whole = tuple(f"{name}." for name in trained_whole(model))
            assert names == {name for name in wanting(model) if not name.startswith((*whole, *behind))}
        else:
            assert names == {name for name in wanting(model) if re.search("e3va_highway|baseline_adapter", name)}
            assert bool(names) == (method != "head-only")


def test_bitfit_and_norm_tuning_leave_nothing_of_their_kind_out():
    case = BY_NAME["swin-upernet"]
    base = [name for name, _ in case.base().named_parameters() if ".swin." in name and ".swin.layernorm" not in name]
    assert {name for name in wanting(adapted(case, "bitfit")) if ".swin." in name} == {n for n in base if "bias" in n}
    norms = {name for name in base if "norm" in name}
    tuned = {name for name in wanting(adapted(case, "norm-tuning")) if ".swin." in name}
    assert {n.removeprefix("base_model.model.").replace(".ln_tuning_layers.default", "") for n in tuned} == norms


@every_method
@every_family
def test_training_begins_at_the_pretrained_model(case, method):
    batch = case.batch()
    with torch.no_grad():
        expected, found = case.base()(**batch).logits, adapted(case, method).eval()(**batch).logits
    if method in ("lorand", "mona"):  # as in their authors' code
        assert not torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@inserting
@every_family
def test_a_state_dict_and_a_copy_are_complete(case, method):
    model = adapted(case, method)
    train_steps(model, case.training_batch())
    expected = model(**case.batch()).logits
    other = adapted(case, method, seed=5).eval()
    other.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    model.requires_grad_(False).apply(lambda m: [p.zero_() for p in m.parameters(recurse=False)])
    for same in (other, twin):
        torch.testing.assert_close(same(**case.batch()).logits, expected)


@pytest.mark.parametrize(
    ("method", "count", "published"),
    [
        ("partial-1", 12_605_472, 12.60),
        ("bitfit", 203_576, 0.20),
        ("norm-tuning", 59_392, 0.06),
        ("adapter", 3_111_168, 3.11),
        ("adaptformer", 1_557_504, None),  # 3.11 is published: see its docstring
        ("lorand", 1_201_152, 1.20),
        ("mona", 3_671_296, None),
        ("lora", 388_864, None),  # rank 8 here, 64 there
        ("e3va", 1_195_008, 1.20),
    ],
)
def test_swin_b_has_the_published_number_of_trained_parameters(method, count, published):
    with torch.device("meta"):
        backbone = SwinBackbone(SwinConfig(**SWIN_B, out_features=["stage1", "stage2", "stage3", "stage4"]))
        model = adapt(nn.Sequential(backbone), {"name": method})
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == count
    if published is not None:
        assert published == METHODS[method].published
        assert trained / 1e6 == pytest.approx(published, abs=0.0065)


def randomized(module: nn.Module) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: parameter.normal_(std=0.3) for name, parameter in module.named_parameters()}


@pytest.mark.parametrize(("activation", "scale"), [(F.gelu, 1.0), (F.relu, 0.1)])
def test_a_bottleneck_matches_its_formula(activation, scale):
    module, x = Bottleneck(8, activation, scale), torch.randn(2, 5, 8)
    assert not module(x).any()
    p = randomized(module)
    inner = activation(x @ p["down.weight"].T + p["down.bias"])
    torch.testing.assert_close(module(x), scale * (inner @ p["up.weight"].T + p["up.bias"]))


def test_lorand_matches_its_formula():
    module, x = LoRand(8), torch.randn(2, 5, 8)
    p = randomized(module)
    down = sum(p["p1"][i] @ p["kernel"][i] @ p["q1"][i] for i in range(2))
    up = sum(p["p2"][i] @ p["kernel"][i] @ p["q2"][i] for i in range(2))
    assert down.shape == (8, 4) and up.shape == (4, 8)
    torch.testing.assert_close(module(x), F.gelu(x @ down + p["down_bias"]) @ up + p["up_bias"])


def test_mona_matches_its_formula_and_mixes_no_token_in_front_of_the_image():
    module, x = Mona(8).eval(), torch.randn(2, 1 + 12, 8)
    assert sum(q.numel() for q in module.parameters()) == 133 * 8 + 64 * (1 + 9 + 25 + 49 + 3 + 64 + 1)
    p = randomized(module)
    s = F.layer_norm(x, (8,), p["norm.weight"], p["norm.bias"]) * p["gamma"] + x * p["gammax"]
    y = s @ p["down.weight"].T + p["down.bias"]
    image = y[:, 1:].reshape(2, 3, 4, 64).permute(0, 3, 1, 2)
    convolved = [
        F.conv2d(image, p[f"depthwise.{i}.weight"], p[f"depthwise.{i}.bias"], padding=k // 2, groups=64)
        for i, k in enumerate((3, 5, 7))
    ]
    image = image + sum(convolved) / 3
    image = image + F.conv2d(image, p["pointwise.weight"], p["pointwise.bias"])
    y = torch.cat((y[:, :1], image.permute(0, 2, 3, 1).reshape(2, 12, 64)), 1)
    torch.testing.assert_close(module(x, (3, 4), 1), F.gelu(y) @ p["up.weight"].T + p["up.bias"])
    other = x.clone()
    other[:, 0] += 1
    changed = module(other, (3, 4), 1) != module(x, (3, 4), 1)
    assert changed[:, 0].any() and not changed[:, 1:].any()


@every_model
def test_mona_sees_the_grid_of_every_family_and_changes_no_shape(case):
    seen = []
    model = adapted(case, "mona").eval()
    for module in model.modules():
        if isinstance(module, Mona):
            module.register_forward_hook(lambda module, args, output: seen.append((args, output.shape)))
    for size in case.sizes or (case.size,):
        with torch.no_grad():
            model(**case.batch(size=size))
        for (x, grid, prefix), shape in seen:
            assert x.shape == shape and x.shape[1] == prefix + grid[0] * grid[1]
            assert grid[0] == grid[1] or (grid[0] > grid[1]) == (size[0] > size[1])
        assert seen
        seen.clear()


def test_mona_is_placed_on_the_stream_behind_each_residual_add():
    case, x = BY_NAME["swin-classifier"], torch.randn(2, 16 * 8, 8)
    model = adapted(case, "mona").eval()
    block, plain = model.swin.encoder.layers[0].blocks[0], case.base().swin.encoder.layers[0].blocks[0]
    seen = []
    plain.drop_path.register_forward_hook(lambda module, args, output: seen.append(output))
    plain(x, (16, 8))
    first, second = block.drop_path.baseline_adapter, block.mlp.baseline_adapter
    middle = x + seen[0]
    middle = middle + first(middle, (16, 8))
    expected = middle + plain.mlp(plain.layernorm_after(middle))
    expected = expected + second(expected, (16, 8))
    found = block(x, (16, 8))
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, expected)


def test_mona_refuses_tokens_that_lie_in_no_grid():
    enter = Enter(registered("swin"), nn.Identity())
    with pytest.raises(UserError, match=r"method=mona: .*100 .*16 x 8"):
        enter(nn.Identity(), (torch.zeros(2, 100, 8), (16, 8)))


@every_method
def test_every_method_trains(method):
    for name in ("swin-upernet", "vit-classifier", "dinov2-classifier"):
        case = BY_NAME[name]
        model = adapted(case, method)
        wanted = [p for p in model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in wanted]
        train_steps(model, case.training_batch())
        assert any(not torch.equal(a, b) for a, b in zip(before, wanted, strict=True))
        assert torch.isfinite(loss_of(model(**case.training_batch())))


def test_adapters_sit_behind_both_branches_and_adaptformer_beside_the_mlp():
    case, x = BY_NAME["swin-classifier"], torch.randn(2, 16, 16)
    for method in ("adapter", "lorand", "adaptformer"):
        block = adapted(case, method).eval().swin.encoder.layers[1].blocks[0]
        plain = case.base().swin.encoder.layers[1].blocks[0]
        beside = block.mlp.baseline_adapter
        randomized(beside)
        branch = plain.mlp(x)
        torch.testing.assert_close(block.mlp(x), branch + beside(x if method == "adaptformer" else branch))
        if method != "adaptformer":
            torch.testing.assert_close(block.drop_path(x), x + block.drop_path.baseline_adapter(x))
    dinov2 = adapted(BY_NAME["dinov2-classifier"], "adaptformer").dinov2.encoder.layer[0]
    assert hasattr(dinov2.mlp, "baseline_adapter") and not hasattr(dinov2.layer_scale2, "baseline_adapter")


@every_family
def test_checkpointing_changes_no_gradient_and_keeps_less(case):
    kept, gradients = {}, {}
    for method in ("lora", "lora-checkpointing"):
        model = adapted(case, method).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout) or "DropPath" in type(module).__name__:
                module.eval()
        sizes: list[int] = []

        def count(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = loss_of(model(**case.training_batch()))
        loss.backward()
        kept[method] = sum(sizes)
        gradients[method] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert kept["lora-checkpointing"] < kept["lora"]
    assert gradients["lora"].keys() == gradients["lora-checkpointing"].keys()
    for name, gradient in gradients["lora"].items():
        torch.testing.assert_close(gradients["lora-checkpointing"][name], gradient, rtol=1e-4, atol=1e-6)


def test_options_reach_the_methods_that_have_some():
    case = BY_NAME["vit-classifier"]
    ranks = [adapt(case.base(), {"name": name, "r": 3}).peft_config["default"].r for name in ("lora", "e3va")]
    assert ranks == [3, 3]
    with pytest.raises(UserError, match=r"method=lora-checkpointing: .*rank"):
        adapt(case.base(), {"name": "lora-checkpointing", "rank": 3})


@every_method
def test_a_model_without_a_known_backbone_is_refused_by_all_that_must_tell_it_from_the_head(method):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    if method == "full":
        assert len(wanting(adapt(model, {"name": method}))) == 4
    else:
        with pytest.raises(UserError, match="holds no backbone"):
            adapt(model, {"name": method})


def test_the_help_of_compare_lists_the_methods():
    assert tuple(METHODS) == cli._METHODS
