"""The words name the class that the evidence tells: files, training spread, stages 2 and 3 with the three-class ViT."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_world import draw_class, write_classes

from llava import cli
from llava.core.config import build
from llava.core.types import FAKE, REAL, Turn
from llava.data.answer_texts import VERDICT_QUESTION, class_sentence, stated_class
from llava.data.conversations import VerdictConfig, build_verdicts, open_conversations
from llava.data.dataset import to_tensor
from llava.data.sources import DataConfig
from llava.detectors import DETECTORS
from llava.detectors.base import load
from llava.detectors.vit3 import ViT3, ViT3Config
from llava.evaluation.text import parse_verdict
from llava.explainer.generation import load_model, load_processor
from llava.explainer.merge import merge_delta, merge_detector
from llava.jobs.causality import says, told_texts
from llava.pipeline import Pipeline
from llava.train import explain
from llava.train.arguments import ExplainArguments
from llava.train.explain import ExplainDataset
from llava.train.tiny_base import TinyBaseConfig, _words, make_tiny_base

CLASSES = ("real", "deepfake", "ai_generated")
NAMES = {"aifake": "ai_generated", "fake": "deepfake"}
SMALL = {
    "bf16": False,
    "tf32": None,
    "per_device_train_batch_size": 16,
    "logging_steps": 10,
    "warmup_steps": 0.03,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "tune_deepfake_mlp_adapter": True,
}


def train_vit(folder: Path, steps: int = 60) -> ViT3:
    """Train a tiny three-class ViT with a plain loop and save it."""
    torch.manual_seed(0)
    detector = ViT3(ViT3Config.tiny()).train()
    spec = detector.inputs["pixel_values"]
    optimiser = torch.optim.Adam(detector.parameters(), lr=2e-3)
    for step in range(steps):
        labels = torch.arange(24) % 3
        drawn = [draw_class(detector.classes[int(y)], 1000 + 24 * step + i) for i, y in enumerate(labels)]
        optimiser.zero_grad()
        detector(torch.stack([to_tensor(picture, spec) for picture in drawn]), labels=labels).loss.backward()
        optimiser.step()
    detector.eval().save(folder)
    return detector


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the whole chain: ViT, files, tiny base, stage 2, stage 3; gives the folder."""
    folder = tmp_path_factory.mktemp("classes")
    data = DataConfig(path=str(write_classes(folder / "images")), class_names=NAMES)
    build_verdicts(VerdictConfig(data=data, output=str(folder / "words"), kinds=True))
    train_vit(folder / "detector")
    said = str(folder / "words/train/verdict_only.json")
    sizes = {"vocab_size": 420, "hidden_size": 64, "layers": 2, "heads": 2, "steps": 110, "lr": 6e-3}
    places = {"data": [said], "image_folder": "", "detector": str(folder / "detector"), "out": str(folder / "base")}
    make_tiny_base(TinyBaseConfig(**places, **sizes))
    merge_detector(str(folder / "base/model"), str(folder / "detector"), folder / "start")
    train = {**SMALL, "data_path": said, "spread_evidence": True}
    stage = {"learning_rate": 1e-2, "num_train_epochs": 15, "output_dir": str(folder / "delta_2")}
    explain.train(build(ExplainArguments, train | stage | {"model_name_or_path": str(folder / "start")}))
    merge_delta(str(folder / "start"), str(folder / "delta_2"), folder / "stage_2")
    stage = {"learning_rate": 1e-3, "num_train_epochs": 4, "output_dir": str(folder / "delta_3")}
    stage |= {"lora_enable": True, "lora_r": 8, "lora_alpha": 16, "tune_mm_mlp_adapter": True}
    explain.train(build(ExplainArguments, train | stage | {"model_name_or_path": str(folder / "stage_2")}))
    merge_delta(str(folder / "stage_2"), str(folder / "delta_3"), folder / "final")
    return folder


PICTURES = [draw_class(name, 600 + n) for n in range(7) for name in CLASSES]


def shares(folder: Path, p: float) -> dict[str, float]:
    """Give for each class the share of texts that say it when it is told to have the probability `p`."""
    texts = told_texts(Pipeline.from_pretrained(folder, "cpu"), PICTURES, VERDICT_QUESTION, p)
    return {name: float(np.mean([says(text, name, CLASSES) for text in said])) for name, said in texts.items()}


def test_evidence_set_to_a_class_makes_the_words_say_it(world: Path) -> None:
    before = shares(world / "start", 0.98)
    assert before.keys() == set(CLASSES) and min(before.values()) < 0.5, "before stage 2 words follow nothing"
    for stage in ("stage_2", "final"):
        for p in (0.98, 0.75):
            assert min(shares(world / stage, p).values()) >= 0.9, (stage, p)


def test_the_words_say_what_the_detector_finds(world: Path) -> None:
    pipeline = Pipeline.from_pretrained(world / "final", "cpu")
    explainer = pipeline.needed_explainer()
    encoded = explainer.encode(PICTURES)
    texts = explainer.answer(encoded, [[Turn(role="human", text=VERDICT_QUESTION)]] * len(PICTURES))
    found = encoded.detection.logits.argmax(dim=1).tolist()
    said = [stated_class(text, CLASSES) for text in texts]
    assert sum(pipeline.detector.classes[n] == name for n, name in zip(found, said, strict=True)) >= 19
    assert sum(name == CLASSES[n % 3] for n, name in enumerate(said)) >= 19


@pytest.mark.parametrize(("name", "code"), [("final", 0), ("start", 1)])
def test_the_command_measures_every_class(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, code: int
) -> None:
    words = ["causality", str(world / name), "--data.path", str(world / "images"), "--images", "12"]
    assert cli.main([*words, "--output_dir", str(tmp_path), "--device", "cpu"]) == code
    printed = capsys.readouterr()
    report = json.loads((tmp_path / "causality.json").read_text())
    assert report["classes"].keys() == report["texts"].keys() == set(CLASSES)
    assert all(found["n"] == 12 == len(report["texts"][told]) for told, found in report["classes"].items())
    assert "ai_generated" in printed.out
    assert ("the words follow the evidence" in printed.out) == (code == 0)
    assert ("do not follow the evidence when told" in printed.err) == (code == 1)


def test_the_base_remembers_its_detector(world: Path, tmp_path: Path) -> None:
    settings = json.loads((world / "base/model/config.json").read_text())
    assert settings["deepfake_model_sha256"] == load(world / "detector").fingerprint()
    train_vit(tmp_path / "detector", steps=1)
    with pytest.raises(ValueError, match=r"was made for the detector .*make a base for this one"):
        merge_detector(str(world / "base/model"), str(tmp_path / "detector"), tmp_path / "start")


# ---- files ------------------------------------------------------------------------------------------------------


def test_the_files_say_the_class(world: Path) -> None:
    rows = json.loads((world / "words/train/verdict_only.json").read_text())
    said = {row["class_name"]: row["conversations"][1]["value"] for row in rows}
    assert said == {
        "real": "The image is real.",
        "deepfake": "The image is a deepfake.",
        "ai_generated": "The image is AI-generated.",
    }
    source = open_conversations(str(world / "words/train/verdict_only.json"), "")
    assert {_words(record) for record in source.records} == {"real none", "fake deepfake", "fake ai_generated"}
    edited, untouched = ({"region": region, "artefact": trace} for region, trace in (("eyes", "blur"), ("", "")))
    assert _words(replace(source.records[0], label=FAKE, tags=edited)) == "fake eyes blur"
    assert _words(replace(source.records[0], label=REAL, tags=untouched)) == "real none none"


def test_without_kinds_the_files_are_what_they_were(world: Path, tmp_path: Path) -> None:
    data = DataConfig(path=str(world / "images"), class_names=NAMES)
    build_verdicts(VerdictConfig(data=data, output=str(tmp_path)))
    rows = json.loads((tmp_path / "val/verdict_only.json").read_text())
    assert {row["conversations"][1]["value"] for row in rows} == {"The image is real.", "The image is fake."}
    assert not any("tags" in row for row in rows)


@pytest.mark.parametrize("name", [*CLASSES, "fake", "Face2Face"])
def test_every_class_is_read_as_a_verdict_and_as_itself(name: str) -> None:
    assert parse_verdict(class_sentence(name)) == (REAL if name == "real" else FAKE)
    assert stated_class(f"{class_sentence(name)} The nose shows a grid.", (*CLASSES, "fake", "Face2Face")) == name
    assert stated_class(class_sentence("real") + class_sentence(name), (*CLASSES, "fake")) in (None, "real")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("The image is real.", {"real"}),
        ("The image is a deepfake. The nose shows a grid.", {"fake", "deepfake"}),
        ("The image is AI-generated.", {"fake", "ai_generated"}),
        ("The image is fake.", {"fake"}),
        ("The image is a deepfake. The image is AI-generated.", {"fake"}),
        ("The image is not a deepfake.", {"real"}),
        ("The nose.", set()),
    ],
)
def test_a_text_says_a_kind_only_by_its_own_sentence(text: str, said: set[str]) -> None:
    classes = (*CLASSES, "fake")
    assert {name for name in classes if says(text, name, classes)} == said


# ---- evidence ---------------------------------------------------------------------------------------------------


def tellable(name: str) -> tuple[str, ...]:
    return ("real", "fake") if name == "m2f2det" else CLASSES


@pytest.mark.parametrize("detector", ["vit3", "m2f2det"])
@pytest.mark.parametrize("p", [0.6, 0.98, 1.0])
def test_evidence_set_by_hand_is_of_one_piece(detector: str, p: float) -> None:
    kind = DETECTORS.get(detector)
    model = kind(kind.Config.tiny())
    spec = model.inputs["pixel_values"]
    with torch.no_grad():
        own = model.eval()(torch.randn(4, 3, spec.size, spec.size)).evidence
    for name in tellable(detector):
        told = dict(zip(model.evidence_names, model.with_class(own, name, p).T, strict=True))
        torch.testing.assert_close(told[f"p_{name}"], torch.full((4,), p))
        torch.testing.assert_close(told["p_real"] + told["p_fake"], torch.ones(4))
        for other in set(tellable(detector)) - {name, "fake"}:
            assert (told[f"p_{other}"] < p).all()
        if model.kinds:
            torch.testing.assert_close(sum(told[f"p_{kind}"] for kind in model.kinds), told["p_fake"])
    with pytest.raises(ValueError, match=r"'paint' with p = 0.9: the evidence of .* tells real, "):
        model.with_class(own, "paint", 0.9)
    with pytest.raises(ValueError, match=r"with p = 0.3: .*each with a p above 0.[35]"):
        model.with_class(own, "real", 0.3)


def test_training_tells_the_right_class_most_at_any_strength(world: Path) -> None:
    source = open_conversations(str(world / "words/train/verdict_only.json"), "")
    model = load_model(world / "start")
    processor, kinds = load_processor(world / "start", model), model.detector.kinds
    dataset = ExplainDataset(source, processor, 999, spread_seed=3, kinds=kinds)
    rows = range(len(dataset))
    spread = torch.tensor([dataset[n]["spread"] for n in rows])
    assert spread.shape == (len(rows), 2 + len(kinds)) and torch.equal(spread[5], torch.tensor(dataset[5]["spread"]))
    own = torch.rand(len(rows), len(model.detector.evidence_names)).softmax(dim=1)
    told = model.detector.with_p_fake(model.detector.soften(own, spread[:, 1]), spread[:, 0], spread[:, 2:])
    columns = dict(zip(model.detector.evidence_names, told.T, strict=True))
    names = [record.class_name for record in source.records]
    for kind, other in (kinds, kinds[::-1]):
        mine = torch.tensor([name == kind for name in names])
        share = columns[f"p_{kind}"] / columns["p_fake"]
        assert (columns[f"p_{kind}"] > columns[f"p_{other}"])[mine].all() and (columns["p_fake"] > 0.5)[mine].all()
        assert share[mine].min() < 0.65 and share[mine].max() > 0.9, "from hardly to nearly certain"
    real = torch.tensor([name == "real" for name in names])
    assert (columns["p_fake"][real] < 0.5).all()
    assert 0 < (columns["p_deepfake"][real] > columns["p_ai_generated"][real]).sum() < real.sum()
    torch.testing.assert_close(columns["p_deepfake"] + columns["p_ai_generated"], columns["p_fake"])


def test_where_no_answer_names_a_kind_the_detector_s_own_shares_are_told(world: Path, tmp_path: Path) -> None:
    data = DataConfig(path=str(world / "images"), class_names=NAMES)
    build_verdicts(VerdictConfig(data=data, output=str(tmp_path)))
    model = load_model(world / "start")
    processor, kinds = load_processor(world / "start", model), model.detector.kinds
    plain = open_conversations(str(tmp_path / "train/verdict_only.json"), "")
    spread = torch.tensor([ExplainDataset(plain, processor, 999, spread_seed=3, kinds=kinds)[0]["spread"]])
    assert spread[0, 2:].tolist() == [0.0, 0.0]
    own = torch.tensor([[0.2, 0.8, 0.6, 0.2]])
    told = model.detector.with_p_fake(own, torch.tensor([0.4]), spread[:, 2:])
    torch.testing.assert_close(told, torch.tensor([[0.6, 0.4, 0.3, 0.1]]))
    named = open_conversations(str(world / "words/train/verdict_only.json"), "")
    with pytest.raises(ValueError, match=r"is said to be '\w+', which the detector's evidence does not tell.*glued"):
        list(ExplainDataset(named, processor, 999, spread_seed=3, kinds=["glued", "painted"]))
