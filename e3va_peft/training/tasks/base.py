"""`Task`: the interface of a task, and the parts that all tasks share."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPImageProcessor,
    DetrImageProcessor,
    PreTrainedModel,
    SegformerImageProcessor,
)
from transformers.utils import cached_file

from e3va_peft.cache.taking import RECORD
from e3va_peft.card import PROCESSOR
from e3va_peft.data.config import LabelKind
from e3va_peft.errors import UserError, nearest, reason, refuse_no_path
from e3va_peft.loading import from_safetensors
from e3va_peft.training.config import RunConfig

_KEPT = ("image_mean", "image_std", "do_normalize", "do_rescale", "rescale_factor", "resample")

_ABSENT = "_e3va_absent"  # attribute of a model: the weights that its checkpoint did not have

View = Callable[[Image.Image, Any], dict[str, Tensor]]

_DECIDED = {  # options of a model's config that are not a free choice
    **dict.fromkeys(("num_labels", "id2label", "label2id"), "the classes of the data"),
    "backbone_config": "model",
    "masks": "task and head",
}


class Task(ABC):
    """A task: which model, what an example looks like, how predictions are scored.

    Args:
        config: The run.

    Attributes:
        main_metric: The one of its `metrics` that judges.
        metrics: Names of the `scores` that are one number, all that there may be.
    """

    label_kind: ClassVar[LabelKind]
    main_metric: ClassVar[str]
    metrics: ClassVar[Sequence[str]]
    default_scale: ClassVar[tuple[float, float]]
    default_training: ClassVar[Mapping[str, Any]]

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @cached_property
    def found_processor(self) -> Any:
        """The image processor of the pretrained model, see `find_processor`."""
        return find_processor(self.config.model)

    @cached_property
    def found_config(self) -> Any:
        """The config of the pretrained model, to look at only; None where there is none, as its own loading says."""
        with contextlib.suppress(UserError):
            return find_config(self.config.model)
        return None

    @abstractmethod
    def build_model(self, labels: Sequence[str]) -> PreTrainedModel:
        """Load the pretrained model, with a head for these classes.

        Raises:
            UserError: The model cannot be found, is of no use for the task, or comes without pretrained weights.
        """

    @abstractmethod
    def build_processor(self) -> Any:
        """Return the image processor that the adapter will be saved with."""

    @abstractmethod
    def training_view(self, processor: Any) -> View:
        """Return the transform of a training example: random where the run says so."""

    @abstractmethod
    def evaluation_view(self, processor: Any) -> View:
        """Return the transform of an evaluation example: what the image processor does."""

    @abstractmethod
    def evidence(self, outputs: Any, inputs: Mapping[str, Any], processor: Any) -> list[Any]:
        """Reduce outputs and truth to what `scores` needs: an item per image, on the CPU, that can be pickled."""

    def add(self, evidence: Any, items: list[Any]) -> Any:
        """Add the items of a batch to the evidence of the batches before, which is None at first."""
        evidence = [] if evidence is None else evidence
        evidence += items
        return evidence

    @abstractmethod
    def scores(self, evidence: Any, num_labels: int) -> dict[str, Any]:
        """Score the evidence of a whole split: metrics by name, per-class ones as lists."""

    def confusion(self, evidence: Any, num_labels: int) -> Tensor | None:
        """Count which class was taken for which, `(K, K)`, true classes in rows; None where objects are found."""
        return None

    def collator(
        self, model: PreTrainedModel, processor: Any
    ) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
        """The collator that makes a batch of examples, with all that the model's forward needs."""
        return partial(stack_batch, extra=forward_extras(model, processor))

    def scale(self) -> tuple[float, float]:
        """Range of the random scale of training images."""
        given = self.config.augment.scale if self.config.augment else None
        return (given[0], given[1]) if given else self.default_scale

    def flips(self) -> list[v2.Transform]:
        """Return the flips that the run asks for."""
        augment = self.config.augment
        if augment is None:
            return []
        flips: list[v2.Transform] = []
        if augment.flip:
            flips.append(v2.RandomHorizontalFlip())
        if augment.vertical_flip:
            flips.append(v2.RandomVerticalFlip())
        return flips

    def colors(self) -> list[v2.Transform]:
        """Return the colour jitter that the run asks for: that of SSD, without its swap of channels."""
        if not (self.config.augment and self.config.augment.color):
            return []
        ranges = {"brightness": (0.875, 1.125), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-0.05, 0.05)}
        return [v2.RandomApply([v2.ColorJitter(**{name: bounds})]) for name, bounds in ranges.items()]

    def load_config(self, labels: Sequence[str]) -> Any:
        """Load the model's config, with class names and the run's options.

        Raises:
            UserError: There is no such model, or it has no such option.
        """
        config = find_config(self.config.model)
        name_classes(config, labels)
        return config

    def apply_options(self, config: Any) -> None:
        """Set the run's `model_options` on a model's config.

        Raises:
            UserError: The config has no such option, something else decides it, or the options contradict each other.
        """
        for name in self.config.model_options:
            if name in _DECIDED:
                raise UserError(f"model_options.{name}: is decided by {_DECIDED[name]}. Leave it out.")
            if not hasattr(config, name):
                hint = nearest(name, config.to_dict())
                raise UserError(f"model_options.{name}: {type(config).__name__} has no such option.{hint}")
        try:
            for name, value in self.config.model_options.items():
                setattr(config, name, value)
            config.validate()
        except StrictDataclassError as error:
            raise UserError(f"model_options={self.config.model_options!r}: {error}") from None


def find_config(model: str) -> Any:
    """Load a model's config, which is a few KB: no weights.

    Args:
        model: Hub id or folder.

    Raises:
        UserError: There is no such model.
    """
    refuse_no_path("model", model)
    with _clear_errors(model):
        return AutoConfig.from_pretrained(model, trust_remote_code=False)


def name_classes(config: Any, labels: Sequence[str]) -> None:
    """Set the class names of a model's config, and with them their number."""
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}


def stack_batch(examples: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Stack tensors by name to a batch; `truth`, label maps of any size, stays a list.

    Args:
        examples: The examples of the batch.
        extra: Arguments of the model's forward that are not tensors.
    """
    batch: dict[str, Any] = {}
    for name in examples[0]:
        values = [example[name] for example in examples]
        if name == "truth":
            batch[name] = values
        elif len({value.shape for value in values}) > 1:
            raise UserError(
                f"training.per_device_eval_batch_size={len(values)}: the images of a batch have the sizes "
                f"{sorted({tuple(value.shape[-2:]) for value in values})}, because evaluation keeps their aspect "
                "ratio. Set it to 1."
            )
        else:
            batch[name] = torch.stack(values)
    return batch | dict(extra)


def pad_batch(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pad images on their right and lower sides to a batch, as DETR does, and move their labels along.

    Labels differ in number, so they stay lists: a detector's `labels`, Mask2Former's `mask_labels` and `class_labels`,
    and `truth`.

    Returns:
        `pixel_values` `(B, 3, H, W)`, `pixel_mask` `(B, H, W)` and the lists.
    """
    batch: dict[str, Any] = {name: [example[name] for example in examples] for name in examples[0]}
    if RECORD in batch:  # nothing to pad, see `fill_cache`
        blank = torch.stack(batch["pixel_values"])
        mask = torch.ones(len(blank), *blank.shape[-2:], dtype=torch.long)
        return batch | {"pixel_values": blank, "pixel_mask": mask, RECORD: torch.stack(batch[RECORD])}
    heights, widths = zip(*(image.shape[-2:] for image in batch["pixel_values"]), strict=True)
    pad = partial(DetrImageProcessor().pad, padded_size=(max(heights), max(widths)))
    if "labels" in batch:  # copied: DETR's moves boxes in place
        own = [{**label, "boxes": label["boxes"].clone()} for label in batch["labels"]]
    else:
        own = [{"masks": masks} for masks in batch["mask_labels"]]
    padded = [pad(image, annotation=label) for image, label in zip(batch["pixel_values"], own, strict=True)]
    images, valid, labels = zip(*padded, strict=True)
    batch |= {"pixel_values": torch.stack(images), "pixel_mask": torch.stack(valid)}
    if "labels" in batch:
        return batch | {"labels": list(labels)}
    return batch | {"mask_labels": [label["masks"] for label in labels]}


def forward_extras(model: PreTrainedModel, processor: Any) -> dict[str, Any]:
    """Return the arguments that a model needs to take images of the size that its processor gives."""
    return extras_at(model, side(processor))


def extras_at(model: PreTrainedModel, size: int) -> dict[str, Any]:
    """Return the arguments that a model needs to take images of another size than it was trained on."""
    accepts = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    if not accepts or getattr(model.config, "image_size", None) in (None, size):
        return {}
    return {"interpolate_pos_encoding": True}


def side(processor: Any) -> int:
    """Return the side in pixels of what an image processor gives: of its crop, its square, or its shorter edge."""
    crop = getattr(processor, "crop_size", None)
    return edge(crop if crop and getattr(processor, "do_center_crop", False) else processor.size)


def edge(size: Any) -> int:
    """Return the shorter edge in pixels that a processor's `size` or `crop_size` asks for."""
    return int(size.get("shortest_edge") or size["height"])


def find_processor(model: str) -> Any:
    """Return a model's image processor, None where it has none.

    Raises:
        UserError: Its file is there and broken.
    """
    try:
        found = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
        known = getattr(found, "data_config", None)  # timm's, which knows no options of transformers'
        if known is None:
            return found
        height, width = known["input_size"][-2:]
        return CLIPImageProcessor(  # which resizes and crops as timm does
            size={"shortest_edge": math.floor(min(height, width) / known["crop_pct"])},
            crop_size={"height": height, "width": width},
            resample=Image.Resampling[known["interpolation"].upper()],
            image_mean=list(known["mean"]),
            image_std=list(known["std"]),
        )
    except (OSError, ValueError) as error:
        file = None
        with contextlib.suppress(OSError):  # no such model: its own loading says so
            file = cached_file(model, PROCESSOR, _raise_exceptions_for_missing_entries=False)
        if file is None:
            return None
        place = file if Path(model).is_dir() else f"{PROCESSOR} of {model}"
        raise UserError(
            f"{place}: cannot be read ({reason(error)}). Fix it, or remove it for ImageNet's values, for a model on "
            "the Hub in a folder of your own. Code of its author's is not run."
        ) from None


def kept_options(found: Any) -> dict[str, Any]:
    """Return the options of a model's image processor that another one for it takes over; none where it has none."""
    return {} if found is None else {name: getattr(found, name) for name in _KEPT}


def make_processor(cls: type[Any], options: Mapping[str, Any]) -> Any:
    """Build an image processor; refuse options that it does not have.

    Raises:
        UserError: The image processor has no such option.
    """
    for name in ("size", "crop_size"):
        size = options.get(name)
        if isinstance(size, Mapping) and size.get("height") != size.get("width"):
            raise UserError(
                f"processor.{name}={dict(size)}: is no square, and training images are. Set image_size, the side."
            )
    known = [name for name in cls().to_dict() if not name.startswith("_")]
    for name in options:
        if name not in known:
            raise UserError(f"processor.{name}: {cls.__name__} has no such option.{nearest(name, known)}")
    return cls(**options)


def prepare(processor: Any, image: Image.Image) -> Any:
    """Prepare an image as its processor says, `pixel_values` (1, 3, H, W).

    With a `size_divisor`, see `SemanticSegmentation.build_processor`, both sides are the nearest multiples of it.
    """
    divisor = getattr(processor, "size_divisor", None)
    if divisor is None or not isinstance(processor, SegformerImageProcessor):
        return processor(image, return_tensors="pt")
    factor = edge(processor.size) / min(image.size) / divisor
    width, height = (max(1, round(length * factor)) * divisor for length in image.size)
    return processor(image, size={"height": height, "width": width}, return_tensors="pt")


class MasksInPlace(v2.Transform):
    """Lets a transform of torchvision resize masks to where their image is: its nearest pixel is half a pixel off."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image, or a mask."""
        if isinstance(inpt, tv_tensors.Mask):
            size = params.get("size") or self.size
            plain = inpt.as_subclass(Tensor).unsqueeze(0)  # torchvision 0.25 heeds no interpolation for masks
            resized = v2.functional.resize(plain, size, InterpolationMode.NEAREST_EXACT).squeeze(0)
            return tv_tensors.wrap(resized, like=inpt)
        return super().transform(inpt, params)


def grey(processor: Any) -> list[int]:
    """Return the colour that normalises to zero, 0 to 255."""
    unit = 1 / processor.rescale_factor if processor.do_rescale else 1
    return [round(unit * value) for value in processor.image_mean]


def normalized(processor: Any) -> list[v2.Transform]:
    """Return the transforms from an image to the tensor that the processor would give, without resizing."""
    transforms: list[v2.Transform] = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    factor = 255 * processor.rescale_factor if processor.do_rescale else 255  # on top of the scale above
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    if processor.do_normalize or factor != 1:
        transforms.append(v2.Normalize([value / factor for value in mean], [value / factor for value in std]))
    return transforms


def load_weights(cls: Any, source: str, new: Sequence[str] = (), **options: Any) -> Any:
    """Load pretrained weights, silently but for what matters: that the backbone is there.

    Args:
        cls: Class with `from_pretrained`.
        source: Hub id or folder.
        new: Beginnings of the names of modules that may start at random: head, output norms.
        options: For `from_pretrained`.

    Raises:
        UserError: There is no such model, its weights are a pickle, or some of its backbone are missing.
    """
    with _clear_errors(source):  # in fp32, whatever the file has: mixed precision keeps weights so
        model, report = from_safetensors(cls, source, dtype=torch.float32, **options)
    absent = absent_weights(report)
    setattr(model, _ABSENT, absent)
    missing = [name for name in absent if not name.startswith(tuple(new))]
    if missing:
        raise UserError(
            f"model={source!r}: has no weights for {len(missing)} parameters of its backbone, {sorted(missing)[:3]}, "
            "..., or in other sizes, and a random backbone is not worth adapting. Choose a pretrained model, and no "
            "model_options that change its sizes."
        )
    return model


def absent_weights(report: Mapping[str, Any]) -> frozenset[str]:
    """Return the names that `from_pretrained` found no weights for, or in other sizes, by its loading info."""
    return frozenset([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])


def new_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters of a model, as a task builds it, that no checkpoint gave their values."""
    loaded: set[int] = set()
    for module in model.modules():
        absent = module.__dict__.get(_ABSENT)
        if absent is not None:
            loaded |= {id(parameter) for name, parameter in module.named_parameters() if name not in absent}
    return [name for name, parameter in model.named_parameters() if id(parameter) not in loaded]


def load_backbone(cls: Any, source: str, config: Any, **options: Any) -> Any:
    """Load a pretrained backbone. Swin's classifiers have no output norms: these are new."""
    return load_weights(cls, source, new=("hidden_states_norms",), config=config, **options)


@contextmanager
def _clear_errors(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        where = "" if os.path.isdir(source) else f"no such folder (from {os.getcwd()}), and on the Hub it "
        raise UserError(
            f"model={source!r}: {where}cannot be loaded ({reason(error)}). Check the folder or Hub id; a private one "
            "needs `hf auth login`."
        ) from None
