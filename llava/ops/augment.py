"""Versions of one photo that are as real as it is, and pictures of leaves that are nobody's face.

Lee, Mumford and Huang, Occlusion Models for Natural Images, IJCV 2001. Networks can learn to see from them (Baradad et
al., Learning to See by Looking at Noise, NeurIPS 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from llava.core.config import setting
from llava.ops.degrade import require_within, resize, sharpen

SMALLEST_RADIUS = 3.0  # pixels
COLOUR_SPREAD = 25.0  # standard deviation of a channel around the leaf's grey level, in levels of 255


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
    stretch: float = setting(0.0, "largest relative change of the width alone")
    smallest: float = setting(1.0, "smallest part of its size that the photo is shrunk to, in (0, 1]; 1 = never")

    def __post_init__(self) -> None:
        require_within("rotation", (self.rotation,), 0, 45)
        require_within("stretch", (self.stretch,), 0, 0.5)
        require_within("smallest", (self.smallest,), 0.05, 1)
        require_within("shift", (self.shift,), 0, 25)
        require_within("grain", (self.grain,), 0, 255)
        for name in ("scale", "gain", "colour", "gamma", "sharpness", "flip_probability"):
            require_within(name, (getattr(self, name),), 0, 1)


def augment(
    image: np.ndarray, regions: Mapping[str, np.ndarray], config: AugmentConfig, rng: np.random.Generator
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Give another version of a photo, uint8 (H, W, 3), and of the masks (H, W) in [0, 1] of its regions.

    What comes in over the border is mirrored, in masks it is 0. With `smallest` both come out smaller.
    """
    height, width = image.shape[:2]
    size = 1 + rng.uniform(-config.scale, config.scale)
    matrix = cv2.getRotationMatrix2D(
        ((width - 1) / 2, (height - 1) / 2), rng.uniform(-config.rotation, config.rotation), size
    )
    if config.stretch:
        wider = 1 + rng.uniform(-config.stretch, config.stretch)
        matrix[0] = wider * matrix[0] + (0, 0, (1 - wider) * (width - 1) / 2)
    matrix[:, 2] += rng.uniform(-config.shift, config.shift, 2) * min(height, width) / 100
    if rng.random() < config.flip_probability:
        matrix[0] = -matrix[0] + (0, 0, width - 1)
    moved = cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    gains = (1 + rng.uniform(-config.gain, config.gain)) * (1 + rng.uniform(-config.colour, config.colour, 3))
    lit = np.clip(moved / 255 * gains, 0, 1) ** np.exp(rng.uniform(-config.gamma, config.gamma))
    masks = {
        name: cv2.warpAffine(mask, matrix, (width, height), flags=cv2.INTER_LINEAR) for name, mask in regions.items()
    }
    if config.smallest < 1:
        part = rng.uniform(config.smallest, 1)
        lit, masks = resize(lit, part), {name: resize(mask, part) for name, mask in masks.items()}
    seen = _photographed(lit, config, rng)
    return np.rint(seen * 255).astype(np.uint8), {name: np.clip(mask, 0, 1) for name, mask in masks.items()}


def _photographed(image: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Add or take away fine detail, then add noise, to float (H, W, 3) in [0, 1]."""
    if config.sharpness:
        image = sharpen(image, rng.uniform(-config.sharpness, config.sharpness))
    if config.grain:
        image = image + rng.normal(0, rng.uniform(0, config.grain) / 255, image.shape)
    return np.clip(image, 0, 1)


def dead_leaves(side: int, rng: np.random.Generator) -> np.ndarray:
    """Give one picture, uint8 (side, side, 3): ellipses, focus, grain and shading are all drawn from `rng`.

    Radii follow the cubic law, under which the picture looks alike at every scale, up to a third of the side.
    """
    picture = np.full((side, side, 3), rng.uniform(40, 200, 3), np.float32)
    for _ in range(rng.integers(300, 900)):
        radius = min(side / 3, SMALLEST_RADIUS / np.sqrt(max(rng.random(), 1e-6)))
        x, y = rng.uniform(0, side, 2)
        axes = (round(radius), round(radius * rng.uniform(0.4, 1.0)))
        colour = rng.uniform(20, 235) + rng.normal(0, COLOUR_SPREAD, 3)
        centre = (round(x), round(y))
        cv2.ellipse(picture, centre, axes, rng.uniform(0, 360), 0, 360, colour.tolist(), cv2.FILLED, cv2.LINE_AA)
    focused = cv2.GaussianBlur(picture, (0, 0), sigmaX=rng.uniform(0.5, 2.0))
    grain = rng.uniform(3, 14) * power_law_noise(side, rng.uniform(0.6, 1.3), rng)
    shading = rng.uniform(5, 20) * power_law_noise(side, 1.8, rng)
    sensor = rng.normal(0, rng.uniform(0.5, 4.0), picture.shape)
    return np.clip(np.rint(focused + (grain + shading)[..., None] + sensor), 0, 255).astype(np.uint8)


def power_law_noise(side: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Give noise (side, side), mean 0, deviation 1; its amplitude is frequency to the power -`exponent`."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    frequency[0, 0] = 1 / side
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(side, side))) / frequency**exponent).real
    return (noise - noise.mean()) / noise.std()
