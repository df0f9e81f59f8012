"""The missing parts of `m2f2 score` over many processes, with Ray Data; each process writes the parts that it scores.

All machines of a cluster have to see images, model and output folder under the same paths.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llava.core.cluster import connected
from llava.core.logs import setup_logging
from llava.explainer.convert import ready
from llava.pipeline.loading import load
from llava.pipeline.score_parts import Parts, score_part
from llava.pipeline.score_settings import Missing, ScoreSettings

MAX_BLOCKS = 10_000


class PartScorer:
    """Holds the model in a process of its own and scores one part after the other."""

    def __init__(self, settings: ScoreSettings, parts: Parts, folder: str) -> None:
        setup_logging()
        os.chdir(folder)  # relative names mean here what they mean where the command was typed
        self._parts = parts
        self._pipeline = load(settings, settings.model)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Score and write parts; `batch` has their numbers and names, what comes back how many images they held."""
        images = []
        for number, names in zip(batch["number"].tolist(), batch["names"], strict=True):
            images.append(sum(score_part(self._pipeline, self._parts, number, [os.fsdecode(name) for name in names])))
        return {"images": images}


def score_with_ray(settings: ScoreSettings, parts: Parts, missing: Missing) -> Iterator[int]:
    """Score the missing parts; yields how many images were done, part by part."""
    settings = replace(settings, model=str(ready(settings.model).resolve()))
    with connected(settings.cluster):
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        logging.getLogger("ray.data").setLevel(logging.WARNING)
        DataContext.get_current().enable_progress_bars = False  # ours counts images, not blocks
        workers = min(settings.workers or max(settings.cluster.room(), 1), len(missing))
        # Names travel as bytes, because a file name need not be Unicode.
        items = [{"number": number, "names": [os.fsencode(n) for n in names]} for number, names in missing.items()]
        scored = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS)).map_batches(
            PartScorer,
            fn_constructor_args=(settings, parts, str(Path.cwd())),
            batch_size=1,
            compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            **settings.cluster.resources,
        )
        for row in scored.iter_rows():
            yield int(row["images"])
