"""The benchmarks that are run elsewhere: a rehearsal here tells that they would run through."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_the_check_of_a_gpu_rehearses_on_the_cpu_and_says_so(tmp_path):
    selection = ["--settings=vit-b,voc-retinanet-swin-l", "--methods=e3va-int4,lora", "--precisions=fp32,fp16"]
    command = [sys.executable, GPU, "--quick", "--no-compile", *selection, f"--output={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    steps = [row for row in rows if row["kind"] == "step"]
    assert len(steps) == 8 and all(row["seconds"] > 0 for row in steps)
    assert all(row["broken"] == [] for row in rows if row["kind"] == "laws")
    assert rows[0]["quick"]
    if "CPU" in rows[0]["device"]:
        assert all(row["counted"] and row["allocated"] is row["reserved"] is None for row in steps)
    known = [row for row in steps if row["setting"] == "vit-b"]
    assert all(row["predicted"] for row in known)
    assert (tmp_path / "gpu.md").read_text() in done.stdout
