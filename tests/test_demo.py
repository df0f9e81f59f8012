"""`m2f2 demo`: the whole path in one process on a few forged photos, and what its report shows and does not show."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from filelock import FileLock
from page_parser import Page

from llava.core.config import build, load_yaml
from llava.data.sources import DataConfig
from llava.data.stills import CsvSource
from llava.jobs.case_file import outlined
from llava.jobs.demo import Clock, DemoConfig, DemoRecipe, prepare, run_demo

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "scripts" / "configs" / "demo.yaml"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run the whole demonstration with a handful of versions and steps."""
    folder = tmp_path_factory.mktemp("demo")
    recipe = load_yaml(RECIPE)
    recipe["data"] |= {"versions": 3, "per_image": 2, "longest_side": 96}
    recipe["stage_1"] |= {"steps": 10, "eval_steps": 10, "batch_size": 4, "collapse.min_sd": 0.0, "workers": 0}
    recipe["leaves"] = {"count": 3, "versions": 1}
    recipe["base"] |= {"steps": 20, "batch_size": 4, "layers": 1, "hidden_size": 48, "heads": 2}
    for stage in ("stage_2", "stage_3"):
        recipe[stage] |= {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("M2F2_CHECKPOINTS", str(folder / "checkpoints"))
        said = "".join(run_demo(DemoConfig(recipe=str(folder / "recipe.yaml"), output=str(folder / "out"))))
    assert "judgement accuracy" in said and str(folder / "out" / "report.html") in said
    assert f"--model {folder / 'checkpoints' / 'demo'}" in said
    yield folder / "out"


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match=r"another run writes to .*; wait for it"):
        next(run_demo(DemoConfig(output=str(tmp_path))))


@pytest.mark.e2e
def test_every_step_leaves_what_it_promises(demo: Path) -> None:
    for name in (
        "stage_1/model.safetensors",
        "../checkpoints/demo/model.safetensors",
        "judgement.json",
        "explanation.json",
        "integrity.json",
    ):
        assert (demo / name).is_file(), name
    seconds = json.loads((demo / "seconds.json").read_text())
    assert list(seconds)[:2] == ["data", "stage 1: the detector"] and all(s >= 0 for s in seconds.values())
    source = CsvSource(DataConfig(source="csv", path=str(demo / "manifest.csv"), masks=True))
    leaves = [record for record in source.records if record.id.startswith("leaves/")]
    assert len(leaves) == 3 * 3 and {record.split for record in leaves} == {"train"}
    assert {bool(source.load(record).mask.any()) for record in leaves if record.label == 1} == {True}
    assert {record.tags["untouched"] for record in leaves} <= {record.id for record in leaves}
    assert json.loads((demo.parent / "checkpoints" / "demo" / "config.json").read_text())["evidence_tokens"] == 2


@pytest.mark.e2e
def test_the_report_shows_only_the_historical_portrait_forged(demo: Path) -> None:
    text = (demo / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "demonstration" in page.text and all(address.startswith("data:image/png") for address in page.addresses)
    with (demo / "data" / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    shown = [row for row in rows if row["file"] in text]
    assert {row["group"] for row in shown} == {"grace_hopper"} and {row["split"] for row in shown} == {"test"}
    assert [row["label"] for row in shown] == ["real", "fake"]
    assert f"{shown[1]['region']} edited" in text and "The truth: nothing was edited." in text
    assert {"data", "learning", "scores", "integrity", "real", "forged", "time"} <= {
        s["id"] for s in page.all("section")
    }
    integrity = json.loads((demo / "integrity.json").read_text())
    assert all(sentence in page.text for sentence in integrity["verdict"]) and len(integrity["verdict"]) >= 4
    pictures = page.all("img")
    assert all(picture["alt"] for picture in pictures) and len(pictures) >= 3 + 2 * 2 + 1


def test_the_recipe_holds_the_navy_portrait_out() -> None:
    recipe = build(DemoRecipe, load_yaml(RECIPE), where="demo.yaml")
    assert recipe.data.test_groups == ("grace_hopper",) and recipe.data.folder == "utils/demo_faces"
    photos = {p.stem for p in (ROOT / recipe.data.folder).iterdir() if p.suffix != ".md"}
    assert photos == {"astronaut", "grace_hopper", "portrait_cc0_1", "portrait_cc0_2"}
    credits = (ROOT / recipe.data.folder / "CREDITS.md").read_text()
    assert all(name in credits for name in photos)


def test_the_model_is_named_after_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2F2_CHECKPOINTS", "models")
    assert DemoConfig().explainer == Path("models/demo")
    assert DemoConfig(data="faces/mine/").explainer == Path("models/demo-mine")
    assert DemoConfig(data="faces", model="x").explainer == Path("models/x")


def test_a_step_that_fails_ends_the_demonstration() -> None:
    clock = Clock()
    assert clock.run("fine", lambda: 0) == 0 and clock.run("result", lambda: "text") == "text"
    with pytest.raises(ValueError, match="The step 'broken' ended with 2"):
        clock.run("broken", lambda: 2)
    assert list(clock.seconds) == ["fine", "result"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; give DD-VQA or class folders"):
        prepare(str(tmp_path / "nothing"), str(RECIPE), tmp_path)


def test_an_outline_lies_outside_of_what_it_shows() -> None:
    pixels = np.full((40, 40, 3), 90, np.uint8)
    mask = np.zeros((40, 40), bool)
    mask[15:25, 15:25] = True
    shown = outlined(pixels, mask)
    assert np.array_equal(shown[mask], pixels[mask]) and (shown[13, 20] != pixels[13, 20]).any()
    assert np.array_equal(shown[:5], pixels[:5]) and (pixels == 90).all()
