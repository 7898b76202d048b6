"""Results of a run: checkpoints that are whole, the trained model and its metrics, and their place on the Hub."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeGuard

import torch
from accelerate import PartialState
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's, or httpx2's
from peft import PeftConfig, PeftModel
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError
from torch import nn
from transformers import TrainingArguments

from e3va_peft.card import record_metrics, write_card_of_run
from e3va_peft.config import E3VAConfig
from e3va_peft.data.examples import Split
from e3va_peft.errors import UserError, causes, reason
from e3va_peft.files import write_whole
from e3va_peft.methods import METHODS
from e3va_peft.refusals import base_fingerprint, check_backbone, check_fingerprint, check_outside
from e3va_peft.training.config import RunConfig
from e3va_peft.training.folder import ADAPTER, DRAFT, METRICS, MODEL, checkpoints, place, remove_replaced

MANIFEST = "e3va_manifest.json"

_FULL_DISK = (  # what Python, safetensors and torch.save say
    "No space left", "os error 28", "File too large", "os error 27", "failed writing", "iostream error",
)  # fmt: skip


def last_checkpoint(output: Path, console: Console) -> Path | None:
    """Return the newest checkpoint that is whole; put aside those that are not, and say so.

    Args:
        output: Folder of the run.
        console: Where to say it.
    """
    found, whole = checkpoints(output), []
    for step in sorted(found, reverse=True):
        broken = _what_is_broken(found[step])
        if broken is None:
            whole.append(found[step])
            continue
        aside = found[step].with_name(f"broken-{found[step].name}")
        shutil.rmtree(aside, ignore_errors=True)
        found[step].rename(aside)
        note = f"{found[step]} is not whole: {broken}. It is put aside as {aside.name}"
        console.print(f"[yellow]warning[/yellow]: {escape(note)}.")
    if found and not whole:
        console.print("[yellow]warning[/yellow]: no checkpoint is whole; training starts from the beginning.")
    return whole[0] if whole else None


def write_manifest(folder: Path, model: nn.Module, trained_on: Mapping[str, Any] | None = None) -> None:
    """Write beside files what they are, by which damage and another base are known when they are read again.

    Args:
        folder: Of a checkpoint, or of results: of these the weights alone are noted, all else is the user's to edit.
        model: What was saved. Of an E3VA adapter its own config knows the base.
        trained_on: For a checkpoint, what a run must have to resume from it, see `refuse_other_training`.
    """
    files = sorted(folder.rglob("*.safetensors" if trained_on is None else "*"))
    sums = {str(path.relative_to(folder)): _sha256(path) for path in files if path.is_file() and path.name != MANIFEST}
    base = {"base": base_fingerprint(model)} if of_another_method(model) else {}
    content = {**(trained_on or {}), **base, "files": sums}
    write_whole(folder / MANIFEST, json.dumps(content, indent=2) + "\n")


def of_another_method(model: nn.Module) -> TypeGuard[PeftModel]:
    """Whether a model has an adapter of another of PEFT's methods, such as LoRA."""
    return isinstance(model, PeftModel) and not isinstance(model.peft_config["default"], E3VAConfig)


def refuse_other_files(folder: Path) -> None:
    """Refuse a folder whose weights are not those that were saved there; one without a manifest does not say.

    Raises:
        UserError: They differ, or are not there.
    """
    broken = _what_is_broken(folder, "*.safetensors") if (folder / MANIFEST).is_file() else None
    if broken is not None:
        raise UserError(
            f"{folder}: {broken}. Restore the files that were saved together. If you changed the weights on purpose, "
            f"remove {MANIFEST} there."
        )


def refuse_other_base(model: PeftModel, folder: Path) -> None:
    """Refuse an adapter, or a checkpoint of one, that was trained on other frozen weights than the model has.

    Raises:
        UserError: They differ.
    """
    config = PeftConfig.from_pretrained(str(folder))
    name = config.base_model_name_or_path or "its base"
    try:
        if not of_another_method(model):
            backbone = (config.auto_mapping or {}).get("backbone")
            if backbone is not None:
                check_backbone(backbone, model, str(model.active_adapter), name)
            check_outside((config.auto_mapping or {}).get("outside") or {}, model, model.peft_config["default"])
            return
        base = _manifest(folder).get("base")
        if base is not None:
            check_fingerprint(base, base_fingerprint(model, base), name, f"base from {MANIFEST} beside it")
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None


def fingerprints(splits: Sequence[Split | None]) -> dict[str, str | None]:
    """Say what the examples are that are trained and evaluated on, see `Split.rows_fingerprint`."""
    pairs = zip(("train", "eval"), splits, strict=True)
    return {name: None if split is None else split.rows_fingerprint() for name, split in pairs}


def trained_on(rows: Mapping[str, str | None], arguments: TrainingArguments) -> dict[str, Any]:
    """Describe what a resumed run must share with its checkpoint: the examples, and how many are in a step.

    Args:
        rows: See `fingerprints`.
        arguments: Those of the training.
    """
    images = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return {"rows": rows["train"], "eval_rows": rows["eval"]} | (
        {} if arguments.auto_find_batch_size else {"images_a_step": images}
    )


def refuse_other_training(checkpoint: Path, now: Mapping[str, Any], processes: int) -> None:
    """Refuse to resume on other examples than a checkpoint was trained on, or with more or fewer of them in a step.

    A run that looked for its batch size does not say the latter.

    Args:
        checkpoint: Its folder.
        now: See `trained_on`.
        processes: Number of those that train.

    Raises:
        UserError: They differ.
    """
    before = dict(now) | _manifest(checkpoint)
    if before["rows"] != now["rows"]:
        raise UserError(
            f"{checkpoint}: was trained on {before['rows']}, and the data now has {now['rows']}. Restore the images "
            "and labels of then to resume, or train on those of now from the beginning with --overwrite."
        )
    if before["eval_rows"] != now["eval_rows"]:
        raise UserError(
            f"{checkpoint}: was evaluated on {before['eval_rows']}, and the data now has {now['eval_rows']}: its "
            "scores and the coming ones could not be compared. Restore the images and labels of then to resume, or "
            "train from the beginning with --overwrite."
        )
    images = before.get("images_a_step")
    if images != now.get("images_a_step", images):
        raise UserError(
            f"{checkpoint}: was trained with {images} images a step, and {processes} processes would now take "
            f"{now['images_a_step']}. Change training.per_device_train_batch_size or "
            f"training.gradient_accumulation_steps: their product with the processes must be {images}. Or train from "
            "the beginning with --overwrite."
        )


def evaluated_on(folder: Path) -> str | None:
    """Say what a run, or a checkpoint of it, was evaluated on, see `Split.rows_fingerprint`; None if it is unknown."""
    try:
        if (folder / METRICS).is_file():
            return json.loads((folder / METRICS).read_text(encoding="utf-8")).get("rows", {}).get("eval")
        return _manifest(folder).get("eval_rows")
    except (OSError, ValueError):  # config and adapter alone were kept
        return None


def _manifest(checkpoint: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:  # removed, or the run ended before it was written
        return {}
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _what_is_broken(checkpoint: Path, pattern: str = "*") -> str | None:
    """Say what is wrong with the first file of a checkpoint that is missing or damaged; None where it is whole."""
    try:
        sums = _manifest(checkpoint).get("files")
    except (OSError, ValueError):
        return f"{MANIFEST} is damaged"
    if sums is None:
        return f"{MANIFEST}, which is written behind all the others, is missing"
    for name, checksum in sums.items():
        if not fnmatch(name, pattern):
            continue
        try:
            if _sha256(checkpoint / name) != checksum:
                return f"{name} is not what was written (SHA-256)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({reason(error)})"
    return None


def check_disk(output: Path, model: nn.Module) -> None:
    """Refuse to start where not even one checkpoint fits beside another."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    whole = 0 if isinstance(model, PeftModel) else sum(p.numel() * p.element_size() for p in model.parameters())
    needed = 3 * (max(whole, trained) + 2 * trained)  # two checkpoints with AdamW's state, and the one in the making
    free = shutil.disk_usage(output).free
    if free < needed:
        raise UserError(
            f"output={str(output)!r}: {free / 1e6:.0f} MB are free, checkpoints take {needed / 1e6:.0f} MB. Free "
            "some, or choose a folder on another disk."
        )


@contextmanager
def full_disk_explained(output: Path, state: PartialState) -> Iterator[None]:
    """Turn a full disk into a clear error, and remove the checkpoint that did not fit."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save fails again while it closes
        if not any(sign in str(each) for each in causes(error) for sign in _FULL_DISK):
            raise
        if state.is_main_process:
            for path in checkpoints(output).values():
                if _what_is_broken(path) is not None:
                    shutil.rmtree(path, ignore_errors=True)
        free = shutil.disk_usage(output).free / 1e6
        raise UserError(
            f"output={str(output)!r}: the disk is full ({reason(error)}; {free:.0f} MB free now). Free some; the "
            "same command resumes from the last whole checkpoint."
        ) from error


def save_results(
    output: Path, model: Any, processor: Any, record: dict[str, Any], console: Console,
    weights: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Save model and image processor, then the metrics, whose presence marks the run as finished.

    Args:
        output: Folder of the run.
        model: The model.
        processor: Its image processor.
        record: The metrics.
        console: Where to say what is moved aside.
        weights: The model's state, gathered, where the model itself is sharded.

    Returns:
        The model's folder.
    """
    adapter, other = isinstance(model, PeftModel), of_another_method(model)
    draft = output / DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    processor.save_pretrained(draft)
    if other:
        model.get_base_model().config.save_pretrained(draft)  # the class names, which a LoRA adapter does not keep
    elif adapter:
        model.peft_config["default"].base.metrics.clear()  # what single evaluations gave
        record_metrics(model, record["metrics"])
    # under its own key names where a method has put modules in: transformers' older ones know none of these
    own = {"save_original_format": False} if METHODS[record["method"]].saves == "inserted" else {}
    model.save_pretrained(str(draft), state_dict=weights, **own)
    if other:
        write_card_of_run(draft / "README.md", record)
    write_manifest(draft, model)
    folder = place(output, draft, ADAPTER if adapter else MODEL, console)
    write_whole(output / METRICS, json.dumps(plain(record), indent=2) + "\n")
    remove_replaced(output)
    return folder


def plain(value: Any) -> Any:
    """Make a value fit for JSON: not-a-number and infinity, which JSON does not have, become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def number(value: float | None) -> float:
    """Read what `plain` made of a number: null was not a finite one."""
    return math.nan if value is None else value


def push(folder: Path, repo_id: str, token: str | None, console: Console) -> None:
    """Upload an adapter's folder to a repository on the Hub, in one commit.

    Raises:
        UserError: The Hub refuses; the folder stays as it is.
    """
    try:
        api = HfApi(token=token)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload adapter")
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # of a large file it is a RuntimeError that names the file alone
        why = error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error
        raise UserError(
            f"hub_model_id={repo_id!r}: could not be pushed ({reason(why)}). The adapter is whole in {folder}; "
            f"push it again with `hf upload {repo_id} {folder}`."
        ) from None
    console.print(escape(f"pushed to {api.endpoint}/{repo_id}"))


def check_hub(config: RunConfig, arguments: TrainingArguments) -> str | None:
    """Find out before training whether the adapter can be pushed after it."""
    if not config.training.get("push_to_hub"):
        return None
    if not arguments.hub_model_id:
        raise UserError("training.push_to_hub=True: needs training.hub_model_id, e.g. hub_model_id: me/my-adapter.")
    repo_id = str(arguments.hub_model_id)
    try:
        api = HfApi(token=config.training.get("hub_token"))
        repo_id = api.create_repo(repo_id, private=arguments.hub_private_repo, exist_ok=True).repo_id  # with its owner
        api.auth_check(repo_id, write=True)  # a token that may only read finds a repository that is there, too
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"training.hub_model_id={repo_id!r}: the Hub does not let you write there ({reason(error)}). Log in "
            "with `hf auth login`, or set training.push_to_hub: false."
        ) from None
    return repo_id
