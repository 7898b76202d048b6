"""`e3va compare`: methods side by side on one task, from training to table and plots."""

from __future__ import annotations

import dataclasses
import gc
import os
import re
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from rich.console import Console
from rich.markup import escape
from transformers import TrainingArguments, set_seed

from e3va_peft.compare.report import Row, write_report
from e3va_peft.data.examples import Examples, Split
from e3va_peft.data.formats import load_splits
from e3va_peft.data.yaml import parse_yaml
from e3va_peft.errors import UserError, nearest
from e3va_peft.meter.step import StepReport, measure_step
from e3va_peft.methods import METHODS, adapt, trained_whole
from e3va_peft.training.arguments import build_arguments
from e3va_peft.training.config import CacheConfig, RunConfig, parse_method, read_config, set_field
from e3va_peft.training.folder import refuse_file
from e3va_peft.training.results import number
from e3va_peft.training.run import read_cache, refuse_push, train_once, verify
from e3va_peft.training.tasks import Task, task_of

ROUNDS = 5
_UNEVEN = 2.0  # how far apart rounds may lie on a quiet machine
RUNS = "runs"
CACHED = ", from the cache"

_OWN_OPTIONS = {
    "method": "--methods",
    "output": "--output",
    "training.seed": "--seeds",
    "training.learning_rate": "--learning-rate METHOD=RATE",
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison: its config, methods and seeds.

    Attributes:
        config: The task: data, model, epochs. Its own method's options and learning rate hold for that method.
        output: Folder of runs and report.
        methods: Title -> the `method` section of its runs; a title is a name in `METHODS`, or one with options.
        seeds: Each of them seeds head, data order and, without a cache, augmentation of one run of every method.
        rates: Learning rate of each method.
    """

    config: RunConfig
    output: Path
    methods: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    rates: Mapping[str, float]

    def run(self, method: str, seed: int) -> RunConfig:
        """Return the config of one run: scored once, at the end, so that the evaluation images choose nothing.

        Where the config has a cache, a method whose backbone changes sees the same views without one.
        """
        once = {"eval_strategy": "no", "save_strategy": "epoch", "load_best_model_at_end": False}
        return dataclasses.replace(
            self.config,
            output=str(self.output / RUNS / f"{_word(method)}-seed{seed}"),
            method=dict(self.methods[method]),
            data=dataclasses.replace(self.config.data, verify=False),  # once for all runs, before the first
            cache=self._cache(method, seed),
            patience=None,
            training={"save_total_limit": 1}
            | self.config.training
            | once
            | {"learning_rate": self.rates[method], "seed": seed},
        )

    def reads_cache(self, method: str) -> bool:
        """Whether a method's runs read the backbone from a cache."""
        cache = self._cache(method, self.seeds[0])
        return cache is not None and cache.storage != "none"

    def _cache(self, method: str, seed: int) -> CacheConfig | None:
        cache, data = self.config.cache, self.config.data
        if cache is None or cache.storage == "none":
            return cache
        if not METHODS[self.methods[method]["name"]].cacheable:
            return dataclasses.replace(cache, storage="none")
        if cache.folder == "auto":
            return cache
        drawn = "" if data.train_samples is None else f"-seed{seed}"  # other images for each seed
        own = Path(cache.folder) / f"{_word(method)}{drawn}"
        return dataclasses.replace(cache, folder=str(own))


def read_comparison(
    source: str | Path,
    output: Path,
    methods: str | None = None,
    seeds: str = "0",
    overrides: Sequence[str] = (),
    rates: Sequence[str] = (),
) -> Comparison:
    """Read and check what `e3va compare` is asked for.

    Args:
        source: YAML file of a run, or the name of a recipe.
        output: Folder of runs and report.
        methods: Names, each with options if wanted (`e3va:live_blocks=2:r=8`), separated by commas. None: all.
        seeds: Numbers, separated by commas.
        overrides: `key=value` for the config.
        rates: `method=rate`, for a name alone or with its options; the others keep their defaults.

    Raises:
        UserError: File, field or value cannot work; the message says which and what to do.
    """
    for override in overrides:
        key = override.partition("=")[0].strip()
        own = next((option for name, option in _OWN_OPTIONS.items() if f"{key}.".startswith(f"{name}.")), None)
        if own is not None and not key.startswith("method."):
            raise UserError(f"--set {override}: a comparison sets it for each run by itself. Use {own}.")
    config = read_config(source, overrides)
    if config.sweep:
        raise UserError(
            "sweep: a comparison trains no combinations. Leave it out, or name rows: --methods e3va:r=8,e3va:r=16."
        )
    refuse_push(config, "comparison")
    chosen = _methods(",".join(METHODS) if methods is None else methods, config)
    names = {title: section["name"] for title, section in chosen.items()}
    learned = {name: METHODS[name].learning_rate for name in names.values()}
    if "learning_rate" in config.training and config.method_name in learned:
        learned[config.method_name] = config.training["learning_rate"]
    learned |= _rates(rates, dict.fromkeys([*names, *names.values()]))
    rated = {title: learned.get(title, learned[name]) for title, name in names.items()}
    return Comparison(config, Path(output).expanduser(), chosen, _seeds(seeds), rated)


def compare(comparison: Comparison, overwrite: bool = False) -> list[Row]:
    """Train every method with every seed, measure a training step of each, and write table, JSON and plots.

    Seeds are the outer loop, so that a comparison that is cut short has whole rounds. A run that is finished is not
    trained again; the measurement and the report are made again by every call.

    Runs of a seed begin with the same head and see the same images in the same order, with the same crops and flips.
    With a cache the crops and flips of all seeds are the same, and methods that leave the backbone as it is
    (`Method.cacheable`) train from the cache.

    Args:
        comparison: The comparison.
        overwrite: Train all runs again.

    Returns:
        One row per method.

    Raises:
        UserError: Something must be fixed first; the message says what.
        FileExistsError: The folder holds something else, or runs with other settings.
        Interrupted: Ctrl-C was pressed; the same call resumes.
    """
    console = Console(highlight=False, soft_wrap=True)
    _check_place(comparison.output)
    task = task_of(comparison.config)
    split = _check_task(comparison, task, console)
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in comparison.methods}
    plan = [(seed, name) for seed in comparison.seeds for name in comparison.methods]
    for position, (seed, name) in enumerate(plan, start=1):
        config = comparison.run(name, seed)
        title, about = f"[{position}/{len(plan)}] {name}, seed {seed}", f"learning rate {comparison.rates[name]:g}"
        record = train_once(config, overwrite, console, title, about, keep=False)  # of large models: a full disk
        records[name].append(record)
        gc.collect()  # the Trainer's cycles hold the model
    console.print(f"measuring a training step of each method, {ROUNDS} rounds")
    steps = measure_steps(comparison, task, split, ROUNDS)
    rows = _rows(comparison, task.main_metric, records, steps)
    _warn_of_a_busy_machine(rows, console)
    write_report(comparison.output, rows, comparison.config, console)
    return rows


def _warn_of_a_busy_machine(rows: Sequence[Row], console: Console) -> None:
    row = max(rows, key=lambda each: max(each.step_rounds) / min(each.step_rounds))
    least, most = (1000 * pick(row.step_rounds) for pick in (min, max))
    if most > _UNEVEN * least:
        console.print(
            f"[yellow]warning[/yellow]: a step of {escape(row.method)} took between {least:.0f} and {most:.0f} ms: "
            "something else runs on this machine, and times say little. The same command measures them again and "
            "trains nothing."
        )


def measure_steps(comparison: Comparison, task: Task, split: Split, rounds: int) -> dict[str, list[StepReport]]:
    """Measure one training step of every method in interleaved rounds, so that a busy moment hits all alike.

    Args:
        comparison: The comparison.
        task: Its task.
        split: The training split; its first images are the batch.
        rounds: How often each is measured.

    Returns:
        Reports by method; of the step from the cache, where there is one, by its name and `CACHED`.
    """
    first = comparison.run(next(iter(comparison.methods)), comparison.seeds[0])
    arguments = build_arguments(first, task, has_eval=True)
    set_seed(arguments.seed)
    batch = _batch(task, split, arguments)
    models = {name: _fresh_model(comparison, task, split, name) for name in comparison.methods}
    batches = dict.fromkeys(models, batch)
    for name, model in models.items():
        if comparison.reads_cache(name):
            batches[name + CACHED] = _cached_batch(comparison, task, split, name, model, arguments)
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        for name, model in models.items()
    }
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    reports: dict[str, list[StepReport]] = {title: [] for title in batches}
    for _ in range(rounds):
        for title, own in batches.items():
            name = title.removesuffix(CACHED)
            model = models[name].to(arguments.device)  # one at a time: a small GPU does not hold them all
            reports[title].append(measure_step(model, own, optimizers[name], autocast_dtype=dtype, repeats=1))
            model.to("cpu")
    return reports


def _cached_batch(
    comparison: Comparison, task: Task, split: Split, name: str, model: torch.nn.Module, arguments: TrainingArguments
) -> dict[str, Any]:
    """Return the batch of `_batch` as a method's runs read it from their cache."""
    processor = task.build_processor()
    examples, collator = Examples(split, task.training_view(processor)), task.collator(model, processor)
    config = comparison.run(name, comparison.seeds[0])
    found = read_cache(config, "train", split, examples, model.to(arguments.device), arguments, collator)
    found.set_epoch(0)
    batch = collator([found[i] for i in range(min(arguments.per_device_train_batch_size, len(found)))])
    model.to("cpu")
    return send_to_device(batch, arguments.device)


def _batch(task: Task, split: Split, arguments: TrainingArguments) -> dict[str, Any]:
    processor = task.build_processor()
    examples = Examples(split, task.training_view(processor))
    size = min(arguments.per_device_train_batch_size, len(split))
    batch = task.collator(task.build_model(split.labels), processor)([examples[i] for i in range(size)])
    return send_to_device(batch, arguments.device)


def _fresh_model(comparison: Comparison, task: Task, split: Split, name: str) -> torch.nn.Module:
    set_seed(comparison.seeds[0])
    return adapt(task.build_model(split.labels), comparison.methods[name])


def _rows(
    comparison: Comparison,
    metric: str,
    records: Mapping[str, list[dict[str, Any]]],
    steps: Mapping[str, list[StepReport]],
) -> list[Row]:
    saved = {name: reports[0].saved_bytes for name, reports in steps.items()}
    rows = []
    for name, runs in records.items():
        scores = [number(run["metrics"][metric]) for run in runs]
        from_cache = steps.get(name + CACHED)
        share = None
        if {"full", "head-only"} <= saved.keys():
            share = (saved[name] - saved["head-only"]) / (saved["full"] - saved["head-only"])
        rows.append(
            Row(
                method=name,
                metric=metric,
                seeds=list(comparison.seeds),
                scores=scores,
                mean=statistics.fmean(scores),
                deviation=statistics.stdev(scores) if len(scores) > 1 else None,
                learning_rate=comparison.rates[name],
                trained_parameters=runs[0]["trained_parameters"],
                steps=runs[0]["steps"],
                epochs=runs[0]["epochs"],
                training_seconds=[run["training_seconds"] for run in runs],
                saved_bytes=saved[name],
                peak_bytes=steps[name][0].peak_bytes,
                backbone_share=share,
                step_seconds=_seconds(steps[name]),
                step_rounds=[report.step_ms / 1000 for report in steps[name]],
                cached_step_seconds=_seconds(from_cache) if from_cache else None,
                cache_seconds=[run["cache_seconds"] for run in runs] if from_cache else None,
            )
        )
    return rows


def _seconds(reports: Sequence[StepReport]) -> float:
    """Return the median time of a step."""
    return statistics.median(report.step_ms for report in reports) / 1000


def _check_place(output: Path) -> None:
    """Refuse a folder that holds something else, and a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("num_processes: e3va compare runs in one process. Start it without a launcher.")
    refuse_file(output)
    if output.is_dir() and any(output.iterdir()) and not (output / RUNS).is_dir():
        raise FileExistsError(f"output={str(output)!r}: is not empty and holds no comparison. Choose another folder.")


def _check_task(comparison: Comparison, task: Task, console: Console) -> Split:
    """Find out before the first run what would stop a later one; return the training split."""
    data = comparison.config.data
    split, eval_split = load_splits(data, task.label_kind, comparison.seeds[0])
    if eval_split is None:
        raise UserError("data.eval_split: there is no split to score on. Set it, or data.eval_fraction.")
    build_arguments(comparison.run(next(iter(comparison.methods)), comparison.seeds[0]), task, has_eval=True)
    if comparison.methods.keys() - {"full"}:
        trained_whole(task.build_model(split.labels))
    for title, section in comparison.methods.items():
        if len(section) > 1 and not Path(comparison.run(title, comparison.seeds[0]).output).exists():
            try:
                _fresh_model(comparison, task, split, title)
            except UserError as error:
                raise UserError(f"methods={title!r}: {error}") from error
    if data.verify and not (comparison.output / RUNS).is_dir():
        verify((split, eval_split), console)
    return split


def _methods(text: str, config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return title -> `method` section for what `--methods` says; the config's own options hold for its method."""
    found: dict[str, dict[str, Any]] = {}
    for title in _parts(text, r",(?![^\[{]*[\]}])"):  # not at the commas of a list
        name, *options = (part.strip() for part in title.split(":"))
        if name not in METHODS:
            raise UserError(f"methods={name!r}: must be among {', '.join(METHODS)}.{nearest(name, METHODS)}")
        own = config.method_name == name.removesuffix("-checkpointing")
        values: dict[str, Any] = {"method": {**(config.method if own else {}), "name": name}}
        for option in options:
            key, _, value = option.partition("=")
            if not value:
                raise UserError(f"methods={title!r}: {option!r} has no value. Write {name}:r=8.")
            set_field(values, f"method.{key}", parse_yaml(value, f"methods={title!r}"), f"methods={title!r}")
        if _word(title) in map(_word, found):
            raise UserError(f"methods={text!r}: names {title} twice. Name each once.")
        found[title] = parse_method(values["method"])
    if not found:
        raise UserError(f"methods={text!r}: names none. Choose among {', '.join(METHODS)}.")
    return found


def _word(title: str) -> str:
    """Return a title as a part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", title)


def _seeds(text: str) -> tuple[int, ...]:
    seeds = tuple(_parts(text))
    for seed in seeds:
        if not seed.isdecimal():
            raise UserError(f"seeds={text!r}: {seed!r} is not a whole number from 0. Write --seeds 0,1,2.")
    numbers = tuple(int(seed) for seed in seeds)
    if not numbers or len(set(numbers)) != len(numbers):
        raise UserError(f"seeds={text!r}: must be one or more numbers, all different. Write --seeds 0,1,2.")
    return numbers


def _rates(pairs: Sequence[str], names: Collection[str]) -> dict[str, float]:
    rates: dict[str, float] = {}
    for pair in pairs:
        name, text = pair.rsplit("=", 1) if "=" in pair else (pair, "")
        if name not in names:
            raise UserError(
                f"learning-rate={pair!r}: must be METHOD=RATE, and {name!r} is not among the methods "
                f"{', '.join(names)}.{nearest(name, names)}"
            )
        try:
            rates[name] = float(text)
        except ValueError:
            rates[name] = float("nan")
        if not 0 < rates[name] < float("inf"):
            raise UserError(f"learning-rate={pair!r}: must be a positive number. Write --learning-rate {name}=1e-3.")
    return rates


def _parts(text: str, separator: str = ",") -> Iterator[str]:
    return (part.strip() for part in re.split(separator, text) if part.strip())
