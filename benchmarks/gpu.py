"""Check the package on a CUDA card: the laws of the method, and memory and time of one training step of each method.

    python benchmarks/gpu.py  # all of it, sized for ten minutes on a fast card; no card has run it yet
    python benchmarks/gpu.py --settings swin-b --precisions bf16  # a part; the time it saves goes to torch.compile
    python benchmarks/gpu.py --quick --output FOLDER  # a rehearsal with tiny models, also without a card

Needs the extra `dev` and no network: weights are random. It does, in this order:

1. *laws*: `check_backbone` on the tiny models of the test suite.
2. *memory*: one training step of each method at the paper's sizes, alone on the card: what CUDA's allocator handed out
   and reserved at most, beside the peak that `e3va plan` predicts, of detectors from above.
3. *time* of such a step by CUDA events: median over rounds that take one step of every method and precision in turn,
   after a step to warm up; all models are on the card then.
4. *compiled*: the same model with `torch.compile` and without, in turn. No compilation begins once the time is over.

fp32 weights and fused AdamW with its moments in place; bf16 and fp16 by autocast, fp16 with a GradScaler. What runs
out of memory or fails is recorded as such, and the rest continues. The output folder gets `gpu.json`, written after
each measurement, and at the end `gpu.md`, the table that is printed. The exit status is 1 where a law is broken, or a
step that is not compiled fails for another reason than memory.

Without CUDA it rehearses on the CPU, whose peaks are those of the meter of `measure_step`, and records that
in a temporary folder.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: without network they would wait and try again
sys.path.insert(0, str(Path(__file__).parent.parent))  # for the models of the tests

import memory
import paper
import torch
from accelerate.utils import send_to_device
from readme_tables import markdown
from record import RESULTS, names, save
from speed import interleaved
from torch import nn
from transformers.utils import logging as transformers_logging

from e3va_peft import check_backbone
from e3va_peft.files import write_whole
from e3va_peft.meter.step import MIB, count_peak
from e3va_peft.methods import adapt
from e3va_peft.plan.estimate import PRECISIONS, FakeStep, optimizer_in_use
from e3va_peft.plan.gpus import GIB
from tests.models import BY_NAME, CASES, Case

Row = dict[str, Any]

METHODS: dict[str, dict[str, Any]] = {
    **paper.METHODS,
    "e3va-block-taps": {"name": "e3va", "taps": ("block",)},
    "e3va-int4": {"name": "e3va", "tap_storage": "int4"},
}
# From small to large: the task that `e3va plan` knows it by, and the tiny model that stands for it in a rehearsal.
SETTINGS = {
    "vit-b": ("image-classification", "vit-classifier"),
    "swin-b": ("image-classification", "swin-classifier"),
    "ade20k-upernet-swin-l": ("semantic-segmentation", "swin-upernet"),
    "voc-retinanet-swin-l": ("object-detection", "swin-retinanet"),
    "coco-cascade-swin-b": ("instance-segmentation", "swin-cascade"),
    "coco-cascade-swin-l": ("instance-segmentation", "swin-cascade"),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ORDER = ("bf16", "fp32", "fp16")  # bf16 is compiled first
REHEARSED = {"settings": ["vit-b", "ade20k-upernet-swin-l", "coco-cascade-swin-b"], "precisions": ["fp32", "fp16"]}
ROUNDS, ROUNDS_QUICK = 5, 1
LAST_COMPILATION, LAST_COMPILATION_QUICK = 480, 60  # seconds after the start
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Setting:
    """A model and its batch."""

    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    size: int
    batch: int


def find_setting(key: str, quick: bool) -> Setting:
    """The measurements under a name."""
    if quick:
        tiny = BY_NAME[SETTINGS[key][1]]
        return Setting(f"tiny {tiny.name}", tiny.build, tiny.training_batch, tiny.size[0], 2)
    if key in memory.SETTINGS:
        found = memory.SETTINGS[key]
        return Setting(found.title, found.build, found.inputs, found.size, found.batch)
    dense = paper.SETTINGS[key]
    title = f"{dense.title}, {dense.size[0]} x {dense.size[1]}, batch {dense.batch}"
    build, inputs = partial(dense.build, dense.backbone), partial(dense.inputs, dense.size)
    return Setting(title, build, inputs, dense.size[0], dense.batch)


class Training:
    """A model on the device, made trainable by a method, with optimizer and batch."""

    def __init__(self, setting: Setting, method: str, precision: str) -> None:
        torch.manual_seed(0)
        with DEVICE:
            base = setting.build()
        self.model = adapt(base.to(DEVICE), METHODS[method]).train()
        self.optimizer = optimizer_in_use(self.model)
        self.batch = send_to_device(setting.inputs(), DEVICE)
        self.dtype = PRECISIONS[precision]
        self.scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16")

    def step(self, model: Callable[..., Any] | None = None) -> None:
        """Take a step, with a compiled form of the model if there is one."""
        torch.manual_seed(0)  # the proposals, crops and dropout that all methods see
        with torch.autocast(DEVICE.type, self.dtype, enabled=self.dtype is not None):
            loss = (self.model if model is None else model)(**self.batch).loss
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def seconds(self, model: Callable[..., Any] | None = None) -> float:
        """Take a step and return its seconds."""
        if DEVICE.type == "cpu":
            start = time.perf_counter()
            self.step(model)
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.step(model)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def peaks(self, model: Callable[..., Any] | None = None) -> Row:
        """Take a step and return its peaks in bytes: those of CUDA's allocator, or of the meter on the CPU."""
        if DEVICE.type == "cpu":
            parameters = list(self.model.parameters())
            fixed = [*parameters, *self.model.buffers()]
            meter = count_peak(partial(self.step, model), parameters, fixed, self.optimizer, self.batch)
            return {"counted": sum(meter.split().values()), "allocated": None, "reserved": None}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.step(model)
        torch.cuda.synchronize()
        found = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        return {"counted": None, **found}


def attempt(measure: Callable[..., Row], *args: Any) -> Row:
    """Measure, or say what went wrong; then give back what nobody holds any more."""
    try:
        return measure(*args)
    except torch.OutOfMemoryError:
        return {"error": OUT_OF_MEMORY}
    except Exception as error:  # whatever a card does, the rest is measured
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        gc.collect()
        torch.cuda.empty_cache()  # nothing without CUDA


def try_laws(case: Case) -> Row:
    """Try the laws on a tiny model, without TF32: they compare results."""
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        laws = check_backbone(case.base().to(DEVICE), send_to_device(case.training_batch(), DEVICE)).laws
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    return {"tried": len(laws), "broken": [f"{law.name}: {law.detail}" for law in laws if not law.holds]}


@cache
def predict(setting: Setting, task: str, method: str, mixed: bool) -> Row:
    """Predict the peak in bytes as `e3va plan` does; bf16 and fp16 are of one size."""
    how = partial(adapt, method=METHODS[method])
    step = FakeStep(setting.build, how, task, setting.size, torch.bfloat16 if mixed else None, DEVICE.type)
    return {"predicted": step.trace(setting.batch).peak}


def measure_memory(setting: Setting, method: str, precision: str) -> Row:
    """Measure the peaks of a step that is alone on the device, in bytes, and what was allocated before."""
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else None
    training = Training(setting, method, precision)
    training.step()  # libraries choose kernels and take workspaces
    return {"before": before, **training.peaks()}


def measure_times(setting: Setting, rows: list[Row], rounds: int) -> Row:
    """Time the steps of all rows that ran, interleaved, and write the times into the rows."""
    tasks: dict[str, Callable[[], float]] = {}

    def warm_up(number: int, row: Row) -> Row:
        training = Training(setting, row["method"], row["precision"])
        training.step()
        tasks[str(number)] = training.seconds
        return {}

    for number, row in enumerate(rows):
        if "error" not in row and (failure := attempt(warm_up, number, row)):
            row["error"] = f"{failure['error']} beside the other models"
    for number, times in interleaved(tasks, rounds).items():
        rows[int(number)] |= {"seconds": statistics.median(times), "rounds": times}
    return {"timed": len(tasks)}


def measure_compiled(setting: Setting, method: str, precision: str, rounds: int) -> Row:
    """Time a compiled step beside the same one that is not, and measure its peaks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    training = Training(setting, method, precision)
    compiled = torch.compile(training.model)
    first = training.seconds(compiled)
    training.step(compiled)  # transformers notes the kind of labels in the first step, which compiles once more
    tasks = {"eager": training.seconds, "compiled": partial(training.seconds, compiled)}
    times = {name: statistics.median(found) for name, found in interleaved(tasks, rounds).items()}
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    found = {"first_step_seconds": first, "eager_seconds": times["eager"], "seconds": times["compiled"]}
    return {**found, "graph_breaks": breaks, **(training.peaks(compiled) if DEVICE.type == "cuda" else {})}


def about(quick: bool) -> Row:
    """Return the row that says what all others were measured on."""
    if DEVICE.type == "cpu":
        return {"kind": "device", "quick": quick, "device": "A rehearsal on a CPU, no result of a GPU"}
    card = torch.cuda.get_device_properties(DEVICE)
    name = f"{card.name}, {card.total_memory / GIB:.1f} GiB, compute capability {card.major}.{card.minor}"
    libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return {"kind": "device", "quick": quick, "device": f"{name}, {libraries}{', tiny models' if quick else ''}"}


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Measure what is asked for, and give the rows each time that there are more."""
    start = time.monotonic()
    rounds, last = (ROUNDS_QUICK, LAST_COMPILATION_QUICK) if args.quick else (ROUNDS, LAST_COMPILATION)
    rows = [about(args.quick)]
    yield rows
    for case in {case.family: case for case in reversed(CASES)}.values() if args.quick else CASES:
        rows.append({"kind": "laws", "model": case.name} | attempt(try_laws, case))
        yield rows
    settings = {key: find_setting(key, args.quick) for key in args.settings}
    for key, setting in settings.items():
        first = len(rows)
        for method, precision in product(args.methods, args.precisions):
            what = {"setting": key, "title": setting.title, "method": method, "precision": precision}
            predicted = attempt(predict, setting, SETTINGS[key][0], method, precision != "fp32")
            rows.append({"kind": "step", **what, **predicted, **attempt(measure_memory, setting, method, precision)})
            yield rows
        rows.append({"kind": "times", "setting": key} | attempt(measure_times, setting, rows[first:], rounds))
        yield rows
    for precision, key, method in product(args.precisions, settings, args.methods) if args.compile else ():
        what = {"kind": "compiled", "setting": key, "method": method, "precision": precision}
        late = {"skipped": f"not reached within {last} s"} if time.monotonic() - start > last else None
        rows.append(what | (late or attempt(measure_compiled, settings[key], method, precision, rounds)))
        yield rows


def failed(row: Row) -> bool:
    """Whether a law is broken, or something that is not compiled failed for another reason than memory."""
    error = row.get("error", "")
    return bool(row.get("broken")) or bool(error and OUT_OF_MEMORY not in error and row["kind"] != "compiled")


def table(rows: list[Row]) -> str:
    """Lay out what was found, in Markdown."""
    laws = [row for row in rows if row["kind"] == "laws"]
    which = ("model", "setting", "method", "precision")
    wrong = [
        f"- {' '.join(row[name] for name in which if name in row)}: {row.get('broken') or row['error']}"
        for row in filter(failed, rows)
    ]
    compiled = {step_of(row): row for row in rows if row["kind"] == "compiled"}
    steps = [row for row in rows if row["kind"] == "step"]
    names = ("predicted", "counted", "allocated", "reserved")
    body = [
        [row["title"], row["method"], row["precision"]]
        + [f"{row[name] / MIB:.1f}" if row.get(name) is not None else "" for name in names]
        + [ms(row), ms(compiled.get(step_of(row), {}))]
        for row in steps
    ]
    holding = sum(not failed(row) for row in laws)
    return "\n".join(
        [
            f"{rows[0]['device']}. The laws hold on {holding} of {len(laws)} tiny models.",
            *wrong,
            "",
            markdown(["one training step", "method", "precision", *names, "ms", "ms, compiled"], body),
            "",
            "Peaks in MiB: *predicted* by `e3va plan`, *counted* by the meter on the CPU, *allocated* and *reserved*",
            "by CUDA's allocator. Beside a compiled step: its share of the time of the eager step it took turns with.",
            "",
        ]
    )


def step_of(row: Row) -> tuple[str, ...]:
    """The fields that tell one step from another."""
    return row["setting"], row["method"], row["precision"]


def ms(row: Row) -> str:
    """Return the milliseconds of a step, or why there are none."""
    if "seconds" not in row:
        return row.get("error", "").replace("|", "/")
    share = f" ({row['seconds'] / row['eager_seconds']:.2f})" if "eager_seconds" in row else ""
    return f"{1000 * row['seconds']:.1f}{share}"


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = {"settings": SETTINGS, "methods": METHODS, "precisions": ORDER}
    for option, known in choices.items():
        text = f"separated by commas, of {', '.join(known)}; by default all, in this order, in a rehearsal some"
        parser.add_argument(f"--{option}", type=names(known), help=text)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help="a rehearsal with tiny models; the rule without CUDA")
    parser.add_argument("--output", type=Path, help="folder; benchmarks/results, a temporary one for a rehearsal")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.quick:
        print("No CUDA here: a rehearsal with tiny models on the CPU.", flush=True)
        args.quick = True
    for option, known in choices.items():
        default = REHEARSED.get(option, list(known)) if args.quick else list(known)
        setattr(args, option, getattr(args, option) or default)
    args.output = args.output or (Path(tempfile.gettempdir()) / "e3va-quick" if args.quick else RESULTS)
    if args.quick and args.output.resolve() == RESULTS.resolve():
        parser.error(
            f"--output {args.output}: holds results of real runs, and this is a rehearsal. Name another folder."
        )
    return args


def main() -> None:
    """Measure, record and print."""
    args = read_arguments()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    if args.quick:
        torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
    rows: list[Row] = []
    for rows in run(args):
        save("gpu", rows, folder=args.output)
        print(", ".join(f"{name} {found}" for name, found in rows[-1].items() if found is not None), flush=True)
    write_whole(args.output / "gpu.md", table(rows))
    print(f"\n{table(rows)}\nwritten to {args.output}: gpu.json, gpu.md")
    sys.exit(any(map(failed, rows)))


if __name__ == "__main__":
    main()
