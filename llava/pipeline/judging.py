"""A detector's numbers about a face become its verdict, calibrated where the detector is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llava.core.calibration import Calibration
from llava.core.types import Verdict, VerdictLabel
from llava.detectors.base import Detector
from llava.pipeline.faces import Face
from llava.pipeline.stability import outlasting

IN_THE_BAND = "real and forged faces both get such scores"
CONTRADICTED = "the score alone would decide, but not with the share of forgeries expected"


def judge(detector: Detector, face: Face, scores: Mapping[str, Any] | None, prior: float | None = None) -> Verdict:
    """Give the verdict on a face from its p_fake, probabilities and evidence; without, INCONCLUSIVE.

    scores may hold `versions`, raw p_fake of delivered versions by name: see `outlasting`.

    prior: share of fakes expected, for a calibrated detector; None = the calibration's own.
    """
    box = face.box
    found = _found(detector, scores["p_fake"], prior) if scores else _nothing(face.reason)
    if scores and scores.get("versions"):
        found |= outlasting(detector, found["label"], scores["versions"], prior)
    return Verdict(
        **found,
        probabilities=scores["probabilities"] if scores else {},
        evidence=scores["evidence"] if scores else {},
        detector=detector.name,
        face_box=None if box is None else (box.x, box.y, box.width, box.height),
        image=face.image,
        face=face.number,
        face_count=face.count,
    )


def _nothing(reason: str) -> dict[str, Any]:
    return {"label": VerdictLabel.INCONCLUSIVE, "p_fake": None, "reason": reason}


def _found(detector: Detector, raw: float, prior: float | None) -> dict[str, Any]:
    """Give label, p_fake and what goes with them."""
    (label,) = detector.labels(np.array([raw]), prior)
    if detector.calibration is not None:
        return _calibrated(detector.calibration, label, raw, prior)
    return {"label": label, "p_fake": raw, "raw_p_fake": raw, "threshold": detector.decision.threshold}


def _calibrated(calibration: Calibration, label: VerdictLabel, raw: float, prior: float | None) -> dict[str, Any]:
    is_in_band = calibration.real_below <= raw <= calibration.fake_above
    doubt = IN_THE_BAND if is_in_band else CONTRADICTED
    told = "" if prior is None else f", {100 * prior:g} % forgeries expected"
    return {
        "label": label,
        "reason": doubt if label == VerdictLabel.UNCERTAIN else "",
        "p_fake": float(calibration.posterior(raw, prior)),
        "raw_p_fake": raw,
        "threshold": 0.5,
        "calibration": f"{calibration}{told}",
        "band": calibration.band(prior),
        "coverage": calibration.coverage,
        "likelihood_ratio": float(np.exp(calibration.score_map.log_likelihood_ratio(raw))),
        "prior": calibration.prior if prior is None else prior,
    }
