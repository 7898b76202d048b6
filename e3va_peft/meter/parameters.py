"""Share of a backbone that is trained."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel
from torch import nn

from e3va_peft.exits import base_modules, find_exits, layers_of


@dataclass(frozen=True)
class BackboneShare:
    """Trained parameters beside and in the backbones of a model.

    Attributes:
        trainable: Parameters of the active highways and of the trained copies of output norms. Heads do not count.
        total: Parameters of the frozen backbones: embeddings, blocks, patch merging and their output norms.
    """

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """100 * trainable / total."""
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        return f"{self.trainable:,d} trained parameters for a backbone of {self.total:,d}: {self.percent:.2f} %"


def backbone_share(model: PeftModel) -> BackboneShare:
    """Report the share of a model's backbones that E3VA trains, to compare with the paper's 1.5 %.

    Args:
        model: Result of `get_peft_model(model, E3VAConfig())`.

    Raises:
        ValueError: The model holds no E3VA adapter.
    """
    root = model.get_base_model()
    modules = dict(base_modules(root))
    layers = {id(layer.exit): layer for layer in layers_of(root)}
    exits = [found for found in find_exits(root) if id(found.module) in layers]
    if not exits:
        raise ValueError(f"model={type(model).__name__}: holds no E3VA adapter. Pass what get_peft_model returned.")
    total: dict[int, int] = {}
    trainable: dict[int, int] = {}
    for found in exits:
        parts = [*found.parts, *found.site.norms, *found.site.unused]
        total |= {id(p): _elements(p) for part in parts for p in modules[part].parameters()}
        outside = [root.get_submodule(name) for name in found.site.norms if name not in found.tail]
        holders = [layers[id(found.module)], *outside]
        trainable |= {id(p): p.numel() for holder in holders for p in holder.parameters() if p.requires_grad}
    return BackboneShare(sum(trainable.values()), sum(total.values()))


def _elements(parameter: nn.Parameter) -> int:
    """Return the number of weights; bitsandbytes packs two 4-bit ones into an element."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
