"""Segment objects by Mask2Former and the Trainer: images, and a COCO JSON of their objects.

python examples/mask2former.py --data coco/train2017 --annotations coco/annotations/instances_train2017.json
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation, Trainer

import e3va_peft
from e3va_peft.training import training_arguments

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="facebook/mask2former-swin-tiny-coco-instance")
parser.add_argument("--data", type=Path, required=True, help="folder of the images")
parser.add_argument("--annotations", type=Path, required=True, help="COCO JSON, with polygons")
parser.add_argument("--output", default="runs/mask2former")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=2)
args = parser.parse_args()

coco = json.loads(args.annotations.read_text())
names = [category["name"] for category in coco["categories"]]
number = {category["id"]: i for i, category in enumerate(coco["categories"])}
objects = {image["id"]: [] for image in coco["images"]}
for item in coco["annotations"]:
    if not item["iscrowd"]:
        objects[item["image_id"]].append(item)

labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
model = Mask2FormerForUniversalSegmentation.from_pretrained(args.model, **labels, ignore_mismatched_sizes=True)
model = get_peft_model(model, e3va_peft.E3VAConfig())
processor = AutoImageProcessor.from_pretrained(args.model, do_reduce_labels=False, ignore_index=0)  # 0: no object


def instances(image, items):
    """Draw polygons into a map: the i-th object is i, from 1 on."""
    drawn = Image.new("I", image.size)
    for i, item in enumerate(items, 1):
        for polygon in item["segmentation"]:
            ImageDraw.Draw(drawn).polygon(polygon, fill=i)
    return np.array(drawn)


def collate(batch):
    """Prepare images, and the mask and class of each of their objects."""
    images = [Image.open(args.data / entry["file_name"]).convert("RGB") for entry in batch]
    items = [objects[entry["id"]] for entry in batch]
    maps = [instances(image, each) for image, each in zip(images, items, strict=True)]
    classes = [{i: number[item["category_id"]] for i, item in enumerate(each, 1)} for each in items]
    return processor(images, maps, instance_id_to_semantic_id=classes, return_tensors="pt")


trainer = Trainer(
    model,
    training_arguments(
        args.output,
        learning_rate=5e-4,  # a decoder that is trained whole wants less than a highway alone
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        remove_unused_columns=False,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
    ),
    data_collator=collate,
    train_dataset=[image for image in coco["images"] if objects[image["id"]]],
)
trainer.train()
model.save_pretrained(f"{args.output}/adapter")
processor.save_pretrained(f"{args.output}/adapter")
