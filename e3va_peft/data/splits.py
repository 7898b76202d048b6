"""Splits by name: which is trained on, which is evaluated on, and what may be in neither or both."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence, Sized
from typing import Any

from e3va_peft.data.config import DataConfig, source_of
from e3va_peft.errors import UserError

TRAIN = ("train", "training")
EVAL = ("validation", "val", "valid", "test", "testing")


def choose_splits(config: DataConfig, found: Mapping[str, Any]) -> tuple[str, str | None]:
    """Choose the splits to train and to evaluate on: the config's, or those of the usual names.

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
    """Choose the split to evaluate on: the config's, or the one of a usual name; None where there is none.

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


def refuse_overlap(chosen: Mapping[str, Sequence[Hashable]]) -> None:
    """Raise a UserError if an image of an evaluation split is in the first, which is trained on."""
    (train_name, trained), *others = chosen.items()
    for name, entries in others:
        both = set(entries) & set(trained)
        if both:
            raise UserError(
                f"data.eval_split={name!r}: {len(both)} of its {len(entries)} images are trained on, in "
                f"{train_name!r}. Choose another, e.g. test, or train on train."
            )
