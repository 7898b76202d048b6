"""The folder of a run: nothing of its owner's is deleted, a whole run replaces one, and one at a time trains there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from filelock import FileLock
from rich.console import Console
from ruamel.yaml import YAML
from typer.testing import CliRunner

from e3va_peft.cli import app
from e3va_peft.errors import UserError
from e3va_peft.files import write_whole
from e3va_peft.training.config import parse_config
from e3va_peft.training.folder import LOCK, MARKER, begin, check_output, locked
from e3va_peft.training.predict import load_trained
from e3va_peft.training.run import train
from tests.helpers import Stop, stop_after
from tests.inputs import classify, write


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def old(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".old-")]


def foreign(folder: Path, config: str = "db: x\n") -> dict[str, bytes]:
    """A project of somebody's own whose files and folders have the names that a run's have; return what is in it."""
    for name in ("model/net.py", "adapter/code.py", "checkpoint-1/mine.bin", "broken-checkpoint-2/a.bin", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    (folder / "config.yaml").write_text(config)
    return contents(folder)


def quick(root: Path, output: str = "run", **training: Any) -> dict[str, Any]:
    return classify(root, output, **{"num_train_epochs": 1, "eval_strategy": "no"} | training)


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize("method", ["e3va", "head-only"])
def test_a_project_of_somebodys_own_is_refused_before_any_work_and_stays_as_it_is(method, overwrite, tmp_path):
    before = foreign(tmp_path / "run")
    config = parse_config(quick(tmp_path) | {"method": method, "data": {"source": str(tmp_path / "nowhere")}})
    with pytest.raises(FileExistsError, match=r"output='.*run': is not empty and holds no run"):
        train(config, overwrite=overwrite)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
def test_a_config_that_could_be_a_runs_makes_no_run_of_a_folder(overwrite, tmp_path):
    config = parse_config(quick(tmp_path))
    before = foreign(tmp_path / "run", config.to_yaml())
    with pytest.raises(FileExistsError, match=rf"output=.*\{MARKER}"):
        train(config, overwrite=overwrite)
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
def test_a_marker_that_was_left_in_an_emptied_folder_makes_no_run_of_what_is_put_there(overwrite, tmp_path):
    before = foreign(tmp_path / "run")
    (tmp_path / "run" / MARKER).touch()
    with pytest.raises((FileExistsError, UserError)):
        train(parse_config(quick(tmp_path)), overwrite=overwrite)
    assert contents(tmp_path / "run") == before | {MARKER: b""}


def test_a_run_from_before_the_marker_is_trained_again_once_it_is_marked(tmp_path):
    config = parse_config(quick(tmp_path))
    first = train(config)
    (tmp_path / "run" / MARKER).unlink()
    with pytest.raises(FileExistsError, match="holds no run"):
        train(config, overwrite=True)
    load_trained(str(tmp_path / "run"))  # which only reads
    (tmp_path / "run" / MARKER).touch()
    assert train(config, overwrite=True)["steps"] == first["steps"]


def test_a_finished_run_stays_until_another_can_train(tmp_path):
    values = quick(tmp_path)
    train(parse_config(values))
    before = contents(tmp_path / "run")
    for broken in ({"data": {"source": str(tmp_path / "photoz")}}, {"model": str(tmp_path / "nowhere")}):
        with pytest.raises(UserError):
            train(parse_config(values | broken), overwrite=True)
        assert contents(tmp_path / "run") == before


def test_a_run_that_is_replaced_is_kept_until_the_new_one_is_saved(tmp_path, monkeypatch, capsys):
    train(parse_config(quick(tmp_path)))
    before = contents(tmp_path / "run")
    other = parse_config(quick(tmp_path, learning_rate=1e-3))
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stop):
            train(other, overwrite=True)
    (aside,) = old(tmp_path / "run")
    assert contents(aside) == {**before, MARKER: b""}
    assert f"is in {aside} until" in capsys.readouterr().out
    train(other)
    assert not old(tmp_path / "run")
    assert YAML(typ="safe").load(tmp_path / "run" / "config.yaml")["training"]["learning_rate"] == 1e-3


def test_overwriting_leaves_folders_beside_the_runs_own_where_they_are(tmp_path):
    config = parse_config(quick(tmp_path))
    train(config)
    for name in ("model/net.py", "checkpoint-best/mine.bin", ".old-photos/1.jpg"):
        (tmp_path / "run" / name).parent.mkdir()
        (tmp_path / "run" / name).write_text("mine")
    train(config, overwrite=True)
    for name in ("model/net.py", "checkpoint-best/mine.bin", ".old-photos/1.jpg"):
        assert (tmp_path / "run" / name).read_text() == "mine"


def test_what_is_in_the_way_of_what_is_saved_is_kept_and_said(tmp_path, monkeypatch, capsys):
    config = parse_config(quick(tmp_path, num_train_epochs=2) | {"method": "head-only"})
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        with pytest.raises(Stop):
            train(config)
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "net.py").write_text("mine")
    train(config)
    (aside,) = old(tmp_path / "run")
    assert (aside / "model" / "net.py").read_text() == "mine"
    assert str(aside / "model") in capsys.readouterr().out
    assert not (tmp_path / "run" / "model" / "net.py").exists()


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
def test_an_adapter_that_is_a_link_is_put_aside_and_its_target_is_not_touched(overwrite, tmp_path, monkeypatch):
    config = parse_config(quick(tmp_path, num_train_epochs=2))
    if overwrite:
        train(config)
        (tmp_path / "run" / "adapter").rename(tmp_path / "elsewhere")
    else:
        with monkeypatch.context() as patch:
            stop_after(4, patch)
            with pytest.raises(Stop):
                train(config)
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "mine.txt").write_text("mine")
    before = contents(tmp_path / "elsewhere")
    (tmp_path / "run" / "adapter").symlink_to(tmp_path / "elsewhere")
    train(config, overwrite=overwrite)
    assert contents(tmp_path / "elsewhere") == before
    assert not (tmp_path / "run" / "adapter").is_symlink()
    load_trained(str(tmp_path / "run"))


def test_a_run_in_the_home_folder_is_in_one_place_and_resumes_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    values = quick(tmp_path, num_train_epochs=2) | {
        "output": "~/run",
        "model": "~/model",
        "data": {"source": "~/colors"},
    }
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        with pytest.raises(Stop):
            train(parse_config(values))
    assert train(parse_config(values))["resumed"]
    assert {"adapter", "checkpoint-6", "config.yaml", "metrics.json"} <= {p.name for p in (tmp_path / "run").iterdir()}
    assert not (tmp_path / "~").exists()


def test_a_start_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(UserError):
        train(parse_config(quick(tmp_path) | {"model": str(tmp_path / "nowhere")}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
def test_a_start_that_is_killed_at_any_write_or_move_can_be_repeated(overwrite, tmp_path, monkeypatch):
    config = parse_config(quick(tmp_path))
    output = Path(config.output)

    def start() -> None:
        check_output(output, config, overwrite)
        with locked(output):
            begin(output, config, overwrite, Console(quiet=True))

    def dies(number: int) -> bool:
        """Start, and be killed before that write or move; False where there are fewer."""
        steps = iter(range(number))

        def step(path: Path, *args: Any) -> None:
            writes = isinstance(args[0], str)
            if next(steps, None) is None:
                if writes:
                    (path.parent / f".{path.name}.123").touch()  # what a write that is killed leaves
                raise Stop
            (write_whole if writes else rename)(path, *args)

        rename = Path.rename
        with monkeypatch.context() as patch:
            patch.setattr("e3va_peft.training.folder.write_whole", step)
            patch.setattr(Path, "rename", step)
            try:
                start()
            except Stop:
                return True
            return False

    number = 0
    while dies(number):
        start()
        assert (output / MARKER).is_file() and parse_config(YAML().load(output / "config.yaml")).to_dict()
        if overwrite:
            for name in ("metrics.json", "curves.png", "checkpoint-3/a"):
                (output / name).parent.mkdir(exist_ok=True)
                (output / name).write_text("{}")
        else:
            shutil.rmtree(output)
        number += 1
    assert number >= 2


def test_a_config_is_not_written_over_by_the_run_that_was_read_from_it(tmp_path):
    values = quick(tmp_path, "own")
    (tmp_path / "own").mkdir()
    file = write(tmp_path / "own" / "config.yaml", values)
    file.write_text("# why these values\n" + file.read_text())
    before = file.read_bytes()
    for more in ([], ["--overwrite"]):
        done = CliRunner().invoke(app, ["train", str(file), *more])
        assert done.exit_code == 1 and "Choose another output, or move the file elsewhere" in done.output, done.output
        assert contents(tmp_path / "own") == {"config.yaml": before}


def test_a_runs_own_config_resumes_it_and_keeps_its_comments(tmp_path, monkeypatch):
    values = quick(tmp_path, num_train_epochs=2)
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        with pytest.raises(Stop):
            train(parse_config(values))
    file = tmp_path / "run" / "config.yaml"
    commented = "# why these values\n" + file.read_text()
    file.write_text(commented)
    changed = ["--set", "training.learning_rate=1e-4", "--overwrite"]
    for more in (changed, ["--overwrite"]):
        done = CliRunner().invoke(app, ["train", str(file), *more])
        assert done.exit_code == 1 and "yours would be lost" in done.output, done.output
    done = CliRunner().invoke(app, ["train", str(file)])
    assert done.exit_code == 0, done.output
    assert file.read_text() == commented
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["resumed"]


# --- one run at a time -----------------------------------------------------------------------------------------------


def held(folder: Path) -> FileLock:
    folder.mkdir()
    return FileLock(folder / LOCK)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_in_which_another_run_trains_is_refused_before_any_work(tmp_path, overwrite):
    config = parse_config(quick(tmp_path) | {"data": {"source": str(tmp_path / "nowhere")}})
    with held(tmp_path / "run"):
        before = contents(tmp_path / "run")
        with pytest.raises(FileExistsError, match="another run is training there"):
            train(config, overwrite=overwrite)
        assert contents(tmp_path / "run") == before


def test_a_lock_whose_process_was_killed_is_taken_over(tmp_path):
    script = f"import os, signal; from filelock import FileLock; FileLock({str(tmp_path / 'run' / LOCK)!r}).acquire()"
    (tmp_path / "run").mkdir()
    died = subprocess.run([sys.executable, "-c", f"{script}; os.kill(os.getpid(), signal.SIGKILL)"], check=False)
    assert died.returncode == -signal.SIGKILL and (tmp_path / "run" / LOCK).is_file()
    train(parse_config(quick(tmp_path)))
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_folder_that_takes_no_lock_is_refused(tmp_path, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(FileLock, "acquire", full)
        with pytest.raises(UserError, match="No space left"), locked(tmp_path / "run"):
            pass
    with locked(tmp_path / "run"):
        pass


def test_two_runs_of_one_process_do_not_share_a_folder(tmp_path):
    config = parse_config(quick(tmp_path))
    with locked(tmp_path / "run"), pytest.raises(FileExistsError, match="another run"):
        train(config)
    assert train(config)["steps"] == 3


def test_the_command_line_names_the_run_that_holds_a_folder(tmp_path):
    with held(tmp_path / "run"):
        done = CliRunner().invoke(app, ["train", str(write(tmp_path / "c.yaml", quick(tmp_path)))])
    assert done.exit_code == 1 and f"output={str(tmp_path / 'run')!r}: another run" in done.output
