"""Curves and flip rates: hand-made scores whose every number is known, and one split scored through the command."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from toy_detector import HandMadeConfig, HandMadeDetector

from llava import cli
from llava.core.types import VerdictLabel
from llava.data.sources import DataConfig, split_of
from llava.data.stills import FolderSource
from llava.detectors.m2f2det import M2F2Det, M2F2DetConfig
from llava.evaluation.pictures import draw_robustness
from llava.evaluation.predictions import Prediction, Predictions
from llava.evaluation.robustness import robustness_report
from llava.evaluation.statistics import wilson
from llava.ops.degrade import DEGRADATIONS, VERSIONS, Change, every_change
from llava.train.evaluate import degraded_scores, rule_lines
from llava.train.scoring import score

LABELS = [0, 0, 0, 0, 1, 1, 1, 1]
P_FAKE = np.array([0.1, 0.2, 0.3, 0.8, 0.9, 0.9, 0.5, 0.2])


def by_band(p_fake: np.ndarray) -> list[VerdictLabel]:
    """REAL under 0.4, FAKE above 0.6."""
    return [VerdictLabel("REAL" if p < 0.4 else "FAKE" if p > 0.6 else "UNCERTAIN") for p in p_fake]


def predictions() -> Predictions:
    names = ("real", "fake")
    return Predictions(
        tuple(
            Prediction(id=f"{i}", label=y, p_fake=float(p), video=f"{i}", group=f"g{i}", class_name=names[y])
            for i, (y, p) in enumerate(zip(LABELS, P_FAKE, strict=True))
        )
    )


def degraded() -> dict[Change, np.ndarray]:
    """Image 3 (real, called fake) turns at JPEG 30; image 4 (fake) at JPEG 40, which the rule does not try."""
    scores = {change: P_FAKE.copy() for change in every_change()}
    scores[Change("JPEG", 30)][3] = 0.1
    scores[Change("JPEG", 40)][4] = 0.3
    scores[Change("JPEG", 40)][5] = 0.5  # into the band: another verdict, no flip
    return scores


def test_only_real_against_fake_is_a_flip() -> None:
    labels = [VerdictLabel.REAL, VerdictLabel.FAKE, VerdictLabel.UNCERTAIN]
    found = [[before.contradicts(after) for after in labels] for before in labels]
    assert found == [[False, True, False], [True, False, False], [False, False, False]]


def test_flip_rates_before_and_after_the_rule() -> None:
    report = robustness_report(predictions(), degraded(), by_band, n_boot=50)
    jpeg = report["degradations"]["JPEG"]
    at = {point["strength"]: point for point in jpeg["points"]}
    # 7 of 8 verdicts are clear; image 3 is what the rule makes UNCERTAIN, so 6 stay.
    before, after = at[30]["flips_before"], at[30]["flips_after"]
    assert (before["value"], before["images"]) == (pytest.approx(1 / 7), 7)
    assert (after["value"], after["images"]) == (0, 6)
    expected = wilson(1, 7)
    assert (before["low"], before["high"]) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert after["high"] == pytest.approx(wilson(0, 6).high) and after["high"] > 0
    assert (at[40]["flips_before"]["value"], at[40]["flips_after"]["value"]) == (pytest.approx(1 / 7), 1 / 6)
    assert at[40]["differs"]["value"] == 2 / 8 and at[95]["differs"]["value"] == 0
    assert jpeg["any"]["flips_before"]["value"] == pytest.approx(2 / 7)
    assert jpeg["any"]["flips_after"]["value"] == 1 / 6 and jpeg["any"]["differs"]["value"] == 3 / 8
    assert report["degradations"]["blur"]["any"]["flips_before"]["value"] == 0


def test_what_the_rule_costs_and_brings() -> None:
    rule = robustness_report(predictions(), degraded(), by_band, n_boot=50)["rule"]
    assert rule["clear_before"]["value"] == 7 / 8 and rule["clear_after"]["value"] == 6 / 8
    assert rule["become_uncertain"]["value"] == pytest.approx(1 / 7)
    assert {name: share["value"] for name, share in rule["by_version"].items() if share["value"]} == {
        "JPEG 30": pytest.approx(1 / 7)
    }
    assert (rule["right_before"]["value"], rule["right_after"]["value"]) == (pytest.approx(5 / 7), pytest.approx(5 / 6))


def test_auc_at_every_strength_equals_sklearn() -> None:
    rng = np.random.default_rng(0)
    scores = {change: rng.random(len(LABELS)) for change in every_change()}
    report = robustness_report(predictions(), scores, by_band, n_boot=50)
    assert report["undegraded"]["auc"]["value"] == pytest.approx(roc_auc_score(LABELS, P_FAKE))
    for kind, numbers in report["degradations"].items():
        assert [point["strength"] for point in numbers["points"]] == list(DEGRADATIONS[kind].strengths)
        for point in numbers["points"]:
            expected = roc_auc_score(LABELS, scores[Change(kind, point["strength"])])
            assert point["auc"]["value"] == pytest.approx(expected)
            assert point["auc"]["low"] <= expected <= point["auc"]["high"]


def test_nothing_clear_is_said_and_not_zero(tmp_path: Path) -> None:
    report = robustness_report(predictions(), degraded(), lambda p: [VerdictLabel.UNCERTAIN] * len(p), n_boot=20)
    assert report["rule"]["become_uncertain"] == wilson(0, 0).to_dict() | {"images": 0}
    assert "none to look at" in rule_lines({"verdicts": "a band", **report})[1]
    draw_robustness(tmp_path / "a.png", report)
    assert Image.open(tmp_path / "a.png").size[0] > 1000


def test_the_lines_say_rate_interval_and_number() -> None:
    report = robustness_report(predictions(), degraded(), by_band, n_boot=20)
    lines = rule_lines({"verdicts": "a band", **report})
    low, high = (100 * end for end in (wilson(2, 7).low, wilson(2, 7).high))
    assert lines[0].split("  ")[0] == "verdicts by a band" and len(lines) == 7
    jpeg = " ".join(lines[1].split())
    assert jpeg.startswith(f"JPEG 95 to 30 (quality) 28.6 % [{low:.1f}, {high:.1f}] of 7 16.7 %")
    assert lines[-1].startswith("the rule makes UNCERTAIN 14.3 %")


def test_scores_are_those_of_the_changed_images_whatever_the_batch(class_folder: Path) -> None:
    source = FolderSource(DataConfig(path=str(class_folder)))
    records = split_of(source, "test")
    detector = HandMadeDetector(HandMadeConfig(measure="detail", turning_point=0.05, size=48))
    device = torch.device("cpu")
    scores = degraded_scores(partial(score, detector, source, records, device, batch_size=3))
    again = degraded_scores(partial(score, detector, source, records, device, batch_size=8))
    other = degraded_scores(partial(score, detector, source, records, device, seed=1))
    assert set(VERSIONS.values()) <= set(scores) == set(every_change())
    for change, p_fake in scores.items():
        np.testing.assert_allclose(p_fake, again[change], atol=1e-6)
        assert np.array_equal(again[change], other[change]) == (change.kind != "noise")
    fakes = np.array([record.label == 1 for record in records])
    plain = score(detector, source, records, device).p_fake
    assert (plain[fakes] > 0.5).all() and (scores[Change("resize", 0.5)][fakes] < 0.5).all(), "the grid is gone"


def test_m2f2_evaluate_writes_curves_and_flip_rates(
    class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    M2F2Det(M2F2DetConfig.tiny()).save(tmp_path / "detector")
    output = tmp_path / "out"
    words = ["evaluate", "--model", str(tmp_path / "detector"), "--data.path", str(class_folder), "--resamples", "20"]
    assert cli.main([*words, "--device", "cpu", "--output_dir", str(output)]) == 0
    plain = capsys.readouterr().out
    assert (
        plain.startswith("test frame ")
        and "\ntest video trimmed AUC" in plain
        and not (output / "robustness.json").exists()
    )
    assert cli.main([*words, "--device", "cpu", "--output_dir", str(output), "--robustness"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(plain.splitlines()[0]) and "after the rule" in out
    report = json.loads((output / "robustness.json").read_text())
    assert report["verdicts"] == "threshold 0.500, not calibrated" and report["n"]["images"] == 8
    assert json.loads((output / "report.json").read_text())["frame"]["auc"]["value"] == pytest.approx(
        report["undegraded"]["auc"]["value"]
    )
    assert Image.open(output / "robustness.png").size[0] > 1000
    assert cli.main(["evaluate", "--model", str(tmp_path / "none"), "--data.path", str(class_folder)]) == 2
