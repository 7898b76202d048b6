"""`check_backbone`: the laws of the method, tried on a model of a family that somebody declared at home."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from e3va_peft.backbones.base import adapted_blocks
from e3va_peft.config import E3VAConfig
from e3va_peft.exits import Exit, find_exits, layers_of
from e3va_peft.frozen_pass import Grid
from e3va_peft.highway import sum_of_adapters
from e3va_peft.hooks import Hook
from e3va_peft.layer import E3VALayer


@dataclass(frozen=True)
class Law:
    """One law, and whether it holds.

    Attributes:
        name: The law in a sentence.
        holds: Whether it does.
        detail: The finding: where it broke, or what was left out.
    """

    name: str
    holds: bool
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """Findings of `check_backbone`.

    Attributes:
        laws: The laws, in the order in which they were tried.
    """

    laws: tuple[Law, ...]

    @property
    def ok(self) -> bool:
        """Whether all laws hold."""
        return all(law.holds for law in self.laws)

    def __str__(self) -> str:
        return "\n".join(
            f"{'holds ' if law.holds else 'BROKEN'}  {law.name}" + (f": {law.detail}" if law.detail else "")
            for law in self.laws
        )


class _Broken(Exception):
    """A law does not hold; the text says where."""


def check_backbone(model: nn.Module, batch: Mapping[str, Any], *, rtol: float = 1e-3) -> Report:
    """Try the laws of the method on a model, for a `Backbone` that you declared.

    A tiny model with random weights and two images will do, and is checked in seconds. The model is left as it is.

    Args:
        model: A base model that holds the backbone, with a head of its own.
        batch: Its keyword arguments; labels, if it then returns a loss, which is trained on.
        rtol: How far two results may be apart that should be equal, as a share of the largest value.

    Returns:
        Each law and whether it holds; print it. An error that a law ran into is its detail.
    """
    trial = _Trial(model, dict(batch), rtol)
    laws: list[Law] = []
    for law in _LAWS:
        try:
            detail = law(trial) or ""
            laws.append(Law(_name(law), True, detail))
        except Exception as error:
            text = str(error) if isinstance(error, _Broken) else f"{type(error).__name__}: {error}"
            laws.append(Law(_name(law), False, text))
            if law is _is_found:  # there is nothing else to try
                break
    return Report(tuple(laws))


def _name(law: Callable[..., Any]) -> str:
    return (law.__doc__ or "").strip().removesuffix(".")


class _Trial:
    def __init__(self, model: nn.Module, batch: dict[str, Any], rtol: float) -> None:
        self.model = model
        self.batch = batch
        self.rtol = rtol
        self.base = copy.deepcopy(model).eval()

    def adapted(self, init_weights: bool = True, **options: Any) -> PeftModel:
        """Return a copy of the model, adapted; without `init_weights` with a highway that says something."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = E3VAConfig(r=4, init_weights=init_weights, **options)
            return get_peft_model(copy.deepcopy(self.model), config).eval()

    def outputs(self, model: nn.Module, grad: bool = False) -> dict[str, Tensor]:
        with torch.set_grad_enabled(grad), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # losses that draw samples draw the same
            return dict(_tensors(model(**self.batch)))

    def differ(self, left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
        """Return the names of outputs that are apart, or only in one of the two."""
        apart = set(left) ^ set(right)
        for name in left.keys() & right.keys():
            a, b = left[name].detach().double(), right[name].detach().double()
            if a.shape != b.shape or (a - b).abs().max() > self.rtol * b.abs().max().clamp_min(1e-6):
                apart.add(name)
        return sorted(apart)

    @cached_property
    def observed(self) -> dict[str, _Block]:
        """Run the base, and record the input, output and taps of each adapted block."""
        base = copy.deepcopy(self.base)
        blocks: dict[str, tuple[int, int]] = {}
        seen: dict[Any, Tensor] = {}
        for found in find_exits(base):
            for name, stage in _blocks(found).items():
                block, points = found.module.get_submodule(name), found.family.tap_points(found.module, name)
                watched = [(block, "input"), (block, "output"), *((p.module, p.read) for p in points.values())]
                for i, (module, side) in enumerate(watched):
                    note = partial(_note, seen, (name, i), found.family.channels)
                    if side == "input":
                        module.register_forward_pre_hook(note)
                    else:
                        module.register_forward_hook(lambda module, args, output, note=note: note(module, (output,)))
                blocks[name] = stage, len(watched)
        self.outputs(base)
        return {
            name: _Block(stage, seen[name, 0], seen[name, 1], [seen[name, i] for i in range(2, count)])
            for name, (stage, count) in blocks.items()
        }

    def spoken(self, model: PeftModel) -> dict[str, Tensor]:
        """Run the base with the highway of an adapted model written into its blocks, which is what the method says.

        The branches stay what they are without the highway, `x_l = x_{l-1} + branches_l + A(branches_l)`.
        """
        base, observed = copy.deepcopy(self.base), self.observed
        wrapped = cast(nn.Module, model.base_model.model)
        for found, adapted in zip(find_exits(base), find_exits(wrapped), strict=True):
            highway: Any = cast(E3VALayer, wrapped.get_submodule(adapted.place)).e3va_highway["default"]
            first: dict[int, int] = {}  # stage -> index of the next block's first adapter
            for name, stage in _blocks(found).items():
                seen, start = observed[name], first.get(stage, 0)
                first[stage] = start + len(seen.taps)
                own = highway.stages[stage]
                factors = [factor[start : first[stage]] for factor in own.factors]
                with torch.no_grad():
                    added = (
                        seen.behind - seen.before + sum_of_adapters(factors, [(tap,) for tap in seen.taps], own.norm)
                    )
                hook = partial(_say, added, found.family.channels)
                found.module.get_submodule(name).register_forward_hook(
                    hook, prepend=True
                )  # before who records outputs
        return self.outputs(base)

    def disturbed(self, adapted: bool) -> dict[str, Tensor]:
        """Run the base with noise behind its first adapted block, or behind its first that is not, if there is one."""
        base = copy.deepcopy(self.base)
        for found in find_exits(base):
            inside = _blocks(found)
            every = [name for stage in found.family.stages(found.module) for name in stage.blocks]
            if names := [name for name in every if (name in inside) == adapted]:
                found.module.get_submodule(names[0]).register_forward_hook(_add_noise, prepend=True)
        return self.outputs(base)

    def loss(self, model: nn.Module) -> Tensor:
        outputs = dict(_tensors(model(**self.batch)))
        if "loss" in outputs:
            return outputs["loss"]
        return torch.stack([v.float().square().mean() for v in outputs.values() if v.is_floating_point()]).sum()


def _is_found(trial: _Trial) -> str:
    """The backbone is found, and is laid out as its family declares."""
    found = find_exits(trial.model)
    if not found:
        raise _Broken(
            f"{type(trial.model).__name__} holds no exit of a registered family: compare Backbone.exits with the "
            "qualified name of its class, and Backbone.blocks with the names of its blocks"
        )
    trial.adapted()
    return "; ".join(f"{exit.target} ({exit.family.name}), {sum(exit.site.depth)} blocks" for exit in found)


def _starts_at_the_base(trial: _Trial) -> None:
    """The adapted model equals the base at the start, in every output."""
    if apart := trial.differ(trial.outputs(trial.adapted()), trial.outputs(trial.base)):
        raise _Broken(f"{apart} differ: the splice loses or changes them, or patch merging depends on more than x")


def _branches_add_up(trial: _Trial) -> None:
    """The branches of a block add up to what the block adds to the stream."""
    for block, seen in trial.observed.items():
        got, expected = sum(seen.taps[1:], start=seen.taps[0]), seen.behind - seen.before
        if (got - expected).abs().max() > trial.rtol * expected.abs().max().clamp_min(1e-6):
            raise _Broken(f"{block}: compare Backbone.branches with the residual adds in its forward")


def _every_output_moves(trial: _Trial) -> str:
    """The highway moves every output that is behind an adapted block."""
    base = trial.outputs(trial.base)
    highway = trial.outputs(trial.adapted(init_weights=False, modules_to_save=[]))
    moved = {name for name in base if not torch.equal(highway[name], base[name])}
    behind, beyond = (set(trial.differ(trial.disturbed(adapted), base)) for adapted in (True, False))
    behind = {name for name in behind if base[name].is_floating_point()}  # a class may well stay the same
    if still := sorted(behind - beyond - moved):
        raise _Broken(f"{still} stay as they are: the splice leaves them out")
    return f"behind the last adapted block: {sorted(beyond - moved)}" if beyond - moved else ""


def _says_what_the_method_says(trial: _Trial) -> None:
    """Every output is that of the base whose blocks add the highway to the stream."""
    model = trial.adapted(init_weights=False, modules_to_save=[])
    base = trial.outputs(trial.base)
    beyond = set(trial.differ(trial.disturbed(adapted=False), base))
    if apart := sorted(set(trial.differ(trial.outputs(model), trial.spoken(model))) - beyond):
        raise _Broken(f"{apart} differ: the splice adds the lane in another place, or Merging.run does something else")


def _trains_what_it_says(trial: _Trial) -> None:
    """Everything that is trained gets a gradient, and nothing else."""
    model = trial.adapted().train()
    trial.loss(model).backward()
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    got = {name for name, p in model.named_parameters() if p.grad is not None}
    if wanted != got:
        raise _Broken(f"without: {sorted(wanted - got)[:3]}; besides: {sorted(got - wanted)[:3]}")


def _no_graph_in_blocks(trial: _Trial) -> None:
    """No block has a graph, and nothing inside of one is kept for backward."""
    model = trial.adapted().train()
    watch = _Watch()
    for found in find_exits(model):
        for name in _blocks(found):
            block = found.module.get_submodule(name)
            block.register_forward_pre_hook(watch.enter)
            block.register_forward_hook(watch.leave)
    with saved_tensors_hooks(watch.pack, lambda tensor: tensor):
        trial.loss(model).backward()
    if watch.graphs or watch.kept:
        raise _Broken(f"{watch.graphs} tensors with a graph leave blocks, {watch.kept} are kept inside of them")


def _inference_agrees(trial: _Trial) -> None:
    """With gradients and without, the outputs are the same."""
    model = trial.adapted(init_weights=False)
    if apart := trial.differ(trial.outputs(model, grad=True), trial.outputs(model)):
        raise _Broken(f"{apart} differ")


def _grid_is_known(trial: _Trial) -> str:
    """The grid of every stage is known: prefix + height * width is its number of tokens."""
    model = trial.adapted()
    grids: dict[int, Grid] = {}
    for layer in layers_of(model):
        layer.family = replace(layer.family, splice=partial(_noting_grids, grids, layer.family.splice))
    trial.outputs(model)
    for block, seen in trial.observed.items():
        grid = grids.get(seen.stage)
        if grid is None or grid.prefix + grid.height * grid.width != seen.before.shape[1]:
            raise _Broken(f"{block}: has {seen.before.shape[1]} tokens, and its grid is {grid}")
    return ", ".join(f"{grid.height} x {grid.width}" for grid in grids.values())


def _comes_back(trial: _Trial) -> None:
    """Saved and loaded it is the same model."""
    model = trial.adapted(init_weights=False)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(copy.deepcopy(trial.model), folder).eval()
        if apart := trial.differ(trial.outputs(again), trial.outputs(model)):
            raise _Broken(f"{apart} differ")


def _leaves_the_base(trial: _Trial) -> None:
    """Disabled it is the base, and unloaded it leaves nothing behind."""
    model = trial.adapted(init_weights=False)
    with model.disable_adapter():
        if apart := trial.differ(trial.outputs(model), trial.outputs(trial.base)):
            raise _Broken(f"disabled: {apart} differ")
    bare = model.unload()
    hooks = (hook for m in bare.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    if any(isinstance(hook, Hook) for hook in hooks) or layers_of(bare):
        raise _Broken("unloaded: hooks or layers stay")
    if bare.state_dict().keys() != trial.base.state_dict().keys():
        raise _Broken("unloaded: the names of its weights are not those of the base")


_LAWS: tuple[Callable[[_Trial], str | None], ...] = (
    _is_found,
    _branches_add_up,
    _starts_at_the_base,
    _every_output_moves,
    _says_what_the_method_says,
    _trains_what_it_says,
    _no_graph_in_blocks,
    _inference_agrees,
    _grid_is_known,
    _comes_back,
    _leaves_the_base,
)


class _Block(NamedTuple):
    """Record of an adapted block: its stage, the stream before and behind it, and its taps, all (B, N, C)."""

    stage: int
    before: Tensor
    behind: Tensor
    taps: list[Tensor]


class _Watch:
    """Hooks that count what leaves blocks with a graph, and what is kept inside of them."""

    def __init__(self) -> None:
        self.inside = self.graphs = self.kept = 0

    def enter(self, *args: Any) -> None:
        self.inside += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.inside -= 1
        self.graphs += sum(tensor.requires_grad for _, tensor in _tensors(output))

    def pack(self, tensor: Tensor) -> Tensor:
        self.kept += self.inside > 0
        return tensor


def _blocks(found: Exit) -> dict[str, int]:
    """Return the adapted blocks of an exit: name -> stage."""
    return adapted_blocks(found.family.stages(found.module), found.site.depth)


def _note(seen: dict[Any, Tensor], key: Any, channels: str, module: nn.Module, args: Any) -> None:
    value = args[0][0] if isinstance(args[0], tuple) else args[0]
    value = (value.movedim(1, -1) if channels == "first" else value).detach().clone()
    seen[key] = value.flatten(1, -2) if value.dim() > 3 else value


def _say(added: Tensor, channels: str, module: nn.Module, args: Any, output: Any) -> Any:
    x = args[0].movedim(1, -1) if channels == "first" else args[0]
    x = x + added.view(x.shape)
    x = x.movedim(-1, 1) if channels == "first" else x
    return (x, *output[1:]) if isinstance(output, tuple) else x


def _add_noise(module: nn.Module, args: Any, output: Any) -> Any:
    first = output[0] if isinstance(output, tuple) else output
    first = first + torch.randn(first.shape, generator=torch.Generator().manual_seed(0)).to(first) * first.std()
    return (first, *output[1:]) if isinstance(output, tuple) else first


def _noting_grids(grids: dict[int, Any], splice: Callable[..., Any], outputs: Any, lane: Any, call: Any) -> Any:
    grids |= lane.frozen.grids
    return splice(outputs, lane, call)


def _tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Iterate over every tensor of an output, with its path."""
    if isinstance(value, Tensor):
        yield prefix or "output", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{prefix}[{index}]")
