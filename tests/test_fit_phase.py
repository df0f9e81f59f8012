"""Parts that are fitted and detectors made of detectors, by recipes: folds, leaks, members, missing inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import expit, logit

from llava.core.config import build
from llava.core.runtime import item_rng
from llava.core.types import InputSpec
from llava.core.weights import read_config, sha256_of
from llava.data.dataset import to_tensor
from llava.data.sources import DataConfig, open_source, split_of
from llava.data.splits import LeakError, group_hashes, refuse_groups
from llava.detectors import DETECTORS
from llava.detectors.base import Detector, create, load, load_uncalibrated
from llava.detectors.ensemble import Ensemble, EnsembleConfig
from llava.detectors.fitted import LogisticFusion
from llava.evaluation.calibration import CalibrationConfig
from llava.evaluation.predictions import read_csv
from llava.ops.degrade import VERSIONS
from llava.pipeline import Pipeline
from llava.pipeline.settings import FaceSettings
from llava.train import stage_1
from llava.train.evaluate import ScoreConfig, data_of_training, evaluate
from llava.train.recipe import Fold, PhaseConfig, Recipe
from llava.train.scoring import calibrate
from llava.train.stage_1 import fit_phase

DETECTORS.add("toy", "toy_detector:ToyDetector")
DETECTORS.add("fitted_toy", "toy_detector:FittedToy")
DETECTORS.add("two_toys", "toy_detector:TwoToys")
NOISE = {"real": 4.0, "fake": 12.0}  # standard deviation, in grey levels
SPLITS = {"train": 40, "val": 16, "test": 16, "fit": 20, "calibration": 16}
TOY = {"size": 16, "filters": 4}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in SPLITS.items():
        for name, noise in NOISE.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                picture = 128 + 30 * rng.random() + noise * (0.5 + rng.random()) * rng.standard_normal((16, 16, 3))
                Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{number:02d}.png")
    return root


def recipe(images: Path, out: Path, detector: str, phases: list[dict[str, Any]], **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "detector": detector,
        "data": {"path": str(images), "cache": True},
        "output_dir": str(out),
        "steps": 20,
        "eval_steps": 10,
        "batch_size": 20,
        "workers": 0,
        "precision": "fp32",
        "near_duplicates": False,
        "resamples": 50,
        "optim": {"optimizer": "adamw", "lr": 5e-2},
        "degrade": None,
        "collapse": {"min_recall": 0.0, "min_sd": 0.0},
        "phases": phases,
    }
    return build(Recipe, values | changes)


@pytest.fixture(scope="module")
def toys(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two toys, the members of ensembles."""
    root = tmp_path_factory.mktemp("toys")
    for name, seed in (("a", 1), ("b", 2)):
        stage_1.train(recipe(images, root / name, "toy", [], model=TOY, seed=seed, scope=f"sees noise {name}"))
    return root


@pytest.fixture(scope="module")
def fused(images: Path, toys: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Fit an ensemble of them on a fold of its own."""
    out = tmp_path_factory.mktemp("fused")
    return out, stage_1.train(recipe(images, out, "ensemble", [{"kind": "fit", "fold": "fit"}], model=both(toys)))


def both(toys: Path) -> dict[str, Any]:
    return {"members": {name: str(toys / name) for name in ("a", "b")}}


def whole_image(detector: Detector) -> Pipeline:
    return Pipeline(detector, None, "it", faces=FaceSettings(face="off"), stability=False)


def tensors(images: Path, split: str, spec: InputSpec) -> tuple[torch.Tensor, torch.Tensor]:
    source = open_source(DataConfig(path=str(images)))
    records = split_of(source, split)
    pixels = torch.stack([to_tensor(source.load(record).image, spec) for record in records])
    return pixels, torch.tensor([record.label for record in records])


# ---- a fitted part by a recipe ----------------------------------------------------------------------------------


def test_a_part_is_fitted_on_its_fold_and_calibration_on_another(images: Path, tmp_path: Path) -> None:
    phases = [
        {"name": "standardise", "kind": "fit", "fold": "fit"},
        {"name": "train"},
        {"name": "calibrate", "kind": "fit", "parts": ["calibration"], "fold": "calibration"},
    ]
    results = stage_1.train(recipe(images, tmp_path / "out", "fitted_toy", phases, model=TOY))
    assert results["test"]["frame"]["auc"]["value"] > 0.9
    assert results["decision"]["chosen_on"] == "split 'calibration', 32 images, youden"
    found = load(tmp_path / "out")
    assert str(found.calibration) == f"calibrated on {images.name}, split 'calibration', n = 32"
    first = load_uncalibrated(tmp_path / "out" / "phases" / "0" / "best")
    pixels, _ = tensors(images, "fit", found.inputs["raw"])
    with torch.no_grad():
        seen = (first.energy(pixels) + 1e-6).log()  # type: ignore[operator]
    torch.testing.assert_close(first.get_buffer("norm.mean"), seen.mean(dim=0))
    torch.testing.assert_close(first.get_buffer("norm.deviation"), seen.std(dim=0))
    for name in ("norm.mean", "norm.deviation"):
        assert torch.equal(found.get_buffer(name), first.get_buffer(name)), "training does not move it"
    assert not torch.equal(found.get_parameter("classifier.weight"), first.get_parameter("classifier.weight"))
    assert data_of_training(tmp_path / "out").path == str(images)
    verdict = whole_image(found).detect(np.zeros((16, 16, 3), np.uint8))[0]
    assert verdict.is_calibrated and set(verdict.evidence) == {"energy", "p_real", "p_fake"}


def test_a_part_is_fitted_on_delivered_versions_where_the_calibration_is(images: Path, tmp_path: Path) -> None:
    phases = [{"kind": "fit", "fold": "fit", "parts": ["norm"]}, {}]
    stage_1.train(recipe(images, tmp_path, "fitted_toy", phases, model=TOY, calibrate_versions=True))
    first = load_uncalibrated(tmp_path / "phases" / "0" / "best")
    source = open_source(DataConfig(path=str(images)))
    pictures, spec = [source.load(record).image for record in split_of(source, "fit")], first.inputs["raw"]
    looks = [None, *VERSIONS.values()]
    pixels = [to_tensor(p if look is None else look(p, item_rng(0, 0, 0)), spec) for look in looks for p in pictures]
    with torch.no_grad():
        seen = (first.energy(torch.stack(pixels)) + 1e-6).log()  # type: ignore[operator]
    torch.testing.assert_close(first.get_buffer("norm.mean"), seen.mean(dim=0))


@pytest.mark.parametrize(
    ("detector", "phases", "message"),
    [
        ("fitted_toy", [{"name": "one"}], "Phase 'one' trains before norm is fitted; add a phase `kind: fit`"),
        ("fitted_toy", [{"kind": "fit", "parts": ["calibration"]}], "No phase fits norm of 'fitted_toy'; add a phase"),
        (
            "fitted_toy",
            [{"kind": "fit", "parts": ["nrm"]}],
            "parts: 'nrm' is no part of 'fitted_toy'.*Did you mean 'norm",
        ),
        ("toy", [{}, {"kind": "fit"}], "nothing but its calibration can be fitted of 'toy'. Allowed: calibration"),
        (
            "toy",
            [{"kind": "fit", "parts": ["calibration"]}, {}],
            "calibration is that of the finished detector; fit it",
        ),
        ("toy", [{}, {"kind": "fit", "parts": ["calibration"], "fold": "nix"}], "Split 'nix' has no records"),
    ],
)
def test_a_plan_that_cannot_work_is_refused_before_anything_is_trained(
    images: Path, tmp_path: Path, detector: str, phases: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        stage_1.train(recipe(images, tmp_path / "out", detector, phases, model=TOY))
    assert not (tmp_path / "out").exists()


def test_an_unfitted_detector_is_neither_scored_nor_trained(images: Path, tmp_path: Path) -> None:
    create("fitted_toy", TOY).save(tmp_path / "raw")
    with pytest.raises(ValueError, match="norm must be fitted first; add a phase `kind: fit` to its recipe"):
        evaluate(ScoreConfig(model=str(tmp_path / "raw"), data=DataConfig(path=str(images)), device="cpu"))
    with pytest.raises(ValueError, match="norm must be fitted first"):
        stage_1.train(recipe(images, tmp_path / "out", "fitted_toy", [{"init_from": str(tmp_path / "raw")}], model=TOY))


# ---- leaks ------------------------------------------------------------------------------------------------------

CALIBRATE = {"kind": "fit", "parts": ["calibration"]}


LEAKS = [
    ("toy", [{}, CALIBRATE | {"fold": "train"}], "split 'train' has 80 groups .* trained on"),
    ("toy", [{}, CALIBRATE | {"fold": "all"}], r"has 80 groups .* trained on \('train/fake/00.png'"),
    ("toy", [{}, CALIBRATE | {"fold": "test"}], "split 'test' has 32 groups .* tested on"),
    ("ensemble", [{"kind": "fit", "fold": "train"}], "split 'train' has 80 groups .* trained on"),
]


@pytest.mark.parametrize(("detector", "phases", "message"), LEAKS)
def test_a_fold_of_groups_that_were_trained_or_will_be_tested_on_is_refused(
    images: Path, toys: Path, tmp_path: Path, detector: str, phases: list[dict[str, Any]], message: str
) -> None:
    model = both(toys) if detector == "ensemble" else TOY
    with pytest.raises(LeakError, match=message):
        stage_1.train(recipe(images, tmp_path / "out", detector, phases, model=model))
    assert not (tmp_path / "out").exists()


def test_what_a_detector_starts_from_was_trained_on_counts(images: Path, toys: Path, tmp_path: Path) -> None:
    """The validation split of the second data set holds groups that the first training had."""
    rows = ["file,label,split"]
    for split, folder in (("train", "fit"), ("val", "train"), ("test", "test")):
        rows += [f"{folder}/{name}/{n:02d}.png,{name},{split}" for name in NOISE for n in range(SPLITS[folder])]
    table = images / "other.csv"
    table.write_text("\n".join(rows))
    data = {"source": "csv", "path": str(table)}
    groups = [r.group for r in open_source(DataConfig(**data)).records if r.split == "val"]
    assert load(toys / "a").trained_on == group_hashes(groups), "both sources name groups alike"
    changes = {"model": TOY, "data": data, "init_from": str(toys / "a")}
    with pytest.raises(LeakError, match="has 80 groups that the detector, or a part of it, is trained on"):
        stage_1.train(recipe(images, tmp_path / "out", "toy", [], **changes))
    assert not (tmp_path / "out").exists(), "it is seen before hours of training"


def test_the_fit_itself_refuses_groups_that_were_trained_on(images: Path, toys: Path, tmp_path: Path) -> None:
    """Not only the plan: whoever calls it."""
    data = DataConfig(path=str(images))
    source = open_source(data)
    ensemble = create("ensemble", both(toys))
    ensemble.load_pretrained()
    before = ensemble.fingerprint()
    plan = recipe(images, tmp_path, "ensemble", [{"kind": "fit"}], model=both(toys))
    with pytest.raises(LeakError, match="trained on"):
        fit_phase(
            ensemble, PhaseConfig(kind="fit"), Fold(data, "train", source, split_of(source, "train")), plan, tmp_path
        )
    assert ensemble.fingerprint() == before
    trained_on, other = read_csv(toys / "a" / "val.csv"), read_csv(toys / "a" / "test.csv")
    ensemble.trained_on = group_hashes(trained_on.groups[:1])
    with pytest.raises(LeakError, match=r"val has 1 groups .* \('val/fake/00.png'\)"):
        calibrate(ensemble, trained_on, CalibrationConfig(), "val")
    assert calibrate(ensemble, other, CalibrationConfig(), "test").images == len(other)
    assert calibrate(ensemble, trained_on, CalibrationConfig(), "val", allow_leaks=True).images == len(trained_on)


def test_leaks_that_are_allowed_are_told(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    fold = Fold(DataConfig(path=str(images), allow_leaks=True), "x", *_two_records(images))
    fold.refuse(group_hashes([fold.records[0].group]), "trained on")
    assert "fitted all the same: Leak" in caplog.text
    refuse_groups(["a", "b"], group_hashes(["c"]), "x", "trained on")
    assert group_hashes(["a", "a"]) == {"ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"}


def _two_records(images: Path) -> tuple[Any, list[Any]]:
    source = open_source(DataConfig(path=str(images)))
    return source, split_of(source, "fit")[:2]


# ---- an ensemble ------------------------------------------------------------------------------------------------


def test_fusion_weights_are_the_logistic_regression_of_the_members(
    images: Path, toys: Path, fused: tuple[Path, dict[str, Any]]
) -> None:
    """At its minimum the gradient of the loss is zero, but for weights at their bound."""
    ensemble = load(fused[0])
    pixels, labels = tensors(images, "fit", ensemble.inputs["raw"])
    with torch.no_grad():
        members = [load(toys / name) for name in ("a", "b")]
        log_odds = np.array([logit(m.p_fake(m(pixels).logits).double().numpy()) for m in members])  # (2, N)
    fusion = ensemble.fitted_parts()["fusion"]
    weights, offset = fusion.get_buffer("weights").numpy(), float(fusion.get_buffer("offset"))
    target = np.where(labels == 1, 21 / 22, 1 / 22)
    slopes = (expit(weights @ log_odds + offset) - target) / len(labels)
    assert abs(slopes.sum()) < 1e-4
    for weight, gradient in zip(weights, log_odds @ slopes, strict=True):
        assert abs(gradient) < 1e-4 or (weight == 0 and gradient > 0)
    assert weights.max() > 0 and not np.allclose(weights, 0.5)


def test_members_stay_as_they_were_and_speak_in_the_evidence(
    images: Path, toys: Path, fused: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, results = fused
    for name in ("a", "b"):
        assert sha256_of(out / "members" / name / "model.safetensors") == sha256_of(toys / name / "model.safetensors")
        assert load(out / "members" / name).calibration == load(toys / name).calibration is not None
    assert str(load(out).calibration) == f"calibrated on {images.name}, split 'val', n = 32"
    assert load(out).trained_on == load(toys / "a").trained_on, "who trains on it, or fits, can know"
    scope = "a (sees noise a), b (sees noise b)"
    assert load(out).scope == results["scope"] == scope and load(out / "members" / "a").scope == "sees noise a"
    said = evaluate(ScoreConfig(model=str(out), output_dir=str(tmp_path), resamples=50, device="cpu"))
    assert "split 'val'" in said and f"\nscope: {scope}\n" in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["frame"]["auc"]["value"] == results["test"]["frame"]["auc"]["value"] > 0.9
    picture = np.asarray(Image.open(images / "test" / "fake" / "00.png"))
    verdict = whole_image(load(out)).detect(picture)[0]
    for name in ("a", "b"):
        alone = whole_image(load(toys / name)).detect(picture)[0]
        assert verdict.evidence[f"p_fake_{name}"] == pytest.approx(alone.raw_p_fake, abs=1e-5)


def test_a_next_phase_takes_over_all_that_is_known_of_members(toys: Path) -> None:
    before, after = (create("ensemble", both(toys)) for _ in range(2))
    before.load_pretrained()
    before.trained_on, before.own_scope = frozenset(["x"]), "sees y"
    before.members["a"].own_scope = "sees z"
    after.take_over(before, "the phase before")
    assert after.fingerprint() == before.fingerprint() and after.trained_on == {"x"}
    assert after.scope == "sees y" and after.members["a"].scope == "sees z"
    for name, member in after.members.items():
        alone = load(toys / name)
        assert member.calibration == alone.calibration is not None
        assert (member.decision, member.trained_on) == (alone.decision, alone.trained_on)


def test_free_members_train_together_and_are_then_fused(images: Path, tmp_path: Path) -> None:
    """Train, then fit, from nothing; and a fusion that is trained over members that are not."""
    fresh = {"detector": "toy", "config": TOY}
    model = {"members": {"a": fresh, "b": fresh}, "freeze_members": False}
    phases = [{}, {"kind": "fit", "fold": "fit"}]
    results = stage_1.train(recipe(images, tmp_path / "free", "ensemble", phases, model=model))
    assert results["test"]["frame"]["auc"]["value"] > 0.9
    trained, fitted = (load(tmp_path / "free" / "phases" / n / "best") for n in ("0", "1"))
    assert trained.get_buffer("fusion.weights").tolist() == [0.5, 0.5]
    assert fitted.get_buffer("fusion.weights").tolist() != [0.5, 0.5]
    assert fitted.members["a"].fingerprint() == trained.members["a"].fingerprint()
    assert fitted.trained_on == group_hashes(f"train/{name}/{n:02d}.png" for name in NOISE for n in range(40))
    over = {"members": {name: str(tmp_path / "free" / "members" / name) for name in ("a", "b")}}
    stage_1.train(recipe(images, tmp_path / "over", "two_toys", [{"steps": 10}], model=over))
    above = load(tmp_path / "over")
    assert above.members["a"].fingerprint() == fitted.members["a"].fingerprint(), "BatchNorm statistics too"
    with pytest.raises(ValueError, match=r"every weight is frozen; freeze fewer, or fit parts \(kind: fit\)"):
        stage_1.train(recipe(images, tmp_path / "none", "ensemble", [{}], model=over))


def spread_ensemble() -> tuple[Ensemble, dict[str, torch.Tensor]]:
    """Give an ensemble of two toys that see the picture at two sizes, with pictures."""
    torch.manual_seed(0)
    members: dict[str, Any] = {
        n: {"detector": "toy", "config": TOY | {"size": size}} for n, size in (("a", 16), ("b", 24))
    }
    ensemble = Ensemble(EnsembleConfig(members=members)).eval()
    return ensemble, {name: torch.rand(3, 3, spec.size, spec.size) for name, spec in ensemble.inputs.items()}


def test_inputs_are_shared_where_members_agree_on_them() -> None:
    same = {"detector": "toy", "config": TOY}
    assert list(Ensemble(EnsembleConfig(members={"a": same, "b": same})).inputs) == ["raw"]
    ensemble, inputs = spread_ensemble()
    assert {name: spec.size for name, spec in ensemble.inputs.items()} == {"a_raw": 16, "b_raw": 24}
    with torch.no_grad():
        output = ensemble(**inputs)
        alone = [m.p_fake(m(raw=x).logits) for m, x in zip(ensemble.members.values(), inputs.values(), strict=True)]
    torch.testing.assert_close(output.evidence[:, 2:], torch.stack(alone, dim=1))
    mean = torch.stack([torch.logit(p) for p in alone]).mean(dim=0).sigmoid()
    torch.testing.assert_close(output.evidence[:, 1], mean)


def test_a_member_that_lacks_its_input_is_left_out_and_nothing_is_said_of_it() -> None:
    ensemble, inputs = spread_ensemble()
    inputs["a_raw"][1:] = torch.nan
    inputs["b_raw"][2] = torch.nan
    fed: list[torch.Tensor] = []
    for member in ensemble.members.values():
        member.register_forward_pre_hook(lambda _, given, by_name: fed.append(by_name["raw"]), with_kwargs=True)
    with torch.no_grad():
        output = ensemble(**inputs)
        seen = ensemble.over_views({name: tensor[:, None] for name, tensor in inputs.items()})
        b = ensemble.members["b"]
        alone = b.p_fake(b(raw=inputs["b_raw"][1:2]).logits)
    assert [len(rows) for rows in fed[:2]] == [1, 2] and not any(rows.isnan().any() for rows in fed)
    torch.testing.assert_close(seen.logits, output.logits, equal_nan=True)
    p_fake = ensemble.p_fake(output.logits)
    assert p_fake.isnan().tolist() == [False, False, True]
    torch.testing.assert_close(p_fake[1:2], alone)
    assert output.evidence.isnan().tolist()[:2] == [[False] * 4, [False, False, True, False]]
    told = ensemble.evidence_for_words(output)
    assert told[1, 2] == told[1, 1], "words are told what the others say"
    assert ensemble.lacking({"a_raw": "it is too small"}) == ""
    assert ensemble.lacking(dict.fromkeys(inputs, "it is too small")) == "it is too small"
    row = whole_image(ensemble)._rows(output)[1]
    assert set(row["evidence"]) == {"p_real", "p_fake", "p_fake_b"}
    ensemble.optional_evidence = ()
    assert len(whole_image(ensemble)._rows(output)[1]["evidence"]) == 4, "what may not be missing is not hidden"


def test_told_members_agree_with_the_told_whole() -> None:
    ensemble, inputs = spread_ensemble()
    with torch.no_grad():
        evidence = ensemble(**inputs).evidence
    told = ensemble.with_p_fake(evidence, torch.tensor([0.02, 0.5, 0.97]))
    torch.testing.assert_close(torch.logit(told[:, 2:]).mean(dim=1).sigmoid(), told[:, 1])


def test_a_fusion_leaves_out_what_is_not_there_and_never_turns_a_member_round() -> None:
    fusion, rng = LogisticFusion(2), np.random.default_rng(0)
    assert fusion(torch.tensor([[1.0, 3.0], [torch.nan, 3.0]])).tolist() == [2.0, 3.0]
    labels = np.arange(400) % 2
    good, against = 3 * labels - 1.5 + rng.normal(size=400), -labels + rng.normal(size=400)
    observed = torch.tensor(np.array([good, against]).T)
    observed[0, 1] = torch.nan
    fusion.fit(observed, torch.tensor(labels), [""] * len(labels))
    assert fusion.weights[0] > 0.5 and fusion.weights[1] == 0
    assert float(fusion(torch.tensor([[torch.nan, 4.0]]))) == pytest.approx(float(fusion.offset)), "it says nothing"
    with pytest.raises(ValueError, match="real and fake images that every member answers, got 1 of 2"):
        fusion.fit(torch.tensor([[1.0, torch.nan], [1.0, 2.0]]), torch.tensor([0, 1]), ["", ""])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "members: 'none' is not usable; give at least one"),
        ({"A b": "x"}, "members: 'A b' is not usable"),
        ({"a": "nowhere"}, "No model at 'nowhere'"),
        ({"a": {"detector": "toy", "confg": {}}}, "members.a: unknown setting 'confg'.*Did you mean 'config'"),
        ({"a": {"detector": "toy"}}, "members.a: detector or config is missing"),
        ({"a": {"detector": "toi", "config": {}}}, "Unknown detector 'toi'"),
    ],
)
def test_mistakes_about_members_are_named(members: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        create("ensemble", {"members": members})


def test_an_ensemble_lives_in_an_explainer(tmp_path: Path) -> None:
    from tiny_world import make_base

    from llava.detectors.m2f2det import M2F2Det, M2F2DetConfig
    from llava.explainer.generation import load_explainer, load_model, load_processor
    from llava.explainer.merge import merge_detector

    torch.manual_seed(0)
    M2F2Det(M2F2DetConfig.tiny()).save(tmp_path / "clip")
    make_base(tmp_path / "base", tmp_path / "clip")
    ensemble: Detector = Ensemble(EnsembleConfig.tiny())
    ensemble.eval().save(tmp_path / "ensemble")
    merge_detector(str(tmp_path / "base"), str(tmp_path / "ensemble"), tmp_path / "merged")
    model = load_model(tmp_path / "merged")
    inside = model.detector
    assert load_processor(tmp_path / "merged", model).lacking == inside.lacking, "one member may be enough to judge"
    whole = load_explainer(tmp_path / "merged", read_config(tmp_path / "merged"), torch.device("cpu"))
    assert whole.processor.lacking == whole.model.detector.lacking
    assert inside.config == ensemble.config and inside.evidence_names[2:] == ("p_fake_clip", "p_fake_vit")
