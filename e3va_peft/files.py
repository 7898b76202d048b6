"""Files: written whole, sizes that people write, and the folder of everything that can be made again."""

from __future__ import annotations

import errno
import io
import os
import re
from pathlib import Path
from typing import Any

from e3va_peft.errors import UserError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors that a full disk, a quota and a limit on the size of files give."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it, so that it is there whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the name without the content
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def save_figure(figure: Any, path: Path, **options: Any) -> None:
    """Save a figure of matplotlib as a PNG, whole or not at all; further options are those of `savefig`."""
    content = io.BytesIO()
    figure.savefig(content, format="png", **options)
    write_whole(path, content.getvalue())


def is_draft(path: Path, *names: str) -> bool:
    """Whether a file is what `write_whole` leaves of a file of one of these names where its process is killed."""
    match = re.fullmatch(r"\.(.+)\.\d+", path.name)
    return match is not None and match[1] in names


def number_of_bytes(name: str, value: int | str) -> int:
    """Return a number of bytes that is given as such, or as a text with a unit: 40GiB, 500 MB.

    Raises:
        UserError: It is not one. The message begins with its `name`.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?\s*", str(value), re.IGNORECASE)
    count = float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper()) if match else 0
    count = value if isinstance(value, int) else count
    if count < 1:
        raise UserError(f"{name}={value!r}: must be a number of bytes with a unit, e.g. 40GiB or 500MB.")
    return int(count)


def cache_home() -> Path:
    """Return the folder of what is kept between runs and can be made again: $E3VA_CACHE, or ~/.cache/e3va_peft."""
    return Path(os.environ.get("E3VA_CACHE") or "~/.cache/e3va_peft").expanduser()


def refuse_links(folder: Path) -> None:
    """Refuse an adapter whose files are links to elsewhere; in the Hub's cache they are links into its blobs.

    Raises:
        ValueError: One is; the message names it and where it leads.
    """
    root = folder.resolve()
    allowed = [root, *(path.parents[1] / "blobs" for path in (root, *root.parents) if path.parent.name == "snapshots")]
    for file in sorted(folder.iterdir()):
        target = file.resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise ValueError(
                f"{file}: is a link to {target}, outside of the adapter's folder, and is not followed. Copy the file "
                "there, if it is the adapter's."
            )
