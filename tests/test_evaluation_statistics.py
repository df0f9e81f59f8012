"""Intervals against hand values, scipy and direct resampling."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap
from sklearn.metrics import roc_auc_score

from llava.evaluation.statistics import (
    group_bootstrap,
    group_bootstraps,
    paired_group_bootstrap,
    percentile_intervals,
    resampled_weights,
    wilson,
)


def mean_of(values):
    return lambda weights: float(np.average(values, weights=weights))


def test_wilson_known_values():
    # 136 of 144, the published judge: 89.4 to 97.2 %
    interval = wilson(136, 144)
    assert (interval.value, interval.n) == (pytest.approx(136 / 144), 144)
    assert (interval.low, interval.high) == (pytest.approx(0.894, abs=5e-4), pytest.approx(0.972, abs=5e-4))


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 5), (1, 3), (57, 100)])
def test_wilson_equals_scipy(k, n):
    theirs = binomtest(k, n).proportion_ci(method="wilson")
    assert (wilson(k, n).low, wilson(k, n).high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))


def test_wilson_refuses_impossible_counts():
    with pytest.raises(ValueError, match="k = 4, n = 3"):
        wilson(4, 3)
    assert math.isnan(wilson(0, 0).value)


def test_one_item_per_group_equals_scipy():
    values = np.random.default_rng(1).normal(size=60)
    ours = group_bootstrap([str(i) for i in range(60)], mean_of(values), n_boot=4000)
    theirs = bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(2))
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.02)
    assert ours.n == 60


def test_an_interval_holds_95_percent_unless_told_otherwise():
    replicates = np.arange(1001.0)[:, None]  # of 0, 1, ... 1000: the 2.5th and the 97.5th percentile are 25 and 975
    (interval,) = percentile_intervals(np.array([500.0]), replicates, n=7)
    assert (interval.low, interval.high, interval.n) == (pytest.approx(25), pytest.approx(975), 7)
    (narrow,) = percentile_intervals(np.array([500.0]), replicates, n=7, level=0.9)
    assert (narrow.low, narrow.high) == (pytest.approx(50), pytest.approx(950))


def test_every_bootstrap_holds_95_percent_of_its_resamples():
    values = np.random.default_rng(6).normal(size=40)
    groups = np.arange(40).astype(str)
    drawn = [mean_of(values)(weights) for weights in resampled_weights(groups, 1001, seed=0)]
    expected = (pytest.approx(sorted(drawn)[25]), pytest.approx(sorted(drawn)[975]))
    zero = mean_of(np.zeros(40))
    for interval in (
        group_bootstrap(groups, mean_of(values), 1001),
        *group_bootstraps(groups, lambda weights: np.array([mean_of(values)(weights)]), 1001),
        paired_group_bootstrap(groups, mean_of(values), zero, 1001),
    ):
        assert (interval.low, interval.high) == expected


def test_groups_widen_the_interval_as_the_theory_says():
    rng = np.random.default_rng(3)
    per_group = rng.normal(size=100)
    values, groups = np.repeat(per_group, 9), np.repeat([f"g{i}" for i in range(100)], 9)
    grouped = group_bootstrap(groups, mean_of(values))
    assert grouped.high - grouped.low == pytest.approx(2 * 1.96 * per_group.std() / 10, rel=0.1)
    alone = group_bootstrap(np.arange(900).astype(str), mean_of(values))
    assert (grouped.high - grouped.low) / (alone.high - alone.low) == pytest.approx(3, rel=0.15)


def test_weights_are_whole_groups():
    groups = ["a", "a", "b", "c", "c", "c"]
    for weights in resampled_weights(groups, 50, seed=0):
        assert weights[0] == weights[1]
        assert len({*weights[3:]}) == 1
        assert weights[0] + weights[2] + weights[3] == 3


def test_same_seed_same_interval():
    values = np.arange(20.0)
    groups = np.arange(20).astype(str)
    assert group_bootstrap(groups, mean_of(values), 100, seed=4) == group_bootstrap(
        groups, mean_of(values), 100, seed=4
    )
    assert group_bootstrap(groups, mean_of(values), 100, seed=4) != group_bootstrap(
        groups, mean_of(values), 100, seed=5
    )


def test_undefined_resamples_are_redrawn_and_counted():
    labels, scores = np.array([0, 1, 1, 1]), np.array([0.1, 0.2, 0.8, 0.9])

    def auc(weights):
        kept = weights > 0
        return roc_auc_score(labels[kept], scores[kept]) if len({*labels[kept]}) == 2 else math.nan

    interval = group_bootstrap(["a", "b", "c", "d"], auc, n_boot=300)
    # One class only: the real one is never drawn (0.75 ** 4), or always (0.25 ** 4).
    p_undefined = 0.75**4 + 0.25**4
    assert interval.redrawn / (300 + interval.redrawn) == pytest.approx(p_undefined, abs=0.07)
    assert interval.value == interval.low == interval.high == 1


def test_undefined_everywhere_and_single_group_have_no_bounds():
    undefined, defined = group_bootstraps(["a", "b"], lambda w: np.array([math.nan, w.sum()]), n_boot=20)
    assert math.isnan(undefined.value)
    assert math.isnan(undefined.low)
    assert defined.value == defined.low == 2
    single = group_bootstrap(["a", "a"], mean_of(np.array([1.0, 3.0])), n_boot=20)
    assert single.value == 2
    assert math.isnan(single.low)
    assert single.to_dict()["high"] is None


def test_hopeless_redraws_end_without_bounds():
    interval = group_bootstrap(["a", "b", "c"], lambda w: 1.0 if w[0] == w[1] == w[2] == 1 else math.nan, 10)
    assert interval.low < math.inf  # 2 of 9 resamples draw every group once: enough for 10 of 200
    rare = group_bootstrap([str(i) for i in range(12)], lambda w: 1.0 if w.max() == 1 else math.nan, 10)
    assert (rare.value, rare.redrawn) == (1, 200)
    assert math.isnan(rare.low)


def test_no_items_is_an_error():
    with pytest.raises(ValueError, match="at least one item"):
        group_bootstrap([], lambda w: 0.0)


def test_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(5)
    hard = rng.normal(size=80)
    first, second = hard + 0.3 + 0.05 * rng.normal(size=80), hard
    groups = np.arange(80).astype(str)
    difference = paired_group_bootstrap(groups, mean_of(first), mean_of(second))
    assert difference.value == pytest.approx((first - second).mean())
    assert difference.low > 0
    assert difference.high - difference.low < 0.1


def test_bootstraps_apart_are_those_of_each_statistic_alone():
    groups = np.arange(6).astype(str)
    values = np.random.default_rng(8).normal(size=6)
    rare, none = np.array([1.0, 0, 0, 0, 0, 0]), np.zeros(6)

    def mean_within(kept):
        return lambda w: float(w * kept @ values / (w @ kept)) if w @ kept else math.nan

    alone = [mean_within(kept) for kept in (np.ones(6), rare, rare[::-1], none)]
    apart = group_bootstraps(groups, lambda w: np.array([s(w) for s in alone]), 200, jointly=False)
    for found, statistic in zip(apart[:3], alone, strict=False):
        assert found == group_bootstrap(groups, statistic, 200)
    assert apart[0].redrawn == 0 < apart[1].redrawn != apart[2].redrawn
    assert np.isnan([apart[3].value, apart[3].low, apart[3].high]).all()
    joint = group_bootstraps(groups, lambda w: np.array([s(w) for s in alone]), 200)
    assert len({interval.redrawn for interval in joint}) == 1 and joint[0].redrawn > apart[1].redrawn


def test_only_the_statistic_that_is_hardly_ever_defined_has_no_bounds():
    groups = np.arange(8).astype(str)
    steady, never = group_bootstraps(
        groups, lambda w: np.array([w[0], 1.0 if w.min() > 0 else math.nan]), 50, jointly=False
    )
    assert not math.isnan(steady.low) and steady.redrawn == 0
    assert math.isnan(never.low) and never.value == 1 and 950 < never.redrawn <= 1000
