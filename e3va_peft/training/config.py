"""`RunConfig`: the YAML file of `e3va train`, checked field by field before anything is loaded."""

import dataclasses  # no annotations from __future__: `check_fields` checks no types that are text
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from ruamel.yaml import YAML
from transformers import TrainingArguments

from e3va_peft.data.config import DataConfig
from e3va_peft.data.yaml import parse_yaml
from e3va_peft.errors import Rule, UserError, check_fields, check_value, nearest, one_of, read_text
from e3va_peft.files import number_of_bytes
from e3va_peft.methods import METHODS

TaskName = Literal["image-classification", "semantic-segmentation", "object-detection", "instance-segmentation"]
TASKS: tuple[str, ...] = get_args(TaskName)
OBJECT_TASKS = TASKS[2:]

HEADS = {
    "image-classification": ("linear",),
    "semantic-segmentation": ("upernet", "mask2former"),
    "object-detection": ("retinanet", "faster-rcnn", "cascade-rcnn"),
    "instance-segmentation": ("cascade-mask-rcnn", "mask-rcnn", "mask2former"),
}
"""Heads that may be put onto a backbone alone, for each task; the first is the default."""

RECIPES = resources.files("e3va_peft") / "recipes"

RECIPE_EPOCHS = 10
"""Epochs of a run that does not say."""

_TRAINING_NAMES = {each.name for each in dataclasses.fields(TrainingArguments)}
_LISTED = 30  # fields of a section that a message may list

_RESERVED = {
    "output_dir": "write output: at the top of the file",
    "remove_unused_columns": "the data has no unused columns",
    "label_names": "the task knows them",
    "save_only_model": "a run that is stopped could not go on where it was",
    "prediction_loss_only": "scores are of what the model says",
}

_RULES: dict[str, Rule] = {
    "image_size": (lambda side: side >= 1, "must be a positive number of pixels, e.g. image_size: 224."),
    "lr_steps": (
        lambda steps: sorted({step for step in steps if step > 0}) == steps != [],
        "must be a list of epochs that rise, e.g. [27, 33].",
    ),
    "backbone_lr_multiplier": (
        lambda factor: 0 < factor < math.inf,
        "must be a positive number, e.g. 0.1; to train nothing in the backbone, set method: head-only.",
    ),
    "scale": (
        lambda scale: len(scale) == 2 and 0 < scale[0] <= scale[1] < math.inf,
        "must be two numbers, 0 < low <= high, e.g. [0.5, 2].",
    ),
    "crop": (lambda side: side >= 1, "must be a positive number of pixels, e.g. crop: 512."),
    "views": (lambda views: views >= 1, "must be at least 1, e.g. views: 4."),
    "patience": (lambda evaluations: evaluations >= 1, "must be at least 1 evaluation, e.g. patience: 3."),
}


@dataclass
class AugmentConfig:
    """Variation of training images. Evaluation images never vary.

    Attributes:
        scale: Classification: share of the area a crop covers, default [0.35, 1]. Segmentation and detection: shorter
            side before the crop, as a multiple of the image size, default [0.5, 2], of a detector [0.6, 1].
        crop: Segmentation and detection: side of a training crop in pixels. None: the image size; of a detector, no
            crop.
        flip: Mirror left and right in half of the cases.
        vertical_flip: Mirror top and bottom in half of the cases (microscopy, aerial images).
        color: Vary brightness, contrast, saturation and hue.
    """

    scale: list[int | float] | None = None
    crop: int | None = None
    flip: bool = True
    vertical_flip: bool = False
    color: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "augment.", _RULES)


@dataclass
class CacheConfig:
    """Storage of the frozen backbone's passes, so that it runs once per image and view: see `e3va_peft.cached`.

    Attributes:
        views: How often augmentation is drawn for each training image; epoch e sees view e mod views.
        storage: exact; or rounded to fp16, int8 or int4. none: nothing is kept, and the views are drawn again in each
            epoch; so any method trains on the images of a run with a cache.
        folder: Where the records go. auto: a folder below $E3VA_CACHE, or ~/.cache/e3va_peft, that runs of the same
            model, data and views share.
        limit: Most bytes that the records of a split may take, e.g. 40GiB. None: as many as the disk has.
    """

    views: int = 1
    storage: Literal["exact", "fp16", "int8", "int4", "none"] = "int8"
    folder: str = "auto"
    limit: int | str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "cache.", _RULES)
        if self.limit is not None:
            number_of_bytes("cache.limit", self.limit)


@dataclass
class RunConfig:
    """One run of `e3va train`.

    Attributes:
        task: `image-classification`, `semantic-segmentation`, `object-detection` or `instance-segmentation`.
        model: Hub id or folder. A backbone alone gets a new head.
        head: The head of a backbone alone. Semantic segmentation: `upernet` (default) or `mask2former`; object
            detection: `retinanet` (default), `faster-rcnn` or `cascade-rcnn`; instance segmentation:
            `cascade-mask-rcnn` (default), `mask-rcnn` or `mask2former`.
        output: Folder of the run; `{method}` in it stands for the method's name. A `~` at the beginning of this and of
            every other path is the home folder.
        data: Where images and labels are.
        method: Name of one of `e3va_peft.methods.METHODS`; or a mapping with `name` and options of its PEFT config.
        image_size: Pixels: side of a classifier's image; shorter side of a segmenter's, and side of its training crop.
            None: what the model's image processor says, without one 512; a detector's 800.
        augment: How training images vary; false for not at all.
        cache: Run the frozen backbone once per image and view, and read what it said in every epoch after; true for
            the defaults, false for not at all. Needs a method that leaves the backbone as it is, e3va, e3va-plus or
            head-only, and images of one size in each batch.
        processor: Options of the model's image processor, e.g. `image_mean`, `image_std`.
        model_options: Options of the model's config, e.g. `hidden_size` of UperNet.
        lr_steps: Epochs after which the learning rate falls to a tenth, e.g. [27, 33], and no other schedule.
        backbone_lr_multiplier: The learning rate inside the backbone, of an adapter or of the backbone itself, as a
            multiple of `training.learning_rate`, which is the head's then. A new decoder that trains for long often
            wants more than what adapts a pretrained backbone: 0.1 for Mask2Former by its paper.
        patience: Stop early, once so many evaluations in turn have not become better than the best one before.
        training: Fields of `transformers.TrainingArguments`; those that the run decides, e.g. output_dir, are refused.
        sweep: Fields with a list of values each, e.g. learning_rate: [1e-3, 2e-3]; method.r: [8, 16]. Every
            combination is trained, in a folder of its own in `output`, and ranked in its sweep.json. A name without a
            dot is a field of this file, or else a training argument.
    """

    task: TaskName
    model: str
    output: str
    data: DataConfig
    method: dict[str, Any] = field(default_factory=lambda: {"name": "e3va"})
    head: str | None = None
    image_size: int | None = None
    augment: AugmentConfig | None = field(default_factory=AugmentConfig)
    cache: CacheConfig | None = None
    processor: dict[str, Any] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)
    lr_steps: list[int | float] | None = None
    backbone_lr_multiplier: int | float = 1.0
    patience: int | None = None
    training: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "", _RULES)
        # once and here: what writes into a folder must not differ in where ~ is
        self.model, self.output = os.path.expanduser(self.model), os.path.expanduser(self.output)

    @property
    def method_name(self) -> str:
        """Name of the method alone."""
        return str(self.method["name"])

    @property
    def seed(self) -> int:
        """Seed of the run, before there are `TrainingArguments` to ask."""
        return int(self.training.get("seed", TrainingArguments.seed))

    def to_dict(self) -> dict[str, Any]:
        """Return the config as it is written to `config.yaml`: every field, defaults included, but no token."""
        values = dataclasses.asdict(self)
        values["training"].pop("hub_token", None)
        return values | {name: False if values[name] is None else values[name] for name in ("augment", "cache")}

    def to_yaml(self) -> str:
        """YAML that `read_config` reads back to an equal config; words like `no` are quoted, as YAML 1.1 wants it."""
        writer = YAML(typ="safe", pure=True)
        writer.version, writer.width = (1, 1), 110
        writer.default_flow_style = False
        writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # typed as None
        text = io.StringIO()
        writer.dump(self.to_dict(), text)
        return text.getvalue().partition("---\n")[2]  # behind the line that says 1.1


def recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(item.name.removesuffix(".yaml") for item in RECIPES.iterdir() if item.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """Return a recipe's YAML.

    Raises:
        UserError: There is no recipe of that name.
    """
    if name not in recipes():
        raise UserError(
            f"recipe={name!r}: there is none of that name.{nearest(name, recipes())} There are {', '.join(recipes())}."
        )
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def read_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML file, or a recipe by name, apply `key=value` overrides and check every field.

    Args:
        source: YAML file, or the name of a recipe.
        overrides: `key=value` with dots into sections and values in YAML, e.g. `training.learning_rate=1e-3`.

    Raises:
        UserError: File, field or value cannot work; the message says which and what to do.
    """
    path = Path(source)
    if path.is_file():
        text = read_text(path)
    elif str(source) in recipes():
        text = recipe_text(str(source))
    else:
        raise UserError(
            f"config={str(source)!r}: no such file, and no recipe of that name.{nearest(str(source), recipes())} "
            f"Recipes: {', '.join(recipes())}. `e3va recipes NAME > my.yaml` gives you one to edit."
        )
    values = parse_yaml(text, str(source))
    if not isinstance(values, dict):
        raise UserError(f"{source}: is not a mapping of fields to values. `e3va recipes NAME` prints one that works.")
    for override in overrides:
        _apply(values, override)
    return parse_config(values)


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in nested mappings."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write key=value, e.g. --set training.learning_rate=1e-3.")
    set_field(values, key.strip(), parse_yaml(text, f"--set {override}"), f"--set {override}")


def set_field(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set one field, with dots into sections, in nested mappings.

    Args:
        values: The mapping.
        key: The field, `section.key`.
        value: Its value.
        where: What asks for it, for messages.

    Raises:
        UserError: There is a value where a section is needed.
    """
    *sections, last = key.split(".", 1) if key.startswith("sweep.") else key.split(".")  # whose keys have dots
    place = values
    for i, section in enumerate(sections):
        inner = place.get(section)
        if section == "method" and (inner is None or isinstance(inner, str)):
            inner = {"name": inner or "e3va"}
        if inner is None or isinstance(inner, bool):
            inner = {}
        if not isinstance(inner, dict):
            raise UserError(f"{where}: {'.'.join(sections[: i + 1])} holds {inner!r}, no section.")
        place[section] = inner
        place = inner
    place[last] = value


_REQUIRED = {
    "task": f"Write task: {TASKS[0]}, or one of {TASKS[1:]}.",
    "model": "Write model: a Hub id or a folder, e.g. model: microsoft/swin-base-patch4-window7-224.",
    "output": "Write output: the folder of this run, e.g. output: runs/first.",
    "data": "Write data: with source: (Hub id, image folder, parquet, Pascal VOC, YOLO, exported COCO), or images: "
    "(folder) and masks: (folder) or annotations: (COCO JSON).",
}


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """Check a run's fields and return them as a config. See `read_config`.

    Raises:
        UserError: A field is unknown, missing, or has a value that cannot work.
    """
    _refuse_unknown("", values, RunConfig)
    values = dict(values)
    for name, remedy in _REQUIRED.items():
        if values.get(name) in (None, "", {}):
            raise UserError(f"{name}: is missing. {remedy}")
    for name in ("model", "output"):
        check_value(name, values[name], str | int | float, (lambda _: True, f"must be text. {_REQUIRED[name]}"))
        values[name] = str(values[name])
    values["data"] = _section("data", values["data"], DataConfig)
    augment = None if values.get("augment") is True else values.get("augment")
    values["augment"] = None if augment is False else _section("augment", augment, AugmentConfig)
    cache = {} if values.get("cache") is True else values.get("cache")
    values["cache"] = None if cache is None or cache is False else _section("cache", cache, CacheConfig)
    values["method"] = parse_method(values.get("method", "e3va"))
    values["output"] = values["output"].replace("{method}", values["method"]["name"])
    for name in ("processor", "model_options", "training", "sweep"):
        values[name] = _mapping(name, values.get(name))
    _check_training(values["training"])
    config = RunConfig(**values)
    _check_head(config)
    _check_label_smoothing(config)
    _check_lr_steps(config)
    _check_data(config)
    _check_augment(config)
    _refuse_unknown("sweep", {name: 0 for name in config.sweep if swept_field(name) != name}, TrainingArguments)
    for name, listed in config.sweep.items():
        if not isinstance(listed, list) or not listed:
            raise UserError(f"sweep.{name}={listed!r}: must be a list of values, e.g. [1e-3, 2e-3].")
    keeps = config.cache is not None and config.cache.storage != "none"
    if keeps and not METHODS[config.method_name].cacheable:
        able = " or ".join(method.name for method in METHODS.values() if method.cacheable)
        raise UserError(
            f"cache: needs a method whose backbone never changes, {able}, and method is {config.method_name}. Leave "
            "it out, or see the same views without one: cache.storage: none."
        )
    return config


def swept_field(name: str) -> str:
    """Return the field of a run that a name in `sweep` stands for: what no run has by that name is in `training`."""
    own = {each.name for each in dataclasses.fields(RunConfig)} - {"output", "training", "sweep"}
    return name if "." in name or name in own else f"training.{name}"


_LEAST = {
    **dict.fromkeys(("weight_decay", "dataloader_num_workers", "seed"), 0),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
}


def _check_training(training: Mapping[str, Any]) -> None:
    """Check names and simple types of training arguments."""
    for name in _RESERVED.keys() & training:
        raise UserError(f"training.{name}: cannot be set, {_RESERVED[name]}.")
    _refuse_unknown("training", training, TrainingArguments)
    types: Any = {each.name: each.type for each in dataclasses.fields(TrainingArguments)}
    types["fsdp"] |= bool  # as its documentation says
    for name, value in training.items():
        kinds = set(get_args(types[name]) or (types[name],))
        if kinds <= {int, float, str, bool, NoneType}:
            check_value(f"training.{name}", value, types[name] | int if float in kinds else types[name])
        if name in _LEAST and not value >= _LEAST[name]:
            raise UserError(f"training.{name}={value!r}: must be at least {_LEAST[name]}.")
        if name in ("num_train_epochs", "learning_rate") and not 0 < value < math.inf:
            raise UserError(f"training.{name}={value!r}: must be more than 0, or nothing is trained.")
        if name == "max_steps" and not (value >= 1 or value == -1):
            raise UserError(f"training.max_steps={value!r}: must be at least 1, or -1 to train num_train_epochs.")


def parse_method(value: Any) -> dict[str, Any]:
    """Check a run's method, a name or a mapping with `name` and options, and return it as a mapping.

    Raises:
        UserError: There is no such method, or it has no such option or value.
    """
    method = {"name": value} if isinstance(value, str) else _mapping("method", value)
    if "name" not in method:
        raise UserError(f"method={value!r}: has no name. Write method: e3va, or method: {{name: e3va, r: 8}}.")
    if method["name"] not in [*METHODS]:
        raise UserError(f"method={method['name']!r}: {one_of(method['name'], METHODS)}")
    options = {key: option for key, option in method.items() if key != "name"}
    known: Any = METHODS[method["name"]].options
    if known is not None:
        _refuse_unknown("method", options, known)
        try:
            known(**options)
        except (TypeError, ValueError) as error:
            raise UserError(f"method.{error}") from None
    elif options:
        raise UserError(f"method.{next(iter(options))}: {method['name']} has no options. Leave it out.")
    return method


def _check_label_smoothing(config: RunConfig) -> None:
    factor = config.training.get("label_smoothing_factor")
    if factor and config.task != "image-classification":
        raise UserError(
            f"training.label_smoothing_factor={factor!r}: is for image-classification, and task is {config.task}. "
            "Leave it out."
        )


def _check_head(config: RunConfig) -> None:
    if config.head is not None and config.head not in HEADS[config.task]:
        meant = " or ".join(task for task, heads in HEADS.items() if config.head in heads)
        other_task = f"is for task: {meant}, and task is {config.task}. Change one."
        raise UserError(f"head={config.head!r}: {other_task if meant else one_of(config.head, HEADS[config.task])}")


def _check_data(config: RunConfig) -> None:
    data = config.data
    other = "annotations" if config.task in OBJECT_TASKS else "masks"
    if (data.source is None) == (data.images is None):
        raise UserError(
            f"data: needs either source: (Hub id, image folder, parquet) or images: and {other}:, not both."
        )
    _check_labels(config)
    if (data.images is None) != (getattr(data, other) is None):
        raise UserError(f"data: images: and {other}: go together; one of them is missing.")
    if data.annotations is not None and data.box_format != "xywh":
        raise UserError(f"data.box_format={data.box_format!r}: COCO JSON has xywh. Leave it out.")
    if "{split}" in (data.images or "") and "{split}" not in (data.annotations or ""):
        raise UserError(f"data.annotations={data.annotations!r}: needs {{split}}, which data.images has.")
    if data.eval_fraction is not None and data.eval_split is not None:
        raise UserError("data: eval_split: and eval_fraction: both say what to evaluate on. Leave one out.")


def _check_labels(config: RunConfig) -> None:
    """Refuse fields that are about what other tasks have: label maps, or objects."""
    data, task = config.data, config.task
    if data.masks is not None and task != "semantic-segmentation":
        instead = "annotations: (COCO JSON)" if task in OBJECT_TASKS else "source: an image folder"
        raise UserError(f"data.masks={data.masks!r}: {task} has no masks. Use {instead}.")
    if data.reduce_labels and task != "semantic-segmentation":
        raise UserError(f"data.reduce_labels=True: {task} has no label maps. Leave it out.")
    if data.label_column is not None and task in OBJECT_TASKS:
        raise UserError(f"data.label_column={data.label_column!r}: {task} has none. Use objects_column.")
    for name in ("annotations", "objects_column", "box_format"):
        value = getattr(data, name)
        if task not in OBJECT_TASKS and value != getattr(DataConfig, name):
            raise UserError(f"data.{name}={value!r}: {task} has no objects. Leave it out.")


def _check_lr_steps(config: RunConfig) -> None:
    steps = config.lr_steps
    if steps is None:
        return
    if config.training.get("max_steps", -1) > 0:
        raise UserError(f"lr_steps={steps!r}: counts epochs, and training.max_steps is set. Use num_train_epochs.")
    epochs = config.training.get("num_train_epochs", RECIPE_EPOCHS)
    if steps[-1] >= epochs:
        raise UserError(f"lr_steps={steps!r}: the run is over after {epochs} epochs. Lower it, or train longer.")


def _check_augment(config: RunConfig) -> None:
    augment = config.augment
    if augment is None or config.task != "image-classification":
        return
    if augment.scale is not None and augment.scale[1] > 1:
        raise UserError(f"augment.scale={augment.scale}: a crop covers at most 1, all of the image, e.g. [0.35, 1].")
    if augment.crop is not None:
        raise UserError(f"augment.crop={augment.crop}: {config.task} crops to image_size. Leave it out, or set that.")


def _section(name: str, value: Any, cls: type[Any]) -> Any:
    """Build a section's dataclass, which checks its values."""
    given = _mapping(name, value)
    _refuse_unknown(name, given, cls)
    return cls(**given)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"{name}={value!r}: must be a section, that is key: value lines indented under {name}:")
    return dict(value or {})


_SYNONYMS = {
    **dict.fromkeys(("lr", "learningrate", "rate", "base_lr"), "learning_rate"),
    **dict.fromkeys(("epochs", "epoch", "num_epochs", "max_epochs", "n_epochs"), "num_train_epochs"),
    **dict.fromkeys(("batch_size", "batchsize", "batch", "train_batch_size", "bs"), "per_device_train_batch_size"),
    **dict.fromkeys(("steps", "num_steps", "max_iters", "iterations"), "max_steps"),
    **dict.fromkeys(("workers", "num_workers"), "dataloader_num_workers"),
    **dict.fromkeys(("warmup", "warmup_ratio"), "warmup_steps"),
    **dict.fromkeys(("accumulation", "grad_accum", "accumulate_grad_batches"), "gradient_accumulation_steps"),
    **dict.fromkeys(("scheduler", "lr_scheduler"), "lr_scheduler_type"),
    **dict.fromkeys(("optimizer",), "optim"),
}
"""Names of training arguments in other trainers."""
_SYNONYMS_OF = {
    "sweep": _SYNONYMS,
    "method": {"rank": "r", "lora_r": "r", "tap": "taps", "storage": "tap_storage", "norm": "tap_norm"},
    "data": {
        **dict.fromkeys(("labels_dir", "label_dir", "masks_dir", "mask", "segmentation", "annotations_dir"), "masks"),
        **dict.fromkeys(("images_dir", "image_dir"), "images"),
        **dict.fromkeys(("classes", "class_names", "names"), "labels"),
    },
}
"""Names of the fields of a section in other tools."""


def _refuse_unknown(section: str, values: Mapping[str, Any], cls: type[Any]) -> None:
    """Refuse names that are not a dataclass's fields."""
    names = [each.name for each in dataclasses.fields(cls) if each.init]
    for key in values:
        if key not in names:
            where = f"{section}.{key}" if section else str(key)
            meant = _SYNONYMS.get(str(key).lower().replace("-", "_"))
            if section in ("", "training") and meant is not None:
                raise UserError(f"{where}: no such field. Write training: {{{meant}: {values[key]!r}}}.")
            if not section and str(key) in _TRAINING_NAMES:
                raise UserError(f"{where}: no such field. Write training: {{{key}: {values[key]!r}}}.")
            meant = _SYNONYMS_OF.get(section, {}).get(str(key).lower().replace("-", "_"))
            if meant in names:
                raise UserError(f"{where}: no such field. It is called {section}.{meant}.")
            listed = f" There are {', '.join(names)}." if len(names) <= _LISTED else ""
            raise UserError(f"{where}: no such field.{nearest(str(key), names) or listed}")
