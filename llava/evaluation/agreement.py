"""Do the words say what the evidence says? Text verdicts against the detector's, or against evidence that was told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava.core.types import FAKE, REAL
from llava.evaluation.captions import image_groups, read_jsonl
from llava.evaluation.statistics import group_bootstrap
from llava.evaluation.text import parse_verdict

_LABELS = {"REAL": REAL, "FAKE": FAKE}


def agreement(
    text_verdicts: Sequence[int | None],
    detector_verdicts: Sequence[int | None],
    groups: Sequence[str],
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Give the part of items whose text says what the detector says, with its group-bootstrap interval.

    An undecided text does not agree. Items on which the detector gave no verdict are left out and counted.
    """
    pairs = [(t, d, g) for t, d, g in zip(text_verdicts, detector_verdicts, groups, strict=True) if d is not None]
    if not pairs:
        raise ValueError("The detector gave no verdict on any item, so there is nothing to agree with.")
    same = np.array([t == d for t, d, _ in pairs], dtype=float)
    interval = group_bootstrap(
        [g for _, _, g in pairs], lambda weights: float(np.average(same, weights=weights)), n_boot, seed
    )
    return {
        "agreement": interval.to_dict(),
        "n": len(pairs),
        "text_undecided": sum(t is None for t, _, _ in pairs),
        "no_detector_verdict": len(text_verdicts) - len(pairs),
    }


def read_agreement(predict_path: str | Path, n_boot: int = 2000, seed: int = 0) -> dict[str, Any] | None:
    """Compare each answer with its row's metadata; None where rows do not say what the detector found.

    Evidence that was told (`evidence_p_fake`, the causality test) counts as fake from 0.5 on; else the detector's
    own `label` counts. `told` in the result names it.
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
    found = [_LABELS.get(n.get("label", "")) if p_fake is None else int(p_fake >= 0.5) for n in notes]
    return {"told": p_fake, **agreement(texts, found, groups, n_boot, seed)}
