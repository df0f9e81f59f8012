"""Stages 2 and 3 through their scripts, in real processes: they learn, resume exactly, ZeRO-2 equals one process.

A run that is not killed may be started by a Python that has loaded the large packages (`forked.py`).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from tiny_world import draw, train_detector, write_world

from llava.core.config import build, load_yaml, parse
from llava.core.types import Turn
from llava.evaluation.text import parse_verdict
from llava.explainer.generation import Explainer, load_model, load_processor
from llava.train.arguments import ExplainArguments, translate
from llava.train.explain import DetectorInFloat32, balanced_rows
from llava.train.stages import split_flags
from llava.train.tiny_base import TinyBaseConfig, make_tiny_base

ROOT = Path(__file__).parents[1]
SMALL = [
    *("--bf16", "false", "--tf32", "null", "--per_device_train_batch_size", "16", "--warmup_steps", "0.03"),
    *("--dataloader_num_workers", "0", "--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "true"),
]
TUNING = ["--num_train_epochs", "3", "--learning_rate", "1e-3", "--lora_r", "8"]
SAVING = ["--save_steps", "4", "--save_total_limit", "9", "--lora_dropout", "0.1"]
ENVIRONMENT = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
ASK = [Turn(role="human", text="Determine the authenticity of this image.")]


def run(*words: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    done = forked.run_shell(words, ROOT, timeout=1800, OMP_NUM_THREADS="1", **environment)
    assert not check or done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [row["loss"] for row in history if "loss" in row]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the whole chain: detector, tiny base, stage 2, stage 3."""
    folder = tmp_path_factory.mktemp("stages")
    conversations = write_world(folder)
    train_detector(folder / "detector")
    make_tiny_base(
        TinyBaseConfig(
            data=[str(conversations)],
            image_folder=str(folder / "images"),
            detector=str(folder / "detector"),
            out=str(folder / "base"),
            vocab_size=420,
            hidden_size=64,
            layers=2,
            heads=4,
            steps=100,
            lr=3e-3,
        )
    )
    data = ["--data_path", str(conversations), "--image_folder", str(folder / "images")]
    merge = ["--merge.base", str(folder / "base/model"), "--merge.detector", str(folder / "detector")]
    out = ["--merge.start", str(folder / "start"), "--output_dir", str(folder / "delta_2")]
    fast = ["--num_train_epochs", "8", "--learning_rate", "1e-2"]
    run("bash", "stage_2_train.sh", *merge, *out, *data, *SMALL, *fast)
    merge = ["--merge.base_of_delta", str(folder / "start"), "--merge.delta", str(folder / "delta_2")]
    out = ["--merge.start", str(folder / "stage_2"), "--merge.final", str(folder / "final")]
    out += ["--output_dir", str(folder / "delta_3"), "--lora_alpha", "16"]
    run("bash", "stage_3_train.sh", *merge, *out, *data, *SMALL, *TUNING, *SAVING)
    return folder


def verdicts(folder: Path, p_fake: float | None) -> list[int | None]:
    model = load_model(folder)
    explainer = Explainer(model, load_processor(folder, model))
    encoded = explainer.encode([draw(i % 2, 500 + i) for i in range(20)])
    evidence = None if p_fake is None else torch.tensor([[1 - p_fake, p_fake]] * 20)
    return [parse_verdict(text) for text in explainer.answer(encoded, [ASK] * 20, evidence=evidence)]


@pytest.mark.e2e
def test_the_words_learn_to_follow_the_evidence(world: Path) -> None:
    told_real, told_fake = (verdicts(world / "start", p_fake) for p_fake in (0.02, 0.98))
    assert told_real.count(0) < 18 or told_fake.count(1) < 18, "before stage 2 words do not follow the evidence"
    for folder in ("stage_2", "final"):
        assert verdicts(world / folder, 0.02).count(0) >= 18
        assert verdicts(world / folder, 0.98).count(1) >= 18
    own = verdicts(world / "final", None)
    assert sum(said == i % 2 for i, said in enumerate(own)) >= 18
    certificate = json.loads((world / "final/certificate.json").read_text(encoding="utf-8"))
    assert certificate["max_delta_logit"] <= 1e-4
    assert (world / "delta_3/run.json").is_file()


def stage_3_flags(world: Path, out: Path, model: str = "stage_2") -> list[str]:
    return [
        *("--model_name_or_path", str(world / model), "--data_path", str(world / "conversations.json")),
        *("--image_folder", str(world / "images"), "--output_dir", str(out), *SMALL, *TUNING),
    ]


def kill(words: list[str], checkpoint: Path) -> None:
    """Start a run and kill it, and all that it started, once it has written a checkpoint."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, **quiet)
    wait_for(checkpoint / "trainer_state.json", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (checkpoint.parent / "trainer_state.json").exists()


def require_the_same(whole: Path, broken: Path) -> None:
    assert len(losses(whole)) == 18
    assert losses(broken) == pytest.approx(losses(whole), abs=1e-6)
    for name in ("adapter_model.safetensors", "non_lora_trainables.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


@pytest.mark.e2e
def test_a_killed_run_goes_on_as_if_nothing_had_happened(world: Path, tmp_path: Path) -> None:
    script = ["bash", "scripts/finetune_stage_3.sh"]
    words = [*stage_3_flags(world, tmp_path / "out"), *SAVING, "--lora_alpha", "16"]
    kill([*script, *words], tmp_path / "out" / "checkpoint-8")
    for later in (tmp_path / "out").glob("checkpoint-1*"):  # written before the signal came
        shutil.rmtree(later)
    (tmp_path / "out/checkpoint-8/trainer_state.json").unlink()  # as if killed while saving
    done = run(*script, *words, "--model_name_or_path", str(world / "start"), check=False)
    assert done.returncode != 0 and "holds a run with another model or data file" in done.stderr
    assert "checkpoint-8 is not complete and is passed over" in done.stderr
    run(*script, *words)
    require_the_same(world / "delta_3", tmp_path / "out")


@pytest.fixture(scope="module")
def two_processes(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Run stage 3 by ZeRO-2 on two processes; gives the command, without its output folder, and that folder."""
    out = tmp_path_factory.mktemp("two_processes") / "whole"
    words = ["bash", "scripts/finetune_stage_3.sh", "--num_gpus", "2", "--master_port", "29941"]
    words += [*stage_3_flags(world, out), *SAVING, "--per_device_train_batch_size", "8"]
    run(*words)
    return words, out


@pytest.mark.e2e
def test_a_killed_run_of_two_processes_goes_on_likewise(two_processes: tuple[list[str], Path], tmp_path: Path) -> None:
    words, whole = two_processes
    words = [*words, "--output_dir", str(tmp_path / "broken")]
    kill(words, tmp_path / "broken" / "checkpoint-8")
    run(*words)
    require_the_same(whole, tmp_path / "broken")


@pytest.mark.e2e
def test_zero_2_in_bf16_leaves_the_detector_in_float32(world: Path, tmp_path: Path) -> None:
    halves = ["--num_gpus", "2", "--master_port", "29942", "--per_device_train_batch_size", "8"]
    short = ["--bf16", "true", "--max_steps", "2", "--save_strategy", "no"]
    words = ["bash", "scripts/finetune_stage_3.sh", *stage_3_flags(world, tmp_path / "out"), *halves, *short]
    run(*words, TORCH_EXTENSIONS_DIR=str(tmp_path / "compiled"))
    assert not (tmp_path / "compiled").exists(), "DeepSpeed compiles what training does not use"
    assert len(losses(tmp_path / "out")) == 2 and all(0 < loss < 3 for loss in losses(tmp_path / "out"))
    model = load_model(world / "stage_2", dtype="bf16")
    kept = DetectorInFloat32(model)
    exact = model.detector.classifier.weight.clone()
    model.bfloat16()
    kept.on_train_begin(None, None, None)
    assert torch.equal(model.detector.classifier.weight, exact)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    for _ in range(12000):
        if path.exists():
            return
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


@pytest.mark.e2e
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_2_on_two_processes_equals_one(world: Path, tmp_path: Path, stage: int) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    model = "start" if stage == 2 else "stage_2"
    script = ["bash", f"scripts/finetune_stage_{stage}.sh"]
    common = ["--save_strategy", "no", "--lora_dropout", "0", "--num_train_epochs", "1"]
    run(*script, *stage_3_flags(world, one, model), *common)
    halves = ["--num_gpus", "2", "--master_port", str(29900 + stage), "--per_device_train_batch_size", "8"]
    run(*script, *stage_3_flags(world, two, model), *common, *halves)
    assert len(losses(one)) == 6
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)


def test_published_flags_are_accepted_mapped_or_refused() -> None:
    published = "--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --version v1 --bf16 False "
    published += "--model_name_or_path m --data_path d --image_folder i --vision_tower v --deepfake_ckpt_path k "
    published += "--tune_mm_mlp_adapter True --tune_deepfake_mlp_adapter True --mm_projector_type mlp2x_gelu "
    published += "--mm_vision_select_layer -2 --mm_vision_select_feature cls_patch --mm_use_im_start_end False "
    published += "--mm_use_im_patch_token False --output_dir o --num_train_epochs 10 --evaluation_strategy no "
    published += "--save_strategy steps --save_steps 1200 --save_total_limit 1 --learning_rate 2e-5 "
    published += "--weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 "
    published += "--model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 "
    published += "--lazy_preprocess True --report_to none"
    words = list(translate(published.split()))
    values = {words[i][2:]: words[i + 1] for i in range(0, len(words), 2)}
    arguments = build(ExplainArguments, values)
    assert (arguments.lora_r, arguments.mm_projector_lr, arguments.warmup_steps) == (128, 2e-5, 0.03)
    assert arguments.eval_strategy == "no"
    assert arguments.activation_checkpointing is True
    with pytest.raises(ValueError, match="--group_by_modality_length is not accepted: every record has an image"):
        list(translate(["--group_by_modality_length", "True"]))


def test_balanced_rows_hold_everything_and_both_classes_equally() -> None:
    labels = [1, 1, 0, 1, 1, 1, 0, 1]
    rows = balanced_rows(labels)
    assert set(rows) == set(range(8))
    assert sorted(labels[i] for i in rows) == [0] * 6 + [1] * 6
    assert [rows.count(i) for i in (2, 6)] == [3, 3]
    assert balanced_rows([0, 1]) == [0, 1]
    for bad in ([1, 1], [0, 1, None]):
        with pytest.raises(ValueError, match="--balance_classes False"):
            balanced_rows(bad)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_arguments_of_the_fixtures_parse(shared_data: Path, stage: int) -> None:
    path = shared_data.parent / "golden" / "dev" / f"train_stage{stage}" / "manifest.json"
    if not path.is_file():
        pytest.skip("the golden fixtures are not beside the face data")
    words = json.loads(path.read_text(encoding="utf-8"))["argv"]
    valued = []
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        valued += [word, "x"] if word.startswith("--") and following.startswith("--") else [word]
    arguments = parse(ExplainArguments, list(translate(valued)))
    assert arguments.tune_deepfake_mlp_adapter and arguments.mm_vision_select_layer == -2
    assert arguments.lora_enable == (stage == 3)


def test_impossible_flags_are_refused() -> None:
    with pytest.raises(ValueError, match="--mm_vision_select_feature patch: only cls_patch"):
        build(ExplainArguments, {"output_dir": "o", "mm_vision_select_feature": "patch"})
    with pytest.raises(ValueError, match="leave --freeze_backbone True"):
        build(ExplainArguments, {"output_dir": "o", "lora_enable": "true", "freeze_backbone": "false"})
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--tf32 True needs a GPU, and here is none; give --tf32 False"):
            build(ExplainArguments, {"output_dir": "o", "tf32": "true", "bf16": "false"})


def test_launcher_flags_are_told_apart() -> None:
    launcher, training = split_flags(["--include", "localhost:0,1", "--lora_r", "8", "--master_port=29801"])
    assert launcher == ["--include", "localhost:0,1", "--master_port=29801"]
    assert training == ["--lora_r", "8"]


@pytest.mark.parametrize("path", sorted((ROOT / "scripts/configs").glob("stage_[23]/*.yaml")), ids=str)
def test_every_recipe_parses(path: Path, tmp_path: Path) -> None:
    values = load_yaml(path) | {"bf16": False, "tf32": None, "model_name_or_path": "m"}
    arguments = build(ExplainArguments, values)
    assert arguments.tune_deepfake_mlp_adapter
    assert arguments.merge.start
