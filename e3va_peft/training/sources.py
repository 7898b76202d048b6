"""Where data comes from: datasets, their splits and columns, and the names of their classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import datasets

from e3va_peft.errors import UserError, read_text, reason
from e3va_peft.training.config import DataConfig

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
TRAIN = ("train", "training")
EVAL = ("validation", "val", "valid", "test", "testing")


def source_of(config: DataConfig) -> str:
    """Return what the data is called in messages: where its images are."""
    return str(config.source if config.images is None else config.images)


def load_dataset(config: DataConfig) -> dict[str, datasets.Dataset]:
    """Load a Hub dataset, an image folder, parquet files or what `save_to_disk` wrote.

    Raises:
        UserError: It is none of these, or not there.
    """
    source = str(config.source)
    path = Path(source)
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


def choose_splits(config: DataConfig, found: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the names of the splits to train and to evaluate on: the config's, or the usual ones.

    Raises:
        UserError: There is no such split, or both are the same.
    """
    train_name = _choose("train_split", config.train_split, TRAIN, found)
    if train_name is None:
        raise UserError(
            f"data.train_split: {source_of(config)} has no split named {' or '.join(TRAIN)}, only {sorted(found)}. "
            "Set it."
        )
    eval_name = None if config.eval_fraction else choose_eval_split(config, found)
    if eval_name == train_name:
        raise UserError(
            f"data.eval_split={eval_name!r}: is what is trained on. Choose another, or data.eval_fraction."
        )
    return train_name, eval_name


def choose_eval_split(config: DataConfig, found: Mapping[str, Any]) -> str | None:
    """Return the name of the split to evaluate on: the config's, or the usual one; None where there is none.

    Raises:
        UserError: There is no such split.
    """
    return _choose("eval_split", config.eval_split, EVAL, found)


def _choose(field: str, wanted: str | None, usual: tuple[str, ...], found: Mapping[str, Any]) -> str | None:
    if wanted is not None and wanted not in found:
        raise UserError(f"data.{field}={wanted!r}: there is no such split, only {sorted(found)}.")
    return wanted or next((name for name in usual if name in found), None)


def refuse_empty(config: DataConfig, split: str, rows: Sized) -> None:
    """Raise a UserError if a split has no images."""
    if not len(rows):
        raise UserError(f"{source_of(config)}: split {split!r} is empty. Put images there or choose another split.")


def column(field: str, wanted: str | None, found: Sequence[str], rows: datasets.Dataset, split: str) -> str:
    """Return the column that a config names, or the only one that fits.

    Args:
        field: Field of the config that names it.
        wanted: Its value.
        found: Columns that fit.
        rows: The split.
        split: Its name.

    Raises:
        UserError: There is no such column, or not just one that fits.
    """
    columns = list(rows.features)
    if wanted is not None:
        if wanted not in columns:
            raise UserError(f"data.{field}={wanted!r}: split {split!r} has no such column, only {columns}.")
        return wanted
    if len(found) != 1:
        what = "none fits" if not found else f"{list(found)} all fit"
        hint = " An image folder needs one sub-folder per class." if field == "label_column" and not found else ""
        raise UserError(f"data.{field}: of the columns {columns} of split {split!r} {what}. Name one.{hint}")
    return found[0]


def undecoded(rows: datasets.Dataset, name: str, split: str) -> datasets.Dataset:
    """Return a split with the images of a column not decoded: `{"path", "bytes"}`.

    Raises:
        UserError: The column holds no images.
    """
    if not isinstance(rows.features[name], datasets.Image):
        raise UserError(f"column {name!r} of split {split!r}: holds {rows.features[name]}, no images.")
    return rows.cast_column(name, datasets.Image(decode=False))


def class_names(config: DataConfig, known: Sequence[str] | None) -> list[str] | None:
    """Return the class names that the config gives, else those that the dataset knows, else None.

    Raises:
        UserError: The config has another number of names than the dataset, or gives a class the name of another one.
    """
    if config.labels is None:
        return list(known) if known is not None else None
    labels = _given_labels(config.labels)
    if known is not None and len(labels) != len(known):
        raise UserError(f"data.labels: has {len(labels)} names, the dataset {len(known)} classes: {list(known)}.")
    for i, name in enumerate(labels if known is not None else ()):
        if known is not None and name != known[i] and name in known:
            raise UserError(
                f"data.labels: calls class {i} {name!r}, and in the dataset that is class {list(known).index(name)}: "
                f"images would get another class. It has its names in the order {list(known)[:20]}; leave data.labels "
                "out, or rename them in this order, to names that it does not have."
            )
    return labels


def match_names(config: DataConfig, own: Sequence[str], model: Sequence[str], where: str) -> list[str]:
    """Return what a model calls the classes of a dataset: the same, or those that `data.labels` renames in order.

    Args:
        config: Where the data is.
        own: The dataset's names, in the order of their ids.
        model: The model's.
        where: What to call the dataset in an error.

    Raises:
        UserError: The model does not know them.
    """
    if set(own) <= set(model):
        return list(own)
    if config.labels is not None and len(own) == len(model):
        return list(model)
    odd = [name for name in own if name not in model]
    raise UserError(
        f"{where}: has the classes {odd[:10]}, which the model does not know; it knows {list(model)[:10]}. Rename "
        "them, or, if only the names differ, name all by data.labels."
    )


def own_names(
    config: DataConfig, classes: Sequence[str] | None, model: Sequence[str] | None, split: str
) -> Sequence[str] | None:
    """Return what the numbers of a split mean, where it says and nothing renames them."""
    if classes is not None and model is not None:
        return match_names(config, classes, model, f"{source_of(config)}, split {split!r}")
    return classes if config.labels is None else None


def names_of(seen: Iterable[Any]) -> list[str] | None:
    """Return the class names that follow from all labels of a split: sorted names, or numbers up to the largest."""
    values = {value for value in seen if value is not None}
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    if all(isinstance(value, int) for value in values):
        return [str(i) for i in range(max(values) + 1)]
    return None


def refuse_names(labels: Sequence[str], least: int) -> None:
    """Raise a UserError unless class names are all different, and at least this many."""
    if len(labels) < least or len(set(labels)) != len(labels):
        number = {1: "one", 2: "two"}[least]
        raise UserError(f"data.labels={list(labels)!r}: must be {number} or more names, all different.")


def class_id(value: Any, own: Sequence[str] | None, labels: Mapping[str, int], where: str) -> int:
    """Return the id of a class that a dataset gives by number or name.

    Args:
        value: Number or name.
        own: What the numbers mean in this split: a split may number its classes in another way.
        labels: Ids by name.
        where: What to call it in an error.

    Raises:
        UserError: It is none of the classes.
    """
    named = own[value] if isinstance(value, int) and own is not None and 0 <= value < len(own) else value
    number = labels.get(named, -1) if isinstance(named, str) else named
    if not isinstance(number, int) or not 0 <= number < len(labels):
        raise UserError(
            f"{where}: has the label {named!r}, not one of the {len(labels)} classes {list(labels)[:20]}. Add it to "
            "data.labels, or remove it; -1 means that the split has no labels."
        )
    return int(number)


def _given_labels(given: list[str] | str | int) -> list[str]:
    if isinstance(given, int):
        return [str(i) for i in range(given)]
    if isinstance(given, list):
        return [str(name) for name in given]
    path = Path(given)
    if not path.is_file():
        raise UserError(
            f"data.labels={given!r}: no such file. Write the names as a list, or a file of one name a line."
        )
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    header = lines[0].split("\t") if lines else []
    if "Name" in header:  # ADE20K's objectInfo150.txt
        return [line.split("\t")[header.index("Name")].strip() for line in lines[1:]]
    return lines
