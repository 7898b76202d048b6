"""A frozen base with quantised weights: it needs no gradient, so it can be int8 (torchao) or 4 bits (bitsandbytes)."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import BitsAndBytesConfig, TorchAoConfig, Trainer

import e3va_peft
from e3va_peft import E3VAConfig, E3VALayer
from e3va_peft.meter import backbone_share, measure_step
from e3va_peft.training import training_arguments
from tests.helpers import assert_same, outputs
from tests.models import BY_NAME, Case, loss_of, train_steps


def four_bit(spared: list[str] | None) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=spared)


METHODS = {
    "int8": lambda spared: TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=spared),
    "int8-dynamic": lambda spared: TorchAoConfig(
        Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=spared
    ),
    "4-bit": four_bit,
}
HEAD = ["classifier"]
every_method = pytest.mark.parametrize("method", METHODS)
every_family = pytest.mark.parametrize(
    "case", [BY_NAME[f"{family}-classifier"] for family in ("swin", "vit", "dinov2")], ids=lambda case: case.family
)


STORED = [{}, {"tap_storage": "int8"}, {"tap_storage": "recompute", "live_blocks": 1}]


@pytest.fixture(autouse=True)
def no_packing(monkeypatch):
    # On CPUs with bf16 instructions bitsandbytes packs weights for inference, in blocks of 32 rows: these have fewer.
    # 0.48 has no such packing.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, raising=False)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load a case's base model as users do, from a folder of full-precision weights."""
    root = tmp_path_factory.mktemp("bases")

    def load(case: Case, quantization_config=None, **kwargs) -> nn.Module:
        folder = root / case.name
        if not folder.exists():
            case.base().save_pretrained(folder)
        return type(case.base()).from_pretrained(folder, quantization_config=quantization_config, **kwargs).eval()

    return load


def inner(tensor: Tensor) -> Iterator[Tensor]:
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from inner(getattr(tensor, name))
    else:
        yield tensor


def is_quantized(parameter: Tensor) -> bool:
    return is_traceable_wrapper_subclass(parameter) or not parameter.is_floating_point()


def quantized_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if is_quantized(parameter)]


@every_family
@every_method
def test_adapted_model_equals_the_quantised_base_at_init_to_the_bit(case, method, load):
    base, original = load(case, METHODS[method](HEAD)), load(case, METHODS[method](HEAD))
    assert len(quantized_names(base)) >= 6 * len(case.blocks)
    model = get_peft_model(base, E3VAConfig(r=4)).eval()
    assert_same(outputs(model, case.batch()), outputs(original, case.batch()), rtol=0, atol=0)
    assert backbone_share(model) == backbone_share(get_peft_model(load(case), E3VAConfig(r=4)))


@every_family
@every_method
@pytest.mark.parametrize("options", STORED, ids=str)
def test_training_changes_the_highway_and_the_head_only(case, method, options, load):
    config = E3VAConfig(r=4, init_weights=False, **options)
    model = get_peft_model(load(case, METHODS[method](HEAD)), config)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: [plain.clone() for plain in inner(p)] for name, p in frozen.items()}
    batch = case.training_batch()
    first = loss_of(model.eval()(**batch)).item()
    train_steps(model, batch, steps=4, lr=0.1)
    assert loss_of(model(**batch)).item() < first
    # Stages before patch merging too: a dynamically quantised layer lets no gradient through.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("e3va_" in name or ".modules_to_save." in name for name in trained)
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    assert all(p.grad is None for p in frozen.values())
    for name, parameter in frozen.items():
        assert all(torch.equal(*pair) for pair in zip(before[name], inner(parameter), strict=True)), name


@every_family
@every_method
def test_round_trip_onto_a_freshly_quantised_base_is_equal_to_the_bit(case, method, load, tmp_path):
    model = get_peft_model(load(case, METHODS[method](HEAD)), E3VAConfig(r=4))
    train_steps(model, case.training_batch())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) == model.get_nb_trainable_parameters()[0]
    assert {value.dtype for value in saved.values()} == {torch.float32}
    again = PeftModel.from_pretrained(load(case, METHODS[method](HEAD)), tmp_path)
    for other in (again, copy.deepcopy(model)):
        assert_same(outputs(other, case.batch()), outputs(model, case.batch()), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["int8", "4-bit"])
def test_load_adapter_quantises_the_base_when_asked(method, load, tmp_path):
    case = BY_NAME["swin-classifier"]
    model = get_peft_model(load(case, METHODS[method](HEAD)), E3VAConfig(r=4, init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "base_config.json").read_text())
    assert "pass the same `quantization_config` to `load_adapter`" in (tmp_path / "README.md").read_text()
    again, _ = e3va_peft.load_adapter(tmp_path, quantization_config=METHODS[method](HEAD))
    assert_same(outputs(again, case.batch()), outputs(model, case.batch()), rtol=0, atol=0)
    plain, _ = e3va_peft.load_adapter(tmp_path)  # needs neither library
    assert not quantized_names(plain)
    assert_same(outputs(plain, case.batch()), outputs(model, case.batch()), rtol=0.5, atol=0.5)


@pytest.mark.parametrize(("before", "now"), [("int8", None), (None, "4-bit"), ("int8", "4-bit")])
def test_a_quantised_base_of_other_weights_is_known_by_its_norms_and_biases(before, now, load, tmp_path):
    case = BY_NAME["swin-classifier"]
    config = {name: METHODS[name](HEAD) for name in (before, now) if name}
    get_peft_model(load(case, config.get(before)), E3VAConfig(r=4)).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(load(case, config.get(now)), tmp_path)
    other = load(case, config.get(now))
    with torch.no_grad():
        next(p for name, p in other.named_parameters() if "layernorm_before.bias" in name).add_(1)
    with pytest.raises(ValueError, match="trained on the backbone weights"):
        PeftModel.from_pretrained(other, tmp_path)


def test_a_base_that_is_stored_quantised_is_rebuilt_as_it_is(load, tmp_path):
    case = BY_NAME["swin-classifier"]
    load(case, METHODS["int8"](HEAD)).save_pretrained(tmp_path / "base")
    base = type(case.base()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, E3VAConfig(r=4, init_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    again, _ = e3va_peft.load_adapter(tmp_path / "adapter")
    assert quantized_names(again) == quantized_names(model) != []
    assert_same(outputs(again, case.batch()), outputs(model, case.batch()), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["int8", "4-bit"])
def test_the_trainer_takes_a_quantised_base(method, load, tmp_path):
    case = BY_NAME["swin-classifier"]
    model = get_peft_model(load(case, METHODS[method](HEAD)), E3VAConfig(r=4))
    images = case.batch(4)["pixel_values"]
    data = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images)]
    arguments = training_arguments(tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert trainer.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bf16_base_is_quantised_too(dtype, load):
    case = BY_NAME["swin-classifier"]
    base, original = (load(case, METHODS["int8"](HEAD), dtype=dtype) for _ in range(2))
    batch = {key: value.to(dtype) for key, value in case.batch().items()}
    model = get_peft_model(base, E3VAConfig(r=4)).eval()
    assert {p.dtype for p in model.get_submodule("base_model.model.swin.encoder").e3va_highway.parameters()} == {
        torch.float32
    }
    assert_same(outputs(model, batch), outputs(original, batch), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["int8", "4-bit"])
def test_a_quantised_head_is_refused_before_anything_is_changed(method, load):
    case = BY_NAME["vit-classifier"]
    everything = METHODS[method]([] if method == "4-bit" else None)  # transformers' default spares the bias only
    base = load(case, everything)
    before = [(name, type(module), len(module._forward_hooks)) for name, module in base.named_modules()]
    with pytest.raises(
        ValueError, match=r"modules_to_save=\['classifier'\].*classifier\.weight.*not_convert=\['classifier'\]"
    ):
        get_peft_model(base, E3VAConfig())
    assert before == [(name, type(module), len(module._forward_hooks)) for name, module in base.named_modules()]
    assert not any(isinstance(module, E3VALayer) for module in base.modules())
    model = get_peft_model(base, E3VAConfig(modules_to_save=[]))
    assert_same(outputs(model, case.batch()), outputs(load(case, everything), case.batch()), rtol=0, atol=0)


@pytest.mark.parametrize("how", ["torchao itself", "4-bit"])  # transformers' way to torchao fails on UperNet
def test_a_head_of_convolutions_needs_no_exception(how, load):
    case = BY_NAME["swin-upernet"]
    base = load(case, None if how == "torchao itself" else METHODS[how](None))
    if how == "torchao itself":
        quantize_(base.backbone, Int8WeightOnlyConfig())
    original = copy.deepcopy(base)
    model = get_peft_model(base, E3VAConfig(r=4)).eval()
    assert quantized_names(model) and not any(".modules_to_save." in name for name in quantized_names(model))
    assert_same(outputs(model, case.batch()), outputs(original, case.batch()), rtol=0, atol=0)
    train_steps(model, case.training_batch(), steps=1)


def test_patch_merging_that_rounds_its_input_is_refused(load):
    case = BY_NAME["swin-classifier"]
    base = load(case, BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=HEAD))
    with pytest.raises(ValueError, match=r"llm_int8_skip_modules=\['swin\.encoder\.layers\.0\.downsample'"):
        get_peft_model(base, E3VAConfig())
    spared = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[*HEAD, ".*downsample"])
    model = get_peft_model(load(case, spared), E3VAConfig(r=4)).eval()
    assert_same(outputs(model, case.batch()), outputs(load(case, spared), case.batch()), rtol=0, atol=0)


def test_the_meter_counts_what_a_quantised_weight_holds():
    linear = nn.Linear(64, 32, bias=False)
    quantize_(linear, Int8WeightOnlyConfig())
    linear.requires_grad_(False)
    held = sum(plain.nbytes for plain in inner(linear.weight))
    assert held == 64 * 32 + 32 * (4 + 1)  # int8, an fp32 scale and an int8 zero point per row
    model = nn.Sequential(linear, nn.Linear(32, 4))
    before = [plain.clone() for plain in inner(linear.weight)]
    batch = torch.randn(8, 64)
    report = measure_step(model, batch, torch.optim.SGD(model[1].parameters()), loss_fn=torch.sum, repeats=1)
    assert report.peak_parameters == held + (32 * 4 + 4) * 4
    assert report.saved_bytes == 8 * 32 * 4  # the second layer's input, and nothing of the frozen layer
    assert all(torch.equal(*pair) for pair in zip(before, inner(linear.weight), strict=True))


@pytest.mark.parametrize("method", ["int8", "4-bit"])
def test_the_frozen_weights_of_a_step_shrink_by_the_expected_bytes(method, load):
    case = BY_NAME["vit-classifier"]

    def parameters(quantization_config) -> int:
        model = get_peft_model(load(case, quantization_config), E3VAConfig(r=4))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        return measure_step(model, case.training_batch(), optimizer, repeats=1).peak_parameters

    plain = dict(load(case).named_parameters())
    weights = [plain[name] for name in quantized_names(load(case, METHODS[method](HEAD)))]
    expected = {
        "int8": sum(w.numel() + 5 * w.shape[0] for w in weights),  # and an fp32 scale and an int8 zero point per row
        "4-bit": sum(w.numel() // 2 + 4 * (w.numel() // 64) + 4 * 16 for w in weights),  # fp32 scale per 64, a code
    }
    saved = sum(4 * w.numel() for w in weights) - expected[method]
    assert parameters(None) - parameters(METHODS[method](HEAD)) == saved
