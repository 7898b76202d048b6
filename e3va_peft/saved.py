"""Modules that an adapter trains whole, such as heads: where the base's own is while a copy stands in for it."""

from __future__ import annotations

import mmap
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

FILE_FROM = 2**16  # bytes of a module from which a file is worth its handle
ALIGNMENT = 64  # bytes, a cache line: kernels read aligned tensors faster


class SavedModule(ModulesToSaveWrapper):
    """A module of the base with a trained copy for each adapter, as PEFT's wrapper, at the price of the copy alone.

    `disable_adapter()` has to give the base, so PEFT keeps the base's module beside its copies, on the same device.
    For a new head that is a second head which nobody uses. Here it is part of the model only while it computes, that
    is while adapters are disabled or the active one has no copy. Otherwise it *waits*: it is not a child of the
    wrapper, so that `parameters()`, `.to(device)`, DDP and FSDP do not see it, and its numbers are in a temporary file
    which is mapped into memory. They can be read like any tensor on the CPU (`original_module`, `state_dict()`,
    copies, pickles), but the operating system reads a page of them when it is touched and drops it when it needs the
    room. When it is asked for, it comes back: on the CPU without a copy, elsewhere to the device of its trained copy,
    and it is written to a new file when it leaves.

    The storage of the copy cannot be shared instead: the first step of an optimizer writes it in place.

    Under FSDP it is sharded like the rest and does not wait. A module of less than `FILE_FROM` bytes waits in host
    memory; one on meta, which has no numbers yet, where it is; and one that holds anything but plain tensors
    (quantised or distributed ones) is kept as PEFT keeps it. A temporary folder in memory (tmpfs) costs that memory;
    the environment variable TMPDIR names another.

    Args:
        module: The base's module.
        adapter_name: First adapter that has a copy.
        shared: Names of its tensors that the rest of the model uses too: they take no memory of their own and stay.
    """

    _waiting: tuple[nn.Module, ...] = ()  # the base's module, or nothing; nn.Module does not look into tuples
    _on_host: frozenset[int] = frozenset()  # addresses of the tensors that were put there: a hint, to do it once

    def __init__(self, module: nn.Module, adapter_name: str, shared: Iterable[str] = ()) -> None:
        self._shared = frozenset(shared)  # before PEFT's, which calls update()
        super().__init__(module, adapter_name)
        self.register_load_state_dict_post_hook(_settle_after_loading)
        self.register_state_dict_pre_hook(_settle_before_sharding)

    @property
    def original_module(self) -> nn.Module:
        """The base's module, whether it is a child or waits."""
        child = self._modules.get("original_module")
        return self._waiting[0] if child is None else child

    def update(self, adapter_name: str, tied_module: nn.Module | None = None, **kwargs: Any) -> None:
        """Give an adapter a copy, made where the base's module comes back to."""
        self._bring_back()
        super().update(adapter_name, tied_module=tied_module, **kwargs)
        self._settle()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch between the copy and the base's module."""
        super().enable_adapters(enabled)
        self._settle()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose whose copy is used; with none it is the base's module."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._settle()

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Delete a copy, but not before the base's module is back where it was."""
        self._bring_back()
        super().delete_adapter(adapter_name, new_active_adapters)
        self._settle()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the active copy, or else the base's module in memory of its own."""
        module: nn.Module = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        if module is self._modules.get("original_module"):
            with torch.inference_mode(False):
                for tensor in self._own_tensors():
                    if tensor.data_ptr() in self._on_host:
                        tensor.data = tensor.detach().clone()
        return module

    def train(self, mode: bool = True) -> SavedModule:
        """Set the training mode of the copies, and put back into a file what a deep copy or a pickle holds in memory.

        Not done where those are made: the old format of `torch.save` fills tensors in later.
        """
        super().train(mode)
        self._settle()
        return self

    def _settle(self) -> None:
        """Let the base's module wait if a copy is used, and else bring it back."""
        active = self.active_adapters
        used = active and not self.disable_adapters and set(active) <= self.modules_to_save.keys()
        if used and not will_be_sharded():
            self._let_wait()
        else:
            self._bring_back()

    def _let_wait(self) -> None:
        module = self.original_module
        if not all(map(_may_wait, _tensors(module).values())):
            return
        with torch.inference_mode(False):
            self._put_on_host([tensor for tensor in self._own_tensors() if not tensor.is_meta])
        self._waiting = (module,)
        self._modules["original_module"] = None  # keeps its place among the keys

    def _bring_back(self) -> None:
        if not self._waiting:
            return
        (module,) = self._waiting
        copy = next(iter(self.modules_to_save.values()), None)
        placed = {} if copy is None else _tensors(copy)
        modes = {} if copy is None else {name: part.training for name, part in copy.named_modules()}
        with torch.inference_mode(False):
            for name, tensor in _tensors(module).items():
                if name in placed:
                    tensor.data = _beside(tensor.detach(), placed[name])
        for name, part in module.named_modules():
            part.training = modes.get(name, part.training)
        self._modules["original_module"] = module
        self._waiting = ()

    def _own_tensors(self) -> list[Tensor]:
        """Return the parameters and buffers of the base's module that nothing else uses, each once."""
        own = {id(t): t for name, t in _tensors(self.original_module).items() if name not in self._shared}
        return list(own.values())

    def _put_on_host(self, tensors: list[Tensor]) -> None:
        tensors = [tensor for tensor in tensors if tensor.numel()]
        if all(tensor.is_cpu and tensor.data_ptr() in self._on_host for tensor in tensors):
            return
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        on_host = _in_a_file(tensors, size) if size >= FILE_FROM else [tensor.detach().cpu() for tensor in tensors]
        for tensor, data in zip(tensors, on_host, strict=True):
            tensor.data = data
        self._on_host = frozenset(tensor.data_ptr() for tensor in tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SavedModule:
        """Take part in `.to()`, `.half()` and their like: what waits changes its dtype, and not its place."""
        super()._apply(fn, recurse)
        for module in self._waiting:
            tensors = _tensors(module).values()
            if any(tensor.is_meta for tensor in tensors):
                module._apply(fn)
            else:
                for tensor in tensors:
                    dtype = fn(torch.empty(0, dtype=tensor.dtype, device="cpu")).dtype
                    if dtype != tensor.dtype:
                        tensor.data = tensor.detach().to(dtype)
        self._settle()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for module in self._waiting:
            module.state_dict(destination=destination, prefix=f"{prefix}original_module.", keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Make what waits a child for as long as numbers are loaded: torch hands them to the children."""
        for module in self._waiting:
            self._modules["original_module"] = module
            self._waiting = ()
        if any(key.startswith(f"{prefix}original_module.") for key in state_dict):
            self._on_host = frozenset()  # pages that are written are in memory: they go to a new file
        super()._load_from_state_dict(state_dict, prefix, *args)


def shared_tensors(model: nn.Module, module: nn.Module) -> list[str]:
    """Return the names of those parameters and buffers of a module that modules outside of it hold as well."""
    inside = set(module.modules())
    waiting = [part for other in model.modules() if isinstance(other, SavedModule) for part in other._waiting]
    others = [*model.modules(), *(part for root in waiting for part in root.modules())]
    outside = {
        id(tensor)
        for other in others
        if other not in inside
        for tensor in (*other._parameters.values(), *other._buffers.values())
    }
    return [name for name, tensor in _tensors(module).items() if id(tensor) in outside]


def _settle_after_loading(module: SavedModule, _incompatible_keys: Any) -> None:
    module._settle()


def _settle_before_sharding(module: SavedModule, *args: Any) -> None:
    if will_be_sharded():
        module._settle()


def will_be_sharded() -> bool:
    """Whether Accelerate uses FSDP, which pairs a model's weights with their shards one by one: then none waits."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers under each of their names."""
    parameters: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return parameters | dict(module.named_buffers(remove_duplicate=False))


def _may_wait(tensor: Tensor) -> bool:
    """Whether a tensor has no numbers, or plain ones, which can be swapped; DeepSpeed moves its own by itself."""
    if tensor.is_meta:
        return True
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or hasattr(tensor, "ds_numel"):
        return False
    return torch._has_compatible_shallow_copy_type(tensor, torch.empty(0, device="cpu"))


def _beside(tensor: Tensor, copy: Tensor) -> Tensor:
    """Return a tensor on the device of its trained copy and in its memory format, in its own dtype."""
    if tensor.is_meta or copy.is_meta:
        return tensor
    if type(copy) not in (Tensor, nn.Parameter) or copy.shape != tensor.shape:
        return tensor.to(copy.device)
    if (copy.device, copy.stride()) == (tensor.device, tensor.stride()):
        return tensor
    return torch.empty_like(copy, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def _in_a_file(tensors: list[Tensor], size: int) -> list[Tensor]:
    """Return tensors that read what these hold from a temporary file, or from memory where no file can be written.

    Nobody has to delete the file: it has no name, or under Windows is deleted with its last handle, which is the
    mapping's. So it goes with the tensors or with the process, however that ends. The mapping is private: what is
    written to it later is in memory and not in the file, so it cannot fail for want of room on the disk.

    Args:
        tensors: Plain tensors, none of them empty.
        size: Their bytes.
    """
    places = []
    try:
        with tempfile.TemporaryFile() as file:
            for tensor in tensors:
                offset = file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR)
                dense = tensor.detach().to("cpu", copy=True)  # in its own memory format, but without gaps
                file.write(dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data)
                places.append((offset, dense.stride()))
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        warnings.warn(
            f"{size / 2**20:.1f} MiB of the base's saved module stay in host memory: the temporary folder cannot take "
            f"them ({error}). Set the environment variable TMPDIR to a folder that can.",
            stacklevel=2,
        )
        return [tensor.detach().cpu() for tensor in tensors]
    flat = [
        torch.frombuffer(mapped, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        for tensor, (offset, _) in zip(tensors, places, strict=True)
    ]
    return [
        data.as_strided(tensor.shape, stride) for data, tensor, (_, stride) in zip(flat, tensors, places, strict=True)
    ]
