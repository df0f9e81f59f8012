"""Which image or video format bytes are in, by how they begin; names and headers that come with them do not count."""

from __future__ import annotations

from llava.serve.refusals import Refused

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


def unknown_format(name: str) -> Refused:
    """Give the refusal for what is neither an image nor a video."""
    return Refused(415, f"{name}: not an image or video in a format that is known here; send JPEG, PNG, WebP or MP4.")
