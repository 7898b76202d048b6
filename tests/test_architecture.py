"""The package's own order: who may import whom, what is registered, what a new family needs."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import re
import runpy
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

import e3va_peft
from e3va_peft import Backbone, Branch, E3VAConfig, E3VAModel, register_backbone, registered_backbones
from e3va_peft import backbones as registry
from e3va_peft.backbones.splices import add
from e3va_peft.registration import register
from tests.models import CASES

PACKAGE = Path(e3va_peft.__file__).parent
ORDER = [
    {"storage", "registration", "frozen_pass", "saved", "errors", "fingerprint"},
    {"fused", "files"},
    {"config"},
    {"highway", "backbones"},
    {"card", "recompute", "recorder"},
    {"lane", "hooks", "replay"},
    {"layer"},
    {"exits"},
    {"refusals"},
    {"resolve"},
    {"model"},
    {"loading", "check", "meter", "cache"},
    {""},
    {"detection"},
    {"data", "methods"},
    {"training"},
    {"plan", "compare"},
    {"demo", "app"},
    {"cli"},
    {"__main__"},
]
TORCH_ONLY = {"storage", "frozen_pass", "fused", "highway", "recompute", "lane", "backbones", "recorder", "hooks"}


@cache
def imports(path: Path) -> set[str]:
    """Modules a file imports when it runs, leaving out what is for the type checker only."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            rooms = {f"e3va_peft.{alias.name}" for alias in node.names} if node.module == "e3va_peft" else set()
            rooms = {name for name in rooms if find_spec(name) is not None}
            found |= rooms or {node.module or ""}
    return found


def room(module: str) -> str:
    """`e3va_peft.backbones.swin` -> `backbones`."""
    return module.removeprefix("e3va_peft").strip(".").split(".")[0]


def test_imports_run_in_one_direction_only():
    rank = {name: i for i, names in enumerate(ORDER) for name in names}
    for path in PACKAGE.rglob("*.py"):
        own = room(".".join(("e3va_peft", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix("__init__"))
        assert own in rank, f"{own} has no place in the order"
        for module in imports(path):
            if module.split(".")[0] == "e3va_peft" and room(module) != own:
                assert rank[room(module)] < rank[own], f"{own} imports {module}, which stands to its right"
            if own in TORCH_ONLY and module.split(".")[0] not in {"e3va_peft", "__future__"}:
                library = module.split(".")[0]
                assert library == "torch" or library in sys.stdlib_module_names, f"{own} imports {module}"


def test_no_module_reads_or_writes_pickles():
    for path in PACKAGE.rglob("*.py"):
        found = {module.split(".")[0] for module in imports(path)}
        assert not found & {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"}, path


def test_a_function_fits_a_screen():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= 60, f"{path.name}: {node.name} has {lines} lines"


def test_registration_is_a_real_member_of_the_enum():
    member = PeftType.E3VA
    assert isinstance(member, PeftType) and member.value == member.name == "E3VA"
    assert PeftType("E3VA") is PeftType["E3VA"] is member and member in list(PeftType)
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert json.dumps({"type": member}) == '{"type": "E3VA"}'
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is E3VAConfig and PEFT_TYPE_TO_TUNER_MAPPING[member] is E3VAModel
    config = pickle.loads(pickle.dumps(E3VAConfig(r=3)))
    assert config == E3VAConfig(r=3) and config.peft_type is member


def test_registration_happens_once():
    register(E3VAConfig, E3VAModel)
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.E3VA] is E3VAModel
    assert [t.name for t in PeftType].count("E3VA") == 1


def test_registration_gives_way_the_day_peft_ships_e3va(monkeypatch):
    theirs = SimpleNamespace(__module__="peft.tuners.e3va.model")
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.E3VA, theirs)
    with pytest.warns(UserWarning, match=r"peft\.tuners\.e3va\.model"):
        register(E3VAConfig, E3VAModel)
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.E3VA] is theirs


def test_every_registered_family_is_tested():
    assert {case.family for case in CASES} == registered_backbones().keys()
    exits = {name for family in registered_backbones().values() for name in family.exits}
    modules = (type(module) for case in CASES for module in case.base().modules())
    seen = {f"{cls.__module__}.{cls.__qualname__}" for cls in modules}
    assert exits <= seen


def test_a_family_is_one_short_file():
    for path in (PACKAGE / "backbones").glob("*.py"):
        if re.search(r"^[A-Z0-9_]+ = Backbone\(", path.read_text(), re.MULTILINE):
            assert len(path.read_text().splitlines()) < 40, path


def test_register_backbone_works_from_user_code(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", registered_backbones())

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm = nn.LayerNorm(width)
            self.attention, self.mlp = nn.Linear(width, width), nn.Linear(width, width)

        def forward(self, x):
            x = x + self.attention(self.norm(x))
            return x + self.mlp(x)

    class TinyEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block(8) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return SimpleNamespace(x=x)

    tiny = Backbone(
        name="tiny",
        about="A tiny encoder",
        exits=(f"{TinyEncoder.__module__}.{TinyEncoder.__qualname__}",),
        blocks="blocks.{block}",
        width="norm",
        branches={"attention": Branch("attention"), "mlp": Branch("mlp")},
        splice=lambda outputs, lane, call: SimpleNamespace(x=add(outputs.x, lane.behind(0, 3))),
    )

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = TinyEncoder(), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.encoder(x).x)

    register_backbone(tiny)
    register_backbone(tiny)  # again, as a notebook cell that is run twice does
    assert "tiny" in registered_backbones()
    base, x = Model(), torch.randn(2, 5, 8)
    expected = base(x)
    model = get_peft_model(base, E3VAConfig(r=2))
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8


@pytest.mark.slow
def test_importing_the_package_warns_about_nothing_and_reloading_it_does_no_harm():
    code = (
        "import importlib, peft, transformers, warnings\n"
        "warnings.simplefilter('error')\n"
        "import e3va_peft, e3va_peft.model\n"
        "first = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING['E3VA']\n"
        "importlib.reload(e3va_peft.model), importlib.reload(e3va_peft)\n"
        "assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING['E3VA'] is first\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


WITHOUT_EXTRAS = """
import sys
from importlib.machinery import PathFinder

hidden = {"faster_coco_eval", "matplotlib", "PIL", "scipy", "timm", "torchao", "bitsandbytes", "torchmetrics"}
hidden |= {"torchvision", "onnx", "nilearn", "sklearn"}
hidden |= {"ruamel", "typer", "rich", "psutil", "gradio", "onnxruntime", "onnxscript", "tensorboard", "wandb"}
find = PathFinder.find_spec
is_hidden = lambda name: name.split(".")[0] in hidden
PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if is_hidden(name) else find(name, *rest))
"""


ROOMS = ("data", "training", "detection")


@pytest.fixture(scope="module")
def without_extras(tmp_path_factory) -> dict[str, str]:
    """Run a process without the extras: what each room that needs them says, and the command line."""
    folder = str(tmp_path_factory.mktemp("adapter"))
    code = WITHOUT_EXTRAS + (
        "import importlib, json, torch\n"
        "from peft import PeftModel, get_peft_model\n"
        "from transformers import ViTConfig, ViTForImageClassification\n"
        "from e3va_peft import E3VAConfig, check_backbone\n"
        "size = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16)\n"
        "def base():\n"
        "    torch.manual_seed(0)\n"
        "    return ViTForImageClassification(ViTConfig(**size, patch_size=8))\n"
        "batch = {'pixel_values': torch.randn(2, 3, 16, 16), 'labels': torch.tensor([0, 1])}\n"
        "model = get_peft_model(base(), E3VAConfig(r=2))\n"
        "model(**batch).loss.backward()\n"
        f"model.save_pretrained({folder!r})\n"
        f"PeftModel.from_pretrained(base(), {folder!r})\n"
        "said = {'core': str(check_backbone(base(), batch))}\n"
        "said['loaded'] = str(hidden & {name.split('.')[0] for name in sys.modules})\n"
        f"for room in {ROOMS}:\n"
        "    try:\n"
        "        importlib.import_module(f'e3va_peft.{room}')\n"
        "    except ImportError as error:\n"
        "        said[room] = str(error)\n"
        "from e3va_peft.__main__ import main\n"
        "sys.argv = ['e3va', 'train', 'x.yaml']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as error:\n"
        "    said['cli'] = str(error)\n"
        "print(json.dumps(said))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_core_adapts_trains_and_saves_without_the_extras(without_extras):
    assert "BROKEN" not in without_extras["core"] and without_extras["loaded"] == "set()"


@pytest.mark.slow
@pytest.mark.parametrize("room", [*ROOMS, "cli"])
def test_a_room_whose_packages_are_missing_names_the_install_line(room, without_extras):
    said = without_extras[room]
    assert "faster_coco_eval, matplotlib, PIL" in said and 'pip install "e3va_peft[train]"' in said


def test_the_readme_and_the_pages_show_what_was_recorded(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["readme_tables.py", "--check"])
    runpy.run_path(str(PACKAGE.parent / "benchmarks" / "readme_tables.py"), run_name="__main__")  # or it exits


def test_no_test_module_imports_from_another():
    for path in Path(__file__).parent.glob("*.py"):
        found = re.findall(r"^\s*(?:from|import) tests\.(test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(found) <= {path.stem}, path  # its own, in a process that it starts


def test_contributing_shows_the_order_that_is_held():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = text[text.index("a test holds this:") + len("a test holds this:") :].split("\n\n")[1]
    assert [set(step.split()) for step in shown.split(">")] == [names for names in ORDER if names - {"", "__main__"}]
