"""Stage 1's calibration: fitted on the trained detector's validation scores, measured on test."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from llava.core.calibration import Calibration
from llava.core.types import FAKE, REAL
from llava.data.sources import DataConfig
from llava.detectors.base import Detector
from llava.evaluation.calibration import CalibrationConfig, fit_calibration
from llava.evaluation.conformal import groups_of, needed_groups
from llava.evaluation.predictions import Predictions
from llava.evaluation.reliability import calibration_report, share_of_fakes

log = logging.getLogger(__name__)


def calibrate(
    detector: Detector, validation: Predictions, config: CalibrationConfig | None, data: DataConfig
) -> Calibration | None:
    """Fit a detector's calibration on validation scores; None, with a warning, for too few groups."""
    if config is None:
        return None
    needed = max(needed_groups(config.coverage), config.folds)
    counts = [groups_of(validation, label) for label in (REAL, FAKE)]
    if min(counts) < needed:
        log.warning(
            "not calibrated: a coverage of %g needs %d validation groups of each class, there are %d real and %d fake",
            config.coverage,
            needed,
            *counts,
        )
        return None
    return fit_calibration(validation, config, f"{data_name(data)}, split {data.val!r}", detector.fingerprint())


def data_name(data: DataConfig) -> str:
    """Name a data set without saying where it lies: its folder, also when it is given by the table in it."""
    path = Path(data.path).resolve()
    return (path.parent if path.is_file() else path).name


def measured(calibration: Calibration | None, test: Predictions | None, n_boot: int) -> dict[str, Any] | None:
    """Give the report of a calibration on test scores; None when either is missing."""
    if calibration is None or test is None:
        return None
    report = calibration_report(test, calibration, n_boot, prior=share_of_fakes(test))
    values = [report[side]["ece"] for side in ("before", "after")]
    shown = (f"{v['value']:.3f}" + ("" if v["low"] is None else f" [{v['low']:.3f}, {v['high']:.3f}]") for v in values)
    log.info("ECE on test: %s raw, %s after calibration by %s (%s)", *shown, report["method"], report["calibration"])
    return report
