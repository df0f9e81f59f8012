"""Forgeries whose truth is known: which region of a face was edited, with which artefact, and the exact mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from llava.core.config import setting
from llava.core.registry import nearest
from llava.ops import artefacts
from llava.ops.artefacts import Edit
from llava.ops.face_regions import FACE
from llava.ops.ranges import require_within
from llava.ops.self_blend import SelfBlendConfig, self_blend

SELF_BLENDED = "self_blended"
_LOCAL = ("blending_boundary", "colour_mismatch", "blur", "resampling", "warp")
# Blur, coarse resampling and a warp hardly show where there is no detail, so the skin gets over-smoothing instead; and
# over-smoothing is a loss of skin texture: on eyes, eyebrows and mouth it could not be told from blur.
PAIRS: dict[str, tuple[str, ...]] = {
    "skin": ("blending_boundary", "colour_mismatch", "over_smooth"),
    "eyebrows": _LOCAL,
    "eyes": _LOCAL,
    "nose": _LOCAL,
    "mouth": _LOCAL,
    FACE: (SELF_BLENDED,),
}
SMALLEST_REGION = 64  # pixels; below this nobody sees what happened to it


@dataclass(frozen=True, kw_only=True)
class ForgeConfig:
    """How often what is forged, and how strongly; lengths in percent of the image's shorter side.

    Every strength is drawn evenly from its range. At 256 px one percent is 2.6 px.
    """

    self_blend_share: float = setting(0.25, "part of the forgeries that are whole faces, self-blended; in [0, 1]")
    boundary_step: tuple[float, float] = setting((60.0, 90.0), "height of the seam, in grey levels of 255")
    boundary_width: tuple[float, float] = setting((2.0, 3.2), "width of the seam")
    colour_distance: tuple[float, float] = setting((22.0, 34.0), "shift in the a*b* plane, in CIELAB units")
    lightness_shift: tuple[float, float] = setting((5.0, 12.0), "shift of L* with it, either way, in CIELAB units")
    blur_sigma: tuple[float, float] = setting((1.6, 2.6), "sigma of the Gaussian blur")
    smooth_sigma: tuple[float, float] = setting((2.5, 4.0), "spatial sigma of the over-smoothing filter")
    smooth_tolerance: tuple[float, float] = setting((25.0, 40.0), "texture it flattens, in grey levels of 255")
    resample_cell: tuple[float, float] = setting((2.2, 3.2), "side of the squares that resampling leaves")
    warp_shift: tuple[float, float] = setting((5.0, 8.0), "displacement in the middle of a warped part")
    least_change: float = setting(5.0, "smallest mean change inside the mask, in grey levels; below it, none is given")
    self_blend: SelfBlendConfig = setting(SelfBlendConfig())

    def __post_init__(self) -> None:
        require_within("self_blend_share", (self.self_blend_share,), 0, 1)
        require_within("least_change", (self.least_change,), 0, 255)
        for name in ("boundary_step", "colour_distance", "lightness_shift", "smooth_tolerance"):
            require_within(name, getattr(self, name), 0, 255)
        for name in ("boundary_width", "blur_sigma", "smooth_sigma", "resample_cell", "warp_shift"):
            require_within(name, getattr(self, name), 0, 100)


@dataclass(frozen=True, kw_only=True)
class Forgery:
    """A forged image, uint8 (H, W, 3), and what was done to it.

    mask: float32 (H, W) in [0, 1], above 0 wherever a pixel may differ from the original.
    """

    image: np.ndarray
    mask: np.ndarray
    region: str
    artefact: str


def draw_kind(regions: Mapping[str, np.ndarray], config: ForgeConfig, rng: np.random.Generator) -> tuple[str, str]:
    """Draw (region, artefact): a whole face by its share, else each region, then each of its artefacts, alike.

    Regions of less than 64 pixels are passed over. Raises ValueError when there is none.
    """
    if rng.random() < config.self_blend_share:
        return FACE, SELF_BLENDED
    large = [name for name in PAIRS if name != FACE and np.count_nonzero(regions[name]) >= SMALLEST_REGION]
    if not large:
        raise ValueError(f"No region of the face has {SMALLEST_REGION} pixels; give a larger crop.")
    region = large[rng.integers(len(large))]
    return region, PAIRS[region][rng.integers(len(PAIRS[region]))]


def forge(
    image: np.ndarray,
    mask: np.ndarray,
    region: str,
    artefact: str,
    rng: np.random.Generator,
    config: ForgeConfig | None = None,
) -> Forgery | None:
    """Edit one region of a face with one artefact; None when the result differs too little to be seen.

    image: uint8 (H, W, 3); mask: the region, float (H, W) in [0, 1]. Where the forgery's mask is 0 (at least wherever
    `mask` is, but for a self-blended face, whose outline is moved) pixels are exactly those of the image. Raises
    ValueError for a pair that `PAIRS` does not allow, an empty mask or wrong shapes.
    """
    config = config or ForgeConfig()
    _check(image, mask, region, artefact)
    edit = _EDITS[artefact](image, mask, config, min(image.shape[:2]) / 100, rng)
    forged = artefacts.lay_over(image, edit)
    weight = edit[1]
    change = np.abs(forged.astype(np.float32) - image).mean(axis=2)
    if weight.max() == 0 or float((change * weight).sum() / weight.sum()) < config.least_change:
        return None
    return Forgery(image=forged, mask=weight, region=region, artefact=artefact)


def _boundary(image: np.ndarray, mask: np.ndarray, config: ForgeConfig, unit: float, rng: np.random.Generator) -> Edit:
    # One sign for all channels, and slightly different heights: a seam of light with a tint.
    step = rng.uniform(*config.boundary_step) * rng.choice((-1.0, 1.0)) * rng.uniform(0.7, 1.0, 3)
    return artefacts.blending_boundary(image, mask, step, max(unit * rng.uniform(*config.boundary_width), 2.0))


def _colour(image: np.ndarray, mask: np.ndarray, config: ForgeConfig, unit: float, rng: np.random.Generator) -> Edit:
    angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(*config.colour_distance)
    lightness = rng.uniform(*config.lightness_shift) * rng.choice((-1.0, 1.0))
    shift = np.array([lightness, distance * np.cos(angle), distance * np.sin(angle)])
    return artefacts.colour_mismatch(image, mask, shift)


def _blur(image: np.ndarray, mask: np.ndarray, config: ForgeConfig, unit: float, rng: np.random.Generator) -> Edit:
    return artefacts.blur(image, mask, unit * rng.uniform(*config.blur_sigma))


def _smooth(image: np.ndarray, mask: np.ndarray, config: ForgeConfig, unit: float, rng: np.random.Generator) -> Edit:
    sigma, tolerance = unit * rng.uniform(*config.smooth_sigma), rng.uniform(*config.smooth_tolerance)
    return artefacts.over_smooth(image, mask, sigma, tolerance)


def _resample(image: np.ndarray, mask: np.ndarray, config: ForgeConfig, unit: float, rng: np.random.Generator) -> Edit:
    cell = max(unit * rng.uniform(*config.resample_cell), 2.0)
    return artefacts.resampling(image, mask, cell, (rng.random(), rng.random()))


def _warp(image: np.ndarray, mask: np.ndarray, config: ForgeConfig, unit: float, rng: np.random.Generator) -> Edit:
    return artefacts.warp(image, mask, unit * rng.uniform(*config.warp_shift), rng)


def _self_blend(
    image: np.ndarray, mask: np.ndarray, config: ForgeConfig, unit: float, rng: np.random.Generator
) -> Edit:
    return self_blend(image, mask, config.self_blend, rng)


_EDITS: dict[str, Callable[[np.ndarray, np.ndarray, ForgeConfig, float, np.random.Generator], Edit]] = {
    "blending_boundary": _boundary,
    "colour_mismatch": _colour,
    "blur": _blur,
    "over_smooth": _smooth,
    "resampling": _resample,
    "warp": _warp,
    SELF_BLENDED: _self_blend,
}
ARTEFACTS = tuple(_EDITS)


def _check(image: np.ndarray, mask: np.ndarray, region: str, artefact: str) -> None:
    if region not in PAIRS:
        raise ValueError(f"region: {region!r} is unknown. {nearest(region, PAIRS)}")
    if artefact not in PAIRS[region]:
        raise ValueError(f"artefact: {artefact!r} cannot be put on the {region}. {nearest(artefact, PAIRS[region])}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image: expected uint8 (H, W, 3), got {image.dtype} {image.shape}.")
    if mask.shape != image.shape[:2] or not 0 < float(mask.max()) <= 1 or float(mask.min()) < 0:
        raise ValueError(
            f"mask: expected {image.shape[:2]} in [0, 1] and not empty, got {mask.shape} "
            f"from {mask.min()} to {mask.max()}."
        )
