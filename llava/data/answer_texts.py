"""The words of training: DD-VQA's answers made readable, label-free questions, answers for forgeries of known truth.

DD-VQA (Zhang et al. 2024) annotates FaceForensics++ faces. The published style is the wording of the M2F2-Det
repository's test.jsonl; the other two styles are ours.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

from llava.core.types import FAKE, LABEL_NAMES, REAL, REGIONS

Pair = tuple[str, str]  # question and answer
# What an annotation says before its reasons.
LEAD = re.compile(r"(?:The image looks|The person's \w+ looks?) (real|fake)\.\s*")
_BECAUSE = re.compile(
    r"[Tt]he person's (?:skin|eyebrows|eyes|nose|mouth) looks? (?:(?:a bit|very|slightly|somewhat) )?"
    r"(?:fake|real) because "
)

# A reason that starts here was run on to the one before it ...
_SUBJECT = (
    r"the (?:skin|eyebrows|eyes|nose|mouth|teeth|chin|lighting|person|person's face)(?: in the image)? "
    r"(?:is|are|looks?|lookes|lacks|does|do|doesn't|appears?|has)\b"
    r"|there (?:are|area)\b|overly (?:large|small) mouth|overly (?:pointed|squared) chin"
    r"|(?:left|right) (?:broken|overlapped) eyebrows|mismatched (?:beard|mustache)\b|no mouth|no eyebrow"
    r"|one single eyebrow"
)
# ... except after a word that leaves its own clause open.
_OPEN = (
    *("such as", "as", "like", "that", "and", "or", "because", "if", "but", "than", "has", "have", "a", "the"),
    *("of", "on", "at", "to", "with", "from", "around", "between"),
)
# The tool's own sentences end here; what an annotator typed behind them is another reason.
_TOOL_ENDS = (
    *("other facial features", "large to the face", "small to the face", "such as skin texture", "blurry hairlines"),
    *("unnaturally brighter", "unnaturally darker", "overly large mouth", "overly small mouth"),
    *("overly squared chin", "overly pointed chin"),
)
_BOUNDARY = re.compile(
    "".join(rf"(?<!\b{word})" for word in _OPEN)
    + rf",?\s+(?={_SUBJECT})|(?:"
    + "|".join(f"(?<={end})" for end in _TOOL_ENDS)
    + r") +(?!such as\b)",
    re.IGNORECASE,
)
# The tool's adjectives; a list of features that ends with one has lost its noun.
_ADJECTIVE = (
    r"(?:naturally|smooth|illuminated|wrinkled|blemished|even|arched|straight|thick|thin|bushy|sparse|furrowed|round"
    r"|oval|deep|large|small|sparkling|pointed|broad|full|pouty|white|aligned|misaligned)"
)
_FEATURE = r"(?:skin|eyebrows|eyes|nose|mouth|teeth)"
_SCRAP = r"(?:yes|no|na|n or a|nil|none|nothing|nice|good|bad|very bad|beautiful|different)"
# Slips that the annotation tool put into thousands of answers, and what annotators typed where nothing fitted; each is
# mended the same way for both labels. Clauses come with a small first letter.
_REPAIRS = tuple(
    (re.compile(pattern, re.IGNORECASE), mended)
    for pattern, mended in (
        (r"\s*/\s*", " or "),
        (r"\s{2,}", " "),
        (r"\b(\w+)(?: \1\b)+", r"\1"),
        (r"\blookes\b", "looks"),
        (r"\bcarton\b", "cartoon"),
        (r"\bexpresssion\b", "expression"),
        (r"\bwrinked\b", "wrinkled"),
        (r"\bsparking eyes\b", "sparkling eyes"),
        (r"\black(s?) of\b", r"lack\1"),
        (r"\b(skin|nose|mouth|chin) do not\b", r"\1 does not"),
        (r"^((?:the )?(?:skin|nose|mouth|chin)) are\b", r"\1 is"),
        (r"\b(eyes|eyebrows) looks\b", r"\1 look"),
        (r"^((?:the )?(?:eyes|eyebrows)) is\b", r"\1 are"),
        (r"\bthere area of\b", "there are areas"),
        (r"\bnot have nose$", "not have a nose"),
        (r"\bunclear or flaw\b", "unclear or flawed"),
        (r"\blook unnatural coloring\b", "have an unnatural coloring"),
        (r"\bperson exhibit\b", "person exhibits"),
        (r"\bperson have complete face feature\b", "person has complete facial features"),
        (r"^the person has ((?:the (?:lighting|person's face|hair)|upper lip)\b)", r"\1"),
        (r"^the lighting in the image is inconsistent, unrealistic shadows", "the lighting and shadows do not match"),
        (r"^overly (large|small) mouth$", r"the mouth is overly \1"),
        (r"^overly (pointed|squared) chin$", r"the chin is overly \1"),
        (r"^(left|right) (broken|overlapped) eyebrows$", r"the \1 eyebrow is \2"),
        (r"^(?:the person has )?(mismatched (?:beard|mustache|neckline))$", r"the person has a \1"),
        (r"^blurry hairlines$", "the person has blurry hairlines"),
        (r"^matched beard or mustache$", "the beard or mustache matches the face"),
        (r"^proper hair and hairstyles$", "the hair and the hairstyle look proper"),
        (r"^no (mouth|eyebrow)$", r"there is no \1"),
        (r"^one single eyebrow$", "there is only one eyebrow"),
        # A free text in the middle of the tool's list of features left its second half behind.
        (rf"^{_FEATURE}, (?=(?:{_ADJECTIVE} )+{_FEATURE})", "the person has "),
        (rf"\byes (?={_FEATURE}\b)", ""),
        (rf"(?:,? such as {_SCRAP}| (?:yes|na|n or a|nothing))$", ""),
        (r",? such as$", ""),
    )
)
_VERDICT_WORD = re.compile(r"\b(?:real|fake|fakes|faked|genuine|authentic)\b", re.IGNORECASE)
_DANGLING = re.compile(
    r"\b(?:" + "|".join((*_OPEN, "is", "are", "one", "very")) + r")$"
    rf"|^the person has (?:.* )?{_ADJECTIVE}$|^the person has(?: naturally)? \w+$|\bno (?:image|he)\b",
    re.IGNORECASE,
)
FEWEST_WORDS = 3
KIND_TAG = "kind"  # of records whose answers say which kind of fake an image is: the class, empty for a real one
KIND_WORDS = {"deepfake": "a deepfake", "ai_generated": "AI-generated"}
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
SIGNS = {
    "blending_boundary": "a blending boundary",
    "colour_mismatch": "a colour mismatch",
    "blur": "local blur",
    "over_smooth": "over-smooth texture",
    "resampling": "coarse resampling",
    "warp": "a warp",
    "self_blended": "a blend with a changed copy of itself",
}


def stated_verdict(answer: str) -> str | None:
    """Give `real` or `fake` as an annotation's first sentence states it, else None."""
    found = LEAD.match(answer)
    return found.group(1) if found else None


def without_verdict(answer: str) -> str:
    """Give an annotation's answer without the verdict it begins with and those inside it."""
    return _BECAUSE.sub("", LEAD.sub("", answer, count=1) if LEAD.match(answer) else answer)


def reason_sentences(answer: str) -> list[str]:
    """Split an annotation's answer into mended sentences, in order, without the verdict.

    Left out: repeated reasons, reasons that hold a verdict word of their own (the verdict is said once and by the
    label), fragments that break off, and scraps of fewer than FEWEST_WORDS words.
    """
    sentences: list[str] = []
    for part in re.split(r"\.(?:\s+|$)", without_verdict(answer)):
        for clause in _BOUNDARY.split(part):
            text = _mended(clause.strip(' .,"'))
            if len(text.split()) < FEWEST_WORDS or _VERDICT_WORD.search(text) or _DANGLING.search(text):
                continue
            sentence = text[0].upper() + text[1:] + "."
            if sentence not in sentences:
                sentences.append(sentence)
    return sentences


@cache  # twelve thousand answers hold one thousand different clauses
def _mended(clause: str) -> str:
    clause = clause[:1].lower() + clause[1:]
    for pattern, mended in _REPAIRS:
        clause = pattern.sub(mended, clause)
    return clause.strip()


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


def class_sentence(class_name: str) -> str:
    """Say the verdict with the kind of fake: `The image is a deepfake.`, `The image is fake, made by FaceSwap.`"""
    is_plain = class_name in LABEL_NAMES
    return f"The image is {class_name if is_plain else KIND_WORDS.get(class_name, f'fake, made by {class_name}')}."


def stated_class(text: str, classes: Collection[str]) -> str | None:
    """Give the class whose sentence a text holds, None if it holds none or those of several."""
    found = [name for name in classes if class_sentence(name) in text]
    return found[0] if len(found) == 1 else None


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
