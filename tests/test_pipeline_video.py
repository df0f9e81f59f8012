"""One verdict per clip: which face, which score, which words; and what is said where there is none."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from clips import grey, write_clip, write_sound
from PIL import Image
from scipy.stats import trim_mean
from tiny_world import calibration_of, draw

import llava
from llava import cli
from llava.core.score_map import write_calibration
from llava.core.types import FrameScore, VerdictLabel, VideoVerdict
from llava.data.images import read_image
from llava.detectors.base import load
from llava.evaluation.pictures import timeline_png
from llava.explainer.prompts import VERDICT_QUESTION
from llava.pipeline import Pipeline
from llava.pipeline.crops import TURNS
from llava.pipeline.settings import FaceSettings, VideoSettings
from llava.pipeline.video import NO_FACE, UNFIT, write_timelines

WHOLE = FaceSettings(face="off")
# Eleven frames: three real ones among forged ones, so that the scores differ widely.
LABELS = [1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 1]
FRAMES = [draw(label, 500 + i) for i, label in enumerate(LABELS)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mkv", FRAMES, codec="ffv1")


@pytest.fixture(scope="module")
def model(tiny_explainer: Path) -> Pipeline:
    return llava.load(str(tiny_explainer), device="cpu", faces=WHOLE, batch_size=4)


@pytest.fixture(scope="module")
def finder(tiny_explainer: Path) -> Pipeline:
    """Give the detector with the rule that finds faces."""
    return llava.load(str(tiny_explainer.parent / "detector"), device="cpu")


def test_the_score_is_the_trimmed_mean_of_the_frames(model: Pipeline, clip: Path) -> None:
    raw = [verdict.raw_p_fake for verdict in model.detect(FRAMES)]
    verdict = model.detect_video(clip, VideoSettings(trim=0.2))
    assert [frame.raw_p_fake for frame in verdict.frames] == pytest.approx(raw, abs=1e-6)
    assert [frame.seconds for frame in verdict.frames] == pytest.approx([i / 25 for i in range(11)])
    assert verdict.raw_p_fake == verdict.p_fake == pytest.approx(trim_mean(raw, 0.2), abs=1e-6)
    assert verdict.raw_p_fake == pytest.approx(np.sort(raw)[2:-2].mean(), abs=1e-6)
    assert verdict.spread == pytest.approx(np.std(raw, ddof=1), abs=1e-6)
    assert verdict.probabilities["fake"] == pytest.approx(verdict.raw_p_fake)
    assert (verdict.label, verdict.image, verdict.trim) == ("FAKE", str(clip), 0.2)
    assert (verdict.frames_with_face, verdict.face_count, verdict.reason) == (11, 1, "")


def test_the_most_telling_frame_lies_farthest_on_the_verdict_s_side(model: Pipeline, clip: Path, monkeypatch) -> None:
    verdict = model.detect_video(clip)
    raw = [frame.raw_p_fake for frame in verdict.frames]
    assert (verdict.label, verdict.telling) == ("FAKE", int(np.argmax(raw)))
    assert verdict.telling_seconds == verdict.frames[verdict.telling].seconds
    assert f"judged on 11 of 11 frames, standard deviation {verdict.spread:.3f}, most telling at" in str(verdict)
    monkeypatch.setattr(model.detector, "decision", replace(model.detector.decision, threshold=1.0))
    verdict = model.detect_video(clip)
    assert (verdict.label, verdict.telling) == ("REAL", int(np.argmin(raw)))


def test_the_words_are_about_the_most_telling_frame(model: Pipeline, clip: Path) -> None:
    answer = model.explain_video(clip, "Why?")
    alone = model.explain(FRAMES[answer.verdict.telling], "Why?")
    assert answer.text == alone.text != ""
    assert answer.about == f"the frame at {answer.verdict.telling_seconds:.1f} s"
    assert f"[{answer.about}] {answer.text}" in str(answer)
    assert (answer.question, answer.agrees, alone.about) == ("Why?", alone.agrees, "")
    assert model.explain_video(clip).question == VERDICT_QUESTION
    assert json.loads(json.dumps(answer.to_dict()))["verdict"]["frames"][2]["seconds"] == pytest.approx(0.08)


@pytest.mark.parametrize(("edge", "label"), [(0.0, "FAKE"), (0.999, "UNCERTAIN")])
def test_a_calibration_is_applied_to_the_video_s_score(
    tiny_explainer: Path, tmp_path: Path, clip: Path, edge: float, label: str
) -> None:
    shutil.copytree(tiny_explainer.parent / "detector", tmp_path / "detector")
    own = calibration_of(load(tmp_path / "detector").fingerprint())
    calibration = replace(own, real_below=0.0, fake_above=edge)
    write_calibration(tmp_path / "detector", calibration)
    verdict = llava.load(str(tmp_path / "detector"), device="cpu", faces=WHOLE).detect_video(clip)
    raw = np.array([frame.raw_p_fake for frame in verdict.frames])
    assert verdict.p_fake == pytest.approx(float(calibration.posterior(trim_mean(raw, 0.1))))
    assert [frame.p_fake for frame in verdict.frames] == pytest.approx(calibration.posterior(raw).tolist())
    assert verdict.label == label and verdict.is_calibrated
    nearest = int(np.argmin(abs(raw - verdict.raw_p_fake)))
    assert verdict.telling == (nearest if label == "UNCERTAIN" else int(np.argmax(raw)))


def test_as_many_frames_are_looked_at_as_asked(model: Pipeline, clip: Path) -> None:
    verdict = model.detect_video(clip, VideoSettings(frames=3))
    assert [round(frame.seconds * 25) for frame in verdict.frames] == [1, 5, 9]


def test_a_clip_of_one_frame_is_judged_by_it(model: Pipeline, tmp_path: Path) -> None:
    verdict = model.detect_video(write_clip(tmp_path / "one.mkv", FRAMES[:1], codec="ffv1"))
    assert verdict.raw_p_fake == pytest.approx(model.detect(FRAMES[0])[0].raw_p_fake, abs=1e-6)
    assert (verdict.label, verdict.spread, len(verdict.frames), verdict.telling) == ("FAKE", None, 1, 0)


def test_a_clip_without_a_face_is_inconclusive(finder: Pipeline, tmp_path: Path) -> None:
    verdict = finder.detect_video(write_clip(tmp_path / "empty.mp4", [grey(i, 120, 160) for i in range(8)]))
    assert (verdict.label, verdict.p_fake, verdict.reason) == ("INCONCLUSIVE", None, NO_FACE)
    assert (len(verdict.frames), verdict.frames_with_face, verdict.face_count) == (8, 0, 0)
    with pytest.raises(ValueError, match="no frame has a score"):
        timeline_png(verdict)


def test_a_clip_that_cannot_be_read_is_inconclusive(finder: Pipeline, model: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"hello")
    for path, words in (
        (tmp_path / "bad.mp4", "damaged, or not a video"),
        (write_sound(tmp_path / "sound.mp4"), "has no video stream, only audio"),
        (tmp_path / "none.mp4", "no such file"),
    ):
        verdict = finder.detect_video(path)
        assert (verdict.label, verdict.frames, verdict.p_fake) == ("INCONCLUSIVE", (), None)
        assert verdict.reason.startswith(words)
    answer = model.explain_video(tmp_path / "bad.mp4")
    assert (answer.text, answer.about, answer.agrees) == ("", "", None)
    with pytest.raises(ValueError, match="is not named like a video"):
        finder.detect_video(tmp_path / "face.png")


def test_a_cut_off_clip_is_judged_and_says_so(model: Pipeline, tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "whole.mp4", [draw(1, i) for i in range(40)], g="5").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    verdict = model.detect_video(tmp_path / "cut.mp4")
    assert verdict.label == "FAKE" and "the file is damaged or breaks off after 0." in verdict.reason


@pytest.mark.parametrize(
    ("name", "value"), [("frames", 0), ("least_frames", 0), ("trim", 0.5), ("trim", -0.1)], ids=str
)
def test_wrong_settings_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"video\.{name}: {value} is not usable"):
        VideoSettings(**{name: value})


def scenes(shared_data: Path, places: list[tuple[int, int] | None]) -> list[np.ndarray]:
    """Draw frames of 640 x 400 with a portrait at each place, and none for None."""
    portrait = read_image(shared_data / "public_domain" / "portrait_cc0_1.png")
    portrait = np.asarray(Image.fromarray(portrait).resize((240, 240)))
    frames = []
    for place in places:
        frame = np.full((400, 640, 3), 90, np.uint8)
        if place:
            x, y = place
            frame[y : y + 240, x : x + 240] = portrait
        frames.append(frame)
    return frames


def test_a_face_is_followed_and_frames_without_it_are_counted(
    finder: Pipeline, shared_data: Path, tmp_path: Path
) -> None:
    places = [(20, 20), (60, 40), None, (140, 80), (180, 100), None]
    path = write_clip(tmp_path / "moving.mkv", scenes(shared_data, places), codec="ffv1")
    verdict = finder.detect_video(path)
    boxes = [frame.face_box for frame in verdict.frames]
    assert [box is not None for box in boxes] == [place is not None for place in places]
    moved = [(box[0] - boxes[0][0], box[1] - boxes[0][1]) for box in boxes if box]
    assert np.abs(np.array(moved) - [[0, 0], [40, 20], [120, 60], [160, 80]]).max() <= 12
    shown = [frame for frame in verdict.frames if frame.face_box]
    assert [len(frame.face_landmarks) for frame in shown] == [5] * 4 and all(abs(f.face_roll) < 20 for f in shown)
    eyes = np.array([frame.face_landmarks[0] for frame in shown])
    assert np.abs(eyes - eyes[0] - [[0, 0], [40, 20], [120, 60], [160, 80]]).max() <= 12
    assert verdict.face_landmarks == verdict.frames[verdict.telling].face_landmarks and verdict.face_roll is not None
    assert {frame.face_landmarks for frame in verdict.frames if not frame.face_box} == {None}
    assert (verdict.frames_with_face, verdict.face_count) == (4, 1) and verdict.label != "INCONCLUSIVE"
    assert verdict.face_box == boxes[verdict.telling]
    whole = FaceSettings(whole_from=0.01)  # would take every image whole
    assert finder.faces.whole_from != whole.whole_from
    same = Pipeline(finder.detector, None, "same", faces=whole).detect_video(path)
    assert same.raw_p_fake == verdict.raw_p_fake


def test_a_clip_of_unfit_faces_says_what_is_wrong_with_most(
    finder: Pipeline, shared_data: Path, tmp_path: Path
) -> None:
    upright = scenes(shared_data, [(20, 20), (60, 40), None, (140, 80)])
    lying = [np.ascontiguousarray(np.rot90(frame)) for frame in upright]
    said = finder.detect_video(write_clip(tmp_path / "lying.mkv", lying, codec="ffv1"))
    assert (said.label, said.reason) == ("INCONCLUSIVE", UNFIT.format(3, 4, TURNS[3]))
    small = [np.full((400, 640, 3), 90, np.uint8) for _ in upright]
    for number, frame in enumerate(small):  # of other sizes in each frame, so that no reason stands twice
        shrunk = np.asarray(Image.fromarray(upright[0]).resize((128 + 8 * number, 80 + 5 * number)))
        frame[: shrunk.shape[0], : shrunk.shape[1]] = shrunk
    said = finder.detect_video(write_clip(tmp_path / "small.mkv", [*small, *lying[:1]], codec="ffv1"))
    assert said.label == "INCONCLUSIVE" and "in 4 of 5 frames the face is too small: " in said.reason


def test_too_few_frames_with_a_face_give_no_verdict(finder: Pipeline, shared_data: Path, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "short.mkv", scenes(shared_data, [(20, 20), None, (20, 20), None]), codec="ffv1")
    verdict = finder.detect_video(path)
    assert (verdict.label, verdict.p_fake, verdict.frames_with_face) == ("INCONCLUSIVE", None, 2)
    assert "in 2 of 4 frames; 3 are needed (--video.least_frames)" in verdict.reason
    assert finder.detect_video(path, VideoSettings(least_frames=2)).label != VerdictLabel.INCONCLUSIVE
    two = write_clip(tmp_path / "two.mkv", scenes(shared_data, [(20, 20)] * 2), codec="ffv1")
    assert finder.detect_video(two).label != VerdictLabel.INCONCLUSIVE


@pytest.fixture
def ask(tiny_explainer: Path):
    """Give a function that runs one command on the tiny explainer, on whole frames."""
    options = ("--model", str(tiny_explainer), "--device", "cpu", "--face", "off")
    return lambda *words: cli.main([*map(str, words), *options])


def test_videos_and_images_are_answered_in_order(ask, clip: Path, tmp_path: Path, capsys) -> None:
    Image.fromarray(FRAMES[0]).save(tmp_path / "a.png")
    (tmp_path / "bad.mp4").write_bytes(b"hello")
    words = (tmp_path / "a.png", clip, tmp_path / "bad.mp4", tmp_path / "a.png", "--timeline", tmp_path / "lines")
    assert ask("detect", *words[:2], "--json") == 0
    assert [len(json.loads(line).get("frames", "x")) for line in capsys.readouterr().out.splitlines()] == [1, 11]
    assert ask("explain", *words, "--csv", tmp_path / "a.csv", "--video.frames", "5") == 1
    captured = capsys.readouterr()
    assert captured.err.endswith("m2f2: 1 of 3 inputs could not be read; their rows say why.\n")
    assert "telling" in captured.out and "[the" in captured.out  # the table folds its cells
    rows = list(csv.DictReader((tmp_path / "a.csv").open(encoding="utf-8")))
    assert [Path(row["image"]).name for row in rows] == ["a.png", "clip.mkv", "bad.mp4"]
    assert [row["frames"] for row in rows] == ["", "5", "0"]
    assert rows[1]["about"] == f"the frame at {float(rows[1]['telling_seconds']):.1f} s" and rows[0]["about"] == ""
    assert rows[1]["frames_with_face"] == "5" and float(rows[1]["spread"]) > 0
    assert [path.name for path in (tmp_path / "lines").iterdir()] == ["clip.mkv.png"]


def test_a_conversation_is_about_an_image(ask, clip: Path, capsys) -> None:
    assert ask("chat", clip) == 2
    assert "ask about a video with `m2f2 explain`" in capsys.readouterr().err


def test_the_name_of_a_timeline_is_used_once(tmp_path: Path) -> None:
    frames = tuple(FrameScore(seconds=s, raw_p_fake=p, p_fake=p) for s, p in ((0.0, 0.2), (1.0, None), (2.0, 0.8)))
    verdict = VideoVerdict(
        label=VerdictLabel.UNCERTAIN,
        p_fake=0.5,
        probabilities={},
        evidence={},
        detector="toy",
        frames=frames,
        telling=2,
        band=(0.4, 0.7),
    )
    named = [replace(verdict, image=name) for name in ("a/x.mp4", "b/x.mp4", "x.mp4-2", "c/x.mp4")]
    drawn = write_timelines(tmp_path, [*named, replace(verdict, image="y.mp4", telling=None)])
    assert [path.name for path in drawn] == ["x.mp4.png", "x.mp4-2.png", "x.mp4-2-2.png", "x.mp4-3.png"]
    assert all(Image.open(path).size > (800, 300) for path in drawn)
    (tmp_path / "file").write_text("x")
    assert cli.main(["detect", __file__, "--timeline", str(tmp_path / "file")]) == 2
