"""What a run needs around its computation: a log, devices, randomness, files that appear when complete, its record."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch

log = logging.getLogger(__name__)

T = TypeVar("T")
PACKAGES = (
    *("torch", "torchvision", "transformers", "peft", "accelerate", "deepspeed"),
    *("numpy", "pillow", "opencv-python-headless"),
)


class Incomplete(Exception):
    """A result is there, but not for everything that was asked; the message counts what is missing."""


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and each of a record's `fields` by its key."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the line of a record."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, "fields", {}), ensure_ascii=False)


def log_json() -> None:
    """Write the log as JSON lines from now on."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(JsonLines())


def setup_logging(verbose: bool = False) -> None:
    """Send this package's log to standard error; other ranks only report errors."""
    level = logging.DEBUG if verbose else logging.INFO
    if int(os.environ.get("RANK", "0")) != 0:
        level = logging.ERROR
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    for name in ("llava", "__main__"):  # a module run by `python -m` logs as __main__
        logging.getLogger(name).setLevel(level)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Cut items into lists of `size`, the last one perhaps shorter; nothing is read ahead of a batch."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def pick_device(name: str = "auto") -> torch.device:
    """Resolve `auto` to the first of cuda, mps, cpu. Raises ValueError when the named device is not there."""
    import torch  # here, so that scoring and data tools start without it

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"Device {name!r} is not available here ({error}); use --device auto or cpu.") from None
    return torch.device(name)


def item_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Give the generator of one item: the same on any worker, in any order, after any resume."""
    import numpy as np  # here, so that commands that load no model begin at once

    return np.random.default_rng((seed, epoch, index))


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `target` (file or folder) that is moved into place when the block succeeds."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    staged = scratch / target.name
    try:
        yield staged
        if staged.is_dir() and target.is_dir():
            target.replace(scratch / "old")
        staged.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def give_memory_back() -> None:
    """Return freed memory to the system where the C library keeps it for each thread, as glibc does."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON atomically."""
    with atomic_path(path) as staged:
        staged.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_run(folder: str | Path, config: dict[str, Any], seed: int | None) -> None:
    """Write `run.json` (command, config, git commit, versions, seed) before the first step of a run."""
    write_json(
        Path(folder) / "run.json",
        {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": seed,
            **software(),
            "config": config,
        },
    )


def software() -> dict[str, Any]:
    """Give what a result was computed with: git_commit (None outside a checkout), python, versions by package."""
    return {
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def git_commit() -> str | None:
    """Give the commit of the source tree, `+dirty` when it has changes, None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


class ResumableJsonl:
    """Rows on their way to `path`; until they are complete they lie beside it in `.<name>.partial`.

    identity: everything that the rows depend on. A partial file of another identity is not continued.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        self._head = json.dumps(identity, sort_keys=True)

    def resume(self, batch_sizes: Sequence[int]) -> int:
        """Begin, or take up a partial file; gives how many batches are done. Rows of a cut batch are dropped.

        Whole batches only, so that a resumed run forms the same batches as an unbroken one and writes the same file.
        """
        rows = self._rows()
        done = kept = 0
        for size in batch_sizes:
            if kept + size > len(rows):
                break
            done, kept = done + 1, kept + size
        if kept:
            log.info("continuing %s: %d rows are there", self.partial, kept)
        with atomic_path(self.partial) as staged:
            staged.write_text("".join(f"{line}\n" for line in (self._head, *rows[:kept])), encoding="utf-8")
        return done

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add the rows of one batch; they are on disk when this returns."""
        with self.partial.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> Path:
        """Move the complete rows into place."""
        with atomic_path(self.path) as staged:
            staged.write_text("".join(f"{line}\n" for line in self._rows()), encoding="utf-8")
        self.partial.unlink()
        return self.path

    def _rows(self) -> list[str]:
        """Give the complete lines of a partial file of the same identity."""
        if not self.partial.is_file():
            return []
        head, *rows = self.partial.read_text(encoding="utf-8", errors="replace").split("\n")
        if head != self._head:
            log.warning("%s belongs to another model or other settings; starting afresh", self.partial)
            return []
        return rows[:-1]  # what follows the last line feed was cut off while it was written


def other_settings(folder: Path, settings: Mapping[str, Any], compared: Collection[str]) -> list[str]:
    """Name the settings in which the run of `run.json` differs from this one; none when there was no run."""
    record = folder / "run.json"
    if not record.is_file():
        return []
    old = json.loads(record.read_text(encoding="utf-8")).get("config", {})
    new = json.loads(json.dumps(dict(settings), default=str))
    return [key for key in compared if key in new and old.get(key) != new[key]]


def last_checkpoint(folder: Path) -> Path | None:
    """Give the newest checkpoint that was written to its end; Trainer writes its state last."""
    complete = [p for p in folder.glob("checkpoint-*") if _is_complete(p)]
    return max(complete, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _is_complete(checkpoint: Path) -> bool:
    state = checkpoint / "trainer_state.json"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        log.warning("%s is not complete and is passed over", checkpoint)
        return False
    return True
