"""Does the score fall when the region that the text names is edited, and more than for other regions of that area?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.core.types import REGIONS
from llava.evaluation.captions import CaptionItem, read_jsonl
from llava.evaluation.statistics import group_bootstraps

EDITS = {"blur": "blurred", "restore": "restored"}
_FIELDS = ("p_fake", "p_fake_named", "p_fake_random")


@dataclass(frozen=True)
class Edited:
    """One answer: p_fake of the image as it is, with the named region edited, and with each random region edited."""

    item: CaptionItem
    named: str
    p_fake: float
    p_fake_named: float
    p_fake_random: tuple[float, ...]


@dataclass(frozen=True)
class CounterfactualCase:
    """How regions were edited, the answers that name one, and how many answers were left out by reason."""

    edit: str
    answers: tuple[Edited, ...]
    left_out: Mapping[str, int]


def read_counterfactual(path: str | Path, items: Sequence[CaptionItem]) -> CounterfactualCase:
    """Read the file of `m2f2 counterfactual`: one json {key, left_out} or {key, edit, named, p_fake, ...} per line.

    Raises ValueError naming the line for a row of another kind, a key that is unknown or given twice, and scores
    outside [0, 1], and when the rows differ in their edit or in how many random regions they have.
    """
    known = {item.key: item for item in items}
    answers: dict[str, Edited | None] = {}
    left_out: Counter[str] = Counter()
    edits: set[str] = set()
    for where, row in read_jsonl(path):
        key = row.get("key")
        if key not in known or key in answers:
            raise ValueError(f"{where}: key {key!r} is {'given twice' if key in answers else 'no key of the truth'}.")
        if "left_out" in row:
            left_out[str(row["left_out"])] += 1
            answers[key] = None
        else:
            answers[key] = _edited(row, known[key], where)
            edits.add(row["edit"])
    read = tuple(answer for answer in answers.values() if answer is not None)
    if len({len(answer.p_fake_random) for answer in read}) > 1 or len(edits) > 1:
        raise ValueError(f"{str(path)!r}: rows differ in edit or number of random regions; write the file in one run.")
    return CounterfactualCase("".join(edits), read, dict(left_out))


def counterfactual_report(case: CounterfactualCase, n_boot: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Give how far p_fake falls when the named region is edited, and when random ones are, with paired difference.

    `drop`: p_fake of the image minus that of the edited one; `random` is the mean over the random regions of an image.
    `rank`: part of the random regions that lower p_fake less than the named one does, ties half; 0.5 by chance.
    `by_truth`: the difference where the text names the edited region (`right`), and where it names another one of a
    locally edited image (`wrong`). 95 % group bootstrap.
    """
    report: dict[str, Any] = {"edit": case.edit, "n": len(case.answers), "left_out": dict(case.left_out)}
    if not case.answers:
        return report
    return report | {
        "random_regions": len(case.answers[0].p_fake_random),
        **_drops(case.answers, n_boot, seed),
        "by_truth": {
            name: {"n": len(part), "difference": _drops(part, n_boot, seed)["drop"]["difference"]}
            for name, is_right in (("right", True), ("wrong", False))
            if (part := [a for a in case.answers if a.item.region and (a.named == a.item.region) == is_right])
        },
    }


def _drops(answers: Sequence[Edited], n_boot: int, seed: int) -> dict[str, Any]:
    p_fake, named = (np.array([getattr(a, field) for a in answers]) for field in _FIELDS[:2])
    random = np.array([a.p_fake_random for a in answers])  # (n, random regions)
    rank = ((random > named[:, None]) + 0.5 * (random == named[:, None])).mean(axis=1)
    rows = np.stack([p_fake - named, p_fake - random.mean(axis=1), random.mean(axis=1) - named, rank])
    groups = [a.item.group for a in answers]
    *drops, ranked = group_bootstraps(groups, lambda w: rows @ w / w.sum(), n_boot, seed)
    names = ("named", "random", "difference")
    return {"drop": {n: d.to_dict() for n, d in zip(names, drops, strict=True)}, "rank": ranked.to_dict()}


def _edited(row: Mapping[str, Any], item: CaptionItem, where: str) -> Edited:
    is_known = row.get("edit") in EDITS and row.get("named") in REGIONS
    if not is_known or not all(name in row for name in _FIELDS) or not row["p_fake_random"]:
        raise ValueError(
            f"{where}: expected `edit`, a region `named` and the scores {', '.join(_FIELDS)}, or `left_out`; write the "
            "file with `m2f2 counterfactual`."
        )
    scores = [row["p_fake"], row["p_fake_named"], *row["p_fake_random"]]
    if not all(isinstance(score, (int, float)) and 0 <= score <= 1 for score in scores):
        raise ValueError(f"{where}: scores must lie in [0, 1], got {scores}.")
    return Edited(item, row["named"], scores[0], scores[1], tuple(scores[2:]))
