"""The words of DD-VQA: annotations to published, label-free and verdict-only questions and answers.

DD-VQA (Zhang et al. 2024) annotates FaceForensics++ faces. The published style is the wording of the M2F2-Det
repository's test.jsonl; the other two styles are ours.
"""

from __future__ import annotations

import re

from llava.core.types import LABEL_NAMES, REGIONS
from llava.data.ddvqa_reasons import reason_sentences, stated_verdict, without_verdict

VERDICT_QUESTION = "Determine the authenticity of this image."
WHOLE_QUESTION = "Does this image look real or fake? Give the reasons."

_REGION = re.compile(r"person's (\w+)")
_LABEL_WORD = re.compile(rf"(?<![\w-])(?:{'|'.join(LABEL_NAMES)})(?![\w-])", re.I)
_PUBLISHED_REGION = re.compile(r"The (\w+) in the image (?:is|are) (\w+)")
# The order in which the published questions name the regions that an answer speaks of.
_NAMED = ("face", "nose", "mouth", "skin", "eyebrows", "eyes")
_EXAMPLES = {
    "skin": "The skin is overly smooth and lacks of details, such as skin texture. ",
    "eyebrows": "The eyebrows look asymmetric. ",
    "eyes": "The eyes look unnaturally asymmetric. ",
    "nose": "The nose lacks of subtle details, such as pores, fine lines. ",
    "mouth": "The mouth is misaligned with other facial features. ",
}


def region_of(question: str) -> str | None:
    """Give the region that an annotation's question asks about, None for the whole image."""
    found = _REGION.search(question)
    return found.group(1) if found else None


def published_pair(question: str, answer: str, label_name: str) -> tuple[str, str]:
    """Reword one annotation as the published training and test files do: the question states the verdict.

    `label_name` (real or fake) serves answers that state none. Slips of the published wording are kept.
    """
    verdict = stated_verdict(answer) or label_name
    reasons = without_verdict(answer).replace("/", " or ").strip()
    if reasons.startswith("the"):
        reasons = "T" + reasons[1:]
    region = region_of(question)
    if region is None:
        named = [name for name in _NAMED if name in reasons.lower()]
        # An answer that speaks of one region only gets that region's question.
        if len(named) != 1 or named[0] not in REGIONS:
            basis = ", ".join(named)
            return f"This image is {verdict}. Describe the authenticity of the image based on {basis}.", reasons
        region = named[0]
    return _published_region_question(region, verdict), reasons


def label_free_question(region: str | None) -> str:
    """Ask about a region, or the whole image, in words that are the same for real and fake images."""
    if region is None:
        return WHOLE_QUESTION
    verb = "Do" if region.startswith("eye") else "Does"
    return f"{verb} the person's {region} look real or fake? Give the reason."


def stated_label(question: str) -> int | None:
    """Give the label a question states: the one of the whole words `real` and `fake` that it holds, None if both."""
    words = {word.lower() for word in _LABEL_WORD.findall(question)}
    return LABEL_NAMES.index(words.pop()) if len(words) == 1 else None


def flipped_question(question: str) -> str:
    """Ask the same with the other label stated. Raises ValueError when no label is stated.

    A published region question becomes that of the other label as a whole, because its format gives the label away,
    too; in any other question the label's word is exchanged.
    """
    label = stated_label(question)
    if label is None:
        raise ValueError(
            f"{question!r} states no label (one of the whole words real and fake), so none can be flipped."
        )
    other = LABEL_NAMES[1 - label]
    found = _PUBLISHED_REGION.match(question)
    if found and found[1] in REGIONS and question == _published_region_question(found[1], found[2]):
        return _published_region_question(found[1], other)
    return _LABEL_WORD.sub(other, question)


def verdict_sentence(label_name: str) -> str:
    """Say the verdict: `The image is real.` or `The image is fake.`"""
    return f"The image is {label_name}."


def label_free_answer(answer: str, label_name: str) -> str:
    """Say the verdict, then the annotation's reasons, one sentence each; without any, the verdict stands alone."""
    return " ".join([verdict_sentence(label_name), *reason_sentences(answer)])


def _published_region_question(region: str, verdict: str) -> str:
    are = "are" if region.startswith("eye") else "is"
    stem = f"The {region} in the image {are} {verdict}, tell me why. Answer in one sentence in the format"
    if verdict == "real":
        return f'{stem}"The person has naturally …… {region}."'
    example = _EXAMPLES[region]
    # The published question for the eyes has its `like` in another place than the others.
    early, late = (" like", "") if region == "eyes" else ("", "like ")
    return (
        f'{stem}"The {region} ……"{early}. Instead of saying, "The {region} {are} fake because" '
        f'directly answer why {late}"{example}"'
    )
