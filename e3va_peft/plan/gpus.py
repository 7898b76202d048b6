"""Graphics cards: how much memory they have, and which PyTorch and which precision they still take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from e3va_peft.errors import UserError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """A graphics card.

    Attributes:
        name: As its maker writes it.
        memory: Bytes.
        capability: CUDA compute capability, (major, minor).
    """

    name: str
    memory: int
    capability: tuple[int, int]


def _cards(capability: tuple[int, int], **gib: int) -> list[Card]:
    return [Card(name.replace("_", " "), size * GIB, capability) for name, size in gib.items()]


CARDS = [
    *_cards((5, 2), GTX_980_Ti=6, GTX_Titan_X=12),
    *_cards((6, 0), Tesla_P100=16),
    *_cards((6, 1), GTX_1060=6, GTX_1070=8, GTX_1070_Ti=8, GTX_1080=8, GTX_1080_Ti=11, Titan_Xp=12),
    *_cards((7, 0), Titan_V=12, Tesla_V100=16),
    *_cards((7, 5), GTX_1660=6, RTX_2060=6, RTX_2070=8, RTX_2080=8, RTX_2080_Ti=11, Tesla_T4=15),
    *_cards((8, 6), RTX_3050=8, RTX_3060=12, RTX_3060_Ti=8, RTX_3070=8, RTX_3070_Ti=8, RTX_3080=10, RTX_3080_Ti=12),
    *_cards((8, 9), RTX_4060=8, RTX_4060_Ti=8, RTX_4070=12, RTX_4070_Super=12, RTX_4070_Ti=12),
    *_cards((12, 0), RTX_5060=8, RTX_5060_Ti=8, RTX_5070=12),
]


def find_card(name: str) -> Card:
    """Look a card up by its name, whatever its case, spaces and maker.

    Raises:
        UserError: It is not in the list.
    """
    wanted = _plain(name)
    for card in CARDS:
        if _plain(card.name) == wanted:
            return card
    names = {_plain(card.name): card.name for card in CARDS}
    hint = nearest(wanted, names)
    for plain, written in sorted(names.items(), key=lambda item: -len(item[0])):
        hint = re.sub(rf"(?<= ){re.escape(plain)}(?=[ ?])", written, hint)
    raise UserError(f"gpu={name!r}: is not in the list of cards.{hint} Or give its memory: --memory 8GiB.")


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|[\s_-]", "", name.lower())


def this_card() -> Card | None:
    """Return the graphics card of this machine, None where PyTorch sees none."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return Card(found.name, found.total_memory, (found.major, found.minor))


@dataclass(frozen=True)
class Stack:
    """The software that a card takes.

    Attributes:
        architecture: NVIDIA's name of the card's generation.
        torch: Which PyTorch to install.
        install: The command for it.
        precision: The best of fp32, fp16 and bf16 on the card.
        why: Why this precision.
        installed: Whether the PyTorch that is installed here has kernels for the card; None where it has no CUDA.
    """

    architecture: str
    torch: str
    install: str
    precision: str
    why: str
    installed: bool | None


# Which wheels hold kernels for which cards, and until when. Sources, looked up in November 2026:
# - 2.8 dropped Maxwell and Pascal from the CUDA 12.8 and 12.9 wheels: pytorch/pytorch#157517 and 2.8's release notes.
# - 2.11 dropped Volta from CUDA 12.8: pytorch/pytorch#172352. CUDA 13 itself begins with Turing (7.5).
# - CUDA 12.6 wheels hold 5.0, 6.0, 7.0, 7.5, 8.0, 8.6, 9.0 from 2.6 to 2.14 (pytorch/pytorch#190355), and are to end
#   with 2.15 (pytorch/pytorch#190385). A kernel for 6.0 runs on 6.1, and so on within a generation.
# - CUDA 12.8 wheels, the first with Blackwell, came with 2.7; 2.8 made them the default.
# The floor of 2.12 is this package's own, see pyproject.toml.
_LEGACY = (
    "torch 2.12 to 2.14 with CUDA 12.6: the CUDA 13 wheels, which pip takes by default, have dropped this card",
    'pip install "torch>=2.12,<2.15" torchvision, from the index for CUDA 12.6 that pytorch.org/get-started names',
)
_CURRENT = ("any torch from 2.12", "pip install torch torchvision")

_NO_TENSOR_CORES = (
    "it has no bf16 and no tensor cores. fp16 saves the memory, not the time: at best it is about as fast as fp32"
)


def software_stack(capability: tuple[int, int]) -> Stack:
    """Say which PyTorch still runs on a card, and in which precision to train there.

    Args:
        capability: CUDA compute capability, (major, minor).

    Raises:
        UserError: No PyTorch that this package runs with has kernels for the card.
    """
    if capability < (5, 0):
        raise UserError(
            f"compute capability {capability[0]}.{capability[1]}: no torch from 2.12 on, which this package needs, "
            "runs on this card. Use another, or train on the CPU."
        )
    name, precision, why = _generation(capability)
    wheels = _LEGACY if capability < (7, 5) else _CURRENT
    return Stack(name, *wheels, precision, why, runs_on(capability, torch.cuda.get_arch_list()))


def _generation(capability: tuple[int, int]) -> tuple[str, str, str]:
    """Return the name of a card's generation, the precision to train in, and why."""
    if capability < (6, 0):
        return "Maxwell", "fp16", _NO_TENSOR_CORES
    if capability < (7, 0):
        # Source: hma02/cublasHgemm-P100 measured a GTX 1080 Ti; NVIDIA's CUDA C++ Programming Guide gives the rates
        slow = ", and arithmetic in pure fp16 would run at 1/64 of the rate" if capability == (6, 1) else ""
        return "Pascal", "fp16", _NO_TENSOR_CORES + slow
    if capability < (7, 5):
        return "Volta", "fp16", "it has tensor cores for fp16, and no bf16"
    if capability < (8, 0):
        return "Turing", "fp16", "RTX cards have tensor cores for fp16; none has bf16, which PyTorch would emulate"
    names = {8: "Ampere", 9: "Hopper"}
    name = "Ada" if capability == (8, 9) else names.get(capability[0], "Blackwell")
    return name, "bf16", "it has tensor cores for bf16, which needs no loss scaling"


def runs_on(capability: tuple[int, int], built_for: Sequence[str]) -> bool | None:
    """Whether a PyTorch has kernels for a card.

    A kernel runs on cards of its generation with the same or a higher minor number; PTX (`compute_`) on any newer one.

    Args:
        capability: CUDA compute capability of the card.
        built_for: Result of `torch.cuda.get_arch_list()`. Empty, for a PyTorch without CUDA, gives None.
    """
    if not built_for:
        return None
    for name in built_for:
        kind, _, digits = name.partition("_")  # without digits: an AMD card's, of a ROCm build
        number = re.sub(r"\D", "", digits)
        if not number:
            continue
        major, minor = int(number[:-1]), int(number[-1])
        if kind == "compute" and (major, minor) <= capability:
            return True
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
    return False
