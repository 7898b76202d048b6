"""A run's YAML: every name and value is checked before anything is loaded, and every message offers a way out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from e3va_peft.errors import UserError
from e3va_peft.methods import METHODS
from e3va_peft.training.arguments import build_arguments
from e3va_peft.training.config import (
    TASKS,
    RunConfig,
    parse_config,
    read_config,
    recipe_text,
    recipes,
)
from e3va_peft.training.tasks import task_of
from e3va_peft.training.trainer import _stepped

CLASSIFY = {"task": "image-classification", "model": "m", "output": "o", "data": {"source": "photos"}}
SEGMENT = {"task": "semantic-segmentation", "model": "m", "output": "o", "data": {"images": "i", "masks": "m"}}
TEXT = "task: image-classification\nmodel: m\noutput: o\ndata: {source: photos}\n"


def file(folder: Path, more: str = "", text: str = TEXT) -> Path:
    path = folder / "run.yaml"
    path.write_text(text + more, encoding="utf-8")
    return path


def parsed(base: dict[str, Any] = CLASSIFY, **fields: Any) -> RunConfig:
    return parse_config(base | fields)


def refused(*parts: str, base: dict[str, Any] = CLASSIFY, **fields: Any) -> str:
    """Assert that a config is refused and that the message holds each of these parts."""
    with pytest.raises(UserError) as error:
        parse_config(base | fields)
    message = str(error.value)
    assert all(part in message for part in parts), message
    return message


def arguments(base: dict[str, Any] = CLASSIFY, has_eval: bool = True, **training: Any) -> Any:
    config = parse_config(base | {"training": {"use_cpu": True} | training})
    return build_arguments(config, task_of(config), has_eval)


@pytest.mark.parametrize(
    "data",
    [
        {"source": "~/photos", "labels": "~/names.txt"},
        {"source": "photos", "labels": ["~", "cat"]},
        {"images": "~/i", "annotations": "~/a.json"},
        {"images": "~/i", "masks": "~/m"},
    ],
    ids=lambda data: " ".join(data),
)
def test_a_tilde_is_the_home_folder_in_every_path(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    task = {"annotations": "object-detection", "masks": "semantic-segmentation"}.get([*data][-1], TASKS[0])
    config = parsed(task=task, model="~/model", output="~/runs/{method}", data=data)
    assert (config.model, config.output) == (str(tmp_path / "model"), str(tmp_path / "runs" / "e3va"))
    for name, value in data.items():
        expected = value.replace("~", str(tmp_path)) if isinstance(value, str) else value
        assert getattr(config.data, name) == expected
    assert parse_config(config.to_dict()) == config


@pytest.mark.parametrize(
    ("fields", "named", "nearest"),
    [
        ({"modle": "m"}, "modle:", "model"),
        ({"taks": "x"}, "taks:", "task"),
        ({"data": {"sorce": "photos"}}, "data.sorce:", "source"),
        ({"data": {"source": "p", "eval_fracton": 0.1}}, "data.eval_fracton:", "eval_fraction"),
        ({"augment": {"flipp": True}}, "augment.flipp:", "flip"),
        ({"method": {"name": "e3va", "bottleneck_ration": 2}}, "method.bottleneck_ration:", "bottleneck_ratio"),
        ({"method": {"name": "lora", "lora_alhpa": 2}}, "method.lora_alhpa:", "lora_alpha"),
        ({"training": {"learning_rte": 1e-3}}, "training.learning_rte:", "learning_rate"),
        ({"task": "image-clasification"}, "task='image-clasification'", "image-classification"),
        ({"method": "lor"}, "method='lor'", "lora"),
        ({"method": "adaptorformer"}, "method='adaptorformer'", "adaptformer"),
    ],
)
def test_a_mistyped_name_is_refused_and_the_nearest_one_offered(fields, named, nearest):
    message = refused(named, **fields)
    assert f"Did you mean {nearest}" in message


def test_where_no_name_is_near_all_are_listed():
    message = refused("data.limit:", data={"source": "photos", "limit": 3})
    assert "There are source, images, masks, annotations" in message and "train_samples" in message


@pytest.mark.parametrize(
    "name", ["output_dir", "remove_unused_columns", "label_names", "save_only_model", "prediction_loss_only"]
)
def test_training_arguments_that_the_run_sets_are_refused(name):
    refused(f"training.{name}: cannot be set", training={name: "x"})


@pytest.mark.parametrize("name", ["task", "model", "output", "data"])
@pytest.mark.parametrize("empty", [None, ""])
def test_a_missing_field_is_named_with_what_to_write(name, empty):
    values = {key: value for key, value in CLASSIFY.items() if key != name}
    refused(f"{name}: is missing. Write {name}:", base=values, **({} if empty is None else {name: empty}))


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"data": {"source": "p", "images": "i", "masks": "m"}}, "either source"),
        ({"data": {"name": "n"}}, "either source"),
        ({"data": {"images": "i"}}, "images: and masks: go together"),
        ({"data": {"images": "i", "masks": "m"}}, "has no masks"),
        ({"data": {"source": 5}}, "data.source=5: must be str"),
        ({"data": {"source": "p", "verify": "yes"}}, "data.verify='yes': must be bool"),
        ({"data": {"source": "p", "verify": None}}, "data.verify=None: must be bool"),
        ({"data": {"source": "p", "ignore_index": -1}}, "data.ignore_index=-1"),
        ({"data": {"source": "p", "ignore_index": True}}, "data.ignore_index=True: must be a whole number"),
        ({"data": {"source": "p", "eval_fraction": 1}}, "data.eval_fraction=1"),
        ({"data": {"source": "p", "eval_fraction": 0.1, "eval_split": "test"}}, "Leave one out"),
        ({"data": {"source": "p", "train_samples": 0}}, "data.train_samples=0"),
        ({"data": {"source": "p", "eval_samples": 1.5}}, "data.eval_samples=1.5: must be a whole number"),
        ({"data": {"source": "p", "labels": [False, True]}}, "Quote it"),
        ({"data": {"source": "p", "reduce_labels": True}}, "has no label maps"),
        ({"data": "photos"}, "data='photos': must be a section"),
        ({"training": [1]}, "training=[1]: must be a section"),
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": 224.0}, "image_size=224.0"),
        ({"image_size": True}, "image_size=True"),
        ({"augment": {"scale": [0.5]}}, "augment.scale=[0.5]"),
        ({"augment": {"scale": [1, 0.5]}}, "augment.scale=[1, 0.5]"),
        ({"augment": {"scale": ["a", 1]}}, "augment.scale=['a', 1]"),
        ({"augment": {"scale": [0.5, 2]}}, "at most 1"),
        ({"augment": {"crop": 32}}, "augment.crop=32"),
        ({"augment": "none"}, "augment='none': must be a section"),
        ({"method": {"r": 8}}, "has no name"),
        ({"method": {"name": "head-only", "r": 8}}, "method.r: head-only has no options"),
        ({"method": {"name": "full", "r": 8}}, "method.r: full has no options"),
        ({"method": {"name": "e3va", "r": 0}}, "method.r=0: the rank must be a whole number"),
        ({"method": {"name": "bitfit", "r": 8}}, "method.r: bitfit has no options"),
        ({"model": ["m"]}, "model=['m']: must be text"),
        ({"output": True}, "output=True: must be text"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(fields, part):
    refused(part, **fields)


@pytest.mark.parametrize("fields", [{"augment": {"crop": 0}}, {"augment": {"scale": [0.5, float("inf")]}}])
def test_a_crop_or_scale_that_cannot_work_is_refused_for_a_segmenter_too(fields):
    refused("augment.", base=SEGMENT, **fields)


def test_defaults_are_e3va_with_augmentation_and_nothing_else():
    config = parsed()
    assert config.method_name == "e3va" and config.augment is not None and config.augment.flip
    assert (config.training, config.processor, config.model_options, config.image_size) == ({}, {}, {}, None)
    assert parsed(augment=False).augment is None
    assert parsed(augment=True).augment == parsed(augment=None).augment == config.augment


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("training.learning_rate=1e-3", lambda c: c.training["learning_rate"] == 0.001),
        ("training.learning_rate=2E+1", lambda c: c.training["learning_rate"] == 20.0),
        ("training.max_steps=7", lambda c: c.training["max_steps"] == 7),
        ("training.bf16=true", lambda c: c.training["bf16"] is True),
        ("training.fsdp=true", lambda c: c.training["fsdp"] is True),
        ("training.eval_strategy=no", lambda c: c.training["eval_strategy"] == "no"),
        ("training.lr_scheduler_kwargs={power: 1e0}", lambda c: c.training["lr_scheduler_kwargs"] == {"power": 1.0}),
        ("training.lr_scheduler_kwargs.power=2.0", lambda c: c.training["lr_scheduler_kwargs"] == {"power": 2.0}),
        ("data.labels=[cat, dog]", lambda c: c.data.labels == ["cat", "dog"]),
        ("data.source=a=b", lambda c: c.data.source == "a=b"),
        ("data.eval_split='no'", lambda c: c.data.eval_split == "no"),
        ("augment.scale=[0.5, 1e0]", lambda c: c.augment.scale == [0.5, 1.0]),
        ("augment=false", lambda c: c.augment is None),
        ("output=runs/other", lambda c: c.output == "runs/other"),
        ("image_size=64", lambda c: c.image_size == 64),
        ("method=lora", lambda c: c.method == {"name": "lora"}),
        ("method={name: lora, r: 4}", lambda c: c.method == {"name": "lora", "r": 4}),
        ("model_options.hidden_size=8", lambda c: c.model_options == {"hidden_size": 8}),
    ],
)
def test_set_changes_one_field_typed_as_in_yaml(override, read, tmp_path):
    assert read(read_config(file(tmp_path), [override]))


@pytest.mark.parametrize(
    ("written", "method"),
    [
        ("", {"name": "e3va", "r": 8}),
        ("method: lora\n", {"name": "lora", "r": 8}),
        ("method: {name: lora, r: 4, lora_alpha: 3}\n", {"name": "lora", "r": 8, "lora_alpha": 3}),
    ],
)
def test_set_an_option_of_a_method_that_is_a_word_or_a_mapping(written, method, tmp_path):
    assert read_config(file(tmp_path, written), ["method.r=8"]).method == method


def test_set_a_method_by_its_word_drops_the_options_of_the_other(tmp_path):
    config = read_config(file(tmp_path, "method: {name: e3va, r: 8}\n"), ["method=full"])
    assert config.method == {"name": "full"}


def test_set_flip_where_augmentation_was_off_turns_it_on(tmp_path):
    config = read_config(file(tmp_path, "augment: false\n"), ["augment.flip=false"])
    assert config.augment is not None and not config.augment.flip


def test_later_sets_win(tmp_path):
    config = read_config(file(tmp_path), ["training.seed=1", "training.seed=2"])
    assert config.training == {"seed": 2}


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("training.seed", "write key=value"),
        ("=3", "write key=value"),
        ("training.learning_rate=[1", "not valid YAML"),
        ("model.name=x", "model holds 'm', no section"),
        ("training.learning_rte=1", "Did you mean learning_rate"),
        ("trainnig.seed=1", "Did you mean training"),
        ("data=other", "data='other': must be a section"),
    ],
)
def test_a_set_that_cannot_work_is_refused(override, part, tmp_path):
    with pytest.raises(UserError, match=part.replace("[", r"\[")):
        read_config(file(tmp_path), [override])


@pytest.mark.parametrize("strategy", ["no", '"no"'])
def test_a_strategy_of_no_is_text(strategy, tmp_path):
    config = read_config(file(tmp_path, f"training: {{eval_strategy: {strategy}, save_strategy: no}}\n"))
    assert config.training == {"eval_strategy": "no", "save_strategy": "no"}
    built = build_arguments(config, task_of(config), has_eval=True)
    assert built.eval_strategy == built.save_strategy == "no"


def test_yaml_anchors_and_merges_work(tmp_path):
    more = "training: &t {seed: 1}\nmodel_options: {<<: *t, hidden_size: 8}\n"
    assert read_config(file(tmp_path, more)).model_options == {"seed": 1, "hidden_size": 8}
    assert read_config(file(tmp_path, more.replace("hidden_size", "seed"))).model_options == {"seed": 8}


def test_aliases_of_aliases_that_stand_for_billions_of_values_are_refused_at_once(tmp_path):
    levels = "".join(f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    path = file(tmp_path, f"model_options:\n  a0: &a0 [{'x' * 9}]\n{levels}")
    with pytest.raises(UserError, match=r"run\.yaml: .*99"):
        read_config(path)


def test_a_file_that_is_nested_without_end_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"run\.yaml: .*recursion"):
        read_config(file(tmp_path, "model_options: " + "[" * 1200))


def test_a_key_that_is_not_a_word_is_named(tmp_path):
    with pytest.raises(UserError, match=r"\('a',\)"):
        read_config(file(tmp_path, "? [a]\n: b\n"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (TEXT + "model: again\n", ['duplicate key "model"', "line 5"]),
        (TEXT + "training: {seed: 1, seed: 2}\n", ['duplicate key "seed"', "line 5"]),
        (TEXT + "training:\n\tseed: 1\n", ["not valid YAML", "line 6"]),
        (TEXT + "training: {seed: 1\n", ["not valid YAML"]),
        (TEXT + "training: !!python/object/apply:os.getcwd []\n", ["not valid YAML"]),
        ("", ["is not a mapping", "e3va recipes"]),
        ("# only a comment\n", ["is not a mapping"]),
        ("- task\n", ["is not a mapping"]),
        ("task\n", ["is not a mapping"]),
    ],
)
def test_a_file_that_is_no_config_is_named_with_the_line(text, parts, tmp_path):
    path = file(tmp_path, text=text)
    with pytest.raises(UserError) as error:
        read_config(path)
    assert all(part in str(error.value) for part in [str(path), *parts]), error.value


def test_a_file_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(TEXT.replace("photos", "fotografías").encode("latin-1"))
    with pytest.raises(UserError, match=r"run\.yaml: .*UTF-8"):
        read_config(path)
    path.write_bytes(TEXT.replace("photos", "fotografías").encode("utf-8-sig"))
    assert read_config(path).data.source == "fotografías"


def test_a_missing_file_offers_the_nearest_recipe(tmp_path):
    with pytest.raises(UserError, match=r"dinov2-image-folder.*e3va recipes"):
        read_config("dinov2-image-foldr")
    with pytest.raises(UserError, match="no such file"):
        read_config(tmp_path)  # a folder, not a file
    with pytest.raises(UserError, match="nuclei-upernet-swin"):
        recipe_text("nuclei-upernet-swim")


@pytest.mark.parametrize(
    "config",
    [
        parsed(),
        parsed(augment=False, method={"name": "lora", "r": 4}, image_size=64),
        parsed(SEGMENT, augment={"scale": [0.5, 2], "crop": 64, "color": True}),
        parsed(training={"learning_rate": 1e-5, "eval_strategy": "no", "lr_scheduler_kwargs": {"power": 1e-7}}),
        parsed(data={"source": "日本/é", "labels": ["no", "on", "1", "1e3", "~", "a: b", "Ü"], "eval_fraction": 1e-3}),
        parsed(processor={"image_mean": [0.5, 0.5, 0.5]}, model_options={"hidden_size": 8}),
    ],
    ids=range(6),
)
def test_what_is_written_reads_back_equal(config, tmp_path):
    assert read_config(file(tmp_path, text=config.to_yaml())) == config


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_a_config_that_says_what_it_is(name, tmp_path):
    first = recipe_text(name).splitlines()[0]
    assert first.startswith("# ") and len(first) > 20 and first.endswith(".")
    config = read_config(name)
    assert config == read_config(file(tmp_path, text=recipe_text(name)))
    assert arguments(config.to_dict(), **config.training).output_dir == config.output


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_says_where_data_and_weights_are_for_everyone(name):
    header = "".join(recipe_text(name).partition("task:")[0]).replace("\\\n#", "")
    assert "Data" in header or "data.source=" in header
    weights = read_config(name).model
    for words in re.findall(rf"e3va train {name} (.*)", header):
        weights = read_config(name, re.findall(r"--set (\S+)", words)).model
    assert weights.startswith(("facebook/", "microsoft/")) or "e3va_peft.demo.weights" in header


COCO = {
    "head": "cascade-mask-rcnn", "image_size": 800, "lr_steps": [27, 33], "num_train_epochs": 36, "batch": 16,
    "learning_rate": 1e-4, "weight_decay": 0.05, "scale": (480, 800),
}  # fmt: skip
PAPER = {
    "coco-cascade-mask-rcnn-swin-base": COCO,
    "coco-cascade-mask-rcnn-swin-large": COCO,
    "voc-retinanet-swin-large": {
        "head": "retinanet", "image_size": 600, "lr_steps": [9], "num_train_epochs": 12, "learning_rate": 1e-4,
        "processor": {"size": {"shortest_edge": 600, "longest_edge": 1000}}, "scale": (600, 600),
    },
    "ade20k-upernet-swin-large": {
        "image_size": 512, "max_steps": 160_000, "learning_rate": 6e-5, "weight_decay": 0.01, "batch": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_recipes_of_the_paper_train_as_it_did(name):
    config = read_config(name)
    training = config.training
    batch = training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1)
    low, high = (round(factor * config.image_size) for factor in config.augment.scale)
    found = config.to_dict() | training | {"batch": batch, "scale": (low, high)}
    assert {key: found[key] for key in PAPER[name]} == PAPER[name]
    assert training.get("optim", "adamw_torch").startswith("adamw") and config.method_name == "e3va"


def test_there_are_recipes_for_every_task():
    assert {read_config(name).task for name in recipes()} == set(TASKS)


def test_the_learning_rate_falls_to_a_tenth_at_the_epochs_of_lr_steps():
    factors = [_stepped(3, [6, 8], step) for step in range(9)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("steps", "training", "parts"),
    [
        (5, {}, ["lr_steps=5", "[27, 33]"]),
        ([], {}, ["lr_steps=[]"]),
        ([3, 2], {}, ["lr_steps=[3, 2]", "rise"]),
        (["9"], {}, ["lr_steps=['9']"]),
        ([9, 12], {"num_train_epochs": 12}, ["over after 12 epochs"]),
        ([2], {"max_steps": 100}, ["max_steps", "num_train_epochs"]),
    ],
)
def test_lr_steps_that_cannot_work_are_refused(steps, training, parts):
    refused(*parts, lr_steps=steps, training=training)


@pytest.mark.parametrize("factor", [0, -0.1, ".inf", "much", True])
def test_a_multiplier_that_cannot_work_is_refused(factor):
    refused(f"backbone_lr_multiplier={factor!r}", "method: head-only", backbone_lr_multiplier=factor)


def test_a_method_brings_its_learning_rate_and_the_config_overrides_it():
    for name, method in METHODS.items():
        assert arguments(CLASSIFY | {"method": name}).learning_rate == method.learning_rate
        assert arguments(CLASSIFY | {"method": name}, learning_rate=0.5).learning_rate == 0.5


def test_ddp_looks_for_no_unused_parameters_where_a_highway_is_trained():
    found = {name: arguments(CLASSIFY | {"method": name}).ddp_find_unused_parameters for name in METHODS}
    assert found == {name: False if name in ("e3va", "e3va-plus") else None for name in METHODS}
    assert arguments(ddp_find_unused_parameters=True).ddp_find_unused_parameters


def test_without_an_evaluation_split_nothing_is_evaluated_and_asking_for_it_is_refused():
    built = arguments(has_eval=False)
    assert built.eval_strategy == "no" and built.save_strategy == "epoch" and not built.load_best_model_at_end
    with pytest.raises(UserError, match=r"training\.eval_strategy=steps: .*data\.eval_fraction"):
        arguments(has_eval=False, eval_strategy="steps")


def test_the_best_checkpoint_is_kept_by_the_metric_of_the_task():
    for base, metric in ((CLASSIFY, "eval_accuracy"), (SEGMENT, "eval_mean_iou")):
        built = arguments(base)
        assert built.load_best_model_at_end and built.greater_is_better and built.metric_for_best_model == metric
    built = arguments(eval_strategy="steps", eval_steps=30)
    assert built.eval_steps == built.save_steps == 30


def test_the_best_checkpoint_can_be_the_only_one_that_is_saved():
    built = arguments(save_strategy="best")
    assert built.eval_strategy == "epoch" and built.metric_for_best_model == "eval_accuracy"
    assert built.load_best_model_at_end and built.greater_is_better
    with pytest.raises(UserError, match=r"save_strategy=best: .* Set training\.eval_strategy: epoch"):
        arguments(has_eval=False, save_strategy="best")


@pytest.mark.parametrize("name", ["eval_loss", "loss", "mean_class_accuracy", "eval_accuracy_top5"])
def test_a_score_of_the_task_may_judge(name):
    assert arguments(metric_for_best_model=name).greater_is_better is ("loss" not in name)


def test_a_score_that_no_evaluation_has_is_refused_before_training():
    with pytest.raises(UserError, match=r"best_model='acuracy': must be one of loss, accuracy, .* Did you mean"):
        arguments(metric_for_best_model="acuracy")
    with pytest.raises(UserError, match="metric_for_best_model='eval_accuracy': must be one of loss, mean_iou"):
        arguments(SEGMENT, metric_for_best_model="eval_accuracy")


@pytest.mark.parametrize(
    "training",
    [
        {"learning_rate": "fast"},
        {"learning_rate": [1e-3]},
        {"learning_rate": -1},
        {"learning_rate": float("nan")},
        {"learning_rate": None},
        {"num_train_epochs": "ten"},
        {"num_train_epochs": -1},
        {"num_train_epochs": 0},
        {"learning_rate": 0},
        {"learning_rate": 0.0},
        {"max_steps": 0},
        {"max_steps": -2},
        {"max_steps": 1e5},
        {"max_steps": "5"},
        {"per_device_train_batch_size": 0},
        {"per_device_train_batch_size": "two"},
        {"per_device_eval_batch_size": -2},
        {"gradient_accumulation_steps": 0},
        {"dataloader_num_workers": "all"},
        {"dataloader_num_workers": -1},
        {"seed": -1},
        {"seed": None},
        {"bf16": "yes"},
        {"push_to_hub": "yes"},
        {"warmup_steps": -1},
        {"logging_steps": 0},
        {"eval_strategy": "sometimes"},
        {"eval_strategy": True},
        {"eval_strategy": False},
        {"save_strategy": "sometimes"},
        {"optim": "magic"},
        {"lr_scheduler_type": "magic"},
        {"hub_strategy": "every_save"},
        {"load_best_model_at_end": True, "save_strategy": "no"},
        {"eval_strategy": "steps", "eval_steps": 7, "save_steps": 10},
    ],
    ids=str,
)
def test_a_training_argument_that_cannot_work_is_refused_by_name(training):
    with pytest.raises(UserError, match="training") as error:
        arguments(**training)
    *_, value = training.values()
    assert any(name in str(error.value) for name in training) or str(value) in str(error.value), error.value


def test_types_of_training_arguments_take_what_transformers_takes():
    built = arguments(num_train_epochs=3, eval_steps=None, tf32=None, warmup_steps=0.1, report_to=["none"])
    assert built.num_train_epochs == 3 and built.warmup_steps == 0.1


def test_patience_counts_evaluations_that_there_are():
    refused("patience=0", "patience: 3", patience=0)
    config = parsed(patience=2, training={"use_cpu": True})
    with pytest.raises(UserError, match=r"patience=2: .*eval_fraction"):
        build_arguments(config, task_of(config), has_eval=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on this machine")
def test_fp16_on_the_cpu_is_refused_with_what_works():
    with pytest.raises(UserError, match=r"training\.fp16=True: .*bf16: true"):
        arguments(fp16=True)
