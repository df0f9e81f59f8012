"""Picture files to uint8 RGB, from a folder or a zip; only the unreadable and absurd are refused."""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Protocol
from zipfile import BadZipFile, ZipFile, is_zipfile

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif")
MIN_SIDE = 16
# Pillow's own limit for one warning (1 GiB of RGB / 4 / 3), so nothing it worries about is decoded.
MAX_PIXELS = 89_000_000
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
# What Pillow and libheif raise on broken files of one format or another.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, RuntimeError)
MEMBER_MARK = "::"
NAMED_AT_MOST = 5


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """What kind of files a source lists. are_frames: several in one folder below the class are frames of one video."""

    name: str
    suffixes: tuple[str, ...]
    are_frames: bool

    @property
    def plural(self) -> str:
        """Give the name of several."""
        return f"{self.name}s"


IMAGE_FILES = FileKind(name="image", suffixes=IMAGE_SUFFIXES, are_frames=True)


class UnreadableImage(ValueError):
    """An image that is refused; the message names the file and the reason."""


class ImageTooLarge(UnreadableImage):
    """An image with more pixels than are decoded."""


class UnreadableVideo(UnreadableImage):
    """A video that is refused; the message names the file and the reason."""

    @property
    def reason(self) -> str:
        """Give the message as a part of a sentence."""
        return str(self).removesuffix(".")


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


class ImageStore(Protocol):
    """Finds image files by the relative names that tables and conversations use."""

    def locate(self, name: str) -> str | None:
        """Give where `name` lies, for `stored_image`, or None when it is absent."""

    def names(self, folder: str) -> list[str]:
        """List the file names directly in `folder`, sorted."""


class FolderStore:
    """Image files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def locate(self, name: str) -> str | None:
        """Give the path of `name` below the root, or None."""
        path = self.root / name
        return str(path) if path.is_file() else None

    def names(self, folder: str) -> list[str]:
        """List the files of a sub-folder; none when it does not exist."""
        path = self.root / folder
        return sorted(p.name for p in path.iterdir() if p.is_file()) if path.is_dir() else []


class ZipStore:
    """Image files in a zip archive; one leading folder inside the archive (`c40/train/…`) is looked through."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with ZipFile(path) as archive:
            members = [m.filename for m in archive.infolist() if not m.is_dir()]
        self._members = set(members)
        tops = {m.split("/", 1)[0] for m in members}
        nested = len(tops) == 1 and all("/" in m for m in members)
        self._prefix = f"{tops.pop()}/" if nested else ""

    def _member(self, name: str) -> str | None:
        for candidate in (name, self._prefix + name):
            if candidate in self._members:
                return candidate
        return None

    def locate(self, name: str) -> str | None:
        """Give `archive::member` of `name`, or None."""
        member = self._member(name)
        return f"{self.path}{MEMBER_MARK}{member}" if member else None

    def names(self, folder: str) -> list[str]:
        """List the files of a folder inside the archive."""
        starts = {f"{folder}/", f"{self._prefix}{folder}/"}
        split = (m.rpartition("/") for m in self._members)
        return sorted({name for parent, slash, name in split if parent + slash in starts})


def open_store(root: str | Path) -> ImageStore:
    """Open a folder or a zip; a missing folder `x` is looked for as `x.zip`. Raises FileNotFoundError."""
    path = Path(root)
    if path.is_dir():
        return FolderStore(path)
    for archive in (path, path.with_name(path.name + ".zip")):
        if archive.is_file() and is_zipfile(archive):
            return ZipStore(archive)
    raise FileNotFoundError(
        f"Image folder {str(root)!r} does not exist, nor {path.name + '.zip'!r}; give a folder or zip."
    )


def stored_image(where: str) -> Path | bytes:
    """Give what `read_image` reads: the path of a file, or the bytes of an archive's member.

    Raises KeyError, OSError or BadZipFile for a member that is not there or cannot be unpacked.
    """
    archive, mark, member = where.partition(MEMBER_MARK)
    if not mark:
        return Path(where)
    try:
        return _open_zip(archive, os.getpid()).read(member)
    except (RuntimeError, zlib.error) as error:
        raise BadZipFile(f"{where}: locked, damaged or packed in an unknown way ({error}).") from error


def require_files(names: Sequence[str], store: ImageStore, what: str) -> list[str]:
    """Locate every name. Raises FileNotFoundError that counts the missing ones and lists the first five."""
    places = [store.locate(name) for name in names]
    missing = [name for name, place in zip(names, places, strict=True) if place is None]
    if missing:
        first = ", ".join(missing[:5])
        raise FileNotFoundError(
            f"{what}: {len(missing)} of {len(names)} files are missing (first: {first}); "
            "check `root`, the folder that relative names start from."
        )
    return [place for place in places if place is not None]


def report_missing(missing: Mapping[str, Sequence[str]], is_allowed: bool) -> None:
    """Name the videos that splits name and a place lacks: all of them in a warning, or some in a ValueError."""
    lacking = {place: names for place, names in missing.items() if names}
    if is_allowed:
        for place, names in lacking.items():
            log.warning("%s lacks %d videos that the splits name: %s", place, len(names), ", ".join(names))
    elif lacking:
        places = "; ".join(f"{p}: {len(n)} ({', '.join(n[:NAMED_AT_MOST])})" for p, n in lacking.items())
        raise ValueError(
            f"{sum(map(len, lacking.values()))} videos that the splits name are missing. First of each place: "
            f"{places}. Complete the files, or leave these videos out by --data.allow_missing true."
        )


@lru_cache(maxsize=8)
def _open_zip(path: str, process: int) -> ZipFile:
    """Keep an archive open per process: a file handle shared after a fork would mix up reads."""
    return ZipFile(path)
