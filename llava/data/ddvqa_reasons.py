"""DD-VQA's annotated answers to readable reasons: run-ons split, slips mended, scraps left out."""

from __future__ import annotations

import re
from functools import cache

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
