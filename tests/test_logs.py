"""Progress of a run: the bar over its steps, its curves, and its logs for TensorBoard and wandb."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from e3va_peft.training import logs
from e3va_peft.training.config import parse_config
from e3va_peft.training.curves import curves
from e3va_peft.training.predict import predict
from e3va_peft.training.run import train
from tests.helpers import Stop, adapter_weights, assert_same, stop_after
from tests.inputs import classify, detect, segment


def test_the_bar_shows_the_time_left_and_the_last_score_also_of_a_run_that_was_resumed(tmp_path, monkeypatch, capsys):
    config = parse_config(classify(tmp_path, disable_tqdm=False))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(4, patch)
        train(config)
    bars = _bars(capsys.readouterr().err)
    assert "accuracy" not in bars[3][0] and all(f"{name}=" in bars[4][-1] for name in ("loss", "accuracy", "lr"))
    history = train(config)["history"]
    bars = _bars(capsys.readouterr().err)
    first, *_, last = (f"accuracy={entry['eval_accuracy']:.4g}" for entry in history if "eval_accuracy" in entry)
    assert first in bars[3][-1] and last in bars[9][-1]


def test_a_log_file_gets_a_line_an_evaluation_and_no_bar(tmp_path, capsys):
    values = classify(tmp_path)
    del values["training"]["disable_tqdm"]
    train(parse_config(values))
    shown = capsys.readouterr()
    assert not _bars(shown.err) and shown.out.count("accuracy") >= 3
    assert len(re.findall(r"^epoch +\d.*accuracy", shown.out, re.MULTILINE)) == 3


def _bars(shown: str) -> dict[int, list[str]]:
    """States of the bar over nine steps, by the step: what is behind the time left."""
    found: dict[int, list[str]] = {}
    for step, rest in re.findall(r"(\d)/9 \[\d\d:\d\d<[\d:?]+,([^\]]*)\]", shown):
        found.setdefault(int(step), []).append(rest)
    return found


@pytest.mark.parametrize(("judge", "higher", "step"), [("accuracy", True, 4), ("eval_loss", False, 6)])
def test_curves_mark_the_best_epoch_on_axes_that_begin_at_nothing(judge, higher, step):
    evaluations = [(2, 0.90, 0.7), (4, 0.92, 0.6), (6, 0.92, 0.5), (6, 0.92, 0.6)]  # the best is scored again, last
    history: list[dict[str, float]] = [
        {"step": step, "epoch": step / 2, "eval_accuracy": accuracy, "eval_loss": loss}
        for step, accuracy, loss in evaluations
    ]
    figure = curves([{"step": 1, "epoch": 0.5, "loss": 2.0}, *history], "accuracy", judge, higher)
    assert [axes.get_ylim()[0] for axes in figure.axes] == [0, 0] and figure.axes[1].get_ylim()[1] == 1
    (text,) = (text.get_text() for text in figure.legends[0].get_texts() if "best" in text.get_text())
    assert f"epoch {step // 2}" in text
    assert any(list(line.get_xdata()) == [step, step] for line in figure.axes[0].get_lines())


def test_tensorboard_gets_scores_and_pictures_in_one_log_and_training_is_the_same(tmp_path, monkeypatch):
    train(parse_config(classify(tmp_path, "plain")))
    config = parse_config(classify(tmp_path, report_to="tensorboard"))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(4, patch)
        train(config)
    train(config)
    log = _log(tmp_path / "run")
    assert [event.step for event in log.Scalars("train/loss")] == list(range(1, 10))
    assert {event.step for event in log.Scalars("eval/accuracy")} == {3, 6, 9}
    names = log.Tags()["images"]
    assert [name.split()[-1] for name in names] == ["0.png", "2.png", "1.png", "3.png"], "spread over both classes"
    assert all({event.step for event in log.Images(name)} == {3, 6, 9} for name in names)
    assert_same(adapter_weights(tmp_path / "run"), adapter_weights(tmp_path / "plain"), rtol=0, atol=0)


@pytest.mark.parametrize("values", [segment, lambda root, **more: detect(root, "mask-rcnn", "coco", **more)])
def test_a_logged_picture_is_what_predict_draws(values, tmp_path):
    config = parse_config(values(tmp_path, report_to="tensorboard", num_train_epochs=1))
    train(config)
    photos = next((tmp_path / name) for name in ("discs/images/val", "shapes/coco/val") if (tmp_path / name).exists())
    predict(str(tmp_path / "run"), [str(photos)], tmp_path / "found")
    log = _log(tmp_path / "run")
    assert len(log.Tags()["images"]) == 3
    for name in log.Tags()["images"]:
        logged = Image.open(io.BytesIO(log.Images(name)[-1].encoded_image_string))
        drawn = Image.open((tmp_path / "found" / "overlays" / name.split()[-1]).with_suffix(".png"))
        assert np.array_equal(np.asarray(logged), np.asarray(drawn))


def test_a_picture_that_cannot_be_drawn_is_warned_of_once_and_a_replaced_run_takes_its_log_along(
    tmp_path, monkeypatch, capsys
):
    config = parse_config(classify(tmp_path, report_to="tensorboard"))
    with monkeypatch.context() as patch:
        patch.setattr(logs, "draw", lambda *args: 1 / 0)
        train(config)
    assert capsys.readouterr().out.count("not logged any more (division by zero)") == 1
    assert not _log(tmp_path / "run").Tags()["images"]
    before = set((tmp_path / "run" / "logs").rglob("events*"))
    train(config, overwrite=True)
    assert before and not before & set((tmp_path / "run").rglob("events*")) and _log(tmp_path / "run").Tags()["images"]


def test_wandb_gets_scores_and_pictures_in_one_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = parse_config(classify(tmp_path, report_to="wandb"))
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(4, patch)
        train(config)
    assert wandb.run is None
    train(config)
    assert wandb.run is None
    stores = list((tmp_path / "run").glob("logs/wandb/offline-run-*/run-*.wandb"))
    assert len({store.parent for store in stores}) == 2 and len({store.name for store in stores}) == 1
    assert len(list((tmp_path / "run").glob("logs/wandb/offline-run-*/files/media/images/*.png"))) == 4 * 4


def _log(run: Path) -> EventAccumulator:
    log = EventAccumulator(str(run / "logs" / "tensorboard"))
    return log.Reload()
