"""Origin of every recorded benchmark: versions, machine, revision, command."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from e3va_peft.compare.report import machine
from e3va_peft.training.folder import write_whole
from e3va_peft.training.run import versions

RESULTS = Path(__file__).parent / "results"


def origin(*more: str) -> dict[str, Any]:
    """Return where a result comes from, the versions of `more` packages included."""
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *(Path(a).name for a in sys.argv[1:])]),
        "revision": revision(),
        "versions": versions(*more),
        "python": platform.python_version(),
        "machine": machine(),
    }


def revision() -> str:
    """Return the commit that is checked out; nothing without git."""
    if shutil.which("git") is None:
        return ""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return asked.stdout.strip()


def save(name: str, rows: list[dict[str, Any]], *more: str, folder: Path = RESULTS) -> None:
    """Write `<folder>/<name>.json` with the rows and where they come from, the versions of `more` included."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{name}.json", json.dumps({**origin(*more), "rows": rows}, indent=2) + "\n")
