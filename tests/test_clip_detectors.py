"""Detectors that read two frames, sound or native pixels: trained, scored, asked, and told what is missing."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import clip_detectors
import numpy as np
import pytest
import torch
from clips import write_clip
from fastapi.testclient import TestClient
from PIL import Image
from test_serve_api import png

from llava.core.config import build
from llava.core.input_specs import STILL
from llava.core.types import Content, GenerationSettings, Record, Turn, VerdictLabel
from llava.data.dataset import wants_of
from llava.data.sources import open_source, split_of
from llava.detectors.base import DetectorOutput, create, is_there, load
from llava.evaluation.predictions import read_csv
from llava.explainer.modeling import Encoded, ForgeryLlavaConfig
from llava.explainer.processing import ExplainerProcessor
from llava.jobs import maps
from llava.jobs.diagnose import other_normalisations
from llava.pipeline import Pipeline
from llava.pipeline.crops import Face, prepared
from llava.pipeline.settings import FaceSettings, VideoSettings
from llava.pipeline.verdict import Finding
from llava.pipeline.video import NO_WINDOW, _looked_at
from llava.serve.api import Service, build_app
from llava.serve.batching import BatchingEngine
from llava.serve.engine import Question
from llava.serve.guard import RequestLimits
from llava.train import stage_1
from llava.train.recipe import Recipe, open_data
from llava.train.scoring import probe_answers, score, usable_data, without_lacking
from llava.train.tiny_base import train_tokenizer

clip_detectors.add_to_table()
WHOLE = FaceSettings(face="off")
CPU = torch.device("cpu")
RECORD = Record(id="a", label=0, class_name="real", video="a", group="a", where="a")
SILENCE = np.zeros(16000, np.float32)


def frames_of(is_fake: bool, seed: int, count: int = 25) -> list[np.ndarray]:
    """Draw a noise picture that stays as it is, and flickers where it is forged."""
    rng = np.random.default_rng(seed)
    still = rng.integers(60, 180, (32, 32, 3))
    flicker = [is_fake * rng.integers(-60, 60, (32, 32, 3)) for _ in range(count)]
    return [(still + change + rng.integers(-2, 3, still.shape)).astype(np.uint8) for change in flicker]


def sound_of(is_fake: bool, seed: int) -> np.ndarray:
    """Give one second of noise, which is smooth unless it is forged."""
    noise = np.random.default_rng(seed).normal(0, 0.1, 16000)
    return (noise if is_fake else np.convolve(noise, np.ones(32) / 32, "same")).astype(np.float32)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write DFDC-like clips; in training one is silent, one has no sound stream, one is too short."""
    root = tmp_path_factory.mktemp("clips")
    for place, count in (("dfdc_train_part_0", 14), ("validation", 8), ("test", 8)):
        (root / place).mkdir()
        labels, rows = {}, ["filename,label"]
        for number in range(count):
            is_fake, seed, name = bool(number % 2), 100 * count + number, f"{place[0]}{number:02}.mkv"
            write_clip(
                root / place / name,
                frames_of(is_fake, seed, 3 if (place, number) == ("dfdc_train_part_0", 5) else 25),
                codec="ffv1",
                sound=SILENCE if number == 0 else SILENCE[:0] if number == 1 else sound_of(is_fake, seed),
            )
            labels[name] = {"label": "FAKE", "original": f"{name}-o"} if is_fake else {"label": "REAL"}
            rows.append(f"{name},{int(is_fake)}")
        (root / place / "metadata.json").write_text(json.dumps(labels))
        (root / place / "labels.csv").write_text("\n".join(rows))
    return root


def recipe(clips: Path, out: Path, detector: str, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "detector": detector,
        "data": {"source": "dfdc", "path": str(clips), "frames": 2},
        "output_dir": str(out),
        "epochs": 8,
        "eval_steps": 12,
        "batch_size": 4,
        "workers": 0,
        "precision": "fp32",
        "near_duplicates": False,
        "resamples": 50,
        "optim": {"optimizer": "adamw", "lr": 5e-2},
        "collapse": {"grace_epochs": 100},
    }
    return build(Recipe, values | changes)


@pytest.fixture(scope="module", params=["two_frame", "sound"])
def trained(request, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict, str]:
    out, name = tmp_path_factory.mktemp(request.param), request.param
    with pytest.MonkeyPatch.context() as patch:
        told: list[str] = []
        patch.setattr(
            logging.getLogger("llava.train.scoring"), "warning", lambda text, *words: told.append(text % words)
        )
        return name, out, stage_1.train(recipe(clips, out, name)), "\n".join(told)


def test_it_learns_from_what_is_whole_and_counts_the_rest(trained, clips: Path) -> None:
    name, out, results, told = trained
    assert results["test"]["video"]["auc"]["value"] == 1.0
    scored = read_csv(out / "test.csv")
    assert np.isfinite(scored.p_fake).all()
    if name == "two_frame":
        assert "1 of 14 records cannot be trained on (first: 'dfdc_train_part_0/d05': too few frames" in told
        assert len(scored) == 16 and set(results["plain_images"]) >= {"grey", "noise"}
    else:  # the silent clip, the one without a stream, and the short one, which has sound
        assert "2 of 14 records cannot be trained on (first: 'dfdc_train_part_0/d00': its sound is silent)" in told
        assert "4 of 16 records cannot be scored (first: 'test/t00#6': its sound is silent)" in told
        assert len(scored) == 12 and not {"test/t00", "test/t01"} & set(scored.videos)
        assert results["plain_images"] == {}
    assert all(tensor.isfinite().all() for tensor in load(out).state_dict().values())


def test_a_clip_is_judged_by_its_windows(trained, clips: Path) -> None:
    name, out, _, _ = trained
    pipeline = Pipeline.from_pretrained(out, device="cpu", faces=WHOLE)
    for number, label in ((2, VerdictLabel.REAL), (3, VerdictLabel.FAKE)):
        verdict = pipeline.detect_video(clips / "test" / f"t{number:02}.mkv", VideoSettings(frames=8))
        assert verdict.label == label and not verdict.reason and verdict.stability == {}
        scored = [frame for frame in verdict.frames if frame.raw_p_fake is not None]
        assert len(scored) == (4 if name == "two_frame" else 8)
        assert verdict.frames[verdict.telling].raw_p_fake is not None
        assert verdict.raw_p_fake == pytest.approx(np.mean([frame.raw_p_fake for frame in scored]), abs=1e-5)
        starts = [frame.seconds for frame in verdict.frames if frame.raw_p_fake is not None]
        assert starts == sorted(starts) and starts[-1] + (0.2 if name == "two_frame" else 0.25) <= 1.001
        finding = pipeline.video_finding(clips / "test" / f"t{number:02}.mkv")
        assert finding.pixels is not None and finding.pixels.shape == (32, 32, 3)


def test_asking_reads_what_scoring_reads(trained, clips: Path) -> None:
    """The window of a test record, scored from its source, has the score of the same window in the video."""
    name, out, _, _ = trained
    detector = load(out)
    source = open_source(recipe(clips, out, name).data)
    record = next(r for r in source.records if r.video == "test/t03")
    scored = float(score(detector, source, [record], CPU).p_fake[0])
    number = int(source.load(record, None, wants_of(detector.inputs)).record.tags["frame"])
    clip = Pipeline(detector, None, "x", faces=WHOLE).detect_video(
        clips / "test" / "t03.mkv", VideoSettings(frames=2 * 25, trim=0)
    )
    same = next(frame for frame in clip.frames if round(frame.seconds * 25) == number)
    assert same.raw_p_fake == pytest.approx(scored, abs=1e-6)


@pytest.mark.parametrize(("number", "reason"), [(0, "its sound is silent"), (1, "the clip has no sound")])
def test_a_silent_clip_is_never_scored_as_if_it_had_sound(trained, clips: Path, number: int, reason: str) -> None:
    name, out, _, _ = trained
    pipeline = Pipeline.from_pretrained(out, device="cpu", faces=WHOLE)
    verdict = pipeline.detect_video(clips / "test" / f"t{number:02}.mkv")
    if name == "two_frame":
        assert verdict.label != VerdictLabel.INCONCLUSIVE and not verdict.reason
        return
    assert (verdict.label, verdict.p_fake, verdict.raw_p_fake) == (VerdictLabel.INCONCLUSIVE, None, None)
    assert verdict.reason == reason and verdict.evidence == {} and len(verdict.frames) == 16
    source = open_source(recipe(clips, out, name).data)
    silent = [r for r in source.records if r.video == f"test/t{number:02}"]
    with pytest.raises(ValueError, match=f"2 of 2 records cannot be scored .*{reason}"):
        score(load(out), source, silent, CPU)


def test_a_still_image_has_no_verdict_and_says_why(trained) -> None:
    _, out, _, _ = trained
    pipeline = Pipeline.from_pretrained(out, device="cpu", faces=WHOLE)
    assert not pipeline.stability
    image = frames_of(True, 0)[0]
    verdict, other = pipeline.detect([image, image])
    assert (verdict.label, verdict.p_fake, verdict.reason) == ("INCONCLUSIVE", None, STILL)
    assert other.reason == verdict.reason
    ready = prepared(Face(image="x", pixels=image), pipeline.pixels, pipeline.stability)  # as the server does
    (finding,), encoded = pipeline.look([ready])
    assert finding.verdict.reason == STILL and finding.pixels is None and encoded is None


def test_the_server_s_doors_say_the_same(trained, clips: Path) -> None:
    """API, question (as on the page) and video come through the engine, whose thread owns the model."""
    _, out, _, _ = trained
    pipeline = Pipeline.from_pretrained(out, device="cpu", faces=WHOLE)
    engine = BatchingEngine(pipeline)
    image, clip = png(frames_of(True, 0)[0]), (clips / "test" / "t03.mkv").read_bytes()
    service = Service(engines={"toy": engine}, limits=RequestLimits(requests_per_minute=1000))
    with TestClient(build_app(service)) as client:
        files = [("files", ("a.png", image, "image/png")), ("files", ("t03.mkv", clip, "video/x-matroska"))]
        still, video = client.post("/v1/detect", files=files).json()["verdicts"]
    assert (still["label"], still["p_fake"], still["reason"]) == ("INCONCLUSIVE", None, STILL)
    wanted = pipeline.detect_video(clips / "test" / "t03.mkv")
    assert video["label"] == wanted.label == "FAKE" and video["p_fake"] == pytest.approx(wanted.p_fake, abs=1e-6)
    turns = [Turn(role="human", text="Why?")]
    asked = Question(image=frames_of(True, 0)[0], turns=turns, settings=GenerationSettings())
    first, said = engine.ask(asked, Event())
    assert first.verdict.reason == STILL and said.text == f"There is no verdict: {STILL}."
    engine.close()


def test_a_clip_that_is_too_short_says_what_is_needed(trained, clips: Path) -> None:
    name, out, _, _ = trained
    verdict = Pipeline.from_pretrained(out, device="cpu", faces=WHOLE).detect_video(
        clips / "dfdc_train_part_0" / "d05.mkv"
    )
    if name == "two_frame":
        assert verdict.label == "INCONCLUSIVE"
        assert verdict.reason == "too few frames: 2 of one face are needed, 0.2 s from one to the next"


def test_training_without_a_usable_record_is_refused(clips: Path, tmp_path: Path) -> None:
    for part in ("dfdc_train_part_0", "validation", "test"):
        (tmp_path / part).mkdir()
        for name in ("labels.csv", "metadata.json"):
            (tmp_path / part / name).write_text((clips / part / name).read_text())
        for file in (clips / part).glob("*.mkv"):
            write_clip(tmp_path / part / file.name, frames_of(False, 0, 8), codec="ffv1")
    with pytest.raises(ValueError, match=r"14 of 14 records cannot be trained on .*has no sound\); give data"):
        stage_1.train(recipe(tmp_path, tmp_path / "out", "sound"))


def test_no_class_vanishes_with_what_cannot_be_used(clips: Path) -> None:
    detector = create("sound", {"size": 8})
    data = open_data(recipe(clips, clips, "sound").data, seed=0)
    whole = usable_data(detector, data)
    assert [len(data.train), len(data.val), len(data.test)] == [14, 16, 16]
    assert [len(whole.train), len(whole.val), len(whole.test)] == [12, 12, 12]
    no_sound = [r for r in data.val if r.label == 0 or r.video == "validation/v01"]
    with pytest.raises(ValueError, match="No record that can be validated on is 'fake'; add some"):
        usable_data(detector, replace(data, val=no_sound))


def test_a_detector_with_alternatives_goes_on_with_what_is_there(clips: Path) -> None:
    torch.manual_seed(0)
    detector = clip_detectors.EitherDetector(clip_detectors.EnergyConfig.tiny()).eval()
    pipeline = Pipeline(detector, None, "either", faces=WHOLE)
    whole = pipeline.detect_video(clips / "test" / "t03.mkv")
    assert whole.p_fake is not None and not whole.reason
    silent = pipeline.detect_video(clips / "test" / "t01.mkv")
    assert silent.reason == "without sound: the clip has no sound"
    scores = [frame.raw_p_fake for frame in silent.frames if frame.raw_p_fake is not None]
    assert len(scores) == 8 and np.isfinite(scores).all() and silent.p_fake is not None
    still = pipeline.detect([frames_of(True, 0)[0]])[0]
    assert (still.label, still.reason) == ("INCONCLUSIVE", STILL)


def test_a_score_that_is_no_number_never_leaves_as_one(class_folder: Path) -> None:
    class Broken(clip_detectors.NativeDetector):
        def forward(self, pixels, labels=None):
            return super().forward(pixels * torch.nan, labels)

    detector = Broken(clip_detectors.EnergyConfig.tiny()).eval()
    verdict = Pipeline(detector, None, "broken", faces=WHOLE).detect([frames_of(True, 0)[0]])[0]
    assert (verdict.label, verdict.p_fake, verdict.raw_p_fake) == ("INCONCLUSIVE", None, None)
    assert verdict.reason == "the detector gives no number for it" and verdict.evidence == {}
    source = open_source(build(Recipe, {"data": {"path": str(class_folder)}}).data)
    with pytest.raises(ValueError, match=r"gives no number for 8 of 8 records \(first: 'val/fake/00.png'\)"):
        score(detector, source, split_of(source, "val"), CPU)


def test_native_pixels_are_judged_where_the_face_is_large_enough(class_folder: Path, tmp_path: Path, caplog) -> None:
    torch.manual_seed(0)
    detector = create("native", {"size": 48}).eval()
    pipeline = Pipeline(detector, None, "native", faces=WHOLE)
    large, small = np.random.default_rng(0).integers(0, 256, (2, 60, 60, 3), np.uint8)
    verdict, none = pipeline.detect([large, small[:40, :40]])
    assert verdict.p_fake is not None and verdict.stability == {}
    with torch.no_grad():
        seen = torch.from_numpy(large[6:54, 6:54]).permute(2, 0, 1).float()[None] / 255
        assert verdict.raw_p_fake == pytest.approx(float(detector.p_fake(detector(seen).logits)), abs=1e-6)
    assert none.label == "INCONCLUSIVE" and "40 pixels wide, and 48 are needed" in none.reason
    Image.fromarray(small[:40, :40]).save(class_folder / "val" / "real" / "small.png")
    source = open_source(build(Recipe, {"data": {"path": str(class_folder)}}).data)
    assert len(score(detector, source, split_of(source, "val"), CPU)) == 8
    assert "1 of 9 records cannot be scored (first: 'val/real/small.png': the face is too small" in caplog.text


def test_a_face_that_is_in_no_whole_window_has_a_reason(tmp_path: Path, monkeypatch) -> None:
    pipeline = Pipeline(create("two_frame", {"size": 8}).eval(), None, "x")
    path = write_clip(tmp_path / "a.mkv", frames_of(True, 0), codec="ffv1")
    seen = iter(range(100))

    def every_second(image, settings):
        return [Face(image=image.name, pixels=image.pixels if next(seen) % 2 else None)]

    monkeypatch.setattr("llava.pipeline.video.faces_of", every_second)
    verdict = pipeline.detect_video(path, VideoSettings(frames=2, least_frames=1))
    assert (verdict.label, verdict.reason) == ("INCONCLUSIVE", NO_WINDOW)


def test_what_is_made_ready_is_what_is_looked_at() -> None:
    """Also for the server, which makes faces ready before the model runs: the face's place in its crop counts."""
    pipeline = Pipeline(create("native", {"size": 8}).eval(), None, "x", faces=WHOLE)
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    face = Face(image="x", pixels=image, inner=(4, 6, 10, 9))
    ready = prepared(face, pipeline.pixels, pipeline.stability)
    assert len(ready.prepared) == 1
    (cut,) = ready.prepared[0]["detector_inputs"]["pixels"]
    assert np.array_equal((cut * 255).round().permute(1, 2, 0).numpy(), image[6:14, 5:13])
    (one,), (other,) = (pipeline.look([each])[0] for each in (face, ready))
    assert one.verdict == other.verdict and one.verdict.p_fake is not None


def test_windows_without_a_verdict_have_no_row_of_the_explainer() -> None:
    faces = {number: Face(image="x", pixels=frames_of(True, 0)[0]) for number in (3, 5, 8)}
    verdict = Pipeline(create("native", {"size": 8}).eval(), None, "x", faces=WHOLE).look([faces[3]])[0][0].verdict

    def look(batch: Sequence[Face]) -> tuple[list[Finding], Encoded]:
        findings = [Finding(verdict=verdict, pixels=None if n == 1 else face.pixels) for n, face in enumerate(batch)]
        rows = torch.arange(2.0)[:, None]
        return findings, Encoded(image_features=rows, evidence=rows, detection=DetectorOutput(logits=rows))

    _, encoded = _looked_at(look, 8, faces)
    assert {number: each.evidence.item() for number, each in encoded.items()} == {3: 0.0, 8: 1.0}


def test_an_explainer_of_pictures_refuses_a_detector_of_clips() -> None:
    config = ForgeryLlavaConfig(detector={}, vision_config={"image_size": 16, "patch_size": 8})
    tokenizer = train_tokenizer(iter(["The image is real."]), 300)
    detector = create("two_frame", {"size": 8}).eval()
    processor = ExplainerProcessor(tokenizer, config, detector.inputs)
    item = {"input_ids": [1], **processor.pixels(frames_of(True, 0)[0])}
    with pytest.raises(ValueError, match=f"its detector judges none: {STILL}"):
        processor.collate([item])
    can_do_without = ExplainerProcessor(tokenizer, config, detector.inputs, lacking=lambda reasons: "")
    told = can_do_without.collate([item])["detector_inputs"]
    assert all(tensor.isnan().all() for tensor in told.values()), "as an ensemble's member that judges nothing"
    image = frames_of(True, 0)[0]
    whole = processor.pixels(Content(image=image, frames=[image, image], seconds=(0.0, 0.2)))
    batch = processor.collate([{"input_ids": [1], **whole}] * 2)
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert {n: tuple(t.shape) for n, t in batch["detector_inputs"].items()} == {
        name: (2, 1, *spec.shape) for name, spec in detector.inputs.items()
    }
    with pytest.raises(ValueError, match=f"'clips' gives no verdict: {STILL}"):
        maps._look(Pipeline(detector, None, "clips", faces=WHOLE), [image])


def test_looks_at_plain_and_renormalised_images_fit_every_input() -> None:
    two, sound, native = (create(name, {"size": 8}).eval() for name in clip_detectors.NAMES)
    assert set(probe_answers(two, CPU)) == set(probe_answers(native, CPU)) >= {"black", "noise"}
    assert probe_answers(sound, CPU) == {}
    others = other_normalisations(two)
    assert "none" not in others and others["half"]["frames"].image.mean == (0.5,) * 3
    assert others["half"]["times"] == two.inputs["times"] and others["half"]["frames"].count == 2
    assert other_normalisations(native)["half"]["pixels"].std == (0.5,) * 3
    assert other_normalisations(sound) == {}


def test_views_of_frames_are_averaged() -> None:
    torch.manual_seed(0)
    detector = create("two_frame", {"size": 8, "flip": True}).eval()
    frames, times = torch.randn(3, 1, 2, 3, 8, 8), torch.tensor([[0.0, 0.2]]).expand(3, 1, 2)
    both = torch.cat([frames, frames.flip(-1)], dim=1)
    with torch.no_grad():
        found = detector.over_views({"frames": both, "times": times.expand(3, 2, 2)})
        alone = [detector(view, times[:, 0]).logits.softmax(-1) for view in both.unbind(dim=1)]
    torch.testing.assert_close(found.logits.exp(), sum(alone) / 2)
    assert is_there(both).all()


def test_nothing_left_is_an_error_and_some_left_a_warning(caplog) -> None:
    records = [replace(RECORD, id=name) for name in "abc"]
    assert without_lacking(records, ["", "", ""], "used") == records and not caplog.text
    assert without_lacking(records, ["", "no sound", "short"], "used") == records[:1]
    assert "2 of 3 records cannot be used (first: 'b': no sound); they are left out" in caplog.text
    with pytest.raises(ValueError, match="3 of 3 records cannot be used"):
        without_lacking(records, ["x", "y", "z"], "used")
