"""Random pictures of leaves that cover each other: nobody's face, but edges, shades and textures of every size.

Lee, Mumford and Huang, Occlusion Models for Natural Images, IJCV 2001. Networks can learn to see from them (Baradad et
al., Learning to See by Looking at Noise, NeurIPS 2021).
"""

from __future__ import annotations

import cv2
import numpy as np

SMALLEST_RADIUS = 3.0  # pixels
COLOUR_SPREAD = 25.0  # standard deviation of a channel around the leaf's grey level, in levels of 255


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
