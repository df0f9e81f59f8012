"""How large are RADAR's published slips? Trained detectors, repaired and as published, on one test set.

Of each detector: AUC of its verdict and of each branch alone, every image judged by itself, in batches of shuffled
images, and in batches of one class (sorted, as the published scripts read a test folder); and the verdict's in train
mode, as the published validation runs, with what that does to the statistics of normalisation. Intervals: 95 %, group
bootstrap. With --speed: time of RADAR beside the plain ViT-S, at the published sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llava.core.config import parse, setting
from llava.core.runtime import setup_logging, write_json
from llava.core.terminal import console, titled_table
from llava.core.types import REAL, Record
from llava.data.dataset import to_tensor
from llava.data.sources import DataConfig, Source, open_source, split_of
from llava.data.splits import refuse_groups
from llava.detectors.base import Detector, create, load
from llava.detectors.radar import Radar
from llava.evaluation.metrics import auc_interval
from llava.evaluation.tables import interval_text, run_script

ALONE, SHUFFLED, SORTED, TRAINING = "one by one", "shuffled batches", "batches of one class", "train mode, one class"
SPEED_SIZE, SPEED_BATCH = 224, 8
MAPS = "of these, edges and spectra"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which detectors are looked at, and on what."""

    detectors: tuple[str, ...] = setting((), "folders of trained RADAR detectors", positional=True)
    data: DataConfig | None = setting(None, "where images come from")
    split: str = setting("test", "which of them")
    batch_size: int = setting(32, "images per batch, where it matters")
    seed: int = setting(0, "seed of the shuffled order")
    resamples: int = setting(2000, "bootstrap resamples behind each interval")
    speed: bool = setting(False, "time RADAR beside the plain ViT-S as well, on one core")
    repeats: int = setting(7, "how often each is timed; the median counts")
    json: str | None = setting(None, "write the numbers to this file as well")


def main() -> None:
    """Measure, print, and write the numbers when asked."""
    settings = parse(Settings, description=(__doc__ or "").splitlines()[0])
    setup_logging()
    if not (settings.detectors or settings.speed):
        raise ValueError("Nothing is asked: name folders of RADAR detectors and --data.path, or give --speed true.")
    report: dict[str, Any] = {"slips": {}, "speed": {}}
    for name in settings.detectors:
        rows = report["slips"][name] = dict(slips(load(name, expected="radar"), settings))
        table = titled_table(name, "what", *rows["verdict"])
        for what, cells in rows.items():
            table.add_row(what, *map(interval_text, cells.values()))
        console().print(table)
    if settings.speed:
        report["speed"] = spent = speeds(settings.repeats)
        table = titled_table(f"ms a batch of {SPEED_BATCH} at {SPEED_SIZE} px, one core", "", *spent["RADAR"])
        for what, numbers in spent.items():
            table.add_row(what, *(f"{number:.3g}" for number in numbers.values()))
        console().print(table)
    if settings.json:
        write_json(settings.json, report)


def slips(detector: Detector, settings: Settings) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Yield what is looked at, and its AUC in each order, each as value, low and high."""
    assert isinstance(detector, Radar)
    if settings.data is None:
        raise ValueError("Missing setting 'data.path'; give it as --data.path FOLDER_OR_CSV.")
    source = open_source(settings.data)
    records = split_of(source, settings.split)
    refuse_groups((r.group for r in records), detector.trained_on, f"split {settings.split!r}", "trained on")
    labels = np.array([int(record.label or REAL) for record in records])
    images = pixels(detector, source, records)
    shuffled = np.random.default_rng(settings.seed).permutation(len(records))
    by_class = np.argsort(labels, kind="stable")
    groups = np.array([record.group for record in records])

    def aucs(found: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
        return {
            what: auc_interval(labels, scores, groups, settings.resamples).to_dict() for what, scores in found.items()
        }

    orders = {ALONE: (np.arange(len(records)), 1), SHUFFLED: (shuffled, settings.batch_size)}
    orders[SORTED] = (by_class, settings.batch_size)
    rows = {name: aucs(scores(detector, images, *order)) for name, order in orders.items()}
    training = deepcopy(detector)
    training.train()
    rows[TRAINING] = {"verdict": aucs(scores(training, images, by_class, settings.batch_size))["verdict"]}
    for what in rows[ALONE]:
        yield what, {name: cells[what] for name, cells in rows.items() if what in cells}
    training.eval()
    moved = scores(training, images, shuffled, settings.batch_size)
    yield "verdict after such a validation", {ALONE: aucs(moved)["verdict"]}


def pixels(detector: Radar, source: Source, records: Sequence[Record]) -> Tensor:
    """Give all images as the detector reads them, (N, 3, S, S)."""
    spec = detector.inputs["pixel_values"]
    return torch.stack([to_tensor(source.load(record, None).image, spec) for record in records])


@torch.no_grad()
def scores(detector: Radar, images: Tensor, order: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
    """Give logits (N,) of the verdict and of each branch, judged in batches in this order."""
    found: dict[str, np.ndarray] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        answer = detector.answer(images[torch.from_numpy(chosen)])
        logits = {"verdict": answer.logit, **{f"{name} alone": each.logit for name, each in answer.found.items()}}
        for what, values in logits.items():
            found.setdefault(what, np.empty(len(order)))[chosen] = values.numpy()
    return found


def speeds(repeats: int) -> dict[str, dict[str, float]]:
    """Time forward and a training step of both networks, turn by turn, and give the ratios."""
    torch.set_num_threads(1)
    radar = create("radar", {})
    assert isinstance(radar, Radar)
    made = {"RADAR": radar, "ViT-S": create("baseline", {"network": "vit_small"})}
    images, labels = torch.randn(SPEED_BATCH, 3, SPEED_SIZE, SPEED_SIZE), torch.arange(SPEED_BATCH) % 2
    spent: dict[str, dict[str, list[float]]] = {name: {"forward": [], "step": []} for name in made}
    spent[MAPS] = {"forward": []}
    for _ in range(repeats + 1):  # the first warms up
        spent[MAPS]["forward"].append(timed(partial(radar.maps, images)))
        for name, detector in made.items():
            spent[name]["forward"].append(timed(partial(forward, detector.eval(), images)))
            optimiser = torch.optim.AdamW(detector.train().parameters(), lr=1e-5)
            spent[name]["step"].append(timed(partial(step, detector, optimiser, images, labels)))
    rows = {name: {what: 1000 * median(each[1:]) for what, each in parts.items()} for name, parts in spent.items()}
    rows["ratio"] = {what: rows["RADAR"][what] / rows["ViT-S"][what] for what in rows["RADAR"]}
    return rows


def timed(work: Callable[[], object]) -> float:
    """Give the processor's seconds of a piece of work."""
    start = process_time()
    work()
    return process_time() - start


@torch.no_grad()
def forward(network: nn.Module, images: Tensor) -> object:
    """Judge images."""
    return network(images)


def step(network: nn.Module, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    """Learn from one batch."""
    optimiser.zero_grad()
    network(images, labels=labels).loss.backward()
    optimiser.step()


if __name__ == "__main__":
    run_script(main)
