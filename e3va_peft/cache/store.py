"""A folder of frozen passes: written once, read by many, whole after every crash."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import RawIOBase
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock, Timeout

from e3va_peft.errors import UserError
from e3va_peft.files import FULL_DISK, is_draft, write_whole

FORMAT = 3
IDENTITY, INDEX, LOCK = "cache.json", "index.bin", ".lock"
_FEWER = "Take fewer views, a storage of fewer bytes (int8, int4), or one tap a block (taps=('block',))."
# One line of the index. `check` is the CRC-32 of what stands before it: a line that is cut short is not one.
_LINE = np.dtype(
    [
        ("offset", "<u8"),
        ("file", "<u4"),
        ("row", "<u4"),
        ("rest", "<u4"),
        ("crc", "<u4"),
        ("source", "<u4"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("check", "<u4"),
    ]
)


class Store:
    """Records in a folder, by number.

    A record is a row of bytes, the frozen pass, and the rest of an example. It goes to the end of a file of its
    process, and only then into the index, so that whatever stops a process leaves whole records only.

    Args:
        folder: The folder; it is made where there is none.
        identity: Everything that decides what is in the records, by name.
        count: Number of records.

    Raises:
        UserError: The folder holds something else, or records of another identity.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], count: int) -> None:
        self.folder, self.count = folder, count
        self._index: np.ndarray[Any, Any] | None = None
        self._data: dict[int, np.memmap[Any, Any]] = {}
        # Shared: which records were checked is known to every worker, those of later epochs among them.
        self._seen = torch.zeros(count, dtype=torch.uint8).share_memory_()
        self._lock: FileLock | None = None
        self._writer: tuple[BinaryIO, RawIOBase] | None = None  # the file of this process, the index
        identity = json.loads(json.dumps({"format": FORMAT, **identity}))
        own = folder / IDENTITY
        if not own.is_file():
            if folder.exists() and not (folder.is_dir() and all(_is_begun(path) for path in folder.iterdir())):
                raise UserError(f"folder={str(folder)!r}: is not empty and holds no cache. Choose another folder.")
            with self._full_disk_explained():
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(folder / INDEX, bytes(_LINE.itemsize * count))
                write_whole(own, json.dumps(identity, indent=1).encode())
        try:
            found = json.loads(own.read_text(encoding="utf-8"))
        except ValueError as error:
            raise self._damaged(IDENTITY) from error
        if not isinstance(found, dict):
            raise self._damaged(IDENTITY)
        _check_identity(folder, found, identity)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_index": None, "_data": {}, "_lock": None, "_writer": None}

    @property
    def index(self) -> np.ndarray[Any, Any]:
        """The index, which shows what any process writes."""
        if self._index is None:
            try:
                self._index = np.memmap(self.folder / INDEX, dtype=_LINE, mode="r", shape=(self.count,))
            except (OSError, ValueError) as error:  # it is gone, or cut short
                raise self._damaged(INDEX) from error
        return self._index

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"folder={str(self.folder)!r}: {what} is damaged. Remove the folder: the cache is made again."
        )

    def missing(self) -> list[int]:
        """Return the numbers of the records that are not there."""
        return [i for i, line in enumerate(np.array(self.index)) if not _is_whole(line)]

    def sizes(self) -> dict[tuple[int, int], int]:
        """Return the sizes (H, W) of the images, and the number of a record of each."""
        found: dict[tuple[int, int], int] = {}
        for i, line in enumerate(np.array(self.index)):
            if _is_whole(line):
                found.setdefault((int(line["height"]), int(line["width"])), i)
        return found

    def source(self, number: int) -> int:
        """Return the checksum of the image that a record was made from."""
        return int(self.index[number]["source"])

    def lock(self) -> None:
        """Take the folder for writing; the system gives it back when the process ends, however it does.

        Raises:
            UserError: Another run writes it.
        """
        self._lock = FileLock(self.folder / LOCK, timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            self._lock = None
            raise UserError(
                f"folder={str(self.folder)!r}: another run is filling this cache. Wait until it is done, or choose "
                "another folder."
            ) from None

    def write(
        self, number: int, row: Any, rest: bytes, source: int, size: tuple[int, int], file: int = 0,
        limit: int | None = None,
    ) -> None:  # fmt: skip
        """Write a record.

        Args:
            number: Its number.
            row: Its row, as bytes.
            rest: The rest of the example.
            source: Checksum of the image.
            size: (H, W) of the image.
            file: Number of the process.
            limit: Bytes that the records of all processes may have; looked at a thousand times.

        Raises:
            UserError: The disk is full, or there would be more bytes. What was written before is whole.
        """
        row = memoryview(row).cast("B")
        with self._full_disk_explained():
            data, index = self._writer = self._writer or self._open(file)
            offset = data.tell()
            if limit is not None and number % (self.count // 1000 or 1) == 0:
                there = sum(int(self.index[part].sum(dtype=np.int64)) for part in ("row", "rest"))
                if there + len(row) + len(rest) > limit:
                    raise UserError(
                        f"limit={limit}: reached after {np.count_nonzero(self.index['row'])} of {self.count} records; "
                        f"images of {size[0]}x{size[1]} px take {len(row) + len(rest)} bytes each. {_FEWER}"
                    )
            data.write(row)
            data.write(rest)
            data.flush()
            crc = zlib.crc32(rest, zlib.crc32(row))
            line = np.array((offset, file, len(row), len(rest), crc, source, *size, 0), dtype=_LINE)
            line["check"] = _check(line)
            index.seek(number * _LINE.itemsize)
            index.write(line.tobytes())

    @contextmanager
    def _full_disk_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            done = self.count - len(self.missing()) if (self.folder / INDEX).is_file() else 0
            raise UserError(
                f"folder={str(self.folder)!r}: the disk is full after {done} of {self.count} records. Make room and "
                "start again: it continues from there."
            ) from None

    def _open(self, file: int) -> tuple[BinaryIO, RawIOBase]:
        own = [line for line in np.array(self.index) if line["file"] == file and _is_whole(line)]
        end = max((int(line["offset"]) + int(line["row"]) + int(line["rest"]) for line in own), default=0)
        data = open(self.folder / f"data-{file}.bin", "ab")  # noqa: SIM115  kept open until `close`
        data.truncate(end)  # what a crash left behind the last whole record
        data.seek(end)
        return data, open(self.folder / INDEX, "r+b", buffering=0)

    def close(self) -> None:
        """Finish writing.

        Raises:
            UserError: The disk is full.
        """
        try:
            with self._full_disk_explained(), ExitStack() as opened:
                for file in self._writer or ():
                    opened.callback(file.close)
                    os.fsync(file.fileno())
        finally:
            if self._lock is not None:
                self._lock.release()
            self._writer = self._lock = None

    def read(self, number: int) -> tuple[np.ndarray[Any, Any], bytes]:
        """Return a record: its row, and the rest of the example.

        Raises:
            UserError: It is damaged, which is looked at when it is read for the first time.
        """
        line = self.index[number]
        row, rest, offset, file = int(line["row"]), int(line["rest"]), int(line["offset"]), int(line["file"])
        if file not in self._data:
            try:
                self._data[file] = np.memmap(self.folder / f"data-{file}.bin", dtype=np.uint8, mode="r")
            except (OSError, ValueError) as error:  # it is gone, or empty
                raise self._damaged(f"data-{file}.bin") from error
        data = self._data[file]
        record = np.array(data[offset : offset + row + rest])
        if not self._seen[number]:
            if len(record) < row + rest or zlib.crc32(record.data) != line["crc"] or not _is_whole(line):
                raise self._damaged(f"record {number}")
            self._seen[number] = 1
        return record[:row], record[row:].tobytes()

    def check_room(self, record: int, limit: int | None) -> bool:
        """Refuse records that cannot fit, before the first is written; True where they can.

        Args:
            record: Bytes of a record.
            limit: Bytes that the cache may have.

        Raises:
            UserError: The records that are missing need more than there is.
        """
        need, left = record * self.count, record * len(self.missing())
        if limit is not None and need > limit:
            raise UserError(
                f"limit={limit}: {self.count} records of {record / 1e6:.2f} MB are {need / 1e9:.2f} GB. {_FEWER}"
            )
        if (free := shutil.disk_usage(self.folder).free) < left:
            raise UserError(
                f"folder={str(self.folder)!r}: records need {left / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free. "
                f"Choose a folder on another disk. {_FEWER}"
            )
        return True


def _is_begun(path: Path) -> bool:
    """Whether a file is what a process leaves that is stopped before a store has its identity."""
    return path.name == INDEX or is_draft(path, INDEX, IDENTITY)


def _is_whole(line: Any) -> bool:
    """Whether a line of the index tells of a record, as it was written."""
    return bool(line["row"]) and _check(line) == line["check"]


def _check(line: Any) -> int:
    return zlib.crc32(line.tobytes()[: -_LINE["check"].itemsize])


def _check_identity(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse records that were made by something else."""
    differ = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if differ:
        sides = "; ".join(f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} here" for name in differ)
        raise UserError(
            f"folder={str(folder)!r}: its records were made from something else ({sides}). Choose another folder, or "
            "remove this one: the cache is made again."
        )
