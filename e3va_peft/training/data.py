"""Images with classes, label maps or objects, from wherever they are, each error naming its file."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

from e3va_peft.errors import UserError
from e3va_peft.training.annotations import Reader, find_objects
from e3va_peft.training.config import DataConfig, LabelKind
from e3va_peft.training.objects import Decoded, decode
from e3va_peft.training.sources import (
    EVAL,
    IMAGE_SUFFIXES,
    TRAIN,
    choose_eval_split,
    choose_splits,
    class_id,
    class_names,
    column,
    load_dataset,
    names_of,
    own_names,
    refuse_empty,
    refuse_names,
    source_of,
    undecoded,
)

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""What is opened, whatever a file is called. Of what Pillow knows besides, EPS would start Ghostscript."""

_CLASS_COLUMNS = ("label", "labels", "fine_label", "class", "target")
_MASK_COLUMNS = ("label", "labels", "annotation", "mask", "masks", "semantic_mask", "segmentation_mask")
_SHOWN = 10  # broken files to name at once
_ENOUGH = 10  # boxes to judge their format by
_BOXES = {
    "xywh": "x, y of the upper left corner, width, height in pixels",
    "xyxy": "x, y of the upper left and of the lower right corner in pixels",
    "cxcywh": "x, y of the centre, width, height as shares of the image",
    "voc": "xmin, ymin, xmax, ymax in pixels that count from 1",
}
_PART = 10_000  # rows whose labels are read at once


@dataclass(frozen=True)
class Split:
    """Images and their labels, read one by one.

    Attributes:
        name: Name of the split, for messages.
        rows: Columns `image` (`{"path", "bytes"}`, not decoded) and `label` (a class id, a label map like `image`, or
            a pickled `Record` of objects).
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
        image, label = self._read(index)
        return image, label.objects if isinstance(label, Decoded) else label

    def _read(self, index: int) -> tuple[Image.Image, int | np.ndarray | Decoded]:
        row = self.rows[index]
        for name, value in row.items():
            if value is None or (isinstance(value, dict) and value.get("bytes") is None and value.get("path") is None):
                raise UserError(f"{self.name}, row {index}: has no {name}. Remove the row.")
        where = self._where(row["image"], index)
        image, raw = _open_upright(row["image"], where)
        if self.kind == "class":
            return image, row["label"]
        if self.kind == "label-map":
            return image, self._label_map(row, where, self._where(row["label"], index), image, raw)
        record = pickle.loads(row["label"])
        if record["size"] is not None:
            _check_size(image, raw, where, tuple(record["size"]), record["where"], "annotation")
        return image, decode(record, image.size[::-1], self.kind == "instances")

    def _label_map(
        self, row: dict[str, Any], where: str, where_mask: str, image: Image.Image, raw: tuple[int, int] | None
    ) -> np.ndarray:
        mask = open_label_map(row["label"], where_mask)
        _check_size(image, raw, where, mask.shape, where_mask, "label map")
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

    def where(self, index: int) -> str:
        """Return what to call an example in an error: its image's path, or row."""
        return self._where(self.rows[index]["image"], index)

    def _where(self, item: dict[str, Any], index: int) -> str:
        path = item.get("path")
        return path if path and os.path.exists(path) else f"{self.name}, row {index}{f' ({path})' if path else ''}"

    def verify(
        self, report: Callable[[], None] = lambda: None, note: Callable[[str], None] = lambda text: None
    ) -> np.ndarray:
        """Decode every example once; return how often each class occurs, `(K,)` int64.

        It is counted in images, pixels, or objects that are neither difficult nor a crowd.

        Args:
            report: Called after each example.
            note: Called with each thing that a user should know of, though nothing stops.

        Raises:
            UserError: Some examples are broken; the message names the first ten.
        """
        counts = np.zeros(len(self.labels), dtype=np.int64)
        errors: list[str] = []
        dropped: list[str] = []
        clipped: list[str] = []
        outside: list[str] = []
        blank: list[str] = []
        objects, largest, box_format = 0, 0.0, ""

        def check(index: int) -> int | np.ndarray | Decoded | UserError:
            try:
                return self._read(index)[1]
            except UserError as error:
                return error

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for index, found in enumerate(pool.map(check, range(len(self)))):
                report()
                if isinstance(found, UserError):
                    errors.append(str(found))
                    continue
                if isinstance(found, Decoded):
                    dropped += found.dropped
                    clipped += found.clipped
                    outside += found.outside
                    objects += len(found.objects) + len(found.dropped)
                    largest = max(largest, found.objects.boxes.max(initial=0))
                    box_format = found.box_format
                count = self._count(found)
                if isinstance(found, np.ndarray) and not count.any():
                    blank.append(self._where(self.rows[index]["label"], index))
                counts += count
        if errors:
            more = f"\n... and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
            raise UserError(f"{len(errors)} of {len(self)} examples:\n" + "\n".join(errors[:_SHOWN]) + more)
        if objects >= _ENOUGH and len(outside) > objects / 2:
            raise UserError(
                f"{len(outside)} of the {objects} boxes of {self.name} leave their image or have no area in it: "
                f"{_few(outside)}. They are read as {_BOXES[box_format]}. If they are something else, convert them, "
                "or for a table set data.box_format; if the images were resized, resize the boxes too; if objects do "
                "reach beyond their images, set data.verify: false."
            )
        if objects >= _ENOUGH and 0 < largest <= 1 and box_format != "cxcywh":
            raise UserError(
                f"the {objects} boxes of {self.name} lie between 0 and 1. They are read as {_BOXES[box_format]}. If "
                "they are shares of the image, convert them to pixels, or for a table set data.box_format: cxcywh."
            )
        if blank:
            note(f"{len(blank)} label maps of {self.name} are ignored at every pixel and teach nothing: {_few(blank)}")
        if dropped:
            note(
                f"{len(dropped)} objects of {self.name} have no area in their image and are left out: {_few(dropped)}"
            )
        if clipped:
            note(
                f"{len(clipped)} of the {objects} boxes of {self.name} are clipped, for they leave their image by "
                f"more than a pixel: {_few(clipped)}"
            )
        return counts

    def _count(self, label: int | np.ndarray | Decoded) -> np.ndarray:
        if isinstance(label, int):
            ids = np.array([label])
        elif isinstance(label, Decoded):
            ids = label.objects.labels[~(label.objects.crowd | label.objects.difficult)]
        else:
            ids = label[label != self.ignore_index]
        return np.bincount(ids, minlength=len(self.labels))


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


def load_splits(config: DataConfig, kind: LabelKind, seed: int = 0) -> tuple[Split, Split | None]:
    """Find the images and labels that a config names: to train on, and to evaluate on where there are some.

    Args:
        config: The `data` section of a run.
        kind: What is known of an image.
        seed: Of `train_samples`.

    Raises:
        UserError: Nothing is there, a split is empty, or a label is not among the class names.
    """
    found, read = _find(config, kind)
    train_name, eval_name = choose_splits(config, found)
    chosen = {name: found[name] for name in (train_name, eval_name) if name is not None}
    rows, labels = read(config, kind, chosen, None)
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
    limits = {train_name: config.train_samples, eval_name: config.eval_samples}
    splits = {name: _split(config, kind, seed, name, part, labels, limits[name]) for name, part in rows.items()}
    return splits[train_name], splits.get(eval_name or "")


def load_eval_split(config: DataConfig, kind: LabelKind, labels: Sequence[str], seed: int = 0) -> Split | None:
    """Find what a config evaluates a model on; what it trains on need not be there.

    Args:
        config: The `data` section of a run.
        kind: What is known of an image.
        labels: The model's class names in the order of their ids. Those of the data are matched by name.
        seed: Of `eval_samples`.

    Returns:
        The split; None where the config has none to evaluate on.

    Raises:
        UserError: Nothing is there, the split is empty, or it has a class that the model does not know.
    """
    if config.eval_fraction is not None:
        return load_splits(config, kind, seed)[1]
    found, read = _find(config, kind)
    name = choose_eval_split(config, found)
    if name is None:
        return None
    rows, names = read(config, kind, {name: found[name]}, labels)
    return _split(config, kind, seed, name, rows[name], names, config.eval_samples)


def _find(config: DataConfig, kind: LabelKind) -> tuple[dict[str, Any], Reader]:
    return find_objects(config) if kind in ("boxes", "instances") else (_find_labels(config), _read_labels)


def _split(
    config: DataConfig,
    kind: LabelKind,
    seed: int,
    name: str,
    rows: datasets.Dataset,
    labels: Sequence[str],
    limit: int | None,
) -> Split:
    title, sample = f"{source_of(config)}, {name}", _sample(rows, limit, seed)
    return Split(title, sample, tuple(labels), kind, config.reduce_labels, config.ignore_index)


def missing_classes(counts: np.ndarray, labels: Iterable[str]) -> list[str]:
    """Return the names of the classes that occur nowhere."""
    return [name for name, count in zip(labels, counts, strict=True) if count == 0]


def open_image(item: dict[str, Any], where: str) -> Image.Image:
    """Open an image as 8-bit RGB, turned as its EXIF tag says.

    Greyscale of 16 bits, and of 32, which must hold no more, is scaled from 0..65535 to 0..255, where PIL's own
    conversion would clip it to white.

    Args:
        item: `{"path": ...}` or `{"bytes": ...}`.
        where: What to call it in an error.

    Raises:
        UserError: It cannot be read as an image.
    """
    return _open_upright(item, where)[0]


def _open_upright(item: dict[str, Any], where: str) -> tuple[Image.Image, tuple[int, int] | None]:
    """Open an image as `open_image` does; return also its height and width as stored if its EXIF tag turned it."""
    image, raw = _decoded(item, where), None
    with contextlib.suppress(Exception):  # a broken EXIF block says nothing about the pixels
        if image.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
            image, raw = ImageOps.exif_transpose(image), image.size[::-1]
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(
                f"{where}: has values from {values.min()} to {values.max()}, no 8 or 16 bits. Convert it to one."
            )
        image = Image.fromarray((values // 257).astype(np.uint8))
    if image.mode == "F":
        raise UserError(f"{where}: has floating-point values, whose range is unknown. Convert it to 8 or 16 bits.")
    return image.convert("RGB"), raw


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


def _check_size(
    image: Image.Image, raw: tuple[int, int] | None, where: str, size: tuple[int, ...], where_label: str, what: str
) -> None:
    """Raise a UserError if a label was made for an image of another size, or nobody can say for which way up."""
    if size == image.size[::-1]:
        if size == raw:
            raise UserError(
                f"{where_label}: its image {where} is turned by its EXIF tag, and nothing says whether the {what} is. "
                "Turn the pixels to fit, and drop the tag."
            )
        return
    why = f"Export the {what} in the size of its image."
    if size == raw:
        why = f"The image is rotated by its EXIF tag, the {what} is not: rotate the pixels, drop the tag."
    raise UserError(
        f"{where_label}: is {size[1]} x {size[0]} pixels, its image {where} {image.width} x {image.height}. {why}"
    )


def _few(names: Sequence[str]) -> str:
    return names[0] + (", ..." if len(names) > 1 else "")


def _open(item: dict[str, Any], where: str) -> Image.Image:
    data = item.get("bytes")
    try:
        return Image.open(BytesIO(data) if data is not None else item["path"], formats=FORMATS)
    except FileNotFoundError:
        raise UserError(f"{where}: is not there any more. Restore it, or remove its row or label map.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        hint = f", save it as one of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else ""
        raise UserError(f"{where}: cannot be read as an image ({error}). Replace it{hint}, or remove it.") from None


def _decoded(item: dict[str, Any], where: str) -> Image.Image:
    image = _open(item, where)
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        image.close()
        raise UserError(f"{where}: is cut short or corrupt ({error}). Replace it, or remove it.") from None
    return image


def _find_labels(config: DataConfig) -> dict[str, datasets.Dataset]:
    return _folder_pair(config) if config.images is not None else load_dataset(config)


def _read_labels(
    config: DataConfig, kind: LabelKind, chosen: Mapping[str, datasets.Dataset], model: Sequence[str] | None
) -> tuple[dict[str, datasets.Dataset], list[str]]:
    """Read class ids and label maps: see `Reader`."""
    with_masks = kind == "label-map"
    for name, rows in chosen.items():
        refuse_empty(config, name, rows)
    parts = {name: _columns(config, name, rows, with_masks) for name, rows in chosen.items()}
    labels = _labels(config, next(iter(parts.values())), with_masks) if model is None else list(model)
    if not with_masks:
        return {name: _class_ids(config, name, part, labels, model) for name, part in parts.items()}, labels
    if config.reduce_labels and config.ignore_index < len(labels):
        raise UserError(
            f"data.ignore_index={config.ignore_index}: is one of the {len(labels)} classes, once data.reduce_labels "
            "has subtracted one from the label maps. Set it higher, e.g. 255 or 65535."
        )
    return parts, labels


def _folder_pair(config: DataConfig) -> dict[str, datasets.Dataset]:
    """Pair the images and label maps of two folders with equal sub-folders and file names (ADE20K layout)."""
    images, masks = Path(str(config.images)), Path(str(config.masks))
    for name, folder in (("images", images), ("masks", masks)):
        if not folder.is_dir():
            raise UserError(f"data.{name}={str(folder)!r}: no such folder (from {Path.cwd()}).")
    splits = [part.name for part in sorted(images.iterdir()) if part.is_dir()]
    needed = (*TRAIN, *EVAL[:3], config.train_split, config.eval_split)  # others, as test, often have no label maps
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
    image = column("image_column", config.image_column, candidates, rows, split)
    if with_masks:
        others = [name for name in pictures if name != image]
        label = column("label_column", config.label_column, [n for n in usual if n in others] or others, rows, split)
    else:
        present = [name for name in usual if name in rows.features]
        classes = [name for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
        label = column("label_column", config.label_column, present[:1] or classes, rows, split)
    for name in (image, label) if with_masks else (image,):
        rows = undecoded(rows, name, split)
    rows = rows.select_columns([image, label])
    return rows.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})


def _labels(config: DataConfig, rows: datasets.Dataset, with_masks: bool) -> list[str]:
    """Return the class names: the config's, or the dataset's."""
    kind = rows.features["label"]
    labels = class_names(config, kind.names if isinstance(kind, datasets.ClassLabel) else None)
    if labels is None and with_masks:
        values = sorted({int(v) for i in range(min(20, len(rows))) for v in _values(rows[i]["label"])})
        raise UserError(
            "data.labels: is missing. Label maps do not know the names of their classes; the first 20 of "
            f"{source_of(config)} hold the values {values}. Write labels: [first, second, ...], or a text file of "
            "names, or their number; with reduce_labels: true if 0 means nothing."
        )
    if labels is None:
        plain = isinstance(kind, datasets.Value)  # no list of several labels
        labels = names_of({value for part in _parts(rows) for value in part}) if plain else None
    if labels is None:
        raise UserError(f"data.label_column: holds {kind}, no class ids or names. Name another, or clean it.")
    refuse_names(labels, 2)
    return labels


def _values(item: dict[str, Any]) -> np.ndarray:
    return np.unique(open_label_map(item, item.get("path") or "a label map"))


def _parts(rows: datasets.Dataset) -> Iterator[list[Any]]:
    for start in range(0, len(rows), _PART):
        yield rows.select_columns(["label"])[start : start + _PART]["label"]


def _class_ids(
    config: DataConfig, split: str, rows: datasets.Dataset, labels: list[str], model: Sequence[str] | None
) -> datasets.Dataset:
    """Turn the label column into class ids and check each of them."""
    ids: list[int] = []
    numbers = {name: i for i, name in enumerate(labels)}
    kind = rows.features["label"]
    own = own_names(config, kind.names if isinstance(kind, datasets.ClassLabel) else None, model, split)
    for part in _parts(rows):
        for value in part:
            ids.append(class_id(value, own, numbers, f"{source_of(config)}, split {split!r}, row {len(ids)}"))
    return rows.remove_columns("label").add_column("label", ids)  # a cast would write a copy of all images


def _sample(rows: datasets.Dataset, limit: int | None, seed: int) -> datasets.Dataset:
    if limit is None or limit >= len(rows):
        return rows
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit])
    return rows.select(chosen.tolist())
