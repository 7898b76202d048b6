"""What a run shows while it runs: the bar over its steps, and its curves."""

from __future__ import annotations

import re

import pytest

from e3va_peft.training.config import parse_config
from e3va_peft.training.run import train
from tests.helpers import Stop, stop_after
from tests.inputs import classify


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
