"""Rebuild a model from an adapter alone: base, head, image processor, highway."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, cast

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's, or httpx2's
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel
from transformers.utils import cached_file

from e3va_peft.card import BASE_CONFIG, PROCESSOR
from e3va_peft.config import E3VAConfig
from e3va_peft.exits import everything_outside, find_exits

_ALLOWED = ("transformers", "e3va_peft")
_FILES = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, BASE_CONFIG, PROCESSOR]


def load_adapter(
    adapter: str | os.PathLike[str],
    *,
    is_trainable: bool = False,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    **kwargs: Any,
) -> tuple[PeftModel, Any]:
    """Rebuild base model, head and image processor from an adapter's folder or Hub repository alone.

    Args:
        adapter: Folder or Hub id of an adapter that `save_pretrained` or `push_to_hub` wrote.
        is_trainable: Load it to train on, not only to predict.
        revision: Revision of the adapter's repository.
        subfolder: Folder within; an adapter that is not named "default" is saved in one of its name.
        token: Hub token, for the adapter and its base model.
        kwargs: For the base model's `from_pretrained`, e.g. `dtype`, `device_map`, `quantization_config`. A base that
            was quantised while loading is not quantised again unless asked to.

    Returns:
        The model in eval mode (training mode with `is_trainable`), and its image processor, None where neither the
        adapter nor its base model has one.

    Raises:
        FileNotFoundError: The adapter, its revision, or a file it needs is not there, or not for this token.
        PermissionError: The Hub refuses the token.
        ConnectionError: The Hub cannot be reached, or the connection broke.
        OSError: The base model cannot be loaded.
        ValueError: The adapter is of another method, does not say what its base model is, or has weights that are not
            all of its own; or neither it nor the base model has the weights of some module, or has them in its sizes.
    """
    source = os.fspath(adapter)
    folder = Path(source) if os.path.isdir(source) else _download(source, revision, subfolder, token)
    folder = folder / subfolder
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"adapter={source!r}, subfolder={subfolder!r}: has no {CONFIG_NAME}. Name the folder or repository that "
            'save_pretrained or push_to_hub wrote; adapters not named "default" are in a subfolder of their name.'
        )
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, E3VAConfig):
        raise ValueError(f"adapter={source!r}: holds {config.peft_type}, not E3VA. Load it with peft.AutoPeftModel.")
    base = _build_base(source, folder, config, {"token": token} | kwargs)
    try:
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable)
    except KeyError as error:  # PEFT's way to say that a module's weights are not in the file
        raise ValueError(
            f"adapter={source!r}: lacks the weights {error}, which its adapter_config.json names in modules_to_save. "
            "Restore the file that was saved, or download it again."
        ) from error
    model.train(is_trainable)
    return model, _load_processor(folder, config, token)


def _download(source: str, revision: str | None, subfolder: str, token: str | bool | None) -> Path:
    """Download an adapter's files, all of one commit, and return their folder in the cache."""
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"adapter={source!r}: no such folder.")
    files = [str(PurePosixPath(subfolder) / name) for name in _FILES]
    try:
        return Path(snapshot_download(source, revision=revision, token=token, allow_patterns=files))
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"revision={revision!r}: {source!r} has no such branch, tag or commit on the Hub. Leave it out for the "
            "newest."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"adapter={source!r}: no such folder, and no such repository on the Hub, or a private or gated one. Check "
            "the id; for a private one log in with `hf auth login`, or pass token=..."
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        given = "the token you are logged in with" if token in (None, True) else "token=..."
        raise PermissionError(
            f"adapter={source!r}: the Hub refuses {given}; it is mistyped, expired or revoked. Pass another as "
            "token=..., log in again with `hf auth login`, or pass token=False if the adapter is public."
        ) from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise ConnectionError(
            f"adapter={source!r}: the Hub cannot be reached, or the connection broke, and the adapter is not whole in "
            f"the local cache. Nothing half-loaded is kept: call again once there is a connection. {error}"
        ) from error


def _build_base(source: str, folder: Path, config: E3VAConfig, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Build the base model with the adapter's label map."""
    model_class = _base_class(source, config.auto_mapping or {})
    if not (folder / BASE_CONFIG).is_file():
        raise FileNotFoundError(
            f"adapter={source!r}: has no {BASE_CONFIG}. It is written by save_pretrained of e3va_peft >= 0.1."
        )
    base_config = AutoConfig.for_model(**json.loads((folder / BASE_CONFIG).read_text()))
    saved, name = config.modules_to_save or (), config.base_model_name_or_path
    if name:
        options = {"config": base_config, "revision": config.revision, "trust_remote_code": False} | kwargs
        return _from_pretrained(source, model_class, name, options, saved)
    backbones = (config.auto_mapping or {}).get("backbones") or {}
    model = model_class(base_config)
    _refuse_lost(source, model, backbones, saved)
    for path, weights in backbones.items():
        parent, _, attribute = path.rpartition(".")
        part = model.get_submodule(path)
        bare = {"add_pooling_layer": False} if getattr(part, "pooler", part) is None else {}
        own = [name.removeprefix(f"{path}.") for name in saved if name.startswith(f"{path}.")]
        options = {"config": part.config, "trust_remote_code": False} | bare | kwargs
        loaded = _from_pretrained(source, type(part), weights, options, own)
        setattr(model.get_submodule(parent), attribute, loaded)
    return model.eval()


def _base_class(source: str, mapping: Mapping[str, Any]) -> Any:
    """Find the class of the base model, which is one of transformers or of this package."""
    library, class_name = str(mapping.get("parent_library")), str(mapping.get("base_model_class"))
    if library.split(".")[0] not in _ALLOWED:
        raise ValueError(
            f"adapter={source!r}: its base model is {library}.{class_name}, code of its author's that is not run "
            "unasked. Build the base yourself, then peft.PeftModel.from_pretrained(base, adapter)."
        )
    found: Any = getattr(importlib.import_module(library), class_name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(f"adapter={source!r}: its base model {library}.{class_name} is not a transformers model.")
    return found


def _refuse_lost(source: str, model: nn.Module, backbones: Mapping[str, str], saved: Collection[str]) -> None:
    """Refuse a base model of which neither the adapter nor the checkpoints of its backbones have all weights."""
    exits = find_exits(model)
    if not all(any(found.is_within(path) for path in backbones) for found in exits):
        raise ValueError(
            f"adapter={source!r}: does not know where the weights of its base model are, because "
            f"{type(model).__name__} was not made by from_pretrained. Save the base with save_pretrained(folder), set "
            "base_model_name_or_path in adapter_config.json to that folder or a Hub id, and load again."
        )
    outside = everything_outside(model, exits)
    lost = sorted(
        name for name in outside if name not in saved and not name.startswith(tuple(f"{p}." for p in backbones))
    )
    if lost:
        raise ValueError(
            f"adapter={source!r}: has no weights for {lost} of its base model, which was not made by "
            "from_pretrained and whose adapter was trained with modules_to_save that leave them out. Build the base "
            "yourself, then peft.PeftModel.from_pretrained(base, adapter)."
        )


def _from_pretrained(
    source: str, model_class: Any, name: str, options: dict[str, Any], saved: Sequence[str]
) -> PreTrainedModel:
    """Load a base model, or its backbone, of which the adapter brings the modules `saved`; all else must be there."""
    options = {"ignore_mismatched_sizes": True} | options | {"output_loading_info": True}
    try:
        model, report = model_class.from_pretrained(name, **options)
    except (OSError, HTTPError) as error:
        raise OSError(
            f"adapter={source!r}: its base model {name!r} cannot be loaded. If it is elsewhere now, set "
            f"base_model_name_or_path in adapter_config.json. {error.__cause__ or error}"
        ) from error
    weightless = [name for name, module in model.named_modules() if next(module.parameters(), None) is None]  # a loss
    elsewhere = (*saved, *weightless, *(part for found in find_exits(model) for part in found.site.unused))
    absent = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    random = sorted(key for key in absent if not any(key.startswith(f"{part}.") for part in elsewhere))
    if random:
        raise ValueError(
            f"adapter={source!r}: its base model {name!r} has no weights for {len(random)} parameters, {random[:3]} "
            "among them, or has them in other sizes, and the adapter brings none: they would be random. Restore the "
            "base model that it was trained on, or set base_model_name_or_path in adapter_config.json to it."
        )
    return cast(PreTrainedModel, model)


def _image_processor(place: Any, options: dict[str, Any]) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(place, trust_remote_code=False, **options)
    except ValueError as error:
        raise ValueError(
            f"{str(place)!r}: its {PROCESSOR} names no image processor of transformers, and code of its author's is "
            "not run unasked. Put the file of one that is into the adapter's folder."
        ) from error


def _load_processor(folder: Path, config: E3VAConfig, token: str | bool | None) -> Any:
    backbones = (config.auto_mapping or {}).get("backbones") or {}
    base = {"revision": config.revision, "token": token}
    places: list[tuple[Any, dict[str, Any]]] = [(folder, {}), (config.base_model_name_or_path, base)]
    for place, options in places + [(backbone, {"token": token}) for backbone in backbones.values()]:
        if place and cached_file(place, PROCESSOR, _raise_exceptions_for_missing_entries=False, **options):
            return _image_processor(place, options)
    return None
