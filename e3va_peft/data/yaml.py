"""YAML as users write it: configs of runs and of YOLO datasets."""

from __future__ import annotations

from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.tokens import AliasToken

from e3va_peft.errors import UserError

_HINT = "Indent with spaces, not tabs; text that begins with {, [ or * or holds a colon goes in quotes."
_ALIASES = 10  # of a file: each may stand for others, so that a few dozen of them stand for billions of values


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML 1.2: `1e-3` is a number, `no` is text.

    Args:
        text: The YAML.
        where: Name of the file, for messages.

    Raises:
        UserError: It is not valid, gives a key twice, or has too many aliases.
    """
    try:
        aliases = sum(isinstance(token, AliasToken) for token in YAML(typ="safe", pure=True).scan(text))
        if aliases > _ALIASES:
            raise UserError(
                f"{where}: has {aliases} aliases (*name), and at most {_ALIASES} are read. Write them out."
            )
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, RecursionError) as error:
        if hasattr(error, "note"):
            error.note = None  # how to allow keys that are given twice
        raise UserError(f"{where}: is not valid YAML: {error}. {_HINT}") from None
