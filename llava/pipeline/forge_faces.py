"""A photo of a real person to a face crop with its regions, or the reason why it cannot be forged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import cv2
import numpy as np

from llava.data.eyes import find_eyes
from llava.data.faces import FaceBox, face_square
from llava.data.images import UnreadableImage, read_image
from llava.data.inputs import NamedImage
from llava.ops.face_regions import disjoint, eyes_in_box, face_regions, usual_box
from llava.pipeline.faces import faces_of
from llava.pipeline.settings import FaceSettings

UNREADABLE, NO_FACE, DOUBTFUL = "left_out_unreadable", "left_out_without_face", "left_out_doubtful_face"


class RegionFinder(Protocol):
    """Finds the regions of a face: the place where a landmark detector is plugged in."""

    def __call__(self, image: np.ndarray, box: FaceBox | None) -> Mapping[str, np.ndarray] | None:
        """Give masks float (H, W) in [0, 1] of the five regions and `face`; None when the image shows no face.

        image: uint8 RGB (H, W, 3); box: where the face was found in it, None when nobody looked.
        """


@dataclass(frozen=True, kw_only=True)
class FaceCrop:
    """A face, uint8 (H, W, 3), and the masks of its regions, which never overlap but for `face`."""

    image: np.ndarray
    regions: Mapping[str, np.ndarray]


def read_face(
    path: Path, face: Literal["auto", "off"], longest_side: int, find_regions: RegionFinder
) -> FaceCrop | str:
    """Read a photo and give its largest face, shrunk to `longest_side` pixels, or why it is left out.

    A face that had to be cut out must show its two eyes: the Haar cascade also fires on walls and chins. An image that
    is a face crop already is taken whole.
    """
    try:
        pixels = read_image(path)
    except UnreadableImage:
        return UNREADABLE
    box: FaceBox | None = None
    if face == "auto":
        settings = FaceSettings(face="largest")
        found = faces_of(NamedImage(name=path.name, pixels=pixels), settings)[0]
        if found.pixels is None or found.box is None:
            return NO_FACE
        box = found.box
        if found.pixels is not pixels:
            if find_eyes(pixels, box) is None:
                return DOUBTFUL
            left, top, _ = face_square(box, pixels.shape[0], pixels.shape[1], settings.margin)
            box = FaceBox(x=box.x - left, y=box.y - top, width=box.width, height=box.height, score=box.score)
        pixels = found.pixels
    image, box = _shrunk(pixels, box, longest_side)
    regions = find_regions(image, box)
    return NO_FACE if regions is None else FaceCrop(image=image, regions=disjoint(regions, *image.shape[:2]))


def regions_by_eyes(image: np.ndarray, box: FaceBox | None) -> dict[str, np.ndarray]:
    """Place the regions by the two eyes, by the box where they are not seen, by the usual crop without a box."""
    height, width = image.shape[:2]
    x, y, w, h = usual_box(height, width) if box is None else (box.x, box.y, box.width, box.height)
    eyes = find_eyes(image, FaceBox(x=round(x), y=round(y), width=round(w), height=round(h), score=0.0))
    return face_regions(height, width, eyes or eyes_in_box(x, y, w, h))


def _shrunk(image: np.ndarray, box: FaceBox | None, longest_side: int) -> tuple[np.ndarray, FaceBox | None]:
    scale = longest_side / max(image.shape[:2])
    if scale >= 1:
        return image, box
    height, width = (max(1, round(size * scale)) for size in image.shape[:2])
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    if box is not None:
        x, y, w, h = (round(value * scale) for value in (box.x, box.y, box.width, box.height))
        box = FaceBox(x=x, y=y, width=min(w, width - x), height=min(h, height - y), score=box.score)
    return image, box
