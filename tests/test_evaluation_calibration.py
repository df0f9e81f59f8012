"""Calibration and its measures against scikit-learn, hand values and simulated data with known truth."""

import json
import math
from pathlib import Path

import forked
import numpy as np
import pytest
from PIL import Image
from scipy.special import expit, logit
from scipy.stats import betabinom, binomtest
from sklearn.calibration import calibration_curve
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss

from llava.core.score_map import read_calibration
from llava.data.splits import group_hashes
from llava.detectors.base import load
from llava.detectors.m2f2det import M2F2Det, M2F2DetConfig
from llava.evaluation.calibration import (
    CalibrationConfig,
    balanced_weights,
    choose_method,
    conformal_band,
    conformal_bound,
    coverage_range,
    cross_validated_losses,
    fit_calibration,
    fit_map,
    needed_groups,
)
from llava.evaluation.pictures import draw_reliability
from llava.evaluation.predictions import Prediction, Predictions, write_csv
from llava.evaluation.reliability import (
    bin_numbers,
    calibration_metrics,
    calibration_report,
    cllr,
    ece,
    ece_if_calibrated,
    min_cllr,
    reliability,
)
from llava.evaluation.tables import calibration_tables

ROOT = Path(__file__).resolve().parents[1]


def predictions(labels, p_fake, groups=None):
    groups = range(len(labels)) if groups is None else groups
    return Predictions(
        tuple(
            Prediction(
                id=str(i), label=int(y), p_fake=float(p), video=str(i), group=f"g{g}", class_name=("real", "fake")[y]
            )
            for i, (y, p, g) in enumerate(zip(labels, p_fake, groups, strict=True))
        )
    )


def simulated(n, seed=0, temperature=1.0, shift=0.0, share=0.5):
    """Draw labels, p_fake and the true log-likelihood ratios: 2 * score of Gaussians of sd 1 at -1 and +1."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < share).astype(int)
    ratios = 2 * (rng.normal(size=n) + 2 * labels - 1)
    return labels, expit(temperature * ratios + shift), ratios


# ---- the maps ---------------------------------------------------------------------------------------------------


def test_the_temperature_that_was_put_in_is_found():
    labels, p_fake, ratios = simulated(20_000, temperature=2.5)
    found = fit_map("temperature", labels, p_fake)
    assert (1 / found.scale, found.offset) == (pytest.approx(2.5, rel=0.05), 0)
    platt = fit_map("platt", *simulated(20_000, temperature=2.5, shift=1.0)[:2])
    assert (platt.scale, platt.offset) == (pytest.approx(0.4, rel=0.05), pytest.approx(-0.4, abs=0.05))
    inner = np.abs(ratios) < 4
    assert found.log_likelihood_ratio(p_fake[inner]) == pytest.approx(ratios[inner], abs=0.25)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_the_ratio_does_not_depend_on_the_share_of_fakes(share):
    labels, p_fake, _ = simulated(20_000, share=share, temperature=1.5, shift=0.5)
    platt = fit_map("platt", labels, p_fake)
    assert platt.scale == pytest.approx(1 / 1.5, rel=0.08) and platt.offset == pytest.approx(-0.5 / 1.5, abs=0.08)


def test_platt_is_scikit_learn_s_logistic_regression():
    labels, p_fake, _ = simulated(4000, temperature=1.7, shift=-0.4, share=0.3)
    peer = LogisticRegression(C=1e12, class_weight="balanced", tol=1e-10).fit(logit(p_fake)[:, None], labels)
    found = fit_map("platt", labels, p_fake)
    assert (found.scale, found.offset) == pytest.approx((peer.coef_[0, 0], peer.intercept_[0]), abs=0.01)


def test_platt_s_targets_keep_separable_classes_finite():
    found = fit_map("platt", np.array([0] * 20 + [1] * 20), np.array([0.1] * 20 + [0.9] * 20))
    # at the optimum both scores get their targets: 1 / 22 and 21 / 22
    assert expit(found.log_likelihood_ratio(np.array([0.1, 0.9]))) == pytest.approx([1 / 22, 21 / 22], abs=1e-4)


def test_scores_that_are_turned_round_are_worth_nothing():
    labels, p_fake, _ = simulated(2000)
    assert fit_map("temperature", 1 - labels, p_fake).scale == 0


def test_isotonic_is_scikit_learn_s_between_the_ends():
    labels, p_fake, _ = simulated(5000, share=0.3)
    peer = IsotonicRegression().fit(p_fake, labels, sample_weight=balanced_weights(labels))
    found = fit_map("isotonic", labels, p_fake)
    inner = np.sort(p_fake)[500:-500]
    assert expit(found.log_likelihood_ratio(inner)) == pytest.approx(peer.predict(inner), abs=0.005)


def test_isotonic_never_says_0_or_1():
    found = fit_map("isotonic", np.array([0] * 9 + [1] * 9), np.arange(18) / 17)
    # the added fake shares the low block with nine reals, ten of each class altogether: 1 against 9
    ends = expit(found.log_likelihood_ratio(np.array([0.0, 0.3, 0.7, 1.0])))
    assert ends == pytest.approx([0.1, 0.1, 0.9, 0.9])


def test_one_class_cannot_be_calibrated():
    with pytest.raises(ValueError, match="needs both classes, got 3 real and 0 fake"):
        fit_map("platt", np.zeros(3, int), np.full(3, 0.2))


# ---- the choice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes"), [("temperature", {"temperature": 3}), ("platt", {"shift": 2}), ("isotonic", {})]
)
def test_the_simplest_method_that_fits_is_chosen(method, changes):
    labels, p_fake, _ = simulated(1500, 1, **changes)
    if method == "isotonic":  # ranks kept, but with a step that no line follows
        p_fake = np.where(p_fake < 0.5, 0.01 * p_fake, 0.995 + 0.01 * (p_fake - 0.5))
    assert choose_method(predictions(labels, p_fake), CalibrationConfig()) == method


def test_cross_validation_never_divides_a_group():
    labels, p_fake, _ = simulated(60, 2)
    doubled = predictions(np.tile(labels, 2), np.tile(p_fake, 2), groups=list(range(60)) * 2)
    losses = cross_validated_losses("isotonic", doubled, CalibrationConfig())
    assert losses[:60] == pytest.approx(losses[60:])
    leaky = predictions(np.tile(labels, 2), np.tile(p_fake, 2))
    assert cross_validated_losses("isotonic", leaky, CalibrationConfig()).mean() < losses.mean()


def test_cross_validated_loss_is_log_2_without_knowledge():
    rng = np.random.default_rng(0)
    data = predictions((rng.random(4000) < 0.2).astype(int), rng.random(4000))
    assert cross_validated_losses("platt", data, CalibrationConfig()).mean() == pytest.approx(math.log(2), abs=0.003)


def test_what_cannot_be_fitted_is_named():
    few = predictions([0, 1] * 8, np.linspace(0.1, 0.9, 16))
    with pytest.raises(ValueError, match=r"coverage of 0\.9 of real images needs 9 groups of them, got 8"):
        fit_calibration(few, CalibrationConfig(), "x", "")
    with pytest.raises(ValueError, match="folds: 20 parts of 16 groups"):
        fit_calibration(few, CalibrationConfig(coverage=0.5, folds=20), "x", "")
    with pytest.raises(ValueError, match="folds: 1 is not usable"):
        CalibrationConfig(folds=1)
    with pytest.raises(ValueError, match="coverage: 1 is not usable"):
        CalibrationConfig(coverage=1)


def test_the_calibration_counts_what_it_was_fitted_on():
    labels, p_fake, _ = simulated(90, share=0.4)
    groups = [i // 3 for i in range(90)]
    found = fit_calibration(predictions(labels, p_fake, groups), CalibrationConfig(method="platt"), "faces", "abc")
    classes = tuple(len({g for g, y in zip(groups, labels, strict=True) if y == label}) for label in (0, 1))
    assert (found.images, found.groups, found.class_groups) == (90, 30, classes)
    assert (found.prior, found.weights_sha256, str(found)) == (0.5, "abc", "calibrated on faces, n = 90")


def test_calibrating_repairs_probabilities_also_where_fakes_are_rare():
    fitted = fit_calibration(predictions(*simulated(3000, 1, temperature=3)[:2]), CalibrationConfig(), "x", "")
    labels, p_fake, _ = simulated(20_000, 2, temperature=3, share=0.05)
    for p, is_good in ((fitted.posterior(p_fake, 0.05), True), (fitted.posterior(p_fake), False), (p_fake, False)):
        error = ece(labels, p, bin_numbers(p), np.ones(len(labels)))
        assert (error < 0.01) == is_good


# ---- the band ---------------------------------------------------------------------------------------------------


def test_the_bound_is_the_rank_of_split_conformal_prediction():
    scores, groups = np.arange(1, 20) / 20, np.arange(19).astype(str)
    assert conformal_bound(scores, groups, 0.9) == scores[17]  # ceil(0.9 * 20) = 18th of 19
    assert conformal_bound(scores[:9], groups[:9], 0.9) == scores[8]
    assert conformal_bound(scores[:8], groups[:8], 0.9) == math.inf
    assert [needed_groups(c) for c in (0.5, 0.8, 0.9, 0.95, 0.99)] == [1, 4, 9, 19, 99]


def test_images_of_a_group_share_its_weight():
    # 9 groups of weight 1 / 10; the group of 100 images with the highest scores counts once
    scores = np.concatenate([np.arange(8) / 100, np.linspace(0.5, 0.9, 100)])
    groups = np.array([*map(str, range(8)), *["many"] * 100])
    assert conformal_bound(scores, groups, 0.85) == pytest.approx(np.linspace(0.5, 0.9, 100)[49])
    assert conformal_bound(scores, groups, 0.8) == 0.07


@pytest.mark.parametrize("frames", [1, 4])
def test_coverage_is_what_was_promised_for_new_groups(frames):
    """Bands of many small validation sets, each asked about one new image of a new group of each class."""
    rng, coverage, count, trials = np.random.default_rng(3), 0.8, 14, 4000

    def draw(label):
        """Give scores of `count + 1` groups whose frames are alike and whose sizes differ."""
        sizes = rng.integers(1, frames + 1, count + 1)
        means = rng.normal(2 * label - 1, 1, count + 1)
        return [expit(m + 0.2 * rng.normal(size=size)) for m, size in zip(means, sizes, strict=True)]

    kept = np.zeros(2)
    for _ in range(trials):
        drawn = [draw(label) for label in (0, 1)]
        sets = [np.concatenate(groups[:-1]) for groups in drawn]
        names = [np.repeat(np.arange(count), [len(g) for g in groups[:-1]]) for groups in drawn]
        fake_above = conformal_bound(sets[0], names[0], coverage)
        real_below = -conformal_bound(-sets[1], names[1], coverage)
        kept += [rng.choice(drawn[0][-1]) <= fake_above, rng.choice(drawn[1][-1]) >= real_below]
    for hits in kept:
        assert binomtest(int(hits), trials, coverage, alternative="less").pvalue > 0.01
    if frames == 1:  # exactly 12 of 15 = 0.8
        assert all(binomtest(int(hits), trials, 0.8).pvalue > 0.01 for hits in kept)


def test_coverage_of_one_band_lies_in_its_range():
    inside, test_size, validation = 0, 100, 60
    for seed in range(300):
        labels, p_fake, _ = simulated(4 * (validation + test_size), seed)
        is_real = p_fake[labels == 0][: validation + test_size]
        bound = conformal_bound(is_real[:validation], np.arange(validation), 0.9)
        low, high = coverage_range(validation, test_size, 0.9)
        inside += low <= (is_real[validation:] <= bound).mean() <= high
    # misses: floor(0.1 * 61) = 6
    law = betabinom(test_size, 55, 6)
    expected = law.cdf(round(high * test_size)) - law.cdf(round(low * test_size) - 1)
    assert binomtest(inside, 300, expected).pvalue > 0.01


def test_the_verdicts_keep_the_promise_under_any_prior():
    fitted = fit_calibration(predictions(*simulated(4000, 1)[:2]), CalibrationConfig(coverage=0.95), "x", "")
    assert fitted.real_below < 0.5 < fitted.fake_above
    labels, p_fake, _ = simulated(4000, 2, share=0.5)
    for prior in (None, 0.01, 0.3, 0.99):
        said = np.array(fitted.labels(p_fake, prior), dtype=str)
        assert (said[labels == 0] == "FAKE").mean() < 0.07 and (said[labels == 1] == "REAL").mean() < 0.07


def test_a_band_of_a_good_detector_is_empty():
    labels, p_fake, _ = simulated(400, 1, temperature=1)
    items = predictions(labels, np.clip(p_fake + labels - 0.5, 0, 1))
    real_below, fake_above = conformal_band(items, (0.9, 0.9))
    assert real_below > fake_above


def test_real_faces_may_be_promised_more():
    items = predictions(*simulated(4000, 1)[:2])
    even, careful = (
        fit_calibration(items, CalibrationConfig(coverage=0.8, real_coverage=share), "x", "") for share in (None, 0.99)
    )
    assert even.coverages == (0.8, 0.8) and careful.coverages == (0.99, 0.8)
    assert careful.real_below == even.real_below and careful.fake_above > even.fake_above
    labels, p_fake, _ = simulated(4000, 2, share=0.5)
    said = np.array(careful.labels(p_fake), dtype=str)
    assert 0.002 < (said[labels == 0] == "FAKE").mean() < 0.02 and 0.15 < (said[labels == 1] == "REAL").mean() < 0.25
    report = calibration_report(predictions(labels, p_fake), careful, n_boot=20)
    assert [row["promised"] for row in report["coverage"].values()] == [0.99, 0.8]
    few = predictions(labels[:60], p_fake[:60])
    with pytest.raises(ValueError, match=r"coverage of 0\.99 of real images needs 99 groups of them, got"):
        conformal_band(few, careful.coverages)
    with pytest.raises(ValueError, match="real_coverage: 1"):
        CalibrationConfig(real_coverage=1)


# ---- the measures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("binning", "strategy"), [("equal_mass", "quantile"), ("equal_width", "uniform")])
def test_ece_is_that_of_scikit_learn_s_calibration_curve(binning, strategy):
    labels, p_fake, _ = simulated(997, temperature=3)
    numbers = bin_numbers(p_fake, 10, binning)
    shares, means = calibration_curve(labels, p_fake, n_bins=10, strategy=strategy)
    sizes = np.bincount(numbers)[np.unique(numbers)]
    expected = np.sum(sizes * np.abs(shares - means)) / 997
    assert ece(labels, p_fake, numbers, np.ones(997)) == pytest.approx(expected, abs=1e-12)
    if binning == "equal_mass":
        bins = reliability(predictions(labels, p_fake), p_fake)
        assert [b.share.value for b in bins] == pytest.approx(shares)
        assert [b.p_fake for b in bins] == pytest.approx(means)


def test_ece_of_calibrated_scores_by_chance_is_that_of_calibrated_scores():
    draws = [simulated(300, seed) for seed in range(60)]
    errors = [ece(y, expit(r), bin_numbers(expit(r)), np.ones(300)) for y, _, r in draws]
    assert ece_if_calibrated(expit(draws[0][2])) == pytest.approx(np.mean(errors), abs=0.006)
    assert np.mean(errors) > 0.02, "an ECE of 0 is not what calibrated scores show"


def test_brier_and_log_loss_are_scikit_learn_s():
    labels, p_fake, _ = simulated(500, temperature=2)
    found = calibration_metrics(predictions(labels, p_fake), p_fake, prior=0.5, n_boot=20)
    assert found["brier"]["value"] == pytest.approx(brier_score_loss(labels, p_fake))
    assert found["log_loss"]["value"] == pytest.approx(log_loss(labels, p_fake))
    assert all(row["low"] <= row["value"] <= row["high"] for row in (found["brier"], found["log_loss"]))


def test_cllr_by_hand():
    labels, ones = np.array([1, 1, 0]), np.ones(3)
    # fakes of LR 1 and 3: log2(2) and log2(4/3); a real of LR 1/3: log2(4/3)
    expected = 0.5 * ((1 + math.log2(4 / 3)) / 2 + math.log2(4 / 3))
    assert cllr(labels, np.log([1, 3, 1 / 3]), ones) == pytest.approx(expected)
    assert cllr(labels, np.zeros(3), ones) == 1
    assert cllr(labels, np.array([-5.0, -5, 5]), ones) > 1
    assert math.isnan(cllr(np.ones(3, int), np.zeros(3), ones))
    assert cllr(labels, np.log([1, 3, 1 / 3]), np.array([2, 0, 1.0])) == pytest.approx(0.5 * (1 + math.log2(4 / 3)))


def test_min_cllr_by_hand():
    # PAV pools the middle pair (fake under real): LR 0, 1, 1, infinite; so 0.5 * (1 / 2 + 1 / 2)
    labels, scores = np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.3, 0.9])
    assert min_cllr(labels, scores, np.ones(4)) == pytest.approx(0.5)
    assert min_cllr(labels, np.array([0.1, 0.8, 0.2, 0.9]), np.ones(4)) == 0
    assert min_cllr(labels, np.full(4, 0.7), np.ones(4)) == 1
    assert min_cllr(labels, scores, np.array([1, 0, 1, 1.0])) == 0


def test_min_cllr_is_the_best_that_a_rising_map_can_do():
    labels, p_fake, ratios = simulated(3000, temperature=3, share=0.3)
    ones = np.ones(3000)
    peer = IsotonicRegression(y_min=1e-15, y_max=1 - 1e-15).fit(p_fake, labels, sample_weight=balanced_weights(labels))
    lowest = min_cllr(labels, p_fake, ones)
    assert lowest == pytest.approx(cllr(labels, logit(peer.predict(p_fake)), ones), abs=1e-9)
    assert lowest < cllr(labels, ratios, ones) < cllr(labels, logit(p_fake), ones)
    assert min_cllr(labels, ratios, ones) == pytest.approx(lowest), "any rising map of the scores has the same"
    drawn = np.random.default_rng(0).integers(0, 3, 3000).astype(float)
    again = np.repeat(np.arange(3000), drawn.astype(int))
    assert min_cllr(labels, p_fake, drawn) == pytest.approx(min_cllr(labels[again], p_fake[again], np.ones(len(again))))


def test_the_report_tells_before_from_after_and_counts_verdicts():
    fitted = fit_calibration(predictions(*simulated(800, 1, temperature=3)[:2]), CalibrationConfig(), "x", "")
    labels, p_fake, _ = simulated(400, 2, temperature=3)
    report = calibration_report(predictions(labels, p_fake), fitted, n_boot=60)
    assert report["after"]["ece"]["value"] < 0.7 * report["before"]["ece"]["value"]
    assert report["after"]["cllr"]["value"] < report["before"]["cllr"]["value"]
    assert report["after"]["min_cllr"] == report["before"]["min_cllr"]
    said = np.array(fitted.labels(p_fake), dtype=str)
    truth = np.where(labels == 1, "FAKE", "REAL")
    assert report["coverage"]["real"]["value"] == pytest.approx((said[labels == 0] != "FAKE").mean())
    assert report["coverage"]["fake"]["value"] == pytest.approx((said[labels == 1] != "REAL").mean())
    assert report["decided"]["value"] == pytest.approx((said != "UNCERTAIN").mean())
    assert report["right"]["value"] == pytest.approx((said == truth)[said != "UNCERTAIN"].mean())
    shifted = calibration_report(predictions(labels, p_fake), fitted, n_boot=2, prior=0.1)
    assert (shifted["prior"], shifted["band"]) == (0.1, fitted.band(0.1))
    assert shifted["after"]["ece"]["value"] > 0.15, "half of these are fakes, not a tenth"
    assert shifted["after"]["cllr"]["value"] == pytest.approx(report["after"]["cllr"]["value"])
    reals = int((labels == 0).sum())
    assert report["coverage"]["real"]["expected"] == coverage_range(fitted.class_groups[0], reals, 0.9)
    assert json.loads(json.dumps(report)) and len(calibration_tables(report)) == 2


def test_bins_of_many_images_of_few_groups_have_wide_intervals(tmp_path):
    labels, p_fake, _ = simulated(400)
    alone = reliability(predictions(labels, p_fake), p_fake)
    grouped = reliability(predictions(labels, p_fake, groups=[i % 8 for i in range(400)]), p_fake)
    for narrow, wide in zip(alone, grouped, strict=True):
        assert narrow.share.value == pytest.approx(wide.share.value)
        assert wide.share.high - wide.share.low > narrow.share.high - narrow.share.low
    draw_reliability(tmp_path / "r.png", predictions(labels, p_fake), {"raw": p_fake, "calibrated": p_fake**2})
    assert Image.open(tmp_path / "r.png").size[0] > 400


# ---- the script -------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """Write validation and test predictions, and a detector."""
    for name, seed in (("val", 1), ("test", 2)):
        labels, p_fake, _ = simulated(120, seed, temperature=2)
        write_csv(tmp_path / f"{name}.csv", predictions(labels, p_fake, groups=[f"{name}{i}" for i in range(120)]))
    M2F2Det(M2F2DetConfig.tiny()).save(tmp_path / "detector")
    return tmp_path


def calibrate(files, *words):
    command = ["eval/calibrate.py", "--predictions", str(files / "val.csv"), *map(str, words)]
    return forked.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})


@pytest.mark.e2e
def test_the_script_writes_what_the_detector_loads(files):
    words = ["--detector", files / "detector", "--data", "faces", "--coverage", "0.8", "--n_boot", "30"]
    words += ["--test", files / "test.csv", "--json", files / "report.json", "--picture", files / "r.png"]
    done = calibrate(files, *words)
    assert done.returncode == 0, done.stderr
    assert "calibrated on faces, n = 120, 120 groups" in done.stdout and "min Cllr" in done.stdout
    found = load(files / "detector").calibration
    assert found == read_calibration(files / "detector") and found.coverage == 0.8
    promised = json.loads((files / "report.json").read_text())["coverage"]
    assert [row["promised"] for row in promised.values()] == [0.8, 0.8]
    assert (files / "r.png").is_file()
    M2F2Det(M2F2DetConfig.tiny()).save(files / "other")
    (files / "other" / "calibration.json").write_text((files / "detector" / "calibration.json").read_text())
    with pytest.raises(ValueError, match="fitted for other weights"):
        load(files / "other")
    assert calibrate(files, "--detector", files / "other", "--method", "platt").returncode == 0
    assert load(files / "other").calibration.score_map.method == "platt"


@pytest.mark.e2e
def test_the_script_refuses_the_groups_it_was_fitted_on(files):
    done = calibrate(files, "--test", files / "val.csv")
    assert done.returncode == 1 and "share 120 groups" in done.stderr
    assert "give --test" in calibrate(files, "--picture", files / "r.png").stderr


@pytest.mark.e2e
def test_the_script_refuses_the_groups_that_the_detector_was_trained_on(files):
    detector = load(files / "detector")
    detector.trained_on = group_hashes(["gval0", "gval1", "another"])
    detector.save(files / "detector")
    done = calibrate(files, "--detector", files / "detector")
    assert done.returncode == 1 and "has 2 groups that the detector, or a part of it, is trained on" in done.stderr
    assert load(files / "detector").calibration is None
    assert calibrate(files, "--detector", files / "detector", "--allow_leaks").returncode == 0
