"""Forgeries whose truth is known: which region was edited, with which artefact, and the exact mask.

Every edit takes `image` uint8 (H, W, 3), `mask` float (H, W) in [0, 1] and lengths in pixels, and gives the edited
content, float32 (H, W, 3), with the weight (H, W) in [0, 1] at which it is to be laid over the image: `lay_over`.

Shiohara and Yamasaki, Detecting Deepfakes with Self-Blended Images, CVPR 2022. What differs: the paper changes the
copy or the background, at random; we only change the copy, so that pixels outside the mask stay untouched. Its mask is
a landmark hull; ours comes in as an argument. Ranges are ours, weaker, fixed in the recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from llava.core.config import setting
from llava.core.registry import nearest
from llava.ops.degrade import require_within
from llava.ops.face_regions import FACE

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
    """Flatten texture of less than about `tolerance` grey levels and keep edges: a bilateral filter, run twice.

    Tomasi and Manduchi 1998; `sigma` is its spatial width in pixels.
    """
    smooth: np.ndarray = image.astype(np.float32)
    for _ in range(2):
        # OpenCV sums the difference over the three channels.
        smooth = cv2.bilateralFilter(smooth, 2 * round(1.5 * sigma) + 1, 3 * tolerance, sigma)
    return smooth, mask


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

    def __post_init__(self) -> None:
        for name in ("saturation_change", "contrast_change", "resize", "blend_ratio"):
            require_within(name, getattr(self, name), 0, 1)
        for name in ("translate", "elastic", "mask_blur"):
            require_within(name, getattr(self, name), 0, 100)
        require_within("colour_shift", self.colour_shift, 0, 255)
        require_within("hue_shift", self.hue_shift, 0, 180)
        require_within("sharpen_amount", self.sharpen_amount, 0, 10)
        require_within("shrink_factor", self.shrink_factor, 1, 16)


def self_blend(image: np.ndarray, mask: np.ndarray, config: SelfBlendConfig, rng: np.random.Generator) -> Edit:
    """Give a changed copy of the face, float32 (H, W, 3), and its weight (H, W) in [0, 1], soft and deformed.

    image: uint8 (H, W, 3); mask: the face, float (H, W) in [0, 1].
    """
    side = min(image.shape[:2]) / 100
    copy = _recolour(image.astype(np.float32), config, rng)
    copy = _refocus(copy, config, rng)
    copy = _displace(copy, config, side, rng)
    weight = _deform(mask, side * rng.uniform(*config.elastic), 8 * side, rng)
    weight = cv2.GaussianBlur(weight, (0, 0), sigmaX=max(side * rng.uniform(*config.mask_blur), 0.3))
    weight = np.clip(weight * rng.uniform(*config.blend_ratio), 0, 1)
    return copy, np.where(weight < 1 / 255, 0, weight).astype(np.float32)


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
        detail = image - cv2.GaussianBlur(image, (0, 0), sigmaX=1.0)
        return np.clip(image + rng.uniform(*config.sharpen_amount) * detail, 0, 255)
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
    forged = lay_over(image, edit)
    weight = edit[1]
    change = np.abs(forged.astype(np.float32) - image).mean(axis=2)
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
