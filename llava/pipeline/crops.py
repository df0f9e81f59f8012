"""Which part of an image is judged: the rule that finds faces, and what is said when there is none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

import cv2
import numpy as np

from llava.data.faces import FaceBox, crop_face, find_faces
from llava.data.inputs import NamedImage
from llava.ops.degrade import delivered
from llava.pipeline.settings import FaceSettings

if TYPE_CHECKING:
    from llava.explainer.generation import Explainer
    from llava.explainer.processing import Pixels

NO_FACE = "no face found"


@dataclass(frozen=True, kw_only=True)
class Face:
    """One thing to judge: pixels uint8 (H, W, 3), or None and the reason; `box` is where it was found, if anywhere.

    prepared: what an explainer reads of it and of its delivered versions; empty = to be made when it is looked at.
    """

    image: str
    pixels: np.ndarray | None
    box: FaceBox | None = None
    number: int = 1
    count: int = 1
    reason: str = ""
    prepared: tuple[Pixels, ...] = ()

    @property
    def shown(self) -> np.ndarray | Pixels:
        """Give what a model looks at. A face without pixels has nothing."""
        assert self.pixels is not None
        return self.prepared[0] if self.prepared else self.pixels

    @property
    def versions(self) -> Iterable[np.ndarray | Pixels]:
        """Give its delivered versions, in the order of VERSIONS, one at a time."""
        assert self.pixels is not None
        return self.prepared[1:] or delivered(self.pixels)


def faces_of(image: NamedImage, settings: FaceSettings) -> list[Face]:
    """Give the faces of an image, largest first; exactly one entry, without pixels, when there is nothing to judge.

    An image that is a face crop already (the largest box covers `whole_from` of it) is one face, taken whole.
    """
    if image.pixels is None:
        return [Face(image=image.name, pixels=None, reason=image.problem)]
    if settings.face == "off":
        return [Face(image=image.name, pixels=image.pixels)]
    boxes = _distinct(_find(image.pixels))
    if not boxes:
        return [Face(image=image.name, pixels=None, reason=NO_FACE, count=0)]
    height, width = image.pixels.shape[:2]
    if boxes[0].width * boxes[0].height >= settings.whole_from * height * width:
        return [Face(image=image.name, pixels=image.pixels, box=boxes[0])]
    chosen = boxes[:1] if settings.face == "largest" else boxes
    return [
        Face(
            image=image.name,
            pixels=crop_face(image.pixels, box, settings.margin),
            box=box,
            number=number,
            count=len(boxes),
        )
        for number, box in enumerate(chosen, 1)
    ]


def prepared(face: Face, explainer: Explainer, stability: bool) -> Face:
    """Give the face with all that the explainer reads of it, so that looking at it only runs the model."""
    if face.pixels is None:
        return face
    images = chain([face.pixels], delivered(face.pixels) if stability else ())
    return replace(face, prepared=tuple(map(explainer.processor.pixels, images)))


def _find(pixels: np.ndarray) -> list[FaceBox]:
    """Look for faces; where there is none, look again with a border, because a tight crop cuts a face's outline."""
    found = find_faces(pixels)
    if found:
        return found
    height, width = pixels.shape[:2]
    border = max(height, width) // 4
    framed = cv2.copyMakeBorder(pixels, border, border, border, border, cv2.BORDER_REPLICATE)
    return [clipped for box in find_faces(framed) if (clipped := _clipped(box, border, width, height))]


def _clipped(box: FaceBox, border: int, width: int, height: int) -> FaceBox | None:
    """Move a box from the framed image back and cut off what lies in the border; None when nothing is left."""
    left, top = max(box.x - border, 0), max(box.y - border, 0)
    right, bottom = min(box.x - border + box.width, width), min(box.y - border + box.height, height)
    if right <= left or bottom <= top:
        return None
    return FaceBox(x=left, y=top, width=right - left, height=bottom - top, score=box.score)


def _distinct(boxes: list[FaceBox]) -> list[FaceBox]:
    """Drop boxes whose centre lies within a larger one: the cascade also fires on parts of a face."""
    kept: list[FaceBox] = []
    for box in sorted(boxes, key=lambda b: (-b.width * b.height, b.x, b.y)):
        x, y = box.x + box.width / 2, box.y + box.height / 2
        if not any(k.x <= x < k.x + k.width and k.y <= y < k.y + k.height for k in kept):
            kept.append(box)
    return kept
