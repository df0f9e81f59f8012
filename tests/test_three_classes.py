"""A detector with three classes from files to verdict: the class is the truth, and a sick detector is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava import cli
from llava.core.config import build
from llava.data.sources import DataConfig, open_source
from llava.detectors import DETECTORS
from llava.detectors.base import Detector, load
from llava.evaluation.predictions import read_csv
from llava.pipeline import Pipeline
from llava.pipeline.settings import FaceSettings
from llava.pipeline.verdict import meaning
from llava.train import stage_1
from llava.train.evaluate import ScoreConfig, evaluate
from llava.train.recipe import Recipe, open_data
from llava.train.scoring import CollapseError, flat_metrics, score

DETECTORS.add("toy", "toy_detector:ToyDetector")
DETECTORS.add("three_class", "toy_detector:ThreeClassDetector")
FOLDERS = {"real": "real", "fake": "deepfake", "aifake": "ai_generated"}  # as the published data have them
NOISE = {"real": 2.0, "fake": 12.0, "aifake": 50.0}  # standard deviation, in grey levels
NAMES = {"aifake": "ai_generated", "fake": "deepfake"}


def picture(folder: str, rng: np.random.Generator) -> Image.Image:
    """Give a smooth picture under noise that tells its class."""
    y, x = np.mgrid[0:32, 0:32] / 32
    waves = [np.sin(6 * (rng.random() * x + rng.random() * y) + 6 * rng.random()) for _ in range(3)]
    image = 128 + 40 * np.stack(waves, axis=-1) + rng.normal(0, NOISE[folder], (32, 32, 3))
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("three"), np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 20), ("test", 20)):
        for folder in FOLDERS:
            (root / split / folder).mkdir(parents=True)
            for number in range(count):
                picture(folder, rng).save(root / split / folder / f"{number:02d}.png")
    return root


def recipe(images: Path, out: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "detector": "three_class",
        "data": {"path": str(images), "cache": True, "class_names": NAMES},
        "output_dir": str(out),
        "epochs": 40,
        "eval_steps": 40,
        "batch_size": 30,
        "workers": 0,
        "precision": "fp32",
        "near_duplicates": False,
        "resamples": 100,
        "optim": {"optimizer": "adamw", "lr": 3e-2},
        "degrade": None,
        "best": "macro_f1",
        "collapse": {"grace_epochs": 100},
    }
    return build(Recipe, values | changes)


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("trained")
    return out, stage_1.train(recipe(images, out))


def test_names_of_fakes_are_put_into_the_detector_s_words(images: Path) -> None:
    source = open_source(DataConfig(path=str(images), class_names=NAMES))
    found = {r.where.split("/")[-2]: r.class_name for r in source.records}
    assert found == FOLDERS
    record = source.records[0]
    assert np.array_equal(source.load(record).image, np.asarray(Image.open(record.where)))


def test_every_class_is_learned_and_counted(trained: tuple[Path, dict[str, Any]]) -> None:
    out, results = trained
    assert results["targets"]["training"] == {"ai_generated": 40, "real": 40, "deepfake": 40}
    predictions = read_csv(out / "test.csv")
    assert predictions.classes == ("ai_generated", "real", "deepfake")
    answers = predictions.scores.argmax(axis=1)
    assert (answers == predictions.targets).mean() > 0.8
    assert {
        c: {predictions.classes[t] for t, n in zip(predictions.targets, predictions.class_names, strict=True) if n == c}
        for c in set(predictions.class_names)
    } == {n: {n} for n in predictions.classes}
    np.testing.assert_allclose(predictions.p_fake, 1 - predictions.scores[:, 1], atol=1e-6)
    report = results["test"]["multiclass"]["frame"]
    assert report["accuracy"]["value"] == pytest.approx((answers == predictions.targets).mean())


def test_a_split_is_scored_with_every_class(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    said = evaluate(ScoreConfig(model=str(trained[0]), output_dir=str(tmp_path), resamples=100, device="cpu"))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["multiclass"] == trained[1]["test"]["multiclass"]
    assert "macro F1" in said and "confusion.png" in said
    assert Image.open(tmp_path / "confusion.png").format == "PNG"


def test_the_best_weights_are_those_of_the_highest_macro_f1(trained: tuple[Path, dict[str, Any]], images: Path) -> None:
    out, _ = trained
    history = json.loads((out / "phases/0/history.json").read_text())
    f1 = [row["eval_video_macro_f1"] for row in history if "eval_video_macro_f1" in row]
    data = open_data(recipe(images, out).data, 0)
    own = flat_metrics(score(load(out), data.source, data.val, torch.device("cpu")), best="macro_f1")
    assert own["video_macro_f1"] == pytest.approx(max(f1))
    assert own["merit"] == pytest.approx(own["video_macro_f1"], abs=1e-3)
    with pytest.raises(ValueError, match="best: 'toy' has two classes"):
        recipe(images, out, detector="toy")


def test_a_verdict_has_a_score_for_every_class(trained: tuple[Path, dict[str, Any]], images: Path) -> None:
    pipeline = Pipeline(load(trained[0]), None, "three", faces=FaceSettings(face="off"), stability=False)
    (verdict,) = pipeline.detect(str(images / "test/aifake/00.png"))
    assert set(verdict.probabilities) == {"ai_generated", "real", "deepfake"}
    assert sum(verdict.probabilities.values()) == pytest.approx(1, abs=1e-5)
    assert max(verdict.probabilities, key=verdict.probabilities.__getitem__) == "ai_generated"
    assert verdict.raw_p_fake == pytest.approx(1 - verdict.probabilities["real"], abs=1e-5)
    kind = f"it scores AI-generated highest: {verdict.probabilities['ai_generated']:.2f} (deepfake "
    assert verdict.label == "FAKE" and kind in meaning(verdict)
    assert verdict.meanings["p_ai_generated"] == "Score for AI-generated"
    (real,) = pipeline.detect(str(images / "test/real/00.png"))
    assert real.label == "REAL" and "highest" not in meaning(real)


def test_unknown_and_missing_classes_are_refused_before_training(images: Path, tmp_path: Path) -> None:
    data = {"path": str(images), "class_names": {"aifake": "ai_generated"}}
    with pytest.raises(ValueError, match=r"no class for 'fake' .*its classes are ai_generated, real, deepfake"):
        stage_1.train(recipe(images, tmp_path / "a", data=data))
    data["class_names"] = {"aifake": "deepfake", "fake": "deepfake"}
    with pytest.raises(ValueError, match="No training record is 'ai_generated'"):
        stage_1.train(recipe(images, tmp_path / "b", data=data))
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_a_class_that_is_never_answered_is_a_collapse(images: Path, tmp_path: Path) -> None:
    with pytest.raises(CollapseError, match=r"recall of (ai_generated|deepfake) is 0\.000"):
        stage_1.train(recipe(images, tmp_path, epochs=1, optim={"lr": 0.0}, collapse={"min_sd": 0.0}))


# ---- diagnose ---------------------------------------------------------------------------------------------------


def changed(trained: tuple[Path, dict[str, Any]], folder: Path, change: Any) -> Path:
    """Save the trained detector after a change to its weights, beside what it was trained on."""
    detector = load(trained[0])
    detector.calibration = None
    with torch.no_grad():
        change(detector)
    detector.save(folder)
    (folder / "run.json").write_text((trained[0] / "run.json").read_text())
    return folder


def diagnosis(model: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, dict[str, Any]]:
    code = cli.main(["diagnose", str(model), "--output_dir", str(out), "--resamples", "200", "--device", "cpu"])
    printed = capsys.readouterr()
    return code, printed.out + printed.err, json.loads((out / "diagnosis.json").read_text())


def test_a_healthy_detector_is_said_to_be_healthy(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, report = diagnosis(trained[0], tmp_path, capsys)
    assert code == 0 and report["is_healthy"] and said.rstrip().endswith("healthy (60 images, split 'test')")
    own, shuffled = report["looks"]["as it is"], report["looks"]["pixels shuffled"]
    assert own["recalls"].keys() == {"ai_generated", "real", "deepfake"}
    assert own["balanced_accuracy"]["value"] > shuffled["balanced_accuracy"]["value"]
    assert report["truth"] == pytest.approx(dict.fromkeys(own["recalls"], 1 / 3))
    assert {"normalised: half", "normalised: imagenet"} <= report["looks"].keys()
    assert "ai_generated" in said and "recall" in said


def always_real(detector: Detector) -> None:
    detector.get_parameter("classifier.weight").mul_(0.1)
    detector.get_parameter("classifier.bias")[1] += 3


def never_deepfake(detector: Detector) -> None:
    detector.get_parameter("classifier.bias")[2] -= 50


def blind(detector: Detector) -> None:
    detector.get_parameter("classifier.weight").zero_()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (always_real, "answers REAL to everything"),
        (never_deepfake, "hardly ever answers DEEPFAKE"),
        (blind, "ignores the image"),
    ],
)
def test_a_sick_detector_is_named_with_exit_code_1(
    trained: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Any,
    sentence: str,
) -> None:
    code, said, report = diagnosis(changed(trained, tmp_path / "model", change), tmp_path / "out", capsys)
    assert code == 1 and sentence in said
    assert report["verdict"].startswith(sentence) and not report["is_healthy"]


def test_weights_of_another_normalisation_are_found_out(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """High-pass filters of half the weight need pixels of twice the contrast: mean and deviation .5 give them."""

    def expect_half(detector: Detector) -> None:
        detector.get_parameter("filters.weight").mul_(0.5)

    code, said, report = diagnosis(changed(trained, tmp_path / "model", expect_half), tmp_path / "out", capsys)
    assert code == 1 and "is more often right with another normalisation (half) than with its own" in said
    own, half = (report["looks"][name]["balanced_accuracy"] for name in ("as it is", "normalised: half"))
    assert half["low"] > own["high"]
