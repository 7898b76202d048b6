"""Several processes, several threads, replicas, compiled graphs."""

from __future__ import annotations

import copy
import os
import re
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import compile_regions
from packaging import version
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import default_data_collator

from e3va_peft import E3VAConfig, backbone_once, cached
from e3va_peft.config import PLUS
from tests.helpers import (
    KEPT,
    SLIM_PLUS,
    WAYS,
    adapted,
    assert_same,
    blocks,
    by_two,
    every_model_in,
    every_way,
    let_shard,
    outputs,
    replica_of,
)
from tests.models import BY_NAME, Case, loss_of, train_steps


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = distributed.FileStore(str(tmp_path_factory.mktemp("ddp") / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


MOST = 0.1  # norm of clipped gradients
DDP = WAYS | {"live-kept": KEPT, "plus": SLIM_PLUS}
STORED = {"": {}, "int8": {"tap_storage": "int8"}, "live": {"tap_storage": "recompute", "live_blocks": 1}}


@every_model_in(*WAYS)
def test_ddp_sees_no_unused_parameter(case, way, process_group):
    model = get_peft_model(case.base(), E3VAConfig(r=4, **way)).train()
    model = DistributedDataParallel(model, find_unused_parameters=False)
    for _ in range(2):  # DDP complains at the next step about parameters that got no gradient in this one
        loss_of(model(**case.training_batch())).backward()


def test_ddp_would_have_complained(process_group):
    model = get_peft_model(BY_NAME["swin-classifier"].base(), E3VAConfig(r=4)).train()
    model.base_model.model.classifier.modules_to_save["default"].extra = nn.Linear(2, 2)
    model = DistributedDataParallel(model, find_unused_parameters=False)
    with pytest.raises(RuntimeError, match="not used in producing loss"):
        for _ in range(2):
            loss_of(model(**BY_NAME["swin-classifier"].training_batch())).backward()


def shard(model: nn.Module, *units: nn.Module) -> nn.Module:
    """Shard a model by FSDP2 over the processes of the group; each unit is gathered for its own forward only."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def stages(model: nn.Module, case) -> list[nn.Module]:
    """The units that transformers names in `_no_split_modules`: Swin's stages, the blocks of the others."""
    found = [module for module in model.modules() if type(module).__name__ == "SwinStage"]
    return found if case.family == "swin" else blocks(model, case)


@every_model_in(*STORED, options=STORED)
def test_sharded_stage_by_stage_it_has_the_same_gradients(case, way, process_group):
    whole = without_dropout(adapted(case, init_weights=False, **way).train())
    sharded = copy.deepcopy(whole)
    shard(sharded, *stages(sharded, case))
    for model in (whole, sharded):
        torch.manual_seed(0)  # Mask2Former and the detectors sample
        loss_of(model(**case.training_batch())).backward()
    for (key, a), (_, b) in zip(sharded.named_parameters(), whole.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("tap_storage", ["exact", "int8"])
def test_a_bf16_base_has_the_same_gradients_sharded(tap_storage, process_group):
    case = BY_NAME["swin-classifier"]
    config = E3VAConfig(r=4, init_weights=False, tap_storage=tap_storage)
    # FSDP wants one dtype among the weights of a unit, so the adapter cannot stay in fp32
    whole = get_peft_model(case.base().bfloat16(), config, autocast_adapter_dtype=False).train()
    sharded = copy.deepcopy(whole)
    shard(sharded, *stages(sharded, case))
    batch = case.training_batch() | {"pixel_values": case.batch()["pixel_values"].bfloat16()}
    for model in (whole, sharded):
        loss_of(model(**batch)).backward()
    for (key, a), (_, b) in zip(sharded.named_parameters(), whole.named_parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=2e-2, atol=2e-2, msg=key)


def test_sharded_it_says_the_same_of_what_was_recorded(process_group):
    case = BY_NAME["swin-classifier"]
    model = adapted(case, init_weights=False)
    batch = case.batch(2)
    read = cached([{"pixel_values": image} for image in batch["pixel_values"]], model, storage="exact")
    with torch.no_grad():
        expected = model(**batch).logits
        shard(model, *stages(model, case))
        torch.testing.assert_close(model(**default_data_collator([read[0], read[1]])).logits, expected)
        with backbone_once(model):
            for _ in range(2):
                torch.testing.assert_close(model(**batch).logits, expected)


@pytest.mark.parametrize("part", ["", ".reduction"])
def test_patch_merging_that_is_sharded_by_itself_is_refused(part, process_group):
    case = BY_NAME["swin-classifier"]
    model = adapted(case).train()
    stage = model.base_model.model.swin.encoder.base_layer.layers[0]
    shard(model, stage.get_submodule(f"downsample{part}"), stage)
    with pytest.raises(ValueError, match=r"transformer_cls_names_to_wrap=\['SwinStage'\]"):
        model(**case.training_batch())


@pytest.mark.parametrize("name", ["swin-classifier", "vit-classifier"])
def test_the_first_fsdp_is_refused_by_name(name, process_group):
    case = BY_NAME[name]
    model = FullyShardedDataParallel(adapted(case).train(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match="fsdp_version=2"):
        model(**case.training_batch())


SHARDED = {
    "swin": ("swin-classifier", {}, "SwinStage"),
    "swin-int8": ("swin-classifier", {"tap_storage": "int8"}, "SwinStage"),
    "vit": ("vit-classifier", {}, "ViTLayer"),
    "swin-plus": ("swin-classifier", PLUS, "SwinStage"),
    "swin-cached": ("swin-classifier", {}, "SwinStage"),
    "swin-live-cached": ("swin-classifier", {"live_blocks": 2}, "SwinStage"),
    "vit-live": ("vit-classifier", {"live_blocks": 1, "tap_storage": "recompute"}, "ViTLayer"),
}
REPLICATED = {f"{name}-{key}": (f"{name}-classifier", way) for name in ("swin", "vit") for key, way in DDP.items()}


def be_one_of_two(rank: int, folder: str) -> None:
    """Train in each way as one of two processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=50))
    train_replicated(rank, folder)
    AcceleratorState._reset_state()
    GradientState._reset_state()
    train_sharded(rank, folder)
    distributed.destroy_process_group()


def train_replicated(rank: int, folder: str) -> None:
    """Train with DDP, in each step on two parts of a batch, with clipped gradients; save."""
    for key, (name, config) in REPLICATED.items():
        case = BY_NAME[name]
        whole = case.training_batch(8)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = get_peft_model(case.base(), E3VAConfig(r=4, init_weights=False, **config))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        model, optimizer = accelerator.prepare(model.train(), optimizer)
        assert isinstance(model, DistributedDataParallel) and not model.find_unused_parameters
        for part in (0, 1, 0, 1):
            first = 4 * part + 2 * rank
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model(**{k: v[first : first + 2] for k, v in whole.items()})))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MOST)
                optimizer.step()
                optimizer.zero_grad()
        if accelerator.is_main_process:
            accelerator.unwrap_model(model).save_pretrained(f"{folder}/{key}")
        accelerator.free_memory()


def train_sharded(rank: int, folder: str) -> None:
    """Train sharded, save, load, and train on."""
    for key, (name, config, unit) in SHARDED.items():
        case = BY_NAME[name]
        whole = case.training_batch(4)
        examples = [{k: v[i] for k, v in whole.items()} for i in range(4)]
        model = get_peft_model(case.base(), E3VAConfig(**{"r": 4, "init_weights": False} | config))
        for phase in ("first", "second"):
            os.environ.pop("ACCELERATE_USE_FSDP", None)
            options = {"cpu_ram_efficient_loading": True, "transformer_cls_names_to_wrap": [unit]}
            accelerator = let_shard(Accelerator(cpu=True), **options)
            read = cached(examples, model, folder=f"{folder}/{key}", storage="exact") if "cached" in key else examples
            batch = default_data_collator([read[2 * rank], read[2 * rank + 1]])
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
            model, optimizer = accelerator.prepare(model.train(), optimizer)
            assert isinstance(model, FSDPModule)
            for _ in range(2):
                optimizer.zero_grad()
                accelerator.backward(loss_of(model(**batch)))
                optimizer.step()
            state, at = accelerator.get_state_dict(model), f"{folder}/{key}-{phase}"
            if accelerator.is_main_process:  # the others are given an empty state
                model.save_pretrained(at, state_dict=state)
            accelerator.wait_for_everyone()
            model = PeftModel.from_pretrained(case.base(), at, is_trainable=True)


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        by_two(be_one_of_two, str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("key", REPLICATED)
def test_two_processes_that_accumulate_and_clip_train_like_one(key, trained_by_two):
    name, config = REPLICATED[key]
    case = BY_NAME[name]
    model = get_peft_model(case.base(), E3VAConfig(r=4, init_weights=False, **config)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model(**case.training_batch(8))).backward()
        assert nn.utils.clip_grad_norm_(trained, MOST) > 2 * MOST
        optimizer.step()
    got = load_file(trained_by_two / key / "adapter_model.safetensors")
    assert_same(got, get_peft_model_state_dict(model), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("key", SHARDED)
def test_two_processes_that_shard_train_save_and_resume_like_one(key, trained_by_two):
    name, config, _ = SHARDED[key]
    case = BY_NAME[name]
    model = get_peft_model(case.base(), E3VAConfig(**{"r": 4, "init_weights": False} | config))
    before = copy.deepcopy(get_peft_model_state_dict(model))
    for phase in ("first", "second"):
        train_steps(model, case.training_batch(4), steps=2)
        got = load_file(trained_by_two / f"{key}-{phase}" / "adapter_model.safetensors")
        assert_same(got, get_peft_model_state_dict(model), rtol=1e-4, atol=1e-5)
        assert not any(torch.equal(got[k], before[k]) for k in got)


@pytest.mark.parametrize("name", ["swin-upernet", "vit-classifier", "dinov2-classifier"])
def test_forwards_in_threads_do_not_mix_their_taps(name):
    case = BY_NAME[name]
    model = get_peft_model(case.base(), E3VAConfig(r=4, init_weights=False)).eval()
    batches = [case.batch(seed=seed) for seed in range(4)]
    expected = [outputs(model, batch) for batch in batches]
    got: dict[int, list] = {i: [] for i in range(4)}

    def work(i: int) -> None:
        torch.manual_seed(i)
        for _ in range(5):
            got[i].append(outputs(model, batches[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, results in got.items():
        assert len(results) == 5
        for result in results:
            assert_same(result, expected[i], rtol=1e-5, atol=1e-6)


@pytest.fixture
def compiler():
    """Forget what was compiled before: of one class PyTorch compiles a few models, and runs later ones as they are."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):  # which takes minutes of algebra
        yield


def compile_blocks(model: nn.Module, case: Case) -> nn.Module:
    for module in model.modules():
        if type(module).__name__ in case.blocks:
            module.compile(backend="aot_eager")
    return model


def compile_with_a_graph_break(model: nn.Module, case: Case) -> nn.Module:
    block = next(module for module in model.modules() if type(module).__name__ in case.blocks)
    block.register_forward_hook(lambda *args: torch._dynamo.graph_break())
    return torch.compile(model, backend="aot_eager")


def compile_by_regions(model: nn.Module, case: Case) -> nn.Module:
    return compile_regions(model, backend="aot_eager")


@pytest.mark.parametrize(
    ("name", "how", "way"),
    [
        ("vit-classifier", compile_blocks, "live"),
        ("swin-classifier", compile_with_a_graph_break, ""),
        ("vit-classifier", compile_by_regions, "recompute"),
        ("swin-classifier", compile_by_regions, "live"),
    ],
)
def test_compiled_in_parts_it_reads_every_tap(name, how, way, compiler):
    case, options = BY_NAME[name], WAYS[way]
    if version.parse(torch.__version__) < version.parse("2.13"):
        options = options | {"checkpoint_live_blocks": False}  # its checkpoints run another graph the second time
    model = get_peft_model(case.base(), E3VAConfig(r=4, init_weights=False, **options)).train()
    compiled = how(copy.deepcopy(model), case)
    batch = case.training_batch()
    left, right = compiled(**batch), model(**batch)
    torch.testing.assert_close(left["logits"], right["logits"], rtol=1e-4, atol=1e-5)
    left["loss"].backward(), right["loss"].backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    got = {name.replace("_orig_mod.", ""): p.grad for name, p in compiled.named_parameters() if p.requires_grad}
    assert_same(got, wanted, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch)["logits"], model(**batch)["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["swin-classifier", "vit-classifier"])
def test_a_base_that_is_compiled_by_regions_can_be_adapted(name, compiler):
    case = BY_NAME[name]
    model = get_peft_model(compile_regions(case.base(), backend="aot_eager"), E3VAConfig(r=4)).train()
    loss_of(model(**case.training_batch())).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("vit-classifier", "vit.base_layer.layers.0.mlp.fc1.weight"),
        ("swin-classifier", "swin.embeddings.patch_embeddings.projection.weight"),  # in front of the exit
    ],
)
def test_what_is_unfrozen_by_hand_is_refused_as_compiled_training_begins(name, weight):
    model = get_peft_model(BY_NAME[name].base(), E3VAConfig(r=4))
    model.base_model.model.get_parameter(weight).requires_grad = True
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(ValueError, match=re.escape(weight.rpartition("base_layer.")[2])):
        compiled.train()


@pytest.mark.parametrize(
    "name, options",
    [
        ("swin-classifier", {"tap_storage": "int8", "live_blocks": 2}),
        ("vit-classifier", {"live_blocks": 2}),
        ("timm-vit", {}),
        ("timm-swin", {}),
    ],
)
def test_compiled_in_one_graph_it_gives_the_same_outputs_and_gradients(name, options, compiler):
    case, stats = BY_NAME[name], torch._dynamo.utils.counters["stats"]
    model = get_peft_model(case.base(), E3VAConfig(r=4, init_weights=False, **options)).train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    graphs = [stats["unique_graphs"]]
    for seed in range(3):
        batch = case.training_batch(seed=seed)
        left, right = compiled(**batch), model(**batch)
        torch.testing.assert_close(left["logits"], right["logits"], rtol=1e-4, atol=1e-5)
        loss_of(left).backward(), loss_of(right).backward()
        graphs.append(stats["unique_graphs"])
    assert graphs[0] < graphs[2] == graphs[3]  # transformers notes the kind of labels: the second step compiles again
    for (key, a), (_, b) in zip(twin.named_parameters(), model.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=key)


# The layer runs outside of the graph: what differs is how it is called, as a module or as a method, and live blocks.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("swin-classifier", {}),
        ("vit-classifier", {"live_blocks": 1, "checkpoint_live_blocks": False}),
        ("timm-vit", {}),
    ],
)
def test_compiled_whole_taps_are_recomputed_all_the_same(name, options, compiler):
    case = BY_NAME[name]
    config = E3VAConfig(r=4, init_weights=False, tap_storage="recompute", **options)
    model = get_peft_model(case.base(), config).train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager")
    for seed in range(2):
        batch = case.training_batch(seed=seed)
        loss_of(compiled(**batch)).backward(), loss_of(model(**batch)).backward()
    wanted = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert_same({key: p.grad for key, p in twin.named_parameters() if p.requires_grad}, wanted, rtol=1e-3, atol=1e-5)


@every_way
@pytest.mark.parametrize("name", ["swin-classifier", "vit-classifier", "timm-vit", "timm-swin"])
def test_a_replica_runs_on_its_own_weights(name, way):
    case = BY_NAME[name]
    model = get_peft_model(case.base(), E3VAConfig(r=4, init_weights=False, **way)).eval()
    before = outputs(model, case.batch())
    assert_same(outputs(replica_of(model, 0.0), case.batch()), before)
    got = outputs(replica_of(model, 0.1), case.batch())
    assert_same(outputs(model, case.batch()), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert_same(got, outputs(model, case.batch()))
