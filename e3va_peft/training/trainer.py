"""The Hugging Face `Trainer` with a task's scores, and with eyes for what goes wrong in a long run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import FSDP_MODEL_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, EvalPrediction
from transformers.training_args import OptimizerNames
from transformers.utils import is_accelerate_available

from e3va_peft.config import E3VAConfig
from e3va_peft.errors import UserError
from e3va_peft.exits import base_of, find_exits, trained_inside
from e3va_peft.model import note_base
from e3va_peft.refusals import base_fingerprint
from e3va_peft.training.folder import checkpoints
from e3va_peft.training.results import of_another_method, refuse_other_base, trained_on, write_manifest
from e3va_peft.training.tasks import Task

_NAMED = 5  # parameters in a message


class VisionTrainer(Trainer):
    """`Trainer` that scores a task's evidence instead of keeping all logits, and stops at a loss that is not a number.

    Args:
        task: What to score.
        processor: The model's image processor, which turns outputs into predictions.
        callbacks: Instead of Trainer's own progress bar and printer.
        kwargs: For `Trainer`.

    Raises:
        UserError: FSDP is of version 1, or saves shards; or it is DeepSpeed.

    Attributes:
        scores: Scores of the last evaluation, per-class scores included.
        confusion: Of the last evaluation, which class was taken for which; None where objects are found.
        rows: See `results.fingerprints`, for the manifests of checkpoints.
    """

    def __init__(self, task: Task, processor: Any, callbacks: Sequence[TrainerCallback] = (), **kwargs: Any) -> None:
        self.task = task
        self.processor = processor
        self.scores: dict[str, Any] = {}
        self.confusion: torch.Tensor | None = None
        self.rows: dict[str, str | None] = {"train": None, "eval": None}
        self._evidence: Any = None
        self._looked_for_idle = False
        super().__init__(compute_metrics=self._score, processing_class=processor, **kwargs)
        if self.is_fsdp_enabled:
            _refuse_sharding(self.accelerator.state.fsdp_plugin)
            for name, config in getattr(self.model, "peft_config", {}).items():  # later it cannot be asked any more
                if isinstance(config, E3VAConfig):
                    note_base(self.model, config, name)
                else:
                    base_fingerprint(self.model)
        if self.is_deepspeed_enabled:
            raise UserError("DeepSpeed: is not supported. Train with DDP, or with FSDP of version 2.")
        # UperNet's forward takes any keyword and ignores `num_items_in_batch`. Trainer believes that it scaled its
        # loss by it, and would neither divide by the accumulation steps nor average over processes.
        self.model_accepts_loss_kwargs = False
        for default in (ProgressCallback, PrinterCallback):
            self.remove_callback(default)
        for callback in callbacks:
            self.add_callback(callback)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Build the optimizer; what is trained inside the backbone is in groups of its own, if its rate is another.

        Raises:
            UserError: It is another, and there is no telling head from backbone, or the optimizer has one rate.
        """
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        factor = self.task.config.backbone_lr_multiplier
        if fresh and factor != 1:
            model = self.model if model is None else model
            if not find_exits(base_of(model)):
                raise UserError(
                    f"backbone_lr_multiplier={factor}: {type(base_of(model)).__name__} holds no backbone that `e3va "
                    "backbones` lists, so there is no telling head from backbone. Leave it out."
                )
            inside = {id(parameter) for parameter in trained_inside(model)}
            groups = optimizer.param_groups[:]  # the head's stay first: what logs show as the rate
            for group in groups:
                own = [parameter for parameter in group["params"] if id(parameter) in inside]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in inside]
                if own:
                    optimizer.add_param_group({**group, "params": own, "lr": factor * group["lr"]})
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]  # FSDP wants it
            grouped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            optim = OptimizerNames(self.args.optim).value
            if not inside <= grouped or "lomo" in optim:
                raise UserError(
                    f"backbone_lr_multiplier={factor}: training.optim={optim!r} has one learning rate for the whole "
                    "model. Leave one of them out."
                )
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Build the schedule: where the run has `lr_steps`, a linear warm-up and a tenth behind each of them."""
        steps = self.task.config.lr_steps
        if steps is not None and self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            milestones = [round(epoch / self.args.num_train_epochs * num_training_steps) for epoch in steps]
            self.lr_scheduler: Any = LambdaLR(optimizer or self.optimizer, partial(_stepped, warmup, milestones))
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of the training images, see `_apart`."""
        return self._apart(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        """Return the loader of the evaluation images, of all of them, see `_apart`."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return self._apart(super().get_eval_dataloader(*args, **kwargs))
        finally:
            self.args.dataloader_drop_last = drop

    def _apart(self, loader: Any) -> DataLoader[Any]:
        """Let a loader draw its workers' seeds from a generator of its own.

        PyTorch's takes them from the global one whenever it starts workers, once in a run and once more behind a
        checkpoint, after which dropout would draw other numbers.
        """
        loader.base_dataloader.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on a batch.

        Raises:
            UserError: The loss is infinite or not a number.
        """
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            half = "fp16" if self.args.fp16 else "bf16" if self.args.bf16 else None
            first = "train in bf16 or fp32, " if half == "fp16" else ""
            raise UserError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, learning rate "
                f"{self._get_learning_rate():.2e}{f', {half}' if half else ''}: {first}lower training.learning_rate, "
                "or clip harder (training.max_grad_norm). Checkpoints saved before are whole."
            )
        if not self._looked_for_idle:
            self._looked_for_idle = True
            self._warn_of_idle()
        return loss

    def _warn_of_idle(self) -> None:
        """Name what is said to be trained, and got no gradient in a first step."""
        trained = {
            name: p for name, p in self.accelerator.unwrap_model(self.model).named_parameters() if p.requires_grad
        }
        idle = [name for name, parameter in trained.items() if parameter.grad is None]
        if idle and self.is_world_process_zero():
            more = f" and {len(idle) - _NAMED} more" if len(idle) > _NAMED else ""
            tqdm.write(
                f"warning: {len(idle)} of {len(trained)} trained parameters got no gradient in the first step: "
                f"{', '.join(idle[:_NAMED])}{more}. The loss does not depend on them, and they will stay as they are."
            )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Return the loss: 0 for a batch of label maps that are all ignored, whose mean is nan."""
        maps = inputs.get("labels")
        if not isinstance(maps, torch.Tensor) or maps.dim() < 3 or (maps != self.task.config.data.ignore_index).any():
            return super().compute_loss(model, inputs, *args, **kwargs)
        found = super().compute_loss(model, {**inputs, "labels": torch.zeros_like(maps)}, *args, **kwargs)
        return (0 * found[0], *found[1:]) if isinstance(found, tuple) else 0 * found

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Add the evidence of a batch, of all processes and without the last batch's duplicates; return the loss.

        What `Trainer` calls logits and labels is a placeholder: without both it asks for no metrics.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            given = {name: value for name, value in inputs.items() if name != "truth"}
            found, outputs = self.compute_loss(model, given, return_outputs=True)
        loss = found.detach().mean()  # nn.DataParallel gives one a device
        if prediction_loss_only:
            return loss, None, None
        items = self.task.evidence(outputs, inputs, self.processor)
        gathered = self.accelerator.gather_for_metrics(items, use_gather_object=True)
        self._evidence = self.task.add(self._evidence, gathered)
        return loss, loss.reshape(1), loss.reshape(1)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Start without evidence, which an evaluation that was interrupted may have left."""
        self._evidence = None
        return super().evaluation_loop(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = output_dir or self.args.output_dir
        if isinstance(self.model, PreTrainedModel):
            # Under the model's own key names. transformers 5 saves those of version 4, which `from_pretrained` alone
            # translates back, and that knows no module which a method has put in.
            self.model.save_pretrained(
                folder, state_dict=state_dict, is_main_process=self.args.should_save, save_original_format=False
            )
            self.processor.save_pretrained(folder)
            return
        super()._save(output_dir, state_dict)
        if of_another_method(self.model):
            base: Any = self.model.get_base_model()
            base.config.save_pretrained(folder)  # the class names, which a LoRA does not keep

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each process writes its random numbers
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            write_manifest(folder, self.model, trained_on(self.rows, self.args))
            self._remove_older(limit)

    def _remove_older(self, limit: int | None) -> None:
        """Remove checkpoints beyond a limit, by step, neither the last nor the best, and no folder of another name.

        Trainer goes by time, would remove the newest where the clock was set back, and copies that somebody made.
        """
        if limit is None or limit < 1:
            return
        found = checkpoints(Path(self.args.output_dir))
        newest = sorted(found, reverse=True)
        best = [step for step in newest[1:] if step == self.state.best_global_step]
        order = newest[:1] + best + [step for step in newest[1:] if step not in best]
        for step in order[max(limit, 1 + len(best)) :]:
            shutil.rmtree(found[step], ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        _refuse_other_sharding(Path(resume_from_checkpoint), self.is_fsdp_enabled)
        if isinstance(target, PreTrainedModel) and not self.is_fsdp_enabled:  # which has a file of its own
            load_saved(target, resume_from_checkpoint)
        else:
            bare = self.accelerator.unwrap_model(target)
            if isinstance(bare, PeftModel):
                refuse_other_weights(bare, Path(resume_from_checkpoint))
                refuse_other_base(bare, Path(resume_from_checkpoint))
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PreTrainedModel) and not self.is_fsdp_enabled:
            load_saved(self.model, str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _score(self, batch: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """Score the evidence of all batches behind the last one."""
        if not compute_result:
            return {}
        num_labels = self.accelerator.unwrap_model(self.model).config.num_labels
        self.scores = self.task.scores(self._evidence, num_labels)
        self.confusion = self.task.confusion(self._evidence, num_labels)
        self._evidence = None
        return {name: value for name, value in self.scores.items() if isinstance(value, int | float)}


def _refuse_sharding(plugin: Any) -> None:
    """Refuse FSDP of version 1, checkpoints of shards, which hold no adapter, and an Accelerate that cannot load them.

    Raises:
        UserError: It is so.
    """
    if not is_accelerate_available("1.15.0"):  # up to 1.8 processes wait for each other, up to 1.14 no adapter is read
        raise UserError(
            f"FSDP: accelerate {accelerate.__version__} does not load checkpoints of an adapter. Update it: "
            "pip install -U 'accelerate>=1.15', or train without FSDP."
        )
    state = plugin.state_dict_type.name
    if plugin.fsdp_version != 2 or state != "FULL_STATE_DICT":
        raise UserError(
            f"FSDP: is of version {plugin.fsdp_version} and saves {state}. A run needs version 2 and checkpoints that "
            "hold the whole adapter: accelerate launch --use_fsdp --fsdp_version 2 --fsdp_state_dict_type "
            "FULL_STATE_DICT, or training.fsdp_config: {version: 2, state_dict_type: FULL_STATE_DICT}."
        )


def _refuse_other_sharding(checkpoint: Path, sharded: bool) -> None:
    """Refuse to resume with FSDP what was begun without it, or the other way round: the optimizer would begin again.

    Raises:
        UserError: It is so.
    """
    before = (checkpoint / f"{FSDP_MODEL_NAME}.bin").is_file()
    if before != sharded:
        ways = {True: "with FSDP", False: "without FSDP"}
        raise UserError(
            f"{checkpoint}: was trained {ways[before]}, and this run is {ways[sharded]}. Resume {ways[before]}, or "
            "train from the beginning with --overwrite."
        )


def _stepped(warmup: int, milestones: Sequence[int], step: int) -> float:
    """Return the factor of the learning rate at a step."""
    return float(min(1.0, (step + 1) / (warmup + 1)) * 0.1 ** sum(step >= milestone for milestone in milestones))


def load_saved(model: nn.Module, folder: str | Path) -> None:
    """Load a whole model's weights from a folder. Every key must be there: Trainer lets missing ones pass."""
    files = sorted(Path(folder).glob("model*.safetensors"))
    model.load_state_dict({name: value for path in files for name, value in load_file(path).items()})


def refuse_other_weights(model: PeftModel, folder: Path) -> None:
    """Refuse an adapter's file with other weights than the model trains: PEFT lets missing ones pass with a warning.

    Raises:
        UserError: Weights are missing there, or there are others.
    """
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))  # "auto" would ask the Hub
    found = set(load_peft_weights(str(folder), device="cpu"))
    for names, what in ((expected - found, "lacks"), (found - expected, "has, and should not,")):
        if names:
            raise UserError(
                f"{folder}: the adapter there {what} {len(names)} weights, {min(names)!r} among them. Restore the "
                "file that was saved; a checkpoint may be removed, and the run resumes from the one before."
            )
