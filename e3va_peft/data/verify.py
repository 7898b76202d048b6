"""Checks of a split before training: every example is decoded once, and what is odd is said or refused."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np
from PIL import Image

from e3va_peft.data.examples import Split
from e3va_peft.data.records import Decoded, refuse_broken
from e3va_peft.errors import UserError, shown

_THREADS = 8
_ENOUGH = 10  # boxes to judge their format by
_BOXES = {
    "xywh": "x, y of the upper left corner, width, height in pixels",
    "xyxy": "x, y of the upper left and of the lower right corner in pixels",
    "cxcywh": "x, y of the centre, width, height as shares of the image",
    "yolo": "x, y of the centre, width, height as shares of the image",
    "voc": "xmin, ymin, xmax, ymax in pixels that count from 1",
}
_few = partial(shown, most=1)

Checked: TypeAlias = list[tuple[Split, np.ndarray]]
"""Splits whose images were checked, and for each image 64 bits of its pixels' SHA-256, `(n,)` uint64."""


@dataclass
class _Seen:
    """An example, or those of a split added up.

    Attributes:
        counts: How often each class occurs, `(K,)` int64.
        errors: Messages of the broken ones.
        blank: Names of label maps that are ignored at every pixel.
        ignored: Pixels of label maps that are ignored.
        dropped: See `Decoded`, as `clipped` and `outside`.
        objects: Number of annotated objects, dropped ones included.
        largest: Largest coordinate of a box in pixels.
        box_format: How the boxes were read.
        images: 64 bits of the SHA-256 of each image's pixels.
    """

    counts: np.ndarray
    errors: list[str] = field(default_factory=list)
    blank: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    clipped: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    ignored: int = 0
    objects: int = 0
    largest: float = 0.0
    box_format: str = ""

    def add(self, other: _Seen) -> None:
        """Add an example."""
        self.counts += other.counts
        for name in ("errors", "blank", "dropped", "clipped", "outside", "images"):
            getattr(self, name).extend(getattr(other, name))
        self.ignored += other.ignored
        self.objects += other.objects
        self.largest = max(self.largest, other.largest)
        self.box_format = other.box_format or self.box_format


def verify_split(
    split: Split,
    report: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda text: None,
    checked: Checked | None = None,
) -> np.ndarray:
    """Decode every example once and count how often each class occurs, `(K,)` int64.

    Counted are images, pixels, or objects that are neither difficult nor a crowd. At most `_THREADS` examples are in
    memory at a time, whatever the number of processors: with label maps 24 bytes a pixel each, 1.1 GiB for eight
    of 2500 x 2500 pixels.

    Args:
        split: The examples.
        report: Called after each example.
        note: Called with each finding that stops nothing.
        checked: Splits that were checked before; an image that is in one of them, too, is a finding, whatever the
            names of the two files. This split is added.

    Raises:
        UserError: Some examples are broken; the message names the first ten. Or most boxes cannot be what they are
            read as, or label maps have one class alone beside what is ignored.
    """
    seen = _Seen(np.zeros(len(split.labels), dtype=np.int64))
    threads = min(_THREADS, usable_processors())
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[_Seen]] = deque()
        for index in range(len(split)):
            waiting.append(pool.submit(_look_at, split, index))
            if len(waiting) >= 4 * threads:  # some ahead of the oldest, not all
                seen.add(waiting.popleft().result())
                report()
        for future in waiting:
            seen.add(future.result())
            report()
    refuse_broken(seen.errors, len(split), "examples")
    _refuse_other_boxes(seen, split.name)
    _refuse_single_class(seen, split)
    images = np.array(seen.images, dtype=np.uint64)
    for text in (*_notes(seen, split.name), *_twins(split, images, checked or [])):
        note(text)
    if checked is not None:
        checked.append((split, images))
    return seen.counts


def usable_processors() -> int:
    """Count the processors that this process may use, which a container or a scheduler can limit."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _look_at(split: Split, index: int) -> _Seen:
    """Decode an example and keep nothing of it but counts and names."""
    try:
        image, found = split.read(index)
    except UserError as error:
        return _Seen(np.zeros(len(split.labels), dtype=np.int64), errors=[str(error)])
    seen = _Seen(_count(split, found), images=[_digest(image)])
    if isinstance(found, np.ndarray):
        seen.ignored = int(found.size - seen.counts.sum())
        if not seen.counts.any():
            seen.blank.append(split.where(index, "label"))
    if isinstance(found, Decoded):
        seen.dropped, seen.clipped, seen.outside = found.dropped, found.clipped, found.outside
        seen.objects = len(found.objects) + len(found.dropped)
        seen.largest = found.objects.boxes.max(initial=0)
        seen.box_format = found.box_format
    return seen


def _digest(image: Image.Image) -> int:
    """64 bits of the SHA-256 of an image's pixels, which copies share, whatever their names, formats and tags."""
    digest = hashlib.sha256(repr(image.size).encode())
    digest.update(image.tobytes())
    return int.from_bytes(digest.digest()[:8], "little")


def _count(split: Split, label: int | np.ndarray | Decoded) -> np.ndarray:
    if isinstance(label, int):
        ids = np.array([label])
    elif isinstance(label, Decoded):
        ids = label.objects.labels[~(label.objects.crowd | label.objects.difficult)]
    else:
        ids = label[label != split.ignore_index]
    return np.bincount(ids, minlength=len(split.labels))


def _refuse_other_boxes(seen: _Seen, name: str) -> None:
    """Raise a UserError if boxes look as if they had another format than they are read as."""
    if seen.objects < _ENOUGH:
        return
    if len(seen.outside) > seen.objects / 2:
        raise UserError(
            f"{len(seen.outside)} of the {seen.objects} boxes of {name} leave their image or have no area in it: "
            f"{_few(seen.outside)}. They are read as {_BOXES[seen.box_format]}. If they are something else, convert "
            "them, or for a table set data.box_format; if the images were resized, resize the boxes too; if objects "
            "do reach beyond their images, set data.verify: false."
        )
    if 0 < seen.largest <= 1 and seen.box_format not in ("cxcywh", "yolo"):
        raise UserError(
            f"the {seen.objects} boxes of {name} lie between 0 and 1. They are read as {_BOXES[seen.box_format]}. If "
            "they are shares of the image, convert them to pixels, or for a table set data.box_format: cxcywh."
        )


def _refuse_single_class(seen: _Seen, split: Split) -> None:
    """Raise a UserError if all pixels that count are of one class, as in masks of 0 and 255."""
    classes = [name for name, count in zip(split.labels, seen.counts, strict=True) if count]
    if seen.ignored and len(classes) == 1:
        raise UserError(
            f"the label maps of {split.name} hold {classes[0]!r} and, at {seen.ignored} pixels, "
            f"{split.ignore_index}, which data.ignore_index leaves out: a model would learn one class alone. If they "
            "are masks of 0 and 255, save class ids instead, 0 and 1; if this is meant, set data.verify: false."
        )


def _notes(seen: _Seen, name: str) -> Iterable[str]:
    if seen.blank:
        yield (
            f"{len(seen.blank)} label maps of {name} are ignored at every pixel and teach nothing: {_few(seen.blank)}"
        )
    if seen.dropped:
        yield (
            f"{len(seen.dropped)} objects of {name} have no area in their image and are left out: {_few(seen.dropped)}"
        )
    if seen.clipped:
        yield (
            f"{len(seen.clipped)} of the {seen.objects} boxes of {name} are clipped, for they leave their image by "
            f"more than a pixel: {_few(seen.clipped)}"
        )


def _twins(split: Split, images: np.ndarray, checked: Checked) -> Iterable[str]:
    for other, known in checked:
        both = np.isin(images, known)
        if both.any():
            index = int(np.argmax(both))
            twin = int(np.argmax(known == images[index]))
            yield (
                f"{both.sum()} of the {len(split)} images of {split.name} are images of {other.name}, too, and what "
                f"is trained on scores too well: {split.where(index)} is {other.where(twin)}. Remove them from one"
            )


def missing_classes(counts: np.ndarray, labels: Iterable[str]) -> list[str]:
    """List the classes that occur nowhere."""
    return [name for name, count in zip(labels, counts, strict=True) if count == 0]
