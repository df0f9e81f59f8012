"""What happens to a face on its way to the viewer: a few named versions of it, and changes of rising strength."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from llava.ops.degrade import add_noise, blur, compress_jpeg


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """A kind of change: `apply` changes an image by a strength; `strengths` in `unit`, the milder ones first.

    (Of resize, growing comes before shrinking.)
    """

    unit: str
    strengths: tuple[float, ...]
    apply: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class Change:
    """One degradation at one strength; calling it changes an image, uint8 (H, W, 3)."""

    kind: str
    strength: float

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Give the changed image; its size may be another one, the input is left as it is."""
        return DEGRADATIONS[self.kind].apply(image, self.strength, rng)


def resize(image: np.ndarray, factor: float) -> np.ndarray:
    """Give the image `factor` times as wide and high: area average to shrink, bicubic to grow."""
    height, width = image.shape[:2]
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)


def crop_sides(image: np.ndarray, percent: float) -> np.ndarray:
    """Cut `percent` of height and width off at each of the four sides."""
    height, width = image.shape[:2]
    top, left = round(height * percent / 100), round(width * percent / 100)
    return np.ascontiguousarray(image[top : height - top, left : width - left])


DEGRADATIONS: dict[str, Degradation] = {
    "JPEG": Degradation(
        unit="quality",
        strengths=(95, 90, 80, 70, 60, 50, 40, 30),
        apply=lambda image, quality, rng: compress_jpeg(image, int(quality)),
    ),
    "resize": Degradation(
        unit="times the size",
        strengths=(2.0, 1.5, 1.25, 0.8, 0.65, 0.5),
        apply=lambda image, factor, rng: resize(image, factor),
    ),
    "crop": Degradation(
        unit="% of each side",
        strengths=(1, 2, 3, 4, 6, 8),
        apply=lambda image, percent, rng: crop_sides(image, percent),
    ),
    "blur": Degradation(
        unit="sigma in pixels",
        strengths=(0.5, 1.0, 1.5, 2.0, 3.0),
        apply=lambda image, sigma, rng: blur(image, sigma),
    ),
    "noise": Degradation(unit="sigma in grey levels", strengths=(2.0, 5.0, 10.0, 15.0), apply=add_noise),
}

# What a messenger, a web page or a screenshot does to a picture that nobody meant to change. None of it is random.
VERSIONS: dict[str, Change] = {
    "JPEG 95": Change("JPEG", 95),
    "JPEG 70": Change("JPEG", 70),
    "JPEG 50": Change("JPEG", 50),
    "JPEG 30": Change("JPEG", 30),
    "half size": Change("resize", 0.5),
    "double size": Change("resize", 2.0),
    "crop 3 %": Change("crop", 3),
    "crop 6 %": Change("crop", 6),
}


def delivered(image: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the versions of one image, in the order of VERSIONS, one at a time: those of a large image are large."""
    rng = np.random.default_rng(0)
    for change in VERSIONS.values():
        yield change(image, rng)


def every_change() -> list[Change]:
    """List every degradation at every strength; the changes of VERSIONS are among them."""
    return [Change(kind, strength) for kind, family in DEGRADATIONS.items() for strength in family.strengths]
