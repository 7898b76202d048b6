"""`RunConfig`: the YAML file of `e3va train`, checked field by field before anything is loaded."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from ruamel.yaml import YAML
from transformers import TrainingArguments

from e3va_peft.data.config import BOX_FORMATS, DataConfig
from e3va_peft.data.yaml import parse_yaml
from e3va_peft.errors import UserError, nearest, read_text
from e3va_peft.methods import METHODS

TASKS = ("image-classification", "semantic-segmentation", "object-detection", "instance-segmentation")
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

_LISTED = 30  # fields of a section that a message may list

_RESERVED = {
    "output_dir": "write output: at the top of the file",
    "remove_unused_columns": "the data has no unused columns",
    "label_names": "the task knows them",
}


@dataclass
class AugmentConfig:
    """How training images vary. Evaluation images never do.

    Attributes:
        scale: Classification: share of the area a crop covers, default [0.35, 1]. Segmentation: shorter side before
            the crop, as a multiple of the image size, default [0.5, 2].
        crop: Segmentation: side of a training crop in pixels. None: the image size.
        flip: Mirror left and right in half of the cases.
        vertical_flip: Mirror top and bottom in half of the cases (microscopy, aerial images).
        color: Vary brightness, contrast, saturation and hue.
    """

    scale: list[float] | None = None
    crop: int | None = None
    flip: bool = True
    vertical_flip: bool = False
    color: bool = False


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
            None: what the model's image processor says.
        augment: How training images vary; false for not at all.
        processor: Options of the model's image processor, e.g. `image_mean`, `image_std`.
        model_options: Options of the model's config, e.g. `hidden_size` of UperNet.
        lr_steps: Epochs after which the learning rate falls to a tenth, e.g. [27, 33], and no other schedule.
        training: Any field of `transformers.TrainingArguments`.
    """

    task: str
    model: str
    output: str
    data: DataConfig
    method: dict[str, Any] = field(default_factory=lambda: {"name": "e3va"})
    head: str | None = None
    image_size: int | None = None
    augment: AugmentConfig | None = field(default_factory=AugmentConfig)
    processor: dict[str, Any] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)
    lr_steps: list[float] | None = None
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
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
        return values | {"augment": False if self.augment is None else values["augment"]}

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
        raise UserError(f"recipe={name!r}: there is none of that name.{nearest(name, recipes())}")
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
    *sections, last = key.strip().split(".")
    place = values
    for i, section in enumerate(sections):
        inner = place.get(section)
        if section == "method" and (inner is None or isinstance(inner, str)):
            inner = {"name": inner or "e3va"}
        if inner is None or isinstance(inner, bool):
            inner = {}
        if not isinstance(inner, dict):
            raise UserError(f"--set {override}: {'.'.join(sections[: i + 1])} holds {inner!r}, no section.")
        place[section] = inner
        place = inner
    place[last] = parse_yaml(text, f"--set {override}")


def parse_config(values: Mapping[str, Any]) -> RunConfig:
    """Check a run's fields and return them as a config. See `read_config`.

    Raises:
        UserError: A field is unknown, missing, or has a value that cannot work.
    """
    values = dict(values)
    _known("", values, (f.name for f in dataclasses.fields(RunConfig)))
    for name in ("task", "model", "output", "data"):
        if values.get(name) in (None, "", {}):
            raise UserError(f"{name}: is missing. {_REQUIRED[name]}")
    for name in ("model", "output"):
        if isinstance(values[name], bool | list | Mapping):
            raise UserError(f"{name}={values[name]!r}: must be text. {_REQUIRED[name]}")
    _choice("task", values["task"], TASKS)
    values["data"] = _section("data", values["data"], DataConfig)
    values["augment"] = _augment(values.get("augment", True))
    values["method"] = _method(values.get("method", "e3va"))
    for name in ("processor", "model_options", "training"):
        values[name] = dict(_mapping(name, values.get(name)))
    values["model"] = str(values["model"])
    values["output"] = str(values["output"]).replace("{method}", values["method"]["name"])
    if values.get("head") is not None:
        meant = [task for task, heads in HEADS.items() if values["head"] in heads]
        if meant and values["task"] not in meant:
            raise UserError(
                f"head={values['head']!r}: is for task: {' or '.join(meant)}, and task is {values['task']}. Change "
                "one."
            )
        _choice("head", values["head"], HEADS[values["task"]])
    size = values.get("image_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise UserError(f"image_size={size!r}: must be a positive number of pixels, e.g. image_size: 224.")
    config = RunConfig(**values)
    config.training = _training(config.training)
    _check_lr_steps(config)
    _check_data(config)
    _check_augment(config)
    return config


_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "dataloader_num_workers": 0,
    "seed": 0,
}

_REQUIRED = {
    "task": f"Write task: {TASKS[0]}, or one of {TASKS[1:]}.",
    "model": "Write model: a Hub id or a folder, e.g. model: microsoft/swin-base-patch4-window7-224.",
    "output": "Write output: the folder of this run, e.g. output: runs/first.",
    "data": "Write data: with source: (Hub id, image folder, parquet, Pascal VOC, YOLO, exported COCO), or images: "
    "(folder) and masks: (folder) or annotations: (COCO JSON).",
}


def _training(training: dict[str, Any]) -> dict[str, Any]:
    """Check names and simple types of training arguments."""
    types = {f.name: set(get_args(f.type) or (f.type,)) for f in dataclasses.fields(TrainingArguments) if f.init}
    for name in training:
        if name in _RESERVED:
            raise UserError(f"training.{name}: cannot be set, {_RESERVED[name]}.")
    _known("training", training, types)
    for name, value in training.items():
        kinds = types[name]
        if kinds <= {int, float, str, bool, NoneType} and not any(_is(value, kind.__name__) for kind in kinds):
            wanted = " or ".join(sorted(kind.__name__ for kind in kinds - {NoneType}))
            raise UserError(f"training.{name}={value!r}: must be {wanted}. Leave it out for the default.")
        if name in _LEAST and not value >= _LEAST[name]:
            raise UserError(f"training.{name}={value!r}: must be at least {_LEAST[name]}.")
    return training


def _method(value: Any) -> dict[str, Any]:
    method = {"name": value} if isinstance(value, str) else dict(_mapping("method", value))
    if "name" not in method:
        raise UserError(f"method={value!r}: has no name. Write method: e3va, or method: {{name: e3va, r: 8}}.")
    _choice("method", method["name"], tuple(METHODS))
    options = [key for key in method if key != "name"]
    known = METHODS[method["name"]].options
    if known is not None:
        _known("method", dict.fromkeys(options), (f.name for f in dataclasses.fields(known)))
    elif options:
        raise UserError(f"method.{options[0]}: {method['name']} has no options. Leave it out.")
    return method


def _augment(value: Any) -> AugmentConfig | None:
    if value is False:
        return None
    augment: AugmentConfig = _section("augment", {} if value is True or value is None else value, AugmentConfig)
    scale = augment.scale
    if scale is not None:
        numbers = len(scale) == 2 and all(_is(value, "float") for value in scale)
        if not numbers or not 0 < scale[0] <= scale[1] < float("inf"):
            raise UserError(f"augment.scale={scale!r}: must be two numbers, 0 < low <= high, e.g. [0.5, 2].")
    if augment.crop is not None and augment.crop < 1:
        raise UserError(f"augment.crop={augment.crop}: must be a positive number of pixels.")
    return augment


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
    _choice("data.box_format", data.box_format, BOX_FORMATS)
    if data.annotations is not None and data.box_format != "xywh":
        raise UserError(f"data.box_format={data.box_format!r}: COCO JSON has xywh. Leave it out.")
    if "{split}" in (data.images or "") and "{split}" not in (data.annotations or ""):
        raise UserError(f"data.annotations={data.annotations!r}: needs {{split}}, which data.images has.")
    if isinstance(data.labels, list) and not all(_is(name, "str") or _is(name, "int") for name in data.labels):
        raise UserError(
            f"data.labels={data.labels!r}: holds what is not a name. Quote it: YAML reads true and 1.5 as values."
        )
    if not 0 <= data.ignore_index <= 65535:
        raise UserError(f"data.ignore_index={data.ignore_index}: must be a value that a mask can hold, 0 to 65535.")
    if data.eval_fraction is not None and not 0 < data.eval_fraction < 1:
        raise UserError(f"data.eval_fraction={data.eval_fraction}: must be between 0 and 1, e.g. 0.1.")
    if data.eval_fraction is not None and data.eval_split is not None:
        raise UserError("data: eval_split: and eval_fraction: both say what to evaluate on. Leave one out.")
    for name in ("train_samples", "eval_samples"):
        value = getattr(data, name)
        if value is not None and value < 1:
            raise UserError(f"data.{name}={value}: must be at least 1, or left out for all.")


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
    numbers = isinstance(steps, list) and steps and all(_is(value, "float") and value > 0 for value in steps)
    if not numbers or sorted(set(steps)) != steps:
        raise UserError(f"lr_steps={steps!r}: must be a list of epochs that rise, e.g. [27, 33].")
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
    """Build a section's dataclass; check names and simple types."""
    given = dict(_mapping(name, value))
    fields = {f.name: str(f.type) for f in dataclasses.fields(cls)}
    _known(name, given, fields)
    for key, item in given.items():
        if item is not None and not any(_is(item, kind.strip()) for kind in fields[key].split("|")):
            raise UserError(f"{name}.{key}={item!r}: must be {fields[key].replace(' | None', '')}.")
    return cls(**given)


def _is(value: Any, kind: str) -> bool:
    if kind.startswith("list"):
        return isinstance(value, list)
    types: dict[str, tuple[type, ...]] = {
        "str": (str,),
        "bool": (bool,),
        "int": (int,),
        "float": (int, float),
        "NoneType": (NoneType,),
    }
    return isinstance(value, types.get(kind, ())) and (kind == "bool" or not isinstance(value, bool))


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{name}={value!r}: must be a section, that is key: value lines indented under {name}:")
    return value


def _choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{name}={value!r}: must be one of {', '.join(choices)}.{nearest(str(value), choices)}")


def _known(section: str, values: Mapping[str, Any], names: Iterable[str]) -> None:
    names = list(names)
    for key in values:
        if key not in names:
            where = f"{section}.{key}" if section else str(key)
            listed = f" There are {', '.join(names)}." if len(names) <= _LISTED else ""
            hint = nearest(str(key), names) or listed
            raise UserError(f"{where}: no such field.{hint}")
