"""Case files of videos: what they say of a clip, of its frames and of its damage, and that nothing is done twice."""

from __future__ import annotations

import hashlib
import json
import shutil
from base64 import b64decode
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from clips import write_clip, write_damaged
from page_parser import Page
from PIL import Image
from tiny_world import draw

import llava
from llava import cli
from llava.core.types import FrameScore, VerdictLabel, VideoVerdict
from llava.data.inputs import NamedVideo, open_input
from llava.jobs.case_file import entry_of, entry_section, render_page
from llava.pipeline import Pipeline
from llava.pipeline.settings import FaceSettings, VideoSettings
from llava.pipeline.verdict import VideoFinding

FRAMES = [draw(int(i % 4 != 2), 500 + i) for i in range(11)]


@pytest.fixture(scope="module")
def model(tiny_explainer: Path) -> Pipeline:
    return llava.load(str(tiny_explainer), device="cpu", faces=FaceSettings(face="off"), batch_size=4)


@pytest.fixture(scope="module")
def folder(tiny_explainer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run `explain` once on a picture, a clip and a file that is no clip, with both case files and the timelines."""
    folder = tmp_path_factory.mktemp("clips")
    Image.fromarray(FRAMES[0]).save(folder / "a.png")
    write_clip(folder / "b.mkv", FRAMES, codec="ffv1")
    (folder / "c.mp4").write_bytes(b"hello")
    words = [str(folder), "--face", "off", "--model", str(tiny_explainer), "--device", "cpu", "--json"]
    files = ["--html", str(folder / "out" / "case.html"), "--json-file", str(folder / "out" / "case.json")]
    assert cli.main(["explain", *words, *files, "--timeline", str(folder / "lines"), "--question", "Why?"]) == 1
    return folder


def page_of(finding: VideoFinding, name: str = "clip.mp4") -> Page:
    entry = entry_of(finding, NamedVideo(name=name, source=b"", sha256="ab12", byte_count=5))
    return Page(render_page("A page", [entry_section(entry, "e0")]))


def png(uri: str) -> bytes:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return b64decode(data)


def test_a_clip_is_told_with_its_frames_and_the_most_telling_one(folder: Path, model: Pipeline) -> None:
    case = json.loads((folder / "out" / "case.json").read_text())
    picture, clip, bad = case["entries"]
    verdict, telling = clip["verdict"], clip["verdict"]["telling"]
    expected = model.explain_video(folder / "b.mkv", "Why?")
    raw = [frame["raw_p_fake"] for frame in verdict["frames"]]
    assert picture["video"] is None and (verdict["label"], telling) == ("FAKE", int(np.argmax(raw)))
    assert verdict["spread"] == pytest.approx(np.std(raw, ddof=1)) and verdict["damaged"] == 0
    assert clip["video"] | {"timeline": None} == {
        "frames": 11,
        "frames_with_face": 11,
        "telling_seconds": pytest.approx(telling / 25),
        "lowest": min(raw),
        "highest": max(raw),
        "timeline": None,
    }
    assert (np.asarray(Image.open(BytesIO(png(clip["crop"]["png"])))) == FRAMES[telling]).all()
    (alone,) = model.findings([FRAMES[telling]])
    np.testing.assert_allclose(clip["evidence_map"]["fields"], alone.evidence_map, atol=1e-4)
    assert png(clip["video"]["timeline"]["png"]) == (folder / "lines" / "b.mkv.png").read_bytes()
    assert (clip["explanation"]["text"], clip["explanation"]["about"]) == (expected.text, expected.about)
    assert clip["input"]["sha256"] == hashlib.sha256((folder / "b.mkv").read_bytes()).hexdigest()
    assert bad["verdict"]["label"] == "INCONCLUSIVE" and bad["video"]["timeline"] is None and bad["crop"] is None
    assert bad["input"]["sha256"] == hashlib.sha256(b"hello").hexdigest() and bad["input"]["bytes"] == 5
    assert case["settings"]["video.frames"] == 16 and "video" not in case["settings"]


def test_the_page_says_what_the_json_file_holds(folder: Path) -> None:
    _, clip, bad = json.loads((folder / "out" / "case.json").read_text())["entries"]
    page = Page((folder / "out" / "case.html").read_text())
    verdict = clip["verdict"]
    told = [
        "Looked at 11 frames, spread evenly over the video With the face 11 frames Damaged none",
        f"{clip['video']['lowest']:.3f} to {clip['video']['highest']:.3f}",
        f"standard deviation {verdict['spread']:.3f}",
        f"{verdict['raw_p_fake']:.3f}, without the lowest and the highest 10 %",
        f"Most telling the frame at {clip['video']['telling_seconds']:.1f} s",
        f"Asked: Why? About {clip['explanation']['about']}: {clip['explanation']['text']}",
        f"INCONCLUSIVE There is no verdict: {bad['verdict']['reason'].rstrip('.')}.",
        clip["input"]["sha256"],
        bad["input"]["sha256"],
        "video.frames = 16",
    ]
    assert [words for words in told if words not in page.text] == []
    pictures = [image["src"] for image in page.all("img")]
    shown = (clip["crop"], clip["evidence_map"]["overlay"], clip["video"]["timeline"])
    assert [pictures.count(each["png"]) for each in shown] == [1, 1, 1] and all(
        image["alt"] for image in page.all("img")
    )


def test_every_frame_is_looked_at_once(model: Pipeline, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, counts = model.explainer.encode, []
    monkeypatch.setattr(model.explainer, "encode", lambda im, *more: counts.append(len(im)) or encode(im, *more))
    assert model.explained_video_finding(folder / "b.mkv").explanation.text
    assert counts == [4, 4, 3]


def test_damage_is_counted_and_told(model: Pipeline, tmp_path: Path) -> None:
    write_damaged(tmp_path / "rot.mp4")
    finding = model.video_finding(tmp_path / "rot.mp4", VideoSettings(frames=30))
    verdict = finding.verdict
    assert (verdict.damaged, len(verdict.frames)) == (7, 23) and verdict.label in ("REAL", "FAKE")
    text = page_of(finding).text
    assert "Looked at 23 frames" in text and "Damaged 7 of those wanted" in text
    assert f"This limits it: {verdict.reason}." in text and "7 of 30 frames are damaged" in verdict.reason
    sound = page_of(replace(finding, verdict=replace(verdict, reason="", damaged=0))).text
    assert "Damaged none" in sound and "This limits it" not in sound


def test_a_calibration_on_pictures_promises_nothing_about_a_clip() -> None:
    verdict = VideoVerdict(
        label=VerdictLabel.FAKE,
        p_fake=0.87,
        raw_p_fake=0.7,
        probabilities={"real": 0.3, "fake": 0.7},
        evidence={"p_fake": 0.7},
        detector="toy",
        calibration="calibrated on photos, n = 400",
        band=(0.2, 0.7),
        coverage=0.9,
        real_coverage=0.9,
        likelihood_ratio=6.7,
        prior=0.5,
        frames=tuple(FrameScore(seconds=s, raw_p_fake=p, p_fake=p) for s, p in ((0.0, 0.6), (1.0, 0.8))),
        spread=0.14,
        telling=1,
    )
    text = page_of(VideoFinding(verdict=verdict, pixels=draw(1, 5))).text
    assert "FAKE 87 % forged" in text and "Of 100 faces with such a score" not in text
    assert "does not say how many of 100 such videos are forged" in text
    assert "All of this holds for single pictures, not for videos." in text


def test_a_video_knows_its_bytes(folder: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "clips"), "zip", folder, "b.mkv")
    content = (folder / "b.mkv").read_bytes()
    for name in (str(folder / "b.mkv"), f"{archive}::b.mkv"):
        video = open_input(name)
        assert isinstance(video, NamedVideo) and video.source is not None
        assert (video.sha256, video.byte_count) == (hashlib.sha256(content).hexdigest(), len(content))
    assert (open_input(str(tmp_path / "none.mp4")).sha256, open_input(f"{archive}::no.mp4").byte_count) == ("", 0)
