"""`cached`: a dataset whose frozen passes are read instead of computed."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
import weakref
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm.auto import tqdm
from transformers import default_data_collator

from e3va_peft.cache.layout import STORAGES
from e3va_peft.cache.rest import comparable, from_bytes, to_bytes
from e3va_peft.cache.store import Store
from e3va_peft.cache.taking import RECORD, Taker
from e3va_peft.errors import UserError
from e3va_peft.files import cache_home, number_of_bytes
from e3va_peft.hooks import PLACEHOLDERS

LOOKED_AT = 4  # examples that are made again to see whether a cache that exists is still of this dataset
_WORKERS = 256  # places of a loader's workers, each to count for itself


def cached(
    dataset: Dataset[Any], model: nn.Module, *, views: int = 1, folder: str | Path | None = None,
    storage: str = "int8", limit: int | str | None = None, seed: int = 0, batch_size: int = 8, num_workers: int = 0,
    image: str | None = None, data_collator: Callable[[list[Any]], Mapping[str, Any]] = default_data_collator,
    autocast: torch.dtype | None = None, key: str = "", types: Sequence[type] = (), one_size: bool = False,
) -> Cached:  # fmt: skip
    """Run the frozen backbone once over a dataset, and return the dataset with what highway and head read of it.

        train = cached(train, model, views=4, folder="cache/train")
        args = TrainingArguments(remove_unused_columns=False, ...)
        Trainer(model, args, train_dataset=train, callbacks=[e3va_peft.training.NextView(train)]).train()

    Training then costs the highway and the head. Random augmentation is drawn `views` times an image and repeats from
    then on: epoch e sees view e mod `views`. Evaluate on a cached dataset of its own, or on the dataset itself.

    Args:
        dataset: Examples are dictionaries that hold the image as the model takes it, (C, H, W), and labels: tensors,
            arrays, numbers, texts, and lists and dictionaries of them.
        model: The adapted model, with one backbone. The records serve every highway that reads the same taps in the
            same way over the same weights, of any rank, seed and learning rate. A model without a highway works too
            where its backbone is frozen but for its output norms (`method: head-only`): its frozen blocks are
            recorded in eval mode, without dropout or drop-path.
        views: How often augmentation is drawn for each image.
        storage: *exact*: as the backbone computes it. *fp16*, *int8*, *int4*: rounded, see `cache.layout.Layout`.
        folder: Where records are kept. Those of the same model and dataset are used, and filled up where a run was
            stopped. "auto": a folder for each model and dataset below `$E3VA_CACHE`, or `~/.cache/e3va_peft`. None: a
            temporary folder, gone with the process.
        limit: Bytes that the records may have, 40 * 2**30 or "40GiB".
        seed: Of the augmentation.
        batch_size: Images that the backbone sees at once. Sizes that differ are not mixed.
        num_workers: Processes that read the dataset meanwhile.
        image: Name of the image in an example; None: the model's `main_input_name`.
        data_collator: Makes the model's arguments of a list of examples.
        autocast: Dtype that the backbone runs in under autocast: that of the training, where results shall be equal.
        key: What the dataset and its transform are, e.g. their version: records of another key are refused. Without
            it, a few examples are looked at to see whether they are still those of the records.
        types: Dataclasses that examples hold.
        one_size: Refuse images of several sizes, before much is computed: a batch of them would have to be padded, and
            what a backbone says of a padded image depends on the others in its batch.

    Raises:
        UserError: The folder holds something else, or has no room; another run fills it; the images have changed; an
            argument is out of range. Nothing is overwritten.
        ValueError: The model has several highways, or none and a backbone that is trained or not known, or weights on
            meta; or the backbone's outputs do not split into images.
    """
    _check(dataset, model, views, storage, batch_size)
    limit = None if limit is None else number_of_bytes("limit", limit)
    image = image or getattr(getattr(model, "base_model", model), "main_input_name", None) or "pixel_values"
    taker = Taker(model, image, storage, data_collator, autocast)
    state, source = PartialState(), Views(dataset, views, seed)
    found = _open(folder, key, source, taker, types, state)
    _fill(found.store, source, taker, (batch_size, num_workers), limit, state, one_size)
    if one_size:
        _refuse_several(found.store.sizes())
    _refuse_changed(found.store, source, taker)
    for size, number in found.store.sizes().items():
        if not taker.knows(size):
            taker.learn(source[number])
    return found


def _open(
    folder: str | Path | None, key: str, source: Views, taker: Taker, types: Sequence[type], state: PartialState
) -> Cached:
    """Open the cache of a dataset and a model, filled or not; a temporary one goes with what is returned."""
    taker.learn(source[0])
    count = len(source.dataset)  # type: ignore[arg-type]
    own = {"dataset": key, "images": count, "views": source.views, "seed": source.seed, "image": taker.image}
    identity = {**taker.fingerprint(), **own}
    temporary = None
    if folder is None:
        if state.num_processes > 1:
            raise UserError("folder=None: several processes share a cache. Name a folder that all of them see.")
        temporary = folder = tempfile.mkdtemp(prefix="e3va-cache-")
    folder = _own_folder(identity, source, taker.image) if folder == "auto" else Path(folder).expanduser()
    with state.main_process_first():
        store = Store(folder, identity, len(source))
    found = Cached(store, source, taker.image, types)
    if temporary is not None:
        weakref.finalize(found, rmtree, temporary, ignore_errors=True)
    return found


class Views(Dataset[Any]):
    """The views of a dataset, one behind the other: example i of view v is number `v * len(dataset) + i`.

    Whatever a dataset draws, an example of a view is always the same.

    Args:
        dataset: The dataset.
        views: Number of views.
        seed: Of what it draws.
    """

    def __init__(self, dataset: Dataset[Any], views: int, seed: int) -> None:
        self.dataset, self.views, self.seed = dataset, views, seed

    def __len__(self) -> int:
        return len(self.dataset) * self.views  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> Any:
        with _seeded(self.seed, number):
            return self.dataset[number % len(self.dataset)]  # type: ignore[arg-type]


class ByEpoch(Dataset[Any]):
    """A dataset that shows one of several views in each epoch: in epoch e view e mod `views`.

    Args:
        source: The views.
    """

    def __init__(self, source: Views) -> None:
        self.views, self._images = source.views, len(source) // source.views
        # Shared, so that workers that persist see them too. The epoch is -1 until somebody says which it is.
        self._epoch = torch.tensor(-1).share_memory_()
        self._processes = PartialState().num_processes
        # Of each image; of several processes, how many images each worker of this one has read.
        places = self._images if self._processes == 1 else _WORKERS
        self._visits = torch.zeros(places, dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return self._images

    def set_epoch(self, epoch: int) -> None:
        """Take the view of an epoch.

        `training.NextView` calls it, and without it the Trainer in one process that begins at the start of an epoch.
        Where nobody does, an image shows its next view each time that it is read; in several processes the view
        follows from how many images this one has read.
        """
        self._epoch.fill_(epoch)

    def number(self, index: int) -> int:
        """Return the number of the view that an image shows now, see `Views`."""
        index = range(len(self))[index]
        epoch = int(self._epoch)
        if epoch < 0 and self._processes == 1:
            epoch = int(self._visits[index])
            self._visits[index] += 1
        elif epoch < 0:
            worker = get_worker_info()
            epoch = int(self._visits.sum()) // -(-len(self) // self._processes)  # each reads as many, so some twice
            self._visits[worker.id % _WORKERS if worker else 0] += 1
        return epoch % self.views * self._images + index


class Repeated(ByEpoch):
    """The views of a dataset, epoch by epoch, drawn each time: what a cached dataset shows, as images."""

    def __init__(self, source: Views) -> None:
        super().__init__(source)
        self.source = source

    def __getitem__(self, index: int) -> Any:
        return self.source[self.number(index)]


class Cached(ByEpoch):
    """A dataset whose examples hold a record of the frozen pass instead of the image. `cached` makes it.

    Args:
        store: The records.
        source: What they were made from.
        image: Name of the image in an example, where a placeholder of its shape stands.
        types: Dataclasses that examples hold.
    """

    def __init__(self, store: Store, source: Views, image: str, types: Sequence[type] = ()) -> None:
        super().__init__(source)
        self.store, self.image, self.types = store, image, types
        PLACEHOLDERS.add(image)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, rest = self.store.read(self.number(index))
        example = from_bytes(rest, self.types)
        example[self.image] = torch.zeros(example[self.image], dtype=torch.bool)
        return {**example, RECORD: torch.from_numpy(row)}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


def _own_folder(identity: Mapping[str, Any], source: Views, image: str) -> Path:
    """Return the folder of records of an identity, and of a few examples: not all datasets have a `key`.

    Raises:
        UserError: The same view of an image is another one when it is drawn again.
    """
    seen, again = ([_seen(source[number], image) for number in _looked_at(source)] for _ in range(2))
    if seen != again:
        raise UserError(
            "dataset: draws from other generators than Python's, NumPy's and PyTorch's own, so that no view is the "
            "same twice. Let its transform draw from these."
        )
    known = json.dumps({**identity, "seen": seen}, sort_keys=True)
    return cache_home() / "frozen" / hashlib.sha256(known.encode()).hexdigest()[:16]


def _seen(example: Mapping[str, Any], image: str) -> list[int]:
    """Return checksums of an example's image and of the rest."""
    return [_checksum(example[image]), zlib.crc32(_rest_of(example, image))]


def _check(dataset: Any, model: nn.Module, views: int, storage: str, batch_size: int) -> None:
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise UserError(f"dataset={type(dataset).__name__}: has no length, or is empty. A cache needs a known number.")
    if views < 1:
        raise UserError(f"views={views}: must be at least 1, for images without augmentation.")
    if storage not in STORAGES:
        raise UserError(f"storage={storage!r}: choose among {STORAGES}.")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size}: must be at least 1.")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"model={type(model).__name__}: {name} has no values, it is on meta. Load the weights in each "
                "process, because each fills its part of the cache: with FSDP, cpu_ram_efficient_loading=False."
            )


class _Numbered(Dataset[Any]):
    """Examples with their numbers."""

    def __init__(self, source: Views, numbers: Sequence[int]) -> None:
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[int, Any]:
        return self.numbers[i], self.source[self.numbers[i]]


def _fill(
    store: Store, source: Views, taker: Taker, loading: tuple[int, int], limit: int | None, state: PartialState,
    one_size: bool,
) -> None:  # fmt: skip
    """Write the records that are missing; each process its share."""
    missing = store.missing()
    state.wait_for_everyone()  # all know what is missing before one of them writes
    if not missing:
        return
    if state.is_main_process:
        store.lock()
    own = missing[state.process_index :: state.num_processes]
    batch_size, workers = loading
    loader: DataLoader[Any] = DataLoader(_Numbered(source, own), batch_size, num_workers=workers, collate_fn=list)
    bar = tqdm(
        total=store.count, initial=store.count - len(missing), unit="image", desc=f"Filling {store.folder}",
        disable=None if state.is_main_process else True,  # None: where nobody looks
    )  # fmt: skip
    fits, sizes = False, dict.fromkeys(store.sizes())
    try:
        with bar:
            for batch in loader:
                sizes |= dict.fromkeys(taker.size(example) for _, example in batch)
                if one_size:
                    _refuse_several(sizes)
                for number, example, row in sorted(_taken(batch, taker), key=lambda record: record[2].size):
                    rest, crc = _rest_of(example, taker.image), _checksum(example[taker.image])
                    fits = fits or store.check_room(len(row) + len(rest), limit)
                    store.write(number, row, rest, crc, taker.size(example), state.process_index, limit)
                    bar.update(state.num_processes)
    finally:
        store.close()
    state.wait_for_everyone()


def _taken(batch: Sequence[tuple[int, Any]], taker: Taker) -> Iterator[tuple[int, Any, Any]]:
    """Iterate over numbers, examples and rows of a batch; images of one size go through the backbone together."""
    groups: dict[tuple[int, int], list[tuple[int, Any]]] = {}
    for number, example in batch:
        groups.setdefault(taker.size(example), []).append((number, example))
    for group in groups.values():
        rows = taker.rows([example for _, example in group])
        for (number, example), row in zip(group, rows, strict=True):
            yield number, example, row.numpy()


class SeveralSizes(UserError):
    """The images have several sizes, and batches need one."""


def _refuse_several(sizes: Collection[tuple[int, int]]) -> None:
    """Refuse images of several sizes.

    Raises:
        SeveralSizes: There are several.
    """
    first, *others = sizes
    if others:
        raise SeveralSizes(
            f"the images have several sizes, {first[0]}x{first[1]} and {others[0][0]}x{others[0][1]} px among them, "
            "and padding them to one changes what a backbone sees. Train from a cache with batches of one image "
            "(per_device_train_batch_size=1, and gradient_accumulation_steps for more), or on images of one size "
            "(augment.crop)."
        )


def _refuse_changed(store: Store, source: Views, taker: Taker) -> None:
    """Make a few examples again, and compare their images with those that the records were made from.

    Raises:
        UserError: One is another.
    """
    for number in _looked_at(source):
        example, index = source[number], number % (len(source) // source.views)
        if _checksum(example[taker.image]) != store.source(number):
            raise UserError(
                f"folder={str(store.folder)!r}: image {index} of the dataset is not what it was when this cache was "
                "made: its file or its transform changed, or the transform draws from other generators than Python's, "
                "NumPy's and PyTorch's own. Choose another folder, or remove this one."
            )
        if comparable(_rest_of(example, taker.image)) != comparable(store.read(number)[1]):
            raise UserError(
                f"folder={str(store.folder)!r}: the labels of image {index} of the dataset, or what else its example "
                "holds, are not what they were when this cache was made. Choose another folder, or remove this one."
            )


def _looked_at(source: Views) -> list[int]:
    """Return the numbers of the examples that are made again."""
    return sorted({round(i * (len(source) - 1) / (LOOKED_AT - 1)) for i in range(LOOKED_AT)})


def _rest_of(example: Mapping[str, Any], image: str) -> bytes:
    """Return an example as bytes, with the shape of its image instead of the image."""
    return to_bytes({**example, image: tuple(example[image].shape)})


def _checksum(image: Any) -> int:
    data = torch.as_tensor(image).detach().cpu().contiguous()
    return zlib.crc32(data.flatten().view(torch.uint8).numpy().data)


@contextmanager
def _seeded(seed: int, number: int) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's generators, and bring them back at the end of a `with` statement."""
    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(own)
            np.random.seed(own)
            torch.default_generator.manual_seed(own)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
