"""uint8 images to the tensors that a detector declares, equal to transformers' PIL image processor."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava.core.types import InputSpec

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def to_tensor(image: np.ndarray, spec: InputSpec) -> Tensor:
    """Resize the shortest edge, crop the centre, scale to [0, 1] and normalise: uint8 (H, W, 3) to (3, S, S)."""
    pixels = torch.from_numpy(_resize_and_crop(image, spec)).permute(2, 0, 1).float() / 255.0
    mean = torch.tensor(spec.mean).view(3, 1, 1)
    std = torch.tensor(spec.std).view(3, 1, 1)
    return (pixels - mean) / std


def view_tensors(image: np.ndarray, spec: InputSpec) -> Tensor:
    """Give every test-time view of one image, (V, 3, S, S) in the order of `spec.views`."""
    plain = to_tensor(image, spec)
    return torch.stack([plain.flip(-1) if view == "flip" else plain for view in spec.views])


def mask_cells(mask: np.ndarray, spec: InputSpec, grid: int) -> Tensor:
    """Give the forged part of each cell (grid, grid) in [0, 1]; the mask (H, W) uint8 goes the image's way."""
    picture = np.repeat((mask > 0).astype(np.uint8)[..., None] * 255, 3, axis=2)
    seen = torch.from_numpy(_resize_and_crop(picture, replace(spec, interpolation="bilinear"))[..., 0])
    return torch.nn.functional.adaptive_avg_pool2d(seen[None].float() / 255.0, grid)[0]


def _resize_and_crop(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    height, width = image.shape[:2]
    # The long side is cut off, not rounded, as transformers and torchvision do.
    short = spec.shortest_edge
    long = int(short * max(height, width) / min(height, width))
    new_width, new_height = (short, long) if width <= height else (long, short)
    resized = np.array(Image.fromarray(image).resize((new_width, new_height), _RESAMPLING[spec.interpolation]))
    top, left = (new_height - spec.size) // 2, (new_width - spec.size) // 2
    return resized[top : top + spec.size, left : left + spec.size]
