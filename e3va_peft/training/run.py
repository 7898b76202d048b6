"""`e3va train`: from a config to an adapter, its metrics and its curves; stop and resume at any time."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from rich import progress
from rich.console import Console
from rich.markup import escape
from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.training_args import OptimizerNames

from e3va_peft.cache.dataset import Cached, Repeated, SeveralSizes, Views, cached
from e3va_peft.card import PROCESSOR
from e3va_peft.config import E3VAConfig
from e3va_peft.data.examples import Examples, Split
from e3va_peft.data.formats import load_splits
from e3va_peft.data.objects import Objects
from e3va_peft.data.splits import EVAL
from e3va_peft.data.verify import Checked, missing_classes, verify_split
from e3va_peft.errors import UserError, reason
from e3va_peft.exits import base_of
from e3va_peft.methods import METHODS, adapt, refuse_lost
from e3va_peft.training.arguments import build_arguments, check_precision
from e3va_peft.training.callbacks import (
    Curves,
    LostBest,
    MetricsToCard,
    NextView,
    Pace,
    Patience,
    Progress,
    StopOnInterrupt,
)
from e3va_peft.training.config import RunConfig
from e3va_peft.training.confusion import write_confusion
from e3va_peft.training.folder import (
    CONFUSION,
    CONFUSION_PICTURE,
    CURVES,
    METRICS,
    begin,
    check_output,
    checkpoints,
    finished,
    locked,
)
from e3va_peft.training.logs import reported
from e3va_peft.training.results import (
    check_disk,
    check_hub,
    fingerprints,
    full_disk_explained,
    last_checkpoint,
    push,
    refuse_other_training,
    save_results,
    trained_on,
)
from e3va_peft.training.scores import class_metric, metrics_table
from e3va_peft.training.tasks import Task, task_of
from e3va_peft.training.tasks.base import new_parameters
from e3va_peft.training.trainer import VisionTrainer

_EPOCHS = 2**31  # more than a run has
_GUESSED: set[str] = set()  # models that this process has warned of: a comparison trains one many times


class Interrupted(Exception):
    """The run was stopped by Ctrl-C, or by the signal that ends a job, after a checkpoint.

    Args:
        text: What to say.
        signal: Number of the signal.
    """

    def __init__(self, text: str, signal: int) -> None:
        super().__init__(text)
        self.signal = signal


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
    state = process(config)
    if not state.is_main_process:
        return _train(config, overwrite, state)
    check_output(Path(config.output), config, overwrite)
    with locked(Path(config.output)):
        return _train(config, overwrite, state)


def process(config: RunConfig) -> PartialState:
    """Return this process as TrainingArguments will set it up: without accelerators a launcher's meet by gloo."""
    return PartialState(cpu=bool(config.training.get("use_cpu")) or not torch.accelerator.is_available())


def _train(config: RunConfig, overwrite: bool, state: PartialState) -> dict[str, Any]:
    """Train in a folder that is this run's alone. See `train`."""
    output, task = Path(config.output), task_of(config)
    console = Console(quiet=not state.is_main_process, highlight=False, soft_wrap=True)
    check_precision(config.training)
    with state.main_process_first():  # it puts broken ones aside before the others look
        checkpoint = None if overwrite else last_checkpoint(output, console)
    with state.main_process_first():
        splits = load_splits(config.data, task.label_kind, config.seed)
    if splits[1] is None:
        _warn_of_no_scores(config, console)
    if config.data.verify and checkpoint is None and state.is_main_process:
        verify(splits, console)
    state.wait_for_everyone()
    rows = fingerprints(splits)
    arguments = build_arguments(config, task, has_eval=splits[1] is not None)
    if checkpoint is not None:
        refuse_other_training(checkpoint, trained_on(rows, arguments), state.num_processes)
    hub = check_hub(config, arguments) if state.is_main_process else None
    if hub is not None and Path(config.model).exists():
        _warn_of_folder(config, hub, console)
    trainer = _build_trainer(config, task, arguments, *splits)
    trainer.rows = rows
    model, trained = trainer.model, trainer.get_num_trainable_parameters()  # before training may wrap the model
    check_disk(output, model)
    check_sizes(trainer)
    check_optimizer(trainer)
    for note in filter(None, (uneven_size(config.image_size, model), unseen_views(config, arguments))):
        console.print(f"[yellow]warning[/yellow]: {note}")
    _warn_of_guessed_values(task, trainer.processor, console)
    console.print(_summary(config, trainer, trained))
    if checkpoint is not None:
        console.print(f"resuming from {escape(str(checkpoint))}")
    with state.main_process_first(), full_disk_explained(output, state):
        if state.is_main_process:
            begin(output, config, overwrite, console)
    with full_disk_explained(output, state), reported(trainer, splits[1], checkpoint):
        filled = fill_cache(config, trainer, *splits)
        seconds = _run(trainer, checkpoint, overwrite)
        _evaluate_at_end(trainer)
    record = _record(config, trainer, splits[0].labels, trained, seconds, resumed=checkpoint is not None)
    record["rows"] = rows
    record |= {} if config.cache is None else {"cache_seconds": round(filled, 1)}
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None  # all processes
    if state.is_main_process:
        with full_disk_explained(output, state):
            if trainer.confusion is not None:
                places = (output / CONFUSION, output / CONFUSION_PICTURE)
                write_confusion(trainer.confusion, splits[0].labels, *places)
            folder = save_results(output, model, trainer.processor, record, console, weights)
        _print_scores(trainer, splits[0].labels, console)
        console.print(escape(f"saved: {folder}, {output / METRICS}, {output / CURVES}; {_costs(record)}"))
        if hub is not None:
            push(folder, hub, config.training.get("hub_token"), console)
    state.wait_for_everyone()
    return record


def refuse_push(config: RunConfig, of: str) -> None:
    """Refuse to push each of several runs, those of a sweep or of a comparison, to one repository.

    Raises:
        UserError: It is asked for.
    """
    if config.training.get("push_to_hub"):
        raise UserError(
            f"training.push_to_hub: every run of a {of} would replace the last one. Push the best by itself."
        )


def train_once(
    config: RunConfig, overwrite: bool, console: Console, title: str, about: str = "", keep: bool = True
) -> dict[str, Any]:
    """Train one of several runs and say so, or take over what a finished one recorded, on the data as it is now.

    Args:
        config: The run.
        overwrite: Train it again where it is finished.
        console: Where to say it.
        title: What to call it.
        about: What to say of it where it is trained.
        keep: Keep the checkpoints of its training.

    Raises:
        FileExistsError: `config.output` holds a run with other settings.
        UserError: See `train`, and the data of a finished run has changed since.
    """
    record = None if overwrite else finished(config)
    if record is not None and "rows" in record:
        rows = fingerprints(load_splits(config.data, task_of(config).label_kind, config.seed))
        if rows != record["rows"]:
            raise UserError(
                f"output={config.output!r}: its scores are of {record['rows']}, and the data now has {rows}. Restore "
                "the images and labels of then, choose another output, or train again with --overwrite."
            )
    note = about if record is None else "trained before"
    console.print(f"[bold]{escape(title)}[/bold]{': ' if note else ''}{note}")
    if record is None:
        record = train(config, overwrite)
        for path in () if keep else checkpoints(Path(config.output)).values():
            shutil.rmtree(path)
    return record


def _print_scores(trainer: VisionTrainer, labels: Sequence[str], console: Console) -> None:
    """Print what was reached, and a warning where the training went astray."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    later = statistics.median(losses[len(losses) // 2 :] or [0.0])
    if len(losses) > 1 and later > 2 * losses[0]:
        console.print(
            f"[yellow]warning[/yellow]: the loss rose from {losses[0]:.4g} to about {later:.4g}: nothing good was "
            f"learned. Lower training.learning_rate, {trainer.args.learning_rate:g} now."
        )
    if trainer.eval_dataset is not None:
        if trainer.state.best_global_step and trainer.args.load_best_model_at_end:
            console.print(f"the best, of step {trainer.state.best_global_step}, is what is saved:")
        console.print(metrics_table(trainer.scores, labels))


def _warn_of_folder(config: RunConfig, hub: str, console: Console) -> None:
    place = escape(str(Path(config.model)))
    console.print(
        f"[yellow]warning[/yellow]: the adapter that is pushed to {hub} names its base model, {place}, a folder that "
        "nobody else has."
    )


def _warn_of_no_scores(config: RunConfig, console: Console) -> None:
    folders = [Path(config.data.source, name) for name in EVAL] if config.data.source else []
    empty = next(filter(Path.is_dir, folders), None)
    console.print(
        "[yellow]warning[/yellow]: there is nothing to evaluate on, so nothing will say how good the model is. "
        + ("" if empty is None else f"{escape(str(empty))} has no image. ")
        + "Set data.eval_split, or data.eval_fraction to set some aside."
    )


def _warn_of_guessed_values(task: Task, processor: Any, console: Console) -> None:
    """Say how images are normalised where neither the model nor the config does."""
    config = task.config
    if task.found_processor is None and "image_mean" not in config.processor and config.model not in _GUESSED:
        _GUESSED.add(config.model)
        mean, std = ([round(value, 3) for value in values] for values in (processor.image_mean, processor.image_std))
        console.print(
            f"[yellow]warning[/yellow]: {escape(config.model)} has no {PROCESSOR}: images are normalised by the mean "
            f"{mean} and std {std}. If its weights want others, set them: processor: {{image_mean: {mean}, "
            f"image_std: {std}}}."
        )


def _build_trainer(
    config: RunConfig, task: Task, arguments: TrainingArguments, split: Split, eval_split: Split | None
) -> VisionTrainer:
    """Build the model, make it trainable, and build its trainer."""
    set_seed(arguments.seed)
    with _weights_in_each_process():
        model = task.build_model(split.labels)
    processor, new = task.build_processor(), new_parameters(model)
    adapted = adapt(model, config.method)
    refuse_lost(adapted, new)
    progress_bar = Progress(task.main_metric, quiet=arguments.disable_tqdm)
    callbacks = [LostBest(), progress_bar, Curves(Path(config.output) / CURVES, task.main_metric)]
    callbacks += [Pace()] + ([] if config.patience is None else [Patience(config.patience, task.main_metric)])
    callbacks += [MetricsToCard()] if METHODS[config.method_name].options is E3VAConfig else []
    return VisionTrainer(
        task,
        processor,
        model=adapted,
        args=arguments,
        train_dataset=Examples(split, task.training_view(processor)),
        eval_dataset=Examples(eval_split, task.evaluation_view(processor)) if eval_split is not None else None,
        data_collator=task.collator(model, processor),
        callbacks=callbacks,
    )


@contextmanager
def _weights_in_each_process() -> Iterator[None]:
    """Let transformers load weights in all processes, which check sizes and fill a cache before FSDP shards the model.

    FSDP's `cpu_ram_efficient_loading` would leave them to the first.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before


def check_sizes(trainer: VisionTrainer) -> None:
    """Run the model once on an example of each split, so that images of a size that it cannot take stop no long run.

    Raises:
        UserError: It cannot.
    """
    model, training = trainer.model, trainer.model.training
    device = next(model.parameters()).device
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        if dataset is None or device.type == "meta":
            continue
        with torch.random.fork_rng():  # augmentation and Mask2Former draw, and training shall draw the same
            batch = send_to_device(dict(trainer.data_collator([dataset[0]])), device)
            height, width = batch["pixel_values"].shape[-2:]
            try:
                with torch.no_grad(), trainer.compute_loss_context_manager():
                    model.eval()(**{name: value for name, value in batch.items() if name != "truth"})
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, IndexError) as error:
                raise UserError(
                    f"image_size={trainer.task.config.image_size}: {trainer.task.config.model} cannot take images of "
                    f"{height} x {width} pixels ({reason(error)}). Leave it out, or set a larger one, e.g. 224."
                ) from error
    model.train(training)


def check_optimizer(trainer: VisionTrainer) -> None:
    """Build the optimizer once, so that one which cannot be stops no run that has put an earlier one aside.

    Raises:
        UserError: It cannot be built.
    """
    optim = OptimizerNames(trainer.args.optim).value
    if "layerwise" in optim:  # it leaves hooks in the model
        return
    try:
        trainer.create_optimizer()
    except (ImportError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        given = "" if trainer.args.optim_args is None else f", training.optim_args={trainer.args.optim_args!r}"
        raise UserError(f"training.optim={optim!r}{given}: cannot be built. {reason(error)}") from error
    trainer.optimizer = None


def uneven_size(size: int | None, model: Any) -> str:
    """Say that patches do not fill an image of a run's `image_size`, and the nearest size that they do; "" if so."""
    base = base_of(model)
    config = getattr(base.config, "backbone_config", None) or base.config
    patch = getattr(config, "patch_size", None)
    if size is None or not isinstance(patch, int) or size % patch == 0:
        return ""
    near = max(1, (size + patch // 2) // patch) * patch
    return (
        f"image_size={size}: is no multiple of {patch}, the side of the model's patches, so the edge of each image "
        f"is cut off or filled up. The nearest that is: {near}."
    )


def unseen_views(config: RunConfig, arguments: TrainingArguments) -> str:
    """Say that a cache is filled with views that no epoch of a run sees; "" if it is not."""
    cache, epochs = config.cache, math.ceil(arguments.num_train_epochs)
    if cache is None or cache.storage == "none" or arguments.max_steps > 0 or cache.views <= epochs:
        return ""
    return (
        f"cache.views={cache.views}: each epoch sees one of them, so this run sees {epochs}, and filling the rest is "
        f"for nothing. Set cache.views={epochs}, unless a longer run follows."
    )


def fill_cache(config: RunConfig, trainer: VisionTrainer, split: Split, eval_split: Split | None) -> float:
    """Let a trainer read the frozen passes of its images instead of computing them, and compute those not there.

    Where a cache keeps nothing it sees the same views, as images; without one it sees other views in each epoch. What
    an image looks like in an epoch hangs on the two alone: a run that resumes sees what it would have seen.

    Returns:
        Seconds.

    Raises:
        UserError: Images of a batch have several sizes, there is no room, or see `cached`.
    """
    if config.cache is None:
        trainer.train_dataset = Repeated(Views(trainer.train_dataset, _EPOCHS, config.seed))
        trainer.add_callback(NextView(trainer.train_dataset))
        return 0.0
    start, cache = time.perf_counter(), config.cache
    if cache.storage == "none":
        trainer.train_dataset = Repeated(Views(trainer.train_dataset, cache.views, 0))
    for name, own in (("train", split), ("eval", eval_split)):
        if own is not None and cache.storage != "none":
            dataset = getattr(trainer, f"{name}_dataset")
            found = read_cache(config, name, own, dataset, trainer.model, trainer.args, trainer.data_collator)
            setattr(trainer, f"{name}_dataset", found)
    trainer.add_callback(NextView(trainer.train_dataset))
    return time.perf_counter() - start


def read_cache(
    config: RunConfig, name: str, split: Split, dataset: Any, model: nn.Module, arguments: TrainingArguments,
    collator: Any,
) -> Cached:  # fmt: skip
    """Return a dataset with the frozen passes of its images, filled up where they are missing.

    Args:
        config: The run, with a cache.
        name: train or eval.
        split: What the dataset shows.
        dataset: The examples.
        model: The model.
        arguments: How it is trained.
        collator: Makes batches.

    Raises:
        UserError: Images of a batch have several sizes, there is no room, or see `cached`.
    """
    cache, batch_size = config.cache, getattr(arguments, f"per_device_{name}_batch_size")
    assert cache is not None
    values = config.to_dict()
    view = {key: value for key, value in values.items() if key in ("task", "image_size", "processor")}
    try:
        return cached(
            dataset,
            model,
            views=cache.views if name == "train" else 1,
            storage=cache.storage,
            folder="auto" if cache.folder == "auto" else Path(cache.folder) / name,
            limit=cache.limit,
            batch_size=batch_size,
            num_workers=arguments.dataloader_num_workers,
            data_collator=collator,
            autocast=torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None,
            key=f"{split.fingerprint()} {view} {values['augment'] if name == 'train' else False}",
            types=(Objects,),
            one_size=batch_size > 1,
        )
    except SeveralSizes as error:
        raise UserError(f"training.per_device_{name}_batch_size={batch_size}: {error}") from None


def _summary(config: RunConfig, trainer: VisionTrainer, trained: int) -> str:
    """A line about what is trained, on what and where."""
    model = base_of(trainer.model)
    scored_on = 0 if trainer.eval_dataset is None else len(trainer.eval_dataset)
    processes = trainer.args.world_size
    return (
        f"{config.method_name} on {escape(config.model)} ({type(model).__name__}): {trained:,d} trained parameters, "
        f"{len(trainer.train_dataset):,d} images to train on, {scored_on:,d} to evaluate on, on {trainer.args.device}"
        + (f", {processes} processes" if processes > 1 else "")
    )


def _run(trainer: VisionTrainer, checkpoint: Path | None, overwrite: bool) -> float:
    """Train, from a checkpoint on where there is one; return the seconds.

    Raises:
        Interrupted: Ctrl-C was pressed; the checkpoint is saved.
    """
    start, interrupt = time.perf_counter(), StopOnInterrupt()
    trainer.add_callback(interrupt)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        interrupt.restore()
    if interrupt.signal is not None:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}, saved in "
            f"{trainer.args.output_dir}. The same command{' without --overwrite' if overwrite else ''} resumes from "
            "there.",
            interrupt.signal,
        )
    return time.perf_counter() - start


def _evaluate_at_end(trainer: VisionTrainer) -> None:
    """Evaluate the model that is saved, unless the last evaluation was of it."""
    last, step = trainer.state.log_history[-2:], trainer.state.global_step  # an evaluation, the training's summary
    scored = any("eval_loss" in entry and entry["step"] == step for entry in last)
    saved = (trainer.args.load_best_model_at_end and trainer.state.best_global_step) or step
    fresh = scored and trainer.scores and saved == step
    if trainer.eval_dataset is not None and not fresh:
        trainer.evaluate()


def verify(splits: Sequence[Split | None], console: Console) -> None:
    """Decode every example once and warn of objects without area, classes that never occur, and images in two splits.

    Raises:
        UserError: Some examples are broken.
    """
    checked: Checked = []
    for split in splits:
        if split is None:
            continue
        notes: list[str] = []
        with progress.Progress(console=console, transient=True) as bars:
            task = bars.add_task(f"checking {escape(split.name)}", total=len(split))
            counts = verify_split(split, partial(bars.advance, task), notes.append, checked)
        for note in notes:
            console.print(f"[yellow]warning[/yellow]: {escape(note)}.")
        for name in missing_classes(counts, split.labels):
            note = f"the class {name!r} never occurs in {split.name}"
            console.print(f"[yellow]warning[/yellow]: {escape(note)}.")


def _record(
    config: RunConfig, trainer: VisionTrainer, labels: Sequence[str], trained: int, seconds: float, resumed: bool
) -> dict[str, Any]:
    """Put together what is written to `metrics.json`."""
    scores = dict(trainer.scores)
    per_class = {class_metric(name): scores.pop(name) for name in list(scores) if isinstance(scores[name], list)}
    return {
        "task": config.task,
        "method": config.method_name,
        "model": config.model,
        "metrics": scores,
        "per_class": {name: dict(zip(labels, values, strict=True)) for name, values in per_class.items()},
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "best_step": trainer.state.best_global_step,
        "trained_parameters": trained,
        "training_seconds": round(seconds, 1),
        "seconds_per_step": _seconds_per_step(trainer),
        "peak_memory_bytes": _peak_memory(trainer.args.device),
        "resumed": resumed,
        "versions": versions(),
        "python": platform.python_version(),
        "device": str(trainer.args.device),
        "history": trainer.state.log_history,
    }


def _seconds_per_step(trainer: VisionTrainer) -> float | None:
    """The median over the steps of this session; None where there was none."""
    (pace,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, Pace))
    return round(statistics.median(pace.seconds), 5) if pace.seconds else None


def _peak_memory(device: torch.device) -> int:
    """The most bytes: on a CUDA GPU those of its tensors in this training, elsewhere all of this process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # which Windows does not have

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _costs(record: Mapping[str, Any]) -> str:
    """Describe the time of a step and the peak of the memory, in one line."""
    of = "the GPU" if record["device"].startswith("cuda") else "the process"
    peak = f"{record['peak_memory_bytes'] / 2**20:.0f} MiB of {of} at the peak"
    return peak if record["seconds_per_step"] is None else f"{record['seconds_per_step']:.3g} s a step, {peak}"


def versions(*more: str) -> dict[str, str]:
    """Return the versions of the packages that a result may depend on, those of `more` included."""
    packages = ("e3va_peft", "torch", "torchvision", "transformers", "peft", "accelerate", *more)
    return {name: importlib.metadata.version(name) for name in packages}
