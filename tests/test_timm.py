"""timm's models as they are, at the root and in our detectors: trained, saved, asked for maps of every form."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from peft import PeftModel, get_peft_model
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, ParallelThingsBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer as TorchvisionViT
from transformers import TimmBackboneConfig

import e3va_peft
from e3va_peft import E3VAConfig
from e3va_peft.detection import RetinaNet
from e3va_peft.detection.pyramid import feature_maps, map_strides
from e3va_peft.highway import Highway, answer
from e3va_peft.hooks import Hook
from tests.models import TIMM_SWIN, TIMM_VIT, objects, perturb, retinanet, train_steps

BLOCKS = 3
IMAGE = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
MODELS = {
    "vit": ("vit_tiny_patch16_224", TIMM_VIT | {"init_values": 0.5, "drop_path_rate": 0.3}),
    "vit-registers": ("vit_tiny_patch16_224", TIMM_VIT | {"reg_tokens": 2, "global_pool": "avg"}),
    "vit-mapped": ("vit_tiny_patch16_224", TIMM_VIT | {"global_pool": "map", "class_token": False}),
    "deit-distilled": ("deit_tiny_distilled_patch16_224", TIMM_VIT),
    "deit3": ("deit3_small_patch16_224", TIMM_VIT | {"init_values": 0.5}),
    "swin": ("swin_tiny_patch4_window7_224", TIMM_SWIN | {"img_size": 28, "window_size": 7}),
}
ROOTS = pytest.mark.parametrize("name", MODELS)
VITS = pytest.mark.parametrize("name", [name for name in MODELS if name != "swin"])


def base(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    architecture, options = MODELS[name]
    model = timm.create_model(architecture, num_classes=3, **options | kwargs).eval()
    perturb(model, 0)
    return model


def adapted(model: nn.Module, **options: Any) -> PeftModel:
    """The model with a highway that says something."""
    torch.manual_seed(1)
    return get_peft_model(copy.deepcopy(model), E3VAConfig(r=4, init_weights=False, **options)).eval()


@torch.no_grad()
def run(model: nn.Module, method: str = "forward", **kwargs: Any) -> Any:
    while isinstance(model, PeftModel):
        model = model.base_model.model
    return getattr(model, method)(IMAGE.to(next(model.parameters()).dtype), **kwargs)


class Loss(nn.Module):
    """What a user writes around a model that returns logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.model(x), torch.tensor([0, 2]))}


@ROOTS
def test_a_plain_model_trains_its_highway_its_norm_and_its_heads(name):
    model = get_peft_model(base(name), E3VAConfig(r=4)).train()
    assert torch.equal(run(model), run(base(name)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    train_steps(Loss(model), {"x": IMAGE})
    got = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert got == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    kinds = {"e3va_highway": 0, "e3va_tail": 0, "modules_to_save": 0}
    for key in got:
        (kind,) = (kind for kind in kinds if kind in key)
        kinds[kind] += 1
    norms = not isinstance(model.base_model.model.norm, nn.Identity)  # an averaging ViT norms behind its pool
    assert kinds["e3va_highway"] and kinds["modules_to_save"] and bool(kinds["e3va_tail"]) == norms
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and changed <= got


@ROOTS
def test_a_plain_model_comes_back_from_its_folder(name, tmp_path):
    model = get_peft_model(base(name), E3VAConfig(r=4))
    train_steps(Loss(model), {"x": IMAGE})
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(name), tmp_path)
    assert torch.equal(run(again), run(model)) and not torch.equal(run(again), run(base(name)))


@ROOTS
def test_a_plain_model_is_the_base_while_disabled_and_after_unload(name):
    bare = base(name)
    model = adapted(bare)
    assert not torch.equal(run(model), run(bare))
    with model.disable_adapter():
        for method in ("forward", "forward_features"):
            assert torch.equal(run(model, method), run(bare, method))
    unloaded = model.unload()
    assert unloaded.state_dict().keys() == bare.state_dict().keys()
    assert unloaded.__dict__.keys() == bare.__dict__.keys()  # no method of ours stands on it
    assert unloaded.forward_features.__func__ is type(bare).forward_features
    hooks = [h for m in unloaded.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not any(isinstance(hook, Hook) for hook in hooks)
    assert torch.equal(run(unloaded, "forward_features"), run(bare, "forward_features"))


SWIN_FORMS: list[dict[str, Any]] = [
    {},
    *({"indices": indices} for indices in (1, 2, [0, 2], [-1], [-3, 1], [2, 0], (1,))),
    {"norm": True},
    {"norm": True, "indices": [0, 1]},
    {"stop_early": True, "indices": [0, 1]},
    {"stop_early": True, "indices": [2]},
    {"stop_early": True, "indices": [0], "norm": True},
    {"intermediates_only": True},
    {"intermediates_only": True, "indices": [-2], "norm": True, "stop_early": True},
]
VIT_FORMS = [
    *SWIN_FORMS,
    {"output_fmt": "NLC"},
    {"output_fmt": "NLC", "indices": 2, "norm": True},
    {"output_fmt": "NLC", "intermediates_only": True, "stop_early": True, "indices": [0, -2]},
]
FORMS = [(name, form) for name in MODELS for form in (SWIN_FORMS if name == "swin" else VIT_FORMS)]


def parts(outputs: Any) -> list[Tensor]:
    """The last tokens where there are any, and the intermediates."""
    return outputs if isinstance(outputs, list) else [outputs[0], *outputs[1]]


@pytest.mark.parametrize(("name", "form"), FORMS, ids=str)
def test_maps_of_every_form_are_the_bases_at_the_start_and_move(name, form):
    bare = base(name)
    expected = parts(run(bare, "forward_intermediates", **form))
    start = parts(run(get_peft_model(base(name), E3VAConfig(r=4)).eval(), "forward_intermediates", **form))
    moved = parts(run(adapted(bare), "forward_intermediates", **form))
    for x, same, other in zip(expected, start, moved, strict=True):
        torch.testing.assert_close(same, x, rtol=1e-5, atol=1e-5)
        assert other.shape == x.shape and not torch.allclose(other, x, atol=1e-3)
        assert other.is_contiguous() or not x.is_contiguous()


def streams(model: nn.Module, highway: Highway) -> list[Tensor]:
    """`x_l + z_l` behind each block of a ViT in float64, from the blocks' own parts and the formulas of the paper."""
    (stage,), z = highway.stages, torch.zeros((), dtype=torch.float64)
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(IMAGE.double()))))
    behind = []
    for i, block in enumerate(model.blocks):
        attention = block.ls1(block.attn(block.norm1(x)))
        mlp = block.ls2(block.mlp(block.norm2(x + attention)))
        x = x + attention + mlp
        z = z + sum(
            answer(t, [f[2 * i + j] for f in stage.factors], stage.norm) for j, t in enumerate((attention, mlp))
        )
        behind.append(x + z)
    return behind


def chosen(indices: Any) -> list[int]:
    """Which blocks `indices` mean."""
    if isinstance(indices, list | tuple):
        return sorted(index % BLOCKS for index in indices)
    return list(range(BLOCKS))[-(indices or BLOCKS) :]


@VITS
@torch.no_grad()
def test_every_form_of_a_vit_equals_the_formulas_of_the_paper(name):
    bare = base(name).double()
    model = adapted(bare)
    tokens = streams(bare, model.base_model.model.e3va.e3va_highway["default"])
    torch.testing.assert_close(run(model, "forward_features"), bare.norm(tokens[-1]))
    torch.testing.assert_close(run(model), bare.forward_head(bare.norm(tokens[-1])))
    for form in VIT_FORMS:
        form = {"indices": None, "norm": False, "stop_early": False} | form
        which = chosen(form["indices"])
        expected = [bare.norm(tokens[i]) if form["norm"] else tokens[i] for i in which]
        expected = [x[:, bare.num_prefix_tokens :] for x in expected]
        if form.get("output_fmt") != "NLC":
            expected = [x.mT.unflatten(2, (4, 4)) for x in expected]
        if not form.get("intermediates_only"):
            expected.insert(0, bare.norm(tokens[which[-1] if form["stop_early"] else -1]))
        found = parts(run(model, "forward_intermediates", **form))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, form=form: f"{form}: {text}")


@VITS
def test_dinos_name_for_intermediate_layers_is_adapted_too(name):
    bare = base(name)
    model = adapted(bare)
    (found,) = run(model, "get_intermediate_layers", n=1, norm=True)
    assert torch.equal(found, run(model, "forward_features")[:, bare.num_prefix_tokens :])
    assert not torch.equal(found, run(bare, "get_intermediate_layers", n=1, norm=True)[0])


@pytest.mark.parametrize("argument", ["output_dict", "return_prefix_tokens"])
@VITS
def test_a_form_that_is_not_adapted_is_refused_by_its_argument(name, argument):
    model = adapted(base(name))
    with pytest.raises(NotImplementedError, match=f"{argument}=True"):
        run(model, "forward_intermediates", **{argument: True})
    with model.disable_adapter():
        run(model, "forward_intermediates", **{argument: True})  # the base may


@pytest.mark.parametrize("block", [ParallelScalingBlock, DiffParallelScalingBlock, ParallelThingsBlock])
def test_a_block_of_another_layout_is_refused_before_anything_is_changed(block):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, block_fn=block, **TIMM_VIT)
    keys = [*model.__dict__], [*model.state_dict()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=rf"blocks\.0 \({block.__name__}\)"):
        get_peft_model(model, E3VAConfig())
    assert keys == ([*model.__dict__], [*model.state_dict()], [p.requires_grad for p in model.parameters()])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_another_packages_vision_transformer_is_not_taken_for_timms():
    model = TorchvisionViT(28, 7, 2, 2, 16, 32, num_classes=3)
    with pytest.raises(ValueError, match="model=VisionTransformer"):
        get_peft_model(model, E3VAConfig())


def test_no_file_of_the_package_imports_timm():
    files = list(Path(e3va_peft.__file__).parent.rglob("*.py"))
    imported = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {(alias.name.split(".")[0], file.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add((node.module.split(".")[0], file.name))
    assert len(files) > 50 and ("torch", "highway.py") in imported
    assert not [file for package, file in imported if package == "timm"]


@timm.models.register_model
def e3va_test_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A tiny ViT under a name, because a TimmBackbone is built by name."""
    return timm.create_model("vit_tiny_patch16_224", **TIMM_VIT | {"dynamic_img_size": False} | kwargs)


@timm.models.register_model
def e3va_test_swin(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A tiny Swin under a name."""
    options = TIMM_SWIN | {"patch_size": 4, "dynamic_img_size": False} | kwargs
    return timm.create_model("swin_tiny_patch4_window7_224", **options)


def timm_retinanet(name: str) -> RetinaNet:
    torch.manual_seed(0)
    indices = [-1] if name == "e3va_test_vit" else [0, 1, 2]
    # timm notes the stride of the model whose name it is, of 16 pixels, and not of this one.
    strides = {"strides": [7]} if name == "e3va_test_vit" else {}
    model = retinanet(TimmBackboneConfig(backbone=name, out_indices=indices), **strides).eval()
    perturb(model, 0)
    return model


@pytest.mark.parametrize(
    ("name", "size", "shapes"),
    [
        ("e3va_test_vit", 42, [(2, 16, 6, 6)]),
        ("e3va_test_swin", 64, [(2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4)]),
    ],
)
def test_a_detector_over_timm_trains(name, size, shapes, tmp_path):
    """Also where timm's maps are (B, H, W, C), as its Swin's are, and where images are larger than it was made for."""
    bare = timm_retinanet(name)
    batch = {"pixel_values": torch.randn(2, 3, size, size)} | objects(2, size, size)
    maps = feature_maps(bare.backbone, batch["pixel_values"], map_strides(bare.config))
    assert [tuple(x.shape) for x in maps] == shapes
    model = get_peft_model(copy.deepcopy(bare), E3VAConfig(r=4))
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).loss, bare(**batch).loss)
    train_steps(model, batch, steps=2, lr=1e-3)
    got = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert got == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("e3va_highway" in key for key in got)
    model.save_pretrained(tmp_path / "adapter")
    bare.save_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(RetinaNet.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    with torch.no_grad():
        found, expected = again(**batch), model.eval()(**batch)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize(
    ("name", "indices", "strides"),
    [("e3va_test_swin", [0, 2], [4, 16]), ("test_vit", [-1], [16]), ("test_resnet", [2, -1], [8, 32])],
)
def test_the_strides_of_a_timm_backbone_are_asked_of_timm(name, indices, strides):
    model = retinanet(TimmBackboneConfig(backbone=name, out_indices=indices))
    assert model.strides == strides
    pixels = torch.randn(1, 3, 64, 96)
    maps = feature_maps(model.backbone, pixels, model.strides)
    assert [tuple(x.shape[2:]) for x in maps] == [(64 // stride, 96 // stride) for stride in strides]
