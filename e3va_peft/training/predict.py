"""Predictions of a trained adapter or model: on a labelled split (`e3va eval`), on images (`e3va predict`)."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftConfig, PeftModel
from PIL import Image
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from torch import nn
from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation, PreTrainedModel

from e3va_peft import detection
from e3va_peft.cache.once import backbone_once, have_same_backbone, hold_once
from e3va_peft.config import E3VAConfig
from e3va_peft.data.examples import Examples
from e3va_peft.data.formats import load_eval_split
from e3va_peft.data.images import IMAGE_SUFFIXES, is_picture, open_image, pictures_in
from e3va_peft.data.names import class_names
from e3va_peft.data.objects import Detections
from e3va_peft.detection import Detector
from e3va_peft.errors import UserError, reason, refuse_no_path, shown
from e3va_peft.exits import base_of, layers_of
from e3va_peft.files import write_whole
from e3va_peft.loading import from_safetensors, load_adapter, read_model_config, refuse_unbuildable
from e3va_peft.methods import INSERTED, METHODS, adapt
from e3va_peft.training.arguments import build_arguments
from e3va_peft.training.config import RunConfig
from e3va_peft.training.drawing import draw_objects, draw_regions, palette
from e3va_peft.training.folder import ADAPTER, CONFIG, MODEL, checkpoints, read_run, refuse_file, run_of
from e3va_peft.training.results import evaluated_on, plain, refuse_other_base, refuse_other_files
from e3va_peft.training.sheet import write_sheet
from e3va_peft.training.tasks import task_of
from e3va_peft.training.tasks.base import absent_weights, forward_extras, prepare
from e3va_peft.training.tasks.detection import detections
from e3va_peft.training.tasks.segmentation import label_maps
from e3va_peft.training.trainer import VisionTrainer, load_saved, refuse_other_weights

CLASSES, PREDICTIONS, SHEET = "classes.json", "predictions.json", "index.html"
_LOOKED_AT = 1000  # files of a folder that is not a run, to see whether it holds images: a home folder has many
_SMALL = 512  # pixels of the longer side of a classified image on the contact sheet
_TRAINABLE = ("ForImageClassification", "ForSemanticSegmentation", "ForUniversalSegmentation", "RCNN", "RetinaNet")
_OF_LABELS = {"do_reduce_labels", "ignore_index", "num_labels"}  # what an image processor does to label maps alone


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to predict.

    Attributes:
        model: In eval mode.
        processor: Its image processor.
        labels: Class names in the order of their ids.
        config: The run it comes from; None for an adapter or model by itself.
        name: What it was loaded from: the last part of its path or Hub id.
    """

    model: nn.Module
    processor: Any
    labels: tuple[str, ...]
    config: RunConfig | None
    name: str = ""

    @property
    def base(self) -> Any:
        """The transformers model inside PEFT's wrapper."""
        return base_of(self.model)

    @property
    def first_label(self) -> int:
        """The value in the user's own label maps of the first class: 1 where 0 means that a pixel does not count."""
        if self.config is not None:
            return int(self.config.data.reduce_labels)
        reduced = bool(getattr(self.processor, "do_reduce_labels", False))
        return int(getattr(self.base.config, "first_label", reduced))

    @property
    def task(self) -> str:
        """Name of the task that the model's head is for."""
        if isinstance(self.base, Detector):
            return "instance-segmentation" if getattr(self.base.config, "masks", False) else "object-detection"
        if isinstance(self.base, Mask2FormerForUniversalSegmentation):
            return str(getattr(self.base.config, "task", "instance-segmentation"))
        classifies = type(self.base).__name__.endswith("ForImageClassification")
        return "image-classification" if classifies else "semantic-segmentation"

    def outputs(self, image: Image.Image) -> Any:
        """Run the model on one image, RGB.

        Raises:
            UserError: The image processor cannot take it.
        """
        device = next(self.model.parameters()).device
        try:
            inputs = prepare(self.processor, image).to(device)
        except ValueError as error:  # as where one side of a sliver is resized to nothing
            raise UserError(f"an image of {image.width} x {image.height} pixels cannot be prepared: {error}") from None
        with torch.inference_mode():
            return self.model(**inputs, **forward_extras(self.base, self.processor))

    def probabilities(self, image: Image.Image) -> torch.Tensor:
        """Classify an image, RGB: the probability of each class, (K,), fp32."""
        return self.outputs(image).logits[0].float().softmax(0)

    def regions(self, image: Image.Image) -> np.ndarray:
        """Find the class of each pixel of an image, RGB: ids, (H, W)."""
        return label_maps(self.outputs(image), self.processor, [image.size[::-1]])[0].cpu().numpy()

    def detect(self, image: Image.Image, threshold: float = 0.5) -> Detections:
        """Find the objects of an image, RGB: what scores more than the threshold."""
        return detections(self.outputs(image), self.processor, [image.size[::-1]], threshold)[0]


def load_trained(source: str) -> Trained:
    """Load what a run trained, an E3VA adapter (folder or Hub id), or the folder of a whole model.

    Args:
        source: Folder that `e3va train` wrote, or folder or Hub id of an adapter.

    Raises:
        UserError: Nothing that can be loaded is there.
    """
    folder, config = _locate(source)
    try:
        model, processor = _load(folder, source, config)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source}: cannot be loaded: {error}") from error
    if processor is None:
        raise UserError(f"{source}: has no image processor (preprocessor_config.json). Save one beside the adapter.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Trained(model.to(device).eval(), processor, _class_names(base_of(model).config), config, _name_of(source))


def _locate(source: str) -> tuple[Path | None, RunConfig | None]:
    """Find what there is to load: its folder, None where it has to be on the Hub; and the run that it is of.

    Raises:
        UserError: Nothing that can be loaded is there.
    """
    refuse_no_path("run", source)
    folder = Path(source).expanduser()
    if (run := run_of(folder)) != folder:
        return folder, read_run(run)
    if (folder / CONFIG).is_file():
        config = read_run(folder)
        part = folder / (ADAPTER if METHODS[config.method_name].saves == "adapter" else MODEL)
        if not part.is_dir():
            newest = max(checkpoints(folder).items(), default=None)
            raise UserError(
                f"{source}: holds a run that is not finished. `e3va train` with its config resumes it."
                + ("" if newest is None else f" What it has learned so far is in {newest[1]}.")
            )
        return part, config
    if not folder.is_dir():
        return None, None
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        runs = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        images = not runs and any(is_picture(path.name) for path in islice(folder.rglob("*"), _LOOKED_AT))
        raise UserError(
            f"{source}: is not a run, adapter or model: neither config.yaml nor adapter_config.json is there."
            + (" It holds images; the run comes first, then the images." if images else "")
            + (f" It holds the runs {shown(runs)}; name one of them." if runs else "")
        )
    return folder, None


def _class_names(config: Any) -> tuple[str, ...]:
    return tuple(config.id2label[i] for i in sorted(config.id2label))


def _load(folder: Path | None, source: str, config: RunConfig | None) -> tuple[Any, Any]:
    method = None if config is None else METHODS[config.method_name]
    saves = "" if method is None else method.saves
    if folder is not None:
        refuse_other_files(folder)
    other = method is not None and saves == "adapter" and method.options is not E3VAConfig
    if folder is not None and config is not None and other:
        base = task_of(config).build_model(_class_names(read_model_config(folder / "config.json")))
        with warnings.catch_warnings():  # as `norm_tuning` does
            warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
            model = PeftModel(base, PeftConfig.from_pretrained(str(folder)))
        refuse_other_weights(model, folder)
        refuse_other_base(model, folder)
        model.load_adapter(str(folder), "default")
        return model, AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    if folder is None or (folder / "adapter_config.json").is_file():
        return load_adapter(source if folder is None else folder, dtype=torch.float32)  # that of prepared images
    architecture_config = read_model_config(folder / "config.json")
    names = architecture_config.architectures
    architecture = names[0] if isinstance(names, list) and names else names
    name = architecture if isinstance(architecture, str) and architecture.endswith(_TRAINABLE) else ""
    cls: Any = getattr(detection, name, None) or getattr(transformers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        raise UserError(f"{folder / 'config.json'}: names the architecture {architecture!r}, which is not known here.")
    refuse_unbuildable(folder / "config.json", architecture_config, cls)
    if config is not None and saves == "inserted":
        whole = adapt(cls(architecture_config), config.method)
        try:
            load_saved(whole, folder)
        except (RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{folder}: does not hold the weights of a model trained by method={config.method_name} "
                f"({reason(error)}). Restore the files that were saved together."
            ) from error
        return whole, AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    model = _whole(cls, folder, architecture_config)
    return model, AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)


def _whole(cls: Any, folder: Path, config: Any) -> Any:
    """Load a model of which every weight must be there."""
    model, report = from_safetensors(cls, folder, config=config)
    if any(f".{INSERTED}." in name for name in report["unexpected_keys"]):
        raise UserError(
            f"{folder}: holds modules that a method has put into the backbone, and the model by itself does not say "
            "which method. Name the folder of the run, in which `e3va train` has written its config.yaml."
        )
    absent = sorted(absent_weights(report))
    if absent:
        raise UserError(
            f"{folder}: has no weights for {len(absent)} parameters of the model, {absent[:3]} among them, or has "
            "them in other sizes: they would be random. Restore the files that were saved together."
        )
    return model


def evaluate(source: str, config: RunConfig | None = None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Score a trained model on the evaluation split of its run, or of another config.

    Args:
        source: See `load_trained`.
        config: Whose `data` and evaluation batch size to use; that of the run by default.

    Returns:
        Metrics by name, per-class ones as lists in the order of the labels, and the labels.

    Raises:
        UserError: There is nothing to evaluate on, or its classes are not the model's.
    """
    trained = load_trained(source)
    config = config or trained.config
    if config is None:
        raise UserError(f"{source}: is an adapter by itself and knows no data. Name a config: --data my.yaml.")
    if config.task != trained.task:
        raise UserError(f"task={config.task}: the model in {source} is for {trained.task}.")
    task = task_of(config)
    split = load_eval_split(config.data, task.label_kind, trained.labels)
    if split is None:
        raise UserError("data.eval_split: there is no split to evaluate on. Set it, or data.eval_fraction.")
    if trained.config is not None and config.data.eval_fraction is not None and _same_data(config, trained.config):
        _refuse_other_draw(Path(source).expanduser(), config, split.rows_fingerprint())
    labels = tuple(class_names(config.data, None) or split.labels)
    if labels != trained.labels:
        raise UserError(
            f"data.labels: the data has the classes {list(labels)[:10]}, the model {list(trained.labels)[:10]}. "
            "Give data.labels in the model's order."
        )
    with TemporaryDirectory() as nowhere:  # Trainer makes its output folder, and nothing is put out
        arguments = build_arguments(replace(config, output=nowhere), task, has_eval=True)
        arguments.load_best_model_at_end, arguments.report_to = False, []
        arguments.save_strategy = arguments.eval_strategy = "no"
        trainer = VisionTrainer(
            task,
            trained.processor,
            model=trained.model,
            args=arguments,
            eval_dataset=Examples(split, task.evaluation_view(trained.processor)),
            data_collator=task.collator(trained.base, trained.processor),
        )
        loss = trainer.evaluate()["eval_loss"]
    return {"loss": loss, **trainer.scores}, split.labels


def _same_data(config: RunConfig, other: RunConfig) -> bool:
    """Whether two runs draw what they set aside from the same images."""
    places = ("source", "images", "masks", "annotations", "train_split")
    return all(getattr(config.data, place) == getattr(other.data, place) for place in places)


def _refuse_other_draw(folder: Path, config: RunConfig, now: str) -> None:
    """Refuse images set aside that are not those of a run, or of its checkpoint: it may have learned some of them."""
    before = evaluated_on(folder)
    if before not in (None, now):
        raise UserError(
            f"data.eval_fraction={config.data.eval_fraction}: sets aside {now}, and when the model was trained, "
            f"{before}: images came, went or changed, and the model may have learned some that are now set aside. "
            "Restore the data of then, or name images that it has not seen: --data my.yaml with an eval_split."
        )


def predict(
    source: str, images: Sequence[str], output: Path, overwrite: bool = False, top: int = 5, threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Predict images and write what is found.

    Writes `predictions.json`, and `index.html`, a page with all pictures; for a segmenter `masks/` (one value per
    pixel, as in the label maps that it was trained on, with a palette), `classes.json` (value -> class) and
    `overlays/`; for a detector `overlays/` with boxes, masks and names; for a classifier small copies there.
    An image that is broken or cannot be prepared is named in its entry, and the others are predicted all the same.

    Args:
        source: See `load_trained`.
        images: Files and folders.
        output: Folder to write to.
        overwrite: Replace earlier predictions there.
        top: Classes to name per image, for a classifier.
        threshold: Score above which an object counts, for a detector.

    Returns:
        What is in `predictions.json`: one entry per image.

    Raises:
        FileExistsError: `output` holds predictions already, or other label maps.
        UserError: There are no images, or nothing that can be loaded.
    """
    files = _files(images, [output])
    _locate(source)  # what is there already is no matter to somebody who has named the wrong run
    _refuse_existing(output, overwrite)
    return _predict({output: load_trained(source)}, files, top, threshold)[output]


def predict_together(
    sources: Sequence[str],
    images: Sequence[str],
    output: Path,
    overwrite: bool = False,
    top: int = 5,
    threshold: float = 0.5,
) -> dict[Path, list[dict[str, Any]]]:
    """Predict images with several adapters of one base, for one run of the frozen backbone an image.

    Writes for each adapter what `predict` writes for it, into a folder of its name below the output. Adapters that
    read other taps than the first, or have other live blocks, run the backbone once more.

    Args:
        sources: Runs or adapters, see `load_trained`.
        images: See `predict`.
        output: Folder of the folders to write to.
        overwrite: See `predict`.
        top: See `predict`.
        threshold: See `predict`.

    Returns:
        Folder -> what is in its `predictions.json`, in the order of the sources.

    Raises:
        FileExistsError: One of the folders holds predictions already.
        UserError: See `predict`; or two sources have one name, one has no highway, or they have other frozen weights
            or image processors. Nothing has been written.
    """
    folders = _folders(sources, output)
    files = _files(images, folders)
    for source in sources:
        _locate(source)
    for folder in folders:
        _refuse_existing(folder, overwrite)
    trained = dict(zip(folders, load_together(sources), strict=True))
    with backbone_once(*(each.model for each in trained.values())):
        return _predict(trained, files, top, threshold)


def _folders(sources: Sequence[str], output: Path) -> list[Path]:
    """Return the folder of each source, by the last part of its path or Hub id."""
    folders: dict[Path, str] = {}
    for source in sources:
        folder = output / _name_of(source)
        if folder in folders:
            raise UserError(
                f"adapters: {source!r} has the name of {folders[folder]!r}, and both would write to {folder}. Give "
                "one of them another name, that of a link will do, or predict with each by itself."
            )
        folders[folder] = source
    return list(folders)


def _name_of(source: str) -> str:
    return os.path.basename(os.path.abspath(os.path.expanduser(source)))  # links keep their names


def load_together(sources: Sequence[str]) -> list[Trained]:
    """Load adapters of one base, whose frozen weights are held once.

    Args:
        sources: Runs or adapters, see `load_trained`.

    Raises:
        UserError: See `load_trained`; or one has no highway, or they have other frozen weights or image processors.
    """
    found: list[Trained] = []
    for source in sources:
        trained = load_trained(source)
        if not layers_of(trained.model):
            raise UserError(
                f"{source}: has no E3VA highway beside a frozen backbone, so it cannot share a run of one. Predict "
                "with it by itself, without --adapters."
            )
        first = found[0] if found else trained
        if not have_same_backbone(first.model, trained.model):
            raise UserError(
                f"{source}: was trained on other backbone weights than {sources[0]}, so no run of the backbone can "
                "serve both. Predict with it by itself, without --adapters."
            )
        left, right = first.processor.to_dict(), trained.processor.to_dict()
        fields = (left.keys() | right.keys()) - _OF_LABELS
        if other := sorted(field for field in fields if left.get(field) != right.get(field)):
            field = other[0]
            raise UserError(
                f"{source}: its image processor has {field}={right.get(field)!r}, that of {sources[0]} has "
                f"{left.get(field)!r}, so their backbones would see other images. Predict with it by itself, without "
                "--adapters."
            )
        if found:
            hold_once(first.model, trained.model)
        found.append(trained)
    return found


def _refuse_existing(output: Path, overwrite: bool) -> None:
    refuse_file(output)
    there = [name for name in (PREDICTIONS, "masks", "overlays", CLASSES, SHEET) if (output / name).exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"output={str(output)!r}: holds {', '.join(there)} already. Choose another folder, or --overwrite."
        )


def _predict(
    trained: Mapping[Path, Trained], files: Mapping[str, Path], top: int, threshold: float
) -> dict[Path, list[dict[str, Any]]]:
    """Predict files with models, each of which writes into its folder; return what each has found."""
    entries: dict[Path, list[dict[str, Any]]] = {output: [] for output in trained}
    for output, each in trained.items():
        output.mkdir(parents=True, exist_ok=True)
        _remove_drawings(output)
        if each.task == "semantic-segmentation":
            values = {each.first_label + i: label for i, label in enumerate(each.labels)}
            (output / CLASSES).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    try:
        for name, path in track(files.items(), "predicting", console=Console(stderr=True), transient=True):
            try:
                image = open_image({"path": str(path)}, str(path))
            except UserError as error:
                for own in entries.values():
                    own.append({"file": str(path), "error": str(error)})
                continue
            for output, each in trained.items():
                entries[output].append({"file": str(path), **_found(each, image, output, name, top, threshold)})
    finally:  # what was found up to here is kept, whatever ends it
        for output, own in ((output, own) for output, own in entries.items() if own):
            write_whole(output / PREDICTIONS, json.dumps(plain(own), indent=2) + "\n")
            write_sheet(output / SHEET, own, trained[output].labels, f"Predictions of {trained[output].name}")
    return entries


def _remove_drawings(output: Path) -> None:
    """Remove the label maps and drawings that earlier predictions in a folder name, and nothing else."""
    try:
        before = json.loads((output / PREDICTIONS).read_text(encoding="utf-8"))
        named = [entry[part] for entry in before for part in ("mask", "overlay") if isinstance(entry.get(part), str)]
    except (OSError, ValueError, AttributeError, TypeError):
        return
    for parts in (Path(name).parts for name in named if name.endswith(".png")):
        for begin, part in enumerate(parts):  # the folder may have moved, or may be seen from elsewhere
            path = output.joinpath(*parts[begin:])
            if part in ("masks", "overlays") and (output / part).resolve() in path.resolve().parents:
                path.unlink(missing_ok=True)


def _found(
    trained: Trained, image: Image.Image, output: Path, name: str, top: int, threshold: float
) -> dict[str, Any]:
    """Predict one image; write its drawings, and return what is found or why it cannot be prepared."""
    try:
        if trained.task == "image-classification":
            return _classes(trained, image, output, name, top)
        if trained.task == "semantic-segmentation":
            return _regions(trained, image, output, name)
        return _objects(trained, image, output, name, threshold)
    except UserError as error:
        return {"error": str(error)}


def _files(images: Sequence[str], outputs: Sequence[Path]) -> dict[str, Path]:
    """Find the images, but for what predictions drew; name each by its path below its folder, without suffix."""
    drawn = {(output / name).resolve() for output in outputs for name in ("masks", "overlays")}
    files: dict[str, Path] = {}
    twins: list[str] = []
    for given in images:
        path = Path(given).expanduser()
        if not path.exists():
            raise UserError(f"image={given!r}: no such file or folder (from {Path.cwd()}).")
        inside = [path]
        if path.is_dir():
            others = drawn - {path.resolve()}  # which may be just what is asked for
            inside = [file for file in pictures_in(path) if not any(map(file.resolve().is_relative_to, others))]
        for file in inside:
            name = (file.relative_to(path) if path.is_dir() else Path(file.name)).with_suffix("").as_posix()
            if (other := files.setdefault(name, file)) is not file:
                twins.append(f"{file} has the name of {other}")
    if twins:
        more = f"; and {len(twins) - 10} more" if len(twins) > 10 else ""
        raise UserError(f"images: {'; '.join(twins[:10])}{more}. Predict them into two folders, or rename them.")
    if not files:
        raise UserError(f"image={list(images)!r}: no images there ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    return files


def _classes(trained: Trained, image: Image.Image, output: Path, name: str, top: int) -> dict[str, Any]:
    """Classify an image; return its classes, and the file of a small copy for the contact sheet."""
    probabilities = trained.probabilities(image)
    scores, ids = probabilities.topk(min(top, len(probabilities)))
    found = [{"label": trained.labels[i], "score": s} for i, s in zip(ids.tolist(), scores.tolist(), strict=True)]
    small = image.copy()
    small.thumbnail((_SMALL, _SMALL))
    return {"overlay": _saved(small, output / "overlays" / f"{name}.png"), "predictions": found}


def _objects(trained: Trained, image: Image.Image, output: Path, name: str, threshold: float) -> dict[str, Any]:
    """Draw the objects that were found; return them and the drawing's file."""
    found = trained.detect(image, threshold)
    overlay = _saved(draw_objects(image, found, trained.labels), output / "overlays" / f"{name}.png")
    objects = [
        {"label": trained.labels[label], "score": score, "box": [round(value, 2) for value in box]}
        for label, score, box in zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    ]
    for entry, mask in zip(objects, found.masks or (), strict=False):
        entry["mask"] = {"size": list(mask["size"]), "counts": mask["counts"].decode("ascii")}
    below = None if objects else trained.detect(image, 0.0)  # of those, the best
    if below is None or not len(below):
        return {"overlay": overlay, "objects": objects}
    best = int(below.scores.argmax())
    return {
        "overlay": overlay,
        "objects": objects,
        "best_below": {"label": trained.labels[below.labels[best]], "score": float(below.scores[best])},
    }


def _regions(trained: Trained, image: Image.Image, output: Path, name: str) -> dict[str, Any]:
    """Write the label map and its overlay; return their files and the share of each class that is there."""
    ids = trained.regions(image)
    first = trained.first_label
    if first + len(trained.labels) <= 256:
        mask = Image.fromarray((ids + first).astype(np.uint8), mode="P")
        mask.putpalette([0] * 3 * first + palette(len(trained.labels)).ravel().tolist())
    else:
        mask = Image.fromarray((ids + first).astype(np.uint16))
    overlay = draw_regions(image, ids, trained.labels)
    shares = np.bincount(ids.ravel(), minlength=len(trained.labels)) / ids.size
    present = {label: float(share) for label, share in zip(trained.labels, shares, strict=True) if share}
    return {
        "mask": _saved(mask, output / "masks" / f"{name}.png"),
        "overlay": _saved(overlay, output / "overlays" / f"{name}.png"),
        "shares": present,
    }


def _saved(picture: Image.Image, file: Path) -> str:
    """Save a picture, and the folder for it; return the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)
    return str(file)
