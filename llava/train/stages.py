"""Stages 2 and 3 as whole steps: merge, train, merge (`python -m llava.train.stages 2 --config RECIPE`)."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.core.config import build, read_values
from llava.core.logs import setup_logging
from llava.explainer.merge import merge_delta, merge_detector
from llava.train.arguments import ExplainArguments, MergeConfig, translate
from llava.train.launch import default_recipe, run, split_flags

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run stage 2 or 3; gives the exit code."""
    setup_logging()
    stage, *rest = sys.argv[1:] if argv is None else list(argv)
    try:
        if stage not in ("2", "3"):
            raise ValueError(f"Stage {stage!r} is not here; allowed: 2, 3 (stage 1: llava.train.stage_1).")
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
