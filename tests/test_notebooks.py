"""The notebooks run, from the first cell to the last, on tiny inputs and without network."""

from __future__ import annotations

from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image
from transformers import BitImageProcessor, SwinForImageClassification

from tests.models import BY_NAME

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


@pytest.fixture
def tiny_inputs(tmp_path):
    """A tiny pretrained model and a picture folder of two classes that differ in colour."""
    torch.manual_seed(0)
    config = BY_NAME["swin-classifier"].base().config
    SwinForImageClassification(config).save_pretrained(tmp_path / "model")
    size = {"shortest_edge": 32}
    BitImageProcessor(size=size, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for channel, name in enumerate(("red", "green")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 80, (40, 36, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


def run(name: str, parameters: str, folder: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    cell.source += "\n" + parameters
    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, timeout=180, kernel_name="python3", resources=resources).execute()


def test_quickstart_goes_from_base_model_to_reloaded_adapter(tiny_inputs, monkeypatch):
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tiny_inputs / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    parameters = (
        f"MODEL, DATASET = {str(tiny_inputs / 'model')!r}, {str(tiny_inputs / 'data')!r}\nEPOCHS, BATCH = 2, 4"
    )
    notebook = run("01_quickstart.ipynb", parameters, tiny_inputs)
    text = "\n".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ()))
    assert "saved for backward" in text and "trainable params" in text
    pictures = [
        out for cell in notebook.cells for out in cell.get("outputs", ()) if "image/png" in out.get("data", {})
    ]
    assert len(pictures) == 2
    card = (tiny_inputs / "quickstart" / "adapter" / "README.md").read_text()
    assert "| eval_accuracy |" in card and "green, red" in card


def test_notebooks_are_committed_without_outputs():
    for path in NOTEBOOKS.glob("*.ipynb"):
        assert all(not cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells), path
