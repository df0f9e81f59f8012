"""A training that is killed after its first checkpoint and started again, beside one that runs through."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llava.core.runtime import last_checkpoint

STAGE_1 = [sys.executable, "-m", "llava.train.stage_1"]


def whole_and_broken(whole: Sequence[str], broken: Sequence[str], output: Path) -> str:
    """Train by the words `whole`; then by `broken`, killed after a checkpoint in `output`, and again; gives its log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*STAGE_1, *whole], env=environment, check=True, capture_output=True)
    process = subprocess.Popen([*STAGE_1, *broken], env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and last_checkpoint(output / "phases" / "0") is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was to be killed in the middle"
    again = subprocess.run([*STAGE_1, *broken], env=environment, check=True, capture_output=True, text=True)
    assert "going on from" in again.stderr
    return again.stderr
