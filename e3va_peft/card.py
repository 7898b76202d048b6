"""The files that travel with an adapter beside its weights: model card, base config, image processor."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from peft import PeftModel

from e3va_peft.fingerprint import content_checksum

BASE_CONFIG = "base_config.json"
PROCESSOR = "preprocessor_config.json"
GENERATED = "<!-- written by e3va_peft at each save; delete this line to keep your own edits -->"
_CARD = Path(__file__).with_name("card.md.jinja")
_DATASET = "unknown"  # of results: the Hub wants a name, and an adapter knows none

# What transformers' push_to_hub puts into its template.
_TEMPLATE = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
    "automatically generated."
)
_PIPELINES = {
    "ForImageClassification": "image-classification",
    "ForSemanticSegmentation": "image-segmentation",
    "ForUniversalSegmentation": "image-segmentation",
    "ForObjectDetection": "object-detection",
    "RetinaNet": "object-detection",
    "MaskRCNN": "image-segmentation",
}


@dataclass
class BaseModel:
    """Facts about a base model that are needed to build it again.

    Attributes:
        config: The live transformers config, so that label names set after injection are saved too. None for a plain
            `nn.Module`.
        class_name: Class of the base model.
        library: Module that defines the class.
        backbones: Name in the model -> Hub id or folder, of backbones with weights of their own in a model that was
            put together from parts and has no id itself.
        metrics: Results to show in the model card.
        quantized_by: Library that quantised the weights while they were loaded, "" where they are used as stored.
        folders: Those of the base and its backbones that were folders: never to be looked for on the Hub.
        commits: Hub id -> commit, of those that were loaded from the Hub.
        backbone: See `refusals.backbone_fingerprint`; noted when the adapter is saved.
        outside: See `refusals.outside_fingerprints`; noted when the adapter is saved.
    """

    config: Any = None
    class_name: str = ""
    library: str = ""
    backbones: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    quantized_by: str = ""
    folders: list[str] = field(default_factory=list)
    commits: dict[str, str] = field(default_factory=dict)
    backbone: dict[str, str] | None = None
    outside: dict[str, dict[str, str]] = field(default_factory=dict)

    def mapping(self) -> dict[str, Any]:
        """The part of the base model that `adapter_config.json` keeps, under `auto_mapping`."""
        return {
            "base_model_class": self.class_name,
            "parent_library": self.library,
            "num_labels": getattr(self.config, "num_labels", None),
            "backbones": self.backbones,
            "metrics": self.metrics,
            "folders": self.folders,
            "commits": self.commits,
            "backbone": self.backbone,
            "outside": self.outside,
            "base_config": None if self.config is None else content_checksum(json.loads(self._config_text())),
        }

    def _config_text(self) -> str:
        """The content of `base_config.json`."""
        config = self.config.to_dict()
        if self.quantized_by:
            config.pop("quantization_config", None)  # it would say that the stored weights are quantised
        return json.dumps(config, indent=2, sort_keys=True, default=str)

    @property
    def labels(self) -> list[str]:
        """Class names in the order of their ids."""
        names: Mapping[int, str] = getattr(self.config, "id2label", None) or {}
        return [str(names[key]) for key in sorted(names)]

    def write(self, folder: Path, adapter: Mapping[str, Any]) -> None:
        """Write model card, base config and image processor beside an adapter.

        Args:
            folder: The adapter's folder.
            adapter: The adapter's config as a dict.
        """
        if self.config is not None:
            (folder / BASE_CONFIG).write_text(self._config_text(), encoding="utf-8")
        _copy_processor(folder, [adapter.get("base_model_name_or_path"), *self.backbones.values()])
        _write_card(folder / "README.md", adapter, self)


class KeepCard:
    """Stands on a `PeftModel` for its `_upload_modified_files`, and uploads the adapter's own model card.

    Between saving and uploading, transformers writes its template, or the repository's card, over the one that
    `save_pretrained` wrote.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def __call__(self, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        """Write the card again, then upload as PEFT does; warn of a base that nobody else has."""
        config: Any = self.model.peft_config.get("default")  # others are saved, with their cards, in subfolders
        if isinstance(getattr(config, "base", None), BaseModel):
            config.base.write(Path(working_dir), config.to_dict())
            if folders := config.base.folders:
                warnings.warn(
                    f"base_model_name_or_path: the adapter_config.json that is pushed names {folders}, folders of "
                    "this machine: whoever can read the repository sees their paths, and cannot load the adapter. "
                    "Push the base model as well, and adapt it by its Hub id.",
                    stacklevel=2,
                )
        return type(self.model)._upload_modified_files(self.model, working_dir, *args, **kwargs)


def record_metrics(model: PeftModel, metrics: Mapping[str, float], adapter_name: str | None = None) -> None:
    """Note results of an adapter for its model card, which the next save writes.

    Args:
        model: The model.
        metrics: Name -> value, e.g. `{"mean_iou": 0.75}`; what is not a number is left out.
        adapter_name: The adapter; the active one by default.
    """
    active = model.active_adapters() if callable(model.active_adapters) else model.active_adapters
    config = model.peft_config[adapter_name or active[0]]
    values = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
    config.base.metrics |= {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def _copy_processor(folder: Path, sources: list[str | None]) -> None:
    """Copy the base model's image processor from its folder or the Hub cache, where the adapter has none yet."""
    if (folder / PROCESSOR).exists():
        return
    for source in filter(None, sources):
        local = Path(source) / PROCESSOR
        cached = None if Path(source).exists() else try_to_load_from_cache(source, PROCESSOR)
        found = local if local.is_file() else cached
        if isinstance(found, str | Path):
            shutil.copyfile(found, folder / PROCESSOR)
            return


def _write_card(path: Path, adapter: Mapping[str, Any], base: BaseModel) -> None:
    """Write the card, over an earlier one that nobody has made his own; what else its metadata said is kept."""
    data = ModelCardData()
    if path.exists():
        old = ModelCard.load(path, ignore_metadata_errors=True)
        templates = (
            ModelCard.from_template(ModelCardData(), **values) for values in ({}, {"model_description": _TEMPLATE})
        )
        if GENERATED not in old.text and not any(template.text.strip() in old.text for template in templates):
            return  # somebody's own words
        data = old.data
    sources = [source for source in (adapter.get("base_model_name_or_path"), *base.backbones.values()) if source]
    # of a folder its name alone: cards are public, and paths name people
    folders = [source for source in sources if Path(source).exists()]
    name = ", ".join(Path(source).name if source in folders else source for source in sources) or base.class_name
    title = f"E3VA adapter for {name}"
    task = next((task for ending, task in _PIPELINES.items() if base.class_name.endswith(ending)), None)
    data.library_name = "peft"
    tags = [tag for tag in data.tags or () if tag not in [f"base_model:adapter:{source}" for source in folders]]
    data.tags = sorted({"e3va", "e3va_peft", "parameter-efficient-fine-tuning", *tags})
    data.pipeline_tag = task or data.pipeline_tag
    before = [data.base_model] if isinstance(data.base_model, str) else data.base_model or []  # PEFT notes paths
    known = [source for source in sources if source not in folders]
    data.base_model = known or [source for source in before if source not in folders] or None
    others = [result for result in data.eval_results or () if result.dataset_type != _DATASET]
    data.eval_results = others + (_results(task, base.metrics) if task else []) or None
    data.model_name = (data.model_name or title) if data.eval_results else None
    ModelCard.from_template(
        data, str(_CARD), title=title, name=name, task=task, adapter=adapter, base=base, generated=f"{GENERATED}\n"
    ).save(path)


def write_card_of_run(path: Path, record: Mapping[str, Any]) -> None:
    """Write the card of an adapter of another method that `e3va train` saved, instead of PEFT's empty template.

    Args:
        path: The card that PEFT wrote, whose metadata is kept.
        record: What `metrics.json` says of the run.
    """
    base = Path(record["model"]).name if Path(record["model"]).exists() else record["model"]
    scores = [f"| {name.removeprefix('eval_')} | {value:.4g} |" for name, value in record["metrics"].items()]
    lines = [
        f"# {record['method']} adapter for {base}",
        f"Trained on {base} for {record['task']} by `e3va train`, {record['steps']} steps. Labels and image processor "
        "are beside it.",
        *(["\n".join(["| score | |", "| --- | ---: |", *scores])] if scores else []),
        "```python\nfrom e3va_peft.training.predict import load_trained\n\n"
        'trained = load_trained("folder of the run")  # trained.model, trained.processor, trained.labels\n```',
    ]
    card = ModelCard.load(path, ignore_metadata_errors=True)
    card.text = "\n\n".join(["", *lines, ""])
    card.save(path)


def _results(task: str, metrics: Mapping[str, float]) -> list[EvalResult]:
    """Metrics as the Hub renders them; it takes no nan."""
    return [
        EvalResult(task, _DATASET, _DATASET, metric_type=name.removeprefix("eval_"), metric_value=value)
        for name, value in metrics.items()
        if math.isfinite(value)
    ]
