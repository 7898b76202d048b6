"""A sweep: the same run with every combination of some fields, and which of them scored best."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from e3va_peft.data.formats import load_splits
from e3va_peft.errors import UserError
from e3va_peft.files import write_whole
from e3va_peft.training.config import RunConfig, parse_config, set_field, swept_field
from e3va_peft.training.folder import MARKER
from e3va_peft.training.results import number, plain
from e3va_peft.training.run import process, refuse_push, train_once
from e3va_peft.training.tasks import task_of

SWEEP = "sweep.json"


def runs_of(config: RunConfig) -> dict[str, RunConfig]:
    """Return the runs of a sweep by name, `learning_rate=0.001,seed=1`, each in a folder of that name.

    Raises:
        UserError: A combination cannot work.
    """
    found = {}
    for values in itertools.product(*config.sweep.values()):
        chosen = dict(zip(config.sweep, values, strict=True))
        name = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in chosen.items())
        fields = replace(config, sweep={}).to_dict()
        token = config.training.get("hub_token")  # which is not written down
        fields["training"] |= {} if token is None else {"hub_token": token}
        fields["output"] = str(Path(config.output) / name)
        # sections before what is in them: a method begins with its own options
        for key in sorted(chosen, key=lambda key: swept_field(key).count(".")):
            set_field(fields, swept_field(key), chosen[key], f"sweep.{key}")
        found[name] = parse_config(fields)
    return found


def sweep(config: RunConfig, overwrite: bool = False) -> dict[str, Any]:
    """Train every run of a sweep that is not finished, and rank them.

    Where runs read a cache they share its records: the backbone runs once for all of them.

    Args:
        config: A run with a `sweep`.
        overwrite: Train finished runs again.

    Returns:
        What is in `sweep.json`: the main metric, the runs from best to worst, and each one's fields and score.

    Raises:
        UserError: See `train`, and there is nothing to evaluate on, or the folder holds a run.
    """
    output, metric = Path(config.output), task_of(config).main_metric
    if (output / MARKER).exists():
        raise UserError(f"output={config.output!r}: holds a single run. Choose another folder for a sweep.")
    runs = runs_of(config)
    refuse_push(config, "sweep")
    _refuse_unscored(next(iter(runs.values())))
    scores = {}
    console = Console(highlight=False, soft_wrap=True, quiet=not PartialState().is_main_process)
    for position, (name, own) in enumerate(runs.items(), start=1):
        record = train_once(own, overwrite, console, f"[{position}/{len(runs)}] {name}")
        scores[name] = number(record["metrics"][metric])
    ranked = sorted(scores, key=lambda name: (math.isnan(scores[name]), -scores[name]))
    if math.isnan(scores[ranked[0]]):
        raise UserError(f"{metric}: is nan in every run: nothing in the evaluation split counts. Look at its labels.")
    result = {"metric": metric, "sweep": config.sweep, "runs": {name: scores[name] for name in ranked}}
    if PartialState().is_main_process:
        write_whole(output / SWEEP, json.dumps(plain(result), indent=2) + "\n")
        _show(output, result, console)
    return result


def _refuse_unscored(config: RunConfig) -> None:
    """Refuse a run that evaluates on nothing.

    Raises:
        UserError: It does not.
    """
    with process(config).main_process_first():
        splits = load_splits(config.data, task_of(config).label_kind, config.seed)
    if splits[1] is None:
        raise UserError("sweep: needs a score to rank by. Set data.eval_split, or data.eval_fraction.")


def _show(output: Path, result: dict[str, Any], console: Console) -> None:
    table = Table("run", result["metric"])
    for name, score in result["runs"].items():
        table.add_row(name, f"{score:.4f}")
    console.print(table)
    console.print(f"saved: {output / SWEEP}; the best run is {output / next(iter(result['runs']))}", markup=False)
