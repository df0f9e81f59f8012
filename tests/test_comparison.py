"""Paired tests of AUCs against recordings and hand-made cases, and `m2f2 compare` on runs of three seeds."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import golden
import numpy as np
import pytest
from PIL import Image
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from llava import cli
from llava.core.config import build, to_dict
from llava.evaluation.comparison import LEAST_P, compare, delong, holm
from llava.evaluation.metrics import RankedScores
from llava.evaluation.predictions import Prediction, Predictions, write_csv
from llava.jobs.compare import _curve
from llava.train.recipe import Recipe


def scores(count: int, shift: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(count) % 2
    return labels, np.random.default_rng(seed).normal(size=count) + shift * labels


def predictions(labels: np.ndarray, logits: np.ndarray, people: int = 0) -> Predictions:
    groups = [f"p{n % people}" if people else f"p{n}" for n in range(len(labels))]
    names = ("real", "fake")
    return Predictions(
        tuple(
            Prediction(
                id=f"{n:03}.png", label=int(y), p_fake=float(1 / (1 + np.exp(-z))), video=f"{n}", group=g,
                class_name=names[y], split="test",
            )
            for n, (y, z, g) in enumerate(zip(labels, logits, groups, strict=True))
        )
    )  # fmt: skip


# ---- recordings -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> tuple[dict[str, Any], ModuleType]:
    path = golden.RADAR / "radar_stats.json"
    if not path.is_file():
        pytest.skip("the recorded statistics do not lie beside this checkout")
    content = json.loads(path.read_text(encoding="utf-8"))
    return content, golden.generator(golden.RADAR, content["generator"])


def score_set(recorded: tuple[dict[str, Any], ModuleType], name: str) -> tuple[np.ndarray, np.ndarray]:
    content, make = recorded
    entry = content["score_sets"][name]
    count = entry["n0"] + entry["n1"]
    labels = np.repeat([0, 1], [entry["n0"], entry["n1"]])
    noise = make.gen_input(entry["gen_input_name"], [count], content["seed"], "normal").astype(np.float64)
    values = labels * entry["shift"] + noise
    return labels, values if entry["decimals"] is None else values.round(entry["decimals"])


def expression(recorded: tuple[dict[str, Any], ModuleType], text: str, count: int) -> np.ndarray:
    """Give the scores that a recording describes: a set, turned round or with noise added, or noise alone."""
    content, make = recorded
    name, _, rest = text.partition(" + ")
    factor, _, call = rest.partition(" * ") if rest else ("1", "", text)
    noise = np.zeros(count)
    if '"' in call:
        noise = float(factor) * make.gen_input(call.split('"')[1], [count], content["seed"], "normal").astype(float)
    if name.startswith("gen_input"):
        return noise
    values = score_set(recorded, name.lstrip("-"))[1]
    return (-values if name.startswith("-") else values) + noise


def test_delong_meets_the_recordings(recorded: tuple[dict[str, Any], ModuleType]) -> None:
    compared = 0
    for case in recorded[0]["delong"]:
        if case["scores"][0] not in recorded[0]["score_sets"]:  # perfect against reversed, which is a test of its own
            continue
        labels = score_set(recorded, case["scores"][0])[0]
        first, second = (expression(recorded, text, len(labels)) for text in case["scores"])
        found, wanted = delong(labels, first, second), case["correct"]
        assert found.aucs == pytest.approx(wanted["auc"], rel=1e-9)
        assert found.covariance == pytest.approx(np.array(wanted["covariance"]), rel=1e-9, abs=1e-15)
        if wanted["z"] is not None and np.isfinite(wanted["z"]):
            assert found.z == pytest.approx(wanted["z"], rel=1e-9, abs=1e-12)
            assert found.p == pytest.approx(max(wanted["p"], LEAST_P), rel=1e-9)
        compared += 1
    assert compared >= 5


def test_areas_of_resamples_meet_the_recordings(recorded: tuple[dict[str, Any], ModuleType]) -> None:
    """The recordings draw images one by one, by an old generator; the area of each resample is ours."""
    for case in recorded[0]["bootstrap"]:
        if case["correct_same_resamples"] is None or case["scores"] not in recorded[0]["score_sets"]:
            continue
        labels, values = score_set(recorded, case["scores"])
        ranked, generator, areas = RankedScores(labels, values), np.random.RandomState(42), []
        for _ in range(case["n_bootstrap"]):
            drawn = generator.choice(len(labels), size=len(labels), replace=True)
            areas.append(ranked.curve(np.bincount(drawn, minlength=len(labels)).astype(float)).auc())
        tail = 50 * (1 - case["confidence"])
        assert np.nanpercentile(areas, [tail, 100 - tail]) == pytest.approx(case["correct_same_resamples"], abs=1e-9)


# ---- tests ------------------------------------------------------------------------------------------------------


def test_delong_of_no_difference_of_a_sure_one_and_of_a_tiny_p() -> None:
    labels, values = scores(40, 1.0, 0)
    same = delong(labels, values, values)
    assert (same.z, same.p) == (0, 1)
    perfect = delong(labels, labels.astype(float), -labels.astype(float))
    assert perfect.z == np.inf and perfect.p == LEAST_P > 0, "as published: 'not different'"
    labels, values = scores(4000, 6.0, 0)
    sure = delong(labels, values, scores(4000, 0.0, 1)[1])
    assert 0 < sure.p < 1e-300
    with pytest.raises(ValueError, match="needs two fake items or more, got 1"):
        delong(np.array([0, 0, 1]), np.zeros(3), np.ones(3))


def test_delong_is_a_test_of_the_level_that_it_says() -> None:
    """Of two scores that are alike, p is below 0.1 in a tenth of the cases."""
    found = []
    for seed in range(300):
        labels, shared = scores(80, 0.8, seed)
        noise = np.random.default_rng(1000 + seed).normal(size=(2, 80))
        found.append(delong(labels, shared + noise[0], shared + noise[1]).p < 0.1)
    assert norm.ppf(0.0005) < (np.mean(found) - 0.1) / np.sqrt(0.1 * 0.9 / 300) < norm.ppf(0.9995)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_models_are_compared_on_the_same_resampled_groups() -> None:
    labels, good = scores(120, 2.0, 0)
    poor = scores(120, 0.3, 1)[1]
    scored = {
        "good": predictions(labels, good, 30),
        "same": predictions(labels, good, 30),
        "poor": predictions(labels, poor, 30),
    }
    rows = compare(scored, "good", n_boot=400)
    assert rows["good"]["auc"]["value"] == pytest.approx(roc_auc_score(labels, good))
    assert rows["good"]["auc"]["n"] == 30 and "difference" not in rows["good"]
    assert rows["same"]["difference"] == {"value": 0, "low": 0, "high": 0, "n": 30, "redrawn": 0}
    assert rows["same"]["p_delong"] == rows["same"]["p_bootstrap"] == 1
    away = roc_auc_score(labels, poor) - roc_auc_score(labels, good)
    assert rows["poor"]["difference"]["value"] == pytest.approx(away) and rows["poor"]["difference"]["high"] < 0
    assert rows["poor"]["p_bootstrap"] == pytest.approx(2 / 401)
    assert rows["poor"]["p_bootstrap_holm"] == pytest.approx(4 / 401)


# ---- the command ------------------------------------------------------------------------------------------------


def make_run(folder: Path, seed: int, logits: np.ndarray, labels: np.ndarray, **model: object) -> Path:
    """Write what stage 1 writes of a finished run, as far as a comparison reads it."""
    recipe = build(Recipe, {"detector": "baseline", "model": {"small": True, "image_size": 32, **model}, "seed": seed})
    (folder / "phases" / "0").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"config": to_dict(recipe) | {"output_dir": str(folder)}}))
    (folder / "metrics.json").write_text(json.dumps({"minutes": 1.5 + seed % 2}))
    history = [{"step": step, "eval_video_auc": auc} for step, auc in ((10, 0.6), (20, 0.7), (20, 0.9))]
    (folder / "phases" / "0" / "history.json").write_text(json.dumps(history))
    write_csv(folder / "test.csv", predictions(labels, logits, 20))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    labels = np.arange(60) % 2
    made = []
    for name, shift, model in (("good", 2.0, {}), ("poor", 0.2, {"network": "resnet50"})):
        for seed in (100, 101, 102):
            logits = scores(60, shift, seed)[1]
            made.append(make_run(tmp_path / name / f"seed_{seed}", seed, logits, labels, **model))
    return list(map(str, made))


def test_seeds_of_a_recipe_are_one_model(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["compare", *runs, "--resamples", "200", "--output_dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "test, 60 frames, 20 groups; differences to good" in printed
    report = json.loads((out / "compare.json").read_text())
    good, poor = report["models"]["good"], report["models"]["poor"]
    assert good["seeds"] == [100, 101, 102] and len(good["aucs"]) == 3
    assert good["sd"] == pytest.approx(np.std(good["aucs"], ddof=1))
    assert good["mean"] == pytest.approx(np.mean(good["aucs"]))
    assert good["minutes"] == pytest.approx((1.5 + 2.5 + 1.5) / 3) and good["weights"] < poor["weights"]
    labels = np.arange(60) % 2
    averaged = np.mean([1 / (1 + np.exp(-scores(60, 2.0, seed)[1])) for seed in (100, 101, 102)], axis=0)
    assert good["auc"]["value"] == pytest.approx(roc_auc_score(labels, averaged))
    assert poor["difference"]["value"] == pytest.approx(poor["auc"]["value"] - good["auc"]["value"])
    with (out / "compare.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["model", "good", "poor"] and rows[1][6:] == ["", "", ""]
    assert (out / "compare.md").read_text().splitlines()[1] == "| " + " | ".join(["---"] * 9) + " |"
    latex = (out / "compare.tex").read_text()
    assert "\\toprule" in latex and "\\textbf{good}" in latex and "\\textbf{poor}" not in latex
    assert _curve(Path(runs[0])) == [(10, 0.6), (20, 0.7)], "the last is that of the best weights, once more"
    for name in ("aucs.png", "roc.png", "curves.png"):
        assert Image.open(out / name).width > 500


def test_the_reference_is_chosen_and_a_wrong_one_refused(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--resamples", "50", "--output_dir", str(tmp_path / "out")]
    assert cli.main(["compare", *runs, *words, "--reference", "poor", "--level", "video"]) == 0
    assert "differences to poor" in capsys.readouterr().out
    assert cli.main(["compare", *runs, *words, "--reference", "por"]) == 2
    assert "no run is called 'por'. Allowed: good, poor. Did you mean 'poor'?" in capsys.readouterr().err


def test_runs_of_other_items_and_unfinished_ones_are_refused(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, logits = scores(40, 1.0, 5)
    other = make_run(tmp_path / "other" / "seed_100", 100, logits, labels, network="xception")
    words = ["--output_dir", str(tmp_path / "out")]
    assert cli.main(["compare", *runs, str(other), *words]) == 2
    assert (
        "was tested on other items than" in (said := capsys.readouterr().err)
        and "20 items differ, as '040.png'" in said
    )
    (other / "test.csv").unlink()
    assert cli.main(["compare", str(other), *words]) == 2
    assert "has no test.csv; give the folder of a finished run" in capsys.readouterr().err
    assert cli.main(["compare", runs[0], runs[0], *words]) == 2
    assert "is given twice; name each run once" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
