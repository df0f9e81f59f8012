"""What a text says of an image: real, fake, or neither; by whole words, and safe under negation.

The rule, in order; the first step that decides gives the verdict, otherwise the text is undecided:

1. a sentence labelled as the answer ("Verdict: ...", "In conclusion, ...");
2. the first sentence that calls the image, the photo, the face or the person (or nothing named) real or fake;
3. sentences that call a region (skin, eyes, mouth, lighting ...) real or fake, if all of them agree;
4. the image or face as a whole *is / looks / seems* realistic, unrealistic, lifelike or artificial.

A sentence that says both is passed over; so are questions, and words under "if", "whether", "although", "at first
glance", "made to look", "not sure" and the like. A negation flips a verdict word when only light words stand between
them ("does not appear to be a real photo"); with other words between, its reach is unclear and the word is not read.
"Realistic facial features" describes features, so it is no verdict.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from llava.core.types import FAKE, REAL

TAGS = ("</s>", "<s>", "</n>")

_REAL = (
    r"real(?![- ](?:time|world|looking|estate))|authentic|genuine|legit(?:imate)?|bona fide|pristine"
    r"|un(?:manipulated|altered|edited|doctored|tampered|modified)"
)
_MADE = r"(?:generated|created|made|produced|rendered|synthesi[sz]ed|altered|edited|manipulated)"
_MACHINE = r"(?:ai|artificial intelligence|computers?|machine|gan|diffusion|neural|deep learning|generative|algorithm)"
_FAKE = (
    rf"(?:ai|computer|machine|gan|diffusion|digitally|artificially|synthetically)[- ]{_MADE}"
    rf"|{_MADE} (?:by|with|using|through) (?:an? |the )?{_MACHINE}"
    r"|deep[- ]?fake[sd]?|fak(?:e[sd]?|ery|ing)(?! (?:smile|tan|nails|lashes|eyelashes))"
    r"|forge(?:d|ry|ries)|manipulat(?:ed|ions?)|tamper(?:ed|ing)|doctored|altered|edited|photo-?shop(?:ped|ping)"
    r"|synthetic|synthesi[sz]ed|generated|fabricated|counterfeit|spoof(?:ed)?|cgi|unreal|(?:in|un)authentic|ungenuine"
    r"|face[- ]?swap(?:ped|s)?|swapped|bogus|phony"
)
_TERM = re.compile(rf"(?<![\w-])(?:(?P<real>{_REAL})|(?P<fake>{_FAKE}))(?![\w]|-(?:looking|like))")
_WEAK = re.compile(
    r"\b(?:is|are|was|be|been|being|looks?|looking|appears?|seems?)"
    r"(?: (?:not|all|very|quite|so|too|to|be|a bit|\w+ly))* "
    r"(?:(?P<real>realistic|lifelike)|(?P<fake>unrealistic|artificial))\b"
    r"(?=\s*(?:$|[.!;]|and\b|or\b|but\b|because\b|to me\b|enough\b|in\b|with\b|due\b|overall\b))"
)
_WHOLE = "image|photo|photograph|picture|portrait|frame|video|face|person|man|woman|subject|it|this|he|she"
_REGION = (
    "skin|eyebrows?|brows?|eyes?|eyelids?|pupils?|nose|nostrils?|mouth|lips?|teeth|tooth|tongue|chin|jaw|cheeks?|ears?"
    "|forehead|hair|hairlines?|beard|mustache|moustache|bangs|lighting|light|shadows?|background|texture|features?"
)
_NOUN = re.compile(rf"\b(?:(?P<whole>{_WHOLE})|(?P<region>{_REGION}))\b")
_PLACE = re.compile(
    r"\b(?:in|of|on|for|from|within|across) (?:the|this|that|his|her) (?:person's )?(?:" + _WHOLE + r")\b"
)

_NEGATOR = re.compile(
    r"^(?:not|no|never|neither|none|nothing|nobody|without|hardly|barely|scarcely|rarely|little|doubt\w*|unlikely)$"
)
_LIGHT = re.compile(
    r"^(?:an?|the|any|some|this|that|it|its|is|are|was|were|be|been|being|am|has|have|had|do|does|did|will|would|can|could"
    r"|looks?|looking|appears?|appearing|seems?|like|to|of|for|at|all|in|as|so|too|very|quite|even|a|bit|longer|more|or|and"
    r"|images?|photos?|photographs?|pictures?|portraits?|frames?|videos?|faces?|person|human|one|signs?|evidence|traces?"
    r"|indications?|indicators?|hints?|proof|reasons?|suggests?|suggesting|shows?|showing|indicates?|indicating|contains?"
    r"|thinks?|believes?|says?|considers?|considered|finds?|feels?|see|seen|anything|obvious|visible|clear|likely|natural"
    r"|realistic|there|here|i|we|\w+ly)$"
)
_CLAUSE = re.compile(
    r"[,:()–—]|\s-\s|\b(?=(?:although|though|while|whereas|despite)\b)"
    r"|\bbut\b|\bhowever\b|\bbecause\b|\bsince\b|\bdue to\b"
    rf"|\btherefore\b|\bthus\b|\bhence\b|\bso (?=it\b|the\b|this\b)|\band\b(?! (?:{_REAL}|{_FAKE})\b)"
)
_UNREAD_CLAUSE = re.compile(
    r"\b(?:if|whether|unless|although|though|while|whereas|despite|claim(?:s|ed|ing)?|pretend\w*|supposed(?:ly)?"
    r"|(?:made|meant|intended|designed|attempt\w*|trie[sd]|try|trying) to|mistaken?|almost|nearly"
    r"|not (?:necessarily|always|sure|certain)|unsure|uncertain|unclear"
    r"|(?:can|could|am) not (?:tell|say|determine|decide|know)"
    r"|not (?:tell|know|determine|decide)|(?:hard|difficult|unable|impossible) to (?:tell|say|determine|decide|know))\b"
)
_UNREAD_SENTENCE = re.compile(r"\bat first (?:glance|sight|look)\b|\binitially\b|\bsuperficially\b|\?\s*$")
_ANSWER = re.compile(
    r"^\s*(?:(?:my |the |final )*(?:verdict|answer|conclusion|judge?ment|decision)(?: is)?\s*[:\-]|in conclusion\b)"
)
_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n\s*\n|\n(?=\s*(?:[-*•]|\d+[.)]))")

_REWRITES = (
    (re.compile(r"<[^<>\s]{1,16}>|[#*_`\"“”|]"), " "),
    (re.compile(r"[’‘´]"), "'"),
    (re.compile(r"\ba\.\s?i\.(?=\W)"), "ai"),
    (re.compile(r"\bdeep fake"), "deepfake"),
    (re.compile(r"\bcan(?:not|'t|t)\b"), "can not"),
    (re.compile(r"\b(is|are|was|were|do|does|did|has|have|had|wo|would|could|should|ai)n'?t\b"), r"\1 not"),
    (re.compile(r"\b(?:no|without (?:an?y? )?|beyond (?:an?y? )?) ?(?:doubt|question)\b"), " "),
    (re.compile(r"\bnothing but\b|\bnot (?:only|just|merely|simply)\b"), " "),
    (re.compile(r"\b(?:anything but|by no means|in no way|far from|absence of)\b"), "not"),
    (re.compile(r"\b(?:free (?:of|from)|devoid of|fail(?:s|ed)? to)\b"), "not"),
    (re.compile(r"\black(?:s|ing)?(?: of)? (?=(?:any |all )?(?:signs?|evidence|traces?|indications?)\b)"), "no "),
    (re.compile(r"\btoo \w+ to (?:be|look)\b"), "is not"),
    (re.compile(r"\b(?:non|un)-(?=[a-z])"), "not "),
    (re.compile(r"\b(?:rather than|instead of|nor)\b"), ", not"),
    (re.compile(r"\bnot, [^,.]{1,40},"), "not"),
    (re.compile(r"\b(?:in real life|real life)\b"), "life"),
)  # fmt: skip
_YES_NO = re.compile(r"^\s*(?:yes|no)\b[,:]?\s+(?=(?:it|this|that|the|i|he|she)\b)")


class _Reading(NamedTuple):
    verdict: int
    is_region: bool


def strip_tags(text: str) -> str:
    """Remove the model's `</s>`, `<s>` and `</n>`, and white space at both ends."""
    for tag in TAGS:
        text = text.replace(tag, "")
    return text.strip()


def parse_verdict(text: str) -> int | None:
    """Read what a text says of its image: 0 real, 1 fake, None undecided; the module's head gives the rule."""
    sentences = _sentences(text)
    strong = [list(_readings(sentences, i, _TERM)) for i in range(len(sentences))]
    weak = [list(_readings(sentences, i, _WEAK)) for i in range(len(sentences))]
    regions = {r.verdict for found in strong for r in found if r.is_region}
    decided = (
        _first_unanimous([found for found, s in zip(strong, sentences, strict=True) if _ANSWER.match(s)]),
        _first_unanimous([[r for r in found if not r.is_region] for found in strong]),
        next(iter(regions)) if len(regions) == 1 else None,
        _first_unanimous([[r for r in found if not r.is_region] for found in weak]) if not regions else None,
    )
    return next((verdict for verdict in decided if verdict is not None), None)


def parse_verdict_published(text: str) -> int | None:
    """Read a verdict as the original judge: `real` anywhere is 0, else `fake` or `computer-generated` is 1."""
    text = text.lower()
    if "real" in text:
        return REAL
    return FAKE if "fake" in text or "computer-generated" in text else None


def _sentences(text: str) -> list[str]:
    text = text.lower()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    sentences = (_YES_NO.sub("", s) for s in _SENTENCE.split(text))
    return [s for s in sentences if s.strip() and not _UNREAD_SENTENCE.search(s)]


def _first_unanimous(sentences: list[list[_Reading]]) -> int | None:
    for found in sentences:
        verdicts = {r.verdict for r in found}
        if len(verdicts) == 1:
            return verdicts.pop()
    return None


def _clauses(sentence: str) -> Iterator[tuple[str, int]]:
    """Give each clause that states something, with its start in the sentence."""
    starts = [0, *(m.end() for m in _CLAUSE.finditer(sentence))]
    ends = [*(m.start() for m in _CLAUSE.finditer(sentence)), len(sentence)]
    for start, end in zip(starts, ends, strict=True):
        yield sentence[start:end], start


def _readings(sentences: list[str], index: int, pattern: re.Pattern[str]) -> Iterator[_Reading]:
    """Give what each verdict word of one sentence says, and whether of a region; earlier sentences name the subject."""
    earlier, sentence = " ".join(sentences[:index]) + " ", sentences[index]
    for clause, start in _clauses(sentence):
        for match in pattern.finditer(clause):
            said = REAL if match["real"] else FAKE
            position = start + match.start("real" if match["real"] else "fake")
            before = sentence[start:position]
            flips = _flips(before)
            if flips is not None and not _UNREAD_CLAUSE.search(before):
                is_region = _is_region(earlier + sentence[:position], sentence[start + match.end() :])
                yield _Reading(said ^ flips, is_region)


def _flips(before: str) -> int | None:
    """Tell whether the negations before a word flip it (1) or not (0); None when their reach is unclear."""
    words = re.findall(r"[\w'%-]+", _TERM.sub("so", before))
    negators = [i for i, word in enumerate(words) if _NEGATOR.match(word)]
    if not negators:
        return 0
    if not all(_LIGHT.match(w) or _NEGATOR.match(w) for w in words[negators[0] + 1 :]):
        return None
    return len(negators) % 2


def _is_region(before: str, after: str) -> bool:
    """Tell whether a verdict word is said of a region: of the noun right after it, else of the last one before it."""
    following = _NOUN.match(after.lstrip())
    if following and after.startswith(" "):
        return following["region"] is not None
    named = list(_NOUN.finditer(_PLACE.sub(" ", before)))
    return bool(named) and named[-1]["region"] is not None
