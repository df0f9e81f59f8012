"""Where eyes, eyebrows, nose, mouth and skin lie in a face crop: soft masks from two eye positions.

All proportions are in units of the distance between the pupils, which is about 63 mm in adults: bizygomatic width
2.2, eyes to chin 1.8, nose width 0.55, mouth width 0.8 (rounded from Farkas 1994, Anthropometry of the Head and Face).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from llava.core.types import REGIONS

Point: TypeAlias = tuple[float, float]
Eyes: TypeAlias = tuple[Point, Point]
FACE = "face"
# Centre and half axes (u, v, a, b) of each ellipse; origin between the eyes, u to the right, v down the face.
_FACE = (0.0, 0.45, 1.04, 1.27)
_PARTS: dict[str, tuple[tuple[float, float, float, float], ...]] = {
    "eyebrows": ((-0.47, -0.34, 0.31, 0.13), (0.47, -0.34, 0.31, 0.13)),
    "eyes": ((-0.5, 0.0, 0.32, 0.19), (0.5, 0.0, 0.32, 0.19)),
    "nose": ((0.0, 0.43, 0.3, 0.34),),
    "mouth": ((0.0, 1.07, 0.46, 0.28),),
}
_TAPER = 0.06  # inward fall of a mask from 1 to 0, in the same unit
# In the square around a face box. Detectors that pool by region were trained with these places, so they stay. They lie
# between the medians of `llava.data.faces`: ((0.34, 0.40), (0.67, 0.39)) in 517 portraits, ((0.31, 0.32), (0.70, 0.30))
# in 299 faces of ddvqa; `python eval/measure_faces.py FOLDER` prints them.
_EYES_IN_SQUARE = ((0.31, 0.39), (0.69, 0.39))
_CROP_MARGIN = 0.3  # of `llava.data.faces.crop_face`


def face_regions(height: int, width: int, eyes: Eyes | None = None) -> dict[str, np.ndarray]:
    """Give soft masks of skin, eyebrows, eyes, nose, mouth, and of the whole face.

    eyes: (x, y) in pixels of the eye on the image's left, then of the other; without them a face crop of the usual
    margin is assumed. Masks are float32 (height, width) in [0, 1], 1 inside, falling to 0 within the outline. The five
    regions never overlap where they are above 0. Raises ValueError for eyes that coincide.
    """
    (left_x, left_y), (right_x, right_y) = eyes or eyes_in_box(*usual_box(height, width))
    axis = np.array([right_x - left_x, right_y - left_y])
    unit = float(np.hypot(*axis))
    if unit < 1:
        raise ValueError(f"eyes: {eyes} are less than a pixel apart; give two different positions, or none.")
    cos, sin = axis / unit
    y, x = np.mgrid[0:height, 0:width]
    x, y = (x - (left_x + right_x) / 2) / unit, (y - (left_y + right_y) / 2) / unit
    u, v = x * cos + y * sin, y * cos - x * sin
    depths = {name: np.max([_depth(u, v, *e) for e in ellipses], axis=0) for name, ellipses in _PARTS.items()}
    face = _depth(u, v, *_FACE)
    depths["skin"] = np.min([face, *(-depth for depth in depths.values())], axis=0)
    masks = {name: np.clip(depths[name] / _TAPER, 0, 1).astype(np.float32) for name in REGIONS}
    return {**masks, FACE: np.clip(face / _TAPER, 0, 1).astype(np.float32)}


def eyes_in_box(x: float, y: float, width: float, height: float) -> Eyes:
    """Give where the eyes of a frontal face box usually are, in pixels."""
    side = max(width, height)
    x, y = x + (width - side) / 2, y + (height - side) / 2
    (left_u, left_v), (right_u, right_v) = _EYES_IN_SQUARE
    return (x + left_u * side, y + left_v * side), (x + right_u * side, y + right_v * side)


def usual_box(height: int, width: int) -> tuple[float, float, float, float]:
    """Give (x, y, width, height) in pixels of the face box in a crop of that size with the usual margin."""
    side = min(height, width) / (1 + 2 * _CROP_MARGIN)
    return (width - side) / 2, (height - side) / 2, side, side


def disjoint(regions: Mapping[str, np.ndarray], height: int, width: int) -> dict[str, np.ndarray]:
    """Give regions that never overlap, for masks of a plugged-in finder: skin yields to parts, parts to earlier ones.

    Raises ValueError when a region is missing, has another shape, or values outside [0, 1].
    """
    taken = np.zeros((height, width), dtype=bool)
    separate = {FACE: _checked(regions, FACE, height, width)}
    for name in (*_PARTS, "skin"):
        mask = _checked(regions, name, height, width)
        separate[name] = np.where(taken, 0, mask).astype(np.float32)
        taken |= mask > 0
    return separate


def _checked(regions: Mapping[str, np.ndarray], name: str, height: int, width: int) -> np.ndarray:
    if name not in regions:
        raise ValueError(f"regions: {name!r} is missing; needed: {', '.join((*REGIONS, FACE))}.")
    mask = np.asarray(regions[name], dtype=np.float32)
    if mask.shape != (height, width) or not ((mask >= 0) & (mask <= 1)).all():
        raise ValueError(f"regions: {name!r} has shape {mask.shape}; expected {(height, width)} with values in [0, 1].")
    return mask


def _depth(u: np.ndarray, v: np.ndarray, cu: float, cv: float, a: float, b: float) -> np.ndarray:
    """Give how deep points lie inside an ellipse (outside: negative), to first order along the shorter axis."""
    return (1 - np.hypot((u - cu) / a, (v - cv) / b)) * min(a, b)
