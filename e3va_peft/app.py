"""A page in the browser for trained adapters, here or as a Hugging Face Space: `e3va app`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from html import escape
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from platform import python_version_tuple
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from huggingface_hub import ModelCard, SpaceCardData, hf_hub_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's, or httpx2's
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import nn

from e3va_peft.cache.once import backbone_once
from e3va_peft.compare.report import MEMORY_PLOT, TABLE, TIME_PLOT
from e3va_peft.compare.run import RUNS
from e3va_peft.data.images import open_image
from e3va_peft.data.objects import Detections
from e3va_peft.errors import MissingExtra, UserError, read_text, reason
from e3va_peft.exits import layers_of
from e3va_peft.training.drawing import draw_objects, draw_regions, palette
from e3va_peft.training.folder import CURVES
from e3va_peft.training.predict import Trained, load_together, load_trained

if find_spec("gradio") is None:
    raise MissingExtra('e3va app needs gradio: pip install "e3va_peft[app]"', name="gradio")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

LOOPBACK = ("127.0.0.1", "localhost")
MAX_FILE = "50mb"
LEAST = 0.05  # score below which no object is kept
_SIDE = 1600  # pixels of the longer side of a drawing; it is drawn in full before
_NAMED = 8  # classes with a bar
_SHOWN_BY_BROWSERS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
_PINNED = ("e3va_peft[app]", "torch", "torchvision", "transformers", "peft", "gradio")  # of a Space
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
_HINT = "<p class='note'>Drop an image, and what is found in it appears here.</p>"
_STYLE = """
.gradio-container { max-width: 1320px !important; margin: auto; }
.found { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.found, .found tr, .found td { border: 0 !important; }
.found td { padding: 3px 0; vertical-align: middle; overflow-wrap: anywhere; }
.found td:last-child { text-align: right; white-space: nowrap; }
.found .bar { width: 45%; padding: 3px 12px; }
.found .bar div { height: 9px; border-radius: 5px; min-width: 2px; }
.note { color: var(--body-text-color-subdued); }
.refused { border-left: 4px solid #bd1f01; padding: 8px 12px; overflow-wrap: anywhere; }
.compared { max-width: calc(100vw - 4rem); }
.compared table { display: block; overflow-x: auto; border: 0 !important; }
.compared th, .compared td { white-space: nowrap; border-color: var(--border-color-primary) !important; }
"""


class Finder:
    """Results of models on images, with and without their adapters; those of the last few images are kept.

    Attributes:
        trained: The models.
        part: What can be switched off in all of them, `highway` or `adapter`; "" where that is nothing.
        find: `(path, off) -> image, what each model finds`: probabilities, a label map, or `Detections`.
    """

    def __init__(self, trained: Sequence[Trained]) -> None:
        self.trained = tuple(trained)
        layers = [[m for m in each.model.modules() if isinstance(m, BaseTunerLayer)] for each in self.trained]
        self.part = "" if not all(layers) else "highway" if layers_of(self.trained[0].model) else "adapter"
        self.find = lru_cache(maxsize=4)(self._find)  # the threshold moves without another run of the model

    def _find(self, path: str, off: bool) -> tuple[Image.Image, list[Any]]:
        image = open_image({"path": path}, Path(path).name)
        models = [each.model for each in self.trained]
        with backbone_once(*models) if len(models) > 1 else nullcontext():
            found = []
            for each in self.trained:
                with without_adapter(each.model) if off else nullcontext():
                    found.append(_found(each, image))
        return image, found


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Switch the adapter of a model off, and leave on what was trained and saved whole with it: its head.

    PEFT's `disable_adapter()` gives the base with its own head, which for new classes is a random one.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _found(trained: Trained, image: Image.Image) -> Any:
    if trained.task == "image-classification":
        return trained.probabilities(image).cpu().numpy()
    if trained.task == "semantic-segmentation":
        return trained.regions(image)
    return trained.detect(image, LEAST)


def show(trained: Trained, image: Image.Image, found: Any, threshold: float) -> tuple[Image.Image | None, str]:
    """Draw what was found in an image, and say it in HTML.

    Args:
        trained: The model.
        image: The image.
        found: See `Finder.find`.
        threshold: Score above which an object counts.

    Returns:
        The drawing, none for a classifier; and a table of classes with bars.
    """
    labels, colors = trained.labels, palette(len(trained.labels))
    if trained.task == "image-classification":
        best = np.argsort(-found, kind="stable")[:_NAMED]
        return None, _bars([(labels[i], f"{100 * found[i]:.1f} %", found[i], colors[0]) for i in best])
    if isinstance(found, Detections):
        kept = found.scores > threshold
        masks = None if found.masks is None else tuple(m for m, keep in zip(found.masks, kept, strict=True) if keep)
        found = Detections(found.boxes[kept], found.scores[kept], found.labels[kept], masks)
        drawn, counts = draw_objects(image, found, labels), np.bincount(found.labels, minlength=len(labels))
        words = [f"{count} found" for count in counts]
    else:
        drawn, counts = draw_regions(image, found, labels), np.bincount(found.ravel(), minlength=len(labels))
        words = [f"{100 * count / found.size:.1f} %" for count in counts]
    drawn.thumbnail((_SIDE, _SIDE))
    order = [i for i in np.argsort(-counts, kind="stable")[:_NAMED] if counts[i]]
    return drawn, _bars([(labels[i], words[i], counts[i] / counts.sum(), colors[i]) for i in order])


def _bars(lines: Sequence[tuple[str, str, float, Any]]) -> str:
    """A table in HTML: name, a bar of a share in a colour, and what it says."""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td class='bar'><div style='width:{100 * share:.1f}%;"
        f"background:#{bytes(color).hex()}'></div></td><td>{escape(text)}</td></tr>"
        for name, text, share, color in lines
    )
    return f"<table class='found'>{rows}</table>" if rows else "<p class='note'>Nothing above the threshold.</p>"


def page(trained: Sequence[Trained], sources: Sequence[str], note: str = "") -> gr.Blocks:
    """Build the page: an image to drop, what each model finds in it with and without its adapter, pictures of the run.

    Args:
        trained: Models of one base, as `load_together` returns them, or a single one.
        sources: Where they are from, for the pictures of their runs.
        note: What to say below the title.
    """
    finder, names = Finder(trained), [each.name for each in trained]
    names = names if len({*names}) == len(names) else list(sources)
    objects = any(each.task in ("object-detection", "instance-segmentation") for each in trained)
    explained = (
        f"The trained head stays on and reads the frozen backbone alone, as it never did in training: the difference "
        f"is what the {finder.part} adds."
    )
    pictures = _pictures(sources)
    with gr.Blocks(title=f"e3va: {', '.join(names)}", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.HTML(f"<h1>{escape(', '.join(names))}</h1><p class='note'>{escape(_about(trained))} {escape(note)}</p>")
        with gr.Tab("Try it") if pictures else nullcontext(), gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(
                    label="Image", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=320,
                    buttons=[],
                )  # fmt: skip
                threshold = gr.Slider(LEAST, 1, 0.5, step=0.05, label="Threshold of the score", visible=objects)
                off = gr.Checkbox(label=f"Beside it: the {finder.part} off", info=explained, visible=bool(finder.part))
            with gr.Column(scale=5, min_width=300):
                message = gr.HTML(_HINT)
                panels = [_panels(name, finder.part, each) for name, each in zip(names, trained, strict=True)]
        if pictures:
            with gr.Tab("The run" if len(sources) == 1 else "The runs"):
                _show_pictures(pictures)
        gr.on(
            [image.input, image.clear, threshold.change, off.change],
            partial(_answer, finder),
            [image, threshold, off],
            [message, image, *(piece for pieces in panels for piece in pieces)],
            preprocess=False,  # Gradio's opens the file, and fails in its own words; where it lies is checked before
            show_progress="minimal",
            trigger_mode="always_last",
            api_visibility="private",
        )
    return blocks


def _about(trained: Sequence[Trained]) -> str:
    """A sentence with the classes that models tell apart."""
    labels = list(dict.fromkeys(label for each in trained for label in each.labels))
    more = f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else ""
    return f"Tells apart {', '.join(labels[:_NAMED])}{more}."


def _panels(name: str, part: str, trained: Trained) -> list[Any]:
    """Add places for what a model finds with its adapter and, beside it, without: column, picture, words of each."""
    pieces: list[Any] = []
    with gr.Row():
        for title in (escape(name), f"{escape(name)}, <b>{part} off</b>"):
            with gr.Column(min_width=300, visible=False) as column:
                gr.HTML(f"<h3>{title}</h3>")
                drawn = trained.task != "image-classification"
                picture = gr.Image(
                    show_label=False, interactive=False, buttons=["download", "fullscreen"], visible=drawn,
                    alt_text=f"What {name} finds",
                )  # fmt: skip
                pieces += [column, picture, gr.HTML()]
    return pieces


def _answer(finder: Finder, file: Mapping[str, Any] | None, threshold: float, off: bool) -> list[Any]:
    """Return new values for message, image and panels."""
    path = None if file is None else file["path"]
    hidden = [gr.Column(visible=False), None, ""]
    if path is None:
        return [gr.HTML(_HINT, visible=True), gr.skip(), *(2 * len(finder.trained) * hidden)]
    try:
        ways = [finder.find(path, False), *([finder.find(path, True)] if off else [])]
        pieces: list[Any] = []
        for i, each in enumerate(finder.trained):
            for image, found in ways:
                pieces += [gr.Column(visible=True), *show(each, image, found[i], threshold)]
            pieces += hidden * (2 - len(ways))
    except UserError as error:
        said = escape(str(error).replace(path, Path(path).name))
        message = gr.HTML(f"<p class='refused' role='alert'>{said}</p>", visible=True)
        return [message, None, *(2 * len(finder.trained) * hidden)]
    preview = gr.skip() if Path(path).suffix.lower() in _SHOWN_BY_BROWSERS else ways[0][0]
    return [gr.HTML("", visible=False), preview, *pieces]


def _pictures(sources: Sequence[str]) -> list[tuple[str, list[Path]]]:
    """Find what shows how models were trained: the curves of their runs, and the comparisons that these are part of.

    Returns:
        Markdown, and the pictures that go below it.
    """
    runs = [Path(source).expanduser().resolve() for source in sources]
    curves = [run / CURVES for run in runs if (run / CURVES).is_file()]
    compared = [run.parent.parent for run in runs if run.is_dir() and run.parent.name == RUNS]
    folders = [folder for folder in dict.fromkeys(compared) if (folder / TABLE).is_file()]
    found = [("## Loss and metric over the steps", curves)] if curves else []
    for folder in folders:
        plots = [folder / plot for plot in (MEMORY_PLOT, TIME_PLOT) if (folder / plot).is_file()]
        found.append((f"## Comparison\n\n{read_text(folder / TABLE)}", plots))
    return found


def _show_pictures(pictures: Sequence[tuple[str, list[Path]]]) -> None:
    for words, files in pictures:
        gr.Markdown(words, elem_classes="compared")
        with gr.Row():
            for file in files:
                name = f"{file.parent.name}/{file.name}"
                with Image.open(file) as drawn, gr.Column(min_width=340):
                    pixels = drawn.convert("RGB")  # the page gets no path of the user's
                    gr.Image(pixels, alt_text=name, show_label=False, interactive=False, format="png", buttons=[])
                    gr.HTML(f"<p class='note'>{escape(name)}</p>")


class _StayHere:
    """Lets the browser send and fetch nothing but from and to the page's own address."""

    def __init__(self, app: Callable[..., Any]) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Pass a request on, and add the policy to its response."""

        async def sealed(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY)]
            await send(message)

        await self.app(scope, receive, sealed)


@contextmanager
def opened(
    sources: Sequence[str], host: str = LOOPBACK[0], port: int | None = None, browser: bool = False
) -> Iterator[gr.Blocks]:
    """Load models, and serve their page up to the end of the `with` statement; what was dropped is removed then.

    Args:
        sources: Runs or adapters, see `load_trained`; several must be of one base.
        host: Address to listen at. On loopback, other machines cannot reach it, other hosts' names are refused, and
            the browser may talk to nobody else.
        port: Port to listen at; by default the first from 7860 that is free.
        browser: Open it.

    Raises:
        UserError: Nothing that can be loaded is there, they are of several bases, or the address cannot be used.
    """
    trained = load_together(sources) if len(sources) > 1 else [load_trained(sources[0])]
    local = host in LOOPBACK
    note = "Images stay on this machine." if local else "Images are sent to the machine that serves this page."
    guards = [Middleware(_StayHere), Middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))] if local else []
    with TemporaryDirectory(prefix="e3va-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        blocks = page(trained, sources, note)
        try:
            blocks.launch(
                server_name=host, server_port=port, inbrowser=browser, prevent_thread_lock=True, quiet=True,
                share=False, inline=False, ssr_mode=False, mcp_server=False, pwa=False, run_history=False,
                enable_monitoring=False, footer_links=[], max_file_size=MAX_FILE, show_error=True, css=_STYLE,
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(
                    body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600"
                ),
                app_kwargs={"middleware": guards},
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"host={host!r}, port={port}: cannot be listened at ({error}). Choose others.") from None
        try:
            yield blocks
        finally:
            blocks.close(verbose=False)


def serve(sources: Sequence[str], host: str = LOOPBACK[0], port: int | None = None, browser: bool = False) -> None:
    """Serve the page of models until Ctrl-C. See `opened`."""
    with opened(sources, host, port, browser) as blocks:
        print(f"{blocks.local_url} (Ctrl-C ends it)", flush=True)
        blocks.block_thread()


def write_space(source: str, folder: Path) -> None:
    """Write a Hugging Face Space that serves the page of an adapter on the Hub: app file, requirements, card.

    Args:
        source: Hub id of the adapter.
        folder: Where to write; made where it is not there.

    Raises:
        FileExistsError: Files are in the folder.
        UserError: The adapter is not on the Hub, or the Hub cannot be reached.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"export={str(folder)!r}: is not empty. Choose another folder.")
    if Path(source).expanduser().exists():
        raise UserError(
            f"{source}: is on this machine, where a Space cannot read it. Push it first, `hf upload me/my-adapter "
            f"{source}` (of a run, its folder adapter), then export that id: e3va app me/my-adapter --export {folder}"
        )
    try:
        hf_hub_download(source, "adapter_config.json")
        card = ModelCard.load(hf_hub_download(source, "README.md"), ignore_metadata_errors=True)
    except (OSError, EntryNotFoundError, HFValidationError, HTTPError) as error:
        raise UserError(f"{source}: the Hub does not show an adapter with a card there: {reason(error)}") from None
    title = source.rpartition("/")[2]
    data = SpaceCardData(
        title=title, sdk="gradio", sdk_version=gr.__version__, python_version=".".join(python_version_tuple()[:2]),
        app_file="app.py", models=[source], license=card.data.license, tags=["e3va"],
    )  # fmt: skip
    text = f"Drop an image, see what [{source}](https://huggingface.co/{source}) finds in it, its highway on and off."
    files = {
        "app.py": f'from e3va_peft.app import serve\n\nserve([{source!r}], host="0.0.0.0")\n',
        "requirements.txt": "".join(
            f"{name}=={version(name.partition('[')[0]).partition('+')[0]}\n" for name in _PINNED
        ),
        "README.md": f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text}\n",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
