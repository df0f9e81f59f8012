"""Edges of an image: how steep its brightness is at each pixel."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
FAINT = 1e-8  # a picture whose steepest pixel is no steeper is left as it is


def luma(images: Tensor) -> Tensor:
    """Give the brightness of images (B, 3, H, W) as (B, 1, H, W)."""
    weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def sobel_magnitude(images: Tensor, border: Literal["reflect", "zero"] = "reflect") -> Tensor:
    """Give the gradient's length by Sobel's kernels, divided by its maximum: (B, 1, H, W) in [0, 1].

    images: (B, 3, H, W) on any scale. border: what lies beyond the image; zeros draw a frame around it, unless its
    brightness there is zero. It has a gradient everywhere, which is 0 where the image is flat. Sobel and Feldman 1968.
    """
    grey = luma(images)
    grey = F.pad(grey, (1, 1, 1, 1), mode="reflect") if border == "reflect" else F.pad(grey, (1, 1, 1, 1))
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=grey.dtype, device=grey.device)
    steps = F.conv2d(grey, torch.stack([across, across.T])[:, None])  # (B, 2, H, W)
    squared = steps.square().sum(dim=1, keepdim=True)
    is_flat = squared == 0  # where the square root has no gradient
    length = torch.where(is_flat, 0.0, torch.where(is_flat, 1.0, squared).sqrt())
    most = length.amax(dim=(2, 3), keepdim=True)
    return length / torch.where(most > FAINT, most, 1.0)
