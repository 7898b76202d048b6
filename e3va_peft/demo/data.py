"""Real brain MRI with tissue labels, without a download.

Source: the MNI152 template (ICBM 152 nonlinear symmetric 2009a, 1 mm, skull removed) with its grey- and white-matter
probability maps, as `nilearn` ships it. Copyright 1993-2004 Louis Collins, McConnell Brain Imaging Centre, Montreal
Neurological Institute, McGill University; use, copying and distribution are permitted without fee if this notice is
kept (nilearn's own licence is BSD-3-Clause). See Fonov et al., NeuroImage 54 (2011), 313-327. Nothing of it is copied
into this package.

The template is the average of 152 people, mirrored: one brain, symmetric to the last bit, without noise and without
disease. A network that learns it has shown that its training works, not that it would read a patient's scan.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from e3va_peft.demo.weights import IMAGE_MEAN, IMAGE_STD

CLASSES = ("rest", "grey matter", "white matter")

_PATCH = 14  # pixels; the demo's ViT wants multiples of it
_LEFT_RIGHT, _BACK_FRONT = slice(14, 182), slice(21, 213)  # 168 x 192 mm, centred on the brain
_FIRST_SLICE = 62  # z = -10 mm
_MIN_BRAIN = 0.1  # smallest share of grey and white matter in the picture
_BLOCK, _GAP = 10, 2  # slices
_MOVES = v2.Compose(
    [
        v2.RandomHorizontalFlip(),
        v2.RandomAffine(2, (0.01, 0.01), (0.98, 1.02), interpolation=v2.InterpolationMode.BILINEAR),
    ]
)


class MNI152Slices(Dataset[dict[str, torch.Tensor]]):
    """Axial slices as `{"pixel_values": (3, H, W) float32, "labels": (H, W) int64}`.

    Args:
        images: T1 intensity in [0, 1], `(K, H, W)`.
        labels: indices into `CLASSES`, `(K, H, W)` uint8.
        indices: the axial index of each slice in the template; its height is `index - 72` mm.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, indices: tuple[int, ...]) -> None:
        self.images = images
        self.labels = labels
        self.indices = indices
        self._moved = False

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, label = self.images[index, None], self.labels[index, None]
        if self._moved:
            moved = _MOVES(tv_tensors.Image(image), tv_tensors.Mask(label))
            image, label = (each.as_subclass(torch.Tensor) for each in moved)
        mean, std = torch.tensor(IMAGE_MEAN).view(3, 1, 1), torch.tensor(IMAGE_STD).view(3, 1, 1)
        return {"pixel_values": (image - mean) / std, "labels": label[0].long()}

    def augmented(self) -> MNI152Slices:
        """Return slices that are mirrored or not, turned (2 degrees), shifted (1 %) and scaled (2 %) when read.

        `images` and `labels` are as they were.
        """
        augmented = copy.copy(self)
        augmented._moved = True
        return augmented


def mni152_slices(size: tuple[int, int] = (224, 196)) -> tuple[MNI152Slices, MNI152Slices]:
    """Return (train, test): axial slices of the MNI152 T1 template with grey- and white-matter labels.

    *Picture*: anterior up, in radiological convention (the patient's right on the left); 168 x 192 mm around the
    brain, scaled without distortion (0.86 mm a pixel at the default size) and padded with background where `size` has
    another aspect ratio; the T1 intensity in [0, 1] in all three channels, then normalised as the ViT expects.

    *Label*: the most probable of grey matter, white matter and rest (1 - grey - white: fluid and background). Unlike a
    threshold of 0.5 on each map, this leaves no seam of "rest" where grey meets white. The maps follow intensity and
    have two known weaknesses: they call most of the brainstem grey, so the slices start above the pons, at z = -10 mm,
    and they call the pallidum and parts of the thalamus white, which stays.

    *Split*: blocks of ten slices, train, train, test and again, with two slices left out wherever train meets test, so
    that no test slice has a training slice nearer than 3 mm. It is still the same brain.

    Args:
        size: height and width in pixels, multiples of 14.

    Raises:
        ValueError: a side of `size` is not a positive multiple of 14.
        ModuleNotFoundError: `nilearn` is not installed.
    """
    if any(side <= 0 or side % _PATCH for side in size):
        raise ValueError(f"size must be positive multiples of {_PATCH}, the ViT's patch, not {size}; try (224, 196)")
    t1, grey, white = _load_volumes()  # (Z, Y, X) each
    labels = torch.stack([1 - grey - white, grey, white]).argmax(dim=0)
    usable = (labels > 0).float().mean(dim=(1, 2)) >= _MIN_BRAIN
    train, test = _split([index for index in range(_FIRST_SLICE, len(t1)) if usable[index]])
    return _dataset(t1, labels, train, size), _dataset(t1, labels, test, size)


def _load_volumes() -> list[torch.Tensor]:
    """Load T1, grey and white matter in [0, 1], `(Z, Y, X)` float32: from the feet, from the front, from the right.

    Raises:
        ModuleNotFoundError: `nilearn` is not installed.
    """
    try:
        from nilearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('the demo\'s MRI needs nilearn: pip install "e3va_peft[demo]"') from error

    loaders = (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    volumes = [torch.tensor(load(resolution=1).get_fdata(), dtype=torch.float32) for load in loaders]
    # stored as (X, Y, Z), rising to the right, to the front and to the head
    return [volume[_LEFT_RIGHT, _BACK_FRONT].permute(2, 1, 0).flip(1, 2) for volume in volumes]


def _split(indices: list[int]) -> tuple[list[int], list[int]]:
    """Deal consecutive slices to (train, test) in a cycle of 20 train, 2 left out, 10 test, 2 left out."""
    end_of_train = 2 * _BLOCK
    start_of_test = end_of_train + _GAP
    end_of_test = start_of_test + _BLOCK
    cycle = end_of_test + _GAP
    train = [index for index in indices if (index - indices[0]) % cycle < end_of_train]
    test = [index for index in indices if start_of_test <= (index - indices[0]) % cycle < end_of_test]
    return train, test


def _dataset(t1: torch.Tensor, labels: torch.Tensor, indices: list[int], size: tuple[int, int]) -> MNI152Slices:
    """Cut the slices and bring them to `size`: bilinear for the image, nearest for the label."""
    images = t1[indices][:, None]  # (K, 1, Y, X)
    masks = labels[indices][:, None].to(torch.uint8)
    scale = min(size[0] / images.shape[2], size[1] / images.shape[3])
    fitted = round(scale * images.shape[2]), round(scale * images.shape[3])
    images = F.interpolate(images, fitted, mode="bilinear", antialias=True)
    masks = F.interpolate(masks, fitted, mode="nearest-exact")
    top, left = (size[0] - fitted[0]) // 2, (size[1] - fitted[1]) // 2
    border = (left, size[1] - fitted[1] - left, top, size[0] - fitted[0] - top)
    return MNI152Slices(F.pad(images, border)[:, 0], F.pad(masks, border)[:, 0], tuple(indices))
