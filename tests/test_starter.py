"""The model that comes with the package: it is asked where none is named."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from test_architecture import LLM_STACK
from test_shared_tower import made, merged
from tiny_world import draw

import llava
from llava.core import weights
from llava.core.config import parse
from llava.core.types import STARTER
from llava.detectors.base import load
from llava.jobs.bulk import ScoreSettings
from llava.jobs.commands import ChatSettings, DetectSettings, ExplainSettings
from llava.jobs.ddvqa_answers import JudgeSettings, ReasonSettings
from llava.jobs.maps import CounterfactualSettings, MapSettings
from llava.pipeline.pipeline import Pipeline
from llava.pipeline.settings import FaceSettings
from llava.serve.options import ServeSettings

WHOLE = FaceSettings(face="off")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (DetectSettings, ["photo.jpg"]),
        (ExplainSettings, ["photo.jpg"]),
        (ChatSettings, ["photo.jpg"]),
        (ScoreSettings, ["folder", "--out", "scores"]),
        (MapSettings, ["manifest.csv"]),
        (CounterfactualSettings, ["manifest.csv", "--predict_path", "a", "--gt_path", "b"]),
        (JudgeSettings, []),
        (ReasonSettings, []),
        (ServeSettings, []),
    ],
)
def test_who_names_no_model_asks_the_starter(settings: Any, words: list[str]) -> None:
    def asked(*flags: str) -> Any:
        found = parse(settings, [*words, *flags])
        return getattr(found, "model", None) or found.model_path

    flag = "--model" if "model" in inspect.signature(settings).parameters else "--model_path"
    name: Any = [STARTER] if settings is ServeSettings else STARTER
    assert asked() == name
    assert asked(flag, "mine") == (["mine"] if settings is ServeSettings else "mine")
    if settings is ServeSettings:
        assert parse(settings, words).models == {STARTER: STARTER}


def test_python_asks_the_starter_too(tiny_explainer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "STARTER_DIR", tiny_explainer)
    model = llava.load(device="cpu")
    assert model.name == STARTER and model.explainer is not None
    assert llava.load(tiny_explainer.parent / "detector").explainer is None


# ---- a verdict needs no language model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with a calibrated CNN as `detector`, and the explainer merged from it as `start`."""
    folder = tmp_path_factory.mktemp("starter")
    made(folder, "cnn")
    merged(folder)
    return folder


def judged(pipeline: Pipeline) -> list[tuple[dict[str, Any], bytes]]:
    found = pipeline.findings([draw(n % 2, n) for n in range(3)])
    return [(each.verdict.to_dict(), np.asarray(each.evidence_map).tobytes()) for each in found]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_detector_taken_out_says_what_the_whole_explainer_says(world: Path, precision: Any) -> None:
    whole = Pipeline.from_pretrained(world / "start", "cpu", precision, faces=WHOLE)
    alone = Pipeline.from_pretrained(world / "start", "cpu", precision, faces=WHOLE, words=False)
    assert whole.explainer is not None and alone.explainer is None
    assert judged(alone) == judged(whole) == judged(Pipeline.from_pretrained(world / "detector", "cpu", faces=WHOLE))
    assert alone.detector.calibration is not None and len({str(each) for each in judged(alone)}) == 3
    with pytest.raises(ValueError, match=r"is here as the detector 'cnn', .* load a merged explainer"):
        alone.explain(draw(1, 1))


def test_a_detector_that_reads_the_explainers_tower_stays_inside(tiny_explainer: Path) -> None:
    assert Pipeline.from_pretrained(tiny_explainer, "cpu", words=False).explainer is not None
    with pytest.raises(ValueError, match="its detector reads the explainer's vision tower; give that of stage 1"):
        load(tiny_explainer)


def test_a_detector_is_taken_out_of_shards_and_by_its_kind(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "start", tmp_path / "shards")
    path = tmp_path / "shards" / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    for number in range(3):
        part = {name: tensors[name] for name in names[number::3]}
        save_file(part, path.with_name(f"model-0000{number + 1}-of-00003.safetensors"), metadata={"format": "pt"})
    assert load(tmp_path / "shards").fingerprint() == load(world / "detector").fingerprint()
    assert load(world / "start", expected="cnn").describe() == load(world / "detector").describe()
    with pytest.raises(ValueError, match="holds detector 'cnn', not detector 'vit3'"):
        load(world / "start", expected="vit3")


def test_other_weights_are_refused_outside_as_inside(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "start", tmp_path / "changed")
    path = tmp_path / "changed" / "model.safetensors"
    tensors = load_file(path)
    name = "detector.classifier.bias"
    save_file(tensors | {name: tensors[name] + 0.01}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="was fitted for other weights"):
        load(tmp_path / "changed")
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"does not fit FaceCnn: tensors 1 missing \(first: classifier.bias\)"):
        load(tmp_path / "changed")


PLAIN = """
import sys
from pathlib import Path
from llava.cli import main
from llava.core import weights
weights.STARTER_DIR = Path(sys.argv[1])
assert main(["detect", sys.argv[2], "--face", "off", "--json"]) == 0
assert main(["score", sys.argv[2], "--face", "off", "--out", sys.argv[3]]) == 0
print(*sys.modules)
"""


@pytest.mark.e2e
def test_a_plain_verdict_loads_no_language_model(world: Path, tmp_path: Path) -> None:
    Image.fromarray(draw(1, 1)).save(tmp_path / "face.png")
    words = [sys.executable, "-c", PLAIN, str(world / "start"), "face.png", "scores"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout.splitlines()[0])
    assert verdict["detector"] == "cnn" and verdict["calibration"].startswith("calibrated on checkerboards")
    assert set(done.stdout.splitlines()[-1].split()).isdisjoint(LLM_STACK)
