"""Contents of README.md and of the pages of docs/: Python runs, configs and commands are taken, files are there."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
import typer
from peft import PeftModel, get_peft_model
from PIL import Image

import e3va_peft
from e3va_peft.cli import app
from e3va_peft.data.yaml import parse_yaml
from e3va_peft.training import training_arguments
from e3va_peft.training.config import parse_config, read_config
from e3va_peft.training.run import train
from tests.inputs import classify, save_swin, write

ROOT = Path(__file__).parent.parent


FILES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "tests" / "faults" / "README.md",
    *(ROOT / "docs").glob("*.md"),
]
PAGES = {str(path.relative_to(ROOT)).removeprefix("docs/"): path.read_text(encoding="utf-8") for path in FILES}
ELSEWHERE = {"objects.md"}  # the tests of detectors run it


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)


def commands() -> Iterator[list[str]]:
    for page in PAGES:
        for line in "".join(blocks(page, "bash")).replace("&&", "\n").splitlines():
            words = shlex.split(line.partition(" > ")[0], comments=True)
            if words[:1] == ["accelerate"]:
                words = ["e3va", *words[words.index("e3va_peft") + 1 :]]
            if words and Path(words[0]).name == "e3va":
                yield words[3:] if words[1] == "--import" else words[1:]


class Colors(torch.utils.data.Dataset):
    """Four images, as a data set for the Trainer."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)), "labels": i % 2}


@pytest.mark.parametrize("page", sorted(page for page in PAGES if blocks(page, "python") and page not in ELSEWHERE))
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PeftModel, "push_to_hub", lambda model, name: model.save_pretrained(name))  # a folder here
    folder = save_swin(tmp_path / "swin")
    base = transformers.SwinForImageClassification.from_pretrained(folder)
    model = get_peft_model(base, e3va_peft.E3VAConfig())
    model.save_pretrained("me/my-adapter")
    for name in ("cells", "nuclei", "tissue"):
        model.add_adapter(name, e3va_peft.E3VAConfig())
    Image.new("RGB", (40, 40)).save("photo.jpg")
    if "runs/photos-lora" in PAGES[page]:
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        train(parse_config(classify(tmp_path, "runs/photos-lora", max_steps=1) | {"method": "lora"}))
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    names = {
        **{"e3va_peft": e3va_peft, "torch": torch, "Trainer": transformers.Trainer, "outputs": {}},
        **{"training_arguments": partial(training_arguments, use_cpu=True), "train": Colors(), "test": Colors()},
        "names": ["red", "green"],
        **{"model": model, "base": type(base).from_pretrained(folder)},
        "batch": batch,
        "optimizer": torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]),
    }
    for code in blocks(page, "python"):
        code = code.replace("microsoft/swin-base-patch4-window7-224", str(folder))
        code = code.replace('training_arguments("out"', 'training_arguments("out", max_steps=1')
        exec(compile(code, page, "exec"), dict(names))


def test_the_configs_of_all_pages_are_read(tmp_path):
    shown = [parse_yaml(text, page) for page in PAGES for text in blocks(page, "yaml")]
    assert len(shown) > 4
    for values in shown:
        values = values if "task" in values else classify(tmp_path) | values
        read_config(str(write(tmp_path / "shown.yaml", values)), ())


def test_the_commands_of_all_pages_are_taken(tmp_path):
    known = typer.main.get_command(app).commands
    shown = list(commands())
    assert {words[0] for words in shown} >= {"train", "eval", "predict", "compare", "recipes", "demo"} <= known.keys()
    for words in shown:
        context = known[words[0]].make_context(words[0], words[1:])
        if fields := context.params.get("overrides"):
            read_config(str(write(tmp_path / "my.yaml", classify(tmp_path))), fields)


def test_every_file_that_a_page_names_is_there():
    for page, text in PAGES.items():
        for name in re.findall(r"\b(?:benchmarks|examples|notebooks|e3va_peft)/[\w/-]*(?:\.\w+)?", text):
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_a_recipe_is_shown_as_it_is():
    recipe = ROOT / "e3va_peft" / "recipes" / "dinov2-image-folder.yaml"
    assert recipe.read_text(encoding="utf-8") in blocks("train.md", "yaml")


def test_links_lead_somewhere_on_github():
    for path in FILES:
        text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)#]+)|(?:src|srcset)=\"([^\"]+)", text):
            (target,) = filter(None, target)
            found = Path(os.path.normpath(path.parent / target))  # as text: GitHub follows no symlink in a path
            followed = [parent for parent in found.parents if parent.is_symlink()]
            assert target.startswith("https://") or (found.exists() and not followed), f"{path.name}: {target}"


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150
