"""Degradations of uint8 images that a face meets on its way through cameras and networks."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from llava.core.config import setting
from llava.ops.ranges import require_within


@dataclass(frozen=True, kw_only=True)
class DegradeConfig:
    """Say how likely and how strong each degradation is; every strength is drawn evenly from its range.

    Defaults: blur 0.1, JPEG 0.1 and flip 0.5 of the M2F2-Det recipe, whose quality list (30, 100) we read as a
    range; noise and rescaling are off. Calling the settings degrades an image.
    """

    blur_probability: float = setting(0.1, "chance of a Gaussian blur")
    blur_sigma: tuple[float, float] = setting((0.0, 3.0), "range of the blur's sigma in pixels")
    rescale_probability: float = setting(0.0, "chance of shrinking and growing back")
    rescale_factor: tuple[float, float] = setting((0.5, 1.0), "range of the shrinking factor, in (0, 1]")
    noise_probability: float = setting(0.0, "chance of Gaussian noise")
    noise_sigma: tuple[float, float] = setting((0.0, 10.0), "range of the noise's sigma, in grey levels of 255")
    jpeg_probability: float = setting(0.1, "chance of JPEG compression")
    jpeg_quality: tuple[int, int] = setting((30, 100), "range of the JPEG quality, both ends included")
    flip_probability: float = setting(0.5, "chance of a left-right flip")

    def __post_init__(self) -> None:
        for name in ("blur", "rescale", "noise", "jpeg", "flip"):
            require_within(f"{name}_probability", (getattr(self, f"{name}_probability"),), 0, 1)
        require_within("blur_sigma", self.blur_sigma, 0, 100)
        require_within("rescale_factor", self.rescale_factor, 0.01, 1)
        require_within("noise_sigma", self.noise_sigma, 0, 255)
        require_within("jpeg_quality", self.jpeg_quality, 1, 100)

    def __call__(
        self, image: np.ndarray, mask: np.ndarray | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Degrade one image with these settings; its mask (H, W) is flipped with it."""
        return degrade(image, mask, self, rng)


def degrade(
    image: np.ndarray, mask: np.ndarray | None, config: DegradeConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Blur, rescale, add noise, compress and flip, each by its chance; uint8 (H, W, 3) to uint8 of the same shape.

    mask: (H, W), what belongs to the pixels; it is only flipped. All randomness comes from `rng`; the input is left as
    it is.
    """
    if rng.random() < config.blur_probability:
        image = blur(image, rng.uniform(*config.blur_sigma))
    if rng.random() < config.rescale_probability:
        image = rescale(image, rng.uniform(*config.rescale_factor))
    if rng.random() < config.noise_probability:
        image = add_noise(image, rng.uniform(*config.noise_sigma), rng)
    if rng.random() < config.jpeg_probability:
        low, high = config.jpeg_quality
        image = compress_jpeg(image, int(rng.integers(low, high + 1)))
    if rng.random() < config.flip_probability:
        image, mask = flip(image), None if mask is None else flip(mask)
    return image, mask


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur with a Gaussian of `sigma` pixels, mirrored at the border; sigma below 0.01 changes nothing."""
    if sigma < 0.01:
        return image
    # Half width of 4 sigma, as scipy's gaussian_filter truncates it.
    side = 2 * int(4 * sigma + 0.5) + 1
    return cv2.GaussianBlur(image, (side, side), sigmaX=sigma, borderType=cv2.BORDER_REFLECT)


def rescale(image: np.ndarray, factor: float) -> np.ndarray:
    """Shrink by `factor` (area average) and grow back to the old size (bicubic): detail above the limit is gone."""
    height, width = image.shape[:2]
    small = (max(1, round(width * factor)), max(1, round(height * factor)))
    shrunk = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    return cv2.resize(shrunk, (width, height), interpolation=cv2.INTER_CUBIC)


def add_noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Add independent Gaussian noise of `sigma` grey levels to every value, rounded and clipped to 0…255."""
    noisy = image + rng.normal(0.0, sigma, image.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def compress_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Write as JPEG of `quality` (1 to 100, 4:2:0) into memory and read back."""
    done, buffer = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ValueError(f"JPEG compression failed for an image of shape {image.shape}; expected uint8 (H, W, 3).")
    decoded = cv2.imdecode(buffer, cv2.IMREAD_COLOR)
    assert decoded is not None, "what OpenCV has just encoded it can decode"
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB)


def flip(image: np.ndarray) -> np.ndarray:
    """Mirror left and right."""
    return np.ascontiguousarray(image[:, ::-1])
