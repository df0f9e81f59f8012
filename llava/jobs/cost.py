"""What a detector costs: time of a face on one core, memory of a process."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from llava.core.types import Content
from llava.data.dataset import input_tensors
from llava.detectors.base import Detector
from llava.train.scoring import answers_of, evaluating

WARM_UP, TIMED = 5, 30


def milliseconds(detector: Detector) -> float:
    """Give the median time in which one core makes p_fake of one face crop, preparation included.

    The processor's time, so that others who use the core do not count.
    """
    crop = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    threads, spent = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        with evaluating(detector, torch.device("cpu")):
            for _ in range(WARM_UP + TIMED):
                start = time.process_time()
                tensors, _ = input_tensors(Content(image=crop), detector.inputs, with_views=True)
                answers_of(detector, {name: tensor[None] for name, tensor in tensors.items()})
                spent.append(1000 * (time.process_time() - start))
    finally:
        torch.set_num_threads(threads)
    return median(spent[WARM_UP:])


def peak_memory(command: Sequence[str]) -> float:
    """Run a command on one core and give its largest resident memory in MB. Raises ValueError when it fails."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    peak = 0.0
    while child.poll() is None:
        # Not ru_maxrss, which begins with what this process holds.
        status = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        peak = max([peak, *(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))])
        time.sleep(0.02)
    if child.returncode:
        raise ValueError(f"{' '.join(command)!r} ended with {child.returncode}; run it to see why.")
    return peak
