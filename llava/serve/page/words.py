"""What the page says, apart from what it says of one picture."""

from __future__ import annotations

from typing import NamedTuple

from llava.core.types import REGIONS, Verdict, VerdictLabel
from llava.explainer.prompts import VERDICT_QUESTION

TITLE = "Is this face real or forged?"
LEAD = "You get a verdict, how sure it is, what it rests on, and the reasons in words."
DEMO = (
    "This is the model of the demonstration. It learned from a handful of photographs and is no tool: try the page "
    "with it, and believe none of its verdicts."
)
PRIVACY = (
    "What you send is looked at on this server alone and kept in its memory, so that you can ask about it. Clear "
    "forgets it at once; otherwise it is forgotten within an hour after your last question. It is never written to a "
    "file that stays."
)
DROP = "Photo or short video, up to 20 MB (25 megapixels, 5 minutes)"
SUGGESTIONS = (
    "Does this image look real or fake? Give the reasons.",
    "Do the person's eyes look real or fake? Give the reason.",
    "Does the person's mouth look real or fake? Give the reason.",
)
HEADLINES = {
    VerdictLabel.FAKE: "Fake",
    VerdictLabel.REAL: "Real",
    VerdictLabel.UNCERTAIN: "Uncertain",
    VerdictLabel.INCONCLUSIVE: "No verdict",
}
UNCALIBRATED = {VerdictLabel.FAKE: "Looks fake", VerdictLabel.REAL: "Looks real"}
EVIDENCE = {"p_real": "Speaks for real", "p_fake": "Speaks for fake"}

NO_MODEL = "This model is not there now; try again in a minute, or load the page again."
GONE = "There is no picture here any more; drop it again."
EMPTY = "The question is empty; ask something, such as: Why?"
FAILED = "Something went wrong here; the server's log says what."
LOCKED = "Your key is no longer valid; log out at the end of the page, and log in with another one."
NO_FACE = (
    "No face was found, and only faces are judged. Take a picture in which a face is larger and seen from the front."
)
NO_WORDS = "There is nothing to explain without a verdict."
BROKEN_OFF = "The answer broke off and is not kept; ask again."
STOPPED = "Stopped before the first word."
NO_MORE = "No words could be written about this face alone; choose the largest one."


class Example(NamedTuple):
    """A photo that comes with the source tree: file, who it shows, and where it is from."""

    file: str
    name: str
    credit: str


EXAMPLES = (
    Example("grace_hopper.jpg", "Grace Hopper", "US Navy, public domain"),
    Example("astronaut.png", "Eileen Collins", "NASA, public domain"),
    Example("portrait_cc0_1.png", "Portrait 1", "IBM MAX-Facial-Recognizer, CC0"),
    Example("portrait_cc0_2.png", "Portrait 2", "IBM MAX-Facial-Recognizer, CC0"),
)


def headline(verdict: Verdict) -> str:
    """Give the verdict in a word or two; without calibration nobody knows how often it is right."""
    known = HEADLINES if verdict.is_calibrated else HEADLINES | UNCALIBRATED
    return known[verdict.label]


def evidence_name(name: str) -> str:
    """Give the name of a piece of evidence in plain words."""
    return f"Map: {name}" if name in REGIONS else EVIDENCE.get(name, name.replace("_", " ").capitalize())


def announcement(verdict: Verdict) -> str:
    """Say a verdict in one sentence, for people who hear the page."""
    why = f" {verdict.reason[:1].upper()}{verdict.reason[1:]}."
    sure = why if verdict.p_fake is None else f" {verdict.score_text}, {verdict.calibration}."
    which = f" Face {verdict.face} of {verdict.face_count}." if verdict.face_count > 1 else ""
    return f"Verdict: {headline(verdict)}.{sure}{which}"


def shown_question(question: str) -> str:
    """Give a question as the page shows it; the first one is asked by the page itself."""
    return "" if question == VERDICT_QUESTION else question
