"""The form of a method, and what methods share: what all of them train whole, the blocks, modules put in by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from e3va_peft.backbones import TapPoint
from e3va_peft.backbones.base import adapted_blocks
from e3va_peft.config import E3VAConfig
from e3va_peft.errors import UserError
from e3va_peft.exits import Exit, everything_outside, find_exits

INSERTED = "baseline_adapter"
"""Name of a module that a method has put into one of the backbone's."""

WIDTH = 64  # of bottlenecks, as in V-PETL Bench


@dataclass(frozen=True)
class Method:
    """A way to fine-tune. All of them train the head and the output norms whole.

    Attributes:
        name: Its word in configs and on the command line.
        title: Its name in tables.
        trains: The parts of the backbone that it trains, in a word or two.
        adapt: (model, options) -> the model, made trainable.
        learning_rate: A rate to start from, with AdamW. Each method has its own best one: search it.
        source: Where it was published.
        options: PEFT config whose fields are its options; None where it has none.
        saves: What a run keeps: a PEFT *adapter*; the whole *model*; or that with modules *inserted*, which have to be
            put in again before the weights are loaded.
        cacheable: Whether the frozen backbone runs in eval mode and gets no gradient, so that one pass per image holds
            for the whole training (`e3va_peft.cached`).
        published: Millions of parameters trained in the backbone of Swin-B, by V-PETL Bench and the papers of LoRand
            and E3VA; None where they do not say.
        settings: More rows of a plan: title -> options.
    """

    name: str
    title: str
    trains: str
    adapt: Callable[..., nn.Module]
    learning_rate: float
    source: str = ""
    options: type[PeftConfig] | None = None
    saves: str = "model"
    cacheable: bool = False
    published: float | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def trained_whole(model: nn.Module) -> list[str]:
    """Names of the modules that every method trains whole: outside the backbone, and its output norms.

    Raises:
        UserError: The model holds no backbone that is known here.
    """
    exits = find_exits(model)
    if not exits:
        raise UserError(
            f"model={type(model).__name__}: holds no backbone that `e3va backbones` lists, so there is no telling "
            "head from backbone. Choose another model, or method: full."
        )
    return everything_outside(model, exits)


def freeze_backbone(model: nn.Module) -> None:
    """Leave trainable what every method trains whole, and nothing else."""
    whole = trained_whole(model)
    model.requires_grad_(False)
    for name in whole:
        model.get_submodule(name).requires_grad_(True)


def refuse_lost(adapted: nn.Module, new: Sequence[str]) -> None:
    """Refuse to train beside parameters that start at random and that nothing would keep.

    A whole model is saved with all it has; of an adapter's base only what it trains.

    Args:
        adapted: A model with the parameters that a method has made trainable.
        new: Names of the parameters of its base that no checkpoint gave their values.

    Raises:
        UserError: Some of them are neither trained nor saved.
    """
    if not isinstance(adapted, PeftModel):
        return
    base, config = adapted.get_base_model(), adapted.peft_config["default"]
    saved = {name for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    saved |= set(config.modules_to_save or ()) if isinstance(config, E3VAConfig) else set()  # also in the exits
    unused = {name for found in find_exits(base) for name in found.site.unused}
    kept = tuple(f"{name}." for name in saved | unused)
    lost = [name for name in new if not name.startswith(kept)]
    if lost:
        raise UserError(
            f"method.modules_to_save: leaves out {lost[:3]}{' and more' if len(lost) > 3 else ''}, which start at "
            "random, because the model has no weights for them or for other classes; they would be neither trained "
            "nor saved. Name their modules, or leave modules_to_save out to train everything outside the backbone."
        )


def blocks(found: Exit) -> Iterator[tuple[int, nn.Module, dict[str, TapPoint]]]:
    """Iterate over the blocks whose result is read: width, module, and where its branches are, as they run."""
    stages = found.family.stages(found.module)
    for name, stage in adapted_blocks(stages, found.site.depth).items():
        points = found.family.tap_points(found.module, name)
        yield stages[stage].width, found.module.get_submodule(name), points


def read_modules(model: nn.Module, found: Exit) -> Iterator[tuple[str, nn.Module]]:
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


class OnMaps(nn.Module):
    """A module on tokens for maps, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.adapter(x.movedim(1, -1)).movedim(-1, 1)


def behind_branches(model: nn.Module, build: Callable[[int], nn.Module]) -> nn.Module:
    """Put a new module A, `build(width)`, behind attention and MLP of every block, with a residual: `t + A(t)`.

    It is a child of a module that the backbone has, run by a hook: no name in the model changes, so that pretrained
    weights and checkpoints load as before.
    """
    freeze_backbone(model)
    for found in find_exits(model):
        for width, _, points in blocks(found):
            for point in points.values():
                adapter = build(width)
                point.module.add_module(INSERTED, OnMaps(adapter) if found.family.channels == "first" else adapter)
                if point.read == "input":
                    point.module.register_forward_pre_hook(_before)
                else:
                    point.module.register_forward_hook(_behind)
    return model


# Hooks are plain functions that look their adapter up: they survive pickle and deepcopy, and hold no module.
def _before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] + module.get_submodule(INSERTED)(args[0]), *args[1:])


def _behind(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    branch = output[0] if isinstance(output, tuple) else output
    adapted = branch + module.get_submodule(INSERTED)(branch)
    return (adapted, *output[1:]) if isinstance(output, tuple) else adapted
