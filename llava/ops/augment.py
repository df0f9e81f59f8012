"""Versions of one photo that are as real as it is: turned, scaled, moved, mirrored, lit, focused and grained anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from llava.core.config import setting
from llava.ops.ranges import require_within


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How far a version may be from the photo; each is drawn evenly up to its limit, either way."""

    rotation: float = setting(6.0, "largest rotation, in degrees")
    scale: float = setting(0.1, "largest relative change of size")
    shift: float = setting(3.0, "largest displacement along each axis, in percent of the shorter side")
    gain: float = setting(0.15, "largest relative change of brightness")
    colour: float = setting(0.06, "largest relative change of each colour channel beside the others")
    gamma: float = setting(0.2, "largest logarithm of the exponent of grey levels")
    sharpness: float = setting(0.0, "largest part of the fine detail that is added or taken away; 1 = all there is")
    grain: float = setting(0.0, "largest sigma of the noise that is added, in grey levels of 255")
    flip_probability: float = setting(0.5, "chance of a left-right flip")

    def __post_init__(self) -> None:
        require_within("rotation", (self.rotation,), 0, 45)
        require_within("shift", (self.shift,), 0, 25)
        require_within("grain", (self.grain,), 0, 255)
        for name in ("scale", "gain", "colour", "gamma", "sharpness", "flip_probability"):
            require_within(name, (getattr(self, name),), 0, 1)


def augment(
    image: np.ndarray, regions: Mapping[str, np.ndarray], config: AugmentConfig, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Give another version of a photo, uint8 (H, W, 3), and of the masks (H, W) in [0, 1] of its regions.

    Every pixel is resampled once; what comes in over the border is mirrored, in masks it is 0.
    """
    height, width = image.shape[:2]
    size = 1 + rng.uniform(-config.scale, config.scale)
    matrix = cv2.getRotationMatrix2D(
        ((width - 1) / 2, (height - 1) / 2), rng.uniform(-config.rotation, config.rotation), size
    )
    matrix[:, 2] += rng.uniform(-config.shift, config.shift, 2) * min(height, width) / 100
    if rng.random() < config.flip_probability:
        matrix[0] = -matrix[0] + (0, 0, width - 1)
    moved = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    gains = (1 + rng.uniform(-config.gain, config.gain)) * (1 + rng.uniform(-config.colour, config.colour, 3))
    lit = np.clip(moved / 255 * gains, 0, 1) ** np.exp(rng.uniform(-config.gamma, config.gamma))
    seen = _photographed(lit, config, rng)
    masks = {
        name: np.clip(cv2.warpAffine(mask, matrix, (width, height), flags=cv2.INTER_LINEAR), 0, 1)
        for name, mask in regions.items()
    }
    return np.rint(seen * 255).astype(np.uint8), masks


def _photographed(image: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Add or take away fine detail, then add noise, to float (H, W, 3) in [0, 1]."""
    if config.sharpness:
        detail = image - cv2.GaussianBlur(image, (0, 0), sigmaX=1.0)
        image = image + rng.uniform(-config.sharpness, config.sharpness) * detail
    if config.grain:
        image = image + rng.normal(0, rng.uniform(0, config.grain) / 255, image.shape)
    return np.clip(image, 0, 1)
