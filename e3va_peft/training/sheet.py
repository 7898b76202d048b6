"""Contact sheet of predictions: one page with every picture, what was found in it, and a legend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from e3va_peft.files import write_whole
from e3va_peft.training.drawing import palette

_PAGE = Path(__file__).with_name("sheet.html.jinja")
_SHOWN = 3  # classes of an image


def write_sheet(path: Path, entries: Sequence[Mapping[str, Any]], labels: Sequence[str], title: str) -> None:
    """Write a page that needs no network and may be sent along with the folder that it is in.

    Args:
        path: The page; the pictures are below its folder.
        entries: As in `predictions.json`: `file`, `overlay`, and `predictions`, `shares`, `objects` or `error`.
        labels: Class names in the order of their ids.
        title: What made the predictions.
    """
    names = Counter(Path(entry["file"]).name for entry in entries)
    named = {name for entry in entries for name in _names(entry)}
    colors = dict(zip(labels, palette(len(labels)).tolist(), strict=True))
    several = len(labels) > 1 and not any("predictions" in entry for entry in entries)  # else no colour means a class
    text = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(_PAGE.read_text(encoding="utf-8")).render(
        title=title,
        about=f"{len(entries)} image{'s' * (len(entries) != 1)}. A click opens a picture.",
        legend=[(name, f"rgb{tuple(colors[name])}") for name in labels if name in named] if several else [],
        pictures=[
            {
                "name": _name(Path(entry["file"]), names),
                "link": _link(entry["overlay"], path) if "overlay" in entry else "",
                "error": entry.get("error", ""),
                "found": _found(entry),
            }
            for entry in entries
        ],
    )  # fmt: skip
    write_whole(path, text)


def _name(file: Path, names: Mapping[str, int]) -> str:
    return file.name if names[file.name] == 1 else f"{file.parent.name}/{file.name}"


def _link(file: str, page: Path) -> str:
    return quote(Path(file).relative_to(page.parent).as_posix())


def _names(entry: Mapping[str, Any]) -> set[str]:
    return {*entry.get("shares", ()), *(found["label"] for found in entry.get("objects", ()))}


def _found(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say what is in an image: classes with their probability, their share of the pixels, or how many of them."""
    if "predictions" in entry:
        return [(found["label"], f"{100 * found['score']:.0f} %") for found in entry["predictions"][:_SHOWN]]
    if "shares" in entry:
        most = sorted(entry["shares"].items(), key=lambda item: -item[1])[:_SHOWN]
        return [(name, f"{100 * share:.0f} %") for name, share in most]
    counts = Counter(found["label"] for found in entry.get("objects", ())).most_common()
    return [(name, str(count)) for name, count in counts] or (
        [("nothing above the threshold", "")] if "objects" in entry else []
    )
