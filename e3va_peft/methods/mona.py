"""Mona: adapters that see each token's surroundings, by depth-wise convolutions in the bottleneck."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e3va_peft.backbones import Backbone
from e3va_peft.backbones.base import GridSource
from e3va_peft.errors import UserError
from e3va_peft.exits import find_exits
from e3va_peft.hooks import image_size
from e3va_peft.methods.base import INSERTED, WIDTH, Method, blocks, freeze_backbone


class Mona(nn.Module):
    """Change a token by its surroundings: `dropout(gelu(mix(s W1 + b1))) W2 + b2`, (B, N, C) -> (B, N, C).

    s = layernorm(x) * gamma + x * gammax. The mix is y + (conv3(y) + conv5(y) + conv7(y)) / 3, depth-wise, and
    behind it y + conv1(y), on the map of the image's tokens. Tokens in front of them are not mixed (inferred: the
    paper's backbones have none).

    Args:
        width: Channels C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))
        self.gammax = nn.Parameter(torch.ones(width))
        self.down = nn.Linear(width, WIDTH)
        self.depthwise = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, k, padding=k // 2, groups=WIDTH) for k in (3, 5, 7))
        self.pointwise = nn.Conv2d(WIDTH, WIDTH, 1)
        self.dropout = nn.Dropout(0.1)
        self.up = nn.Linear(WIDTH, width)
        for projection in (self.down, self.up):
            nn.init.trunc_normal_(projection.weight, std=0.02)
            nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor, grid: tuple[int, int], prefix: int = 0) -> Tensor:
        """(B, prefix + H * W, C) -> (B, prefix + H * W, C)."""
        y = self.down(self.norm(x) * self.gamma + x * self.gammax)
        front, image = y[:, :prefix], y[:, prefix:]
        mixed = self.mix(image.transpose(1, 2).unflatten(2, grid))  # (B, 64, H, W)
        y = torch.cat((front, mixed.flatten(2).transpose(1, 2)), dim=1)
        return self.up(self.dropout(F.gelu(y)))

    def mix(self, y: Tensor) -> Tensor:
        """(B, 64, H, W) -> (B, 64, H, W)."""
        small, middle, large = (conv(y) for conv in self.depthwise)
        y = y + (small + middle + large) / 3
        return y + self.pointwise(y)


class Stream(NamedTuple):
    """The stream inside the block that runs, channels where the family has them, and how its tokens lie."""

    value: Tensor
    channels_first: bool
    grid: tuple[int, int]
    prefix: int


_STREAM: ContextVar[Stream | None] = ContextVar("e3va_mona_stream", default=None)
_IMAGE: ContextVar[tuple[int, int] | None] = ContextVar("e3va_mona_image", default=None)


def mona(model: nn.Module) -> nn.Module:
    """Put a Mona M behind attention and another behind the MLP, on the stream x: `x + M(x)`.

    Placed as in the authors' code, behind the residual add, and initialised likewise: the adapted model begins near
    the pretrained one, not at it. Where drop-path follows a branch (DINOv2), it drops the change with it.
    """
    freeze_backbone(model)
    for found in find_exits(model):
        for part in found.parts:
            model.get_submodule(part).register_forward_pre_hook(_see_image, with_kwargs=True)
        for width, block, points in blocks(found):
            block.register_forward_pre_hook(Enter(found.family, found.module))
            for point in points.values():
                point.module.add_module(INSERTED, Mona(width))
                point.module.register_forward_hook(_change_stream)
            block.register_forward_hook(_leave)
    return model


def _see_image(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    _IMAGE.set(image_size((*args, *kwargs.values())) or _IMAGE.get())


@dataclass(frozen=True, eq=False)
class Enter:
    """A pre-hook on a block, which notes what enters it.

    Attributes:
        family: Of its backbone.
        exit: The backbone's exit.
    """

    family: Backbone
    exit: nn.Module

    def __call__(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        """Work out how the tokens lie.

        Raises:
            UserError: They do not lie in a grid.
        """
        image = _IMAGE.get() or getattr(block, "mona_image", None)  # checkpointing runs it again in another thread
        block.mona_image = image  # type: ignore[assignment]
        first = self.family.channels == "first"
        x, prefix = args[0].movedim(1, -1) if first else args[0], self.family.prefix(self.exit)
        height, width = self.family.grid(GridSource((x, *args[1:]), image, self.exit, prefix))
        tokens = x.shape[1:-1].numel()
        if tokens != prefix + height * width:
            raise UserError(
                f"method=mona: the {tokens} tokens of {type(block).__name__} are not {prefix} and a grid of {height} "
                f"x {width}, as the family {self.family.name!r} declares them, so there is no map to convolve. Choose "
                "another method."
            )
        _STREAM.set(Stream(args[0], first, (height, width), prefix))


def _change_stream(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    branch = output[0] if isinstance(output, tuple) else output
    stream = _STREAM.get()
    assert stream is not None  # its block has just been entered
    value = stream.value.reshape(branch.shape) + branch  # timm's Swin has maps for attention and tokens for the MLP
    x = value.movedim(1, -1) if stream.channels_first else value
    change = module.get_submodule(INSERTED)(x.flatten(1, -2), stream.grid, stream.prefix).view(x.shape)
    change = change.movedim(-1, 1) if stream.channels_first else change
    _STREAM.set(stream._replace(value=value + change))
    return (branch + change, *output[1:]) if isinstance(output, tuple) else branch + change


def _leave(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    _STREAM.set(None)  # so that nothing is kept alive


SOURCE = "Yin et al., CVPR 2025, arXiv 2408.08345"
MONA = Method(
    "mona", "Mona", "convolving adapters", mona, 3e-4, SOURCE, saves="inserted"
)  # rate of its authors' configs
