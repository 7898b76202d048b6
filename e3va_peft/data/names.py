"""Names of classes: a config's, a dataset's and a model's, brought together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from e3va_peft.data.config import DataConfig, source_of
from e3va_peft.errors import UserError, read_text

_SPARSE = 1000  # classes for each that occurs from which a label is taken for a mistake


def class_names(config: DataConfig, known: Sequence[str] | None) -> list[str] | None:
    """Choose the class names: those of the config, else those of the dataset, else None.

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
    """Match the classes of a dataset to a model's: by name, or by order where `data.labels` renames them.

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
    config: DataConfig,
    known: Mapping[str, Sequence[str] | None],
    model: Sequence[str] | None,
    labels: Sequence[str],
) -> dict[str, Sequence[str] | None]:
    """Name the numbers of each split's labels; None where a split has no names.

    Args:
        config: Where the data is. Its labels may rename those of the split that is trained on, in their order.
        known: The splits' own names, those of the one that is trained on first.
        model: A model's, which stand for those of the split that is trained on.
        labels: The names of the classes, all in all.

    Raises:
        UserError: A split has a class that is not among them.
    """
    first, named = next(iter(known.values())), dict(known)
    for split, classes in known.items():
        where = f"{source_of(config)}, split {split!r}"
        if classes is not None and model is not None:
            named[split] = match_names(config, classes, model, where)
        elif classes is not None and config.labels is not None:
            renamed = dict(zip(first if first is not None else labels, labels, strict=True))
            if odd := [name for name in classes if name not in renamed]:
                raise UserError(
                    f"{where}: has the classes {odd[:10]}, which the split that is trained on does not have; it has "
                    f"{list(renamed)[:10]}. Rename or remove them."
                )
            named[split] = [renamed[name] for name in classes]
    return named


def names_of(seen: Iterable[Any]) -> list[str] | None:
    """Derive class names from all labels of a split: sorted names, or numbers up to the largest; None of others.

    Raises:
        UserError: Of the numbers up to the largest nearly none occurs.
    """
    values = {value for value in seen if value is not None}
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    if all(isinstance(value, int) for value in values):
        count = max(values) + 1
        if count > _SPARSE * len(values):
            raise UserError(
                f"the labels are {len(values)} different numbers up to {max(values)}, which would be {count} classes. "
                f"Number the classes from 0, or give data.labels: {count} if that is what they are."
            )
        return [str(i) for i in range(count)]
    return None


def refuse_names(labels: Sequence[str], least: int) -> None:
    """Raise a UserError unless class names are all different, and at least this many."""
    if len(labels) < least or len(set(labels)) != len(labels):
        number = {1: "one", 2: "two"}[least]
        raise UserError(f"data.labels={list(labels)!r}: must be {number} or more names, all different.")


def refuse_alike(labels: Iterable[str], source: str) -> None:
    """Raise a UserError where names that were found, such as those of folders, differ in capitals or spaces alone."""
    seen: dict[str, str] = {}
    for name in labels:
        other = seen.setdefault("".join(name.casefold().split()), name)
        if other != name:
            raise UserError(
                f"{source}: has the classes {other!r} and {name!r}, perhaps one in two spellings. Give both the same "
                "name, or data.labels with both if they are two."
            )


def class_id(value: Any, own: Sequence[str] | None, labels: Mapping[str, int], where: str) -> int:
    """Find the id of a class that a dataset gives by number or name.

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
    if value is None:
        raise UserError(f"{where}: has no label (in a CSV, None, NA and null mean that). Fill it in, or leave it out.")
    if named is value and isinstance(value, int) and labels.get(str(value), value) != value:
        raise UserError(
            f"{where}: has the label {value}, and class {labels[str(value)]} is called '{value}', counted from 0. "
            "Store labels as text where they are names, or name the classes otherwise by data.labels, in the order of "
            "their numbers."
        )
    if not isinstance(number, int) or not 0 <= number < len(labels):
        raise UserError(
            f"{where}: has the label {named!r}, not one of the {len(labels)} classes {list(labels)[:20]}. Add it to "
            "data.labels, or remove it; -1 means that the split has no labels."
        )
    return int(number)


def _given_labels(given: list[str | int] | str | int) -> list[str]:
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
