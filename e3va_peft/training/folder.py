"""The folder of a run: whose it is, who is training in it, and what is put aside before anything is replaced."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from e3va_peft.errors import UserError, read_text
from e3va_peft.files import is_draft, write_whole
from e3va_peft.training.config import RunConfig, read_config

CONFIG, METRICS, CURVES = "config.yaml", "metrics.json", "curves.png"
CONFUSION, CONFUSION_PICTURE = "confusion.csv", "confusion.png"
ADAPTER, MODEL, LOGS = "adapter", "model", "logs"
MARKER, LOCK, DRAFT = ".e3va-run", ".e3va-lock", ".e3va-draft"

_CHECKPOINT, _BROKEN = re.compile(r"checkpoint-(\d+)"), re.compile(r"broken-checkpoint-(\d+)")
_OLD = ".old-"
_OF_A_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")


def read_run(run: Path) -> RunConfig:
    """Read the config of a run from its folder.

    Raises:
        UserError: It is not the folder of a run.
    """
    if not (run / CONFIG).is_file():
        raise UserError(f"run={str(run)!r}: has no {CONFIG}; it is not a folder that `e3va train` wrote.")
    return read_config(run / CONFIG)


def run_of(folder: Path) -> Path:
    """Return the folder of the run that a folder is a checkpoint of; of all others itself."""
    of_a_run = (folder.parent / CONFIG).is_file() and folder in checkpoints(folder.parent).values()
    return folder.parent if of_a_run else folder


def finished(config: RunConfig) -> dict[str, Any] | None:
    """The content of `metrics.json` of a run that is finished; None where it is not.

    Raises:
        FileExistsError: `config.output` holds a run with other settings.
    """
    output = Path(config.output)
    if not _is_finished(output):
        return None
    _refuse_changes(output, read_run(output), config)
    record: dict[str, Any] = json.loads((output / METRICS).read_text(encoding="utf-8"))
    return record


def _is_finished(output: Path) -> bool:
    """Whether a run has written its metrics; a file of no bytes is what a power cut leaves."""
    file = output / METRICS
    return file.is_file() and file.stat().st_size > 0


def checkpoints(output: Path) -> dict[int, Path]:
    """Return the checkpoints in a run's folder by their step: folders whose name is Trainer's, and no others."""
    return _numbered(output, _CHECKPOINT)


def _numbered(output: Path, name: re.Pattern[str]) -> dict[int, Path]:
    found = output.iterdir() if output.is_dir() else iter(())
    return {int(match[1]): path for path in found if (match := name.fullmatch(path.name)) and path.is_dir()}


def refuse_file(output: Path) -> None:
    """Refuse an output that shall be a folder and is a file.

    Raises:
        UserError: It is.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"output={str(output)!r}: is a file. Choose a folder.")


def check_output(output: Path, config: RunConfig, overwrite: bool) -> None:
    """Refuse a folder that is not a run's, or that holds another or a finished run. Nothing is changed.

    A run's folder has the marker that only `e3va train` writes, and a config that it can read. A `config.yaml` alone,
    a name that many programs use, says nothing.

    Args:
        output: The folder.
        config: The run that shall go there.
        overwrite: A run that is there shall be replaced.

    Raises:
        UserError: It is a file, or the config there is broken.
        FileExistsError: It is not free for this run.
    """
    refuse_file(output)
    if not output.is_dir() or all(_is_ours(path) for path in output.iterdir()):
        return
    if not (output / MARKER).is_file() or not (output / CONFIG).is_file():
        raise FileExistsError(
            f"output={str(output)!r}: is not empty and holds no run: there is no {MARKER} with a {CONFIG}. Choose "
            "another folder."
        )
    before = read_run(output)
    if overwrite:
        return
    if _is_finished(output):
        _refuse_changes(output, before, config)
        raise FileExistsError(
            f"output={str(output)!r}: holds this run, finished. Look at {output / METRICS}; --overwrite trains it "
            "again."
        )
    if checkpoints(output):  # which know how many images a step has: how many of them a process takes may change
        _refuse_changes(output, _without_batch(before), _without_batch(config))


def _without_batch(config: RunConfig) -> RunConfig:
    kept = {name: value for name, value in config.training.items() if name not in _OF_A_STEP}
    return dataclasses.replace(config, training=kept)


def _is_ours(path: Path) -> bool:
    """Whether a path is what a start that did not come to train may have left."""
    return path.name in (MARKER, LOCK, DRAFT) or is_draft(path, MARKER, CONFIG) or _is_replaced(path)


def protect_source(source: str | Path, config: RunConfig, overwrite: bool) -> None:
    """Refuse to write a run's config over the file that it was read from, unless nothing of that would change.

    Args:
        source: What the config was read from.
        config: The run.
        overwrite: A run that is in its folder shall be replaced.

    Raises:
        UserError: The file is in the run's folder, where `e3va train` would change it.
    """
    output = Path(config.output)
    file, own = Path(source), output / CONFIG
    if not file.is_file() or not own.is_file() or not file.samefile(own):
        return
    kept = read_text(file) == config.to_yaml()
    if not overwrite and not kept:
        kept = _says(output, config)
    if not kept or not (output / MARKER).is_file():
        raise UserError(
            f"config={str(source)!r}: is in output={str(output)!r}, where the run writes a {CONFIG} of its own, and "
            "yours would be lost. Choose another output, or move the file elsewhere and name it there."
        )


def _says(output: Path, config: RunConfig) -> bool:
    """Whether the config in a run's folder is this one."""
    return read_run(output).to_dict() == config.to_dict()


def _refuse_changes(output: Path, before: RunConfig, config: RunConfig) -> None:
    changed = _differences(before.to_dict(), config.to_dict())
    if changed:
        raise FileExistsError(
            f"output={str(output)!r}: holds a run with other settings:\n  "
            + "\n  ".join(changed)
            + "\nChoose another output, take the settings back to resume, or --overwrite."
        )


def _differences(before: Any, after: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [*before, *(key for key in after if key not in before)]
        return [
            line
            for key in keys
            for line in _differences(before.get(key), after.get(key), f"{name}.{key}" if name else key)
        ]
    if before == after:
        return []
    there, now = ("not set" if value is None else repr(value) for value in (before, after))
    return [f"{name}: {there} there, {now} now"]


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold a run's folder, which is made where it is not there, against other runs.

    Raises:
        UserError: The folder cannot be written.
        FileExistsError: Another run holds it.
    """
    made = not output.exists()
    path = output.resolve() / LOCK
    lock = FileLock(path, timeout=0)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise FileExistsError(
            f"output={str(output)!r}: another run is training there. Wait for it, stop it, or choose another output."
        ) from None
    except (OSError, NotImplementedError) as error:
        raise UserError(f"output={str(output)!r}: cannot be written ({error}). Choose another folder.") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # on Windows, where it is open
            path.unlink()
        lock.release()
        if made:
            with contextlib.suppress(OSError):  # it is not empty: the run has begun
                output.rmdir()


def begin(output: Path, config: RunConfig, overwrite: bool, console: Console) -> None:
    """Write marker and config of a run that is about to train; put aside what a run there has left, if it is replaced.

    A config that is there and says the same is left as it is, comments and all.

    Args:
        output: Folder of the run, which `check_output` has let pass.
        config: The run.
        overwrite: A run that is there is replaced.
        console: Where to say what is put aside.
    """
    parts = [output / name for name in (METRICS, CURVES, CONFUSION, CONFUSION_PICTURE, *_saved_parts(output))]
    parts += [*checkpoints(output).values(), *_numbered(output, _BROKEN).values()]
    parts += [output / CONFIG]  # last: with it a folder is a run's, whatever stops the moving
    there = [path for path in parts if os.path.lexists(path)]
    if overwrite and there:
        aside = _put_aside(output, there, replaced=True)
        console.print(f"the run that is there is in {escape(str(aside))} until this one is saved")
    if not (output / MARKER).is_file():  # first: a config alone could be anybody's
        _mark(output, ())
    if not (output / CONFIG).is_file() or not _says(output, config):
        write_whole(output / CONFIG, config.to_yaml())


def place(output: Path, draft: Path, name: str, console: Console) -> Path:
    """Move what a run has saved to its place. What is in the way is put aside, and kept if no run has made it.

    Args:
        output: Folder of the run.
        draft: What was saved.
        name: What it shall be called there.
        console: Where to say what is kept.

    Returns:
        Its place.
    """
    folder, parts = output / name, _saved_parts(output)
    if os.path.lexists(folder):
        aside = _put_aside(output, [folder], replaced=name in parts)
        if name not in parts:
            console.print(
                f"[yellow]warning[/yellow]: {escape(str(folder))} was not of this run; it is now "
                f"{escape(str(aside / name))}."
            )
    _mark(output, [*parts, name])
    draft.rename(folder)
    return folder


def log_folder(output: Path) -> Path:
    """Return the folder of a run's logs, which is made where it is not there and belongs to the run then."""
    folder = output / LOGS
    if not folder.exists():
        _mark(output, [*_saved_parts(output), LOGS])
        folder.mkdir()
    return folder


def remove_replaced(output: Path) -> None:
    """Remove the runs that were put aside to be replaced, now that there is another."""
    for path in output.glob(f"{_OLD}*"):
        if _is_replaced(path):
            shutil.rmtree(path, ignore_errors=True)


def _put_aside(output: Path, paths: Iterable[Path], replaced: bool) -> Path:
    """Move files and folders into a new folder; with `replaced`, `remove_replaced` will remove it."""
    aside = Path(tempfile.mkdtemp(prefix=f"{_OLD}{time.strftime('%Y%m%d-%H%M%S')}-", dir=output))
    if replaced:
        _mark(aside, ())
    for path in paths:
        path.rename(aside / path.name)
    return aside


def _is_replaced(path: Path) -> bool:
    return path.name.startswith(_OLD) and (path / MARKER).is_file() and not path.is_symlink()


def _mark(folder: Path, parts: Iterable[str]) -> None:
    """Write the marker: the names of the folders that runs have saved there, one a line."""
    write_whole(folder / MARKER, "".join(f"{name}\n" for name in dict.fromkeys(parts)))


def _saved_parts(output: Path) -> list[str]:
    try:
        lines = (output / MARKER).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [name for name in (ADAPTER, MODEL, LOGS) if name in lines]
