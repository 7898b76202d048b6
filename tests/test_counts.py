"""Published parameter counts, on the real configurations (on the meta device: nothing is allocated)."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import Dinov2Backbone, Dinov2Config, SwinBackbone, SwinConfig, SwinForImageClassification

from e3va_peft import E3VAConfig
from e3va_peft.meter import backbone_share
from tests.models import SWIN_B

SWIN_L = {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 7}


def on_meta(config: dict, out_features: list[str]):
    with torch.device("meta"):
        model = torch.nn.Sequential(SwinBackbone(SwinConfig(**config, out_features=out_features)))
        return get_peft_model(model, E3VAConfig())


@pytest.mark.parametrize(
    ("config", "out_features", "count"),
    [
        (SWIN_B, ["stage1", "stage2", "stage3", "stage4"], 1_195_008),
        (SWIN_L, ["stage2", "stage3", "stage4"], 1_792_128),
    ],
    ids=["Swin-B, four maps", "Swin-L, three maps"],
)
def test_trainable_count_is_the_published_one(config, out_features, count, capsys):
    model = on_meta(config, out_features)
    assert model.get_nb_trainable_parameters()[0] == count
    share = backbone_share(model)
    assert share.trainable == count
    assert share.percent < 1.5
    model.print_trainable_parameters()
    assert f"trainable params: {count:,d}" in capsys.readouterr().out


def test_norms_that_the_backbone_does_not_use_are_not_trained():
    model = on_meta(SWIN_L, ["stage2", "stage3", "stage4"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not any("swin.layernorm" in name or "norms.stage1" in name for name in trained)


def test_no_adapter_exists_beyond_the_deepest_output():
    model = on_meta(SWIN_B, ["stage2"])
    stages = model.base_model.model[0].swin.encoder.e3va_highway["default"].stages
    assert [stage.u1.shape[:2] for stage in stages] == [(4, 128), (4, 256)]
    with torch.device("meta"):
        plain = torch.nn.Sequential(Dinov2Backbone(Dinov2Config(out_features=["stage3", "stage6"])))
        model = get_peft_model(plain, E3VAConfig())
    (stage,) = model.base_model.model[0].encoder.e3va_highway["default"].stages
    assert stage.u1.shape[0] == 12


def test_share_of_a_classifier_leaves_the_head_out():
    with torch.device("meta"):
        model = get_peft_model(SwinForImageClassification(SwinConfig(**SWIN_B, num_labels=1000)), E3VAConfig())
    share = backbone_share(model)
    head = 1024 * 1000 + 1000
    assert share.trainable == model.get_nb_trainable_parameters()[0] - head
    assert share.total == sum(p.numel() for p in model.unload().swin.parameters())
