"""Convert published LLaVA-1.5 and detector weights into this project's layout, with a report on every tensor.

What it takes: a LLaVA-1.5 or merged M2F2-Det folder (or hub id), a detector file (M2F2-Det, three-class ViT, RADAR) or
vision_tower.pth, and with --model_base the output folder of the published stage 2 or 3.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from llava.core.config import parse, setting
from llava.core.runtime import setup_logging
from llava.core.tensor_files import Plan, TensorFiles
from llava.core.weights import resolve
from llava.detectors.m2f2det_published import TOWER_PREFIX, PublishedTower, read_clip_config
from llava.detectors.published import PublishedFile, Unseen, layout_of
from llava.explainer.convert import PublishedDelta, PublishedFolder, ready

log = logging.getLogger("convert_m2f2")
Published: TypeAlias = PublishedFile | PublishedTower | PublishedFolder | PublishedDelta


@dataclass(frozen=True, kw_only=True)
class Options:
    """Command line of this script."""

    model_path: str = setting(help="published weights: a folder, a hub id, or a .pth file")
    save_path: str = setting("", "folder for the converted copy; may be left out with --dry_run")
    model_base: str | None = setting(None, "the explainer that a stage-2 or stage-3 output belongs to")
    vision_tower: str | None = setting(
        None, "CLIP vision tower for weights without one: vision_tower.pth, a CLIP folder or hub id"
    )
    clip: str | None = setting(None, "folder of the CLIP's config.json, when it is not ViT-L/14-336")
    heads: int | None = setting(None, "attention heads of a detector's ViT, when they are not 64 channels wide")
    iterations: int | None = setting(None, "RADAR: rounds of reasoning, when no config.yaml says it")
    branches: Literal["both", "boundary", "frequency"] | None = setting(None, "RADAR: what was on, when nobody says it")
    dry_run: bool = setting(False, "print what would become of every tensor; write nothing")


def main() -> None:
    """Convert, or with --dry_run print the report; exit code 2 when tensors do not fit."""
    setup_logging()
    options = parse(Options, description=__doc__ or "")
    try:
        if not options.dry_run and not options.save_path:
            raise ValueError("Where to? Give --save_path FOLDER, or --dry_run true to see the report only.")
        published = opened(options)
        if options.dry_run:
            sys.stdout.writelines(f"{line}\n" for line in report(published))
        for what, found in plans(published):
            found.check(f"{options.model_path} ({what})")
        if not options.dry_run:
            published.write(Path(options.save_path))
            counts = "; ".join(found.counts() for _, found in plans(published))
            log.info("%s: %s. Written to %s", options.model_path, counts, options.save_path)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"convert_m2f2: error: {error}") from error


def opened(options: Options) -> Published:
    """Open what --model_path names and plan its conversion."""
    path = Path(options.model_path)
    if path.is_file():
        tower = None if options.vision_tower is None else Path(options.vision_tower)
        clip = None if options.clip is None else read_clip_config(options.clip)
        if all(name.startswith(TOWER_PREFIX) for name in TensorFiles([path])):
            return PublishedTower(path, clip)
        unseen = Unseen(
            vision_tower=tower, clip=clip, heads=options.heads, iterations=options.iterations, branches=options.branches
        )
        return layout_of(path).open(path, unseen)
    folder = resolve(options.model_path)
    if options.model_base is not None:
        return PublishedDelta(folder, ready(options.model_base))
    return PublishedFolder(folder, options.vision_tower, options.clip)


def plans(published: Published) -> Iterator[tuple[str, Plan]]:
    """Yield the plan, or the two of a delta, each with a name."""
    if isinstance(published, PublishedDelta):
        yield from published.plans.items()
    else:
        yield "tensors", published.plan


def report(published: Published) -> Iterator[str]:
    """Yield what becomes of every tensor."""
    for _, found in plans(published):
        yield from found.lines()


if __name__ == "__main__":
    main()
