"""Training with the Hugging Face `Trainer`: recipe, metrics, tasks, and what `e3va train` is made of."""

from e3va_peft.errors import require_train

require_train(__name__)

from e3va_peft.training.arguments import training_arguments  # noqa: E402
from e3va_peft.training.batchnorm import allow_single_values  # noqa: E402  what it needs is known to be there
from e3va_peft.training.callbacks import MetricsToCard, NextView  # noqa: E402

__all__ = ["MetricsToCard", "NextView", "allow_single_values", "training_arguments"]
