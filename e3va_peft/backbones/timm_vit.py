"""timm's VisionTransformer (ViT, DeiT III, DINOv2, SigLIP, ...): the exit is two methods of the model itself."""

from __future__ import annotations

from typing import Any

from e3va_peft.backbones.base import Backbone, Branch
from e3va_peft.backbones.splices import add, in_own_dtype
from e3va_peft.backbones.timm import bound, taken, without_norm


def splice(outputs: Any, lane: Any, call: Any) -> Any:
    """Splice tokens (B, N, C), and of `forward_intermediates` maps (B, C, H, W) or tokens; the norm runs again."""
    norm, (blocks,), arguments = call.tail["norm"], call.depth, bound(call)
    maps = [] if call.method == "forward_features" else outputs if arguments["intermediates_only"] else outputs[1]
    which, spliced = taken(call, blocks) if maps else [], []
    for x, block in zip(maps, which, strict=True):
        tokens = add(
            x.flatten(2).mT if x.dim() == 4 else x, lane.behind(0, block + 1)[:, call.exit.num_prefix_tokens :]
        )
        tokens = in_own_dtype(norm, tokens) if arguments["norm"] else tokens
        spliced.append(tokens.mT.reshape(x.shape).contiguous() if x.dim() == 4 else tokens)
    if spliced and arguments["intermediates_only"]:
        return spliced
    last = max(which) + 1 if spliced and arguments["stop_early"] else blocks
    final = in_own_dtype(norm, add(call.tail_input, lane.behind(0, last)))
    return (final, spliced) if spliced else final


TIMM_VIT = Backbone(
    name="timm-vit",
    about="timm's VisionTransformer: ViT, DeiT III, DINOv2, SigLIP, ...",
    exits=("timm.models.vision_transformer.VisionTransformer",),
    methods=("forward_features", "forward_intermediates"),
    blocks="blocks.{block}",
    width="norm1",
    branches={"attention": Branch("drop_path1", "input"), "mlp": Branch("drop_path2", "input", computed_by="mlp")},
    prefix=lambda exit: exit.num_prefix_tokens,
    frozen=("patch_embed", "pos_drop", "patch_drop", "norm_pre", "blocks"),
    tail=("norm",),
    prepare=without_norm,
    splice=splice,
)
