"""Run the notebooks on real data without the Hub, and keep in them what they print and draw.

python benchmarks/notebooks.py --data DATA --weights WEIGHTS  # DATA/{cifar10,dsb2018,bccd}, WEIGHTS/swin32-cifar10
python benchmarks/notebooks.py --data DATA --weights WEIGHTS 03 05  # some of them

Each runs with the parameters below, of which the notebook itself says so; its own parameters stay as they are.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import nbformat
from datasets import Dataset
from nbclient import NotebookClient
from PIL import Image
from transformers import BitImageProcessor

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
PARAMETERS = {
    "01_quickstart": "MODEL, DATASET, EPOCHS = 'swin32', 'cifar10', 3",
    "02_train_your_own": (
        "MODEL, IMAGES, MASKS, LABELS = 'swin32', 'dsb2018/images', 'dsb2018/semantic', ['background', 'nucleus']\n"
        "REDUCE_LABELS, IMAGE_SIZE, HEAD_WIDTH, EPOCHS = True, 128, 32, 4"
    ),
    "03_where_the_memory_goes": "",
    "04_dense_prediction": (
        "MODEL, VOC, EPOCHS, BATCH, IMAGE_SIZE = 'swin32', 'bccd', 4, 4, 128\n"
        "COCO_IMAGES, COCO_ANNOTATIONS = 'dsb2018/images/{split}', 'dsb2018/annotations/instances_{split}.json'\n"
        "IMAGES, MASKS, LABELS = 'dsb2018/images', 'dsb2018/semantic', ['background', 'nucleus']\n"
        "small = {'rpn_post_nms_top_n_train': 300, 'rpn_post_nms_top_n_test': 200, 'box_batch_size_per_image': 64}\n"
        "CASCADE_OPTIONS = {'fpn_channels': 32, 'box_head_dim': 128, 'mask_dim': 32, 'anchor_scales': [4], **small}\n"
        "RETINANET_OPTIONS = {'fpn_channels': 32, 'anchor_scales': [2, 2.5, 3.2]}\n"
        "MASK2FORMER_OPTIONS = {name: 64 for name in ('feature_size', 'mask_feature_size', 'hidden_dim')} | {\n"
        "    'encoder_layers': 2, 'decoder_layers': 3, 'num_attention_heads': 4, 'num_queries': 20,\n"
        "    'encoder_feedforward_dim': 128, 'dim_feedforward': 256, 'train_num_points': 1024}"
    ),
    "05_add_a_backbone": "",
}
IMAGES = {"train": 96, "val": 16}  # of a data set at most
_LARGE = 100_000  # characters
_NOISE = re.compile(
    r"^(W\d{4} |Failed to load CPU gemm|.*UserWarning|  (warnings\.warn|super\(\)\.)).*\n", re.MULTILINE
)


def record(name: str, folder: Path) -> None:
    """Run a notebook in a folder, and write its outputs into its file."""
    path = NOTEBOOKS / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    own = cell.source
    cell.source += f"\n{PARAMETERS[name]}"
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    cell.source = own
    for number, each in enumerate((c for c in notebook.cells if c.cell_type == "code"), 1):
        each.execution_count = number
        each.metadata.pop("execution", None)
        each.outputs = [output for output in each.outputs if output.get("name") != "stderr"]
        for output in each.outputs:
            if "execution_count" in output:
                output.execution_count = number
            if "text" in output:
                output.text = _NOISE.sub("", output.text).replace(f"{folder}/", "")
            shrink(output.get("data", {}))
        each.outputs = [output for output in each.outputs if output.get("text") != ""]
    nbformat.write(notebook, path)


def shrink(data: dict[str, str]) -> None:
    """Turn a PNG of photos into a JPEG, a quarter of its size."""
    if len(data.get("image/png", "")) > _LARGE:
        picture, file = Image.open(io.BytesIO(base64.b64decode(data.pop("image/png")))), io.BytesIO()
        picture.convert("RGB").save(file, "JPEG", quality=80)
        data["image/jpeg"] = base64.b64encode(file.getvalue()).decode()


def prepare(data: Path, weights: Path, folder: Path) -> None:
    """Lay out model and data, a part of each set."""
    shutil.copytree(weights / "swin32-cifar10", folder / "swin32")
    size = {"height": 64, "width": 64}
    processor = BitImageProcessor(size={"shortest_edge": 64}, crop_size=size)
    processor.image_mean, processor.image_std = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
    processor.save_pretrained(folder / "swin32")
    (folder / "cifar10").mkdir()
    for split, count in (("train", 640), ("test", 200)):
        images = Dataset.from_parquet(str(data / "cifar10" / f"{split}.parquet"), cache_dir=str(folder / "cache"))
        images.select(range(count)).to_parquet(folder / "cifar10" / f"{split}.parquet")
    shutil.copytree(data / "bccd", folder / "bccd")
    for split, count in IMAGES.items():
        for kind in ("images", "semantic"):
            (folder / "dsb2018" / kind / split).mkdir(parents=True)
        content = json.loads((data / f"dsb2018/annotations/instances_{split}.json").read_text())
        content["images"] = content["images"][:count]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [item for item in content["annotations"] if item["image_id"] in kept]
        (folder / "dsb2018/annotations").mkdir(exist_ok=True)
        (folder / f"dsb2018/annotations/instances_{split}.json").write_text(json.dumps(content))
        for image in content["images"]:
            for kind, name in (("images", image["file_name"]), ("semantic", f"{Path(image['file_name']).stem}.png")):
                (folder / "dsb2018" / kind / split / name).symlink_to(data / "dsb2018" / kind / split / name)
        listed = folder / f"bccd/ImageSets/Main/{split}.txt"
        listed.write_text("\n".join(listed.read_text().split()[:count]))


def main() -> None:
    """Run them one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", help="e.g. 03; by default all")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    args = parser.parse_args()
    for name in PARAMETERS:
        if args.numbers and name.partition("_")[0] not in args.numbers:
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": f"{folder}/cache"}
            prepare(args.data.resolve(), args.weights.resolve(), Path(folder))
            record(name, Path(folder))
        print(name, flush=True)


if __name__ == "__main__":
    main()
