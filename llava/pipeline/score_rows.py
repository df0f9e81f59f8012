"""One row for each image: whether it could be read, and the verdict on its largest face, as an Arrow table."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from llava.core.runtime import batched
from llava.data.inputs import NamedImage, NamedInput, is_video, open_input

if TYPE_CHECKING:
    from llava.core.types import Verdict
    from llava.detectors.base import Detector
    from llava.pipeline.pipeline import Pipeline

OK, BAD = "ok", "bad"
A_VIDEO = "a video; one row is one image, and `m2f2 detect` judges videos."
TEXTS = ("label", "risk_band", "reason", "detector", "calibration")
NUMBERS = ("p_fake", "low", "high", "raw_p_fake", "threshold", "likelihood_ratio", "prior")
BOX = ("box_x", "box_y", "box_width", "box_height")


def schema_of(detector: Detector) -> pa.Schema:
    """Give the columns; all but path, sha256, status and problem are empty where an image could not be read."""
    named = [f"probability_{name}" for name in detector.classes]
    named += [f"evidence_{name}" for name in detector.evidence_names]
    return pa.schema(
        [
            *((name, pa.string()) for name in ("path", "sha256", "status", "problem")),
            ("faces", pa.int32()),
            *((name, pa.string()) for name in TEXTS),
            *((name, pa.float64()) for name in (*NUMBERS, *named)),
            *((name, pa.int32()) for name in BOX),
        ]
    )


def score_names(pipeline: Pipeline, names: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the rows of images in their order, a batch of the pipeline's size at a time.

    The pipeline is to judge one face of each image: `face` is "largest" or "off".
    """
    schema = schema_of(pipeline.detector)
    for batch in batched(names, pipeline.batch_size):
        yield pa.Table.from_pylist(list(_rows(pipeline, batch)), schema)


def _rows(pipeline: Pipeline, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    images = [_opened(name) for name in names]
    found = pipeline.findings([image for image in images if image.pixels is not None])
    for image in images:
        known = {"path": _storable(image.name), "sha256": image.sha256 or None, "problem": image.problem or None}
        if image.pixels is None:
            yield known | {"status": BAD}
        else:
            yield known | {"status": OK} | _columns(next(found).verdict)
    assert next(found, None) is None, "more than one finding for an image"


def _opened(name: str) -> NamedImage:
    """Read an image; what is none comes back with its problem."""
    image: NamedInput = NamedImage(name=name, pixels=None, problem=A_VIDEO) if is_video(name) else open_input(name)
    assert isinstance(image, NamedImage)
    return image


def _storable(name: str) -> str:
    """Give a name as UTF-8 can hold it: bytes of a file name that are no UTF-8 as `\\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _columns(verdict: Verdict) -> dict[str, Any]:
    low, high = verdict.p_fake_range or (None, None)
    box = verdict.face_box or (None,) * len(BOX)
    return {
        **{name: getattr(verdict, name) for name in NUMBERS if name not in ("low", "high")},
        **{name: getattr(verdict, name) for name in TEXTS},
        **{f"probability_{name}": value for name, value in verdict.probabilities.items()},
        **{f"evidence_{name}": value for name, value in verdict.evidence.items()},
        **dict(zip(BOX, box, strict=True)),
        "reason": verdict.reason or None,
        "low": low,
        "high": high,
        "faces": verdict.face_count,
    }
