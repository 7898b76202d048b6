"""Train methods side by side on real data with `e3va train`, and record what came out.

python benchmarks/training.py cifar10 --data DATA --model MODEL --runs RUNS  # parquet with image and label; a ViT
python benchmarks/training.py nuclei  --data DATA --model MODEL --runs RUNS  # dsb2018/{images,semantic}; a Swin
python benchmarks/training.py nuclei-cascade --data DATA --model MODEL --runs RUNS  # dsb2018/{images,annotations}
python benchmarks/training.py nuclei-mask2former --data TILES --model MODEL --runs RUNS  # dsb2018 by tiles.py, 64 px
python benchmarks/training.py blood-cells-retinanet --data DATA --model MODEL --runs RUNS  # bccd, Pascal VOC layout
python benchmarks/training.py blood-cells-cascade --data DATA --model MODEL --runs RUNS  # bccd, Pascal VOC layout
python benchmarks/training.py cifar10 --data DATA --model MODEL --runs RUNS --measure  # on a quiet machine
python benchmarks/training.py nuclei --data DATA --model MODEL --runs RUNS --methods lora,full --seeds 1  # some of it

Each method gets the same head, data order and epochs, and, where a setting gives it several learning rates, the best
of them, judged on a part of the *training* images that is set aside; the evaluation images are seen once per seed, at
the end. Without `--measure` it trains, and a run that is finished already is not trained again; with it, it measures
one training step of each method, interleaved, and writes `results/NAME.json` together with what the runs gave.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import quiet, save, spread, training_parser

from e3va_peft.compare.run import Comparison, measure_steps
from e3va_peft.data.formats import load_splits
from e3va_peft.training.config import RunConfig, read_config
from e3va_peft.training.folder import finished
from e3va_peft.training.run import train
from e3va_peft.training.tasks import task_of

ROUNDS = 7
DENSE = ("e3va", "head-only", "partial-1", "lora", "full")
_NUCLEI = ("data.images=DATA/images/{split}", "data.annotations=DATA/annotations/instances_{split}.json")


@dataclass(frozen=True)
class Setting:
    """A comparison: the recipe it takes, the fields it changes, and each method's learning rates.

    In `data`, DATA is the folder of the data. A method with one rate is not searched.
    """

    recipe: str
    data: tuple[str, ...]
    metric: str
    seeds: tuple[int, ...]
    overrides: tuple[str, ...]
    grid: dict[str, tuple[float, ...]]
    search: tuple[str, ...] = ()


SETTINGS = {
    "cifar10": Setting(
        recipe="cifar10-focus-vit",
        data=("data.source=DATA",),
        metric="accuracy",
        seeds=(0,),
        overrides=("training.num_train_epochs=2",),
        search=("training.num_train_epochs=1", "data.train_samples=1000", "data.eval_fraction=0.1"),
        grid={
            "e3va": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
            "head-only": (1e-3, 3e-3, 1e-2, 3e-2),
            "lora": (5e-4, 1e-3, 3e-3, 1e-2),
            "full": (1e-5, 3e-5, 1e-4, 3e-4),
        },
    ),
    "nuclei": Setting(
        recipe="nuclei-upernet-swin",
        data=("data.images=DATA/images", "data.masks=DATA/semantic"),
        metric="mean_iou",
        seeds=(0, 1, 2),
        overrides=("training.num_train_epochs=6",),
        search=("training.num_train_epochs=3", "data.eval_fraction=0.15"),
        grid={
            "e3va": (1e-3, 2e-3, 4e-3, 8e-3),
            "head-only": (1e-3, 2e-3, 4e-3, 8e-3),
            "partial-1": (5e-4, 1e-3, 2e-3),
            "lora": (1e-3, 2e-3, 4e-3, 8e-3),
            "full": (3e-4, 1e-3, 2e-3, 4e-3),
        },
    ),
    "nuclei-cascade": Setting(
        recipe="nuclei-cascade-mask-rcnn-swin",
        data=_NUCLEI,
        metric="mask_ap",
        seeds=(0, 1, 2),
        overrides=("training.num_train_epochs=3",),
        search=("training.num_train_epochs=2", "data.eval_fraction=0.15"),
        grid=dict.fromkeys(DENSE, (2e-3, 4e-3, 8e-3)) | {"partial-1": (4e-3,), "full": (1e-3, 2e-3, 4e-3)},
    ),
    "nuclei-mask2former": Setting(
        recipe="nuclei-mask2former-swin",
        data=_NUCLEI,
        metric="mask_ap",
        seeds=(0,),
        overrides=("data.eval_samples=400",),
        grid=dict.fromkeys(DENSE, (5e-4,)),  # its own head is most of what learns
    ),
    "blood-cells-retinanet": Setting(
        recipe="blood-cells-retinanet-swin",
        data=("data.source=DATA",),
        metric="box_ap",
        seeds=(0,),
        overrides=("training.num_train_epochs=12",),
        search=("training.num_train_epochs=4", "data.train_split=train", "data.eval_split=val"),
        grid=dict.fromkeys(DENSE, (1e-3, 2e-3, 4e-3)) | {"partial-1": (2e-3,), "full": (5e-4, 1e-3, 2e-3)},
    ),
    "blood-cells-cascade": Setting(
        recipe="blood-cells-cascade-swin",
        data=("data.source=DATA",),
        metric="box_ap",
        seeds=(0, 1, 2),
        overrides=("training.num_train_epochs=3",),
        search=("training.num_train_epochs=2", "data.train_split=train", "data.eval_split=val"),
        grid=dict.fromkeys(DENSE, (2e-3, 4e-3, 8e-3)) | {"partial-1": (4e-3,), "full": (1e-3, 2e-3, 4e-3)},
    ),
}


def configure(args: argparse.Namespace, method: str, rate: float, seed: int, search: bool) -> RunConfig:
    """Return the config of one run."""
    setting = SETTINGS[args.setting]
    name = f"{method}-{rate:g}-{'search' if search else seed}"
    data = [override.replace("DATA", args.data) for override in setting.data]
    common = overrides(f"{args.runs}/{args.setting}/{name}", args.model, rate, seed)
    verified = f"data.verify={str(not search).lower()}"
    changed = (*setting.overrides, *(setting.search if search else ()))
    return read_config(setting.recipe, [*data, *common, verified, *changed, f"method={method}"])


def overrides(output: str, model: str, rate: float, seed: int) -> list[str]:
    """The fields that every recorded run sets."""
    return [
        f"model={model}",
        f"output={output}",
        f"training.learning_rate={rate}",
        f"training.seed={seed}",
        "training.eval_strategy=no",  # scored once, at the end: nothing is chosen by the evaluation images
        "training.save_strategy=epoch",
        "training.save_total_limit=1",
        "training.dataloader_num_workers=0",
        "training.disable_tqdm=true",
    ]


def result(config: RunConfig) -> dict[str, Any]:
    """Train, or read what an earlier call trained."""
    return finished(config) or train(config)


def best_rate(args: argparse.Namespace, method: str) -> tuple[float, dict[str, float]]:
    """Search a method's learning rate on a part of the training images that is set aside."""
    setting = SETTINGS[args.setting]
    if len(setting.grid[method]) == 1:
        return setting.grid[method][0], {}
    found = {}
    for rate in setting.grid[method]:
        found[rate] = result(configure(args, method, rate, 0, search=True))["metrics"][setting.metric]
        print(f"search {method} {rate:g}: {setting.metric} {found[rate]:.4f}", flush=True)
    return max(found, key=lambda rate: found[rate]), {f"{rate:g}": score for rate, score in found.items()}


def train_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train every method, and return a row for each."""
    setting = SETTINGS[args.setting]
    rates = {method: best_rate(args, method) for method in args.methods or setting.grid}
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in rates}
    for seed in setting.seeds if args.seeds is None else args.seeds:
        for method, (rate, _) in rates.items():
            runs[method].append(result(configure(args, method, rate, seed, search=False)))
            print(f"{method}, seed {seed}: {runs[method][-1]['metrics']}", flush=True)
    rows = []
    for method, done in runs.items():
        if not done:
            continue
        scores = [run["metrics"][setting.metric] for run in done]
        rows.append(
            {
                "method": method,
                "metric": setting.metric,
                **spread(scores),
                "learning_rate": rates[method][0],
                "searched": rates[method][1],
                "trained_parameters": done[0]["trained_parameters"],
                "steps": done[0]["steps"],
                "epochs": done[0]["epochs"],
            }
        )
    return rows


def measure_all(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Measure one training step of each method, interleaved, and add it to the rows."""
    torch.set_num_threads(2)
    first = rows[0]
    comparison = Comparison(
        config=configure(args, first["method"], first["learning_rate"], 0, search=False),
        output=Path(args.runs),
        methods={row["method"]: {"name": row["method"]} for row in rows},
        seeds=(0,),
        rates={row["method"]: row["learning_rate"] for row in rows},
    )
    task = task_of(comparison.config)
    split, _ = load_splits(comparison.config.data, task.label_kind)
    steps = measure_steps(comparison, task, split, ROUNDS)
    for row in rows:
        reports = steps[row["method"]]
        row["saved_bytes"], row["peak_bytes"] = reports[0].saved_bytes, reports[0].peak_bytes
        row["step_seconds"] = statistics.median(report.step_ms for report in reports) / 1000
        row["step_rounds"] = [report.step_ms / 1000 for report in reports]


def main() -> None:
    """Train, or measure and record."""
    parser = training_parser(__doc__)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--methods", type=lambda text: text.split(","), help="train only these")
    parser.add_argument(
        "--seeds",
        type=lambda text: [int(seed) for seed in text.split(",") if seed],
        help="train only these; empty: search only",
    )
    args = parser.parse_args()
    if args.measure and (args.methods or args.seeds is not None):
        parser.error("--measure records all methods and seeds: leave out --methods and --seeds")
    if unknown := set(args.methods or ()) - set(SETTINGS[args.setting].grid):
        parser.error(f"--methods: {args.setting} has no {', '.join(sorted(unknown))}")
    quiet()
    rows = train_all(args)
    if args.measure:
        measure_all(args, rows)
        save(args.setting, rows)
    for row in rows:
        print({key: value for key, value in row.items() if key not in ("searched", "step_rounds")})


if __name__ == "__main__":
    main()
