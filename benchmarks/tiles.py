"""Cut images of objects into square tiles, as images with a few objects each or, sorted by their number, as classes.

python benchmarks/tiles.py DATA TILES --side 64  # dsb2018/{images,annotations}; a new folder of the same layout
python benchmarks/tiles.py DATA TILES --side 160 --count RBC  # bccd; a new folder TILES/SPLIT/CELLS/TILE.png

Tiles lie side by side from the upper left corner; what is left over at the right and lower edges is not used. An
object is cut along with its image, and left out of a tile where fewer than 16 of its pixels lie. It is counted in the
tile where the centre of its box lies; tiles with three or more are one class. Where objects are not counted, the tiles
of every seventh image of `train` are `aside`, to choose learning rates by, and those of the others `fit`; their images
stay in images/train.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle
from PIL import Image

from e3va_peft.data.config import DataConfig
from e3va_peft.data.formats import load_splits
from e3va_peft.data.objects import encode_masks
from e3va_peft.detection.annotations import encode_segmentation

SPLITS = ("train", "val")
LEAST = 16
MOST = 3
EVERY = 7


def cut(data: Path, tiles: Path, split: str, side: int) -> dict[str, Any]:
    """Cut the images of a split, save the tiles, and return their annotations in COCO's layout."""
    content = json.loads((data / f"annotations/instances_{split}.json").read_text())
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for item in content["annotations"]:
        objects[item["image_id"]].append(item)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (tiles / "images" / split).mkdir(parents=True)
    for image in content["images"]:
        pixels = np.asarray(Image.open(data / "images" / split / image["file_name"]).convert("RGB"))
        size = pixels.shape[:2]
        masks = [rle.decode(encode_segmentation(item["segmentation"], size)) for item in objects[image["id"]]]
        for y in range(0, pixels.shape[0] - side + 1, side):
            for x in range(0, pixels.shape[1] - side + 1, side):
                name = f"{Path(image['file_name']).with_suffix('').as_posix().replace('/', '-')}-{y}-{x}.png"
                Image.fromarray(pixels[y : y + side, x : x + side]).save(tiles / "images" / split / name)
                images.append({"id": len(images) + 1, "file_name": name, "height": side, "width": side})
                for item, mask in zip(objects[image["id"]], masks, strict=True):
                    part = mask[y : y + side, x : x + side].astype(bool)
                    if part.sum() < LEAST:
                        continue
                    (run_lengths,) = encode_masks(part[None])
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": len(images),
                            "category_id": item["category_id"],
                            "bbox": rle.toBbox(run_lengths).tolist(),
                            "area": int(part.sum()),
                            "iscrowd": item.get("iscrowd", 0),
                            "segmentation": {"size": [side, side], "counts": run_lengths["counts"].decode()},
                        }
                    )
    return {"images": images, "annotations": annotations, "categories": content["categories"]}


def set_aside(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Split the tiles' annotations by the image that a tile is of, which its name begins with."""
    sources = sorted({source_of(image) for image in content["images"]})
    chosen = set(sources[::EVERY])
    parts = {}
    for name, inside in (("fit", False), ("aside", True)):
        images = [image for image in content["images"] if (source_of(image) in chosen) == inside]
        ids = {image["id"] for image in images}
        own = [item for item in content["annotations"] if item["image_id"] in ids]
        parts[name] = {**content, "images": images, "annotations": own}
    return parts


def source_of(tile: dict[str, Any]) -> str:
    """The image that a tile is of."""
    return str(tile["file_name"]).rsplit("-", 2)[0]


def sort_by_count(data: Path, tiles: Path, side: int, name: str) -> None:
    """Cut the splits of a dataset in Pascal VOC's layout; each tile goes into the folder of its number of objects."""
    for splits in (("train", "val"), ("trainval", "test")):
        loaded = load_splits(DataConfig(str(data), train_split=splits[0], eval_split=splits[1]), "boxes")
        for called, split in zip(splits, loaded, strict=True):
            assert split is not None  # both are named
            for index in range(len(split)):
                image, objects = split[index]
                boxes = objects.boxes[objects.labels == split.labels.index(name)]
                places = (boxes[:, :2] + boxes[:, 2:]) / 2 // side  # of the tiles, x and y
                for y in range(0, image.height - side + 1, side):
                    for x in range(0, image.width - side + 1, side):
                        count = int((places == (x // side, y // side)).all(1).sum())
                        folder = tiles / called / (str(count) if count < MOST else f"{MOST} or more")
                        folder.mkdir(parents=True, exist_ok=True)
                        image.crop((x, y, x + side, y + side)).save(folder / f"{index}-{y}-{x}.png")


def main() -> None:
    """Cut all splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("tiles", type=Path)
    parser.add_argument("--side", type=int, default=64, help="in pixels (default: 64)")
    parser.add_argument("--count", metavar="NAME", help="sort the tiles by their number of objects of this class")
    args = parser.parse_args()
    if args.count:
        sort_by_count(args.data, args.tiles, args.side, args.count)
        return
    (args.tiles / "annotations").mkdir(parents=True)
    for split in SPLITS:
        content = cut(args.data, args.tiles, split, args.side)
        for name, part in {split: content, **(set_aside(content) if split == "train" else {})}.items():
            (args.tiles / f"annotations/instances_{name}.json").write_text(json.dumps(part))
            print(f"{name}: {len(part['images'])} tiles, {len(part['annotations'])} objects")


if __name__ == "__main__":
    main()
