"""A case file: everything that was found in one call and what it rests on, as HTML for people and JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from llava import __version__
from llava.core.config import to_dict
from llava.core.runtime import software
from llava.core.types import Explanation, VideoVerdict
from llava.data.inputs import NamedImage, NamedInput
from llava.evaluation.pictures import timeline_png
from llava.explainer.convert import ready
from llava.pipeline.findings import Finding
from llava.pipeline.overlays import framed, overlay, shrink
from llava.pipeline.pages import Section, fill, png_bytes, png_uri, render_page, write_page
from llava.pipeline.wording import (
    LIMITS,
    band_in_words,
    meaning,
    prior_in_words,
    ratio_in_words,
    regions_in_words,
)

if TYPE_CHECKING:
    from llava.pipeline.pipeline import Pipeline

Facts: TypeAlias = dict[str, Any]


def entry_of(finding: Finding, source: NamedInput, said: Sequence[Explanation] | None = None) -> Facts:
    """Give what a case file says of one face or video, as plain JSON values; pictures are PNG `data:` addresses.

    source: the input that was asked about. said: all answers about it, oldest first; None = the finding's explanation.
    Pictures of faces are shrunk to 512 px; their real sizes stand beside them.
    """
    verdict = finding.verdict
    if said is None:
        said = [] if finding.explanation is None else [finding.explanation]
    words = {"meaning": meaning(verdict), "band": band_in_words(verdict), "regions": regions_in_words(verdict)}
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
        "detector_sha256": detector.fingerprint(),
        "explainer_sha256": _explainer_sha256(pipeline),
        "calibration": None if detector.calibration is None else to_dict(detector.calibration),
    }


def case_about(model: Facts, entries: Sequence[Facts], settings: Mapping[str, Any] | None = None) -> Facts:
    """Give the facts of a whole case file as `case_of` does, for a model of which the facts are known."""
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model,
        "software": {"m2f2": __version__, **software()},
        "settings": dict(settings or {}),
        "limits": list(LIMITS),
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


def _explainer_sha256(pipeline: Pipeline) -> str | None:
    """Give the fingerprint of the explainer's weight files, the one that its certificate names; None without one."""
    if pipeline.explainer is None:
        return None
    from llava.explainer.delta import fingerprint  # here, because it imports peft, which a detector does not need

    return fingerprint(ready(pipeline.name))
