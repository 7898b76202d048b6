"""Heads that are trained whole: where the base's own head is meanwhile, and that it comes back."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from peft.utils.save_and_load import get_base_model_state_dict, set_base_model_state_dict
from torch import nn

from e3va_peft import E3VAConfig
from e3va_peft.meter import measure_step
from e3va_peft.methods import adapt
from e3va_peft.saved import FILE_FROM, SavedModule
from tests.helpers import assert_same, outputs
from tests.models import BY_NAME, every_model, train_steps

OWN = BY_NAME["swin-in-own-head"]


def with_head(width: int = 1024, seed: int = 0) -> nn.Module:
    """A model whose head of `width` channels has weights and running statistics: at 1024 of 150 KiB."""
    model = OWN.base(seed)
    model.head = nn.Sequential(nn.Linear(32, width), nn.BatchNorm1d(width), nn.Linear(width, 3))
    model.head[1].running_mean.normal_()
    return model.eval()


def adapted(width: int = 1024) -> PeftModel:
    return get_peft_model(with_head(width), E3VAConfig(r=4))


def wrapper_of(model: PeftModel, name: str = "head") -> SavedModule:
    return model.get_base_model().get_submodule(name)


def base_outputs(model: nn.Module) -> dict[str, torch.Tensor]:
    with model.disable_adapter():
        return outputs(model, OWN.batch())


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def bytes_of(model: nn.Module) -> int:
    """Bytes of the storages of parameters and buffers, each once."""
    storages = {id(s): s for t in (*model.parameters(), *model.buffers()) for s in [t.untyped_storage()]}
    return sum(storage.nbytes() for storage in storages.values())


def in_anonymous_memory() -> int:
    """Bytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


@every_model
def test_no_tensor_of_the_base_is_among_those_of_a_model_whose_adapter_trains_a_copy_of_it(case):
    base = case.base()
    before = bytes_of(base)
    model = get_peft_model(base, E3VAConfig(r=4))
    own = sum(
        t.untyped_storage().nbytes()
        for name, t in (*model.named_parameters(), *model.named_buffers())
        if "e3va_highway" in name or "e3va_tail" in name
    )
    assert bytes_of(model) == before + own
    assert not [name for name, _ in model.named_parameters() if "original_module" in name]


def test_the_peak_of_a_step_holds_one_head_as_that_of_the_head_alone():
    reports = []
    for method in ({"name": "e3va", "r": 4}, {"name": "head-only"}):
        torch.manual_seed(0)
        model = adapt(with_head(65536), method)
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        reports.append(measure_step(model, OWN.training_batch(), optimizer, repeats=1))
    ours, alone = reports
    assert ours.peak_bytes < 1.02 * alone.peak_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_base_s_head_takes_no_memory_of_the_process():
    model = OWN.base()
    model.head = nn.Sequential(nn.Linear(32, 2**19), nn.Linear(2**19, 3))  # 64 + 6 MiB, and 2 of biases
    gc.collect()  # what earlier tests left
    before = in_anonymous_memory()
    model = get_peft_model(model, E3VAConfig(r=4))
    gc.collect()
    grown = in_anonymous_memory() - before
    assert grown < 16 * 2**20  # the copy has taken the place of the original
    copy.deepcopy(wrapper_of(model).original_module)  # which can be read all the same


@pytest.fixture
def files(monkeypatch) -> list[int]:
    """An entry for each temporary file that is made."""
    made: list[int] = []
    real = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *args, **kwargs: made.append(1) or real(*args, **kwargs))
    return made


def test_a_small_module_waits_in_memory_and_a_large_one_in_a_file(files):
    per_channel = 4 * (32 + 1 + 4 + 3)
    width = (FILE_FROM - 8 - 12) // per_channel  # 8 bytes count batches, 12 are the last biases
    adapted(width)
    assert not files
    adapted(width + 1)
    assert len(files) == 1


@pytest.mark.parametrize("width", [8, 1024], ids=["in memory", "in a file"])
def test_disabled_after_training_the_model_computes_what_the_base_computed_to_the_bit(width):
    base = with_head(width)
    expected, weights = outputs(base, OWN.batch()), values(base.head)
    model = get_peft_model(base, E3VAConfig(r=4))
    train_steps(model, OWN.training_batch())
    trained = outputs(model, OWN.batch())
    for _ in range(2):
        assert_same(base_outputs(model), expected, rtol=0, atol=0)
        assert_same(values(wrapper_of(model).original_module), weights, rtol=0, atol=0)
        assert_same(outputs(model, OWN.batch()), trained, rtol=0, atol=0)
    assert not torch.equal(trained["logits"], expected["logits"])


def test_while_disabled_the_base_is_a_part_of_the_model_again():
    model = adapted()
    with model.disable_adapter():
        names = dict(model.named_parameters())
        assert "base_model.model.head.original_module.0.weight" in names
    assert "base_model.model.head.original_module.0.weight" not in dict(model.named_parameters())


def test_disabled_under_inference_mode_it_can_be_trained_afterwards():
    model = adapted()
    expected = base_outputs(model)
    with torch.inference_mode():
        assert_same(base_outputs(model), expected, rtol=0, atol=0)
    train_steps(model, OWN.training_batch(), steps=1)
    assert_same(base_outputs(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True])
def test_the_base_comes_back_in_the_mode_of_its_copy(training):
    model = adapted().train(training)
    wrapper_of(model).modules_to_save["default"][1].eval()  # a batch norm kept still by hand
    with model.disable_adapter():
        assert wrapper_of(model).original_module[0].training is training
        assert wrapper_of(model).original_module[1].training is False


def test_statistics_that_the_base_gathers_while_disabled_are_kept():
    model = adapted().train()
    before = values(wrapper_of(model).original_module)
    with model.disable_adapter():
        model(**OWN.training_batch())
        gathered = values(wrapper_of(model).original_module)
    assert not torch.equal(before["1.running_mean"], gathered["1.running_mean"])
    assert_same(values(wrapper_of(model).original_module), gathered, rtol=0, atol=0)


@every_model
def test_the_state_dict_has_the_keys_and_values_that_peft_gives_it(case):
    model = get_peft_model(case.base(), E3VAConfig(r=4))
    waiting = values(model)
    with model.disable_adapter():
        present = values(model)
    assert list(waiting) == list(present)
    assert_same(waiting, present, rtol=0, atol=0)
    base = case.base().state_dict()
    assert_same(get_base_model_state_dict(model), base, rtol=0, atol=0)


@pytest.mark.parametrize("assign", [False, True])
def test_a_full_state_dict_goes_into_a_model_whose_base_waits(assign):
    source, target = adapted(), get_peft_model(with_head(seed=1), E3VAConfig(r=4))
    train_steps(source, OWN.training_batch())
    assert not torch.equal(base_outputs(source)["logits"], base_outputs(target)["logits"])
    before = bytes_of(target)
    result = target.load_state_dict(source.state_dict(), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert bytes_of(target) == before
    assert_same(outputs(target, OWN.batch()), outputs(source, OWN.batch()), rtol=0, atol=0)
    assert_same(base_outputs(target), base_outputs(source), rtol=0, atol=0)


def test_numbers_that_are_loaded_go_to_a_new_file(files):
    model = adapted()
    model.load_state_dict(model.state_dict())
    assert len(files) == 2


def test_a_state_dict_without_the_base_is_found_incomplete():
    model = adapted()
    partial = {key: value for key, value in model.state_dict().items() if "original_module" not in key}
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.original_module\.0\.weight"):
        model.load_state_dict(partial)
    assert wrapper_of(model).original_module[0].weight.shape == (1024, 32)
    train_steps(model, OWN.training_batch(), steps=1)


def test_the_base_s_own_state_dict_goes_in_and_comes_out():
    model, other = adapted(), with_head(seed=1).state_dict()
    set_base_model_state_dict(model, other)
    assert_same(get_base_model_state_dict(model), other, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_change_of_dtype_reaches_the_base_that_waits(dtype):
    model = adapted()
    expected = {k: v.to(dtype) for k, v in values(wrapper_of(model).original_module).items() if v.is_floating_point()}
    before = bytes_of(model)
    model.to(dtype)
    found = {k: v for k, v in values(wrapper_of(model).original_module).items() if v.is_floating_point()}
    assert_same(found, expected, rtol=0, atol=0)
    assert values(wrapper_of(model).original_module)["1.num_batches_tracked"].dtype == torch.int64
    assert bytes_of(model) < before or dtype == torch.float64
    with model.disable_adapter():
        assert wrapper_of(model).original_module[0].weight.dtype == dtype


def test_the_base_comes_back_in_the_memory_format_of_its_copy():
    base = BY_NAME["swin-maps-in-own-head"].base()
    model = get_peft_model(base, E3VAConfig(r=4, modules_to_save=["lateral.0"]))
    wrapper = wrapper_of(model, "lateral.0")
    before = values(wrapper.original_module)
    model.to(memory_format=torch.channels_last)
    copy = wrapper.modules_to_save["default"].weight
    assert copy.stride() != wrapper.original_module.weight.stride()
    with model.disable_adapter():
        assert copy.stride() == wrapper.original_module.weight.stride()
        assert_same(values(wrapper.original_module), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "through",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("width", [8, 1024], ids=["in memory", "in a file"])
def test_a_copy_has_a_base_of_its_own(through, width):
    model = adapted(width)
    again = through(model)
    assert bytes_of(again) == bytes_of(model)
    expected = base_outputs(model)
    assert_same(base_outputs(again), expected, rtol=0, atol=0)
    with torch.no_grad():
        wrapper_of(again).original_module[0].weight.zero_()
    assert_same(base_outputs(model), expected, rtol=0, atol=0)
    assert not torch.equal(base_outputs(again)["logits"], expected["logits"])


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_whole_model_goes_through_torch_save(new):
    model = adapted()
    buffer = io.BytesIO()
    torch.save(model, buffer, _use_new_zipfile_serialization=new)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False).eval()
    assert_same(base_outputs(again), base_outputs(model), rtol=0, atol=0)
    assert_same(outputs(again, OWN.batch()), outputs(model, OWN.batch()), rtol=0, atol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_copy_s_base_goes_back_to_a_file_when_its_training_begins():
    model = OWN.base()
    model.head = nn.Sequential(nn.Linear(32, 2**19), nn.Linear(2**19, 3))
    again = copy.deepcopy(get_peft_model(model, E3VAConfig(r=4)))
    before = in_anonymous_memory()
    again.train()
    assert in_anonymous_memory() < before - 32 * 2**20


def test_a_second_adapter_begins_with_the_base_s_head():
    model = adapted()
    expected = values(wrapper_of(model).original_module)
    train_steps(model, OWN.training_batch())
    model.add_adapter("second", E3VAConfig(r=2))
    assert_same(values(wrapper_of(model).modules_to_save["second"]), expected, rtol=0, atol=0)
    assert not any("original_module" in name for name, _ in model.named_parameters())


def test_a_copy_of_the_base_in_its_half_is_in_its_half():
    model = adapted().half()
    wrapper_of(model).modules_to_save["default"].float()
    model.add_adapter("second", E3VAConfig(r=2))
    assert wrapper_of(model).modules_to_save["second"][0].weight.dtype == torch.float16
    with model.disable_adapter():
        assert wrapper_of(model).original_module[0].weight.dtype == torch.float16


def test_where_the_active_adapter_has_no_head_the_base_s_is_present_and_runs():
    model = adapted()
    expected = base_outputs(model)["logits"]
    train_steps(model, OWN.training_batch())
    model.add_adapter("lanes", E3VAConfig(r=2, modules_to_save=[]))
    model.set_adapter("lanes")
    assert any("original_module" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(outputs(model, OWN.batch())["logits"], expected, rtol=1e-5, atol=1e-6)
    model.set_adapter("default")
    assert not any("original_module" in name for name, _ in model.named_parameters())


def test_the_base_s_head_is_whole_once_the_last_adapter_is_deleted_and_once_unloaded():
    base = with_head()
    expected, weights = outputs(base, OWN.batch()), values(base.head)
    model = get_peft_model(base, E3VAConfig(r=4))
    train_steps(model, OWN.training_batch())
    model.add_adapter("lanes", E3VAConfig(r=2, modules_to_save=[]))
    model.set_adapter("lanes")
    model.delete_adapter("default")
    unloaded = model.unload()
    assert type(unloaded.head) is nn.Sequential
    assert_same(values(unloaded.head), weights, rtol=0, atol=0)
    torch.testing.assert_close(outputs(unloaded, OWN.batch())["logits"], expected["logits"])
    unloaded.head[0].weight.untyped_storage().resize_(0)  # memory of its own, and no file's


def test_unloading_keeps_the_trained_head_alone():
    model = adapted()
    train_steps(model, OWN.training_batch())
    trained = values(wrapper_of(model).modules_to_save["default"])
    assert_same(values(model.unload().head), trained, rtol=0, atol=0)


@pytest.mark.parametrize("saved", [["head"], ["head", "other"], ["other", "head"]], ids=", ".join)
def test_a_tensor_that_the_rest_of_the_model_uses_too_stays_where_it_is(saved):
    base = with_head()
    base.other = nn.Linear(32, 1024)
    base.other.weight = weight = base.head[0].weight
    pointer = weight.data_ptr()
    model = get_peft_model(base, E3VAConfig(r=4, modules_to_save=saved))
    original = wrapper_of(model).original_module
    assert original[0].weight is weight and weight.data_ptr() == pointer
    model.half()
    with model.disable_adapter():
        assert original[0].weight is weight
        assert weight.dtype == original[2].weight.dtype == torch.float16


def test_tensors_that_are_shared_within_the_head_stay_shared():
    base = with_head()
    base.head[0] = nn.Sequential(nn.Linear(32, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 1024))
    base.head[0][2].weight = base.head[0][1].weight
    model = get_peft_model(base, E3VAConfig(r=4))
    original = wrapper_of(model).original_module
    for _ in range(2):
        assert original[0][2].weight is original[0][1].weight
        base_outputs(model)


def test_a_head_on_meta_is_made_real_with_its_model():
    with torch.device("meta"):
        model = get_peft_model(with_head_on_meta(), E3VAConfig(r=4))
    assert not any("original_module" in name for name, _ in model.named_parameters())
    model.to_empty(device="cpu")
    assert not wrapper_of(model).original_module[0].weight.is_meta
    source = adapted()
    model.load_state_dict(source.state_dict())
    found, expected = wrapper_of(model).original_module, wrapper_of(source).original_module
    assert_same(values(found), values(expected), rtol=0, atol=0)


def with_head_on_meta() -> nn.Module:
    model = OWN.build().eval()
    model.head = nn.Sequential(nn.Linear(32, 1024), nn.BatchNorm1d(1024), nn.Linear(1024, 3)).eval()
    return model


def test_what_is_no_plain_tensor_is_kept_as_peft_keeps_it():
    class Wrapped(nn.Parameter):
        pass

    base = with_head()
    base.head[0].weight = Wrapped(base.head[0].weight.detach())
    model = get_peft_model(base, E3VAConfig(r=4))
    assert "base_model.model.head.original_module.0.weight" in dict(model.named_parameters())
    base_outputs(model)


def test_no_file_is_left_while_or_after_a_model_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = adapted()
    train_steps(model, OWN.training_batch(), steps=1)
    base_outputs(model)
    if sys.platform != "win32":
        assert not list(tmp_path.iterdir())
    del model
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_handle_is_left_after_a_model():
    gc.collect()
    handles = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        model = adapted().half().float()
        base_outputs(model)
        copy.deepcopy(model).train()
    del model
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == handles


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_base_takes_no_memory_of_a_gpu_and_comes_back_to_it():
    model = adapted()
    expected = values(wrapper_of(model).original_module)
    model.to("cuda")
    before = torch.cuda.memory_allocated()
    with model.disable_adapter():
        original = wrapper_of(model).original_module
        assert {t.device.type for t in (*original.parameters(), *original.buffers())} == {"cuda"}
        assert torch.cuda.memory_allocated() > before
    assert torch.cuda.memory_allocated() == before
    assert {t.device.type for t in (*original.parameters(), *original.buffers())} == {"cpu"}
    assert_same(values(original), expected, rtol=0, atol=0)


def test_without_a_place_for_a_file_the_base_waits_in_memory_and_says_so_once(monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.warns(UserWarning, match=r"0\.2 MiB.*No space left on device.*TMPDIR"):
        model = adapted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()
        model.eval()
    assert_same(base_outputs(model), outputs(with_head(), OWN.batch()), rtol=0, atol=0)


def test_it_is_peft_s_wrapper_to_all_who_ask():
    model = adapted()
    assert isinstance(wrapper_of(model), ModulesToSaveWrapper)
    assert model.get_nb_trainable_parameters()[1] == sum(p.numel() for p in model.parameters())
    status = next(s for s in model.get_layer_status() if s.module_type == "SavedModule")
    assert status.available_adapters == ["default"] and status.enabled
