"""Errors that a user can fix, and what their messages are made of."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable
from pathlib import Path


class UserError(ValueError):
    """Error that a user can fix: the message names the argument or file, its value and the remedy."""


def reason(error: Exception) -> str:
    """Return the first line of what another library's error says, to be quoted in a `UserError`."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(value: str, names: Iterable[str]) -> str:
    """Return ` Did you mean ...?` with the names most like a mistyped one; nothing where none is."""
    close = difflib.get_close_matches(value, list(names), n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def read_text(path: Path) -> str:
    """Read a text file, UTF-8 with or without a byte order mark.

    Raises:
        UserError: It is in another encoding, or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}). Save it as UTF-8.") from None


class MissingExtra(ModuleNotFoundError):
    """Error of a room whose packages are not installed: the message names them and the install line."""


def require_train(room: str) -> None:
    """Refuse to import a room of the extra `train` where its packages are not installed.

    Raises:
        MissingExtra: One is missing.
    """
    needed = "faster_coco_eval matplotlib PIL psutil rich ruamel scipy torchmetrics torchvision"
    if missing := [package for package in needed.split() if importlib.util.find_spec(package) is None]:
        raise MissingExtra(f'{room} needs {", ".join(missing)}: pip install "e3va_peft[train]"', name=missing[0])
