"""`E3VAConfig`: the choices of a user."""

import re  # no annotations from __future__: `check_fields` checks no types that are text
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from e3va_peft.errors import Rule, check_fields
from e3va_peft.files import refuse_links
from e3va_peft.fingerprint import tensors_checksum
from e3va_peft.registration import peft_type  # the type exists before a config is unpickled
from e3va_peft.storage import NORMS, TAP_STORAGES

_EXITS: Rule = (
    lambda names: names != "all-linear" and all(names),
    "must be a list of module names, one regular expression, or None. E3VA adapts no linear layers, it wraps the exit "
    "of the backbone: leave it out, and the exit is found by itself.",
)
_MOST = 10**6
RELEASE = ".".join(metadata.version("e3va_peft").split(".")[:2])
PLUS: dict[str, Any] = {"taps": ("stream",), "r": 64, "bottleneck_ratio": 1, "tap_storage": "int4"}
_NOT_GIVEN: Any = object()  # unlike None, which is a choice
_FLAG: Rule = (lambda _: True, "must be True or False.")
_RULES: dict[str, Rule] = {
    "r": (lambda rank: 1 <= rank <= _MOST, "the rank must be a whole number from 1 to a million, e.g. r=16."),
    "bottleneck_ratio": (lambda share: 0 < share <= _MOST, "must be a positive number, e.g. bottleneck_ratio=0.5."),
    "taps": (
        lambda taps: not isinstance(taps, str) and len(taps) > 0 and all(taps),
        "must be a sequence of names, e.g. taps=('attention', 'mlp'), or None for all of the backbone's branches.",
    ),
    "tap_norm": (NORMS.__contains__, f"must be one of {(None, *NORMS)}."),
    "tap_storage": (TAP_STORAGES.__contains__, f"must be one of {TAP_STORAGES}."),
    "live_blocks": (lambda blocks: blocks >= 0, "must be a number of blocks, 0 or more, e.g. live_blocks=2."),
    "checkpoint_live_blocks": _FLAG,
    "target_modules": _EXITS,
    "exclude_modules": _EXITS,
    "modules_to_save": (all, "must be a list of module names, e.g. ['classifier'], or None."),
    "init_weights": _FLAG,
}

_READING = ("taps", "tap_norm", "tap_storage", "live_blocks")
"""Fields that decide how the frozen pass is read, which weights of the same shapes do not tell."""


@dataclass
class E3VAConfig(PeftConfig):
    """Configuration of an E3VA highway (arXiv 2306.09729).

    Every field has a default that works: `get_peft_model(model, E3VAConfig())`. The fields inherited from `PeftConfig`
    are filled in by PEFT; `task_type` stays `None`, because PEFT's task types are about text.

    Raises:
        ValueError: A field has a value that cannot work. The message names field, value and remedy.
    """

    r: int = field(
        default=16,
        metadata={"help": "Rank of both factored projections of an adapter. The paper's highway has r=16."},
    )
    bottleneck_ratio: int | float = field(
        default=0.5,
        metadata={
            "help": "Width of the bottleneck between the two projections, as a share of the stage's width C: "
            "k = bottleneck_ratio * C. 0.5 is inferred from the paper's parameter counts."
        },
    )
    taps: Sequence[str] | None = field(
        default=None,
        metadata={
            "help": "Points of a block to read, one adapter for each: branches by the backbone's own names, before "
            "their residual add, such as ('attention', 'mlp') or ('branch',); 'stream', what enters the block, "
            "alone or beside them (ours; alone, a live block is read as by ('block',)); or ('block',), the "
            "branches' sum. One tap a block halves what taps keep for backward. None means all of the "
            "backbone's branches."
        },
    )
    tap_norm: str | None = field(
        default_factory=lambda: _NOT_GIVEN,
        metadata={
            "help": "How an adapter reads a tap t. 'layer': normalised per token over its channels, n(t), without "
            "parameters. 'relative': the same, and its answer in the scale of what was read, s(t) A(n(t)), with s(t) "
            "the token's deviation, so that live blocks behind small branches (LayerScale) are not shouted over. "
            "'none': as it is, as in adapters from before this field existed. None means the backbone's own: "
            "'relative' for DINOv2 and DINOv3's ViT, 'layer' for the others (inferred; without live blocks no choice "
            "differs by more than noise, with 4 of 12 live a DINOv2 comes to 0.746 by the first and 0.591 by "
            "the second on CIFAR-10, see benchmarks/results/choices.json)."
        },
    )
    tap_storage: str = field(
        default="exact",
        metadata={
            "help": "How a tap is kept between forward and backward. 'exact': as it is. 'recompute': not at all; "
            "backward runs the frozen backbone once more. 'int8': rounded, with a scale per token, a quarter of the "
            "bytes of fp32. 'int4': with a scale per 32 channels, a seventh. An adapter reads rounded taps in "
            "forward, in backward and after training alike: it is the function that was trained. Live blocks read "
            "theirs as they are. Patch merging keeps its input in int8, unless 'exact'. Of adapters that are active "
            "together, the most exact setting is kept."
        },
    )
    live_blocks: int = field(
        default=0,
        metadata={
            "help": "Number of blocks, counted from the end over all stages, that gradient passes through. The lane "
            "is written into the stream in front of them, and their adapters add to the stream where they read it. "
            "They stay frozen. 0 is the paper's method. Each costs its share of the backbone's backward and memory."
        },
    )
    checkpoint_live_blocks: bool = field(
        default=True,
        metadata={
            "help": "Keep one tensor of a live block for backward and run the block once more there. False keeps all "
            "its activations, which is faster. Of compiled blocks the compiler decides what is kept."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or one regular expression) of the backbone exits to adapt. None finds every supported "
            "backbone in the model; only needed for a model with several."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names (or one regular expression) of backbone exits to leave alone."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules to train and save whole beside the highway. None means everything outside the backbone "
            "(head, neck, decoder; also what was frozen before) plus the backbone's output norms; [] means none."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "True starts at the base model exactly (the last factor is zero). False draws it at random, "
            "for tests."
        },
    )

    def __post_init__(self) -> None:
        if self.tap_norm is _NOT_GIVEN:
            self.tap_norm = None if self.peft_version is None else "none"  # a file from before there was the field
        self._refuse_task_type()  # before PEFT does, which lists types of text tasks
        super().__post_init__()
        self.peft_type = peft_type()
        self.base: Any = (
            None  # `card.BaseModel`; no field: known once the adapter is in a model, never passed by a user
        )
        self._check()

    def _refuse_task_type(self) -> None:
        if self.task_type is not None:
            raise ValueError(
                f"task_type={str(self.task_type)!r}: PEFT's task types wrap text models and break vision models. "
                "Leave it None; the head of the model that you pass decides the task."
            )

    def _check(self) -> None:
        for name in ("taps", "target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, list | tuple | set):
                setattr(self, name, sorted(value, key=str) if isinstance(value, set) else list(value))
        check_fields(self, "", _RULES, ValueError)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            try:
                re.compile(value if isinstance(value, str) else "")
            except re.error as error:
                raise ValueError(f"{name}={value!r}: is not a regular expression ({error}).") from None
        if self.taps is not None:
            if len(set(self.taps)) < len(self.taps) or ("block" in self.taps and len(self.taps) > 1):
                raise ValueError(f"taps={self.taps!r}: must be names of branches, each once, or ('block',) alone.")
            self.taps = tuple(self.taps)

    @classmethod
    def plus(cls, **options: Any) -> "E3VAConfig":
        """E3VA+, this package's own choice: an adapter of rank 64 a block, which reads the stream, kept in 4 bits.

        Against the paper's setting it keeps fewer bytes and learns faster (`benchmarks/results/accuracy/`), with two
        to three times the parameters: 3.1 instead of 1.2 million on Swin-B.

        Args:
            options: More fields, or other values of those that it sets.
        """
        return cls(**PLUS | options)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "E3VAConfig":
        """Read `adapter_config.json`, as PEFT's loaders do before they open the weights.

        Args:
            pretrained_model_name_or_path: Folder or Hub id of the adapter.
            subfolder: Folder within.
            kwargs: PEFT's own.

        Raises:
            ValueError: A file of the folder is a link out of it.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        if folder.is_dir():
            refuse_links(folder)
        config: E3VAConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        return config

    def reading(self) -> dict[str, Any]:
        """What decides how an adapter reads the frozen pass: these fields, and the release of this package."""
        return {name: getattr(self, name) for name in _READING} | {"e3va_peft": RELEASE}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save `adapter_config.json`; where the adapter is in a model, let that write what travels with it.

        Args:
            save_directory: The adapter's folder.
            kwargs: PEFT's own; `auto_mapping_dict` is completed with all that rebuilds the base model.
        """
        if self.base is not None:
            # PEFT passes the mapping, and has just written the weights; transformers does neither
            file = Path(save_directory) / SAFETENSORS_WEIGHTS_NAME
            written = "auto_mapping_dict" in kwargs and file.is_file()
            own: dict[str, Any] = {"reads": self.reading()}
            if written:
                own["weights"] = tensors_checksum(load_file(file).values())
            kwargs["auto_mapping_dict"] = (kwargs.get("auto_mapping_dict") or {}) | self.base.mapping() | own
        super().save_pretrained(save_directory, **kwargs)
        if self.base is not None:
            self.base.write(Path(save_directory), self.to_dict())
