"""Abstain band by split conformal prediction, per class (Mondrian), for images that come in groups.

Each image gets a set of labels: real belongs to it when p_fake <= fake_above, fake when p_fake >= real_below. One label
in the set is a verdict, both (or none) are none. Vovk, Gammerman and Shafer 2005 (Mondrian predictors);
Angelopoulos and Bates 2023 (split conformal and class-conditional coverage).

What it promises: for one image drawn from a new group, exchangeable with the validation groups, the set holds the true
label with probability >= coverage, for real images and for fake ones separately, whatever the detector, and therefore
under any share of fakes. Images of one group are not exchangeable with those of others, so groups are the units: each
of K groups weighs 1 / (K + 1), shared equally by its images of the class (hierarchical conformal prediction, Lee,
Barber and Willett 2023, which becomes the ordinary method with one image per group).

What it does not promise: nothing for images from another source, camera, compression or kind of forgery; nothing for a
single image or subgroup; nothing about those that are decided (with few fakes around, most FAKE verdicts can be wrong:
that is what the posterior is for). It holds on average over validation sets: the coverage of one band is itself spread
around the promise (`coverage_range`). Validation images that also chose checkpoint or threshold are not quite
exchangeable with new ones; the true coverage can then lie a little lower.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import betabinom

from llava.core.types import FAKE, REAL
from llava.evaluation.predictions import Predictions

ROUNDING = 1e-9  # 0.9 * (9 + 1) must count as 9


def conformal_bound(scores: np.ndarray, groups: np.ndarray, coverage: float) -> float:
    """Give the smallest bound that a new score stays at or under with probability >= coverage.

    scores (N,), groups (N,): names. Infinite with fewer than `needed_groups(coverage)` groups.
    """
    _, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    weights = 1 / ((len(sizes) + 1) * sizes[codes])
    order = np.argsort(scores, kind="stable")
    reached = np.cumsum(weights[order]) >= coverage - ROUNDING
    return float(scores[order][np.argmax(reached)]) if reached.any() else math.inf


def conformal_band(predictions: Predictions, coverage: float) -> tuple[float, float]:
    """Give (real_below, fake_above): the p_fake under which few fakes lie, and above which few reals.

    Few is 1 - coverage of the class. The first may be the larger one: such a detector need not abstain at this
    coverage. Raises ValueError with too few groups of a class.
    """
    for label, name in ((REAL, "real"), (FAKE, "fake")):
        count = groups_of(predictions, label)
        if count < needed_groups(coverage):
            raise ValueError(
                f"A coverage of {coverage:g} needs {needed_groups(coverage)} groups of each class, got {count} with "
                f"{name} images; give more validation data or a lower coverage."
            )
    is_fake = predictions.labels == FAKE
    fake_above = conformal_bound(predictions.p_fake[~is_fake], predictions.groups[~is_fake], coverage)
    real_below = -conformal_bound(-predictions.p_fake[is_fake], predictions.groups[is_fake], coverage)
    return real_below, fake_above


def groups_of(predictions: Predictions, label: int) -> int:
    """Count the groups that have images of a class."""
    return len(set(predictions.groups[predictions.labels == label]))


def needed_groups(coverage: float) -> int:
    """Count the groups of each class from which on a coverage can be promised: 9 for 0.9."""
    return max(1, math.ceil(coverage / (1 - coverage) - ROUNDING))


def coverage_range(validation: int, test: int, coverage: float, level: float = 0.95) -> tuple[float, float]:
    """Give the interval in which the coverage of `test` new groups lies with probability `level`.

    For continuous scores, one image per group and class: beta-binomial, from the chance of both draws (Angelopoulos
    and Bates 2023).
    """
    misses = math.floor((1 - coverage) * (validation + 1) + ROUNDING)
    law = betabinom(test, validation + 1 - misses, misses)
    return float(law.ppf((1 - level) / 2) / test), float(law.ppf((1 + level) / 2) / test)
