"""Segment images by UperNet and the Trainer: IMAGES/train/*.jpg and MASKS/train/*.png of the same names, and val.

python examples/segment.py --data my-data --labels road,car,tree  # my-data/images, my-data/masks
"""

import argparse
from pathlib import Path

import torch
from peft import get_peft_model
from PIL import Image
from transformers import AutoImageProcessor, Trainer, UperNetForSemanticSegmentation

import e3va_peft
from e3va_peft.training import allow_single_values, training_arguments
from e3va_peft.training.metrics import MeanIoU

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="openmmlab/upernet-swin-tiny")
parser.add_argument("--data", type=Path, required=True)
parser.add_argument("--labels", type=lambda text: text.split(","), required=True, help="names of the masks' values")
parser.add_argument("--first", type=int, choices=[0, 1], default=0, help="value of the first label")
parser.add_argument("--output", default="runs/segment")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=4)
args = parser.parse_args()

labels = {"id2label": dict(enumerate(args.labels)), "label2id": {name: i for i, name in enumerate(args.labels)}}
model = UperNetForSemanticSegmentation.from_pretrained(args.model, **labels, ignore_mismatched_sizes=True)
model = get_peft_model(allow_single_values(model), e3va_peft.E3VAConfig())
processor = AutoImageProcessor.from_pretrained(args.model, do_reduce_labels=args.first == 1)


class Pairs(torch.utils.data.Dataset):
    """Images and label maps of a split."""

    def __init__(self, split):
        self.images = sorted((args.data / "images" / split).iterdir())
        self.masks = [args.data / "masks" / split / f"{image.stem}.png" for image in self.images]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        """Return an image of the processor's size, and its label map."""
        found = processor(Image.open(self.images[i]).convert("RGB"), Image.open(self.masks[i]), return_tensors="pt")
        return {"pixel_values": found["pixel_values"][0], "labels": found["labels"][0]}


def classes_of(logits, labels):
    """The class of each pixel, so that logits need not be kept."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(1)


def score(predicted):
    """Mean IoU."""
    metric = MeanIoU(num_labels=len(args.labels), ignore_index=255)
    return {"mean_iou": metric.compute(predictions=predicted.predictions, references=predicted.label_ids)["mean_iou"]}


trainer = Trainer(
    model,
    training_arguments(
        args.output,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        eval_strategy="epoch",
    ),
    train_dataset=Pairs("train"),
    eval_dataset=Pairs("val"),
    preprocess_logits_for_metrics=classes_of,
    compute_metrics=score,
)
trainer.train()
model.save_pretrained(f"{args.output}/adapter")
