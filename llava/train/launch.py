"""Start `train_deepfake.py`: through the deepspeed launcher with ZeRO-2 on GPUs or on request, else in this process."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from llava.core.logs import setup_logging

log = logging.getLogger(__name__)
ENTRY = Path(__file__).with_name("train_deepfake.py")
LAUNCHER_FLAGS = ("include", "exclude", "num_gpus", "num_nodes", "master_port", "master_addr", "hostfile")


def default_recipe(stage: str) -> Path:
    """Give the full-size recipe of a stage."""
    return Path("scripts/configs") / f"stage_{stage}" / "m2f2.yaml"


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the deepspeed launcher's flags from the training's."""
    launcher: list[str] = []
    training: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, _ = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in LAUNCHER_FLAGS:
            launcher.append(word)
            if not equals:
                launcher.append(next(words, ""))
        else:
            training.append(word)
    return launcher, training


def command(argv: Sequence[str], zero: Path) -> list[str]:
    """Build the launcher's command line for these flags. Raises FileNotFoundError when deepspeed is missing."""
    launcher, training = split_flags(argv)
    deepspeed = Path(sys.executable).with_name("deepspeed")
    found = str(deepspeed) if deepspeed.exists() else shutil.which("deepspeed")
    if found is None:
        raise FileNotFoundError(
            "The deepspeed launcher is not installed; install the extra: pip install 'm2f2-det[train]'."
        )
    if not any(word.split("=")[0] == "--deepspeed" for word in training):
        training = ["--deepspeed", str(zero), *training]
    return [found, *launcher, str(ENTRY), *training]


def run(stage: str, argv: Sequence[str], zero: Path = Path("scripts/zero2.json")) -> int:
    """Train stage 2 or 3 with these flags (its full recipe unless --config says otherwise); gives the exit code."""
    if stage not in ("2", "3"):
        raise ValueError(f"Stage {stage!r} is not trained here; allowed: 2, 3.")
    if not any(word.split("=")[0] == "--config" for word in argv):
        argv = ["--config", str(default_recipe(stage)), *argv]
    launcher, training = split_flags(argv)
    if not launcher and not torch.cuda.is_available():
        from llava.train import train_deepfake  # here, because transformers takes seconds to load

        return train_deepfake.main(training)
    words = command(argv, zero)
    log.info("starting %s", " ".join(words))
    return subprocess.run(words, check=False).returncode


if __name__ == "__main__":
    setup_logging()
    raise SystemExit(run(sys.argv[1], sys.argv[2:]))
