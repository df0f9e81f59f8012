"""The stability rule, with detectors made by hand: what turns in delivery is UNCERTAIN, what does not stays."""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_world import calibration_of, draw
from toy_detector import HandMadeConfig, HandMadeDetector

import llava
from llava import cli
from llava.core.score_map import Calibration
from llava.core.types import Explanation, Verdict, VerdictLabel
from llava.data.inputs import NamedImage
from llava.jobs.commands import table_text, write_csv
from llava.ops.degrade import VERSIONS, delivered
from llava.pipeline import Pipeline
from llava.pipeline.crops import Face
from llava.pipeline.settings import FaceSettings
from llava.pipeline.verdict import IN_THE_BAND, outlasting

WHOLE = FaceSettings(face="off")
CHECKS = np.repeat((np.indices((32, 32)).sum(0) % 2 * 255)[..., None], 3, axis=2).astype(np.uint8)
GREY = np.full((32, 32, 3), 128, np.uint8)
WHITE = np.full((32, 32, 3), 250, np.uint8)


def pipeline(measure: str = "brightness", turning_point: float = 0.5, **options) -> Pipeline:
    detector = HandMadeDetector(HandMadeConfig(measure=measure, turning_point=turning_point)).eval()
    return Pipeline(detector, None, "hand made", WHOLE, **options)


def calibration(**ends: float) -> Calibration:
    return replace(calibration_of("0" * 64), **ends)


def test_a_verdict_that_delivery_turns_round_is_uncertain_and_says_by_what() -> None:
    detail = pipeline("detail", 0.2)
    (plain,) = pipeline("detail", 0.2, stability=False).detect(CHECKS)
    (verdict,) = detail.detect(CHECKS)
    assert (plain.label, plain.stability, plain.reason, plain.p_fake_range) == ("FAKE", {}, "", None)
    assert verdict.label == "UNCERTAIN" and verdict.p_fake == plain.p_fake > 0.9
    # Averaging two by two pixels leaves nothing of the checks; all other versions keep them.
    assert verdict.stability["half size"] < 0.1 and list(verdict.stability) == list(VERSIONS)
    turned = [name for name, p_fake in verdict.stability.items() if p_fake < 0.5]
    assert "half size" in turned and "JPEG 95" not in turned
    assert verdict.reason.startswith("the verdict turns to REAL after ") and verdict.reason.count("JPEG 95") == 0
    assert all(name in verdict.reason for name in turned)


def test_each_version_is_scored_as_if_it_had_been_asked_about() -> None:
    versions = list(delivered(CHECKS))
    alone = [pipeline("detail", 0.2, stability=False).detect(version)[0].p_fake for version in versions]
    (verdict,) = pipeline("detail", 0.2).detect(CHECKS)
    assert list(verdict.stability.values()) == pytest.approx(alone, abs=1e-6)
    assert verdict.p_fake_range == (pytest.approx(min(alone), abs=1e-6), pytest.approx(max(alone), abs=1e-6))


@pytest.mark.parametrize(("image", "label"), [(WHITE, "FAKE"), (255 - WHITE, "REAL")])
def test_a_stable_verdict_stays(image: np.ndarray, label: str) -> None:
    (verdict,) = pipeline().detect(image)
    assert (verdict.label, verdict.reason, len(verdict.stability)) == (label, "", 8)
    low, high = verdict.p_fake_range
    assert high - low < 0.01 and low <= verdict.p_fake <= high
    assert verdict.range_text == f"{low:.3f} to {high:.3f} in 8 delivered versions"
    assert str(verdict).endswith(f"(not calibrated), {verdict.range_text}")


def test_a_real_can_turn_too() -> None:
    """A dark frame around a bright middle: without the frame it is bright."""
    image = np.full((100, 100, 3), 200, np.uint8)
    image[:5] = image[-5:] = image[:, :5] = image[:, -5:] = 0
    (verdict,) = pipeline(turning_point=0.66).detect(image)
    assert verdict.p_fake < 0.5 and verdict.label == "UNCERTAIN"
    assert verdict.reason == "the verdict turns to FAKE after crop 3 % and crop 6 %"


@pytest.mark.parametrize(
    ("turned", "words"),
    [
        (["JPEG 30"], "after JPEG 30"),
        (["JPEG 50", "JPEG 30"], "after JPEG 50 and JPEG 30"),
        (["a", "b", "c"], "after a, b and c"),
    ],
)
def test_the_reason_lists_what_turned_it(turned: list[str], words: str) -> None:
    versions = {"stays": 0.9, **dict.fromkeys(turned, 0.1)}
    found = outlasting(pipeline().detector, VerdictLabel.FAKE, versions)
    assert found == {
        "stability": versions,
        "label": VerdictLabel.UNCERTAIN,
        "reason": f"the verdict turns to REAL {words}",
    }


def test_a_version_in_the_band_is_no_flip_and_numbers_are_calibrated() -> None:
    detector = pipeline().detector
    detector.calibration = calibration(real_below=0.3, fake_above=0.7)
    versions = {"JPEG 95": 0.8, "JPEG 30": 0.5}
    found = outlasting(detector, VerdictLabel.FAKE, versions)
    assert found == {"stability": {"JPEG 95": pytest.approx(2 / 3), "JPEG 30": pytest.approx(0.5)}}  # odds 4 -> 2
    found = outlasting(detector, VerdictLabel.FAKE, versions, prior=0.2)
    assert found["stability"]["JPEG 95"] == pytest.approx(1 / 3)  # odds 2 * 1/4
    assert outlasting(detector, VerdictLabel.FAKE, versions | {"crop": 0.1})["label"] == "UNCERTAIN"


def test_a_score_in_the_band_keeps_its_own_reason() -> None:
    model = pipeline("detail", 0.2)
    model.detector.calibration = calibration(real_below=0.001, fake_above=1.0)
    (verdict,) = model.detect(CHECKS)
    assert (verdict.label, verdict.reason) == ("UNCERTAIN", IN_THE_BAND) and len(verdict.stability) == 8
    assert verdict.range_text.endswith("% in 8 delivered versions")


def test_faces_of_a_batch_keep_their_own_versions() -> None:
    images = [CHECKS, GREY, WHITE, CHECKS, 255 - CHECKS]
    together = pipeline("detail", 0.2, batch_size=3).detect(images)
    alone = [pipeline("detail", 0.2, batch_size=1).detect(image)[0] for image in images]
    assert [v.label for v in together] == ["UNCERTAIN", "REAL", "REAL", "UNCERTAIN", "UNCERTAIN"]
    for a, b in zip(together, alone, strict=True):
        assert a.label == b.label and list(a.stability) == list(b.stability)
        assert list(a.stability.values()) == pytest.approx(list(b.stability.values()), abs=1e-6)


def test_what_cannot_be_read_has_no_versions() -> None:
    unread, read = pipeline().detect([NamedImage(name="a", pixels=None, problem="damaged"), WHITE])
    assert (unread.label, unread.stability, unread.range_text) == ("INCONCLUSIVE", {}, "")
    assert len(read.stability) == 8


def test_a_plain_look_does_without() -> None:
    """What scores test sets (the DD-VQA answer files) looks without versions."""
    faces = [Face(image="a", pixels=CHECKS)]
    ((without,), _), ((careful,), _) = (pipeline("detail", 0.2).look(faces, stability=s) for s in (False, True))
    assert (without.verdict.label, careful.verdict.label) == ("FAKE", "UNCERTAIN")
    (again,), _ = pipeline("detail", 0.2).look(faces)
    assert again.verdict == without.verdict


def test_the_explainer_sees_the_versions_as_its_detector_does(tiny_explainer: Path) -> None:
    pictures = [draw(i % 2, 300 + i) for i in range(4)]
    inside = llava.load(str(tiny_explainer), device="cpu", faces=WHOLE)
    alone = llava.load(str(tiny_explainer.parent / "detector"), device="cpu", faces=WHOLE, batch_size=5)
    said = list(inside.explain_all(pictures))
    for a, b in zip(said, alone.detect(pictures), strict=True):
        assert a.verdict.label == b.label
        assert a.verdict.stability == pytest.approx(b.stability, abs=1e-5)
    plain = llava.load(str(tiny_explainer), device="cpu", faces=WHOLE, stability=False)
    assert [e.text for e in plain.explain_all(pictures)] == [e.text for e in said]


def unstable() -> Verdict:
    return pipeline("detail", 0.2).detect([NamedImage(name="a.png", pixels=CHECKS)])[0]


def test_table_and_csv_show_range_and_reason(tmp_path: Path) -> None:
    verdict = unstable()
    said = Explanation(verdict=verdict, question="Why?", text="The image is fake.", text_verdict=1, agrees=None)
    low, high = verdict.p_fake_range
    shown = " ".join(table_text([verdict, said]).replace("│", " ").split())
    assert "the verdict turns to REAL after" in shown and f"{low:.3f} to {high:.3f} in 8 delivered versions" in shown
    assert "[The text says fake; the verdict is UNCERTAIN.]" in shown
    write_csv(tmp_path / "a.csv", [verdict, pipeline(stability=False).detect(WHITE)[0]])
    with (tmp_path / "a.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert [float(p) for p in first["p_fake_range"].split()] == [low, high] and second["p_fake_range"] == ""
    assert first["reason"] == verdict.reason


def test_the_command_line_is_careful_unless_told_otherwise(
    tiny_explainer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(draw(1, 701)).save(tmp_path / "1.png")
    asked = [str(tmp_path / "1.png"), "--face", "off", "--model", str(tiny_explainer), "--device", "cpu"]

    def row(*words: str) -> dict:
        assert cli.main(["detect", *asked, "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    assert list(row()["stability"]) == list(VERSIONS)
    assert row("--stability", "off")["stability"] == {}
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert cli.main(["chat", *asked]) == 0
    assert "in 8 delivered versions" in capsys.readouterr().out.splitlines()[0]
