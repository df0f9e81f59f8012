"""Which part of an image is judged: the rule that finds faces, and what is said when there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from llava.core.types import Content
from llava.data.faces import (
    SECOND_LOOK,
    FaceBox,
    Place,
    crop_face,
    find_faces,
    lie_of_face,
    lying_faces,
    place_in_crop,
    shrunk,
)
from llava.data.inputs import NamedImage
from llava.ops.degrade import delivered
from llava.pipeline.settings import FaceSettings

if TYPE_CHECKING:
    from llava.explainer.processing import Pixels

NO_FACE = "no face found"
TOO_SMALL = "the face is too small: {} x {} pixels, its width must be {} or more (--least-face)"
CUT_OFF = "the face is cut off by the image's border"
TURNS = {  # quarter turns to the left that set the face upright
    1: "the face lies sideways; turn the image by 90 degrees to the left",
    3: "the face lies sideways; turn the image by 90 degrees to the right",
    2: "the face is upside down; turn the image by 180 degrees",
}
LEAST_INSIDE = 0.75  # share of a face's box that must lie in the image


@dataclass(frozen=True, kw_only=True)
class Face:
    """One thing to judge: pixels uint8 (H, W, 3), or None and the reason; `box` is where it was found, if anywhere.

    inner: where the face lies in the pixels; None = they are a face crop, or whole. clip: of a video, the pixels with
    the frames and the sound from there on; None = a still image. prepared: what the model reads of it and of its
    delivered versions; empty = to be made when it is looked at.
    """

    image: str
    pixels: np.ndarray | None
    box: FaceBox | None = None
    number: int = 1
    count: int = 1
    reason: str = ""
    inner: Place | None = None
    clip: Content | None = None
    prepared: tuple[Pixels, ...] = ()

    @property
    def place(self) -> dict[str, Any]:
        """Give where it is, as the fields of a verdict."""
        if self.box is None:
            return {"face_box": None, "face_landmarks": None, "face_roll": None}
        box = (self.box.x, self.box.y, self.box.width, self.box.height)
        return {"face_box": box, "face_landmarks": self.box.landmarks or None, "face_roll": self.box.roll}

    @property
    def content(self) -> Content:
        """Give what there is to look at. A face without pixels has nothing."""
        assert self.pixels is not None
        return self.clip or Content(image=self.pixels, face=self.inner)

    @property
    def versions(self) -> Iterable[np.ndarray | Pixels]:
        """Give its delivered versions, in the order of VERSIONS, one at a time."""
        assert self.pixels is not None
        return self.prepared[1:] or delivered(self.pixels)


def faces_of(image: NamedImage, settings: FaceSettings) -> list[Face]:
    """Give the faces of an image, largest first; exactly one entry, without pixels, when there is nothing to judge.

    An image that is a face crop already (a square on the largest face covers `whole_from` of it, both eyes, nose and
    mouth are on it) is one face, taken whole. A face that is there but unusable has no pixels and a reason: too small,
    cut off, or lying sideways.
    """
    if image.pixels is None:
        return [Face(image=image.name, pixels=None, reason=image.problem)]
    if settings.face == "off":
        return [Face(image=image.name, pixels=image.pixels)]
    boxes = _distinct(_find(image.pixels))
    faces = [_face(image.name, image.pixels, box, settings) for box in boxes] or _lying(image.name, image.pixels)
    if not faces:
        return [Face(image=image.name, pixels=None, reason=NO_FACE, count=0)]
    height, width = image.pixels.shape[:2]
    first = faces[0].box
    assert first is not None
    is_crop = max(first.width, first.height) ** 2 >= settings.whole_from * height * width
    is_whole = not faces[0].reason or (faces[0].reason == CUT_OFF and _shows_landmarks(first, height, width))
    if is_crop and is_whole:
        return [Face(image=image.name, pixels=image.pixels, box=first)]
    faces = [replace(face, number=number, count=len(faces)) for number, face in enumerate(faces, 1)]
    if settings.face == "largest":
        return [next((face for face in faces if face.pixels is not None), faces[0])]
    return faces


def prepared(face: Face, read: Callable[[np.ndarray | Content], Pixels], stability: bool) -> Face:
    """Give the face with all that the model reads of it, so that looking at it only runs the model.

    read: makes an image ready, as `Pipeline.pixels` does.
    """
    if face.pixels is None:
        return face
    versions = map(read, delivered(face.pixels) if stability else ())
    return replace(face, prepared=(read(face.content), *versions))


def _face(name: str, pixels: np.ndarray, box: FaceBox, settings: FaceSettings) -> Face:
    """Cut a face out, or say why it cannot be judged."""
    turns, box = lie_of_face(pixels, box)
    reason = TURNS[turns] if turns else _limit(box, pixels.shape[0], pixels.shape[1], settings.least_face)
    if reason:
        return Face(image=name, pixels=None, box=box, reason=reason)
    inner = place_in_crop(box, pixels.shape[0], pixels.shape[1], settings.margin)
    return Face(image=name, pixels=crop_face(pixels, box, settings.margin), box=box, inner=inner)


def _limit(box: FaceBox, height: int, width: int, least_face: int) -> str:
    """Say what makes an upright face unfit; empty when it can be judged."""
    if box.width < least_face:
        return TOO_SMALL.format(box.width, box.height, least_face)
    return "" if box.inside >= LEAST_INSIDE and _shows_landmarks(box, height, width) else CUT_OFF


def _shows_landmarks(box: FaceBox, height: int, width: int) -> bool:
    return all(0 <= x <= width and 0 <= y <= height for x, y in box.landmarks)


def _lying(name: str, pixels: np.ndarray) -> list[Face]:
    """Give the faces that show when the image is turned, none of them to be judged."""
    turns, boxes = lying_faces(pixels)
    return [Face(image=name, pixels=None, box=box, reason=TURNS[turns]) for box in boxes]


def _find(pixels: np.ndarray) -> list[FaceBox]:
    """Look for faces; where there is none, look again with a border, because a tight crop cuts a face's outline."""
    found = find_faces(pixels)
    if found:
        return found
    small, scale = shrunk(pixels, SECOND_LOOK.longest_side * 2 // 3)  # with the border on both sides half as much again
    border = max(small.shape[:2]) // 4
    framed = cv2.copyMakeBorder(small, border, border, border, border, cv2.BORDER_REPLICATE)
    moved = [box.moved(-border, -border).moved(0, 0, 1 / scale) for box in find_faces(framed, SECOND_LOOK)]
    clipped = [box.clipped(pixels.shape[0], pixels.shape[1]) for box in moved]
    return [box for box in clipped if box is not None]


def _distinct(boxes: list[FaceBox]) -> list[FaceBox]:
    """Drop boxes whose centre lies within a larger one: the nets also see a face within a face."""
    kept: list[FaceBox] = []
    for box in sorted(boxes, key=lambda b: (-b.width * b.height, b.x, b.y)):
        x, y = box.x + box.width / 2, box.y + box.height / 2
        if not any(k.x <= x < k.x + k.width and k.y <= y < k.y + k.height for k in kept):
            kept.append(box)
    return kept
