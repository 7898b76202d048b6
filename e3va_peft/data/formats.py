"""Splits of a config's data, found and read by the format that they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np

from e3va_peft.data.classes import read_classes
from e3va_peft.data.coco import find_coco, find_coco_export, read_coco
from e3va_peft.data.config import DataConfig, LabelKind, source_of
from e3va_peft.data.examples import Split
from e3va_peft.data.hub import load_class_folders, load_dataset
from e3va_peft.data.label_maps import find_label_maps, read_label_maps
from e3va_peft.data.splits import choose_eval_split, choose_splits
from e3va_peft.data.tables import read_tables
from e3va_peft.data.voc import find_voc, read_voc, voc_folders
from e3va_peft.data.yolo import find_yolo, read_yolo
from e3va_peft.errors import UserError

Reader: TypeAlias = Callable[
    [DataConfig, LabelKind, Mapping[str, Any], Sequence[str] | None], tuple[dict[str, datasets.Dataset], list[str]]
]
"""The reader of a format: of a config, a kind of labels, the chosen splits as they were found, a model's class names.

It returns tables with the columns `image` and `label`, and the class names that number the labels: the model's where
there is one, else those of the first split, on which is trained.
"""

_EVAL_SEED = 0  # of what is evaluated on: the same for runs of other seeds, whose scores are compared


def load_splits(config: DataConfig, kind: LabelKind, seed: int = 0) -> tuple[Split, Split | None]:
    """Find the images and labels that a config names: to train on, and to evaluate on where there are some.

    Args:
        config: The `data` section of a run.
        kind: Kind of the labels.
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
            parts = rows[train_name].train_test_split(config.eval_fraction, seed=_EVAL_SEED)
        except ValueError:
            raise UserError(
                f"data.eval_fraction={config.eval_fraction}: leaves nothing to train on of {len(rows[train_name])} "
                "examples. Lower it, or use data.eval_split."
            ) from None
        rows = {train_name: parts["train"], eval_name: parts["test"]}
    samples = {train_name: (config.train_samples, seed), eval_name: (config.eval_samples, _EVAL_SEED)}
    splits = {name: _split(config, kind, name, part, labels, *samples[name]) for name, part in rows.items()}
    return splits[train_name], splits.get(eval_name or "")


def load_eval_split(config: DataConfig, kind: LabelKind, labels: Sequence[str]) -> Split | None:
    """Find what a config evaluates a model on; what it trains on need not be there.

    Args:
        config: The `data` section of a run.
        kind: Kind of the labels.
        labels: The model's class names in the order of their ids. Those of the data are matched by name.

    Returns:
        The split; None where the config has none to evaluate on.

    Raises:
        UserError: Nothing is there, the split is empty, or it has a class that the model does not know.
    """
    if config.eval_fraction is not None:
        return load_splits(config, kind)[1]
    found, read = _find(config, kind)
    name = choose_eval_split(config, found)
    if name is None:
        return None
    rows, names = read(config, kind, {name: found[name]}, labels)
    return _split(config, kind, name, rows[name], names, config.eval_samples, _EVAL_SEED)


def _find(config: DataConfig, kind: LabelKind) -> tuple[dict[str, Any], Reader]:
    """Find the splits of a config's data, and the reader of their format."""
    if kind == "class":
        return load_class_folders(config) or load_dataset(config), read_classes
    if kind == "label-map":
        return find_label_maps(config), read_label_maps
    if config.annotations is not None:
        return find_coco(config), read_coco
    exported = find_coco_export(config)
    if exported:
        return exported, read_coco
    folders = voc_folders(Path(str(config.source)))
    if folders:
        return find_voc(config, folders), read_voc
    described = find_yolo(config)
    if described:
        return described, read_yolo
    return load_dataset(config), read_tables


def _split(
    config: DataConfig,
    kind: LabelKind,
    name: str,
    rows: datasets.Dataset,
    labels: Sequence[str],
    limit: int | None,
    seed: int,
) -> Split:
    title, sample = f"{source_of(config)}, {name}", _sample(rows, limit, seed)
    return Split(title, sample, tuple(labels), kind, config.reduce_labels, config.ignore_index)


def _sample(rows: datasets.Dataset, limit: int | None, seed: int) -> datasets.Dataset:
    if limit is None or limit >= len(rows):
        return rows
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:limit])
    return rows.select(chosen.tolist())
