"""Differences between tasks and methods: views of an image, models with new heads, what is trained, scores."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    ConvNextConfig,
    ConvNextImageProcessor,
    Dinov2Config,
    DINOv3ConvNextConfig,
    SwinConfig,
    TimmWrapperConfig,
    ViTConfig,
    ViTImageProcessor,
)
from transformers.models.upernet.modeling_upernet import UperNetForSemanticSegmentation

from e3va_peft.detection.pyramid import cut_into
from e3va_peft.errors import UserError
from e3va_peft.methods import adapt
from e3va_peft.training.batchnorm import SingleValueBatchNorm2d
from e3va_peft.training.config import parse_config
from e3va_peft.training.metrics import MeanIoU, accuracy_scores
from e3va_peft.training.tasks import ImageClassification, SemanticSegmentation, Task, task_of
from e3va_peft.training.tasks.base import forward_extras, normalized, prepare, side, stack_batch
from e3va_peft.training.tasks.segmentation import label_maps, segmenter_config
from tests.models import BY_NAME, PLAIN, dinov2_config, perturb

COLORS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8)  # of classes; no two mix to one
SMALL = {"hidden_size": 8, "auxiliary_channels": 4, "pool_scales": [1, 2]}  # a small UperNet
EVERY_AUGMENT = {"flip": True, "vertical_flip": True, "color": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with tiny pretrained models, each in a folder of its case's name."""
    root = tmp_path_factory.mktemp("models")
    for name in ("swin-classifier", "vit-classifier", "dinov2-classifier", "swin-upernet", "swin-mask2former"):
        BY_NAME[name].base().save_pretrained(root / name)
    deep = dinov2_config(num_hidden_layers=8, num_labels=3)
    model = type(BY_NAME["dinov2-classifier"].build())(deep)
    perturb(model, 0)
    model.save_pretrained(root / "dinov2-deep")
    return root


def task(model: str | Path, name: str = "semantic-segmentation", **fields: Any) -> Any:
    data = {"images": "i", "masks": "m"} if name == "semantic-segmentation" else {"source": "d"}
    values = {"task": name, "model": str(model), "output": "o", "data": data | fields.pop("data", {})}
    return task_of(parse_config(values | fields))


def classification(model: str | Path = "none", **fields: Any) -> ImageClassification:
    return task(model, "image-classification", **fields)


def segmentation(model: str | Path = "none", **fields: Any) -> SemanticSegmentation:
    return task(model, **fields)


def picture(height: int = 40, width: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def blocks(height: int = 48, width: int = 72, size: int = 12) -> np.ndarray:
    """A label map of four classes in blocks, none of which is its mirror image."""
    ids = np.random.default_rng(3).integers(0, 4, (height // size, width // size))
    return ids.repeat(size, 0).repeat(size, 1)


def raw(view: dict[str, torch.Tensor], processor: Any) -> torch.Tensor:
    """Undo the normalisation: pixel values 0 to 255, (3, H, W)."""
    mean, std = torch.tensor(processor.image_mean)[:, None, None], torch.tensor(processor.image_std)[:, None, None]
    return (view["pixel_values"] * std + mean) * 255


def nearest_class(pixels: torch.Tensor, tolerance: float) -> torch.Tensor:
    """The class whose colour a pixel has, -1 where it has none, (3, H, W) -> (H, W)."""
    distance = (pixels[None] - torch.from_numpy(COLORS).float()[:, :, None, None]).abs().amax(1)
    found = distance.argmin(0)
    return torch.where(distance.amin(0) <= tolerance, found, -1)


# --- views -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_mean": [0.2, 0.5, 0.7], "image_std": [0.1, 0.2, 0.3]},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 50.0, 40.0]},
    ],
    ids=["default", "mean and std", "no normalisation", "other scale", "no scale"],
)
def test_training_normalises_as_the_processor_does(options):
    processor = ViTImageProcessor(**({"do_resize": False} | options))
    ours = picture()
    for transform in normalized(processor):
        ours = transform(ours)
    theirs = processor(picture(), return_tensors="pt")["pixel_values"][0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("augment", [True, EVERY_AUGMENT, {"scale": [0.5, 0.5]}, False], ids=str)
def test_views_of_a_classifier_have_the_size_of_its_processor(augment):
    run = classification(image_size=32, augment=augment)
    processor = run.build_processor()
    for view in (run.training_view(processor), run.evaluation_view(processor)):
        found = view(picture(), 2)
        assert found["pixel_values"].shape == (3, 32, 32) and found["pixel_values"].dtype == torch.float32
        assert found["labels"].item() == 2 and found["labels"].dtype == torch.int64


@pytest.mark.parametrize("name", ["classification", "segmentation"])
def test_without_augmentation_training_sees_the_same_each_time(name):
    run = {"classification": classification, "segmentation": segmentation}[name](image_size=32, augment=False)
    view = run.training_view(run.build_processor())
    label = 1 if name == "classification" else np.ones((40, 60), dtype=np.int64)
    assert torch.equal(view(picture(), label)["pixel_values"], view(picture(), label)["pixel_values"])


def test_with_augmentation_training_sees_another_view_each_time_and_evaluation_the_same():
    run = classification(image_size=32)
    processor = run.build_processor()
    training, evaluation = run.training_view(processor), run.evaluation_view(processor)
    assert not torch.equal(training(picture(), 0)["pixel_values"], training(picture(), 0)["pixel_values"])
    expected = processor(picture(), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(evaluation(picture(), 0)["pixel_values"], expected)


def test_colour_jitter_changes_colours_but_does_not_swap_channels():
    run = classification(image_size=16, augment={"color": True, "flip": False, "scale": [1, 1]})
    processor = run.build_processor()
    view = run.training_view(processor)
    red = Image.new("RGB", (16, 16), (200, 60, 60))
    means = torch.stack([raw(view(red, 0), processor).mean((1, 2)) for _ in range(40)])
    assert (means[:, 0] > means[:, 1:].amax(1)).all()
    assert means.std(0).amin() > 1


@pytest.mark.parametrize(
    ("augment", "crop"),
    [
        ({"flip": True, "scale": [1, 1]}, 32),
        ({"flip": False, "vertical_flip": True, "scale": [1, 1]}, 32),
        ({"scale": [0.5, 2.0], **EVERY_AUGMENT, "color": False}, 32),
        ({"scale": [0.5, 0.5], "crop": 64}, 64),
        ({"scale": [2.0, 2.0], "crop": 24, "vertical_flip": True}, 24),
        (False, 32),
    ],
    ids=["flip", "vertical flip", "scale", "padding", "enlarged", "no augmentation"],
)
def test_image_and_label_map_stay_aligned(augment, crop):
    run = segmentation(image_size=32, augment=augment)
    processor = run.build_processor()
    view = run.training_view(processor)
    truth = blocks()
    image = Image.fromarray(COLORS[truth])
    decided = []
    for _ in range(12):
        found = view(image, truth)
        assert found["pixel_values"].shape == (3, crop, crop) and found["labels"].shape == (crop, crop)
        assert found["labels"].dtype == torch.int64 and found["pixel_values"].dtype == torch.float32
        assert type(found["labels"]) is type(found["pixel_values"]) is torch.Tensor
        seen, labels = nearest_class(raw(found, processor), tolerance=3), found["labels"]
        inside = labels != 255
        pure = inside & (seen >= 0)
        assert torch.equal(seen[pure], labels[pure])
        decided.append(pure.sum().item() / inside.sum().item())
    assert np.mean(decided) > 0.4


@pytest.mark.parametrize("augment", [False, {"scale": [0.5, 0.5], "crop": 32, "flip": False}])
def test_a_label_map_lies_where_its_image_does_to_a_fraction_of_a_pixel(augment):
    run = segmentation(image_size=32 if augment is False else 64, augment=augment)
    y, x = np.ogrid[:256, :256]
    disc = ((y - 120) ** 2 + (x - 130) ** 2 < 70**2).astype(np.int64)
    found = run.training_view(run.build_processor())(
        Image.fromarray((255 * disc).astype(np.uint8)).convert("RGB"), disc
    )
    image, labels = raw(found, run.build_processor())[0] / 255, found["labels"].float()
    for weights in ((image, labels), (image.T, labels.T)):
        centres = [(w.sum(1) * torch.arange(32)).sum() / w.sum() for w in weights]
        assert abs(centres[0] - centres[1]) < 0.15


@pytest.mark.parametrize(("flip", "vertical_flip"), [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize("make", [classification, segmentation])
def test_flips_happen_in_half_of_the_cases_and_only_where_asked_for(make, flip, vertical_flip):
    run = make(image_size=24, augment={"flip": flip, "vertical_flip": vertical_flip, "scale": [1, 1]})
    processor = run.build_processor()
    view = run.training_view(processor)
    corner = np.zeros((24, 24, 3), dtype=np.uint8)
    corner[:6, :6] = 255
    label = np.zeros((24, 24), dtype=np.int64) if run.label_kind == "label-map" else 0
    found = torch.stack([raw(view(Image.fromarray(corner), label), processor)[0] for _ in range(60)])
    mirrored, upside_down = (found[:, :6, -6:].amax((1, 2)) > 200), (found[:, -6:, :6].amax((1, 2)) > 200)
    both = found[:, -6:, -6:].amax((1, 2)) > 200
    for asked, seen in ((flip, mirrored | both), (vertical_flip, upside_down | both)):
        assert 15 < seen.sum() < 45 if asked else not seen.any()


def test_colour_jitter_leaves_the_label_map_alone():
    run = segmentation(image_size=48, augment={"color": True, "flip": False, "scale": [1, 1], "crop": 48})
    processor = run.build_processor()
    view = run.training_view(processor)
    truth = blocks(48, 48)
    found = [view(Image.fromarray(COLORS[truth]), truth) for _ in range(8)]
    assert all(torch.equal(item["labels"], torch.from_numpy(truth)) for item in found)
    assert len({item["pixel_values"].sum().item() for item in found}) > 1


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("dinov2-classifier", 28, (28, 35)),  # patches of 7 px
        ("vit-classifier", 28, (28, 35)),
        ("convnext-classifier", 64, (64, 88)),  # of 4, and once more halved
        ("swin-classifier", 28, (28, 37)),  # which pads
        ("swin-upernet", 28, (28, 37)),
    ],
)
def test_a_backbone_that_sees_whole_patches_gets_images_of_whole_patches(name, size, expected, tmp_path):
    BY_NAME[name].base().save_pretrained(tmp_path / name)
    run = segmentation(tmp_path / name, image_size=size)
    run.build_processor().save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)  # as predictions and evaluations read it
    image, truth = picture(60, 80), blocks(60, 84)[:, :80]
    assert prepare(processor, image)["pixel_values"].shape[-2:] == expected
    found = run.evaluation_view(processor)(image, truth)
    assert found["pixel_values"].shape[-2:] == found["labels"].shape == expected and found["truth"].shape == (60, 80)


def test_the_squares_of_published_backbones_are_known():
    squares = {ViTConfig: 16, Dinov2Config: 14, ConvNextConfig: 32, DINOv3ConvNextConfig: 32, SwinConfig: 1}
    assert {kind: cut_into(kind()) for kind in squares} == squares


def test_label_maps_are_those_of_all_classes_at_once():
    torch.manual_seed(0)
    logits = torch.randn(2, 21, 6, 8).half()
    logits[:, 5] = logits[:, 17]  # a draw is the first one's
    sizes = [(13, 19), (40, 60)]
    found = label_maps(SimpleNamespace(logits=logits), None, sizes)
    for scores, size, ids in zip(logits, sizes, found, strict=True):
        expected = F.interpolate(scores[None].float(), size, mode="bilinear").argmax(1)[0]
        assert torch.equal(ids, expected) and ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("make", "option"), [(classification, "size"), (classification, "crop_size"), (segmentation, "size")]
)
def test_images_that_are_no_squares_are_refused(make, option):
    run = make(processor={option: {"height": 64, "width": 128}})
    with pytest.raises(UserError, match=rf"processor\.{option}=.*no square.*image_size"):
        run.build_processor()


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_upernet_reads_a_backbone_of_few_stages(stages):
    backbone = SwinConfig(embed_dim=8, depths=[1] * stages, num_heads=[1] * stages, window_size=2, image_size=32)
    config = segmenter_config(backbone, "few")
    config.hidden_size, config.num_labels = 8, 2
    model = UperNetForSemanticSegmentation(config).eval()
    assert model(pixel_values=torch.zeros(1, 3, 32, 32)).logits.shape == (1, 2, 32, 32)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("make", [classification, segmentation])
def test_weights_that_a_file_has_in_half_precision_are_loaded_in_full(make, kind, models, tmp_path):
    half = BY_NAME["swin-classifier"].base().to(getattr(torch, kind))
    half.save_pretrained(tmp_path)
    model = make(tmp_path, image_size=32).build_model(["a", "b", "c"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.eval()(pixel_values=torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("ignored", [255, 254, 65535])
def test_padding_is_ignored_and_grey(ignored):
    run = segmentation(
        image_size=16, augment={"scale": [1, 1], "crop": 48, "flip": False}, data={"ignore_index": ignored}
    )
    processor = run.build_processor()
    found = run.training_view(processor)(picture(16, 16), np.ones((16, 16), dtype=np.int64))
    assert sorted(found["labels"].unique().tolist()) == [1, ignored]
    assert (found["labels"] == 1).sum() <= 16 * 16
    padding = found["pixel_values"][:, found["labels"] == ignored]
    assert padding.abs().max() < 0.02  # the mean colour: zero once it is normalised


def test_ignored_pixels_stay_ignored_through_scaling_and_a_crop_without_any_label_is_tried_again():
    truth = np.full((64, 64), 255)
    truth[:16, :16] = 3
    view = segmentation(image_size=64, augment={"scale": [1, 1], "crop": 32}).training_view(
        segmentation(image_size=64).build_processor()
    )
    found = [set(view(picture(64, 64), truth)["labels"].unique().tolist()) for _ in range(20)]
    assert all(values <= {3, 255} for values in found)
    assert sum(3 in values for values in found) > 14  # a single try finds it in one of four


def test_evaluation_of_a_segmenter_keeps_the_aspect_ratio_and_the_truth_at_its_own_size():
    run = segmentation(image_size=24)
    processor = run.build_processor()
    truth = blocks(48, 72)
    found = run.evaluation_view(processor)(Image.fromarray(COLORS[truth]), truth)
    assert found["pixel_values"].shape == (3, 24, 36) and found["labels"].shape == (24, 36)
    assert torch.equal(found["truth"], torch.from_numpy(truth))
    seen = nearest_class(raw(found, processor), tolerance=3)
    pure = seen >= 0
    assert torch.equal(seen[pure], found["labels"][pure]) and pure.float().mean() > 0.4
    apart = run.evaluation_view(processor)(picture(49, 70), 3 * (blocks(49, 70, 7) > 1))
    assert set(apart["labels"].unique().tolist()) == {0, 3}  # no mixture at a border


def test_evaluation_of_a_segmenter_does_not_reduce_labels_twice():
    run = segmentation(image_size=24, data={"reduce_labels": True})
    assert run.build_processor().do_reduce_labels  # what the adapter's users will call does reduce
    truth = blocks(48, 72)  # as `Split` gives it: reduced already
    found = run.evaluation_view(run.build_processor())(Image.fromarray(COLORS[truth]), truth)
    assert found["truth"].unique().tolist() == found["labels"].unique().tolist() == [0, 1, 2, 3]


def test_a_batch_stacks_examples_but_not_truths_and_adds_what_the_forward_needs():
    examples = [{"pixel_values": torch.zeros(3, 4, 4), "truth": torch.zeros(i, i)} for i in (5, 6)]
    batch = stack_batch(examples, {"interpolate_pos_encoding": True})
    assert batch["pixel_values"].shape == (2, 3, 4, 4) and batch["interpolate_pos_encoding"] is True
    assert [truth.shape[0] for truth in batch["truth"]] == [5, 6]


def test_a_batch_of_images_of_several_sizes_is_refused_with_what_to_set():
    examples = [{"pixel_values": torch.zeros(3, 4, i)} for i in (5, 6)]
    with pytest.raises(UserError, match=r"training\.per_device_eval_batch_size=2: .*\(4, 5\), \(4, 6\)"):
        stack_batch(examples, {})


# --- processors ------------------------------------------------------------------------------------------------------


def test_a_processor_keeps_the_models_mean_and_takes_the_runs_size(models, tmp_path):
    for file in (models / "swin-classifier").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, **own).save_pretrained(
        tmp_path
    )
    classifier = classification(tmp_path).build_processor()
    assert side(classifier) == 32 and list(classifier.image_mean) == own["image_mean"]
    assert classifier(picture(), return_tensors="pt")["pixel_values"].shape[-2:] == (32, 32)
    larger = classification(tmp_path, image_size=64).build_processor()
    assert side(larger) == 64 and larger.size["shortest_edge"] == 80 and list(larger.image_std) == own["image_std"]
    segmenter = segmentation(tmp_path).build_processor()
    assert side(segmenter) == 32 and list(segmenter.image_mean) == own["image_mean"]
    assert segmenter(picture(40, 60), return_tensors="pt")["pixel_values"].shape[-2:] == (32, 48)


def test_processors_of_convnext_and_timm_take_the_runs_size(tmp_path):
    ConvNextConfig().save_pretrained(tmp_path / "convnext")
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(tmp_path / "convnext")
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 32, 32], "crop_pct": 0.8}
    TimmWrapperConfig(architecture="vit_tiny_patch16_224", pretrained_cfg=own).save_pretrained(tmp_path / "timm")
    for name, size, augment in itertools.product(("convnext", "timm"), (None, 64), (True, False)):
        run = classification(tmp_path / name, image_size=size, augment=augment)
        found = run.build_processor()
        for view in (run.training_view(found), run.evaluation_view(found)):
            assert view(picture(80, 100), 0)["pixel_values"].shape == (3, size or 32, size or 32)
    found = classification(tmp_path / "timm").build_processor()
    assert list(found.image_mean) == own["mean"]
    image, theirs = picture(80, 100), timm.data.create_transform(**own, interpolation="bicubic")
    assert (found(image, return_tensors="pt")["pixel_values"][0] - theirs(image)).abs().max() < 0.1


def test_a_model_without_processor_gets_the_values_of_imagenet(models):
    processor = classification(models / "vit-classifier", image_size=28).build_processor()
    assert list(processor.image_mean) == [0.485, 0.456, 0.406] and side(processor) == 28
    assert list(segmentation(models / "vit-classifier").build_processor().image_mean) == [0.485, 0.456, 0.406]


def test_a_broken_processor_is_no_missing_one(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{")
    for run in (classification(tmp_path), segmentation(tmp_path)):
        with pytest.raises(UserError, match=r"preprocessor_config\.json"):
            run.build_processor()


@pytest.mark.parametrize("make", [classification, segmentation])
def test_options_of_the_processor_win_and_unknown_ones_are_named_with_the_nearest(make):
    assert make(processor={"image_mean": [0.0, 0.0, 0.0]}).build_processor().image_mean == (0.0, 0.0, 0.0)
    with pytest.raises(UserError, match=r"processor\.image_maen: .*image_mean"):
        make(processor={"image_maen": [0.0, 0.0, 0.0]}).build_processor()


# --- models ----------------------------------------------------------------------------------------------------------


def names(count: int) -> list[str]:
    return [f"class {i}" for i in range(count)]


def forward(run: Task, model: Any, size: int = 32, count: int = 5, **extra: Any) -> Any:
    """Check a training step: the loss is a number, and the logits have the classes."""
    shape = (2, size, size) if run.label_kind == "label-map" else (2,)
    batch = {
        "pixel_values": torch.randn(2, 3, size, size),
        "labels": torch.arange(np.prod(shape)).reshape(shape) % count,
    }
    outputs = model.train()(**batch, **extra)
    outputs.loss.backward()
    assert torch.isfinite(outputs.loss) and outputs.logits.shape[1] == count
    return outputs


def test_a_swin_folder_becomes_a_upernet_with_its_weights_and_an_auxiliary_head(models):
    run = segmentation(models / "swin-classifier", model_options=SMALL)
    model = run.build_model(names(5))
    assert isinstance(model, UperNetForSemanticSegmentation) and model.auxiliary_head is not None
    assert model.backbone.out_features == ["stage1", "stage2", "stage3"]
    assert model.config.hidden_size == 8 and model.config.id2label == dict(enumerate(names(5)))
    forward(run, model)
    assert all(p.grad is not None for p in model.auxiliary_head.parameters())
    before, after = BY_NAME["swin-classifier"].base().state_dict(), model.backbone.state_dict()
    pretrained = [key for key in before if key.startswith(("swin.embeddings", "swin.encoder"))]
    assert len(pretrained) > 50 and all(torch.equal(before[key], after[key]) for key in pretrained)


def test_a_upernet_of_this_run_trains_on_a_batch_of_one(models):
    model = segmentation(models / "swin-classifier", model_options=SMALL).build_model(names(5))
    assert any(isinstance(module, SingleValueBatchNorm2d) for module in model.modules())
    loss = model.train()(pixel_values=torch.randn(1, 3, 32, 32), labels=torch.zeros(1, 32, 32, dtype=torch.long)).loss
    assert torch.isfinite(loss)


def test_a_deep_dinov2_becomes_a_upernet_at_four_evenly_spread_blocks(models):
    run = segmentation(models / "dinov2-deep", model_options=SMALL)
    model = run.build_model(names(5))
    assert model.backbone.out_features == ["stage2", "stage4", "stage6", "stage8"]
    forward(run, model, size=28)


@pytest.mark.parametrize("count", [3, 5])
def test_a_upernet_folder_keeps_its_weights_and_gets_a_head_for_other_classes(count, models):
    run = segmentation(models / "swin-upernet")
    model = run.build_model(names(count))
    forward(run, model, count=count)
    before, after = BY_NAME["swin-upernet"].base().state_dict(), model.state_dict()
    new = {key for key in before if before[key].shape != after[key].shape}
    changed = {key for key in before if key not in new and not torch.equal(before[key], after[key])}
    classifiers = {
        f"{head}.classifier.{kind}" for head in ("decode_head", "auxiliary_head") for kind in ("weight", "bias")
    }
    assert new == (classifiers if count == 5 else set())
    assert all("running_" in key or "num_batches" in key for key in changed)  # the training step above


@pytest.mark.parametrize("name", ["swin-classifier", "vit-classifier", "dinov2-classifier"])
@pytest.mark.parametrize("count", [3, 5])
def test_a_classifier_keeps_its_backbone_and_gets_a_head_for_other_classes(name, count, models):
    run = classification(models / name)
    model = run.build_model(names(count))
    forward(run, model, size=BY_NAME[name].size[0], count=count)
    before, after = BY_NAME[name].base().state_dict(), model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if not key.startswith("classifier"))
    assert (count == 3) is torch.equal(before["classifier.bias"], after["classifier.bias"])
    assert model.config.id2label == dict(enumerate(names(count)))


@pytest.mark.parametrize("size", [28, 42])
def test_a_vit_takes_images_of_another_size_than_it_was_made_for(size, models):
    run = classification(models / "vit-classifier", image_size=size)
    model, processor = run.build_model(names(5)), run.build_processor()
    extras = forward_extras(model, processor)
    assert extras == ({} if size == PLAIN["image_size"] else {"interpolate_pos_encoding": True})
    forward(run, model, size, **extras)
    if extras:
        with pytest.raises(ValueError, match="42"):
            forward(run, model, size)


def test_dinov2_and_swin_take_images_of_another_size_too(models):
    for name, size in (("dinov2-classifier", 42), ("swin-classifier", 48)):
        run = classification(models / name, image_size=size)
        model = run.build_model(names(5))
        forward(run, model, size, **forward_extras(model, run.build_processor()))


def without(models: Path, name: str, part: str, folder: Path) -> Path:
    """A copy of a model without the weights whose names hold `part`."""
    (folder / "config.json").write_text((models / name / "config.json").read_text())
    weights = load_file(models / name / "model.safetensors")
    kept = {key: value for key, value in weights.items() if part not in key}
    assert 0 < len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("make", "name", "part"),
    [
        (classification, "vit-classifier", "attention"),
        (classification, "dinov2-classifier", "embeddings.cls_token"),
        (segmentation, "swin-classifier", "layers.1"),
        (segmentation, "swin-upernet", "backbone"),
    ],
)
def test_a_checkpoint_without_weights_of_its_backbone_is_refused(make, name, part, models, tmp_path):
    folder = without(models, name, part, tmp_path)
    with pytest.raises(UserError, match="no weights") as error:
        make(folder).build_model(names(5))
    assert str(folder) in str(error.value) and part in str(error.value)


def test_options_that_would_throw_away_pretrained_weights_are_refused(models):
    for options in ({"intermediate_size": 48}, {"image_size": 56}):
        with pytest.raises(UserError, match="model_options"):
            classification(models / "vit-classifier", model_options=options).build_model(names(5))


def test_a_checkpoint_with_a_new_head_only_is_fine(models, tmp_path):
    run = classification(without(models, "vit-classifier", "classifier", tmp_path))
    forward(run, run.build_model(names(5)), size=28)


@pytest.mark.parametrize("name", ["vit-classifier"])
def test_a_model_that_is_no_segmenter_is_refused_with_those_that_are(name, models):
    with pytest.raises(UserError, match=f"{name}.*UperNet"):
        segmentation(models / name).build_model(names(5))


@pytest.mark.parametrize("make", [classification, segmentation])
def test_a_model_that_is_not_there_is_named(make, tmp_path):
    with pytest.raises(UserError, match="cannot be loaded") as error:
        make(tmp_path).build_model(names(5))
    assert str(tmp_path) in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "swin"}))
    with pytest.raises(UserError, match="cannot be loaded"):
        make(tmp_path).build_model(names(5))


def test_model_options_are_set_and_unknown_ones_named_with_the_nearest(models):
    options = {"hidden_dropout_prob": 0.25}
    assert (
        classification(models / "vit-classifier", model_options=options)
        .build_model(names(5))
        .config.hidden_dropout_prob
        == 0.25
    )
    for make, name, option, near in (
        (classification, "vit-classifier", "hidden_dropout_prop", "hidden_dropout_prob"),
        (segmentation, "swin-classifier", "auxiliary_chanels", "auxiliary_channels"),
        (segmentation, "swin-upernet", "auxiliary_loss_wieght", "auxiliary_loss_weight"),
    ):
        with pytest.raises(UserError, match=rf"model_options\.{option}: .*{near}"):
            make(models / name, model_options={option: 1}).build_model(names(5))


@pytest.mark.parametrize("name", ["swin-classifier", "swin-upernet"])
def test_the_loss_ignores_what_the_data_ignores(name, models):
    run = segmentation(models / name, data={"ignore_index": 77}, model_options=SMALL if "class" in name else {})
    model = run.build_model(names(5)).eval()
    labels = torch.full((1, 32, 32), 77)
    labels[0, 0] = 1
    pixels = torch.randn(1, 3, 32, 32)
    whole = model(pixel_values=pixels, labels=labels).loss
    logits = model(pixel_values=pixels).logits
    assert whole >= torch.nn.functional.cross_entropy(logits[:, :, :1], labels[:, :1]) > 0


# --- methods ---------------------------------------------------------------------------------------------------------

TRAINED = ["swin-classifier", "vit-classifier", "dinov2-classifier", "swin-upernet", "dinov2-upernet"]
COMMON = {
    "swin-classifier": {"classifier", "swin.layernorm"},
    "vit-classifier": {"classifier", "vit.layernorm"},
    "dinov2-classifier": {"classifier", "dinov2.layernorm"},
    "swin-upernet": {"decode_head", "auxiliary_head", "backbone.hidden_states_norms"},
    "dinov2-upernet": {"decode_head", "auxiliary_head", "backbone.layernorm"},
}


def trained(model: Any) -> set[str]:
    """Names of what is trained, as they are in the base model."""
    found = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for part in ("base_model.model.", ".modules_to_save.default", ".e3va_tail.default"):
        found = [name.replace(part, "") for name in found]
    return set(found)


def own(names: set[str]) -> set[str]:
    """What belongs to the method alone."""
    return {name for name in names if "e3va_highway" in name or "lora_" in name}


@pytest.mark.parametrize("name", TRAINED)
def test_three_methods_train_the_same_head_and_norms_and_each_its_own(name):
    found = {m: trained(adapt(BY_NAME[name].base(), {"name": m})) for m in ("e3va", "head-only", "lora", "full")}
    base = dict(BY_NAME[name].base().named_parameters())
    expected = {key for key in base if key.startswith(tuple(f"{part}." for part in COMMON[name]))}
    assert found["head-only"] == expected
    for method, mark in (("e3va", "e3va_highway"), ("lora", "lora_")):
        assert found[method] - own(found[method]) == expected
        assert own(found[method]) and all(mark in key for key in own(found[method]))
    assert found["full"] == set(base)


def test_lora_is_on_queries_and_values_of_every_block_and_takes_options():
    parts = {
        name.split(".lora_")[0] for name in own(trained(adapt(BY_NAME["vit-classifier"].base(), {"name": "lora"})))
    }
    assert parts == {f"vit.layers.{i}.attention.{p}_proj" for i in range(PLAIN["num_hidden_layers"]) for p in "qv"}
    model = adapt(BY_NAME["vit-classifier"].base(), {"name": "lora", "r": 3, "target_modules": ["fc1"]})
    ranks = {p.shape[0] for n, p in model.named_parameters() if "lora_A" in n}
    assert ranks == {3} and all("fc1" in name for name in own(trained(model)))


@pytest.mark.parametrize(
    "method", [{"name": "e3va", "r": 0}, {"name": "lora", "target_modules": ["nothing"]}, {"name": "lora", "r": -1}]
)
def test_an_option_that_cannot_work_names_the_method(method):
    with pytest.raises(UserError, match=f"method={method['name']}: "):
        adapt(BY_NAME["vit-classifier"].base(), method)


@pytest.mark.parametrize("method", ["e3va", "lora", "head-only"])
def test_a_model_without_a_known_backbone_is_refused(method):
    with pytest.raises(UserError, match="backbone"):
        adapt(torch.nn.Sequential(torch.nn.Linear(2, 2)), {"name": method})


# Dropout inside the exit: ViT's whole model, DINOv2's encoder (drop-path), Swin's encoder (drop-path of `upernet`)
@pytest.mark.parametrize("name", ["vit-classifier", "dinov2-classifier", "dinov2-upernet"])
def test_the_backbone_of_head_only_runs_as_in_inference_while_it_trains(name):
    case = BY_NAME[name]
    assert_forwards_differ(adapt(case.base(), {"name": "full"}), case, True)
    assert_forwards_differ(adapt(case.base(), {"name": "head-only"}), case, False)
    assert_forwards_differ(adapt(case.base(), {"name": "e3va"}), case, False)


def test_the_embeddings_of_head_only_run_as_in_inference_while_it_trains():
    case = BY_NAME["swin-classifier"]
    assert_forwards_differ(adapt(case.base(), {"name": "e3va"}), case, False)
    assert_forwards_differ(adapt(case.base(), {"name": "head-only"}), case, False)


def assert_forwards_differ(model: Any, case: Any, differ: bool) -> None:
    batch = case.batch()
    model.train()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model(**batch).logits) is not differ


# --- scores ----------------------------------------------------------------------------------------------------------


def said(logits: torch.Tensor) -> Any:
    """What a model says, its logits alone."""
    return SimpleNamespace(logits=logits)


def test_scores_of_a_segmenter_are_those_of_the_metric_on_the_same_predictions():
    run, count = segmentation(), 4
    evidence, predictions, truths = None, [], []
    for i, size in enumerate([(20, 30), (33, 17), (8, 8)]):
        logits = torch.randn(1, count, 8, 8, generator=torch.Generator().manual_seed(i))
        truth = torch.randint(
            0, count - 1, size, generator=torch.Generator().manual_seed(i + 9)
        )  # a class never occurs
        truth[:3] = 255
        evidence = run.add(evidence, run.evidence(said(logits), {"truth": [truth]}, None))
        upsampled = torch.nn.functional.interpolate(logits, size=size, mode="bilinear")
        predictions.append(upsampled.argmax(1)[0].numpy())
        truths.append(truth.numpy())
    ours = run.scores(evidence, count)
    theirs = MeanIoU(count, keep_in_memory=True).compute(predictions=predictions, references=truths)
    assert theirs is not None and ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], err_msg=name)
    assert 0 < ours["mean_iou"] < 1 and np.isnan(ours["per_class_accuracy"][-1])


def test_a_batch_of_several_images_counts_as_each_alone():
    run = segmentation(data={"ignore_index": 9})
    logits = torch.randn(2, 3, 8, 8)
    truths = [torch.randint(0, 3, (8, 8)), torch.randint(0, 3, (16, 12))]
    truths[1][0] = 9
    together = run.evidence(said(logits), {"truth": truths}, None)
    alone = [run.evidence(said(logits[i : i + 1]), {"truth": truths[i : i + 1]}, None)[0] for i in (0, 1)]
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))
    assert [counts.sum().item() for counts in together] == [64, 15 * 12]


def test_what_is_held_of_a_segmenters_evaluation_does_not_grow_with_its_images():
    run, evidence, held = segmentation(), None, []
    for _ in range(5):
        logits, truths = torch.randn(2, 3, 8, 8), [torch.randint(0, 3, (8, 8))] * 2
        evidence = run.add(evidence, run.evidence(said(logits), {"truth": truths}, None))
        held.append(len(pickle.dumps(evidence)))
    assert len(set(held)) == 1 and evidence.shape == (3, 3) and evidence.sum() == 5 * 2 * 64


def test_scores_of_a_classifier_are_its_accuracies():
    run = classification()
    logits, labels = torch.randn(40, 7).half(), torch.randint(0, 7, (40,))
    evidence = None
    for part in (slice(0, 30), slice(30, 40)):
        evidence = run.add(evidence, run.evidence(said(logits[part]), {"labels": labels[part]}, None))
    assert len(pickle.dumps(evidence[0])) < 500  # what a process sends of an image has nothing of the others in it
    assert run.scores(evidence, 7) == accuracy_scores(logits.float(), labels)


def test_the_main_metric_is_among_the_scores():
    assert segmentation().main_metric in segmentation().scores(torch.eye(2), 2)
    assert classification().main_metric in classification().scores([(np.zeros(2), 0)], 2)
