"""How far p_fake can be taken at its word: ECE, Brier, log loss, Cllr, coverage, with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from scipy.special import logit

from llava.core.score_map import SMALLEST, Calibration, log_odds
from llava.core.types import FAKE, REAL
from llava.evaluation.calibration import coverage_range, groups_of
from llava.evaluation.predictions import Predictions
from llava.evaluation.statistics import Interval, group_bootstrap, group_bootstraps, wilson

BINS = 10
Binning: TypeAlias = Literal["equal_mass", "equal_width"]
CALIBRATION_METRICS = ("ece", "ece_equal_width", "brier", "log_loss", "cllr", "min_cllr")
DRAWS = 200


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability picture: mean p_fake of its images, and their share of fakes with interval."""

    p_fake: float
    share: Interval
    images: int


def bin_numbers(p_fake: np.ndarray, bins: int = BINS, binning: Binning = "equal_mass") -> np.ndarray:
    """Give the bin (N,) of each p_fake: between quantiles (equal_mass) or even steps (equal_width).

    Equal scores share a bin, so equal-mass bins may differ in size or be empty.
    """
    steps = np.linspace(0, 1, bins + 1)
    edges = np.quantile(p_fake, steps) if binning == "equal_mass" else steps
    return np.searchsorted(edges[1:-1], p_fake)


def ece(labels: np.ndarray, p_fake: np.ndarray, numbers: np.ndarray, weights: np.ndarray) -> float:
    """Give the expected calibration error: sum over bins of weight * |share of fakes - mean p_fake|.

    numbers (N,): `bin_numbers`; weights (N,). Naeini et al. 2015. Never 0 by chance alone: see `ece_if_calibrated`.
    """
    gaps = np.bincount(numbers, weights=weights * (labels - p_fake))
    return float(np.abs(gaps).sum() / weights.sum())


def ece_if_calibrated(p_fake: np.ndarray, bins: int = BINS, seed: int = 0) -> float:
    """Give the mean ECE (equal mass) of perfectly calibrated scores: labels drawn with these p_fake (N,)."""
    rng, numbers, ones = np.random.default_rng(seed), bin_numbers(p_fake, bins), np.ones(len(p_fake))
    drawn = (rng.random((DRAWS, len(p_fake))) < p_fake).astype(int)
    return float(np.mean([ece(labels, p_fake, numbers, ones) for labels in drawn]))


def cllr(labels: np.ndarray, ratios: np.ndarray, weights: np.ndarray) -> float:
    """Give the log-likelihood-ratio cost, in bits, of natural log-likelihood ratios (N,).

    NaN with one class. 0 = all known, 1 = as good as no detector, above 1 its numbers mislead. Bruemmer and du Preez
    2006.
    """
    costs = np.logaddexp(0, np.where(labels == FAKE, -ratios, ratios)) / math.log(2)
    sums = [weights[labels == label].sum() for label in (REAL, FAKE)]
    if not all(sums):
        return math.nan
    is_drawn = weights > 0  # others may cost infinitely much, which 0 times would not cancel
    chosen = [is_drawn & (labels == label) for label in (REAL, FAKE)]
    return float(0.5 * sum(weights[c] @ costs[c] / total for c, total in zip(chosen, sums, strict=True)))


def min_cllr(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> float:
    """Give the Cllr after the best rising map of the scores (N,), found on these labels by PAV.

    NaN with one class. What a detector loses by ranking; the rest of its Cllr is lost by calibration.
    """
    from sklearn.isotonic import isotonic_regression  # here, because it loads for half a second

    levels, codes = np.unique(scores, return_inverse=True)
    sums = [np.bincount(codes, weights=weights * (labels == label), minlength=len(levels)) for label in (REAL, FAKE)]
    real, fake = sums[REAL].sum(), sums[FAKE].sum()
    if not (real and fake):
        return math.nan
    both = sums[REAL] / real + sums[FAKE] / fake
    is_drawn = both > 0
    values = np.full(len(levels), 0.5)
    values[is_drawn] = isotonic_regression(sums[FAKE][is_drawn] / fake / both[is_drawn], sample_weight=both[is_drawn])
    return cllr(labels, logit(values[codes]), weights)


def calibration_metrics(
    predictions: Predictions, p_fake: np.ndarray, prior: float, n_boot: int = 2000, seed: int = 0, bins: int = BINS
) -> dict[str, Any]:
    """Give CALIBRATION_METRICS of p_fake (N,), taken as posteriors at `prior`.

    Intervals by group bootstrap; log_loss in nats, of probabilities clipped to [1e-6, 1 - 1e-6]; the bins stay those of
    all images. ece_if_calibrated is no score: what chance alone gives.
    """
    labels = predictions.labels
    clipped = np.clip(p_fake, SMALLEST, 1 - SMALLEST)
    ratios = log_odds(p_fake) - logit(prior)
    losses = np.stack([(p_fake - labels) ** 2, -np.log(np.where(labels == FAKE, clipped, 1 - clipped))])
    by_mass, by_width = (bin_numbers(p_fake, bins, kind) for kind in ("equal_mass", "equal_width"))

    def all_metrics(weights: np.ndarray) -> np.ndarray:
        errors = [ece(labels, p_fake, numbers, weights) for numbers in (by_mass, by_width)]
        means = (losses @ weights / weights.sum()).tolist()
        return np.array([*errors, *means, cllr(labels, ratios, weights), min_cllr(labels, p_fake, weights)])

    intervals = group_bootstraps(predictions.groups, all_metrics, n_boot, seed)
    values = {name: interval.to_dict() for name, interval in zip(CALIBRATION_METRICS, intervals, strict=True)}
    return values | {"ece_if_calibrated": ece_if_calibrated(p_fake, bins, seed)}


def reliability(predictions: Predictions, p_fake: np.ndarray, bins: int = BINS) -> list[Bin]:
    """Give the equal-mass bins that hold something, lowest first.

    The share's interval is Wilson's with the number of groups in the bin as its trials: images of a group are one unit.
    """
    numbers = bin_numbers(p_fake, bins)
    filled = []
    for number in np.unique(numbers):
        inside = numbers == number
        groups, share = len(set(predictions.groups[inside])), float(predictions.labels[inside].mean())
        interval = wilson(share * groups, groups)
        filled.append(Bin(float(p_fake[inside].mean()), interval, int(inside.sum())))
    return filled


def share_of_fakes(predictions: Predictions) -> float:
    """Give the part of fakes, the prior under which posteriors are compared with these labels."""
    return float((predictions.labels == FAKE).mean())


def calibration_report(
    predictions: Predictions,
    calibration: Calibration,
    n_boot: int = 2000,
    seed: int = 0,
    bins: int = BINS,
    prior: float | None = None,
) -> dict[str, Any]:
    """Compare raw and calibrated p_fake on test predictions, and count the verdicts, as plain values.

    prior: share of fakes expected among these images; None = the calibration's own.
    """
    prior = calibration.prior if prior is None else prior
    settings = (prior, n_boot, seed, bins)
    return {
        "calibration": str(calibration),
        "method": calibration.score_map.method,
        "prior": prior,
        "band": calibration.band(prior),
        "n": {"images": len(predictions), "groups": len(set(predictions.groups))},
        "bootstrap": {"n_boot": n_boot, "seed": seed, "level": 0.95, "unit": "group"},
        "before": calibration_metrics(predictions, predictions.p_fake, *settings),
        "after": calibration_metrics(predictions, calibration.posterior(predictions.p_fake, prior), *settings),
        **verdict_report(predictions, calibration, prior, n_boot, seed),
    }


def verdict_report(
    predictions: Predictions, calibration: Calibration, prior: float, n_boot: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Give coverage of each class, part of the images that are decided, and part of those that is right.

    Coverage: part of a class that is not called the other one, with what was promised and the range
    expected of as many new groups.
    """
    said = np.array(calibration.labels(predictions.p_fake, prior), dtype=str)
    is_fake = predictions.labels == FAKE
    right, wrong = (said == np.where(is_fake, *names) for names in (("FAKE", "REAL"), ("REAL", "FAKE")))

    def part(values: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
        def statistic(weights: np.ndarray) -> float:
            total = float(weights[chosen].sum())
            return float(weights[chosen] @ values[chosen]) / total if total else math.nan

        return group_bootstrap(predictions.groups, statistic, n_boot, seed).to_dict()

    return {
        "coverage": {
            "real": part(~wrong, ~is_fake) | _expected(predictions, calibration, REAL),
            "fake": part(~wrong, is_fake) | _expected(predictions, calibration, FAKE),
        },
        "decided": part(right | wrong, np.ones(len(said), dtype=bool)),
        "right": part(right, right | wrong),
    }


def _expected(predictions: Predictions, calibration: Calibration, label: int) -> dict[str, Any]:
    groups, promised = groups_of(predictions, label), calibration.coverages[label]
    if not groups:
        return {"promised": promised, "expected": None}
    return {"promised": promised, "expected": coverage_range(calibration.class_groups[label], groups, promised)}
