"""Fit what a score means on validation: a map chosen by cross-validation, and the band in which it abstains.

Each image gets a set of labels: real belongs to it when p_fake <= fake_above, fake when p_fake >= real_below. One label
in the set is a verdict, both (or none) are none. Vovk, Gammerman and Shafer 2005 (Mondrian predictors);
Angelopoulos and Bates 2023 (split conformal and class-conditional coverage).

What it promises: for one image drawn from a new group, exchangeable with the validation groups, the set holds the true
label with probability >= coverage, for real images and for fake ones separately (each may have its own), whatever the
detector, and therefore under any share of fakes. Images of one group are not exchangeable with those of others, so
groups are the units: each of K groups weighs 1 / (K + 1), shared equally by its images of the class (hierarchical
conformal prediction, Lee, Barber and Willett 2023, which becomes the ordinary method with one image per group).

What it does not promise: nothing for images from another source, camera, compression or kind of forgery; nothing for a
single image or subgroup; nothing about those that are decided (with few fakes around, most FAKE verdicts can be wrong:
that is what the posterior is for). It holds on average over validation sets: the coverage of one band is itself spread
around the promise (`coverage_range`). Validation images that also chose checkpoint or threshold are not quite
exchangeable with new ones; the true coverage can then lie a little lower.

All of them map the raw p_fake to a log-likelihood ratio and weigh both classes alike, so that the share of fakes in the
validation data, which is an accident of how they were put together, enters nowhere (Bruemmer and du Preez 2006).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from llava.core.config import setting
from llava.core.score_map import (
    Calibration,
    Method,
    ScoreMap,
    balanced_weights,
    both_coverages,
    fit_logistic,
    log_odds,
    require_share,
)
from llava.core.types import FAKE, LABEL_NAMES, REAL
from llava.evaluation.predictions import Predictions

log = logging.getLogger(__name__)

ROUNDING = 1e-9  # 0.9 * (9 + 1) must count as 9
METHODS: tuple[Method, ...] = get_args(Method)  # the simplest first


def conformal_bound(scores: np.ndarray, groups: np.ndarray, coverage: float) -> float:
    """Give the smallest bound that a new score stays at or under with probability >= coverage.

    scores (N,), groups (N,): names. Infinite with fewer than `needed_groups(coverage)` groups.
    """
    _, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    weights = 1 / ((len(sizes) + 1) * sizes[codes])
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum(weights[order]) >= coverage - ROUNDING
    return float(scores[order][np.argmax(reached)]) if reached.any() else math.inf


def conformal_band(predictions: Predictions, coverages: tuple[float, float]) -> tuple[float, float]:
    """Give (real_below, fake_above): the p_fake under which few fakes lie, and above which few reals.

    coverages: of reals and of fakes; few is what is left of a class. The first may be the larger one: such a detector
    need not abstain at these coverages. Raises ValueError with too few groups of a class.
    """
    for label, name in enumerate(LABEL_NAMES):
        count, needed = groups_of(predictions, label), needed_groups(coverages[label])
        if count < needed:
            raise ValueError(
                f"A coverage of {coverages[label]:g} of {name} images needs {needed} groups of them, got {count}; give "
                "more validation data or a lower coverage."
            )
    is_fake = predictions.labels == FAKE
    fake_above = conformal_bound(predictions.p_fake[~is_fake], predictions.groups[~is_fake], coverages[REAL])
    real_below = -conformal_bound(-predictions.p_fake[is_fake], predictions.groups[is_fake], coverages[FAKE])
    return real_below, fake_above


def groups_of(predictions: Predictions, label: int) -> int:
    """Count the groups that have images of a class."""
    return len(set(predictions.groups[predictions.labels == label]))


def needed_groups(coverage: float) -> int:
    """Count the groups of a class from which on a coverage of it can be promised: 9 for 0.9."""
    return max(1, math.ceil(coverage / (1 - coverage) - ROUNDING))


def coverage_range(validation: int, test: int, coverage: float, level: float = 0.95) -> tuple[float, float]:
    """Give the interval in which the coverage of `test` new groups lies with probability `level`.

    For continuous scores, one image per group and class: beta-binomial, from the chance of both draws (Angelopoulos
    and Bates 2023).
    """
    from scipy.stats import betabinom  # here, because it loads for half a second

    misses = math.floor((1 - coverage) * (validation + 1) + ROUNDING)
    law = betabinom(test, validation + 1 - misses, misses)
    return float(law.ppf((1 - level) / 2) / test), float(law.ppf((1 + level) / 2) / test)


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How scores are calibrated on validation predictions."""

    method: Literal["auto", "temperature", "platt", "isotonic"] = setting(
        "auto", "auto = the simplest whose cross-validated log loss is within one standard error of the best"
    )
    coverage: float = setting(0.9, "part of each class that is not called the other one; sets the abstain band")
    real_coverage: float | None = setting(None, "the same of real images alone, as an error accuses; None = coverage")
    prior: float = setting(0.5, "share of forgeries expected where nobody says another (--prior)")
    folds: int = setting(5, "parts of the cross-validation; a group is never divided")
    seed: int = setting(0, "seed of the division into folds")

    def __post_init__(self) -> None:
        require_share("coverage", self.coverage)
        require_share("prior", self.prior)
        if self.real_coverage is not None:
            require_share("real_coverage", self.real_coverage)
        if self.folds < 2:
            raise ValueError(f"folds: {self.folds} is not usable; allowed: 2 or more.")

    @property
    def coverages(self) -> tuple[float, float]:
        """Give the coverage of reals, then of fakes."""
        return both_coverages(self.coverage, self.real_coverage)


def fit_calibration(predictions: Predictions, config: CalibrationConfig, data: str, weights_sha256: str) -> Calibration:
    """Fit map and abstain band on validation predictions.

    data: their name, shown with every verdict. weights_sha256: `Detector.fingerprint()` of the detector that gave them.
    The map is fitted on all images; the band counts groups. Raises ValueError with one class or too few groups.
    """
    real_below, fake_above = conformal_band(predictions, config.coverages)
    method = choose_method(predictions, config) if config.method == "auto" else config.method
    return Calibration(
        score_map=fit_map(method, predictions.labels, predictions.p_fake),
        real_below=real_below,
        fake_above=fake_above,
        coverage=config.coverage,
        real_coverage=config.real_coverage,
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
    try:
        (scale,), offset = fit_logistic(labels, log_odds(p_fake)[None], has_offset=method == "platt")
    except ValueError as error:
        raise ValueError(f"{error} Use --method isotonic.") from error
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
    from sklearn.model_selection import StratifiedGroupKFold  # here, because it loads for half a second

    labels, p_fake, groups = predictions.labels, predictions.p_fake, predictions.groups
    if len(set(groups)) < config.folds:
        raise ValueError(f"folds: {config.folds} parts of {len(set(groups))} groups: impossible; give fewer folds.")
    splitter = StratifiedGroupKFold(config.folds, shuffle=True, random_state=config.seed)
    ratios = np.empty(len(labels))
    for train, held_out in splitter.split(p_fake, labels, groups):
        ratios[held_out] = fit_map(method, labels[train], p_fake[train]).log_likelihood_ratio(p_fake[held_out])
    return len(labels) * balanced_weights(labels) * np.logaddexp(0, np.where(labels == FAKE, -ratios, ratios))


def _isotonic_knots(labels: np.ndarray, p_fake: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Fit the posterior at equal shares by isotonic regression, never 0 or 1.

    One fake with score 0 and one real with score 1 are added (Laplace's rule of succession, as in the BOSARIS toolkit
    of Bruemmer and de Villiers 2013): the ends then say no more than the number of images supports.
    """
    from sklearn.isotonic import IsotonicRegression  # here, because it loads for half a second

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
