"""Fakes made in memory: each beside its untouched face, the same on every reading, and told truly."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llava.core.config import build, parse, to_dict
from llava.core.runtime import Incomplete, item_rng, write_json
from llava.core.types import FAKE, REAL, REGIONS
from llava.data.dataset import DetectionDataset, EpochSampler
from llava.data.sources import DataConfig, open_source
from llava.detectors.base import create, load
from llava.evaluation.predictions import read_csv
from llava.explainer.merge import halve
from llava.jobs.diagnose import DiagnoseConfig, diagnose
from llava.ops.degrade import DegradeConfig
from llava.ops.face_regions import FACE, face_regions
from llava.ops.forge import ARTEFACTS, SELF_BLENDED, ForgeConfig, draw_forgery
from llava.ops.self_blend import BELOW_BROWS, HULLS, SelfBlendConfig, draw_hull, self_blend
from llava.train import stage_1
from llava.train.evaluate import ScoreConfig, data_of_training, evaluate, split_to_score, training_of
from llava.train.forging import FORGED, MARGIN, ForgingConfig, ForgingSource
from llava.train.recipe import PhaseConfig, PhaseData, Recipe, open_phase

ROOT = Path(__file__).resolve().parents[1]
FACES = ROOT / "utils" / "demo_faces"
PHOTOS = {"grace_hopper.jpg": "train", "portrait_cc0_1.png": "val", "astronaut.png": "test"}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photos.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [("file", "label", "split"), *((FACES / name, "real", split) for name, split in PHOTOS.items())]
        )
    return path


@pytest.fixture(scope="module")
def data(table: Path) -> PhaseData:
    phase = PhaseConfig(data=DataConfig(source="csv", path=str(table), cache=True), forge=ForgingConfig())
    opened = open_phase(phase)
    assert isinstance(opened, PhaseData)
    return opened


def test_every_real_face_is_followed_by_its_fakes(data: PhaseData) -> None:
    real, fake = data.train
    assert (real.label, fake.label, fake.class_name) == (REAL, FAKE, FORGED)
    assert fake.group == real.group and fake.video != real.video  # one score each
    assert [r.class_name for r in data.val] == ["real", *ARTEFACTS]
    assert len({r.id for r in (*data.train, *data.val, *data.test)}) == 2 + 2 * (1 + len(ARTEFACTS))


def test_a_fake_differs_from_its_real_inside_the_mask_alone(data: PhaseData) -> None:
    untouched = data.source.load(data.val[0])
    assert untouched.mask is not None and not untouched.mask.any()
    for record in data.val[1:]:
        sample = data.source.load(record)
        assert sample.mask is not None and sample.record.tags["artefact"] == record.class_name
        assert (sample.record.tags["region"] == FACE) == (record.class_name == SELF_BLENDED)
        changed = (sample.image != untouched.image).any(axis=2)
        assert changed.any() and not (changed & (sample.mask == 0)).any()


def test_what_is_held_out_never_changes_and_training_does(data: PhaseData) -> None:
    held_out, trained = data.val[3], data.train[1]
    first = data.source.load(held_out, item_rng(1, 0, 0)).image
    assert np.array_equal(first, data.source.load(held_out, item_rng(2, 5, 7)).image)
    images = [data.source.load(trained, item_rng(0, epoch, 0)).image for epoch in (0, 0, 1)]
    assert np.array_equal(images[0], images[1])
    assert images[0].shape != images[2].shape or not np.array_equal(images[0], images[2])


def test_a_pair_meets_the_same_crop_version_and_degradation(data: PhaseData) -> None:
    detector = create("cnn", {"backbone": "conv_tiny", "image_size": 224, "width": 8})
    degrade = DegradeConfig(noise_probability=1.0, noise_sigma=(20.0, 20.0), rescale_probability=0.5, gain=0.3)
    dataset = DetectionDataset(
        data.source, data.train, detector.inputs, degrade, 3, mask_grid=detector.mask_grid, taught=detector.taught
    )
    for epoch in range(6):
        real, fake = dataset[(epoch, 0)], dataset[(epoch, 1)]
        apart = (real["pixel_values"] - fake["pixel_values"]).abs().amax(dim=0)
        # Noise of 20 grey levels is nowhere to be seen where nothing was forged.
        clear = torch.nn.functional.interpolate(fake["masks"][None, None], size=(224, 224))[0, 0] == 0
        assert clear.any() and apart[clear].quantile(0.9) < 0.1 < apart.max()
        assert real["region"] == real["artefact"] == -1 and not real["masks"].any()
        assert (fake["region"] == len(REGIONS)) == (fake["artefact"] == ARTEFACTS.index(SELF_BLENDED))
    order = list(EpochSampler([0, 1], 0, False, origins=[r.tags["untouched"] for r in data.train]))
    assert order == [(0, 0), (0, 1)]


def test_training_draws_margin_version_and_kind(data: PhaseData) -> None:
    tags = [data.source.load(data.train[1], item_rng(0, epoch, 0)).record.tags for epoch in range(40)]
    assert {tag["artefact"] for tag in tags} == set(ARTEFACTS)
    shapes = {data.source.load(data.train[0], item_rng(0, epoch, 0)).image.shape for epoch in range(5)}
    assert len(shapes) == 5
    with pytest.raises(ValueError, match=r"margin: .*0.5, 0.1.* allowed: 0 to 2"):
        ForgingConfig(margin=(0.5, 0.1))


def test_held_out_faces_are_cut_as_detect_cuts_them(data: PhaseData) -> None:
    from llava.data.images import read_image
    from llava.data.inputs import NamedImage
    from llava.pipeline.crops import faces_of
    from llava.pipeline.settings import FaceSettings

    path = FACES / "astronaut.png"
    found = faces_of(NamedImage(name=path.name, pixels=read_image(path)), FaceSettings(face="largest"))[0]
    assert FaceSettings().margin == MARGIN
    assert np.array_equal(data.source.load(data.test[0]).image, found.pixels)


def test_images_without_a_face_are_left_out_and_counted(table: Path, tmp_path: Path, caplog) -> None:
    import cv2

    cv2.imwrite(str(tmp_path / "plain.png"), np.full((90, 90, 3), 120, np.uint8))
    path = tmp_path / "t.csv"
    path.write_text(f"file,label,split\n{FACES / 'grace_hopper.jpg'},real,train\nplain.png,real,train\n")
    source = ForgingSource(open_source(DataConfig(source="csv", path=str(path))), ForgingConfig(), "train", 0)
    assert len(source.records) == 2
    assert "1 of 2 images show no face (first: 'plain.png'); they are left out" in caplog.text
    path.write_text("file,label,split\nplain.png,real,train\n")
    with pytest.raises(ValueError, match="None of the 1 real images shows a face"):
        ForgingSource(open_source(DataConfig(source="csv", path=str(path))), ForgingConfig(), "train", 0)


def test_a_face_on_which_nothing_shows_is_an_error(table: Path) -> None:
    config = ForgingConfig(held_out=build(ForgeConfig, {"least_change": 255}))
    source = ForgingSource(open_source(DataConfig(source="csv", path=str(table))), config, "train", 0)
    with pytest.raises(ValueError, match=r"portrait_cc0_1.*cannot be forged so that it shows"):
        source.load(next(r for r in source.records if r.split == "val" and r.label == FAKE))


def test_the_starters_recipe_trains_on_real_faces_alone(table: Path, tmp_path: Path) -> None:
    flags = ["--data.source", "csv", "--data.path", str(table), "--output_dir", str(tmp_path / "model")]
    flags += ["--model.backbone", "conv_tiny", "--model.image_size", "64", "--model.width", "8", "--steps", "2"]
    flags += ["--batch_size", "2", "--eval_steps", "2", "--workers", "0", "--resamples", "10"]
    flags += ["--collapse.min_recall", "0", "--collapse.min_sd", "0"]  # two steps teach nothing
    recipe = parse(Recipe, ["--config", str(ROOT / "scripts/configs/starter/stage_1.yaml"), *flags])
    *phases, strangers = ({**phase, **({"steps": 2} if "steps" in phase else {})} for phase in recipe.phases)
    with pytest.raises(ValueError, match="What is familiar needs 10 groups with real and fake images, got 1"):
        stage_1.train(replace(recipe, phases=(phases[0], strangers)))
    results = stage_1.train(replace(recipe, phases=tuple(phases), resume=False))
    assert results["targets"]["training"] == {"real": 1, "fake": 1}
    assert set(results["test"]["classes"]) == set(ARTEFACTS), "one number for each kind of forgery"
    trained = load(tmp_path / "model")
    assert trained.name == "cnn" and len(trained.trained_on) == 1
    assert all(torch.equal(t, t.half().float()) for t in trained.state_dict().values() if t.is_floating_point())
    halve(str(tmp_path / "model"), tmp_path / "half")
    assert load(tmp_path / "half").fingerprint() == trained.fingerprint()


def test_hulls_cover_their_regions_and_are_convex() -> None:
    regions = face_regions(128, 128)
    drawn = {}
    for seed in range(60):
        hull = draw_hull(regions, item_rng(seed, 0, 0))
        drawn[int(hull.sum())] = hull
    assert len(drawn) == len(HULLS) + 1, BELOW_BROWS
    whole = max(drawn.values(), key=np.sum) > 0
    for hull in drawn.values():
        assert not ((hull > 0) & ~whole).any() and (hull[regions["nose"] > 0] == 1).all()
        rows = [np.flatnonzero(row) for row in hull if row.any()]
        assert all(len(row) == row[-1] - row[0] + 1 for row in rows)
    with pytest.raises(ValueError, match="no face is there"):
        draw_hull({name: mask * 0 for name, mask in regions.items()}, item_rng(0, 0, 0))


def test_the_background_is_changed_in_the_copys_stead() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(40, 200, (96, 96, 3)).astype(np.uint8)
    mask = face_regions(96, 96)[FACE]
    for share, is_changed in ((0.0, False), (1.0, True)):
        config = SelfBlendConfig(
            change_background=share, resize=(0.0, 0.0), translate=(0.0, 0.0), colour_shift=(30.0, 30.0)
        )
        background, (copy, weight) = self_blend(image, mask, config, item_rng(0, 0, 0))
        assert np.array_equal(background, image) == (not is_changed)
        assert (np.abs(copy - image).max() < 1e-3) == is_changed
        assert 0 < weight.max() <= 1


def test_a_wanted_artefact_is_put_on_a_region_that_can_carry_it() -> None:
    image = np.random.default_rng(0).integers(0, 255, (96, 96, 3)).astype(np.uint8)
    regions = face_regions(96, 96)
    for artefact in ARTEFACTS:
        forgery = draw_forgery(image, regions, ForgeConfig(least_change=0.0), item_rng(0, 0, 0), artefact)
        assert forgery is not None and forgery.artefact == artefact
    only_eyes = {name: mask * (name == "eyes") for name, mask in regions.items()}
    with pytest.raises(ValueError, match="'over_smooth' needs 64 pixels of skin"):
        draw_forgery(image, only_eyes, ForgeConfig(), item_rng(0, 0, 0), "over_smooth")


# ---- asked about what it was trained on --------------------------------------------------------------------------


@pytest.fixture
def trained(table: Path, tmp_path: Path) -> Path:
    """Save a detector as if it had been trained on forgeries of the photos, by two phases and a fit."""
    torch.manual_seed(0)
    create("cnn", {"backbone": "conv_tiny", "image_size": 64, "width": 8}).save(tmp_path / "detector")
    config = {
        "data": {"source": "csv", "path": str(table), "cache": True},
        "forge": to_dict(ForgingConfig(held_out=ForgeConfig(hulls=True))),
        "phases": [
            {"name": "first", "forge": {"margin": [0.0, 0.0]}},
            {"name": "last", "forge": {"held_out": {"least_change": 0.5}}},
            {"name": "fit", "kind": "fit", "forge": None},
        ],
    }
    write_json(tmp_path / "detector" / "run.json", {"config": config})
    return tmp_path / "detector"


def test_the_forging_is_that_of_the_last_phase_that_trained(trained: Path, tmp_path: Path) -> None:
    forge = training_of(trained).forge
    assert forge == ForgingConfig(held_out=ForgeConfig(hulls=True, least_change=0.5))
    run = json.loads((trained / "run.json").read_text())
    run["config"]["phases"][1]["forge"] = "none"
    write_json(trained / "run.json", run)
    assert training_of(trained).forge is None and data_of_training(trained).source == "csv"
    with pytest.raises(ValueError, match=r"does not say what it was trained on; give --data\.path"):
        data_of_training(tmp_path)


def test_a_split_is_scored_on_the_forgeries_of_the_training_and_on_no_others(trained: Path, table: Path) -> None:
    source, records = split_to_score(ScoreConfig(split="test"), trained)
    forge = training_of(trained).forge
    whole = open_phase(PhaseConfig(data=data_of_training(trained), forge=forge))
    assert isinstance(whole, PhaseData)
    assert [r.id for r in records] == [r.id for r in whole.test] == [r.id for r in source.records]
    for record in records:
        assert np.array_equal(source.load(record).image, whole.source.load(record).image)
    with pytest.raises(ValueError, match=r"Split 'tset' has no records\. Splits here: .*Did you mean 'test'"):
        split_to_score(ScoreConfig(split="tset"), trained)
    own = DataConfig(source="csv", path=str(table))
    with pytest.raises(ValueError, match=r"Split 'test' of .* has no fake images"):
        split_to_score(ScoreConfig(split="test", data=own), trained)
    forged = split_to_score(ScoreConfig(split="test", data=own, forge=ForgingConfig()), trained)[0]
    assert isinstance(forged, ForgingSource) and forged.config == ForgingConfig()
    again = split_to_score(ScoreConfig(split="test", forge=ForgingConfig()), trained)[0]
    assert isinstance(again, ForgingSource) and again.config == ForgingConfig(), "a flag overrides the training's"


def test_evaluate_and_diagnose_forge_in_memory(trained: Path, tmp_path: Path) -> None:
    asked = {"model": str(trained), "split": "val", "device": "cpu", "output_dir": str(tmp_path / "out")}
    evaluate(build(ScoreConfig, {**asked, "resamples": 20}))
    assert {p.class_name for p in read_csv(tmp_path / "out" / "predictions.csv")} == {"real", *ARTEFACTS}
    with pytest.raises(Incomplete, match=r"ignores the image \(8 images, split 'val'\)"):
        list(diagnose(build(DiagnoseConfig, {**asked, "resamples": 20})))
