"""`e3va train` from config to adapter: what it writes, how it stops and resumes, and what it says when it cannot."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial, partialmethod
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    trainer_utils,
)
from transformers.utils import is_accelerate_available
from typer.testing import CliRunner

import e3va_command
import e3va_peft
from e3va_peft import cli, registered_backbones
from e3va_peft.__main__ import main as run_command
from e3va_peft.cli import app
from e3va_peft.errors import UserError
from e3va_peft.files import FULL_DISK
from e3va_peft.methods import METHODS
from e3va_peft.training import run as run_module
from e3va_peft.training.arguments import build_arguments
from e3va_peft.training.config import RunConfig, parse_config, read_config
from e3va_peft.training.curves import best_entry
from e3va_peft.training.logs import _TensorBoard
from e3va_peft.training.predict import evaluate, load_trained
from e3va_peft.training.results import MANIFEST, plain
from e3va_peft.training.run import train
from e3va_peft.training.tasks import task_of
from e3va_peft.training.tasks.classification import ImageClassification
from e3va_peft.training.trainer import VisionTrainer
from tests.helpers import Stop, adapter_weights, assert_same, by_two, let_shard, stop_after
from tests.inputs import classify, detect, segment, write


def train_until(step: int, config: RunConfig, monkeypatch) -> None:
    """Train, and be killed in the middle of a step."""
    with monkeypatch.context() as patch:
        stop_after(step, patch)
        with pytest.raises(Stop):
            train(config)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def losses(record: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in record["history"] if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "method"),
    [(segment, name) for name in ("e3va", "head-only", "lora", "full", "mona")]
    + [(classify, name) for name in METHODS if name not in ("e3va", "head-only", "full")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_every_method_learns_and_is_scored_again_from_its_folder(task, method, tmp_path):
    values = task(tmp_path, num_train_epochs=6, eval_strategy="no", save_strategy="no") | {"method": method}
    record = train(parse_config(values))
    assert losses(record)[-1] < losses(record)[0]
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written["metrics"] == record["metrics"] and written["method"] == method
    scores, labels = evaluate(str(tmp_path / "run"))
    name = "accuracy" if task is classify else "mean_iou"
    assert scores[name] == pytest.approx(record["metrics"][name], abs=1e-6)
    assert labels == (("green", "red") if task is classify else ("ground", "disc"))
    folder = tmp_path / "run" / ("adapter" if METHODS[method].saves == "adapter" else "model")
    assert (folder / "preprocessor_config.json").is_file()
    if METHODS[method].saves == "adapter":
        card = (folder / "README.md").read_text()
        assert "More Information Needed" not in card and f"{record['metrics'][name]:.4g}" in card
        assert ("load_adapter(" if method.startswith("e3va") else f"# {method} adapter for ") in card


def test_curves_are_drawn_after_each_evaluation_and_at_the_end(tmp_path, monkeypatch, curves):
    config, picture = parse_config(classify(tmp_path)), tmp_path / "run" / "curves.png"
    train_until(4, config, monkeypatch)
    assert picture.stat().st_size > 5000
    first = picture.read_bytes()
    train(config)
    assert picture.read_bytes() != first


def test_colours_are_told_apart_after_a_few_epochs(tmp_path):
    options = {"eval_on_start": True, "save_strategy": "no", "load_best_model_at_end": False}
    values = classify(tmp_path, num_train_epochs=15, **options)
    record = train(parse_config(values))
    assert record["metrics"]["accuracy"] == 1.0
    assert record["per_class"]["accuracy"] == {"green": 1.0, "red": 1.0}
    first = next(entry for entry in record["history"] if "eval_accuracy" in entry)
    assert first["step"] == 0 and first["eval_accuracy"] < 1
    values["training"]["batch_eval_metrics"] = False
    assert evaluate(str(tmp_path / "run"), parse_config(values))[0]["accuracy"] == 1.0


@pytest.mark.parametrize(("rising", "count"), [(False, 3), (True, 4)], ids=["last-is-best", "first-is-best"])
def test_what_is_saved_is_evaluated_once(tmp_path, monkeypatch, rising, count):
    steps, plain_loop = [], VisionTrainer.evaluation_loop

    def counted(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return plain_loop(self, *args, **kwargs)

    monkeypatch.setattr(VisionTrainer, "evaluation_loop", counted)
    values = classify(tmp_path, num_train_epochs=3, metric_for_best_model="eval_loss", greater_is_better=rising)
    record = train(parse_config(values))
    assert len(steps) == count and record["best_step"] == steps[0 if rising else 2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A run that is finished, to be read only: the folder that it is in, and its record."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        return root, train(parse_config(classify(root)))


def test_a_run_says_what_a_step_cost_and_which_class_was_taken_for_which(finished, tmp_path, capsys):
    root, record = finished
    assert 0 < record["seconds_per_step"] * record["steps"] < record["training_seconds"] + 0.05
    assert 2**27 < record["peak_memory_bytes"] < 2**37
    first, *rows = (root / "run" / "confusion.csv").read_text().splitlines()
    counts = [[int(count) for count in row.split(",")[1:]] for row in rows]
    assert first == "true class,green,red" and [sum(row) for row in counts] == [4, 4]
    assert (counts[0][0] + counts[1][1]) / 8 == record["metrics"]["accuracy"]
    assert (root / "run" / "confusion.png").stat().st_size > 5000
    train(parse_config(detect(tmp_path, num_train_epochs=1)))
    assert not list((tmp_path / "run").glob("confusion*"))
    assert re.search(r"saved: .* s a step, \d+ MiB of the process at the peak\n", capsys.readouterr().out)


def test_a_run_that_does_not_become_better_ends_early_and_where_it_ends_without_a_stop(tmp_path, monkeypatch, capsys):
    worse = iter([0.5, 0.7, 0.6, 0.7, 0.7, 0.4, 0.3, 0.2] * 2)
    scores = lambda *_: {"accuracy": next(worse), "accuracy_per_class": [0.5, 0.5]}  # noqa: E731
    monkeypatch.setattr("e3va_peft.training.tasks.classification.ImageClassification.scores", scores)
    values = classify(tmp_path, num_train_epochs=8, load_best_model_at_end=False) | {"patience": 3}
    assert best_entry([{"a": math.nan}, {"a": 0.4}, {"a": 0.5}], "a", higher=False) == {"a": 0.4}
    assert plain({"a": [math.inf, 1.0]}) == {"a": [None, 1.0]}
    assert train(parse_config(values))["steps"] == 15  # three evaluations behind that of the second epoch
    assert "stopped early, at step 15 of 24: accuracy" in capsys.readouterr().out
    worse = iter([0.5, 0.7, 0.6, 0.7, 0.7, 0.4])
    config = parse_config(values | {"output": str(tmp_path / "cut")})
    train_until(10, config, monkeypatch)
    assert train(config)["steps"] == 15


def test_an_e3va_adapter_is_complete_by_itself(finished):
    root, record = finished
    with pytest.raises(FileNotFoundError, match=r"is the folder of a run. Its adapter is .*run/adapter\."):
        e3va_peft.load_adapter(root / "run")
    model, processor = e3va_peft.load_adapter(root / "run" / "adapter")
    assert model.get_base_model().config.id2label == {0: "green", 1: "red"}
    assert processor.crop_size["height"] == 32
    card = (root / "run" / "adapter" / "README.md").read_text()
    assert f"| accuracy | {record['metrics']['accuracy']:.4g} |" in card and "green, red" in card


def test_a_head_only_model_loads_with_transformers_alone(tmp_path):
    train(parse_config(classify(tmp_path) | {"method": "head-only"}))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.label2id == {"green": 0, "red": 1}


def test_a_model_with_modules_put_in_is_loaded_from_its_run_and_refused_without_it(tmp_path):
    train(parse_config(classify(tmp_path) | {"method": "mona"}))
    run = tmp_path / "run"
    saved = load_trained(str(run)).model.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in adapter_weights(run).items())
    assert any("baseline_adapter" in name for name in saved)
    with pytest.raises(UserError, match=r"model: .*of the run"):
        load_trained(str(run / "model"))
    weights = {name: value for name, value in adapter_weights(run).items() if "baseline_adapter" not in name}
    save_file(weights, run / "model" / "model.safetensors", metadata={"format": "pt"})
    (run / "model" / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"model: .*method=mona"):
        load_trained(str(run))


def test_a_finished_run_is_trained_again_only_if_told_and_what_it_did_not_write_stays(tmp_path):
    config = parse_config(classify(tmp_path))
    first = train(config)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite"):
        train(config)
    again = train(config, overwrite=True)
    assert again["metrics"] == first["metrics"] and not again["resumed"]
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_the_method_can_be_part_of_the_output_so_that_a_comparison_is_one_word(tmp_path):
    values = classify(tmp_path, "run-{method}")
    config = write(tmp_path / "config.yaml", values)
    outputs = [read_config(config, [f"method={name}"]).output for name in ("lora", "full")]
    assert outputs == [str(tmp_path / "run-lora"), str(tmp_path / "run-full")]


def test_other_settings_do_not_go_into_the_folder_of_a_run(finished):
    root, _ = finished
    with pytest.raises(FileExistsError, match=r"training.learning_rate: 0.005.*0.0001"):
        train(parse_config(classify(root, learning_rate=1e-4)))
    (root / "notes").mkdir()
    (root / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="notes"):
        train(parse_config(classify(root, "notes")), overwrite=True)
    assert (root / "notes" / "mine.txt").read_text() == "keep"


def test_the_learning_rate_of_a_run_falls_at_its_lr_steps(tmp_path):
    values = classify(tmp_path, num_train_epochs=4, logging_steps=1, warmup_steps=0, learning_rate=1e-3)
    history = train(parse_config(values | {"lr_steps": [2, 3]}))["history"]
    rates = {entry["epoch"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}
    assert {rate for epoch, rate in rates.items() if epoch <= 2} == {1e-3}
    assert rates[3] == pytest.approx(1e-4) and rates[4] == pytest.approx(1e-5)


@pytest.mark.parametrize("method", ["e3va", "lora", "full", "head-only"])
def test_what_is_trained_inside_the_backbone_has_a_rate_of_its_own(method, tmp_path):
    values = classify(tmp_path, num_train_epochs=1, learning_rate=1e-3, warmup_steps=0, logging_steps=1)
    rates = {}
    for factor in (1, 0.1):
        config = parse_config(
            values | {"method": method, "backbone_lr_multiplier": factor, "output": str(tmp_path / str(factor))}
        )
        result = train(config)
        (folder,) = Path(config.output).glob("checkpoint-*")
        groups = torch.load(folder / "optimizer.pt")["param_groups"]
        rates[factor] = [group["initial_lr"] for group in groups for _ in group["params"]]
        assert len(rates[factor]) == len({each for group in groups for each in group["params"]})
    assert set(rates[1]) == {1e-3} and len(rates[1]) == len(rates[0.1])
    inside = {} if method == "head-only" else {1e-4}
    assert set(rates[0.1]) == {1e-3, *inside} and rates[0.1].count(1e-3) == 4  # head and output norm
    assert result["history"][0]["learning_rate"] == 1e-3  # the head's is what is shown


def test_a_rate_for_a_backbone_that_nobody_knows_is_refused(tmp_path):
    values = classify(tmp_path) | {"method": "full", "model": str(tmp_path / "resnet"), "backbone_lr_multiplier": 0.1}
    base = ResNetForImageClassification(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_labels=2))
    base.save_pretrained(tmp_path / "resnet")
    shutil.copy(tmp_path / "model" / "preprocessor_config.json", tmp_path / "resnet")
    with pytest.raises(
        UserError, match=r"backbone_lr_multiplier=0\.1: ResNetForImageClassification holds no backbone"
    ):
        train(parse_config(values))


@pytest.mark.parametrize("method", ["e3va", "full", "mona"])
def test_the_same_command_resumes_and_ends_where_an_uninterrupted_run_does(method, tmp_path, monkeypatch):
    arguments = {"load_best_model_at_end": False, "num_train_epochs": 4, "dataloader_num_workers": 1}
    options = {"method": method, "model_options": {"drop_path_rate": 0.3}, "backbone_lr_multiplier": 0.5}
    whole = train(parse_config(classify(tmp_path, "whole", **arguments) | options))
    config = parse_config(classify(tmp_path, "cut", **arguments) | options)
    train_until(7, config, monkeypatch)
    resumed = train(config)
    assert resumed["resumed"] and resumed["steps"] == whole["steps"] == 12
    first, second = adapter_weights(tmp_path / "whole"), adapter_weights(tmp_path / "cut")
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-6, atol=1e-7)


def test_a_run_resumed_within_an_epoch_sees_the_images_that_it_would_have_seen(tmp_path, monkeypatch):
    steps = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": False, "logging_steps": 1}
    whole = train(parse_config(classify(tmp_path, "whole", **steps) | {"augment": True}))
    config = parse_config(classify(tmp_path, "cut", **steps) | {"augment": True})
    train_until(5, config, monkeypatch)  # of three steps an epoch
    assert losses(train(config)) == losses(whole)
    first, second = adapter_weights(tmp_path / "whole"), adapter_weights(tmp_path / "cut")
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_a_checkpoint_cut_short_is_put_aside_and_the_one_before_is_used(tmp_path, monkeypatch, capsys):
    config = parse_config(classify(tmp_path, num_train_epochs=4, save_total_limit=3))
    train_until(10, config, monkeypatch)
    newest = tmp_path / "run" / "checkpoint-9"
    for name in ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json"):
        data = (newest / name).read_bytes()
        (newest / name).write_bytes(data[: len(data) // 2])
        assert run_module.last_checkpoint(tmp_path / "run", run_module.Console()).name == "checkpoint-6"
        assert re.search(rf"not\s+whole:\s+{name}", capsys.readouterr().out)
        (tmp_path / "run" / "broken-checkpoint-9").rename(newest)
        (newest / name).write_bytes(data)
    (newest / "optimizer.pt").write_bytes(b"half")
    assert train(config)["resumed"]
    assert (tmp_path / "run" / "broken-checkpoint-9").is_dir()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped behind three checkpoints, the images it was trained on, and its config; to be copied."""
    root = tmp_path_factory.mktemp("stopped")
    values = classify(root, num_train_epochs=4, save_total_limit=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        stop_after(10, patch)
        with pytest.raises(Stop):
            train(parse_config(values))
    return root, values


def copy_of(stopped, folder: Path) -> Path:
    """A copy of the run alone: it says that its place is still that of the original."""
    shutil.copytree(stopped[0] / "run", folder / "run")
    return folder / "run"


FILES = (
    "adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json",
)  # fmt: skip


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_damaged_checkpoint_is_named_put_aside_and_the_one_before_is_used(damage, stopped, tmp_path, capsys):
    run = copy_of(stopped, tmp_path)
    newest = run / "checkpoint-9"
    for name in FILES if damage == "flipped" else (*FILES, MANIFEST):
        data = (newest / name).read_bytes()
        if damage == "missing":
            (newest / name).unlink()
        else:
            place = len(data) // 2
            (newest / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert run_module.last_checkpoint(run, run_module.Console(soft_wrap=True)).name == "checkpoint-6"
        assert f"not whole: {name}" in capsys.readouterr().out
        (run / "broken-checkpoint-9").rename(newest)
        (newest / name).write_bytes(data)
    assert run_module.last_checkpoint(run, run_module.Console()).name == "checkpoint-9"


def test_a_clock_that_is_set_back_costs_no_checkpoint(tmp_path, monkeypatch):
    def an_hour_earlier_each_time(path: str) -> float:
        return -3600.0 * int(Path(path).name.removeprefix("checkpoint-"))

    monkeypatch.setattr(trainer_utils.os.path, "getmtime", an_hour_earlier_each_time)
    options = {"save_total_limit": 1, "load_best_model_at_end": False, "eval_strategy": "no"}  # so none is the best
    train(parse_config(classify(tmp_path, **options)))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-9"]


def test_a_copy_of_a_checkpoint_is_not_removed_with_the_older_ones(tmp_path, monkeypatch):
    original = VisionTrainer._remove_older

    def copied(self: Any, limit: int | None) -> None:
        if self.state.global_step == 3:
            shutil.copytree(tmp_path / "run" / "checkpoint-3", tmp_path / "run" / "checkpoint-3-mine")
        original(self, limit)

    monkeypatch.setattr(VisionTrainer, "_remove_older", copied)
    train(parse_config(classify(tmp_path, save_total_limit=1, load_best_model_at_end=False, eval_strategy="no")))
    left = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert left == {"checkpoint-3-mine", "checkpoint-9"}


def test_ctrl_c_keeps_the_checkpoint_that_it_saves_beside_the_best_one(tmp_path, monkeypatch):
    config = parse_config(classify(tmp_path, num_train_epochs=4, save_total_limit=1))
    original = VisionTrainer.training_step

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 7:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(VisionTrainer, "training_step", interrupted)
        with pytest.raises(run_module.Interrupted, match="stopped at step 8"):
            train(config)
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} >= {"checkpoint-8"}
    record = train(config)
    assert record["resumed"] and min(entry["step"] for entry in record["history"][-3:]) > 8


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
@pytest.mark.parametrize(("judge", "mode"), [(None, "max"), ("eval_loss", "min")])
def test_a_rate_that_falls_when_nothing_improves_knows_what_is_better(kind, judge, mode, tmp_path):
    judged = {} if judge is None else {"metric_for_best_model": judge}
    config = parse_config(classify(tmp_path, lr_scheduler_type=kind, **judged))
    assert build_arguments(config, task_of(config), has_eval=True).lr_scheduler_kwargs["mode"] == mode
    own = parse_config(classify(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs={"mode": "min", "factor": 0.5}))
    arguments = build_arguments(own, task_of(own), has_eval=True)
    assert arguments.lr_scheduler_kwargs == {"mode": "min", "factor": 0.5}


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"optim": "lomo"}, r"training\.optim='lomo': cannot be built\. .*lomo"),
        ({"optim_args": "foo"}, r"training\.optim='adamw_torch_fused', training\.optim_args='foo': cannot be built"),
    ],
)
def test_an_optimizer_that_cannot_be_built_stops_no_run_that_has_put_an_earlier_one_aside(training, message, tmp_path):
    config = parse_config(classify(tmp_path, num_train_epochs=1))
    train(config)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        train(parse_config(classify(tmp_path, num_train_epochs=1, **training)), overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_rate_inside_the_backbone_is_refused_for_an_optimizer_with_one_rate(tmp_path, monkeypatch):
    class OneRate(torch.optim.SGD):
        def __init__(self, params: Any, **kwargs: Any) -> None:
            super().__init__([torch.nn.Parameter(torch.zeros(1))], lr=0.1)

    monkeypatch.setattr(VisionTrainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda *args: (OneRate, {})))
    with pytest.raises(UserError, match=r"backbone_lr_multiplier=0\.1: training\.optim=.*one learning rate"):
        train(parse_config(classify(tmp_path) | {"backbone_lr_multiplier": 0.1}))


def test_deepspeed_is_refused_by_name(tmp_path, monkeypatch):
    original = VisionTrainer.create_accelerator_and_postprocess

    def with_deepspeed(self: Any) -> None:
        original(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(VisionTrainer, "create_accelerator_and_postprocess", with_deepspeed)
    with pytest.raises(UserError, match=r"DeepSpeed: is not supported.*FSDP"):
        train(parse_config(classify(tmp_path)))


def test_a_run_without_a_whole_checkpoint_says_that_it_starts_from_the_beginning(stopped, tmp_path, capsys):
    run = copy_of(stopped, tmp_path)
    for step in (3, 6, 9):
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text("[]")
        (run / f"checkpoint-{step}" / MANIFEST).write_text("{" if step == 6 else "{}")
    assert run_module.last_checkpoint(run, run_module.Console(soft_wrap=True)) is None
    shown = capsys.readouterr().out
    assert f"{MANIFEST} is damaged" in shown and f"{MANIFEST}, which" in shown and "from the beginning" in shown


@pytest.mark.parametrize("change", ["fewer", "other-file", "other-label", "touched", "fewer-to-evaluate-on"])
def test_a_run_does_not_resume_on_other_images(change, tmp_path, monkeypatch):
    config = parse_config(classify(tmp_path, num_train_epochs=2))
    train_until(4, config, monkeypatch)
    red = tmp_path / "colors" / "train" / "red"
    image = next(red.iterdir())
    if change == "fewer":
        image.unlink()
    elif change == "other-file":
        image.write_bytes(image.read_bytes() + b"more")
    elif change == "other-label":
        image.rename(tmp_path / "colors" / "train" / "green" / f"moved-{image.name}")
    elif change == "touched":
        os.utime(image, (1, 1))
    else:
        next((tmp_path / "colors" / "test" / "red").iterdir()).unlink()
    if change == "touched":
        assert train(config)["resumed"]
        return
    said = r"evaluated on 8 images .* now has 7" if "evaluate" in change else r"trained on 12 images .* now has 1[12]"
    with pytest.raises(UserError, match=f"checkpoint-3: was {said} images"):
        train(config)


def nudge(file: Path, part: str) -> None:
    """Change one of the numbers of a weight."""
    weights = load_file(file)
    next(value for name, value in weights.items() if part in name).view(-1)[0] += 1
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("method", ["e3va", "lora", "norm-tuning"])
def test_a_run_neither_resumes_nor_predicts_on_another_base(method, tmp_path, monkeypatch):
    config, base = parse_config(classify(tmp_path) | {"method": method}), tmp_path / "model" / "model.safetensors"
    train_until(4, config, monkeypatch)
    before = base.read_bytes()
    nudge(base, "layers.0")
    with pytest.raises(UserError, match=r"checkpoint-3: the adapter was trained on the backbone weights"):
        train(config)
    base.write_bytes(before)
    assert train(config)["resumed"]
    load_trained(str(tmp_path / "run"))
    nudge(base, "classifier")  # which the adapter brings
    load_trained(str(tmp_path / "run"))
    nudge(base, "layers.0")
    with pytest.raises(UserError, match=r"run.*: the adapter was trained on the backbone .* remove (base|back)"):
        load_trained(str(tmp_path / "run"))


@pytest.mark.parametrize("method", ["lora", "head-only"])
def test_what_a_run_saved_is_refused_once_its_weights_changed_unless_its_manifest_is_removed(method, tmp_path):
    train(parse_config(classify(tmp_path, num_train_epochs=1) | {"method": method}))
    (file,) = (tmp_path / "run" / ("adapter" if method == "lora" else "model")).glob("*.safetensors")
    nudge(file, "classifier")
    with pytest.raises(UserError, match=rf"{file.name} is not what was written.*{MANIFEST}"):
        load_trained(str(tmp_path / "run"))
    (file.parent / MANIFEST).unlink()
    load_trained(str(tmp_path / "run"))


@pytest.mark.parametrize("method", ["e3va", "head-only"])
def test_a_run_whose_best_checkpoint_was_damaged_resumes_and_ends(method, tmp_path, monkeypatch, capsys):
    config = parse_config(classify(tmp_path, num_train_epochs=3, save_total_limit=3) | {"method": method})
    train_until(7, config, monkeypatch)
    newest = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    best = Path(newest["best_model_checkpoint"])
    assert best.name == "checkpoint-3"
    (best / "optimizer.pt").write_bytes(b"half")
    record = train(config)
    assert record["resumed"] and record["best_step"] == 9  # no evaluation that is left is of another step
    shown = "".join(capsys.readouterr())
    assert "checkpoint-3 is not whole" in shown
    assert "the best checkpoint so far, of step 3, is not there any more" in shown


@pytest.mark.parametrize("method", ["e3va", "lora"])
@pytest.mark.parametrize("part", ["highway|lora_A", "classifier"])
def test_a_checkpoint_that_lacks_weights_of_its_adapter_is_not_resumed_from(method, part, tmp_path, monkeypatch):
    config = parse_config(classify(tmp_path) | {"method": method})
    train_until(7, config, monkeypatch)
    file = tmp_path / "run" / "checkpoint-6" / "adapter_model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if not re.search(part, name)}
    save_file(weights, file, metadata={"format": "pt"})
    manifest = json.loads((file.parent / MANIFEST).read_text())
    manifest["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (file.parent / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"checkpoint-6: .*\d+ weights, '.*({part})"):
        train(config)


@pytest.mark.parametrize("method", ["e3va", "lora"])
def test_a_new_head_that_would_be_neither_trained_nor_saved_is_refused(method, tmp_path):
    values = classify(tmp_path) | {"method": {"name": method, "modules_to_save": []}}
    with pytest.raises(UserError, match=r"modules_to_save: .*\['classifier.weight', 'classifier.bias'\]"):
        train(parse_config(values))
    values["method"]["modules_to_save"] = ["classifier"]
    assert train(parse_config(values))["steps"] == 9


def test_a_part_of_a_new_segmenter_that_would_be_neither_trained_nor_saved_is_refused(tmp_path):
    values = segment(tmp_path) | {"method": {"name": "e3va", "modules_to_save": ["decode_head"]}}
    with pytest.raises(UserError, match=r"modules_to_save: .*\['backbone.hidden_states_norms"):
        train(parse_config(values))


def test_a_pretrained_head_may_stay_as_it_is(tmp_path):
    values = classify(tmp_path, num_train_epochs=1) | {"method": {"name": "e3va", "modules_to_save": []}}
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    config = model.config
    config.num_labels = 2
    type(model)(config).save_pretrained(tmp_path / "model")
    train(parse_config(values))
    assert load_trained(str(tmp_path / "run")).labels == ("green", "red")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_and_the_same_command_resumes(number, code, tmp_path, monkeypatch):
    config = write(tmp_path / "config.yaml", classify(tmp_path, eval_strategy="no", save_strategy="no"))
    original = VisionTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 4:
            signal.raise_signal(number)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(VisionTrainer, "training_step", training_step)
        stopped = CliRunner().invoke(app, ["train", str(config)])
    assert stopped.exit_code == code and "step 5 of 9" in stopped.output, stopped.output
    assert run_module.last_checkpoint(tmp_path / "run", run_module.Console()).name == "checkpoint-5"
    assert CliRunner().invoke(app, ["train", str(config)]).exit_code == 0
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["resumed"] and record["steps"] == 9


def test_ctrl_c_in_the_last_step_of_an_epoch_loses_no_evaluation(tmp_path, monkeypatch):
    options = {"per_device_train_batch_size": 4, "num_train_epochs": 3}
    whole, original = train(parse_config(classify(tmp_path, "whole", **options))), VisionTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **kwargs)

    config = parse_config(classify(tmp_path, **options))
    with monkeypatch.context() as patch:
        patch.setattr(VisionTrainer, "training_step", training_step)
        with pytest.raises(run_module.Interrupted, match="step 3 of 9"):
            train(config)
    record = train(config)
    scores = [[(e["step"], e["eval_loss"]) for e in each["history"] if "eval_loss" in e] for each in (whole, record)]
    assert scores[0] == scores[1] and whole["best_step"] == record["best_step"]


def test_a_short_last_batch_is_dropped_in_training_alone(tmp_path):
    options = {"per_device_train_batch_size": 5, "per_device_eval_batch_size": 3, "num_train_epochs": 1}
    train(parse_config(classify(tmp_path, dataloader_drop_last=True, **options)))
    rows = [line.split(",")[1:] for line in (tmp_path / "run" / "confusion.csv").read_text().splitlines()[1:]]
    assert sum(int(count) for row in rows for count in row) == len(list((tmp_path / "colors" / "test").rglob("*.png")))


def test_ctrl_c_in_an_evaluation_stops_behind_it(tmp_path, monkeypatch):
    config = write(tmp_path / "config.yaml", classify(tmp_path))
    original = VisionTrainer.prediction_step

    def prediction_step(self, *args, **kwargs):
        found = original(self, *args, **kwargs)
        if self.state.global_step == 3:
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(VisionTrainer, "prediction_step", prediction_step)
    stopped = CliRunner().invoke(app, ["train", str(config)])
    assert stopped.exit_code == 130 and "step 3 of 9" in stopped.output, stopped.output
    assert "stopping after this evaluation" in stopped.output
    assert run_module.last_checkpoint(tmp_path / "run", run_module.Console()).name == "checkpoint-3"


def test_a_loss_that_rose_and_stayed_there_is_warned_of(tmp_path, capsys):
    train(parse_config(classify(tmp_path, learning_rate=100, num_train_epochs=3)))
    shown = capsys.readouterr().out
    assert "warning: the loss rose from" in shown and "Lower training.learning_rate, 100 now." in shown
    train(parse_config(classify(tmp_path, "good", num_train_epochs=3)))
    assert "the loss rose" not in capsys.readouterr().out


def test_metrics_that_a_power_cut_left_empty_finish_no_run(tmp_path, monkeypatch):
    config = parse_config(classify(tmp_path, num_train_epochs=2))
    train_until(4, config, monkeypatch)
    (tmp_path / "run" / "metrics.json").touch()
    assert train(config)["resumed"]


def test_a_run_without_an_evaluation_one_that_ends_in_its_warm_up_and_an_uneven_size_are_warned_of(tmp_path, capsys):
    values = classify(tmp_path, num_train_epochs=1, warmup_steps=1000)
    shutil.rmtree(tmp_path / "colors" / "test")
    (tmp_path / "colors" / "val").mkdir()
    (tmp_path / "model" / "preprocessor_config.json").unlink(missing_ok=True)
    train(parse_config(values | {"image_size": 33, "cache": {"views": 2, "folder": str(tmp_path / "frozen")}}))
    shown = capsys.readouterr().out
    assert f"{tmp_path}/colors/val has no image" in shown
    assert "has no preprocessor_config.json: images are normalised by the mean [0.485, 0.456, 0.406]" in shown
    assert "image_size=33: is no multiple of 2" in shown and "nearest that is: 34." in shown
    assert "cache.views=2: " in shown and "Set cache.views=1, unless a longer run follows." in shown
    assert "nothing to evaluate on" in shown and "data.eval_fraction" in shown
    assert "the warm-up takes 1000 steps and the training 3" in shown


@pytest.mark.parametrize(
    ("cache", "training"),
    [({"views": 2, "storage": "none"}, {"num_train_epochs": 1}), ({"views": 2}, {"num_train_epochs": 1.5}),
     ({"views": 2}, {"num_train_epochs": 1, "max_steps": 9}), (None, {"num_train_epochs": 1})],
)  # fmt: skip
def test_views_that_are_seen_or_not_kept_are_not_warned_of(tmp_path, cache, training):
    config = parse_config(classify(tmp_path) | {"cache": cache})
    assert not run_module.unseen_views(config, TrainingArguments(str(tmp_path), use_cpu=True, **training))


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_its_checkpoints(tmp_path, monkeypatch):
    config = parse_config(classify(tmp_path, num_train_epochs=4))
    original = VisionTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 7 else loss

    with monkeypatch.context() as patch:
        patch.setattr(VisionTrainer, "compute_loss", compute_loss)
        with pytest.raises(UserError, match=r"nan at step 8.*training.learning_rate"):
            train(config)
    assert run_module.last_checkpoint(tmp_path / "run", run_module.Console()).name == "checkpoint-6"
    assert train(config)["steps"] == 12


def test_what_is_said_to_be_trained_and_gets_no_gradient_is_named(tmp_path, monkeypatch, capsys):
    build = ImageClassification.build_model

    def with_idle(self: Any, labels: Any) -> Any:
        model = build(self, labels)
        model.idle = torch.nn.Linear(2, 2)
        return model

    monkeypatch.setattr(ImageClassification, "build_model", with_idle)
    monkeypatch.setattr("e3va_peft.training.run.new_parameters", lambda model: [])
    train(parse_config(classify(tmp_path, max_steps=1)))
    shown = capsys.readouterr().out
    assert re.search(r"warning: 2 of \d+ trained parameters got no gradient .*idle.*weight, .*idle.*bias\.", shown), (
        shown
    )


def test_label_maps_that_are_all_ignored_are_named_and_teach_nothing(tmp_path, capsys):
    values = segment(tmp_path, num_train_epochs=1, per_device_train_batch_size=1)
    for split in ("train", "val"):
        blank = next((tmp_path / "discs" / "masks" / split).glob("*.png"))
        with Image.open(blank) as image:
            size = image.size
        Image.new("L", size).save(blank)
    values["training"] |= {"per_device_eval_batch_size": 1, "metric_for_best_model": "eval_loss"}
    assert 0 <= train(parse_config(values))["metrics"]["mean_iou"] <= 1
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert math.isfinite(state["best_metric"])
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "1 label maps of" in shown and "teach nothing" in shown and "0.png" in shown


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_full_disk_is_named_and_the_checkpoint_that_did_not_fit_is_removed(tmp_path, monkeypatch):
    # a real failure to write: files may not grow beyond a limit that the second file of a checkpoint exceeds
    import resource

    original = VisionTrainer._save_optimizer_and_scheduler
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limited(self, folder):
        if self.state.global_step > 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10000, before[1]))
        try:
            original(self, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    config = write(tmp_path / "config.yaml", classify(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(VisionTrainer, "_save_optimizer_and_scheduler", limited)
        done = CliRunner().invoke(app, ["train", str(config)])
    signal.signal(signal.SIGXFSZ, ignored)
    assert done.exit_code == 1
    assert "the disk is full" in done.output and "same command resumes" in done.output, done.output
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    assert train(parse_config(classify(tmp_path)))["resumed"]


@pytest.mark.parametrize("number", FULL_DISK, ids=errno.errorcode.get)
def test_a_full_disk_is_named_by_every_command(number, tmp_path, monkeypatch):
    def full(*args: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number), "there/a.png")

    monkeypatch.setattr("e3va_peft.training.predict.predict", full)
    done = CliRunner().invoke(app, ["predict", str(tmp_path), str(tmp_path)], env={"COLUMNS": "200"})
    assert done.exit_code == 1 and "there/a.png: the disk is full" in done.output, done.output


def test_too_little_disk_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="are free, checkpoints take"):
        train(parse_config(classify(tmp_path)))


def test_a_broken_image_is_named_before_training_starts(tmp_path):
    config = parse_config(classify(tmp_path))
    broken = tmp_path / "colors" / "train" / "red" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(UserError, match=r"1 of 12 examples:\n.*train/red/3.png"):
        train(config)


def test_bf16_follows_fp32(tmp_path):
    curves = {}
    for name in ("fp32", "bf16"):
        values = segment(tmp_path, name, num_train_epochs=4, logging_steps=1, bf16=name == "bf16") | {"augment": False}
        curves[name] = torch.tensor(losses(train(parse_config(values))))
    assert len(curves["fp32"]) == 12
    assert not torch.equal(curves["bf16"], curves["fp32"])
    torch.testing.assert_close(curves["bf16"], curves["fp32"], rtol=0.05, atol=0.02)


def test_gradient_accumulation_equals_a_larger_batch(tmp_path):
    # layer norms only: the batch norms of UperNet see each part by itself
    common = {"num_train_epochs": 2, "logging_steps": 1, "load_best_model_at_end": False}
    whole = train(parse_config(classify(tmp_path, "whole", **common)))
    values = classify(tmp_path, "parts", **common, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    parts = train(parse_config(values))
    torch.testing.assert_close(losses(parts), losses(whole), rtol=1e-4, atol=1e-5)


def train_as_launched(rank: int, config: str, environment: dict[str, str]) -> None:
    """Be the process that a launcher starts with `-m e3va_peft train`, and write what it says to a file."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= environment | ranks | {"MASTER_ADDR": "localhost"}
    datasets.config.HF_DATASETS_CACHE = Path(config).parent / "cache"
    sys.argv = ["e3va", "train", config]
    with open(f"{config}.{rank}", "w") as sys.stdout:
        run_command()


def launched(config: Path) -> dict[str, str]:
    """The environment in which `accelerate launch` starts two processes."""
    arguments = ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
    parsed = launch_command_parser().parse_args([*arguments, "-m", "e3va_peft", "train", str(config)])
    found = prepare_multi_gpu_env(_validate_launch_command(parsed)[0])
    return found | {"MASTER_PORT": parsed.master_port}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_two_processes_give_the_curve_and_the_adapter_of_one_from_images_and_from_a_cache(tmp_path):
    common = {"logging_steps": 1, "load_best_model_at_end": False}
    views = {"augment": True, "cache": {"storage": "none", "views": 2, "folder": str(tmp_path / "frozen")}}
    train(parse_config(classify(tmp_path, "one", **common) | views))
    values = classify(tmp_path, "two", **common, per_device_train_batch_size=2, report_to="tensorboard") | views
    values["sweep"] = {"cache.storage": ["none", "exact"]}
    config = write(tmp_path / "two.yaml", values)
    by_two(train_as_launched, str(config), launched(config))
    said = [Path(f"{config}.{rank}").read_text().count("2 processes") for rank in (0, 1)]
    assert said == [2, 0]  # one of them speaks, once a run
    assert len(list((tmp_path / "frozen" / "train").glob("data-*.bin"))) == 2  # each filled its half
    one, first = json.loads((tmp_path / "one" / "metrics.json").read_text()), adapter_weights(tmp_path / "one")
    for run in (tmp_path / "two" / "storage=none", tmp_path / "two" / "storage=exact"):
        two, second = json.loads((run / "metrics.json").read_text()), adapter_weights(run)
        assert len(losses(two)) == 9
        torch.testing.assert_close(losses(two), losses(one), rtol=1e-4, atol=1e-5)
        assert two["metrics"]["accuracy"] == one["metrics"]["accuracy"]
        for name, value in first.items():
            torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5, msg=name)
        (log,) = (run / "logs" / "tensorboard").iterdir()  # the first process alone writes it
        shown = EventAccumulator(str(log)).Reload()
        assert [len(shown.Images(name)) for name in shown.Tags()["images"]] == [3] * 4


FSDP = pytest.mark.skipif(not is_accelerate_available("1.15.0"), reason="is refused, as `be_one_of_two` sees")


def be_one_of_two(rank: int, folder: str, port: int, names: tuple[str, ...]) -> None:
    """Run in a process of its own: score runs, train one that is cut off, end one that was, and train sharded."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")
    for name in names:
        scores, _ = evaluate(f"{folder}/{name}")
        assert torch.distributed.get_world_size() == 2
        Path(folder, f"{name}-{rank}.json").write_text(json.dumps(scores))
    half = {"per_device_train_batch_size": 2}
    with pytest.raises(
        UserError, match=r"checkpoint-3: was trained with 4 images a step, and 2 .* take 8\. .*must be 4"
    ):
        train(parse_config(classify(Path(folder), "grown")))
    train(parse_config(classify(Path(folder), "grown", **half)))
    with pytest.MonkeyPatch.context() as patch:
        train_until(4, parse_config(classify(Path(folder), "cut", **half)), patch)
        config = parse_config(classify(Path(folder), "sharded", **half, report_to="tensorboard"))
        build = "create_accelerator_and_postprocess"
        patch.setattr(VisionTrainer, build, partialmethod(let_runs_shard, state_dict_type="SHARDED_STATE_DICT"))
        if not is_accelerate_available("1.15.0"):
            with pytest.raises(UserError, match=r"FSDP: accelerate 1\.\d.* pip install -U 'accelerate>=1\.15'"):
                train(config)
            return
        with pytest.raises(UserError, match=r"saves SHARDED_STATE_DICT.*--fsdp_state_dict_type FULL_STATE_DICT"):
            train(config)
        patch.setattr(VisionTrainer, build, let_runs_shard)
        train_until(4, config, patch)
        train(config)
        with pytest.raises(UserError, match="checkpoint-3: was trained without FSDP, and this run is with FSDP"):
            train(parse_config(classify(Path(folder), "cut", **half)))
        patch.setattr(_TensorBoard, "show", lambda *args: 1 / 0)  # the first process alone fails: both must go on
        values = classify(Path(folder), "sharded-head", **half, num_train_epochs=2, report_to="tensorboard")
        train(parse_config(values | {"method": "head-only"}))
        train(parse_config(classify(Path(folder), "sharded-lora", **half, num_train_epochs=1) | {"method": "lora"}))


def let_runs_shard(trainer: VisionTrainer, **options: Any) -> None:
    """Build the accelerator of a run as under `accelerate launch --use_fsdp`."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    Trainer.create_accelerator_and_postprocess(trainer)
    let_shard(trainer.accelerator, cpu_ram_efficient_loading=True, **options)
    trainer.is_fsdp_enabled = True


@pytest.fixture(scope="module")
def runs_of_two(tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    """Runs of three tasks that two processes have scored, one, `cut`, that they have begun, and others they ended."""
    root = tmp_path_factory.mktemp("two")
    common = {"num_train_epochs": 1, "per_device_eval_batch_size": 1}
    tasks = {"colors": classify, "discs": segment, "shapes": partial(detect, head="cascade-mask-rcnn", layout="coco")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        for name, task in tasks.items():
            train(parse_config(task(root, output=f"run-{name}", **common)))
        for extra in (root / "colors" / "test" / "red").glob("*0*"):
            extra.unlink()  # an odd number of images, as the others have
        train(parse_config(classify(root, "whole")))
        train_until(4, parse_config(classify(root, "grown")), patch)
    runs = tuple(f"run-{name}" for name in tasks)
    by_two(be_one_of_two, str(root), free_port(), runs)
    return root, runs


@pytest.mark.slow
def test_two_processes_score_as_one_and_count_no_image_twice(runs_of_two):
    root, runs = runs_of_two
    for name in runs:
        expected, _ = evaluate(str(root / name))
        expected.pop("loss")  # Trainer's mean counts a batch that is filled up by its size
        for rank in (0, 1):
            found = json.loads((root / f"{name}-{rank}.json").read_text())
            for metric, value in expected.items():
                assert found[metric] == pytest.approx(value, abs=1e-6, nan_ok=True), (name, metric)


@pytest.mark.slow
def test_one_process_ends_what_two_began_with_as_many_images_a_step_and_no_others(runs_of_two):
    root, _ = runs_of_two
    with pytest.raises(
        UserError, match=r"checkpoint-3: was trained with 4 images a step, and 1 .*take 2\. .*must be 4"
    ):
        train(parse_config(classify(root, "cut", per_device_train_batch_size=2)))
    config = parse_config(classify(root, "cut", per_device_train_batch_size=2, gradient_accumulation_steps=2))
    sharded = root / "cut" / "checkpoint-3" / "pytorch_model_fsdp.bin"
    sharded.touch()
    with pytest.raises(UserError, match="checkpoint-3: was trained with FSDP, and this run is without FSDP"):
        train(config)
    sharded.unlink()
    train(config)
    assert_resumed_as_whole(root, "cut")


def assert_resumed_as_whole(root: Path, name: str) -> None:
    """Check that a run was resumed, and has the weights of the one that was not interrupted."""
    resumed, whole = (json.loads((root / run / "metrics.json").read_text()) for run in (name, "whole"))
    assert resumed["resumed"] and resumed["steps"] == whole["steps"] == 9
    assert_same(adapter_weights(root / name), adapter_weights(root / "whole"), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_processes_end_what_one_began(runs_of_two):
    assert_resumed_as_whole(runs_of_two[0], "grown")


@pytest.mark.slow
@FSDP
def test_two_processes_that_shard_train_resume_and_save_as_one_and_log_pictures(runs_of_two):
    root, _ = runs_of_two
    assert list((root / "sharded").glob("checkpoint-*/pytorch_model_fsdp.bin"))
    assert_resumed_as_whole(root, "sharded")
    configs = [json.loads((root / name / "adapter/adapter_config.json").read_text()) for name in ("sharded", "whole")]
    sharded, whole = (config["auto_mapping"]["backbone"] for config in configs)
    assert sharded is not None and sharded == whole
    manifest = json.loads((root / "sharded-lora" / "adapter" / MANIFEST).read_text())
    assert manifest["base"]["checksum"] and manifest["base"]["dtype"] == "torch.float32"
    log = EventAccumulator(str(root / "sharded" / "logs" / "tensorboard")).Reload()
    names = log.Tags()["images"]
    assert len(names) == 4 and all({event.step for event in log.Images(name)} == {3, 6, 9} for name in names)


@pytest.mark.slow
@FSDP
def test_a_whole_model_that_two_processes_shard_is_saved_although_pictures_fail(runs_of_two):
    root, _ = runs_of_two
    train(parse_config(classify(root, "whole-head", num_train_epochs=2) | {"method": "head-only"}))
    assert_same(adapter_weights(root / "sharded-head"), adapter_weights(root / "whole-head"), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_the_command_line_trains_scores_and_predicts(tmp_path):
    config = write(tmp_path / "config.yaml", segment(tmp_path))
    runner = CliRunner()
    done = runner.invoke(app, ["train", str(config), "--set", "training.num_train_epochs=1"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "mean_iou" in done.output and "disc" in done.output
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    for name, source in (("run", tmp_path / "run"), ("checkpoint", checkpoint)):
        scored = runner.invoke(app, ["eval", str(source), "--output", str(tmp_path / f"{name}.json")])
        assert scored.exit_code == 0, scored.output
        assert 0 <= json.loads((tmp_path / f"{name}.json").read_text())["mean_iou"] <= 1
    images = str(tmp_path / "discs" / "images" / "val")
    found = runner.invoke(app, ["predict", str(tmp_path / "run"), images, "--output", str(tmp_path / "found")])
    assert found.exit_code == 0, found.output
    assert len(list((tmp_path / "found" / "overlays").glob("*.png"))) == 3


def test_the_command_line_says_what_is_wrong_without_a_traceback(tmp_path):
    runner = CliRunner()
    for arguments, words in (
        (["train", "nothing.yaml"], "no such file, and no recipe"),
        (["train", str(write(tmp_path / "a.yaml", classify(tmp_path, learning_rte=1)))], "mean learning_rate"),
        (["eval", str(tmp_path)], "--data"),
        (["predict", str(tmp_path), "nothing.jpg"], "no such file"),
        (["recipes", "dinov2-folder"], "Did you mean dinov2-image-folder"),
    ):
        done = runner.invoke(app, arguments)
        assert done.exit_code == 1 and words in done.output.replace("\n", " "), (arguments, done.output)


def test_names_of_classes_and_folders_that_look_like_markup_are_shown_as_they_are(tmp_path, capsys):
    values = classify(tmp_path, "[x]", num_train_epochs=1)
    values["data"]["labels"] = ["[/bold]green", "[red]red"]
    for path in (tmp_path / "colors" / "test" / "red").iterdir():
        path.unlink()
    train(parse_config(values))
    shown = capsys.readouterr().out
    assert "the class '[red]red' never occurs" in shown and f"saved: {tmp_path}/[x]/adapter" in shown
    assert "[/bold]green" in shown


def test_help_versions_and_recipes_wait_for_neither_pytorch_nor_peft(monkeypatch, capsys):
    code = (
        "import atexit, sys, e3va_command\n"
        "atexit.register(lambda: print('loaded', {'torch', 'peft', 'transformers'} & {*sys.modules}))\n"
        "sys.argv = ['e3va', *sys.argv[1:]]\n"
        "e3va_command.main()\n"
    )
    for words, said in (
        (["--version"], "e3va_peft 0.1.0, torch "),
        (["train", "--help"], "Usage: e3va train"),
        (["recipes"], "nuclei-upernet-swin"),
        (["recipes", "nuclei-upernet-swin"], "task: semantic-segmentation"),
        ([], ""),
    ):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert said in done.stdout and "loaded set()" in done.stdout, done.stdout + done.stderr
    for words, said in (
        (["trian", "my.yaml"], "No such command 'trian'"),
        (["train", "my.yaml", "--sett", "a=1"], "No such option: --sett"),
        (["compare", "my.yaml"], "Missing option '--output'"),
    ):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
        assert "loaded set()" in done.stdout, done.stdout
    for words, said in (
        (["train", "no.yaml"], "no such file, and no recipe"),
        (["recipes", "nuclei-upernet-swim"], "Did you mean nuclei-upernet-swin"),
    ):
        monkeypatch.setattr(sys, "argv", ["e3va", *words])
        with pytest.raises(SystemExit) as refused:
            e3va_command.main()
        assert refused.value.code == 1 and said in capsys.readouterr().err


def test_a_backbone_of_the_users_own_works_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("e3va_peft.backbones._FAMILIES", registered_backbones())
    (tmp_path / "my_family.py").write_text(
        "from dataclasses import replace\n"
        "from e3va_peft import register_backbone, registered_backbones\n"
        "register_backbone(replace(registered_backbones()['swin'], name='mine', exits=('my_model.Encoder',)))\n"
    )
    done = CliRunner().invoke(app, ["--import", "my_family", "backbones"])
    assert done.exit_code == 0 and "mine" in done.output
    refused = CliRunner().invoke(app, ["--import", "my_famly", "backbones"])
    assert refused.exit_code == 1 and "--import my_famly" in refused.output


def test_help_teaches_by_examples():
    runner = CliRunner()
    for command in ("train", "compare", "eval", "predict", "recipes"):
        text = runner.invoke(app, [command, "--help"], env={"COLUMNS": "160"}).output
        assert f"e3va {command}" in text.split("Usage")[1].split("\n", 1)[1], text


def test_the_help_of_train_breaks_no_line_of_its_config_and_examples_in_80_columns():
    shown = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "80"}).output.splitlines()
    written = [line.strip() for line in (inspect.getdoc(cli.train) or "").splitlines() if line.startswith(" " * 4)]
    assert len(written) > 10 and set(written) <= {line.strip() for line in shown}


@pytest.mark.parametrize("command", ["", *(each.name or each.callback.__name__ for each in app.registered_commands)])
def test_paragraphs_of_a_help_fill_the_lines(command):
    words = [command] if command else []
    shown = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"}).output.split("╭")[0].splitlines()
    for line, following in pairwise(each.rstrip() for each in shown):
        if line and re.match(r" (?!e3va )\S", following):
            assert len(line) + 1 + len(following.split()[0]) > 79, line


@pytest.mark.parametrize("method", ["e3va", "lora", "adaptformer", "head-only"])
def test_a_run_that_is_not_finished_names_its_newest_checkpoint_which_predicts(method, tmp_path, monkeypatch):
    config = parse_config(classify(tmp_path) | {"method": method})
    train_until(7, config, monkeypatch)
    newest = tmp_path / "run" / "checkpoint-6"
    with pytest.raises(UserError, match=f"not finished.*{newest}"):
        load_trained(str(tmp_path / "run"))
    scores, labels = evaluate(str(newest))
    assert labels == ("green", "red") and 0.5 <= scores["accuracy"] <= 1


INTERRUPTED_IMPORT = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, *args):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell turns off for what it runs in the background
sys.meta_path.insert(0, Interrupt())
sys.argv = ["e3va", "backbones"]
import e3va_command
e3va_command.main()
"""


def test_ctrl_c_while_it_imports_ends_it_without_a_traceback():
    found = subprocess.run([sys.executable, "-c", INTERRUPTED_IMPORT], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (-signal.SIGINT, "", "")
