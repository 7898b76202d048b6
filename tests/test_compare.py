"""`e3va compare`: fair to every method, stopped and resumed, and clear about what it cannot do."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from matplotlib.transforms import Bbox
from rich.console import Console
from typer.testing import CliRunner

from e3va_peft.cli import app
from e3va_peft.compare import plots
from e3va_peft.compare import run as module
from e3va_peft.compare.plots import draw_tradeoff
from e3va_peft.compare.report import Row, terminal_table
from e3va_peft.compare.run import Comparison, compare, read_comparison
from e3va_peft.errors import UserError
from e3va_peft.methods import METHODS
from e3va_peft.training import trainer
from e3va_peft.training.config import read_config
from e3va_peft.training.run import train
from tests.helpers import Stop, adapter_weights, stop_after
from tests.inputs import classify, segment, write

COMPARED = ("full", "head-only", "adapter")


@pytest.fixture(autouse=True)
def quickly(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(module, "ROUNDS", 2)


def config(root: Path, task: Any = classify, **training: Any) -> Path:
    """A config file that leaves learning rate and seed to the comparison."""
    values = task(root, num_train_epochs=2, **training)
    values["training"] = {k: v for k, v in values["training"].items() if k not in ("learning_rate", "seed")}
    return write(root / "config.yaml", values)


def plan(root: Path, **kwargs: Any) -> Comparison:
    return read_comparison(config(root), root / "out", **({"methods": ",".join(COMPARED)} | kwargs))


@pytest.fixture
def watched(monkeypatch):
    """What every run has seen: the head it began with, and its batches in order."""
    seen: dict[str, dict[str, Any]] = defaultdict(lambda: {"batches": []})
    original = trainer.VisionTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        run = seen[Path(self.args.output_dir).name]
        parameters = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
        key = next(name for name in parameters if name.startswith("classifier.") and name.endswith("weight"))
        run.setdefault("head", parameters[key].detach().clone())
        run["batches"].append(inputs["pixel_values"].sum((1, 2, 3)))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.VisionTrainer, "training_step", training_step)
    return seen


@pytest.mark.slow
def test_methods_are_compared_on_equal_terms_and_a_cut_comparison_resumes(tmp_path, watched, monkeypatch):
    trained: list[str] = []

    def train_four(config, *args):
        if len(trained) == 4:
            raise Stop
        trained.append(Path(config.output).name)
        return train(config, *args)

    with monkeypatch.context() as patch:
        patch.setattr("e3va_peft.training.run.train", train_four)
        with pytest.raises(Stop):
            compare(plan(tmp_path, seeds="0,7"))
    # seeds outside, methods inside: every method has a run before any has two
    assert trained == [f"{name}-seed0" for name in COMPARED] + ["full-seed7"]
    rows = compare(plan(tmp_path, seeds="0,7"))
    assert list(watched) == [f"{name}-seed{seed}" for seed in (0, 7) for name in COMPARED]
    for seed in (0, 7):
        runs = [watched[f"{name}-seed{seed}"] for name in COMPARED]
        for run in runs[1:]:
            torch.testing.assert_close(run["head"], runs[0]["head"], rtol=0, atol=0)
            torch.testing.assert_close(run["batches"], runs[0]["batches"], rtol=0, atol=0)
    assert not torch.equal(watched["full-seed0"]["head"], watched["full-seed7"]["head"])

    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["method"] for row in written["rows"]] == list(COMPARED)
    for row in written["rows"]:
        assert row["metric"] == "accuracy" and row["seeds"] == [0, 7] and len(row["scores"]) == 2
        metrics = json.loads((tmp_path / "out" / "runs" / f"{row['method']}-seed7" / "metrics.json").read_text())
        assert row["scores"][1] == metrics["metrics"]["accuracy"]
        assert row["mean"] == pytest.approx(sum(row["scores"]) / 2) and row["deviation"] >= 0
        assert row["learning_rate"] == METHODS[row["method"]].learning_rate
        assert len(row["step_rounds"]) == module.ROUNDS and min(row["step_rounds"]) > 0
    full, head, adapter = written["rows"]
    assert full["backbone_share"] == 1 and head["backbone_share"] == 0 < adapter["backbone_share"]
    assert {"torch", "peft", "transformers"} <= written["versions"].keys()
    table = (tmp_path / "out" / "compare.md").read_text()
    assert table.count("\n| ") == len(COMPARED) + 1 and f"{rows[2].mean:.3f} ± {rows[2].deviation:.3f}" in table
    for name in ("metric-memory.png", "metric-time.png"):
        assert (tmp_path / "out" / name).stat().st_size > 5000
    assert not list((tmp_path / "out" / "runs").glob("*/checkpoint-*"))

    # once more: nothing is trained, the step is measured again, and a report may hold fewer methods
    watched.clear()
    monkeypatch.setattr(module, "ROUNDS", 1)
    kept = tmp_path / "out" / "runs" / "adapter-seed7" / "checkpoint-9"  # of a run that was finished before
    kept.mkdir()
    again = compare(plan(tmp_path, methods="adapter", seeds="0,7"))
    assert not watched and again[0].scores == rows[2].scores and len(again[0].step_rounds) == 1
    assert kept.is_dir()
    assert again[0].backbone_share is None
    assert len(json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]) == 1
    with pytest.raises(FileExistsError, match=r"(?s)learning_rate: 0.001.*0.1 .*--overwrite"):
        compare(plan(tmp_path, methods="adapter", rates=["adapter=0.1"]))
    compare(plan(tmp_path, methods="adapter", rates=["adapter=0.1"]), overwrite=True)
    assert list(watched) == ["adapter-seed0"]


def test_times_of_a_busy_machine_are_warned_of(tmp_path, watched, monkeypatch, capsys):
    monkeypatch.setattr(module, "_UNEVEN", 1.0)
    compare(plan(tmp_path))
    shown = capsys.readouterr().out
    assert re.search(r"warning: a step of \S+ took between \d+ and \d+ ms: something else runs", shown)
    monkeypatch.setattr(module, "_UNEVEN", 1e9)
    compare(plan(tmp_path))
    assert "something else runs" not in capsys.readouterr().out


@pytest.mark.slow
def test_with_a_cache_methods_that_leave_the_backbone_read_it_and_all_see_the_same_views(tmp_path, watched):
    options = ["augment=true", "cache.views=2", f"cache.folder={tmp_path / 'frozen'}"]
    found = compare(plan(tmp_path, methods="full,head-only,e3va,bitfit", overrides=options))
    rows = {row.method: row for row in found}
    assert len(list(tmp_path.glob("frozen/*/*/cache.json"))) == 4  # of two methods and two splits
    read = {name: row.cached_step_seconds for name, row in rows.items()}
    assert read["full"] is None and read["head-only"] > 0 and read["e3va"] > 0
    assert rows["full"].cache_seconds is None and rows["e3va"].cache_seconds[0] > 0
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "from the cache" in table and "head-only, e3va; the others" in table

    batches = watched["full-seed0"]["batches"]
    torch.testing.assert_close(batches, watched["bitfit-seed0"]["batches"], rtol=0, atol=0)
    halves = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    views = [sorted(value for batch in half for value in batch.tolist()) for half in halves]
    assert views[0] != views[1]
    for name in ("head-only", "e3va"):
        assert all(not batch.any() for batch in watched[f"{name}-seed0"]["batches"])  # placeholders


@pytest.mark.slow
def test_a_run_that_is_cut_resumes_with_the_modules_that_were_put_in(tmp_path, monkeypatch):
    whole, cut = (
        read_comparison(config(tmp_path), tmp_path / name, "lorand").run("lorand", 0) for name in ("whole", "cut")
    )
    train(whole)
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        with pytest.raises(Stop):
            train(cut)
    assert train(cut)["resumed"]
    first, second = adapter_weights(Path(whole.output)), adapter_weights(Path(cut.output))
    assert first.keys() == second.keys() and any("baseline_adapter" in name for name in first)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_command_line_compares_segmenters(tmp_path):
    arguments = ["compare", str(config(tmp_path, segment)), "--output", str(tmp_path / "out"), "--methods"]
    arguments += ["lora-checkpointing,e3va", "--learning-rate", "e3va=5e-3", "--set", "training.num_train_epochs=1"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "[2/2] e3va, seed 0: learning rate 0.005" in done.output and "  ms/step" in done.output
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert [(row["metric"], row["learning_rate"], row["epochs"]) for row in rows] == [
        ("mean_iou", 1e-3, 1), ("mean_iou", 5e-3, 1),
    ]  # fmt: skip


def test_in_80_columns_no_header_and_no_number_is_cut():
    costs = (98333448, 1138068548, 0.1292, 1.4475, [1.4475], None)
    row = Row("lora-checkpointing", "mean_iou", [0, 1], [0.82, 0.86], 0.843, 0.023, 4e-3, 818180, 9, 6, [1, 1], *costs)
    lines = terminal_lines([row, dataclasses.replace(row, method="e3va")], 80)
    assert lines[0].split() == ["method", "mean_iou", "trained", "kept", "share", "peak", "ms/step"]
    assert lines[2].split("  ")[0] == "lora-checkpointing" and lines[2].endswith("12.9 %  1085 MiB     1448")
    read = terminal_lines([dataclasses.replace(row, cached_step_seconds=0.07)], 80)
    assert read[0].endswith("  cached") and read[2].endswith("1448      70") and not any("…" in line for line in read)


def terminal_lines(rows, columns):
    console = Console(width=columns, record=True, file=io.StringIO())
    console.print(terminal_table(rows))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_the_help_lists_every_method():
    listed = " ".join(CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "200"}).output.split())
    assert f"Methods: {', '.join(METHODS)}." in listed.replace("│ ", "")


def test_the_configs_own_method_keeps_its_options_and_its_rate(tmp_path):
    values = classify(tmp_path, learning_rate=0.5) | {"method": {"name": "lora", "r": 3}}
    comparison = read_comparison(write(tmp_path / "c.yaml", values), tmp_path / "out")
    assert tuple(comparison.methods) == tuple(METHODS)
    assert comparison.run("lora", 0).method == {"name": "lora", "r": 3}
    assert comparison.run("lora-checkpointing", 0).method == {"name": "lora-checkpointing", "r": 3}
    assert comparison.run("e3va", 0).method == {"name": "e3va"}
    rates = [comparison.run(name, 4).training["learning_rate"] for name in ("lora", "e3va")]
    assert rates == [0.5, 2e-3] and comparison.run("e3va", 4).seed == 4


def test_settings_of_a_method_are_compared_side_by_side(tmp_path):
    titles = ("e3va", "e3va:live_blocks=1", "e3va:live_blocks=1:r=4")
    rows = compare(plan(tmp_path, methods=",".join(titles), rates=["e3va=3e-3", "e3va:live_blocks=1=1e-3"]))
    assert [row.method for row in rows] == list(titles)
    assert [row.learning_rate for row in rows] == [3e-3, 1e-3, 3e-3]
    assert rows[0].trained_parameters == rows[1].trained_parameters > rows[2].trained_parameters
    assert rows[0].saved_bytes != rows[1].saved_bytes
    folders = ["e3va-seed0", "e3va-live_blocks-1-seed0", "e3va-live_blocks-1-r-4-seed0"]
    assert [read_config(tmp_path / "out" / "runs" / name / "config.yaml").method for name in folders] == [
        {"name": "e3va"},
        {"name": "e3va", "live_blocks": 1},
        {"name": "e3va", "live_blocks": 1, "r": 4},
    ]


def test_options_stand_over_those_of_the_config_and_have_a_cache_of_their_own(tmp_path):
    values = classify(tmp_path) | {"method": {"name": "e3va", "r": 3}, "cache": {"folder": str(tmp_path / "frozen")}}
    comparison = read_comparison(write(tmp_path / "c.yaml", values), tmp_path / "out", "e3va:live_blocks=1,e3va:r=4")
    first, second = (comparison.run(title, 0) for title in comparison.methods)
    assert first.method == {"name": "e3va", "r": 3, "live_blocks": 1} and second.method == {"name": "e3va", "r": 4}
    assert first.cache.folder != second.cache.folder and first.output != second.output
    lists = read_comparison(tmp_path / "c.yaml", tmp_path / "out", "e3va:taps=[attention, mlp]:r=4,lora")
    assert list(lists.methods) == ["e3va:taps=[attention, mlp]:r=4", "lora"]
    assert lists.methods["e3va:taps=[attention, mlp]:r=4"]["taps"] == ["attention", "mlp"]


def test_a_row_that_cannot_be_is_named_before_another_is_trained(tmp_path, watched):
    with pytest.raises(UserError, match=r"methods='e3va:live_blocks=99': .*live_blocks=99"):
        compare(plan(tmp_path, methods="head-only,e3va:live_blocks=99"))
    with pytest.raises(UserError, match=r"methods='lora:r=0': "):
        compare(plan(tmp_path, methods="head-only,lora:r=0"))
    assert not watched


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"methods": "e3va,adaptorformer"}, r"methods='adaptorformer': .*adaptformer"),
        ({"methods": "e3va,lora,e3va"}, "methods=.*e3va.*twice"),
        ({"methods": ","}, "methods="),
        ({"seeds": "0,one"}, "seeds=.*'one'"),
        ({"seeds": "-1"}, "seeds=.*'-1'"),
        ({"seeds": "1,1"}, "seeds='1,1'"),
        ({"rates": ["lora=1e-3"]}, "'lora' .*full, head-only, adapter"),
        ({"methods": "e3va:lr=3"}, "method.lr"),
        ({"methods": "e3va:r=0"}, "method.r=0"),
        ({"methods": "mona:r=3"}, "method.r: mona has no options"),
        ({"methods": "e3va:r"}, "methods='e3va:r': 'r' has no value"),
        ({"methods": "e3va:r="}, "methods='e3va:r=': 'r=' has no value. Write e3va:r=8"),
        ({"methods": "e3va:r=8,e3va: r=8"}, "twice"),
        ({"methods": "e3va:r=8", "rates": ["e3va:r=4=1e-3"]}, "'e3va:r=4' .*e3va:r=8, e3va"),
        ({"rates": ["1e-3"]}, "learning-rate='1e-3': must be METHOD=RATE"),
        ({"overrides": ["sweep.seed=[1, 2]"]}, "sweep: .*--methods"),
        ({"rates": ["adapter"]}, "--learning-rate adapter="),
        ({"rates": ["adapter=-1"]}, "adapter=-1"),
        ({"overrides": ["method=lora"]}, "--methods"),
        ({"overrides": ["training.seed=3"]}, "--seeds"),
        ({"overrides": ["training.learning_rate=3"]}, "--learning-rate"),
        ({"overrides": ["output=there"]}, "--output"),
        ({"overrides": ["training.epochs=3"]}, "training.epochs"),
        ({"overrides": ["training.push_to_hub=true"]}, "training.push_to_hub: every run of a comparison"),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_is_loaded(arguments, words, tmp_path):
    with pytest.raises(UserError, match=words):
        plan(tmp_path, **arguments)


def test_a_run_of_a_comparison_is_not_cut_short_by_patience(tmp_path):
    comparison = plan(tmp_path, overrides=["patience=2"])
    assert comparison.config.patience == 2 and comparison.run("full", 0).patience is None


def test_what_only_the_data_or_the_model_shows_is_said_before_the_first_run(tmp_path, watched, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"output=.*out"):
        compare(plan(tmp_path))
    with pytest.raises(UserError, match=r"output=.*config\.yaml"):
        compare(read_comparison(config(tmp_path), tmp_path / "config.yaml"))
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match="num_processes"):
            compare(read_comparison(config(tmp_path), tmp_path / "new"))
    with monkeypatch.context() as patch:
        patch.setattr("e3va_peft.methods.base.find_exits", lambda model: [])
        with pytest.raises(UserError, match="holds no backbone"):
            compare(read_comparison(config(tmp_path), tmp_path / "new"))
    (tmp_path / "colors" / "test").rename(tmp_path / "colors" / "holiday")
    with pytest.raises(UserError, match=r"data\.eval_split"):
        compare(read_comparison(config(tmp_path), tmp_path / "new"))
    assert not watched and not (tmp_path / "new").exists()


def test_labels_of_a_crowded_plot_lie_side_by_side(tmp_path, monkeypatch):
    places = [(name, 0.5 + 0.002 * i, 0.01) for i, name in enumerate(METHODS)]
    boxes = []
    place = plots._place
    monkeypatch.setattr(
        plots, "_place", lambda text, dx, dy: boxes.append((text, place(text, dx, dy))) or boxes[-1][1]
    )
    draw_tradeoff(places, [100 + i for i in range(len(places))], tmp_path / "plot.png", "MiB", "accuracy")
    last = list({id(text): box for text, box in boxes}.values())  # where each name was put in the end
    assert len(last) == len(METHODS)
    overlaps = [
        (i, j) for i, a in enumerate(last) for j, b in enumerate(last) if i < j and Bbox.intersection(a, b) is not None
    ]
    assert not overlaps


def test_a_small_gain_looks_small(tmp_path, monkeypatch):
    seen: list[tuple[float, float]] = []
    monkeypatch.setattr(plots, "label", lambda axes, points: seen.append(axes.get_ylim()))
    draw_tradeoff([("lora", 0.226, None), ("e3va", 0.219, None)], [1, 2], tmp_path / "plot.png", "MiB", "mean_iou")
    low, high = seen[0]
    assert low < 0.219 < 0.226 < high and high - low >= 0.099
