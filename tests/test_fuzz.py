"""Whatever is written into a config, an annotation file, an adapter or a command, it works or is one clear error.

`E3VA_FUZZ=10000 python -m pytest tests/test_fuzz.py` tries as many cases of each.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from PIL import Image
from transformers import SwinForImageClassification
from typer.testing import CliRunner

from e3va_peft import E3VAConfig, load_adapter
from e3va_peft.cli import app
from e3va_peft.data.config import LabelKind
from e3va_peft.data.formats import load_splits
from e3va_peft.data.verify import verify_split
from e3va_peft.errors import UserError
from e3va_peft.training.config import parse_config, read_config
from tests.inputs import save_shapes, save_swin

resource = pytest.importorskip("resource")  # which Windows does not have

CASES = int(os.environ.get("E3VA_FUZZ", "25"))
fuzz = settings(
    max_examples=CASES,
    deadline=None,
    derandomize="E3VA_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

SECONDS, BYTES = 2, 2**30  # of a case: the processors' time of all its threads, and growth of the process's peak


def bounded(test: Callable[..., None]) -> Callable[..., None]:
    """Let no case of a test take more time or memory than is meant; the first one imports what it needs."""
    calls = itertools.count()

    @functools.wraps(test)
    def measured(*args: Any, **kwargs: Any) -> None:
        start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        test(*args, **kwargs)
        seconds = time.process_time() - start
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert next(calls) == 0 or (seconds < SECONDS and grown < BYTES), (seconds, grown)

    return measured


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 2, 10**9, 10**400, 1e308, -0.5]),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["", "~", "../..", "/dev/null", "[/bold]", "e3va", "train", "\x00", "a" * 5000, "runs/x", "{split}"]
    ),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(content: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something can be put in nested lists and mappings."""
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    below = [place for key in keys for place in places(content[key], (*prefix, key))]
    return [*((*prefix, key) for key in keys), *below]


@st.composite
def spoilt(draw: st.DrawFn, content: Any) -> Any:
    """Something valid, with one to three of its values replaced, or removed."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        where = places(content)
        if not where:
            break
        *path, last = draw(st.sampled_from(where))
        inner = content
        for key in path:
            inner = inner[key]
        if draw(st.booleans()) or isinstance(inner, list):
            inner[last] = draw(VALUES)
        else:
            del inner[last]
    return content


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


CONFIG: dict[str, Any] = {
    "task": "image-classification", "model": "m", "output": "o", "method": {"name": "e3va", "r": 4, "taps": ["mlp"]},
    "data": {"source": "s", "labels": ["a", "b"], "eval_fraction": 0.1, "train_samples": 5, "verify": True},
    "augment": {"scale": [0.5, 1], "flip": True}, "cache": {"views": 2, "limit": "4GiB"}, "image_size": 32,
    "processor": {"image_mean": [0.5, 0.5, 0.5]}, "model_options": {"x": 1}, "lr_steps": [1, 2],
    "backbone_lr_multiplier": 0.1,
    "training": {"num_train_epochs": 3, "learning_rate": 1e-3, "eval_strategy": "no", "report_to": "none"},
    "sweep": {"learning_rate": [1e-3, 2e-3]},
}  # fmt: skip


@fuzz
@given(values=spoilt(CONFIG) | st.dictionaries(st.sampled_from(list(CONFIG)), VALUES))
@bounded
def test_any_config_is_read_or_refused(values):
    try:
        config = parse_config(values)
    except UserError as error:
        assert str(error)
    else:
        assert parse_config(config.to_dict()).to_dict() == config.to_dict() or config.to_dict() != config.to_dict()


@fuzz
@given(
    text=st.text(max_size=200) | st.sampled_from(["&a [*a]", "a: &a {b: *a}", "!!python/object:os.system {}", "? ? ?"])
)
@bounded
def test_any_text_is_read_as_a_config_or_refused(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(UserError):
        read_config(tmp_path / "c.yaml")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return save_shapes(tmp_path_factory.mktemp("shapes"))


@fuzz
@given(data=st.data())
@bounded
def test_any_annotation_file_is_read_or_refused(data, shapes, tmp_path):
    content = json.loads((shapes / "coco" / "val.json").read_text())
    file = tmp_path / "objects.json"
    file.write_text(json.dumps(data.draw(spoilt(content) | VALUES)))
    fields = {"images": str(shapes / "coco" / "val"), "annotations": str(file)}
    config = parse_config({"task": "instance-segmentation", "model": "m", "output": "o", "data": fields})
    try:
        verify_split(load_splits(config.data, "instances")[0])
    except UserError as error:
        assert "objects.json" in str(error) or "data." in str(error), error


def read_or_refused(values: dict[str, Any], kind: LabelKind, *named: str) -> None:
    """Load and check a training split; an error is the user's to solve, and names one of these, or a field."""
    task = "semantic-segmentation" if kind == "label-map" else "object-detection"
    try:
        config = parse_config({"task": task, "model": "m", "output": "o", "data": values})
        verify_split(load_splits(config.data, kind)[0])
    except UserError as error:
        assert any(name in str(error) for name in (*named, "data.")), error


LINES = st.lists(
    st.text(max_size=12)
    | st.sampled_from(["val0", "val0 1", "../val0", "/dev/zero", "a" * 5000, "\x00", "images/val/val0.png", "../.."]),
    max_size=4,
).map("\n".join)


def rewrite(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", errors="surrogatepass")


@st.composite
def cut(draw: st.DrawFn, text: str) -> str:
    """A text, part of which is left out, or replaced."""
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    odd = [
        "nan",
        "-inf",
        "1e999",
        "9" * 5000,
        "<",
        "&a;",
        "<object>",
        "<!DOCTYPE a [<!ENTITY b 'c'>]>",
        "\x00",
        "-1 ",
        "0.5 ",
    ]
    return text[:start] + draw(st.sampled_from(odd) | st.text(max_size=9)) + text[end:]


@fuzz
@given(data=st.data())
@bounded
def test_any_pascal_voc_is_read_or_refused(data, shapes):
    files = [shapes / "voc" / "ImageSets" / "Main" / "val.txt", shapes / "voc" / "Annotations" / "val0.xml"]
    before = [file.read_text() for file in files]
    try:
        rewrite(files[0], data.draw(st.just(before[0]) | LINES))
        rewrite(files[1], data.draw(cut(before[1])))
        read_or_refused(
            {"source": str(shapes / "voc"), "train_split": "val"}, "boxes", "val0.xml", "split 'val'", "val.txt"
        )
    finally:
        for file, text in zip(files, before, strict=True):
            file.write_text(text)


YAML = {"path": ".", "train": "images/val", "val": ["images/val"], "nc": 2, "names": {"0": "square", "1": "disc"}}


@fuzz
@given(data=st.data(), kind=st.sampled_from(["boxes", "instances"]))
@bounded
def test_any_yolo_is_read_or_refused(data, kind, shapes):
    place = shapes / "yolo"
    files = [place / "data.yaml", place / "list.txt", place / "labels" / "val" / "val0.txt"]
    before = [file.read_text() if file.exists() else "" for file in files]
    try:
        rewrite(files[0], json.dumps(data.draw(st.just(YAML | {"train": "list.txt"}) | spoilt(YAML) | VALUES)))
        rewrite(files[1], data.draw(LINES))
        rewrite(files[2], data.draw(cut(before[2])))
        read_or_refused({"source": str(place)}, kind, "data.yaml", "list.txt", "val0.txt", "split 'train'")
    finally:
        for file, text in zip(files, before, strict=True):
            file.write_text(text)


@fuzz
@given(
    values=st.lists(st.integers(0, 2**16), min_size=1, max_size=6),
    mode=st.sampled_from(["1", "L", "P", "I;16", "I", "F", "LA", "RGB", "RGBA", "CMYK"]),
    form=st.sampled_from(["PNG", "TIFF"]),
    size=st.tuples(*[st.sampled_from([40, 44]) | st.integers(1, 50)] * 2),
    damage=st.none() | st.tuples(st.floats(0, 1), st.integers(0, 255)),
    fields=st.fixed_dictionaries(
        {},
        optional={
            "labels": st.integers(1, 300) | VALUES,
            "reduce_labels": st.booleans(),
            "ignore_index": st.integers(0, 65535),
        },
    ),
)
@bounded
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_any_label_map_is_read_or_refused(values, mode, form, size, damage, fields, tmp_path):
    places = [tmp_path / name for name in ("images", "masks")]
    for place in places:
        place.mkdir(exist_ok=True)
    Image.new("RGB", (40, 44)).save(places[0] / "0.png")
    depth = np.uint16 if mode == "I;16" else np.int32 if mode == "I" else np.uint8
    pixels = Image.fromarray(np.resize(np.array(values).astype(depth), size[::-1]))
    content = io.BytesIO()
    image = pixels if mode in ("I;16", "I") else pixels.convert(mode)
    image.save(content, "TIFF" if mode in ("I", "F", "CMYK") else form)
    written = bytearray(content.getvalue())
    if damage is not None:
        written[min(int(damage[0] * len(written)), len(written) - 1)] = damage[1]
    (places[1] / "0.png").write_bytes(written)
    read_or_refused(
        {"images": str(places[0]), "masks": str(places[1]), "labels": 3} | fields, "label-map", "0.png", "label maps"
    )


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("adapter")
    base = SwinForImageClassification.from_pretrained(save_swin(root / "base"))
    get_peft_model(base, E3VAConfig(r=2)).save_pretrained(root / "adapter")
    return root / "adapter"


@fuzz
@given(data=st.data(), name=st.sampled_from(["adapter_config.json", "base_config.json"]))
@bounded
@pytest.mark.filterwarnings("ignore")
def test_any_adapter_is_loaded_or_refused(data, name, adapter):
    before = (adapter / name).read_text()
    try:
        (adapter / name).write_text(json.dumps(data.draw(spoilt(json.loads(before)) | VALUES)))
        load_adapter(adapter)
    except (ValueError, OSError) as error:
        assert not isinstance(error, UnicodeError) and str(error)
    finally:
        (adapter / name).write_text(before)


COMMANDS = ["train", "eval", "predict", "recipes", "plan", "compare", "export", "app"]
WORDS = st.sampled_from(
    ["train", "--set", "--output", "--overwrite", "--top", "x.yaml", "c.yaml", "training.lr=1", "a=b", "=", "-1",
     "[/x]", "dinov2", "\u2028", "--adapters", "runs/x", "--data", "--methods", "model.onnx"]
) | st.text(st.characters(exclude_characters="/~."), max_size=8)  # fmt: skip


@pytest.fixture(scope="module")
def imported():
    """Import what each command needs, which counts for none of its cases."""
    for command in COMMANDS:
        CliRunner().invoke(app, [command, "./nowhere"])


@fuzz
@given(words=st.lists(WORDS, max_size=5), command=st.sampled_from(COMMANDS))
@bounded
def test_any_command_ends_with_what_is_wrong(words, command, imported, tmp_path):
    (tmp_path / "c.yaml").write_text(json.dumps(CONFIG | {"model": "./nowhere", "data": {"source": "./nowhere"}}))
    done = CliRunner().invoke(app, [command, *words])
    assert done.exception is None or isinstance(done.exception, SystemExit), (words, done.exception)
    assert done.exit_code in (0, 1, 2)
