"""`m2f2 ablate`: what a plan says, what is refused before anything runs, and real small runs, one of them stopped."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml

from llava import cli
from llava.core.config import to_dict
from llava.core.runtime import last_checkpoint, write_run
from llava.detectors.base import load
from llava.train.experiments import AblateConfig, ablate, ending, read_plan, recipe_of, runs_of, steps_of, train_apart

ROOT = Path(__file__).resolve().parents[1]
BASE: dict[str, Any] = {
    "detector": "cnn",
    "model": {"backbone": "conv_tiny", "image_size": 64, "width": 16},
    "batch_size": 4,
    "workers": 0,
    "precision": "fp32",
    "near_duplicates": False,
    "resamples": 10,
    "calibration": None,
    "collapse": {"min_sd": 0.0, "min_recall": 0.0},
}


def write_plan(folder: Path, **changes: Any) -> str:
    """Write a plan of two variants and two seeds, and its base recipe; gives the plan's path."""
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    plan = {
        "recipe": str(folder / "base.yaml"),
        "shared": {"data": {"path": str(folder / "faces")}, "steps": 4, "eval_steps": 2},
        "variants": {"plain": None, "wide": {"model": {"width": 24}}},
        "seeds": [100, 101],
        "output_dir": str(folder / "runs"),
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan | changes))
    return str(folder / "plan.yaml")


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the trainings be forks of a process that has loaded the large packages."""
    forked.run(["-m", "llava.cli", "--version"], check=True)  # it is there before its Python has another name
    monkeypatch.setenv("FORKED_BY", sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "executable", str(forked.PYTHON))


# ---- what a plan says -------------------------------------------------------------------------------------------


def test_a_plan_gives_a_run_for_each_variant_and_seed(class_folder: Path) -> None:
    runs = runs_of(read_plan(AblateConfig(plan=write_plan(class_folder.parent))))
    assert [run.name for run in runs] == ["plain/seed_100", "plain/seed_101", "wide/seed_100", "wide/seed_101"]
    assert [run.recipe.seed for run in runs] == [100, 101, 100, 101]
    assert all(run.folder == class_folder.parent / "runs" / run.name for run in runs)
    assert runs[0].weights == runs[1].weights < runs[2].weights
    assert runs[2].recipe.model == {**BASE["model"], "width": 24} and runs[2].recipe.steps == 4


def test_a_variant_may_name_another_recipe_and_reach_into_phases(class_folder: Path) -> None:
    folder = class_folder.parent
    other = BASE | {"model": {"backbone": "conv_tiny", "image_size": 32}, "phases": [{"epochs": 3}, {"name": "b"}]}
    (folder / "other.yaml").write_text(yaml.safe_dump(other))
    (folder / "over.yaml").write_text("batch_size: 7\n")
    plan = read_plan(
        AblateConfig(plan=write_plan(folder, recipe=[str(folder / "base.yaml"), str(folder / "over.yaml")]))
    )
    found = recipe_of(plan, {"recipe": str(folder / "other.yaml"), "phases.1.steps": 9, "optim": {"lr": 0.5}})
    assert [phase.steps for phase in found.phase_list()] == [4, 9] and found.model["image_size"] == 32
    assert (found.batch_size, found.optim.lr, found.data.path) == (4, 0.5, str(class_folder))  # type: ignore[union-attr]
    assert recipe_of(plan, {}).batch_size == 7 and recipe_of(plan, {}).optim.lr != 0.5


def test_the_command_line_lies_over_the_shared_settings(class_folder: Path, tmp_path: Path) -> None:
    words = {"data": {"path": "elsewhere"}, "steps": "7"}
    plan = read_plan(AblateConfig(plan=write_plan(tmp_path), shared=words, output_dir="out"))
    recipe = recipe_of(plan, {})
    assert (recipe.data.path, recipe.steps, recipe.eval_steps, plan.output_dir) == ("elsewhere", 7, 2, "out")  # type: ignore[union-attr]


def test_the_plan_that_comes_along_has_working_recipes(class_folder: Path) -> None:
    data = {"data": {"path": str(class_folder)}}
    plan = read_plan(AblateConfig(plan=str(ROOT / "scripts/configs/experiments/radar.yaml"), shared=data))
    runs = runs_of(plan)
    assert len(runs) == 48 and {run.recipe.steps for run in runs} == {400}
    assert {run.recipe.detector for run in runs} == {"radar", "baseline"}
    recipes = [json.dumps(to_dict(run.recipe) | {"output_dir": ""}) for run in runs]
    assert len(set(recipes)) == 48, "each variant changes something"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"variants": {"a": {}, "b": {"optim": {"lrr": 1}}}},
            "variants.b: Unknown setting 'optim.lrr'.*Did you mean 'lr'",
        ),
        (
            {"variants": {"a": {"model": {"widht": 1}}}},
            "variants.a: Unknown setting 'model.widht'.*Did you mean 'width'",
        ),
        ({"variants": {"a": {"model": {"backbone": "conv_tyni"}}}}, "variants.a: .*conv_tyni"),
        ({"variants": {"a": {"seed": 3}}}, "variants.a: 'seed' is set by the plan"),
        ({"variants": {"a": {"recipe": "no.yaml"}}}, "variants.a: Recipe 'no.yaml' does not exist"),
        ({"variants": {"a": {"phases": [{"seed": 3}]}}}, "variants.a: A phase has a seed of its own"),
        ({"variants": {"a": {"data": {"path": "nowhere"}}}}, "variants.a: .*nowhere"),
        ({"variants": {"../a": {}}}, "variants: '../a' is no name of a folder"),
        ({"variants": {}}, r"variants: \[\] is not usable"),
        ({"seeds": [1, 1]}, r"seeds: \[1, 1\] is not usable"),
        ({"shared": {"eval_steps": 2}}, "states no budget"),
        ({"varants": {}}, "Unknown setting 'varants'.*Did you mean 'variants'"),
    ],
)
def test_a_mistake_is_refused_before_anything_runs(changes: dict[str, Any], message: str, class_folder: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ablate(AblateConfig(plan=write_plan(class_folder.parent, **changes)))
    assert not (class_folder.parent / "runs").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"only": ("wid",)}, "--only: 'wid' is not in the plan.*Did you mean 'wide'"),
        ({"seeds": (7,)}, "--seeds: '7' is"),
    ],
)
def test_only_what_is_in_the_plan_can_be_asked_for(asked: dict[str, Any], message: str, class_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ablate(AblateConfig(plan=write_plan(class_folder.parent), **asked))


def test_a_changed_plan_is_refused_with_what_differs(class_folder: Path) -> None:
    folder = class_folder.parent
    run = runs_of(read_plan(AblateConfig(plan=write_plan(folder))))[2]
    write_run(run.folder, to_dict(run.recipe), run.recipe.seed)  # as stage 1 begins
    with pytest.raises(ValueError, match=r"wide/seed_100 was begun with .* now has: model.width: 24 -> 32\. Give"):
        ablate(AblateConfig(plan=write_plan(folder, variants={"wide": {"model": {"width": 32}}})))
    with pytest.raises(ValueError, match=r": steps: 4 -> 5\. Give"):
        ablate(AblateConfig(plan=write_plan(folder), shared={"steps": "5"}))
    longer = write_plan(
        folder, seeds=[100, 101, 102], variants={"wide": {"model": {"width": 24}}, "more": {"workers": 1}}
    )
    assert len(runs_of(read_plan(AblateConfig(plan=longer, shared={"resamples": 20})))) == 6


def test_phases_that_do_not_keep_the_budget_are_told(class_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    variants = {"long": {"phases": [{"name": "first", "steps": 9}, {"name": "fit", "kind": "fit", "parts": []}]}}
    values = {"data": {"path": str(class_folder)}, "epochs": 3}
    runs_of(read_plan(AblateConfig(plan=write_plan(class_folder.parent, variants=variants, shared=values))))
    told = "variant 'long', phase 'first': trains 9 steps by settings of its own, the plan says 3 epochs"
    assert [record.message for record in caplog.records if "the plan says" in record.message] == [told]


@pytest.mark.parametrize(
    ("said", "code", "expected"),
    [
        ("", 0, ("finished", "")),
        ("12:00:00 ERROR llava.train.stage_1: It has collapsed.\nleaked", 1, ("collapsed", "It has collapsed.")),
        ("12:00:00 ERROR llava.train.stage_1: No path.\n", 2, ("failed", "No path.")),
        ("Traceback\nRuntimeError: odd\n", 1, ("failed", "RuntimeError: odd")),
        ("step 3\n", -9, ("failed", "ended by SIGKILL; SIGKILL may mean that memory ran out")),
        ("", 7, ("failed", "exit code 7")),
    ],
)
def test_the_reason_of_an_end_is_in_the_log(said: str, code: int, expected: tuple[str, str]) -> None:
    assert ending(said, code) == expected


# ---- real runs --------------------------------------------------------------------------------------------------


@pytest.mark.e2e
def test_a_stopped_plan_goes_on_and_what_is_finished_stays(
    class_folder: Path, forks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = class_folder.parent
    shared = {"data": {"path": str(class_folder)}, "steps": 60, "eval_steps": 2}
    plan, first = write_plan(folder, shared=shared), folder / "runs" / "plain" / "seed_100"
    with (folder / "said.txt").open("w") as said:
        process = forked.Forked(["-m", "llava.cli", "ablate", plan], said, said, env=dict(os.environ))
        while process.poll() is None and last_checkpoint(first / "phases" / "0") is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert "waiting" in (folder / "said.txt").read_text()
    stopped = json.loads((first / "outcome.json").read_text())
    assert stopped["state"] == "stopped" and not (first / "metrics.json").exists()

    assert cli.main(["ablate", plan, "--seeds", "100"]) == 0
    out = capsys.readouterr().out
    assert "[2/2] wide/seed_100: finished, test AUC " in out and out.count(" waiting ") == 2
    assert "going on from" in (first / "log.txt").read_text()
    rows = json.loads((folder / "runs" / "runs.json").read_text())
    assert [row["state"] for row in rows] == ["finished", "waiting"] * 2
    assert rows[0]["steps"] == steps_of(first) == 60 and rows[0]["minutes"] >= stopped["minutes"]
    assert rows[2]["weights"] == sum(p.numel() for p in load(folder / "runs" / "wide" / "seed_100").parameters())

    (first / "model.safetensors").touch()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/seed_100/*")}
    assert cli.main(["ablate", plan]) == 0
    assert times and {path: path.stat().st_mtime_ns for path in times} == times, "finished runs are left alone"
    plain = [json.loads((folder / "runs" / "plain" / f"seed_{s}" / "metrics.json").read_text()) for s in (100, 101)]
    assert plain[0]["plain_images"] != plain[1]["plain_images"], "seeds differ"


@pytest.mark.e2e
def test_a_run_that_collapses_or_fails_is_written_down_and_the_others_go_on(
    class_folder: Path, forks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = class_folder.parent
    variants = {
        "flat": {"optim": {"lr": 0.0}, "collapse": {"min_sd": 0.4, "grace_epochs": 0}},
        "odd": {"init_from": str(folder / "nothing")},
        "plain": {},
    }
    plan = write_plan(folder, variants=variants, seeds=[100])
    assert cli.main(["ablate", plan]) == 1
    captured = capsys.readouterr()
    assert "2 of 3 runs gave no detector: flat/seed_100, odd/seed_100." in captured.err
    states = {row["variant"]: row for row in json.loads((folder / "runs" / "runs.json").read_text())}
    assert [row["state"] for row in states.values()] == ["collapsed", "failed", "finished"]
    assert "has collapsed" in states["flat"]["reason"] and "nothing" in states["odd"]["reason"]
    assert states["odd"]["reason"] in captured.out and "[3/3] plain/seed_100: finished" in captured.out
    log = (folder / "runs" / "flat" / "seed_100" / "log.txt").read_text()
    assert cli.main(["ablate", plan, "--only", "flat"]) == 1, "a collapse would come again"
    assert (folder / "runs" / "flat" / "seed_100" / "log.txt").read_text() == log


def test_a_run_that_another_process_trains_is_left_to_it(class_folder: Path) -> None:
    import fcntl

    run = runs_of(read_plan(AblateConfig(plan=write_plan(class_folder.parent))))[0]
    run.folder.mkdir(parents=True)
    with (run.folder / "log.txt").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="plain/seed_100 is being trained by another process"):
            train_apart(run)
    assert not (run.folder / "outcome.json").exists()
