"""The notebooks run, from the first cell to the last, on tiny inputs and without network."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import nbformat
import pytest
from ipykernel.kernelapp import IPKernelApp
from jupyter_client.provisioning import LocalProvisioner
from nbclient import NotebookClient

from tests.helpers import start
from tests.inputs import save_colors, save_discs, save_shapes, save_swin, small_head

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def be_kernel(rank: int, connection: str, folder: str) -> None:
    """Be the process that `python -m ipykernel_launcher -f connection` would be."""
    os.chdir(folder)
    datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])  # it has read another
    matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"  # so has it
    IPKernelApp.launch_instance(argv=["-f", connection])


class Forked:
    """The process of a kernel, with what a provisioner asks of a `Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, connection: str, folder: str) -> None:
        (self.process,) = start(be_kernel, 1, connection, folder).processes

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()


@pytest.fixture(autouse=True)
def kernels_have_imported(monkeypatch):
    """Fork kernels from a process that has imported, which takes longer than all that most of them do."""

    async def launch_kernel(self, command: list[str], **kwargs: Any) -> Any:
        self.process = Forked(command[command.index("-f") + 1], kwargs["cwd"])
        return self.connection_info

    monkeypatch.setattr(LocalProvisioner, "launch_kernel", launch_kernel)


# The same of the commands: in 02 the first is a process.
IN_PROCESS = """
from e3va_peft.cli import app
def e3va(*arguments):
    assert not app([*map(str, arguments)], standalone_mode=False)
"""


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / name, as_version=4)


def command_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    (cell,) = [c for c in notebook.cells if "def e3va(" in c.source]
    return cell


def run(name: str, parameters: str, folder: Path, in_process: bool = False) -> nbformat.NotebookNode:
    notebook = read(name)
    (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    cell.source += "\n" + parameters
    if in_process:
        command_cell(notebook).source += "\n" + IN_PROCESS
    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, timeout=180, kernel_name="python3", resources=resources).execute()


def text_of(notebook: nbformat.NotebookNode) -> str:
    return "\n".join(text_of_cell(cell) for cell in notebook.cells)


def text_of_cell(cell: nbformat.NotebookNode) -> str:
    return "\n".join(out.get("text", "") for out in cell.get("outputs", ()))


def pictures_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [out for cell in notebook.cells for out in cell.get("outputs", ()) if "image/png" in out.get("data", {})]


@pytest.mark.slow
def test_quickstart_goes_from_base_model_to_reloaded_adapter(tmp_path):
    model, data = save_swin(tmp_path / "model"), save_colors(tmp_path / "data", test=3)
    notebook = run(
        "01_quickstart.ipynb", f"MODEL, DATASET = {str(model)!r}, {str(data)!r}\nEPOCHS, BATCH = 2, 4", tmp_path
    )
    text = text_of(notebook)
    assert "saved for backward" in text and "trainable params" in text
    assert len(pictures_of(notebook)) == 2
    card = (tmp_path / "quickstart" / "adapter" / "README.md").read_text()
    assert "| eval_accuracy |" in card and "green, red" in card


@pytest.mark.slow
def test_train_your_own_goes_from_a_folder_pair_to_predictions(tmp_path):
    model, data = save_swin(tmp_path / "model"), save_discs(tmp_path / "my-data", train=8, val=4)
    parameters = (
        f"MODEL, IMAGES, MASKS = {str(model)!r}, {str(data / 'images')!r}, {str(data / 'masks')!r}\n"
        "LABELS, REDUCE_LABELS = ['ground', 'disc'], True\n"
        "IMAGE_SIZE, HEAD_WIDTH, EPOCHS, BATCH = 32, 16, 2, 4"
    )
    notebook = run("02_train_your_own.ipynb", parameters, tmp_path, in_process=True)
    runs = tmp_path / "runs"
    assert (runs / "e3va" / "adapter" / "adapter_model.safetensors").is_file()
    records = {name: json.loads((runs / name / "metrics.json").read_text()) for name in ("e3va", "head-only")}
    for name, record in records.items():
        assert record["method"] == name and record["steps"] == 4
        assert f"{record['trained_parameters']:,}" in text_of(notebook)
    assert records["e3va"]["trained_parameters"] > records["head-only"]["trained_parameters"]
    found = json.loads((runs / "predictions" / "predictions.json").read_text())
    assert [Path(entry["file"]).name for entry in found] == ["0.jpg", "1.jpg", "2.jpg"]
    assert all(sum(entry["shares"].values()) == pytest.approx(1) for entry in found)
    assert len(pictures_of(notebook)) == 4  # the data, the curves, the overlays, the prediction by hand
    assert "100.0% of the pixels as `e3va predict` says" in text_of(notebook)


@pytest.mark.slow
def test_where_the_memory_goes_shows_it(tmp_path):
    parameters = (
        "SWIN = dict(image_size=32, patch_size=2, embed_dim=8, depths=[1, 2, 1], num_heads=[1, 2, 2], window_size=4)\n"
        "BATCH = 2"
    )
    notebook = run("03_where_the_memory_goes.ipynb", parameters, tmp_path)
    assert len(pictures_of(notebook)) == 4
    assert "lora-checkpointing" in text_of(notebook) and "ms per step" in text_of(notebook)


@pytest.mark.slow
def test_dense_prediction_goes_from_three_formats_to_pictures(tmp_path):
    model, shapes = save_swin(tmp_path / "model"), save_shapes(tmp_path / "shapes")
    discs = save_discs(tmp_path / "discs")
    options = {name: json.dumps(small_head(name)) for name in ("cascade-mask-rcnn", "retinanet", "mask2former")}
    notebook = run(
        "04_dense_prediction.ipynb",
        f"MODEL, VOC, EPOCHS, BATCH, IMAGE_SIZE = {str(model)!r}, {str(shapes / 'voc')!r}, 1, 2, 32\n"
        f"COCO_IMAGES, COCO_ANNOTATIONS = '{shapes}/coco/{{split}}', '{shapes}/coco/{{split}}.json'\n"
        f"IMAGES, MASKS, LABELS = {str(discs / 'images')!r}, {str(discs / 'masks')!r}, ['ground', 'disc']\n"
        f"CASCADE_OPTIONS = {options['cascade-mask-rcnn']}\nRETINANET_OPTIONS = {options['retinanet']}\n"
        f"MASK2FORMER_OPTIONS = {options['mask2former']}",
        tmp_path,
        in_process=True,
    )
    for name in ("cascade", "retinanet", "mask2former"):
        assert json.loads((tmp_path / "runs" / name / "metrics.json").read_text())["method"] == "e3va"
    assert len(pictures_of(notebook)) == 3  # two rows of truth and finds, one of overlays
    assert "trained parameters for a backbone of" in text_of(notebook) and "mask_ap" in str(notebook.cells)


@pytest.mark.slow
def test_add_a_backbone_goes_from_a_wrong_declaration_to_a_reloaded_adapter(tmp_path):
    notebook = run("05_add_a_backbone.ipynb", "STEPS = 3", tmp_path)
    wrong, right = (text for cell in notebook.cells if "  Saved and loaded" in (text := text_of_cell(cell)))
    broken = [line.split(":")[0] for line in wrong.splitlines() if line.startswith("BROKEN")]
    assert broken == [
        "BROKEN  The branches of a block add up to what the block adds to the stream",
        "BROKEN  Every output is that of the base whose blocks add the highway to the stream",
    ]
    assert "BROKEN" not in right and "16 x 12, 8 x 6, 4 x 3, 2 x 2" in right
    assert "holds no backbone that E3VA knows" in text_of(notebook) and "trainable params" in text_of(notebook)
    assert (tmp_path / "add-a-backbone" / "adapter_model.safetensors").is_file()


def test_commands_are_run_in_one_way():
    cells = [command_cell(read(name)) for name in ("02_train_your_own.ipynb", "04_dense_prediction.ipynb")]
    first, second = (cell.source.split("\n\n\n")[0] for cell in cells)
    assert first == second and first.startswith("def e3va(")


def test_notebooks_carry_what_they_print_and_draw_and_no_path_of_a_machine():
    for path in NOTEBOOKS.glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        assert any(cell.get("outputs") for cell in notebook.cells) and path.stat().st_size < 500_000, path
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
        assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
        assert not re.search(r"/(work|tmp|home|root|Users)/", json.dumps(outputs)), path
    assert all(pictures_of(read(name)) for name in ("01_quickstart.ipynb", "03_where_the_memory_goes.ipynb"))
