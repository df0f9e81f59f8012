"""Metrics against scikit-learn, scipy and hand values."""

import json

import numpy as np
import pytest
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn import metrics as sk

from llava.evaluation.metrics import (
    TRIM,
    RankedScores,
    choose_threshold,
    confusion,
    detection_report,
    threshold_from_validation,
)
from llava.evaluation.pictures import draw_histogram, draw_roc
from llava.evaluation.predictions import Prediction, Predictions, by_video


def scores_with_ties(seed, n=200):
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.6).astype(int)
    return labels, np.round(np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1), 1 + seed % 3)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("weighted", [False, True])
def test_ranking_metrics_equal_sklearn(seed, weighted):
    labels, p_fake = scores_with_ties(seed)
    weights = np.random.default_rng(seed).integers(0, 4, len(labels)).astype(float) if weighted else None
    curve = RankedScores(labels, p_fake).curve(weights)
    assert curve.auc() == pytest.approx(sk.roc_auc_score(labels, p_fake, sample_weight=weights))
    assert curve.average_precision() == pytest.approx(sk.average_precision_score(labels, p_fake, sample_weight=weights))
    fpr, tpr, _ = sk.roc_curve(labels, p_fake, sample_weight=weights)
    eer = brentq(lambda x: 1 - x - interp1d(fpr, tpr)(x), 0, 1)
    assert curve.eer() == pytest.approx(eer, abs=1e-9)


def test_extremes():
    labels = np.array([0, 0, 1, 1])
    perfect = RankedScores(labels, np.array([0.1, 0.2, 0.8, 0.9])).curve()
    assert (perfect.auc(), perfect.average_precision(), perfect.eer()) == (1, 1, 0)
    inverted = RankedScores(labels, np.array([0.9, 0.8, 0.2, 0.1])).curve()
    assert (inverted.auc(), inverted.eer()) == (0, 1)
    constant = RankedScores(labels, np.full(4, 0.5)).curve()
    assert (constant.auc(), constant.average_precision(), constant.eer()) == (0.5, 0.5, 0.5)
    one_class = RankedScores(np.ones(3, int), np.array([0.1, 0.2, 0.3])).curve()
    assert np.isnan([one_class.auc(), one_class.average_precision(), one_class.eer()]).all()


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.7])
def test_threshold_metrics_equal_sklearn(threshold):
    labels, p_fake = scores_with_ties(1)
    answers = (p_fake >= threshold).astype(int)
    ours = confusion(labels, answers)
    assert [ours.tn, ours.fp, ours.fn, ours.tp] == sk.confusion_matrix(labels, answers).ravel().tolist()
    assert ours.accuracy == pytest.approx(sk.accuracy_score(labels, answers))
    assert ours.balanced_accuracy == pytest.approx(sk.balanced_accuracy_score(labels, answers))
    assert ours.precision == pytest.approx(sk.precision_score(labels, answers))
    assert ours.recall_fake == pytest.approx(sk.recall_score(labels, answers))
    assert ours.f1 == pytest.approx(sk.f1_score(labels, answers))


def test_nothing_called_fake_has_no_precision():
    assert np.isnan(confusion(np.array([0, 1]), np.array([0, 0])).precision)


@pytest.mark.parametrize("seed", range(5))
def test_chosen_thresholds_are_the_best(seed):
    labels, p_fake = scores_with_ties(seed)
    grid = [confusion(labels, (p_fake >= t).astype(int)) for t in np.linspace(-0.001, 1.001, 4001)]

    def at(rule):
        return confusion(labels, (p_fake >= choose_threshold(labels, p_fake, rule)).astype(int))

    assert at("accuracy").accuracy == pytest.approx(max(c.accuracy for c in grid))
    assert at("youden").balanced_accuracy == pytest.approx(max(c.balanced_accuracy for c in grid))
    gap = abs(at("eer").recall_real - at("eer").recall_fake)
    assert gap == pytest.approx(min(abs(c.recall_real - c.recall_fake) for c in grid))


def test_threshold_lies_between_separated_scores():
    assert choose_threshold(np.array([0, 0, 1]), np.array([0.1, 0.3, 0.7])) == pytest.approx(0.5)
    assert choose_threshold(np.array([0, 0, 0, 1]), np.array([0.2, 1.0, 1.0, 1.0]), "accuracy") > 1
    with pytest.raises(ValueError, match="both classes"):
        choose_threshold(np.array([1, 1]), np.array([0.1, 0.3]))
    with pytest.raises(ValueError, match=r"youdem.*Did you mean 'youden'"):
        choose_threshold(np.array([0, 1]), np.array([0.1, 0.3]), "youdem")


def made_predictions(n_groups=24, frames=4, seed=0, prefix="g"):
    rng = np.random.default_rng(seed)
    items = []
    for g in range(n_groups):
        for class_name, shift in (("real", 0.0), ("Deepfakes", 0.25), ("NeuralTextures", 0.05)):
            for f in range(frames):
                video = f"{prefix}{g}_{class_name}"
                p = float(np.clip(rng.normal(0.4 + shift, 0.15), 0, 1))
                label = int(class_name != "real")
                items.append(
                    Prediction(
                        id=f"{video}_{f}", label=label, p_fake=p, video=video, group=f"{prefix}{g}",
                        class_name=class_name,
                    )
                )  # fmt: skip
    return Predictions(tuple(items))


def test_report_holds_sklearn_numbers_with_intervals_around_them():
    predictions = made_predictions()
    report = detection_report(predictions, 0.5, n_boot=200)
    assert report["n"] == {
        "frames": 288, "videos": 72, "groups": 24, "real": 96, "fake": 192,
        "classes": {"Deepfakes": 96, "NeuralTextures": 96, "real": 96},
    }  # fmt: skip
    frame = report["frame"]
    assert frame["auc"]["value"] == pytest.approx(sk.roc_auc_score(predictions.labels, predictions.p_fake))
    for name, interval in frame.items():
        if name != "confusion":
            assert interval["low"] < interval["value"] < interval["high"], name
            assert interval["n"] == 24
    kept = predictions.class_names != "Deepfakes"
    nt = sk.roc_auc_score(predictions.labels[kept], predictions.p_fake[kept])
    assert report["classes"]["NeuralTextures"]["frame"]["auc"]["value"] == pytest.approx(nt)
    assert report["video"]["auc"]["value"] > frame["auc"]["value"]
    trimmed = by_video(predictions, 0.25)
    expected = sk.roc_auc_score(trimmed.labels, trimmed.p_fake)
    assert expected != report["video"]["auc"]["value"] and report["trim"] == TRIM
    report = detection_report(predictions, 0.5, n_boot=200, trim=0.25)
    assert report["video_trimmed"]["auc"]["value"] == pytest.approx(expected)
    assert report["classes"]["NeuralTextures"]["video_trimmed"]["n"] == 24
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_report_of_one_class_says_what_is_undefined():
    fakes = Predictions(tuple(p for p in made_predictions() if p.label == 1))
    report = detection_report(fakes, 0.5, n_boot=50)
    assert report["frame"]["auc"]["value"] is None
    assert report["frame"]["accuracy"]["low"] is not None


def test_threshold_comes_from_other_groups_only():
    test = made_predictions()
    with pytest.raises(ValueError, match="share 24 groups"):
        threshold_from_validation(test, test)
    validation = made_predictions(seed=1, prefix="v")
    expected = choose_threshold(validation.labels, validation.p_fake, "eer")
    assert threshold_from_validation(validation, test, "eer") == expected


def test_pictures_are_written_whole(tmp_path):
    draw_roc(tmp_path / "roc.png", made_predictions(), n_boot=20)
    draw_histogram(tmp_path / "scores.png", made_predictions(), 0.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["roc.png", "scores.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in tmp_path.iterdir())
    fakes = Predictions(tuple(p for p in made_predictions() if p.label == 1))
    with pytest.raises(ValueError, match="one class"):
        draw_roc(tmp_path / "none.png", fakes, n_boot=20)
    assert not (tmp_path / "none.png").exists()
