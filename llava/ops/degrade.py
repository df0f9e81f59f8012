"""What a face meets on its way through cameras, networks and viewers: random degradations and named versions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from llava.core.config import setting

SMOOTH_SIGMA = 2.0  # pixels: spatial width of what flattens texture all over


def require_within(name: str, values: tuple[float, ...], low: float, high: float) -> None:
    """Refuse values outside [low, high] or not in rising order. Raises ValueError naming the setting."""
    if any(not low <= v <= high for v in values) or values[0] > values[-1]:
        raise ValueError(f"{name}: {values} is not usable; allowed: {low} to {high}, the smaller value first.")


@dataclass(frozen=True, kw_only=True)
class DegradeConfig:
    """Say how likely and how strong each degradation is; every strength is drawn evenly from its range.

    Defaults: blur 0.1, JPEG 0.1 and flip 0.5 of the M2F2-Det recipe, whose quality list (30, 100) we read as a
    range; all else is off. Calling the settings degrades an image.
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
    smooth_probability: float = setting(0.0, "chance of texture being flattened all over, as beauty filters do")
    smooth_tolerance: tuple[float, float] = setting((5.0, 20.0), "range of the texture it flattens, in grey levels")
    sharpen_probability: float = setting(0.0, "chance of fine detail being added to, as cameras and editors do")
    sharpen_amount: tuple[float, float] = setting((0.0, 2.0), "range of the detail's weight; 1 = as much again")
    grey_probability: float = setting(0.0, "chance of colour being taken away")
    gain: float = setting(0.0, "largest relative change of brightness; 0 = none")
    rotation: float = setting(0.0, "largest rotation to either side, in degrees; 0 = none")

    def __post_init__(self) -> None:
        require_within("gain", (self.gain,), 0, 1)
        require_within("rotation", (self.rotation,), 0, 180)
        require_within("smooth_tolerance", self.smooth_tolerance, 0, 255)
        require_within("sharpen_amount", self.sharpen_amount, 0, 10)
        for name in ("smooth", "sharpen", "grey", "blur", "rescale", "noise", "jpeg", "flip"):
            require_within(f"{name}_probability", (getattr(self, f"{name}_probability"),), 0, 1)
        require_within("blur_sigma", self.blur_sigma, 0, 100)
        require_within("rescale_factor", self.rescale_factor, 0.01, 1)
        require_within("noise_sigma", self.noise_sigma, 0, 255)
        require_within("jpeg_quality", self.jpeg_quality, 1, 100)

    def __call__(
        self, image: np.ndarray, mask: np.ndarray | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Degrade one image with these settings; its mask (H, W) is flipped and rotated with it."""
        return degrade(image, mask, self, rng)


def degrade(
    image: np.ndarray, mask: np.ndarray | None, config: DegradeConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Smooth, sharpen, make grey, blur, rescale, add noise, compress, flip, each by its chance; change gain and angle.

    image: uint8 (H, W, 3), as the result; it is left as it is. mask: (H, W), what belongs to the pixels; it is only
    flipped and rotated. All randomness comes from `rng`.
    """
    if config.smooth_probability and rng.random() < config.smooth_probability:
        flat = flatten_texture(image, SMOOTH_SIGMA, rng.uniform(*config.smooth_tolerance))
        image = np.clip(np.rint(flat), 0, 255).astype(np.uint8)
    if config.sharpen_probability and rng.random() < config.sharpen_probability:
        sharp = sharpen(image.astype(np.float32), rng.uniform(*config.sharpen_amount))
        image = np.clip(np.rint(sharp), 0, 255).astype(np.uint8)
    if config.grey_probability and rng.random() < config.grey_probability:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
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
    if config.gain:
        lit = image * (1 + rng.uniform(-config.gain, config.gain))
        image = np.clip(np.rint(lit), 0, 255).astype(np.uint8)
    if config.rotation:
        degrees = rng.uniform(-config.rotation, config.rotation)
        image = rotate(image, degrees)
        mask = None if mask is None else rotate(mask, degrees, cv2.INTER_NEAREST)
    return image, mask


def flatten_texture(image: np.ndarray, sigma: float, tolerance: float) -> np.ndarray:
    """Flatten texture of less than about `tolerance` grey levels and keep edges: a bilateral filter, run twice.

    Tomasi and Manduchi 1998; `sigma` is its spatial width in pixels. Gives float32 (H, W, 3).
    """
    smooth: np.ndarray = image.astype(np.float32)
    for _ in range(2):
        # OpenCV sums the difference over the three channels.
        smooth = cv2.bilateralFilter(smooth, 2 * round(1.5 * sigma) + 1, 3 * tolerance, sigma)
    return smooth


def sharpen(image: np.ndarray, amount: float) -> np.ndarray:
    """Add `amount` times what a Gaussian blur of sigma 1 takes away, to floats (H, W, 3); not clipped."""
    return image + amount * (image - cv2.GaussianBlur(image, (0, 0), sigmaX=1.0))


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


def rotate(image: np.ndarray, degrees: float, interpolation: int = cv2.INTER_LINEAR) -> np.ndarray:
    """Turn counter-clockwise about the centre of the pixels; what comes in over the border is mirrored."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    return cv2.warpAffine(image, matrix, (width, height), flags=interpolation, borderMode=cv2.BORDER_REFLECT)


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
