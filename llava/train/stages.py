"""Stages 2 and 3 as whole steps: merge, train (through deepspeed where asked), merge."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from llava.core.config import build, read_values
from llava.core.runtime import setup_logging
from llava.explainer.merge import merge_delta, merge_detector
from llava.train.arguments import ExplainArguments, MergeConfig, translate

log = logging.getLogger(__name__)

ENTRY = "llava.train.explain"  # a module, because a script would put its folder in front of all imports
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
    if find_spec("deepspeed") is None:
        raise FileNotFoundError(
            "The deepspeed launcher is not installed; install the extra: pip install 'm2f2-det[train]'."
        )
    if not any(word.split("=")[0] == "--deepspeed" for word in training):
        training = ["--deepspeed", str(zero), *training]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *launcher, "--module", ENTRY, *training]


def run(stage: str, argv: Sequence[str], zero: Path = Path("scripts/zero2.json")) -> int:
    """Train stage 2 or 3 with these flags (its full recipe unless --config says otherwise); gives the exit code."""
    if not any(word.split("=")[0] == "--config" for word in argv):
        argv = ["--config", str(default_recipe(stage)), *argv]
    launcher, training = split_flags(argv)
    if not launcher and not torch.cuda.is_available():
        from llava.train import explain  # here, because transformers takes seconds to load

        return explain.main(training)
    words = command(argv, zero)
    log.info("starting %s", " ".join(words))
    return subprocess.run(words, check=False).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Run stage 2 or 3 with its merges, or its training alone (finetune_2, finetune_3); gives the exit code."""
    setup_logging()
    stage, *rest = sys.argv[1:] if argv is None else list(argv)
    try:
        if stage in ("finetune_2", "finetune_3"):
            return run(stage[-1], rest)
        if stage not in ("2", "3"):
            raise ValueError(
                f"Stage {stage!r} is not here; allowed: 2, 3, finetune_2, finetune_3 (stage 1: llava.train.stage_1)."
            )
        values, merging = read_stage(rest, default_recipe(stage), stage)
        return {"2": stage_2, "3": stage_3}[stage](values, merging, rest)
    except (ValueError, FileNotFoundError) as error:
        log.error("stage %s: %s", stage, error)
        return 2


def read_stage(argv: Sequence[str], recipe: Path, stage: str) -> tuple[dict[str, Any], MergeConfig]:
    """Read recipe and flags as plain values, and the merges typed. Raises ValueError naming what is missing."""
    parser = argparse.ArgumentParser(prog=f"stage_{stage}_train.sh", description=__doc__, allow_abbrev=False)
    values = read_values(ExplainArguments, list(translate(split_flags(argv)[1])), parser, recipe)
    merging = build(MergeConfig, values.get("merge", {}), where="merge")
    for name in ("data_path", "output_dir"):
        if not values.get(name):
            raise ValueError(f"--{name} is missing; give it as a flag or in the recipe.")
    if not Path(values["data_path"]).is_file():
        raise FileNotFoundError(
            f"--data_path {values['data_path']!r} does not exist; `m2f2 data ddvqa` writes such files."
        )
    return values, merging


def stage_2(values: dict[str, Any], merging: MergeConfig, argv: Sequence[str]) -> int:
    """Merge the detector into the base, then train the adapter alone."""
    if not merging.base or not merging.start:
        raise ValueError("--merge.base (a LLaVA) and --merge.start (the merged folder) are needed for stage 2.")
    merge_detector(
        merging.base,
        merging.detector,
        Path(merging.start),
        seed=int(values.get("seed", 42)),
        evidence_tokens=merging.evidence_tokens,
        layout=values.get("version") or "v1",
    )
    return run("2", [*argv, "--model_name_or_path", merging.start])


def stage_3(values: dict[str, Any], merging: MergeConfig, argv: Sequence[str]) -> int:
    """Fold the stage-2 delta into its base, tune with LoRA, fold LoRA into the finished explainer."""
    if not (merging.base_of_delta and merging.delta and merging.start and merging.final):
        raise ValueError(
            "--merge.base_of_delta, --merge.delta, --merge.start and --merge.final are needed for stage 3."
        )
    merge_delta(merging.base_of_delta, merging.delta, Path(merging.start))
    code = run("3", [*argv, "--model_name_or_path", merging.start])
    if code == 0:
        merge_delta(merging.start, values["output_dir"], Path(merging.final))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
