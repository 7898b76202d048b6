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

from e3va_peft.detection import Detector, RetinaNet
from e3va_peft.errors import UserError
from e3va_peft.training.predict import Trained, load_trained
from e3va_peft.training.tasks.base import forward_extras, prepare

NEEDED = ("onnx", "onnxruntime", "onnxscript")
_TOLERANCE = 1e-3  # of the largest value of an output


class _Outputs(nn.Module):
    """Some outputs of a model for images, as a tuple."""

    def __init__(self, trained: Trained, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = trained.model.cpu(), names
        self.extras = forward_extras(trained.base, trained.processor)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Run the model, (B, 3, H, W) -> its outputs by name."""
        outputs = self.model(pixel_values=pixel_values, **self.extras)
        return tuple(outputs[name] for name in self.names)


def export(source: str, output: Path) -> str:
    """Write a trained classifier, segmenter or RetinaNet as ONNX, and compare it with PyTorch on random images.

    Images have the size that a square one has in evaluation; their number is free, but of a RetinaNet it is 1.
    That finds as many boxes as in PyTorch with a threshold of 0: the best ones, however low they score.

    Args:
        source: Folder of a run, or folder or Hub id of an adapter.
        output: File to write. It is there only if both agree.

    Returns:
        What goes in, what comes out, and by how much it differs.

    Raises:
        UserError: A package is missing, the model is a detector of two stages, or the two differ by more than 1e-3 of
            an output's largest value.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(f'needs {", ".join(missing)}: pip install "e3va_peft[onnx]"')
    trained = load_trained(source)
    names, count = _outputs(trained.base, source)
    model = _Outputs(trained, names).eval()
    images = torch.randn(count, *_shape(trained))
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
                dynamic_shapes=None if count == 1 else ({0: torch.export.Dim("batch")},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
        difference = _difference(model, partial, torch.randn(1 if count == 1 else 3, *images.shape[1:]))
        if not difference < _TOLERANCE:  # also where it is not a number
            raise UserError(f"{source}: its ONNX differs from PyTorch by {difference:.1e}. Nothing was written.")
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    size = ", ".join(["1" if count == 1 else "batch", *map(str, images.shape[1:])])
    return f"{output}: pixel_values ({size}) -> {', '.join(names)}; within {difference:.1e} of PyTorch"


def _outputs(base: nn.Module, source: str) -> tuple[list[str], int]:
    """The outputs to export, and how many images to export them with; 1 where it must be.

    Raises:
        UserError: The model has no graph.
    """
    if isinstance(base, RetinaNet):
        for module in base.modules():  # PEFT keeps the head that is trained in a wrapper
            if hasattr(module, "score_thresh"):
                module.score_thresh = 0.0
        return ["scores", "labels", "pred_boxes"], 1
    if isinstance(base, Detector):
        raise UserError(
            f"{source}: is a detector of two stages, which looks again at the boxes that it has chosen: its "
            "graph has no fixed size. Classifiers, UperNet, Mask2Former and RetinaNet can be exported."
        )
    if isinstance(base, Mask2FormerForUniversalSegmentation):
        return ["class_queries_logits", "masks_queries_logits"], 2
    return ["logits"], 2


def _shape(trained: Trained) -> tuple[int, ...]:
    """The shape of a square image as evaluation prepares it, (3, H, W)."""
    prepared: Any = prepare(trained.processor, Image.new("RGB", (512, 512)))
    return tuple(prepared["pixel_values"].shape[1:])


def _difference(model: _Outputs, path: Path, images: Tensor) -> float:
    """The largest difference of an output, as a share of its largest value."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(each) for each in session.run(None, {"pixel_values": images.numpy()})]
    with torch.inference_mode():
        expected = model(images)
    if "pred_boxes" in model.names:
        return _difference_of_boxes(found, expected)
    shares = [(a - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(shares).max())


def _difference_of_boxes(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of scores, and of boxes from the nearest one of their class, in shares of the image.

    Boxes that score alike may come in another order, and of those that score as the last one others may be kept.
    """
    scores, labels, boxes = (each[0] for each in expected)
    apart = (boxes[:, None] - found[2][0]).abs().amax(2) + (labels[:, None] != found[1][0])
    sure = scores > scores.min() + _TOLERANCE
    differences = [
        (found[0][0] - scores).abs().max(),
        apart.amin(1)[sure].amax() if sure.any() else scores.new_zeros(()),
    ]
    return float(torch.stack(differences).max())
