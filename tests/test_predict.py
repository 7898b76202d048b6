"""`e3va predict` and `e3va eval` from an adapter alone: what is written for each image, and what cannot be loaded."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, BitImageProcessor, SegformerImageProcessor
from typer.testing import CliRunner

import e3va_peft
from e3va_peft import E3VAConfig
from e3va_peft.cli import app
from e3va_peft.data.formats import load_eval_split, load_splits
from e3va_peft.data.images import open_label_map
from e3va_peft.detection import DetectionImageProcessor
from e3va_peft.errors import UserError
from e3va_peft.methods import adapt
from e3va_peft.training.config import parse_config, read_config
from e3va_peft.training.drawing import palette
from e3va_peft.training.export import export
from e3va_peft.training.predict import Trained, evaluate, load_trained, predict, predict_together
from e3va_peft.training.run import train
from e3va_peft.training.sheet import write_sheet
from e3va_peft.training.tasks import task_of
from e3va_peft.training.tasks.base import find_config, find_processor
from tests.helpers import pickle_weights
from tests.inputs import classify, segment, small_head
from tests.models import BY_NAME

LABELS = {0: "ground", 1: "disc", 2: "edge"}
MODELS = {"classifier": "swin-classifier", "segmenter": "swin-upernet"}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """A folder with a base model, and an untrained adapter with its image processor, for each task."""
    root = tmp_path_factory.mktemp("adapters")
    for name, case in MODELS.items():
        base = BY_NAME[case].base()
        base.config.id2label, base.config.label2id = LABELS, {v: k for k, v in LABELS.items()}
        base.save_pretrained(root / f"{name}-base")
        model = get_peft_model(type(base).from_pretrained(root / f"{name}-base"), E3VAConfig(r=2))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.dim() > 1:
                    parameter.add_(0.5 * torch.randn(parameter.shape))
        model.save_pretrained(root / name)
    square = {"height": 32, "width": 32}
    BitImageProcessor(size={"shortest_edge": 36}, crop_size=square).save_pretrained(root / "classifier")
    SegformerImageProcessor(size={"shortest_edge": 32}, do_reduce_labels=True).save_pretrained(root / "segmenter")
    return root


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Pictures in a folder and in one below it, of two sizes, and one in a format other than 8-bit RGB."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, (height, width) in (("a.jpg", (40, 60)), ("b.v2.png", (50, 36)), ("below/a.png", (64, 48))):
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
    Image.fromarray(generator.integers(0, 65536, (33, 34)).astype(np.uint16)).save(folder / "below" / "grey.tif")
    (folder / "notes.txt").write_text("no image")
    return folder


def read(output: Path) -> Any:
    return json.loads((output / "predictions.json").read_text())


# --- predict ---------------------------------------------------------------------------------------------------------


def test_a_classifier_names_the_most_probable_classes_of_each_image(adapters, pictures, tmp_path):
    output = tmp_path / "found"
    entries = predict(str(adapters / "classifier"), [str(pictures)], output, top=2)
    assert entries == read(output)
    expected = [str(pictures / name) for name in ("a.jpg", "b.v2.png", "below/a.png", "below/grey.tif")]
    assert [entry["file"] for entry in entries] == expected
    trained = load_trained(str(adapters / "classifier"))
    for entry in entries[:3]:
        with torch.no_grad():
            pixels = trained.processor(Image.open(entry["file"]), return_tensors="pt")
            scores = trained.model(**pixels).logits[0].softmax(0)
        found = entry["predictions"]
        assert [item["label"] for item in found] == [LABELS[i] for i in scores.argsort(descending=True)[:2].tolist()]
        np.testing.assert_allclose([item["score"] for item in found], scores.sort(descending=True)[0][:2], rtol=1e-5)
    assert not (output / "masks").exists()
    with Image.open(entries[0]["overlay"]) as small:
        assert max(small.size) <= 512
    every = predict(str(adapters / "classifier"), [str(pictures)], output, top=9, overwrite=True)
    assert all(len(entry["predictions"]) == 3 for entry in every)
    assert all(sum(item["score"] for item in entry["predictions"]) == pytest.approx(1) for entry in every)


def test_a_segmenter_writes_label_maps_and_overlays_of_the_size_of_each_image(adapters, pictures, tmp_path):
    output = tmp_path / "found"
    entries = predict(str(adapters / "segmenter"), [str(pictures)], output)
    assert entries == read(output) and len(entries) == 4
    names = {p.relative_to(output / "masks").as_posix() for p in (output / "masks").rglob("*.png")}
    assert names == {"a.png", "b.v2.png", "below/a.png", "below/grey.png"}
    trained = load_trained(str(adapters / "segmenter"))
    seen = set()
    for entry in entries:
        mask, overlay = Image.open(entry["mask"]), Image.open(entry["overlay"])
        image = Image.open(entry["file"])
        assert mask.size == image.size and overlay.mode == "RGB"
        assert overlay.width >= image.width and overlay.height > image.height  # the legend
        ids = open_label_map({"path": entry["mask"]}, "mask") - trained.first_label
        if image.mode == "RGB":
            expected = F.interpolate(trained.outputs(image).logits, image.size[::-1], mode="bilinear")[0].argmax(0)
            assert np.array_equal(ids, expected)
            blend = 0.55 * np.asarray(image).astype(float) + 0.45 * palette(3)[ids]
            same = np.abs(np.asarray(overlay)[: image.height, : image.width] - blend).max(-1) <= 1
            inside = (ids == np.roll(ids, 1, 0)) & (ids == np.roll(ids, 1, 1))
            assert same[inside].all() and inside.any()
        assert np.array_equal(np.asarray(mask.convert("RGB")), palette(3)[ids])
        shares = {LABELS[i]: float((ids == i).mean()) for i in range(3) if (ids == i).any()}
        assert entry["shares"] == pytest.approx(shares)
        seen |= set(np.unique(ids).tolist())
    assert len(seen) > 1  # else the comparisons above say little


def test_files_and_folders_can_be_given_together(adapters, pictures, tmp_path):
    given = [str(pictures / "a.jpg"), str(pictures / "below" / "grey.tif")]
    entries = predict(str(adapters / "classifier"), given, tmp_path / "found")
    assert [entry["file"] for entry in entries] == given
    entries = predict(
        str(adapters / "classifier"), [str(pictures / "b.v2.png"), str(pictures / "below")], tmp_path / "2"
    )
    assert [Path(entry["file"]).name for entry in entries] == ["b.v2.png", "a.png", "grey.tif"]


def test_an_adapter_alone_counts_the_labels_of_a_mask2former_as_its_run_does(tmp_path):
    run = parse_config(segment(tmp_path) | {"head": "mask2former", "model_options": small_head("mask2former")})
    task = task_of(run)
    model, processor = task.build_model(["ground", "disc"]), task.build_processor()
    assert {Trained(model, processor, ("ground", "disc"), own).first_label for own in (run, None)} == {1}


def test_what_was_drawn_before_is_not_predicted_again(adapters, pictures):
    source, output = str(adapters / "classifier"), pictures / "found"
    first, again = (predict(source, [str(pictures)], output, overwrite=True) for _ in range(2))
    assert [entry["file"] for entry in first] == [entry["file"] for entry in again]
    (pictures / "found" / "masks").mkdir()
    shutil.copy(first[0]["file"], pictures / "found" / "masks" / "a.png")
    assert len(predict(source, [str(pictures / "found" / "masks")], output, overwrite=True)) == 1  # asked for by name


@pytest.mark.parametrize("name", MODELS)
def test_a_broken_image_is_named_in_its_entry_and_the_others_are_predicted(name, adapters, pictures, tmp_path):
    (pictures / "b.v2.png").write_bytes((pictures / "b.v2.png").read_bytes()[:200])
    entries = predict(str(adapters / name), [str(pictures)], tmp_path / "found")
    broken = [entry for entry in entries if "error" in entry]
    assert [entry["file"] for entry in broken] == [str(pictures / "b.v2.png")]
    assert str(pictures / "b.v2.png") in broken[0]["error"] and "Replace it" in broken[0]["error"]
    assert all("predictions" in entry or "mask" in entry for entry in entries if entry not in broken)
    assert len(entries) == 4 and read(tmp_path / "found") == entries


def test_the_command_ends_with_an_error_where_an_image_is_broken_and_without_where_none_is(
    adapters, pictures, tmp_path
):
    command = ["predict", str(adapters / "classifier"), str(pictures), "--output"]
    whole = CliRunner().invoke(app, [*command, str(tmp_path / "whole")])
    assert whole.exit_code == 0 and "4 images" in whole.output, whole.output
    assert len(whole.stdout.splitlines()) == 4 + 1, "an image a line, however long its path"
    (pictures / "a.jpg").write_bytes(b"junk")
    broken = CliRunner().invoke(app, [*command, str(tmp_path / "broken")])
    assert broken.exit_code == 1 and "1 image could not be read" in broken.output
    assert broken.stdout.count(f"{pictures / 'a.jpg'}: ") == 1, broken.stdout
    assert len(read(tmp_path / "broken")) == 4


def test_images_of_one_name_are_refused_before_anything_is_loaded(pictures, tmp_path):
    given = [str(pictures / "a.jpg"), str(pictures / "below" / "a.png")]
    with pytest.raises(UserError, match=r"below/a\.png.*a\.jpg"):
        predict("./not-looked-at", given, tmp_path / "found")


def test_nothing_to_predict_is_refused_before_anything_is_loaded(pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"\(\.bmp, .*\.webp\)"):
        predict("./not-looked-at", [str(tmp_path / "empty")], tmp_path / "found")
    with pytest.raises(UserError, match="nowhere"):
        predict("./not-looked-at", [str(pictures), str(tmp_path / "nowhere")], tmp_path / "found")


def test_earlier_predictions_are_kept_unless_overwrite_is_said(adapters, pictures, tmp_path):
    output = tmp_path / "found"
    predict(str(adapters / "segmenter"), [str(pictures / "a.jpg")], output)
    before = (output / "predictions.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"found.*predictions\.json.*--overwrite"):
        predict(str(adapters / "segmenter"), [str(pictures)], output)
    assert (output / "predictions.json").read_bytes() == before
    predict(str(adapters / "segmenter"), [str(pictures)], output, overwrite=True)
    assert len(read(output)) == 4
    moved = output.rename(tmp_path / "moved")
    drawn = list((moved / "masks").rglob("*.png"))
    predict(str(adapters / "segmenter"), [str(pictures / "a.jpg")], moved, overwrite=True)
    assert len(list((moved / "masks").rglob("*.png"))) == 1 < len(drawn)


def test_a_wrong_run_is_named_before_earlier_predictions(pictures, tmp_path):
    (tmp_path / "found").mkdir()
    (tmp_path / "found" / "predictions.json").write_text("[]")
    for source, words in (("./run", r"run='\./run': no such"), (str(pictures), "is not a run.*comes first")):
        with pytest.raises(UserError, match=words):
            predict(source, [str(pictures)], tmp_path / "found")
        with pytest.raises(UserError, match=words):
            predict_together([source, str(tmp_path)], [str(pictures)], tmp_path)


def test_a_file_in_the_place_of_the_folder_for_predictions_is_named(adapters, pictures, tmp_path):
    (tmp_path / "found").write_text("mine")
    with pytest.raises(UserError, match=r"output='.*found': is a file"):
        predict(str(adapters / "segmenter"), [str(pictures)], tmp_path / "found")


def test_the_label_maps_of_a_dataset_are_not_overwritten(adapters, pictures, tmp_path):
    truth = tmp_path / "dataset" / "masks" / "a.png"
    truth.parent.mkdir(parents=True)
    truth.write_bytes(b"drawn by hand")
    with pytest.raises(FileExistsError, match="holds masks already"):
        predict(str(adapters / "segmenter"), [str(pictures)], tmp_path / "dataset")
    assert truth.read_bytes() == b"drawn by hand"


# --- several adapters of one base ------------------------------------------------------------------------------------


def another(adapters: Path, name: str, folder: Path, **options: Any) -> Path:
    """Write a further adapter of a base into a folder, with weights of its own."""
    base = type(BY_NAME[MODELS[name]].base()).from_pretrained(adapters / f"{name}-base")
    model = get_peft_model(base, E3VAConfig(r=3, **options))
    torch.manual_seed(len(folder.name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.add_(0.5 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    shutil.copy(adapters / name / "preprocessor_config.json", folder)
    return folder


def without_folder(output: Path) -> Any:
    """What was written, with rounded scores and with files named from the folder."""
    text = (output / "predictions.json").read_text().replace(str(output), "")
    return json.loads(text, parse_float=lambda number: round(float(number), 5))


@pytest.mark.parametrize("name", MODELS)
def test_several_adapters_find_what_each_finds_alone_and_the_backbone_runs_once(
    name, adapters, pictures, tmp_path, monkeypatch
):
    (pictures / "b.v2.png").write_bytes(b"junk")
    sources = [adapters / name, another(adapters, name, tmp_path / "second"), another(adapters, name, tmp_path / "3")]
    runs, load = [], load_trained

    def watched(source: str) -> Any:
        trained = load(source)
        block = next(module for module in trained.model.modules() if type(module).__name__ == "SwinLayer")
        block.register_forward_hook(lambda *args: runs.append(source))
        return trained

    monkeypatch.setitem(predict_together.__globals__, "load_trained", watched)
    found = predict_together([str(source) for source in sources], [str(pictures)], tmp_path / "found")
    assert runs == [str(sources[0])] * 3  # images that can be read
    assert list(found) == [tmp_path / "found" / source.name for source in sources]
    for source, (folder, entries) in zip(sources, found.items(), strict=True):
        predict(str(source), [str(pictures)], tmp_path / "alone", overwrite=True)
        assert read(folder) == entries
        assert without_folder(folder) == without_folder(tmp_path / "alone")
        files = [file.relative_to(folder) for file in folder.rglob("*.png")]
        assert len(files) == (6 if name == "segmenter" else 3)
        assert all((folder / file).read_bytes() == (tmp_path / "alone" / file).read_bytes() for file in files)
    assert len({json.dumps(without_folder(folder)) for folder in found}) == 3


def test_the_command_takes_several_adapters_and_names_with_commas(adapters, pictures, tmp_path):
    others = [another(adapters, "classifier", tmp_path / name, live_blocks=1) for name in ("b", "c", "lr=1,seed=2")]
    command = ["predict", str(adapters / "classifier"), str(pictures), "--output", str(tmp_path / "found")]
    command += ["--adapters", f"{others[0]},{others[1]}", "--adapters", str(others[2])]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in (tmp_path / "found").iterdir()) == ["b", "c", "classifier", "lr=1,seed=2"]
    shown = done.output.replace("\n", "")
    assert all(f"4 images: {tmp_path / 'found' / name / 'predictions.json'}" in shown for name in ("b", "classifier"))
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1 and "predictions.json" in again.output.replace("\n", "")
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0


def test_adapters_hold_their_frozen_weights_once(adapters, pictures, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setitem(
        predict_together.__globals__, "load_trained", lambda source: loaded.append(load_trained(source)) or loaded[-1]
    )
    (tmp_path / "no").mkdir()
    (tmp_path / "no" / "adapter_config.json").write_text("{}")
    sources = [adapters / "classifier", another(adapters, "classifier", tmp_path / "b"), tmp_path / "no"]
    with pytest.raises(UserError, match="/no"):
        predict_together([str(source) for source in sources], [str(pictures)], tmp_path / "found")
    first, second = ({name: p.data_ptr() for name, p in each.model.named_parameters()} for each in loaded)
    frozen = [name for name in first if "e3va_" not in name and "classifier" not in name and "layernorm" not in name]
    assert frozen and all(first[name] == second[name] for name in frozen)
    assert not (tmp_path / "found").exists()


def other_base(adapters: Path, tmp_path: Path) -> Path:
    base = BY_NAME[MODELS["classifier"]].base(seed=7)
    base.save_pretrained(tmp_path / "base")
    get_peft_model(type(base).from_pretrained(tmp_path / "base"), E3VAConfig(r=2)).save_pretrained(tmp_path / "b")
    shutil.copy(adapters / "classifier" / "preprocessor_config.json", tmp_path / "b")
    return tmp_path / "b"


def other_size(adapters: Path, tmp_path: Path) -> Path:
    folder = another(adapters, "classifier", tmp_path / "b")
    BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def whole_model(adapters: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(adapters / "classifier-base", tmp_path / "b"))
    shutil.copy(adapters / "classifier" / "preprocessor_config.json", folder)
    return folder


def same_name(adapters: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapters / "classifier", tmp_path / "b" / "classifier"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (other_base, r"/b: .*weights.*/classifier.*--adapters"),
        (other_size, r"/b: .*size=.*40.*/classifier .*36.*--adapters"),
        (whole_model, r"/b: .*highway.*--adapters"),
        (same_name, r"/b/classifier' .*/classifier'"),
    ],
)
def test_adapters_that_cannot_share_a_backbone_are_refused_before_anything_is_written(
    make, words, adapters, pictures, tmp_path
):
    sources = [str(adapters / "classifier"), str(make(adapters, tmp_path))]
    with pytest.raises(UserError, match=words):
        predict_together(sources, [str(pictures)], tmp_path / "found")
    assert not (tmp_path / "found").exists()


# --- colours ---------------------------------------------------------------------------------------------------------


def test_neighbours_in_the_palette_are_told_apart():
    colors = palette(40).astype(int)
    assert np.abs(colors[1:] - colors[:-1]).sum(1).min() > 60


def test_the_palette_has_a_colour_for_each_of_many_classes():
    assert len(np.unique(palette(300), axis=0)) == 300


# --- load_trained ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task"), [("classifier", "image-classification"), ("segmenter", "semantic-segmentation")]
)
def test_an_adapter_alone_knows_its_labels_and_its_task(name, task, adapters):
    trained = load_trained(str(adapters / name))
    assert trained.labels == tuple(LABELS.values()) and trained.task == task and trained.config is None
    assert not trained.model.training


@pytest.mark.parametrize("name", MODELS)
def test_the_folder_of_a_whole_model_works_like_an_adapter(name, adapters, pictures, tmp_path):
    model = BY_NAME[MODELS[name]].base()
    model.save_pretrained(tmp_path / "model")
    for file in (adapters / name).glob("preprocessor_config.json"):
        (tmp_path / "model" / file.name).write_text(file.read_text())
    assert len(load_trained(str(tmp_path / "model")).labels) == 3
    assert len(predict(str(tmp_path / "model"), [str(pictures)], tmp_path / "found")) == 4


def test_a_folder_without_anything_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        load_trained(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="nowhere"):
        load_trained(str(tmp_path / "nowhere"))


def test_an_adapter_without_image_processor_is_refused(adapters, tmp_path):
    for file in (adapters / "classifier").iterdir():
        if file.name != "preprocessor_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        load_trained(str(tmp_path))


def test_an_adapter_whose_base_model_is_gone_is_explained(adapters, tmp_path):
    for file in (adapters / "classifier").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    gone = str(tmp_path / "gone")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": gone}))
    with pytest.raises(UserError, match="base_model_name_or_path"):
        load_trained(str(tmp_path))


@pytest.fixture
def hostile(monkeypatch):
    """Put an image processor into a folder whose code says that it was run; whoever asks fails the test."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("it asks whether to run the code"))

    def put(folder: Path) -> Path:
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
        processor = {"image_processor_type": "Nope", "auto_map": {"AutoImageProcessor": "evil.Evil"}}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        return folder

    return put


def test_code_beside_an_adapter_or_a_model_is_neither_run_nor_asked_about(adapters, hostile, tmp_path):
    for name in ("classifier", "classifier-base"):
        folder = hostile(Path(shutil.copytree(adapters / name, tmp_path / name)))
        with pytest.raises(UserError, match="cannot be loaded"):
            load_trained(str(folder))
        assert not (folder / "ran").exists()
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        e3va_peft.load_adapter(tmp_path / "classifier")
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        find_processor(str(tmp_path / "classifier-base"))


def test_a_model_whose_weights_are_a_pickle_is_neither_loaded_nor_adapted(adapters, tmp_path, monkeypatch):
    folder = pickle_weights(Path(shutil.copytree(adapters / "classifier-base", tmp_path / "base")))
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("it is opened"))
    with pytest.raises(UserError, match=r"base': has .*pytorch_model\.bin.*save_pretrained"):
        load_trained(str(folder))
    config = parse_config(classify(tmp_path) | {"model": str(folder)})
    with pytest.raises(UserError, match=r"base': has .*pytorch_model\.bin.*save_pretrained"):
        task_of(config).build_model(["cat", "dog"])


def test_the_code_of_a_model_that_transformers_does_not_know_is_not_run(hostile, tmp_path):
    hostile(tmp_path)
    config = {"model_type": "nope", "architectures": ["Evil"], "auto_map": {"AutoConfig": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_trained(str(tmp_path))
    with pytest.raises(UserError, match="cannot be loaded"):
        find_config(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("architecture", ["pipeline", "Trainer", 5, "SwinModel", None, "PreTrainedConfig"])
def test_an_architecture_that_is_no_model_with_a_head_is_refused_by_its_name(architecture, adapters, tmp_path):
    folder = Path(shutil.copytree(adapters / "classifier-base", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text()) | {"architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model"):
        load_trained(str(folder))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attn_implementation", "kernels-community/x"),
        ("id2label", 5),
        ("dtype", "nope"),
        ("hidden_act", "nope"),
        ("depths", [20_000, 1]),
        ("embed_dim", 500_000),
        ("architectures", 5),
        ("architectures", [[]]),
    ],
)
def test_a_hostile_config_of_a_whole_model_is_refused_by_its_file(field, value, adapters, tmp_path):
    folder = Path(shutil.copytree(adapters / "classifier-base", tmp_path / "model"))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(UserError, match=r"config\.json: "):
        load_trained(str(folder))


def test_predictions_up_to_a_stop_are_kept_and_drawings_of_before_are_removed(
    adapters, pictures, tmp_path, monkeypatch
):
    output, seen = tmp_path / "found", []
    predict(str(adapters / "segmenter"), [str(pictures)], output)
    (output / "masks" / "mine.png").write_text("mine")
    before = [Path(entry["mask"]) for entry in read(output)]
    original = predict.__globals__["open_image"]

    def open_image(item, where):
        if seen:
            raise KeyboardInterrupt
        seen.append(where)
        return original(item, where)

    monkeypatch.setitem(predict.__globals__, "open_image", open_image)
    with pytest.raises(KeyboardInterrupt):
        predict(str(adapters / "segmenter"), [str(pictures)], output, overwrite=True)
    assert [entry["file"] for entry in read(output)] == seen
    assert len([path for path in before if path.exists()]) == 1 < len(before)
    assert (output / "masks" / "mine.png").exists()


def test_names_that_look_like_markup_are_shown_as_they_are(adapters, pictures, tmp_path):
    folder = Path(shutil.copytree(adapters / "classifier", tmp_path / "classifier"))
    config = json.loads((folder / "base_config.json").read_text())
    config["id2label"] = {"0": "[/bold]ground", "1": "[red]disc", "2": "edge[/]"}
    (folder / "base_config.json").write_text(json.dumps(config))
    adapter = json.loads((folder / "adapter_config.json").read_text())
    del adapter["auto_mapping"]["base_config"]  # or it is seen that the names are others
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    done = CliRunner().invoke(app, ["predict", str(folder), str(pictures), "--output", str(tmp_path / "[x]")])
    assert done.exit_code == 0, done.output
    shown = done.output.replace("\n", "")
    assert all(name in shown for name in (*config["id2label"].values(), f"{tmp_path}/[x]/predictions.json"))


def test_a_lora_adapter_without_its_run_is_refused(adapters, tmp_path):
    adapt(BY_NAME["vit-classifier"].base(), {"name": "lora"}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"holds .*LORA"):
        load_trained(str(tmp_path))


def run_folder(tmp_path: Path, method: str = "e3va", model: str = "m", **data: Any) -> Path:
    (tmp_path / "run").mkdir()
    values = {"task": "image-classification", "model": model, "output": str(tmp_path / "run"), "method": method}
    values |= {"training": {"use_cpu": True, "dataloader_num_workers": 0, "disable_tqdm": True, "seed": 3}}
    config = parse_config(values | {"data": {"source": str(tmp_path / "data")} | data})
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml())
    return tmp_path / "run"


@pytest.mark.parametrize("method", ["e3va", "lora", "head-only", "full"])
def test_a_run_that_is_not_finished_is_refused_with_how_to_resume(method, tmp_path):
    run = run_folder(tmp_path, method)
    (run / "checkpoint-5").mkdir()
    with pytest.raises(UserError, match=r"run: .*e3va train"):
        load_trained(str(run))


def without(folder: Path, part: str) -> None:
    """Leave the weights whose names hold `part` out of a folder."""
    file = next(folder.glob("*model.safetensors"))
    weights = load_file(file)
    kept = {name: value for name, value in weights.items() if part not in name}
    assert kept.keys() != weights.keys()
    save_file(kept, file, metadata={"format": "pt"})


def test_an_adapter_of_a_base_that_is_stored_in_half_precision_predicts(tmp_path):
    BY_NAME["swin-classifier"].base().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    assert base.dtype == torch.bfloat16
    get_peft_model(base, E3VAConfig(r=4)).save_pretrained(tmp_path / "adapter")
    BitImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(tmp_path / "adapter")
    found = load_trained(str(tmp_path / "adapter")).probabilities(Image.new("RGB", (40, 40)))
    assert found.dtype == torch.float32 and found.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("part", ["swin.encoder.layers.0", "classifier"])
def test_a_whole_model_that_lacks_weights_is_refused_by_their_names(part, adapters, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(adapters / "classifier-base", folder)
    BitImageProcessor(size={"shortest_edge": 32}).save_pretrained(folder)
    load_trained(str(folder))
    without(folder, part)
    with pytest.raises(UserError, match=rf"model: .*\['{part}"):
        load_trained(str(folder))


@pytest.mark.parametrize("part", ["lora_A", "classifier"])
def test_a_lora_adapter_that_lacks_weights_is_refused_by_their_names(part, adapters, tmp_path):
    run = run_folder(tmp_path, "lora", model=str(adapters / "classifier-base"))
    base = BY_NAME[MODELS["classifier"]].base()
    base.config.id2label, base.config.label2id = LABELS, {v: k for k, v in LABELS.items()}
    adapt(base, {"name": "lora"}).save_pretrained(run / "adapter")
    base.config.save_pretrained(run / "adapter")
    BitImageProcessor(size={"shortest_edge": 32}).save_pretrained(run / "adapter")
    load_trained(str(run))
    without(run / "adapter", part)
    with pytest.raises(UserError, match=rf"adapter: .*'.*{part}"):
        load_trained(str(run))


def test_an_adapter_and_a_base_model_that_lack_weights_are_refused_when_they_shall_predict(
    adapters, pictures, tmp_path
):
    for name in ("classifier", "classifier-base"):
        shutil.copytree(adapters / name, tmp_path / name)
    config = json.loads((tmp_path / "classifier" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "classifier-base")
    (tmp_path / "classifier" / "adapter_config.json").write_text(json.dumps(config))
    assert len(predict(str(tmp_path / "classifier"), [str(pictures)], tmp_path / "found")) == 4
    for broken, part, words in (
        ("classifier-base", "swin.encoder.layers.0", r"classifier-base' .*\d+ parameters"),
        ("classifier", "e3va_highway", r"\d+ of its \d+ weights"),
    ):
        whole = next((tmp_path / broken).glob("*model.safetensors")).read_bytes()
        without(tmp_path / broken, part)
        with pytest.raises(UserError, match=rf"classifier: .*{words}"):
            predict(str(tmp_path / "classifier"), [str(pictures)], tmp_path / "other")
        next((tmp_path / broken).glob("*model.safetensors")).write_bytes(whole)


def test_a_run_whose_config_is_broken_is_named(tmp_path):
    run = run_folder(tmp_path)
    (run / "config.yaml").write_text("task: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        load_trained(str(run))


# --- evaluate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(adapters, tmp_path, monkeypatch) -> Path:
    """The folder of a run with an untrained adapter, and its data."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for i in range(12):
        for split in ("train", "test"):
            place = tmp_path / "data" / split / sorted(LABELS.values())[i % 3]
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (36, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{i}.png")
    run = run_folder(tmp_path, eval_samples=4)  # its classes are numbered in another order than the model's
    (run / "adapter").symlink_to(adapters / "classifier")
    return run


def test_a_run_is_scored_on_the_samples_that_it_was_scored_on_in_training(finished, monkeypatch):
    seen = []

    def spy(*args: Any) -> Any:
        seen.append(load_eval_split(*args))
        return seen[-1]

    monkeypatch.setitem(evaluate.__globals__, "load_eval_split", spy)
    scores, labels = evaluate(str(finished))
    assert labels == tuple(LABELS.values()) and 0 <= scores["accuracy"] <= 1 and scores["loss"] > 0
    config = load_trained(str(finished)).config
    assert config is not None
    _, in_training = load_splits(config.data, "class", 3)  # as `train` draws them: by training.seed
    drawn = [[row["image"]["path"] for row in split.rows] for split in (seen[0], in_training)]
    assert [seen[0].labels[i] for i in seen[0].rows["label"]] == [Path(path).parent.name for path in drawn[0]]
    assert len(drawn[0]) == 4 and drawn[0] == drawn[1]


def test_images_set_aside_that_are_not_those_of_the_run_are_no_test(tmp_path, monkeypatch):
    values = classify(tmp_path, num_train_epochs=1)
    values["data"] |= {"eval_fraction": 0.3}
    train(parse_config(values))
    assert evaluate(str(tmp_path / "run"))[0]["accuracy"] >= 0
    image = next((tmp_path / "colors" / "train" / "red").iterdir())
    shutil.copy(image, image.with_name(f"more-{image.name}"))
    refusal = r"data\.eval_fraction=0\.3: sets aside .* when the model was trained, "
    with pytest.raises(UserError, match=refusal):
        evaluate(str(tmp_path / "run"))
    with pytest.raises(UserError, match=refusal):  # as the command line reads it
        evaluate(str(tmp_path / "run"), read_config(tmp_path / "run" / "config.yaml"))
    (tmp_path / "run" / "metrics.json").unlink()  # nobody knows any more which they were
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert evaluate("~/run")[0]["accuracy"] >= 0


def test_scoring_makes_no_folder_that_a_config_names(finished):
    moved = finished.rename(finished.with_name("moved"))
    evaluate(str(moved))
    assert not finished.exists()


def test_an_adapter_alone_needs_a_config_to_be_scored_and_its_classes_must_be_the_models(finished, adapters):
    with pytest.raises(UserError, match="knows no data"):
        evaluate(str(adapters / "classifier"))
    config = load_trained(str(finished)).config
    assert config is not None
    config.data.labels = ["disc", "edge", "ground"]
    with pytest.raises(UserError, match=r"data\.labels: .*\['disc', 'edge', 'ground'\]"):
        evaluate(str(adapters / "classifier"), config)
    with pytest.raises(UserError, match=r"task=image-classification: .*semantic-segmentation"):
        evaluate(str(adapters / "segmenter"), config)


def test_label_maps_are_written_in_the_numbering_of_the_users_own(tmp_path):
    train(parse_config(segment(tmp_path, num_train_epochs=1)))
    predict(str(tmp_path / "run"), [str(tmp_path / "discs" / "images" / "val")], tmp_path / "found")
    assert json.loads((tmp_path / "found" / "classes.json").read_text()) == {"1": "ground", "2": "disc"}
    right = counted = 0
    for file in (tmp_path / "discs" / "masks" / "val").iterdir():
        truth, found = (np.asarray(Image.open(path)) for path in (file, tmp_path / "found" / "masks" / file.name))
        assert set(np.unique(found)) <= {1, 2}
        right, counted = right + (found == truth)[truth > 0].sum(), counted + (truth > 0).sum()
    scores, _ = evaluate(str(tmp_path / "run"))
    assert scores["overall_accuracy"] == pytest.approx(right / counted)


EXPORTED = {  # model, image processor, what the command says of it
    "classifier": (
        "vit-classifier",
        BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        "pixel_values (batch, 3, 28, 28) -> logits",
    ),
    "classifier at another size": (
        "vit-classifier",
        BitImageProcessor(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}),
        "pixel_values (batch, 3, 42, 42) -> logits",
    ),
    "segmenter": (
        "swin-upernet",
        SegformerImageProcessor(size={"shortest_edge": 30}, size_divisor=16),
        "pixel_values (batch, 3, 32, 32) -> logits",
    ),
    "detector": (
        "swin-retinanet",
        DetectionImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}),
        "pixel_values (1, 3, 64, 64) -> scores, labels, pred_boxes",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_model_is_a_file_that_agrees_with_pytorch(name, tmp_path):
    case, processor, words = EXPORTED[name]
    folder = saved_adapter(case, tmp_path, processor)
    done = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "model.onnx")])
    assert done.exit_code == 0, done.output
    assert words in done.output
    assert [path.name for path in tmp_path.glob("*.onnx*")] == ["model.onnx"]
    again = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "model.onnx")])
    assert again.exit_code == 1 and "output=" in again.output


def saved_adapter(case: str, root: Path, processor: Any) -> Path:
    base = BY_NAME[case].base()
    if case == "swin-retinanet":  # or nothing is suppressed and kept back
        base.config.nms_thresh, base.config.detections_per_img, base.config.score_thresh = 0.4, 30, 0.3
    base.save_pretrained(root / "base")
    model = get_peft_model(type(base).from_pretrained(root / "base"), E3VAConfig.plus(r=2, init_weights=False))
    model.save_pretrained(root / "adapter")
    processor.save_pretrained(root / "adapter")
    return root / "adapter"


@pytest.mark.slow
def test_an_adapted_model_through_torch_export_finds_what_it_finds_in_any_number_of_images(tmp_path):
    case, processor, _ = EXPORTED["classifier"]
    folder = saved_adapter(case, tmp_path, processor)
    model, images = load_trained(str(folder)).model, torch.randn(3, 3, 28, 28)
    inside = model.get_base_model()  # of PEFT's wrapper, which takes `**kwargs`, torch 2.12 frees no batch size
    sizes = {"pixel_values": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        graph = torch.export.export(inside, (), {"pixel_values": images[:2]}, dynamic_shapes=sizes).module()
        torch.testing.assert_close(graph(pixel_values=images).logits, model(pixel_values=images).logits)


def test_a_detector_of_two_stages_is_not_exported(tmp_path):
    folder = saved_adapter("swin-cascade", tmp_path, DetectionImageProcessor())
    with pytest.raises(UserError, match=r"two stages.*RetinaNet"):
        export(str(folder), tmp_path / "model.onnx")


def test_what_differs_from_pytorch_is_not_kept(adapters, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda model, images, path, **_: path.write_bytes(b"graph"))
    monkeypatch.setattr("e3va_peft.training.export._difference", lambda *_: float("nan"))
    with pytest.raises(UserError, match="differs"):
        export(str(adapters / "classifier"), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


# --- the contact sheet -----------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """Collects what a page links to, and its text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links, self.text = [], []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data):
        self.text += [data.strip()] if data.strip() else []


@pytest.mark.parametrize("name", MODELS)
def test_the_contact_sheet_shows_every_image_from_files_beside_it(name, adapters, pictures, tmp_path):
    (pictures / "b.v2.png").rename(pictures / "<b> & #1.png")
    (pictures / "a.jpg").write_bytes(b"junk")
    entries = predict(str(adapters / name), [str(pictures)], tmp_path / "found")
    (tmp_path / "found").rename(tmp_path / "sent along")
    page = Links(tmp_path / "sent along" / "index.html")
    assert len(page.links) == 2 * 3  # a picture and what a click opens, but for the broken one
    assert all((tmp_path / "sent along" / unquote(link)).is_file() for link in page.links)
    assert {Path(entry["file"]).name for entry in entries} <= set(page.text) and "<b> & #1.png" in page.text
    assert any("Replace it" in text for text in page.text)
    for entry in entries:
        found = [each["label"] for each in entry.get("predictions", ())[:3]] or list(entry.get("shares", ()))
        assert set(found) <= set(page.text)


def test_the_contact_sheet_counts_objects_and_says_which_colour_a_class_has(tmp_path):
    objects = [{"label": label} for label in ("cell", "<i>", "cell")]
    entries = [{"file": "a.png", "objects": objects}, *({"file": f"{name}/b.png", "objects": []} for name in "xy")]
    write_sheet(tmp_path / "index.html", entries, ["cell", "<i>", "none"], "run")
    page, (first, second, _) = Links(tmp_path / "index.html"), palette(3).tolist()
    assert page.text[-9:] == [
        "a.png",
        "cell",
        "2",
        "<i>",
        "1",
        "x/b.png",
        "nothing above the threshold",
        "y/b.png",
        "nothing above the threshold",
    ]
    source = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert f"rgb{tuple(first)}" in source and f"rgb{tuple(second)}" in source and "none" not in page.text
