"""One picture file to uint8 RGB: ordinary formats are converted, only the unreadable and absurd are refused."""

from __future__ import annotations

import struct
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif")
MIN_SIDE = 16
# Pillow's own limit for one warning (1 GiB of RGB / 4 / 3), so nothing it worries about is decoded.
MAX_PIXELS = 89_000_000
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
# What Pillow and libheif raise on broken files of one format or another.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, RuntimeError)


class UnreadableImage(ValueError):
    """An image that is refused; the message names the file and the reason."""


class ImageTooLarge(UnreadableImage):
    """An image with more pixels than are decoded."""


def read_image(
    source: Path | bytes, name: str = "", max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] | None = None
) -> np.ndarray:
    """Read a picture as uint8 RGB (H, W, 3), upright, first frame, transparency laid on white.

    Grey, palette, CMYK and 16-bit or float pictures are converted; colour profiles are not applied. Size limits
    (16 px a side, `max_pixels`) are checked on the header, before decoding. formats: Pillow's names of those that are
    tried; None = all it knows. Raises UnreadableImage or FileNotFoundError.
    """
    _register_heif()
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(f"Image {str(source)!r} does not exist.")
    name = name or (str(source) if isinstance(source, Path) else "uploaded bytes")
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
            check_size(image.size, name, max_pixels)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnreadableImage:
        raise
    except Image.DecompressionBombError:
        raise ImageTooLarge(f"{name}: more pixels than can be decoded safely; the limit is {max_pixels:,}.") from None
    except UnidentifiedImageError:
        raise UnreadableImage(f"{name}: not an image in a format that is known here; send JPEG, PNG or WebP.") from None
    except _DECODE_ERRORS as error:
        raise UnreadableImage(f"{name}: damaged or truncated ({error}); save or download it again.") from error


def list_images(folder: str | Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[Path]:
    """List image files (or others) anywhere below `folder` by suffix, sorted; hidden files are left out."""
    return sorted(
        p
        for p in Path(folder).rglob("*")
        if p.suffix.lower() in suffixes and not p.name.startswith(".") and p.is_file()
    )


def check_size(size: tuple[int, int], name: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raise UnreadableImage when width or height is under 16 pixels, or their product above `max_pixels`."""
    width, height = size
    if min(width, height) < MIN_SIDE:
        raise UnreadableImage(f"{name}: {width}x{height} pixels is too small; each side needs at least {MIN_SIDE}.")
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"{name}: {width}x{height} pixels is too large; the limit is {max_pixels:,} in all. Save it smaller."
        )


@cache
def _register_heif() -> None:
    from pillow_heif import register_heif_opener

    register_heif_opener()


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in _DEEP_MODES:
        grey = _to_eight_bits(np.asarray(image), is_16_bit=image.mode.startswith("I;16"))
        return np.repeat(grey[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def _to_eight_bits(values: np.ndarray, is_16_bit: bool) -> np.ndarray:
    """Scale deep grey values to 0…255, rounding.

    A 16-bit file means 0…65535. 32-bit and float files do not say their range: it is the first of 1 (float only),
    255, 65535 that holds the largest value, else that value itself. Negative values become 0.
    """
    if not np.isfinite(values).all():
        raise ValueError("holds values that are not numbers")
    steps = (65535.0,) if is_16_bit else (1.0, 255.0, 65535.0) if values.dtype.kind == "f" else (255.0, 65535.0)
    largest = float(values.max())
    top = next((step for step in steps if largest <= step), largest)
    return np.rint(np.clip(values.astype(np.float64) / top, 0, 1) * 255).astype(np.uint8)
