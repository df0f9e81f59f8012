"""Image to verdict to explanation, with small trained models: faces, refusals, agreement, batches, conversations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_explainer import REASON_QUESTION
from tiny_world import draw

import llava
from llava.core.types import FAKE, REAL, Decision, Explanation, Verdict, VerdictLabel
from llava.data.dataset import to_tensor
from llava.data.images import UnreadableImage, read_image
from llava.data.inputs import NamedImage
from llava.explainer.prompts import VERDICT_QUESTION
from llava.pipeline import Chat, Pipeline
from llava.pipeline.crops import NO_FACE, faces_of
from llava.pipeline.pipeline import explanation
from llava.pipeline.settings import FaceSettings, PipelineSettings, load

WHOLE = FaceSettings(face="off")
PICTURES = [draw(i % 2, 300 + i) for i in range(6)]


@pytest.fixture(scope="module")
def model(tiny_explainer: Path) -> Pipeline:
    return llava.load(str(tiny_explainer), device="cpu", faces=WHOLE)


@pytest.fixture(scope="module")
def detector(tiny_explainer: Path) -> Pipeline:
    return llava.load(str(tiny_explainer.parent / "detector"), device="cpu", faces=WHOLE)


def portrait(shared_data: Path, name: str = "portrait_cc0_1.png") -> np.ndarray:
    return read_image(shared_data / "public_domain" / name)


def tight_crop(shared_data: Path) -> np.ndarray:
    return np.asarray(Image.fromarray(portrait(shared_data)[30:240, 95:305]).resize((224, 224)))


def three_faces(shared_data: Path) -> np.ndarray:
    names = ("portrait_cc0_1.png", "astronaut.png", "portrait_cc0_2.png")
    tiles = [Image.fromarray(portrait(shared_data, name)).resize((300, 300)) for name in names]
    return np.concatenate([np.asarray(tile) for tile in tiles], axis=1)


def test_the_verdict_is_the_detector_s(detector: Pipeline) -> None:
    verdict = detector.detect(PICTURES[1])[0]
    with torch.no_grad():
        spec = detector.detector.inputs["pixel_values"]
        output = detector.detector(to_tensor(PICTURES[1], spec)[None])
    p_real, p_fake = output.logits.softmax(-1)[0].tolist()
    assert verdict.p_fake == pytest.approx(p_fake, abs=1e-6)
    assert verdict.probabilities == pytest.approx({"real": p_real, "fake": p_fake}, abs=1e-6)
    assert verdict.evidence == pytest.approx({"p_real": p_real, "p_fake": p_fake}, abs=1e-6)
    assert (verdict.label, verdict.calibration, verdict.image) == ("FAKE", "not calibrated", "image 0")


def test_flipped_views_are_averaged(detector: Pipeline, tmp_path: Path) -> None:
    detector.detector.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["config"]["views"] = ["plain", "flip"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    both = llava.load(str(tmp_path), device="cpu", faces=WHOLE).detect(PICTURES)
    plain = detector.detect([*PICTURES, *(np.ascontiguousarray(p[:, ::-1]) for p in PICTURES)])
    mean = [(a.p_fake + b.p_fake) / 2 for a, b in zip(plain[:6], plain[6:], strict=True)]
    assert [v.p_fake for v in both] == pytest.approx(mean, abs=1e-6)


def test_the_explainer_gives_the_detector_s_verdict(model: Pipeline, detector: Pipeline) -> None:
    for inside, alone in zip(model.detect(PICTURES), detector.detect(PICTURES), strict=True):
        assert inside.p_fake == pytest.approx(alone.p_fake, abs=1e-5) and inside.label == alone.label


def test_the_threshold_decides(detector: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "stability", False)
    p_fake = detector.detect(PICTURES[1])[0].p_fake
    for threshold, label in ((p_fake, "FAKE"), (np.nextafter(p_fake, 2), "REAL")):
        monkeypatch.setattr(detector.detector, "decision", Decision(threshold=threshold))
        verdict = detector.detect(PICTURES[1])[0]
        assert (verdict.label, verdict.threshold) == (label, threshold)


def test_a_batch_equals_one_by_one(tiny_explainer: Path, model: Pipeline) -> None:
    together = list(model.explain_all(PICTURES))
    alone = list(llava.load(str(tiny_explainer), device="cpu", faces=WHOLE, batch_size=1).explain_all(PICTURES))
    assert [e.text for e in together] == [e.text for e in alone]
    assert [e.verdict.p_fake for e in together] == pytest.approx([e.verdict.p_fake for e in alone], abs=1e-5)


def test_the_text_follows_the_detector(model: Pipeline) -> None:
    answers = list(model.explain_all(PICTURES))
    assert [a.verdict.label for a in answers] == ["REAL", "FAKE"] * 3
    assert sum(a.agrees is True for a in answers) >= 5
    assert answers[0].question == VERDICT_QUESTION


def test_a_text_that_disagrees_is_marked_and_the_verdict_stands(
    model: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model.explain(PICTURES[0])
    assert (before.verdict.label, before.text_verdict, before.agrees) == ("REAL", REAL, True)
    monkeypatch.setattr(model.detector, "decision", Decision(threshold=0.0))
    assert model.explain(PICTURES[0]).text_verdict == FAKE, "words turn with the threshold"
    # words that do not listen
    monkeypatch.setattr(model.detector, "evidence_for_words", lambda output, prior: output.evidence)
    after = model.explain(PICTURES[0])
    assert (after.verdict.label, after.text_verdict, after.agrees) == ("FAKE", REAL, False)
    assert str(after).endswith("[The text says real; the detector's verdict stands.]") and str(after).startswith("FAKE")


@pytest.mark.parametrize(
    ("label", "text", "agrees"),
    [
        ("FAKE", "The image is fake.", True),
        ("REAL", "The image is fake.", False),
        ("REAL", "The image is not fake.", True),
        ("FAKE", "The nose is large.", None),
        ("INCONCLUSIVE", "The image is fake.", None),
    ],
)
def test_agreement(label: str, text: str, agrees: bool | None) -> None:
    verdict = Verdict(
        label=VerdictLabel(label), p_fake=0.5, probabilities={}, evidence={}, detector="toy", image="photo.jpg"
    )
    assert explanation(verdict, "Why?", text).agrees is agrees


def test_three_lines_of_python(tiny_explainer: Path, tmp_path: Path) -> None:
    Image.fromarray(PICTURES[1]).save(tmp_path / "photo.png")
    answer = llava.load(str(tiny_explainer), faces=WHOLE).explain(tmp_path / "photo.png")
    assert isinstance(answer, Explanation)
    verdict = answer.verdict
    assert str(answer).splitlines()[0] == f"FAKE: p_fake {verdict.p_fake:.3f} (not calibrated), {verdict.range_text}"
    assert json.loads(json.dumps(answer.to_dict()))["verdict"]["label"] == "FAKE"


def test_a_conversation_keeps_image_and_turns(model: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    encode = model.explainer.encode
    monkeypatch.setattr(model.explainer, "encode", lambda im, *more: calls.append(len(im)) or encode(im, *more))
    talk = model.chat(PICTURES[0])
    assert isinstance(talk, Chat) and talk.verdict.label == "REAL" and talk.last is None
    first = list(talk.ask(VERDICT_QUESTION))
    assert len(first) > 1 and "".join(first) == talk.last.text == model.explain(PICTURES[0]).text
    calls.clear()
    again = "".join(talk.ask(REASON_QUESTION))
    assert again and calls == []
    assert [turn.role for turn in talk.turns] == ["human", "assistant"] * 2
    alone = model.explainer.answer(encode([PICTURES[0]]), [talk.turns[:3]])[0]
    assert again == alone
    with pytest.raises(ValueError, match="question is empty"):
        list(talk.ask("  "))


def test_an_answer_that_is_not_read_to_its_end_leaves_the_conversation_as_it_was(model: Pipeline) -> None:
    talk = model.chat(PICTURES[0])
    answer = talk.ask(VERDICT_QUESTION)
    next(answer)
    answer.close()
    assert talk.turns == [] and talk.last is None


def test_no_face_is_inconclusive(tiny_explainer: Path) -> None:
    model = llava.load(str(tiny_explainer), device="cpu")
    verdict = model.detect(PICTURES[0])[0]
    assert (verdict.label, verdict.p_fake, verdict.reason, verdict.face_count) == ("INCONCLUSIVE", None, NO_FACE, 0)
    answer = model.explain(PICTURES[0])
    assert (answer.text, answer.agrees, answer.verdict.label) == ("", None, "INCONCLUSIVE")
    with pytest.raises(ValueError, match="nothing to ask about: no face found"):
        list(model.chat(PICTURES[0]).ask("Why?"))


def test_three_faces_are_three_verdicts(tiny_explainer: Path, shared_data: Path) -> None:
    scene = three_faces(shared_data)
    model = llava.load(str(tiny_explainer), device="cpu", batch_size=2)
    verdicts = model.detect([PICTURES[0], scene])
    assert [(v.image, v.face, v.face_count) for v in verdicts] == [
        ("image 0", 1, 0),
        *(("image 1", number, 3) for number in (1, 2, 3)),
    ]
    boxes = [v.face_box for v in verdicts[1:]]
    assert sorted(box[0] // 300 for box in boxes) == [0, 1, 2]
    assert "face 2 of 3" in str(verdicts[2])
    assert [a.verdict.face for a in model.explain_all([scene])] == [1, 2, 3]
    largest = faces_of(NamedImage(name="scene", pixels=scene), FaceSettings(face="largest"))
    assert [(f.number, f.count) for f in largest] == [(1, 3)]


def test_a_face_crop_passes_unchanged_and_a_photo_is_cropped(shared_data: Path) -> None:
    crop, photo = tight_crop(shared_data), portrait(shared_data)
    (whole,) = faces_of(NamedImage(name="crop", pixels=crop), FaceSettings())
    assert whole.pixels is crop
    (face,) = faces_of(NamedImage(name="photo", pixels=photo), FaceSettings())
    assert face.pixels.shape[0] == face.pixels.shape[1] < 300 and face.box is not None
    (again,) = faces_of(NamedImage(name="cut", pixels=face.pixels), FaceSettings())
    assert again.pixels is face.pixels
    (uncut,) = faces_of(NamedImage(name="photo", pixels=photo), FaceSettings(face="off"))
    assert uncut.pixels is photo and uncut.box is None


def test_forensic_crops_of_the_test_set_pass_unchanged(shared_data: Path) -> None:
    paths = sorted((shared_data / "ddvqa" / "images" / "c40" / "test").glob("*.jpg"))[::6]
    assert len(paths) == 24
    for path in paths:
        image = NamedImage(name=path.name, pixels=read_image(path))
        assert [face.pixels is image.pixels for face in faces_of(image, FaceSettings())] == [True], path.name


def test_every_setting_of_faces_arrives(tiny_explainer: Path) -> None:
    other = {"face": "largest", "margin": 0.1, "whole_from": 0.7, "least_face": 77}
    assert other.keys() == vars(FaceSettings()).keys()
    model = load(PipelineSettings(**other, device="cpu"), str(tiny_explainer.parent / "detector"))
    assert vars(model.faces) == other


def test_a_problem_becomes_a_row_and_a_wrong_path_an_error(model: Pipeline, tmp_path: Path) -> None:
    bad = NamedImage(name="bad.jpg", pixels=None, problem="damaged or truncated")
    verdicts = model.detect([bad, PICTURES[1]])
    assert [(v.label, v.reason) for v in verdicts] == [("INCONCLUSIVE", "damaged or truncated"), ("FAKE", "")]
    texts = [a.text for a in model.explain_all([bad, PICTURES[1], bad])]
    assert texts[0] == texts[2] == "" and texts[1]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        model.detect(tmp_path / "none.jpg")
    with pytest.raises(UnreadableImage, match="not an image"):
        model.detect(b"hello")
    with pytest.raises(ValueError, match=r"image 0: expected uint8 \(H, W, 3\) RGB, got float64 \(8, 8\)"):
        model.detect(np.zeros((8, 8)))


def test_a_detector_has_no_words(detector: Pipeline) -> None:
    for ask in (lambda: detector.explain(PICTURES[0]), lambda: detector.chat(PICTURES[0])):
        with pytest.raises(ValueError, match="gives verdicts and no words; use `m2f2 detect`"):
            ask()


def test_a_folder_of_something_else_is_refused(tiny_explainer: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds model type 'llava', neither a detector nor an explainer"):
        llava.load(str(tiny_explainer.parent / "base"))
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        llava.load(str(tmp_path))
    with pytest.raises(ValueError, match="never quantised"):
        llava.load(str(tiny_explainer.parent / "detector"), quantization="4bit")
    (tmp_path / "config.json").write_text((tiny_explainer / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(
        (tiny_explainer.parent / "detector" / "model.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="missing keys"):
        llava.load(str(tmp_path))


def test_the_package_stays_light() -> None:
    code = "import sys, llava, llava.jobs.commands; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert FAKE == 1
