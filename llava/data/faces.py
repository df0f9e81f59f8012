"""Find faces and cut them out; no face, or several, is an answer and never an error."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
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
