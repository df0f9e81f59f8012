"""Ordinary pictures are converted, absurd ones refused by name; faces are found, cropped, or absent."""

from __future__ import annotations

import struct
import time
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.data.faces import FaceBox, crop_face, find_faces
from llava.data.images import UnreadableImage, list_images, read_image


def corners(height: int = 32, width: int = 48) -> np.ndarray:
    """Red, green / blue, white quarters."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2, 0] = 255
    image[: height // 2, width // 2 :, 1] = 255
    image[height // 2 :, : width // 2, 2] = 255
    image[height // 2 :, width // 2 :] = 255
    return image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation: int) -> None:
    upright = Image.fromarray(corners())
    # What a camera stores for each orientation: the inverse of what a viewer must do.
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation in inverse else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "PNG", exif=exif)
    assert np.array_equal(read_image(data), corners())


def test_grey_palette_and_bilevel_become_rgb() -> None:
    rgb = Image.fromarray(corners())
    grey = read_image(encoded(rgb.convert("L"), "PNG"))
    assert grey.shape == (32, 48, 3)
    assert grey[0, 0].tolist() == [76, 76, 76]  # 0.299 * 255
    assert np.array_equal(read_image(encoded(rgb.quantize(8), "PNG")), corners())
    assert set(np.unique(read_image(encoded(rgb.convert("1"), "PNG")))) == {0, 255}


def test_transparency_is_laid_on_white() -> None:
    rgba = np.dstack([corners(), np.full((32, 48), 255, np.uint8)])
    rgba[0, 0, 3] = 0
    rgba[0, 1, 3] = 128
    image = read_image(encoded(Image.fromarray(rgba), "PNG"))
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[0, 1].tolist() == [255, 127, 127]  # 255 * (1 - 128/255)
    assert np.array_equal(image[1:], corners()[1:])
    palette = Image.fromarray(corners()).quantize(8)
    palette.info["transparency"] = palette.getpixel((0, 0))
    see_through = read_image(encoded(palette, "PNG", transparency=palette.getpixel((0, 0))))
    assert see_through[0, 0].tolist() == [255, 255, 255]


def test_cmyk_jpeg_has_the_right_colours() -> None:
    image = read_image(encoded(Image.fromarray(corners()).convert("CMYK"), "JPEG", quality=100))
    assert np.abs(image.astype(int) - corners()).mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_cut_off(kind: str) -> None:
    values = np.linspace(0, 65535, 32 * 48).reshape(32, 48).astype(np.uint16)
    image = read_image(encoded(Image.fromarray(values), kind))
    assert np.array_equal(image[..., 0], np.rint(values / 257).astype(np.uint8))
    dark = read_image(encoded(Image.fromarray(values // 256), kind))
    assert dark.max() == 1  # 255 of 65535 is almost black, whatever else the file holds


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0, 1e6])
def test_float_images_are_scaled_by_the_range_they_fill(top: float) -> None:
    values = np.linspace(0, top, 32 * 48, dtype=np.float32).reshape(32, 48)
    image = read_image(encoded(Image.fromarray(values), "TIFF"))
    assert image.min() == 0
    assert image.max() == 255
    assert abs(int(image[16, 0, 0]) - 128) <= 1


def test_webp_heic_and_gif_are_read() -> None:
    smooth = Image.fromarray(corners()).resize((96, 64), Image.Resampling.BICUBIC)
    reference = np.asarray(smooth).astype(int)
    from pillow_heif import from_pillow

    buffer = BytesIO()
    from_pillow(smooth).save(buffer, quality=95)
    for data in (encoded(smooth, "WEBP", quality=95), buffer.getvalue()):
        assert np.abs(read_image(data) - reference).mean() < 6
    frames = [Image.fromarray(corners()).quantize(8), Image.new("P", (48, 32))]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(read_image(gif), corners())


def test_damaged_exif_does_not_cost_the_picture() -> None:
    data = encoded(Image.fromarray(corners()), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7fgarbage")
    assert read_image(data).shape == (32, 48, 3)


def test_a_file_is_read_like_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(corners()).save(path)
    assert np.array_equal(read_image(path), read_image(path.read_bytes()))
    assert read_image(path).flags.writeable
    with pytest.raises(FileNotFoundError, match=r"missing.jpg"):
        read_image(tmp_path / "missing.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_files_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{kind.lower()}"
    data = encoded(Image.fromarray(noise), kind)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UnreadableImage, match=rf"cut\.{kind.lower()}.*(truncated|damaged|not an image)"):
        read_image(path)


def test_what_is_no_image_is_refused_by_name() -> None:
    for data in (b"", b"hello, I am a text", b"\xff\xd8\xff"):
        with pytest.raises(UnreadableImage, match=r"letter\.jpg: not an image"):
            read_image(data, name="letter.jpg")


def test_one_pixel_is_refused() -> None:
    with pytest.raises(UnreadableImage, match=r"dot.png: 1x1 pixels is too small"):
        read_image(encoded(Image.new("RGB", (1, 1)), "PNG"), name="dot.png")


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises the size and whose body holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_500, 20_000])
def test_a_bomb_is_refused_from_its_header(side: int) -> None:
    start = time.perf_counter()
    with pytest.raises(UnreadableImage, match=r"bomb.png.*limit is 89,000,000"):
        read_image(png_of(side, side), name="bomb.png")
    assert time.perf_counter() - start < 0.5


def test_the_pixel_limit_is_a_setting() -> None:
    data = encoded(Image.fromarray(corners()), "PNG")
    assert read_image(data, max_pixels=32 * 48).shape == (32, 48, 3)
    with pytest.raises(UnreadableImage, match="too large"):
        read_image(data, max_pixels=32 * 48 - 1)


def test_list_images_is_sorted_recursive_and_skips_the_rest(tmp_path: Path) -> None:
    for name in ("b.JPG", "sub/a.webp", ".hidden.png", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert [p.relative_to(tmp_path).as_posix() for p in list_images(tmp_path)] == ["b.JPG", "sub/a.webp"]


def test_real_portraits_have_one_face_each(shared_data: Path) -> None:
    for path in sorted((shared_data / "public_domain").glob("*.[jp][pn]g")):
        faces = find_faces(read_image(path))
        assert len(faces) == 1, path.name


def test_no_face_and_three_faces_are_answers(shared_data: Path) -> None:
    assert find_faces(np.full((200, 300, 3), 127, np.uint8)) == []
    portrait = Image.fromarray(read_image(shared_data / "public_domain" / "grace_hopper.jpg"))
    sizes = (300, 220, 160)
    group = Image.new("RGB", (sum(sizes), 360), "white")
    for i, size in enumerate(sizes):
        group.paste(portrait.resize((size, int(size * 600 / 512))), (sum(sizes[:i]), 0))
    faces = find_faces(np.asarray(group))
    assert len(faces) == 3
    assert [f.x for f in faces] == sorted(f.x for f in faces)  # largest first = left to right here


def test_boxes_are_in_pixels_of_the_full_size_image(shared_data: Path) -> None:
    portrait = Image.fromarray(read_image(shared_data / "public_domain" / "astronaut.png"))
    small, large = (find_faces(np.asarray(portrait.resize((s, s))))[0] for s in (512, 1536))
    assert large.x / 3 == pytest.approx(small.x, abs=15)
    assert large.width / 3 == pytest.approx(small.width, rel=0.15)


def test_crop_is_square_with_margin_around_the_box() -> None:
    y, x = np.mgrid[0:200, 0:300]
    image = np.dstack([x % 256, y % 256, x * 0]).astype(np.uint8)
    crop = crop_face(image, FaceBox(x=100, y=80, width=40, height=50, score=1.0), margin=0.3)
    assert crop.shape == (80, 80, 3)  # 50 * 1.6
    assert crop[0, 0].tolist() == [80, 65, 0]  # centre (120, 105) minus 40


def test_crop_at_the_border_is_moved_inside_and_shrunk_to_the_image() -> None:
    image = np.arange(100 * 60 * 3, dtype=np.uint32).reshape(100, 60, 3).astype(np.uint8)
    moved = crop_face(image, FaceBox(x=0, y=0, width=20, height=20, score=1.0), margin=0.5)
    assert np.array_equal(moved, image[:40, :40])
    shrunk = crop_face(image, FaceBox(x=5, y=30, width=50, height=50, score=1.0), margin=1.0)
    assert np.array_equal(shrunk, image[25:85, :60])
    with pytest.raises(ValueError, match="margin"):
        crop_face(image, FaceBox(x=0, y=0, width=9, height=9, score=1.0), margin=-0.1)
