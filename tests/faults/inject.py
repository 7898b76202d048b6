"""Inject faults into runs of `e3va train`, and count what survives them: `python -m tests.faults.inject --count 50`.

A run is killed, told to stop, starved of disk, met by another, refused by the Hub or given a clock that jumps, at a
random moment, or files that it has written are cut short or flipped; the same command is run again until it ends. It
has survived if the adapter then is that of a run that nothing happened to, to rounding, and if nobody saw a traceback.
Each run is a fork of this process, so that it starts at once.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pytest
import torch
from huggingface_hub import HfApi, upload_folder
from huggingface_hub.utils import _http
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from e3va_peft.errors import UserError
from e3va_peft.loading import load_adapter
from e3va_peft.training.config import RunConfig, parse_config
from e3va_peft.training.run import Interrupted, train
from tests.hub_server import HubServer, connect, hurry
from tests.inputs import classify

FAULTS = {
    "kill": "kill -9",
    "kill_again_and_again": "kill -9, three times in one run",
    "stop": "SIGTERM, or Ctrl-C",
    "stop_at_once": "Ctrl-C twice",
    "cache": "kill -9 while a cache is filled",
    "shard": "a file of a cache cut short, flipped in one bit, or removed",
    "disk": "no file can grow beyond a random size, as on a full disk",
    "tmpfs": "a full disk: output and cache in a tmpfs of a random size",
    "clock": "a clock that jumps by up to a day, forwards and back, at every look",
    "two_runs": "a second run in the same folder at a random moment",
    "hub_push": "a Hub that refuses (401, 404, 429, 500) or breaks off while an adapter is pushed",
    "hub_load": "a Hub that refuses, is silent or breaks off while an adapter is loaded",
    "checkpoint": "a file of a checkpoint cut short, flipped in one bit, or removed",
    "adapter": "a file of a finished adapter cut short, flipped in one bit, or removed",
}

ENDED, REFUSED, STOPPED, CRASHED = 0, 1, 2, 3  # how a run ended


def run(config: RunConfig, log: Path, disturb: Callable[[int], None] | None = None, limit: int | None = None) -> int:
    """Train in a fork; return how it ended, -9 where it was killed.

    Args:
        config: The run.
        log: Where its output goes.
        disturb: What to do to it meanwhile; takes its process id.
        limit: Bytes beyond which no file can grow, as on a full disk.
    """
    pid = os.fork()
    if pid == 0:
        with log.open("a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        os._exit(_train(config))
    if disturb is not None:
        disturb(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _train(config: RunConfig) -> int:
    try:
        train(config)
    except (UserError, FileExistsError) as error:
        print("refused:", error, flush=True)
        return REFUSED
    except (Interrupted, KeyboardInterrupt):
        return STOPPED
    except BaseException as error:
        print("crashed:", repr(error), flush=True)
        return CRASHED
    return ENDED


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def names_the_reason(said: str) -> bool:
    """Whether a run that was refused has said that there is no room."""
    return any(sign in said for sign in ("disk is full", "cannot be written", "Errno 27", "are free"))


class Faults:
    """The faults, each a method that returns what went wrong, or nothing.

    Args:
        root: An empty folder.
        seed: Of the random moments and places.
    """

    def __init__(self, root: Path, seed: int = 0) -> None:
        self.root, self.random = root, random.Random(seed)
        datasets.config.HF_DATASETS_CACHE = root / "cache"
        self.values = classify(root, "whole", num_train_epochs=6, save_total_limit=3, load_best_model_at_end=False)
        start = time.perf_counter()
        assert run(parse_config(self.values), root / "whole.log") == ENDED, (root / "whole.log").read_text()
        self.seconds = time.perf_counter() - start
        self.whole = weights_of(root / "whole")
        self.number = 0

    @cached_property
    def from_cache(self) -> dict[str, torch.Tensor]:
        """The adapter of a run from a cache that nothing happened to."""
        config = self.config(cache=self.root / "whole-cache")
        assert run(config, self.log(config)) == ENDED, self.log(config).read_text()
        return weights_of(Path(config.output))

    def config(self, folder: Path | None = None, cache: Path | None = None, **training: Any) -> RunConfig:
        """A run of its own that nobody has begun, in a folder, and from a cache where one is named."""
        self.number += 1
        values = self.values | {"output": str((folder or self.root) / f"run{self.number}")}
        if cache is not None:
            values["cache"] = {"storage": "exact", "views": 8, "folder": str(cache)}
        return parse_config(values | {"training": values["training"] | training})

    def begun(self) -> RunConfig:
        """A run that stopped behind a few checkpoints."""
        config = self.config()
        while not list(Path(config.output).glob("checkpoint-*/e3va_manifest.json")):
            self.interrupt(config, signal.SIGKILL)
        return config

    def interrupt(self, config: RunConfig, *signals: int) -> int:
        """Send signals to a run at a random moment, some milliseconds apart."""

        def disturb(pid: int) -> None:
            time.sleep(self.random.uniform(0, self.seconds))
            for number in signals:
                os.kill(pid, number)
                time.sleep(0.02)

        return run(config, self.log(config), disturb)

    def log(self, config: RunConfig) -> Path:
        return self.root / f"{Path(config.output).name}.log"

    def verdict(self, config: RunConfig, tries: int = 3) -> str:
        """Run the same command until it ends, and compare the adapter."""
        if not (Path(config.output) / "metrics.json").is_file():
            codes = [code for _ in range(tries) if (code := run(config, self.log(config))) != ENDED]
            if len(codes) == tries:
                return f"does not end: {self.log(config).read_text()[-500:]}"
        if "Traceback" in self.log(config).read_text() or "crashed" in self.log(config).read_text():
            return f"a traceback: {self.log(config).read_text()[-500:]}"
        found, whole = weights_of(Path(config.output)), self.whole if config.cache is None else self.from_cache
        if found.keys() != whole.keys():
            return "other weights"
        apart = max(float((found[name] - value).abs().max()) for name, value in whole.items())
        shutil.rmtree(config.output)
        return "" if apart < 1e-5 else f"weights differ by {apart:.1e}"

    def kill(self) -> str:
        config = self.config()
        self.interrupt(config, signal.SIGKILL)
        return self.verdict(config)

    def kill_again_and_again(self) -> str:
        config = self.config()
        for _ in range(3):
            if not (Path(config.output) / "metrics.json").is_file():
                self.interrupt(config, signal.SIGKILL)
        return self.verdict(config)

    def stop(self) -> str:
        config = self.config()
        self.interrupt(config, self.random.choice([signal.SIGTERM, signal.SIGINT]))
        return self.verdict(config)

    def stop_at_once(self) -> str:
        config = self.config()
        self.interrupt(config, signal.SIGINT, signal.SIGINT)
        self.log(config).write_text("")  # what Python says of a second Ctrl-C is its own
        return self.verdict(config)

    def disk(self) -> str:
        config = self.config()
        code = run(config, self.log(config), limit=self.random.randrange(1, 60_000))
        said = self.log(config).read_text()
        if code == REFUSED and not names_the_reason(said):
            return f"does not say why: {said[-300:]}"
        self.log(config).write_text("")
        return self.verdict(config)

    def cache(self) -> str:
        folder = self.root / "cache-of-a-run"
        config = self.config(cache=folder)
        bytes_of_all = (self.root / "whole-cache" / "train" / "data-0.bin").stat().st_size if self.from_cache else 0
        enough = self.random.randrange(bytes_of_all)

        def disturb(pid: int) -> None:
            data = folder / "train" / "data-0.bin"
            while not (data.is_file() and data.stat().st_size > enough):
                time.sleep(0.001)
            os.kill(pid, signal.SIGKILL)

        run(config, self.log(config), disturb)
        verdict = self.verdict(config)
        shutil.rmtree(folder)
        return verdict

    def shard(self) -> str:
        folder = Path(tempfile.mkdtemp(dir=self.root)) / "cache"
        assert self.from_cache
        shutil.copytree(self.root / "whole-cache", folder)
        hurt = self.random.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
        damage(hurt, self.random)
        config = self.config(cache=folder)
        code, said = run(config, self.log(config)), self.log(config).read_text()
        if code == REFUSED and str(folder) in said:
            shutil.rmtree(folder)
            self.log(config).write_text("")
        elif code != ENDED:
            return f"{hurt.name}: ends with {code}: {said[-300:]}"
        return self.verdict(config)

    def tmpfs(self) -> str:
        disk = self.root / "disk"
        disk.mkdir(exist_ok=True)
        assert self.from_cache
        size = self.random.randrange(1, 450) * 4096
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
        try:
            config = self.config(disk, disk / "cache")
            code = run(config, self.log(config))
            said = self.log(config).read_text()
            if code not in (ENDED, REFUSED) or (code == REFUSED and not names_the_reason(said)):
                return f"does not say why: {said[-300:]}"
            self.log(config).write_text("")
            subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
            return self.verdict(config)
        finally:
            subprocess.run(["umount", disk], check=True)

    def clock(self) -> str:
        config = self.config()
        now, modified = time.time, os.path.getmtime

        def jumps(path: Any) -> float:  # what the clock said when a file was written stays with the file
            return modified(path) + random.Random(str(path)).uniform(-86400, 86400)

        with (
            mock.patch.object(time, "time", lambda: now() + self.random.uniform(-86400, 86400)),
            mock.patch.object(os.path, "getmtime", jumps),
        ):
            code = (
                self.interrupt(config, signal.SIGKILL) if self.random.random() < 0.5 else run(config, self.log(config))
            )
            if code not in (ENDED, -signal.SIGKILL):
                return f"ends with {code}: {self.log(config).read_text()[-300:]}"
            return self.verdict(config)

    def two_runs(self) -> str:
        config = self.config()
        other, log = config, self.log(config).with_suffix(".second")
        if self.random.random() < 0.5:
            other = parse_config(config.to_dict() | {"image_size": 31})
        codes = []

        def disturb(pid: int) -> None:
            time.sleep(self.random.uniform(0, self.seconds))
            codes.append(run(other, log))

        codes.append(run(config, self.log(config), disturb))
        if sorted(codes) != [ENDED, REFUSED]:
            return f"end with {codes}: {log.read_text()[-300:]}"
        said = log.read_text() + self.log(config).read_text()
        if not any(sign in said for sign in ("is training there", "finished", "other settings")):
            return f"does not say why: {said[-300:]}"
        if other is not config and codes[0] == ENDED:  # it came first
            shutil.rmtree(config.output)
            return ""
        return self.verdict(config)

    def hub_push(self) -> str:
        names = ("create_repo", "check_write", "preupload", "lfs_batch", "put_object", "commit")
        name, fault = self.random.choice(names), self.random.choice([401, 404, 429, 500, "cut"])
        with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
            connect(hub, self.root / "home", patch)
            ail(hub, name, fault)
            config = self.config(push_to_hub=True, hub_model_id="me/run")
            code = run(config, self.log(config))
            said = self.log(config).read_text()
            if code != REFUSED or "hub_model_id='me/run'" not in said:
                return f"{name} {fault} ends with {code}: {said[-300:]}"
            if "me/run" in hub.repos and hub.repos["me/run"].files():
                return f"{name} {fault}: half an adapter is on the Hub"
            hub.well()
            if not (Path(config.output) / "metrics.json").is_file():
                code = run(config, self.log(config))
            else:
                upload_folder(repo_id="me/run", folder_path=Path(config.output) / "adapter")
            _http.close_session()
            local = Path(config.output) / "adapter"
            if hub.repos["me/run"].files() != {path.name: path.read_bytes() for path in local.iterdir()}:
                return f"{name} {fault}: the Hub has another adapter"
            return self.verdict(config)

    def hub_load(self) -> str:
        names = ("info", "tree", "resolve", "get_object")
        name, fault = self.random.choice(names), self.random.choice([401, 404, 429, 500, "cut", "silent"])
        if fault in ("cut", "silent"):  # the client waits for the others without a limit
            name = "get_object"
        with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
            home = Path(tempfile.mkdtemp(dir=self.root))
            connect(hub, home, patch)
            hurry(patch)
            upload_folder(repo_id=HfApi().create_repo("me/run").repo_id, folder_path=self.root / "whole" / "adapter")
            ail(hub, name, fault)
            try:
                load_adapter("me/run")
            except OSError as error:
                if not str(error).startswith("adapter='me/run': "):
                    return f"{name} {fault} says {error}"
            else:
                return f"{name} {fault}: loaded all the same"
            hub.well()
            found: Any = load_adapter("me/run")[0].state_dict()
            _http.close_session()
        whole: Any = load_adapter(self.root / "whole" / "adapter")[0].state_dict()
        own = {key: value for key, value in whole.items() if "original_module" not in key}  # new with each loading
        return "" if all(torch.equal(found[key], value) for key, value in own.items()) else "other weights"

    def checkpoint(self) -> str:
        config = self.begun()
        folders = sorted(Path(config.output).glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
        hurt = self.random.choice(sorted(path for folder in folders for path in folder.iterdir() if path.is_file()))
        damage(hurt, self.random)
        self.log(config).write_text("")
        verdict = self.verdict(config)
        said = self.log(config).read_text()
        unsaid = hurt.parent == folders[-1] and hurt.name not in said
        return verdict or (f"does not name {hurt.name}: {said[-300:]}" if unsaid else "")

    def adapter(self) -> str:
        folder = self.root / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.root / "whole" / "adapter", folder)
        name = self.random.choice(["adapter_model.safetensors", "adapter_config.json", "base_config.json"])
        damage(folder / name, self.random)
        try:
            model, _ = load_adapter(folder)
        except (ValueError, OSError, SafetensorError):
            return ""
        again: Any = {key: value for key, value in model.state_dict().items() if "e3va_highway" in key}
        first: Any = load_adapter(self.root / "whole" / "adapter")[0].state_dict()
        same = all(torch.equal(value, first[key]) for key, value in again.items())
        return "" if same and name != "adapter_model.safetensors" else f"{name}: loaded with other weights"


def ail(hub: HubServer, name: str, fault: int | str) -> None:
    """Let a Hub refuse requests of a kind with a status, break them off, or not answer them."""
    if fault == "cut":
        hub.cuts[name] = 1000
    elif fault == "silent":
        hub.silent.add(name)
    else:
        hub.statuses[name] = int(fault)


def damage(path: Path, chance: random.Random) -> None:
    """Cut a file short, flip one of its bits, or remove it."""
    data, kind = path.read_bytes(), chance.choice(["cut", "flip", "remove"])
    if kind == "remove" or not data:
        path.unlink()
    elif kind == "cut":
        path.write_bytes(data[: chance.randrange(len(data))])
    else:
        place = chance.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :])


def inject(root: Path, count: int, seed: int = 0, names: Iterable[str] = FAULTS) -> dict[str, list[str]]:
    """Inject each fault so many times; return what went wrong by the name of the fault."""
    faults, found = Faults(root, seed), {}
    for name in names:
        times = tqdm(range(count), name)
        found[name] = [wrong for _ in times if (wrong := getattr(faults, name)())]
    return found


def main() -> None:
    """Print a table of faults injected and survived; exit with 1 where one was not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="times each fault is injected")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=FAULTS, action="append")
    given = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    names = [name for name in given.only or FAULTS if name != "tmpfs" or os.geteuid() == 0]
    if len(names) < len(given.only or FAULTS):
        print("tmpfs: skipped, only root can mount one", file=sys.stderr)
    with tempfile.TemporaryDirectory() as root:
        found = inject(Path(root), given.count, given.seed, names)
    print("| fault | injected | survived |\n| --- | --- | --- |")
    for name, wrong in found.items():
        print(f"| {FAULTS[name]} | {given.count} | {given.count - len(wrong)} |")
    for name, wrong in found.items():
        for text in wrong:
            print(f"{name}: {text}", file=sys.stderr)
    sys.exit(any(found.values()))


if __name__ == "__main__":
    main()
