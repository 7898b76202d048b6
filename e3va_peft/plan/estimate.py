"""Needs of a training step, before anything is downloaded or allocated.

A step of each method runs on fake tensors: they have shapes, dtypes and storages with sizes, but no memory. The meter
is the one of `measure_step`, so a plan is what `measure_step` would report, without weights, images and minutes.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from e3va_peft.errors import UserError, one_of, reason
from e3va_peft.exits import layers_of
from e3va_peft.meter.step import Kind, count_peak, count_saved, take_step
from e3va_peft.methods import METHODS, adapt, settings
from e3va_peft.plan.blueprint import CLASSES, give_fake_memory, image_size_of, make_batch, model_builder
from e3va_peft.plan.boxes import bound
from e3va_peft.plan.gpus import GIB
from e3va_peft.plan.reading import CachedImage, Flops, cached_image
from e3va_peft.training.config import OBJECT_TASKS
from e3va_peft.training.tasks.base import extras_at

Rules = Literal["cuda", "cpu"]

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}

# What a card gives to things that are not tensors. The CUDA context with its kernels and the workspaces of cuBLAS and
# cuDNN take 0.3 to 0.7 GiB, by card and driver (forum reports); a desktop on the same card takes its own besides.
CONTEXT_BYTES = int(0.6 * GIB)
# The allocator rounds blocks up and cannot always reuse the gaps between them.
FRAGMENTATION = 0.05
# Images up to which the steps of a detector are run to find the largest batch.
RUN_UP_TO = 16


Prepare = Callable[[PreTrainedModel], nn.Module]


@dataclass(frozen=True)
class MethodPlan:
    """Needs of one method. Memory in bytes.

    Attributes:
        method: Name of the method.
        trains: The parts that it trains besides the head.
        trainable_parameters: Number of elements in parameters that are trained.
        peak_bytes: Peak of live tensor bytes over forward, backward and AdamW step, as `measure_step` counts it.
        peak_parameters: Part of the peak: parameters and buffers.
        peak_gradients: Part of the peak: gradients of parameters.
        peak_optimizer: Part of the peak: AdamW's two moments.
        peak_activations: Part of the peak: everything else.
        needed_bytes: The peak with what a card takes besides: see `CONTEXT_BYTES` and `FRAGMENTATION`.
        fits: Whether `needed_bytes` is within the memory that was asked about; None where none was.
        largest_batch: Largest batch that fits, 0 where not even one image does; None where no memory was given.
        step_flops: Floating-point operations of a step's matmuls and convolutions, those that run again in backward
            included: a lower bound of its time, as norms, activations and the reading of memory are not counted.
    """

    method: str
    trains: str
    trainable_parameters: int
    peak_bytes: int
    peak_parameters: int
    peak_gradients: int
    peak_optimizer: int
    peak_activations: int
    needed_bytes: int
    fits: bool | None
    largest_batch: int | None
    step_flops: int


@dataclass(frozen=True)
class Plan:
    """Needs of each method for a step of one model at one size.

    Attributes:
        model: Short name, folder or Hub id.
        task: Name of the task.
        image_size: Side of the square images in pixels, or the shorter side of a detector's.
        batch_size: Images per step.
        precision: fp32, fp16 or bf16.
        num_labels: Number of classes.
        memory: Bytes of the card; None where none was given.
        methods: One entry per method.
        live_blocks: Most blocks that can be live, with tap_storage="recompute", so that a step fits; None where no
            memory was given, or none fits.
        refused: Methods that cannot adapt this model, and what they say.
        cached: One of its images in a cache (`e3va_peft.cached`), for E3VA without live blocks; None of a detector.
    """

    model: str
    task: str
    image_size: int
    batch_size: int
    precision: str
    num_labels: int
    memory: int | None
    methods: list[MethodPlan]
    live_blocks: int | None = None
    refused: dict[str, str] = field(default_factory=dict)
    cached: CachedImage | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, ready for JSON."""
        return asdict(self)

    def times(self) -> dict[str, float]:
        """Return operations of a step of each method as a multiple of head only's; nothing where that is refused."""
        flops = {row.method: row.step_flops for row in self.methods}
        least = flops.get(METHODS["head-only"].title)
        return {} if not least else {method: own / least for method, own in flops.items()}


def plan(
    model: str, *, task: str = "image-classification", image_size: int | None = None, batch_size: int | None = None,
    precision: str = "fp32", num_labels: int | None = None, memory: int | None = None, autocast: Rules = "cuda",
    progress: Callable[[str], object] = lambda name: None, change: Callable[[Any], None] | None = None,
    head: str | None = None,
) -> Plan:  # fmt: skip
    """Predict the peak memory of a training step for every method, without allocating it or reading weights.

    The step is Trainer's: weights in fp32, forward under autocast for fp16 and bf16, fused AdamW, no gradients at the
    start. Attention is the kernel that PyTorch picks on a CPU: where it can, the fused one, which keeps queries, keys,
    values and output but no attention matrix; so do the flash and memory-efficient kernels of a card. Where a mask is
    trained (Swin's position bias, in full fine-tuning) it is the plain one, which keeps the matrix: a card may need
    less. Scratch space inside a kernel, cuDNN's for convolutions above all, is not seen.

    Args:
        model: Short name (swin-t, swin-b, vit-b, dinov2-s, ...), folder, or Hub id, of which only config.json is read.
        task: image-classification, semantic-segmentation, object-detection or instance-segmentation. A detector is
            estimated from above: see `plan.boxes`.
        image_size: Side of the square images in pixels; by default the model's own, 512 for segmentation. Of a
            detector's, which are 1.67 times as wide, the shorter one, by default 800.
        batch_size: Images per step; by default 8, of a detector 2.
        precision: fp32, fp16 or bf16.
        num_labels: Number of classes; by default ImageNet's 1000, ADE20K's 150 or COCO's 80.
        memory: Bytes of the card, for what fits and for the largest batch.
        autocast: Whose rules for mixed precision: those of CUDA, or of the CPU, to compare with a measurement there.
        progress: Called with the name of each method before its turn.
        change: Sets options of the model's config.
        head: Head that a backbone alone gets; None: the task's first.

    Raises:
        UserError: An argument cannot work; the message names it, its value and the remedy.
    """
    batch_size = (2 if task in OBJECT_TASKS else 8) if batch_size is None else batch_size
    _check(batch_size, image_size, num_labels, precision)
    num_labels = num_labels or CLASSES.get(task, 1)
    build = model_builder(model, task, num_labels, change, head)
    size = image_size

    def fake_step(title: str, method: Mapping[str, Any]) -> FakeStep:
        nonlocal size
        progress(title)
        with _explained(model, image_size):
            step = FakeStep(build, partial(adapt, method=method), task, size, PRECISIONS[precision], autocast)
        size = step.image_size
        return step

    with _explained(model, image_size):
        rows, refused = _rows(fake_step, batch_size, memory)
        live = None if memory is None else most_live_blocks(fake_step, batch_size, memory)
        if live is not None:
            place = sum(row.method.startswith("E3VA") for row in rows)
            rows.insert(place, _row(*_live(live[0]), live[1], batch_size, memory))
        # of a detector's images no two are of a size
        image = None if task in OBJECT_TASKS else cached_image(fake_step("a cached image", {"name": "e3va"}))
    assert size is not None  # every step says its size
    live_blocks = None if live is None else live[0]
    return Plan(model, task, size, batch_size, precision, num_labels, memory, rows, live_blocks, refused, image)


def _rows(
    fake_step: Callable[[str, Mapping[str, Any]], FakeStep], batch_size: int, memory: int | None
) -> tuple[list[MethodPlan], dict[str, str]]:
    """Plan every method; of those that cannot adapt the model, by title, what they say.

    Raises:
        UserError: The first of them cannot: nothing can be planned for this model.
    """
    rows: list[MethodPlan] = []
    refused: dict[str, str] = {}
    for title, method in settings().items():
        try:
            step = fake_step(title, method)
        except UserError as error:
            if not rows:
                raise
            refused[title] = str(error)
            continue
        rows.append(_row(title, method, step, batch_size, memory))
    return rows, refused


def most_live_blocks(
    fake_step: Callable[[str, Mapping[str, Any]], FakeStep], batch_size: int, memory: int
) -> tuple[int, FakeStep] | None:
    """Return the most live blocks with which a step fits, and that step; None where not even one can be live.

    More live blocks keep more: it is searched by halves.

    Args:
        fake_step: Makes the step of a method: its title, and what `adapt` takes.
        batch_size: Images per step.
        memory: Bytes of the card.
    """

    def fits(tried: FakeStep) -> bool:
        return needed_bytes(tried.trace(batch_size).peak) <= memory

    best, fewest, most = None, 1, None
    while most is None or fewest <= most:
        blocks = fewest if most is None else (fewest + most + 1) // 2
        tried = fake_step(*_live(blocks))
        if most is None:  # the first also says how many blocks there are
            most = sum(sum(layer.depth) for layer in layers_of(tried.model))
        if fits(tried):
            best, fewest = (blocks, tried), blocks + 1
        else:
            most = blocks - 1
    return best


def _live(blocks: int) -> tuple[str, dict[str, Any]]:
    """Title and method of E3VA with so many live blocks."""
    return f"E3VA, recompute, {blocks} live", {"name": "e3va", "tap_storage": "recompute", "live_blocks": blocks}


def _check(batch_size: int, image_size: int | None, num_labels: int | None, precision: str) -> None:
    for name, value in (("batch_size", batch_size), ("image_size", image_size), ("num_labels", num_labels)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: must be at least 1.")
    if precision not in PRECISIONS:
        raise UserError(f"precision={precision!r}: {one_of(precision, PRECISIONS)}")


@contextmanager
def _explained(model: str, size: int | None) -> Iterator[None]:
    """Say what a model refuses: images of a size that was asked for, or to run without real values at all."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, RuntimeError) as error:
        if size is None:
            raise UserError(
                f"model={model!r}: its training step cannot be predicted ({reason(error)}). Measure a real one with "
                "e3va_peft.meter.measure_step."
            ) from error
        raise UserError(
            f"image_size={size}: {model} does not take images of that size ({reason(error)}). Leave --image-size out "
            "for the model's own."
        ) from error


def _row(title: str, method: Mapping[str, Any], step: FakeStep, batch_size: int, memory: int | None) -> MethodPlan:
    trace = step.trace(batch_size)
    split, peak = trace.split, sum(trace.split.values())
    return MethodPlan(
        method=title,
        trains=METHODS[method["name"]].trains,
        trainable_parameters=step.trainable_parameters,
        peak_bytes=peak,
        **{f"peak_{kind}": size for kind, size in split.items()},
        needed_bytes=needed_bytes(peak),
        fits=None if memory is None else needed_bytes(peak) <= memory,
        largest_batch=None if memory is None else largest_batch(step.trace, batch_size, memory),
        step_flops=trace.flops,
    )


def needed_bytes(peak: int) -> int:
    """Return the memory that a card must have for a peak of live tensor bytes."""
    return CONTEXT_BYTES + math.ceil(peak * (1 + FRAGMENTATION))


@dataclass(frozen=True, eq=False)
class Trace:
    """Live bytes of one step.

    Attributes:
        split: Bytes of each kind at the peak.
        totals: Live bytes after each operation.
        flops: Floating-point operations of matmuls and convolutions.
    """

    split: dict[Kind, int]
    totals: np.ndarray
    flops: int

    @property
    def peak(self) -> int:
        """Peak of live bytes."""
        return int(self.totals.max())


class FakeStep:
    """A training step of one method that costs no memory, at any batch size.

    Args:
        build: Builds the model on the device of the context.
        prepare: Makes it trainable.
        task: Name of the task.
        image_size: Side of the square images in pixels, or the shorter side of a detector's; None for the model's own.
        dtype: Dtype of autocast, None for fp32.
        autocast: Whose rules for mixed precision.
    """

    def __init__(
        self,
        build: Callable[[], PreTrainedModel],
        prepare: Prepare,
        task: str,
        image_size: int | None,
        dtype: torch.dtype | None,
        autocast: Rules,
    ) -> None:
        with torch.device("meta"), _quietly():
            base = build()
            self.image_size = image_size or image_size_of(base, task)
            self.extras = extras_at(base, self.image_size)
            self.model = prepare(base)
        self.task = task
        self.dtype = dtype
        self.autocast = autocast
        self.mode = FakeTensorMode()
        with self.mode:
            give_fake_memory(self.model, "cpu").train()
            if task in OBJECT_TASKS:
                bound(self.model)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trace = cache(self._trace)

    @property
    def trainable_parameters(self) -> int:
        """Number of elements in parameters that are trained."""
        return sum(parameter.numel() for parameter in self.trained)

    def saved_bytes(self, batch_size: int) -> int:
        """Run a forward and return the bytes that autograd keeps for backward."""
        with self.faking():
            forward = partial(self._loss, make_batch(self.task, batch_size, self.image_size))
            return count_saved(forward, [*self.model.parameters(), *self.model.buffers()])

    def _trace(self, batch_size: int) -> Trace:
        """Run a step and return its peak and what that consists of."""
        with self.faking():
            optimizer = optimizer_in_use(self.model)
            batch = make_batch(self.task, batch_size, self.image_size)
            parameters = list(self.model.parameters())
            with Flops() as counter:
                meter = count_peak(
                    lambda: take_step(partial(self._loss, batch), optimizer, parameters, set()),
                    parameters,
                    [*parameters, *self.model.buffers()],
                    optimizer,
                    batch,
                )
        return Trace(meter.split(), np.array(meter.totals), counter.total)

    @contextmanager
    def faking(self) -> Iterator[None]:
        """Make tensors without memory, by the rules of the device that is planned for."""
        with self.mode, _quietly(), _by_the_rules_of_cuda() if self.autocast == "cuda" else nullcontext():
            yield

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            loss: Tensor = self.model(**batch, **self.extras).loss
            return loss


def optimizer_in_use(model: nn.Module) -> torch.optim.Optimizer:
    """Return an AdamW with its moments in place, as it is from the second step on.

    It is the fused one, Trainer's default: it has no temporaries.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep warnings and logs of other libraries out of it: nothing that is built here is ever used."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")  # logs the trace of what a model refuses
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def largest_batch(trace: Callable[[int], Trace], batch_size: int, memory: int) -> int:
    """Return the largest batch whose step fits, 0 where one image does not.

    With the batch the sizes of tensors grow on straight lines, and the operations stay the same ones. So two steps
    give the live bytes after each operation at any batch size, and their maximum is the peak there, exactly. A batch
    of one image may run other operations (batch norms), and is asked by itself; so is every batch where two steps
    differ, as with detectors, whose heads go through the images one by one: up to `RUN_UP_TO` images, beyond
    which the peak is taken to grow as it does up to there.

    Args:
        trace: Runs a step with a batch of this size.
        batch_size: Where to begin.
        memory: Bytes of the card.
    """
    one = max(2, batch_size)
    other = _guess(trace(one), one, memory)
    probe = RUN_UP_TO if one != RUN_UP_TO else RUN_UP_TO // 2
    if other > RUN_UP_TO and len(trace(one).totals) != len(trace(probe).totals):
        half, full = (needed_bytes(trace(batch).peak) for batch in (RUN_UP_TO // 2, RUN_UP_TO))
        if full <= memory:
            return RUN_UP_TO + (memory - full) * (RUN_UP_TO // 2) // (full - half)
        other = probe
    first, second = trace(one).totals, trace(other).totals

    def peak(batch: int) -> int:
        if batch == 1 or len(first) != len(second):
            return trace(batch).peak
        line = first + (second - first) * ((batch - one) / (other - one))
        return int(line.max())

    def fits(batch: int) -> bool:
        return needed_bytes(peak(batch)) <= memory

    if not fits(1):
        return 0
    fitting, failing = 1, 2
    while fits(failing):
        fitting, failing = failing, 2 * failing
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        fitting, failing = (middle, failing) if fits(middle) else (fitting, middle)
    return fitting


def _guess(at: Trace, batch_size: int, memory: int) -> int:
    """Return a batch size near the largest: a second point that leaves little to extrapolate."""
    room = memory - needed_bytes(at.peak - at.split["activations"])
    guess = int(room / (1 + FRAGMENTATION) / (at.split["activations"] / batch_size))
    guess = min(max(guess, 2), 4096)
    return guess if guess != batch_size else batch_size + 1


class _CudaAutocast(TorchFunctionMode):
    """Runs autocast on CPU tensors by the rules of CUDA, whose tensors cannot be faked where there is no card.

    Norms, softmax and the like run in fp32 on CUDA and in the input's dtype on the CPU; interpolation the other way
    round. Matmuls and convolutions are the same on both.

    Source: "Autocast Op Reference" in PyTorch's documentation of torch.amp.
    """

    FP32_ON_CUDA = frozenset(
        {
            F.layer_norm, torch.layer_norm, F.group_norm, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax,
            F.cross_entropy, F.binary_cross_entropy_with_logits, F.normalize, F.softplus,
            torch.exp, Tensor.exp, torch.log, Tensor.log, torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt,
            torch.sum, Tensor.sum, torch.cumsum, Tensor.cumsum, torch.norm, Tensor.norm,
        }
    )  # fmt: skip
    AS_IT_COMES_ON_CUDA = frozenset({F.interpolate, F.grid_sample})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        if func in self.AS_IT_COMES_ON_CUDA:
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        if func in self.FP32_ON_CUDA and kwargs.get("dtype") is None:
            args, kwargs = tree_map(_in_fp32, (args, kwargs))
        return func(*args, **kwargs)


@contextmanager
def _by_the_rules_of_cuda() -> Iterator[None]:
    """Let `_CudaAutocast` decide for the time of a `with` statement, and in backward, where autograd lifts all modes.

    Backward runs modules again, so the mode is entered by a hook on the outermost that is called.
    """
    entered: list[tuple[nn.Module, _CudaAutocast]] = []

    def enter(module: nn.Module, args: Any) -> None:
        if not entered:
            entered.append((module, _CudaAutocast()))
            entered[0][1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if entered and entered[0][0] is module:
            entered.pop()[1].__exit__(None, None, None)

    handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        with _CudaAutocast():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _in_fp32(leaf: Any) -> Any:
    low = isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
    return leaf.float() if low else leaf
