"""The data of a phase: its three splits, checked for both classes, leaks and near-duplicates before anything heavy."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava.core.types import Record
from llava.data.sources import DataConfig, Source, open_source, split_of
from llava.data.splits import LeakError, check_leaks, choose_groups, near_duplicates, require_both_classes, summary

log = logging.getLogger(__name__)
OWN_FRACTION = 0.15  # of the images, for validation and for test, when the data come without splits


@dataclass(frozen=True)
class PhaseData:
    """A source with its training, validation and test records; test may be empty."""

    source: Source
    train: Sequence[Record]
    val: Sequence[Record]
    test: Sequence[Record]

    def summary(self) -> dict[str, Any]:
        """Count records, labels, classes, videos and groups of each split."""
        return summary([*self.train, *self.val, *self.test])


def open_data(config: DataConfig, seed: int) -> PhaseData:
    """Open a source and pick its splits; data without splits are divided by groups, 70 : 15 : 15.

    Raises LeakError when splits share a group (with `allow_leaks` it is a warning), ValueError when one lacks a class,
    is empty, or has unknown labels.
    """
    source = open_source(config)
    names = {config.train, config.val, config.test}
    if not names & {r.split for r in source.records}:
        train, val, test = _divide(source.records, config, seed)
    else:
        train, val = split_of(source, config.train), split_of(source, config.val)
        test = [r for r in source.records if r.split == config.test]
    splits = {config.train: train, config.val: val, config.test: test}
    for name, records in splits.items():
        if records or name != config.test:
            require_both_classes(records, f"Split {name!r} of {config.path!r}")
    try:
        check_leaks(splits)
    except LeakError as error:
        if not config.allow_leaks:
            raise
        log.warning("trained all the same, by data.allow_leaks: %s", error)
    return PhaseData(source, train, val, test)


def report_near_duplicates(data: PhaseData) -> list[dict[str, Any]]:
    """Log and give pairs of look-alike images in different splits; they are reported, not refused."""
    splits = {"train": data.train, "val": data.val, "test": data.test}
    pairs = near_duplicates(data.source, {name: records for name, records in splits.items() if records})
    for first, second, distance in pairs[:5]:
        log.warning("near-duplicate across splits: %s and %s (%d of 64 bits differ)", first, second, distance)
    if len(pairs) > 5:
        log.warning("... and %d more pairs; all are in metrics.json", len(pairs) - 5)
    return [{"first": first, "second": second, "distance": distance} for first, second, distance in pairs]


def _divide(
    records: Sequence[Record], config: DataConfig, seed: int
) -> tuple[list[Record], list[Record], list[Record]]:
    test = choose_groups([r.group for r in records], OWN_FRACTION, seed)
    rest = [r for r in records if r.group not in test]
    val = choose_groups([r.group for r in rest], OWN_FRACTION / (1 - OWN_FRACTION), seed)
    named = [
        replace(r, split=config.test if r.group in test else config.val if r.group in val else config.train)
        for r in records
    ]
    parts = [[r for r in named if r.split == split] for split in (config.train, config.val, config.test)]
    log.info("the data have no splits; divided by groups into %d / %d / %d images", *(len(p) for p in parts))
    return parts[0], parts[1], parts[2]
