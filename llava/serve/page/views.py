"""What the page says, and the parts that show one picture: HTML with everything in it, every value escaped."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Collection, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

from llava.core.types import Explanation, Verdict, VerdictLabel, VideoVerdict
from llava.data.answer_texts import VERDICT_QUESTION
from llava.data.inputs import NamedImage
from llava.evaluation.pictures import timeline_png
from llava.jobs.case_file import fill, overlay, png_bytes, png_uri, shrink
from llava.pipeline.settings import DEMO_MODEL
from llava.pipeline.verdict import LIMITS, WORDS_LIMIT, Finding, band_in_words, meaning, regions_in_words
from llava.serve.engine import WORDLESS
from llava.serve.page.visits import Visit

TITLE = "Is this face real or forged?"
LEAD = "You get a verdict, how sure it is, what it rests on, and the reasons in words."
MIXED_LEAD = "You get a verdict, how sure it is, what it rests on and, from a model that writes, the reasons in words."
WORDLESS_LEAD = "You get a verdict, how sure it is, and what it rests on."
NO_TOOL = (
    "It learned from a handful of photographs and is no tool: try the page with it, and believe none of its verdicts."
)
DEMO = f"This is the model of the demonstration. {NO_TOOL}"
DEMO_AMONG = f"The model called {DEMO_MODEL} is that of the demonstration. {NO_TOOL}"
FORGETTING = (
    "Clear forgets it at once; otherwise it is forgotten within an hour after you last did something with it. It is "
    "never written to a file that stays."
)
PRIVACY = f"What you send is looked at on this server alone and kept in its memory for what you do next. {FORGETTING}"
REMOTE_PRIVACY = (
    "What you send is kept in this server's memory for what you do next. The faces that are found in it, or all of it "
    f"where there is none, go to the model's machine, which keeps a few in its memory, too. {FORGETTING}"
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

NO_MODEL = "This model is not there now; try again in a minute, or load the page again."
GONE = "There is no picture here any more; drop it again."
EMPTY = "The question is empty; ask something, such as: Why?"
FAILED = "Something went wrong here; the server's log says what."
LOCKED = "Your key is no longer valid; log out at the end of the page, and log in with another one."
NO_FACE = (
    "No face was found, and only faces are judged. Take a picture in which a face is larger and seen from the front."
)
NO_WRITER = "This model gives verdicts and no words."
NO_WORDS = "There is nothing to explain without a verdict."
BROKEN_OFF = "The answer broke off and is not kept; ask again."
AGAIN = "Writing the answer again, in other words."
STOPPED = "Stopped before the first word."
NO_MORE = "No words could be written about this face alone; choose the largest one."
CAPABILITIES = {True: "verdict and words", False: "verdict alone", None: ""}
SHOWN_SIDE = 960  # px
JPEG_QUALITY = 88


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


def announcement(verdict: Verdict, model: str = "") -> str:
    """Say a verdict in one sentence, for people who hear the page; `model` as in `card`."""
    why = f" {verdict.reason[:1].upper()}{verdict.reason[1:]}."
    sure = why if verdict.p_fake is None else f" {verdict.score_text}, {verdict.calibration}."
    which = f" Face {verdict.face} of {verdict.face_count}." if verdict.face_count > 1 else ""
    whose = f" of {model}" if model else ""
    return f"Verdict{whose}: {headline(verdict)}.{sure}{which} {verdict.scope_text}".rstrip()


def remark(models: Collection[str]) -> str:
    """Say what has to be known of the models before anything else, by their names."""
    if DEMO_MODEL not in models:
        return ""
    return DEMO if len(models) == 1 else DEMO_AMONG


def lead(can_write: Collection[bool | None]) -> str:
    """Say what one gets here, from models of which each does or does not write words; None = nobody knows yet."""
    if set(can_write) == {True}:
        return LEAD
    return WORDLESS_LEAD if set(can_write) == {False} else MIXED_LEAD


def limits(can_write: Collection[bool | None]) -> list[str]:
    """List what the page can not tell; of words only where a model may write some, see `lead`."""
    return [*LIMITS, WORDS_LIMIT] if set(can_write) != {False} else [*LIMITS]


def wordless_note(writers: Sequence[str]) -> str:
    """Say that a model has no words, and which others have some."""
    return f"{NO_WRITER} For reasons in words, clear this and choose {' or '.join(writers)}." if writers else WORDLESS


def model_label(name: str, can_write: bool | None) -> str:
    """Name a model in the choice, with what it gives where that is known."""
    return f"{name}: {CAPABILITIES[can_write]}" if CAPABILITIES[can_write] else name


def shown_question(question: str) -> str:
    """Give a question as the page shows it; the first one is asked by the page itself."""
    return "" if question == VERDICT_QUESTION else question


def photo(visit: Visit) -> Markup:
    """Show the picture with a numbered box around each face; of a video, the most telling frame."""
    source = visit.source
    pixels = source.pixels if isinstance(source, NamedImage) else visit.finding.pixels
    if pixels is None:
        return Markup("")
    boxes = _boxes(visit, *pixels.shape[:2]) if isinstance(source, NamedImage) else []
    return fill(
        "live_photo.html",
        name=source.name,
        size=[pixels.shape[1], pixels.shape[0]],
        boxes=boxes,
        telling=visit.finding.verdict,
        is_video=not isinstance(source, NamedImage),
        source=jpeg_uri(shrink(pixels, SHOWN_SIDE)),
    )


def card(finding: Finding, name: str, model: str = "") -> Markup:
    """Show a verdict: label, certainty, what it means, and the evidence by plain names.

    model: whose verdict it is, where there is a choice of them.
    """
    verdict = finding.verdict
    video = verdict if isinstance(verdict, VideoVerdict) else None
    is_faceless = verdict.p_fake is None and verdict.face_count == 0 and video is None
    return fill(
        "live_card.html",
        verdict=verdict,
        name=name,
        model=model,
        headline=headline(verdict),
        meaning=NO_FACE if is_faceless else meaning(verdict),
        band=band_in_words(verdict),
        regions=regions_in_words(verdict),
        evidence=[(verdict.meanings.get(name, name), value) for name, value in verdict.evidence.items()],
        video=video,
        timeline="" if video is None or video.p_fake is None else png_uri(timeline_png(video)),
    )


def words(answers: Sequence[Explanation], note: str = "", is_writing: bool = False) -> Markup:
    """Show what was said about a face; the first answer is the explanation, the others follow their questions."""
    said = [(shown_question(answer.question), answer) for answer in answers]
    return fill("live_words.html", said=said, note=note, is_writing=is_writing)


def heatmap(finding: Finding) -> Markup:
    """Show the detector's map over the face, or say that there is none."""
    mapped = finding.evidence_map
    crop = "" if finding.pixels is None else jpeg_uri(shrink(finding.pixels))
    if finding.pixels is None or mapped is None:
        return fill("live_map.html", crop=crop, shown="", fields=(0, 0), lowest=0.0, highest=0.0, is_part=False)
    return fill(
        "live_map.html",
        crop=crop,
        shown=png_uri(png_bytes(shrink(overlay(finding.pixels, mapped, finding.seen)))),
        fields=mapped.shape,
        lowest=float(mapped.min()),
        highest=float(mapped.max()),
        is_part=finding.seen < 1 or finding.pixels.shape[0] != finding.pixels.shape[1],
    )


def thumbnail(path: Path, name: str) -> Markup:
    """Show an example small."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    return fill("live_thumbnail.html", source=jpeg_uri(shrink(pixels, 240)), name=name)


def jpeg_uri(pixels: np.ndarray) -> str:
    """Give uint8 RGB (H, W, 3) as the `data:` address of a JPEG, for the eye alone."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode('ascii')}"


def _boxes(visit: Visit, height: int, width: int) -> list[dict[str, float | int | bool]]:
    """Give the boxes of the faces in percent of the picture."""
    found = [(number, finding.verdict.face_box) for number, finding in enumerate(visit.findings)]
    return [
        {
            "number": number + 1,
            "is_chosen": number == visit.chosen,
            "left": 100 * box[0] / width,
            "top": 100 * box[1] / height,
            "width": 100 * box[2] / width,
            "height": 100 * box[3] / height,
        }
        for number, box in found
        if box is not None
    ]
