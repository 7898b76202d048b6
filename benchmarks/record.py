"""What every recorded benchmark says about itself: versions, machine, revision, command."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from e3va_peft.measure.report import machine
from e3va_peft.training.run import versions

RESULTS = Path(__file__).parent / "results"


def origin(*more: str) -> dict[str, Any]:
    """Return where a result comes from, the versions of `more` packages included."""
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent).stdout
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *(Path(a).name for a in sys.argv[1:])]),
        "revision": revision.strip(),
        "versions": versions(*more),
        "python": platform.python_version(),
        "machine": machine(),
    }


def save(name: str, rows: list[dict[str, Any]], *more: str) -> None:
    """Write `results/<name>.json` with the rows and where they come from, the versions of `more` packages included."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**origin(*more), "rows": rows}, indent=2) + "\n")
