"""The cache: frozen passes that are read give what frozen passes that are computed give."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import zlib
from collections import namedtuple
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import compile_regions
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import distributed, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedConfig, Trainer, TrainingArguments, default_data_collator

from e3va_peft import E3VAConfig, cached
from e3va_peft.cache.dataset import Repeated, Views
from e3va_peft.cache.rest import comparable, from_bytes, to_bytes
from e3va_peft.cache.store import IDENTITY, INDEX, Store
from e3va_peft.cache.taking import RECORD
from e3va_peft.errors import UserError
from e3va_peft.files import number_of_bytes, write_whole
from e3va_peft.layer import E3VALayer
from e3va_peft.methods import adapt
from e3va_peft.plan.estimate import FakeStep
from e3va_peft.plan.reading import cached_image
from e3va_peft.training.config import parse_config, read_config
from e3va_peft.training.run import train
from e3va_peft.training.sweep import runs_of, sweep
from tests.helpers import by_two, every_model_in, replica_of, start
from tests.inputs import classify, detect, segment
from tests.models import BY_NAME, Case, every_model, loss_of

WAYS = {"": {}, "live": {"live_blocks": 2}}
COUNT = 4


class Images(Dataset):
    """Random images with the labels of a case; `noise` draws other ones each time."""

    def __init__(self, case: Case, count: int = COUNT, noise: float = 0.0) -> None:
        batch = case.batch(count)
        labels = case.labels(count, *case.size)
        self.examples = [{name: value[i] for name, value in {**batch, **labels}.items()} for i in range(count)]
        self.noise = noise
        self.read = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        self.read += 1
        example = dict(self.examples[index])
        if self.noise:
            shift = torch.randn(()) + float(np.random.normal())
            example["pixel_values"] = example["pixel_values"] + self.noise * shift
        return example


def collate(examples: list[dict]) -> dict:
    """Stack what is of one shape, but for what detectors and Mask2Former take as lists."""
    batch = {}
    for name in examples[0]:
        values = [example[name] for example in examples]
        lists = isinstance(values[0], dict) or name in ("mask_labels", "class_labels")
        batch[name] = values if lists else torch.stack([torch.as_tensor(value) for value in values])
    return batch


def adapted(case: Case, **options) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(case.base(), E3VAConfig(r=4, init_weights=False, **options))


def curve(model: nn.Module, batches: list[dict], lr: float = 1e-2) -> list[torch.Tensor]:
    """Losses, and the parameters at the end, of a few steps."""
    torch.manual_seed(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    model.train()
    found = []
    for batch in batches:
        loss = loss_of(model(**batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return [*found, *(p.detach() for p in parameters)]


def layer_of(model: nn.Module) -> E3VALayer:
    return next(module for module in model.modules() if isinstance(module, E3VALayer))


@every_model_in(*WAYS, options=WAYS)
def test_an_exact_record_trains_as_its_images_do_to_the_bit(case, way):
    images = Images(case)
    plain, model = adapted(case, **way), adapted(case, **way)
    read = cached(images, model, storage="exact", batch_size=2, data_collator=collate)
    runs: list[nn.Module] = []
    blocks = [layer_of(model).exit.get_submodule(name) for name in layer_of(model).stages[0].blocks]
    frozen = blocks[: 1 if way else len(blocks)]
    for block in frozen:
        block.register_forward_hook(lambda module, args, output: runs.append(module))
    pairs = [(0, 1), (2, 3), (0, 1)]
    expected = curve(plain, [collate([images[i] for i in pair]) for pair in pairs])
    found = curve(model, [collate([read[i] for i in pair]) for pair in pairs])
    assert way or not runs  # live: the block is called, and skipped
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("storage", ["exact", "int4"])
@pytest.mark.parametrize("live", [0, 1])
@pytest.mark.parametrize("name", ["swin-upernet", "vit-classifier"])
def test_taps_of_the_stream_are_recorded_and_rounded_as_those_of_images(name, live, storage):
    case = BY_NAME[name]
    images = Images(case)
    plain, model = (adapted(case, taps=("stream",), live_blocks=live, tap_storage=storage) for _ in range(2))
    read = cached(images, model, storage="exact", batch_size=2, data_collator=collate)
    expected = curve(plain, [collate([images[i] for i in (0, 1)])])
    found = curve(model, [collate([read[i] for i in (0, 1)])])
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


@every_model
def test_an_exact_record_trains_the_head_alone_to_the_bit_and_needs_no_block(case):
    images = Images(case)
    plain, model = (adapt(case.base(), {"name": "head-only"}) for _ in range(2))
    read = cached(images, model, storage="exact", batch_size=2, data_collator=collate)
    for block in (module for module in model.modules() if type(module).__name__ in case.blocks):
        block.forward = None
    pairs = [(0, 1), (2, 3), (0, 1)]
    expected = curve(plain, [collate([images[i] for i in pair]) for pair in pairs])
    found = curve(model, [collate([read[i] for i in pair]) for pair in pairs])
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["dinov2-early-maps", "swin-early-maps"])
def test_the_head_alone_needs_no_block_behind_the_deepest_map_at_any_size(name):
    case = BY_NAME[name]
    images = Images(case)
    for example in images.examples[2:]:
        example["pixel_values"], example["labels"] = example["pixel_values"][:, :28], example["labels"][:28]
    model = adapt(case.base(), {"name": "head-only"})
    read = cached(images, model, data_collator=collate, batch_size=1)
    for block in (module for module in model.modules() if type(module).__name__ in case.blocks):
        block.forward = None
    assert all(torch.isfinite(loss_of(model(**collate([read[i]])))) for i in range(COUNT))


def test_a_record_for_the_head_alone_holds_what_enters_the_output_norms_and_no_more():
    case = BY_NAME["vit-classifier"]
    read = cached(Images(case), adapt(case.base(), {"name": "head-only"}), storage="exact", data_collator=collate)
    assert read[0][RECORD].numel() == (16 + 1) * 16 * 4 + 0  # tokens of the last block


@pytest.mark.parametrize(
    ("method", "named"), [("full", "cls_token"), ("lora", "lora_A"), ("bitfit", "bias"), ("partial-1", r"layers\.2\.")]
)
def test_a_backbone_that_is_trained_is_not_cached_and_the_parameter_is_named(method, named):
    case = BY_NAME["vit-classifier"]
    with pytest.raises(ValueError, match=rf"trains .*{named}"):
        cached(Images(case), adapt(case.base(), {"name": method}))


def test_a_model_without_a_known_backbone_is_not_cached():
    with pytest.raises(ValueError, match="model=Conv2d: has no backbone"):
        cached(Images(BY_NAME["vit-classifier"]), nn.Conv2d(3, 3, 1))


@pytest.mark.parametrize("storage", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("name", ["swin-upernet", "vit-classifier", "dinov2-classifier", "convnext-classifier"])
def test_rounded_records_are_close_and_smaller(name, storage):
    case = BY_NAME[name]
    images = Images(case)
    model = adapted(case, tap_storage="int4" if storage == "int4" else "exact").eval()
    read, exact = (cached(images, model, storage=kind, data_collator=collate) for kind in (storage, "exact"))
    with torch.no_grad():
        found, expected = (model(**collate([own[i] for i in range(COUNT)])).logits for own in (read, images))
    allowed = {"fp16": 2e-3, "int8": 0.02, "int4": 0.02}[storage]  # taps in int4 are read so from the images too
    assert (found - expected).norm() < allowed * expected.norm()
    assert read[0][RECORD].numel() < exact[0][RECORD].numel()


def test_records_do_not_show_an_adapter_less_than_it_reads_later():
    case = BY_NAME["vit-classifier"]
    with pytest.raises(UserError, match=r"storage='int4'.*'default' has tap_storage='int8'"):
        cached(Images(case), adapted(case, tap_storage="int8"), storage="int4")
    model = adapted(case, tap_storage="int4")
    read = cached(Images(case), model, storage="int4", data_collator=collate)
    model.add_adapter("later", E3VAConfig(r=4))
    model(**collate([read[0]]))
    model.set_adapter("later")
    with pytest.raises(UserError, match=r"storage='int4'.*'later' has tap_storage='exact'"):
        model(**collate([read[0]]))


def test_a_record_of_a_model_without_live_blocks_needs_no_block_at_all():
    case = BY_NAME["swin-upernet"]
    model = adapted(case)
    read = cached(Images(case), model, data_collator=collate)
    for block in (module for module in model.modules() if type(module).__name__ == "SwinLayer"):
        block.forward = None
    assert torch.isfinite(loss_of(model(**collate([read[0], read[1]]))))


@pytest.mark.parametrize("name", ["swin-upernet", "vit-classifier"])
def test_live_blocks_do_not_run_to_fill_a_cache_once_their_outputs_are_known(name):
    case = BY_NAME[name]
    runs = []
    for count in (2, 6):
        model, seen = adapted(case, live_blocks=2), []
        stage = layer_of(model).stages[-1]
        inner = next(layer_of(model).exit.get_submodule(stage.blocks[-1]).children())
        inner.register_forward_hook(lambda module, args, output, seen=seen: seen.append(module))
        cached(Images(case, count), model, data_collator=collate, batch_size=1)
        runs.append(len(seen))
    assert runs[0] == runs[1] > 0


def compiled(model: nn.Module) -> nn.Module:
    return compile_regions(model.eval(), backend="eager")


def windows(model: nn.Module) -> nn.Module:
    """Attention maps of windows, which do not split into images, are among the outputs of its blocks."""
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize(
    ("name", "live", "change"),
    [("vit-classifier", 1, compiled), ("swin-classifier", 4, windows)],
    ids=["compiled", "windows"],
)
def test_live_blocks_that_cannot_be_left_out_run_to_fill_a_cache(name, live, change):
    case = BY_NAME[name]
    images, plain = Images(case), adapted(case, live_blocks=live)
    model = change(adapted(case, live_blocks=live))
    read = cached(images, model, storage="exact", data_collator=collate, batch_size=1)
    with torch.no_grad():
        found, expected = (own.eval()(**collate([of[3]])).logits for own, of in ((model, read), (plain, images)))
    torch.testing.assert_close(found, expected)


def test_a_cache_is_made_for_the_model_as_it_is_now():
    case = BY_NAME["vit-classifier"]
    model = adapted(case)
    cached(Images(case), model, data_collator=collate)
    model.config.output_hidden_states = True
    read = cached(Images(case), model, data_collator=collate)
    assert len(model(**collate([read[0]])).hidden_states) == model.config.num_hidden_layers + 1


def test_a_head_with_batch_norms_is_cached_one_image_at_a_time():
    case = BY_NAME["swin-upernet"]
    model = adapted(case)
    before = {name: value.clone() for name, value in model.named_buffers()}
    read = cached(Images(case), model, data_collator=collate, batch_size=1)
    assert torch.isfinite(loss_of(model.train()(**collate([read[0], read[1]]))))
    model = adapted(case)
    cached(Images(case), model, data_collator=collate, batch_size=2)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_views_repeat_and_differ_and_follow_the_epoch():
    case = BY_NAME["vit-classifier"]
    images = Images(case, noise=0.5)
    views = Views(images, 2, seed=3)
    assert torch.equal(views[1]["pixel_values"], views[1]["pixel_values"])
    assert not torch.equal(views[1]["pixel_values"], views[1 + COUNT]["pixel_values"])
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    views[0]
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()

    read = cached(images, adapted(case), views=2, seed=3)
    assert len(read) == COUNT and len(read.store.missing()) == 0
    by_epoch = []
    for epoch in range(4):
        read.set_epoch(epoch)
        by_epoch.append(read[1][RECORD])
    assert torch.equal(by_epoch[0], by_epoch[2]) and torch.equal(by_epoch[1], by_epoch[3])
    assert not torch.equal(by_epoch[0], by_epoch[1])


def test_views_change_where_nobody_says_the_epoch_and_several_processes_share_the_images(monkeypatch):
    monkeypatch.setattr(PartialState(), "num_processes", 4)
    shared = [Repeated(Views(Images(BY_NAME["vit-classifier"], 8), 4, 0)) for _ in range(4)]
    for epoch in range(4):
        order = torch.randperm(8).tolist()
        found = {own.number(i) // 8 for rank, own in enumerate(shared) for i in order[rank::4]}
        assert found == {epoch}
    shared = [Repeated(Views(Images(BY_NAME["vit-classifier"], 7), 4, 0)) for _ in range(4)]
    for epoch in range(8):  # the last process sees an image again, so that all have as many
        order = [*torch.randperm(7).tolist(), 0]
        found = {own.number(i) // 7 for rank, own in enumerate(shared) for i in order[rank::4]}
        assert found == {epoch % 4}


def arguments(folder: Path, **options) -> TrainingArguments:
    return TrainingArguments(
        str(folder), per_device_train_batch_size=2, num_train_epochs=3, learning_rate=1e-2, report_to=[],
        use_cpu=True, logging_steps=1, save_strategy="epoch", remove_unused_columns=False, disable_tqdm=True,
        **options,
    )  # fmt: skip


class ByEpoch(Views):
    """The views without a cache."""

    epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict:
        return super().__getitem__(self.epoch % self.views * len(self.dataset) + index)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_trainer_takes_a_cached_dataset_and_its_curve_is_that_of_the_views(tmp_path, workers):
    case = BY_NAME["swin-classifier"]
    images = Images(case, noise=0.5)
    model = adapted(case)
    read = cached(images, model, views=2, storage="exact", batch_size=2, folder=tmp_path / "cache")
    before = images.read
    trainer = Trainer(
        model, arguments(tmp_path / "a", dataloader_num_workers=workers, dataloader_persistent_workers=workers > 0),
        train_dataset=read, eval_dataset=read,
    )  # fmt: skip
    trainer.train()
    assert images.read == before
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    plain = Trainer(adapted(case), arguments(tmp_path / "b"), train_dataset=ByEpoch(images, 2, 0))
    plain.train()
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)
    assert len(set(losses(trainer))) == 6

    resumed = adapted(case)
    again = cached(images, resumed, views=2, storage="exact", batch_size=2, folder=tmp_path / "cache")
    rest = Trainer(resumed, arguments(tmp_path / "c"), train_dataset=again)
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(rest) == pytest.approx(losses(trainer), rel=1e-5)


def test_several_highways_read_one_store(tmp_path):
    case = BY_NAME["vit-classifier"]
    images = Images(case)
    cached(images, adapted(case), folder=tmp_path / "cache")
    before = images.read
    other = get_peft_model(case.base(), E3VAConfig(r=2, bottleneck_ratio=1.0, init_weights=False))
    read = cached(images, other, folder=tmp_path / "cache")
    assert images.read - before <= 5  # a few are looked at
    assert torch.isfinite(loss_of(other(**default_data_collator([read[0], read[1]]))))


def test_autocast_records_train_under_autocast(tmp_path):
    case = BY_NAME["swin-classifier"]
    images = Images(case)
    plain, model = adapted(case), adapted(case)
    read = cached(images, model, storage="exact", batch_size=2, autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_of(model(**collate([read[0], read[1]])))
        expected = loss_of(plain(**collate([images[0], images[1]])))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def test_images_of_several_sizes_come_in_batches_of_one_size():
    case = BY_NAME["swin-upernet"]
    images = Images(case)
    for example in images.examples[2:]:
        example["pixel_values"] = example["pixel_values"][:, :28, :24]
        example["labels"] = example["labels"][:28, :24]
    model, plain = adapted(case), adapted(case)
    read = cached(images, model, storage="exact", data_collator=collate)
    for i in range(COUNT):
        found, expected = (loss_of(own(**collate([source[i]]))) for own, source in ((model, read), (plain, images)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(RuntimeError, match="equal size"):
        collate([read[0], read[2]])


def train_by_two(rank: int, folder: str) -> None:
    """Be one of two processes that fill a cache together and train from it, each on its half of a batch."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=50))
    accelerator = Accelerator(cpu=True)
    for name, way in BY_TWO:
        case = BY_NAME[name]
        model = adapted(case, **way)
        at = f"{folder}/{name}-{len(way)}"
        read = cached(Images(case, noise=0.5), model, folder=f"{at}-cache", storage="exact", views=2, batch_size=1)
        model = accelerator.prepare(model.train())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        loader = accelerator.prepare(DataLoader(read, batch_size=2, shuffle=False, collate_fn=collate))
        for _ in range(2):
            for batch in loader:
                optimizer.zero_grad()
                accelerator.backward(loss_of(model(**batch)))
                optimizer.step()
        if accelerator.is_main_process:
            accelerator.unwrap_model(model).save_pretrained(at)
    accelerator.wait_for_everyone()
    # Freed later, DDP would be the last to hold the group, whose threads PyTorch joins while they wait for the GIL.
    del model, optimizer, loader
    accelerator.free_memory()
    distributed.destroy_process_group()


BY_TWO = [("vit-classifier", {}), ("swin-classifier", {"live_blocks": 2})]


def test_two_processes_fill_one_store_and_train_like_one(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    by_two(train_by_two, str(tmp_path))
    for name, way in BY_TWO:
        case, at = BY_NAME[name], tmp_path / f"{name}-{len(way)}"
        model = adapted(case, **way)
        images = Images(case, noise=0.5)
        read = cached(images, model, folder=f"{at}-cache", storage="exact", views=2, batch_size=1)
        assert images.read <= 6 and len(list(Path(f"{at}-cache").glob("data-*.bin"))) == 2
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        model.train()
        for epoch in range(2):
            read.set_epoch(epoch)
            optimizer.zero_grad()
            loss_of(model(**collate([read[i] for i in range(COUNT)]))).backward()
            optimizer.step()
        got = load_file(at / "adapter_model.safetensors")
        for key, value in get_peft_model_state_dict(model).items():
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5)


# What does not fit


def test_no_process_writes_before_all_know_what_is_missing(monkeypatch):
    happened = []

    def noted(owner: type, name: str) -> None:
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **more: (happened.append(name), own(*args, **more))[1])

    for owner, name in ((Store, "missing"), (Store, "write"), (PartialState, "wait_for_everyone")):
        noted(owner, name)
    case = BY_NAME["swin-classifier"]
    cached(Images(case), get_peft_model(case.base(), E3VAConfig(r=4)))
    assert "wait_for_everyone" in happened[happened.index("missing") : happened.index("write")]


def test_a_batch_whose_record_was_dropped_is_refused():
    case = BY_NAME["vit-classifier"]
    model = adapted(case)
    read = cached(Images(case), model)
    batch = default_data_collator([read[0]])
    del batch[RECORD]
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        model(**batch)


def test_a_model_that_was_not_given_the_cache_refuses_its_records():
    case = BY_NAME["vit-classifier"]
    read = cached(Images(case), adapted(case))
    model = adapted(case)
    cached(Images(case, 1), model, storage="fp16")
    with pytest.raises(ValueError, match=RECORD):
        model(**default_data_collator([read[0]]))


@every_model
def test_a_placeholder_that_would_be_read_as_the_image_is_refused(case):
    model = adapted(case)
    read = cached(Images(case), model, data_collator=collate, batch_size=1)
    image = collate([read[0]])["pixel_values"]
    for call in (adapted(case), model, model.base_model.model):
        with pytest.raises(ValueError, match="is the placeholder of a cached dataset"):
            call(image)


def test_masks_and_labels_of_bools_are_the_models_own(monkeypatch):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = BY_NAME["vit-classifier"].base()

        def forward(self, mask, pixel_values, labels=None):
            return self.vit(pixel_values=pixel_values * mask).logits, labels

    pixel_values = BY_NAME["vit-classifier"].batch()["pixel_values"]
    mask = torch.ones_like(pixel_values[:, :1], dtype=torch.bool)
    model = get_peft_model(Masked(), E3VAConfig())
    model(mask=mask, pixel_values=pixel_values, labels=mask)
    monkeypatch.setattr("e3va_peft.hooks.PLACEHOLDERS", set())
    model(mask, pixel_values, labels=mask)


@pytest.mark.parametrize("name", ["vit-classifier", "dinov2-classifier"])
def test_a_cached_batch_that_is_called_by_position_is_refused_by_a_head_alone(name):
    case = BY_NAME[name]
    model = adapt(case.base(), {"name": "head-only"})
    with pytest.raises(ValueError, match="is the placeholder of a cached dataset"):
        model(collate(list(cached(Images(case), model)))["pixel_values"])


@pytest.mark.parametrize("method", [{"name": "e3va"}, {"name": "e3va", "live_blocks": 1}, {"name": "head-only"}])
def test_a_forward_that_is_interrupted_leaves_no_record_behind(method):
    case = BY_NAME["vit-classifier"]
    model, other = (adapt(case.base(), method).eval() for _ in range(2))
    batch, images = collate(list(cached(Images(case), model))), case.batch(COUNT)
    expected = model(**images).logits

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.get_submodule("base_model.model.classifier" if "peft" in type(model).__module__ else "classifier")
    hook = hook.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    hook.remove()
    if method["name"] == "e3va":
        assert not torch.equal(other(**images).logits, model(**batch).logits)
    assert torch.equal(model(**images).logits, expected)
    model(**batch)
    assert torch.equal(model(**images).logits, expected)


@pytest.mark.parametrize("method", ["e3va", "head-only"])
def test_a_replica_reads_a_cached_batch(method):
    case = BY_NAME["vit-classifier"]
    model = adapt(case.base(), {"name": method}).eval()
    batch = collate(list(cached(Images(case), model, storage="exact")))
    assert torch.equal(replica_of(model, 0.0)(**batch).logits, model(**batch).logits)


def test_a_cached_batch_without_an_active_adapter_is_refused():
    case = BY_NAME["vit-classifier"]
    model = adapted(case)
    read = cached(Images(case), model)
    with model.disable_adapter(), pytest.raises(ValueError, match="no adapter is active"):
        model(**default_data_collator([read[0]]))
    assert torch.isfinite(loss_of(model(**default_data_collator([read[0]]))))  # nothing is left over


def test_a_model_without_values_is_refused():
    case = BY_NAME["swin-classifier"]
    with pytest.raises(ValueError, match=r"swin\..* has no values, .*cpu_ram_efficient_loading=False"):
        cached(Images(case), adapted(case).to("meta"))


class Peeking(nn.Module):
    """A model that looks at the image beside its backbone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict:
        return {"logits": self.inner(pixel_values).logits + pixel_values.mean()}


def test_a_model_that_reads_the_image_elsewhere_is_refused():
    case = BY_NAME["vit-classifier"]
    model = get_peft_model(Peeking(case.base()), E3VAConfig(r=4))
    with pytest.raises(UserError, match="beside the backbone"):
        cached(Images(case), model)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"storage": "int4"}, "storage"),
        ({"views": 2}, "views"),
        ({"seed": 1}, "seed"),
        ({"model": {"live_blocks": 1}}, "live_blocks"),
        ({"model": {"taps": ("block",)}}, "taps"),
        ({"weights": 1}, "backbone"),
        ({"images": 3}, "images"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_store_of_something_else_is_refused_and_named(tmp_path, change, named):
    case = BY_NAME["vit-classifier"]
    cached(Images(case), adapted(case), folder=tmp_path / "cache")
    content = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    model = get_peft_model(case.base(change.get("weights", 0)), E3VAConfig(**change.get("model", {})))
    options = {name: value for name, value in change.items() if name in ("storage", "views", "seed")}
    with pytest.raises(UserError, match=named):
        cached(Images(case, change.get("images", COUNT)), model, folder=tmp_path / "cache", **options)
    assert content == {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}


class Deeper(nn.Module):
    """A model whose head reads the first block, too."""

    def __init__(self, inner: nn.Module, read: bool) -> None:
        super().__init__()
        self.inner, self.read = inner, read

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict:
        found = self.inner(pixel_values, output_hidden_states=self.read)
        return {"logits": found.logits + (found.hidden_states[1].mean() if self.read else 0)}


@pytest.mark.parametrize("method", ["e3va", "head-only"])
def test_heads_that_read_other_outputs_do_not_share_a_store(tmp_path, method):
    case = BY_NAME["dinov2-classifier"]
    cached(Images(case), adapt(Deeper(case.base(), False), {"name": method}), folder=tmp_path / "cache")
    with pytest.raises(UserError, match="reads"):
        cached(Images(case), adapt(Deeper(case.base(), True), {"name": method}), folder=tmp_path / "cache")


@pytest.mark.parametrize("method", ["e3va", "head-only"])
def test_a_store_knows_a_timm_models_positions(tmp_path, method):
    case = BY_NAME["timm-vit"]
    cached(Images(case), adapt(case.base(), {"name": method}), folder=tmp_path / "cache")
    base = case.base()
    next(p for name, p in base.named_parameters() if name.endswith("pos_embed")).data += 1
    with pytest.raises(UserError, match="backbone"):
        cached(Images(case), adapt(base, {"name": method}), folder=tmp_path / "cache")


def test_changed_images_are_refused(tmp_path):
    case = BY_NAME["vit-classifier"]
    images = Images(case)
    cached(images, adapted(case), folder=tmp_path / "cache")
    images.examples[-1]["pixel_values"] += 1e-3
    with pytest.raises(UserError, match="image 3"):
        cached(images, adapted(case), folder=tmp_path / "cache")


def test_changed_labels_are_refused(tmp_path):
    case = BY_NAME["vit-classifier"]
    images = Images(case)
    cached(images, adapted(case), folder=tmp_path / "cache")
    images.examples[0]["labels"] = images.examples[0]["labels"] + 1
    with pytest.raises(UserError, match="labels of image 0"):
        cached(images, adapted(case), folder=tmp_path / "cache")


def test_what_is_said_of_an_example_in_another_way_is_no_change(tmp_path):
    case = BY_NAME["vit-classifier"]
    images = Images(case)
    images.examples = [
        {**example, "path": "here/0.png", "labels": int(example["labels"])} for example in images.examples
    ]
    cached(images, adapted(case), folder=tmp_path / "cache")
    images.examples = [
        {"path": "there/0.png", "labels": torch.tensor(example["labels"]), "pixel_values": example["pixel_values"]}
        for example in images.examples
    ]
    cached(images, adapted(case), folder=tmp_path / "cache")


def test_two_datasets_of_one_length_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("E3VA_CACHE", str(tmp_path))
    case = BY_NAME["vit-classifier"]
    images, others = Images(case), Images(case)
    others.examples[0]["pixel_values"] = others.examples[0]["pixel_values"] + 1
    other_labels = Images(case)
    other_labels.examples[0]["labels"] = other_labels.examples[0]["labels"] + 1
    found = [cached(own, adapted(case), folder="auto") for own in (images, others, other_labels, images)]
    assert found[0].store.folder == found[3].store.folder
    assert len({read.store.folder for read in found}) == 3


def test_views_that_are_never_the_same_are_refused_before_anything_is_filled(tmp_path, monkeypatch):
    monkeypatch.setenv("E3VA_CACHE", str(tmp_path))
    images = Images(BY_NAME["vit-classifier"])
    numbers = iter(range(1000))
    monkeypatch.setattr(Images, "__getitem__", lambda self, i: self.examples[i] | {"labels": next(numbers)})
    with pytest.raises(UserError, match="draws from other generators"):
        cached(images, adapted(BY_NAME["vit-classifier"]), folder="auto")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_cache_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    case = BY_NAME["vit-classifier"]
    with pytest.raises(UserError, match="holds no cache"):
        cached(Images(case), adapted(case), folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("method", ["e3va", "head-only"])
def test_a_cache_of_a_backbone_that_computes_something_else_is_refused(method, tmp_path):
    case = BY_NAME["vit-classifier"]
    models = [adapted(case) if method == "e3va" else adapt(case.base(), {"name": method}) for _ in range(2)]
    for module in models[1].modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config.hidden_act = "relu"
    cached(Images(case), models[0], folder=tmp_path / "cache")
    with pytest.raises(UserError, match=r"\(config: "):
        cached(Images(case), models[1], folder=tmp_path / "cache")


def test_two_runs_cannot_fill_one_store(tmp_path):
    case = BY_NAME["vit-classifier"]

    class Nested(Images):
        def __getitem__(self, index: int) -> dict:
            if index == 1:
                cached(Images(case), adapted(case), folder=tmp_path / "cache")
            return super().__getitem__(index)

    with pytest.raises(UserError, match="another run"):
        cached(Nested(case), adapted(case), folder=tmp_path / "cache")


def test_no_room_and_a_limit_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    case = BY_NAME["vit-classifier"]
    with pytest.raises(UserError, match="limit=1000"):
        cached(Images(case), adapted(case), folder=tmp_path / "a", limit=1000)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match="are free"):
        cached(Images(case), adapted(case), folder=tmp_path / "b")
    assert not list(tmp_path.glob("*/data-*"))


@pytest.mark.parametrize("bad", [{"views": 0}, {"storage": "int2"}, {"batch_size": 0}, {"limit": 0}])
def test_bad_arguments_are_named(bad):
    case = BY_NAME["vit-classifier"]
    with pytest.raises(UserError, match=next(iter(bad))):
        cached(Images(case), adapted(case), **bad)


def test_a_dataset_without_images_is_refused():
    case = BY_NAME["vit-classifier"]
    with pytest.raises(UserError, match="image='pixels'"):
        cached(Images(case), adapted(case), image="pixels")


# What a crash leaves


def test_a_damaged_record_is_refused(tmp_path):
    case = BY_NAME["vit-classifier"]
    read = cached(Images(case, 8), adapted(case), folder=tmp_path / "cache")
    data = tmp_path / "cache" / "data-0.bin"
    content = bytearray(data.read_bytes())
    content[int(read.store.index[1]["offset"]) + 40] ^= 1
    data.write_bytes(content)
    fresh = cached(Images(case, 8), adapted(case), folder=tmp_path / "cache")
    assert fresh[0]
    with pytest.raises(UserError, match="record 1 is damaged"):
        fresh[1]


def test_a_limit_that_larger_images_reach_later_stops_there(tmp_path):
    case = BY_NAME["convnext-classifier"]
    images = Images(case)
    for example in images.examples[1:]:
        example["pixel_values"] = torch.rand(3, 96, 96)
    with pytest.raises(UserError, match=rf"after 2 of {COUNT} records; images of 96x96 px"):
        record = len(cached(Images(case, 1), adapted(case), batch_size=1)[0][RECORD])
        cached(images, adapted(case), folder=tmp_path / "cache", limit=14 * record, batch_size=1)
    assert (tmp_path / "cache" / "data-0.bin").stat().st_size <= 14 * record


def test_one_large_image_does_not_count_for_all(tmp_path):
    case = BY_NAME["convnext-classifier"]
    images = Images(case)
    images.examples[0]["pixel_values"] = torch.rand(3, 96, 96)
    sizes = [len(cached(images, adapted(case))[i][RECORD]) for i in (0, 1)]
    limit = sizes[0] + COUNT * sizes[1]
    assert sizes[0] * COUNT > limit
    assert len(cached(images, adapted(case), folder=tmp_path / "cache", limit=limit)) == COUNT


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "removed"])
@pytest.mark.parametrize("name", [IDENTITY, INDEX, "data-0.bin"])
def test_a_file_of_a_cache_that_is_cut_short_or_removed_is_named(tmp_path, name, cut):
    case, folder = BY_NAME["vit-classifier"], tmp_path / "cache"
    cached(Images(case), adapted(case), folder=folder)
    (folder / name).write_bytes(b"") if cut else (folder / name).unlink()
    named = "is not empty and holds no cache" if name == IDENTITY and not cut else f"{name} is damaged. Remove"
    with pytest.raises(UserError, match=named):
        cached(Images(case), adapted(case), folder=folder)[0]


@pytest.mark.parametrize("field", ["height", "offset", "file", "row"])
def test_a_line_of_the_index_that_was_flipped_is_written_again(tmp_path, field):
    case, folder = BY_NAME["vit-classifier"], tmp_path / "cache"
    whole = cached(Images(case), adapted(case), folder=folder)
    expected, line = whole[1][RECORD], whole.store.index.dtype
    content = bytearray((folder / INDEX).read_bytes())
    content[line.itemsize + line.fields[field][1] + 1] ^= 8
    (folder / INDEX).write_bytes(content)
    assert torch.equal(cached(Images(case), adapted(case), folder=folder, one_size=True)[1][RECORD], expected)


def test_a_record_that_a_worker_has_checked_is_not_checked_again(tmp_path, monkeypatch):
    case = BY_NAME["vit-classifier"]
    read = cached(Images(case), adapted(case), folder=tmp_path / "cache")
    batches = DataLoader(read, batch_size=2, num_workers=1, collate_fn=list)
    expected = [example[RECORD] for batch in batches for example in batch]
    monkeypatch.setattr(zlib, "crc32", None)
    assert all(torch.equal(read[i][RECORD], expected[i]) for i in range(COUNT))


@pytest.mark.parametrize("cut", ["index", "data"])
def test_a_store_that_was_cut_short_goes_on_where_it_was_whole(tmp_path, cut):
    case = BY_NAME["vit-classifier"]
    images = Images(case)
    whole = cached(images, adapted(case), folder=tmp_path / "cache")
    expected = [whole[i][RECORD] for i in range(COUNT)]
    line = whole.store.index.itemsize
    with open(tmp_path / "cache" / INDEX, "r+b") as index:
        index.seek(2 * line + (5 if cut == "index" else 0))
        index.write(bytes(2 * line - (5 if cut == "index" else 0)))
    if cut == "data":  # bytes of a record that never came into the index
        with open(tmp_path / "cache" / "data-0.bin", "ab") as data:
            data.write(b"half")
    before = images.read
    again = cached(images, adapted(case), folder=tmp_path / "cache")
    assert images.read - before < 2 * COUNT + 2
    assert all(torch.equal(again[i][RECORD], expected[i]) for i in range(COUNT))


@pytest.mark.parametrize("file", [INDEX, IDENTITY])
def test_a_store_that_was_stopped_before_it_had_its_identity_is_begun_again(tmp_path, monkeypatch, file):
    def stops(path: Path, content: bytes) -> None:
        if path.name == file:
            (path.parent / f".{path.name}.123").touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_whole(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("e3va_peft.cache.store.write_whole", stops)
        with pytest.raises(UserError, match="the disk is full after 0 of 3 records"):
            Store(tmp_path / "cache", {"what": 1}, 3)
    assert Store(tmp_path / "cache", {"what": 1}, 3).missing() == [0, 1, 2]


def fill(rank: int, folder: str) -> None:
    """Fill a cache of forty images, if nobody kills this process meanwhile."""
    case = BY_NAME["vit-classifier"]
    cached(Images(case, 40), adapted(case), folder=folder, batch_size=2)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_at_any_moment_it_goes_on_and_no_record_is_broken(tmp_path):
    case = BY_NAME["vit-classifier"]
    folder = tmp_path / "cache"
    images = Images(case, 40)
    survived = 0
    for kill in range(3):
        child = start(fill, 1, str(folder)).processes[0]
        while child.is_alive():
            data = folder / "data-0.bin"
            if data.is_file() and data.stat().st_size > (4 + 10 * kill) * 1000:
                child.kill()
                child.join()
                survived += 1
    assert survived
    read = cached(images, adapted(case), folder=folder, batch_size=2)
    expected = cached(images, adapted(case), batch_size=2)
    assert all(torch.equal(read[i][RECORD], expected[i][RECORD]) for i in range(40))


def test_the_rest_of_an_example_comes_back_as_it_was():
    example = {
        "labels": 3,
        "boxes": {"boxes": torch.rand(2, 4), "names": ["a", "b"], "none": None},
        "masks": [np.zeros((2, 3), dtype=np.uint8), torch.ones(2, dtype=torch.bool)],
        "size": (4, 5.5),
        "shape": torch.Size([2, 3]),
        "number": np.int64(7),
        "a.b": torch.zeros(1),
        "a": {"b": torch.ones(1)},
    }
    found = from_bytes(to_bytes(example))
    assert found["labels"] == 3 and found["size"] == (4, 5.5) and found["number"] == 7 and found["shape"] == (2, 3)
    assert found["boxes"]["names"] == ["a", "b"] and found["boxes"]["none"] is None
    assert torch.equal(found["boxes"]["boxes"], example["boxes"]["boxes"])
    assert isinstance(found["masks"][0], np.ndarray) and found["masks"][1].dtype == torch.bool
    assert found["a.b"] == 0 and found["a"]["b"] == 1
    one, same, other = {"a": b"x", "b": 1}, {"b": torch.tensor(1), "a": b"x"}, {"a": b"y", "b": 1}
    assert comparable(to_bytes(one)) == comparable(to_bytes(same)) != comparable(to_bytes(other))
    pair = namedtuple("Pair", "a b")(1, 2)
    for value in (object(), {1: 2}, pair, np.array(["a"])):
        with pytest.raises(TypeError, match=r"labels\.0: is a "):
            to_bytes({"labels": [value]})


# e3va train

TASKS = {"classes": (classify, {}), "maps": (segment, {}), "objects": (detect, {"per_device_train_batch_size": 1})}


@pytest.mark.parametrize(
    ("task", "method", "views"),
    [("classes", "e3va", 2), ("maps", "e3va", 0), ("objects", "e3va", 0), ("maps", "head-only", 2)],
)
def test_e3va_train_reads_the_cache_and_ends_where_it_does_without(task, method, views, tmp_path, monkeypatch):
    monkeypatch.setenv("E3VA_CACHE", str(tmp_path / "own"))
    build, training = TASKS[task]
    values = build(tmp_path, num_train_epochs=2, per_device_eval_batch_size=1, **training)
    values |= {"method": method, "augment": views > 0}
    without = {"storage": "none", "views": views} if views else False
    plain = train(parse_config(values | {"output": str(tmp_path / "plain"), "cache": without}))
    with_it = {"storage": "exact", "views": views or 1}
    read = train(parse_config(values | {"output": str(tmp_path / "read"), "cache": with_it}))
    assert [path.name for path in tmp_path.glob("own/*")] == ["frozen"]
    curves = ([entry["loss"] for entry in record["history"] if "loss" in entry] for record in (plain, read))
    assert next(curves) == pytest.approx(next(curves), rel=1e-5)
    assert plain["metrics"] == pytest.approx(read["metrics"], rel=1e-5, nan_ok=True)
    assert read["cache_seconds"] > 0


def test_padded_batches_are_refused_before_much_is_computed_and_the_remedies_work(tmp_path):
    values = detect(tmp_path, num_train_epochs=1, per_device_eval_batch_size=1)
    values["cache"] = {"folder": str(tmp_path / "frozen")}
    with pytest.raises(UserError, match=r"(?s)training.per_device_train_batch_size=2: .*gradient_accum.*augment.crop"):
        train(parse_config(values | {"augment": False}))
    assert len(list(tmp_path.glob("frozen/train/data-*"))) == 0
    values["cache"] = {"folder": str(tmp_path / "cropped")}
    train(parse_config(values | {"augment": {"crop": 32}}), overwrite=True)


def test_e3va_train_fills_a_cache_once_and_not_for_other_data(tmp_path, monkeypatch):
    values = classify(tmp_path, num_train_epochs=1) | {"cache": {"views": 2, "folder": str(tmp_path / "frozen")}}
    train(parse_config(values | {"output": str(tmp_path / "a")}))
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("frozen/*/data-0.bin")}
    assert len(written) == 2
    train(parse_config(values | {"output": str(tmp_path / "b"), "method": {"name": "e3va", "r": 4}}))
    assert written == {path: path.stat().st_mtime_ns for path in written}
    changed = next(tmp_path.glob("**/train/red/*.png"))
    os.utime(changed, ns=(1, 1))
    with pytest.raises(UserError, match="dataset"):
        train(parse_config(values | {"output": str(tmp_path / "c")}))


@pytest.mark.parametrize(
    ("cache", "named"),
    [
        ({"views": 0}, "cache.views=0"),
        ({"storage": "int2"}, "cache.storage='int2'"),
        ({"limit": "lots"}, "cache.limit='lots'"),
        ({"limit": "1.2.3GB"}, "cache.limit='1.2.3GB'"),
        ({"view": 2}, "cache.view"),
    ],
)
def test_a_bad_cache_section_is_named(cache, named, tmp_path):
    with pytest.raises(UserError, match=re.escape(named)):
        parse_config(classify(tmp_path) | {"cache": cache})


def test_a_limit_is_read_in_bytes(tmp_path):
    assert number_of_bytes("limit", "1.5GiB") == 1.5 * 2**30 and number_of_bytes("limit", "3 MB") == 3e6
    assert number_of_bytes("limit", 7) == 7
    assert parse_config(classify(tmp_path) | {"cache": True}).cache.views == 1


def test_a_cache_of_a_method_that_changes_the_backbone_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cache: .* lora"):
        parse_config(classify(tmp_path) | {"cache": True, "method": "lora"})
    parse_config(classify(tmp_path) | {"cache": {"storage": "none"}, "method": "lora"})


def test_a_sweep_trains_every_combination_on_one_store_and_ranks_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("E3VA_CACHE", str(tmp_path / "own"))
    values = classify(tmp_path, num_train_epochs=1) | {"cache": True}
    values["sweep"] = {"learning_rate": [1e-3, 1e-2], "seed": [0, 1]}
    result = sweep(parse_config(values))
    assert len(list(tmp_path.glob("own/frozen/*"))) == 2  # of the two splits
    names = [f"learning_rate={rate},seed={seed}" for rate in (0.001, 0.01) for seed in (0, 1)]
    assert sorted(result["runs"]) == sorted(names)
    assert list(result["runs"].values()) == sorted(result["runs"].values(), reverse=True)
    for name in names:
        record = json.loads((tmp_path / "run" / name / "metrics.json").read_text())
        assert record["metrics"]["accuracy"] == result["runs"][name]
    assert json.loads((tmp_path / "run" / "sweep.json").read_text()) == result
    assert f"[2/4] {names[1]}\n" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run/*/metrics.json")}
    assert sweep(parse_config(values)) == result  # nothing is trained again
    assert f"[2/4] {names[1]}: trained before" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    next((tmp_path / "colors" / "test" / "red").iterdir()).unlink()
    with pytest.raises(UserError, match=r"its scores are of .*8 images .* now has .*7 images"):
        sweep(parse_config(values))


def test_a_sweep_ranks_nan_last_refuses_nothing_but_nan_and_to_push(tmp_path, monkeypatch):
    values = classify(tmp_path, num_train_epochs=1) | {"sweep": {"seed": [0, 1, 2]}}
    with pytest.raises(UserError, match=r"training\.push_to_hub: every run of a sweep"):
        sweep(parse_config(values | {"training": values["training"] | {"push_to_hub": True, "hub_model_id": "a/b"}}))
    (tmp_path / "run").mkdir()
    found = iter([None, 0.5, 0.7, None, None, None])
    monkeypatch.setattr("e3va_peft.training.run.train", lambda *_: {"metrics": {"accuracy": next(found)}})
    runs = sweep(parse_config(values))["runs"]
    assert list(runs) == ["seed=2", "seed=1", "seed=0"] and "NaN" not in (tmp_path / "run" / "sweep.json").read_text()
    with pytest.raises(UserError, match="accuracy: is nan in every run"):
        sweep(parse_config(values))


def test_a_sweep_without_anything_to_rank_by_is_named_before_anything_is_trained(tmp_path):
    values = classify(tmp_path) | {"sweep": {"seed": [0, 1]}}
    shutil.rmtree(tmp_path / "colors" / "test")
    with pytest.raises(UserError, match=r"sweep: .*data\.eval_split"):
        sweep(parse_config(values))
    assert not (tmp_path / "run").exists()


def test_a_sweep_takes_fields_of_the_run_of_its_method_and_of_training_in_any_order(tmp_path):
    (tmp_path / "run.yaml").write_text(json.dumps(classify(tmp_path)))
    options = ["sweep.method=[lora, e3va]", "sweep.method.r=[2, 4]", "sweep.seed=[1]"]
    runs = runs_of(read_config(tmp_path / "run.yaml", options))
    assert list(runs)[:2] == ["method=lora,r=2,seed=1", "method=lora,r=4,seed=1"]
    combinations = [{"name": name, "r": rank} for name in ("lora", "e3va") for rank in (2, 4)]
    assert [run.method for run in runs.values()] == combinations and {run.seed for run in runs.values()} == {1}
    turned = runs_of(read_config(tmp_path / "run.yaml", options[::-1]))
    assert {name: run.method["r"] for name, run in turned.items()} == {
        f"seed=1,r={rank},method={name}": rank for name in ("lora", "e3va") for rank in (2, 4)
    }


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"learning_rate": 1e-3}, "sweep.learning_rate"),
        ({"learning_rate": []}, "sweep.learning_rate"),
        ({"learning_rte": [1]}, "sweep.learning_rte: .*learning_rate"),
        ({"lr": [1]}, "sweep.lr: .*It is called sweep.learning_rate"),
        ({"method.rr": [1]}, "method.rr"),
        ({"output": ["a", "b"]}, "sweep.output"),
    ],
)
def test_a_bad_sweep_is_named_before_anything_is_trained(fields, named, tmp_path):
    values = classify(tmp_path) | {"sweep": fields}
    with pytest.raises(UserError, match=named):
        sweep(parse_config(values))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["swin-classifier", "dinov2-classifier"])
def test_the_plan_predicts_the_bytes_of_an_image(name):
    case, method = BY_NAME[name], {"name": "e3va", "r": 4}
    step = FakeStep(case.build, partial(adapt, method=method), "image-classification", case.size[0], None, "cpu")
    expected = cached_image(step).bytes
    found = {}
    for storage in expected:
        model = adapt(case.base(), method | {"tap_storage": "int4" if storage == "int4" else "exact"})
        found[storage] = cached(Images(case), model, storage=storage)[0][RECORD].numel()
    assert found == expected
