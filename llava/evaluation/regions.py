"""Does the text name the region that was edited? Accuracy, confusion, blind guess and image swap."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from llava.core.types import REGIONS
from llava.evaluation.captions import CaptionItem, question_type
from llava.evaluation.questions import Lookup, TrainingPair
from llava.evaluation.statistics import group_bootstrap, wilson
from llava.evaluation.swap import swap_gap

NONE, SEVERAL = "none", "several"
_WORDS = re.compile(r"\b(?:(eye)s?|(?:eye)?(brow)s?|(nose)|(mouth)|(skin))\b", re.I)
_REGION_OF = {"eye": "eyes", "brow": "eyebrows", "nose": "nose", "mouth": "mouth", "skin": "skin"}


def named_region(text: str) -> str:
    """Give the one region a text names by whole words, `none`, or `several`; eye(s) and (eye)brow(s) count alike."""
    named = {_REGION_OF[word.lower()] for found in _WORDS.findall(text) for word in found if word}
    return named.pop() if len(named) == 1 else SEVERAL if named else NONE


def region_report(
    items: Sequence[CaptionItem], training: Sequence[TrainingPair], n_boot: int = 2000, seed: int = 0
) -> dict[str, Any] | None:
    """Give how often answers name the edited region, against a blind guess and under image swap; None without truth.

    Items: whole-image questions about images whose truth has a `region`. An answer that names no region or several is
    wrong. `accuracy`: Wilson. `guess`: the region that training answers to the question name most often (ties: first in
    the alphabet). `gain`: accuracy minus that of the guess, paired group bootstrap. `swap`: see `swap_gap`.
    `confusion`: {true region: {named region: count}}. Raises ValueError for a region that is none of the five.
    """
    own = [item for item in items if item.region is not None and question_type(item.question) == "image"]
    if not own:
        return None
    for item in own:
        if item.region not in REGIONS:
            raise ValueError(f"Truth {item.key!r}: region {item.region!r} is unknown; allowed: {', '.join(REGIONS)}.")
    said = [named_region(item.answer) for item in own]
    guesses = _guesses(own, training)
    right = np.array([region == item.region for region, item in zip(said, own, strict=True)], dtype=float)
    guessed = np.array([guess == item.region for guess, item in zip(guesses, own, strict=True)], dtype=float)
    gain = group_bootstrap([i.group for i in own], lambda w: float((right - guessed) @ w / w.sum()), n_boot, seed)
    truths = Counter(str(item.region) for item in own)
    return {
        "n": len(own),
        "accuracy": wilson(int(right.sum()), len(own)).to_dict(),
        "guess": {
            "regions": sorted(set(guesses)),
            "accuracy": wilson(int(guessed.sum()), len(own)).to_dict(),
        },
        "gain": gain.to_dict(),
        "swap": swap_gap(own, _matches, lambda sums, n: sums / n, ("accuracy",), n_boot, seed),
        "confusion": {
            region: dict(Counter(s for s, item in zip(said, own, strict=True) if item.region == region))
            for region in REGIONS
            if region in truths
        },
    }


def _guesses(items: Sequence[CaptionItem], training: Sequence[TrainingPair]) -> list[str]:
    named = [(pair.question, named_region(pair.answer)) for pair in training]
    seen = [(question, region) for question, region in named if region in REGIONS]
    if not seen:
        return [NONE] * len(items)
    lookup = Lookup(seen)
    return [lookup.most_frequent(item.question, "question") for item in items]


def _matches(items: Sequence[CaptionItem]) -> np.ndarray:
    """Give (n, n, 1): does the answer of item i name the region of item j?"""
    said = np.array([named_region(item.answer) for item in items])
    true = np.array([str(item.region) for item in items])
    return (said[:, None] == true)[:, :, None].astype(float)
