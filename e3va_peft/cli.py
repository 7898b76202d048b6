"""The command line: `e3va`."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

_METHODS = (  # as text, because METHODS imports PEFT: --help waits for nothing
    "full", "head-only", "partial-1", "bitfit", "norm-tuning", "adapter", "adaptformer", "lorand", "mona", "lora",
    "lora-checkpointing", "e3va-plus", "e3va",
)  # fmt: skip

_UsageError: Any = typer.BadParameter.__mro__[1]  # click's own, which newer releases of typer bring with them
_EXAMPLE = re.compile(r"Examples?.*?(e3va .*?)(?:\[/bold\]|  #|$)", re.DOTALL | re.MULTILINE)

_WRAPPED = re.compile(r"(?<=\S)\n(?=\S)")  # a line break inside of a paragraph


class _Command(TyperCommand):
    """A command that answers a wrong call with a right one, the first example of its help."""

    def __init__(self, *args: Any, help: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, help=_WRAPPED.sub(" ", help or ""), **kwargs)  # as wide as the terminal is

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words behind the command."""
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            if example := _EXAMPLE.search(self.help or ""):
                error.message = f"{error.message or ''}\n\nFor example: {example[1]}".strip()
            raise


app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def _say_versions(asked: bool) -> None:
    if asked:
        found = [f"{name} {version(name)}" for name in ("e3va_peft", "torch", "transformers", "peft")]
        typer.echo(", ".join([*found, f"Python {platform.python_version()}"]))
        raise typer.Exit


def _import(names: list[str] | None) -> None:
    if names:
        sys.path.insert(0, os.getcwd())
    for name in names or ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            typer.secho(
                f"error: --import {name}: cannot be imported ({error}). Name a Python module of this folder, without "
                ".py, or one that is installed.",
                fg="red",
                err=True,
            )
            raise typer.Exit(1) from None


@app.callback()
def about(
    versions: Annotated[
        bool, typer.Option("--version", callback=_say_versions, is_eager=True, help="Say the versions, and end.")
    ] = False,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            callback=_import,
            help="Import a Python module first, which registers a backbone of yours. Repeat for more.",
            metavar="MODULE",
        ),
    ] = None,
) -> None:
    """Fine-tune large vision models on small GPUs: E3VA for PEFT.

    See it work: [bold]e3va demo[/bold], real weights and real MRI, a few minutes on a CPU.

    Will it fit? [bold]e3va plan[/bold] predicts the memory of each method on your card, and downloads no weights.

    Train on your own images: [bold]e3va train[/bold] takes a YAML file; [bold]e3va recipes[/bold] has some.

    What did it learn? [bold]e3va eval[/bold] scores it, [bold]e3va predict[/bold] draws what it sees.

    Which method? [bold]e3va compare[/bold] trains several on your images and tabulates score, memory and time.
    """


@contextmanager
def _errors_in_plain_words() -> Iterator[None]:
    """Print errors that a user can fix without a traceback; keep the libraries' loading reports out of it."""
    import warnings

    from transformers.utils import logging

    from e3va_peft.errors import UserError
    from e3va_peft.files import FULL_DISK
    from e3va_peft.training.run import Interrupted

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # checkpointed blocks inside of a checkpointed stage, whose first forward keeps nothing
    warnings.filterwarnings("ignore", "None of the inputs have requires_grad", module="torch.utils.checkpoint")

    try:
        yield
    except (UserError, FileExistsError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        typer.secho(f"error: {error.filename or 'output'}: the disk is full ({error}). Free some.", fg="red", err=True)
        raise typer.Exit(1) from None
    except Interrupted as stopped:
        typer.secho(str(stopped), fg="yellow", err=True)
        raise typer.Exit(128 + stopped.signal) from None  # as a shell reports a process that a signal ended


def _check_new_file(output: Path | None) -> None:
    """Refuse, before anything is computed, a file that exists or that has no folder to be in."""
    if output is not None and output.exists():
        raise FileExistsError(f"output={str(output)!r}: exists already. Choose another file.")
    if output is not None and not output.parent.is_dir():
        raise FileExistsError(f"output={str(output)!r}: there is no folder {str(output.parent)!r}. Make it first.")


Config = Annotated[str, typer.Argument(help="YAML file of the run, or the name of a recipe.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one field, e.g. training.num_train_epochs=3. Repeat for more.", metavar="K=V"),
]
Source = Annotated[
    str, typer.Argument(help="Folder of a run, or folder or Hub id of an E3VA adapter.", metavar="RUN_OR_ADAPTER")
]


@app.command(cls=_Command)
def train(
    config: Config,
    overrides: Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run, once this one is saved.")
    ] = False,
) -> None:
    """Fine-tune a model on your images: one YAML file, one command.

    Writes into the config's [bold]output[/bold]: the adapter (or, of methods that are none of PEFT's, the model) with
    its image processor, metrics.json, curves.png and the resolved config.yaml. Ctrl-C saves a checkpoint; the same
    command continues from it. A finished run is never overwritten unasked.

    [bold]A config[/bold]

        task: image-classification   # semantic-segmentation, object-detection,
                                     # instance-segmentation
        model: facebook/dinov2-base  # Hub id or folder
        data: {source: my-photos}    # train/CLASS/*.jpg and val/CLASS/*.jpg in
                                     # it; Hub id; parquet; objects: YOLO's
                                     # data.yaml, Pascal VOC, exported COCO
        method: e3va                 # or another that e3va compare has
        output: runs/first
        training: {num_train_epochs: 10}  # any of TrainingArguments

    [bold]Examples[/bold]

        e3va recipes dinov2-image-folder > my.yaml && e3va train my.yaml
        e3va recipes nuclei-cascade-mask-rcnn-swin > my.yaml  # objects
        e3va train my.yaml --set method=lora --set output=runs/lora
        e3va train my.yaml --set cache=true  # the backbone runs once
        e3va train my.yaml --set sweep.learning_rate=[1e-3,2e-3,4e-3]
        e3va train my.yaml --set training.bf16=true
        accelerate launch --num_processes 2 -m e3va_peft train my.yaml
    """
    with _errors_in_plain_words():
        from e3va_peft.training.config import read_config
        from e3va_peft.training.folder import protect_source
        from e3va_peft.training.run import train as run
        from e3va_peft.training.sweep import sweep

        read = read_config(config, overrides or ())
        protect_source(config, read, overwrite)
        (sweep if read.sweep else run)(read, overwrite=overwrite)


@app.command(cls=_Command)
def compare(
    config: Config,
    output: Annotated[Path, typer.Option(help="Folder for runs, table, JSON and plots.")],
    methods: Annotated[
        str | None,
        typer.Option(
            help="Some of them, separated by commas, with options behind colons if wanted (e3va:live_blocks=2); by "
            f"default all. Methods: {', '.join(_METHODS)}."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas: one run of every method for each.")] = "0",
    overrides: Overrides = None,
    rates: Annotated[
        list[str] | None,
        typer.Option("--learning-rate", help="Learning rate of one method. Repeat for more.", metavar="METHOD=RATE"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train runs again that are finished.")] = False,
) -> None:
    """Train methods side by side on your task: score, memory and time of each.

    All get the same head, data order and epochs, and are scored once, at the end. Then one training step of each is
    measured, interleaved. Writes compare.md, compare.json, metric-memory.png, metric-time.png, and every run under
    [bold]runs/[/bold]. The same command resumes after a stop; once all runs are finished, it measures again.

    Each method wants a learning rate of its own: the defaults are where a search begins. With cache=true, methods that
    leave the backbone as it is are trained from a cache of it, and all see the same augmented views.

    [bold]Examples[/bold]

        e3va compare my.yaml --output runs/compare
        e3va compare my.yaml --output runs/some --methods head-only,lora,e3va
        e3va compare my.yaml --output runs/seeds --seeds 0,1,2 --set cache.views=4
        e3va compare my.yaml --output runs/rates --learning-rate e3va=1e-3
        e3va compare my.yaml --output runs/ranks --methods lora:r=8,e3va,e3va:r=32
    """
    with _errors_in_plain_words():
        from e3va_peft.compare.run import compare as run
        from e3va_peft.compare.run import read_comparison

        run(read_comparison(config, output, methods, seeds, overrides or (), rates or ()), overwrite=overwrite)


@app.command("eval", cls=_Command)
def evaluate(
    source: Source,
    data: Annotated[
        str | None, typer.Option(help="Config whose data to use. By default that of the run.", metavar="CONFIG")
    ] = None,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the metrics to.")] = None,
) -> None:
    """Score a trained model on a labelled split.

    [bold]Examples[/bold]

        e3va eval runs/first
        e3va eval runs/first --set data.eval_split=test --output test.json
        e3va eval me/my-adapter --data my.yaml
    """
    with _errors_in_plain_words():
        from rich.console import Console

        from e3va_peft.errors import UserError
        from e3va_peft.training.config import read_config
        from e3va_peft.training.folder import CONFIG, run_of
        from e3va_peft.training.predict import evaluate as score
        from e3va_peft.training.results import plain
        from e3va_peft.training.scores import metrics_table

        _check_new_file(output)
        for override in overrides or ():
            if override.partition("=")[0].partition(".")[0].strip() not in ("data", "training"):
                raise UserError(
                    f"--set {override}: has no say in an evaluation, which takes from the trained model all but the "
                    "data and how it is loaded. Set fields of data, e.g. data.eval_split=test."
                )
        run = run_of(Path(source).expanduser())
        if data is None and not (run / CONFIG).is_file():
            if run.is_file():
                raise UserError(
                    f"{source}: is a file, not what it trained: e3va eval RUN, the folder of its `output`."
                )
            what = "is not the folder of a run" if run.is_dir() else f"no such folder (from {Path.cwd()})"
            raise UserError(f"{source}: {what}, and an adapter knows no data. Name a config: --data my.yaml.")
        scores, labels = score(source, read_config(data or run / CONFIG, overrides or ()))
        Console().print(metrics_table(scores, labels))
        if output is not None:
            output.write_text(json.dumps(plain(scores), indent=2) + "\n", encoding="utf-8")


@app.command(cls=_Command)
def predict(
    source: Source,
    images: Annotated[list[str], typer.Argument(help="Image files and folders.")],
    output: Annotated[Path, typer.Option(help="Folder for what is found.")] = Path("predictions"),
    top: Annotated[int, typer.Option(min=1, help="Classes to name per image, for a classifier.")] = 5,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Score above which an object counts, for a detector.")
    ] = 0.5,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            help="More runs or adapters of the same base, separated by commas: the backbone runs once an image for "
            "all, and each writes into a folder of its name. Repeat for folders with commas in their names.",
            metavar="RUN_OR_ADAPTER,...",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier predictions there.")] = False,
) -> None:
    """Predict images: classes, boxes, masks and scores as JSON; label maps and drawings as PNG.

    [bold]Examples[/bold]

        e3va predict runs/first photo.jpg more-photos/
        e3va predict me/my-adapter photos/ --output found
        e3va predict runs/detector photos/ --threshold 0.3
        e3va predict runs/first photos/ --adapters runs/second,runs/third
    """
    with _errors_in_plain_words():
        from rich.console import Console
        from rich.markup import escape

        from e3va_peft.training.predict import predict as run
        from e3va_peft.training.predict import predict_together

        options: dict[str, Any] = {"overwrite": overwrite, "top": top, "threshold": threshold}
        if adapters:
            found = predict_together([source, *_separated(adapters)], images, output, **options)
        else:
            found = {output: run(source, images, output, **options)}
        console = Console(soft_wrap=True)  # a path that is broken over two lines cannot be copied
        for folder, entries in found.items():
            for entry in entries[:20]:
                console.print(f"{escape(entry['file'])}: {_in_a_line(entry)}")
            places = f"{folder / 'predictions.json'}, and to look at: {folder / 'index.html'}"
            console.print(escape(f"{_images(len(entries))}: {places}"))
        broken = [entry for entry in next(iter(found.values())) if "error" in entry]
        if broken:
            typer.secho(f"error: {_images(len(broken))} could not be read: {broken[0]['error']}", fg="red", err=True)
            raise typer.Exit(1)


@app.command("app", cls=_Command)
def open_app(
    source: Source,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            help="More runs or adapters of the same base, separated by commas, to see beside it. Repeat for folders "
            "with commas in their names.",
            metavar="RUN_OR_ADAPTER,...",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at. By default this machine alone can reach the page.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen at. By default the first free from 7860 on.")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    export: Annotated[
        Path | None,
        typer.Option(help="Open nothing; write a Hugging Face Space for an adapter on the Hub into this new folder."),
    ] = None,
) -> None:
    """Open a page in the browser: drop an image, see what is found, with the adapter and without.

    Classes, masks or boxes with a threshold; several adapters of one base side by side; the curves of a run, and table
    and plots of the comparison that it is part of. No image leaves the machine. Needs the extra
    [bold]app[/bold], Gradio.

    [bold]Examples[/bold]

        e3va app runs/first
        e3va app runs/first --adapters runs/second,runs/third
        e3va app me/my-adapter --export my-space
    """
    with _errors_in_plain_words():
        from e3va_peft.app import serve, write_space
        from e3va_peft.errors import UserError

        more = _separated(adapters or [])
        if export is None:
            serve([source, *more], host, port, browser)
            return
        if more:
            raise UserError(f"adapters={','.join(more)}: a Space is written for one adapter. Leave --adapters out.")
        write_space(source, export)
        typer.echo(
            f"{export}: a Space for {source}. It installs e3va_peft from PyPI and runs once that is published there. "
            f"Put it on the Hub: hf upload me/my-space {export} --repo-type space"
        )


def _separated(texts: Sequence[str]) -> list[str]:
    """Names that are separated by commas; a path that is there is one name, with its commas."""
    parts = ([text] if os.path.exists(os.path.expanduser(text)) else text.split(",") for text in texts)
    return [name for each in parts for name in each if name]


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _in_a_line(entry: dict[str, Any]) -> str:
    """Findings in an image: its best classes, the shares of its regions, or why it was not read."""
    from rich.markup import escape

    if "error" in entry:
        return f"[red]{escape(entry['error'].removeprefix(entry['file'] + ': '))}[/red]"
    if "shares" in entry:
        return escape(", ".join(f"{name} {100 * share:.1f} %" for name, share in entry["shares"].items()))
    if "objects" in entry:
        counts = Counter(found["label"] for found in entry["objects"]).most_common()
        best = entry.get("best_below")
        if best is not None:
            return escape(f"nothing above the threshold; the best is {best['label']}, {best['score']:.2f}")
        return escape(", ".join(f"{count} {name}" for name, count in counts)) or "nothing"
    return escape(", ".join(f"{found['label']} {found['score']:.3f}" for found in entry["predictions"]))


@app.command(cls=_Command)
def export(source: Source, output: Annotated[Path, typer.Argument(help="File to write, e.g. model.onnx.")]) -> None:
    """Write a classifier, a segmenter or a RetinaNet as ONNX, compared with PyTorch by onnxruntime.

    It takes any number of images, a RetinaNet one, as the image processor prepares square ones. Detectors of two
    stages cannot be exported.

    Example: [bold]e3va export runs/first model.onnx[/bold]
    """
    with _errors_in_plain_words():
        from e3va_peft.training.export import export as run

        _check_new_file(output)
        typer.echo("exporting and comparing, about a minute", err=True)
        typer.echo(run(source, output))


PlanConfig = Annotated[
    str | None, typer.Argument(help="YAML file of a run, or the name of a recipe, for what the options leave open.")
]
Model = Annotated[
    str | None,
    typer.Option(help="swin-t/s/b/l, vit-s/b/l, dinov2-s/b/l, a Hub id (only its config is read) or a folder."),
]
Task = Annotated[str | None, typer.Option(help="Task of e3va train, by default image-classification.", metavar="NAME")]
Head = Annotated[str | None, typer.Option(help="Head for a backbone alone, e.g. faster-rcnn.", metavar="NAME")]
ImageSize = Annotated[
    int | None,
    typer.Option(
        help="Side of the images in pixels. By default the model's own; 512 of a segmenter, 800 of a detector.",
        metavar="PX",
    ),
]
BatchSize = Annotated[int | None, typer.Option(help="Images per step, by default 8, of a detector 2.", metavar="N")]
Precision = Annotated[
    str | None, typer.Option(help="fp32, fp16 or bf16. By default the best of the card.", metavar="NAME")
]
Labels = Annotated[
    int | None, typer.Option(help="Number of classes. By default 1000; of masks 150, of boxes 80.", metavar="K")
]
Memory = Annotated[str | None, typer.Option(help="Memory of the card, e.g. 8GiB, 11GB or 8192MiB.", metavar="SIZE")]
Card = Annotated[
    str | None, typer.Option(help="Name of the card, e.g. 'GTX 1080 Ti'. By default the one here.", metavar="NAME")
]


@app.command(cls=_Command)
def plan(
    config: PlanConfig = None,
    model: Model = None,
    task: Task = None,
    head: Head = None,
    image_size: ImageSize = None,
    batch_size: BatchSize = None,
    precision: Precision = None,
    labels: Labels = None,
    memory: Memory = None,
    gpu: Card = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the plan to.")] = None,
) -> None:
    """Predict whether a training step fits on your card, before anything is downloaded.

    For each method that e3va train has, and E3VA at some of its settings: parameters trained, peak memory and what it
    consists of, and the largest batch that fits; also how many blocks of the backbone can be live under E3VA. Nothing
    is allocated: the step runs on tensors without memory. [bold]needs[/bold] adds what is not a tensor, the CUDA
    context (0.6 GiB) and the allocator's gaps (5 %). With a card it also says which PyTorch still runs there.

    [bold]Examples[/bold]

        e3va plan my.yaml --gpu "GTX 1080 Ti"
        e3va plan --model swin-b --gpu "GTX 1080 Ti"
        e3va plan --model dinov2-l --memory 8GiB --precision fp16 --batch-size 16
        e3va plan --model swin-l --task semantic-segmentation --gpu "RTX 3060"
        e3va plan --model swin-l --task instance-segmentation --memory 12GiB
        e3va plan --model facebook/dinov2-base --memory 8GiB --output plan.json
    """
    with _errors_in_plain_words():
        from e3va_peft.errors import UserError
        from e3va_peft.plan.show import arguments_of, show_plan
        from e3va_peft.training.config import read_config

        _check_new_file(output)
        if config is None and model is None:
            raise UserError(
                "model: is missing. Name one, --model swin-b, or the YAML file of a run: e3va plan my.yaml."
            )
        own: dict[str, Any] = {"precision": None} if config is None else arguments_of(read_config(config))
        given = {
            "model": model,
            "task": task,
            "head": head,
            "image_size": image_size,
            "batch_size": batch_size,
            "num_labels": labels,
            "precision": precision,
        }
        given = {key: value for key, value in given.items() if value is not None}
        found = show_plan(gpu=gpu, memory=memory, **own | given)
        if output is not None:
            output.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")


@app.command(cls=_Command)
def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to print. Without it, the list.")] = None,
) -> None:
    """List configs to start from, or print one.

    Example: [bold]e3va recipes dinov2-image-folder > my.yaml[/bold]
    """
    from rich.console import Console
    from rich.table import Table

    folder = Path(__file__).with_name("recipes")  # nothing is imported, so that the list is there at once
    texts = {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.yaml"))}
    if name is None:
        grid = Table("recipe", "what it is")
        for each, text in texts.items():
            grid.add_row(each, text.splitlines()[0].removeprefix("# "))
        Console().print(grid)
    elif name in texts:
        typer.echo(texts[name], nl=False)
    else:
        with _errors_in_plain_words():
            from e3va_peft.training.config import recipe_text

            recipe_text(name)  # which says so


@app.command(cls=_Command)
def demo(
    output: Annotated[Path, typer.Option(help="Folder for table, adapter and picture.")] = Path("e3va-demo"),
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the training slices; E3VA+ has 2.5 times as many, rounded up.")
    ] = 6,
    seed: Annotated[int, typer.Option(help="Seed of head, highway and batch order.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results of an earlier run.")] = False,
) -> None:
    """Segment grey and white matter in MRI: E3VA+ beside head-only training and LoRA.

    Takes a pretrained ViT and MRI slices out of installed packages (no download), trains each method, E3VA+ from a
    cache for 2.5 times the epochs, and prints parameters, memory, time and mIoU. Then it saves the adapter of E3VA+,
    loads it in a fresh process and draws its predictions next to the truth.

    Example: [bold]e3va demo --epochs 9 --output my-run[/bold]
    """
    try:
        from e3va_peft.demo.run import run_demo

        run_demo(output, epochs=epochs, seed=seed, overwrite=overwrite)
    except (FileExistsError, ImportError, FileNotFoundError, ValueError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from None


@app.command(cls=_Command)
def backbones() -> None:
    """List the backbones that E3VA adapts."""
    from rich.console import Console
    from rich.table import Table

    from e3va_peft import registered_backbones

    grid = Table("family", "adapted at", "what it is")
    for name, family in registered_backbones().items():
        grid.add_row(name, ", ".join(exit.rpartition(".")[2] for exit in family.exits), family.about)
    Console().print(grid)


def check_words(words: Sequence[str]) -> None:
    """End with an error where words are no call of a command, before anything is imported."""
    if "--import" in words:  # which imports
        return
    command: Any = typer.main.get_command(app)
    for each in (command, *command.commands.values()):
        each.callback = None
    try:
        command.main(list(words), prog_name="e3va")
    except SystemExit as end:
        if end.code:
            raise


def main() -> None:
    """Run the command line."""
    app(prog_name="e3va")


if __name__ == "__main__":
    main()
