"""Detector and records to predictions, the same way during training, after it and for a split on its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from llava.core.score_map import Calibration
from llava.core.types import InputSpec, Record
from llava.data.dataset import Degradation, DetectionDataset, collate, view_tensors
from llava.data.sources import Source
from llava.detectors.base import Detector
from llava.evaluation.predictions import Predictions, from_records
from llava.evaluation.reliability import calibration_report, share_of_fakes

log = logging.getLogger(__name__)

PLAIN_COLOURS = {
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "white": (255, 255, 255),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
}


def score(
    detector: Detector,
    source: Source,
    records: Sequence[Record],
    device: torch.device,
    batch_size: int = 32,
    workers: int = 0,
    degrade: Degradation | None = None,
    seed: int = 0,
    inputs: Mapping[str, InputSpec] | None = None,
) -> Predictions:
    """Give p_fake and class scores of every record, averaged over the views that the detector declares, in fp32.

    degrade: changes each image first, random only through (seed, index). inputs: how images are prepared, by the names
    of the detector's inputs; None = as it declares.
    """
    detector.require_fitted()
    answer = partial(answers_of, detector)
    run = (device, batch_size, workers, answer, degrade, seed, inputs)
    kept, (p_fake, scores) = answers_over(detector, source, records, *run)
    return predictions_of(detector, kept, p_fake.numpy(), scores.numpy())


def answers_over(
    detector: Detector,
    source: Source,
    records: Sequence[Record],
    device: torch.device,
    batch_size: int,
    workers: int,
    answer: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
    degrade: Degradation | None = None,
    seed: int = 0,
    inputs: Mapping[str, InputSpec] | None = None,
) -> tuple[list[Record], tuple[Tensor, ...]]:
    """Ask a detector in eval mode about records: those that it could be asked, and what `answer` gives, put together.

    answer: tensors (B, ...) of inputs (B, V, ...). degrade, seed, inputs: as for `score`.
    """
    dataset = DetectionDataset(source, records, inputs or detector.inputs, degrade, seed, with_views=True)
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate)
    answers = []
    with evaluating(detector, device):
        for batch in loader:
            tensors = {name: batch[name].to(device) for name in detector.inputs}
            answers.append([tensor.cpu() for tensor in answer(tensors)])
    return list(records), tuple(torch.cat(parts) for parts in zip(*answers, strict=True))


def predictions_of(
    detector: Detector, records: Sequence[Record], p_fake: np.ndarray, scores: np.ndarray
) -> Predictions:
    """Put a detector's p_fake (N,) and class scores (N, K) beside the records that they are of."""
    return from_records(records, p_fake.tolist(), list(map(detector.target, records)), scores, detector.classes)


def probe_answers(detector: Detector, device: torch.device, seed: int = 0) -> dict[str, float]:
    """Give p_fake of plain colours and of noise, where a sound detector knows nothing."""
    side = max(spec.shortest_edge for spec in detector.inputs.values())
    images = {name: np.full((side, side, 3), colour, np.uint8) for name, colour in PLAIN_COLOURS.items()}
    images["noise"] = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    inputs = {
        name: torch.stack([view_tensors(image, spec) for image in images.values()]).to(device)
        for name, spec in detector.inputs.items()
    }
    with evaluating(detector, device):
        scores, _ = answers_of(detector, inputs)
    return {name: round(p, 4) for name, p in zip(images, scores.tolist(), strict=True)}


def answers_of(detector: Detector, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Give p_fake (B,) and class scores (B, K), averaged over the views of inputs (B, V, 3, S, S)."""
    logits = detector.over_views(inputs).logits
    assert logits is not None
    return detector.p_fake(logits), detector.class_scores(logits)


@contextmanager
def evaluating(detector: Detector, device: torch.device) -> Iterator[None]:
    """Put the detector on `device` in eval mode, without gradients; its mode is restored afterwards."""
    was_training = detector.training
    detector.to(device).eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        detector.train(was_training)


def measured(calibration: Calibration | None, test: Predictions | None, n_boot: int) -> dict[str, Any] | None:
    """Give the report of a calibration on test scores; None when either is missing."""
    if calibration is None or test is None:
        return None
    report = calibration_report(test, calibration, n_boot, prior=share_of_fakes(test))
    values = [report[side]["ece"] for side in ("before", "after")]
    shown = (f"{v['value']:.3f}" + ("" if v["low"] is None else f" [{v['low']:.3f}, {v['high']:.3f}]") for v in values)
    log.info("ECE on test: %s raw, %s after calibration by %s (%s)", *shown, report["method"], report["calibration"])
    return report
