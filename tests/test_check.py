"""`check_backbone`: it finds nothing wrong with what is right, and names what is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from e3va_peft import Branch, Host, check_backbone
from e3va_peft import backbones as registry
from tests.models import BY_NAME, every_model, registered


@every_model
def test_every_law_holds_for_every_supported_model(case):
    model = case.base()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = check_backbone(model, case.training_batch())
    assert report.ok, str(report)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "holds" in str(report) and "BROKEN" not in str(report)


SWIN = registered("swin")


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        (replace(SWIN, blocks="stages.{stage}.blocks.{block}"), "The backbone is found"),
        (replace(SWIN, width="norm"), "The backbone is found"),
        (replace(SWIN, branches=SWIN.branches | {"mlp": Branch("mlp", "input")}), "The branches of a block add up"),
        (replace(SWIN, branches={"attention": SWIN.branches["attention"]}), "The branches of a block add up"),
        (replace(SWIN, splice=lambda outputs, lane, call: outputs), "The highway moves every output"),
        (replace(SWIN, hosts=(Host(frozen=("../embeddings",)),)), None),  # the norms are trained as parts of the head
        (replace(SWIN, grid=lambda source: (1, 1)), "The grid of every stage is known"),
        (replace(SWIN, prefix=lambda exit: 1), "The grid of every stage is known"),
    ],
)
def test_a_wrong_declaration_breaks_the_law_that_says_so(wrong, law, monkeypatch):
    monkeypatch.setitem(registry._FAMILIES, "swin", wrong)
    case = BY_NAME["swin-classifier"]
    report = check_backbone(case.base(), case.training_batch())
    broken = [found.name for found in report.laws if not found.holds]
    assert any(name.startswith(law) for name in broken) if law else not broken


def test_a_model_without_a_backbone_is_said_to_have_none():
    report = check_backbone(nn.Linear(2, 2), {"input": torch.ones(1, 2)})
    assert not report.ok and len(report.laws) == 1
    assert "holds no exit of a registered family" in str(report)
