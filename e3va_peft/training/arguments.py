"""The default recipe for a highway, as `TrainingArguments`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from e3va_peft.card import record_metrics
from e3va_peft.training.config import RECIPE_EPOCHS

RECIPE: dict[str, Any] = {
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "num_train_epochs": RECIPE_EPOCHS,
    "report_to": "none",
}


def training_arguments(output_dir: str | os.PathLike[str], **overrides: Any) -> TrainingArguments:
    """Build `TrainingArguments` with defaults that suit a highway.

    *Learning rate* 2e-3, an order above what full fine-tuning takes: the factors start from scratch, and 1e-3 to 3e-3
    did best where it was searched. Tune it first; a new head alone is content with the same. *Weight decay* 0.05, by
    Trainer's own rule not on norms and biases. *Schedule*: 10 % of the steps linear warm-up, then cosine to zero.

    Args:
        output_dir: Where checkpoints go.
        overrides: Any argument of `TrainingArguments`; it wins over the recipe's.
    """
    return TrainingArguments(output_dir=os.fspath(output_dir), **(RECIPE | overrides))


def without_timings(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The measurements of an evaluation, without how long it took and when."""
    return {name: value for name, value in metrics.items() if not name.endswith(("runtime", "per_second", "epoch"))}


class MetricsToCard(TrainerCallback):
    """Notes the results of each evaluation, so that every later save shows them in the model card."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the evaluation's metrics; timings stay out."""
        record_metrics(kwargs["model"], without_timings(kwargs["metrics"]))
