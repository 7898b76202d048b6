"""Pictures of predictions: label maps and objects over their image, with outlines, and a legend of the classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from e3va_peft.data.objects import Detections, Objects, decode_mask

_OPACITY = 0.45
_FONT = "DejaVu Sans"  # which matplotlib brings along
# Petroff's ten (arXiv 2107.02270), told apart with any colour vision, in an order in which neighbours differ most.
_COLORS = ("3f90da", "ffa90e", "bd1f01", "94a4a2", "832db6", "a96b59", "e76300", "b9ac70", "717581", "92dadd")
_WHITE = (255, 255, 255)


def palette(count: int) -> np.ndarray:
    """Return colours for classes, `(count, 3)` uint8: ten, and their tints and shades from the eleventh on."""
    base = np.array([list(bytes.fromhex(color)) for color in _COLORS], dtype=float)
    ids = np.arange(count)
    level = ids // len(base)
    share = ((level * 0.618) % 1 * 0.6)[:, None]  # of white or, at every other level, of black
    colors = base[(ids + 3 * level) % len(base)] * (1 - share) + 255 * share * (level % 2)[:, None]
    return colors.round().astype(np.uint8)


def draw_class(image: Image.Image, label: int, score: float, labels: Sequence[str]) -> Image.Image:
    """Write the class of an image and its probability below it.

    Args:
        image: RGB.
        label: Id of the class.
        score: 0 to 1.
        labels: Class names in the order of their ids.
    """
    return _with_legend(image, {f"{labels[label]} {score:.2f}": tuple(palette(len(labels))[label].tolist())})


def draw_regions(image: Image.Image, ids: np.ndarray, labels: Sequence[str]) -> Image.Image:
    """Draw a label map over its image: a tint and a thin outline for each region, and a legend below.

    Args:
        image: RGB.
        ids: `(H, W)`, class ids.
        labels: Class names in the order of their ids.
    """
    colors = palette(len(labels))
    drawn = np.asarray(Image.blend(image, Image.fromarray(colors[ids]), _OPACITY)).copy()
    drawn[_edges(ids, _line(image))] = _WHITE
    return _with_legend(Image.fromarray(drawn), {labels[i]: tuple(colors[i].tolist()) for i in np.unique(ids)})


def draw_objects(image: Image.Image, objects: Detections | Objects, labels: Sequence[str]) -> Image.Image:
    """Draw boxes, masks where there are any, and the names of the classes if there are several.

    One class: each object in a colour of its own. Several classes: one colour for each class. Where masks overlap, the
    one with the higher score is seen, of annotated ones the first.

    Args:
        image: RGB, of the size that the objects are given in.
        objects: Found or annotated.
        labels: Class names in the order of their ids.
    """
    colors = [tuple(color) for color in palette(max(len(labels), len(objects))).tolist()]
    chosen = [colors[label if len(labels) > 1 else i] for i, label in enumerate(objects.labels.tolist())]
    order = np.argsort(-objects.scores, kind="stable") if isinstance(objects, Detections) else np.arange(len(objects))
    drawn = image.copy()
    if objects.masks is not None and len(objects):
        drawn = _with_masks(image, [decode_mask(mask) for mask in objects.masks], chosen, order)
    pen, font = ImageDraw.Draw(drawn), _font(image)
    for i in order[::-1]:
        pen.rectangle(_inside(objects.boxes[i], image), outline=chosen[i], width=_line(image))
    for i in order[::-1] if len(labels) > 1 else ():
        name = labels[int(objects.labels[i])]
        name += f" {objects.scores[i]:.2f}" if isinstance(objects, Detections) else ""
        _plate(pen, image, font, objects.boxes[i], name, chosen[i])
    return drawn


def _with_masks(
    image: Image.Image, masks: Sequence[np.ndarray], colors: Sequence[tuple[int, ...]], order: np.ndarray
) -> Image.Image:
    """Tint masks, the first in the order on top, and outline each."""
    painted, outlined = np.asarray(image).copy(), np.zeros(np.asarray(image).shape[:2], dtype=bool)
    for i in order[::-1]:
        painted[masks[i]] = colors[i]
        outlined[masks[i]] = False
        outlined |= _edges(masks[i], _line(image)) & masks[i]
    drawn = np.asarray(Image.blend(image, Image.fromarray(painted), _OPACITY)).copy()
    drawn[outlined] = painted[outlined]
    return Image.fromarray(drawn)


def _edges(ids: np.ndarray, width: int) -> np.ndarray:
    """Return where a label map changes, `(H, W)` bool, by lines of a width in pixels."""
    edges = np.zeros(ids.shape, dtype=bool)
    edges[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    edges[1:] |= ids[1:] != ids[:-1]
    for _ in range(width - 1):
        edges[:, :-1] |= edges[:, 1:]
        edges[:-1] |= edges[1:]
    return edges


def _line(image: Image.Image) -> int:
    """Width of a line, as well seen on a photo of 4000 px as on one of 400."""
    return max(1, round(max(image.size) / 350))


def _font(image: Image.Image) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_manager.findfont(_FONT), max(10, round(max(image.size) / 45)))


def _inside(box: np.ndarray, image: Image.Image) -> list[float]:
    """Return the corners of a box, moved onto the image where they are beyond it."""
    left, top, right, bottom = (float(value) for value in box)
    right, bottom = min(right, image.width - 1), min(bottom, image.height - 1)
    return [min(max(left, 0), right), min(max(top, 0), bottom), max(right, 0), max(bottom, 0)]


def _plate(
    pen: ImageDraw.ImageDraw, image: Image.Image, font: ImageFont.FreeTypeFont, box: np.ndarray, text: str,
    color: tuple[int, ...],
) -> None:  # fmt: skip
    """Write a name on a plate above its box, or as near as it stays inside of the picture."""
    margin, text = font.size // 5, " ".join(text.split())
    width, height = pen.textlength(text, font) + 2 * margin, font.size + 2 * margin
    x = max(0, min(float(box[0]), image.width - width))
    y = max(0, min(float(box[1]) - height, image.height - height))
    pen.rectangle([x, y, x + width, y + height], fill=color)
    pen.text((x + margin, y + margin), text, font=font, fill=_readable_on(color), anchor="la")


def _readable_on(color: Sequence[int]) -> tuple[int, int, int]:
    """Black or white, whichever stands out more on a colour."""
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    return (0, 0, 0) if luminance > 140 else _WHITE


def _with_legend(image: Image.Image, colors: dict[str, tuple[int, ...]]) -> Image.Image:
    """Put a legend of names and colours below an image, in as many rows as they need."""
    font = _font(image)
    side = round(font.size)
    gap = side // 2
    widths = {name: round(font.getlength(name)) + side + 2 * gap for name in colors}
    total = max(image.width, max(widths.values()) + gap)
    places, x, y = {}, gap, image.height + gap
    for name, width in widths.items():
        if x > gap and x + width > total:
            x, y = gap, y + side + gap
        places[name] = x, y
        x += width
    sheet = Image.new("RGB", (total, y + side + gap), _WHITE)
    sheet.paste(image)
    pen = ImageDraw.Draw(sheet)
    for name, (left, top) in places.items():
        pen.rectangle([left, top, left + side, top + side], fill=colors[name])
        pen.text((left + side + gap // 2, top + side // 2), name, font=font, fill=(0, 0, 0), anchor="lm")
    return sheet
