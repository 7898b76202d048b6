"""A cache, predicted: bytes of an image, and whether reading them beats running the backbone on this machine."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from e3va_peft.cache.layout import STORAGES
from e3va_peft.cache.taking import Beside, layout_of
from e3va_peft.files import cache_home
from e3va_peft.plan.blueprint import make_batch

if TYPE_CHECKING:
    from e3va_peft.plan.estimate import FakeStep

_TRIED = 64 * 2**20  # bytes that are written and read to see how fast the disk is
_SIDE = 2048  # of the matrices that are multiplied to see how fast the machine is


class Flops(TorchDispatchMode):
    """Counts the floating-point operations that PyTorch knows to count.

    `FlopCounterMode` notes by modules as well, with hooks that do not bear a backward that runs a graph of its own.
    """

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=found)
        return found


@dataclass(frozen=True)
class CachedImage:
    """One image in a cache.

    Attributes:
        bytes: Storage -> bytes of its record.
        flops: Floating-point operations of the backbone, which reading saves.
    """

    bytes: dict[str, int]
    flops: int

    def seconds(self) -> tuple[float, float]:
        """Seconds that the backbone and the reading of an int8 record take here, by a matmul and a file of now."""
        return self.flops / flops_a_second(), self.bytes["int8"] / bytes_a_second(cache_home())


def cached_image(step: FakeStep) -> CachedImage:
    """Predict the record of an image of a step's size, for a model whose blocks are not live."""
    with step.faking(), torch.no_grad():
        batch = {**make_batch(step.task, 2, step.image_size), **step.extras}
        backbone = Beside(step.model)
        with Flops() as counter:
            capture = backbone.capture(batch)
        read, _ = backbone.read(capture, batch)
        found = {storage: layout_of(backbone, capture, read, storage).bytes for storage in STORAGES}
    return CachedImage(found, counter.total // 2)


def flops_a_second() -> float:
    """Measure the fp32 floating-point operations a second of a large matmul here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left = torch.rand(_SIDE, _SIDE, device=device)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        (left @ left)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * _SIDE**3 / min(seconds)


def bytes_a_second(folder: Path) -> float:
    """Measure how fast a disk reads what is not in memory; where the system keeps it there all the same, that."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(os.urandom(_TRIED))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        file.read()
        return _TRIED / (time.perf_counter() - start)
