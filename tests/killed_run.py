"""A training that is killed after its first checkpoint and started again, beside one that runs through."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from forked import Forked, run

from llava.core.runtime import last_checkpoint

STAGE_1 = ["-m", "llava.train.stage_1"]


def whole_and_broken(whole: Sequence[str], broken: Sequence[str], output: Path) -> str:
    """Train by the words `whole`; then by `broken`, killed after a checkpoint in `output`, and again; gives its log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run([*STAGE_1, *whole], env=environment, check=True)
    process = Forked([*STAGE_1, *broken], env=environment)
    while process.poll() is None and last_checkpoint(output / "phases" / "0") is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was to be killed in the middle"
    again = run([*STAGE_1, *broken], env=environment, check=True)
    assert "going on from" in again.stderr
    return again.stderr
