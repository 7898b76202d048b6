"""The paper's dense-prediction systems at the paper's sizes: memory and time of one training step by every method.

    python benchmarks/paper.py memory SETTING [--methods e3va,full] [--precision bf16]  # peaks, at the paper's size
    python benchmarks/paper.py time SETTING [--rounds 5]  # on a quiet machine
    python benchmarks/paper.py memory SETTING --tiny --size 200x120  # a smoke test: a Swin-T, and nothing in results/

Models are what `e3va train` builds for the recipes of these systems, with random weights. Bytes do not depend on them,
but for some kB: they decide which boxes an R-CNN looks at. Images and objects are drawn, the same for all methods.
fp32 weights, fused AdamW with its moments in place. Memory is that of one forward, which counts what is kept for
backward, and one whole step, which counts the peak of live tensor bytes. Time is the median over rounds that take one
step of every method in turn, after one round to warm up; all models are in memory then.

bf16 is mixed precision by the rules of the CPU. Below the meter its products are computed in fp32, see `WideProducts`:
the same tensors, and so the same bytes, in minutes instead of hours.

Full fine-tuning fills the gaps of glibc's heap besides: set MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ to 65536
where memory is short, as `plan.py` does.

Each measurement is written to `results/paper.json` when it is done, with the command that made it; what is there
already is not measured again without `--again`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, names, quiet, read_rows, replace_row, same
from speed import interleaved, step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torchvision.ops import box_convert
from transformers import PreTrainedModel

from e3va_peft.meter.parameters import backbone_share
from e3va_peft.meter.step import MIB, count_peak, count_saved, take_step
from e3va_peft.methods import adapt
from e3va_peft.plan.blueprint import model_builder
from e3va_peft.plan.estimate import PRECISIONS, optimizer_in_use
from e3va_peft.training.config import HEADS

aten = torch.ops.aten

METHODS: dict[str, dict[str, Any]] = {
    "e3va": {"name": "e3va"},
    "e3va-int8": {"name": "e3va", "tap_storage": "int8"},
    "e3va-recompute": {"name": "e3va", "tap_storage": "recompute"},
    "e3va-live": {"name": "e3va", "tap_storage": "recompute", "live_blocks": 2},
    **{name: {"name": name} for name in ("head-only", "lora", "lora-checkpointing", "full")},
}
WHAT = ("kind", "setting", "method", "precision", "width", "height")  # tells one measurement from another

Size = tuple[int, int]  # width and height, as the paper writes them


@dataclass(frozen=True)
class Setting:
    """A system of the paper and its batch.

    Attributes:
        title: How it is called in tables.
        backbone: Short name of its Swin.
        head: Of the names in `e3va train`.
        num_labels: Classes.
        size: Of the paper's images.
        batch: Images per step.
        objects: On each image; 0 for label maps.
    """

    title: str
    backbone: str
    head: str
    num_labels: int
    size: Size
    batch: int = 1
    objects: int = 0

    def build(self, backbone: str) -> PreTrainedModel:
        """Build the model on a backbone, as `e3va train` does."""
        task = next(task for task, heads in HEADS.items() if self.head in heads)
        return model_builder(backbone, task, self.num_labels, head=self.head)()

    def inputs(self, size: Size) -> dict[str, Any]:
        """Draw a batch, the same at every call."""
        torch.manual_seed(0)
        width, height = size
        pixel_values = torch.randn(self.batch, 3, height, width)
        if not self.objects:
            labels = torch.randint(0, self.num_labels, (self.batch, height, width))
            return {"pixel_values": pixel_values, "labels": labels}
        return {"pixel_values": pixel_values, "labels": [self._draw_objects(size) for _ in range(self.batch)]}

    def _draw_objects(self, size: Size) -> dict[str, Tensor]:
        width, height = size
        centres = 0.3 + 0.4 * torch.rand(self.objects, 2)
        boxes = torch.cat([centres, 0.1 + 0.4 * torch.rand(self.objects, 2)], 1)
        label = {"class_labels": torch.randint(0, self.num_labels, (self.objects,)), "boxes": boxes}
        if self.head != "retinanet":
            x1, y1, x2, y2 = box_convert(boxes, "cxcywh", "xyxy")[..., None, None].unbind(1)  # (objects, 1, 1) each
            x, y = torch.arange(width) / width, torch.arange(height)[:, None] / height
            label["masks"] = (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
        return label


SETTINGS = {
    "coco-cascade-swin-b": Setting(
        "COCO, Cascade Mask R-CNN, Swin-B", "swin-b", "cascade-mask-rcnn", 80, (1333, 800), objects=8
    ),
    "coco-cascade-swin-l": Setting(
        "COCO, Cascade Mask R-CNN, Swin-L", "swin-l", "cascade-mask-rcnn", 80, (1333, 800), objects=8
    ),
    "voc-retinanet-swin-l": Setting("VOC, RetinaNet, Swin-L", "swin-l", "retinanet", 20, (1000, 600), objects=5),
    "ade20k-upernet-swin-l": Setting(  # the paper does not say how many images a GPU gets
        "ADE20K, UperNet, Swin-L", "swin-l", "upernet", 150, (512, 512), batch=2
    ),
}


class WideProducts(TorchDispatchMode):
    """Compute matrix products and convolutions of bf16 tensors in fp32, and round what comes out to bf16.

    Many CPUs have no instructions for bf16 and take 10 to 30 times as long. A meter that is entered later sees the
    operation from bf16 to bf16 alone, as it sees no scratch space of a kernel.
    """

    PRODUCTS = frozenset(
        {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
        | {aten.convolution.default, aten.convolution_backward.default}
    )

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        halves = [leaf for leaf in tree_leaves((args, kwargs)) if is_half(leaf)]
        if func not in self.PRODUCTS or not halves:
            return func(*args, **kwargs)
        args, kwargs = tree_map(lambda leaf: leaf.float() if is_half(leaf) else leaf, (args, kwargs))
        return tree_map(lambda leaf: leaf.bfloat16() if isinstance(leaf, Tensor) else leaf, func(*args, **kwargs))


def is_half(leaf: object) -> bool:
    """Whether a leaf is a bf16 tensor."""
    return isinstance(leaf, Tensor) and leaf.dtype == torch.bfloat16


def prepare(setting: Setting, backbone: str, method: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build a model, make it trainable by a method, and give it its optimizer."""
    torch.manual_seed(0)
    model = adapt(setting.build(backbone), METHODS[method]).train()
    return model, optimizer_in_use(model)


def loss_of(model: nn.Module, batch: dict[str, Any], dtype: torch.dtype | None = None) -> Tensor:
    """Return the loss, with the proposals, crops and dropout that all methods see."""
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        return model(**batch).loss


def memory_row(setting: Setting, backbone: str, size: Size, method: str, precision: str) -> dict[str, Any]:
    """Measure the memory of a method's step."""
    batch = setting.inputs(size)
    model, optimizer = prepare(setting, backbone, method)
    forward = partial(loss_of, model, batch, PRECISIONS[precision])
    parameters = list(model.parameters())
    fixed = [*parameters, *model.buffers()]
    milliseconds: list[float] = []

    def whole_step() -> None:
        milliseconds.extend(take_step(forward, optimizer, parameters, set()))

    with WideProducts():
        saved_bytes = count_saved(forward, fixed)
        peak = count_peak(whole_step, parameters, fixed, optimizer, batch).split()
    row = {
        "saved_bytes": saved_bytes,
        "peak_bytes": sum(peak.values()),
        **{f"peak_{kind}": found for kind, found in peak.items()},
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "seconds_metered": sum(milliseconds) / 1000,  # one step, with the meter at work
    }
    if method == "e3va":
        share = backbone_share(model)
        row |= {"backbone_trained": share.trainable, "backbone_parameters": share.total}
    return row


def measure_memory(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure each method that is asked for and not recorded yet."""
    setting = SETTINGS[args.setting]
    for method in args.methods:
        about = describe(args, method)
        if not args.again and recorded(args.output, about):
            print(f"{args.setting}: {method}, {args.precision}: recorded before", flush=True)
            continue
        row = memory_row(setting, about["backbone"], args.size, method, args.precision)
        gc.collect()  # the meter keeps the collector out, and the next model needs the room
        print(
            f"{args.setting}: {method}, {args.precision}: {row['saved_bytes'] / MIB:.0f} MiB saved, "
            f"{row['peak_bytes'] / MIB:.0f} MiB peak, {row['seconds_metered']:.0f} s",
            flush=True,
        )
        yield about | row


def measure_time(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time all methods that are asked for, interleaved."""
    about = {method: describe(args, method) for method in args.methods}
    if not args.again and all(recorded(args.output, each) for each in about.values()):
        print(f"{args.setting}: recorded before", flush=True)
        return
    setting = SETTINGS[args.setting]
    batch = setting.inputs(args.size)
    models = {method: prepare(setting, about[method]["backbone"], method) for method in args.methods}
    tasks: dict[str, Callable[[], float]] = {
        method: partial(step, partial(loss_of, model, batch), optimizer)
        for method, (model, optimizer) in models.items()
    }
    for method, times in interleaved(tasks, args.rounds).items():
        print(f"{args.setting}: {method}: {statistics.median(times):.2f} s", flush=True)
        yield about[method] | {"seconds": statistics.median(times), "rounds": times}


def describe(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """Return the fields that say what a row is about."""
    setting = SETTINGS[args.setting]
    return {
        "kind": args.kind,
        "setting": args.setting,
        "title": setting.title,
        "method": method,
        "precision": args.precision,
        "backbone": "swin-t" if args.tiny else setting.backbone,
        "width": args.size[0],
        "height": args.size[1],
        "batch": setting.batch,
        "objects": setting.objects,
    }


def key(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that tell one measurement from another."""
    return {name: row[name] for name in WHAT}


def recorded(path: Path, about: Mapping[str, Any]) -> bool:
    """Whether a measurement is recorded."""
    return any(same(row, key(about)) for row in read_rows(path))


def pixels(text: str) -> Size:
    """Read WIDTHxHEIGHT."""
    width, height = map(int, text.split("x"))
    return width, height


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("memory", "time"))
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--methods", type=names(METHODS), default=list(METHODS), help="with commas; all by default")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--size", type=pixels, help="WIDTHxHEIGHT; the paper's by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--again", action="store_true", help="measure also what is recorded")
    parser.add_argument("--tiny", action="store_true", help="smoke test on a Swin-T, recorded in a temporary folder")
    args = parser.parse_args()
    if args.kind == "time" and args.precision != "fp32":
        parser.error("time: bf16 on a CPU says nothing about a GPU. Leave --precision out.")
    args.size = args.size or SETTINGS[args.setting].size
    args.output = (Path(tempfile.gettempdir()) / "e3va-tiny" if args.tiny else RESULTS) / "paper.json"
    return args


def main() -> None:
    """Measure and record."""
    args = read_arguments()
    quiet()
    warnings.filterwarnings("ignore", "None of the inputs have requires_grad")  # of a checkpoint within a checkpoint
    torch.set_num_threads(2)
    measure = measure_memory if args.kind == "memory" else measure_time
    for row in measure(args):
        replace_row(args.output, key(row), row)


if __name__ == "__main__":
    main()
