"""`e3va app`: what is found with and without the adapter, what is refused, the Space; and in a browser."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import runpy
import shutil
import struct
import sys
import zlib
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from peft import get_peft_model
from PIL import Image
from transformers import BitImageProcessor, SegformerImageProcessor
from typer.testing import CliRunner

from e3va_peft import E3VAConfig
from e3va_peft.cli import app as command
from e3va_peft.detection import DetectionImageProcessor
from e3va_peft.errors import MissingExtra, UserError
from e3va_peft.training.predict import load_together, load_trained
from tests.models import BY_NAME

app = pytest.importorskip("e3va_peft.app")

LABELS = {0: "ground", 1: "disc", 2: "<img src=x>"}
SQUARE = {"height": 32, "width": 32}
MODELS = {
    "classifier": ("swin-classifier", BitImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)),
    "segmenter": ("swin-upernet", SegformerImageProcessor(size=SQUARE)),
    "detector": ("swin-cascade", DetectionImageProcessor(size={"shortest_edge": 64, "longest_edge": 64})),
}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """Folders of adapters with random weights: one for each task, and a second one of the classifier's base."""
    root = tmp_path_factory.mktemp("adapters")
    return {name: save(root, name.partition("-")[0], name) for name in (*MODELS, "classifier-2")}


def save(root: Path, name: str, adapter: str) -> str:
    case, processor = MODELS[name]
    base = BY_NAME[case].base()
    base.config.id2label, base.config.label2id = LABELS, {v: k for k, v in LABELS.items()}
    if not (root / f"{name}-base").exists():
        base.save_pretrained(root / f"{name}-base")
    torch.manual_seed(len(adapter))
    model = get_peft_model(type(base).from_pretrained(root / f"{name}-base"), E3VAConfig(r=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.add_((0.02 if name == "detector" else 0.5) * torch.randn(parameter.shape))
    model.save_pretrained(root / adapter)
    processor.save_pretrained(root / adapter)
    return str(root / adapter)


@pytest.fixture
def photo(tmp_path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def png(width: int, height: int) -> bytes:
    """The beginning of a PNG that says how large it is, and has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


# --- what is found ---------------------------------------------------------------------------------------------------


def test_a_classifier_says_its_probabilities_and_names_are_escaped(sources, photo):
    finder = app.Finder([load_trained(sources["classifier"])])
    image, (found,) = finder.find(photo, False)
    expected = finder.trained[0].outputs(image).logits[0].softmax(0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    drawn, words = app.show(finder.trained[0], image, found, 0.5)
    assert drawn is None and "<img" not in words and "&lt;img src=x&gt;" in words
    assert all(f"{100 * value:.1f} %" in words for value in expected.tolist())


def test_a_segmenter_draws_its_label_map_and_says_its_shares(sources, photo):
    finder = app.Finder([load_trained(sources["segmenter"])])
    image, (found,) = finder.find(photo, False)
    assert found.shape == (48, 40) and len(np.unique(found)) > 1
    drawn, words = app.show(finder.trained[0], image, found, 0.5)
    assert drawn.size[0] >= 40 and drawn.size[1] > 48  # with a legend
    assert all(f"{100 * (found == i).mean():.1f} %" in words for i in np.unique(found))


def test_the_threshold_takes_objects_away_without_another_run(sources, photo, monkeypatch):
    finder = app.Finder([load_trained(sources["detector"])])
    image, (found,) = finder.find(photo, False)
    middle = float(np.median(found.scores))
    assert middle > app.LEAST and found.masks
    monkeypatch.setattr(type(finder.trained[0]), "outputs", None)  # it is not run again
    assert finder.find(photo, False)[1][0] is found
    for threshold in (app.LEAST, middle):
        drawn, words = app.show(finder.trained[0], image, found, threshold)
        counts = np.bincount(found.labels[found.scores > threshold], minlength=3)
        assert drawn.size == image.size and all(f"{count} found" in words for count in counts if count)
    drawn, words = app.show(finder.trained[0], image, found, 1.0)
    assert np.array_equal(drawn, image) and "threshold" in words


def test_without_the_highway_the_trained_head_reads_the_frozen_backbone(sources, photo):
    finder = app.Finder([load_trained(sources["classifier"])])
    image, (on,) = finder.find(photo, False)
    _, (off,) = finder.find(photo, True)
    trained = finder.trained[0]
    base = type(trained.base).from_pretrained(Path(sources["classifier"]).with_name("classifier-base"))
    base.classifier.load_state_dict(trained.base.classifier.modules_to_save["default"].state_dict())
    with torch.no_grad():
        expected = base(**trained.processor(image, return_tensors="pt")).logits[0].softmax(0)
    np.testing.assert_allclose(off, expected, rtol=1e-4)
    assert finder.part == "highway" and np.abs(on - off).max() > 1e-3
    np.testing.assert_array_equal(app.Finder([trained]).find(photo, False)[1][0], on)  # and it is on again


def test_several_adapters_share_a_run_of_the_backbone_and_find_what_each_finds_alone(sources, photo):
    both = [sources["classifier"], sources["classifier-2"]]
    trained, runs = load_together(both), []
    for each in trained:
        block = next(module for module in each.model.modules() if type(module).__name__ == "SwinLayer")
        block.register_forward_hook(lambda *args: runs.append(1))
    _, found = app.Finder(trained).find(photo, False)
    assert len(runs) == 1
    for source, together in zip(both, found, strict=True):
        np.testing.assert_allclose(app.Finder([load_trained(source)]).find(photo, False)[1][0], together, rtol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 1e-3


# --- the page --------------------------------------------------------------------------------------------------------


def test_what_is_not_an_image_is_named_and_nothing_is_shown_of_the_one_before(sources, tmp_path):
    finder = app.Finder([load_trained(sources["classifier"])])
    whole = tmp_path / "whole.png"
    Image.new("RGB", (40, 40)).save(whole)
    message, _, column, _, words, *_ = app._answer(finder, {"path": str(whole)}, 0.5, False)
    assert column.visible and "ground" in words and not message.visible
    files = {
        "text.png": b"<script>",
        "cut.png": png(40, 40),
        "bomb.png": png(60000, 60000),
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "<b>.png": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        message, _, column, _, words, *_ = app._answer(finder, {"path": str(tmp_path / name)}, 0.5, False)
        assert "role='alert'" in message.value and name.replace("<b>", "&lt;b&gt;") in message.value
        assert str(tmp_path) not in message.value and not column.visible and words == ""


def test_a_picture_that_no_browser_shows_is_shown_as_one_that_it_does(sources, photo, tmp_path):
    finder = app.Finder([load_trained(sources["classifier"])])
    Image.open(photo).save(tmp_path / "photo.tif")
    preview = app._answer(finder, {"path": str(tmp_path / "photo.tif")}, 0.5, False)[1]
    assert np.array_equal(preview, Image.open(photo))
    assert not isinstance(app._answer(finder, {"path": photo}, 0.5, False)[1], Image.Image)


def test_the_page_shows_curves_table_and_plots_of_the_run_and_no_path(sources, tmp_path):
    run = tmp_path / "comparison" / "runs" / "e3va-seed0"
    run.mkdir(parents=True)
    for picture in (run / "curves.png", run.parents[1] / "metric-time.png"):
        Image.new("RGB", (8, 8)).save(picture)
    (run.parents[1] / "compare.md").write_text("| method |\n| --- |\n| e3va |\n")
    trained = load_trained(sources["classifier"])
    config = json.dumps(app.page([trained], [str(run)]).get_config_file(), default=str)
    assert "| e3va |" in config and "runs/e3va-seed0/../.." not in config and str(tmp_path) not in config
    assert "e3va-seed0/curves.png" in config and "metric-time.png" in config and "metric-memory.png" not in config
    assert "Comparison" not in json.dumps(app.page([trained], ["me/other"]).get_config_file(), default=str)


def test_the_page_is_served_to_this_machine_and_to_names_of_it_alone(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "MAX_FILE", "1kb")
    with app.opened([sources["classifier"]]) as blocks:
        url = blocks.local_url
        assert url.startswith("http://127.0.0.1:") and blocks.share_url is None and not blocks.analytics_enabled
        with urlopen(url) as answer:
            assert "default-src 'self'" in answer.headers["content-security-policy"]
            assert "googleapis" not in answer.read().decode()
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.stat().st_mode & 0o77 == 0
        lines = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%b\r\n--b--\r\n'
        form = {"Content-Type": "multipart/form-data; boundary=b"}
        (tmp_path / "secret.txt").write_text("secret")
        for request, status in (
            (Request(url, headers={"Host": "elsewhere.example"}), 400),
            (Request(f"{url}gradio_api/file={tmp_path / 'secret.txt'}"), 403),
            (Request(f"{url}gradio_api/upload", lines % bytes(5000), form), 413),
        ):
            with pytest.raises(HTTPError) as refused:
                urlopen(request)
            assert refused.value.code == status
            refused.value.close()
        Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
        answer = ask(url, str(tmp_path / "private.png"))
        assert '"success":false' in answer and "ground" not in answer
        with (
            pytest.raises(UserError, match=rf"port={blocks.server_port}"),
            app.opened([sources["classifier"]], port=blocks.server_port),
        ):
            pass
    assert not folder.exists()


def ask(url: str, path: str) -> str:
    """Ask the page for what it finds in a file of this machine; return what it answers."""
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, 0.5, False]
    body = json.dumps({"data": data, "fn_index": 0, "session_hash": "asked"}).encode()
    urlopen(Request(f"{url}gradio_api/queue/join", body, {"Content-Type": "application/json"})).close()
    with urlopen(f"{url}gradio_api/queue/data?session_hash=asked") as answer:
        return answer.read().decode()


def test_without_gradio_the_install_line_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else find(name))
    monkeypatch.delitem(sys.modules, "e3va_peft.app")
    with pytest.raises(MissingExtra, match=r'pip install "e3va_peft\[app\]"'):
        importlib.import_module("e3va_peft.app")


# --- the Space -------------------------------------------------------------------------------------------------------


def test_a_space_is_whole_and_its_app_opens_the_page(sources, tmp_path, monkeypatch):
    adapter = Path(sources["classifier"])
    card = "---\nlicense: cc-by-4.0\n---\n"
    (tmp_path / "README.md").write_text(card)
    held = {"adapter_config.json": adapter / "adapter_config.json", "README.md": tmp_path / "README.md"}
    monkeypatch.setattr(app, "hf_hub_download", lambda source, name: str(held[name]))
    done = CliRunner().invoke(command, ["app", "me/my-adapter", "--export", str(tmp_path / "space")])
    assert done.exit_code == 0 and "hf upload" in done.output and "PyPI" in done.output, done.output
    assert {file.name for file in (tmp_path / "space").iterdir()} == {"app.py", "requirements.txt", "README.md"}
    text = (tmp_path / "space" / "README.md").read_text()
    for line in ("sdk: gradio", f"sdk_version: {app.gr.__version__}", "license: cc-by-4.0", "- me/my-adapter"):
        assert line in text
    pinned = (tmp_path / "space" / "requirements.txt").read_text().splitlines()
    assert all("==" in line and "+" not in line for line in pinned) and len(pinned) == 6
    assert pinned[0].startswith("e3va_peft[app]==")
    served: list[Any] = []
    monkeypatch.setattr(app, "serve", lambda sources, **options: served.append((sources, options)))
    runpy.run_path(str(tmp_path / "space" / "app.py"))
    assert served == [(["me/my-adapter"], {"host": "0.0.0.0"})]
    again = CliRunner().invoke(command, ["app", "me/my-adapter", "--export", str(tmp_path / "space")])
    assert again.exit_code == 1 and "export=" in again.output
    assert (tmp_path / "space" / "README.md").read_text() == text


def test_a_space_is_not_written_for_what_it_could_not_load(sources, tmp_path, monkeypatch):
    def missing(source: str, name: str) -> str:
        raise EntryNotFoundError("404: there is none")

    monkeypatch.setattr(app, "hf_hub_download", missing)
    for source, words in ((sources["classifier"], "hf upload"), ("me/none", "404")):
        with pytest.raises(UserError, match=words):
            app.write_space(source, tmp_path / "space")
    assert not (tmp_path / "space").exists()


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_an_image_is_dropped_looked_at_toggled_and_a_broken_one_is_refused(sources, photo, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    (tmp_path / "broken.png").write_bytes(b"junk")
    with app.opened([sources["segmenter"]]) as blocks, playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page, asked = chromium.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(blocks.local_url)
        drop(page, photo)
        playwright.expect(page.locator(".found")).to_have_count(1, timeout=60_000)
        playwright.expect(page.locator(".found")).to_contain_text("<img src=x>")
        page.get_by_role("checkbox").check()
        playwright.expect(page.locator(".found")).to_have_count(2, timeout=60_000)
        page.get_by_label("Remove Image").click()
        playwright.expect(page.locator(".found")).to_have_count(0)
        drop(page, str(tmp_path / "broken.png"))
        playwright.expect(page.get_by_role("alert")).to_contain_text("broken.png: cannot be read as an image")
        playwright.expect(page.get_by_label("Remove Image")).to_have_count(0)
        playwright.expect(page.get_by_role("alert")).to_be_visible()
        playwright.expect(page.locator(".found")).to_have_count(0)
        assert all(url.startswith((blocks.local_url, "data:", "blob:")) for url in asked)
        chromium.close()


def drop(page: Any, file: str) -> None:
    """Drop a file onto the page, as from a file manager."""
    content = list(Path(file).read_bytes())
    transfer = page.evaluate_handle(
        "([name, bytes]) => { const held = new DataTransfer(); held.items.add(new File([new Uint8Array(bytes)], name, "
        "{type: 'image/png'})); return held; }",
        [Path(file).name, content],
    )
    page.get_by_label("Drop an image").dispatch_event("drop", {"dataTransfer": transfer})
