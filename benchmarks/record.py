"""Parts that benchmarks share: command line, quiet, and records with versions, machine, revision and command."""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import shutil
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from e3va_peft.compare.report import machine
from e3va_peft.files import write_whole
from e3va_peft.training.config import RunConfig
from e3va_peft.training.folder import finished
from e3va_peft.training.run import train, versions

RESULTS = Path(__file__).parent / "results"


def training_parser(about: str | None) -> argparse.ArgumentParser:
    """Begin the command line of a benchmark that trains: where its data, its model and its runs are."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--data", "--model", "--runs"):
        parser.add_argument(name, required=True)
    return parser


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a function that reads some of the known names, separated by commas."""

    def read(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: choose among {', '.join(known)}")
        return text.split(",")

    return read


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


def quiet() -> None:
    """Keep loading reports, progress bars and announcements of other libraries out of the output."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def keep_pages() -> None:
    """Let glibc keep freed memory, as CUDA's allocator does.

    Else it hands pages back to the system after large tensors and takes them again, zeroed, one fault at a time: more
    or less often by what the method freed whose step was timed before.
    """
    trim_threshold, mmap_threshold = -1, -3  # as malloc.h numbers them
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(mmap_threshold, 2**30) and mallopt(trim_threshold, 2**31 - 1)):
        sys.exit("this C library cannot keep freed memory, so times would not compare with those that are recorded.")


def origin(*more: str) -> dict[str, Any]:
    """Return where a result comes from, the versions of `more` packages included."""
    return {
        "command": " ".join(["python", script(), *(Path(a).name for a in sys.argv[1:])]),
        "revision": revision(),
        "versions": versions(*more),
        "python": platform.python_version(),
        "machine": machine(),
    }


def script() -> str:
    """Return the script that runs, from the root of the repository on."""
    path = Path(sys.argv[0]).resolve()
    root = RESULTS.parents[1]
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def revision() -> str:
    """Return the commit that is checked out; nothing without git."""
    if shutil.which("git") is None:
        return ""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return asked.stdout.strip()


def save(name: str, rows: list[dict[str, Any]], *more: str, folder: Path = RESULTS) -> None:
    """Write `<folder>/<name>.json` with the rows and where they come from, the versions of `more` included."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{name}.json", json.dumps({**origin(*more), "rows": rows}, indent=2) + "\n")


def spread(scores: list[float]) -> dict[str, Any]:
    """Scores of the seeds of a method, their mean, and their standard deviation, None of one seed."""
    deviation = statistics.stdev(scores) if len(scores) > 1 else None
    return {"scores": scores, "mean": statistics.fmean(scores), "deviation": deviation}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The recorded rows of a file, none where it is not there."""
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def same(row: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    """Whether a row is about this."""
    return all(row[name] == value for name, value in about.items())


def replace_row(path: Path, about: Mapping[str, Any], row: Mapping[str, Any]) -> None:
    """Write a row and where it comes from, instead of an earlier one about the same; `about` is a part of it."""
    kept = [other for other in read_rows(path) if not same(other, about)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"rows": [*kept, {**row, "origin": origin()}]}, indent=2) + "\n")
