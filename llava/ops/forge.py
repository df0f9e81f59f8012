"""Forgeries whose truth is known: which region was edited, with which artefact, and the exact mask.

Every edit takes `image` uint8 (H, W, 3), `mask` float (H, W) in [0, 1] and lengths in pixels, and gives the edited
content, float32 (H, W, 3), with the weight (H, W) in [0, 1] at which it is to be laid over the image: `lay_over`.

A whole face is self-blended, see `llava.ops.self_blend`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from llava.core.config import setting
from llava.core.registry import nearest
from llava.ops.degrade import flatten_texture, require_within
from llava.ops.face_regions import FACE
from llava.ops.self_blend import SelfBlendConfig, draw_hull, self_blend

Edit = tuple[np.ndarray, np.ndarray]
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
ATTEMPTS = 20  # draws for one forgery until one is strong enough to be seen
SMALLEST_REGION = 64  # pixels; below this nobody sees what happened to it


def lay_over(image: np.ndarray, edit: Edit) -> np.ndarray:
    """Mix the edited content into the image by its weight; where the weight is 0 every value stays exactly."""
    content, weight = edit
    mixed = image + weight[..., None] * (content - image)
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def blending_boundary(image: np.ndarray, mask: np.ndarray, step: np.ndarray, width: float) -> Edit:
    """Raise a seam along the outline: `step` grey levels (3,) there, falling to 0 within `width` pixels inwards.

    Holes of the mask get no seam: that of the skin runs around the face, not around the eyes.
    """
    inside = (mask > 0).astype(np.uint8)
    outlines, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros_like(inside), outlines, -1, 1, thickness=cv2.FILLED)
    # A frame of zeros, so that a region cut by the image's border has its outline there.
    depth = cv2.distanceTransform(np.pad(filled, 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    weight = np.clip(1 - (depth - 1) / width, 0, 1) * inside
    return image + step.astype(np.float32), weight.astype(np.float32)


def colour_mismatch(image: np.ndarray, mask: np.ndarray, shift: np.ndarray) -> Edit:
    """Shift the colour by (L*, a*, b*) units of CIELAB."""
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    return cv2.cvtColor(lab + shift.astype(np.float32), cv2.COLOR_LAB2RGB) * 255, mask


def blur(image: np.ndarray, mask: np.ndarray, sigma: float) -> Edit:
    """Blur with a Gaussian of `sigma` pixels."""
    blurred = cv2.GaussianBlur(image.astype(np.float32), (0, 0), sigmaX=sigma, borderType=cv2.BORDER_REFLECT)
    return blurred, mask


def over_smooth(image: np.ndarray, mask: np.ndarray, sigma: float, tolerance: float) -> Edit:
    """Flatten texture and keep edges, see `flatten_texture`."""
    return flatten_texture(image, sigma, tolerance), mask


def resampling(image: np.ndarray, mask: np.ndarray, cell: float, offset: tuple[float, float]) -> Edit:
    """Take one pixel for each square of `cell` pixels, as nearest-neighbour shrinking and growing back does.

    offset: (y, x) of the grid in cells, each in [0, 1).
    """
    rows, columns = (_nearest(size, cell, shift) for size, shift in zip(image.shape[:2], offset, strict=True))
    return image[rows][:, columns].astype(np.float32), mask


def warp(image: np.ndarray, mask: np.ndarray, shift: float, rng: np.random.Generator) -> Edit:
    """Push the middle of each connected part by `shift` pixels in a direction of its own; outlines stay.

    A small part is pushed less, so that the mapping never folds.
    """
    inside = (mask > 0).astype(np.uint8)
    depth = cv2.distanceTransform(np.pad(inside, 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    count, parts = cv2.connectedComponents(inside)
    height, width = mask.shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    for part in range(1, count):
        deepest = float(depth[parts == part].max())
        t = np.where(parts == part, depth / deepest, 0)
        angle = rng.uniform(0, 2 * np.pi)
        # The smoothstep's steepest slope is 1.5 / deepest; times 0.6 deepest it stays below 1.
        push = min(shift, 0.6 * deepest) * t * t * (3 - 2 * t)
        x += (push * np.cos(angle)).astype(np.float32)
        y += (push * np.sin(angle)).astype(np.float32)
    moved = cv2.remap(image.astype(np.float32), x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    return moved, inside.astype(np.float32)


def _nearest(size: int, cell: float, offset: float) -> np.ndarray:
    start = np.floor(np.arange(size) / cell + offset) - offset
    return np.clip(np.rint((start + 0.5) * cell - 0.5), 0, size - 1).astype(int)


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
    hulls: bool = setting(False, "draw the outline of a self-blended face among five hulls, not always the whole face")
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

    mask: float32 (H, W) in [0, 1], above 0 wherever a pixel may differ from the original; where the background of a
    self-blended face was changed, wherever it is not the background.
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


def draw_forgery(
    image: np.ndarray,
    regions: Mapping[str, np.ndarray],
    config: ForgeConfig,
    rng: np.random.Generator,
    artefact: str | None = None,
) -> Forgery | None:
    """Draw region, artefact and strength until the change is large enough to be seen; None after 20 draws.

    regions: masks of `image` as `face_regions` gives them. artefact: the one that is wanted; None = draw it, too.
    """
    for _ in range(ATTEMPTS):
        region, drawn = draw_kind(regions, config, rng) if artefact is None else _region_for(artefact, regions, rng)
        mask = draw_hull(regions, rng) if config.hulls and drawn == SELF_BLENDED else regions[region]
        forgery = forge(image, mask, region, drawn, rng, config)
        if forgery is not None:
            return forgery
    return None


def _region_for(artefact: str, regions: Mapping[str, np.ndarray], rng: np.random.Generator) -> tuple[str, str]:
    """Draw a region that an artefact can be put on and that is large enough, alike among these."""
    fit = [name for name, artefacts in PAIRS.items() if artefact in artefacts]
    large = [name for name in fit if np.count_nonzero(regions[name]) >= SMALLEST_REGION]
    if not large:
        raise ValueError(f"artefact: {artefact!r} needs {SMALLEST_REGION} pixels of {', '.join(fit) or 'no region'}.")
    return large[rng.integers(len(large))], artefact


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
    `mask` is, but for a self-blended face, whose outline is moved) pixels are exactly those of the image, or of the
    changed background. Raises ValueError for a pair that `PAIRS` does not allow, an empty mask or wrong shapes.
    """
    config = config or ForgeConfig()
    _check(image, mask, region, artefact)
    background = image
    if artefact == SELF_BLENDED:
        background, edit = self_blend(image, mask, config.self_blend, rng)
    else:
        edit = _EDITS[artefact](image, mask, config, min(image.shape[:2]) / 100, rng)
    forged, weight = lay_over(background, edit), edit[1]
    change = np.abs(forged.astype(np.float32) - background).mean(axis=2)
    if weight.max() == 0 or float((change * weight).sum() / weight.sum()) < config.least_change:
        return None
    return Forgery(image=forged, mask=weight, region=region, artefact=artefact)


def _boundary(image: np.ndarray, mask: np.ndarray, config: ForgeConfig, unit: float, rng: np.random.Generator) -> Edit:
    # One sign for all channels, and slightly different heights: a seam of light with a tint.
    step = rng.uniform(*config.boundary_step) * rng.choice((-1.0, 1.0)) * rng.uniform(0.7, 1.0, 3)
    return blending_boundary(image, mask, step, max(unit * rng.uniform(*config.boundary_width), 2.0))


def _colour(image: np.ndarray, mask: np.ndarray, config: ForgeConfig, unit: float, rng: np.random.Generator) -> Edit:
    angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(*config.colour_distance)
    lightness = rng.uniform(*config.lightness_shift) * rng.choice((-1.0, 1.0))
    shift = np.array([lightness, distance * np.cos(angle), distance * np.sin(angle)])
    return colour_mismatch(image, mask, shift)


def _blur(image: np.ndarray, mask: np.ndarray, config: ForgeConfig, unit: float, rng: np.random.Generator) -> Edit:
    return blur(image, mask, unit * rng.uniform(*config.blur_sigma))


def _smooth(image: np.ndarray, mask: np.ndarray, config: ForgeConfig, unit: float, rng: np.random.Generator) -> Edit:
    sigma, tolerance = unit * rng.uniform(*config.smooth_sigma), rng.uniform(*config.smooth_tolerance)
    return over_smooth(image, mask, sigma, tolerance)


def _resample(image: np.ndarray, mask: np.ndarray, config: ForgeConfig, unit: float, rng: np.random.Generator) -> Edit:
    cell = max(unit * rng.uniform(*config.resample_cell), 2.0)
    return resampling(image, mask, cell, (rng.random(), rng.random()))


def _warp(image: np.ndarray, mask: np.ndarray, config: ForgeConfig, unit: float, rng: np.random.Generator) -> Edit:
    return warp(image, mask, unit * rng.uniform(*config.warp_shift), rng)


_EDITS: dict[str, Callable[[np.ndarray, np.ndarray, ForgeConfig, float, np.random.Generator], Edit]] = {
    "blending_boundary": _boundary,
    "colour_mismatch": _colour,
    "blur": _blur,
    "over_smooth": _smooth,
    "resampling": _resample,
    "warp": _warp,
}
ARTEFACTS = (*_EDITS, SELF_BLENDED)


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


def random_region(within: np.ndarray, area: int, rng: np.random.Generator) -> np.ndarray:
    """Give a random region, bool (H, W), of exactly `area` pixels of `within`, bool (H, W).

    It is where a smooth random field is highest; the field's scale makes it a few blobs. Raises ValueError unless
    1 <= area <= the pixels of `within`.
    """
    places = np.flatnonzero(within)
    if not 1 <= area <= len(places):
        raise ValueError(f"area: {area} pixels are not to be had; allowed: 1 to {len(places)}.")
    # Half the radius of a disc of that area.
    scale = max(0.5 * np.sqrt(area / np.pi), 0.5)
    noise = rng.standard_normal(within.shape).astype(np.float32)
    field = cv2.GaussianBlur(noise, (0, 0), sigmaX=float(scale), borderType=cv2.BORDER_REFLECT)
    region = np.zeros(within.shape, dtype=bool)
    region.flat[places[np.argsort(-field.flat[places], kind="stable")[:area]]] = True
    return region


def blur_region(image: np.ndarray, region: np.ndarray, sigma: float) -> np.ndarray:
    """Blur an image, uint8 (H, W, 3), within a region, bool (H, W), by `sigma` pixels; the outline is softened."""
    content, weight = blur(image, region.astype(np.float32), sigma)
    # A sharp outline would be a forger's trace of its own.
    soft = cv2.GaussianBlur(weight, (0, 0), sigmaX=sigma / 4, borderType=cv2.BORDER_REFLECT)
    return lay_over(image, (content, soft))
