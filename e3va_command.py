"""`e3va`: `python -m e3va_peft`, whose help, recipes and errors of the command line do not wait for PyTorch.

This stands beside the package, because whatever is in it imports PyTorch and PEFT first, which takes seconds.
"""

import contextlib
import logging
import runpy
import signal
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path


def main() -> None:
    """Say help, versions or recipes, or run a command."""
    package = find_spec("e3va_peft")  # which imports nothing
    words = sys.argv[1:]
    light = not words or words[0] == "recipes" or {"--help", "--version"} & {*words}
    if package is not None and package.origin is not None:
        with contextlib.suppress(ModuleNotFoundError):  # the extra `train` is missing, as what is below says
            cli = runpy.run_path(
                str(Path(package.origin).with_name("cli.py")), run_name="__main__" if light else "e3va"
            )
            cli["check_words"](words)
    for name in ("torch.utils._pytree", "bitsandbytes"):  # what they warn of is nothing that a user could change
        logging.getLogger(name).setLevel(logging.ERROR)
    with _interrupts_end_it():
        from e3va_peft.__main__ import main as run

    run()


@contextlib.contextmanager
def _interrupts_end_it() -> Iterator[None]:
    """Let Ctrl-C end the process without a word, as in the middle of an import Python's traceback says nothing."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
