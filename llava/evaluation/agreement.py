"""How often the words say what the detector found, or what the evidence they were told says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava.core.types import FAKE, REAL
from llava.evaluation.captions import image_groups, read_jsonl
from llava.evaluation.statistics import Interval, group_bootstrap
from llava.evaluation.text import parse_verdict

_LABELS = {"REAL": REAL, "FAKE": FAKE}


def agreement(
    text_verdicts: Sequence[int | None],
    found: Sequence[int | None],
    groups: Sequence[str],
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Give the part of items whose text says what was found, with its group-bootstrap interval.

    An undecided text does not agree. Items on which nothing was found (None) are left out and counted; when no item is
    left, the agreement has no value.
    """
    pairs = [(t, f, g) for t, f, g in zip(text_verdicts, found, groups, strict=True) if f is not None]
    same = np.array([t == f for t, f, _ in pairs], dtype=float)
    interval = Interval(math.nan, math.nan, math.nan, 0)
    if pairs:
        interval = group_bootstrap([g for _, _, g in pairs], lambda w: float(np.average(same, weights=w)), n_boot, seed)
    return {
        "agreement": interval.to_dict(),
        "n": len(pairs),
        "text_undecided": sum(t is None for t, _, _ in pairs),
        "left_out": len(found) - len(pairs),
    }


def read_agreement(predict_path: str | Path, n_boot: int = 2000, seed: int = 0) -> dict[str, Any] | None:
    """Compare each answer with its row's metadata; None where rows do not say what the detector found.

    What was found is the side of `p_fake`, of the detector or told (`evidence_p_fake`, the causality test): fake from
    0.5 on, or as a clear label (REAL, FAKE) says. `clear`: the same over clear labels only, without UNCERTAIN ones.
    `told` in the result names the evidence told.
    """
    rows = [row for _, row in read_jsonl(predict_path)]
    notes = [row.get("metadata") or {} for row in rows]
    if not any("label" in note for note in notes):
        return None
    told = {note.get("evidence_p_fake") for note in notes}
    if len(told) > 1:
        raise ValueError(f"{str(predict_path)!r} mixes answers to different evidence: {sorted(map(str, told))}.")
    texts = [parse_verdict(row["text"]) for row in rows]
    groups = image_groups([Path(row["image"]).stem for row in rows])
    p_fake = told.pop()
    if p_fake is not None:
        return {"told": p_fake, **agreement(texts, [int(p_fake >= 0.5)] * len(rows), groups, n_boot, seed)}
    labels = [_LABELS.get(note.get("label", "")) for note in notes]
    sides = [_side(note) if label is None else label for note, label in zip(notes, labels, strict=True)]
    clear = agreement(texts, labels, groups, n_boot, seed)
    return {"told": None, **agreement(texts, sides, groups, n_boot, seed), "clear": clear}


def _side(note: dict[str, Any]) -> int | None:
    p_fake = note.get("p_fake")
    return None if p_fake is None else int(p_fake >= 0.5)
