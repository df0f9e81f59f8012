"""`batch_size: auto` and `workers: auto`: what memory and cores of this machine allow, kept when a run goes on."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from llava.core.runtime import pick_device, write_json
from llava.detectors.base import Detector, create
from llava.train.recipe import Fold, PhaseConfig, PhaseData, Recipe

log = logging.getLogger(__name__)
LADDER = (8, 16, 32, 64, 128)
MOST_WORKERS = 8
MEASURED = 2  # images whose activations are counted
SPARE = 0.7  # of the free memory that a step may take: libraries and the allocator want theirs
STATES = 4  # of each trained weight: itself, its gradient, and Adam's two averages
SIZES = "sizes.json"


def settled(
    recipe: Recipe, phases: Sequence[PhaseConfig], data: Sequence[PhaseData | Fold], folder: Path
) -> list[PhaseConfig]:
    """Give the phases with numbers in the place of `auto`; those of a run that goes on are as they were.

    Raises ValueError when not even the smallest batch fits into the memory.
    """
    record = folder / SIZES
    if record.is_file():
        known = json.loads(record.read_text(encoding="utf-8"))
    else:
        known = [
            _sizes(recipe, phase, len(next(iter(each.parts.values()))))
            for phase, each in zip(phases, data, strict=True)
        ]
        write_json(record, known)
    for phase, sizes in zip(phases, known, strict=True):
        log.info("phase %r: batch size %d, %d worker processes", phase.name, sizes["batch_size"], sizes["workers"])
    return [replace(phase, **sizes) for phase, sizes in zip(phases, known, strict=True)]


def _sizes(recipe: Recipe, phase: PhaseConfig, images: int) -> dict[str, int]:
    batch_size = phase.batch_size
    if batch_size == "auto":
        batch_size = fitting_batch(create(recipe.detector, recipe.model), images)
    workers = phase.workers
    if workers == "auto":
        workers = spare_cores(len(os.sched_getaffinity(0)), math.ceil(images / batch_size))
    return {"batch_size": batch_size, "workers": workers}


def spare_cores(cores: int, batches: int) -> int:
    """Give how many processes prepare images: all cores but that of the training, as far as they have a batch each."""
    return min(MOST_WORKERS, cores - 1, batches)


def fitting_batch(detector: Detector, images: int) -> int:
    """Give the largest batch size of the ladder whose step fits into the free memory, at most all `images`.

    Raises ValueError when not even the smallest fits.
    """
    device = pick_device("auto")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    states = sum(STATES * w.nbytes for w in detector.parameters() if w.requires_grad)
    image = activation_bytes(detector)
    fitting = [size for size in LADDER if size * image + states <= SPARE * free]
    if not fitting:
        raise ValueError(
            f"batch_size: auto finds no room for {LADDER[0]} images of {image / 1e6:.0f} MB beside "
            f"{states / 1e6:.0f} MB of weights in {free / 1e6:.0f} MB; give a --batch_size and --accumulation, or a "
            "smaller detector."
        )
    return max([size for size in fitting if size <= images], default=LADDER[0])


def activation_bytes(detector: Detector) -> int:
    """Count what one image leaves in memory for the backward pass of a step, in bytes, in float32."""
    kept: dict[int, int] = {}
    own = {tensor.data_ptr() for tensor in (*detector.parameters(), *detector.buffers())}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs: dict[str, Any] = {name: torch.zeros(MEASURED, *spec.shape) for name, spec in detector.inputs.items()}
    labels = torch.arange(MEASURED) % len(detector.classes)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = detector.train()(**inputs, labels=labels)  # holds all of it until it is counted
    assert output.loss is not None
    return sum(kept.values()) // MEASURED
