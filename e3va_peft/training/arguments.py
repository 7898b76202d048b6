"""`TrainingArguments`: the default recipe for a highway, and those of a run of `e3va train`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from e3va_peft.config import E3VAConfig
from e3va_peft.errors import UserError, one_of
from e3va_peft.methods import METHODS
from e3va_peft.training.config import RECIPE_EPOCHS, RunConfig
from e3va_peft.training.tasks import Task

RECIPE: dict[str, Any] = {
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "num_train_epochs": RECIPE_EPOCHS,
    "report_to": "none",
    "ddp_find_unused_parameters": False,
}


def training_arguments(output_dir: str | os.PathLike[str], **overrides: Any) -> TrainingArguments:
    """Build `TrainingArguments` with defaults that suit a highway.

    *Learning rate* 2e-3, an order above what full fine-tuning takes: the factors start from scratch, and 1e-3 to 3e-3
    did best where it was searched. Tune it first; a new head alone is content with the same. *Weight decay* 0.05, by
    Trainer's own rule not on norms and biases. *Schedule*: 10 % of the steps linear warm-up, then cosine to zero.
    *DDP* looks for no unused parameters: there are none, and one that your own head leaves unused is an error then.

    Args:
        output_dir: Where checkpoints go.
        overrides: Any argument of `TrainingArguments`; it wins over the recipe's.
    """
    return TrainingArguments(output_dir=os.fspath(output_dir), **(RECIPE | overrides))


def build_arguments(config: RunConfig, task: Task, has_eval: bool) -> TrainingArguments:
    """Build the `TrainingArguments` of a run: the recipe's, the method's and the task's defaults, then its own.

    Raises:
        UserError: A value cannot work.
    """
    given = config.training
    if given.get("hub_strategy", "end") != "end":
        raise UserError(
            f"training.hub_strategy={given['hub_strategy']}: only the finished adapter is pushed. Leave it."
        )
    # the run pushes the adapter itself, when it is finished, and no checkpoint shall hold the token
    own = {"push_to_hub": False, "hub_token": None}
    workers = max(min(4, (os.cpu_count() or 1) - 1), 0)
    defaults: dict[str, Any] = {
        "learning_rate": METHODS[config.method_name].learning_rate,
        # other methods may train a backbone, of which a head does not read everything
        "ddp_find_unused_parameters": False if METHODS[config.method_name].options is E3VAConfig else None,
        "logging_steps": 0.01,
        "disable_tqdm": not sys.stderr.isatty(),
        "batch_eval_metrics": True,  # batches are not kept: `Task.add` keeps what scores need
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": given.get("dataloader_num_workers", workers) > 0,
        **_schedule_defaults(given, task, has_eval),
        **task.default_training,
    }
    check_precision(given)
    try:
        arguments = training_arguments(config.output, **(defaults | given | own))
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise UserError(f"training: {error}") from error
    for name in arguments.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(f"training.report_to={name!r}: {one_of(name, ['none', *INTEGRATION_TO_CALLBACK])}")
        if name not in (*get_available_reporting_integrations(), "flyte"):  # which it does not look for
            raise UserError(
                f"training.report_to={name!r}: is not installed. Run `pip install {name.replace('_', '-')}`, or leave "
                "report_to out."
            )
    if arguments.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        mode = {"mode": "max" if arguments.greater_is_better else "min"}  # by itself either waits for a lower score
        arguments.lr_scheduler_kwargs = mode | dict(arguments.lr_scheduler_kwargs or {})
    arguments.label_names = ["labels"]
    arguments.remove_unused_columns = False
    if config.patience is not None and arguments.eval_strategy == "no":
        raise UserError(
            f"patience={config.patience}: counts evaluations, and there are none. Set data.eval_split or "
            "data.eval_fraction, and training.eval_strategy: epoch."
        )
    return arguments


def check_precision(given: Mapping[str, Any]) -> None:
    """Refuse a precision that this machine has not, which needs no data and no model to say.

    Raises:
        UserError: It is fp16 on the CPU; or bf16 without a GPU for it, and the CPU is not asked for.
    """
    if given.get("fp16") and (given.get("use_cpu") or not torch.accelerator.is_available()):
        raise UserError("training.fp16=True: needs a GPU, and this runs on the CPU. Use bf16: true, or neither.")
    if given.get("bf16") and not (given.get("use_cpu") or is_torch_bf16_gpu_available() or is_torch_xla_available()):
        raise UserError(
            "training.bf16=True: there is no GPU here that has bf16. Set training.bf16: false; or, to train on the "
            "CPU in bf16, training.use_cpu: true beside it."
        )


def _schedule_defaults(given: Mapping[str, Any], task: Task, has_eval: bool) -> dict[str, Any]:
    """Defaults for when to evaluate and to save: together, and the best is kept.

    Raises:
        UserError: There is nothing to evaluate on, and it is asked for; or no evaluation has the score to judge by.
    """
    evaluation = str(given.get("eval_strategy", "epoch" if has_eval else "no"))
    if evaluation != "no" and not has_eval:
        raise UserError(
            f"training.eval_strategy={evaluation}: there is no split to evaluate on. Set data.eval_split, or "
            "data.eval_fraction to set some aside."
        )
    judge = given.get("metric_for_best_model")
    if judge is not None and str(judge).removeprefix("eval_") not in ("loss", *task.metrics):
        raise UserError(f"training.metric_for_best_model={judge!r}: {one_of(judge, ['loss', *task.metrics])}")
    save = str(given.get("save_strategy", evaluation if evaluation != "no" else "epoch"))
    if save == "best" and evaluation == "no":
        raise UserError(
            "training.save_strategy=best: nothing says what is the best without an evaluation. Set "
            "training.eval_strategy: epoch, or save_strategy: epoch."
        )
    defaults: dict[str, Any] = {"eval_strategy": evaluation, "save_strategy": save, "save_total_limit": 2}
    if evaluation == save == "steps":
        defaults |= {"save_steps": given.get("eval_steps", 500), "eval_steps": given.get("save_steps", 500)}
    if evaluation != "no" and save in (evaluation, "best"):
        defaults["load_best_model_at_end"] = True
        if judge is None:
            defaults |= {"metric_for_best_model": f"eval_{task.main_metric}", "greater_is_better": True}
    return defaults
