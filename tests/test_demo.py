"""`scripts/demo.sh`: the whole path on a few forged photos, and what its report shows and does not show."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import yaml
from filelock import FileLock
from page_parser import Page

from llava.core.config import build, load_yaml, merge
from llava.jobs.case_file import outlined
from llava.jobs.forged_faces import ForgeDataConfig
from llava.pipeline.verdict import UNKNOWN_LOOK

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "scripts" / "configs" / "demo"
EXPLAIN = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}
SMALL: dict[str, dict[str, Any]] = {
    "edit": {},
    "forge": {"versions": 2, "per_image": 2, "longest_side": 96},
    "stage_1": {"steps": 10, "eval_steps": 10, "batch_size": 4, "collapse": {"min_sd": 0.0}, "workers": 0},
    "tiny_base": {"steps": 20, "batch_size": 4, "layers": 1, "hidden_size": 48, "heads": 2},
    "stage_2": EXPLAIN,
    "stage_3": EXPLAIN,
}
# All that the script needs, and no Java: METEOR loads for longer than the rest takes, and has its own tests.
TOOLS = ("basename", "bash", "cp", "dirname", "flock", "mkdir", "rm", "sed")


def write_recipes(folder: Path, **changes: dict[str, Any]) -> Path:
    """Write the recipes of the demonstration, made small, into a folder."""
    folder.mkdir()
    for name, small in SMALL.items():
        recipe = merge(merge(load_yaml(RECIPES / f"{name}.yaml"), small), changes.get(name, {}))
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def demo_sh(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "scripts/demo.sh", *map(str, words)]
    return forked.run_shell(command, ROOT, timeout=1800, **{"M2F2_CHECKPOINTS": "models"} | environment)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the whole demonstration with a handful of versions and steps."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "tools").mkdir()
    for tool in TOOLS:
        (folder / "tools" / tool).symlink_to(str(shutil.which(tool)))
    words = ("--output", folder / "out", "--recipes", write_recipes(folder / "recipes"))
    place = {"M2F2_CHECKPOINTS": str(folder / "checkpoints"), "PATH": str(folder / "tools")}
    done = demo_sh(*words, **place)
    said = done.stdout
    assert done.returncode == 0, said[-2000:] + done.stderr[-3000:]
    assert "judgement accuracy" in said and str(folder / "out" / "report.html") in said
    assert f"--model {folder / 'checkpoints' / 'demo'}" in said
    return folder / "out"


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"):
        done = demo_sh("--output", tmp_path)
    assert done.returncode == 2 and f"another run writes to '{tmp_path}' now; wait for it" in done.stderr
    assert "==" not in done.stdout


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
    assert list(seconds)[:2] == ["the starter: verdicts and reasons", "data"] and all(s >= 0 for s in seconds.values())
    assert list(seconds)[-1] == "report" and len(seconds) == 11
    made = json.loads((demo.parent / "checkpoints" / "demo" / "config.json").read_text())
    assert made["evidence_tokens"] == 3 and made["detector"]["detector"] == "cnn"


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
    (starter,) = [s for s in page.all("section") if s["id"] == "starter"]
    assert starter and all(name in page.text for name in ("astronaut.png", "portrait_cc0_2.png", UNKNOWN_LOOK))
    assert {"starter", "data", "learning", "scores", "integrity", "real", "forged", "time"} <= {
        s["id"] for s in page.all("section")
    }
    integrity = json.loads((demo / "integrity.json").read_text())
    assert all(sentence in page.text for sentence in integrity["verdict"]) and len(integrity["verdict"]) >= 4
    pictures = page.all("img")
    assert all(picture["alt"] for picture in pictures) and len(pictures) >= 3 + 2 * 2 + 1


def test_the_recipe_holds_the_navy_portrait_out() -> None:
    recipe = build(ForgeDataConfig, load_yaml(RECIPES / "forge.yaml") | {"output": "x"}, where="forge.yaml")
    assert recipe.test_groups == ("grace_hopper",) and recipe.photos == "utils/demo_faces"
    photos = {p.stem for p in (ROOT / recipe.photos).iterdir() if p.suffix != ".md"}
    assert photos == {"astronaut", "grace_hopper", "portrait_cc0_1", "portrait_cc0_2"}
    credits = (ROOT / recipe.photos / "CREDITS.md").read_text()
    assert all(name in credits for name in photos)


@pytest.mark.parametrize(
    ("own", "name", "model"), [(None, None, "demo"), ("mine/", None, "demo-mine"), ("mine", "x", "x")]
)
def test_the_model_is_named_after_its_data(own: str | None, name: str | None, model: str, tmp_path: Path) -> None:
    words = [str(tmp_path / own)] if own else []
    (tmp_path / "mine").mkdir()
    with FileLock(tmp_path / ".lock"):  # it says what it will do, and does not do it
        done = demo_sh(*words, "--output", tmp_path, *(["--model", name] if name else []))
    assert done.stdout.startswith(f"From {words[0] if own else 'the embedded photos'} to the model models/{model};")
    assert done.stdout.rstrip().endswith(f"goes to {tmp_path}.")


@pytest.mark.e2e
def test_a_step_that_fails_ends_the_demonstration(tmp_path: Path) -> None:
    recipes = write_recipes(tmp_path / "recipes", forge={"versions": 1, "leaves": 0}, stage_1={"stepz": 3})
    done = demo_sh("--output", tmp_path / "out", "--recipes", recipes)
    assert done.returncode == 2 and "Unknown setting 'stepz'" in done.stderr
    assert done.stderr.endswith("The step 'stage 1: the detector' ended with 2; its message stands above.\n")
    assert "scores on test" not in done.stdout
    assert list(json.loads((tmp_path / "out" / "seconds.json").read_text())) == [
        "the starter: verdicts and reasons",
        "data",
    ]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    done = demo_sh(tmp_path / "nothing")
    assert done.returncode == 2 and "does not exist; give DD-VQA or class folders, or no folder at all" in done.stderr
    done = demo_sh("--recipe", "x")
    assert done.returncode == 2 and "Unknown option '--recipe'; allowed: --output, --model, --recipes." in done.stderr
    done = demo_sh("--model")
    assert done.returncode == 2 and "--model needs a value." in done.stderr


def test_an_outline_lies_outside_of_what_it_shows() -> None:
    pixels = np.full((40, 40, 3), 90, np.uint8)
    mask = np.zeros((40, 40), bool)
    mask[15:25, 15:25] = True
    shown = outlined(pixels, mask)
    assert np.array_equal(shown[mask], pixels[mask]) and (shown[13, 20] != pixels[13, 20]).any()
    assert np.array_equal(shown[:5], pixels[:5]) and (pixels == 90).all()
