"""Errors that a user can fix, what their messages are made of, and the check of a config's fields."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin

from huggingface_hub.dataclasses import type_validator


class UserError(ValueError):
    """Error that a user can fix: the message names the argument or file, its value and the remedy."""


def reason(error: Exception) -> str:
    """Return the first line of what another library's error says, to be quoted in a `UserError`."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(value: str, names: Iterable[str]) -> str:
    """Return ` Did you mean ...?` with the names most like a mistyped one; nothing where none is."""
    close = difflib.get_close_matches(value, list(names), n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def one_of(value: Any, names: Iterable[str]) -> str:
    """Return `must be one of ...`, and with it the names most like a mistyped one."""
    names = list(names)
    return f"must be one of {', '.join(names)}.{nearest(str(value), names)}"


def shown(names: Sequence[str], most: int = 3) -> str:
    """List the first names, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Iterate over an error and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


Rule: TypeAlias = tuple[Callable[[Any], bool], str]
"""Whether a value other than None can work, and the end of the message if not: what it must be."""

_ANY: Rule = (lambda value: True, "")


def check_fields(config: Any, section: str, rules: Mapping[str, Rule], error: type[ValueError] = UserError) -> None:
    """Check the values of a dataclass by the types of its fields, where these are not text, and by rules.

    Raises:
        ValueError: A value cannot work. It is an `error`, and names the value with the section in front.
    """
    for field in dataclasses.fields(config):
        value, rule = getattr(config, field.name), rules.get(field.name, _ANY)
        check_value(f"{section}{field.name}", value, field.type, rule, error)


def check_value(name: str, value: Any, kind: Any, rule: Rule = _ANY, error: type[ValueError] = UserError) -> None:
    """Check one value by its type and, if it is not None, by a rule. See `check_fields`."""
    works, must = rule
    try:
        type_validator(name, value, kind)
        if value is None or works(value):
            return
    except TypeError:
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        words = inspect.formatannotation(kind).replace(" | None", "").replace(" | ", " or ")
        must = must or (one_of(value, choices) if choices else f"must be {words}.")
    raise error(f"{name}={value!r}: {must}")


def refuse_no_path(field: str, value: str) -> None:
    """Refuse what can only be meant as a path, and is none, before it is looked for on the Hub.

    That is what begins as a path does, has more parts than an id, or is in a folder that is there: an id `runs/x` of
    somebody else's must not stand in for the run that is not there.

    Raises:
        UserError: There is no such file or folder.
    """
    path = Path(value).expanduser()
    if path.exists():
        return
    is_id = not value.startswith((".", "/", "~")) and value.count("/") <= 1
    if is_id and not (len(path.parts) > 1 and path.parent.is_dir()):
        return
    hint = f" If the Hub's {value} is meant, go where there is no folder {path.parent}." if is_id else ""
    raise UserError(f"{field}={value!r}: no such file or folder (from {Path.cwd()}).{hint}")


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
    needed = "faster_coco_eval matplotlib PIL psutil rich ruamel scipy torchmetrics torchvision typer"
    if missing := [package for package in needed.split() if importlib.util.find_spec(package) is None]:
        raise MissingExtra(f'{room} needs {", ".join(missing)}: pip install "e3va_peft[train]"', name=missing[0])
