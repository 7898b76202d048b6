"""Images and label maps, opened by their content, each error naming its file."""

from __future__ import annotations

import contextlib
import os
import struct
import warnings
from collections.abc import Iterable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from e3va_peft.errors import UserError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats that are opened, whatever a file is called. Of Pillow's others, EPS would start Ghostscript."""
# what Pillow raises of damaged files
_DAMAGE = (ArithmeticError, EOFError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # which may be made an error
_SCALES = {"L;2": 85, "L;4": 17}  # which Pillow makes 8 bits of
_DARK = 2**14  # values of 16 bits, all below a quarter of the range
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def outside(paths: Iterable[str], folders: Iterable[str | Path]) -> list[str]:
    """List the paths that lie in none of some folders, neither as they are written nor with all links followed.

    Links in the folders are the user's own, and so may lead out of them.
    """
    paths, folders = list(paths), list(folders)
    places = dict.fromkeys(map(os.path.dirname, paths), False)  # one look for each, not for each of their files
    for follow in (os.path.abspath, os.path.realpath):
        within = [Path(follow(folder)) for folder in folders]
        for place in (place for place, inside in places.items() if not inside):
            places[place] = any(Path(follow(place)).is_relative_to(folder) for folder in within)
    return [path for path in paths if not places[os.path.dirname(path)]]


def pictures_in(folder: str | Path) -> list[Path]:
    """List the images below a folder, but hidden ones. Links are followed, and a folder is looked into once."""
    found, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not is_hidden(name)]
        found += [Path(place, name) for name in files if is_picture(name)]
    return sorted(found)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not the user's: `._a.jpg` of macOS, `.ipynb_checkpoints`, `__MACOSX`."""
    return name.startswith((".", "__"))


def is_picture(name: str) -> bool:
    """Whether a file is an image by its name, and not a hidden one."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")


def open_image(item: dict[str, Any], where: str) -> Image.Image:
    """Open an image as 8-bit RGB, turned as its EXIF tag says.

    Greyscale of 16 bits, and of 32, which must hold no more, is scaled from 0..65535 to 0..255, where PIL's own
    conversion would clip it to white.

    Args:
        item: `{"path": ...}` or `{"bytes": ...}`.
        where: What to call it in an error.

    Raises:
        UserError: It cannot be read as an image.
    """
    return open_upright(item, where)[0]


def open_upright(item: dict[str, Any], where: str) -> tuple[Image.Image, tuple[int, int] | None]:
    """Open an image as `open_image` does, with its height and width as stored if its EXIF tag turned it.

    Raises:
        UserError: It cannot be read as an image.
    """
    file, raw, turn = _open(item, where), None, 1
    with contextlib.suppress(Exception):  # a broken EXIF block says nothing about the pixels
        turn = file.getexif().get(ExifTags.Base.Orientation, 1)
    image = _loaded(file, where)
    with contextlib.suppress(Exception):
        if turn in range(2, 9):  # of a TIFF, Pillow turns the pixels and drops the tag
            image = ImageOps.exif_transpose(image)
            raw = image.size if turn > 4 else image.size[::-1]  # 5 to 8 swap height and width
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(
                f"{where}: has values from {values.min()} to {values.max()}, not 8 or 16 bits. Convert it to one."
            )
        if 0 < values.max() < _DARK:
            _warn_of_dark_images()
        image = Image.fromarray((values // 257).astype(np.uint8))
    if image.mode == "F":
        raise UserError(f"{where}: has floating-point values, whose range is unknown. Convert it to 8 or 16 bits.")
    return image.convert("RGB"), raw


@cache
def _warn_of_dark_images() -> None:
    """Warn, once, of greyscale images that use a small part of their 16 bits."""
    warnings.warn(
        f"greyscale images of 16 bits hold no value above {_DARK - 1} of 65535, as of a camera of 12 or 14 bits: "
        "they are read as nearly black. Stretch all images to 65535 by one factor, or save them in 8 bits.",
        stacklevel=2,
    )


def open_label_map(item: dict[str, Any], where: str) -> np.ndarray:
    """Open a label map: one class id per pixel, `(H, W)` int64, from an 8-bit, 16-bit or palette image.

    Of a palette image the indices are the classes, as in Pascal VOC, not the colours.

    Raises:
        UserError: It cannot be read, or has colours.
    """
    file = _open(item, where)
    stored = file.tile[0].args if file.tile else ""
    scale = _SCALES.get(str(stored[0] if isinstance(stored, tuple) and stored else stored), 1)
    image = _loaded(file, where)
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        raise UserError(
            f"{where}: is a {image.mode} image; a label map has one number per pixel. Save class ids as an 8-bit "
            "greyscale or palette PNG, not colours. Or are data.images and data.masks swapped?"
        )
    return np.asarray(image).astype(np.int64) // scale


def check_size(
    image: Image.Image, raw: tuple[int, int] | None, where: str, size: tuple[int, ...], where_label: str, what: str
) -> None:
    """Raise a UserError if a label was made for an image of another size, or nobody can say for which way up."""
    if size == image.size[::-1]:
        if size == raw:
            raise UserError(
                f"{where_label}: its image {where} is turned by its EXIF tag, and nothing says whether the {what} is. "
                "Turn the pixels to fit, and drop the tag."
            )
        return
    why = f"Export the {what} in the size of its image."
    if size == raw:
        why = f"The image is rotated by its EXIF tag, the {what} is not: rotate the pixels, drop the tag."
    raise UserError(
        f"{where_label}: is {size[1]} x {size[0]} pixels, its image {where} {image.width} x {image.height}. {why}"
    )


def _open(item: dict[str, Any], where: str) -> ImageFile.ImageFile:
    data = item.get("bytes")
    try:
        image = Image.open(BytesIO(data) if data is not None else item["path"], formats=FORMATS)
    except FileNotFoundError:
        raise UserError(f"{where}: is not there any more. Restore it, or remove its row or label map.") from None
    except (*_DAMAGE, *_BOMBS) as error:
        hint = f", save it as one of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else ""
        raise UserError(f"{where}: cannot be read as an image ({error}). Replace it{hint}, or remove it.") from None
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:  # before any of them is decoded
        image.close()
        raise UserError(
            f"{where}: has {image.width} x {image.height} pixels, more than the {most} that are decoded. Resize it, "
            "or cut it into tiles."
        )
    return image


def _loaded(image: Image.Image, where: str) -> Image.Image:
    try:
        image.load()
    except _DAMAGE as error:
        image.close()
        raise UserError(f"{where}: is cut short or corrupt ({error}). Replace it, or remove it.") from None
    return image
