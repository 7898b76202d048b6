"""Classify images by PyTorch Lightning: its Trainer moves, scales, logs and saves (`pip install lightning`).

python examples/lightning_trainer.py --data photos  # photos/train/CLASS/*.jpg and photos/test/CLASS/*.jpg
"""

import argparse

import torch
from datasets import load_dataset
from lightning import LightningModule, Trainer
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification, get_cosine_schedule_with_warmup

import e3va_peft

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="microsoft/swin-tiny-patch4-window7-224")
parser.add_argument("--data", required=True)
parser.add_argument("--output", default="runs/lightning")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--precision", default="32-true", help="of Lightning, e.g. bf16-mixed")
parser.add_argument("--resume", help="a checkpoint below OUTPUT/lightning_logs")
args = parser.parse_args()

data = load_dataset("imagefolder", data_dir=args.data)
names = data["train"].features["label"].names
labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
model = AutoModelForImageClassification.from_pretrained(args.model, **labels, ignore_mismatched_sizes=True)
processor = AutoImageProcessor.from_pretrained(args.model)


def collate(examples):
    """Prepare the images of a batch."""
    images = [example["image"].convert("RGB") for example in examples]
    labels = torch.tensor([example["label"] for example in examples])
    return {**processor(images, return_tensors="pt"), "labels": labels}


class Classifier(LightningModule):
    """An adapted classifier, of which checkpoints hold what is trained."""

    def __init__(self):
        super().__init__()
        self.strict_loading = False  # the frozen backbone is in no checkpoint
        self.model = get_peft_model(model, e3va_peft.E3VAConfig()).train()  # Lightning leaves modes alone

    def training_step(self, batch, _):
        """Return the loss of a batch."""
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, _):
        """Log the share that is right."""
        right = self.model(**batch).logits.argmax(-1) == batch["labels"]
        self.log("accuracy", right.float().mean(), batch_size=len(right), prog_bar=True, sync_dist=True)

    def configure_optimizers(self):
        """Return AdamW and its schedule, a step of which follows each of the optimizer's."""
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint):
        """Leave out what is frozen."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: value for k, value in checkpoint["state_dict"].items() if k in trained}


train = DataLoader(data["train"], args.batch_size, shuffle=True, collate_fn=collate)
test = DataLoader(data["test" if "test" in data else "validation"], args.batch_size, collate_fn=collate)
trainer = Trainer(max_epochs=args.epochs, precision=args.precision, default_root_dir=args.output, gradient_clip_val=1)
classifier = Classifier()
trainer.fit(classifier, train, test, ckpt_path=args.resume)
if trainer.is_global_zero:
    classifier.model.save_pretrained(f"{args.output}/adapter")
