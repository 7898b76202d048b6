"""`e3va train`: from a config to an adapter, its metrics and its curves; stop and resume at any time."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's, or httpx2's
from peft import PeftModel
from rich import progress
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainingArguments, set_seed

from e3va_peft.card import record_metrics
from e3va_peft.config import E3VAConfig
from e3va_peft.data.examples import Examples, Split
from e3va_peft.data.load import load_splits
from e3va_peft.data.verify import missing_classes, verify_split
from e3va_peft.errors import UserError, reason
from e3va_peft.methods import METHODS, adapt, refuse_lost
from e3va_peft.training.arguments import MetricsToCard, training_arguments
from e3va_peft.training.config import RunConfig
from e3va_peft.training.folder import (
    ADAPTER,
    CURVES,
    DRAFT,
    METRICS,
    MODEL,
    begin,
    check_output,
    checkpoints,
    locked,
    place,
    remove_replaced,
    write_whole,
)
from e3va_peft.training.tables import class_metric, metrics_table
from e3va_peft.training.tasks import Task, task_of
from e3va_peft.training.tasks.base import new_parameters
from e3va_peft.training.trainer import Curves, Progress, StopOnInterrupt, VisionTrainer

_FULL_DISK = (  # what Python, safetensors and torch.save say
    "No space left", "os error 28", "File too large", "os error 27", "failed writing", "iostream error",
)  # fmt: skip


class Interrupted(Exception):
    """The run was stopped by Ctrl-C after a checkpoint."""


def train(config: RunConfig, overwrite: bool = False) -> dict[str, Any]:
    """Train as a config says, or resume where an earlier call stopped.

    Writes into `config.output`: `config.yaml`, every field resolved; `adapter/` (PEFT's methods) or `model/` (the
    others) with the image processor; `metrics.json`, last, which marks the run as finished; `curves.png`; checkpoints.

    Args:
        config: The run.
        overwrite: Replace what an earlier run left in `config.output`. It is put aside when all is ready to train, and
            removed when this run is saved.

    Returns:
        What is in `metrics.json`.

    Raises:
        UserError: Something in config, data or machine must be fixed first; the message says what.
        FileExistsError: `config.output` holds a finished or another run, one that is training, or something else.
        Interrupted: Ctrl-C was pressed; the checkpoint is saved.
    """
    # as TrainingArguments will set it up: a launcher's processes without accelerator find each other by gloo
    state = PartialState(cpu=bool(config.training.get("use_cpu")) or not torch.accelerator.is_available())
    if not state.is_main_process:
        return _train(config, overwrite, state)
    check_output(Path(config.output), config, overwrite)
    with locked(Path(config.output)):
        return _train(config, overwrite, state)


def _train(config: RunConfig, overwrite: bool, state: PartialState) -> dict[str, Any]:
    """Train in a folder that is this run's alone. See `train`."""
    output = Path(config.output)
    console = Console(quiet=not state.is_main_process, highlight=False, soft_wrap=True)
    with state.main_process_first():  # it puts broken ones aside before the others look
        checkpoint = None if overwrite else last_checkpoint(output, console)
    task = task_of(config)
    with state.main_process_first():
        split, eval_split = load_splits(config.data, task.label_kind, config.seed)
    if config.data.verify and checkpoint is None and state.is_main_process:
        verify((split, eval_split), console)
    state.wait_for_everyone()
    arguments = build_arguments(config, task, has_eval=eval_split is not None)
    hub = _check_hub(config, arguments) if state.is_main_process else None
    set_seed(arguments.seed)
    model = task.build_model(split.labels)
    processor, new = task.build_processor(), new_parameters(model)
    adapted = adapt(model, config.method)
    refuse_lost(adapted, new)
    _check_disk(output, adapted)
    interrupt = StopOnInterrupt()
    callbacks = [interrupt, Progress(task.main_metric, quiet=arguments.disable_tqdm)]
    callbacks += [Curves(output / CURVES, task.main_metric)]
    callbacks += [MetricsToCard()] if config.method_name == "e3va" else []
    trainer = VisionTrainer(
        task,
        processor,
        model=adapted,
        args=arguments,
        train_dataset=Examples(split, task.training_view(processor)),
        eval_dataset=Examples(eval_split, task.evaluation_view(processor)) if eval_split is not None else None,
        data_collator=task.collator(model, processor),
        callbacks=callbacks,
    )
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    scored_on = len(eval_split) if eval_split is not None else 0
    console.print(
        f"{config.method_name} on {escape(config.model)} ({type(model).__name__}): {trained:,d} trained parameters, "
        f"{len(split):,d} images to train on, {scored_on:,d} to evaluate on, on {arguments.device}"
        + (f", {arguments.world_size} processes" if arguments.world_size > 1 else "")
    )
    if checkpoint is not None:
        console.print(f"going on from {escape(str(checkpoint))}")
    with state.main_process_first(), _full_disk_explained(output, state):
        if state.is_main_process:
            begin(output, config, overwrite, console)
    start = time.perf_counter()
    try:
        with _full_disk_explained(output, state):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        interrupt.restore()
    if interrupt.interrupted:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, saved in {output}. The same "
            f"command{' without --overwrite' if overwrite else ''} resumes from there."
        )
    seconds = time.perf_counter() - start
    last = trainer.state.log_history[-2:]  # an evaluation's entry, and the summary of the training
    scored = any("eval_loss" in entry and entry["step"] == trainer.state.global_step for entry in last)
    if eval_split is not None and not (scored and trainer.scores and not arguments.load_best_model_at_end):
        trainer.evaluate()
    record = _record(config, trainer, split, trained, seconds, resumed=checkpoint is not None)
    if state.is_main_process:
        with _full_disk_explained(output, state):
            folder = _save(output, adapted, processor, record, console)
        if eval_split is not None:
            console.print(metrics_table(trainer.scores, split.labels))
        console.print(escape(f"saved: {folder}, {output / METRICS}, {output / CURVES}"))
        if hub is not None:
            push(folder, hub, config.training.get("hub_token"), console)
    state.wait_for_everyone()
    return record


def build_arguments(config: RunConfig, task: Task, has_eval: bool) -> TrainingArguments:
    """Build the `TrainingArguments` of a run: the recipe's, the method's and the task's defaults, then its own.

    Raises:
        UserError: A value cannot work.
    """
    given = config.training
    evaluation = str(given.get("eval_strategy", "epoch" if has_eval else "no"))
    if evaluation != "no" and not has_eval:
        raise UserError(
            f"training.eval_strategy={evaluation}: there is no split to evaluate on. Set data.eval_split, or "
            "data.eval_fraction to set some aside."
        )
    save = str(given.get("save_strategy", evaluation if evaluation != "no" else "epoch"))
    workers = max(min(4, (os.cpu_count() or 1) - 1), 0)
    defaults: dict[str, Any] = {
        "eval_strategy": evaluation,
        "save_strategy": save,
        "save_total_limit": 2,
        "logging_steps": 0.01,
        "disable_tqdm": not sys.stderr.isatty(),
        "batch_eval_metrics": True,  # batches are not kept: `Task.add` keeps what scores need
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": given.get("dataloader_num_workers", workers) > 0,
        **task.default_training,
    }
    if "learning_rate" not in given:
        defaults["learning_rate"] = METHODS[config.method_name].learning_rate
    if evaluation == save == "steps":
        defaults["save_steps"] = given.get("eval_steps", 500)
        defaults["eval_steps"] = given.get("save_steps", 500)
    if evaluation == save != "no":
        defaults["load_best_model_at_end"] = True
        if "metric_for_best_model" not in given:
            defaults |= {"metric_for_best_model": f"eval_{task.main_metric}", "greater_is_better": True}
    if given.get("hub_strategy", "end") != "end":
        raise UserError(
            f"training.hub_strategy={given['hub_strategy']}: only the finished adapter is pushed. Leave it."
        )
    try:
        # the run pushes the adapter itself, when it is finished, and no checkpoint shall hold the token
        own = {"push_to_hub": False, "hub_token": None}
        arguments = training_arguments(config.output, **(defaults | given | own))
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise UserError(f"training: {error}") from error
    arguments.label_names = ["labels"]
    arguments.remove_unused_columns = False
    if arguments.fp16 and arguments.device.type == "cpu":
        raise UserError("training.fp16=True: needs a GPU, and this runs on the CPU. Use bf16: true, or neither.")
    return arguments


def verify(splits: Sequence[Split | None], console: Console) -> None:
    """Decode every example once and warn of objects without area, and of classes that never occur.

    Raises:
        UserError: Some examples are broken.
    """
    for split in splits:
        if split is None:
            continue
        notes: list[str] = []
        with progress.Progress(console=console, transient=True) as bars:
            task = bars.add_task(f"checking {escape(split.name)}", total=len(split))
            counts = verify_split(split, partial(bars.advance, task), notes.append)
        for note in notes:
            console.print(f"[yellow]warning[/yellow]: {escape(note)}.")
        for name in missing_classes(counts, split.labels):
            note = f"the class {name!r} never occurs in {split.name}"
            console.print(f"[yellow]warning[/yellow]: {escape(note)}.")


def last_checkpoint(output: Path, console: Console) -> Path | None:
    """Return the newest checkpoint that is whole; put aside those that were cut short, and say so.

    Args:
        output: Folder of the run.
        console: Where to say it.
    """
    found = checkpoints(output)
    for step in sorted(found, reverse=True):
        broken = _what_is_broken(found[step])
        if broken is None:
            return found[step]
        aside = found[step].with_name(f"broken-{found[step].name}")
        shutil.rmtree(aside, ignore_errors=True)
        found[step].rename(aside)
        note = f"{found[step]} was cut short ({broken}); put aside as {aside.name}"
        console.print(f"[yellow]warning[/yellow]: {escape(note)}.")
    return None


def _what_is_broken(checkpoint: Path) -> str | None:
    """Name the first file of a checkpoint that is missing or cut short; None where it is whole."""
    weights = [*checkpoint.glob("*model*.safetensors")]
    if not weights:
        return "no weights"
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (OSError, SafetensorError):
            return path.name
    for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
        if not zipfile.is_zipfile(path):
            return path.name
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return "trainer_state.json"
    return None


def push(folder: Path, repo_id: str, token: str | None, console: Console) -> None:
    """Upload an adapter's folder to a repository on the Hub, in one commit.

    Raises:
        UserError: The Hub refuses; the folder stays as it is.
    """
    try:
        api = HfApi(token=token)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload adapter")
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"hub_model_id={repo_id!r}: could not be pushed ({reason(error)}). The adapter is whole in {folder}; "
            f"push it again with `hf upload {repo_id} {folder}`."
        ) from None
    console.print(escape(f"pushed to {api.endpoint}/{repo_id}"))


def _check_hub(config: RunConfig, arguments: TrainingArguments) -> str | None:
    """Find out before training whether the adapter can be pushed after it."""
    if not config.training.get("push_to_hub"):
        return None
    if not arguments.hub_model_id:
        raise UserError("training.push_to_hub=True: needs training.hub_model_id, e.g. hub_model_id: me/my-adapter.")
    repo_id = str(arguments.hub_model_id)
    try:
        HfApi(token=config.training.get("hub_token")).create_repo(
            repo_id, private=arguments.hub_private_repo, exist_ok=True
        )
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"training.hub_model_id={repo_id!r}: the Hub does not let you write there ({reason(error)}). Log in "
            "with `hf auth login`, or set training.push_to_hub: false."
        ) from None
    return repo_id


def _check_disk(output: Path, model: nn.Module) -> None:
    """Refuse to start where not even one checkpoint fits beside another."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    whole = 0 if isinstance(model, PeftModel) else sum(p.numel() * p.element_size() for p in model.parameters())
    needed = 3 * (max(whole, trained) + 2 * trained)  # two checkpoints with AdamW's state, and the one in the making
    free = shutil.disk_usage(output).free
    if free < needed:
        raise UserError(
            f"output={str(output)!r}: {free / 1e6:.0f} MB are free, checkpoints take {needed / 1e6:.0f} MB. Free "
            "some, or choose a folder on another disk."
        )


@contextmanager
def _full_disk_explained(output: Path, state: PartialState) -> Iterator[None]:
    """Turn a full disk into a clear error, and remove the checkpoint that did not fit."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full_disk(error):
            raise
        if state.is_main_process:
            for path in checkpoints(output).values():
                if _what_is_broken(path) is not None:
                    shutil.rmtree(path, ignore_errors=True)
        free = shutil.disk_usage(output).free / 1e6
        raise UserError(
            f"output={str(output)!r}: the disk is full ({reason(error)}; {free:.0f} MB free now). Free some; the "
            "same command resumes from the last whole checkpoint."
        ) from error


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is of a full disk: torch.save fails again while it closes."""
    while error is not None:
        if any(sign in str(error) for sign in _FULL_DISK):
            return True
        error = error.__cause__ or error.__context__
    return False


def _record(
    config: RunConfig, trainer: VisionTrainer, split: Split, trained: int, seconds: float, resumed: bool
) -> dict[str, Any]:
    """Put together what is written to `metrics.json`."""
    scores = dict(trainer.scores)
    per_class = {class_metric(name): scores.pop(name) for name in list(scores) if isinstance(scores[name], list)}
    return {
        "task": config.task,
        "method": config.method_name,
        "model": config.model,
        "metrics": scores,
        "per_class": {name: dict(zip(split.labels, values, strict=True)) for name, values in per_class.items()},
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "best_step": trainer.state.best_global_step,
        "trained_parameters": trained,
        "training_seconds": round(seconds, 1),
        "resumed": resumed,
        "versions": versions(),
        "python": platform.python_version(),
        "device": str(trainer.args.device),
        "history": trainer.state.log_history,
    }


def versions(*more: str) -> dict[str, str]:
    """Return the versions of the packages that a result may depend on, those of `more` included."""
    packages = ("e3va_peft", "torch", "torchvision", "transformers", "peft", "accelerate", *more)
    return {name: importlib.metadata.version(name) for name in packages}


def _save(output: Path, model: Any, processor: Any, record: dict[str, Any], console: Console) -> Path:
    """Save model and image processor, then the metrics, whose presence marks the run as finished."""
    adapter = isinstance(model, PeftModel)
    draft = output / DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    processor.save_pretrained(draft)
    if adapter and isinstance(model.peft_config["default"], E3VAConfig):
        model.peft_config["default"].base.metrics.clear()  # what single evaluations gave
        record_metrics(model, record["metrics"])
    elif adapter:
        model.get_base_model().config.save_pretrained(draft)  # the class names, which a LoRA adapter does not keep
    # under its own key names where a method has put modules in: transformers' older ones know none of these
    own = {"save_original_format": False} if METHODS[record["method"]].saves == "inserted" else {}
    model.save_pretrained(str(draft), **own)
    folder = place(output, draft, ADAPTER if adapter else MODEL, console)
    write_whole(output / METRICS, json.dumps(plain(record), indent=2) + "\n")
    remove_replaced(output)
    return folder


def plain(value: Any) -> Any:
    """Make a value fit for JSON: not-a-number, which JSON does not have, becomes null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, float) and value != value:
        return None
    return value
