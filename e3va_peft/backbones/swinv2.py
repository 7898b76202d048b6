"""Swin Transformer V2: as V1, but its branches are normed at their ends."""

from __future__ import annotations

from functools import partial

from e3va_peft.backbones.base import Backbone, Branch, Host, Merging, merge_two_by_two, second_argument
from e3va_peft.backbones.splices import stages_of_tokens

SWINV2 = Backbone(
    name="swinv2",
    about="Swin Transformer V2",
    exits=("transformers.models.swinv2.modeling_swinv2.Swinv2Encoder",),
    blocks="layers.{stage}.blocks.{block}",
    width="layernorm_before",
    # Behind the norms, as the stream sees them. `drop_path` is one module called twice and cannot be read.
    branches={"attention": Branch("layernorm_before"), "mlp": Branch("layernorm_after", computed_by=None)},
    merging=Merging(
        ("layers.{stage}.downsample",),
        run=merge_two_by_two,
        forward="transformers.models.swinv2.modeling_swinv2.Swinv2PatchMerging.forward",
        parts=("layers.{stage}.downsample.reduction", "layers.{stage}.downsample.norm"),
    ),
    grid=second_argument,
    hosts=(
        Host(
            classes=("transformers.models.swinv2.modeling_swinv2.Swinv2Backbone",),
            frozen=("../embeddings",),
            cuts=True,
        ),
        Host(frozen=("../embeddings",), norms=("../layernorm",)),
    ),
    splice=partial(stages_of_tokens, hidden_before_merging=True),
    onto=True,
)
