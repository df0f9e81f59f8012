"""Stage 1: recipes, what is checked before training, and short real trainings on pictures made here."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from killed_run import whole_and_broken
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import log_loss, roc_auc_score

from llava import cli
from llava.core.config import build, load_yaml, merge, parse, to_dict
from llava.core.runtime import last_checkpoint
from llava.core.score_map import read_calibration
from llava.core.types import Record
from llava.data.sources import DataConfig
from llava.detectors import DETECTORS
from llava.detectors.base import create, load
from llava.detectors.m2f2det import M2F2DetConfig
from llava.evaluation.calibration import CalibrationConfig, fit_calibration
from llava.evaluation.predictions import from_records, read_csv
from llava.ops.degrade import VERSIONS, Change
from llava.train import stage_1
from llava.train.engine import (
    DetectorTrainer,
    WholeBatches,
    balance_classes,
    train_phase,
    training_arguments,
)
from llava.train.recipe import CollapseConfig, Fold, LossConfig, OptimConfig, PhaseConfig, Recipe, data_name, open_data
from llava.train.scoring import (
    CollapseError,
    changed,
    check_collapse,
    flat_metrics,
    measured,
    probe_answers,
    score,
    with_versions,
)
from llava.train.stage_1 import settle

DETECTORS.add("toy", "toy_detector:ToyDetector")
ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "scripts" / "configs" / "stage_1").glob("*.yaml"))
TINY_MODEL = {**to_dict(M2F2DetConfig.tiny()), "freeze_vision": False, "freeze_text": False}


def make_images(root, counts, seed=0):
    """Write smooth noisy pictures; a fake one also carries a faint grid of period 4, as upsampling leaves it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:32, 0:32] / 32
    grid = np.outer(*2 * [np.where(np.arange(32) % 4 < 2, 1.0, -1.0)])[..., None]
    for split, count in counts.items():
        for class_name in ("real", "fake"):
            folder = root / split / class_name
            folder.mkdir(parents=True)
            for i in range(count):
                waves = [np.sin(6 * (rng.random() * x + rng.random() * y) + 6 * rng.random()) for _ in range(3)]
                image = 128 + 60 * np.stack(waves, axis=-1) + rng.normal(0, 10, (32, 32, 3))
                image += 12 * grid * (class_name == "fake")
                Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder / f"{i:03}.png")
    return root


def settings(data, output, **changes):
    base = {
        "model": TINY_MODEL,
        "data": {"path": str(data), "cache": True},
        "output_dir": str(output),
        "epochs": 6,
        "batch_size": 16,
        "workers": 0,
        "precision": "fp32",
        "near_duplicates": False,
        "resamples": 100,
        "optim": {"optimizer": "adamw", "lr": 5e-3},
        "degrade": {"blur_probability": 0.0, "jpeg_probability": 0.0},
        "collapse": {"grace_epochs": 100},
    }
    return merge(base, changes)


def write_recipe(path, values):
    path.write_text(json.dumps(values))  # JSON is YAML
    return str(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), {"train": 80, "val": 45, "test": 40})


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """Train once for all tests that look at the result."""
    output = tmp_path_factory.mktemp("trained")
    recipe = build(Recipe, settings(images, output, epochs=16))
    return recipe, stage_1.train(recipe), output


# ---- recipes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_parses(path):
    recipe = parse(Recipe, ["--config", str(path), "--data.path", "somewhere"])
    recipe.require_data()
    assert set(load_yaml(path)) <= set(to_dict(recipe))


def test_the_full_recipe_is_the_published_one():
    recipe = parse(Recipe, ["--config", str(ROOT / "scripts/configs/stage_1/m2f2.yaml"), "--data.path", "x"])
    model = recipe.detector_config()
    assert (model.backbone, model.hidden_size, model.vision.image_size) == ("densenet121", 1024, 336)
    assert (recipe.batch_size, recipe.optim.lr, recipe.optim.weight_decay, recipe.seed) == (80, 1e-3, 1e-6, 100)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optm": {}}, r"Unknown setting 'optm'.*Did you mean 'optim'"),
        ({"optim": {"lrr": 1}}, r"Unknown setting 'optim.lrr'.*Did you mean 'lr'"),
        ({"model": {"fusoin": "none"}}, r"Unknown setting 'model.fusoin'.*Did you mean 'fusion'"),
        ({"model": {"vision": {"patchsize": 8}}}, r"'model.vision.patchsize'.*Did you mean 'patch_size'"),
        ({"model": {"fusion": "bridg"}}, r"model.fusion: 'bridg' is not usable"),
        ({"phases": [{}, {"epoch": 1}]}, r"Unknown setting 'phases.1.epoch'.*Did you mean 'epochs'"),
        ({"phases": [{"optim": {"lrr": 1}}]}, r"'phases.0.optim.lrr'.*Did you mean 'lr'"),
        ({"phases": [{"model": {}}]}, r"Unknown setting 'phases.0.model'"),
        ({"detector": "m2f2dett"}, r"Unknown detector 'm2f2dett'.*Did you mean 'm2f2det'"),
        ({"degrade": {"jpeg_quality": [0, 300]}}, r"jpeg_quality"),
    ],
)
def test_mistakes_in_a_recipe_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        build(Recipe, values)


def test_phases_override_only_what_they_name():
    recipe = build(
        Recipe,
        settings(
            "a",
            "out",
            phases=[
                {"name": "first"},
                {"data": {"path": "b"}, "optim": {"lr": 1e-4}, "freeze": ["backbone"], "epochs": 1},
            ],
        ),
    )
    first, second = recipe.phase_list()
    assert (first.name, first.data.path, first.optim.lr, first.epochs) == ("first", "a", 5e-3, 6)
    assert (second.data.path, second.data.cache, second.optim.lr) == ("b", True, 1e-4)
    assert (second.optim.optimizer, second.freeze, second.epochs) == ("adamw", ("backbone",), 1)


def test_a_recipe_without_data_says_what_to_give():
    with pytest.raises(ValueError, match=r"'data.path'.*--data.path"):
        build(Recipe, {}).require_data()


# ---- before training --------------------------------------------------------------------------------------------


def test_one_class_is_refused(tmp_path, caplog):
    make_images(tmp_path / "data", {"train": 4, "val": 4})
    for image in (tmp_path / "data" / "train" / "fake").iterdir():
        image.unlink()
    recipe = write_recipe(tmp_path / "recipe.yaml", settings(tmp_path / "data", tmp_path / "out"))
    assert stage_1.main(["--config", recipe]) == 2
    assert "has no fake images" in caplog.text
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_is_refused(tmp_path, caplog):
    recipe = write_recipe(tmp_path / "recipe.yaml", settings(tmp_path / "nowhere", tmp_path / "out"))
    assert stage_1.main(["--config", recipe]) == 2
    assert "nowhere" in caplog.text


def test_unknown_flags_name_the_nearest(capsys):
    with pytest.raises(SystemExit):
        stage_1.main(["--optim.lrr", "1"])
    assert "Did you mean --optim.lr" in capsys.readouterr().err


def test_a_leak_is_refused(tmp_path):
    make_images(tmp_path / "data", {"train": 2, "val": 2})
    rows = ["file,label,split,group"]
    for split in ("train", "val"):
        for label in ("real", "fake"):
            rows += [f"{split}/{label}/{i:03}.png,{label},{split},person{i}" for i in range(2)]
    table = tmp_path / "data" / "table.csv"
    table.write_text("\n".join(rows))
    with pytest.raises(ValueError, match="share 2 groups"):
        open_data(DataConfig(source="csv", path=str(table)), seed=0)


def test_data_without_splits_are_divided_by_groups(tmp_path):
    make_images(tmp_path, {"all": 40})
    data = open_data(DataConfig(path=str(tmp_path / "all")), seed=0)
    assert (len(data.train), len(data.val), len(data.test)) == (56, 12, 12)
    assert not {r.group for r in data.train} & {r.group for r in (*data.val, *data.test)}
    again = open_data(DataConfig(path=str(tmp_path / "all")), seed=0)
    assert [r.id for r in again.test] == [r.id for r in data.test]


def test_weights_of_another_detector_or_size_are_refused(tmp_path):
    create("toy", {}).save(tmp_path / "toy")
    create("m2f2det", {**TINY_MODEL, "hidden_size": 8}).save(tmp_path / "smaller")
    recipe = build(Recipe, settings("data", tmp_path / "out"))
    with pytest.raises(ValueError, match="holds detector 'toy', not detector 'm2f2det'"):
        stage_1.start(recipe, PhaseConfig(init_from=str(tmp_path / "toy")), None)
    with pytest.raises(ValueError, match="of another shape"):
        stage_1.start(recipe, PhaseConfig(init_from=str(tmp_path / "smaller")), None)


# ---- parts ------------------------------------------------------------------------------------------------------


def test_class_weights_make_classes_equal():
    detector = create("m2f2det", TINY_MODEL)
    labels = [0] * 2 + [1] * 8
    balance_classes(detector, PhaseConfig(), labels)
    assert detector.class_weights.tolist() == [2.5, 0.625]
    balance_classes(detector, PhaseConfig(loss=LossConfig(class_balance="none")), labels)
    assert detector.class_weights.tolist() == [1, 1]


def records(labels):
    names = {0: "real", 1: "fake"}
    return [
        Record(id=str(i), label=y, class_name=names[y], video=f"v{i // 2}", group=f"v{i // 2}", where="")
        for i, y in enumerate(labels)
    ]


def test_metrics_agree_with_sklearn():
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.integers(0, 2, 20), 2)
    p_fake = np.clip(0.3 * labels + 0.7 * rng.random(40), 0, 1)
    flat = flat_metrics(from_records(records(labels.tolist()), p_fake))
    assert flat["frame_auc"] == pytest.approx(roc_auc_score(labels, p_fake))
    assert flat["video_auc"] == pytest.approx(roc_auc_score(labels[::2], p_fake.reshape(-1, 2).mean(axis=1)))
    assert flat["frame_recall_fake"] == pytest.approx((p_fake[labels == 1] >= 0.5).mean())
    assert flat["frame_auc_low"] < flat["frame_auc"] < flat["frame_auc_high"]
    assert flat["sd_p_fake"] == pytest.approx(p_fake.std())
    assert flat["log_loss"] == pytest.approx(log_loss(labels, p_fake), rel=1e-4)


def test_equal_auc_is_decided_by_the_loss_and_any_higher_auc_wins():
    sharp, dull, worse = [0.1, 0.1, 0.9, 0.9], [0.4, 0.4, 0.6, 0.6], [0.01, 0.5, 0.49, 0.99]
    items = [replace(r, video=r.id) for r in records([0, 0, 1, 1])]
    merits = [flat_metrics(from_records(items, scores))["merit"] for scores in (sharp, dull, worse)]
    assert merits == sorted(merits, reverse=True) and len(set(merits)) == 3


def test_the_best_weights_are_those_of_the_highest_video_auc(images, tmp_path):
    """One scoring orders all videos rightly but not their frames; another has the higher AUC over frames alone."""
    items = records([0] * 4 + [1] * 4)  # two frames a video
    by_video = flat_metrics(from_records(items, [0.0, 0.7, 0.0, 0.7, 0.3, 0.6, 0.3, 0.6]))
    by_frame = flat_metrics(from_records(items, [0.2, 0.2, 0.2, 0.9, 0.3, 0.3, 0.95, 0.95]))
    assert (by_video["video_auc"], by_frame["video_auc"]) == (1, 0.75)
    assert (by_video["frame_auc"], by_frame["frame_auc"]) == (0.5, 0.875)
    assert by_video["merit"] == pytest.approx(by_video["video_auc"], abs=1e-4)
    assert by_frame["merit"] == pytest.approx(by_frame["video_auc"], abs=1e-4)
    phase = build(Recipe, settings(images, tmp_path)).phase_list()[0]
    data = open_data(phase.data, seed=0)
    trainer = DetectorTrainer(create("m2f2det", TINY_MODEL), phase, data, training_arguments(phase, tmp_path))
    seen = [{f"eval_{name}": number for name, number in flat.items()} for flat in (by_frame, by_video, by_frame)]
    assert [trainer._determine_best_metric(metrics, None) for metrics in seen] == [True, True, False]


def one_cycle(images, folder, steps):
    """Give a trainer's rates and first averages, step by step, of a phase with one cycle."""
    optim = {"schedule": "one_cycle", "warmup": 0.1, "lr": 5e-4}
    phase = build(Recipe, settings(images, folder, optim=optim)).phase_list()[0]
    detector = create("cnn", {"backbone": "conv_tiny", "image_size": 32, "width": 8})
    data = open_data(phase.data, seed=0)
    trainer = DetectorTrainer(detector, phase, data, training_arguments(phase, folder))
    trainer.create_optimizer_and_scheduler(steps)
    seen = []
    for _ in range(steps):
        group = trainer.optimizer.param_groups[0]
        seen.append((group["lr"], group["betas"][0]))
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return seen


def test_one_cycle_rises_and_falls_as_published(images, tmp_path):
    rates, averages = zip(*one_cycle(images, tmp_path, 40), strict=True)
    assert (rates[0], rates[3], rates[-1]) == pytest.approx((5e-4 / 25, 5e-4, 5e-4 / 25 / 1e4))
    assert (averages[0], averages[3], averages[-1]) == pytest.approx((0.95, 0.85, 0.95))
    if not (golden.RADAR / "radar_stats.json").is_file():
        pytest.skip("the recorded rates do not lie beside this checkout")
    recorded = json.loads((golden.RADAR / "radar_stats.json").read_text(encoding="utf-8"))["one_cycle"]
    assert list(rates) == pytest.approx(recorded["lr"], rel=1e-9)
    assert list(averages) == pytest.approx(recorded["beta1"], rel=1e-9)


@pytest.mark.parametrize("length", [{"epochs": 3}, {"steps": 7}])
def test_one_cycle_ends_with_the_training_whatever_is_accumulated(images, length, tmp_path):
    """Ten batches an epoch, four of them a step: the last step of an epoch has but two."""
    changes = {"detector": "cnn", "model": {"backbone": "conv_tiny", "image_size": 32, "width": 8}, "accumulation": 4}
    optim = {"schedule": "one_cycle", "warmup": 0.3}
    values = {"optim": optim, "collapse": {"min_recall": 0.0, "min_sd": 0.0}, "epochs": 1, **changes, **length}
    base = settings(images, tmp_path)
    recipe = build(Recipe, {**base, **values, "optim": base["optim"] | optim})
    phase = recipe.phase_list()[0]
    train_phase(create("cnn", changes["model"]), phase, open_data(phase.data, seed=0), tmp_path)
    history = json.loads((tmp_path / "history.json").read_text())
    assert max(row["step"] for row in history) == length.get("steps", 9)


def test_one_cycle_that_never_rises_is_refused():
    with pytest.raises(ValueError, match=r"warmup: 0\.0 is not usable with one_cycle"):
        OptimConfig(schedule="one_cycle")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_frame_recall_real": 0.05}, r"recall of real is 0.050, under 0.1.*noise 0.70"),
        ({"eval_frame_recall_fake": 0.0}, "recall of fake is 0.000"),
        ({"eval_sd_p_fake": 0.01}, r"sd\(p_fake\) is 0.0100, under 0.02"),
    ],
)
def test_collapse_is_an_error_with_its_numbers(changes, message):
    metrics = {"eval_frame_recall_real": 0.6, "eval_frame_recall_fake": 0.6, "eval_sd_p_fake": 0.2}
    check_collapse(metrics, CollapseConfig(), lambda: {"noise": 0.7})
    with pytest.raises(CollapseError, match=message):
        check_collapse(metrics | changes, CollapseConfig(), lambda: {"noise": 0.7})


def test_incomplete_checkpoints_are_passed_over(tmp_path):
    for step, state in ((9, "{}"), (10, "{}"), (11, '{"cut of'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_checkpoint(tmp_path / "nothing") is None


def test_scores_are_averaged_over_the_declared_views(images):
    torch.manual_seed(0)
    plain = create("m2f2det", TINY_MODEL).eval()
    both = create("m2f2det", {**TINY_MODEL, "views": ["plain", "flip"]})
    both.load_state_dict(plain.state_dict())
    data = open_data(DataConfig(path=str(images)), seed=0)
    chosen = [*data.test[:3], *data.test[-3:]]
    device = torch.device("cpu")
    one = score(plain, data.source, chosen, device, batch_size=4).p_fake
    two = score(both, data.source, chosen, device, batch_size=4).p_fake

    class Flipped:
        records = ()

        def load(self, record, rng=None):
            sample = data.source.load(record)
            return replace(sample, image=np.ascontiguousarray(sample.image[:, ::-1]))

    flipped = score(plain, Flipped(), chosen, device).p_fake
    np.testing.assert_allclose(two, (one + flipped) / 2, atol=1e-6)
    assert not np.allclose(one, flipped, atol=1e-6)


def test_validation_while_training_takes_every_image(images, tmp_path):
    torch.manual_seed(0)
    phase = build(Recipe, settings(images, tmp_path, model={**TINY_MODEL, "views": ["plain", "flip"]})).phase_list()[0]
    data = open_data(phase.data, seed=0)
    assert len(data.val) % phase.batch_size, "the last batch is to be a smaller one"
    detector = create("m2f2det", {**TINY_MODEL, "views": ["plain", "flip"]})
    trainer = DetectorTrainer(detector, phase, data, training_arguments(phase, tmp_path))
    measured = trainer.evaluate()
    expected = flat_metrics(score(detector, data.source, data.val, torch.device("cpu")))
    for name in ("frame_auc", "video_auc", "log_loss", "frame_recall_fake"):
        assert measured[f"eval_{name}"] == pytest.approx(expected[name], abs=1e-6)


@pytest.mark.parametrize(("count", "expected"), [(33, 32), (32, 32), (16, 16), (5, 5)])
def test_training_leaves_out_a_last_smaller_batch_only(count, expected):
    sampler = WholeBatches([0, 1] * 50, seed=0, balanced=False, batch_size=16)
    sampler.labels = sampler.labels[:count]
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == expected == len(set(drawn))
    sampler.set_epoch(1)
    assert {epoch for epoch, _ in sampler} == {1}


@pytest.mark.parametrize(("groups", "is_fitted"), [(9, True), (8, False)])
def test_too_few_validation_groups_leave_a_detector_uncalibrated_with_a_warning(groups, is_fitted, caplog):
    detector = create("m2f2det", TINY_MODEL)
    items = from_records(records([0] * 2 * groups + [1] * 30), np.linspace(0.01, 0.99, 2 * groups + 30))
    recipe, data = build(Recipe, {}), DataConfig(path="somewhere/faces")
    settle(detector, items, recipe, Fold(data, "val", None, []))
    found = detector.calibration
    assert (found is not None) == is_fitted != ("not calibrated" in caplog.text)
    if not is_fitted:
        assert "0.9 and 0.9 need 9 real and 9 fake validation groups, there are 8 and 15" in caplog.text
    assert detector.decision.chosen_on == f"validation split 'val', {len(items)} images, youden"
    settle(detector, items, replace(recipe, calibration=None), Fold(data, "val", None, []))
    assert detector.calibration is None
    assert (found is None) == (measured(found, items, 10) is None)


def test_calibration_may_look_at_delivered_versions_too(trained, tmp_path):
    recipe, results, output = trained
    recipe = replace(recipe, calibrate_versions=True, resamples=10)
    phase = recipe.phase_list()[0]
    data = open_data(phase.data, phase.seed)
    detector = load(output)
    found = stage_1.finish(detector, recipe, phase, data, tmp_path)
    count = len(data.val)
    assert found["decision"]["chosen_on"] == f"validation split 'val', {count * (1 + len(VERSIONS))} images, youden"
    assert read_calibration(tmp_path).images == count * (1 + len(VERSIONS))
    assert found["val"]["frame"]["auc"]["value"] == results["val"]["frame"]["auc"]["value"], "reports are of the images"
    score_val = partial(score, detector, data.source, data.val, torch.device("cpu"))
    plain = score_val()
    both = with_versions(plain, score_val)
    assert sorted(both.groups.tolist()) == sorted(plain.groups.tolist() * (1 + len(VERSIONS)))
    saved_again = [p.p_fake for p in both if p.id.endswith(" (JPEG 30)")]
    assert saved_again == score_val(degrade=partial(changed, Change("JPEG", 30))).p_fake.tolist()
    assert saved_again != plain.p_fake.tolist()


def test_data_are_named_without_their_place(tmp_path):
    (tmp_path / "faces.v2").mkdir()
    (tmp_path / "faces.v2" / "table.csv").touch()
    assert data_name(DataConfig(path=str(tmp_path / "faces.v2"))) == "faces.v2"
    assert data_name(DataConfig(source="csv", path=str(tmp_path / "faces.v2" / "table.csv"))) == "faces.v2"


def test_plain_images_and_noise_are_answered():
    answers = probe_answers(create("m2f2det", TINY_MODEL), torch.device("cpu"))
    assert {"black", "white", "noise"} <= answers.keys()
    assert all(0 <= p <= 1 for p in answers.values())


# ---- short trainings --------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_training_learns_and_writes_everything(trained):
    recipe, results, output = trained
    assert results["test"]["frame"]["auc"]["value"] > 0.8
    assert results["test"]["frame"]["auc"]["low"] > 0.5
    assert {p.name for p in output.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "run.json",
        "metrics.json",
        "val.csv",
        "test.csv",
    }
    assert json.loads((output / "run.json").read_text())["config"]["optim"]["lr"] == 5e-3
    assert list((output / "phases" / "0" / "tensorboard").glob("events*"))
    assert not list((output / "phases" / "0").glob("checkpoint-*")), "a finished phase needs no optimiser states"
    again = stage_1.train(recipe)
    assert again == json.loads((output / "metrics.json").read_text()), "a finished run is not trained again"
    with pytest.raises(ValueError, match=r"other settings \(epochs\)"):
        stage_1.train(replace(recipe, epochs=3))


@pytest.mark.e2e
def test_the_loss_falls(images, tmp_path):
    recipe = build(Recipe, settings(images, tmp_path / "out", epochs=12, eval_steps=40))
    folder = tmp_path / "out" / "phases" / "0"
    stage_1.train(recipe)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = EventAccumulator(str(folder / "tensorboard")).Reload()
    losses = [event.value for event in logs.Scalars("train/loss")]
    assert len(losses) >= 6
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.e2e
def test_the_threshold_comes_from_validation_and_inference_uses_it(trained, tmp_path):
    _, results, output = trained
    decision = load(output).decision
    assert decision.threshold == results["decision"]["threshold"] != 0.5
    assert decision.chosen_on == "validation split 'val', 90 images, youden"
    val = read_csv(output / "val.csv")
    rates = [(val.p_fake[val.labels == 1] >= t).mean() - (val.p_fake[val.labels == 0] >= t).mean() for t in val.p_fake]
    answers = val.p_fake >= decision.threshold
    assert answers[val.labels == 1].mean() - answers[val.labels == 0].mean() == pytest.approx(max(rates))
    assert cli.main(["evaluate", "--model", str(output), "--output_dir", str(tmp_path), "--resamples", "50"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["decision"] == results["decision"]
    assert report["frame"]["auc"]["value"] == pytest.approx(results["test"]["frame"]["auc"]["value"], abs=1e-6)
    scored, trained_on = read_csv(tmp_path / "predictions.csv"), read_csv(output / "test.csv")
    np.testing.assert_allclose(scored.p_fake, trained_on.p_fake, atol=1e-5)
    assert Image.open(tmp_path / "roc.png").size[0] > 300


@pytest.mark.e2e
def test_the_calibration_comes_from_validation_and_lies_beside_the_weights(images, trained):
    _, results, output = trained
    found = load(output).calibration
    assert found == read_calibration(output)
    assert str(found) == f"calibrated on {images.name}, split 'val', n = 90"
    assert found == fit_calibration(
        read_csv(output / "val.csv"), CalibrationConfig(), f"{images.name}, split 'val'", load(output).fingerprint()
    )
    report = results["calibration"]
    assert report["n"]["images"] == 80 and report["method"] == found.score_map.method
    assert 0 <= report["after"]["ece"]["value"] <= 1 and report["coverage"]["real"]["value"] > 0.7


@pytest.mark.e2e
def test_phases_follow_each_other_and_freeze(images, tmp_path):
    values = settings(
        images,
        tmp_path / "out",
        epochs=4,
        phases=[{"loss": {"class_balance": "sampling"}}, {"freeze": ["backbone"], "optim": {"lr": 1e-3}}],
        collapse={"min_recall": 0.0, "min_sd": 0.0},
    )
    stage_1.train(build(Recipe, values))
    first, second = (load_file(tmp_path / "out" / "phases" / str(i) / "best" / "model.safetensors") for i in (0, 1))
    frozen = [name for name in first if name.startswith("backbone.")]
    assert frozen and all(torch.equal(first[name], second[name]) for name in frozen), "BatchNorm statistics too"
    assert not torch.equal(first["classifier.weight"], second["classifier.weight"])


@pytest.mark.e2e
def test_a_second_detector_trains_by_its_name(images, tmp_path):
    values = settings(images, tmp_path / "out", detector="toy", epochs=12, optim={"lr": 2e-2, "schedule": "plateau"})
    results = stage_1.train(build(Recipe, values | {"model": {}}))
    assert results["detector"] == "toy" and results["test"]["frame"]["auc"]["value"] > 0.8


@pytest.mark.e2e
def test_collapse_ends_the_run_with_an_error(images, tmp_path, caplog):
    model = {**TINY_MODEL, "vision_alpha_lr": 0.0, "text_alpha_lr": 0.0}
    values = settings(images, tmp_path / "out", model=model, epochs=2, optim={"lr": 0.0})
    assert stage_1.main(["--config", write_recipe(tmp_path / "recipe.yaml", values)]) == 1
    assert "has collapsed" in caplog.text and "noise" in caplog.text
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.e2e
@pytest.mark.parametrize("workers", [0, 1])  # of processes that stay, the seed is drawn once, from dropout's numbers
def test_a_killed_run_goes_on_exactly(images, workers, tmp_path):
    changes = {"model": {**TINY_MODEL, "fusion": "bridge"}, "epochs": 5, "eval_steps": 7, "patience": 50}
    changes["workers"] = workers
    changes["collapse"] = {"min_recall": 0.0, "min_sd": 0.0}
    changes["loss"] = {"class_balance": "sampling"}
    changes["optim"] = {"schedule": "one_cycle" if workers else "cosine", "warmup": 0.1}
    whole = write_recipe(tmp_path / "whole.yaml", settings(images, tmp_path / "whole", **changes))
    broken = write_recipe(tmp_path / "broken.yaml", settings(images, tmp_path / "broken", **changes))
    said = whole_and_broken(["--config", whole], ["--config", broken], tmp_path / "broken")
    assert re.search("test frame +AUC", said) and "chosen on validation" in said
    for file in ("model.safetensors", "phases/0/best/model.safetensors"):
        expected, found = load_file(tmp_path / "whole" / file), load_file(tmp_path / "broken" / file)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (tmp_path / "whole" / "test.csv").read_text() == (tmp_path / "broken" / "test.csv").read_text()
