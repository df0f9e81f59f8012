"""Pictures of a finding: the crop, the map laid over it, and where the face is in the whole image."""

from __future__ import annotations

import cv2
import matplotlib
import numpy as np

SHOWN_SIDE = 512  # px; a case file holds three pictures per face and is to stay small enough to send
COLOURS = "cividis"  # dark blue to light yellow: rises in lightness, so it also reads in grey and to the colour-blind
OPACITY = 0.45
FRAME_COLOUR = (255, 221, 0)


def overlay(pixels: np.ndarray, evidence_map: np.ndarray, seen: float = 1.0) -> np.ndarray:
    """Lay a map (h, w) in colours over the grey central square of a crop: uint8 RGB (H, W, 3) in and out.

    seen: the square's side as a share of the crop's shorter side. The colours span the lowest to the highest value of
    this very map. Fields are not smoothed into one another, because the detector knows no finer grid; outside the
    square, which it does not see, the picture stays grey.
    """
    grey = np.repeat(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    side = round(seen * min(pixels.shape[:2]))
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    low, high = float(evidence_map.min()), float(evidence_map.max())
    spread = (evidence_map - low) / (high - low) if high > low else np.full_like(evidence_map, 0.5)
    large = cv2.resize(spread.astype(np.float32), (side, side), interpolation=cv2.INTER_NEAREST)
    colours = matplotlib.colormaps[COLOURS](large)[..., :3] * 255
    square = (slice(top, top + side), slice(left, left + side))
    grey[square] = np.rint((1 - OPACITY) * grey[square] + OPACITY * colours)
    return grey


def shrink(pixels: np.ndarray, longest_side: int = SHOWN_SIDE) -> np.ndarray:
    """Make a picture smaller, so that no side is longer; a small one stays as it is."""
    height, width = pixels.shape[:2]
    scale = longest_side / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def framed(pixels: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """Draw a frame around (x, y, width, height) into a copy of a picture, wide enough to be seen when it is shrunk."""
    x, y, width, height = box
    thickness = max(2, max(pixels.shape[:2]) // 128)
    shown = pixels.copy()
    for colour, line in (((0, 0, 0), 2 * thickness), (FRAME_COLOUR, thickness)):  # a dark edge, for bright pictures
        cv2.rectangle(shown, (x, y), (x + width - 1, y + height - 1), colour, line)
    return shown


def outlined(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw the outline of a mask (H, W), bool, into a copy of a picture; the line lies outside of it."""
    inside = mask.astype(np.uint8)
    shown = pixels.copy()
    for colour, reach in (((0, 0, 0), 3), (FRAME_COLOUR, 2)):
        grown = cv2.dilate(inside, np.ones((2 * reach + 1, 2 * reach + 1), np.uint8))
        near = cv2.dilate(inside, np.ones((3, 3), np.uint8)) if reach == 2 else inside
        shown[(grown > 0) & (near == 0)] = colour
    return shown
