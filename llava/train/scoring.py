"""Detector and records to predictions, the same way during training, after it and for a split on its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from llava.core.input_specs import FramesSpec, Input
from llava.core.score_map import Calibration
from llava.core.terminal import progress
from llava.core.types import FAKE, REAL, Content, InputSpec, Record
from llava.data.dataset import Degradation, DetectionDataset, collate, input_tensors, wants_of
from llava.data.sources import Source
from llava.data.splits import refuse_groups
from llava.detectors.base import Detector
from llava.evaluation.calibration import CalibrationConfig, fit_calibration, groups_of, needed_groups
from llava.evaluation.metrics import detection_report
from llava.evaluation.predictions import Predictions, from_records, read_csv, write_csv
from llava.evaluation.reliability import calibration_report, share_of_fakes
from llava.ops.degrade import VERSIONS, Change
from llava.train.recipe import Best, CollapseConfig, PhaseData

log = logging.getLogger(__name__)
RESAMPLES_WHILE_TRAINING = 200
# The best weights have the highest video AUC (or macro F1); this small share of the loss decides between equal ones.
# One pair of 100 + 100 videos in another order changes the AUC by 1e-4.
LOSS_IN_MERIT = 1e-5
CLASS_RECALL = "class_recall_"  # what the recall of a class begins with, of a detector with more than two
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
    inputs: Mapping[str, Input] | None = None,
) -> Predictions:
    """Give p_fake and class scores of every record, averaged over the views that the detector declares, in fp32.

    degrade: changes each image first, random only through (seed, index). inputs: how images are prepared, by the names
    of the detector's inputs; None = as it declares. Records that lack an input, or cannot be decoded, are left out with
    a warning; raises ValueError when all do, or when the detector gives no number.
    """
    detector.require_fitted()
    answer = partial(answers_of, detector)
    run = (device, batch_size, workers, answer, degrade, seed, inputs)
    kept, (p_fake, scores) = answers_over(detector, source, records, *run)
    require_numbers(p_fake, kept)
    return predictions_of(detector, kept, p_fake.numpy(), scores.numpy())


def kept_scores(path: Path, records: Sequence[Record], make: Callable[[], Predictions]) -> Predictions:
    """Read what these records scored before, or make the scores and keep them; `path` says what they depend on."""
    if path.is_file():
        found = read_csv(path)
        if [prediction.id for prediction in found] == [record.id for record in records]:
            return found
    made = make()
    write_csv(path, made)
    return made


def changed(
    change: Change, image: np.ndarray, mask: np.ndarray | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Change an image that is scored; nobody reads its mask."""
    return change(image, rng), mask


def with_versions(predictions: Predictions, score_degraded: Callable[..., Predictions]) -> Predictions:
    """Add the scores of the same images as they may be delivered: saved again, in another size, cropped.

    score_degraded: `score` of everything but `degrade`. A version has the group of its image, and a name of its own.
    """
    items = list(predictions)
    for name, change in progress(list(VERSIONS.items()), "delivered versions"):
        scored = score_degraded(degrade=partial(changed, change))
        items += [replace(p, id=f"{p.id} ({name})", video=f"{p.video} ({name})") for p in scored]
    return Predictions(tuple(items))


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
    inputs: Mapping[str, Input] | None = None,
) -> tuple[list[Record], tuple[Tensor, ...]]:
    """Ask a detector in eval mode about records: those that it could be asked, and what `answer` gives, put together.

    answer: tensors (B, ...) of inputs (B, V, ...). degrade, seed, inputs: as for `score`.
    """
    dataset = DetectionDataset(
        source,
        records,
        inputs or detector.inputs,
        degrade,
        seed,
        with_views=True,
        lacking=detector.lacking,
        with_reasons=True,
    )
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate)
    answers, reasons = [], []
    with evaluating(detector, device):
        for batch in loader:
            whole = torch.tensor([not why for why in batch["lacks"]])
            reasons += batch["lacks"]
            if whole.any():
                tensors = {name: batch[name][whole].to(device) for name in detector.inputs}
                answers.append([tensor.cpu() for tensor in answer(tensors)])
    kept = without_lacking(records, reasons, "scored")
    return kept, tuple(torch.cat(parts) for parts in zip(*answers, strict=True))


def usable_data(detector: Detector, data: PhaseData) -> PhaseData:
    """Leave out the records of each split that lack an input or cannot be decoded, with a warning, before any training.

    Each record is read once, of a detector that reads more than an image crop; for any other only a record of a video
    file, without looking for faces. Raises ValueError when none is left, or none of a class.
    """
    is_crop_only = all(isinstance(spec, InputSpec) for spec in detector.inputs.values())
    kept = []
    for use, records in (("trained on", data.train), ("validated on", data.val), ("tested on", data.test)):
        dataset = DetectionDataset(data.source, records, detector.inputs, lacking=detector.lacking)
        reasons = (
            map(data.source.why_unreadable, records) if is_crop_only else map(dataset.why_unusable, range(len(dataset)))
        )
        kept.append(without_lacking(records, list(reasons), use))
        gone = set(map(detector.target, records)) - set(map(detector.target, kept[-1]))
        if gone:
            raise ValueError(f"No record that can be {use} is {detector.classes[min(gone)]!r}; add some to that split.")
    return PhaseData(data.source, *kept)


def without_lacking(records: Sequence[Record], reasons: Sequence[str], use: str) -> list[Record]:
    """Give the records without a reason against them, and warn of the others. Raises ValueError when none is left."""
    lacking = [(record, why) for record, why in zip(records, reasons, strict=True) if why]
    if lacking:
        record, why = lacking[0]
        told = f"{len(lacking)} of {len(records)} records cannot be {use} (first: {record.id!r}: {why})"
        if len(lacking) == len(records):
            raise ValueError(f"{told}; give data that have what the detector reads.")
        log.warning("%s; they are left out", told)
    return [record for record, why in zip(records, reasons, strict=True) if not why]


def scored_records(records: Sequence[Record], predictions: Predictions) -> list[Record]:
    """Give the records that a score was made of, so that those that were left out are told of once."""
    scored = {prediction.id for prediction in predictions}
    return [record for record in records if record.id in scored]


def require_numbers(p_fake: Tensor, records: Sequence[Record]) -> None:
    """Refuse scores that are no numbers. Raises ValueError naming the first record."""
    wrong = [record.id for record, is_number in zip(records, p_fake.isfinite().tolist(), strict=True) if not is_number]
    if wrong:
        raise ValueError(
            f"The detector gives no number for {len(wrong)} of {len(records)} records (first: {wrong[0]!r}); its "
            "weights are broken, or it reads an input that is missing."
        )


def predictions_of(
    detector: Detector, records: Sequence[Record], p_fake: np.ndarray, scores: np.ndarray
) -> Predictions:
    """Put a detector's p_fake (N,) and class scores (N, K) beside the records that they are of."""
    return from_records(records, p_fake.tolist(), list(map(detector.target, records)), scores, detector.classes)


def probe_answers(detector: Detector, device: torch.device, seed: int = 0) -> dict[str, float]:
    """Give p_fake of plain colours and of noise, where a sound detector knows nothing.

    They are still: every frame is the same. They make no sound: a detector that cannot do without gives no answers.
    """
    side = max(_side(spec) for spec in detector.inputs.values())
    images = {name: np.full((side, side, 3), colour, np.uint8) for name, colour in PLAIN_COLOURS.items()}
    images["noise"] = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    wants = wants_of(detector.inputs)
    seconds = () if wants is None else wants.moments
    contents = [Content(image=image, frames=[image] * len(seconds), seconds=seconds) for image in images.values()]
    read, reasons = zip(*(input_tensors(each, detector.inputs, with_views=True) for each in contents), strict=True)
    if reasons[0] and detector.lacking(reasons[0]):
        return {}
    with evaluating(detector, device):
        scores, _ = answers_of(detector, {n: t.to(device) for n, t in collate(read).items()})
    return {name: round(p, 4) for name, p in zip(images, scores.tolist(), strict=True)}


def plain_text(answers: Mapping[str, float]) -> str:
    """Write what `probe_answers` gave."""
    return ", ".join(f"{name} {p:.2f}" for name, p in answers.items()) or "none, it needs sound"


class CollapseError(RuntimeError):
    """The detector gives one answer to everything."""


def check_collapse(
    metrics: Mapping[str, float], config: CollapseConfig, answers: Callable[[], Mapping[str, float]]
) -> None:
    """Raise CollapseError when a class is hardly ever recalled or p_fake hardly varies over validation.

    Real and fake are told apart at 0.5, the classes of a detector with more than two by the highest score.

    metrics: those of one evaluation. answers: gives p_fake of plain colours and noise, to be named beside it.
    """
    recalls = {label: metrics[f"eval_frame_recall_{label}"] for label in ("real", "fake")}
    beginning = f"eval_{CLASS_RECALL}"
    recalls |= {name.removeprefix(beginning): r for name, r in metrics.items() if name.startswith(beginning)}
    problems = [
        f"recall of {label} is {recall:.3f}, under {config.min_recall}"
        for label, recall in recalls.items()
        if recall < config.min_recall
    ]
    if metrics["eval_sd_p_fake"] < config.min_sd:
        problems.append(f"sd(p_fake) is {metrics['eval_sd_p_fake']:.4f}, under {config.min_sd}")
    if problems:
        raise CollapseError(
            f"The detector has collapsed: on validation, {' and '.join(problems)}. p_fake of plain images: "
            f"{plain_text(answers())}. Use --loss.class_balance sampling, another --optim.lr, or more "
            "--collapse.grace_epochs."
        )


def _side(spec: Input) -> int:
    """Give the least side of an image that an input can be made of."""
    image = spec.image if isinstance(spec, FramesSpec) else spec
    return image.shortest_edge if isinstance(image, InputSpec) else getattr(image, "size", 1)


def answers_of(detector: Detector, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Give p_fake (B,) and class scores (B, K), averaged over the views of inputs (B, V, ...)."""
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


def has_enough_groups(predictions: Predictions, config: CalibrationConfig) -> bool:
    """Say whether a calibration can be fitted on these predictions, with a warning when not."""
    needed = [max(needed_groups(coverage), config.folds) for coverage in config.coverages]
    counts = [groups_of(predictions, label) for label in (REAL, FAKE)]
    if all(count >= least for count, least in zip(counts, needed, strict=True)):
        return True
    log.warning(
        "not calibrated: coverages of %g and %g need %d real and %d fake validation groups, there are %d and %d",
        *config.coverages,
        *needed,
        *counts,
    )
    return False


def calibrate(
    detector: Detector, predictions: Predictions, config: CalibrationConfig, data: str, allow_leaks: bool = False
) -> Calibration:
    """Fit what a detector's scores mean on predictions of groups that it was not trained on.

    data: their name. allow_leaks: only warn of groups that it was. Raises LeakError, or ValueError with one class or
    too few groups.
    """
    refuse_groups(predictions.groups.tolist(), detector.trained_on, data, "trained on", allow_leaks)
    return fit_calibration(predictions, config, data, detector.fingerprint())


def flat_metrics(predictions: Predictions, threshold: float = 0.5, best: Best = "auc") -> dict[str, float]:
    """Give frame and video numbers with interval bounds as one level of names, sd(p_fake), log loss and merit.

    merit: what the best weights are chosen by, see `PhaseConfig.best`. Undefined numbers are left out, as the precision
    when nothing is called fake.
    """
    report = detection_report(predictions, threshold, RESAMPLES_WHILE_TRAINING)
    ends = {"value": "", "low": "_low", "high": "_high"}
    flat = {
        f"{level}_{name}{ends[end]}": numbers[end]
        for level in ("frame", "video")
        for name, numbers in report[level].items()
        for end in ends
        if numbers.get(end) is not None
    }
    if "multiclass" in report:
        frames = report["multiclass"]["frame"]["classes"]
        flat |= {f"{CLASS_RECALL}{name}": numbers["recall"]["value"] for name, numbers in frames.items()}
        flat["video_macro_f1"] = report["multiclass"]["video"]["macro_f1"]["value"]
        p_label = predictions.scores[np.arange(len(predictions)), predictions.targets]
    else:
        p_label = np.where(predictions.labels == 1, predictions.p_fake, 1 - predictions.p_fake)
    log_loss = float(-np.log(p_label.clip(1e-7)).mean())
    merit = flat[f"video_{best}"] - LOSS_IN_MERIT * log_loss
    return {**flat, "sd_p_fake": float(predictions.p_fake.std()), "log_loss": log_loss, "merit": merit}
