"""Accuracy of every method on one task: learning rates searched, three seeds, each result in a file of its own.

    python benchmarks/accuracy/run.py nuclei --data DATA --model MODEL --runs RUNS               # all of it, hours
    python benchmarks/accuracy/run.py nuclei --data DATA --model MODEL --runs RUNS --minutes 20  # continues each time
    python benchmarks/accuracy/run.py tissue --runs RUNS --methods lora,e3va-4                   # some of it
    python benchmarks/accuracy/run.py nuclei ... --quick                                         # a few steps of each
    python benchmarks/accuracy/run.py --list                                                     # what is recorded

A task is a file beside this one. All methods get the same head, images, order, augmentation and epochs; only those
whose names end in -cached or -in-time see the images more or less often, as the task says, in about as much time as
LoRA takes. A learning rate is searched for each from its default on (or the task's `centres`), by factors of two,
until the best one is bracketed on both sides, on a part of the *training* images that is set aside; the evaluation
images are seen once per seed, at the end. A run that was stopped resumes at its last epoch, and what is recorded is
not trained again: `results/accuracy/TASK/*.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as if started there: what benchmarks share
from record import RESULTS, names, origin, overrides, quiet, result, spread

from e3va_peft.data.yaml import parse_yaml
from e3va_peft.demo.data import MNI152Slices, mni152_slices
from e3va_peft.demo.run import mean_iou, predict
from e3va_peft.demo.run import train as train_demo
from e3va_peft.demo.weights import focus_vit
from e3va_peft.methods import METHODS
from e3va_peft.training.config import RunConfig, read_config
from e3va_peft.training.folder import write_whole

HERE = Path(__file__).parent
RECORDS = RESULTS / "accuracy"
LIVE = (2, 4, 6, 8, 12)  # of the 12 blocks that both backbones have
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in ("full", "head-only", "partial-1", "bitfit", "adaptformer", "mona")},
    "lora": {"name": "lora", "lora_alpha": 8},  # PEFT's own scale
    "e3va": {"name": "e3va"},
    **{f"e3va-{live}": {"name": "e3va", "live_blocks": live} for live in LIVE},
    "e3va-plus": {"name": "e3va-plus"},
    "e3va-plus-exact": {"name": "e3va-plus", "tap_storage": "exact"},
    **{f"e3va-plus-{live}": {"name": "e3va-plus", "live_blocks": live} for live in LIVE[1::2]},
}
CACHED = "-cached"  # behind a method's name: the backbone once per image and view, so more epochs in the same time
SETTINGS |= {f"{name}{CACHED}": SETTINGS[name] for name in ("head-only", "e3va", "e3va-8")}
SETTINGS[f"e3va-plus{CACHED}"] = SETTINGS["e3va-plus-exact"]  # the cache is what takes memory, not what a step keeps
SETTINGS[f"e3va-8-kept{CACHED}"] = SETTINGS["e3va-8"] | {"checkpoint_live_blocks": False}
IN_TIME = "-in-time"  # behind a method's name: fewer epochs, so that it takes no longer than LoRA
SETTINGS[f"e3va-8{IN_TIME}"] = SETTINGS["e3va-8"]
LEAN = f"e3va-plus-r32{CACHED}"  # half of E3VA+'s rank, from a cache in int8 wherever it runs
SETTINGS[LEAN] = SETTINGS["e3va-plus-exact"] | {"r": 32}
SETTINGS["e3va-12-r8"] = SETTINGS["e3va-12"] | {"r": 8}  # of LoRA's rank
SETTINGS[f"e3va-plus-2{CACHED}"] = SETTINGS["e3va-plus-exact"] | {"live_blocks": 2}
INSIDE = {"-slow": 0.2, "-half": 0.5}  # behind a method's name: the rate inside or beside the backbone, a share
SETTINGS |= {f"{name}-slow": SETTINGS[name] for name in ("lora", "e3va-8")}
SETTINGS["e3va-8-r64-half"] = SETTINGS["e3va-8"] | {"r": 64}
SHORT = (0.5, 1.0, 2.0)  # the rates that a search begins with, as multiples of its centre
FEWEST, MOST = 2**-4, 2**4  # where it ends


@dataclass(frozen=True)
class Task:
    """A task, as its file says.

    Attributes:
        name: Of its file and its records.
        recipe: What `e3va train` calls it; `demo`: the demo's own model and slices.
        metric: The score.
        seeds: Of head, data order and augmentation.
        epochs: Of a run that is scored on the evaluation images.
        search_epochs: Of a run that is scored on training images set aside.
        cached_epochs: Of a run from a cache that is scored on the evaluation images, and as many more when searching.
        epochs_in_time: Method -> epochs of a run that is scored on the evaluation images, where it has others.
        epochs_in_search: Method -> epochs of a run that is scored on training images set aside, where it has others.
        centres: Method -> the rate that its search begins at, where that is not the method's default.
        views: How often a cache draws the augmentation of an image.
        moved: Whether the demo's slices are augmented, as in the demo.
        curve: Whether the record of a seed has the score after each epoch, too. The score is that of the last one.
        fields: `key=value` of the recipe. DATA in them, and in those below, is the folder of the data.
        search: More of them that set training images aside.
        quick: More of them that leave a few images.
    """

    name: str
    recipe: str
    metric: str
    seeds: list[int]
    epochs: int
    search_epochs: int
    cached_epochs: int
    epochs_in_time: Mapping[str, float] = field(default_factory=dict)
    epochs_in_search: Mapping[str, float] = field(default_factory=dict)
    centres: Mapping[str, float] = field(default_factory=dict)
    views: int = 1
    moved: bool = False
    curve: bool = False
    fields: Sequence[str] = ()
    search: Sequence[str] = ()
    quick: Sequence[str] = ()


def read_task(name: str) -> Task:
    """Read the file of a task."""
    return Task(name, **parse_yaml((HERE / f"{name}.yaml").read_text(encoding="utf-8"), name))


class Protocol:
    """The runs of one task, and their records.

    Args:
        task: The task.
        args: The command line: where data, model and runs are, `quick`, and `deadline` in seconds of `time.monotonic`.
    """

    def __init__(self, task: Task, args: argparse.Namespace) -> None:
        self.task, self.args = task, args
        self.records = Path(args.runs) / "quick" / task.name if args.quick else RECORDS / task.name

    def score(self, method: str, rate: float, seed: int, search: bool = False) -> float:
        """Train and score one run, or read its record."""
        name = f"{method}-{'search' if search else 'seed'}-{rate:g}-{seed}"
        path = self.records / f"{name}.json"
        if not path.is_file():
            if time.monotonic() > self.args.deadline:
                raise SystemExit(f"time is up before {name}; the same command continues")
            start = time.perf_counter()
            train_one = self._demo if self.task.recipe == "demo" else self._command
            found = train_one(name, method, rate, seed, search)
            row = {
                **{"task": self.task.name, "method": method, "options": SETTINGS[method]},
                **{"part": "search" if search else "seed", "learning_rate": rate, "seed": seed},
                **{"metric": self.task.metric, **found, "seconds": time.perf_counter() - start},
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps({**row, "origin": origin()}, indent=2) + "\n")
            print(f"{self.task.name} {name}: {found['score']:.4f}", flush=True)
        return float(json.loads(path.read_text(encoding="utf-8"))["score"])

    def config(self, name: str, method: str, rate: float, seed: int, search: bool = False) -> RunConfig:
        """The config of a run by `e3va train`."""
        fields = [*self.task.fields, *overrides(str(self._folder(name)), self.args.model, rate, seed)]
        fields += self.task.search if search else ()
        fields += self.task.quick if self.args.quick else ()
        epochs = self._epochs(method, search)
        fields += ["data.verify=false", f"training.num_train_epochs={epochs}"]
        if self.task.curve and not search:
            fields += ["training.eval_strategy=epoch", "training.load_best_model_at_end=false"]
        fields += [f"backbone_lr_multiplier={share}" for end, share in INSIDE.items() if method.endswith(end)]
        views = self._views(method, epochs)
        fields += [f"cache.views={views}", f"cache.storage={self.storage(method)}"] if views else ()
        options = dict(SETTINGS[method])
        fields += [f"method={options.pop('name')}", *(f"method.{key}={value}" for key, value in options.items())]
        return read_config(self.task.recipe, [each.replace("DATA", str(self.args.data)) for each in fields])

    def storage(self, method: str) -> str:
        """How the cache of a method keeps what it reads."""
        return "exact" if self.task.recipe == "demo" and method != LEAN else "int8"

    def _folder(self, name: str) -> Path:
        return Path(self.args.runs) / self.task.name / name

    def _epochs(self, method: str, search: bool) -> float:
        if self.args.quick:
            return 1
        default = self.task.cached_epochs if method.endswith(CACHED) else self.task.epochs
        epochs = self.task.epochs_in_time.get(method, default)
        if not search:
            return epochs
        return self.task.epochs_in_search.get(method, max(1, epochs * self.task.search_epochs // self.task.epochs))

    def _views(self, method: str, epochs: float) -> int:
        return min(self.task.views, int(epochs)) if method.endswith(CACHED) else 0

    def _command(self, name: str, method: str, rate: float, seed: int, search: bool) -> dict[str, Any]:
        config = self.config(name, method, rate, seed, search)
        run = result(config)
        shutil.rmtree(config.output)  # hundreds of runs; the record is what is kept
        key = f"eval_{self.task.metric}"
        curve = [{"epoch": entry["epoch"], "score": entry[key]} for entry in run["history"] if key in entry]
        return {
            "score": run["metrics"][self.task.metric],
            **{key: run[key] for key in ("metrics", "steps", "epochs", "trained_parameters")},
            **({"curve": curve} if self.task.curve and not search else {}),
        }

    def _demo(self, name: str, method: str, rate: float, seed: int, search: bool) -> dict[str, Any]:
        fit, scored = set_aside(mni152_slices()[0]) if search else mni152_slices()
        if self.args.quick:
            fit, scored = choose(fit, range(8)), choose(scored, range(2))
        epochs, folder = self._epochs(method, search), self._folder(name)
        views, fit = self._views(method, epochs), fit.augmented() if self.task.moved else fit
        model, _ = train_demo(
            SETTINGS[method], rate, focus_vit(), fit, folder, epochs, seed, views, self.storage(method)
        )
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        score = mean_iou(predict(model, scored), scored)
        return {
            "score": score,
            "steps": math.ceil(epochs * -(-len(fit) // 2)),
            "epochs": epochs,
            "trained_parameters": trained,
        }

    def best_rate(self, method: str) -> float:
        """The learning rate that did best on images set aside, with worse ones on both sides."""
        method = method.removesuffix(IN_TIME)
        default = self.task.centres.get(method, METHODS[SETTINGS[method]["name"]].learning_rate)
        return bracketed(lambda factor: self.score(method, default * factor, 0, search=True)) * default

    def all(self, methods: Sequence[str]) -> None:
        """Search, then train, every method; seeds are the outer loop."""
        rates = {method: self.best_rate(method) for method in methods}
        for seed in self.task.seeds[:1] if self.args.quick else self.task.seeds:
            for method, rate in rates.items():
                self.score(method, rate, seed)


def bracketed(score: Callable[[float], float]) -> float:
    """The factor with the best score among powers of two, searched until both neighbours are worse."""
    found = {factor: score(factor) for factor in SHORT}
    while True:
        best = max(found, key=lambda factor: found[factor])
        beyond = best * 2 if best == max(found) else best / 2 if best == min(found) else None
        if beyond is None or not FEWEST <= beyond <= MOST:
            return best
        found[beyond] = score(beyond)


def choose(slices: MNI152Slices, places: Sequence[int]) -> MNI152Slices:
    """Some of the slices, by their places."""
    chosen = list(places)
    return MNI152Slices(slices.images[chosen], slices.labels[chosen], tuple(slices.indices[i] for i in chosen))


def set_aside(slices: MNI152Slices) -> tuple[MNI152Slices, MNI152Slices]:
    """Split training slices: to train on, and the middle one of the blocks that follow without a gap, to choose by."""
    starts = [i for i, index in enumerate(slices.indices) if index - 1 not in slices.indices]
    first, last = starts[len(starts) // 2], starts[len(starts) // 2 + 1]
    return choose(slices, [*range(first), *range(last, len(slices))]), choose(slices, range(first, last))


def recorded(task: str) -> Iterator[dict[str, Any]]:
    """Iterate over the records of a task."""
    for path in sorted((RECORDS / task).glob("*.json")):
        yield json.loads(path.read_text(encoding="utf-8"))


def summary(task: str) -> list[dict[str, Any]]:
    """A row per method: mean and deviation over its seeds, its rate, and what its search found."""
    rows = []
    found = list(recorded(task))
    for method in SETTINGS:
        own = [row for row in found if row["method"] == method]
        seeds = [row for row in own if row["part"] == "seed"]
        if not seeds:
            continue
        scores = [row["score"] for row in seeds]
        rows.append(
            {
                **{"task": task, "method": method, "metric": seeds[0]["metric"], **spread(scores)},
                **{key: seeds[0][key] for key in ("learning_rate", "steps", "epochs", "trained_parameters")},
                "searched": {f"{row['learning_rate']:g}": row["score"] for row in own if row["part"] == "search"},
            }
        )
    return rows


def main() -> None:
    """Train what is not recorded yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = sorted(path.stem for path in HERE.glob("*.yaml"))
    parser.add_argument("task", nargs="?", choices=tasks)
    parser.add_argument("--data", help="folder of the data")
    parser.add_argument("--model", help="folder of the pretrained backbone")
    parser.add_argument("--runs", help="folder for checkpoints")
    parser.add_argument("--methods", type=names(SETTINGS), default=list(SETTINGS), help="only these")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further run after so many")
    parser.add_argument("--quick", action="store_true", help="a few images, one epoch, records in RUNS")
    parser.add_argument("--list", action="store_true", help="print what is recorded")
    args = parser.parse_args()
    if args.list:
        for task in tasks:
            for row in summary(task):
                spread = "" if row["deviation"] is None else f" +- {row['deviation']:.4f}"
                print(
                    f"{task} {row['method']}: {row['mean']:.4f}{spread} at {row['learning_rate']:g}, {row['searched']}"
                )
        return
    if args.task is None or args.runs is None:
        parser.error("name a task, and --runs")
    quiet()
    args.deadline = time.monotonic() + 60 * args.minutes
    Protocol(read_task(args.task), args).all(args.methods)


if __name__ == "__main__":
    main()
