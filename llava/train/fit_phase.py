"""Phases of kind `fit`: parts of a detector, calibration among them, made on a fold that nothing was trained on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from llava.core.registry import nearest
from llava.core.runtime import pick_device
from llava.core.score_map import Calibration
from llava.core.types import FAKE, REAL, Decision, Record
from llava.data.splits import group_hashes, refuse_groups
from llava.detectors.base import Detector
from llava.detectors.fitted import CALIBRATION
from llava.detectors.members import read_trained_on
from llava.detectors.published import ready_detector
from llava.evaluation.calibration import CalibrationConfig, fit_calibration, groups_of, needed_groups
from llava.evaluation.metrics import choose_threshold
from llava.evaluation.predictions import Predictions
from llava.train.recipe import Fold, PhaseConfig, PhaseData, Recipe
from llava.train.scoring import answers_over, score

log = logging.getLogger(__name__)
FIT_FIRST = "add a phase `kind: fit` to the recipe (docs/training.md)."


def check_phases(
    detector: Detector, recipe: Recipe, data: Sequence[PhaseData | Fold], validation: Fold, test: Sequence[Record]
) -> None:
    """Refuse, before anything is trained, a fit that is missing or could not be trusted.

    data: of each phase; validation, test: by which the finished detector is calibrated and judged. Raises LeakError
    when a fold shares groups with what the detector's members, what it starts from or an earlier phase was trained on,
    or with the test split; ValueError for a part that there is not, and for one that is needed before it is fitted.
    """
    trained_on, tested_on = detector.trained_on, group_hashes(r.group for r in test)
    needed = {name for name, part in detector.fitted_parts().items() if not part.has_default}
    for phase, each in zip(recipe.phase_list(), data, strict=True):
        if phase.init_from:
            trained_on |= read_trained_on(ready_detector(phase.init_from))
            needed = set()  # whether it has them is seen when it is loaded
        if isinstance(each, Fold):
            needed -= set(part_names(detector, phase))
            each.refuse(trained_on, "trained on")
            each.refuse(tested_on, "tested on")
        elif needed:
            raise ValueError(f"Phase {phase.name!r} trains before {', '.join(sorted(needed))} is fitted; {FIT_FIRST}")
        else:
            trained_on |= group_hashes(r.group for r in each.train)
    if needed:
        raise ValueError(f"No phase fits {', '.join(sorted(needed))} of {detector.name!r}; {FIT_FIRST}")
    if not recipe.fits_calibration:
        validation.refuse(trained_on, "trained on")


def part_names(detector: Detector, phase: PhaseConfig) -> list[str]:
    """List the parts that a phase fits, in order. Raises ValueError for one that the detector has not."""
    known = list(detector.fitted_parts())
    wrong = sorted(set(phase.parts) - {*known, CALIBRATION})
    if wrong or not (phase.parts or known):
        problem = f"{wrong[0]!r} is no part of" if wrong else "nothing but its calibration can be fitted of"
        raise ValueError(
            f"parts: {problem} {detector.name!r}. {nearest(wrong[0] if wrong else '', [*known, CALIBRATION])}"
        )
    return [name for name in (*known, CALIBRATION) if name in (phase.parts or known)]


def fit_phase(detector: Detector, phase: PhaseConfig, fold: Fold, recipe: Recipe, folder: Path) -> None:
    """Fit the parts that a phase names, one after another, in place, and write the detector into `folder`.

    Raises LeakError when the detector was trained on groups of the fold.
    """
    fold.refuse(detector.trained_on, "trained on")
    device = pick_device()
    run = (fold.source, fold.records, device, phase.batch_size, phase.workers)
    for name in part_names(detector, phase):
        if name == CALIBRATION:
            settle(detector, score(detector, *run), recipe, fold)
            continue
        part = detector.fitted_parts()[name]
        records, (observed,) = answers_over(detector, *run, partial(_observed, detector, name))
        part.fit(observed, torch.tensor(list(map(detector.target, records))))
        assert part.is_fitted, name
        log.info("%s is fitted on %s, n = %d", name, fold.name, len(records))
    detector.save(folder)


def _observed(detector: Detector, part: str, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
    return (detector.observe(part, inputs),)


def settle(detector: Detector, predictions: Predictions, recipe: Recipe, fold: Fold) -> None:
    """Choose a detector's threshold on predictions of a fold, and calibrate it where there are enough groups."""
    threshold = choose_threshold(predictions.labels, predictions.p_fake, recipe.threshold_rule)
    chosen_on = f"{fold.title}, {len(predictions)} images, {recipe.threshold_rule}"
    detector.decision = Decision(threshold=threshold, chosen_on=chosen_on)
    config = recipe.calibration
    if config is None or not has_enough_groups(predictions, config):
        detector.calibration = None
        return
    detector.calibration = calibrate(detector, predictions, config, fold.name, fold.config.allow_leaks)


def has_enough_groups(predictions: Predictions, config: CalibrationConfig) -> bool:
    """Say whether a calibration can be fitted on these predictions, with a warning when not."""
    needed = max(needed_groups(config.coverage), config.folds)
    counts = [groups_of(predictions, label) for label in (REAL, FAKE)]
    if min(counts) >= needed:
        return True
    log.warning(
        "not calibrated: a coverage of %g needs %d validation groups of each class, there are %d real and %d fake",
        config.coverage,
        needed,
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
