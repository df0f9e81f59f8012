"""Intervals: bootstrap over groups, the Wilson interval, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

Statistic = Callable[[np.ndarray], float]
Statistics = Callable[[np.ndarray], np.ndarray]

MAX_DRAWS_PER_RESAMPLE = 20


@dataclass(frozen=True)
class Interval:
    """A value with its interval; NaN where undefined.

    n: number of independent units behind it (groups of a bootstrap, trials of a proportion).
    redrawn: resamples in which the statistic was undefined and that were therefore drawn again.
    """

    value: float
    low: float
    high: float
    n: int
    redrawn: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values; NaN becomes None."""
        numbers = {name: getattr(self, name) for name in ("value", "low", "high")}
        return {k: None if math.isnan(v) else v for k, v in numbers.items()} | {"n": self.n, "redrawn": self.redrawn}


def group_bootstrap(
    groups: Sequence[str] | np.ndarray, statistic: Statistic, n_boot: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Give a statistic of all items with its percentile interval over resampled groups.

    `statistic` gets weights (N,), how often each item is drawn (all ones for the value itself), and gives NaN
    where it is undefined; see `group_bootstraps`.
    """
    return group_bootstraps(groups, lambda weights: np.array([statistic(weights)]), n_boot, seed, level)[0]


def group_bootstraps(
    groups: Sequence[str] | np.ndarray,
    statistics: Statistics,
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    jointly: bool = True,
) -> list[Interval]:
    """Give several statistics (k,) of all items with percentile intervals from the same resamples.

    Whole groups are drawn with replacement, as many as there are. A resample in which a statistic is undefined
    though it is defined on all items (only one class was drawn) is drawn again and counted in `redrawn`: the
    interval is conditional on the statistic being defined. Bounds are NaN when there are fewer than two groups
    or when more than 20 draws per resample would be needed. Efron and Tibshirani 1993, chapter 13.

    jointly: a resample counts where all statistics are defined. Without, it counts for those that are: each gets
    the interval that it has alone, and a rare one does not condition the others.
    """
    codes, n_groups = _group_codes(groups)
    value = np.asarray(statistics(np.ones(len(codes))), dtype=float)
    needed = ~np.isnan(value)
    counts = np.zeros(len(value), dtype=int)
    replicates: list[np.ndarray] = []
    usable: list[np.ndarray] = []
    draws = resampled_weights(groups, n_boot * MAX_DRAWS_PER_RESAMPLE, seed) if n_groups > 1 else iter(())
    while (counts < n_boot).any() and (weights := next(draws, None)) is not None:
        replicates.append(np.asarray(statistics(weights), dtype=float))
        defined = ~np.isnan(replicates[-1]) | ~needed
        usable.append(np.full_like(defined, defined.all()) if jointly else defined)
        counts += usable[-1]
    drawn, chosen = (np.array(rows).reshape(-1, len(value)) for rows in (replicates, usable))
    return [_interval(v, drawn[:, k], chosen[:, k], n_boot, n_groups, level) for k, v in enumerate(value)]


def _interval(
    value: float, replicates: np.ndarray, usable: np.ndarray, n_boot: int, n_groups: int, level: float
) -> Interval:
    """Give a statistic's interval from the first `n_boot` of its replicates that are usable."""
    used = np.flatnonzero(usable)[:n_boot]
    if len(used) < n_boot:
        return Interval(float(value), math.nan, math.nan, n_groups, len(usable) - len(used))
    redrawn = int(used[-1]) + 1 - n_boot
    return percentile_intervals(np.array([value]), replicates[used, None], n_groups, level, redrawn)[0]


def resampled_weights(groups: Sequence[str] | np.ndarray, n_boot: int, seed: int) -> Iterator[np.ndarray]:
    """Yield `n_boot` times how often each item is drawn (N,) when whole groups are drawn with replacement."""
    codes, n_groups = _group_codes(groups)
    rng = np.random.default_rng(seed)
    for _ in range(n_boot):
        counts = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)
        yield counts[codes].astype(float)


def percentile_intervals(
    value: np.ndarray, replicates: np.ndarray, n: int, level: float = 0.95, redrawn: int = 0
) -> list[Interval]:
    """Turn values (k,) and their replicates (n_boot, k) into percentile intervals."""
    tail = 50 * (1 - level)
    lows, highs = np.percentile(replicates, [tail, 100 - tail], axis=0)
    return [
        Interval(float(v), float(low), float(high), n, redrawn) for v, low, high in zip(value, lows, highs, strict=True)
    ]


def paired_group_bootstrap(
    groups: Sequence[str] | np.ndarray,
    first: Statistic,
    second: Statistic,
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Give first - second with its interval; both statistics see the same resamples of the same items."""
    return group_bootstrap(groups, lambda weights: first(weights) - second(weights), n_boot, seed, level)


def wilson(k: float, n: int, level: float = 0.95) -> Interval:
    """Give the proportion k / n with Wilson's score interval; NaN for n = 0. Wilson 1927.

    k need not be whole: a share of n units that are divided. Raises ValueError unless 0 <= k <= n.
    """
    if not 0 <= k <= n:
        raise ValueError(f"k: expected 0 <= k <= n, got k = {k}, n = {n}.")
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    z = NormalDist().inv_cdf((1 + level) / 2)
    p, shrink = k / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Both ends hold p, but for rounding.
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)), n)


def _group_codes(groups: Sequence[str] | np.ndarray) -> tuple[np.ndarray, int]:
    if len(groups) == 0:
        raise ValueError("groups: expected at least one item, got none; there is nothing to score.")
    names, codes = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return codes, len(names)
