"""Rebuild a model from an adapter alone: base, head, image processor, highway."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel

from e3va_peft.card import BASE_CONFIG, PROCESSOR
from e3va_peft.config import E3VAConfig
from e3va_peft.resolve import everything_outside, find_exits

_ALLOWED = ("transformers", "e3va_peft")


def load_adapter(
    adapter: str | os.PathLike[str],
    *,
    is_trainable: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    **kwargs: Any,
) -> tuple[PeftModel, Any]:
    """Rebuild base model, head and image processor from an adapter's folder or Hub repository alone.

    Args:
        adapter: Folder or Hub id of an adapter that `save_pretrained` or `push_to_hub` wrote.
        is_trainable: Load it to train on, not only to predict.
        revision: Revision of the adapter's repository.
        token: Hub token.
        kwargs: For the base model's `from_pretrained`, e.g. `dtype`, `device_map`.

    Returns:
        The model in eval mode (training mode with `is_trainable`), and its image processor, None where neither the
        adapter nor its base model has one.

    Raises:
        FileNotFoundError: The adapter, or a file it needs, is not there.
        ValueError: The adapter is of another method, or its base model cannot be found.
    """
    source = os.fspath(adapter)
    hub: dict[str, Any] = {"revision": revision, "token": token}
    if not os.path.isdir(source) and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise FileNotFoundError(f"adapter={source!r}: no such folder.")
    config = PeftConfig.from_pretrained(source, **hub)
    if not isinstance(config, E3VAConfig):
        raise ValueError(f"adapter={source!r}: holds {config.peft_type}, not E3VA. Load it with peft.AutoPeftModel.")
    base = _build_base(source, config, hub, kwargs)
    model = PeftModel.from_pretrained(base, source, is_trainable=is_trainable, **hub)
    model.train(is_trainable)
    return model, _load_processor(source, config, hub)


def _build_base(source: str, config: E3VAConfig, hub: dict[str, Any], kwargs: dict[str, Any]) -> PreTrainedModel:
    """Build the base model with the adapter's label map."""
    mapping = config.auto_mapping or {}
    library, class_name = str(mapping.get("parent_library")), str(mapping.get("base_model_class"))
    if library.split(".")[0] not in _ALLOWED:
        raise ValueError(
            f"adapter={source!r}: its base model is {library}.{class_name}, code of its author's that is not run "
            "unasked. Build the base yourself, then peft.PeftModel.from_pretrained(base, adapter)."
        )
    model_class: Any = getattr(importlib.import_module(library), class_name, None)
    if not _is_transformers_model(model_class):
        raise ValueError(f"adapter={source!r}: its base model {library}.{class_name} is no transformers model.")
    values = json.loads(_file(source, BASE_CONFIG, hub).read_text())
    base_config = AutoConfig.for_model(**values)
    name = config.base_model_name_or_path
    if name:
        return model_class.from_pretrained(
            name, config=base_config, revision=config.revision, ignore_mismatched_sizes=True, **kwargs
        )
    backbones = mapping.get("backbones") or {}
    model = model_class(base_config)
    exits = find_exits(model)
    missing = [found.name for found in exits if not any(found.name.startswith(f"{b}.") for b in backbones)]
    if missing:
        raise ValueError(
            f"adapter={source!r}: does not know where the weights of its base model are, because {class_name} was "
            "not made by from_pretrained. Save the base with save_pretrained(folder), set base_model_name_or_path in "
            "adapter_config.json to that folder or a Hub id, and load again."
        )
    outside = [
        name for name in everything_outside(model, exits) if not any(name.startswith(f"{b}.") for b in backbones)
    ]
    lost = sorted(set(outside) - set(config.modules_to_save or ()))
    if lost:
        raise ValueError(
            f"adapter={source!r}: has no weights for {lost} of its base model, which was not made by "
            "from_pretrained and whose adapter was trained with modules_to_save that leave them out. Build the base "
            "yourself, then peft.PeftModel.from_pretrained(base, adapter)."
        )
    for path, weights in backbones.items():
        parent, _, attribute = path.rpartition(".")
        part = model.get_submodule(path)
        loaded = type(part).from_pretrained(weights, config=part.config, **kwargs)
        setattr(model.get_submodule(parent), attribute, loaded)
    return model.eval()


def _is_transformers_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, PreTrainedModel)


def _load_processor(source: str, config: E3VAConfig, hub: dict[str, Any]) -> Any:
    backbones = (config.auto_mapping or {}).get("backbones") or {}
    for place, options in [(source, hub)] + [
        (s, {}) for s in (config.base_model_name_or_path, *backbones.values()) if s
    ]:
        try:
            _file(place, PROCESSOR, options)
        except FileNotFoundError:
            continue
        return AutoImageProcessor.from_pretrained(place, **options)
    return None


def _file(source: str, name: str, hub: dict[str, Any]) -> Path:
    """Return the local path of a file in a folder or Hub repository."""
    if os.path.isdir(source):
        path = Path(source) / name
        if path.is_file():
            return path
        raise FileNotFoundError(f"{source!r} has no {name}. It is written by save_pretrained of e3va_peft >= 0.1.")
    try:
        return Path(hf_hub_download(source, name, **hub))
    except (EntryNotFoundError, HfHubHTTPError) as error:
        raise FileNotFoundError(f"{source!r} has no {name} on the Hub: {error}") from error
