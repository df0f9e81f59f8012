"""Calibrate a detector on validation predictions; with --test, say what that does on other data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llava.core.config import parse, setting
from llava.core.runtime import setup_logging, write_json
from llava.core.score_map import Calibration, write_calibration
from llava.core.terminal import console
from llava.detectors.base import load_uncalibrated
from llava.detectors.published import ready_detector
from llava.evaluation.calibration import CalibrationConfig, fit_calibration
from llava.evaluation.pictures import draw_reliability
from llava.evaluation.predictions import Predictions, read_csv, refuse_shared_groups
from llava.evaluation.reliability import calibration_report, share_of_fakes
from llava.evaluation.tables import calibration_tables, run_script
from llava.train.scoring import calibrate


@dataclass(frozen=True, kw_only=True)
class Settings(CalibrationConfig):
    """What is fitted, for which detector, and how the result is looked at."""

    predictions: str = setting(help="csv of the validation split, raw scores of this very detector")
    detector: str | None = setting(None, "folder of the detector; calibration.json is written there; none = only show")
    data: str | None = setting(None, "name of the data, shown with every verdict; default: folder and name of the csv")
    allow_leaks: bool = setting(False, "only warn of groups that the detector was trained on")
    test: str | None = setting(None, "csv of other groups, to measure on; without it nothing is measured")
    n_boot: int = setting(2000, "resamples of the group bootstrap")
    json: str | None = setting(None, "write the report on --test to this file as well")
    picture: str | None = setting(None, "draw how reliable the scores on --test are into this file")


def main() -> None:
    """Fit, write the calibration, and print what it does on the test predictions."""
    setup_logging()
    settings = parse(Settings, description=__doc__ or "")
    path = Path(settings.predictions)
    validation, test = read_csv(path), read_csv(settings.test) if settings.test else None
    if test is None and (settings.json or settings.picture):
        raise ValueError("--json and --picture show how good the calibration is on other data: give --test.")
    if test is not None:
        refuse_shared_groups(validation, test)
    folder = ready_detector(settings.detector) if settings.detector else None
    data = settings.data or f"{path.parent.name}/{path.name}"
    if folder:
        calibration = calibrate(load_uncalibrated(folder), validation, settings, data, settings.allow_leaks)
    else:
        calibration = fit_calibration(validation, settings, data, weights_sha256="")
    print(describe(calibration))
    if folder:
        write_calibration(folder, calibration)
        print(f"written to {folder}")
    if test is not None:
        measure(calibration, test, settings)


def describe(calibration: Calibration) -> str:
    """Give the fitted numbers in two lines."""
    fitted = calibration.score_map
    numbers = f"{len(fitted.knots)} knots" if fitted.knots else f"scale {fitted.scale:.4f}, offset {fitted.offset:.4f}"
    low, high = calibration.band()
    of_reals, of_fakes = calibration.coverages
    return (
        f"{fitted.method} ({numbers}), {calibration}, {calibration.groups} groups, prior {calibration.prior:.3f}\n"
        f"UNCERTAIN from {low:.3f} to {high:.3f} for a coverage of {of_reals:g} of reals, {of_fakes:g} of fakes"
    )


def measure(calibration: Calibration, test: Predictions, settings: Settings) -> None:
    """Print the report on test predictions, at the share of fakes they have; write it and draw it when asked."""
    prior = share_of_fakes(test)
    report = calibration_report(test, calibration, settings.n_boot, settings.seed, prior=prior)
    out = console()
    for table in calibration_tables(report):
        out.print(table)
    if settings.json:
        write_json(settings.json, report)
    if settings.picture:
        after = calibration.posterior(test.p_fake, prior)
        draw_reliability(settings.picture, test, {"raw": test.p_fake, "calibrated": after})


if __name__ == "__main__":
    run_script(main)
