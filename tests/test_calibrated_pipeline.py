"""A calibrated detector in the pipeline, through merges and on the command line; words rest on the verdict's p_fake."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_world import calibration_of, draw

import llava
from llava import cli
from llava.core.score_map import read_calibration, write_calibration
from llava.core.types import REAL, Decision
from llava.detectors.base import load
from llava.explainer.delta import fingerprint, save_delta
from llava.explainer.generation import load_model
from llava.explainer.merge import merge_delta, merge_detector
from llava.jobs.ddvqa_answers import JudgeSettings, _identity
from llava.pipeline import Pipeline
from llava.pipeline.crops import Face
from llava.pipeline.settings import FaceSettings
from llava.pipeline.verdict import CONTRADICTED, IN_THE_BAND

WHOLE = FaceSettings(face="off")
PICTURES = [draw(i % 2, 300 + i) for i in range(6)]


@pytest.fixture(scope="module")
def calibrated(tiny_explainer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with `detector` and `explainer`, both calibrated by hand."""
    folder = tmp_path_factory.mktemp("calibrated")
    for name in ("detector", "explainer"):
        shutil.copytree(tiny_explainer.parent / name, folder / name)
        write_calibration(folder / name, calibration_of(load(tiny_explainer.parent / "detector").fingerprint()))
    return folder


def opened(folder: Path, **options) -> Pipeline:
    return llava.load(str(folder), device="cpu", faces=WHOLE, **options)


@pytest.mark.parametrize("name", ["detector", "explainer"])
def test_a_verdict_is_the_calibrated_posterior(calibrated: Path, tiny_explainer: Path, name: str) -> None:
    raw = opened(tiny_explainer.parent / name).detect(PICTURES)
    for before, after in zip(raw, opened(calibrated / name).detect(PICTURES), strict=True):
        assert before.raw_p_fake == before.p_fake == pytest.approx(after.raw_p_fake)
        odds = np.sqrt(before.p_fake / (1 - before.p_fake))
        assert after.p_fake == pytest.approx(odds / (1 + odds), rel=1e-5)
        assert (after.likelihood_ratio, after.prior) == (pytest.approx(odds, rel=1e-5), 0.5)
        assert (after.label, after.threshold, after.band) == (before.label, 0.5, (0.5, 0.5))
        assert after.calibration == "calibrated on checkerboards, n = 40"
        assert after.evidence == before.evidence and after.probabilities == before.probabilities
        assert "% forged (calibrated on checkerboards, n = 40)" in str(after)


def test_the_prior_moves_the_posterior_and_never_turns_a_verdict_round(calibrated: Path) -> None:
    plain, rare = opened(calibrated / "detector"), opened(calibrated / "detector", prior=1e-4)
    for before, after in zip(plain.detect(PICTURES), rare.detect(PICTURES), strict=True):
        odds = before.likelihood_ratio * 1e-4 / (1 - 1e-4)
        assert after.p_fake == pytest.approx(odds / (1 + odds), rel=1e-5)
        assert after.likelihood_ratio == before.likelihood_ratio and after.prior == 1e-4
        assert after.label == ("REAL" if before.label == "REAL" else "UNCERTAIN")
        assert after.reason == ("" if after.label == "REAL" else CONTRADICTED)
        assert after.calibration.endswith("n = 40, 0.01 % forgeries expected")


def test_a_score_in_the_band_is_uncertain_and_the_words_stay(calibrated: Path, tmp_path: Path) -> None:
    shutil.copytree(calibrated / "explainer", tmp_path / "wide")
    wide = replace(read_calibration(tmp_path / "wide"), real_below=0.0, fake_above=1.0)
    write_calibration(tmp_path / "wide", wide)
    before = list(opened(calibrated / "explainer").explain_all(PICTURES))
    after = list(opened(tmp_path / "wide").explain_all(PICTURES))
    assert [a.text for a in after] == [b.text for b in before], "the words rest on p_fake, not on the label"
    assert {a.verdict.label for a in after} == {"UNCERTAIN"} and {a.verdict.reason for a in after} == {IN_THE_BAND}
    assert {a.agrees for a in after} == {None}
    assert all(a.remark.endswith("the verdict is UNCERTAIN.]") for a in after if a.text_verdict is not None)


def test_the_words_are_told_the_calibrated_p_fake(calibrated: Path, tiny_explainer: Path) -> None:
    told = opened(calibrated / "explainer").needed_explainer().encode(PICTURES).evidence
    raw = opened(tiny_explainer).needed_explainer().encode(PICTURES).evidence
    verdicts = opened(calibrated / "explainer").detect(PICTURES)
    assert told[:, 1].tolist() == pytest.approx([v.p_fake for v in verdicts], abs=1e-6)
    assert told.sum(dim=1).tolist() == pytest.approx([1.0] * len(PICTURES))
    assert raw[:, 1].tolist() == pytest.approx([v.raw_p_fake for v in verdicts], abs=1e-6)
    assert not np.allclose(told, raw)


def test_the_words_are_told_the_verdict_at_its_prior(calibrated: Path) -> None:
    rare = opened(calibrated / "explainer", prior=0.01)
    findings, encoded = rare.look([Face(image="", pixels=picture) for picture in PICTURES])
    expected = [finding.verdict.p_fake for finding in findings]
    assert encoded.evidence[:, 1].tolist() == pytest.approx(expected, abs=1e-6) and max(expected) < 0.5
    assert {a.text_verdict for a in rare.explain_all(PICTURES)} == {REAL}, "hardly any is expected to be forged"


def test_without_calibration_words_tip_over_where_the_verdict_does(tiny_explainer: Path) -> None:
    explainer = opened(tiny_explainer).needed_explainer()
    raw = explainer.encode(PICTURES).evidence[:, 1].double()
    threshold = float(raw.median())
    explainer.model.detector.decision = Decision(threshold=threshold)
    told = explainer.encode(PICTURES).evidence
    odds = raw / (1 - raw) / (threshold / (1 - threshold))
    torch.testing.assert_close(told[:, 1].double(), odds / (1 + odds), atol=1e-3, rtol=0)
    assert told.sum(dim=1).tolist() == pytest.approx([1.0] * len(PICTURES))
    assert ((told[:, 1] >= 0.5 - 1e-4) == (raw >= threshold)).all() and 0 < (raw >= threshold).sum() < len(PICTURES)


def test_a_prior_without_calibration_is_refused(tiny_explainer: Path, calibrated: Path) -> None:
    with pytest.raises(ValueError, match=r"prior: 0\.1 moves.*is not calibrated; run eval/calibrate\.py"):
        opened(tiny_explainer.parent / "detector", prior=0.1)
    with pytest.raises(ValueError, match="prior: 10 is not usable"):
        opened(calibrated / "detector", prior=10)


def test_an_explainer_refuses_the_calibration_of_another_detector(calibrated: Path, tmp_path: Path) -> None:
    shutil.copytree(calibrated / "explainer", tmp_path / "wrong")
    write_calibration(tmp_path / "wrong", replace(read_calibration(tmp_path / "wrong"), weights_sha256="0" * 64))
    with pytest.raises(ValueError, match="fitted for other weights"):
        opened(tmp_path / "wrong")


def test_a_merge_takes_the_calibration_along(calibrated: Path, tiny_explainer: Path, tmp_path: Path) -> None:
    base = tiny_explainer.parent / "base"
    merge_detector(str(base), str(calibrated / "detector"), tmp_path / "merged")
    model = load_model(tmp_path / "merged").requires_grad_(False)
    assert model.detector.calibration == read_calibration(calibrated / "detector")
    for parameter in model.deepfake_projector.requires_grad_(True).parameters():
        parameter.data += 0.1
    save_delta(model, tmp_path / "delta", {"name": "merged", "sha256": fingerprint(tmp_path / "merged")})
    merge_delta(str(tmp_path / "merged"), str(tmp_path / "delta"), tmp_path / "folded")
    assert load_model(tmp_path / "folded").detector.calibration == read_calibration(calibrated / "detector")
    merge_detector(str(base), str(tiny_explainer.parent / "detector"), tmp_path / "plain")
    assert load_model(tmp_path / "plain").detector.calibration is None


def test_answers_of_another_calibration_are_not_continued(calibrated: Path, tiny_explainer: Path) -> None:
    def identity(folder: Path) -> str:
        return _identity(JudgeSettings(model_path=str(folder)), [])["sha256"]

    with_it = identity(calibrated / "explainer")
    (calibrated / "explainer" / "calibration.json").rename(calibrated / "kept.json")
    without = identity(calibrated / "explainer")
    (calibrated / "kept.json").rename(calibrated / "explainer" / "calibration.json")
    assert identity(calibrated / "explainer") == with_it != without


def test_the_command_line_shows_probability_band_and_prior(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    Image.fromarray(PICTURES[1]).save(tmp_path / "1.png")
    words = ["detect", str(tmp_path / "1.png"), "--face", "off", "--model", str(calibrated / "detector")]
    table = tmp_path / "answers.csv"
    assert cli.main([*words, "--prior", "0.1", "--csv", str(table)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "probability" in out and "% forged" in out and "not calibrated" not in out
    assert "calibrated on checkerboards, n = 40, 10 % forgeries expected; UNCERTAIN from 10.0 % to 50.0 %" in out
    with table.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert [float(edge) for edge in row["band"].split()] == pytest.approx([0.1, 0.5])
    assert float(row["prior"]) == 0.1 and float(row["raw_p_fake"]) > float(row["p_fake"])
    assert cli.main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["prior"] == 0.5 and (shown["coverage"], shown["real_coverage"]) == (0.9, 0.9)
    assert cli.main([*words, "--prior", "1.5"]) == 2
    assert "prior: 1.5 is not usable" in capsys.readouterr().err
