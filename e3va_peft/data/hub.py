"""Datasets of the Hub, image folders, parquet and what `save_to_disk` wrote: their splits and columns."""

from __future__ import annotations

import mimetypes
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import datasets
from huggingface_hub import constants

from e3va_peft.data.config import DataConfig, source_of
from e3va_peft.data.images import IMAGE_SUFFIXES, is_hidden, is_picture, outside, pictures_in
from e3va_peft.data.names import refuse_alike
from e3va_peft.data.splits import EVAL, TRAIN, choose_eval_split
from e3va_peft.errors import UserError, reason, refuse_no_path, shown

_HINTS = {
    "label_column": " Or sort the images into one sub-folder per class.",
    "objects_column": " YOLO's text files need a data.yaml, COCO's JSON data.images and data.annotations, Pascal VOC "
    "the folder that holds Annotations and JPEGImages.",
}

_LISTS = (".csv", ".tsv", ".json", ".jsonl", ".xlsx", ".txt")
_TABLE = (
    "Put the list into the folder of the images as metadata.csv, with the columns file_name and label, and name that "
    "folder; or sort the images into one sub-folder per class."
)
_TOLD = (".parquet", ".arrow")  # what needs no folders, nor does metadata.*
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")  # which may hold the images
_LAYOUT = "An image folder is SPLIT/CLASS/image.jpg or CLASS/image.jpg."
# Folders of splits by other names, as the `datasets` library calls them.
_CALLED = dict.fromkeys(("val", "valid", "dev"), "validation") | {"training": "train"}
_CALLED |= dict.fromkeys(("testing", "eval", "evaluation"), "test")
_some = partial(shown, most=5)


def load_dataset(config: DataConfig) -> dict[str, datasets.Dataset]:
    """Load a Hub dataset, an image folder, parquet files or what `save_to_disk` wrote.

    Raises:
        UserError: It is none of these, or not there, or has images that are files elsewhere.
    """
    found = _load(config)
    _refuse_outside(config, found)
    return found


def _load(config: DataConfig) -> dict[str, datasets.Dataset]:
    source = str(config.source)
    path = Path(source)
    try:
        if path.is_file() and path.suffix == ".parquet":
            return dict(datasets.load_dataset("parquet", data_files=str(path)))
        if (path / "dataset_dict.json").is_file():
            return dict(datasets.load_from_disk(str(path)))
        if (path / "state.json").is_file():
            return {"train": datasets.load_from_disk(str(path))}
        refuse_no_path("data.source", source)
        if path.is_file():
            raise UserError(f"data.source={source!r}: {_file_hint(path)}")
        place = str(path) if path.exists() else source
        return dict(datasets.load_dataset(place, config.name, revision=config.revision))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, UserError):
            raise
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # which alone says what is wrong
        if path.is_dir():
            raise UserError(
                f"data.source={source!r}: cannot be read ({reason(error)}). It holds {look(path)}. {_LAYOUT}"
            ) from None
        if path.exists():
            raise UserError(
                f"data.source={source!r}: cannot be loaded as parquet ({reason(error)}). Replace it."
            ) from None
        raise UserError(
            f"data.source={source!r}: no such file or folder (from {Path.cwd()}), and no dataset of that name on the "
            f"Hub ({reason(error)}). Correct the path (--set data.source=PATH); or, for the Hub, the id, the network "
            "and, if it is private, `hf auth login`."
        ) from None


def _root(config: DataConfig) -> Path | None:
    """Return the folder of the classes or splits; None where something else than folders may say what the classes are.

    It is the one that a config names, or the first in it that holds more than one other.
    """
    folder = Path(str(config.source))
    while folder.is_dir() and not _is_told(folder):
        direct, below, _ = _contents(folder)
        (only, *others) = below or [""]
        if direct or others or not only or only in _usual(config) or _contents(folder / only)[0]:
            return folder
        folder /= only
    return None


def _is_told(folder: Path) -> bool:
    card = folder / "README.md"
    if card.is_file() and "data_files:" in card.read_text(encoding="utf-8", errors="replace"):
        return True
    with os.scandir(folder) as entries:
        below = [entry.path for entry in entries if entry.is_dir()]
    names = [name for place in (str(folder), *below) for name in os.listdir(place)]
    if any(name.startswith("metadata.") or name.endswith(_TOLD) for name in names):
        return True
    # Where folders hold images, an archive beside them is what they came in.
    return any(name.endswith(_ARCHIVES) for name in names) and not any(pictures_in(place) for place in below)


def _called(config: DataConfig, place: str) -> str:
    """Return what the split of a folder is called."""
    return place if place in (config.train_split, config.eval_split) else _CALLED.get(place, place)


def _usual(config: DataConfig) -> set[str | None]:
    """Return what folders of splits are called."""
    return {*TRAIN, *EVAL, *_CALLED, config.train_split, config.eval_split}


def load_class_folders(config: DataConfig) -> dict[str, datasets.Dataset]:
    """Load SPLIT/CLASS/image.jpg or CLASS/image.jpg, or images deeper in a class's folder; nothing of another source.

    Not by the `datasets` library, which takes the folder right above an image for its class, and words such as train
    and test anywhere in a path for a split.

    Raises:
        UserError: It is a folder without images, or one that says nothing of their classes, or with a class of images
            of no known kind or that is not trained on, or with one split in two folders.
    """
    folder = _root(config)
    if folder is None:
        return {}
    places = {place: _called(config, place) for place in _split_folders(config, folder)}
    searched = places and not config.eval_fraction
    evaluated = choose_eval_split(config, dict.fromkeys(places.values())) if searched else None
    _refuse_merged(config, places, evaluated)
    _refuse_unsorted(config, folder, places, evaluated)
    found: dict[str, dict[str, list[Path]]] = {}
    for place, split in (places or {"": "train"}).items():
        classes = found.setdefault(split, {})
        for name in _contents(folder / place)[1]:
            pictures = pictures_in(folder / place / name)
            if not pictures:
                _refuse_unknown(folder / place / name)
            else:
                classes.setdefault(name, []).extend(pictures)
    names = _class_names(config, {split: set(classes) for split, classes in found.items()}, evaluated)
    if not names:
        raise UserError(f"data.source={config.source!r}: holds {look(folder)}. {_LAYOUT}")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {}
    for split, classes in found.items():
        pairs = [(str(path.absolute()), i) for i, name in enumerate(names) for path in classes.get(name, ())]
        columns = {"image": [path for path, _ in pairs], "label": [label for _, label in pairs]}
        rows[split] = datasets.Dataset.from_dict(columns, features=features)
    return rows


def _refuse_merged(config: DataConfig, places: Mapping[str, str], evaluated: str | None) -> None:
    """Raise a UserError if what is trained or evaluated on lies in two folders, such as val and valid."""
    for field, split in {"train_split": config.train_split or TRAIN[0], "eval_split": evaluated}.items():
        merged = [place for place, called in places.items() if called == split]
        if len(merged) > 1:
            raise UserError(
                f"{source_of(config)}: holds the folders {' and '.join(sorted(merged))}, which both mean {split!r}. "
                f"Choose one by data.{field}, or put their images into one folder."
            )


def _class_names(config: DataConfig, found: Mapping[str, set[str]], evaluated: str | None) -> list[str]:
    """Name the classes of the splits that are trained and evaluated on; of all, where the former is not there."""
    train = next((name for name in (config.train_split, *TRAIN) if name in found), None)
    if train is None:
        return sorted(set().union(*found.values()))
    names = sorted(found[train] | found.get(evaluated or train, set()))
    odd = [name for name in names if name not in found[train]]
    if odd and config.labels is None:
        refuse_alike(names, source_of(config))
        raise UserError(
            f"{source_of(config)}, split {evaluated!r}: has the classes {odd[:10]}, which the split that is trained "
            f"on, {train!r}, does not have; it has {sorted(found[train])[:10]}. Rename or remove them, or name all by "
            "data.labels."
        )
    return names


def _refuse_unknown(folder: Path) -> None:
    """Refuse the folder of a class whose images are all of a kind that is not read."""
    kinds = {Path(name).suffix for name in os.listdir(folder) if str(mimetypes.guess_type(name)[0])[:6] == "image/"}
    if kinds:
        raise UserError(
            f"{folder}: holds images as {', '.join(sorted(kinds))} alone, which are not read. Convert them to one of "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}, or remove the folder."
        )


def _split_folders(config: DataConfig, folder: Path) -> list[str]:
    """Name the sub-folders that are splits: of a usual name or the config's, with folders alone in them or alone."""
    below = [name for name, number in _contents(folder)[1].items() if number]
    named = [name for name in below if name in _usual(config)]
    if not named:  # the folders of classes, which may hold a million images, need no look
        return []
    inside = {name: _contents(folder / name) for name in below}
    filled = [name for name, (images, classes, _) in inside.items() if images or any(classes.values())]
    apart = [name for name in named if any(inside[name][1].values()) and not inside[name][0]]
    return named if set(filled) <= set(named) else apart


def _refuse_outside(config: DataConfig, found: Mapping[str, datasets.Dataset]) -> None:
    """Refuse a table that names files elsewhere as its images: whoever wrote it would choose what is trained on.

    Raises:
        UserError: An image is neither in the table, nor a file beside it, nor one that was downloaded or unpacked.
    """
    source, saved = Path(str(config.source)), datasets.config
    caches = [saved.HF_DATASETS_CACHE, saved.DOWNLOADED_DATASETS_PATH, saved.EXTRACTED_DATASETS_PATH]
    caches.append(constants.HF_HUB_CACHE)
    beside = [source if source.is_dir() else source.parent] if source.exists() else []
    for split, rows in found.items():
        for name in (name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)):
            paths = _paths(rows, name)
            absent = (path for path in outside(filter(None, paths), [*beside, *caches]) if os.path.isfile(path))
            if path := next(absent, None):
                folder = f"the folder {beside[0]}" if beside else "what was downloaded"
                raise UserError(
                    f"{source_of(config)}, split {split!r}, row {paths.index(path)}: has the {name} {path!r}, a file "
                    f"outside of {folder}. Move it there, or write the images themselves into the table."
                )


def _paths(rows: datasets.Dataset, name: str) -> list[str | None]:
    """List the paths of a column's images whose bytes are not in the table; None for the others."""
    return [
        path if no_bytes else None
        for part in rows.data.column(name).chunks
        for path, no_bytes in zip(
            part.field("path").to_pylist(), part.field("bytes").is_null().to_pylist(), strict=True
        )
    ]


def _file_hint(path: Path) -> str:
    """Say what to do with a file that is not parquet."""
    suffixes = "".join(path.suffixes[-2:]).lower()
    if suffixes.endswith((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")):
        return "is an archive. Unpack it, and name the folder."
    if suffixes.endswith(_LISTS):
        return f"is a list, and images are read from folders. {_TABLE}"
    return "is a file of no format that is read. Name a folder of images, or a .parquet."


def look(folder: Path) -> str:
    """Say what a folder of images holds, for a message."""
    direct, below, lists = _contents(folder)
    found = [f"{len(direct)} images directly"] if direct else []
    deeper = [name for name, inner in below.items() if inner and not _contents(folder / name)[0]]
    with_images = [name for name in below if name not in deeper and _contents(folder / name)[0]]
    found += [f"images in the {len(with_images)} folders {_some(with_images)}"] if with_images else []
    found += [f"folders in {_some(deeper)}"] if deeper else []
    found += [f"the files {_some(lists)}"] if lists else []
    return ", ".join(found) or "nothing that is read"


def _refuse_unsorted(config: DataConfig, folder: Path, splits: Mapping[str, str], evaluated: str | None) -> None:
    """Refuse a folder of images that says nothing of their classes, after one look at it.

    Args:
        config: Where the data is.
        folder: What holds the classes or splits.
        splits: Sub-folder -> name of the splits.
        evaluated: Name of the split that is evaluated on.

    Raises:
        UserError: It has a list instead of images, or images lie in no folder of a class, or all in one.
    """
    direct, below, lists = _contents(folder)
    wanted = (evaluated, config.train_split, *TRAIN)  # what is in others, such as a contest's own test, is no matter
    places = {name: _contents(folder / name) for name, split in splits.items() if split in wanted}
    places = places or {"": (direct, below, lists)}
    begin, sorts = (
        f"data.source={config.source!r}:",
        "Give each class a sub-folder: SPLIT/CLASS/image.jpg, or CLASS/image.jpg.",
    )
    if lists and not direct and not any(below.values()):
        raise UserError(f"{begin} holds no image, but {_some(lists)}. {_TABLE}")
    bare = [name for name, (images, classes, _) in places.items() if images and not any(classes.values())]
    if bare:
        where = f"directly in {' and '.join(bare)}" if splits else "in it directly"
        table = f" Or, with {lists[0]}: {_TABLE}" if lists else ""
        raise UserError(f"{begin} its images lie {where}, and nothing says what their classes are. {sorts}{table}")
    outer = list(splits) or [name for name, number in below.items() if number]
    if len(outer) > 1 and all(_is_doubled(folder / name) for name in outer):
        raise UserError(
            f"{begin} its folders {_some(outer)} hold one folder of the same name each, as some archives do, so that "
            f"these look like classes. Move what is in {outer[0]}/{outer[0]} up into {outer[0]}, likewise the others; "
            "and name splits by data.train_split and data.eval_split."
        )
    for name, (images, classes, _) in places.items():
        filled = [label for label, number in classes.items() if number]
        if images and filled:
            raise UserError(
                f"{begin} has images {f'directly in {name}' if name else 'directly in it'}, {_some(images)}, beside "
                f"those in folders, {_some(filled)}. Move each into the folder of its class. {sorts}"
            )
        within = [] if splits else [_contents(folder / label) for label in filled]
        inner = [set(below) for _, below, _ in within] if not any(images for images, _, _ in within) else []
        same = set.intersection(*inner) if len(inner) > 1 else set()
        if len(same) > 1:  # one alone cannot be the classes
            raise UserError(
                f"{begin} its folders {_some(filled)} hold folders of the same names, {_some(sorted(same))}: which of "
                "them are classes, and which splits? Name splits train and val, or by data.train_split and "
                "data.eval_split; or move the images of each class into its folder."
            )
        if len(filled) == 1 and name not in EVAL:
            images, deeper, _ = _contents(folder / name / filled[0])
            if images and not deeper:
                raise UserError(
                    f"{begin} has images of one class alone, in the sub-folder {filled[0]!r}{name and f' of {name}'}. "
                    f"A classifier tells two or more apart. {sorts}"
                )


def _is_doubled(folder: Path) -> bool:
    images, below, _ = _contents(folder)
    return not images and list(below) == [folder.name]


def _contents(folder: Path) -> tuple[list[str], dict[str, int], list[str]]:
    """Return the images of a folder, its sub-folders with the number of what is in each, and its lists."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    images = [entry.name for entry in entries if is_picture(entry.name)]
    lists = [
        entry.name for entry in entries if entry.name.lower().endswith((".csv", ".tsv", ".json", ".txt", ".xlsx"))
    ]
    below = {entry.name: len(os.listdir(entry)) for entry in entries if entry.is_dir() and not is_hidden(entry.name)}
    return images, below, lists


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
