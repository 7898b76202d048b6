"""Runs survive what is done to them; `python -m tests.faults.inject` does it more often."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and signals")
def test_a_run_that_is_killed_or_whose_files_are_damaged_ends_as_one_that_is_left_alone():
    # in a process of its own: this one's threads would not survive a fork
    command = [sys.executable, "-m", "tests.faults.inject", "--count", "1", "--only", "kill", "--only", "checkpoint"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
