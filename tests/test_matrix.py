"""`m2f2 evaluate` with several detectors and sets: the matrix, its files, leaks, gaps, and scores that are kept."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.metrics import roc_auc_score
from toy_detector import HandMadeConfig, HandMadeDetector

from llava import cli
from llava.core.runtime import write_json
from llava.data.sources import DataConfig, open_source, split_of
from llava.data.splits import group_hashes
from llava.detectors import DETECTORS
from llava.evaluation.predictions import read_csv
from llava.evaluation.tables import matrix_markdown
from llava.train.evaluate import ScoreConfig, evaluate, score_matrix, short_names

DETECTORS.add("hand_made", "toy_detector:HandMadeDetector")


@pytest.fixture
def models(class_folder: Path, tmp_path: Path) -> list[str]:
    """Save two detectors: one sees the grid of the fakes and knows a group of the test split, one sees brightness."""
    found = []
    for name, measure, point in (("grid", "detail", 0.05), ("light", "brightness", 0.5)):
        detector = HandMadeDetector(HandMadeConfig(measure=measure, turning_point=point, size=48))  # type: ignore[arg-type]
        if name == "grid":
            test = split_of(open_source(DataConfig(path=str(class_folder))), "test")
            detector.trained_on |= group_hashes([test[0].group, "another"])
        detector.save(tmp_path / name)
        found.append(str(tmp_path / name))
    write_json(tmp_path / "grid" / "run.json", {"config": {"data": {"path": str(class_folder)}}})
    return found


@pytest.fixture
def sets(class_folder: Path) -> dict[str, Any]:
    """Give two sets: class folders, and a table of the same pictures with columns of its own, two frames a video."""
    rows = []
    for i, path in enumerate(sorted(class_folder.glob("val/*/*.png"))):
        rows.append((path, path.parent.name, "held", f"v{i // 2}", f"p{i // 2}"))
    table = class_folder / "odd.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("picture", "label", "split", "video", "person"), *rows])
    columns = {"file": "picture", "group": "person"}
    odd = {"source": "csv", "path": str(table), "test": "held", "columns": columns}
    return {"plain": {"path": str(class_folder)}, "odd set/1": odd}


def cell(report: dict[str, Any], model: str, name: str) -> dict[str, Any]:
    return next(c for c in report["cells"] if (c["model"], c["set"]) == (model, name))


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["a/x", "b/y/"]) == {"x": "a/x", "y": "b/y/"}
    assert short_names(["p/a/seed_1", "p/b/seed_1"]) == {"a/seed_1": "p/a/seed_1", "b/seed_1": "p/b/seed_1"}
    assert short_names(["x", "a/x"]) == {"x": "x", "a/x": "a/x"}
    with pytest.raises(ValueError, match="one is named twice"):
        short_names(["x", "x"])


@pytest.mark.filterwarnings("error:constrained_layout")
def test_each_detector_is_tested_on_each_set(
    models: list[str], sets: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump({"sets": sets, "resamples": 50, "device": "cpu"}))
    words = ["evaluate", *models, "--config", str(tmp_path / "sets.yaml"), "--output_dir", str(tmp_path / "out")]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "matrix.json").read_text())
    assert len(report["cells"]) == 4 and [*report["models"]] == ["grid", "light"]
    assert report["sets"] == {"plain": {"images": 8, "groups": 8}, "odd set/1": {"images": 8, "groups": 4}}
    for model in report["models"]:
        kept = [read_csv(path) for path in (tmp_path / "out" / "scores").glob("odd_set_1_*.csv")]
        expected = {round(roc_auc_score(p.labels, p.p_fake), 9) for p in kept}
        assert len(kept) == 2 and round(cell(report, model, "odd set/1")["frame"]["value"], 9) in expected
    grid = cell(report, "grid", "odd set/1")
    assert (grid["frames"], grid["videos"], grid["video"]["value"], grid["video"]["n"]) == (8, 4, 1.0, 4)
    assert [cell(report, model, "plain")["shared_groups"] for model in report["models"]] == [1, 0]
    assert report["models"]["grid"]["trained_on"] == tmp_path.joinpath("faces").name
    assert report["models"]["light"]["trained_on"] == "unknown (groups unknown)"
    assert "LEAK" in printed and "matrix.json, matrix.csv" in printed
    text = (tmp_path / "out" / "matrix.md").read_text()
    assert text == matrix_markdown(report) and text.count("LEAK: trained on 1 of the groups") == 1
    assert text.splitlines()[1] == "| --- | --- | --- | --- |" and "videos 1.0000" in text.splitlines()[2]
    with (tmp_path / "out" / "matrix.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["frame_value"]) for row in rows] == [c["frame"]["value"] for c in report["cells"]]
    assert Image.open(tmp_path / "out" / "matrix.png").size[0] > 600


def test_scores_are_kept_until_the_detector_or_the_set_is_another(
    models: list[str], sets: dict[str, Any], class_folder: Path, tmp_path: Path
) -> None:
    plain = {"plain": DataConfig(**sets["plain"])}
    config = ScoreConfig(models=(models[0],), sets=plain, resamples=20, device="cpu", output_dir=str(tmp_path / "out"))
    before = score_matrix(config)["cells"][0]["frame"]["value"]
    (kept,) = (tmp_path / "out" / "scores").iterdir()
    found = read_csv(kept)
    lines = kept.read_text().splitlines(keepends=True)
    column = lines[0].strip().split(",").index("p_fake")
    turned = [lines[0]]
    for line, p in zip(lines[1:], 1 - found.p_fake, strict=True):
        parts = line.split(",")
        parts[column] = str(p)
        turned.append(",".join(parts))
    kept.write_text("".join(turned))
    assert score_matrix(config)["cells"][0]["frame"]["value"] == pytest.approx(1 - before), "it was read, not scored"
    HandMadeDetector(HandMadeConfig(measure="detail", turning_point=0.06, size=48)).save(Path(models[0]))
    assert score_matrix(config)["cells"][0]["frame"]["value"] == before
    shutil.copy(class_folder / "test" / "real" / "00.png", class_folder / "test" / "real" / "another.png")
    assert score_matrix(config)["cells"][0]["frames"] == 9
    assert len(list((tmp_path / "out" / "scores").iterdir())) == 3


def test_a_cell_without_a_score_says_why_and_the_others_are_there(
    models: list[str], class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from toy_detector import ThreeClassDetector, ToyConfig

    DETECTORS.add("three_class", "toy_detector:ThreeClassDetector")
    ThreeClassDetector(ToyConfig.tiny()).save(tmp_path / "three")
    words = ["evaluate", models[0], str(tmp_path / "three"), "--sets.plain.path", str(class_folder)]
    assert cli.main([*words, "--device", "cpu", "--resamples", "20", "--output_dir", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "1 of 2 cells have no score" in captured.err and "three on plain: " in captured.out
    report = json.loads((tmp_path / "out" / "matrix.json").read_text())
    assert "frame" in report["cells"][0] and "'fake'" in report["cells"][1]["problem"]
    assert (tmp_path / "out" / "matrix.png").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sets": {"a": {"path": "nowhere"}}}, "nowhere"),
        ({}, "Say what the detectors are tested on"),
        ({"data": {"path": "nowhere"}, "robustness": True}, "for one detector on one set"),
    ],
)
def test_a_mistake_ends_it_before_anything_is_scored(
    changes: dict[str, Any], message: str, models: list[str], tmp_path: Path
) -> None:
    from llava.core.config import build

    config = build(ScoreConfig, {"models": models, "output_dir": str(tmp_path / "out"), **changes})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        score_matrix(config)
    assert not (tmp_path / "out").exists()


def test_one_detector_on_one_set_is_as_ever_however_it_is_named(
    models: list[str], class_folder: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"data": DataConfig(path=str(class_folder)), "resamples": 20, "device": "cpu"}
    said = [
        evaluate(ScoreConfig(**settings, **named, output_dir=str(tmp_path / "out")))
        for named in ({"model": models[0]}, {"models": (models[0],)})
    ]
    assert said[0] == said[1] and str(said[0]).startswith("test frame ")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert np.isclose(report["frame"]["auc"]["value"], 1.0) and not (tmp_path / "out" / "matrix.json").exists()
