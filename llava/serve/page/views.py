"""The parts of the page that show one picture: HTML with everything in it, every value escaped."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image

from llava.core.types import Explanation, VideoVerdict
from llava.data.inputs import NamedImage
from llava.evaluation.pictures import timeline_png
from llava.pipeline.findings import Finding
from llava.pipeline.overlays import overlay, shrink
from llava.pipeline.pages import fill, png_bytes, png_uri
from llava.pipeline.wording import band_in_words, meaning, regions_in_words
from llava.serve.page.visits import Visit
from llava.serve.page.words import NO_FACE, evidence_name, headline, shown_question

SHOWN_SIDE = 960  # px
JPEG_QUALITY = 88


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


def card(finding: Finding, name: str) -> Markup:
    """Show a verdict: label, certainty, what it means, and the evidence by plain names."""
    verdict = finding.verdict
    video = verdict if isinstance(verdict, VideoVerdict) else None
    is_faceless = verdict.p_fake is None and verdict.face_count == 0 and video is None
    return fill(
        "live_card.html",
        verdict=verdict,
        name=name,
        headline=headline(verdict),
        meaning=NO_FACE if is_faceless else meaning(verdict),
        band=band_in_words(verdict),
        regions=regions_in_words(verdict),
        evidence=[(evidence_name(key), value) for key, value in verdict.evidence.items()],
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
