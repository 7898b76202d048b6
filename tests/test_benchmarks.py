"""The benchmarks that are run elsewhere: a rehearsal here tells that they would run through."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox
from PIL import Image

from e3va_peft.data.formats import load_splits
from e3va_peft.training.config import read_config
from e3va_peft.training.tasks import task_of
from tests.helpers import run_python

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
GPU = BENCHMARKS / "gpu.py"


@pytest.mark.slow
def test_the_check_of_a_gpu_rehearses_on_the_cpu_and_says_so(tmp_path):
    selection = ["--settings=vit-b,voc-retinanet-swin-l", "--methods=e3va-int4,lora", "--precisions=fp32,fp16"]
    run_python([GPU, "--quick", "--no-compile", *selection, f"--output={tmp_path}"], tmp_path / "said")
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    steps = [row for row in rows if row["kind"] == "step"]
    assert len(steps) == 8 and all(row["seconds"] > 0 for row in steps)
    assert all(row["broken"] == [] for row in rows if row["kind"] == "laws")
    assert rows[0]["quick"]
    if "CPU" in rows[0]["device"]:
        assert all(row["counted"] and row["allocated"] is row["reserved"] is None for row in steps)
    assert all(row["predicted"] for row in steps)
    assert (tmp_path / "gpu.md").read_text() in (tmp_path / "said").read_text()


def test_scores_are_drawn_over_a_tenth_at_least_and_named_inside_the_frame():
    plots = runpy.run_path(str(BENCHMARKS / "accuracy" / "plots.py"))
    tasks = [path.stem.removesuffix("-cost") for path in (BENCHMARKS / "results" / "accuracy").glob("*-cost.json")]
    assert len(tasks) >= 6
    for task in tasks:
        found = plots["protocol"](task)
        for axes in plots["draw"](task, found).axes:
            low, high = axes.get_ylim()
            assert low < min(row["mean"] for row in found) and max(row["mean"] for row in found) < high
            assert high - low >= 0.099
            _assert_readable(axes, len(found))
        if curves := [row for row in found if "curve" in row]:
            assert all(row["score"] == row["curve"][-1]["score"] for row in curves)
            (axes,) = plots["draw_epochs"](task, curves).axes
            _assert_readable(axes, len(curves))


def test_the_names_on_the_frontier_lie_side_by_side_inside_the_frame(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    frontier = runpy.run_path(str(BENCHMARKS / "frontier.py"))
    recorded = frontier["points"]()
    for axes, found in zip(frontier["picture"](recorded).axes, recorded.values(), strict=True):
        _assert_readable(axes, len(found))


def _assert_readable(axes: Axes, count: int) -> None:
    """No name lies on another one or leaves the frame."""
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    frame = axes.get_window_extent()
    assert len(boxes) == count
    assert all(frame.contains(*box.min) and frame.contains(*box.max) for box in boxes)
    assert not any(Bbox.intersection(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_nuclei_as_they_are_published_become_what_the_recipes_read(tmp_path, monkeypatch):
    for name in "abcdef":
        for kind in ("images", "masks"):
            (tmp_path / "stage1_train" / name / kind).mkdir(parents=True)
        Image.new("RGBA", (20, 16)).save(tmp_path / "stage1_train" / name / "images" / f"{name}.png")
        for i, (x, y) in enumerate([(2, 3), (9, 8)]):
            mask = np.zeros((16, 20), np.uint8)
            mask[y : y + 4, x : x + 5] = 255
            Image.fromarray(mask).save(tmp_path / "stage1_train" / name / "masks" / f"{i}.png")
    output = tmp_path / "nuclei"
    monkeypatch.setattr(sys, "argv", ["nuclei.py", str(tmp_path / "stage1_train"), str(output)])
    runpy.run_path(str(BENCHMARKS / "nuclei.py"), run_name="__main__")
    paths = {
        "nuclei-upernet-swin": [f"data.masks={output}/semantic", f"data.images={output}/images"],
        "nuclei-cascade-mask-rcnn-swin": [
            f"data.images={output}/images/{{split}}",
            f"data.annotations={output}/annotations/instances_{{split}}.json",
        ],
    }
    for recipe, fields in paths.items():
        config = read_config(recipe, fields)
        train, val = load_splits(config.data, task_of(config).label_kind, 0)
        assert val is not None and (len(train), len(val)) == (4, 2)
        _, truth = train[0]
        if config.task == "semantic-segmentation":
            assert np.asarray(truth).sum() == 40 and set(np.unique(truth)) == {0, 1}
        else:
            assert truth.boxes.tolist() == [[2, 3, 7, 7], [9, 8, 14, 12]] and truth.labels.tolist() == [0, 0]
    tiles = tmp_path / "tiles"
    monkeypatch.setattr(sys, "argv", ["tiles.py", str(output), str(tiles), "--side", "8"])
    cut = runpy.run_path(str(BENCHMARKS / "tiles.py"), run_name="__main__")
    content = {
        name: json.loads((tiles / f"annotations/instances_{name}.json").read_text())
        for name in ("train", "val", "fit", "aside")
    }
    assert [len(content[name]["images"]) for name in content] == [16, 8, 12, 4]
    fit, aside = ({cut["source_of"](image) for image in content[name]["images"]} for name in ("fit", "aside"))
    assert len(fit) == 3 and len(aside) == 1 and not fit & aside  # tiles of one image are on one side
    for name in ("fit", "aside"):
        ids = {image["id"] for image in content[name]["images"]}
        own = [item for item in content["train"]["annotations"] if item["image_id"] in ids]
        assert own and content[name]["annotations"] == own
