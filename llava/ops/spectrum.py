"""Spectra of images: how much of each spatial frequency there is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.ops.edges import luma

FLAT = 1e-8  # a spectrum whose values lie no further apart is not stretched
SLOPE = 10.0  # bins over which the published gate opens
ORDER = 2  # of the Butterworth filter: 12 dB an octave below its corner


def radius(height: int, width: int, like: Tensor) -> Tensor:
    """Give the distance of each bin to frequency zero, which is in the middle of (height, width), in bins."""
    y = torch.arange(height, dtype=like.dtype, device=like.device) - height // 2
    x = torch.arange(width, dtype=like.dtype, device=like.device) - width // 2
    return torch.hypot(y[:, None], x[None, :])


def published_gate(height: int, width: int, like: Tensor) -> Tensor:
    """Give RADAR's gate (height, width) as published: 0.2 at frequency zero for 112 bins, hence no high-pass."""
    return ((radius(height, width, like) - min(height, width) / 8) / SLOPE).sigmoid()


def high_pass_gate(height: int, width: int, like: Tensor) -> Tensor:
    """Give a Butterworth high-pass (height, width): 0 at frequency zero, half the power at an eighth of the side."""
    distance = radius(height, width, like)
    corner = min(height, width) / 8
    return distance**ORDER / (distance ** (2 * ORDER) + corner ** (2 * ORDER)).sqrt()


def high_spectrum(images: Tensor, size: int) -> Tensor:
    """Give the log amplitudes of what a high-pass leaves of images (B, 3, H, W): (B, size, size) in [0, 1].

    The image is freed of its mean and tapered (Hann), transformed at its own size, so that its finest details count;
    log amplitudes pass the gate, are averaged down to `size` and stretched from 0 to 1 for each image. Raises
    ValueError when it has fewer than `size` pixels.
    """
    height, width = images.shape[-2:]
    if min(height, width) < size:
        raise ValueError(f"size: {size} bins can not be had of {height} x {width} pixels; give {min(height, width)}.")
    grey = luma(images)[:, 0].float()
    taper = torch.hann_window(height, device=grey.device)[:, None] * torch.hann_window(width, device=grey.device)
    flat = (grey - grey.mean(dim=(1, 2), keepdim=True)) * taper
    amplitudes = torch.fft.fftshift(torch.fft.fft2(flat), dim=(-2, -1)).abs()
    passed = amplitudes.log1p() * high_pass_gate(height, width, grey)
    return _stretched(F.adaptive_avg_pool2d(passed[:, None], size)[:, 0])


def published_spectrum(images: Tensor, size: int, rolled: bool = True) -> Tensor:
    """Give RADAR's spectra of images (B, 3, H, W) as they were published: (B, S, S) in [0, 1], S = size.

    rolled: each image gets the spectrum of the image half a batch before, as the shift of frequency zero to the middle
    also moves the batch; one image alone gets its own. An image that is as wide as `size` is not resized, however high.
    """
    grey = luma(images).float()
    if grey.shape[-1] != size:
        grey = F.interpolate(grey, size=(size, size), mode="bilinear", align_corners=False)
    amplitudes = torch.fft.fftshift(torch.fft.fft2(grey[:, 0]), dim=None if rolled else (-2, -1)).abs()
    return _stretched((amplitudes * published_gate(amplitudes.shape[-2], amplitudes.shape[-1], amplitudes)).log1p())


def _stretched(values: Tensor) -> Tensor:
    """Map each of (B, H, W) to 0 at its lowest and 1 at its highest value."""
    low, high = values.amin(dim=(1, 2), keepdim=True), values.amax(dim=(1, 2), keepdim=True)
    return (values - low) / (high - low).clamp(min=FLAT)
