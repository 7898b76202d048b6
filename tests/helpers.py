"""Helpers for tests of tiny models and runs: adapt one, run it, compare outputs and gradients, stop a run."""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.multiprocessing import ProcessContext, start_processes
from torch.nn import functional as F

from e3va_peft import E3VAConfig, E3VALayer, fused
from e3va_peft.backbones.base import in_turn
from e3va_peft.config import PLUS
from e3va_peft.frozen_pass import FrozenPass
from e3va_peft.highway import Highway, Stage
from e3va_peft.lane import Lane
from e3va_peft.meter.step import count_saved
from e3va_peft.training import MetricsToCard
from e3va_peft.training.trainer import VisionTrainer
from tests.models import CASES, Case, loss_of, tensors

WAYS = {"": {}, "live": {"live_blocks": 2}, "recompute": {"tap_storage": "recompute", "taps": ("stream",)}}

KEPT = {"live_blocks": 2, "checkpoint_live_blocks": False}

SLIM_PLUS = {name: value for name, value in PLUS.items() if name != "r"}  # E3VA+, of a rank that a test chooses


def ways(*names: str) -> pytest.MarkDecorator:
    """Parametrise over some of the ways to configure an adapter."""
    return pytest.mark.parametrize("way", [WAYS[name] for name in names], ids=names)


every_way = ways(*WAYS)
# Slow heads over a backbone that another model has too, read in the same way: of these the plain way is tried.
SAME_BACKBONE = {"swin-cascade", "swin-mask2former", "dinov2-cascade", "vit-retinanet", "convnext-retinanet"}


def every_model_in(*names: str, options: Mapping[str, dict[str, Any]] = WAYS) -> pytest.MarkDecorator:
    """Parametrise over every model in some of the ways to configure an adapter."""
    pairs = [
        pytest.param(case, options[name], id=f"{case.name}-{name}")
        for case in CASES
        for name in names
        if not options[name] or case.name not in SAME_BACKBONE
    ]
    return pytest.mark.parametrize(("case", "way"), pairs)


def start(function: Callable[..., None], processes: int, *args: Any) -> ProcessContext:
    """Call function(rank, *args) in processes, forked from one that has imported what takes long."""
    multiprocessing.set_forkserver_preload(["tests.models", "e3va_peft.training.run", "e3va_peft.training.predict"])
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    at = dict(os.environ), function, args
    return start_processes(_with_environment, at, processes, join=False, start_method=method)


def by_two(function: Callable[..., None], *args: Any) -> None:
    """Call function(rank, *args) in two processes, and wait for them."""
    wait_for(start(function, 2, *args))


def wait_for(running: ProcessContext) -> None:
    while not running.join():
        pass


def _with_environment(rank: int, environment: dict[str, str], function: Callable[..., None], args: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # else it would start its own as it was started itself
    gc.freeze()  # as in conftest
    function(rank, *args)


def let_shard(accelerator: Accelerator, **options: Any) -> Accelerator:
    """Let an accelerator use FSDP 2 on the CPU, where it falls back to DDP although PyTorch can shard there.

    With ACCELERATE_USE_FSDP, which this sets, the next one is built on a GPU only: take it away before.
    """
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    options = {"auto_wrap_policy": "transformer_based_wrap", "state_dict_type": "FULL_STATE_DICT"} | options
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **options)
    return accelerator


def run_python(arguments: list[str], said: Path) -> None:
    """Run a script, or a module after `-m`, in a process as `python` would, and write to a file what it says."""
    wait_for(start(_be_python, 1, [str(argument) for argument in arguments], said))


def _be_python(rank: int, arguments: list[str], said: Path) -> None:
    run = runpy.run_path if arguments[0] != "-m" else partial(runpy.run_module, alter_sys=True)
    sys.argv = arguments[arguments[0] == "-m" :]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    with said.open("w") as sys.stdout:
        run(sys.argv[0], run_name="__main__")


def adapted(case: Case, **config) -> nn.Module:
    return get_peft_model(case.base(), E3VAConfig(r=4, **config)).eval()


def outputs(model: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return dict(tensors(model(**batch, output_hidden_states=True)))


@cache
def base_outputs(case: Case, size: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
    """Outputs of the base for a case's batch, computed once: compare with them, change nothing of them."""
    return outputs(case.base(), case.batch(size=size))


def saved_bytes(model: nn.Module, case: Case) -> int:
    """Bytes that autograd keeps of a forward in training, besides the model's own."""
    model.train()
    fixed = [*model.parameters(), *model.buffers()]
    return count_saved(lambda: loss_of(model(**case.training_batch())), fixed)


def assert_same(left: dict, right: dict, **tolerance) -> None:
    assert left.keys() == right.keys()
    for key in left:
        torch.testing.assert_close(left[key], right[key], msg=lambda text, key=key: f"{key}: {text}", **tolerance)


def layers(model: nn.Module) -> list[E3VALayer]:
    return [module for module in model.modules() if isinstance(module, E3VALayer)]


def blocks(model: nn.Module, case: Case) -> list[nn.Module]:
    found = [module for module in model.modules() if type(module).__name__ in case.blocks]
    assert found
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def double(value: Any) -> Any:
    """A batch in fp64."""
    if isinstance(value, dict):
        return {key: double(item) for key, item in value.items()}
    if isinstance(value, list):
        return [double(item) for item in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def step(model: nn.Module, case: Case) -> dict[str, Tensor]:
    """The gradients of one step in fp64."""
    model.zero_grad()
    torch.manual_seed(0)  # Mask2Former and the detectors sample
    loss_of(model(**double(case.training_batch()))).backward()
    return gradients(model)


def written_out(t: Tensor, stage: Stage, i: int) -> Tensor:
    """The formula for adapter i, written out."""
    scale = (t.var(-1, correction=0, keepdim=True) + 1e-8).sqrt() if stage.norm == "relative" else 1
    if stage.norm != "none":
        t = F.layer_norm(t, t.shape[-1:], eps=1e-8)
    hidden = F.gelu(t @ stage.u1[i] @ stage.v1[i] + stage.bias1[i])
    return scale * (hidden @ stage.u2[i] @ stage.v2[i] + stage.bias2[i])


def lane_of(z: Tensor, module: nn.Module, tap_storage: str = "exact") -> Lane:
    """A lane that stands behind the one block of the first of two stages."""
    lane = Lane(
        [Highway([8], [1], tap_storage=tap_storage)], FrozenPass(), [1, 1], mergings=[fused.Merging([module], in_turn)]
    )
    lane.z, lane.block = z, 1
    return lane


def pickle_weights(folder: Path) -> Path:
    """Write a model's weights as transformers wrote them before there was safetensors."""
    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    return folder


class Stop(Exception):
    pass


def stop_after(step: int, monkeypatch, error: Exception | None = None) -> None:
    """Let training die in the step after `step`, as a power cut would."""
    original = VisionTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise error or Stop
        return original(self, *args, **kwargs)

    monkeypatch.setattr(VisionTrainer, "training_step", training_step)


class StopAt(MetricsToCard):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
    return load_file(file)


def replica_of(model: nn.Module, shift: float) -> nn.Module:
    """What `nn.DataParallel` makes of a model for another device, with other weights so that one can tell.

    PyTorch's own `replicate` does the same, but only to GPUs.
    """
    twins = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in twins.items():
        for name, item in module._modules.items():
            setattr(twin, name, None if item is None else twins[item])
        twin._former_parameters = {
            name: parameter.detach() * (1 + shift)
            for name, parameter in module._parameters.items()
            if parameter is not None
        }
        for name in module._parameters:
            setattr(twin, name, twin._former_parameters.get(name))
    return twins[model]
