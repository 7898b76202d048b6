"""Classify images by the Trainer: one folder a class, or a data set of the Hub.

python examples/classify.py --data photos  # photos/train/CLASS/*.jpg and photos/test/CLASS/*.jpg
python examples/classify.py --data AI-Lab-Makerere/beans --model facebook/dinov2-small
"""

import argparse

import torch
from datasets import ClassLabel, load_dataset
from peft import get_peft_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer

import e3va_peft
from e3va_peft.training import MetricsToCard, training_arguments
from e3va_peft.training.metrics import Accuracy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="microsoft/swin-tiny-patch4-window7-224")
parser.add_argument("--data", required=True)
parser.add_argument("--output", default="runs/classify")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=32)
args = parser.parse_args()

data = load_dataset(args.data)
column, classes = next((k, v) for k, v in data["train"].features.items() if isinstance(v, ClassLabel))
model = AutoModelForImageClassification.from_pretrained(
    args.model,
    num_labels=classes.num_classes,
    id2label=dict(enumerate(classes.names)),
    label2id={name: i for i, name in enumerate(classes.names)},
    ignore_mismatched_sizes=True,  # the pretrained head has other classes
)
model = get_peft_model(model, e3va_peft.E3VAConfig())
model.print_trainable_parameters()
processor = AutoImageProcessor.from_pretrained(args.model)


def collate(examples):
    """Prepare the images of a batch."""
    images = [example["image"].convert("RGB") for example in examples]
    labels = torch.tensor([example[column] for example in examples])
    return {**processor(images, return_tensors="pt"), "labels": labels}


def score(predicted):
    """Top-1 accuracy."""
    return {
        "accuracy": Accuracy().compute(predictions=predicted.predictions, references=predicted.label_ids)["accuracy"]
    }


trainer = Trainer(
    model,
    training_arguments(
        args.output,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        eval_strategy="epoch",
        remove_unused_columns=False,  # `collate` reads the images
    ),
    data_collator=collate,
    train_dataset=data["train"],
    eval_dataset=data["test" if "test" in data else "validation"],
    compute_metrics=score,
    callbacks=[MetricsToCard()],
)
trainer.train()
model.save_pretrained(f"{args.output}/adapter")  # with the image processor and a card; push_to_hub shares it
