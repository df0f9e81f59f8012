"""What a run needs around its computation: devices, randomness, atomic files and the run record."""

from __future__ import annotations

import ctypes
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
PACKAGES = (
    *("torch", "torchvision", "transformers", "peft", "accelerate", "deepspeed"),
    *("numpy", "pillow", "opencv-python-headless"),
)


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
