"""`e3va plan`: a plan for a card, and the tables that it prints."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from e3va_peft.files import number_of_bytes
from e3va_peft.plan.boxes import OBJECTS
from e3va_peft.plan.estimate import MethodPlan, Plan, plan
from e3va_peft.plan.gpus import GIB, Card, Stack, find_card, software_stack, this_card
from e3va_peft.plan.reading import CachedImage
from e3va_peft.training.config import OBJECT_TASKS, RunConfig
from e3va_peft.training.tasks import task_of
from e3va_peft.training.tasks.base import side

_PARTS = ("weights", "grads", "AdamW", "activ.")  # of a peak


def show_plan(model: str, gpu: str | None, memory: str | None, precision: str | None, **options: Any) -> Plan:
    """Plan for a card, print the plan, and which software the card takes.

    Args:
        model: See `plan`.
        gpu: Name of the card. None: the one here, unless `memory` is given.
        memory: Size that counts instead of the card's.
        precision: None: the best of the card, else fp32.
        options: Further arguments of `plan`.
    """
    card = find_card(gpu) if gpu is not None else None if memory is not None else this_card()
    size = number_of_bytes("memory", memory) if memory is not None else card.memory if card is not None else None
    stack = software_stack(card.capability) if card is not None else None
    precision = precision or (stack.precision if stack is not None else "fp32")
    console = Console()
    if not console.is_terminal:
        Console(stderr=True).print("predicting a step of each method takes a minute or two")
    with console.status("building the model") as status:
        found = plan(
            model,
            precision=precision,
            memory=size,
            progress=lambda name: status.update(f"a step of {name}"),
            **options,
        )
    print_plan(found, console)
    if found.cached is not None:
        console.print(cache_text(found.cached), highlight=False)
    if card is not None and stack is not None:
        console.print(stack_text(card, stack), highlight=False)
    return found


def print_plan(plan: Plan, console: Console) -> None:
    """Print the table of a plan: in a file as wide as it is, in a terminal that is too narrow with fewer columns."""
    table = plan_table(plan)
    width = console.measure(table, options=console.options.update(max_width=1000)).maximum
    if width > console.width and console.is_terminal:
        table = plan_table(plan, brief=True)
    elif width > console.width:
        console.width = width
    console.print(table)


def arguments_of(config: RunConfig) -> dict[str, Any]:
    """Say what a run of `e3va train` decides of the arguments of `show_plan`; None where it leaves one open."""
    task, training, labels = task_of(config), config.training, config.data.labels
    size = (config.augment and config.augment.crop) or side(task.build_processor())
    if config.task in OBJECT_TASKS and config.augment is not None and not config.augment.crop:
        size = round(size * max(1, task.scale()[1]))  # no crop takes back what the scale has made larger
    return {
        "model": config.model,
        "task": config.task,
        "image_size": size,
        "batch_size": training.get(
            "per_device_train_batch_size", task.default_training["per_device_train_batch_size"]
        ),
        "precision": next((name for name in ("bf16", "fp16") if training.get(name)), "fp32"),
        "num_labels": len(labels) if isinstance(labels, list) else labels if isinstance(labels, int) else None,
        "change": task.apply_options,
        "head": config.head,
    }


def plan_table(plan: Plan, brief: bool = False) -> Table:
    """Lay out a plan, a row per method; sizes in GiB.

    Args:
        plan: The plan.
        brief: Leave out what is trained and what the peak consists of.
    """
    title = (
        f"{plan.model}, {plan.task}, {plan.image_size} px, batch {plan.batch_size}, {plan.precision}, "
        f"{plan.num_labels} classes"
    )
    if plan.memory is not None:
        title += f", on {plan.memory / GIB:.3g} GiB"
    caption = "in GiB: peak = weights + gradients + AdamW + activations\nneeds: with CUDA context and allocator"
    times = plan.times()
    if times:
        caption += "\ntime: an estimate, matmuls and convolutions of a step, head only = 1"
    if plan.task in OBJECT_TASKS:
        caption += f"\nan estimate from above: the most boxes that are sampled, {OBJECTS} objects an image"
    if plan.refused:
        caption += f"\ncannot adapt this model: {', '.join(plan.refused)}"
    table = Table(title=escape(title), caption=caption, title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    if not brief:
        table.add_column("trains", no_wrap=True)
    columns = ["trained, M", "peak", *([] if brief else _PARTS), "needs", *(["time"] if times else [])]
    if plan.memory is not None:
        columns += ["fits", "max batch"]
    for column in columns:
        table.add_column(column.replace(" ", "\n") if brief else column, justify="right", no_wrap=True)
    for row in plan.methods:
        table.add_row(row.method, *([] if brief else [row.trains]), *_cells(row, brief, times.get(row.method)))
    return table


def _cells(row: MethodPlan, brief: bool, time: float | None) -> list[str]:
    parts = [row.peak_parameters, row.peak_gradients, row.peak_optimizer, row.peak_activations]
    sizes = [row.peak_bytes, *([] if brief else parts), row.needed_bytes]
    cells = [f"{row.trainable_parameters / 1e6:.2f}", *(f"{size / GIB:.2f}" for size in sizes)]
    if time is not None:
        cells.append(f"{time:.2f}")
    if row.fits is not None:
        cells += ["[green]yes[/green]" if row.fits else "[red]no[/red]", str(row.largest_batch)]
    return cells


def cache_text(image: CachedImage) -> Text:
    """Say what an image takes in a cache, and whether reading it is faster than running the backbone here."""
    sizes = ", ".join(f"{size / 1e6:.2f} MB {storage}" for storage, size in image.bytes.items())
    runs, reads = image.seconds()
    verdict = "a cache pays from the second epoch on" if reads < runs else "a cache does not pay on this disk"
    return Text(
        f"cache: {sizes} an image and view; here the backbone takes about {1000 * runs:.0f} ms an image, reading int8 "
        f"{1000 * reads:.0f} ms: {verdict}."
    )


def stack_text(card: Card, stack: Stack) -> Text:
    """Say which software a card takes."""
    major, minor = card.capability
    lines = [
        f"{card.name}: {stack.architecture}, compute capability {major}.{minor}, {card.memory / GIB:.3g} GiB",
        f"PyTorch: {stack.torch}",
        f"  {stack.install}",
        f"Precision: {stack.precision}; {stack.why}.",
    ]
    if stack.installed is False:
        lines.append("The PyTorch that is installed here has no kernels for this card.")
    return Text("\n".join(lines))
