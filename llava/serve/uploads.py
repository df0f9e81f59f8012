"""What strangers send (bytes, base64, data URIs) as checked images and videos; only the bytes tell what it is."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Semaphore
from typing import Any, TypeVar

from fastapi import UploadFile

from llava.core.config import setting
from llava.core.runtime import give_memory_back
from llava.data.frames import open_clip
from llava.data.images import ImageTooLarge, UnreadableImage, read_image
from llava.data.inputs import NamedImage, NamedVideo
from llava.serve.engine import Refusal

SNIFF_BYTES = 192  # a second packet of an MPEG transport stream begins at 188
# Pillow's name for each image format; it opens many more, some through other programs (EPS), and none of those here.
PILLOW_FORMATS = {
    "image/jpeg": "JPEG",
    "image/png": "PNG",
    "image/gif": "GIF",
    "image/webp": "WEBP",
    "image/bmp": "BMP",
    "image/tiff": "TIFF",
    "image/heif": "HEIF",
    "image/avif": "AVIF",
}
BEGINNINGS = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"BM", "image/bmp"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
    (b"\x1aE\xdf\xa3", "video/webm"),
    (b"\0\0\x01\xba", "video/mpeg"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "video/x-ms-asf"),
    (b"FLV\x01", "video/x-flv"),
    (b"OggS", "video/ogg"),
)
RIFF = {b"WEBP": "image/webp", b"AVI ": "video/x-msvideo"}
BRANDS = {b"avif": "image/avif", b"avis": "image/avif"} | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), "image/heif"
)
MOVIE_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
T = TypeVar("T")
NAMELESS = "upload"
DECODING = Semaphore(2)  # at a time in a process, because one image may take 525 MB, see UploadLimits
LARGE = 10_000_000  # bytes of pixels; reading more than that leaves hundreds of megabytes with each thread
MAX_NAME = 80
# RFC 2397, with base64 required; the media type is not believed.
DATA_URI = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+\"-]*)*;base64,", re.IGNORECASE | re.ASCII)
MAX_HEAD = 200
BASE64 = re.compile(r"[A-Za-z0-9+/]*={0,2}")  # of a length that 4 divides
WHITESPACE = str.maketrans("", "", " \t\r\n")


def media_type(content: bytes | bytearray) -> str | None:
    """Name the format (`image/jpeg`, `video/mp4`, …) by the first SNIFF_BYTES bytes; None for any other."""
    start = bytes(content[:SNIFF_BYTES])
    if start[:4] == b"RIFF":
        return RIFF.get(start[8:12])
    if start[4:8] == b"ftyp" and start[8:12] in BRANDS:
        return BRANDS[start[8:12]]
    if start[4:8] in MOVIE_BOXES:
        return "video/mp4"
    if start[:1] == b"G" and start[188:189] == b"G":
        return "video/mp2t"
    return next((kind for beginning, kind in BEGINNINGS if start.startswith(beginning)), None)


def unknown_format(name: str) -> Refusal:
    """Give the refusal for what is neither an image nor a video."""
    return Refusal(415, f"{name}: not an image or video in a format that is known here; send JPEG, PNG, WebP or MP4.")


@dataclass(frozen=True, kw_only=True)
class UploadLimits:
    """What one image or video that is sent may cost."""

    max_bytes: int = setting(20_000_000, "largest image or video, in bytes")
    # A see-through picture that is stored turned takes 21 bytes a pixel while it is read: 525 MB at this limit.
    max_pixels: int = setting(25_000_000, "largest image, or frame of a video, in pixels")
    max_request_pixels: int = setting(100_000_000, "all images of a request together, in pixels")
    max_seconds: float = setting(300.0, "longest video, in seconds")
    max_frames: int = setting(20_000, "most frames of a video")


def read_upload(content: bytes, name: str = "", limits: UploadLimits | None = None) -> NamedImage | NamedVideo:
    """Read an image, or check a video, that its bytes show it to be.

    Raises Refusal with a sentence for people: 400 damaged or too small, 413 too large, 415 no known format. Decodes,
    so a server calls it in a thread.
    """
    limits, name = limits or UploadLimits(), display_name(name)
    _check_length(len(content), name, limits)
    if not content:
        raise Refusal(400, f"{name}: empty; nothing was sent.")
    kind = media_type(content)
    if kind is None:
        raise unknown_format(name)
    known: dict[str, Any] = {"name": name, "sha256": hashlib.sha256(content).hexdigest(), "byte_count": len(content)}
    try:
        if kind in PILLOW_FORMATS:
            with DECODING:
                pixels = read_image(content, name, limits.max_pixels, formats=(PILLOW_FORMATS[kind],))
            if pixels.size > LARGE:
                give_memory_back()
            return NamedImage(pixels=pixels, **known)
        _check_clip(content, name, limits)
        return NamedVideo(source=content, **known)
    except ImageTooLarge as error:
        raise Refusal(413, str(error)) from None
    except UnreadableImage as error:
        raise Refusal(400, str(error)) from None


def read_still(content: bytes, name: str = "", limits: UploadLimits | None = None) -> NamedImage:
    """Read an image as `read_upload` does. Raises Refusal for a video, too (415)."""
    found = read_upload(content, name, limits)
    if not isinstance(found, NamedImage):
        raise Refusal(415, f"{found.name}: a video, and an image is wanted here; send one of its frames.")
    return found


async def read_files(
    files: Sequence[UploadFile], read: Callable[[bytes, str, UploadLimits], T], limits: UploadLimits
) -> list[T]:
    """Read the files of a request by `read_upload` or `read_still`.

    Raises Refusal as they do; 413 also where the images are too much together.
    """
    found: list[T] = []
    left = limits.max_request_pixels
    for file in files:
        one = await asyncio.to_thread(read, await file.read(), file.filename or "", limits)
        left -= one.pixels.size // 3 if isinstance(one, NamedImage) and one.pixels is not None else 0
        if left < 0:
            most = limits.max_request_pixels
            raise Refusal(413, f"The images together have more than {most:,} pixels, the limit; send fewer at a time.")
        found.append(one)
    return found


def decode_base64(text: str, name: str = "", limits: UploadLimits | None = None) -> bytes:
    """Decode base64 (RFC 4648, line breaks allowed, nothing else); the length is checked first. Raises Refusal."""
    limits, name = limits or UploadLimits(), display_name(name)
    text = text.translate(WHITESPACE)
    _check_length(len(text) // 4 * 3 - text[-2:].count("="), name, limits)
    if len(text) % 4 or not BASE64.fullmatch(text):
        raise Refusal(400, f"{name}: not base64; encode the file's bytes with the letters A-Z a-z 0-9 + / =.")
    return base64.b64decode(text)


def decode_data_uri(uri: str, name: str = "", limits: UploadLimits | None = None) -> bytes:
    """Decode `data:<media type>;base64,<data>`. Raises Refusal."""
    head = DATA_URI.match(uri[:MAX_HEAD])
    if head is None:
        raise Refusal(400, f"{display_name(name)}: not a data URI; give data:image/jpeg;base64,<data>.")
    return decode_base64(uri[head.end() :], name, limits)


def is_data_uri(uri: str) -> bool:
    """Say whether an address carries its content itself."""
    return uri[:5].lower() == "data:"


def display_name(name: str) -> str:
    """Give the last part of a file name, without control characters and cut: to be shown, never to be opened."""
    last = re.split(r"[/\\]", name)[-1]
    kept = "".join(character for character in last if character.isprintable()).strip()
    return (kept if len(kept) <= MAX_NAME else f"{kept[: MAX_NAME - 3]}...") or NAMELESS


def _check_length(byte_count: int, name: str, limits: UploadLimits) -> None:
    if byte_count > limits.max_bytes:
        raise Refusal(413, f"{name}: larger than {limits.max_bytes:,} bytes, the limit; send a smaller file.")


def _check_clip(content: bytes, name: str, limits: UploadLimits) -> None:
    clip = open_clip(content, name, limits.max_pixels)
    seconds, frames = clip.seconds(len(clip.stamps) - 1), len(clip.stamps)
    if seconds > limits.max_seconds or frames > limits.max_frames:
        allowed = f"{limits.max_seconds:g} s and {limits.max_frames:,} frames"
        raise Refusal(413, f"{name}: {seconds:.0f} s with {frames:,} frames; at most {allowed} are looked at.")
