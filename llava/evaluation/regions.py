"""Do the words name what was done to the face? The edited region and the artefact: accuracy, confusion, baselines."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llava.core.types import LABEL_NAMES, REAL, REGIONS
from llava.data.forgery_text import SIGNS
from llava.evaluation.captions import CaptionItem, question_type
from llava.evaluation.questions import Lookup, TrainingPair
from llava.evaluation.statistics import group_bootstraps, wilson
from llava.evaluation.swap import swap_gap
from llava.evaluation.template import template_answers
from llava.evaluation.text import parse_verdict

NONE, SEVERAL = "none", "several"
_WORDS = re.compile(r"\b(?:(eye)s?|(?:eye)?(brow)s?|(nose)|(mouth)|(skin))\b", re.I)
_REGION_OF = {"eye": "eyes", "brow": "eyebrows", "nose": "nose", "mouth": "mouth", "skin": "skin"}
_UNTOUCHED = re.compile(r"[^.,;]*\bno signs?\b[^.,;]*", re.I)
_SIGNS = {name: re.compile(rf"\b{re.escape(sign.removeprefix('a '))}\b", re.I) for name, sign in SIGNS.items()}


@dataclass(frozen=True)
class Naming:
    """One thing that words can name: the field of the truth, its values, and how it is read from a text."""

    field: Literal["region", "artefact"]
    names: tuple[str, ...]
    read: Callable[[str], str]


def named_region(text: str) -> str:
    """Give the one region a text names by whole words, `none`, or `several`; eye(s) and (eye)brow(s) count alike.

    A text that calls the image real names none, and a region that shows `no signs` of something is not named.
    """
    return _only({_REGION_OF[word.lower()] for found in _WORDS.findall(_claims(text)) for word in found if word})


def named_artefact(text: str) -> str:
    """Give the one artefact a text names in the words of `forgery_text.SIGNS`, `none`, or `several`; see above."""
    return _only({name for name, sign in _SIGNS.items() if sign.search(_claims(text))})


def _claims(text: str) -> str:
    return "" if parse_verdict(text) == REAL else _UNTOUCHED.sub("", text)


def _only(named: set[str]) -> str:
    return named.pop() if len(named) == 1 else SEVERAL if named else NONE


REGION = Naming("region", REGIONS, named_region)
ARTEFACT = Naming("artefact", tuple(SIGNS), named_artefact)


def asks_whole(item: CaptionItem) -> bool:
    """Tell whether the question is about the whole image, so that it leaves open which region is named."""
    return question_type(item.question) == "image"


def naming_report(
    naming: Naming, items: Sequence[CaptionItem], training: Sequence[TrainingPair], n_boot: int = 2000, seed: int = 0
) -> dict[str, Any] | None:
    """Give how often answers name what was edited, against blind baselines and under image swap; None without truth.

    Items: whole-image questions about images whose truth has the field. An answer that names none or several is wrong.
    `accuracy`: Wilson. `chance`: one of the values that occur, picked at random. `guess`: the one of them that
    training answers to the question name most often (ties: first in the alphabet). `template`: what the blind template
    names. `gain`: accuracy minus each of these, paired group bootstrap. `swap`: see `swap_gap`. `confusion`: {true:
    {named: count}}; `elsewhere`: {label: {named: count}} of the images whose truth lacks the field. Raises ValueError.
    """
    asked = [item for item in items if asks_whole(item)]
    own = [item for item in asked if _truth(naming, item) is not None]
    if not own:
        return None
    truths, said = [_truth(naming, item) for item in own], [naming.read(item.answer) for item in own]
    names = [name for name in naming.names if name in truths]
    baselines = {
        "guess": _guesses(naming, names, own, training),
        "template": [naming.read(answer) for answer in template_answers(own, training, "kind")],
    }
    right = _equal(said, truths)
    rivals = np.stack([np.full(len(own), 1 / len(names)), *(_equal(b, truths) for b in baselines.values())])
    gaps = group_bootstraps([i.group for i in own], lambda w: (right - rivals) @ w / w.sum(), n_boot, seed)
    return {
        "n": len(own),
        "named": {"one": sum(s in naming.names for s in said), NONE: said.count(NONE), SEVERAL: said.count(SEVERAL)},
        "accuracy": wilson(int(right.sum()), len(own)).to_dict(),
        "chance": {"of": len(names), "value": 1 / len(names)},
        **{
            name: {"names": sorted(set(answers)), "accuracy": wilson(int(hits.sum()), len(own)).to_dict()}
            for (name, answers), hits in zip(baselines.items(), rivals[1:], strict=True)
        },
        "gain": {name: gap.to_dict() for name, gap in zip(("chance", *baselines), gaps, strict=True)},
        "swap": swap_gap(own, _pairs(naming), lambda sums, n: sums / n, ("accuracy",), n_boot, seed),
        "confusion": {
            name: dict(Counter(s for s, true in zip(said, truths, strict=True) if true == name)) for name in names
        },
        "elsewhere": _elsewhere(naming, asked),
    }


def _truth(naming: Naming, item: CaptionItem) -> str | None:
    value = item.region if naming.field == "region" else item.artefact
    if value is not None and value not in naming.names:
        allowed = ", ".join(naming.names)
        raise ValueError(f"Truth {item.key!r}: {naming.field} {value!r} is unknown; allowed: {allowed}.")
    return value


def _equal(named: Sequence[str], truths: Sequence[str | None]) -> np.ndarray:
    return np.array([name == true for name, true in zip(named, truths, strict=True)], dtype=float)


def _guesses(
    naming: Naming, names: Sequence[str], items: Sequence[CaptionItem], training: Sequence[TrainingPair]
) -> list[str]:
    named = [(pair.question, naming.read(pair.answer)) for pair in training]
    seen = [(question, name) for question, name in named if name in names]
    if not seen:
        return [NONE] * len(items)
    lookup = Lookup(seen)
    return [lookup.most_frequent(item.question, "question") for item in items]


def _pairs(naming: Naming) -> Callable[[Sequence[CaptionItem]], np.ndarray]:
    """Give the function whose value (n, n, 1) says: does the answer of item i name the truth of item j?"""

    def table(items: Sequence[CaptionItem]) -> np.ndarray:
        said = np.array([naming.read(item.answer) for item in items])
        true = np.array([str(_truth(naming, item)) for item in items])
        return (said[:, None] == true)[:, :, None].astype(float)

    return table


def _elsewhere(naming: Naming, asked: Sequence[CaptionItem]) -> dict[str, dict[str, int]]:
    others = [item for item in asked if item.label is not None and _truth(naming, item) is None]
    counts = {
        name: dict(Counter(naming.read(item.answer) for item in others if item.label == label))
        for label, name in enumerate(LABEL_NAMES)
    }
    return {name: said for name, said in counts.items() if said}
