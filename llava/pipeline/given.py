"""What a pipeline is asked about, in whatever form it comes: paths, addresses, bytes, arrays, images already read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from llava.data.images import read_image
from llava.data.inputs import FetchLimits, NamedImage, fetch, is_url

Image: TypeAlias = str | Path | bytes | np.ndarray | NamedImage


def as_list(images: Image | Sequence[Image]) -> Sequence[Image]:
    """Give images, or the one that was given, as a sequence."""
    return [images] if isinstance(images, (str, Path, bytes, np.ndarray, NamedImage)) else images


def named(image: Image, number: int) -> NamedImage:
    """Read an image if it is not read yet; arrays and bytes are named by their number."""
    if isinstance(image, NamedImage):
        return image
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image {number}: expected uint8 (H, W, 3) RGB, got {image.dtype} {image.shape}.")
        return NamedImage(name=f"image {number}", pixels=image)
    if isinstance(image, bytes):
        return NamedImage(name=f"image {number}", pixels=read_image(image, f"image {number}"))
    source = fetch(str(image), FetchLimits()) if is_url(str(image)) else Path(image)
    return NamedImage(name=str(image), pixels=read_image(source, str(image)))
