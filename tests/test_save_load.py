"""Through the disk and back."""

from __future__ import annotations

import copy
import json
import re
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from packaging.version import Version
from peft import AutoPeftModel, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    BitImageProcessor,
    Dinov2Backbone,
    SwinForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import logging

import e3va_peft
from e3va_peft import E3VAConfig
from e3va_peft.config import RELEASE
from e3va_peft.refusals import backbone_fingerprint
from tests.helpers import assert_same, layers, outputs, pickle_weights
from tests.models import BY_NAME, STAGES, SWIN, Case, dinov2_config, every_model, registered, train_steps

CLASSIFIERS = [
    "swin-classifier",
    "vit-classifier",
    "deit-classifier",
    "dinov2-classifier",
    "dinov2-registers-classifier",
]
TRANSFORMERS = [*CLASSIFIERS, "swin-upernet", "swin-mask2former", "dinov2-upernet"]


def trained(case, adapter_name: str = "default") -> PeftModel:
    model = get_peft_model(case.base(), E3VAConfig(r=4), adapter_name=adapter_name)
    train_steps(model, case.training_batch())
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[Case], tuple[PeftModel, Path]]:
    """A trained adapter of any model and the folder it was saved in, made once and to be read only."""

    @cache
    def of(case: Case) -> tuple[PeftModel, Path]:
        model, folder = trained(case, adapter_name="nuclei"), tmp_path_factory.mktemp(case.name)
        model.save_pretrained(folder)
        return model, folder / "nuclei"

    return of


def exactly(case) -> dict[str, float]:
    """To the bit, but where kernels depend on whether weights want a gradient, or on where they lie in memory."""
    convolutions = ("upernet", "retinanet", "cascade", "mask2former", "maps", "own-head", "features")
    return {"rtol": 1e-4, "atol": 1e-5} if case.name.endswith(convolutions) else {"rtol": 0, "atol": 0}


@every_model
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_round_trip_through_disk_under_another_name_is_equal_to_the_bit(case, saved, low_cpu_mem_usage):
    model, folder = saved(case)
    assert {p.name for p in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert not list(folder.rglob("*.bin"))
    keys = load_file(folder / "adapter_model.safetensors").keys()
    assert keys and not any("nuclei" in key or "base_layer" in key for key in keys)
    again = PeftModel.from_pretrained(case.base(), folder, adapter_name="renamed", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(p.is_meta for p in again.parameters())
    assert not any(p.requires_grad for p in again.parameters())
    trained_weights = {name.replace(".nuclei.", ".renamed."): p for name, p in model.named_parameters()}
    assert_same(dict(again.named_parameters()), trained_weights, rtol=0, atol=0)
    assert_same(outputs(again, case.batch()), outputs(model, case.batch()), **exactly(case))


@every_model
def test_only_the_adapter_is_saved(case, saved):
    model, folder = saved(case)
    size = sum(value.numel() for value in load_file(folder / "adapter_model.safetensors").values())
    buffers = sum(
        b.numel() for name, b in model.named_buffers() if ".modules_to_save.nuclei." in name and "relative" not in name
    )
    assert size <= model.get_nb_trainable_parameters()[0] + buffers


@every_model
def test_config_names_what_was_trained_in_full(case, saved):
    _, folder = saved(case)
    written = json.loads((folder / "adapter_config.json").read_text())
    names = dict(case.base().named_modules())
    assert written["peft_type"] == "E3VA" and written["modules_to_save"] and written["target_modules"]
    methods = registered(case.family).methods
    targets = [
        name.removesuffix(f"{method}").rstrip(".") for name in written["target_modules"] for method in methods[:1]
    ]
    assert all(name in names for name in (*written["modules_to_save"], *(targets or written["target_modules"])))
    assert PeftConfig.from_pretrained(folder).taps == tuple(registered(case.family).branches)


@every_model
def test_training_continues_after_loading(case, saved):
    model, folder = saved(case)
    again = PeftModel.from_pretrained(case.base(), folder, is_trainable=True)
    assert again.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    before = outputs(again.eval(), case.batch())
    train_steps(again, case.training_batch(), steps=1)
    after = outputs(again, case.batch())
    assert any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_own_load_adapter(name, tmp_path):
    case = BY_NAME[name]
    model = trained(case)
    model.save_pretrained(tmp_path)
    plain = case.base()
    plain.load_adapter(str(tmp_path), adapter_name="renamed")
    assert_same(outputs(plain.eval(), case.batch()), outputs(model, case.batch()), **exactly(case))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_auto_classes_load_an_adapter_folder(name, tmp_path):
    case = BY_NAME[name]
    case.base().save_pretrained(tmp_path / "base")
    base = type(case.base()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, E3VAConfig(r=4))
    train_steps(model, case.training_batch())
    model.save_pretrained(tmp_path / "adapter")
    expected = outputs(model, case.batch())
    by_transformers = AutoModelForImageClassification.from_pretrained(tmp_path / "adapter")
    by_peft = AutoPeftModel.from_pretrained(tmp_path / "adapter", adapter_name="renamed")
    for again in (by_transformers, by_peft):
        assert_same(outputs(again.eval(), case.batch()), expected, rtol=0, atol=0)


@pytest.fixture
def pretrained(tmp_path):
    """A 'Hub' model with 5 classes and an image processor, as a folder."""
    torch.manual_seed(0)
    config = BY_NAME["swin-classifier"].base().config
    config.num_labels = 5
    SwinForImageClassification(config).save_pretrained(tmp_path / "pretrained")
    BitImageProcessor(size={"shortest_edge": 32}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


def test_label_map_and_processor_travel_and_one_call_rebuilds_everything(pretrained, tmp_path):
    case = BY_NAME["swin-classifier"]
    labels = {0: "cat", 1: "dog", 2: "owl"}
    base = SwinForImageClassification.from_pretrained(
        pretrained,
        num_labels=3,
        id2label=labels,
        label2id={v: k for k, v in labels.items()},
        ignore_mismatched_sizes=True,
    )
    model = get_peft_model(base, E3VAConfig(r=4))
    train_steps(model, case.training_batch())
    model.save_pretrained(tmp_path / "adapter")
    again, processor = e3va_peft.load_adapter(tmp_path / "adapter")
    assert again.config.id2label == labels
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
    assert not again.training
    assert_same(outputs(again, case.batch()), outputs(model, case.batch()), rtol=0, atol=0)
    trainable, _ = e3va_peft.load_adapter(tmp_path / "adapter", is_trainable=True)
    assert trainable.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


@pytest.mark.parametrize("load", [PeftModel.from_pretrained, lambda base, path: base.load_adapter(str(path))])
def test_another_number_of_classes_fails_with_both_numbers_and_the_call(load, pretrained, tmp_path):
    base = SwinForImageClassification.from_pretrained(pretrained, num_labels=3, ignore_mismatched_sizes=True)
    get_peft_model(base, E3VAConfig(r=4)).save_pretrained(tmp_path / "adapter")
    other = SwinForImageClassification.from_pretrained(pretrained)
    with pytest.raises(ValueError, match=r"5 .*3.*num_labels=3"):
        load(other, tmp_path / "adapter")


def test_a_model_put_together_from_a_config_and_a_backbone_is_rebuilt(tmp_path):
    case = BY_NAME["dinov2-upernet"]
    torch.manual_seed(0)
    Dinov2Backbone(dinov2_config(out_features=STAGES)).save_pretrained(tmp_path / "dinov2")
    config = UperNetConfig(
        backbone_config=dinov2_config(out_features=STAGES), hidden_size=8, pool_scales=[1], auxiliary_in_channels=16,
        num_labels=3, id2label={0: "rest", 1: "grey", 2: "white"},
    )  # fmt: skip
    base = UperNetForSemanticSegmentation(config)
    base.backbone = Dinov2Backbone.from_pretrained(tmp_path / "dinov2", out_features=STAGES)
    model = get_peft_model(base, E3VAConfig(r=4))
    train_steps(model, case.training_batch())
    model.save_pretrained(tmp_path / "adapter")
    again, processor = e3va_peft.load_adapter(tmp_path / "adapter")
    assert processor is None and again.config.id2label[1] == "grey"
    assert_same(outputs(again, case.batch()), outputs(model, case.batch()), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mlp", "attention", "norm", "pooler", "layernorm"])
@pytest.mark.parametrize("model", ["swin-in-own-head", "vit-in-own-head"])
def test_a_head_named_like_a_part_of_the_backbone_comes_back(name, model, tmp_path):
    case = BY_NAME[model]

    def base():
        built = case.base()
        head = nn.Sequential(OrderedDict(first=nn.Linear(3, 3), mlp=nn.Linear(3, 3)))
        built.head = nn.Sequential(OrderedDict(head=built.head))
        built.add_module(name, head)
        built.register_forward_hook(lambda m, args, out: out | {"logits": getattr(m, name)(out["logits"])})
        return built

    torch.manual_seed(0)
    original = base()
    adapted = get_peft_model(copy.deepcopy(original), E3VAConfig(r=4, init_weights=False)).eval()
    assert {name, "head"} <= set(adapted.peft_config["default"].modules_to_save)
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(original), tmp_path)
    assert_same(outputs(again, case.batch()), outputs(adapted, case.batch()), rtol=0, atol=0)


def test_a_head_that_was_not_saved_is_missed_when_the_base_is_put_together(tmp_path):
    torch.manual_seed(0)
    Dinov2Backbone(dinov2_config(out_features=STAGES)).save_pretrained(tmp_path / "dinov2")
    base = BY_NAME["dinov2-upernet"].base()
    base.backbone = Dinov2Backbone.from_pretrained(tmp_path / "dinov2", out_features=STAGES)
    get_peft_model(base, E3VAConfig(r=4, modules_to_save=["auxiliary_head"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"\['decode_head'\]"):
        e3va_peft.load_adapter(tmp_path / "adapter")


def test_what_cannot_be_rebuilt_says_why(tmp_path):
    trained(BY_NAME["swin-classifier"]).save_pretrained(tmp_path / "nameless")
    with pytest.raises(ValueError, match="base_model_name_or_path"):
        e3va_peft.load_adapter(tmp_path / "nameless")
    with pytest.raises(FileNotFoundError, match="adapter="):
        e3va_peft.load_adapter(tmp_path / "missing")
    get_peft_model(BY_NAME["swin-classifier"].base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "lora"
    )
    with pytest.raises(ValueError, match=r"LORA.*E3VA"):
        e3va_peft.load_adapter(tmp_path / "lora")
    trained(BY_NAME["swin-in-own-head"]).save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match=r"tests\.models\.HeadOnModel.*PeftModel\.from_pretrained"):
        e3va_peft.load_adapter(tmp_path / "own")


def test_an_adapter_of_another_depth_is_refused(tmp_path):
    trained(BY_NAME["swin-maps-in-own-head"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["modules_to_save"] = []
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="out_features"):
        PeftModel.from_pretrained(BY_NAME["swin-early-maps"].base(), tmp_path)


def edit(folder, change) -> None:
    """Change the weights in a folder: `change` takes the mapping."""
    file = next(folder.glob("*model.safetensors"))
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def drop(part):
    """Leave out the weights whose names hold `part`."""

    def change(weights):
        names = [name for name in weights if part in name]
        assert names
        for name in names:
            del weights[name]

    return change


def drop_half(weights):
    """Leave out every second weight of the highway."""
    for name in sorted(name for name in weights if "e3va_highway" in name)[::2]:
        del weights[name]


@pytest.fixture
def adapter(pretrained, tmp_path):
    """The folder of an adapter whose head has other classes than its base."""
    base = SwinForImageClassification.from_pretrained(pretrained, num_labels=3, ignore_mismatched_sizes=True)
    get_peft_model(base, E3VAConfig(r=4, init_weights=False)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_loading_reports_no_mismatch_of_a_head_that_the_adapter_brings(adapter, caplog):
    caplog.clear()
    verbosity = logging.get_verbosity()
    e3va_peft.load_adapter(adapter)
    assert "MISMATCH" not in caplog.text and logging.get_verbosity() == verbosity


@pytest.mark.parametrize("part", ["swin.encoder.layers.0.blocks.0", "swin.layernorm", "swin.embeddings"])
def test_a_base_model_that_lacks_weights_of_its_backbone_is_refused_by_their_names(part, adapter, pretrained):
    e3va_peft.load_adapter(adapter)
    if part == "swin.layernorm":  # which the adapter brings
        edit(pretrained, drop(part))
        e3va_peft.load_adapter(adapter)
        return
    edit(pretrained, drop(part))
    with pytest.raises(ValueError, match=rf"pretrained' .*\['{part}"):
        e3va_peft.load_adapter(adapter)


def test_a_base_model_of_another_size_is_refused(adapter, pretrained):
    config = BY_NAME["swin-classifier"].base().config
    config.embed_dim *= 2
    SwinForImageClassification(config).save_pretrained(pretrained)
    with pytest.raises(ValueError, match=r"pretrained' .*\d+ parameters"):
        e3va_peft.load_adapter(adapter)


def test_a_backbone_that_lacks_weights_is_refused_where_the_base_was_put_together(tmp_path):
    torch.manual_seed(0)
    Dinov2Backbone(dinov2_config(out_features=STAGES)).save_pretrained(tmp_path / "dinov2")
    base = BY_NAME["dinov2-upernet"].base()
    base.backbone = Dinov2Backbone.from_pretrained(tmp_path / "dinov2", out_features=STAGES)
    get_peft_model(base, E3VAConfig(r=4)).save_pretrained(tmp_path / "adapter")
    e3va_peft.load_adapter(tmp_path / "adapter")
    edit(tmp_path / "dinov2", drop("layer.1."))
    with pytest.raises(ValueError, match=r"dinov2' .*\['encoder\.layer\.1"):
        e3va_peft.load_adapter(tmp_path / "adapter")


def test_a_new_head_that_was_not_saved_is_missed(pretrained, tmp_path):
    base = SwinForImageClassification.from_pretrained(pretrained, num_labels=3, ignore_mismatched_sizes=True)
    get_peft_model(base, E3VAConfig(r=4, modules_to_save=[])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"\['classifier.bias', 'classifier.weight'\]"):
        e3va_peft.load_adapter(tmp_path / "adapter")
    base = SwinForImageClassification.from_pretrained(pretrained)
    model = get_peft_model(base, E3VAConfig(r=4, modules_to_save=[], init_weights=False)).eval()
    model.save_pretrained(tmp_path / "same")  # its head is the base model's
    again, _ = e3va_peft.load_adapter(tmp_path / "same")
    batch = BY_NAME["swin-classifier"].batch()
    assert_same(outputs(again, batch), outputs(model, batch), rtol=0, atol=0)


LOADS = {
    "load_adapter": lambda adapter, base: e3va_peft.load_adapter(adapter),
    "PeftModel": lambda adapter, base: PeftModel.from_pretrained(base, adapter),
    "another-name": lambda adapter, base: PeftModel.from_pretrained(base, adapter, adapter_name="other"),
    "low_cpu_mem_usage": lambda adapter, base: PeftModel.from_pretrained(base, adapter, low_cpu_mem_usage=True),
    "transformers": lambda adapter, base: copy.deepcopy(base).load_adapter(str(adapter)),  # refused, it stays there
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("e3va_highway"), r"\d+ of its \d+ weights, '.*e3va_highway"),
        (drop_half, r"\d+ of its \d+ weights, '.*e3va_highway"),
        (
            lambda weights: weights.update({"base_model.model.swin.embeddings.norm.weight": torch.full((16,), 9.0)}),
            r"swin\.embeddings\.norm\.weight",
        ),
        (
            lambda weights: weights.update({"base_model.model.swin.encoder.e3va_highway.x.y": torch.ones(1)}),
            r"e3va_highway.*x\.y of shape \(1,\)",
        ),
        (
            lambda weights: weights.update({"base_model.model.swin.layernorm.bias": torch.ones(7)}),
            r"layernorm.*bias of shape \(7,\)",
        ),
    ],
    ids=["no-highway", "half", "frozen", "too-many", "size"],
)
def test_a_file_that_is_not_all_of_an_adapter_and_nothing_else_is_refused(load, change, words, adapter, pretrained):
    edit(adapter, change)
    base = SwinForImageClassification.from_pretrained(pretrained, num_labels=3, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match=words):
        load(adapter, base)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_a_head_that_the_adapter_does_not_bring_must_be_the_one_that_it_was_trained_beside(load, pretrained, tmp_path):
    base, other = (
        SwinForImageClassification.from_pretrained(pretrained, num_labels=3, ignore_mismatched_sizes=True)
        for _ in range(2)
    )
    config = E3VAConfig(r=4, modules_to_save=["swin.layernorm"])
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"\['classifier('|\.bias')"):
        load(tmp_path, copy.deepcopy(other))
    other.classifier.load_state_dict(base.classifier.state_dict())
    other.swin.layernorm.bias.data += 1  # which the adapter brings
    PeftModel.from_pretrained(other, tmp_path)


def test_another_head_under_an_adapter_that_is_trained_further_is_a_warning(pretrained, tmp_path):
    base = SwinForImageClassification.from_pretrained(pretrained)
    get_peft_model(copy.deepcopy(base), E3VAConfig(r=4, modules_to_save=[])).save_pretrained(tmp_path)
    assert list(note(tmp_path)["outside"]) == ["classifier", "swin.layernorm"]
    base.classifier.bias.data += 1
    with pytest.warns(UserWarning, match=r"does not bring \['classifier'\]"):
        PeftModel.from_pretrained(base, tmp_path, is_trainable=True)


DEEP = "[" * 100_000 + "]" * 100_000
MALFORMED = {
    "adapter_config.json": [
        ("[]", "holds \\[\\]"),
        ("null", "holds None"),
        ("{", "not valid JSON"),
        (DEEP, "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (" " * (2**24 + 1), "at most"),
        ({"peft_type": ...}, "peft_type=None"),
        ({"peft_type": 5}, "peft_type=5"),
        ({"peft_type": []}, "peft_type="),
        ({"peft_type": "NOPE"}, "peft_type='NOPE'"),
        ({"auto_mapping": []}, "auto_mapping"),
        *(({"auto_mapping": {name: value}}, rf"auto_mapping\.{name}=") for name, value in (
            ("backbones", "abc"), ("backbones", {"x": 5}), ("num_labels", "3"), ("folders", "base"),
            ("commits", ["a"]), ("parent_library", 7), ("metrics", {"accuracy": "much"}), ("backbone", "abc"),
            ("base_config", 5),
        )),
        ({"auto_mapping": {"parent_library": "transformers..x", "base_model_class": "y"}}, r"transformers\.\.x\.y"),
        ({"auto_mapping": {"parent_library": "transformers.nowhere", "base_model_class": "y"}}, "nowhere"),
        ({"auto_mapping": {"parent_library": "os", "base_model_class": "system"}}, r"os\.system.*not run"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path=5"),
        ({"revision": []}, r"revision=\[\]"),
        ({"r": "many"}, "r='many'"),
        ({"r": 10**12}, f"r={10**12}"),
        ({"r": 10**6}, f"r={10**6}, bottleneck_ratio"),
        ({"bottleneck_ratio": 1e300}, "bottleneck_ratio="),
        ({"target_modules": "swin(", "modules_to_save": []}, r"target_modules='swin\('"),
    ],
    "base_config.json": [
        ("[]", "holds \\[\\]"),
        (DEEP, "not valid JSON"),
        ({"model_type": ...}, "is not a config of a"),
        ({"model_type": "nope"}, "is not a config of a"),
        ({"depths": [20_000, 1]}, "depths=20000"),
        ({"num_hidden_layers": 20_000}, "num_hidden_layers=20000"),
        ({"embed_dim": 10**9}, "embed_dim=1000000000"),
        ({"embed_dim": 500_000}, r"of \d\.\de\+\d+ parameters"),
        ({"depths": "many"}, "is not a config of a"),
        ({"image_size": None}, "is not a config of a"),
        ({"_attn_implementation": "kernels-community/x"}, "attn_implementation='kernels-community/x'"),
        ({"dtype": []}, r"dtype=\[\]"),
        ({"dtype": "nn"}, "dtype='nn'"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "base_config.json"])
def test_a_file_that_is_a_link_out_of_the_adapters_folder_is_not_followed(file, adapter, tmp_path):
    own, other = adapter / file, tmp_path / "elsewhere"
    own.rename(other)
    own.symlink_to(other)
    base = BY_NAME["swin-classifier"].base()
    for load in (e3va_peft.load_adapter, lambda folder: PeftModel.from_pretrained(base, folder)):
        with pytest.raises(ValueError, match=rf"{own}: is a link to {other}.*Copy the file"):
            load(adapter)
    own.unlink()
    other.rename(own.with_name("moved"))
    own.symlink_to("moved")  # within it
    e3va_peft.load_adapter(adapter)
    snapshot = tmp_path / "models--me--adapter" / "snapshots" / "0123abc"  # as the Hub's cache has it
    snapshot.parent.mkdir(parents=True)
    adapter.rename(snapshot)
    (snapshot.parents[1] / "blobs").mkdir()
    (snapshot / "moved").rename(snapshot.parents[1] / "blobs" / "e1f2")
    (snapshot / file).unlink()
    (snapshot / file).symlink_to("../../blobs/e1f2")
    e3va_peft.load_adapter(snapshot)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [(file, *entry) for file, entries in MALFORMED.items() for entry in entries],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else None,
)
def test_a_malformed_file_is_refused_by_its_name_before_anything_is_built(file, content, words, adapter):
    path = adapter / file
    if isinstance(content, dict):
        known = json.loads(path.read_text())
        if "auto_mapping" in content and isinstance(content["auto_mapping"], dict):
            content = {"auto_mapping": known["auto_mapping"] | content["auto_mapping"]}
        content = json.dumps({key: value for key, value in (known | content).items() if value is not ...})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.perf_counter()
    with pytest.raises(ValueError, match=words) as error:
        e3va_peft.load_adapter(adapter)
    assert time.perf_counter() - start < 5
    about_the_model = "highway would have" in str(error.value) or "its base model" in str(error.value)
    assert file in str(error.value) or about_the_model


def test_weights_in_a_pickle_are_loaded_by_peft_alone(adapter, pretrained):
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.bin, a pickle"):
        e3va_peft.load_adapter(adapter)
    base = SwinForImageClassification.from_pretrained(pretrained, num_labels=3, ignore_mismatched_sizes=True)
    PeftModel.from_pretrained(base, adapter)


def test_a_base_whose_weights_are_a_pickle_is_not_opened_unless_asked(adapter, pretrained):
    expected, _ = e3va_peft.load_adapter(adapter)
    pickle_weights(pretrained)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("it is opened"))
        with pytest.raises(ValueError, match=r"pretrained': has .*pytorch_model\.bin.*SwinForImage.*save_pretrained"):
            e3va_peft.load_adapter(adapter)
    asked, _ = e3va_peft.load_adapter(adapter, use_safetensors=False)
    batch = BY_NAME["swin-classifier"].batch()
    assert_same(outputs(asked, batch), outputs(expected, batch), rtol=0, atol=0)


def test_code_beside_a_model_cannot_be_asked_for(adapter):
    with pytest.raises(ValueError, match=r"trust_remote_code=True: .*PeftModel\.from_pretrained"):
        e3va_peft.load_adapter(adapter, trust_remote_code=True)
    e3va_peft.load_adapter(adapter, trust_remote_code=False)


@pytest.mark.parametrize("given", [E3VAConfig(r=4), None], ids=["new", "from-the-file"])
def test_a_config_that_is_given_for_loading_is_the_adapters_own(given, adapter, pretrained):
    base = SwinForImageClassification.from_pretrained(pretrained, num_labels=3, ignore_mismatched_sizes=True)
    config = given or PeftConfig.from_pretrained(adapter)
    model = PeftModel.from_pretrained(base, adapter, config=config)
    assert model.peft_config["default"] is config and config.target_modules == ["swin.encoder"]
    other = SwinForImageClassification.from_pretrained(pretrained, num_labels=3, ignore_mismatched_sizes=True)
    again = PeftModel.from_pretrained(other, adapter, config=config)  # a second model cannot have it as well
    assert again.peft_config["default"] is not config and config.base.config is base.config


def write_config(adapter: Path, **fields) -> Path:
    file = adapter / "adapter_config.json"
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps(content))
    return adapter


def test_a_config_of_a_later_version_loads_with_a_warning_that_names_its_new_field(adapter):
    with pytest.warns(UserWarning, match="highway_of_tomorrow"):
        model, _ = e3va_peft.load_adapter(write_config(adapter, highway_of_tomorrow=3))
    assert model.peft_config["default"].r == 4


def test_a_config_from_before_tap_norm_reads_taps_as_they_are_and_none_stays_the_backbones_own(adapter, tmp_path):
    E3VAConfig().save_pretrained(tmp_path / "alone")
    assert PeftConfig.from_pretrained(tmp_path / "alone").tap_norm is None
    content = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    del content["tap_norm"]
    (tmp_path / "alone" / "adapter_config.json").write_text(json.dumps(content))
    assert PeftConfig.from_pretrained(tmp_path / "alone").tap_norm == "none"
    config = E3VAConfig(peft_version="0.21", tap_norm=None)
    assert config.tap_norm is copy.deepcopy(config).tap_norm is None


def note(adapter: Path, **values) -> dict:
    """Change what an adapter's config knows of its base; return what it knew."""
    file = adapter / "adapter_config.json"
    content = json.loads(file.read_text())
    before = dict(content["auto_mapping"])
    content["auto_mapping"] |= values
    file.write_text(json.dumps(content))
    return before


def spoil(value: float):
    """Put a number into a weight of the highway."""

    def change(weights):
        next(value for name, value in weights.items() if "e3va_highway" in name).view(-1)[0] = value

    return change


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoil(float("nan")), r"e3va_highway.* 1 of \d+ numbers"),
        (spoil(float("inf")), r"e3va_highway.* 1 of \d+ numbers"),
        (
            lambda weights: weights.update({name: value.int() for name, value in weights.items()}),
            r"torch\.int32.*float32",
        ),
        (spoil(9.0), "not those that were saved"),
    ],
    ids=["nan", "inf", "int", "changed"],
)
def test_weights_that_are_not_finite_or_not_those_that_were_saved_are_refused(
    load, change, words, adapter, pretrained
):
    edit(adapter, change)
    base = SwinForImageClassification.from_pretrained(pretrained, num_labels=3, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match=words):
        load(adapter, base)


def test_weights_that_were_changed_on_purpose_load_once_their_checksum_is_removed(adapter):
    edit(adapter, spoil(9.0))
    note(adapter, weights=None)
    e3va_peft.load_adapter(adapter)


@pytest.mark.parametrize("change", [{"hidden_act": "relu"}, {"layer_norm_eps": 0.1}], ids=["activation", "eps"])
def test_a_base_config_that_was_edited_by_hand_is_refused_by_both_checksums(change, adapter):
    file, known = adapter / "base_config.json", note(adapter)["base_config"]
    content = json.loads(file.read_text())
    assert all(content[name] != value for name, value in change.items())
    file.write_text(json.dumps(content))  # laid out in another way alone
    e3va_peft.load_adapter(adapter)
    file.write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=rf"base_config\.json: .*is [0-9a-f]{{12}}, .* says {known[:12]}") as error:
        e3va_peft.load_adapter(adapter)
    assert "remove base_config from auto_mapping" in str(error.value)
    note(adapter, base_config=None)  # as in adapters of before
    e3va_peft.load_adapter(adapter)


@pytest.mark.parametrize(
    ("field", "value"), [("taps", ["block"]), ("tap_norm", "relative"), ("tap_storage", "int4"), ("live_blocks", 1)]
)
def test_an_adapter_that_reads_in_another_way_than_it_was_trained_to_warns_of_both(field, value, tmp_path):
    case = BY_NAME["swin-classifier"]
    get_peft_model(case.base(), E3VAConfig(r=4, taps=("stream",))).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    then = getattr(config, field)
    setattr(config, field, value)
    then = list(then) if field == "taps" else then
    with pytest.warns(UserWarning, match=re.escape(f"{field}={then!r} then, {value!r} now")):
        PeftModel.from_pretrained(case.base(), tmp_path, config=config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(case.base(), tmp_path)


def test_an_adapter_of_another_release_is_loaded_with_a_warning_that_names_both(adapter, pretrained):
    file = adapter / "adapter_config.json"
    content = json.loads(file.read_text())
    content["auto_mapping"]["reads"]["e3va_peft"] = "9.9"
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=rf"e3va_peft='9\.9' then, '{re.escape(RELEASE)}' now"):
        e3va_peft.load_adapter(adapter)


def nudge(weights):
    weights["swin.encoder.layers.0.blocks.0.layernorm_before.bias"] += 1e-3


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_a_base_of_other_weights_than_the_adapter_was_trained_on_is_refused_by_both_checksums(
    load, adapter, pretrained
):
    edit(pretrained, nudge)
    base = SwinForImageClassification.from_pretrained(pretrained, num_labels=3, ignore_mismatched_sizes=True)
    known = note(adapter)["backbone"]["checksum"]
    with pytest.raises(ValueError, match=rf"{known[:12]} of '{pretrained}'.* has [0-9a-f]{{12}} .*auto_mapping"):
        load(adapter, base)
    note(adapter, backbone=None)
    load(adapter, base)


def test_weights_that_were_written_by_data_are_noted_as_they_are():
    model = get_peft_model(BY_NAME["vit-classifier"].base(), E3VAConfig(r=4))
    before = backbone_fingerprint(model, "default")
    frozen = next(p for p in layers(model)[0].exit.parameters() if p.dim() > 1)
    frozen.data.mul_(1.1)
    assert backbone_fingerprint(model, "default") != before


def test_other_weights_under_another_version_of_transformers_are_a_warning(adapter, pretrained):
    edit(pretrained, nudge)
    note(adapter, backbone=note(adapter)["backbone"] | {"transformers": "4.0"})
    with pytest.warns(UserWarning, match=r"transformers 4\.0.*transformers 5"):
        e3va_peft.load_adapter(adapter)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_that_loading_rounds_are_compared_as_they_are_rounded(saved, pretrained, tmp_path):
    base = SwinForImageClassification.from_pretrained(pretrained, dtype=saved)
    get_peft_model(base, E3VAConfig(r=4, modules_to_save=[])).save_pretrained(tmp_path / "adapter")
    others = [dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16) if dtype != saved]
    for dtype in others:
        if {saved, dtype} == {torch.bfloat16, torch.float16}:
            with pytest.warns(UserWarning, match=f"pretrained' in {saved}, .* has them in {dtype}"):
                e3va_peft.load_adapter(tmp_path / "adapter", dtype=dtype)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            e3va_peft.load_adapter(tmp_path / "adapter", dtype=dtype)
    edit(pretrained, nudge)
    with pytest.raises(ValueError, match=r"backbone weights [0-9a-f]{12} of .*, and this model has"):
        e3va_peft.load_adapter(tmp_path / "adapter", dtype=others[1])
    edit(pretrained, lambda weights: weights["classifier.bias"].add_(1))
    note(tmp_path / "adapter", backbone=None)
    with pytest.raises(ValueError, match=r"does not bring \['classifier'\]"):
        e3va_peft.load_adapter(tmp_path / "adapter", dtype=others[1])


def test_a_base_that_is_sharded_later_is_noted_before(adapter, pretrained, tmp_path, monkeypatch):
    base = SwinForImageClassification.from_pretrained(pretrained)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    model = get_peft_model(base, E3VAConfig(r=4, modules_to_save=[]))
    for module in ("refusals", "fingerprint"):
        monkeypatch.setattr(f"e3va_peft.{module}.are_plain", lambda tensors: False)  # as shards are not
    model.save_pretrained(tmp_path / "sharded")
    assert note(tmp_path / "sharded")["backbone"] == note(adapter)["backbone"]
    assert list(note(tmp_path / "sharded")["outside"]) == ["classifier", "swin.layernorm"]


def test_the_note_of_an_early_adapter_is_compared_in_its_own_dtype_alone(adapter, pretrained):
    known = note(adapter)["backbone"]
    note(adapter, backbone={name: known[name] for name in ("checksum", "dtype", "transformers")})
    edit(pretrained, nudge)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        e3va_peft.load_adapter(adapter, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="backbone weights"):
        e3va_peft.load_adapter(adapter)


def test_a_head_of_other_weights_and_a_base_in_another_precision_are_no_other_backbone(adapter, pretrained):
    edit(pretrained, lambda weights: weights.update({"classifier.bias": torch.full((5,), 9.0)}))
    model, _ = e3va_peft.load_adapter(adapter, dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16


def test_an_adapter_that_is_trained_further_is_saved_with_its_new_checksum(adapter, tmp_path):
    model, _ = e3va_peft.load_adapter(adapter, is_trainable=True)
    train_steps(model, BY_NAME["swin-classifier"].training_batch())
    model.save_pretrained(tmp_path / "again")
    assert note(tmp_path / "again")["backbone"] == note(adapter)["backbone"]
    assert note(tmp_path / "again")["weights"] != note(adapter)["weights"]
    model.load_adapter(adapter, "default")  # other weights than this adapter's config was loaded with
    again, _ = e3va_peft.load_adapter(tmp_path / "again")
    batch = BY_NAME["swin-classifier"].batch()
    assert not torch.equal(outputs(again, batch)["logits"], outputs(model.eval(), batch)["logits"])


def test_a_base_that_was_a_folder_is_not_looked_for_on_the_hub(pretrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = SwinForImageClassification.from_pretrained("pretrained")
    get_peft_model(base, E3VAConfig(r=4)).save_pretrained("adapter")
    e3va_peft.load_adapter("adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"'pretrained' was a folder.*elsewhere.*base_model_name_or_path"):
        e3va_peft.load_adapter(tmp_path / "adapter")


def test_a_head_that_is_not_in_the_file_is_named(adapter):
    edit(adapter, drop("classifier"))
    with pytest.raises(ValueError, match=r"'.*classifier\.\w+'.*modules_to_save"):
        e3va_peft.load_adapter(adapter)


def test_model_card_opens_with_the_import_and_tells_what_is_inside(pretrained, tmp_path):
    base = SwinForImageClassification.from_pretrained(
        pretrained, num_labels=2, id2label={0: "cat", 1: "dog"}, ignore_mismatched_sizes=True
    )
    model = get_peft_model(base, E3VAConfig(r=4))
    e3va_peft.record_metrics(model, {"accuracy": 0.875, "note": "text is left out"})
    model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "library_name: peft" in head and "pipeline_tag: image-classification" in head
    assert body.splitlines()[:2] == [
        "```python",
        "import e3va_peft  # registers E3VA with PEFT: import it before loading",
    ]
    assert str(pretrained.parent) not in card  # which names people
    for text in (
        "`pretrained` (Swin",
        "cat, dog",
        "| accuracy | 0.875 |",
        "load_adapter(",
        "image-classification",
        "r=4",
    ):
        assert text in body
    assert "More Information Needed" not in card


def test_a_model_saved_by_transformers_itself_is_rebuilt_too(pretrained, tmp_path):
    case = BY_NAME["swin-classifier"]
    base = SwinForImageClassification.from_pretrained(pretrained, num_labels=3, ignore_mismatched_sizes=True)
    config = E3VAConfig(r=4, init_weights=False)
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):  # transformers 5.24 asks for a PEFT that is not out yet
        with pytest.raises(ValueError, match=f"PEFT .*{MIN_PEFT_VERSION}"):
            base.add_adapter(config)
        assert get_peft_model(base, config).get_nb_trainable_parameters()[0] > 0  # the model is as it was
        return
    base.add_adapter(config)
    base.save_pretrained(tmp_path / "adapter")
    again, _ = e3va_peft.load_adapter(tmp_path / "adapter")
    assert_same(outputs(again, case.batch()), outputs(base.eval(), case.batch()), rtol=0, atol=0)


def test_transformers_loads_a_second_adapter_and_leaves_the_first_as_it_is(adapter, pretrained):
    base = SwinForImageClassification.from_pretrained(pretrained, num_labels=3, ignore_mismatched_sizes=True)
    base.load_adapter(str(adapter))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    base.load_adapter(str(adapter), "second")
    after = base.state_dict()
    assert_same({name: after[name] for name in before}, before, rtol=0, atol=0)
    trained = {name: value for name, value in before.items() if ".default." in name}
    second = {name: after[name.replace(".default.", ".second.")] for name in trained}
    assert trained
    assert_same(second, trained, rtol=0, atol=0)
    assert "_load_pretrained_model" not in vars(copy.deepcopy(base))


def test_metrics_and_metadata_of_a_card_survive_loading_and_saving(pretrained, tmp_path):
    model = get_peft_model(SwinForImageClassification.from_pretrained(pretrained), E3VAConfig(r=4))
    e3va_peft.record_metrics(model, {"accuracy": 0.875})
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "README.md"
    path.write_text(path.read_text().replace("library_name: peft", "library_name: peft\nlicense: mit"))
    again, _ = e3va_peft.load_adapter(tmp_path / "adapter")
    again.save_pretrained(tmp_path / "adapter")
    assert "| accuracy | 0.875 |" in path.read_text() and "license: mit" in path.read_text()


def test_the_hub_can_render_the_metrics_beside_results_of_the_users_own(pretrained, tmp_path):
    model = get_peft_model(SwinForImageClassification.from_pretrained(pretrained), E3VAConfig(r=4))
    path = tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    assert "model-index" not in path.read_text()
    e3va_peft.record_metrics(model, {"eval_accuracy": 0.5, "mean_class_accuracy": float("nan")})
    model.save_pretrained(tmp_path)
    card = ModelCard.load(path)
    (result,) = card.data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("image-classification", "accuracy", 0.5)
    own = EvalResult("image-classification", "beans", "Beans", "f1", 0.75)
    card.data.eval_results += [own]
    card.save(path)
    e3va_peft.record_metrics(model, {"eval_accuracy": 0.625})
    model.save_pretrained(tmp_path)
    found = {result.metric_type: result.metric_value for result in ModelCard.load(path).data.eval_results}
    assert found == {"f1": 0.75, "accuracy": 0.625}


def test_a_model_card_of_the_users_own_is_not_overwritten(pretrained, tmp_path):
    model = get_peft_model(SwinForImageClassification.from_pretrained(pretrained), E3VAConfig(r=4))
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "README.md"
    model.save_pretrained(tmp_path / "adapter")
    assert "written by e3va_peft" in path.read_text()
    path.write_text("# My own words\n")
    model.save_pretrained(tmp_path / "adapter")
    assert "# My own words" in path.read_text() and "written by e3va_peft" not in path.read_text()
    (tmp_path / "adapter" / "preprocessor_config.json").write_text("{}")
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "preprocessor_config.json").read_text() == "{}"


def test_bf16_base_round_trip(tmp_path):
    case = BY_NAME["swin-classifier"]
    model = get_peft_model(case.base().to(torch.bfloat16), E3VAConfig(r=4, init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(case.base().to(torch.bfloat16), tmp_path)
    batch = {"pixel_values": case.batch()["pixel_values"].to(torch.bfloat16)}
    assert_same(outputs(again, batch), outputs(model, batch), rtol=0, atol=0)
    assert copy.deepcopy(again).peft_config["default"].r == SWIN["depths"][0] * 4
