"""Logs of a run for TensorBoard and Weights & Biases, kept in its folder, with predictions as pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback

from e3va_peft.data.examples import Split
from e3va_peft.errors import UserError, reason
from e3va_peft.training.drawing import draw_class, draw_objects, draw_regions
from e3va_peft.training.folder import log_folder
from e3va_peft.training.predict import Trained
from e3va_peft.training.trainer import VisionTrainer

_EXAMPLES = 4
_LONGEST = 768  # pixels of a picture's longer side in a log


@contextmanager
def reported(trainer: VisionTrainer, split: Split | None, checkpoint: Path | None) -> Iterator[None]:
    """Let a run's loggers write into its folder, where a run that resumes continues the log; close them behind it.

    Args:
        trainer: The run.
        split: What it is evaluated on: a few images of it, always the same, are drawn at each evaluation.
        checkpoint: What the run resumes from; None where it begins.

    Raises:
        UserError: Weights & Biases does not begin a run.
    """
    logs = [_LOGS[type(each)](each) for each in trainer.callback_handler.callbacks if type(each) in _LOGS]
    if split is not None and logs:
        trainer.add_callback(Pictures(trainer, split, logs))
    logs = logs if trainer.is_world_process_zero() else []
    step = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    for log in logs:
        log.open(Path(trainer.args.output_dir), trainer.args, step)
    try:
        yield
    finally:
        for log in logs:
            log.close()


class _TensorBoard:
    """Trainer's log for TensorBoard."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def open(self, output: Path, arguments: TrainingArguments, step: int) -> None:
        purge = None  # a folder from TENSORBOARD_LOGGING_DIR may have logs of other runs
        if self.callback.logging_dir is None:
            self.callback.logging_dir = str(log_folder(output) / "tensorboard")
            purge = step + 1 if step else 0  # what a run that was killed has logged behind its checkpoint comes again
        self.callback.tb_writer = self.callback._SummaryWriter(self.callback.logging_dir, purge_step=purge)

    def show(self, pictures: Mapping[str, Image.Image], step: int) -> None:
        for name, picture in pictures.items():
            self.callback.tb_writer.add_image(f"examples/{name}", np.asarray(picture), step, dataformats="HWC")
        self.callback.tb_writer.flush()

    def close(self) -> None:
        if self.callback.tb_writer is not None:
            self.callback.tb_writer.close()


class _WeightsAndBiases:
    """Trainer's log for Weights & Biases, in a run of its own unless the caller has begun one."""

    def __init__(self, callback: Any) -> None:
        self.wandb = callback._wandb
        self.own = self.wandb.run is None

    def open(self, output: Path, arguments: TrainingArguments, step: int) -> None:
        if not self.own:
            return
        folder = log_folder(output)
        before = sorted(path.name for path in folder.glob("wandb/*run-*-*"))  # by their time
        try:
            self.wandb.init(
                project=os.getenv("WANDB_PROJECT", "huggingface"),  # as Trainer has it
                name=arguments.run_name or output.name,
                dir=folder,
                id=before[-1].rpartition("-")[2] if step and before else None,
                resume="allow",
            )
        except self.wandb.Error as error:
            raise UserError(
                f"training.report_to='wandb': {reason(error)}. Log in by `wandb login`, or set the environment "
                "variable WANDB_MODE=offline and send the run later by `wandb sync`."
            ) from None

    def show(self, pictures: Mapping[str, Image.Image], step: int) -> None:
        images = [self.wandb.Image(picture, caption=name) for name, picture in pictures.items()]
        self.wandb.log({"examples": images, "train/global_step": step})

    def close(self) -> None:
        if self.own:
            self.wandb.finish()


_LOGS: dict[type, type[_TensorBoard] | type[_WeightsAndBiases]] = {
    TensorBoardCallback: _TensorBoard,
    WandbCallback: _WeightsAndBiases,
}


class Pictures(TrainerCallback):
    """Logs what the model finds in a few images of the evaluation split, drawn as `e3va predict` draws it.

    All processes predict, because a sharded model needs them all; the first one logs.

    Args:
        trainer: The run.
        split: What it is evaluated on; the images are spread evenly over it.
        logs: Where the first process logs.
    """

    def __init__(self, trainer: VisionTrainer, split: Split, logs: Sequence[_TensorBoard | _WeightsAndBiases]) -> None:
        self.trainer = trainer
        self.split = split
        self.logs = logs
        self.indices = np.unique(np.linspace(0, len(split) - 1, _EXAMPLES).round().astype(int)).tolist()
        self._failed = False

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw and log; where that fails, warn once and let the training pass."""
        if self._failed:
            return
        failure = ""
        try:
            pictures = self._draw(kwargs["model"])
            for log in self.logs if state.is_world_process_zero else ():
                log.show(pictures, state.global_step)
        except Exception as error:  # whatever it is, hours of training are worth more than a picture
            failure = reason(error)
        failures = [text for text in gather_object([failure]) if text]  # a process that stops alone stops the others
        self._failed = bool(failures)
        if failures and state.is_world_process_zero:
            tqdm.write(f"warning: example predictions are not logged any more ({failures[0]}).")

    def _draw(self, model: Any) -> dict[str, Image.Image]:
        """Return pictures by name."""
        training = model.training
        trained = Trained(model.eval(), self.trainer.processor, self.split.labels, self.trainer.task.config)
        found = {}
        with torch.random.fork_rng(), self.trainer.compute_loss_context_manager():  # training shall draw as without
            for number, index in enumerate(self.indices, 1):
                image, _ = self.split[index]
                picture = draw(trained, image)
                picture.thumbnail((_LONGEST, _LONGEST))
                found[f"{number} {Path(self.split.where(index)).name}"] = picture
        model.train(training)
        return found


def draw(trained: Trained, image: Image.Image) -> Image.Image:
    """Draw what a model finds in an image, RGB."""
    if trained.task == "image-classification":
        score, index = trained.probabilities(image).max(0)
        return draw_class(image, int(index), float(score), trained.labels)
    if trained.task == "semantic-segmentation":
        return draw_regions(image, trained.regions(image), trained.labels)
    return draw_objects(image, trained.detect(image), trained.labels)
