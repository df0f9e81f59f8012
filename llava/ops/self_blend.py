"""Self-blended faces: a face is laid over itself with one of the two changed, so that only the blend gives it away.

Shiohara and Yamasaki, Detecting Deepfakes with Self-Blended Images, CVPR 2022. What differs: the outlines are hulls of
the masks of face regions, not of 81 landmarks, and the ranges are set by whoever forges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from llava.core.config import setting
from llava.ops.degrade import require_within, sharpen
from llava.ops.face_regions import FACE

# Regions whose convex hull is an outline of what is exchanged; below = only what lies below the eyebrows' upper edge.
HULLS: dict[str, tuple[str, ...]] = {
    "whole face": (FACE,),
    "inner face": ("eyebrows", "eyes", "nose", "mouth"),
    "eyes to mouth": ("eyes", "nose", "mouth"),
    "nose and mouth": ("nose", "mouth"),
}
BELOW_BROWS = "face below the brows"


def draw_hull(regions: Mapping[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Draw one outline of what is exchanged, alike among all: the hull's mask, float32 (H, W), 0 or 1.

    regions: masks (H, W) in [0, 1] of the five regions and `face`. Raises ValueError when all of them are empty.
    """
    name = [*HULLS, BELOW_BROWS][rng.integers(len(HULLS) + 1)]
    inside = np.max([regions[part] for part in HULLS.get(name, (FACE,))], axis=0) > 0
    if name == BELOW_BROWS:
        brows = np.flatnonzero((regions["eyebrows"] > 0).any(axis=1))
        inside[: brows[0] if len(brows) else 0] = False
    points = cv2.findNonZero(inside.astype(np.uint8))
    if points is None:
        raise ValueError("regions: no face is there to be exchanged; give masks that are not empty.")
    hull = np.zeros(inside.shape, np.float32)
    cv2.fillConvexPoly(hull, cv2.convexHull(points), 1.0)
    return hull


@dataclass(frozen=True, kw_only=True)
class SelfBlendConfig:
    """How far the copy is from the face, and how it is blended; lengths in percent of the image's shorter side.

    Every strength is drawn evenly from its range, every sign by a fair coin.
    """

    colour_shift: tuple[float, float] = setting((8.0, 20.0), "shift of each colour channel, in grey levels of 255")
    hue_shift: tuple[float, float] = setting((5.0, 16.0), "shift of the hue, in degrees")
    saturation_change: tuple[float, float] = setting((0.15, 0.4), "relative change of the saturation")
    contrast_change: tuple[float, float] = setting((0.08, 0.22), "relative change of the contrast")
    sharpen_amount: tuple[float, float] = setting((0.8, 1.6), "weight of an unsharp mask, in half of the copies")
    shrink_factor: tuple[float, float] = setting((1.8, 3.0), "shrinking and growing back, in the other half")
    resize: tuple[float, float] = setting((0.0, 0.015), "relative change of the copy's size")
    translate: tuple[float, float] = setting((0.4, 1.6), "displacement of the copy, along each axis")
    elastic: tuple[float, float] = setting((1.0, 4.0), "largest elastic displacement of the mask's outline")
    mask_blur: tuple[float, float] = setting((1.0, 3.0), "sigma of the mask's blur")
    blend_ratio: tuple[float, float] = setting((0.75, 1.0), "weight of the copy inside the mask")
    change_background: float = setting(
        0.0, "part of the forgeries whose background is changed in the copy's stead, as in the paper; in [0, 1]"
    )

    def __post_init__(self) -> None:
        for name in ("saturation_change", "contrast_change", "resize", "blend_ratio"):
            require_within(name, getattr(self, name), 0, 1)
        require_within("change_background", (self.change_background,), 0, 1)
        for name in ("translate", "elastic", "mask_blur"):
            require_within(name, getattr(self, name), 0, 100)
        require_within("colour_shift", self.colour_shift, 0, 255)
        require_within("hue_shift", self.hue_shift, 0, 180)
        require_within("sharpen_amount", self.sharpen_amount, 0, 10)
        require_within("shrink_factor", self.shrink_factor, 1, 16)


def self_blend(
    image: np.ndarray, mask: np.ndarray, config: SelfBlendConfig, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Give the background, uint8 (H, W, 3), and what is laid over it: a copy, float32 (H, W, 3), and its weight (H, W).

    image: uint8 (H, W, 3); mask: the face, float (H, W) in [0, 1]. The weight, in [0, 1], is soft and deformed. The
    background is the image, unless it is changed in the copy's stead.
    """
    side = min(image.shape[:2]) / 100
    changed = _refocus(_recolour(image.astype(np.float32), config, rng), config, rng)
    copy, background = changed, image
    if config.change_background and rng.random() < config.change_background:
        copy, background = image.astype(np.float32), np.rint(changed).astype(np.uint8)
    copy = _displace(copy, config, side, rng)
    weight = _deform(mask, side * rng.uniform(*config.elastic), 8 * side, rng)
    weight = cv2.GaussianBlur(weight, (0, 0), sigmaX=max(side * rng.uniform(*config.mask_blur), 0.3))
    weight = np.clip(weight * rng.uniform(*config.blend_ratio), 0, 1)
    return background, (copy, np.where(weight < 1 / 255, 0, weight).astype(np.float32))


def _recolour(image: np.ndarray, config: SelfBlendConfig, rng: np.random.Generator) -> np.ndarray:
    """Shift channels, hue, saturation and contrast."""
    shift = [_signed(config.colour_shift, rng) for _ in range(3)]
    shifted = np.clip(image + np.array(shift, dtype=np.float32), 0, 255)
    hsv = cv2.cvtColor(shifted / 255, cv2.COLOR_RGB2HSV)  # hue in [0, 360)
    hsv[..., 0] = (hsv[..., 0] + _signed(config.hue_shift, rng)) % 360
    hsv[..., 1] = np.clip(hsv[..., 1] * (1 + _signed(config.saturation_change, rng)), 0, 1)
    rgb = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255
    mean = rgb.mean(axis=(0, 1))
    return np.clip(mean + (rgb - mean) * (1 + _signed(config.contrast_change, rng)), 0, 255).astype(np.float32)


def _refocus(image: np.ndarray, config: SelfBlendConfig, rng: np.random.Generator) -> np.ndarray:
    """Sharpen, or lose detail by shrinking and growing back."""
    if rng.random() < 0.5:
        return np.clip(sharpen(image, rng.uniform(*config.sharpen_amount)), 0, 255)
    height, width = image.shape[:2]
    factor = rng.uniform(*config.shrink_factor)
    small = cv2.resize(image, (round(width / factor), round(height / factor)), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


def _displace(image: np.ndarray, config: SelfBlendConfig, side: float, rng: np.random.Generator) -> np.ndarray:
    """Resize about the centre and move."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), 0, 1 + _signed(config.resize, rng))
    matrix[:, 2] += np.array([side * _signed(config.translate, rng) for _ in range(2)])
    return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)


def _deform(mask: np.ndarray, amount: float, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Move the mask by a smooth random field (`sigma` pixels) whose largest displacement per axis is `amount`."""
    height, width = mask.shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    fields = [
        cv2.GaussianBlur(rng.uniform(-1, 1, mask.shape).astype(np.float32), (0, 0), sigmaX=sigma) for _ in range(2)
    ]
    dx, dy = (field * (amount / np.abs(field).max()) for field in fields)
    return cv2.remap(mask.astype(np.float32), x + dx, y + dy, cv2.INTER_LINEAR)


def _signed(limits: tuple[float, float], rng: np.random.Generator) -> float:
    return float(rng.uniform(*limits) * rng.choice((-1.0, 1.0)))
