"""Training with the Hugging Face `Trainer`: recipe, metrics, tasks, and what `e3va train` is made of."""

from e3va_peft.training.batchnorm import allow_single_values
from e3va_peft.training.recipe import MetricsToCard, training_arguments

__all__ = ["MetricsToCard", "allow_single_values", "training_arguments"]
