"""ONNX of a trained model: `e3va export`."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Mask2FormerForUniversalSegmentation

from e3va_peft.detection import Detector
from e3va_peft.errors import UserError
from e3va_peft.training.predict import Trained, load_trained

NEEDED = ("onnx", "onnxruntime", "onnxscript")
_TOLERANCE = 1e-3  # of the largest value of an output


class _Outputs(nn.Module):
    """Some outputs of a model for images, as a tuple."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Run the model, (B, 3, H, W) -> its outputs by name."""
        outputs = self.model(pixel_values=pixel_values)
        return tuple(outputs[name] for name in self.names)


def export(source: str, output: Path) -> str:
    """Write a trained classifier or segmenter as ONNX, and compare it with PyTorch on random images.

    Images have the size that the image processor gives a square one; their number is free.

    Args:
        source: Folder of a run, or folder or Hub id of an adapter.
        output: File to write. It is there only if both agree.

    Returns:
        What goes in, what comes out, and by how much it differs.

    Raises:
        UserError: A package is missing, the model is a detector, or the two differ by more than 1e-3 of an output's
            largest value.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(f'needs {", ".join(missing)}: pip install "e3va_peft[onnx]"')
    trained = load_trained(source)
    if isinstance(trained.base, Detector):
        raise UserError(
            f"{source}: is a detector, which chooses boxes by what it sees: that is no graph of fixed size. "
            "Classifiers, UperNet and Mask2Former can be exported."
        )
    names = ["logits"]
    if isinstance(trained.base, Mask2FormerForUniversalSegmentation):
        names = ["class_queries_logits", "masks_queries_logits"]
    model = _Outputs(trained.model.cpu(), names).eval()
    images = torch.randn(2, *_shape(trained))
    partial = output.with_name(f".{output.name}.partial")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about code of torch and transformers
            torch.onnx.export(
                model,
                (images,),
                partial,
                input_names=["pixel_values"],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        difference = _difference(model, partial, torch.randn(3, *images.shape[1:]))
        if not difference < _TOLERANCE:  # also where it is no number
            raise UserError(f"{source}: its ONNX differs from PyTorch by {difference:.1e}. Nothing was written.")
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    size = ", ".join(map(str, images.shape[1:]))
    return f"{output}: pixel_values (batch, {size}) -> {', '.join(names)}; within {difference:.1e} of PyTorch"


def _shape(trained: Trained) -> tuple[int, ...]:
    """The shape of a square image as the image processor prepares it, (3, H, W)."""
    prepared: Any = trained.processor(Image.new("RGB", (512, 512)), return_tensors="pt")
    return tuple(prepared["pixel_values"].shape[1:])


def _difference(model: nn.Module, path: Path, images: Tensor) -> float:
    """The largest difference of an output, as a share of its largest value."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(each) for each in session.run(None, {"pixel_values": images.numpy()})]
    with torch.inference_mode():
        expected = model(images)
    shares = [(a - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(shares).max())
