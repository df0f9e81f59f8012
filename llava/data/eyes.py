"""The two eyes of a face, or nothing: a wrong pair would put every region in the wrong place."""

from __future__ import annotations

import os
from itertools import product

import cv2
import numpy as np

from llava.data.faces import FaceBox, open_cascade

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
