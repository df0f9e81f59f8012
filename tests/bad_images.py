"""Ten things in a folder of images that are none, each bad in its own way."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def plant(folder: Path) -> list[str]:
    """Write them into a folder; gives their names, sorted."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    jpeg, tiny = io.BytesIO(), io.BytesIO()
    Image.fromarray(noise).save(jpeg, "JPEG")
    Image.fromarray(noise[:4, :4]).save(tiny, "PNG")
    contents = {
        "bad_bomb.png": _png(60_000, 60_000),
        "bad_cut.jpg": jpeg.getvalue()[:900],
        "bad_empty.jpg": b"",
        "bad_head.gif": b"GIF89a",
        "bad_page.png": b"<html><body>404 not found</body></html>",
        "bad_random.webp": np.random.default_rng(1).bytes(500),
        "bad_small.png": tiny.getvalue(),
        "bad_zero.png": _png(0, 0),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "bad_folder.jpg").mkdir()
    (folder / "bad_link.jpg").symlink_to(folder / "nowhere.jpg")
    return sorted([*contents, "bad_folder.jpg", "bad_link.jpg"])


def _png(width: int, height: int) -> bytes:
    """Give a PNG that says this size and holds one row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )
