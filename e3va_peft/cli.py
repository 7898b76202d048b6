"""The command line: `e3va`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.callback()
def about() -> None:
    """Fine-tune large vision models on small GPUs: E3VA for PEFT.

    Start with [bold]e3va demo[/bold]: real weights, real MRI, a few minutes on a CPU.
    """


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for table, adapter and picture.")] = Path("e3va-demo"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training slices, for each method.")] = 6,
    seed: Annotated[int, typer.Option(help="Seed of head, highway and batch order.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results of an earlier run.")] = False,
) -> None:
    """Segment grey and white matter in MRI: E3VA beside head-only training and LoRA.

    Takes a pretrained ViT and MRI slices out of installed packages (no download), trains each method for the same
    number of epochs, and prints parameters, memory, time and mIoU. Then it saves the E3VA adapter, loads it in a fresh
    process and draws its predictions next to the truth.

    Example: [bold]e3va demo --epochs 9 --output my-run[/bold]
    """
    try:
        from e3va_peft.demo.run import run_demo

        run_demo(output, epochs=epochs, seed=seed, overwrite=overwrite)
    except (FileExistsError, ImportError, FileNotFoundError, ValueError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from None


@app.command()
def backbones() -> None:
    """List the backbones that E3VA adapts."""
    from rich.console import Console
    from rich.table import Table

    from e3va_peft import registered_backbones

    grid = Table("family", "adapted at", "what it is")
    for name, family in registered_backbones().items():
        grid.add_row(name, ", ".join(family.exit_classes), (type(family).__doc__ or "").strip().splitlines()[0])
    Console().print(grid)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
