"""Choices of the method that the paper does not give, compared on real data: the norm of taps, the scale of the sum.

    python benchmarks/choices.py cifar10 --data DATA --model MODEL --runs RUNS  # a plain ViT: parquet, image and label
    python benchmarks/choices.py nuclei  --data DATA --model MODEL --runs RUNS  # a Swin: dsb2018/{images,semantic}

Every choice is trained by `e3va train` with the same head, data order, steps and learning rate, and scored on a part
of the *training* images that is set aside: what becomes a default has not seen the evaluation images. A run that is
finished already is not trained again. Each result is written to `results/choices.json` when its last seed is.

A factor on the sum of a stage's adapters acts as one on the learning rate of their last projection and bias, which
begin at zero: AdamW's steps do not depend on the size of a gradient. It is put on here, outside of the package.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, overrides, quiet, replace_row, result, spread, training_parser
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "accuracy"))
from run import read_task

from e3va_peft.highway import Stage
from e3va_peft.methods import METHODS
from e3va_peft.methods.e3va import E3VA
from e3va_peft.storage import NORMS
from e3va_peft.training.config import RunConfig, read_config

SEEDS = (0, 1, 2)
SUMS = {"1": 0.0, "1/sqrt(n)": -0.5, "1/n": -1.0, "learnt": -0.5}  # the power of n; learnt begins there
TASKS = {  # of `accuracy/`; 188 steps, and 123
    "cifar10": ("data.eval_fraction=0.25", "training.num_train_epochs=2"),
    "nuclei": ("data.eval_fraction=0.25", "training.num_train_epochs=3"),
}
RATES = {"cifar10": 3e-3, "nuclei": 2e-3}
LIVE = {"cifar10": (0, 4), "nuclei": (0, 2)}  # of 12 blocks: the last third; the last stage


def choices(task: str) -> Iterator[dict[str, Any]]:
    """Yield what is compared: every norm with and without live blocks, then every scale of the sum without."""
    for blocks in LIVE[task]:
        for norm in NORMS[1:] if blocks and task == "cifar10" else NORMS:  # raw taps break a live ViT
            yield {"tap_norm": norm, "live_blocks": blocks, "sum": "1"}
    for scale in list(SUMS)[1:]:
        yield {"tap_norm": "relative" if task == "cifar10" else "layer", "live_blocks": 0, "sum": scale}


def adapt(kind: str, model: nn.Module, **options: Any) -> nn.Module:
    """Adapt a model by E3VA, with a factor on the sum of each stage's adapters."""
    adapted = E3VA.adapt(model, **options)
    for stage in [module for module in adapted.modules() if isinstance(module, Stage)]:
        factor = torch.tensor(len(stage.u1) ** SUMS[kind])
        if kind == "learnt":
            stage.factor = nn.Parameter(factor)
        if kind != "1":
            stage.register_forward_hook(partial(scaled, factor=factor))
    return adapted


def scaled(stage: nn.Module, args: tuple[Any, ...], output: Tensor, factor: Tensor) -> Tensor:
    """Scale a sum, whether its taps were kept or reduced before."""
    reduces = len(args) > 2 and args[2] == "reduce"
    return output if reduces else output * getattr(stage, "factor", factor)


NAMES = {kind: f"e3va-sum-{kind.replace('/', 'over')}" for kind in SUMS}
METHODS.update({name: replace(E3VA, name=name, adapt=partial(adapt, kind)) for kind, name in NAMES.items()})


def configure(args: argparse.Namespace, choice: Mapping[str, Any], seed: int) -> RunConfig:
    """Return the config of one run."""
    task = read_task(args.task)
    options = dict(choice)
    method = NAMES[options.pop("sum")]
    name = f"{choice['tap_norm']}-{choice['live_blocks']}-{method}-{seed}"
    data = [override.replace("DATA", args.data) for override in task.fields]
    common = overrides(f"{args.runs}/{args.task}/{name}", args.model, RATES[args.task], seed)
    config = read_config(task.recipe, [*data, *common, "data.verify=false", *TASKS[args.task]])
    return replace(config, method={"name": method, **options})


def record(task: str, choice: Mapping[str, Any], runs: list[dict[str, Any]]) -> None:
    """Write the scores of a choice, instead of an earlier record of it."""
    metric = read_task(task).metric
    scores = [run["metrics"][metric] for run in runs]
    about = {"task": task, **choice}
    row = about | {
        "metric": metric,
        "learning_rate": RATES[task],
        "steps": runs[0]["steps"],
        **spread(scores),
    }
    replace_row(RESULTS / "choices.json", about, row)


def main() -> None:
    """Train, and record each choice whose seeds are all there."""
    parser = training_parser(__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--live-blocks", type=int, help="only the choices with so many")
    parser.add_argument("--sum", choices=SUMS, help="only the choices with this factor on the sum")
    args = parser.parse_args()
    quiet()
    for choice in choices(args.task):
        if args.live_blocks not in (None, choice["live_blocks"]) or args.sum not in (None, choice["sum"]):
            continue
        runs = []
        for seed in SEEDS:
            runs.append(result(configure(args, choice, seed)))
            score = runs[-1]["metrics"][read_task(args.task).metric]
            print(f"{args.task}, {choice}, seed {seed}: {score:.4f}", flush=True)
        record(args.task, choice, runs)


if __name__ == "__main__":
    main()
