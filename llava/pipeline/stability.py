"""Whether a verdict outlasts delivery: one that a saved, resized or cropped copy would turn round is UNCERTAIN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llava.core.types import VerdictLabel
from llava.detectors.base import Detector
from llava.evaluation.robustness import flips


def outlasting(
    detector: Detector, label: VerdictLabel, versions: Mapping[str, float], prior: float | None = None
) -> dict[str, Any]:
    """Give what the delivered versions of a face change about its verdict, as fields of a Verdict.

    versions: raw p_fake by name. Always `stability`, their p_fake as the verdict shows it; where one of them turns
    REAL to FAKE or FAKE to REAL also the label UNCERTAIN and the reason, which names what turned it.
    """
    raw = np.array(list(versions.values()))
    p_fake = raw if detector.calibration is None else detector.calibration.posterior(raw, prior)
    found: dict[str, Any] = {"stability": dict(zip(versions, p_fake.tolist(), strict=True))}
    labels = np.array(detector.labels(raw, prior))
    turning = flips(np.array(label), labels)
    if turning.any():
        names = [name for name, turns in zip(versions, turning, strict=True) if turns]
        reason = f"the verdict turns to {labels[turning][0]} after {_listed(names)}"
        found |= {"label": VerdictLabel.UNCERTAIN, "reason": reason}
    return found


def _listed(names: list[str]) -> str:
    """Write "a", "a and b", "a, b and c"."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
