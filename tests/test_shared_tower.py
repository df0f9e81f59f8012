"""A vision tower is shared where a detector declares it, whatever its name; fingerprints count what a host holds."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_world import calibration_of, draw, make_base
from toy_detector import EyeConfig, EyeDetector
from transformers import LlavaForConditionalGeneration

from llava.core.score_map import read_calibration
from llava.core.types import Decision
from llava.detectors import DETECTORS
from llava.detectors.base import Detector, load
from llava.detectors.m2f2det import M2F2Det, M2F2DetConfig
from llava.explainer.delta import OTHER_WEIGHTS, RECORD, detector_fingerprint, fingerprint, save_delta
from llava.explainer.generation import Explainer, load_model, load_processor
from llava.explainer.merge import merge_delta, merge_detector
from llava.jobs.case_file import model_facts
from llava.pipeline import Pipeline
from llava.train.tiny_base import OWN_TOWER, TinyBaseConfig, make_llava

for toy in ("three_class:ThreeClassDetector", "lookalike:LookalikeDetector", "eye:EyeDetector"):
    DETECTORS.add(toy.partition(":")[0], f"toy_detector:{toy.partition(':')[2]}")
TOWER = "model.vision_tower.embeddings.class_embedding"


def made(folder: Path, name: str) -> Detector:
    """Save a calibrated tiny detector with random weights as `detector`, and a base for it as `base`."""
    torch.manual_seed(0)
    detector = DETECTORS.get(name)(DETECTORS.get(name).Config.tiny()).eval()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    detector.calibration = calibration_of(detector.fingerprint())
    detector.own_scope, detector.decision = f"sees what {name} sees", Decision(threshold=0.4, chosen_on="a test")
    detector.save(folder / "detector")
    make_base(folder / "base", folder / "detector")
    return detector


def merged(folder: Path, base: str = "base", out: str = "start") -> dict[str, object]:
    return merge_detector(str(folder / base), str(folder / "detector"), folder / out)


def stored_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        return set(tensors.keys())


@pytest.mark.parametrize("name", ["m2f2det", "eye", "lookalike", "three_class", "vit3"])
def test_any_detector_is_merged_and_scores_the_same_inside(tmp_path: Path, name: str) -> None:
    detector = made(tmp_path, name)
    certificate = merged(tmp_path)
    inside = {n.removeprefix("detector.") for n in stored_names(tmp_path / "start") if n.startswith("detector.")}
    shared = {n for n in detector.state_dict() if n.startswith(("vision_encoder.model.", "eye."))}
    assert inside == detector.state_dict().keys() - shared and bool(shared) == (name in ("m2f2det", "eye"))
    model = load_model(tmp_path / "start")
    explainer = Explainer(model, load_processor(tmp_path / "start", model))
    pictures = [draw(n % 2, n) for n in range(4)]
    found = explainer.detect(pictures)
    pixels = [explainer.processor.pixels(p)["detector_inputs"] for p in pictures]
    with torch.no_grad():
        alone = detector(**{n: torch.cat([p[n] for p in pixels]) for n in detector.inputs})
    torch.testing.assert_close(found.logits, alone.logits, atol=1e-5, rtol=1e-4)
    assert found.logits.std(dim=0).min() > 1e-6
    assert certificate["stage_1_sha256"] == certificate["detector_sha256"] == detector.fingerprint()
    assert model.detector.calibration == detector.calibration
    assert model.detector.scope == f"sees what {name} sees" and model.detector.decision == detector.decision
    pipeline = Pipeline(model.detector, explainer, str(tmp_path / "start"))
    assert model_facts(pipeline)["detector_sha256"] == detector.fingerprint()


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with a calibrated M2F2-Det, and the explainer merged from it and a base in half precision."""
    folder = tmp_path_factory.mktemp("half")
    made(folder, "m2f2det")
    LlavaForConditionalGeneration.from_pretrained(folder / "base").half().save_pretrained(folder / "base")
    certificate = merged(folder)
    assert certificate["stage_1_sha256"] == load(folder / "detector").fingerprint()
    assert certificate["detector_sha256"] != certificate["stage_1_sha256"]
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "stored"])
def test_a_calibration_goes_along_into_half_precision(half: Path, dtype: str) -> None:
    model = load_model(half / "start", dtype=dtype)
    before = load(half / "detector").calibration
    assert model.detector.calibration == calibration_of(detector_fingerprint(half / "start", model.detector))
    assert model.detector.calibration.weights_sha256 != before.weights_sha256
    assert model.detector.calibration.score_map == before.score_map


@pytest.mark.parametrize("name", [TOWER, "detector.classifier.bias"])
def test_an_explainer_with_another_tensor_refuses_its_calibration(half: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(half / "start", tmp_path / "changed")
    path = tmp_path / "changed" / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"other weights.*merge the detector with its calibration again"):
        load_model(tmp_path / "changed")
    (tmp_path / "changed" / "calibration.json").unlink()
    assert load_model(tmp_path / "changed").detector.calibration is None


def delta(folder: Path, part: str) -> None:
    """Write a delta of `start` in which one part of the model has changed."""
    model = load_model(folder / "start", dtype="stored").requires_grad_(False)
    for parameter in model.get_submodule(part).requires_grad_(True).parameters():
        parameter.data += 0.1
    save_delta(model, folder / "delta", {"name": "start", "sha256": fingerprint(folder / "start")})


def test_folding_a_delta_keeps_the_calibration(half: Path, tmp_path: Path) -> None:
    shutil.copytree(half / "start", tmp_path / "start")
    delta(tmp_path, "deepfake_projector")
    certificate = merge_delta(str(tmp_path / "start"), str(tmp_path / "delta"), tmp_path / "folded")
    folded = load_model(tmp_path / "folded").detector
    # BatchNorm's counters come back as floats from a model in half precision: another fingerprint, the same scores.
    own = detector_fingerprint(tmp_path / "folded", folded)
    assert certificate["detector_sha256"] == own != read_calibration(half / "start").weights_sha256
    assert folded.calibration == calibration_of(own)
    assert folded.scope == "sees what m2f2det sees" and folded.decision.threshold == 0.4


@pytest.mark.parametrize("part", ["detector.classifier", "model.vision_tower"])
def test_a_delta_that_would_change_the_score_is_refused(half: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(half / "start", tmp_path / "start")
    delta(tmp_path, part)
    with pytest.raises(ValueError, match="would change the detector or the vision tower"):
        merge_delta(str(tmp_path / "start"), str(tmp_path / "delta"), tmp_path / "folded")
    assert json.loads((tmp_path / "delta" / RECORD).read_text())["others"] and (tmp_path / "delta" / OTHER_WEIGHTS)


def test_the_layer_and_the_weights_of_a_declared_tower_are_compared(tmp_path: Path) -> None:
    detector = made(tmp_path, "eye")
    detector.calibration = None
    detector.eye.post_layernorm.weight.data += 0.1
    detector.save(tmp_path / "detector")
    with pytest.raises(ValueError, match="another vision tower"):
        merged(tmp_path)
    EyeDetector(EyeConfig(layer=-2)).save(tmp_path / "detector")
    with pytest.raises(ValueError, match="reads layer -2 of the vision tower, the base layer -1"):
        merged(tmp_path)


def test_a_base_refuses_another_detector_than_its_own(tmp_path: Path) -> None:
    detector = made(tmp_path, "vit3")
    path = tmp_path / "base" / "config.json"
    own = {"deepfake_model_path": "stage_1/vit3", "deepfake_model_sha256": detector.fingerprint()}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    merged(tmp_path)
    with torch.no_grad():
        next(detector.parameters()).add_(1e-3)
    detector.calibration = None
    detector.save(tmp_path / "detector")
    short = own["deepfake_model_sha256"][:12], detector.fingerprint()[:12]
    with pytest.raises(ValueError, match=rf"'stage_1/vit3' with the fingerprint {short[0]}, this one has {short[1]}"):
        merged(tmp_path, out="other")
    assert not (tmp_path / "other").exists()


# ---- the tower of a tiny base -----------------------------------------------------------------------------------


def config(**changes: object) -> TinyBaseConfig:
    return TinyBaseConfig(data=[], image_folder="", detector="d", hidden_size=32, layers=1, heads=2, **changes)


def test_beside_a_detector_without_a_tower_the_base_has_one_of_its_own() -> None:
    detector = DETECTORS.get("lookalike")(DETECTORS.get("lookalike").Config.tiny())
    towers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        towers.append(make_llava(config(), detector, 64).model.vision_tower)
    sizes = asdict(OWN_TOWER)
    sizes.pop("select_layer")
    assert {name: getattr(towers[0].config, name) for name in sizes} == sizes
    same = [torch.equal(*(t.embeddings.class_embedding for t in pair)) for pair in (towers[:2], towers[1:])]
    assert same == [True, False] and not any(p.requires_grad for p in towers[0].parameters())
    small = M2F2DetConfig.tiny().vision
    assert make_llava(config(vision=small), detector, 64).model.vision_tower.config.image_size == small.image_size


def test_sizes_of_a_tower_that_is_shared_are_refused() -> None:
    detector = M2F2Det(M2F2DetConfig.tiny())
    with pytest.raises(ValueError, match="vision: 'd' shares its own tower with the base; leave the sizes out"):
        make_llava(config(vision=OWN_TOWER), detector, 64)
    with pytest.raises(ValueError, match="'d' was saved without the vision tower that it reads"):
        make_llava(config(), detector.without_vision(), 64)
