"""The words of DD-VQA: annotations to published, label-free and verdict-only questions and answers.

DD-VQA (Zhang et al. 2024) annotates FaceForensics++ faces. The published style is the wording of the M2F2-Det
repository's test.jsonl; the other two styles are ours.
"""

from __future__ import annotations

import re

REGIONS = ("skin", "eyebrows", "eyes", "nose", "mouth")
VERDICT_QUESTION = "Determine the authenticity of this image."
WHOLE_QUESTION = "Does this image look real or fake? Give the reasons."

_REGION = re.compile(r"person's (\w+)")
_LEAD = re.compile(r"(?:The image looks|The person's \w+ looks?) (real|fake)\.\s*")
_BECAUSE = re.compile(
    r"[Tt]he person's (?:skin|eyebrows|eyes|nose|mouth) looks? (?:(?:a bit|very|slightly|somewhat) )?"
    r"(?:fake|real) because "
)
# The order in which the published questions name the regions that an answer speaks of.
_NAMED = ("face", "nose", "mouth", "skin", "eyebrows", "eyes")
_EXAMPLES = {
    "skin": "The skin is overly smooth and lacks of details, such as skin texture. ",
    "eyebrows": "The eyebrows look asymmetric. ",
    "eyes": "The eyes look unnaturally asymmetric. ",
    "nose": "The nose lacks of subtle details, such as pores, fine lines. ",
    "mouth": "The mouth is misaligned with other facial features. ",
}

# A reason that starts here was run on to the one before it.
_SUBJECT = (
    r"the (?:skin|eyebrows|eyes|nose|mouth|teeth|chin|lighting|person|person's face)(?: in the image)? "
    r"(?:is|are|looks?|lookes|lacks|does|do|doesn't|appears?|has)\b"
    r"|there (?:are|area)\b|overly (?:large|small) mouth|overly (?:pointed|squared) chin"
    r"|(?:left|right) (?:broken|overlapped) eyebrows|no mouth"
)
_RUN_ON = re.compile(
    rf"(?<!such as)(?<!\bas)(?<!\blike)(?<!\bthat)(?<!\band)(?<!\bbecause)(?<!\bif)(?<!\bbut)[,]?\s+(?={_SUBJECT})",
    re.IGNORECASE,
)
# Slips that the annotation tool put into thousands of answers; each is mended the same way for both labels.
_REPAIRS = tuple(
    (re.compile(pattern, re.IGNORECASE), mended)
    for pattern, mended in (
        (r"\s*/\s*", " or "),
        (r"\blookes\b", "looks"),
        (r"\bcarton\b", "cartoon"),
        (r"\bexpresssion\b", "expression"),
        (r"\bwrinked\b", "wrinkled"),
        (r"\bsparking eyes\b", "sparkling eyes"),
        (r"\black(s?) of\b", r"lack\1"),
        (r"\b(skin|nose|mouth|chin) do not\b", r"\1 does not"),
        (r"\b(eyes|eyebrows) looks\b", r"\1 look"),
        (r"\bthere area of\b", "there are areas"),
        (r"\bunclear or flaw\b", "unclear or flawed"),
        (r"\blook unnatural coloring\b", "have an unnatural coloring"),
        (r"\bperson exhibit\b", "person exhibits"),
        (r"\bperson have complete face feature\b", "person has complete facial features"),
        (r"^the person has (the (?:lighting|person's face)\b)", r"\1"),
        (r"^the lighting in the image is inconsistent, unrealistic shadows", "the lighting and shadows do not match"),
        (r"^overly (large|small) mouth$", r"the mouth is overly \1"),
        (r"^overly (pointed|squared) chin$", r"the chin is overly \1"),
        (r"^(left|right) (broken|overlapped) eyebrows$", r"the \1 eyebrow is \2"),
        (r"^(mismatched (?:beard|mustache))$", r"the person has a \1"),
        (r"^matched beard or mustache$", "the beard or mustache matches the face"),
        (r"^proper hair and hairstyles$", "the hair and the hairstyle look proper"),
        (r"^no mouth$", "there is no mouth"),
    )
)
_VERDICT_WORD = re.compile(r"\b(?:real|fake|fakes|faked|genuine|authentic)\b", re.IGNORECASE)
_EMPTY = {"na", "n a", "n or a", "none", "good", "skin", "nose", "mouth", "eyes", "eyebrows"}


def region_of(question: str) -> str | None:
    """Give the region that an annotation's question asks about, None for the whole image."""
    found = _REGION.search(question)
    return found.group(1) if found else None


def stated_verdict(answer: str) -> str | None:
    """Give `real` or `fake` as an annotation's first sentence states it, else None."""
    found = _LEAD.match(answer)
    return found.group(1) if found else None


def published_pair(question: str, answer: str, label_name: str) -> tuple[str, str]:
    """Reword one annotation as the published training and test files do: the question states the verdict.

    `label_name` (real or fake) serves answers that state none. Slips of the published wording are kept.
    """
    verdict = stated_verdict(answer) or label_name
    reasons = _without_verdict(answer).replace("/", " or ").strip()
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


def verdict_sentence(label_name: str) -> str:
    """Say the verdict: `The image is real.` or `The image is fake.`"""
    return f"The image is {label_name}."


def label_free_answer(answer: str, label_name: str) -> str:
    """Say the verdict, then the annotation's reasons, one sentence each.

    Left out: repeated reasons, one-word scraps, and reasons that hold a verdict word of their own, because the
    verdict is said once and by the label. Without any reason left the verdict stands alone.
    """
    return " ".join([verdict_sentence(label_name), *reason_sentences(answer)])


def reason_sentences(answer: str) -> list[str]:
    """Split an annotation's answer into mended sentences, in order, without the verdict."""
    sentences: list[str] = []
    for part in re.split(r"\.(?:\s+|$)", _without_verdict(answer)):
        for clause in _RUN_ON.split(part):
            text = _mended(clause.strip(" .,"))
            if text.lower() in _EMPTY or len(text) < 3 or _VERDICT_WORD.search(text):
                continue
            sentence = text[0].upper() + text[1:] + "."
            if sentence not in sentences:
                sentences.append(sentence)
    return sentences


def _without_verdict(answer: str) -> str:
    return _BECAUSE.sub("", _LEAD.sub("", answer, count=1) if _LEAD.match(answer) else answer)


def _mended(clause: str) -> str:
    for pattern, mended in _REPAIRS:
        clause = pattern.sub(mended, clause)
    return clause


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
