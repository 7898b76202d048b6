"""Training with the Hugging Face `Trainer`: the default recipe, and what it notes for the model card."""

from e3va_peft.training.recipe import MetricsToCard, training_arguments

__all__ = ["MetricsToCard", "training_arguments"]
