"""Examples: a split's images and labels, read one by one, and seen through a transform."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from e3va_peft.data.config import LabelKind
from e3va_peft.data.images import check_size, open_label_map, open_upright
from e3va_peft.data.records import Decoded, decode, from_json
from e3va_peft.errors import UserError


@dataclass(frozen=True)
class Split:
    """Images and their labels, read one by one.

    Attributes:
        name: Name of the split, for messages.
        rows: Columns `image` (`{"path", "bytes"}`, not decoded) and `label` (a class id, a label map like `image`, or
            a `Record` of objects as JSON).
        labels: Class names in the order of their ids.
        kind: Which of these `label` is.
        reduce_labels: Label maps count from 1, 0 is ignored.
        ignore_index: Value in label maps that does not count.
    """

    name: str
    rows: datasets.Dataset
    labels: tuple[str, ...]
    kind: LabelKind
    reduce_labels: bool = False
    ignore_index: int = 255

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        """Return the image, RGB, and its class id, label map `(H, W)` int64, or `Objects`.

        Raises:
            UserError: A file is broken, a label is out of range, or image and label differ in size.
        """
        image, label = self.read(index)
        return image, label.objects if isinstance(label, Decoded) else label

    def read(self, index: int) -> tuple[Image.Image, int | np.ndarray | Decoded]:
        """Read an example as `[]` does, but objects with what was done to their annotations.

        Raises:
            UserError: See `[]`.
        """
        row = self.rows[index]
        for name, value in row.items():
            if value is None or (isinstance(value, dict) and value.get("bytes") is None and value.get("path") is None):
                raise UserError(f"{self.name}, row {index}: has no {name}. Remove the row.")
        where = self._where(row["image"], index)
        image, raw = open_upright(row["image"], where)
        if self.kind == "class":
            return image, row["label"]
        if self.kind == "label-map":
            return image, self._label_map(row, where, self._where(row["label"], index), image, raw)
        record = from_json(row["label"])
        if record["size"] is not None:
            check_size(image, raw, where, tuple(record["size"]), record["where"], "annotation")
        return image, decode(record, image.size[::-1], self.kind == "instances")

    def _label_map(
        self, row: dict[str, Any], where: str, where_mask: str, image: Image.Image, raw: tuple[int, int] | None
    ) -> np.ndarray:
        mask = open_label_map(row["label"], where_mask)
        check_size(image, raw, where, mask.shape, where_mask, "label map")
        shift = 1 if self.reduce_labels else 0
        ignored = (mask == self.ignore_index) | ((mask == 0) & self.reduce_labels)
        wrong = np.unique(mask[~ignored & ((mask < shift) | (mask >= len(self.labels) + shift))])
        if len(wrong):
            raise UserError(
                f"{where_mask}: has the label {wrong[0]}, but data.labels has {len(self.labels)} names, for "
                f"the values {shift} to {len(self.labels) - 1 + shift}; data.ignore_index is {self.ignore_index}. Add "
                "the missing names, or set data.ignore_index, or data.reduce_labels if 0 means nothing."
            )
        mask -= shift
        mask[ignored] = self.ignore_index
        return mask

    def fingerprint(self) -> str:
        """SHA-256 of all that examples are read from: files by path, size and time of change, the rest as it is."""
        digest = hashlib.sha256(repr((self.labels, self.kind, self.reduce_labels, self.ignore_index)).encode())
        for row in self.rows:
            for item in row.values():
                path = item.get("path") if isinstance(item, dict) else None
                if path and os.path.exists(path):
                    found = os.stat(path)
                    item = (path, found.st_size, found.st_mtime_ns)
                elif isinstance(item, dict):
                    item = hashlib.sha256(item["bytes"] or b"").hexdigest()
                digest.update(repr(item).encode())
        return digest.hexdigest()

    def rows_fingerprint(self) -> str:
        """Number of images, and SHA-256 of what they are: files by name and size, images in a table by name; labels.

        Unlike `fingerprint` it is the same for a copy of the data, and reads no image.
        """
        digest = hashlib.sha256(repr((self.labels, self.kind, self.reduce_labels, self.ignore_index)).encode())
        flat = self.rows.flatten()
        columns = [name for name in flat.column_names if not name.endswith(".bytes")]
        for part in flat.select_columns(columns).iter(1000):
            for name in columns:
                named = name.endswith(".path")
                digest.update(repr([_name_and_size(item) if named else item for item in part[name]]).encode())
        return f"{len(self)} images ({digest.hexdigest()[:12]})"

    def where(self, index: int, column: str = "image") -> str:
        """Name an example in a message: by the path of its image, or label map, or by its row."""
        return self._where(self.rows[index][column], index)

    def _where(self, item: dict[str, Any], index: int) -> str:
        path = item.get("path")
        return path if path and os.path.exists(path) else f"{self.name}, row {index}{f' ({path})' if path else ''}"


def _name_and_size(path: str | None) -> tuple[str | None, int | None]:
    try:
        return (path, None) if path is None else (os.path.basename(path), os.stat(path).st_size)
    except (OSError, ValueError):  # a name in a table
        return path, None


class Examples(Dataset[dict[str, torch.Tensor]]):
    """A split seen through a transform.

    Args:
        split: Images and labels.
        transform: (image, label) -> tensors by name.
    """

    def __init__(self, split: Split, transform: Callable[[Image.Image, Any], dict[str, torch.Tensor]]) -> None:
        self.split = split
        self.transform = transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return the tensors of an example.

        Raises:
            UserError: See `Split`; or it cannot be transformed, as where a sliver is resized to no pixel.
        """
        image, label = self.split[index]
        try:
            return self.transform(image, label)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"{self.split.where(index)}: {image.width} x {image.height} pixels cannot be prepared ({error}). Crop "
                "or remove it."
            ) from error
