"""Callbacks of a training: its progress, curves and pace, early stop, views of a cache, Ctrl-C, and the model card."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from e3va_peft.card import record_metrics
from e3va_peft.training.curves import best_entry, draw_curves


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


class Progress(ProgressCallback):
    """A bar over the steps with the time left, the last loss and score, and above it a line for each evaluation.

    Args:
        main_metric: The metric on the bar, and to mark where it is the best so far.
        quiet: Show the lines only.
    """

    def __init__(self, main_metric: str, quiet: bool = False) -> None:
        super().__init__()
        self.main_metric = main_metric
        self.quiet = quiet
        self.best = -math.inf
        self._shown: dict[str, str] = {}  # on the bar

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar where the run stands; warn of a run that ends before its learning rate is reached."""
        self.current_step = state.global_step
        warmup = args.get_warmup_steps(state.max_steps)
        if state.is_world_process_zero and warmup >= state.max_steps:
            tqdm.write(
                f"warning: the warm-up takes {warmup} steps and the training {state.max_steps}, so the learning rate "
                f"{args.learning_rate:g} is never reached. Lower training.warmup_steps, or train longer."
            )
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, dynamic_ncols=True, disable=self.quiet, unit="step"
            )
            self._show(*state.log_history)
        self.best = max((entry.get(f"eval_{self.main_metric}", -math.inf) for entry in state.log_history), default=-1)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Move the evaluation's bar."""
        if not self.quiet:
            super().on_prediction_step(*args, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show loss and score on the bar, the metrics of an evaluation on a line of their own, too."""
        if not state.is_world_process_zero or self.training_bar is None or logs is None:
            return
        if "eval_loss" in logs:
            self.training_bar.write(self._line(state, logs))
        self._show(logs)

    def _show(self, *entries: Mapping[str, Any]) -> None:
        """Put on the bar what is new in entries of the log."""
        names = {"loss": "loss", f"eval_{self.main_metric}": self.main_metric, "learning_rate": "lr"}
        found = {names[key]: f"{entry[key]:.4g}" for entry in entries for key in entry if key in names}
        if found:
            known = self._shown | found
            self._shown = {name: known[name] for name in names.values() if name in known}
            self.training_bar.set_postfix(self._shown)

    def _line(self, state: TrainerState, logs: Mapping[str, Any]) -> str:
        shown = {
            name.removeprefix("eval_"): value
            for name, value in without_timings(logs).items()
            if name.startswith("eval_")
        }
        metric = shown.get(self.main_metric)
        mark = ""
        if metric is not None and metric > self.best:
            self.best, mark = metric, "  best so far"
        values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        return f"epoch {state.epoch or 0:6.2f}  step {state.global_step:>6}  {values}{mark}"


class LostBest(TrainerCallback):
    """Has a run that resumes look for the best anew where its best checkpoint was removed, or put aside as damaged."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the score and the step of what cannot be loaded at the end."""
        if args.load_best_model_at_end and state.best_global_step and state.best_model_checkpoint is None:
            if state.is_world_process_zero:
                tqdm.write(
                    f"warning: the best checkpoint so far, of step {state.best_global_step}, is not there any more; "
                    "the best is looked for among the evaluations from here on."
                )
            state.best_global_step = state.best_metric = None


class Curves(TrainerCallback):
    """Draws loss and metric over the steps after each evaluation and at the end, and marks the best epoch.

    Args:
        path: The PNG.
        main_metric: The metric to draw.
    """

    def __init__(self, path: Path, main_metric: str) -> None:
        self.path = path
        self.main_metric = main_metric

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw what there is."""
        if state.is_world_process_zero:
            judge = args.metric_for_best_model
            draw_curves(
                state.log_history, self.path, self.main_metric, judge, not judge or bool(args.greater_is_better)
            )

    on_train_end = on_evaluate


class Patience(TrainerCallback):
    """Ends a run whose evaluations have stopped to become better.

    It counts in the log, which checkpoints hold: a run that resumes ends where it would have ended.

    Args:
        evaluations: How many in turn may be no better than the best one before.
        main_metric: The metric that judges where the run names no other.
    """

    def __init__(self, evaluations: int, main_metric: str) -> None:
        self.evaluations = evaluations
        self.main_metric = main_metric

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count, and end the run."""
        name = (args.metric_for_best_model or self.main_metric).removeprefix("eval_")
        scored = [entry for entry in state.log_history if f"eval_{name}" in entry]
        higher = not args.metric_for_best_model or bool(args.greater_is_better)
        best = best_entry(scored, f"eval_{name}", higher)
        over = control.should_training_stop or state.global_step >= state.max_steps
        if best is None or over or len(scored) - 1 - scored.index(best) < self.evaluations:
            return
        control.should_training_stop = True
        if state.is_world_process_zero:
            tqdm.write(
                f"stopped early, at step {state.global_step} of {state.max_steps}: {name} has not become better than "
                f"{best[f'eval_{name}']:.4g}, at step {best['step']}, in {self.evaluations} evaluations."
            )


class Pace(TrainerCallback):
    """Takes the time of each step, from its batch to its update; reading, evaluation and saving are left out.

    Attributes:
        seconds: Of the steps, in their order.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the peak of what a GPU did before."""
        if args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(args.device)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin."""
        self._begun = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the time. The loss has been looked at, so a GPU is done with the step but for its update."""
        self.seconds.append(time.perf_counter() - self._begun)


class NextView(TrainerCallback):
    """Says to a cached dataset which epoch it is, so that it shows that epoch's view.

    The Trainer by itself does so in one process, for a run that begins at the start of an epoch.

    Args:
        dataset: What `e3va_peft.cached` returned.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say it."""
        self.dataset.set_epoch(int(state.epoch or 0))


class StopOnInterrupt(TrainerCallback):
    """Lets Ctrl-C end a run after the step it is in, with a checkpoint; pressed again, at once.

    In a run of several processes Ctrl-C keeps its usual meaning: they would stop at different steps.

    Attributes:
        signal: Number of the signal that came; None where none did.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._evaluates = False
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen to Ctrl-C and to the signal that ends a job on a cluster."""
        if args.world_size == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                try:
                    self._before[number] = signal.signal(number, self._on_signal)
                except ValueError:  # not in the main thread: somebody else listens
                    return

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loader's worker, which inherits this; its parent ends it
            if number == signal.SIGTERM:
                os._exit(0)
            return
        if self.signal is not None:
            self.restore()
            raise KeyboardInterrupt
        self.signal = number
        what = "evaluation" if self._evaluates else "step"
        with contextlib.suppress(OSError):  # nobody may be reading any more
            tqdm.write(f"stopping after this {what}, with a checkpoint; once more to stop at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop where Ctrl-C was pressed, behind the evaluation that is due there."""
        self._stop(args, control)

    def _stop(self, args: TrainingArguments, control: TrainerControl) -> None:
        if self.signal is not None:
            control.should_save = control.should_training_stop = True
            args.save_total_limit = None  # by 1 Trainer would remove all but the best, and nothing could resume

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Note that it is an evaluation which is waited for."""
        self._evaluates = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop behind an evaluation in which Ctrl-C was pressed."""
        self._evaluates = False
        self._stop(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Likewise behind the last step of an epoch; one that was cut short is not evaluated."""
        self.on_step_end(args, state, control)
        if self.signal is not None and state.epoch is not None and state.epoch % 1:
            control.should_evaluate = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give Ctrl-C back."""
        self.restore()

    def restore(self) -> None:
        """Give Ctrl-C its former meaning."""
        while self._before:
            signal.signal(*self._before.popitem())
