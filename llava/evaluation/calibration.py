"""Fit what a score means on validation: temperature, Platt or isotonic, chosen by cross-validation.

All of them map the raw p_fake to a log-likelihood ratio and weigh both classes alike, so that the share of fakes in the
validation data, which is an accident of how they were put together, enters nowhere (Bruemmer and du Preez 2006).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from sklearn.model_selection import StratifiedGroupKFold

from llava.core.calibration import Calibration, Method, ScoreMap, log_odds, require_share
from llava.core.config import setting
from llava.core.types import FAKE, REAL
from llava.evaluation.conformal import conformal_band, groups_of
from llava.evaluation.predictions import Predictions

log = logging.getLogger(__name__)
METHODS: tuple[Method, ...] = get_args(Method)  # the simplest first


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How scores are calibrated on validation predictions."""

    method: Literal["auto", "temperature", "platt", "isotonic"] = setting(
        "auto", "auto = the simplest whose cross-validated log loss is within one standard error of the best"
    )
    coverage: float = setting(0.9, "part of each class that is not called the other one; sets the abstain band")
    prior: float = setting(0.5, "share of forgeries expected where nobody says another (--prior)")
    folds: int = setting(5, "parts of the cross-validation; a group is never divided")
    seed: int = setting(0, "seed of the division into folds")

    def __post_init__(self) -> None:
        require_share("coverage", self.coverage)
        require_share("prior", self.prior)
        if self.folds < 2:
            raise ValueError(f"folds: {self.folds} is not usable; allowed: 2 or more.")


def fit_calibration(predictions: Predictions, config: CalibrationConfig, data: str, weights_sha256: str) -> Calibration:
    """Fit map and abstain band on validation predictions.

    data: their name, shown with every verdict. weights_sha256: `Detector.fingerprint()` of the detector that gave them.
    The map is fitted on all images; the band counts groups. Raises ValueError with one class or too few groups.
    """
    real_below, fake_above = conformal_band(predictions, config.coverage)
    method = choose_method(predictions, config) if config.method == "auto" else config.method
    return Calibration(
        score_map=fit_map(method, predictions.labels, predictions.p_fake),
        real_below=real_below,
        fake_above=fake_above,
        coverage=config.coverage,
        prior=config.prior,
        data=data,
        images=len(predictions),
        groups=len(set(predictions.groups)),
        class_groups=(groups_of(predictions, REAL), groups_of(predictions, FAKE)),
        weights_sha256=weights_sha256,
    )


def fit_map(method: Method, labels: np.ndarray, p_fake: np.ndarray) -> ScoreMap:
    """Fit one method to labels (N,) of 0/1 and raw p_fake (N,), both classes weighing alike."""
    counts = np.bincount(labels, minlength=2)
    if not counts.all():
        raise ValueError(f"Calibration needs both classes, got {counts[REAL]} real and {counts[FAKE]} fake images.")
    if method == "isotonic":
        return ScoreMap(method=method, knots=_isotonic_knots(labels, p_fake))
    scale, offset = _logistic(labels, log_odds(p_fake), has_offset=method == "platt")
    return ScoreMap(method=method, scale=scale, offset=offset)


def choose_method(predictions: Predictions, config: CalibrationConfig) -> Method:
    """Give the simplest method whose cross-validated log loss is within one standard error of the best.

    The standard error is that of the difference to the best, over groups (Hastie et al. 2009, section 7.10).
    """
    losses = {method: cross_validated_losses(method, predictions, config) for method in METHODS}
    best = min(METHODS, key=lambda method: losses[method].mean())
    log.info("cross-validated log loss: %s", ", ".join(f"{m} {losses[m].mean():.4f}" for m in METHODS))
    for method in METHODS:
        difference = losses[method] - losses[best]
        if difference.mean() <= _group_error(difference, predictions.groups):
            return method
    return best


def cross_validated_losses(method: Method, predictions: Predictions, config: CalibrationConfig) -> np.ndarray:
    """Give the log loss (N,) in nats of every image by a map fitted without its group.

    Weighted so that their mean weighs both classes alike, at equal shares: with one image per class and no knowledge it
    is log 2. Raises ValueError with fewer groups than folds.
    """
    labels, p_fake, groups = predictions.labels, predictions.p_fake, predictions.groups
    if len(set(groups)) < config.folds:
        raise ValueError(f"folds: {config.folds} parts of {len(set(groups))} groups: impossible; give fewer folds.")
    splitter = StratifiedGroupKFold(config.folds, shuffle=True, random_state=config.seed)
    ratios = np.empty(len(labels))
    for train, held_out in splitter.split(p_fake, labels, groups):
        ratios[held_out] = fit_map(method, labels[train], p_fake[train]).log_likelihood_ratio(p_fake[held_out])
    return len(labels) * balanced_weights(labels) * np.logaddexp(0, np.where(labels == FAKE, -ratios, ratios))


def balanced_weights(labels: np.ndarray) -> np.ndarray:
    """Give weights (N,) that sum to 1, half of it for each class."""
    return 0.5 / np.bincount(labels, minlength=2)[labels]


def _logistic(labels: np.ndarray, scores: np.ndarray, has_offset: bool) -> tuple[float, float]:
    """Fit scale >= 0 and offset by logistic regression.

    Targets are Platt's (1999), (n + 1) / (n + 2) instead of 1 and 0, so that separable classes have a finite answer.
    """
    counts = np.bincount(labels, minlength=2)
    targets = np.where(labels == FAKE, (counts[FAKE] + 1) / (counts[FAKE] + 2), 1 / (counts[REAL] + 2))
    weights = balanced_weights(labels)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        z = parameters[0] * scores + parameters[1]
        slopes = weights * (expit(z) - targets)
        return float(weights @ (np.logaddexp(0, z) - targets * z)), np.array([slopes @ scores, slopes.sum()])

    bounds = [(0, None), (None, None) if has_offset else (0, 0)]
    found = minimize(loss, [1.0, 0.0], jac=True, bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-13})
    if not found.success:
        raise ValueError(f"The fit did not converge ({found.message}); use --method isotonic.")
    return float(found.x[0]), float(found.x[1])


def _isotonic_knots(labels: np.ndarray, p_fake: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Fit the posterior at equal shares by isotonic regression, never 0 or 1.

    One fake with score 0 and one real with score 1 are added (Laplace's rule of succession, as in the BOSARIS toolkit
    of Bruemmer and de Villiers 2013): the ends then say no more than the number of images supports.
    """
    with_ends = np.concatenate([[FAKE], labels, [REAL]])
    scores = np.concatenate([[0.0], p_fake, [1.0]])
    regression = IsotonicRegression().fit(scores, with_ends, sample_weight=balanced_weights(with_ends))
    pairs = zip(regression.X_thresholds_.tolist(), regression.y_thresholds_.tolist(), strict=True)
    return tuple((float(score), float(value)) for score, value in pairs)


def _group_error(values: np.ndarray, groups: np.ndarray) -> float:
    """Give the standard error of the mean of values (N,) when groups are the independent units."""
    _, codes = np.unique(groups, return_inverse=True)
    sums = np.bincount(codes, weights=values - values.mean())
    n = len(sums)
    return float(np.sqrt(n / max(n - 1, 1) * np.sum(sums**2)) / len(values))
