"""Classify images by a plain loop, on one device or many: Accelerate moves, scales and gathers.

accelerate launch examples/accelerate_loop.py --data photos  # photos/train/CLASS/*.jpg and photos/test/CLASS/*.jpg
"""

import argparse

import torch
from accelerate import Accelerator
from datasets import load_dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification, get_cosine_schedule_with_warmup

import e3va_peft

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="microsoft/swin-tiny-patch4-window7-224")
parser.add_argument("--data", required=True)
parser.add_argument("--output", default="runs/loop")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"], default="no")
args = parser.parse_args()

accelerator = Accelerator(mixed_precision=args.mixed_precision, gradient_accumulation_steps=2)
data = load_dataset("imagefolder", data_dir=args.data)
names = data["train"].features["label"].names
labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
model = AutoModelForImageClassification.from_pretrained(args.model, **labels, ignore_mismatched_sizes=True)
model = get_peft_model(model, e3va_peft.E3VAConfig())
processor = AutoImageProcessor.from_pretrained(args.model)


def collate(examples):
    """Prepare the images of a batch."""
    images = [example["image"].convert("RGB") for example in examples]
    labels = torch.tensor([example["label"] for example in examples])
    return {**processor(images, return_tensors="pt"), "labels": labels}


train = DataLoader(data["train"], args.batch_size, shuffle=True, collate_fn=collate)
test = DataLoader(data["test" if "test" in data else "validation"], args.batch_size, collate_fn=collate)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.05)
steps = args.epochs * len(train)
schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
model, optimizer, train, test, schedule = accelerator.prepare(model, optimizer, train, test, schedule)

for epoch in range(args.epochs):
    model.train()
    for batch in train:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    right = []
    for batch in test:
        with torch.inference_mode():
            predicted = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
        right.append(accelerator.gather_for_metrics(predicted == batch["labels"]))
    accelerator.print(f"epoch {epoch + 1}: accuracy {torch.cat(right).float().mean():.3f}")

accelerator.wait_for_everyone()
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(f"{args.output}/adapter")
