"""The model that comes with the package: it is asked where none is named."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from itertools import product
from pathlib import Path
from threading import Event
from typing import Any

import forked
import numpy as np
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from safetensors.torch import load_file, save_file
from test_architecture import LLM_STACK
from test_shared_tower import delta, made, merged
from tiny_world import calibration_of, draw

import llava
from llava.cli import main
from llava.core import weights
from llava.core.config import load_yaml, merge, parse
from llava.core.score_map import write_calibration
from llava.core.tensor_files import INDEX_NAME, Move, TensorFiles, tensor_files_in, write_shards
from llava.core.types import STARTER, UNFAMILIAR, GenerationSettings, Turn, VerdictLabel
from llava.core.weights import STARTER_DIR, halved, sha256_of
from llava.data.splits import group_hashes
from llava.detectors.base import load
from llava.detectors.members import write_trained_on
from llava.evaluation.text import parse_verdict
from llava.explainer.delta import fingerprint
from llava.explainer.generation import load_model, load_processor
from llava.explainer.merge import halve, merge_delta
from llava.jobs.bulk import ScoreSettings
from llava.jobs.commands import ChatSettings, DetectSettings, ExplainSettings
from llava.jobs.ddvqa_answers import JudgeSettings, ReasonSettings
from llava.jobs.maps import CounterfactualSettings, MapSettings
from llava.pipeline.pipeline import Pipeline
from llava.pipeline.settings import FaceSettings
from llava.pipeline.verdict import UNKNOWN_LOOK
from llava.serve.batching import BatchingEngine
from llava.serve.engine import Question
from llava.serve.options import ServeSettings
from llava.train import stage_1
from llava.train.recipe import Recipe

ROOT = Path(__file__).parents[1]
PHOTO = ROOT / "utils" / "demo_faces" / "astronaut.png"
FACES = ("astronaut.png", "grace_hopper.jpg", "portrait_cc0_1.png", "portrait_cc0_2.png")
KNOWN = PHOTO.with_name("portrait_cc0_1.png")
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


def test_python_asks_the_starter_too(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "STARTER_DIR", world / "start")
    model = llava.load(device="cpu")
    assert model.name == STARTER and model.explainer is not None
    assert llava.load(device="cpu", words=False).explainer is None
    assert llava.load(world / "detector").name == str(world / "detector")


# ---- a verdict needs no language model --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with a calibrated CNN as `detector`, and the explainer merged from it as `start`."""
    folder = tmp_path_factory.mktemp("starter")
    made(folder, "cnn")
    write_trained_on(folder / "detector", ["somebody"])
    merged(folder)
    return folder


def sharded(folder: Path, out: Path) -> None:
    """Copy an explainer with its weights in several files."""
    shutil.copytree(folder, out)
    tensors = TensorFiles([folder / "model.safetensors"])
    (out / "model.safetensors").unlink()
    moves = [Move(source=name, action="used", target=name) for name in tensors]
    write_shards(out, moves, tensors, shard_bytes=20_000)
    assert len(list(out.glob("model-*.safetensors"))) > 2


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


def test_a_detector_that_reads_the_explainers_tower_stays_inside(tmp_path: Path) -> None:
    made(tmp_path, "m2f2det")
    merged(tmp_path)
    assert Pipeline.from_pretrained(tmp_path / "start", "cpu", words=False).explainer is not None
    with pytest.raises(ValueError, match="its detector reads the explainer's vision tower; give that of stage 1"):
        load(tmp_path / "start")


def test_a_detector_is_taken_out_of_shards_and_by_its_kind(world: Path, tmp_path: Path) -> None:
    sharded(world / "start", tmp_path / "shards")
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


BARE = """
import json, sys
from importlib.machinery import PathFinder
absent, found = set(json.loads(sys.argv[1])), PathFinder.find_spec
PathFinder.find_spec = lambda name, *more: None if name.partition(".")[0] in absent else found(name, *more)
from llava.cli import main
sys.exit(main(["explain", sys.argv[2], "--json", "--device", "cpu"]))
"""


@pytest.mark.e2e
def test_what_ships_needs_none_of_the_extras(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed, waiting = set(), list(project["dependencies"])
    while waiting:
        wanted = Requirement(waiting.pop())
        name = canonicalize_name(wanted.name)
        if name not in needed and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
            needed.add(name)
            waiting += requires(name) or []
    absent = [
        module
        for module, packages in packages_distributions().items()
        if needed.isdisjoint(map(canonicalize_name, packages)) and module != "llava"
    ]
    assert {"gradio", "deepspeed", "ray"} <= set(absent) and "torch" not in absent
    words = [sys.executable, "-c", BARE, json.dumps(absent), str(KNOWN)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"]


@pytest.mark.e2e
def test_a_plain_verdict_loads_no_language_model(world: Path, tmp_path: Path) -> None:
    Image.fromarray(draw(1, 1)).save(tmp_path / "face.png")
    words = [sys.executable, "-c", PLAIN, str(world / "start"), "face.png", "scores"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout.splitlines()[0])
    assert verdict["detector"] == "cnn" and verdict["calibration"].startswith("calibrated on checkerboards")
    assert set(done.stdout.splitlines()[-1].split()).isdisjoint(LLM_STACK)


def test_training_tells_a_real_face_of_another_ones_edit(world: Path) -> None:
    model = load_model(world / "start")
    processor = load_processor(world / "start", model)
    ids, labels = processor.encode(
        [Turn(role="human", text="<image>\n<deepfake>\nReal?"), Turn(role="assistant", text="No.")]
    )
    items = [{"input_ids": ids, "labels": labels, **processor.pixels(draw(n % 2, n))} for n in range(3)]
    batch = processor.collate(items)
    spread = torch.tensor([[0.2, 1.0], [0.9, 1.0], [0.4, 1.0]])
    with torch.no_grad():
        own = model.encode(batch["pixel_values"], batch["detector_inputs"]).evidence
        assert own is not None and not torch.allclose(own[0], own[2])
        told = model.detector.with_p_fake(own[[2, 1, 1]], spread[:, 0])
        expected = model(**batch, evidence=told).logits
        assert torch.equal(model(**batch, spread=spread).logits, expected)


# ---- weights in half precision ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(world: Path) -> Path:
    """Round the CNN, calibrate it, merge it, store that in half: `half/detector`, `half/start`, `half/small`."""
    folder = world / "half"
    (world / "detector" / "calibration.json").rename(world / "put_aside.json")
    halve(str(world / "detector"), folder / "detector")
    (world / "put_aside.json").rename(world / "detector" / "calibration.json")
    write_calibration(folder / "detector", calibration_of(load(folder / "detector").fingerprint()))
    shutil.copytree(world / "base", folder / "base")
    (folder / "base" / "config.json").write_text(_without_sha256(folder / "base" / "config.json"))
    merged(folder)
    halve(str(folder / "start"), folder / "small")
    return folder


def _without_sha256(path: Path) -> str:
    settings = json.loads(path.read_text())
    settings.pop("deepfake_model_sha256", None)
    return json.dumps(settings)


def dtypes(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


def test_half_the_bytes_say_the_same(world: Path, small: Path) -> None:
    assert dtypes(small / "small") == dtypes(small / "detector") == {torch.float16, torch.int64}
    assert dtypes(small / "start") == {torch.float32, torch.int64}
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (small / "start", small / "small")]
    assert sizes[1] < 0.6 * sizes[0]
    calibration = load(small / "detector").calibration
    assert calibration is not None
    alone = judged(Pipeline.from_pretrained(small / "detector", "cpu", faces=WHOLE))
    for folder in (small / "start", small / "small"):
        for words in (True, False):
            pipeline = Pipeline.from_pretrained(folder, "cpu", faces=WHOLE, words=words)
            assert judged(pipeline) == alone and pipeline.detector.calibration == calibration
    assert judged(Pipeline.from_pretrained(world / "detector", "cpu", faces=WHOLE)) != alone, "rounding does something"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "stored"])
def test_a_detector_is_loaded_from_half_precision_without_a_further_loss(small: Path, dtype: Any) -> None:
    inside = load_model(small / "small", dtype=dtype).detector.state_dict()
    for name, tensor in load(small / "detector").state_dict().items():
        assert inside[name].dtype == torch.float32 or not tensor.is_floating_point(), name
        assert torch.equal(inside[name].double(), tensor.double()), name


def test_rounding_is_certified(small: Path) -> None:
    certificate = json.loads((small / "small" / "certificate.json").read_text())
    before, after = (load_file(small / name / "model.safetensors") for name in ("start", "small"))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name].to(tensor.dtype))}
    assert not any(name.startswith("detector.") for name in changed), "the detector was rounded before"
    assert certificate["kind"] == "half" and certificate["tensors_total"] == len(before)
    assert certificate["tensors_changed"] == len(changed) > 20
    assert 0 < certificate["max_delta_logit"] <= certificate["tolerance"]
    assert certificate["sha256"] == fingerprint(small / "small")
    assert certificate["detector_sha256"] == load(small / "detector").fingerprint()
    assert certificate["base"]["sha256"] == fingerprint(small / "start")


@pytest.mark.parametrize("name", ["detector", "start"])
def test_a_calibration_of_other_values_does_not_go_along(world: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is of its weights before rounding"):
        halve(str(world / name), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_half_precision_are_refused() -> None:
    with pytest.raises(ValueError, match="1 tensors hold values beyond 65504, the range of half precision: b"):
        halved({"a": torch.tensor([65504.0, float("inf")]), "b": torch.tensor([7e4]), "c": torch.tensor(100_000)})


def test_who_it_was_trained_on_is_remembered_to_the_end(small: Path, tmp_path: Path) -> None:
    assert load(small / "small").trained_on == {"somebody"}
    shutil.copytree(small / "start", tmp_path / "start")
    delta(tmp_path, "deepfake_projector")
    merge_delta(str(tmp_path / "start"), str(tmp_path / "delta"), tmp_path / "folded")
    assert load(tmp_path / "folded").trained_on == {"somebody"}


def test_what_lies_beside_the_weights_goes_along(world: Path, small: Path) -> None:
    assert {path.name for path in (small / "small").iterdir()} == {path.name for path in (world / "start").iterdir()}
    for name in ("config.json", "tokenizer.json"):
        assert (small / "small" / name).read_bytes() == (small / "start" / name).read_bytes()


def test_shards_are_halved_one_by_one(small: Path, tmp_path: Path) -> None:
    sharded(small / "start", tmp_path / "shards")
    halve(str(tmp_path / "shards"), tmp_path / "small")
    stored = TensorFiles(tensor_files_in(tmp_path / "small"))
    index = json.loads((tmp_path / "small" / INDEX_NAME).read_text())
    assert index["weight_map"] == {name: path.name for name, path in stored.file_of.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    whole = load_file(small / "small" / "model.safetensors")
    assert whole.keys() == stored.keys() and all(torch.equal(whole[name], stored[name]) for name in whole)


@pytest.mark.e2e
def test_the_script_says_what_is_wrong(world: Path, tmp_path: Path) -> None:
    script = ROOT / "scripts" / "halve_weights.py"
    words = ["--model_path", str(world / "start"), "--save_path", str(tmp_path / "out")]
    done = forked.run([str(script), *words], cwd=tmp_path)
    assert done.returncode == 1 and "halve: error: The calibration of" in done.stderr


@pytest.mark.e2e
def test_what_ships_can_be_fitted_to_own_pictures_without_training(tmp_path: Path) -> None:
    """Pictures with red and blue exchanged look like none that the starter knows; afterwards they do."""
    rows = []
    for number, (name, brightness) in enumerate(product(FACES, (1.0, 0.9, 0.8))):
        photo = Image.open(PHOTO.parent / name).convert("RGB")
        photo.thumbnail((200, 200))
        swapped = Image.merge("RGB", photo.split()[::-1]).point(lambda level, part=brightness: round(level * part))
        swapped.save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,real,{'test' if number == 11 else 'val'},{number}")
    (tmp_path / "own.csv").write_text("\n".join(["file,label,split,group", *rows, f"{PHOTO},real,train,other"]))
    flags = ["--data.source", "csv", "--data.path", str(tmp_path / "own.csv"), "--output_dir", str(tmp_path / "own")]
    flags += ["--workers", "0", "--resamples", "10", "--near_duplicates", "false"]
    flags += ["--calibration.real_coverage", "0.9"]  # 0.98 needs 49 people
    files = [word for name in ("stage_1", "own_pictures") for word in ("--config", str(RECIPES / f"{name}.yaml"))]
    stage_1.train(parse(Recipe, [*files, *flags]))
    before, after = load(STARTER_DIR), load(tmp_path / "own")
    weights_of = {name: t for name, t in after.state_dict().items() if "familiarity" not in name}
    assert all(
        torch.equal(t, before.state_dict()[name].float()) for name, t in weights_of.items() if t.is_floating_point()
    )
    assert after.calibration is not None and after.calibration.groups == 11 and "fitted to" in after.scope
    strange, known = (
        [
            Pipeline(each, None, "it", stability=False).detect(tmp_path / f"{n}.png")[0].evidence[UNFAMILIAR]
            for n in (0, 3, 6)
        ]
        for each in (before, after)
    )
    assert min(strange) > 0.9 and max(known) == 0


# ---- how it is made ---------------------------------------------------------------------------------------------

RECIPES = ROOT / "scripts" / "configs" / "starter"
SMALL: dict[str, dict[str, Any]] = {
    "stage_1": {
        "steps": 2,
        "eval_steps": 2,
        "batch_size": 4,
        "workers": 0,
        "resamples": 10,
        "model": {"backbone": "conv_tiny", "image_size": 64, "width": 16},
        "collapse": {"min_sd": 0.0, "min_recall": 0.0},
        "phases": [{"name": "traces"}],
    },
    "forge": {"per_image": 1, "longest_side": 96},
    "tiny_base": {"steps": 4, "batch_size": 4, "layers": 1, "hidden_size": 48, "heads": 2},
    "stage_2": {"max_steps": 2, "per_device_train_batch_size": 4},
    "stage_3": {"max_steps": 2, "per_device_train_batch_size": 4},
}
# No Java: METEOR has its own tests.
TOOLS = ("bash", "dirname", "mkdir", "mktemp", "rm", "sed", "ls")


def make_starter(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return forked.run_shell(["bash", "scripts/make_starter.sh", *map(str, words)], ROOT, timeout=600, **environment)


@pytest.mark.e2e
def test_the_script_makes_a_small_model_and_leaves_no_forged_face(tmp_path: Path) -> None:
    for folder in ("recipes", "tools", "temporary"):
        (tmp_path / folder).mkdir()
    for tool in TOOLS:
        (tmp_path / "tools" / tool).symlink_to(str(shutil.which(tool)))
    for name, small in SMALL.items():
        recipe = merge(load_yaml(RECIPES / f"{name}.yaml"), small)
        (tmp_path / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    split_of = {"astronaut.png": "train", "portrait_cc0_1.png": "val", "grace_hopper.jpg": "test"}
    rows = [f"{PHOTO.parent / name},real,{split},{name[:5]}" for name, split in split_of.items()]
    (tmp_path / "people.csv").write_text("\n".join(["file,label,split,group", *rows]))
    for _ in range(2):  # the second time the detector is there, and the words are learned anew
        done = make_starter(
            *(tmp_path / "people.csv", "--output", tmp_path / "out", "--recipes", tmp_path / "recipes"),
            PATH=str(tmp_path / "tools"),
            TMPDIR=str(tmp_path / "temporary"),
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "is trained already by this recipe" in done.stderr
    assert dtypes(tmp_path / "out" / "model") == {torch.float16, torch.int64}
    made = Pipeline.from_pretrained(tmp_path / "out" / "model", "cpu")
    assert made.explainer is not None
    assert load(tmp_path / "out" / "model").trained_on == set(group_hashes(["astro"]))
    assert made.detector.scope == load_yaml(RECIPES / "stage_1.yaml")["scope"]
    assert json.loads((tmp_path / "out" / "integrity.json").read_text())
    assert json.loads((tmp_path / "out" / "judgement.json").read_text())["agreement"]["n"]
    assert json.loads((tmp_path / "out" / "explanation.json").read_text())["n"]
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give TABLE, a csv of real faces"),
        (["nowhere.csv"], "File 'nowhere.csv' does not exist"),
        (["a.csv", "b.csv"], "Give one TABLE, not 'a.csv' and 'b.csv'"),
        (["a.csv", "--weights"], "--weights needs a value"),
        (["CHANGELOG.md", "--weights", "nowhere.pth"], "File 'nowhere.pth' does not exist"),
        (
            ["CHANGELOG.md", "--output", "."],
            "Folder '.' holds other things; give an empty one",
        ),
        (["--sed", "1"], "Unknown option '--sed'; allowed: --weights, --output, --seed, --recipes"),
    ],
)
def test_what_the_starter_can_not_be_made_of_is_said(words: list[str], message: str) -> None:
    done = make_starter(*words)
    assert done.returncode == 2 and message in done.stderr


# ---- the one that ships -----------------------------------------------------------------------------------------


def test_what_ships_is_small_calibrated_and_described() -> None:
    stored = load_file(STARTER_DIR / "model.safetensors")
    own = [tensor for name, tensor in stored.items() if name.startswith("detector.")]
    assert {tensor.dtype for tensor in stored.values()} <= {torch.float16, torch.int64}
    assert sum(tensor.numel() for tensor in own) <= 6_000_000 and sum(tensor.nbytes for tensor in own) <= 12_000_000
    assert sum(path.stat().st_size for path in STARTER_DIR.iterdir()) <= 25_000_000
    detector = load(STARTER_DIR)
    assert detector.name == "cnn" and detector.calibration is not None and "never seen" in detector.scope
    assert sha256_of(STARTER_DIR / "model.safetensors") in (STARTER_DIR / "MODEL_CARD.md").read_text(encoding="utf-8")
    for name in ("config.json", "certificate.json", "calibration.json", "tokenizer_config.json"):
        assert '"/' not in (STARTER_DIR / name).read_text(encoding="utf-8"), "a path of the machine it was made on"


def test_what_ships_accuses_none_of_the_authentic_portraits() -> None:
    photos = sorted(path for path in PHOTO.parent.iterdir() if path.suffix != ".md")
    found = llava.load(words=False, device="cpu").detect(photos)
    assert len(found) == len(photos) == 4
    labels = {verdict.image: verdict.label for verdict in found}
    assert set(labels.values()) <= {VerdictLabel.REAL, VerdictLabel.UNCERTAIN}, labels


@pytest.mark.parametrize("command", ["detect", "explain"])
def test_what_ships_fills_a_case_file(command: str, tmp_path: Path) -> None:
    assert main([command, str(KNOWN), "--html", str(tmp_path / "case.html")]) == 0
    page = (tmp_path / "case.html").read_text(encoding="utf-8")
    assert "Coverage of real faces, of forged ones" in page and "98 %, 90 %" in page


@pytest.mark.e2e
def test_what_ships_answers_anywhere_and_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("M2F2_CHECKPOINTS", raising=False)
    monkeypatch.setattr(weights, "snapshot_download", None)  # the hub can not be asked
    answers = {}
    for command in ("detect", "explain"):
        assert main([command, str(KNOWN), "--json", "--device", "cpu"]) == 0
        answers[command] = json.loads(capsys.readouterr().out)
    assert answers["explain"]["text"] and answers["detect"]["label"] in ("REAL", "FAKE", "UNCERTAIN")
    assert {name: answers["explain"]["verdict"][name] for name in answers["detect"]} == answers["detect"]


@pytest.mark.e2e
def test_what_ships_writes_no_words_about_a_face_that_it_cannot_judge(tmp_path: Path) -> None:
    strange = tmp_path / "strange.png"
    Image.merge("RGB", Image.open(PHOTO).convert("RGB").split()[::-1]).save(strange)
    pipeline = llava.load(device="cpu")
    answers = list(pipeline.explain_all([strange, KNOWN, strange]))
    assert [bool(answer.text) for answer in answers] == [False, True, False]
    assert answers[0].verdict.reason == UNKNOWN_LOOK and answers[0].verdict.label == VerdictLabel.UNCERTAIN
    assert not pipeline.chat(strange).can_answer and pipeline.chat(KNOWN).can_answer
    engine = BatchingEngine(pipeline)
    try:
        asked = [Turn(role="human", text="Why?")]
        question = Question(image=np.asarray(Image.open(strange)), turns=asked, settings=GenerationSettings())
        first, said = engine.ask(question, Event())
    finally:
        engine.close()
    assert first.verdict is not None and first.evidence_map is not None
    assert said.text == f"No reasons can be given: {UNKNOWN_LOOK}." and parse_verdict(said.text) is None
