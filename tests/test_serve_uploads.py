"""What strangers send becomes a checked image or video, or a sentence with a status; nothing crashes, nothing hangs."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from clips import grey, write_clip, write_sound
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava.data.inputs import NamedImage, NamedVideo
from llava.serve.engine import KINDS, Refusal
from llava.serve.uploads import (
    BEGINNINGS,
    UploadLimits,
    decode_base64,
    decode_data_uri,
    display_name,
    is_data_uri,
    media_type,
    read_upload,
)

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
PIXELS = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)


def encoded(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, **options)
    return buffer.getvalue()


def heif() -> bytes:
    from pillow_heif import from_pillow

    buffer = io.BytesIO()
    from_pillow(Image.fromarray(PIXELS)).save(buffer)
    return buffer.getvalue()


PICTURES = {
    "image/jpeg": encoded("JPEG"),
    "image/png": encoded("PNG"),
    "image/gif": encoded("GIF"),
    "image/webp": encoded("WEBP"),
    "image/bmp": encoded("BMP"),
    "image/tiff": encoded("TIFF"),
    "image/avif": encoded("AVIF"),
    "image/heif": heif(),
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    write_clip(str(path), [grey(n) for n in range(10)])
    return path.read_bytes()


def refused(content: bytes, name: str = "", limits: UploadLimits | None = None) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read_upload(content, name, limits)
    return caught.value


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_are_known_by_their_bytes(kind: str) -> None:
    image = read_upload(PICTURES[kind], "photo.txt")
    assert media_type(PICTURES[kind]) == kind
    assert isinstance(image, NamedImage) and image.pixels is not None and image.pixels.shape == (40, 48, 3)
    assert image.sha256 == hashlib.sha256(PICTURES[kind]).hexdigest() and image.byte_count == len(PICTURES[kind])


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm", "avi", "mpg", "ts", "flv", "wmv", "ogv"])
def test_videos_are_known_by_their_bytes(suffix: str, tmp_path: Path) -> None:
    codec = {"webm": "libvpx", "mpg": "mpeg2video", "wmv": "wmv2", "ogv": "libvpx"}.get(suffix, "libx264")
    path = tmp_path / f"a.{suffix}"
    write_clip(str(path), [grey(n) for n in range(10)], codec=codec)
    video = read_upload(path.read_bytes(), "face.jpg")
    assert isinstance(video, NamedVideo) and video.source == path.read_bytes() and video.name == "face.jpg"


@pytest.mark.parametrize(
    "content",
    [
        b"hello, I am a text",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would hand it to Ghostscript
        b"P6 20000 20000 255\n",
        b"PK\x03\x04" + bytes(60),
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",  # FFmpeg would open what a playlist names
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"RIFF\x10\0\0\0WAVEfmt ",
        b"\x1f\x8b\x08" + bytes(50),
        b"\0",
    ],
)
def test_other_formats_are_415(content: bytes) -> None:
    error = refused(content, "photo.png")
    assert error.status == 415 and str(error).startswith("photo.png: not an image or video")


@pytest.mark.filterwarnings("ignore:IM image format:DeprecationWarning")
def test_pillow_opens_no_other_format_than_the_bytes_show() -> None:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "IM")
    both = b"GIF89a: x\r\n" + buffer.getvalue().replace(bytes(11) + b"\x1a", b"\x1a", 1)
    with Image.open(io.BytesIO(both)) as image:
        assert image.format == "IM"  # once the bytes are no GIF after all
    assert media_type(both) == "image/gif" and refused(both).status == 400


def test_damage_is_400_with_the_name() -> None:
    for kind, content in PICTURES.items():
        if kind != "image/gif":  # half a GIF shows what it has
            error = refused(content[: len(content) // 2], "cut.x")
            assert error.status == 400 and str(error).startswith("cut.x: "), kind
    assert refused(b"\xff\xd8\xff").status == 400
    assert refused(b"").status == 400 and "empty" in str(refused(b""))
    small = io.BytesIO()
    Image.new("RGB", (4, 4)).save(small, "PNG")
    assert "4x4 pixels is too small" in str(refused(small.getvalue()))


def test_a_video_without_pictures_or_with_too_much_is_refused(tmp_path: Path, clip: bytes) -> None:
    sound = write_sound(tmp_path / "sound.mp4").read_bytes()
    assert refused(sound).status == 400 and "no video stream" in str(refused(sound))
    assert refused(clip[:200]).status == 400
    for limits in (UploadLimits(max_frames=9), UploadLimits(max_seconds=0.2), UploadLimits(max_pixels=48 * 64 - 1)):
        assert refused(clip, limits=limits).status == 413
    assert isinstance(read_upload(clip, limits=UploadLimits(max_frames=10, max_pixels=48 * 64)), NamedVideo)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, *chunks: bytes, rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + body


def gif_of(canvas: tuple[int, int], frame: tuple[int, int]) -> bytes:
    screen = struct.pack("<HHBBB", *canvas, 0x80, 0, 0) + bytes(6)
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\x00;"


def webp_of(width: int, height: int) -> bytes:
    head = bytes([2, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    animation = b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + head + animation
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff_of(width: int, height: int) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 8), (262, 1), (273, 8), (277, 1), (278, height), (279, 99)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)


ZEROS = zlib.compress(bytes(150_000_000), 9)
BOMBS = {
    "png-sides": (png_of(2**31 - 1, 2**31 - 1), 413),
    "png-area": (png_of(5001, 5000), 413),
    "png-area-deflated": (png_of(5100, 5100, rows=bytes(5100)), 413),
    "png-strip": (png_of(2**31 - 1, 16), 413),
    "png-truncated": (png_of(5000, 5000), 400),
    "png-profile": (png_of(32, 32, chunk(b"iCCP", b"x\0\0" + ZEROS), rows=bytes(97 * 32)), None),
    "png-text": (png_of(32, 32, *[chunk(b"zTXt", b"x\0\0" + ZEROS)] * 20, rows=bytes(97 * 32)), None),
    "png-surplus": (png_of(32, 32, rows=bytes(150_000_000)), None),
    "gif-canvas": (gif_of((65535, 65535), (16, 16)), 413),
    "gif-frame": (gif_of((16, 16), (65535, 65535)), 413),
    "webp-canvas": (webp_of(16383, 16383), None),  # some libwebp refuse the canvas before its size is known
    "tiff-sides": (tiff_of(2**31, 2**31), 413),
    "bmp-sides": (b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0), 413),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_little(name: str) -> None:
    """None: it may be refused for one reason or another, or looked at, as long as it stays cheap."""
    content, status = BOMBS[name]
    assert len(content) < 4_000_000
    tracemalloc.start()
    start = time.perf_counter()
    try:
        read_upload(content, "bomb")
        found = None
    except Refusal as error:
        found = error.status
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1.5 and peak < 100_000_000
    assert found == status or (status is None and found in (None, 400, 413))


def test_an_animation_costs_its_first_picture() -> None:
    buffer = io.BytesIO()
    Image.new("P", (1000, 1000), 3).save(buffer, "GIF")
    one = buffer.getvalue()
    frame = one[one.rindex(struct.pack("<BHHHH", 0x2C, 0, 0, 1000, 1000)) : -1]
    content = one[:-1] + frame * 5000 + b";"
    with Image.open(io.BytesIO(content)) as image:
        image.seek(4)  # it is an animation
    start = time.perf_counter()
    found = read_upload(content)
    assert time.perf_counter() - start < 0.5
    assert isinstance(found, NamedImage) and found.pixels is not None and found.pixels.shape == (1000, 1000, 3)


def test_bytes_are_counted_before_anything_is_decoded() -> None:
    limits = UploadLimits(max_bytes=1000)
    for content in (PICTURES["image/png"], b"x" * 1001):
        assert refused(content, limits=limits).status == 413
    with pytest.raises(Refusal) as caught:
        decode_base64("!" * 2000, limits=limits)  # not even looked at
    assert caught.value.status == 413
    for length in (999, 1000):
        assert len(decode_base64(base64.b64encode(bytes(length)).decode(), limits=limits)) == length
    with pytest.raises(Refusal, match="larger than 1,000 bytes"):
        decode_base64(base64.b64encode(bytes(1001)).decode(), limits=limits)


def test_data_uris_are_read_and_their_type_is_not_believed() -> None:
    data = base64.b64encode(PICTURES["image/jpeg"]).decode()
    for head in ("image/jpeg", "image/png", "text/html", "", "image/jpeg;charset=utf-8", "image/svg+xml"):
        assert is_data_uri(f"data:{head};base64,{data}")
        assert decode_data_uri(f"data:{head};base64,{data}") == PICTURES["image/jpeg"]
    assert decode_data_uri(f"DATA:image/jpeg;BASE64,{data[:60]}\r\n{data[60:]}") == PICTURES["image/jpeg"]


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png,%89PNG",
        "data:image/png;base64",
        "data:;base64;,AAAA",
        "data:image/png;base64 ,AAAA",
        "data:image;base64,AAAA",
        "data:a/b;x;base64,AAAA",
        "data:" + "a" * 300 + "/b;base64,AAAA",
        "https://faces.example.org/a.png",
        "data:image/png;base64,AAA",
        "data:image/png;base64,AAAA=",
        "data:image/png;base64,AA=A",
        "data:image/png;base64,AA-_",
        "data:image/png;base64,AAA%3D",
        "data:image/png;base64,ÄÄÄÄ",
        "data:image/png;base64,AAAA\0",
    ],
)
def test_what_is_no_data_uri_is_400(uri: str) -> None:
    with pytest.raises(Refusal) as caught:
        decode_data_uri(uri, "a.png")
    assert caught.value.status == 400 and str(caught.value).startswith("a.png: not ")


@pytest.mark.parametrize(
    ("given_name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\Windows\\face.png", "face.png"),
        ("/etc/", "upload"),
        ("", "upload"),
        ("a\0b\r\nc\x1b[31m.png", "abc[31m.png"),
        ("fac\u202egnp.exe", "facgnp.exe"),
        ("x" * 300, "x" * 77 + "..."),
        ("Gesicht ü 顔.jpg", "Gesicht ü 顔.jpg"),
    ],
)
def test_names_are_shown_and_never_opened(given_name: str, shown: str) -> None:
    assert display_name(given_name) == shown
    assert read_upload(PICTURES["image/png"], given_name).name == shown


def test_a_name_like_an_existing_file_opens_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (32, 32), "red").save(secret)
    monkeypatch.chdir(tmp_path)
    image = read_upload(PICTURES["image/png"], "secret.png")
    assert isinstance(image, NamedImage) and np.array_equal(image.pixels, PIXELS)
    for name in ("secret.png", str(secret)):
        assert refused(name.encode(), name).status == 415


def outcome(content: bytes) -> int:
    """Give the status of a refusal, 200 where it is read; anything else fails the test."""
    try:
        read_upload(content, "fuzz")
        return 200
    except Refusal as error:
        assert error.status in (400, 413, 415) and error.status in KINDS
        assert "Traceback" not in str(error) and " object at 0x" not in str(error)
        return error.status


@QUICK
@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    outcome(content)


@pytest.mark.filterwarnings("ignore::UserWarning")
@QUICK
@given(st.sampled_from([start for start, _ in BEGINNINGS]), st.binary(max_size=400))
@example(b"GIF89a", b"")
def test_any_bytes_behind_a_known_beginning_are_read_or_refused(start: bytes, rest: bytes) -> None:
    outcome(start + rest)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's remarks on damaged TIFF tags
@QUICK
@pytest.mark.parametrize("kind", PICTURES)
@given(data=st.data())
def test_a_picture_with_changed_bytes_is_read_or_refused(kind: str, data: st.DataObject) -> None:
    content = bytearray(PICTURES[kind])
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, min(len(content), 1200) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    outcome(bytes(content))
    outcome(bytes(content[:cut]))


@QUICK
@given(data=st.data())
def test_a_video_with_changed_bytes_is_read_or_refused(clip: bytes, data: st.DataObject) -> None:
    content = bytearray(clip)
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    outcome(bytes(content))


@QUICK
@given(st.one_of(st.text(max_size=200), st.text("AZaz09+/= \r\n", max_size=9)))
def test_any_text_is_decoded_by_the_grammar_or_refused(text: str) -> None:
    kept = "".join(c for c in text if c not in " \t\r\n")
    grammar = r"(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
    expected = base64.b64decode(kept) if re.fullmatch(grammar, kept) else None
    for function, content in ((decode_base64, text), (decode_data_uri, f"data:a/b;base64,{text}")):
        try:
            assert function(content) == expected
        except Refusal as error:
            assert expected is None and error.status == 400


@QUICK
@given(st.binary(max_size=200))
def test_base64_comes_back(content: bytes) -> None:
    assert decode_base64(base64.b64encode(content).decode()) == content
    assert decode_data_uri("data:image/png;base64," + base64.encodebytes(content).decode()) == content
