"""`m2f2 diagnose`: does a detector look at faces at all, and does it know every class that it can answer?

Four looks: what it says of plain colours and noise; of the data; of the data with shuffled pixels, which keep all
colours and no face; and of the data normalised in other ways, which finds weights that were trained with another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llava.core.config import setting
from llava.core.input_specs import FramesSpec, Input, NativeSpec
from llava.core.runtime import Incomplete, pick_device, write_json, write_run
from llava.core.terminal import aligned
from llava.core.types import NORMALISATIONS, InputSpec, Triple
from llava.detectors.base import Detector, load
from llava.detectors.published import ready_detector
from llava.evaluation.metrics import RankedScores, class_confusion
from llava.evaluation.predictions import Predictions
from llava.evaluation.statistics import Interval, group_bootstraps
from llava.train.evaluate import SplitConfig, split_to_score
from llava.train.scoring import plain_text, probe_answers, score, scored_records

EVERYTHING = 0.98  # an answer with this share is given to everything,
EXCUSED = 0.9  # unless so many of the records are of that class
FLAT = 0.02  # scores whose standard deviation is under this do not depend on the image


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(SplitConfig):
    """Which detector is examined, on which data."""

    model: str = setting(help="folder, name in checkpoints/ or hub id of a trained detector", positional=True)
    output_dir: str = setting("outputs/diagnosis", "folder of diagnosis.json")
    resamples: int = setting(1000, "bootstrap resamples behind each interval")


@dataclass(frozen=True, kw_only=True)
class Showing:
    """What a detector answered on one set of images: numbers (recall of each class first) with intervals."""

    recalls: dict[str, Interval]
    balanced_accuracy: Interval
    auc: Interval
    shares: dict[str, float]
    spread: float

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values."""
        return {
            "recalls": {name: interval.to_dict() for name, interval in self.recalls.items()},
            "balanced_accuracy": self.balanced_accuracy.to_dict(),
            "auc": self.auc.to_dict(),
            "shares_of_answers": self.shares,
            "spread": self.spread,
        }


def diagnose(config: DiagnoseConfig) -> Iterator[str]:
    """Yield what was found and, last, one sentence; also written as diagnosis.json.

    Raises Incomplete (exit code 1) for a detector that is not healthy, ValueError or FileNotFoundError.
    """
    folder = ready_detector(config.model)
    source, records = split_to_score(config, folder)
    detector, device = load(folder), pick_device(config.device)
    write_run(Path(config.output_dir), asdict(config), config.seed)
    options: dict[str, Any] = {"batch_size": config.batch_size, "workers": config.workers, "seed": config.seed}
    look = partial(showing, detector, n_boot=config.resamples, seed=config.seed)
    predictions = score(detector, source, records, device, **options)
    run = partial(score, detector, source, scored_records(records, predictions), device, **options)
    own, shuffled = look(predictions), look(run(degrade=_shuffled))
    others = {name: look(run(inputs=inputs)) for name, inputs in other_normalisations(detector).items()}
    truth = {name: float((predictions.targets == n).mean()) for n, name in enumerate(detector.classes)}
    problem = problem_of(own, truth, others)
    plain = probe_answers(detector, device, config.seed)
    report = {"verdict": problem or "healthy", "is_healthy": not problem, "images": len(predictions), "truth": truth}
    shown = {"as it is": own, "pixels shuffled": shuffled, **{f"normalised: {n}": each for n, each in others.items()}}
    write_json(
        Path(config.output_dir) / "diagnosis.json",
        {**report, "plain_images": plain, "looks": {name: each.to_dict() for name, each in shown.items()}},
    )
    yield from (f"{line}\n" for line in _lines(shown, truth, plain))
    sentence = f"{config.model}: {problem or 'healthy'} ({len(predictions)} images, split {config.split!r})"
    if problem:
        raise Incomplete(sentence)
    yield f"{sentence}\n"


def showing(detector: Detector, predictions: Predictions, n_boot: int, seed: int) -> Showing:
    """Measure the detector's answers: of two classes by its threshold, of more by the highest score."""
    scores, targets, classes = predictions.scores, predictions.targets, range(len(detector.classes))
    if len(detector.classes) == 2:
        fake = 1 - detector.classes.index("real")
        answers = np.where(predictions.p_fake >= detector.decision.threshold, fake, 1 - fake)
    else:
        answers = scores.argmax(axis=1)
    there = [n for n in classes if (targets == n).any()]
    ranked = [RankedScores((targets == n).astype(int), scores[:, n]) for n in there]

    def numbers(weights: np.ndarray) -> np.ndarray:
        recalls = class_confusion(targets, answers, len(classes), weights).recall[there]
        return np.array([*recalls, recalls.mean(), np.mean([each.curve(weights).auc() for each in ranked])])

    *recalls, accuracy, auc = group_bootstraps(predictions.groups, numbers, n_boot, seed)
    return Showing(
        recalls={detector.classes[n]: interval for n, interval in zip(there, recalls, strict=True)},
        balanced_accuracy=accuracy,
        auc=auc,
        shares={name: float((answers == n).mean()) for n, name in enumerate(detector.classes)},
        spread=float(scores.std(axis=0).max()),
    )


def problem_of(own: Showing, truth: Mapping[str, float], others: Mapping[str, Showing]) -> str:
    """Say in words what is wrong with a detector; empty when nothing is.

    own: on the data as they are; truth: share of each class there; others: on the data normalised in other ways.
    """
    better = max(others, key=lambda name: others[name].balanced_accuracy.value, default=None)
    is_better = better is not None and others[better].balanced_accuracy.low > own.balanced_accuracy.high
    hint = f"is more often right with another normalisation ({better}) than with its own" if is_better else ""
    return ", and ".join(part for part in (_sickness(own, truth), hint) if part)


def _sickness(own: Showing, truth: Mapping[str, float]) -> str:
    """Say what the answers alone show to be wrong."""
    if own.spread < FLAT:
        return "ignores the image"
    most = max(own.shares, key=lambda name: own.shares[name])
    if own.shares[most] >= EVERYTHING and truth[most] < EXCUSED:
        return f"answers {most.upper()} to everything"
    if own.auc.low <= 0.5:
        return "does not tell the classes apart"
    missed = [name for name, recall in own.recalls.items() if recall.high < 1 / len(truth)]
    return f"hardly ever answers {' or '.join(name.upper() for name in missed)}" if missed else ""


def other_normalisations(detector: Detector) -> dict[str, dict[str, Any]]:
    """Give the detector's inputs with each of NORMALISATIONS that none of them has; nothing where none is a picture."""
    pictures = [spec.image if isinstance(spec, FramesSpec) else spec for spec in detector.inputs.values()]
    own = [(spec.mean, spec.std) for spec in pictures if isinstance(spec, InputSpec | NativeSpec)]
    return {
        name: {key: _normalised(spec, mean, std) for key, spec in detector.inputs.items()}
        for name, (mean, std) in NORMALISATIONS.items()
        if own and (mean, std) not in own
    }


def _normalised(spec: Input, mean: Triple, std: Triple) -> Input:
    """Give an input with another normalisation; times and sound have none and stay as they are."""
    if isinstance(spec, FramesSpec):
        return replace(spec, image=replace(spec.image, mean=mean, std=std))
    return replace(spec, mean=mean, std=std) if isinstance(spec, InputSpec | NativeSpec) else spec


def _shuffled(
    image: np.ndarray, mask: np.ndarray | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Put the pixels of an image into another order; nobody reads the mask of an image that is scored."""
    return rng.permutation(image.reshape(-1, 3)).reshape(image.shape), mask


def _lines(shown: Mapping[str, Showing], truth: Mapping[str, float], plain: Mapping[str, float]) -> Iterator[str]:
    """Yield tables: classes and answers on the data as they are; then every look; then plain images."""
    own = shown["as it is"]
    rows = [["class", "share of records", "share of answers", "recall"]]
    for name, share in truth.items():
        recall = _text(own.recalls[name]) if name in own.recalls else "-"
        rows.append([name, f"{share:.3f}", f"{own.shares[name]:.3f}", recall])
    yield from aligned(rows)
    rows = [["look", "balanced accuracy", "AUC", "spread of scores"]]
    rows += [[name, _text(s.balanced_accuracy), _text(s.auc), f"{s.spread:.3f}"] for name, s in shown.items()]
    yield from aligned(rows)
    yield f"p_fake of plain images: {plain_text(plain)}"


def _text(interval: Interval) -> str:
    bounds = "" if np.isnan(interval.low) else f" [{interval.low:.3f}, {interval.high:.3f}]"
    return "-" if np.isnan(interval.value) else f"{interval.value:.3f}{bounds}"
