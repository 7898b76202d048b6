"""Detect objects by RetinaNet on a pretrained Swin and the Trainer: images, and a COCO JSON of their objects.

python examples/detect.py --data coco/train2017 --annotations coco/annotations/instances_train2017.json
"""

import argparse
import json
from pathlib import Path

import torch
from peft import get_peft_model
from PIL import Image
from transformers import AutoConfig, SwinBackbone, Trainer

import e3va_peft
from e3va_peft.detection import DetectionImageProcessor, RetinaNet, RetinaNetConfig
from e3va_peft.training import training_arguments

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="microsoft/swin-tiny-patch4-window7-224", help="a Swin; its head is left out")
parser.add_argument("--data", type=Path, required=True, help="folder of the images")
parser.add_argument("--annotations", type=Path, required=True, help="COCO JSON")
parser.add_argument("--output", default="runs/detect")
parser.add_argument("--image-size", type=int, default=800, help="shorter side in pixels")
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--batch-size", type=int, default=2)
args = parser.parse_args()

coco = json.loads(args.annotations.read_text())
names = [category["name"] for category in coco["categories"]]
number = {category["id"]: i for i, category in enumerate(coco["categories"])}  # a detector's classes count from 0
objects = {image["id"]: [] for image in coco["images"]}
for item in coco["annotations"]:
    objects[item["image_id"]].append(item | {"category_id": number[item["category_id"]]})

stages = [f"stage{i + 1}" for i in range(len(AutoConfig.from_pretrained(args.model).depths))]
backbone = SwinBackbone.from_pretrained(args.model, out_features=stages)
model = RetinaNet(
    RetinaNetConfig(backbone_config=backbone.config, num_labels=len(names), id2label=dict(enumerate(names)))
)
model.backbone = backbone  # with its weights
model = get_peft_model(model, e3va_peft.E3VAConfig())
size = {"shortest_edge": args.image_size, "longest_edge": args.image_size * 5 // 3}
processor = DetectionImageProcessor(size=size)


def collate(batch):
    """Prepare images, and boxes and classes of their objects."""
    images = [Image.open(args.data / image["file_name"]).convert("RGB") for image in batch]
    annotations = [{"image_id": image["id"], "annotations": objects[image["id"]]} for image in batch]
    return processor(images, annotations, return_tensors="pt")


trainer = Trainer(
    model,
    training_arguments(
        args.output,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        remove_unused_columns=False,
    ),
    data_collator=collate,
    train_dataset=coco["images"],
)
trainer.train()
model.save_pretrained(f"{args.output}/adapter")
processor.save_pretrained(f"{args.output}/adapter")

image = Image.open(args.data / coco["images"][0]["file_name"]).convert("RGB")
with torch.inference_mode():
    outputs = model.eval()(**processor(image, return_tensors="pt").to(model.device))
(found,) = processor.post_process_object_detection(outputs, threshold=0.5, target_sizes=[(image.height, image.width)])
for score, label, box in zip(found["scores"], found["labels"], found["boxes"], strict=True):
    print(f"{names[label]} {score:.2f} at {[round(value) for value in box.tolist()]}")
