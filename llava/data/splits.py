"""What must never cross a split, and how to see that it does not: groups, leaks, near-duplicates, counts."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from llava.core.types import FAKE, LABEL_NAMES, REAL, Record
from llava.data.sources import Source

log = logging.getLogger(__name__)


class LeakError(ValueError):
    """Two splits share a group."""


def check_leaks(splits: Mapping[str, Sequence[Record]]) -> None:
    """Refuse splits that share a group. Raises LeakError with the count, the first five groups and their files."""
    found = []
    for (name_a, a), (name_b, b) in combinations(splits.items(), 2):
        first_a, first_b = _first_by_group(a), _first_by_group(b)
        shared = sorted(first_a.keys() & first_b.keys())
        if shared:
            files = "; ".join(f"{g!r}: {first_a[g].id} and {first_b[g].id}" for g in shared[:5])
            found.append(f"{name_a!r} and {name_b!r} share {len(shared)} groups ({files})")
    if found:
        raise LeakError(
            f"Leak between splits: {'. '.join(found)}. Move every record of a group into one split, "
            "or correct the group column if these are different people."
        )


def group_hashes(groups: Iterable[str]) -> frozenset[str]:
    """Give the SHA-256 of the name of each group, in hexadecimal: enough to meet it again, too little to read it."""
    return frozenset(hashlib.sha256(name.encode()).hexdigest() for name in set(groups))


def shared_groups(groups: Iterable[str], hashes: AbstractSet[str]) -> list[str]:
    """List the groups that are among others, which are only known by their hashes, in order and each once."""
    return sorted(name for name in set(groups) if not hashes.isdisjoint(group_hashes([name])))


def refuse_groups(groups: Iterable[str], hashes: AbstractSet[str], fold: str, use: str, allow: bool = False) -> None:
    """Refuse a fold of which some groups are among others, which are only known by their hashes.

    use: what the others are for, as "trained on". allow: warn only. Raises LeakError with the count and five names.
    """
    shared = shared_groups(groups, hashes)
    if shared:
        problem = (
            f"Leak: {fold} has {len(shared)} groups that the detector, or a part of it, is {use} "
            f"({', '.join(map(repr, shared[:5]))}). Fit on groups of their own: give the phase another `fold` or "
            "`data`, or --data.allow_leaks true if they share no more than their names."
        )
        if not allow:
            raise LeakError(problem)
        log.warning("fitted all the same: %s", problem)


def near_duplicates(
    source: Source, splits: Mapping[str, Sequence[Record]], max_distance: int = 4
) -> list[tuple[str, str, int]]:
    """List (id, id, distance) of images in different splits that look alike, nearest first.

    distance: differing bits of the 64-bit DCT hash (ImageHash's phash). Reads every image of the splits once; clips
    that cannot be decoded look like none.
    """
    hashed = [
        [(r.id, _perceptual_hash(source.load(r).image)) for r in records if not source.why_unreadable(r)]
        for records in splits.values()
    ]
    pairs = []
    for some, others in combinations(hashed, 2):
        codes = np.array([code for _, code in others], dtype=np.uint64)
        for name, code in some:
            distances = np.bitwise_count(codes ^ np.uint64(code))
            pairs += [(name, others[j][0], int(distances[j])) for j in np.flatnonzero(distances <= max_distance)]
    return sorted(pairs, key=lambda pair: (pair[2], pair[0], pair[1]))


def connected_groups(id_lists: Sequence[Sequence[str]]) -> list[str]:
    """Give each item its group's name: items that share an id, directly or through others, share a group.

    The name is the group's smallest id. Raises ValueError for an item without ids.
    """
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for index, ids in enumerate(id_lists):
        if not ids:
            raise ValueError(f"Item {index} has no group id; give it one, its own name for instance.")
        for name in ids:
            parent.setdefault(name, name)
            low, high = sorted((root(ids[0]), root(name)))
            # The smaller id stays the root, so the root is the group's name.
            parent[high] = low
    return [root(ids[0]) for ids in id_lists]


def require_both_classes(records: Sequence[Record], what: str) -> None:
    """Refuse records that are all real, all fake, or none. Raises ValueError naming `what` and the next step."""
    counts = Counter(r.label for r in records)
    if counts[REAL] and counts[FAKE]:
        return
    missing = " and no ".join(LABEL_NAMES[label] for label in (REAL, FAKE) if not counts[label])
    names = ", ".join(sorted({r.class_name for r in records})) or "none"
    raise ValueError(
        f"{what} has no {missing} images ({len(records)} records, classes: {names}); training needs both. "
        "Add the missing class, or list its folder name in real_names."
    )


def choose_groups(groups: Sequence[str], fraction: float, seed: int) -> set[str]:
    """Choose whole groups at random until they hold `fraction` of the items; `groups` has one entry per item."""
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: {fraction} is not usable; allowed: between 0 and 1, 0.2 for instance.")
    sizes = Counter(groups)
    names = sorted(sizes)
    chosen: set[str] = set()
    wanted = fraction * len(groups)
    for i in np.random.default_rng(seed).permutation(len(names)):
        if sum(sizes[name] for name in chosen) >= wanted:
            break
        chosen.add(names[i])
    return chosen


def divide(records: Sequence[Record], shares: Mapping[str, float], seed: int) -> list[Record]:
    """Give records the names of splits: whole groups, and of each class as near to `shares` as the groups allow.

    shares: of each split, with sum 1. Groups come largest first, those of one size in an order drawn by the seed; each
    goes where its classes are missing most. Raises ValueError for shares that do not add up, and when there are fewer
    groups than splits.
    """
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6) or min(shares.values()) <= 0:
        given = ", ".join(map(str, shares.values()))
        raise ValueError(f"shares: {given} do not add up to 1; give 0.7, 0.15 and 0.15 for instance.")
    classes = sorted({r.class_name for r in records})
    counts: dict[str, np.ndarray] = {}
    for record in records:
        counts.setdefault(record.group, np.zeros(len(classes)))[classes.index(record.class_name)] += 1
    if len(counts) < len(shares):
        raise ValueError(
            f"{len(records)} records in {len(counts)} groups can not be divided into {len(shares)} splits; give more."
        )
    names = sorted(counts)
    drawn = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    wanted = np.outer([*shares.values()], np.sum([*counts.values()], axis=0))  # (splits, classes)
    missing, split_of = wanted.copy(), dict[str, str]()
    for group in sorted(drawn, key=lambda name: -counts[name].sum()):
        number = int((missing / wanted @ counts[group]).argmax())
        missing[number] -= counts[group]
        split_of[group] = [*shares][number]
    return [replace(record, split=split_of[record.group]) for record in records]


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Count records, labels, classes, videos and groups, in all and per split."""
    by_split: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_split[record.split].append(record)
    return {**_counts(records), "splits": {name: _counts(part) for name, part in sorted(by_split.items())}}


def _counts(records: Sequence[Record]) -> dict[str, Any]:
    labels = Counter("unknown" if r.label is None else LABEL_NAMES[r.label] for r in records)
    return {
        "records": len(records),
        "labels": dict(sorted(labels.items())),
        "classes": dict(sorted(Counter(r.class_name for r in records).items())),
        "videos": len({r.video for r in records}),
        "groups": len({r.group for r in records}),
    }


def _first_by_group(records: Sequence[Record]) -> dict[str, Record]:
    return {r.group: r for r in reversed(records)}


def _perceptual_hash(image: np.ndarray) -> int:
    # ImageHash comes with the extra [train]; detecting needs no hash.
    import imagehash
    from PIL import Image

    return int(str(imagehash.phash(Image.fromarray(image))), 16)
