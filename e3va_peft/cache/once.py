"""`backbone_once`: several adapters on the same images, for one run of their frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from e3va_peft.exits import frozen_weights, layers_of
from e3va_peft.fingerprint import checksum, config_checksum
from e3va_peft.layer import E3VALayer
from e3va_peft.replay import SOURCE, Once


@contextmanager
def backbone_once(*models: nn.Module) -> Iterator[None]:
    """Run the frozen backbone once for all adapters that see the same images one after the other.

        with torch.no_grad(), backbone_once(model):
            for batch in batches:
                for name in names:
                    model.set_adapter(name)
                    outputs[name].append(model(**batch))

    The first forward of a batch takes down, exactly, what adapters read and what the backbone returns; those that
    follow read it, and what they say is what they say alone. Gradients, where they are wanted, are those of each
    adapter alone, too. Other images, or other arguments of the backbone, make it run again. What is taken down of the
    last batch, every tap among it, is kept up to the end of the `with` statement. With live blocks it ends where they
    begin, and they run each time.

    Args:
        models: Adapted models; the adapters of one model are chosen by its `set_adapter`. Several models must have
            equal frozen weights and configs, and share a run where their adapters read the same taps and have the same
            live blocks. The weights are compared on entering, so enter it outside of the loop over batches.

    Raises:
        ValueError: A model has no highway, or a backbone of other frozen weights, or another config, than the first.
    """
    places: dict[E3VALayer, int] = {}
    for i, model in enumerate(models):
        layers = layers_of(model)
        if not layers:
            raise ValueError(
                f"models[{i}]={type(model).__name__}: has no backbone with a highway. Adapt it first: "
                "get_peft_model(model, E3VAConfig())."
            )
        if not have_same_backbone(models[0], model):
            raise ValueError(
                f"models[{i}]={type(model).__name__}: has other frozen weights, or another config, than models[0], "
                "so no run of the backbone can serve both. Give models whose adapters were trained on the same base, "
                "or run it alone."
            )
        places |= {layer: place for place, layer in enumerate(layers)}
    with SOURCE.set(Once(places)):
        yield


def have_same_backbone(first: nn.Module, other: nn.Module) -> bool:
    """Whether two models have backbones with equal frozen weights, which compute the same."""
    built = [[config_checksum(layer.exit) for layer in layers_of(model)] for model in (first, other)]
    if built[0] != built[1]:
        return False
    pairs = _frozen(first), _frozen(other)
    if len(pairs[0]) != len(pairs[1]):
        return False
    return all(_are_one(a, b) or checksum(a) == checksum(b) for a, b in zip(*pairs, strict=True))


def hold_once(first: nn.Module, other: nn.Module) -> None:
    """Let a model use the frozen weights of another, equal ones on its device, instead of its own."""
    for a, b in zip(_frozen(first), _frozen(other), strict=True):
        for (_, tensor), (_, own) in zip(a, b, strict=True):
            own.data = tensor.data


def _frozen(model: nn.Module) -> list[list[tuple[str, Tensor]]]:
    return [frozen_weights(layer) for layer in layers_of(model)]


def _are_one(first: list[tuple[str, Tensor]], other: list[tuple[str, Tensor]]) -> bool:
    """Whether weights are in the same memory."""
    places = [[(name, t.data_ptr(), t.shape, t.stride()) for name, t in part] for part in (first, other)]
    return places[0] == places[1]
