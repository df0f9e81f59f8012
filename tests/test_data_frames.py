"""Which frames of a clip are decoded, when they are shown, and what is said of files that are no clips."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from clips import grey, write_clip, write_damaged, write_sound

from llava.data import frames as reading
from llava.data.frames import open_clip, read_frames, read_numbers
from llava.data.images import UnreadableImage, UnreadableVideo
from llava.data.inputs import NamedImage, NamedVideo, expand, is_video, open_input


def numbers(path: Path | bytes, count: int) -> list[int]:
    """Give the numbers of the decoded frames, read from their brightness."""
    return [int(frame.pixels[0, 0, 0]) for frame in read_frames(open_clip(path), count)]


def seconds(path: Path | bytes, count: int) -> list[float]:
    return [frame.seconds for frame in read_frames(open_clip(path), count)]


@pytest.fixture
def forty(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "forty.mp4", [grey(i) for i in range(40)])


@pytest.mark.parametrize("count", [1, 3, 16, 39])
def test_frames_are_the_middles_of_equal_parts(forty: Path, count: int) -> None:
    middles = np.floor((np.arange(count) + 0.5) * 40 / count).astype(int).tolist()
    assert numbers(forty, count) == middles
    assert seconds(forty, count) == pytest.approx([n / 25 for n in middles])


def test_a_short_clip_gives_all_its_frames(tmp_path: Path) -> None:
    five = write_clip(tmp_path / "five.mp4", [grey(10 * i) for i in range(5)])
    assert numbers(five, 16) == [0, 10, 20, 30, 40]
    one = write_clip(tmp_path / "one.mp4", [grey(7)])
    assert (numbers(one, 16), seconds(one, 16)) == ([7], [0.0])


def test_pixels_are_rgb(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    (frame,) = read_frames(open_clip(write_clip(tmp_path / "noise.mp4", [pixels])), 1)
    assert frame.pixels.dtype == np.uint8 and np.array_equal(frame.pixels, pixels)


def test_variable_frame_rate_keeps_the_times(tmp_path: Path) -> None:
    stamps = [0, 10, 20, 500, 520, 2000, 2040, 7000]
    path = write_clip(tmp_path / "variable.mkv", [grey(i) for i in range(8)], rate=1000, stamps=stamps)
    assert seconds(path, 16) == pytest.approx([stamp / 1000 for stamp in stamps])
    assert numbers(path, 4) == [1, 3, 5, 7]


def test_a_file_without_a_length_is_read_like_any_other() -> None:
    class Pipe(io.RawIOBase):
        """Takes bytes and cannot go back, so that no length gets into the header."""

        content = b""

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:
            self.content += bytes(data)
            return len(data)

    pipe = Pipe()
    write_clip(pipe, [grey(i) for i in range(40)], file_format="matroska")
    with av.open(io.BytesIO(pipe.content)) as container:
        assert container.duration is None and container.streams.video[0].duration is None
    assert numbers(pipe.content, 4) == [5, 15, 25, 35]
    assert open_clip(pipe.content).note == ""


@pytest.mark.parametrize(("rotation", "corner"), [(90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1))])
def test_a_turned_clip_is_set_upright(tmp_path: Path, rotation: int, corner: tuple[int, int]) -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:16, :16] = 255  # top left: counterclockwise by 90 degrees it comes to the bottom left
    path = write_clip(tmp_path / "turned.mp4", [pixels] * 2, rotation=rotation)
    (frame,) = read_frames(open_clip(path), 1)
    assert frame.pixels.shape == ((48, 64, 3) if rotation == 180 else (64, 48, 3))
    assert frame.pixels[corner].min() == 255
    assert sum(frame.pixels[y, x].min() == 255 for y in (0, -1) for x in (0, -1)) == 1


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_a_long_clip_is_jumped_through_and_gives_the_same_frames(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [grey(i) for i in range(900)]
    path = write_clip(tmp_path / f"long{suffix}", frames, codec="libx264", g="30", bf="2", sc_threshold="0")
    decoded = []
    through = reading._decoded
    monkeypatch.setattr(reading, "_decoded", lambda *a: (decoded.append(1) or pair for pair in through(*a)))
    jumping, jumped = seconds(path, 4), len(decoded)
    monkeypatch.setattr(reading, "JUMP_FROM", 10**9)
    decoded.clear()
    assert seconds(path, 4) == jumping == pytest.approx([n / 25 for n in (112, 337, 562, 787)], abs=2e-3)
    assert len(decoded) == 788
    assert jumped == 113 + 8 + 23 + 8  # the first is near enough; then from the keyframes 330, 540 and 780 on


def test_a_damaged_frame_is_replaced_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "spoiled.mov"
    write_clip(path, [np.random.default_rng(i).integers(0, 256, (48, 64, 3), np.uint8) for i in range(9)], codec="png")
    content = bytearray(path.read_bytes())
    starts = [i for i in range(len(content)) if content[i : i + 4] == b"IHDR"]
    content[starts[4] : starts[4] + 40] = bytes(40)
    path.write_bytes(content)
    assert seconds(path, 1) == pytest.approx([5 / 25])
    assert seconds(path, 9) == pytest.approx([i / 25 for i in (0, 1, 2, 3, 5, 6, 7, 8)])


def test_a_cut_off_clip_says_where_it_ends(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    frames = [noise.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(50)]
    whole = write_clip(tmp_path / "whole.mp4", frames, g="5").read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    clip = open_clip(cut)
    assert clip.note.startswith("the file is damaged or breaks off after 1.0 s") or clip.note.endswith("0.9 s")
    assert 5 <= len(list(read_frames(clip, 8))) <= 8
    assert open_clip(whole).note == ""


def test_what_is_no_clip_is_said_in_words(tmp_path: Path, forty: Path) -> None:
    headless = tmp_path / "headless.mp4"
    headless.write_bytes(forty.read_bytes()[-600:])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("hello " * 100)
    for path in (headless, tmp_path / "empty.mp4", tmp_path / "text.mp4"):
        with pytest.raises(UnreadableVideo, match=rf"{path.name}: damaged, or not a video in a format that is known"):
            open_clip(path)
    with pytest.raises(UnreadableVideo, match="has no video stream, only audio"):
        open_clip(write_sound(tmp_path / "sound.mp4"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_clip(tmp_path / "none.mp4")
    with pytest.raises(ValueError, match="frames: 0 is not usable"):
        open_clip(forty).chosen(0)


def test_a_playlist_opens_no_other_file(tmp_path: Path, forty: Path) -> None:
    path = tmp_path / "list.mp4"
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{forty.name}\n#EXT-X-ENDLIST\n")
    with pytest.raises(UnreadableVideo, match="damaged, or not a video"):
        open_clip(path)


def test_the_limits_on_pixels_are_those_of_images(tmp_path: Path) -> None:
    tiny = write_clip(tmp_path / "tiny.mkv", [grey(1, 8, 8)], codec="ffv1")
    with pytest.raises(UnreadableImage, match="8x8 pixels is too small"):
        open_clip(tiny)
    large = write_clip(tmp_path / "large.mkv", [grey(1, 300, 300)], codec="ffv1").read_bytes()
    for side in (b"\xb0\x82", b"\xba\x82"):  # Matroska's PixelWidth and PixelHeight, two bytes each
        assert large.count(side + b"\x01\x2c") == 1
        large = large.replace(side + b"\x01\x2c", side + b"\x2e\xe0")
    with pytest.raises(UnreadableImage, match="12000x12000 pixels is too large"):
        open_clip(large)


def test_sound_beside_the_pictures_is_no_hindrance(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "sound.mp4", [grey(i) for i in range(10)], seconds_of_sound=0.5)
    assert numbers(path, 2) == [2, 7]


def test_videos_are_found_beside_images(tmp_path: Path, forty: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    assert expand([str(tmp_path)]) == [str(tmp_path / "a.png"), str(forty)]
    assert expand([str(tmp_path / "*.mp4")]) == [str(forty)]
    found = open_input(str(forty))
    assert isinstance(found, NamedVideo) and found.source == forty and found.problem == ""
    missing = open_input(str(tmp_path / "none.MOV"))
    assert isinstance(missing, NamedVideo) and missing.source is None and "no such file" in missing.problem
    assert isinstance(open_input(str(tmp_path / "a.png")), NamedImage)
    assert is_video("http://host/clip.webm?from=3") and not is_video("http://host/face.png?x=a.mp4")


def test_damage_spreads_to_the_next_keyframe(tmp_path: Path) -> None:
    path = tmp_path / "rot.mp4"
    frames = write_damaged(path)
    assert seconds(path, 30) == pytest.approx([i / 25 for i in range(30) if not 13 <= i < 20])
    for frame in read_frames(open_clip(path), 30):
        assert np.array_equal(frame.pixels, frames[round(frame.seconds * 25)])


def test_a_frame_of_an_old_x264_s_444_is_the_same_after_a_jump(shared_data: Path) -> None:
    clip = open_clip(shared_data / "video" / "real" / "ffpp_c23_519.mp4")
    assert len(clip.key_stamps) > 2 and clip.stamps.index(clip.key_stamps[1]) == 250
    for threads in (True, False):
        (alone,) = read_numbers(clip, [262], threads)
        *_, passed = read_numbers(clip, [90, 180, 262], threads)  # each within the reach of the one before
        assert alone.seconds == passed.seconds == clip.seconds(262)
        assert np.array_equal(alone.pixels, passed.pixels)
