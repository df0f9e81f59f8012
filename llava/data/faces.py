"""Find faces and their eyes, cut them out, follow them over time; no face, or several, is an answer, not an error."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import hypot
from pathlib import Path
from typing import Protocol

import cv2
import cv2.data
import numpy as np

from llava.core.config import setting
from llava.core.registry import Registry

FACE_CASCADE = "haarcascade_frontalface_default.xml"
FACE_DETECTORS: Registry[type] = Registry("face detector", {"haar": "llava.data.faces:HaarFaces"})


@dataclass(frozen=True, kw_only=True)
class FaceBox:
    """A face's box in pixels of the image, origin top left; a higher score is a surer face (detector's own scale)."""

    x: int
    y: int
    width: int
    height: int
    score: float


class FaceDetector(Protocol):
    """Finds faces in a uint8 RGB image (H, W, 3)."""

    def detect(self, image: np.ndarray) -> list[FaceBox]:
        """List the faces, largest first; an empty list when there is none."""


@dataclass(frozen=True, kw_only=True)
class HaarConfig:
    """Settings of the Haar cascade; the defaults find one face in each of our four public-domain portraits."""

    longest_side: int = setting(640, "larger images are shrunk to this longest side, in pixels, before the search")
    scale_step: float = setting(1.1, "factor between two sizes of the search window")
    min_neighbors: int = setting(5, "overlapping hits that make a face; more = fewer false faces")
    min_face: float = setting(0.1, "smallest face as a part of the image's shorter side")


class HaarFaces:
    """OpenCV's frontal-face Haar cascade (Viola and Jones 2001; Lienhart and Maydt 2002), shipped with OpenCV 4."""

    def __init__(self, config: HaarConfig | None = None) -> None:
        self.config = config or HaarConfig()

    def detect(self, image: np.ndarray) -> list[FaceBox]:
        """List the frontal faces, largest first; boxes lie within the image."""
        height, width = image.shape[:2]
        scale = min(1.0, self.config.longest_side / max(height, width))
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        if scale < 1.0:
            grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        smallest = max(1, round(self.config.min_face * min(grey.shape)))
        found, _, scores = open_cascade(FACE_CASCADE, os.getpid()).detectMultiScale3(
            grey,
            scaleFactor=self.config.scale_step,
            minNeighbors=self.config.min_neighbors,
            minSize=(smallest, smallest),
            outputRejectLevels=True,
        )
        boxes = [_box(face, scale, float(score), width, height) for face, score in zip(found, scores, strict=True)]
        return sorted(boxes, key=lambda b: (-b.width * b.height, b.x, b.y))


def find_faces(image: np.ndarray, detector: FaceDetector | None = None) -> list[FaceBox]:
    """List the faces of an image, largest first, with the given detector or the Haar cascade."""
    return (detector or HaarFaces()).detect(image)


def crop_face(image: np.ndarray, box: FaceBox, margin: float = 0.3) -> np.ndarray:
    """Cut a square around a face, `margin` of the box's longer side wider on every side.

    At the image's border the square is moved inwards; when it is larger than the image's shorter side, it is shrunk
    to that. So the crop is always square and always made of real pixels, never padded, but the face may be off centre.
    """
    left, top, side = face_square(box, image.shape[0], image.shape[1], margin)
    return np.ascontiguousarray(image[top : top + side, left : left + side])


def face_square(box: FaceBox, height: int, width: int, margin: float = 0.3) -> tuple[int, int, int]:
    """Give (left, top, side) in pixels of the square that `crop_face` cuts out of an image of that size."""
    if margin < 0:
        raise ValueError(f"margin: {margin} is not usable; allowed: 0 or more, 0.3 leaves hair and chin in.")
    side = min(round(max(box.width, box.height) * (1 + 2 * margin)), height, width)
    left = min(max(round(box.x + box.width / 2 - side / 2), 0), width - side)
    top = min(max(round(box.y + box.height / 2 - side / 2), 0), height - side)
    return left, top, side


def _box(face: Sequence[int], scale: float, score: float, width: int, height: int) -> FaceBox:
    x, y, w, h = (round(float(v) / scale) for v in face)
    return FaceBox(x=x, y=y, width=min(w, width - x), height=min(h, height - y), score=score)


@lru_cache(maxsize=4)
def open_cascade(name: str, process: int) -> cv2.CascadeClassifier:
    """Read a cascade that OpenCV ships, once per process (an OpenCV object cannot be pickled into a worker)."""
    cascade = cv2.CascadeClassifier(str(Path(cv2.data.haarcascades) / name))
    if cascade.empty():
        raise FileNotFoundError(f"OpenCV's cascade {name!r} is missing; install opencv-python-headless>=4.14,<5.")
    return cascade


EYE_CASCADES = ("haarcascade_eye.xml", "haarcascade_eye_tree_eyeglasses.xml")  # in this order, until one sees a pair
_LEAST_WIDTH = 160  # of the face in pixels when searched: an eye must fill the cascade's window of 20 pixels
# What a pair must fulfil, in units of the face box: about three standard deviations around the median of the 42 of 60
# real training faces of faces_rvf in which each half of the box held exactly one eye.
_EYE_SIZE = (0.14, 0.42)
_DISTANCE = (0.27, 0.5)
_HEIGHT = (0.3, 0.48)
_STEEPEST = 0.27  # rise over run: a head tilted by 15 degrees
_SIZE_RATIO = 1.8
_TYPICAL = np.array([0.31, 0.39, 0.69, 0.39])

Point = tuple[float, float]


def find_eyes(image: np.ndarray, box: FaceBox) -> tuple[Point, Point] | None:
    """Give (x, y) in pixels of the eye on the image's left, then of the other; None unless two plausible ones are seen.

    image: uint8 RGB (H, W, 3); box: the face in it. OpenCV's Haar eye cascades on the upper 60 % of the box; of several
    plausible pairs the one nearest to where eyes usually are.
    """
    upper = image[box.y : box.y + round(0.6 * box.height), box.x : box.x + box.width]
    grey = cv2.cvtColor(upper, cv2.COLOR_RGB2GRAY)
    scale = max(1.0, _LEAST_WIDTH / box.width)
    if scale > 1:
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    for cascade in EYE_CASCADES:
        eyes = _search(grey, cascade, box, scale)
        pairs = [(left, right) for left, right in product(eyes, eyes) if _are_plausible(left, right)]
        if pairs:
            left, right = min(pairs, key=lambda pair: abs(np.ravel([eye[:2] for eye in pair]) - _TYPICAL).sum())
            return _in_image(left, box), _in_image(right, box)
    return None


def _search(grey: np.ndarray, cascade: str, box: FaceBox, scale: float) -> list[tuple[float, float, float]]:
    """Give centre and width of all that looks like an eye, in units of the face box."""
    width, height = box.width * scale, box.height * scale
    smallest, largest = (max(1, round(part * width)) for part in _EYE_SIZE)
    found = open_cascade(cascade, os.getpid()).detectMultiScale(
        grey, scaleFactor=1.05, minNeighbors=4, minSize=(smallest, smallest), maxSize=(largest, largest)
    )
    return [((x + w / 2) / width, (y + h / 2) / height, w / width) for x, y, w, h in found]


def _are_plausible(left: tuple[float, float, float], right: tuple[float, float, float]) -> bool:
    run, rise = right[0] - left[0], right[1] - left[1]
    return (
        left[0] < 0.5 <= right[0]
        and _DISTANCE[0] <= run <= _DISTANCE[1]
        and all(_HEIGHT[0] <= eye[1] <= _HEIGHT[1] for eye in (left, right))
        and abs(rise) <= _STEEPEST * run
        and max(left[2], right[2]) <= _SIZE_RATIO * min(left[2], right[2])
    )


def _in_image(eye: tuple[float, float, float], box: FaceBox) -> Point:
    return float(box.x + eye[0] * box.width), float(box.y + eye[1] * box.height)


def link_faces(frames: Sequence[Sequence[FaceBox]], overlap: float, shift: float) -> list[dict[int, int]]:
    """Link the boxes of frames into tracks: number of a frame -> number of its box there.

    A box continues a track when it overlaps the track's last box by an IoU of `overlap`, or when their centres lie at
    most `shift` widths of the narrower one apart; the best pairs (IoU, then distance) are linked first. A face may be
    missing in between. Gives the longest track first; of equally long ones the one with larger boxes.
    """
    tracks: list[dict[int, int]] = []
    last: list[FaceBox] = []
    for number, boxes in enumerate(frames):
        links = _links(last, boxes, overlap, shift)
        for index, box in enumerate(boxes):
            track = links.get(index, len(tracks))
            if track == len(tracks):
                tracks.append({})
                last.append(box)
            tracks[track][number] = index
            last[track] = box
    areas = [sum(_area(frames[n][i]) for n, i in track.items()) / len(track) for track in tracks]
    order = sorted(range(len(tracks)), key=lambda t: (-len(tracks[t]), -areas[t]))
    return [tracks[t] for t in order]


def iou(a: FaceBox, b: FaceBox) -> float:
    """Give the intersection of two boxes over their union, in [0, 1]."""
    width = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
    height = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
    common = max(width, 0) * max(height, 0)
    return common / (_area(a) + _area(b) - common)


def _links(last: Sequence[FaceBox], boxes: Sequence[FaceBox], overlap: float, shift: float) -> dict[int, int]:
    """Give number of a box -> number of the track that it continues; each at most once."""
    pairs = []
    for (t, before), (i, box) in product(enumerate(last), enumerate(boxes)):
        shared, distance = iou(before, box), _distance(before, box)
        if shared >= overlap or distance <= shift:
            pairs.append((-shared, distance, t, i))
    links: dict[int, int] = {}
    for _, _, t, i in sorted(pairs):
        if i not in links and t not in links.values():
            links[i] = t
    return links


def _distance(a: FaceBox, b: FaceBox) -> float:
    """Give the distance of two boxes' centres in widths of the narrower one."""
    x, y = a.x + a.width / 2 - b.x - b.width / 2, a.y + a.height / 2 - b.y - b.height / 2
    return hypot(x, y) / min(a.width, b.width)


def _area(box: FaceBox) -> int:
    return box.width * box.height
