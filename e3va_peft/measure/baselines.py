"""The methods that E3VA is compared with: each a function from a model to the same model, made trainable.

Every one trains the same head and output norms whole (`trained_whole`) and differs in what it trains in the backbone
besides. PEFT provides LoRA and norm tuning; its BEFT trains the biases of value projections only and is no BitFit. The
others are here, in a few lines each. Where modules are put in, they are children of modules that the backbone has,
run by hooks: no name in the model changes, so that pretrained weights and checkpoints load as before.

Parameters trained in the backbone of Swin-B, output norms included, against those published for it (V-PETL Bench and
the papers of LoRand and E3VA), in millions:

    method        here   published   where they differ
    partial-1     12.60  12.60
    bitfit         0.20   0.20
    norm-tuning    0.06   0.06
    adapter        3.11   -
    adaptformer    1.56   3.11       published is the count of two adapters a block, behind attention and MLP; the
                                     paper and its authors' code have one, beside the MLP
    lorand         1.20   1.20
    lora           0.39   3.03       rank 8, as everywhere in this package; rank 64 gives 3.08
    e3va           1.20   1.20
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LNTuningConfig, get_peft_model
from torch import Tensor, nn

from e3va_peft.backbones import TapPoint
from e3va_peft.backbones.base import adapted_blocks
from e3va_peft.errors import UserError
from e3va_peft.exits import Exit, find_exits
from e3va_peft.training import methods
from e3va_peft.training.methods import checkpointed, freeze_backbone, trained_whole

WIDTH = 64  # of bottlenecks, as in V-PETL Bench


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        adapt: (model, options of its PEFT config) -> the model, made trainable.
        learning_rate: A rate to start from, with AdamW. Each method has its own best one: search it.
    """

    adapt: Callable[..., nn.Module]
    learning_rate: float


def adapt(model: nn.Module, method: Mapping[str, Any]) -> nn.Module:
    """Make a model trainable by one of `BASELINES`; what is not trained is frozen.

    Args:
        model: Base model with its head.
        method: `name`, and options for the method's PEFT config where it has one.

    Raises:
        UserError: The method cannot adapt this model, or an option cannot work.
    """
    options = {key: value for key, value in method.items() if key != "name"}
    return BASELINES[method["name"]].adapt(model, **options)


def full(model: nn.Module) -> nn.Module:
    """Train everything."""
    return methods.adapt(model, {"name": "full"})


def head_only(model: nn.Module) -> nn.Module:
    """Train nothing in the backbone but its output norms. The backbone runs in eval mode."""
    return methods.adapt(model, {"name": "head-only"})


def partial_1(model: nn.Module) -> nn.Module:
    """Train the last block of the backbone.

    Source: Yosinski et al., NeurIPS 2014, arXiv 1411.1792; the name is from Jia et al., ECCV 2022, arXiv 2203.12119.
    """
    freeze_backbone(model)
    for found in find_exits(model):
        _blocks(found)[-1].requires_grad_(True)
    return model


def bitfit(model: nn.Module) -> nn.Module:
    """Train all biases of the backbone, its tables of relative position bias among them.

    Source: Ben Zaken et al., ACL 2022, arXiv 2106.10199. Its models have no such tables; the 0.20 M published for
    Swin-B count them.
    """
    freeze_backbone(model)
    for found in find_exits(model):
        for _, module in _read_modules(model, found):
            for name, parameter in module.named_parameters(recurse=False):
                if "bias" in name:
                    parameter.requires_grad_(True)
    return model


def norm_tuning(model: nn.Module) -> nn.Module:
    """Train all layer norms of the backbone, by PEFT's LN tuning.

    Source: Zhao et al., ICLR 2024, arXiv 2312.11420.
    """
    whole = trained_whole(model)
    norms = [
        name
        for found in find_exits(model)
        for name, module in _read_modules(model, found)
        if isinstance(module, nn.LayerNorm) and name not in whole
    ]
    config = LNTuningConfig(target_modules="|".join(map(re.escape, norms)), modules_to_save=whole)
    with warnings.catch_warnings():  # PEFT asks of every layer whether it is linear, also where it tunes norms
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
        return get_peft_model(model, config)


def adapter(model: nn.Module) -> nn.Module:
    """Put a bottleneck of GELU behind attention and another behind the MLP, each with a residual: `t + A(t)`.

    Source: Houlsby et al., ICML 2019, arXiv 1902.00751, section 2.1; GELU and width 64 as in V-PETL Bench. Zero at the
    start, where the paper is near zero.
    """
    return _sequential(model, lambda width: Bottleneck(width, F.gelu))


def adaptformer(model: nn.Module) -> nn.Module:
    """Put a bottleneck of ReLU beside the MLP: `MLP(x) + 0.1 A(x)`, x being the normed input of the MLP.

    Source: Chen et al., NeurIPS 2022, arXiv 2205.13535, equations 2 and 3, s = 0.1, width 64, zero at the start. Where
    the backbone scales its branches (LayerScale), the sum is scaled (inferred: the paper's backbones do not).
    """
    freeze_backbone(model)
    for found in find_exits(model):
        for width, taps in _taps(found):
            beside = taps["mlp"].branch if "mlp" in taps else None
            if beside is None:
                raise UserError(
                    f"method=adaptformer: no one module of a {found.family.name} block is an MLP to run beside. Leave "
                    "the method out."
                )
            beside.add_module(_ADAPTER, Bottleneck(width, F.relu, scale=0.1))
            beside.register_forward_hook(_beside)
    return model


def lorand(model: nn.Module) -> nn.Module:
    """Put a LoRand adapter behind attention and another behind the MLP, each with a residual: `t + A(t)`.

    Source: Yin et al., CVPR 2023, "1% VS 100%: Parameter-Efficient Low Rank Adapter for Dense Predictions": two
    branches of rank 8. The width C / 2 is inferred from the published count. Placed and initialised as in the authors'
    code, which does *not* start at zero: the adapted model begins near the pretrained one, not at it.
    """
    return _sequential(model, LoRand)


def lora(model: nn.Module, **options: Any) -> nn.Module:
    """Train PEFT's LoRA on queries and values, rank 8.

    Source: Hu et al., ICLR 2022, arXiv 2106.09685.

    Args:
        model: Base model with its head.
        options: For `LoraConfig`.
    """
    return methods.adapt(model, {"name": "lora", **options})


def lora_checkpointing(model: nn.Module, **options: Any) -> nn.Module:
    """Train LoRA, and run every block of the backbone again in backward in place of keeping its activations.

    Source: Chen et al., 2016, arXiv 1604.06174.

    Args:
        model: Base model with its head.
        options: For `LoraConfig`.
    """
    return checkpointed(lora(model, **options))


def e3va(model: nn.Module, **options: Any) -> nn.Module:
    """Train a highway beside the backbone, with the defaults of `E3VAConfig`.

    Source: Yin et al., ACM MM 2024, arXiv 2306.09729.

    Args:
        model: Base model with its head.
        options: For `E3VAConfig`.
    """
    return methods.adapt(model, {"name": "e3va", **options})


# Rates of `e3va train` where it has the method. BitFit and the adapters: the middle of what their papers search.
BASELINES = {
    "full": Method(full, methods.LEARNING_RATES["full"]),
    "head-only": Method(head_only, methods.LEARNING_RATES["head-only"]),
    "partial-1": Method(partial_1, methods.LEARNING_RATES["full"]),
    "bitfit": Method(bitfit, 1e-3),
    "norm-tuning": Method(norm_tuning, 1e-3),
    "adapter": Method(adapter, 1e-3),
    "adaptformer": Method(adaptformer, 1e-3),
    "lorand": Method(lorand, 1e-3),
    "lora": Method(lora, methods.LEARNING_RATES["lora"]),
    "lora-checkpointing": Method(lora_checkpointing, methods.LEARNING_RATES["lora"]),
    "e3va": Method(e3va, methods.LEARNING_RATES["e3va"]),
}


class Bottleneck(nn.Module):
    """A bottleneck that starts at zero: `scale * (act(x W1 + b1) W2 + b2)`, (B, N, C) -> (B, N, C).

    Args:
        width: Channels C.
        activation: Between the two projections.
        scale: Factor of the output.
    """

    def __init__(self, width: int, activation: Callable[[Tensor], Tensor], scale: float = 1.0) -> None:
        super().__init__()
        self.down = nn.Linear(width, WIDTH)
        self.up = nn.Linear(WIDTH, width)
        self.activation = activation
        self.scale = scale
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.scale * self.up(self.activation(self.down(x)))


class LoRand(nn.Module):
    """A bottleneck whose projections are synthesised: `gelu(x W1 + b1) W2 + b2`, (B, N, C) -> (B, N, C).

    W1 = sum over branches of P1 K Q1, (C, r) (r, r) (r, C/2); W2 = sum of P2 K Q2, (C/2, r) (r, r) (r, C). Both share
    the kernel K of each branch. All factors start uniform.

    Args:
        width: Channels C.
        branches: The paper's α.
        rank: The paper's β, r above.
    """

    def __init__(self, width: int, branches: int = 2, rank: int = 8) -> None:
        super().__init__()
        inner = width // 2
        self.kernel = nn.Parameter(torch.empty(branches, rank, rank))
        self.p1 = nn.Parameter(torch.empty(branches, width, rank))
        self.q1 = nn.Parameter(torch.empty(branches, rank, inner))
        self.p2 = nn.Parameter(torch.empty(branches, inner, rank))
        self.q2 = nn.Parameter(torch.empty(branches, rank, width))
        self.down_bias = nn.Parameter(torch.empty(inner))
        self.up_bias = nn.Parameter(torch.empty(width))
        for factor in (self.kernel, self.p1, self.q1, self.p2, self.q2):
            bound = factor.shape[-1] ** -0.5
            nn.init.uniform_(factor, -bound, bound)
        nn.init.uniform_(self.down_bias, -(width**-0.5), width**-0.5)
        nn.init.uniform_(self.up_bias, -(inner**-0.5), inner**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        down = (self.p1 @ self.kernel @ self.q1).sum(0)  # (C, C/2)
        up = (self.p2 @ self.kernel @ self.q2).sum(0)  # (C/2, C)
        return F.gelu(x @ down + self.down_bias) @ up + self.up_bias


class OnMaps(nn.Module):
    """A module on tokens for maps, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.adapter(x.movedim(1, -1)).movedim(-1, 1)


_ADAPTER = "baseline_adapter"


# Hooks are plain functions that look their adapter up: they survive pickle and deepcopy, and hold no module.
def _before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] + module.get_submodule(_ADAPTER)(args[0]), *args[1:])


def _behind(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    branch = output[0] if isinstance(output, tuple) else output
    adapted = branch + module.get_submodule(_ADAPTER)(branch)
    return (adapted, *output[1:]) if isinstance(output, tuple) else adapted


def _beside(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + module.get_submodule(_ADAPTER)(args[0])


def _sequential(model: nn.Module, build: Callable[[int], nn.Module]) -> nn.Module:
    """Put a new module, `build(width)`, behind attention and MLP of every block."""
    freeze_backbone(model)
    for found in find_exits(model):
        for width, taps in _taps(found):
            for tap in taps.values():
                adapter = build(width)
                tap.module.add_module(_ADAPTER, OnMaps(adapter) if found.family.channels == "first" else adapter)
                if tap.read == "input":
                    tap.module.register_forward_pre_hook(_before)
                else:
                    tap.module.register_forward_hook(_behind)
    return model


def _taps(found: Exit) -> Iterator[tuple[int, Mapping[str, TapPoint]]]:
    """Iterate over the blocks whose result is read: their width and tap points."""
    for stage, depth in zip(found.family.stages(found.module), found.site.depth, strict=False):
        for block in stage.blocks[:depth]:
            yield stage.width, found.family.tap_points(found.module, block)


def _blocks(found: Exit) -> list[nn.Module]:
    """Return the blocks whose result is read."""
    names = adapted_blocks(found.family.stages(found.module), found.site.depth)
    return [found.module.get_submodule(name) for name in names]


def _read_modules(model: nn.Module, found: Exit) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over (full name, module) of a backbone, without blocks and mergings whose result nobody reads."""
    unread: set[int] = set()
    depths = found.site.depth
    for i, stage in enumerate(found.family.stages(found.module)):
        unused = list(stage.blocks[depths[i] if i < len(depths) else 0 :])
        unused += stage.merging if i >= len(depths) - 1 else ()
        unread |= {id(module) for name in unused for module in found.module.get_submodule(name).modules()}
    for part in found.parts:
        for name, module in model.get_submodule(part).named_modules(prefix=part):
            if id(module) not in unread:
                yield name, module
