"""A case file: everything that was found in one call and what it rests on, as HTML for people and JSON for programs."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import cv2
import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from llava import __version__
from llava.core.config import to_dict
from llava.core.runtime import atomic_path, software
from llava.core.types import Explanation, VideoVerdict
from llava.data.inputs import NamedImage, NamedInput
from llava.evaluation.pictures import timeline_png
from llava.pipeline.verdict import (
    LIMITS,
    WORDS_LIMIT,
    Finding,
    band_in_words,
    meaning,
    prior_in_words,
    ratio_in_words,
    regions_in_words,
)

if TYPE_CHECKING:
    from llava.pipeline.pipeline import Pipeline

SHOWN_SIDE = 512  # px; a case file holds three pictures per face and is to stay small enough to send
COLOURS = "cividis"  # dark blue to light yellow: rises in lightness, so it also reads in grey and to the colour-blind
OPACITY = 0.45
FRAME_COLOUR = (255, 221, 0)
Facts: TypeAlias = dict[str, Any]


def overlay(pixels: np.ndarray, evidence_map: np.ndarray, seen: float = 1.0) -> np.ndarray:
    """Lay a map (h, w) in colours over the grey central square of a crop: uint8 RGB (H, W, 3) in and out.

    seen: the square's side as a share of the crop's shorter side. The colours span the lowest to the highest value of
    this very map. Fields are not smoothed into one another, because the detector knows no finer grid; outside the
    square, which it does not see, the picture stays grey.
    """
    grey = np.repeat(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    side = round(seen * min(pixels.shape[:2]))
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    low, high = float(evidence_map.min()), float(evidence_map.max())
    spread = (evidence_map - low) / (high - low) if high > low else np.full_like(evidence_map, 0.5)
    large = cv2.resize(spread.astype(np.float32), (side, side), interpolation=cv2.INTER_NEAREST)
    colours = matplotlib.colormaps[COLOURS](large)[..., :3] * 255
    square = (slice(top, top + side), slice(left, left + side))
    grey[square] = np.rint((1 - OPACITY) * grey[square] + OPACITY * colours)
    return grey


def shrink(pixels: np.ndarray, longest_side: int = SHOWN_SIDE) -> np.ndarray:
    """Make a picture smaller, so that no side is longer; a small one stays as it is."""
    height, width = pixels.shape[:2]
    scale = longest_side / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def framed(pixels: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """Draw a frame around (x, y, width, height) into a copy of a picture, wide enough to be seen when it is shrunk."""
    x, y, width, height = box
    thickness = max(2, max(pixels.shape[:2]) // 128)
    shown = pixels.copy()
    for colour, line in (((0, 0, 0), 2 * thickness), (FRAME_COLOUR, thickness)):  # a dark edge, for bright pictures
        cv2.rectangle(shown, (x, y), (x + width - 1, y + height - 1), colour, line)
    return shown


def outlined(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw the outline of a mask (H, W), bool, into a copy of a picture; the line lies outside of it."""
    inside = mask.astype(np.uint8)
    shown = pixels.copy()
    for colour, reach in (((0, 0, 0), 3), (FRAME_COLOUR, 2)):
        grown = cv2.dilate(inside, np.ones((2 * reach + 1, 2 * reach + 1), np.uint8))
        near = cv2.dilate(inside, np.ones((3, 3), np.uint8)) if reach == 2 else inside
        shown[(grown > 0) & (near == 0)] = colour
    return shown


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a page. body: finished HTML, made by `fill` or `figure`; anchor: its id, without spaces."""

    title: str
    body: Markup
    anchor: str


def render_page(
    title: str, sections: Sequence[Section], lead: str | Markup = "", limits: Sequence[str | Markup] = ()
) -> str:
    """Give a whole page: title, lead, sections, and what it can not tell as its last lines.

    It holds style and pictures itself and no script, so it looks the same anywhere and reaches for nothing. Plain
    strings are escaped, Markup is taken as it is.
    """
    return str(fill("page.html", title=title, sections=sections, lead=lead, limits=limits))


def write_page(path: str | Path, page: str) -> None:
    """Write a page into a file that appears complete."""
    with atomic_path(path) as staged:
        staged.write_text(page, encoding="utf-8")


def fill(template: str, **facts: Any) -> Markup:
    """Fill a template of this package. Every value is escaped; one that the template names and is not given raises."""
    return Markup(_environment().get_template(template).render(**facts))


def figure(png: bytes, alt: str, caption: str | Markup = "") -> Markup:
    """Show a PNG picture, embedded. alt: what it shows, for those who do not see it."""
    return fill("figure.html", source=png_uri(png), alt=alt, caption=caption)


def png_uri(png: bytes) -> str:
    """Give a PNG file as a `data:` address."""
    return f"data:image/png;base64,{b64encode(png).decode('ascii')}"


def png_bytes(pixels: np.ndarray) -> bytes:
    """Encode uint8 RGB (H, W, 3) as a PNG file."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "png", optimize=True)
    return buffer.getvalue()


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("llava.jobs", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def entry_of(finding: Finding, source: NamedInput, said: Sequence[Explanation] | None = None) -> Facts:
    """Give what a case file says of one face or video, as plain JSON values; pictures are PNG `data:` addresses.

    source: the input that was asked about. said: all answers about it, oldest first; None = the finding's explanation.
    Pictures of faces are shrunk to 512 px; their real sizes stand beside them.
    """
    verdict = finding.verdict
    if said is None:
        said = [] if finding.explanation is None else [finding.explanation]
    words = {"meaning": meaning(verdict), "scope": verdict.scope_text, "band": band_in_words(verdict)}
    words["regions"] = regions_in_words(verdict)
    if verdict.likelihood_ratio is not None and verdict.prior is not None:
        words |= {"likelihood_ratio": ratio_in_words(verdict.likelihood_ratio), "prior": prior_in_words(verdict.prior)}
    image = source.pixels if isinstance(source, NamedImage) else None
    size = None if image is None else _size(image)
    return {
        "input": {"name": source.name, "sha256": source.sha256, "bytes": source.byte_count, "size": size},
        "verdict": {**verdict.to_dict(), "score": verdict.score_text},
        "in_words": words,
        "explanation": next(map(_words, said), None),
        "follow_ups": [_words(answer) for answer in said[1:]],
        "video": _video(verdict) if isinstance(verdict, VideoVerdict) else None,
        **_pictures(finding, image),
    }


def case_of(pipeline: Pipeline, entries: Sequence[Facts], settings: Mapping[str, Any] | None = None) -> Facts:
    """Give the facts of a whole case file: when, by which model and software, how it was asked, and the entries."""
    return case_about(model_facts(pipeline), entries, settings)


def model_facts(pipeline: Pipeline) -> Facts:
    """Give what a case file says of a model; reads its weight files once for their SHA-256."""
    detector = pipeline.detector
    return {
        "name": pipeline.name,
        "detector": detector.name,
        "scope": detector.scope,
        **_fingerprints(pipeline),
        "calibration": None if detector.calibration is None else to_dict(detector.calibration),
    }


def case_about(model: Facts, entries: Sequence[Facts], settings: Mapping[str, Any] | None = None) -> Facts:
    """Give the facts of a whole case file as `case_of` does, for a model of which the facts are known."""
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model,
        "software": {"m2f2": __version__, **software()},
        "settings": dict(settings or {}),
        "limits": [*LIMITS, *([WORDS_LIMIT] if any(entry["explanation"] for entry in entries) else [])],
        "entries": list(entries),
    }


def entry_section(entry: Facts, anchor: str) -> Section:
    """Lay out one entry as a part of a page."""
    verdict = entry["verdict"]
    which = f" (face {verdict['face']} of {verdict['face_count']})" if verdict["face_count"] > 1 else ""
    name = entry["input"]["name"]
    short = name.rpartition("/")[2] or name  # the whole path stands in the table of the input
    return Section(title=f"{short}{which}", body=fill("entry.html", **entry, id=anchor), anchor=anchor)


def render_case(case: Facts) -> str:
    """Lay out a case file as a page."""
    entries = case["entries"]
    sections = [entry_section(entry, f"entry-{number}") for number, entry in enumerate(entries, 1)]
    made = Section(title="How this was made", body=fill("made.html", **case), anchor="made")
    return render_page("Case file", [*sections, made], lead=fill("lead.html", **case), limits=case["limits"])


def write_case_html(path: str | Path, case: Facts) -> None:
    """Write a case file for people; it appears complete."""
    write_page(path, render_case(case))


def _words(said: Explanation) -> Facts:
    """Give a question and its answer."""
    return {
        "question": said.question,
        "about": said.about,
        "text": said.text,
        "text_verdict": said.text_verdict,
        "agrees": said.agrees,
        "remark": said.remark,
    }


def _video(verdict: VideoVerdict) -> Facts:
    """Give what there is to know of the frames beside what the verdict holds; scores are the detector's own."""
    scores = [frame.raw_p_fake for frame in verdict.frames if frame.raw_p_fake is not None]
    return {
        "frames": len(verdict.frames),
        "frames_with_face": verdict.frames_with_face,
        "telling_seconds": verdict.telling_seconds,
        "lowest": min(scores, default=None),
        "highest": max(scores, default=None),
        "timeline": {"png": png_uri(timeline_png(verdict))} if scores else None,
    }


def _pictures(finding: Finding, image: np.ndarray | None) -> Facts:
    """Give the crop, the map over it, and, where the crop was cut out, the whole image with the face in a frame."""
    if finding.pixels is None:
        return {"crop": None, "evidence_map": None, "whole": None}
    box, mapped = finding.verdict.face_box, finding.evidence_map
    is_cut = image is not None and image.shape != finding.pixels.shape
    whole = framed(image, box) if image is not None and is_cut and box else None
    return {
        "crop": _picture(finding.pixels),
        "whole": None if whole is None else _picture(whole),
        "evidence_map": None
        if mapped is None
        else {
            "seen": finding.seen,
            "fields": [[round(value, 4) for value in row] for row in mapped.tolist()],
            "lowest": float(mapped.min()),
            "highest": float(mapped.max()),
            "overlay": _picture(overlay(finding.pixels, mapped, finding.seen)),
        },
    }


def _picture(pixels: np.ndarray) -> Facts:
    return {"size": _size(pixels), "png": png_uri(png_bytes(shrink(pixels)))}


def _size(pixels: np.ndarray) -> list[int]:
    """Give [width, height]."""
    return [pixels.shape[1], pixels.shape[0]]


def _fingerprints(pipeline: Pipeline) -> Facts:
    """Give those of the detector and of the explainer's weight files, as certificates name them; None without one."""
    if pipeline.explainer is None:
        return {"detector_sha256": pipeline.detector.fingerprint(), "explainer_sha256": None}
    from llava.explainer.convert import ready  # here, because a detector alone needs no language-model stack
    from llava.explainer.delta import detector_fingerprint, fingerprint

    folder = ready(pipeline.name)
    inside = detector_fingerprint(folder, pipeline.detector)
    return {"detector_sha256": inside, "explainer_sha256": fingerprint(folder)}
