"""Inject faults into runs of `e3va train`, and count what survives them: `python -m tests.faults.inject --count 50`.

A run is killed, told to stop, or starved of disk at a random moment, or files that it has written are cut short or
flipped; the same command is run again until it ends. It has survived if the adapter then is that of a run that nothing
happened to, to rounding, and if nobody saw a traceback. Each run is a fork of this process, so that it starts at once.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from e3va_peft.errors import UserError
from e3va_peft.loading import load_adapter
from e3va_peft.training.config import RunConfig, parse_config
from e3va_peft.training.run import Interrupted, train
from tests.inputs import classify

FAULTS = {
    "kill": "kill -9",
    "kill_again_and_again": "kill -9, three times in one run",
    "stop": "SIGTERM, or Ctrl-C",
    "stop_at_once": "Ctrl-C twice",
    "disk": "no file can grow beyond a random size, as on a full disk",
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

    def config(self) -> RunConfig:
        """A run of its own that nobody has begun."""
        self.number += 1
        return parse_config(self.values | {"output": str(self.root / f"run{self.number}")})

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
        found = weights_of(Path(config.output))
        if found.keys() != self.whole.keys():
            return "other weights"
        apart = max(float((found[name] - value).abs().max()) for name, value in self.whole.items())
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
        if code == REFUSED and not any(sign in said for sign in ("disk is full", "cannot be written", "Errno 27")):
            return f"does not say why: {said[-300:]}"
        self.log(config).write_text("")
        return self.verdict(config)

    def checkpoint(self) -> str:
        config = self.begun()
        files = [path for path in Path(config.output).glob("checkpoint-*/*") if path.is_file()]
        damage(self.random.choice(sorted(files)), self.random)
        return self.verdict(config)

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
    faults = Faults(root, seed)
    return {name: [wrong for _ in range(count) if (wrong := getattr(faults, name)())] for name in names}


def main() -> None:
    """Print a table of faults injected and survived; exit with 1 where one was not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="times each fault is injected")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=FAULTS, action="append")
    given = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as root:
        found = inject(Path(root), given.count, given.seed, given.only or FAULTS)
    print("| fault | injected | survived |\n| --- | --- | --- |")
    for name, wrong in found.items():
        print(f"| {FAULTS[name]} | {given.count} | {given.count - len(wrong)} |")
    for name, wrong in found.items():
        for text in wrong:
            print(f"{name}: {text}", file=sys.stderr)
    sys.exit(any(found.values()))


if __name__ == "__main__":
    main()
