"""The starter's table: what is measured, on whom, with which interval; on embedded photos and a small detector."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from tiny_world import calibration_of

from llava.core.config import to_dict
from llava.core.runtime import write_json
from llava.core.types import REAL, REGIONS
from llava.data.dataset import to_tensor
from llava.data.images import read_image
from llava.data.sources import DataConfig
from llava.data.splits import LeakError, group_hashes
from llava.detectors.base import create
from llava.evaluation.blind import against_blind_guess
from llava.evaluation.metrics import auc_interval, class_aucs
from llava.evaluation.predictions import Prediction, Predictions
from llava.evaluation.statistics import wilson
from llava.jobs.cost import milliseconds, peak_memory
from llava.ops.degrade import VERSIONS, Change
from llava.ops.forge import ARTEFACTS, SELF_BLENDED, ForgeConfig
from llava.train.forging import ForgingConfig
from llava.train.recipe import forging_source
from llava.train.scoring import score

ROOT = Path(__file__).resolve().parents[1]
FACES = ROOT / "utils" / "demo_faces"
PEOPLE = {"astronaut": "train", "portrait_cc0_1": "val", "grace_hopper": "val", "portrait_cc0_2": "test_b"}
SIDE = 200


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Load the script as a module; its settings are looked up by the module's name."""
    spec = importlib.util.spec_from_file_location("measure_starter", ROOT / "eval" / "measure_starter.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def portraits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("portraits")
    for name in PEOPLE:
        photo = Image.open(next(FACES.glob(f"{name}.*"))).convert("RGB")
        photo.thumbnail((SIDE, SIDE))  # small faces are forged at once
        photo.save(folder / f"{name}.png")
    rows = [(f"{name}.png", 0, split, name) for name, split in PEOPLE.items()]
    return write_table(folder, ("file", "label", "split", "group"), rows)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, portraits: Path) -> Path:
    """Save a small detector with a calibration, as if it had been trained on forgeries of the portraits."""
    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    detector = create("cnn", {"backbone": "conv_tiny", "image_size": 64, "width": 16})
    spec = detector.inputs["pixel_values"]
    photos = torch.stack([to_tensor(read_image(path), spec) for path in sorted(portraits.glob("*.png"))])
    with torch.no_grad():  # so that it does not say the same of all: batch norm learns what photos are
        for _ in range(20):
            detector(photos)
        detector.get_parameter("classifier.weight").mul_(30)
        detector.get_parameter("classifier.bias").sub_(detector.eval()(photos).logits.mean(dim=0))
    detector.calibration = calibration_of(detector.fingerprint())
    detector.save(folder)
    data = {"source": "csv", "path": str(portraits / "manifest.csv")}
    write_json(folder / "run.json", {"config": {"data": data, "forge": to_dict(ForgingConfig())}})
    return folder


def write_table(folder: Path, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> Path:
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return folder


def bench_of(script: ModuleType, folder: Path, out: Path, **places: str) -> Any:
    return script.Bench(folder, script.Settings(detectors=(str(folder),), output_dir=str(out), resamples=20, **places))


@pytest.fixture(scope="module")
def measured(
    script: ModuleType, portraits: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, dict[str, Any]]:
    """Measure everything but the cost, on the portraits and on a public set of two real and two fake photos."""
    dfdc = tmp_path_factory.mktemp("dfdc")
    names = [portraits / f"{name}.png" for name in PEOPLE]
    rows = [(name, ("real", "fake")[i % 2], ("test", "train")[i // 3], f"g{i // 2}") for i, name in enumerate(names)]
    shutil.copy(names[0], dfdc / "a.png")
    write_table(dfdc, ("file", "label", "split", "group"), [*rows, ("a.png", "real", "val", "g9")])
    places = {"portraits": str(portraits), "dfdc": str(dfdc)}
    bench = bench_of(script, trained, tmp_path_factory.mktemp("out"), splits=("val",), **places)  # type: ignore[arg-type]
    return bench, dict(script.measure(bench))


def test_every_kind_is_measured_as_it_is_and_delivered(measured: Any) -> None:
    rows = measured[1]["AUC on forgeries of unseen people, portraits val"]
    assert len(rows) == 3 * (len(ARTEFACTS) + 2)
    for kind in (*ARTEFACTS, "self_blended, plainly"):
        for way in ("as it is", "JPEG 50", "half size"):
            row = rows[f"{kind}, {way}"]
            assert (row["real"], row["fake"], row["n"]) == (2, 2, 2) and 0 <= row["value"] <= 1
    assert rows["mean of the local edits, as it is"]["fake"] == 2 * (len(ARTEFACTS) - 1)


def test_scores_are_those_of_the_delivered_face_and_kept(script: ModuleType, measured: Any) -> None:
    bench = measured[0]
    forged = script.Forged(bench, "val")
    plain, compressed = forged.scores(), forged.scores(VERSIONS["JPEG 50"])
    assert not np.allclose(plain.p_fake, compressed.p_fake)
    kept = bench.cache / "portraits val JPEG 50.csv"
    text = kept.read_text()
    kept.write_text(text.replace(",grace_hopper,", ",another person,"))
    assert "another person" in forged.scores(VERSIONS["JPEG 50"]).groups, "it is read, not scored again"
    kept.write_text("\n".join(text.splitlines()[:5]) + "\n")
    assert len(forged.scores(VERSIONS["JPEG 50"])) == len(plain), "what is not of these images is scored again"


def test_blends_come_in_the_recipes_strength_and_by_the_defaults(
    script: ModuleType, trained: Path, portraits: Path, tmp_path: Path
) -> None:
    own = ForgingConfig(held_out=ForgeConfig(least_change=0.5))
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    write_json(copy / "run.json", {"config": {"forge": to_dict(own)}})
    bench = bench_of(script, copy, tmp_path, portraits=str(portraits))
    forged = script.Forged(bench, "test_b")
    assert forged.source.config.held_out == own.held_out
    assert {p.class_name for p in forged.plain_scores()} == {"real", SELF_BLENDED}
    blend = next(r for r in forged.source.records if r.class_name == SELF_BLENDED)
    rows = forged.auc_rows()
    by_defaults = ForgingConfig(held_out=ForgeConfig(hulls=True))
    source = forging_source(DataConfig(source="csv", path=str(portraits / "manifest.csv")), by_defaults)
    image = source.load(blend).image
    assert not np.array_equal(image, forged.source.load(blend).image)
    expected = score(bench.detector, source, [blend], torch.device("cpu")).p_fake
    found = {p.id: p.p_fake for p in forged.plain_scores()}
    assert found[blend.id] == pytest.approx(expected[0], abs=1e-6) and rows["self_blended, plainly, as it is"]["n"] == 1


def test_region_and_trace_are_those_of_the_forgery_and_of_the_evidence(script: ModuleType, measured: Any) -> None:
    bench, tables = measured
    forged = script.Forged(bench, "val")
    fakes = [record for record in forged.source.records if record.label != REAL]
    for record, told in zip(fakes, forged.namings(), strict=True):
        sample = forged.source.load(record)
        assert (told["region"], told["artefact"]) == (sample.record.tags["region"], record.class_name)
        assert told["named_region"] in REGIONS and told["named_artefact"] in ARTEFACTS
    rows = tables["Named right, portraits val"]
    assert rows["region, all"]["images"] == 2 * (len(ARTEFACTS) - 1) == rows["trace, all"]["images"]
    assert "region, face" not in rows and rows["trace, self_blended"]["images"] == 2


def test_only_untouched_faces_count_as_false_alarms(measured: Any) -> None:
    tables = measured[1]
    rows = tables["Verdicts on untouched faces"]
    sets = ("portraits val", "dfdc, as they are", "dfdc, cut out")
    counts = {name: rows[f"{name}, FAKE"]["images"] for name in sets}
    assert counts == {"portraits val": 2, "dfdc, as they are": 3, "dfdc, cut out": 3}
    for name in counts:
        assert sum(rows[f"{name}, {said}"]["value"] for said in ("FAKE", "UNCERTAIN", "REAL")) == pytest.approx(1)
        assert rows[f"{name}, FAKE after the stability rule"]["value"] <= rows[f"{name}, FAKE"]["value"]
    aucs = tables["AUC on public sets, test splits"]
    assert list(aucs) == ["dfdc, every fake, as they are", "dfdc, every fake, cut out"]
    assert all((row["real"], row["fake"]) == (2, 1) for row in aucs.values())


def test_calibration_and_stability_stand_beside_the_share_of_uncertain(measured: Any) -> None:
    rows = measured[1]["Calibration and stability, portraits val"]
    images = 2 * (1 + len(ARTEFACTS))
    assert rows["ECE before calibration"]["images"] == rows["coverage of real"]["images"] == images
    assert rows["flips after the rule, JPEG 50"]["value"] in (0, None), "by construction"
    assert rows["UNCERTAIN before the rule, untouched"]["images"] == 2
    assert rows["UNCERTAIN after the rule, all"]["value"] >= rows["UNCERTAIN before the rule, all"]["value"]
    turned = [row["value"] for name, row in rows.items() if name.startswith("flips before the rule, ")]
    assert turned[0] == max(turned) and len(turned) == 10


def test_a_person_of_the_training_and_another_training_are_refused(
    script: ModuleType, portraits: Path, trained: Path, tmp_path: Path
) -> None:
    bench = bench_of(script, trained, tmp_path, portraits=str(portraits))
    bench.detector.trained_on = group_hashes(["grace_hopper"])
    with pytest.raises(LeakError, match=r"split 'val' of the portraits .* trained on \('grace_hopper'\)"):
        script.Forged(bench, "val")
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    (copy / "run.json").unlink()
    with pytest.raises(ValueError, match=r"copy' was trained on no forgeries made in memory"):
        bench_of(script, copy, tmp_path)


def test_what_is_not_given_is_skipped_with_a_line(
    script: ModuleType, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = bench_of(script, trained, tmp_path)
    assert list(script.measure(bench)) == []
    said = capsys.readouterr().out
    assert all(f"--{name} is not given: skipped." in said for name in ("portraits", "dfdc", "faces_rvf", "three_class"))


def test_memory_is_that_of_the_other_process() -> None:
    small, large = (
        peak_memory([sys.executable, "-I", "-c", f"import time; a = b'x' * {n}; time.sleep(0.1)"])
        for n in (1, 100_000_000)
    )
    assert 90 < large - small < 110 and small < 40
    with pytest.raises(ValueError, match="ended with 3"):
        peak_memory([sys.executable, "-I", "-c", "raise SystemExit(3)"])
    detector = create("cnn", {"backbone": "conv_tiny", "image_size": 64, "width": 16})
    threads = torch.get_num_threads()
    assert 0 < milliseconds(detector) < 1000 and torch.get_num_threads() == threads


def test_tables_have_a_column_a_seed_and_their_mean(script: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"auc, as it is": {"value": value, "low": 0.5, "high": 1.0, "n": 7, "real": 3, "fake": 4}}
        for value in (0.5, 0.8)
    ]
    script.write_tables({"a": {"threshold": "0.5"}, "b": {}}, {"AUC": dict(zip("ab", rows, strict=True))}, tmp_path)
    text = (tmp_path / "starter.md").read_text()
    assert "|  | images (real + fake) | groups | a | b | mean |\n|---|---|---|---|---|---|\n" in text
    assert "| auc, as it is | 3 + 4 | 7 | 0.5000 [0.5000, 1.0000] | 0.8000 [0.5000, 1.0000] | 0.6500 |" in text
    assert json.loads((tmp_path / "starter.json").read_text())["tables"]["AUC"]["b"] == rows[1]


# ---- the numbers themselves -------------------------------------------------------------------------------------


def test_aucs_of_classes_and_their_mean_equal_sklearn() -> None:
    rng = np.random.default_rng(0)
    kinds = ["real"] * 20 + ["a"] * 10 + ["b"] * 15
    items = tuple(
        Prediction(id=f"{i}", label=int(kind != "real"), p_fake=p, video=f"{i}", group=f"{i % 9}", class_name=kind)
        for i, (kind, p) in enumerate(zip(kinds, rng.random(45).tolist(), strict=True))
    )
    found = class_aucs(Predictions(items), {"both": ("a", "b")}, n_boot=50)
    for kind in "ab":
        chosen = [p for p in items if p.class_name in ("real", kind)]
        labels, scores, groups = (np.array([getattr(p, n) for p in chosen]) for n in ("label", "p_fake", "group"))
        assert found[kind]["value"] == pytest.approx(roc_auc_score(labels, scores))
        assert found[kind]["low"] == pytest.approx(auc_interval(labels, scores, groups, n_boot=50).low)
    assert found["both"]["value"] == pytest.approx((found["a"]["value"] + found["b"]["value"]) / 2)
    assert [(row["real"], row["fake"]) for row in found.values()] == [(20, 10), (20, 15), (20, 25)]


def test_a_blind_guess_says_the_most_frequent() -> None:
    truths, answers = list("nnnme"), list("nmnmm")
    found = against_blind_guess(truths, answers, list("12345"), n_boot=50)
    assert {name: row["value"] for name, row in found.items()} == {
        "all": pytest.approx(3 / 5),
        "blind guess (n)": pytest.approx(3 / 5),
        "all minus blind guess": pytest.approx(0),
        "e": 0,
        "m": 1,
        "n": pytest.approx(2 / 3),
    }
    assert found["n"]["images"] == 3 and found["all"]["n"] == 5
    assert "blind guess (a)" in against_blind_guess(list("ba"), list("ba"), list("12"), n_boot=5), "ties: the first"


class Canned:
    """A bench that has scored three real faces and a fake before: at most one of them stays accused."""

    detector = create("cnn", {"backbone": "conv_tiny", "image_size": 64, "width": 16})
    items = ((0, 0.9, "x"), (0, 0.8, "x"), (0, 0.2, "y"), (1, 0.9, "y"))

    def scores(self, name: str, source: None, records: list[int], change: Change | None = None) -> Predictions:
        if change is not None:
            assert (name, records) == ("set, FAKE", [0, 1]), "what nobody is accused of need not be looked at again"
        turned = [1] if change == VERSIONS["JPEG 50"] else []
        return Predictions(
            tuple(
                Prediction(
                    id=f"{i}", label=y, p_fake=0.1 if i in turned else p, video=f"{i}", group=g, class_name="any"
                )
                for i, (y, p, g) in enumerate(self.items)
                if i in records
            )
        )


def test_shares_are_of_groups_and_the_rule_takes_back_what_a_version_turns(script: ModuleType) -> None:
    rows = script.Shown(Canned(), "set", None, [0, 1, 2, 3]).verdict_rows()
    row = rows["FAKE"]
    assert row["value"] == pytest.approx(2 / 3) and row["images"] == 3
    assert row["high"] == pytest.approx(wilson(4 / 3, 2).high)
    assert rows["FAKE after the stability rule"]["value"] == pytest.approx(1 / 3)
