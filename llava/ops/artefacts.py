"""Local edits of a face that each leave one kind of trace; pixels outside the mask are never touched.

Every edit takes `image` uint8 (H, W, 3), `mask` float (H, W) in [0, 1] and lengths in pixels, and gives the edited
content, float32 (H, W, 3), with the weight (H, W) in [0, 1] at which it is to be laid over the image: `lay_over`.
"""

from __future__ import annotations

import cv2
import numpy as np

Edit = tuple[np.ndarray, np.ndarray]


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
