"""Regions at random places of a face, and a region blurred: what a counterfactual check compares."""

from __future__ import annotations

import cv2
import numpy as np

from llava.ops.artefacts import blur, lay_over


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
