"""Settings that every test shares."""

import gc
import os
from functools import cache

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: without network they would wait and try again

import jinja2
import pytest
import torch

from e3va_peft.training import callbacks
from tests.models import Case

gc.disable()  # until the tests are collected: what is imported stays
torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other

# Every save fills in the templates of model cards, and would compile them for it: a fifth of a tiny run.
jinja2.Template.__new__ = staticmethod(cache(jinja2.Template.__new__))

CORE = {
    "adapters", "architecture", "counts", "golden", "highway", "laws", "live_blocks", "recompute", "refusals", "saved",
    "storage",
}  # fmt: skip
CORE_MODELS = {
    "swin-classifier", "swin-early-maps", "vit-classifier", "dinov2-classifier", "convnext-classifier", "timm-swin",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `core` the tests of the tuner itself, on a few of the models, that are not slow."""
    for item in items:
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        few = not isinstance(case, Case) or case.name in CORE_MODELS
        if few and item.path.stem.removeprefix("test_") in CORE and item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.core)


def pytest_collection_finish() -> None:
    """Leave out of every later garbage collection what the libraries hold, a million objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)  # tiny models leave little behind, and many objects come and go
    gc.enable()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def curves() -> None:
    """Draw the curves of runs, which takes longer than tiny runs themselves."""


@pytest.fixture(autouse=True)
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw none in the tests that do not ask for `curves`."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr(callbacks, "draw_curves", lambda *args: None)
