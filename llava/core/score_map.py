"""What a score means: from raw p_fake to a likelihood ratio, a posterior, and a verdict with a band."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from scipy.special import expit, logit

from llava.core.config import build, to_dict
from llava.core.runtime import write_json
from llava.core.types import FAKE, REAL, VerdictLabel

CALIBRATION_NAME = "calibration.json"
# A softmax in float32 says exactly 0 or 1; no validation set supports odds beyond a million to one.
SMALLEST = 1e-6
Method: TypeAlias = Literal["temperature", "platt", "isotonic"]
Scores: TypeAlias = np.ndarray | float


def log_odds(p: Scores) -> np.ndarray:
    """Give log(p / (1 - p)) of probabilities (N,), which are first clipped to [1e-6, 1 - 1e-6]."""
    return np.asarray(logit(np.clip(p, SMALLEST, 1 - SMALLEST)))


def balanced_weights(labels: np.ndarray) -> np.ndarray:
    """Give weights (N,) that sum to 1, half of it for each class."""
    return 0.5 / np.bincount(labels, minlength=2)[labels]


def fit_logistic(labels: np.ndarray, scores: np.ndarray, has_offset: bool) -> tuple[list[float], float]:
    """Fit one scale >= 0 for each row of scores (F, N), and an offset, by logistic regression on labels (N,) of 0/1.

    Both classes weigh alike. Targets are Platt's (1999), (n + 1) / (n + 2) instead of 1 and 0, so that separable
    classes have a finite answer. Begins at the mean of the scores. Raises ValueError when it does not converge.
    """
    from scipy.optimize import minimize  # here, because only what fits needs it

    counts = np.bincount(labels, minlength=2)
    targets = np.where(labels == FAKE, (counts[FAKE] + 1) / (counts[FAKE] + 2), 1 / (counts[REAL] + 2))
    weights = balanced_weights(labels)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        *scales, offset = parameters
        z = sum((scale * row for scale, row in zip(scales, scores, strict=True)), np.zeros(len(labels))) + offset
        slopes = weights * (expit(z) - targets)
        gradient = [*(slopes @ row for row in scores), slopes.sum()]
        return float(weights @ (np.logaddexp(0, z) - targets * z)), np.array(gradient)

    start = [1 / len(scores)] * len(scores)
    bounds = [*([(0, None)] * len(scores)), (None, None) if has_offset else (0, 0)]
    found = minimize(loss, [*start, 0.0], jac=True, bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-13})
    if not found.success:
        raise ValueError(f"The logistic regression on {len(labels)} images did not converge ({found.message}).")
    *scales, offset = found.x.tolist()
    return scales, offset


@dataclass(frozen=True, kw_only=True)
class ScoreMap:
    """A fitted map from raw p_fake to the log-likelihood ratio log(p(score | fake) / p(score | real)).

    temperature and platt: scale * log_odds(p_fake) + offset; the temperature is 1 / scale and leaves 0.5 where it is.
    isotonic: linear between `knots` (raw p_fake, posterior at equal shares), constant outside.
    """

    method: Method
    scale: float = 1.0
    offset: float = 0.0
    knots: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise ValueError(f"scale: {self.scale} turns real and fake round; allowed: 0 or more.")
        steps = np.diff(np.array(self.knots).reshape(-1, 2), axis=0)
        if (self.method == "isotonic") != bool(self.knots) or (steps < 0).any():
            raise ValueError(f"knots: {self.method!r} got {len(self.knots)}; only isotonic has them, in rising order.")

    def log_likelihood_ratio(self, p_fake: Scores) -> np.ndarray:
        """Give natural logarithms (N,), bounded to +-13.8, a million to one."""
        if self.method == "isotonic":
            ratios = log_odds(np.interp(p_fake, *np.array(self.knots).T))
        else:
            ratios = self.scale * log_odds(p_fake) + self.offset
        bound = float(log_odds(1.0))
        return np.clip(ratios, -bound, bound)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was learned on validation predictions about a detector's scores; saved beside its weights.

    real_below, fake_above: ends of the abstain band, in raw p_fake; see `labels`. coverage: what the band promises for
    each class; real_coverage: for reals, None = the same. prior: share of fakes expected where nobody says another.
    images, groups: how many it was fitted on; class_groups: how many of the groups have real images, and fake ones.
    data: their name. weights_sha256: `Detector.fingerprint()` of the detector whose scores they are.
    """

    score_map: ScoreMap
    real_below: float
    fake_above: float
    coverage: float
    prior: float
    data: str
    images: int
    groups: int
    class_groups: tuple[int, int]
    weights_sha256: str
    real_coverage: float | None = None

    def __post_init__(self) -> None:
        require_share("prior", self.prior)
        for coverage in self.coverages:
            require_share("coverage", coverage)

    @property
    def coverages(self) -> tuple[float, float]:
        """Give what is promised for reals, then for fakes."""
        return both_coverages(self.coverage, self.real_coverage)

    def posterior(self, p_fake: Scores, prior: float | None = None) -> np.ndarray:
        """Give the calibrated p_fake (N,): posterior odds = likelihood ratio * prior odds (Bayes).

        prior: share of fakes expected where the images come from; None = the calibration's own.
        """
        share = self.prior if prior is None else prior
        require_share("prior", share)
        return expit(self.score_map.log_likelihood_ratio(p_fake) + logit(share))

    def labels(self, p_fake: np.ndarray, prior: float | None = None) -> list[VerdictLabel]:
        """Say REAL, FAKE or UNCERTAIN of each raw p_fake (N,).

        FAKE needs p_fake > fake_above and a posterior of 0.5 or more; REAL needs p_fake < real_below and a posterior
        under 0.5. So at most 1 - coverage of all reals are called FAKE and of all fakes REAL (each has its own),
        whatever the prior: the second condition only adds UNCERTAIN. `llava.evaluation.calibration` says what this
        rests on.
        """
        is_backed = self.posterior(p_fake, prior) >= 0.5
        is_fake, is_real = (p_fake > self.fake_above) & is_backed, (p_fake < self.real_below) & ~is_backed
        names = np.select([is_fake, is_real], [VerdictLabel.FAKE, VerdictLabel.REAL], VerdictLabel.UNCERTAIN)
        return [VerdictLabel(name) for name in names]

    def band(self, prior: float | None = None) -> tuple[float, float]:
        """Give the posteriors between which the verdict is UNCERTAIN; (0.5, 0.5) = it never is."""
        low, high = self.posterior(np.array([self.real_below, self.fake_above]), prior).tolist()
        return min(low, 0.5), max(high, 0.5)

    def __str__(self) -> str:
        """Name what it was fitted on, as a verdict shows it."""
        return f"calibrated on {self.data}, n = {self.images}"


def both_coverages(coverage: float, real_coverage: float | None) -> tuple[float, float]:
    """Give the coverage of reals, which is that of fakes where it is None, and of fakes."""
    return coverage if real_coverage is None else real_coverage, coverage


def require_share(name: str, value: float) -> None:
    """Raise ValueError unless `value` lies strictly between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name}: {value} is not usable; allowed: a share above 0 and below 1, such as 0.1.")


def write_calibration(folder: str | Path, calibration: Calibration) -> None:
    """Write calibration.json into a model's folder."""
    write_json(Path(folder) / CALIBRATION_NAME, to_dict(calibration))


def read_calibration(folder: str | Path) -> Calibration | None:
    """Read a model folder's calibration.json, None when it has none. Raises ValueError on damage."""
    path = Path(folder) / CALIBRATION_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); fit it again with eval/calibrate.py.") from error
    return build(Calibration, values, where=CALIBRATION_NAME)
