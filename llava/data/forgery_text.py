"""The words of a forgery whose truth is known: label-free questions, and answers that name region and artefact."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from llava.core.types import FAKE, LABEL_NAMES, REAL, REGIONS
from llava.data.conversation_files import Pair
from llava.data.ddvqa_text import label_free_question, verdict_sentence

SIGNS = {
    "blending_boundary": "a blending boundary",
    "colour_mismatch": "a colour mismatch",
    "blur": "local blur",
    "over_smooth": "over-smooth texture",
    "resampling": "coarse resampling",
    "warp": "a warp",
    "self_blended": "a blend with a changed copy of itself",
}


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What was done to a face: the region (one of five, or `face` for the whole), the artefact, all regions touched."""

    region: str
    artefact: str
    touched: Collection[str]


def truthful_pairs(truth: Truth | None) -> list[Pair]:
    """Give the question about the whole image and one for each region, answered; None stands for an untouched image."""
    return [(label_free_question(region), truthful_answer(region, truth)) for region in (None, *REGIONS)]


def truthful_answer(asked: str | None, truth: Truth | None) -> str:
    """Say the verdict, then what is true of the region that was asked about (None: of the whole image).

    A region that a local forgery left alone is said to be so, though the image is fake.
    """
    verdict = verdict_sentence(LABEL_NAMES[REAL if truth is None else FAKE])
    untouched = f"{_subject(asked)} no signs of editing."
    if truth is None:
        return f"{verdict} {untouched if asked else 'No region shows signs of editing.'}"
    if asked in (None, truth.region):
        return f"{verdict} {_subject(truth.region)} {SIGNS[truth.artefact]}."
    if asked not in truth.touched:
        return f"{verdict[:-1]}, but {untouched[0].lower()}{untouched[1:]}"
    return f"{verdict} {_subject(asked)} signs of the blend that covers the {truth.region}."


def _subject(region: str | None) -> str:
    """Begin a sentence: `The nose shows`, `The eyes show`, `The whole face shows`."""
    if region == "face":
        return "The whole face shows"
    return f"The {region} show{'' if region in ('eyes', 'eyebrows') else 's'}"
