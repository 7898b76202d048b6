"""The laws of the method, each held for every supported model; `test_check` holds those of `check_backbone`."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from e3va_peft import E3VAConfig, E3VALayer
from e3va_peft.frozen_pass import FrozenPass
from e3va_peft.hooks import Hook
from e3va_peft.lane import Lane
from e3va_peft.recorder import CURRENT, Recorder
from tests.helpers import (
    KEPT,
    SLIM_PLUS,
    WAYS,
    adapted,
    assert_same,
    base_outputs,
    blocks,
    double,
    every_model_in,
    every_way,
    layers,
    outputs,
    saved_bytes,
    ways,
)
from tests.models import (
    BY_NAME,
    DETECTORS,
    Case,
    every_family,
    every_model,
    every_model_but,
    every_model_that,
    loss_of,
    registered,
    tensors,
    train_steps,
)


def stem_of(case: Case, found: dict) -> set[str]:
    """The outputs that are in front of every block."""
    return {"hidden_states[0]", "reshaped_hidden_states[0]"} & found.keys() if case.stem else set()


def unmoving(case: Case, found: dict, way: dict) -> set[str]:
    """The outputs that no adapter reaches; live blocks change the stream behind the last of them, too."""
    beyond = {key for key in case.beyond if "hidden_states" not in key} if "live_blocks" in way else case.beyond
    return stem_of(case, found) | beyond


def hooks_of(module: nn.Module, values: bool = False) -> list:
    """What PyTorch notes about hooks of a module, under which name and how often; or the hooks."""
    tables = {name: table for name, table in vars(module).items() if "hooks" in name and isinstance(table, dict)}
    if values:
        return [hook for table in tables.values() for hook in table.values()]
    return sorted((name, len(table)) for name, table in tables.items())


@pytest.fixture
def of_forwards(monkeypatch) -> Callable[[], list]:
    """The records, recorders and lanes that forwards have made and that are still alive."""
    made: list[weakref.ref] = []
    for cls in (FrozenPass, Recorder, Lane):

        def init(self, *args, original=cls.__init__, **kwargs):
            made.append(weakref.ref(self))
            original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", init)

    def alive() -> list:
        assert made
        if any(item() is not None for item in made):
            gc.collect()
        return [item() for item in made if item() is not None]

    return alive


def live_blocks(model: nn.Module) -> list[nn.Module]:
    """The last adapted blocks of every backbone, as many as its config says."""
    found = []
    for layer in layers(model):
        stages = zip(layer.stages, layer.depth, strict=False)
        own = [layer.exit.get_submodule(name) for stage, depth in stages for name in stage.blocks[:depth]]
        found += own[len(own) - layer.live_blocks :]
    return found


@every_model_in(*WAYS)
def test_adapted_model_equals_base_at_init_in_every_output(case, way):
    base, model = case.base().double(), adapted(case, **way).double()
    for batch in map(double, (case.batch(), case.batch(1, seed=5))):
        for grad in (False, True):  # another kernel of attention each, so both in both
            with torch.set_grad_enabled(grad):
                left, right = (dict(tensors(m(**batch, output_hidden_states=True))) for m in (model, base))
            assert_same(left, right, rtol=1e-9, atol=1e-9)


# transformers' own Mask2Former does not run in bf16 on the CPU (its deformable attention)
@every_model_but("swin-mask2former")
def test_adapted_bf16_model_equals_base_at_init_within_rounding(case):
    base = case.base().to(torch.bfloat16)
    model = get_peft_model(case.base().to(torch.bfloat16), E3VAConfig(r=4)).eval()
    assert all(p.dtype == torch.float32 for p in layers(model)[0].e3va_highway.parameters())
    batch = {key: value.to(torch.bfloat16) for key, value in case.batch().items()}
    assert_same(outputs(model, batch), outputs(base, batch), rtol=2e-2, atol=2e-2)


@every_model_in(*WAYS)
def test_every_output_but_the_stem_moves_once_trained_and_disabled_it_is_the_base(case, way):
    model = adapted(case, **way)
    before = outputs(model, case.batch())
    train_steps(model, case.training_batch())
    after = outputs(model, case.batch())
    unmoved = {key for key in before if torch.equal(before[key], after[key])}
    assert unmoved - {"labels"} == unmoving(case, before, way)
    with model.disable_adapter():
        assert_same(outputs(model, case.batch()), base_outputs(case), rtol=1e-5, atol=1e-6)


@every_model_in("live")  # `check_backbone` holds it of the others
def test_the_highway_alone_moves_every_output_but_the_stem(case, way):
    model = adapted(case, modules_to_save=[], **way)
    before = outputs(model, case.batch())
    torch.manual_seed(3)
    for parameter in layers(model)[0].e3va_highway.parameters():
        nn.init.normal_(parameter, std=0.3)
    after = outputs(model, case.batch())
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    learned_queries = {"transformer_decoder_hidden_states[0]"}  # Mask2Former's, which have not seen the image yet
    assert moved - {"labels"} == before.keys() - unmoving(case, before, way) - learned_queries - {"labels"}


@every_model_in("live", "recompute")  # `check_backbone` holds it of the paper's own way
def test_only_live_blocks_have_a_graph_and_only_highway_norms_and_saved_modules_get_gradients(case, way):
    model = adapted(case, **way).train()
    live = live_blocks(model)
    with_graph, without, saved_inside, inside = [], [], [], [0]

    def enter(module, args):
        inside[0] += 1

    def leave(module, args, output):
        inside[0] -= 1
        without.extend(tensor.requires_grad for _, tensor in tensors(output))

    for block in blocks(model, case):
        if block in live:
            block.register_forward_hook(
                lambda m, args, out: with_graph.extend(t.requires_grad for _, t in tensors(out))
            )
        else:
            block.register_forward_pre_hook(enter)
            block.register_forward_hook(leave)

    def pack(tensor):
        if inside[0]:
            saved_inside.append(tensor.shape)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model(**case.training_batch()))
    loss.backward()
    assert (without or live) and not any(without)
    assert all(with_graph) and bool(with_graph) == bool(live)
    assert not saved_inside
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == wanted
    saved = model.peft_config["default"].modules_to_save
    outside = {name for name in wanted if "e3va_" not in name}
    assert all(any(f".{module}.modules_to_save.default." in name for module in saved) for name in outside)


@every_model
def test_saved_bytes_are_below_those_of_lora(case):
    model = adapted(case)
    whole = model.peft_config["default"].modules_to_save
    lora = get_peft_model(case.base(), LoraConfig(r=4, target_modules=case.lora, modules_to_save=whole))
    assert saved_bytes(model, case) < saved_bytes(lora, case)


@every_model
def test_frozen_stream_stays_in_eval_mode(case):
    model = adapted(case).train()
    for layer in layers(model):
        assert layer.training and layer.e3va_highway.training
        assert not any(module.training for part in layer.frozen for module in part.modules())


# a detector has no hidden states to show, and in training mode no outputs but its loss
@ways("", "live")
@every_model_but(*DETECTORS, "timm-swin-features")  # nor has a list of maps
def test_frozen_stream_is_deterministic_in_training_mode(case, way):
    model = adapted(case, modules_to_save=[], **way).train()
    head_free = {}
    for attempt in range(2):
        torch.manual_seed(attempt)
        with torch.no_grad():
            states = dict(tensors(model(**case.batch(), output_hidden_states=True)))
        head_free[attempt] = {key: value for key, value in states.items() if "hidden_states" in key and "[" in key}
    assert head_free[0]
    assert_same(head_free[0], head_free[1], rtol=0, atol=0)


@every_model_in("", "live")
def test_unload_restores_keys_and_leaves_no_hook(case, way):
    base, model = case.base(), adapted(case, **way)
    outputs(base, case.batch())  # after which transformers has noted what it records
    outputs(model, case.batch())
    unloaded = model.unload()
    assert unloaded.state_dict().keys() == base.state_dict().keys()
    assert not any(isinstance(hook, Hook) for m in unloaded.modules() for hook in hooks_of(m, values=True))
    assert not any(isinstance(module, E3VALayer) for module in unloaded.modules())
    assert {n: hooks_of(m) for n, m in unloaded.named_modules()} == {n: hooks_of(m) for n, m in base.named_modules()}
    assert {n: sorted(vars(m)) for n, m in unloaded.named_modules()} == {
        n: sorted(vars(m)) for n, m in base.named_modules()
    }
    assert not hasattr(unloaded, "peft_config")
    assert_same(outputs(unloaded, case.batch()), base_outputs(case), rtol=1e-5, atol=1e-6)
    get_peft_model(unloaded, E3VAConfig(r=4))  # and it can be adapted again


@every_model_in(*WAYS)
def test_a_forward_that_raises_leaves_nothing_behind(case, way, of_forwards):
    model = adapted(case, **way).train()
    batch = case.training_batch()
    reference = outputs(copy.deepcopy(model).eval(), case.batch())

    def fail(module, args, output):
        raise RuntimeError("out of memory")

    handle = blocks(model, case)[-1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**batch)  # the error's frames go with it
    handle.remove()
    assert CURRENT.get() is None
    assert not of_forwards()
    assert_same(outputs(model.eval(), case.batch()), reference, rtol=0, atol=0)


@every_model_in(*WAYS)
def test_no_tensor_stays_on_a_module_after_a_forward(case, way, of_forwards):
    model = adapted(case, **way).train()

    def held(model: nn.Module) -> set[str]:
        found = set()
        for name, module in model.named_modules():
            holders = (module, *hooks_of(module, values=True))
            for key, value in (
                (key, value)
                for holder in holders
                if hasattr(holder, "__dict__")
                for key, value in vars(holder).items()
            ):
                if not key.startswith("_"):
                    found |= {f"{name}.{key}{path}" for path, _ in tensors(value)}
        return found

    before = held(model)
    model(**case.training_batch())
    assert held(model) == before
    assert not of_forwards()


@every_model_in(*WAYS)
def test_deepcopy_before_and_after_training(case, way):
    model = adapted(case, **way)
    for steps in (0, 1):
        train_steps(model, case.training_batch(), steps)
        twin = copy.deepcopy(model)
        expected = outputs(model, case.batch())
        assert_same(outputs(twin, case.batch()), expected, rtol=0, atol=0)
    train_steps(twin, case.training_batch(), steps=1)
    assert_same(outputs(model, case.batch()), expected, rtol=0, atol=0)


@every_model_that(pickles=True)
def test_pickle_before_outputs_were_recorded(case):
    model = adapted(case, init_weights=False)
    twin = pickle.loads(pickle.dumps(model))
    assert_same(outputs(twin, case.batch()), outputs(model, case.batch()), rtol=0, atol=0)


@every_model_in(*WAYS)
def test_image_sizes_change_from_step_to_step_and_are_odd(case, way):
    model, sizes = adapted(case, **way), case.sizes or (case.size,)
    for size in sizes:
        assert_same(outputs(model, case.batch(size=size)), base_outputs(case, size), rtol=1e-5, atol=1e-6)
    model.train()
    for size in sizes:
        batch = case.batch(size=size) | case.labels(2, *size)
        loss = sum(tensor.float().square().sum() for _, tensor in tensors(model(**batch)))
        loss.backward()
    assert all(p.grad.isfinite().all() for p in layers(model)[0].e3va_highway.parameters())


def test_vit_takes_other_sizes_when_it_interpolates():
    case = BY_NAME["vit-classifier"]
    base, model = case.base(), adapted(case)
    batch = case.batch(size=(35, 42)) | {"interpolate_pos_encoding": True}
    assert_same(outputs(model, batch), outputs(base, batch), rtol=1e-5, atol=1e-6)


@every_model_in("live", "recompute")  # `check_backbone` holds it of the paper's own way
def test_no_grad_and_grad_forwards_agree_once_trained(case, way):
    """Inference reduces each tap at once and training keeps it: two paths, one function."""
    model, batch = adapted(case, init_weights=False, **way).double(), double(case.batch())
    with_grad = dict(tensors(model(**batch, output_hidden_states=True)))
    assert_same(with_grad, outputs(model, batch), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["swin-classifier", "swinv2-classifier"])
@pytest.mark.parametrize("storage", ["exact", "int8", "recompute"])
def test_heads_may_change_hidden_states_in_place(name, storage):
    """Sums of stream and lane that patch merging has made are shown as they are: once each, and needed no more."""
    case = BY_NAME[name]
    model, losses = adapted(case, init_weights=False, tap_storage=storage).double().eval(), []
    for in_place in (True, False):
        found = model(**double(case.batch()), output_hidden_states=True)
        shown = [*found.hidden_states[1:-1], *found.reshaped_hidden_states[1:-1]]
        assert len({state.untyped_storage().data_ptr() for state in shown}) == len(shown)
        total = sum((state.mul_(2) if in_place else 2 * state).square().mean() for state in shown)
        losses.append(
            [total, *torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad], allow_unused=True)]
        )
    assert any(grad is not None for grad in losses[0][1:])
    for left, right in zip(*losses, strict=True):
        assert (left is None) is (right is None)
        torch.testing.assert_close(left, right)


@every_model
def test_taps_can_be_chosen(case):
    counts, branches = {}, tuple(registered(case.family).branches)
    for taps in (*((branch,) for branch in branches), branches, ("block",), ("stream",)):
        model = adapted(case, taps=taps, modules_to_save=[])
        counts[taps] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        loss_of(model.train()(**case.training_batch())).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert {counts[tap,] for tap in (*branches, "block", "stream")} == {counts[branches] / len(branches)}


@every_model_that(as_tuple=True)
def test_return_dict_false_gives_the_same_tuple(case):
    base, model = case.base(), adapted(case)
    with torch.no_grad():
        left, right = (m(**case.batch(), return_dict=False) for m in (model, base))
    assert isinstance(left, tuple)
    assert_same(dict(tensors(left)), dict(tensors(right)), rtol=1e-5, atol=1e-6)


@every_model
def test_low_cpu_mem_usage_gives_an_adapter_on_meta(case):
    model = get_peft_model(case.base(), E3VAConfig(r=4), low_cpu_mem_usage=True)
    assert all(p.is_meta for p in layers(model)[0].e3va_highway.parameters())
    assert not any(p.is_meta for part in layers(model)[0].frozen for p in part.parameters())


# transformers' own Mask2Former does not run in bf16 on the CPU (its deformable attention); vit-retinanet's P6 is 1x1,
# and oneDNN's bf16 weight gradient of a strided convolution of a 1x1 map reads memory that nothing wrote
@every_way
@every_model_but("swin-mask2former", "vit-retinanet")
def test_bf16_autocast_trains_on_the_cpu(case, way):
    model = adapted(case, **way).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model(**case.training_batch()))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "way",
    [*WAYS.values(), KEPT, SLIM_PLUS, {"taps": ("block",), "tap_storage": "int8"}],
    ids=[*WAYS, "live-kept", "plus", "block-int8"],
)
def test_a_base_of_any_precision_learns_as_in_fp32_with_autocast_and_without(way, storage):
    learns_as_in_fp32(BY_NAME["swin-classifier"], way, storage)


@every_family
def test_a_bf16_base_of_every_family_learns_as_in_fp32(case):
    learns_as_in_fp32(case, {}, torch.bfloat16)


def learns_as_in_fp32(case, way, storage):
    half = torch.bfloat16 if storage == torch.float32 else storage  # PyTorch's layer norms take one of the two
    curves = []
    for dtype, autocast in ((torch.float32, False), (storage, False), (storage, True)):
        torch.manual_seed(0)
        model = get_peft_model(case.base().to(dtype), E3VAConfig(r=4, **way)).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.training_batch().items()}
        optimizer, curve = torch.optim.SGD(trained, lr=0.05), []
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=half, enabled=autocast):
                loss = loss_of(model(**batch))
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        assert all(p.dtype == p.grad.dtype and p.grad.isfinite().all() for p in trained)
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < curves[0][0]
    for curve in curves[1:]:
        torch.testing.assert_close(curve, curves[0], rtol=3e-2, atol=0)


class InPlace(nn.Module):
    """What a branch passes on its way to the stream, in place, as timm's LayerScale may."""

    def forward(self, x):
        return x.mul_(2.0)


def test_a_tap_that_is_changed_in_place_behind_the_hook_is_refused_by_name():
    case = BY_NAME["swin-classifier"]
    base = case.base()
    base.swin.encoder.layers[1].blocks[1].drop_path = InPlace()  # the tap is what enters it
    model = get_peft_model(base, E3VAConfig(r=4)).train()
    with pytest.raises(RuntimeError, match=r"layers\.1\.blocks\.1: attention: .*in place"):
        model(**case.training_batch())
    with torch.no_grad():  # reduced at once: nothing is held that could change
        model(**case.batch())
    rounded = get_peft_model(case.base(), E3VAConfig(r=4, tap_storage="int8"))
    loss_of(rounded.train()(**case.training_batch())).backward()


class CallsItsExit(nn.Module):
    """A host that computes with parts of what it takes for its encoder."""

    def __init__(self, encoder: nn.Module, call) -> None:
        super().__init__()
        self.encoder, self.call, self.head = encoder, call, nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.call(self.encoder, x))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda encoder, x: encoder.layer[0](x), "layer"),
        (lambda encoder, x: encoder.get_submodule("layer.0")(x), "layer"),
        (lambda encoder, x: encoder.encode(x), "encode"),
    ],
)
def test_a_host_that_computes_with_parts_of_the_exit_is_refused_and_not_left_unadapted(call, name, monkeypatch):
    encoder = BY_NAME["dinov2-classifier"].base().dinov2.encoder
    monkeypatch.setattr(type(encoder), "encode", lambda self, x: self(x)[0], raising=False)
    model = get_peft_model(CallsItsExit(encoder, call), E3VAConfig(r=4))
    with pytest.raises(AttributeError, match=rf"{name}"):
        model(torch.randn(1, 5, 16))
    layer = layers(model)[0]
    assert layer.config is encoder.config and layer.main_input_name == encoder.main_input_name
    assert layer.dtype == torch.float32 and layer.is_gradient_checkpointing is False
    assert not hasattr(layer, "layer") and layer.get_base_layer() is encoder
