"""Images with classes or label maps, from wherever they are, each error naming its file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from e3va_peft.training.config import DataConfig, UserError, read_text, reason

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_TRAIN = ("train", "training")
_EVAL = ("validation", "val", "valid", "test", "testing")
_CLASS_COLUMNS = ("label", "labels", "fine_label", "class", "target")
_MASK_COLUMNS = ("label", "labels", "annotation", "mask", "masks", "semantic_mask", "segmentation_mask")
_SHOWN = 10  # broken files to name at once
_PART = 10_000  # rows whose labels are read at once


@dataclass(frozen=True)
class Split:
    """Images and their labels, read one by one.

    Attributes:
        name: Name of the split, for messages.
        rows: Columns `image` (`{"path", "bytes"}`, not decoded) and `label` (a class id, or a label map like `image`).
        labels: Class names in the order of their ids.
        reduce_labels: Label maps count from 1, 0 is ignored.
        ignore_index: Value in label maps that does not count.
    """

    name: str
    rows: datasets.Dataset
    labels: tuple[str, ...]
    reduce_labels: bool = False
    ignore_index: int = 255

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        """Return the image, RGB, and its class id or label map `(H, W)` int64.

        Raises:
            UserError: A file is broken, a label is out of range, or image and label map differ in size.
        """
        row = self.rows[index]
        for name, value in row.items():
            if value is None or (isinstance(value, dict) and value.get("bytes") is None and value.get("path") is None):
                raise UserError(f"{self.name}, row {index}: has no {name}. Remove the row.")
        where = self._where(row["image"], index)
        image = open_image(row["image"], where)
        if not isinstance(row["label"], dict):
            return image, row["label"]
        where_mask = self._where(row["label"], index)
        return image, self._label_map(row, where, where_mask, image)

    def _label_map(self, row: dict[str, Any], where: str, where_mask: str, image: Image.Image) -> np.ndarray:
        mask = open_label_map(row["label"], where_mask)
        if mask.shape != image.size[::-1]:
            with _open(row["image"], where) as file:
                raw = file.size[::-1]
            why = "Export the label map in the size of its image."
            if mask.shape == raw:
                why = "The image is rotated by its EXIF tag, the label map is not: rotate the pixels, drop the tag."
            raise UserError(
                f"{where_mask}: is {mask.shape[1]} x {mask.shape[0]} pixels, its image {where} "
                f"{image.width} x {image.height}. {why}"
            )
        shift = 1 if self.reduce_labels else 0
        ignored = (mask == self.ignore_index) | ((mask == 0) & self.reduce_labels)
        ids = mask - shift
        wrong = np.unique(mask[~ignored & ((ids < 0) | (ids >= len(self.labels)))])
        if len(wrong):
            raise UserError(
                f"{where_mask}: has the label {wrong[0]}, but data.labels has {len(self.labels)} names, for "
                f"the values {shift} to {len(self.labels) - 1 + shift}; data.ignore_index is {self.ignore_index}. Add "
                "the missing names, or set data.ignore_index, or data.reduce_labels if 0 means nothing."
            )
        return np.where(ignored, self.ignore_index, ids)

    def _where(self, item: dict[str, Any], index: int) -> str:
        path = item.get("path")
        return path if path and os.path.exists(path) else f"{self.name}, row {index}{f' ({path})' if path else ''}"

    def verify(self, report: Callable[[], None] = lambda: None) -> np.ndarray:
        """Decode every example once; return how often each class occurs, in images or pixels, `(K,)` int64.

        Args:
            report: Called after each example.

        Raises:
            UserError: Some examples are broken; the message names the first ten.
        """
        counts = np.zeros(len(self.labels), dtype=np.int64)
        errors: list[str] = []

        def check(index: int) -> np.ndarray | UserError:
            try:
                label = np.atleast_1d(self[index][1])
            except UserError as error:
                return error
            counted = label[label != self.ignore_index] if label.ndim == 2 else label  # 255 is a class of ImageNet
            return np.bincount(counted, minlength=len(self.labels))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for found in pool.map(check, range(len(self))):
                report()
                if isinstance(found, UserError):
                    errors.append(str(found))
                else:
                    counts += found
        if errors:
            more = f"\n... and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
            raise UserError(f"{len(errors)} of {len(self)} examples:\n" + "\n".join(errors[:_SHOWN]) + more)
        return counts


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
        return self.transform(*self.split[index])


def load_splits(config: DataConfig, with_masks: bool, seed: int = 0) -> tuple[Split, Split | None]:
    """Find the images and labels that a config names: to train on, and to evaluate on where there are some.

    Args:
        config: The `data` section of a run.
        with_masks: Labels are label maps, not classes.
        seed: Of `train_samples`.

    Raises:
        UserError: Nothing is there, a split is empty, or a label is not among the class names.
    """
    found = _folder_pair(config) if config.images is not None else _dataset(config)
    train_name = _choose("train_split", config.train_split, _TRAIN, found)
    if train_name is None:
        raise UserError(
            f"data.train_split: {_source(config)} has no split named {' or '.join(_TRAIN)}, only {sorted(found)}. "
            "Set it."
        )
    eval_name = None if config.eval_fraction else _choose("eval_split", config.eval_split, _EVAL, found)
    if eval_name == train_name:
        raise UserError(
            f"data.eval_split={eval_name!r}: is what is trained on. Choose another, or data.eval_fraction."
        )
    chosen = {train_name: found[train_name]} | ({eval_name: found[eval_name]} if eval_name is not None else {})
    for name, rows in chosen.items():
        if not len(rows):
            raise UserError(f"{_source(config)}: split {name!r} is empty. Put images there or choose another split.")
    rows = {name: _columns(config, name, rows, with_masks) for name, rows in chosen.items()}
    labels = _labels(config, rows[train_name], with_masks)
    if with_masks and config.reduce_labels and config.ignore_index < len(labels):
        raise UserError(
            f"data.ignore_index={config.ignore_index}: is one of the {len(labels)} classes, once data.reduce_labels "
            "has subtracted one from the label maps. Set it higher, e.g. 255 or 65535."
        )
    if not with_masks:
        rows = {name: _class_ids(config, name, part, labels) for name, part in rows.items()}
    if config.eval_fraction is not None:
        eval_name = f"{train_name} (set aside)"
        try:
            parts = rows[train_name].train_test_split(config.eval_fraction, seed=0)
        except ValueError:
            raise UserError(
                f"data.eval_fraction={config.eval_fraction}: leaves nothing to train on of {len(rows[train_name])} "
                "examples. Lower it, or use data.eval_split."
            ) from None
        rows = {train_name: parts["train"], eval_name: parts["test"]}
    options: dict[str, Any] = {"reduce_labels": config.reduce_labels, "ignore_index": config.ignore_index}
    limits = {train_name: config.train_samples, eval_name: config.eval_samples}
    splits = {
        name: Split(f"{_source(config)}, {name}", _sample(part, limits[name], seed), tuple(labels), **options)
        for name, part in rows.items()
    }
    return splits[train_name], splits.get(eval_name or "")


def missing_classes(counts: np.ndarray, labels: Iterable[str]) -> list[str]:
    """Return the names of the classes that occur nowhere."""
    return [name for name, count in zip(labels, counts, strict=True) if count == 0]


def open_image(item: dict[str, Any], where: str) -> Image.Image:
    """Open an image as 8-bit RGB, turned as its EXIF tag says.

    16-bit greyscale is scaled from 0..65535 to 0..255, where PIL's own conversion would clip it to white.

    Args:
        item: `{"path": ...}` or `{"bytes": ...}`.
        where: What to call it in an error.

    Raises:
        UserError: It cannot be read as an image.
    """
    image = _decoded(item, where)
    with contextlib.suppress(Exception):  # a broken EXIF block says nothing about the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(
                f"{where}: has values from {values.min()} to {values.max()}, no 8 or 16 bits. Convert it to one."
            )
        image = Image.fromarray((values // 257).astype(np.uint8))
    if image.mode == "F":
        raise UserError(f"{where}: has floating-point values, whose range is unknown. Convert it to 8 or 16 bits.")
    return image.convert("RGB")


def open_label_map(item: dict[str, Any], where: str) -> np.ndarray:
    """Open a label map: one class id per pixel, `(H, W)` int64, from an 8-bit, 16-bit or palette image.

    Of a palette image the indices are the classes, as in Pascal VOC, not the colours.

    Raises:
        UserError: It cannot be read, or has colours.
    """
    image = _decoded(item, where)
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        raise UserError(
            f"{where}: is a {image.mode} image; a label map has one number per pixel. Save class ids as an 8-bit "
            "greyscale or palette PNG, not colours."
        )
    return np.asarray(image).astype(np.int64)


def _open(item: dict[str, Any], where: str) -> Image.Image:
    data = item.get("bytes")
    try:
        return Image.open(BytesIO(data) if data is not None else item["path"])
    except FileNotFoundError:
        raise UserError(f"{where}: is not there any more. Restore it, or remove its row or label map.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: cannot be read as an image ({error}). Replace it, or remove it.") from None


def _decoded(item: dict[str, Any], where: str) -> Image.Image:
    image = _open(item, where)
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        image.close()
        raise UserError(f"{where}: is cut short or corrupt ({error}). Replace it, or remove it.") from None
    return image


def _source(config: DataConfig) -> str:
    return str(config.source if config.images is None else config.images)


def _choose(field: str, wanted: str | None, usual: tuple[str, ...], found: dict[str, Any]) -> str | None:
    if wanted is not None and wanted not in found:
        raise UserError(f"data.{field}={wanted!r}: there is no such split, only {sorted(found)}.")
    return wanted or next((name for name in usual if name in found), None)


def _dataset(config: DataConfig) -> dict[str, datasets.Dataset]:
    """Load a Hub dataset, an image folder, parquet files or what `save_to_disk` wrote."""
    source = str(config.source)
    path = Path(source).expanduser()
    try:
        if path.is_file() and path.suffix == ".parquet":
            return dict(datasets.load_dataset("parquet", data_files=str(path)))
        if (path / "dataset_dict.json").is_file():
            return dict(datasets.load_from_disk(str(path)))
        if (path / "state.json").is_file():
            return {"train": datasets.load_from_disk(str(path))}
        if not path.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
            raise UserError(f"data.source={source!r}: no such file or folder (from {Path.cwd()}).")
        place = str(path) if path.exists() else source
        return dict(datasets.load_dataset(place, config.name, revision=config.revision))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"data.source={source!r}: cannot be loaded as a Hub dataset, image folder or parquet ({reason(error)}). "
            "An image folder is SPLIT/CLASS/image.jpg or CLASS/image.jpg; a Hub id needs the network and, if private, "
            "`hf auth login`."
        ) from None


def _folder_pair(config: DataConfig) -> dict[str, datasets.Dataset]:
    """Pair the images and label maps of two folders with equal sub-folders and file names (ADE20K layout)."""
    images, masks = Path(str(config.images)).expanduser(), Path(str(config.masks)).expanduser()
    for name, folder in (("images", images), ("masks", masks)):
        if not folder.is_dir():
            raise UserError(f"data.{name}={str(folder)!r}: no such folder (from {Path.cwd()}).")
    splits = [part.name for part in sorted(images.iterdir()) if part.is_dir()]
    needed = (*_TRAIN, *_EVAL[:3], config.train_split, config.eval_split)  # others, as test, often have no label maps
    if not splits:
        return {"train": _pairs(images, masks)}
    return {name: _pairs(images / name, masks / name) for name in splits if name in needed or (masks / name).is_dir()}


def _pairs(images: Path, masks: Path) -> datasets.Dataset:
    pictures, maps = _by_name(images), _by_name(masks)
    for what, there, here, other in (("label map", pictures, maps, masks), ("image", maps, pictures, images)):
        lonely = sorted(set(there) - set(here))
        if lonely:
            shown = ", ".join(str(there[name]) for name in lonely[:3]) + (", ..." if len(lonely) > 3 else "")
            raise UserError(
                f"{len(lonely)} of {len(there)} files have no {what} of the same name in {other}: {shown}. Add or "
                "remove them."
            )
    names = sorted(pictures)
    columns = {"image": [str(pictures[name]) for name in names], "label": [str(maps[name]) for name in names]}
    features = datasets.Features({key: datasets.Image(decode=False) for key in columns})
    return datasets.Dataset.from_dict(columns, features=features)


def _by_name(folder: Path) -> dict[Path, Path]:
    """Find images by their path below a folder, without suffix."""
    found: dict[Path, Path] = {}
    for path in sorted(_pictures(folder)):
        name = path.relative_to(folder).with_suffix("")
        if name in found:
            raise UserError(
                f"{path}: has the name of {found[name].name}, and images find their label maps by name. Rename or "
                "remove one."
            )
        found[name] = path
    return found


def _pictures(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _columns(config: DataConfig, split: str, rows: datasets.Dataset, with_masks: bool) -> datasets.Dataset:
    """Keep two columns, `image` and `label`, with images not decoded."""
    pictures = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    usual = _MASK_COLUMNS if with_masks else _CLASS_COLUMNS
    candidates = [name for name in pictures if name not in (*usual, config.label_column)] or pictures
    image = _column("image_column", config.image_column, candidates, rows, split)
    if with_masks:
        others = [name for name in pictures if name != image]
        label = _column("label_column", config.label_column, [n for n in usual if n in others] or others, rows, split)
    else:
        present = [name for name in usual if name in rows.features]
        classes = [name for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
        label = _column("label_column", config.label_column, present[:1] or classes, rows, split)
    for name in (image, label) if with_masks else (image,):
        if not isinstance(rows.features[name], datasets.Image):
            raise UserError(f"column {name!r} of split {split!r}: holds {rows.features[name]}, no images.")
        rows = rows.cast_column(name, datasets.Image(decode=False))
    rows = rows.select_columns([image, label])
    return rows.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})


def _column(field: str, wanted: str | None, found: list[str], rows: datasets.Dataset, split: str) -> str:
    columns = list(rows.features)
    if wanted is not None:
        if wanted not in columns:
            raise UserError(f"data.{field}={wanted!r}: split {split!r} has no such column, only {columns}.")
        return wanted
    if len(found) != 1:
        what = "none fits" if not found else f"{found} all fit"
        hint = " An image folder needs one sub-folder per class." if field == "label_column" and not found else ""
        raise UserError(f"data.{field}: of the columns {columns} of split {split!r} {what}. Name one.{hint}")
    return found[0]


def _labels(config: DataConfig, rows: datasets.Dataset, with_masks: bool) -> list[str]:
    """Return the class names: the config's, or the dataset's."""
    kind = rows.features["label"]
    known = list(kind.names) if isinstance(kind, datasets.ClassLabel) else None
    given = config.labels
    if given is not None:
        labels = _given_labels(given)
        if known is not None and len(labels) != len(known):
            raise UserError(f"data.labels: has {len(labels)} names, the dataset {len(known)} classes: {known}.")
    elif known is not None:
        labels = known
    elif with_masks:
        values = sorted({int(v) for i in range(min(20, len(rows))) for v in _values(rows[i]["label"])})
        raise UserError(
            "data.labels: is missing. Label maps do not know the names of their classes; the first 20 of "
            f"{_source(config)} hold the values {values}. Write labels: [first, second, ...], or a text file of "
            "names, or their number; with reduce_labels: true if 0 means nothing."
        )
    else:
        plain = isinstance(kind, datasets.Value)  # no list of several labels
        seen = {value for part in _parts(rows) for value in part if value is not None} if plain else set()
        if plain and all(isinstance(value, str) for value in seen):
            labels = sorted(seen)
        elif plain and all(isinstance(value, int) for value in seen):
            labels = [str(i) for i in range(max(seen) + 1)]
        else:
            raise UserError(f"data.label_column: holds {kind}, no class ids or names. Name another, or clean it.")
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise UserError(f"data.labels={labels!r}: must be two or more names, all different.")
    return labels


def _values(item: dict[str, Any]) -> np.ndarray:
    return np.unique(open_label_map(item, item.get("path") or "a label map"))


def _given_labels(given: list[str] | str | int) -> list[str]:
    if isinstance(given, int):
        return [str(i) for i in range(given)]
    if isinstance(given, list):
        return [str(name) for name in given]
    path = Path(given).expanduser()
    if not path.is_file():
        raise UserError(
            f"data.labels={given!r}: no such file. Write the names as a list, or a file of one name a line."
        )
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    header = lines[0].split("\t") if lines else []
    if "Name" in header:  # ADE20K's objectInfo150.txt
        return [line.split("\t")[header.index("Name")].strip() for line in lines[1:]]
    return lines


def _parts(rows: datasets.Dataset) -> Iterator[list[Any]]:
    for start in range(0, len(rows), _PART):
        yield rows.select_columns(["label"])[start : start + _PART]["label"]


def _class_ids(config: DataConfig, split: str, rows: datasets.Dataset, labels: list[str]) -> datasets.Dataset:
    """Turn the label column into class ids and check each of them."""
    ids: list[int] = []
    names = {name: i for i, name in enumerate(labels)}
    kind = rows.features["label"]
    own = kind.names if isinstance(kind, datasets.ClassLabel) and config.labels is None else None
    for part in _parts(rows):
        for value in part:
            if isinstance(value, int) and own is not None and 0 <= value < len(own):
                value = own[value]  # by name: a split may number its classes in another way
            number = names.get(value, -1) if isinstance(value, str) else value
            if not isinstance(number, int) or not 0 <= number < len(labels):
                raise UserError(
                    f"{_source(config)}, split {split!r}, row {len(ids)}: has the label {value!r}, not one of the "
                    f"{len(labels)} classes {labels[:20]}. Add it to data.labels, or remove the row; -1 means that "
                    "the split has no labels."
                )
            ids.append(int(number))
    return rows.remove_columns("label").add_column("label", ids)  # a cast would write a copy of all images


def _sample(rows: datasets.Dataset, limit: int | None, seed: int) -> datasets.Dataset:
    if limit is None or limit >= len(rows):
        return rows
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit])
    return rows.select(chosen.tolist())
