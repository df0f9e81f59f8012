"""Atomic files, item randomness, devices and the run record."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from llava.core import runtime
from llava.core.runtime import (
    JsonLines,
    atomic_path,
    git_commit,
    item_rng,
    pick_device,
    setup_logging,
    write_json,
    write_run,
)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with atomic_path(target) as staged:
        staged.write_text("half")
        assert not target.exists()
        staged.write_text("whole")
    assert target.read_text() == "whole" and names(target.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_block_keeps_the_old_file_and_leaves_nothing_behind(tmp_path: Path, error: type) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as staged:
        staged.write_text("new")
        raise error
    assert target.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("first", "second"):
        with atomic_path(target) as staged:
            staged.mkdir()
            (staged / f"{content}.txt").write_text(content)
    assert names(target) == ["second.txt"]
    with pytest.raises(RuntimeError), atomic_path(target) as staged:
        staged.mkdir()
        (staged / "third.txt").write_text("third")
        raise RuntimeError
    assert names(target) == ["second.txt"] and names(tmp_path) == ["model"]


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_old(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "model"):
        pass
    assert names(tmp_path / "model") == ["old.txt"]


def test_a_kill_in_the_middle_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    code = (
        "import time; from llava.core.runtime import atomic_path\n"
        f"with atomic_path({str(target)!r}) as staged:\n"
        "    staged.write_text('half'); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert target.read_text() == "old"


def test_what_is_written_is_as_readable_as_any_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "a.json", {"ü": [1]})
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "ü": [\n    1\n  ]\n}\n'


def test_an_item_has_its_own_randomness() -> None:
    keys = [(seed, epoch, index) for seed in range(4) for epoch in range(4) for index in range(64)]
    draws = {key: item_rng(*key).random(8) for key in keys}
    np.random.seed(0)
    for key in reversed(keys):  # in another order, with the global generator disturbed
        np.testing.assert_array_equal(item_rng(*key).random(8), draws[key])
    table = np.array([draws[key] for key in keys])
    assert len(np.unique(table[:, 0])) == len(keys)
    correlation = np.corrcoef(table.T)
    assert np.abs(correlation - np.eye(8)).max() < 4 / np.sqrt(len(keys))
    assert abs(table.mean() - 0.5) < 4 * np.sqrt(1 / 12 / table.size)


def test_the_global_generators_are_left_alone() -> None:
    before = np.random.get_state()[1].copy()
    item_rng(1, 2, 3).random(100)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cuda", "mps", "cpu")
    for name in ("cuda:99", "gpu"):
        with pytest.raises(ValueError, match=f"Device '{name}' is not available here .* use --device auto or cpu"):
            pick_device(name)


def test_a_run_says_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py", "--lr", "1"])
    before = time.time()
    write_run(tmp_path / "run", {"lr": 1.0}, seed=3)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["command"] == ["train.py", "--lr", "1"]
    assert (record["config"], record["seed"]) == ({"lr": 1.0}, 3)
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record["git_commit"] == git_commit()
    started = time.mktime(time.strptime(record["started"], "%Y-%m-%dT%H:%M:%S+00:00")) - time.timezone
    assert abs(started - before) < 5


def test_the_commit_is_the_one_of_the_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    module = tmp_path / "llava" / "core" / "runtime.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(runtime, "__file__", str(module))
    assert git_commit() is None
    git("init", "-q")
    module.write_text("1")
    git("add", "-A")
    git("commit", "-qm", "first")
    assert git_commit() == git("rev-parse", "HEAD")
    module.write_text("2")
    assert git_commit() == git("rev-parse", "HEAD") + "+dirty"


@pytest.mark.parametrize(("rank", "level"), [("0", logging.INFO), ("1", logging.ERROR)])
def test_rank_0_speaks(rank: str, level: int) -> None:
    code = "import logging; from llava.core.runtime import setup_logging as s; s(); l = logging.getLogger('llava.x')\n"
    code += "print(l.getEffectiveLevel()); l.info('hello'); logging.getLogger('other').info('noise')"
    environment = {**os.environ, "RANK": rank}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == level
    assert ("hello" in done.stderr) is (rank == "0") and "noise" not in done.stderr


def test_verbose_logging_is_debug_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    setup_logging(verbose=True)
    assert logging.getLogger("llava.x").isEnabledFor(logging.DEBUG)
    setup_logging()
    assert not logging.getLogger("llava.x").isEnabledFor(logging.DEBUG)


def test_the_log_may_be_json(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("llava.test")
    with caplog.at_level(logging.INFO, logger="llava.test"):
        log.info("asked %d", 1, extra={"fields": {"id": "abc", "status": 200}})
        try:
            raise ValueError("two\nlines")
        except ValueError:
            log.exception("failed")
    asked, failed = (json.loads(line) for line in map(JsonLines().format, caplog.records))
    assert asked["message"] == "asked 1" and (asked["id"], asked["status"], asked["level"]) == ("abc", 200, "INFO")
    assert asked["time"].endswith("+00:00") and failed["exception"].endswith("ValueError: two\nlines")
