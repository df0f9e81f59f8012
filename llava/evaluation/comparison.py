"""Are two detectors that scored the same items different? Paired tests of AUCs, corrected for how many are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm, rankdata

from llava.evaluation.metrics import RankedScores
from llava.evaluation.predictions import Predictions
from llava.evaluation.statistics import Interval, percentile_intervals, resampled_weights

LEAST_P = float(np.nextafter(0, 1))  # what a p that is too small for a number is called
ROUNDING = 1e-15  # a variance of a difference of AUCs below it is none


@dataclass(frozen=True)
class DeLong:
    """AUCs (2,), their covariance (2, 2), z of the first less the second, and the two-sided p of no difference."""

    aucs: np.ndarray
    covariance: np.ndarray
    z: float
    p: float


def delong(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> DeLong:
    """Test whether two scores (N,) of the same items, labels 0 and 1 (N,), have the same AUC.

    Items count as independent; where several share a person or video, read the bootstrap over groups instead. Without
    any variance p is 1 for equal AUCs, and the least there is for others. Raises ValueError with fewer than two items
    of a class. DeLong, DeLong and Clarke-Pearson 1988, by mid-ranks (Sun and Xu 2014).
    """
    is_fake = labels == 1
    counts = {"fake": int(is_fake.sum()), "real": int((~is_fake).sum())}
    few = [name for name, count in counts.items() if count < 2]
    if few:
        raise ValueError(f"DeLong's test needs two {few[0]} items or more, got {counts[few[0]]}; give another split.")
    placed = [_placements(scores, is_fake) for scores in (first, second)]
    v_fake, v_real = (np.stack([each[n] for each in placed]) for n in (0, 1))  # (2, n1), (2, n0)
    covariance = np.cov(v_fake) / counts["fake"] + np.cov(v_real) / counts["real"]
    aucs = v_fake.mean(axis=1)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    difference = float(aucs[0] - aucs[1])
    if variance < ROUNDING:
        z = math.copysign(math.inf, difference) if abs(difference) > ROUNDING else 0.0
    else:
        z = difference / math.sqrt(variance)
    return DeLong(aucs, covariance, z, min(1.0, max(2 * float(norm.sf(abs(z))), LEAST_P)))


def _placements(scores: np.ndarray, is_fake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give of each fake the share of reals below it, and of each real the share of fakes above it; ties count half."""
    ranks, fakes, reals = rankdata(scores), rankdata(scores[is_fake]), rankdata(scores[~is_fake])
    below = (ranks[is_fake] - fakes) / len(reals)
    above = 1 - (ranks[~is_fake] - reals) / len(fakes)
    return below, above


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values of several tests, so that any false one among them is as unlikely as said. Holm 1979."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    highest = 0.0
    for place, number in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[number]))
        corrected[number] = highest
    return corrected.tolist()


def compare(scored: Mapping[str, Predictions], reference: str, n_boot: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Give of each model its AUC with interval, and how it differs from the reference, as plain values.

    scored: predictions of the same items in the same order. The intervals and `p_bootstrap` see the same resampled
    groups; p_bootstrap = 2 (1 + resamples on the other side of no difference) / (1 + n_boot), at most 1. `p_delong`
    takes items as independent. Both are also given corrected by Holm over all models but the reference.
    """
    names = [reference, *(name for name in scored if name != reference)]
    first = scored[reference]
    ranked = [RankedScores(first.labels, scored[name].p_fake) for name in names]
    values = np.array([each.curve().auc() for each in ranked])
    drawn = np.array(
        [
            [each.curve(weights).auc() for each in ranked]
            for weights in resampled_weights(first.groups, n_boot, seed)
            if _has_both(weights, first.labels)
        ]
    )
    count = len(set(first.groups))
    rows: dict[str, dict[str, Any]] = {}
    for number, (name, auc) in enumerate(zip(names, percentile_intervals(values, drawn, count), strict=True)):
        rows[name] = {"auc": auc.to_dict()}
        if number:
            rows[name] |= _differs(first.labels, scored[name].p_fake, first.p_fake, values, drawn, number, count)
    for test in ("p_delong", "p_bootstrap"):
        corrected = holm([rows[name][test] for name in names[1:]])
        for name, p in zip(names[1:], corrected, strict=True):
            rows[name][f"{test}_holm"] = p
    return rows


def _has_both(weights: np.ndarray, labels: np.ndarray) -> bool:
    return bool(weights[labels == 1].any() and weights[labels == 0].any())


def _differs(
    labels: np.ndarray,
    scores: np.ndarray,
    others: np.ndarray,
    values: np.ndarray,
    drawn: np.ndarray,
    number: int,
    count: int,
) -> dict[str, Any]:
    """Give the difference of a model's AUC to the reference's, the first, and how likely it is by chance."""
    away = drawn[:, number] - drawn[:, 0]
    difference: Interval = percentile_intervals(values[[number]] - values[[0]], away[:, None], count)[0]
    tail = min(int((away <= 0).sum()), int((away >= 0).sum()))
    p_bootstrap = min(1.0, 2 * (1 + tail) / (1 + len(away)))
    return {
        "difference": difference.to_dict(),
        "p_delong": delong(labels, scores, others).p,
        "p_bootstrap": p_bootstrap,
    }
