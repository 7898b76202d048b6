"""The package's own order: who may import whom, what is registered, what a new family needs."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

import e3va_peft
from e3va_peft import (
    Backbone,
    E3VAConfig,
    E3VAModel,
    Site,
    StageSpec,
    TapPoint,
    register_backbone,
    registered_backbones,
)
from e3va_peft import backbones as registry
from e3va_peft import model as model_module
from tests.models import CASES

PACKAGE = Path(e3va_peft.__file__).parent
ORDER = [
    {"card", "storage", "backbones"},
    {"config", "highway"},
    {"layer"},
    {"resolve"},
    {"model"},
    {"loading"},
    {""},
    {"detection"},
    {"training"},
    {"measure"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
TORCH_ONLY = {"storage": {"torch"}, "highway": {"torch"}, "backbones": {"torch"}}


def imports(path: Path) -> set[str]:
    """Modules a file imports when it runs, leaving out what is for the type checker only."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
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
            found.add(node.module or "")
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
                assert library in TORCH_ONLY[own] | sys.stdlib_module_names, f"{own} imports {module}"


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
    e3va_peft.register()
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.E3VA] is E3VAModel
    assert [t.name for t in PeftType].count("E3VA") == 1


def test_registration_gives_way_the_day_peft_ships_e3va(monkeypatch):
    theirs = SimpleNamespace(__module__="peft.tuners.e3va.model")
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.E3VA, theirs)
    with pytest.warns(UserWarning, match=r"PEFT registers E3VA itself \(peft\.tuners\.e3va\.model\)"):
        model_module.register()
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.E3VA] is theirs


def test_every_registered_family_is_tested():
    assert {case.family for case in CASES} == registered_backbones().keys()
    exits = {name for family in registered_backbones().values() for name in family.exit_classes}
    seen = {type(module).__name__ for case in CASES for module in case.base().modules()}
    assert exits <= seen


def test_register_backbone_works_from_user_code(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", registered_backbones())

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.attention, self.mlp = nn.Linear(width, width), nn.Linear(width, width)

        def forward(self, x):
            x = x + self.attention(x)
            return x + self.mlp(x)

    class TinyEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block(8) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return SimpleNamespace(x=x)

    class Tiny(Backbone):
        name = "tiny"
        exit_classes = ("TinyEncoder",)

        def stages(self, exit):
            taps = ({"attention": TapPoint(b.attention), "mlp": TapPoint(b.mlp)} for b in exit.blocks)
            return (StageSpec(width=8, blocks=tuple(taps)),)

        def site(self, exit, name, ancestors):
            return Site(depth=(len(exit.blocks),))

        def splice(self, outputs, run):
            outputs.x = registry.add(outputs.x, run.lane.advance(3))
            return outputs

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = TinyEncoder(), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.encoder(x).x)

    register_backbone(Tiny())
    register_backbone(Tiny())  # again, as a notebook cell that is run twice does
    assert "tiny" in registered_backbones()
    base, x = Model(), torch.randn(2, 5, 8)
    expected = base(x)
    model = get_peft_model(base, E3VAConfig(r=2))
    torch.testing.assert_close(model(x), expected)
    model(x).sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8


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


def test_the_readme_shows_what_was_recorded():
    subprocess.run([sys.executable, PACKAGE.parent / "benchmarks" / "readme_tables.py", "--check"], check=True)
