"""Rebuild a model from an adapter alone: base, head, image processor, highway."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's, or httpx2's
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft import PeftConfig, PeftModel, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel
from transformers.utils import cached_file, logging

from e3va_peft.card import BASE_CONFIG, PROCESSOR
from e3va_peft.config import E3VAConfig
from e3va_peft.errors import UserError, causes, reason, refuse_no_path
from e3va_peft.exits import everything_outside, find_exits
from e3va_peft.files import refuse_links
from e3va_peft.fingerprint import content_checksum

_ALLOWED = ("transformers", "e3va_peft")
_MAPPING: dict[str, Any] = {
    "base_model_class": str | None,
    "parent_library": str | None,
    "num_labels": int | None,
    "backbones": dict[str, str] | None,
    "metrics": dict[str, int | float] | None,
    "folders": list[str] | None,
    "commits": dict[str, str] | None,
    "backbone": dict[str, str | dict[str, str]] | None,
    "outside": dict[str, dict[str, str]] | None,
    "base_config": str | None,
    "weights": str | None,
    "reads": dict[str, Any] | None,
}
"""Types of what `auto_mapping` may hold; see `card.BaseModel.mapping`."""

_INHERITED: dict[str, Any] = {  # which PEFT does not check
    "auto_mapping": dict | None,
    "base_model_name_or_path": str | None,
    "revision": str | None,
    "peft_version": str | None,
    "inference_mode": bool | None,
}

_MOST_BYTES = 2**24  # of a JSON file: names of 21,841 classes take 2 MB
_MOST_SIZE, _MOST_BLOCKS, _MOST_PARAMETERS = 10**6, 1000, 10**10  # of a base model's config
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

    Code beside a model is never run. A base model in a folder is found by its path, as `adapter_config.json` has it,
    from the current folder on; an adapter from the Hub may name Hub ids alone.

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
        ConnectionError: The Hub cannot be reached, refuses by another error, or the connection broke.
        OSError: The base model cannot be loaded.
        ValueError: A file of the adapter is malformed, describes what is too large to be meant, or is a link out of
            its folder; it is of another method, does not say what its base model is, was trained on another, or has
            weights that are not all of its own or not those that were saved; neither it nor the base model has the
            weights of some module in its sizes; weights are a pickle; an adapter from the Hub names a path; or
            `trust_remote_code` is asked for.
    """
    if kwargs.pop("trust_remote_code", False):
        raise ValueError(
            "trust_remote_code=True: load_adapter builds classes of transformers and e3va_peft alone, and runs no "
            "code beside a model. Build the base yourself, then peft.PeftModel.from_pretrained(base, adapter)."
        )
    source = os.fspath(adapter)
    folder = (Path(source) if os.path.isdir(source) else _download(source, revision, subfolder, token)) / subfolder
    _refuse_no_adapter(source, subfolder, folder)
    refuse_links(folder)
    config = _read_adapter_config(source, folder)
    _refuse_paths(source, config)
    _refuse_pickle(source, folder)
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


def _refuse_pickle(source: str, folder: Path) -> None:
    if (folder / WEIGHTS_NAME).is_file() and not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(
            f"adapter={source!r}: has its weights in {WEIGHTS_NAME}, a pickle, and no {SAFETENSORS_WEIGHTS_NAME}. If "
            "you trust it, load it with peft.PeftModel.from_pretrained and save it again."
        )


def _refuse_no_adapter(source: str, subfolder: str, folder: Path) -> None:
    """Refuse a folder without an adapter, and name the one inside where it is a run's.

    Raises:
        FileNotFoundError: There is no adapter's config.
    """
    if (folder / CONFIG_NAME).is_file():
        return
    if (folder / "adapter" / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"adapter={source!r}: is the folder of a run. Its adapter is {folder / 'adapter'}.")
    raise FileNotFoundError(
        f"adapter={source!r}, subfolder={subfolder!r}: has no {CONFIG_NAME}. Name the folder or repository that "
        'save_pretrained or push_to_hub wrote; adapters not named "default" are in a subfolder of their name.'
    )


def _read_adapter_config(source: str, folder: Path) -> E3VAConfig:
    """Read `adapter_config.json`, whoever may have written it, before anything is built of it."""
    file = folder / CONFIG_NAME
    content = _read_json(file)
    kind = content.get("peft_type")
    if kind != "E3VA":
        if isinstance(kind, str) and kind in PeftType.__members__:
            raise ValueError(
                f"adapter={source!r}: holds {kind}, not E3VA. Load what `e3va train` made by its run's folder, "
                "e3va_peft.training.predict.load_trained(RUN).model; any other one by PeftModel.from_pretrained, onto "
                "a base with as many classes."
            )
        raise ValueError(f"{file}: peft_type={_short(kind)}: must be E3VA. Restore the file that was saved.")
    _check_types(file, "", content, _INHERITED)
    _check_types(file, "auto_mapping.", content.get("auto_mapping") or {}, _MAPPING)
    try:
        found = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:  # check_fields names field and value
        raise ValueError(f"{file}: {error}") from None
    assert isinstance(found, E3VAConfig)
    return found


def _refuse_paths(source: str, config: E3VAConfig) -> None:
    """Refuse an adapter of the Hub that names a path: it would be whatever is there on this machine."""
    if os.path.isdir(source):  # whose files are the user's own
        return
    mapping = config.auto_mapping or {}
    for place in (config.base_model_name_or_path, *(mapping.get("backbones") or {}).values()):
        try:
            validate_repo_id(place or "none")
            is_path = place in (mapping.get("folders") or ())
        except HFValidationError:
            is_path = True
        if is_path:
            raise ValueError(
                f"adapter={source!r}: is on the Hub, and its base model {place!r} is a path, which is not followed "
                f"from there. If you have that base, download the adapter (hf download {source} --local-dir FOLDER), "
                "set base_model_name_or_path in its adapter_config.json to the base's folder or Hub id, and load that."
            )


def _check_types(file: Path, section: str, values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for name, kind in kinds.items():
        try:
            type_validator(name, values.get(name), kind)
        except TypeError:
            raise ValueError(
                f"{file}: {section}{name}={_short(values[name])}: must be {inspect.formatannotation(kind)}. Restore "
                "the file that was saved."
            ) from None


def _read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: It is something else, or too large or too deep to be one of ours.
    """
    size = file.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(
            f"{file}: has {size} bytes, and at most {_MOST_BYTES} are read. Restore the file that was saved."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{file}: is not valid JSON ({reason(error)}). Restore the file that was saved.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds {_short(content)}, not an object. Restore the file that was saved.")
    return content


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}..."


def read_model_config(file: Path) -> Any:
    """Read a model's config, whoever may have written it, and refuse sizes of which nobody trains a model.

    Raises:
        ValueError: It is not a config, wants its author's code, or describes what is too large to be meant.
    """
    content = _read_json(file)
    attention = content.get("_attn_implementation", content.get("attn_implementation"))
    if isinstance(attention, str) and "/" in attention:
        raise ValueError(
            f"{file}: attn_implementation={attention!r}: is code of its author's, which is not run unasked."
        )
    for name in ("dtype", "torch_dtype"):
        kind = content.get(name)
        if kind is not None and not (isinstance(kind, str) and isinstance(getattr(torch, kind, None), torch.dtype)):
            raise ValueError(
                f"{file}: {name}={_short(kind)}: must be a dtype of torch. Restore the file that was saved."
            )
    for name, value in _numbers(content):
        most = _MOST_BLOCKS if re.search("depths|num_.*layers", name) else _MOST_SIZE
        if not -most <= value <= most:
            raise ValueError(f"{file}: {name}={_short(value)}: is more than {most}, too large to be meant.")
    try:
        return AutoConfig.for_model(**content)
    except Exception as error:  # whatever transformers' classes do with what is not theirs
        raise ValueError(
            f"{file}: is not a config of a model ({reason(error)}). Restore the file that was saved."
        ) from None


def refuse_unbuildable(file: Path, config: Any, model_class: Any) -> None:
    """Build a model without its numbers, so that one that cannot be built, or is too large, is refused by its file.

    Args:
        file: Of the config.
        config: The config, as `read_model_config` reads it.
        model_class: Class of the model.

    Raises:
        ValueError: It is not a config of this class, or describes too large a model.
    """
    try:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in model_class(config).parameters())
    except Exception as error:  # whatever transformers' classes do with what is not theirs
        raise ValueError(
            f"{file}: is not a config of a {model_class.__name__} ({reason(error)}). Restore the file that was saved."
        ) from None
    if parameters > _MOST_PARAMETERS:
        raise ValueError(f"{file}: describes a model of {parameters:.1e} parameters, too large to be meant.")


def _refuse_edited(file: Path, saved: str | None) -> None:
    """Refuse a `base_config.json` that is not the one that was saved: activations, heads and eps leave no trace."""
    found = content_checksum(_read_json(file))
    if saved not in (None, found):
        raise ValueError(
            f"{file}: is not the base model's config that the adapter was saved with: its SHA-256 is {found[:12]}, "
            f"and {CONFIG_NAME} says {saved[:12]}. The model would compute something else. Restore the files that "
            "were saved together, or download them again. If you changed it on purpose, remove base_config from "
            f"auto_mapping in {CONFIG_NAME}."
        )


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Iterate over the whole numbers in a JSON object, by the name of the innermost field they are in."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


def _download(source: str, revision: str | None, subfolder: str, token: str | bool | None) -> Path:
    """Download an adapter's files, all of one commit, and return their folder in the cache."""
    try:
        refuse_no_path("adapter", source)
    except UserError as error:
        raise FileNotFoundError(str(error)) from None
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
            raise ConnectionError(
                f"adapter={source!r}: the Hub answers {error.response.status_code} ({reason(error)}). Nothing "
                "half-loaded is kept: call again later."
            ) from error
        given = "the token you are logged in with" if token in (None, True) else "token=..."
        raise PermissionError(
            f"adapter={source!r}: the Hub refuses {given}; it is mistyped, expired or revoked. Pass another as "
            "token=..., log in again with `hf auth login`, or pass token=False if the adapter is public."
        ) from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise ConnectionError(
            f"adapter={source!r}: no such folder (from {os.getcwd()}). If the Hub is meant: it cannot be reached, or "
            "the connection broke, and the adapter is not whole in the local cache. Nothing half-loaded is kept: call "
            f"again once there is a connection. {error}"
        ) from error


def _build_base(source: str, folder: Path, config: E3VAConfig, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Build the base model with the adapter's label map."""
    model_class = _base_class(source, config.auto_mapping or {})
    if not (folder / BASE_CONFIG).is_file():
        raise FileNotFoundError(
            f"adapter={source!r}: has no {BASE_CONFIG}. It is written by save_pretrained of e3va_peft >= 0.1."
        )
    base_config = read_model_config(folder / BASE_CONFIG)
    refuse_unbuildable(folder / BASE_CONFIG, base_config, model_class)
    _refuse_edited(folder / BASE_CONFIG, (config.auto_mapping or {}).get("base_config"))
    saved, name, mapping = config.modules_to_save or (), config.base_model_name_or_path, config.auto_mapping or {}
    commits = mapping.get("commits") or {}
    for place in (name, *(mapping.get("backbones") or {}).values()):
        if place in (mapping.get("folders") or ()) and not os.path.isdir(place):
            raise FileNotFoundError(
                f"adapter={source!r}: its base model {place!r} was a folder, and there is none of that path (from "
                f"{Path.cwd()}). If it is elsewhere now, set base_model_name_or_path in adapter_config.json."
            )
    if name:
        revision = commits.get(name) or config.revision  # the weights that it was trained on, whatever came after
        options = {"config": base_config, "revision": revision} | kwargs
        return _from_pretrained(source, model_class, name, options, saved)
    backbones = mapping.get("backbones") or {}
    model = model_class(base_config)
    _refuse_lost(source, model, backbones, saved)
    for path, weights in backbones.items():
        parent, _, attribute = path.rpartition(".")
        part = model.get_submodule(path)
        bare = {"add_pooling_layer": False} if getattr(part, "pooler", part) is None else {}
        own = [name.removeprefix(f"{path}.") for name in saved if name.startswith(f"{path}.")]
        pinned = {"revision": commits[weights]} if weights in commits else {}
        options = {"config": part.config} | pinned | bare | kwargs
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
    try:
        found: Any = getattr(importlib.import_module(library), class_name, None)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"adapter={source!r}: its base model {library}.{class_name} cannot be imported ({reason(error)})."
        ) from None
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


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers' report of new heads to itself: who loads looks for what is missing by the loading info."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def from_safetensors(model_class: Any, place: str | os.PathLike[str], **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a model by transformers from a folder or Hub id, of which pickles are not opened unless asked.

    Args:
        model_class: Class with `from_pretrained`.
        place: Folder or Hub id.
        options: For `from_pretrained`; `use_safetensors=False` asks for pickles.

    Returns:
        The model, with new weights where there are none or some of other sizes; and transformers' loading info.

    Raises:
        OSError: It cannot be loaded; or the Hub has no safetensors of it.
        UserError: Its weights are a pickle.
    """
    defaults = {"use_safetensors": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    options = defaults | options | {"output_loading_info": True}
    named = getattr(options.get("config"), "transformers_weights", None)
    try:
        if named is not None and options["use_safetensors"] and ".safetensors" not in str(named):
            raise OSError(f"its config names {named}, not model.safetensors")
        with _without_report():
            model, report = model_class.from_pretrained(place, **options)
    except OSError as error:
        pickles = sorted(path.name for path in Path(place).glob("*model*.bin*"))
        absent = "model.safetensors" in str(error) and not _is_refusal(error)
        if not absent or (os.path.isdir(place) and not pickles):
            raise
        what = f"its weights in {pickles[0]}, a pickle" if pickles else "no model.safetensors, perhaps a pickle"
        message = (
            f"{str(place)!r}: has {what}, which can hold code and is not opened unasked. If you trust it, write it as "
            f"safetensors and use that folder: {model_class.__name__}.from_pretrained({str(place)!r}, "
            "use_safetensors=False).save_pretrained(FOLDER); its other files, such as the image processor's, go along."
        )
        raise (UserError(message) if pickles else OSError(message)) from None
    return model, report


def _is_refusal(error: BaseException) -> bool:
    """Whether an error began as a refusal of the Hub's, which transformers takes for a file that is not there."""
    return any(getattr(getattr(each, "response", None), "status_code", 404) != 404 for each in causes(error))


def _from_pretrained(
    source: str, model_class: Any, name: str, options: dict[str, Any], saved: Sequence[str]
) -> PreTrainedModel:
    """Load a base model, or its backbone, of which the adapter brings the modules `saved`; all else must be there."""
    try:
        model, report = from_safetensors(model_class, name, **options)
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
    name, commits = config.base_model_name_or_path, (config.auto_mapping or {}).get("commits") or {}
    places: list[tuple[Any, dict[str, Any]]] = [(folder, {})]
    for base in (name, *backbones.values()):
        places.append((base, {"revision": commits.get(base or "") or config.revision, "token": token}))
    for place, options in places:
        if place and cached_file(place, PROCESSOR, _raise_exceptions_for_missing_entries=False, **options):
            return _image_processor(place, options)
    return None
