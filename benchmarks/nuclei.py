"""Turn the nuclei of the Data Science Bowl 2018 into what the recipes read: images, label maps and COCO's annotations.

python benchmarks/nuclei.py stage1_train data/dsb2018  # stage1_train/ID/images/ID.png, stage1_train/ID/masks/*.png

Every fifth image is for evaluation. Of label maps 1 is background and 2 a nucleus; 0, "do not count", does not occur.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle
from PIL import Image

from e3va_peft.data.objects import encode_masks


def convert(folder: Path, output: Path, split: str, content: dict[str, Any]) -> None:
    """Write image and label map of a folder of the competition, and add its nuclei to the annotations of a split."""
    image = Image.open(folder / "images" / f"{folder.name}.png").convert("RGB")
    masks = np.stack(
        [np.asarray(Image.open(path).convert("L")) > 0 for path in sorted((folder / "masks").glob("*.png"))]
    )
    image.save(output / "images" / split / f"{folder.name}.png")
    Image.fromarray(np.where(masks.any(0), 2, 1).astype(np.uint8)).save(
        output / "semantic" / split / f"{folder.name}.png"
    )
    number = len(content["images"]) + 1
    size = {"height": image.height, "width": image.width}
    content["images"].append({"id": number, "file_name": f"{folder.name}.png", **size})
    for mask, runs in zip(masks, encode_masks(masks), strict=True):
        content["annotations"].append(
            {
                "id": len(content["annotations"]) + 1,
                "image_id": number,
                "category_id": 1,
                "bbox": rle.toBbox(runs).tolist(),
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": [image.height, image.width], "counts": runs["counts"].decode()},
            }
        )


def main() -> None:
    """Convert all images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path, help="a new folder")
    args = parser.parse_args()
    folders = sorted(path.parent for path in args.source.glob("*/images"))
    if not folders:
        parser.error(f"source={str(args.source)!r}: holds no ID/images. Unpack stage1_train.zip there.")
    (args.output / "annotations").mkdir(parents=True)
    for split, chosen in (("train", [f for i, f in enumerate(folders) if i % 5]), ("val", folders[::5])):
        for kind in ("images", "semantic"):
            (args.output / kind / split).mkdir(parents=True)
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "nucleus"}]}
        for folder in chosen:
            convert(folder, args.output, split, content)
        (args.output / f"annotations/instances_{split}.json").write_text(json.dumps(content))
        print(f"{split}: {len(content['images'])} images, {len(content['annotations'])} nuclei")


if __name__ == "__main__":
    main()
