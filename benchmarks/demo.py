"""Run `e3va demo` and record its table: `python benchmarks/demo.py OUTPUT`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from record import save

from e3va_peft.demo.run import run_demo

if __name__ == "__main__":
    torch.set_num_threads(2)
    save("demo", [asdict(result) for result in run_demo(Path(sys.argv[1]))])
