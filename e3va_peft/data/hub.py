"""Datasets of the Hub, image folders, parquet and what `save_to_disk` wrote: their splits and columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets

from e3va_peft.data.config import DataConfig
from e3va_peft.errors import UserError, reason

_HINTS = {
    "label_column": " An image folder needs one sub-folder per class.",
    "objects_column": " YOLO's text files need a data.yaml, COCO's JSON data.images and data.annotations.",
}


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


def column(field: str, wanted: str | None, found: Sequence[str], rows: datasets.Dataset, split: str) -> str:
    """Find the column that a config names, or the only one that fits.

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
        hint = _HINTS.get(field, "") if not found else ""
        raise UserError(f"data.{field}: of the columns {columns} of split {split!r} {what}. Name one.{hint}")
    return found[0]


def undecoded(rows: datasets.Dataset, name: str, split: str) -> datasets.Dataset:
    """Leave the images of a column undecoded: `{"path", "bytes"}`.

    Raises:
        UserError: The column holds something else.
    """
    if not isinstance(rows.features[name], datasets.Image):
        raise UserError(f"column {name!r} of split {split!r}: holds {rows.features[name]}, no images.")
    return rows.cast_column(name, datasets.Image(decode=False))


def two_columns(rows: datasets.Dataset, image: str, label: str) -> datasets.Dataset:
    """Keep two columns, renamed to `image` and `label`."""
    names = {image: "image", label: "label"}
    return rows.select_columns(list(names)).rename_columns({old: new for old, new in names.items() if old != new})
