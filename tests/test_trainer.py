"""The Hugging Face `Trainer` on an adapted model."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer

from e3va_peft import E3VAConfig
from e3va_peft.training import MetricsToCard, training_arguments
from tests.helpers import StopAt, assert_same, every_way, outputs
from tests.models import BY_NAME, CASES, Case, every_family


class Examples(Dataset):
    """A few fixed examples of a case, picked apart from one batch."""

    def __init__(self, case: Case, length: int = 12) -> None:
        batch = case.training_batch(length)
        self.items = [{key: value[i] for key, value in batch.items()} for i in range(length)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.items[index]


def trainer(case: Case, folder, model: nn.Module | None = None, **arguments) -> Trainer:
    model = model or get_peft_model(case.base(), E3VAConfig(r=4))
    defaults = {
        "num_train_epochs": 4, "per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "logging_strategy": "epoch", "seed": 3,
    }  # fmt: skip
    return Trainer(
        model,
        training_arguments(folder, **(defaults | arguments)),
        train_dataset=Examples(case),
        eval_dataset=Examples(case, 6),
        callbacks=[MetricsToCard()],
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@every_family
def test_trainer_trains_evaluates_and_saves(case, tmp_path):
    run = trainer(case, tmp_path, num_train_epochs=4)
    before = weights(run.model)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    changed = {name for name, value in weights(run.model).items() if not torch.equal(value, before[name])}
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    statistics = {name for name in changed if "running_" in name or "num_batches" in name}
    assert changed - statistics == trained
    assert run.evaluate()["eval_loss"] > 0
    run.save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(case.base(), tmp_path / "adapter")
    assert_same(outputs(again, case.batch()), outputs(run.model.eval(), case.batch()), rtol=0, atol=0)
    assert "| eval_loss |" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("name", ["swin-upernet", "swin-classifier", "vit-classifier", "dinov2-upernet"])
def test_resume_equals_an_uninterrupted_run(name, tmp_path):
    case = BY_NAME[name]
    whole = trainer(case, tmp_path / "whole")
    whole.train()
    arguments = {"save_strategy": "steps", "save_steps": 5}
    cut = trainer(case, tmp_path / "cut", max_steps=-1, **arguments)
    cut.add_callback(StopAt(5))
    cut.train()
    assert cut.state.global_step == 5
    resumed = trainer(case, tmp_path / "cut", **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 12
    assert_same(weights(resumed.model), weights(whole.model), rtol=1e-6, atol=1e-7)


def test_load_best_model_at_end(tmp_path):
    case = BY_NAME["swin-classifier"]
    run = trainer(
        case, tmp_path, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="eval_loss", num_train_epochs=5, learning_rate=0.3, lr_scheduler_type="constant",
    )  # fmt: skip
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.state.best_metric == min(losses)
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in {"swin-classifier", "dinov2-upernet"}], ids=lambda c: c.name
)
def test_bf16_follows_fp32(case, tmp_path):
    losses = {}
    for bf16 in (False, True):
        run = trainer(case, tmp_path / str(bf16), bf16=bf16, num_train_epochs=6)
        run.train()
        losses[bf16] = torch.tensor([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        assert all(p.dtype == torch.float32 for p in run.model.parameters())
    torch.testing.assert_close(losses[True], losses[False], rtol=0.05, atol=0.02)


def test_no_weight_decay_on_norms_and_biases(tmp_path):
    for name in ("swin-upernet", "vit-classifier"):
        run = trainer(BY_NAME[name], tmp_path, weight_decay=0.1)
        optimizer = run.create_optimizer()
        names = {id(p): n for n, p in run.model.named_parameters()}
        decayed, kept = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
        assert optimizer.param_groups[0]["weight_decay"] == 0.1 and optimizer.param_groups[1]["weight_decay"] == 0
        assert not any("norm" in name or "bias" in name for name in decayed)
        assert all("norm" in name or "bias" in name for name in kept)
        assert any(name.endswith("u1") for name in decayed) and any(name.endswith("bias1") for name in kept)


def test_recipe_can_be_overridden(tmp_path):
    assert training_arguments(tmp_path).learning_rate == 2e-3
    arguments = training_arguments(tmp_path, learning_rate=1e-4, lr_scheduler_type="linear")
    assert arguments.learning_rate == 1e-4 and arguments.lr_scheduler_type == "linear"


def test_gradient_accumulation_and_clipping_work(tmp_path):
    case = BY_NAME["dinov2-classifier"]
    run = trainer(case, tmp_path, gradient_accumulation_steps=3, per_device_train_batch_size=2, max_grad_norm=0.1)
    run.train()
    assert run.state.global_step == 8


@every_way
def test_fp16_with_a_gradient_scaler_follows_fp32_and_a_skipped_step_changes_nothing(way):
    """What Accelerate does for `fp16=True`, by hand, because Accelerate refuses fp16 without a GPU."""
    case = BY_NAME["swin-classifier"]
    batch = case.training_batch(4)
    curves, skipped = {}, 0
    for half in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(case.base(), E3VAConfig(r=4, **way)).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=100, enabled=half)
        curves[half] = []
        for _ in range(16):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, enabled=half):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            before, scale = [p.detach().clone() for p in trained], scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            curves[half].append(loss.item())
            if scaler.get_scale() < scale:  # an overflow halves the scale and skips the step, as it shall
                assert all(map(torch.equal, trained, before))
                skipped += 1
    assert 1 <= skipped < 8
    fp16, fp32 = curves[True][skipped:], curves[False]
    torch.testing.assert_close(torch.tensor(fp16), torch.tensor(fp32[: len(fp16)]), rtol=0.05, atol=0.02)
    assert fp16[-1] < fp16[0]
