"""A clip to a few frames, uint8 RGB and upright, with their times, and its sound; never the whole clip in memory."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from llava.core.input_specs import SAMPLE_RATE_HZ, SHORT_BY, MissingInput
from llava.core.types import Record
from llava.data.images import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    MEMBER_MARK,
    UnreadableImage,
    UnreadableVideo,
    check_size,
    read_image,
)
from llava.data.sources import DataConfig

# Containers alone: a playlist (HLS, DASH, concat) makes FFmpeg open whatever other files it names.
CONTAINERS = "mov,matroska,avi,mpeg,mpegts,asf,flv,ogg"
# After a jump a decoder starts afresh at a keyframe; to save fewer frames than this, decoding through is as quick.
JUMP_FROM = 100
# A clip that ends before this part of the length in its header is said to break off.
WHOLE_FROM = 0.9
# A decoder of sound needs a block or two before the first that counts; a jump is to earlier than what is wanted.
LEAD_SECONDS = 0.5
DRAWN = "*"  # instead of a frame's number: any frame of the clip


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame of a clip: pixels uint8 RGB (H, W, 3), upright; seconds since the clip's first frame."""

    pixels: np.ndarray
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Clip:
    """When each frame of a video is shown; nothing has been decoded for it.

    stamps: one per frame, in the order they are shown, in units of `time_base` seconds; key_stamps: of those that can
    be decoded alone. note: how the file is damaged, else empty.
    """

    source: Path | bytes
    name: str
    stamps: tuple[int, ...]
    key_stamps: tuple[int, ...]
    time_base: Fraction
    note: str = ""

    def chosen(self, count: int) -> list[int]:
        """Give the numbers of `count` evenly spread frames, the middle of each of `count` equal parts; all if fewer."""
        return spread_frames(len(self.stamps), count)

    def seconds(self, number: int) -> float:
        """Give when a frame is shown, in seconds since the first one."""
        return float((self.stamps[number] - self.stamps[0]) * self.time_base)


def open_clip(source: Path | bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> Clip:
    """Read when the frames of a video file are shown; none is decoded.

    Pictures inside sound files are no video. The limits on pixels are those of images. Raises FileNotFoundError, or
    UnreadableImage that says what is wrong.
    """
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(f"Video {str(source)!r} does not exist.")
    name = name or (str(source) if isinstance(source, Path) else "uploaded bytes")
    with _opened(source, name) as (container, stream):
        check_size((stream.width, stream.height), name, max_pixels)
        packets, is_broken = _scan(container, stream)
        if not packets or stream.time_base is None:
            raise UnreadableVideo(f"{name}: a video without a frame that has a time.")
        stamps = sorted(packet.stamp for packet in packets)
        seen = max(packet.stamp + packet.duration for packet in packets) - stamps[0]
        is_short = stream.duration is not None and seen < WHOLE_FROM * stream.duration
        broken = f"the file is damaged or breaks off after {float(seen * stream.time_base):.1f} s"
        return Clip(
            source=source,
            name=name,
            stamps=tuple(stamps),
            key_stamps=tuple(sorted(packet.stamp for packet in packets if packet.is_key)),
            time_base=stream.time_base,
            note=broken if is_broken or is_short else "",
        )


def read_frames(clip: Clip, count: int) -> Iterator[Frame]:
    """Decode `count` evenly spread frames one by one, fewer where the clip has fewer or they are damaged."""
    return read_numbers(clip, clip.chosen(count))


def read_numbers(clip: Clip, numbers: Iterable[int], threads: bool = True) -> Iterator[Frame]:
    """Decode the frames with these rising numbers one by one; fewer where they are damaged.

    A damaged frame is replaced by the next sound one. Rotation is undone; pixels are taken as square. threads: let
    FFmpeg decode in several; a process forked while the iterator is open inherits none and would wait for them.
    """
    with _opened(clip.source, clip.name) as (container, stream):
        stream.thread_type = "AUTO" if threads else "NONE"
        decoded, last = _decoded(container, stream), -1
        for number in numbers:
            if number <= last:
                continue
            key = bisect_right(clip.key_stamps, clip.stamps[number]) - 1
            if key >= 0 and bisect_left(clip.stamps, clip.key_stamps[key]) - last > JUMP_FROM:
                if last < 0:
                    _read_head(container, stream)
                container.seek(clip.stamps[number], stream=stream)
                decoded = _decoded(container, stream)
            stamp, frame = next((pair for pair in decoded if pair[0] >= clip.stamps[number]), (None, None))
            if stamp is None or frame is None:
                return
            last = bisect_right(clip.stamps, stamp) - 1
            check_size((frame.width, frame.height), clip.name)
            yield Frame(pixels=_upright(frame), seconds=clip.seconds(last))


def read_sound(clip: Clip, start: float, seconds: float) -> np.ndarray:
    """Give mono sound, float32 (N,) in [-1, 1] at 16,000 Hz, from `start` seconds after the first frame on.

    Up to SHORT_BY seconds that are lacking at either end are filled up with silence. Raises MissingInput.
    """
    begin = float(clip.stamps[0] * clip.time_base) + start
    wanted, least = round(seconds * SAMPLE_RATE_HZ), round(SHORT_BY * SAMPLE_RATE_HZ)
    for jump in (begin - LEAD_SECONDS, 0.0):  # where pictures and sound do not alternate, a jump may miss some
        try:
            first, heard = _heard(clip, jump, begin, begin + seconds)
        except UnreadableVideo as error:  # its pictures were read
            raise MissingInput("its sound is damaged") from error
        lead = round((first - begin) * SAMPLE_RATE_HZ)
        before, heard = max(lead, 0), heard[max(-lead, 0) :][:wanted]
        after = max(wanted - before - len(heard), 0)
        if before <= least and after <= least:
            return np.pad(heard, (before, after))[:wanted]
    raise MissingInput(f"its sound lacks a part of the {seconds:.2g} s from {start:.1f} s on")


def _heard(clip: Clip, jump: float, begin: float, end: float) -> tuple[float, np.ndarray]:
    """Decode the sound between two times of the file; gives when what was decoded begins, which may be earlier."""
    first, pieces = begin, list[np.ndarray]()
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE_HZ)
    with _opened(clip.source, clip.name) as (container, _):
        stream = next((s for s in container.streams.audio if s.codec_context is not None), None)
        if stream is None:
            raise MissingInput("the clip has no sound")
        container.seek(max(int(jump * av.time_base), 0))
        for frame in container.decode(stream):
            if frame.time is None or frame.time + frame.samples / frame.sample_rate <= begin:
                continue
            first = first if pieces else frame.time
            pieces += [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
            if frame.time >= end:
                break
        pieces += [piece.to_ndarray()[0] for piece in resampler.resample(None)]
    return first, np.concatenate(pieces) if pieces else np.empty(0, np.float32)


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its first moving picture; FFmpeg's errors become UnreadableVideo."""
    file = BytesIO(source) if isinstance(source, bytes) else str(source.absolute())
    try:
        allowed = {"format_whitelist": CONTAINERS}
        with av.open(file, mode="r", container_options=allowed, metadata_errors="ignore") as container:
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise UnreadableVideo(f"{name}: has no video stream, only {_kinds(container)}.")
            if streams[0].codec_context is None:
                raise UnreadableVideo(f"{name}: its video codec is not known here; convert it to H.264.")
            yield container, streams[0]
    except av.FFmpegError as error:
        raise UnreadableVideo(
            f"{name}: damaged, or not a video in a format that is known here ({error.strerror}); send MP4 or WebM."
        ) from error


def _kinds(container: InputContainer) -> str:
    return " and ".join(sorted({stream.type for stream in container.streams} - {"video"})) or "a still picture"


class _Packet(NamedTuple):
    """A frame that is not decoded yet: when it is shown, whether it stands alone, and for how long it is shown."""

    stamp: int
    is_key: bool
    duration: int


def _scan(container: InputContainer, stream: VideoStream) -> tuple[list[_Packet], bool]:
    """List the packets up to the end, or up to damage; the second value says that it was damage."""
    packets = []
    try:
        for packet in container.demux(stream):
            if packet.size and packet.pts is not None and not packet.is_discard:
                packets.append(_Packet(packet.pts, packet.is_keyframe, packet.duration or 0))
    except av.FFmpegError:
        return packets, True
    return packets, False


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[tuple[int, VideoFrame]]:
    """Yield the sound frames from here on with their stamps; who wants a damaged one takes the next.

    Damage spreads to what is decoded from it: no frame is sound until the next one that was coded alone.
    """
    is_sound = True
    for packet in chain(_until_damage(container.demux(stream)), [None]):
        try:
            frames = stream.decode(packet)
        except av.FFmpegError:
            is_sound = False
            continue
        for frame in frames:
            is_sound = not frame.is_corrupt and (is_sound or frame.key_frame)
            if is_sound and frame.pts is not None:
                yield frame.pts, frame


def _read_head(container: InputContainer, stream: VideoStream) -> None:
    """Decode the first packet, before a jump away from it.

    Old x264 writes 4:4:4 (FaceForensics++ c23) against the standard and names itself in the first packet alone; without
    that, FFmpeg decodes every frame after the jump wrongly and calls it corrupt.
    """
    with suppress(av.FFmpegError):
        stream.decode(next(container.demux(stream)))


def _until_damage(packets: Iterator[Packet[VideoStream]]) -> Iterator[Packet[VideoStream]]:
    """Yield what can be read; `_scan` has met the same damage and noted it."""
    try:
        yield from (packet for packet in packets if packet.size)
    except av.FFmpegError:
        return


def _upright(frame: VideoFrame) -> np.ndarray:
    """Give a frame's pixels, turned as the file says they are shown."""
    # In one thread: the frame of an open iterator outlives a fork, its threads do not.
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24", threads=1), round(frame.rotation / 90)))


def spread_frames(total: int, count: int) -> list[int]:
    """Give the numbers of `count` evenly spread frames, the middle of each of `count` equal parts; all if fewer.

    Raises ValueError when count is below 1.
    """
    if count < 1:
        raise ValueError(f"frames: {count} is not usable; allowed: 1 or more, such as 16.")
    return [(2 * i + 1) * total // (2 * count) for i in range(count)] if total > count else list(range(total))


def is_drawn(clip: Record, config: DataConfig) -> bool:
    """Say whether a clip is one record, of which a frame is drawn: it belongs to the training split."""
    return bool(clip.split) and clip.split == config.train


def clip_records(clip: Record, frames: int, config: DataConfig) -> Iterator[Record]:
    """Yield the records of a clip with so many frames; `clip` is what they share, its `where` without a frame."""
    if is_drawn(clip, config):
        yield replace(clip, where=f"{clip.where}{MEMBER_MARK}{DRAWN}")
        return
    for number in spread_frames(frames, config.frames):
        yield replace(clip, id=f"{clip.id}#{number}", where=f"{clip.where}{MEMBER_MARK}{number}")


def drawn_number(frames: int, rng: np.random.Generator | None) -> int:
    """Draw the number of one of so many frames, each as likely; the middle one without rng."""
    return frames // 2 if rng is None else int(rng.integers(frames))


class FrameReader:
    """Reads single frames. `count` evenly spread ones of a video file are decoded in one go, if asked for in order.

    rate: frames per second of folders of frames; None = not known, so that nothing can be in step.
    """

    def __init__(self, count: int, rate: float | None = None) -> None:
        self.count, self.rate = count, rate
        self._spread: _Spread | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "rate": self.rate, "_spread": None}

    def frame_count(self, clip: str | Path) -> int:
        """Count the frames of a clip. Raises UnreadableVideo."""
        path = Path(clip)
        return len(frame_files(path)) if path.is_dir() else len(_clip(path, path.stat().st_mtime_ns).stamps)

    def read(self, clip: str | Path, number: int) -> np.ndarray:
        """Read one frame, uint8 RGB (H, W, 3). Raises UnreadableImage or UnreadableVideo naming file and frame.

        A damaged frame of a video file is replaced by the next sound one.
        """
        path = Path(clip)
        if path.is_dir():
            return read_image(frame_files(path)[number])
        video = _clip(path, path.stat().st_mtime_ns)
        if number not in video.chosen(self.count):
            return _sound(next(read_numbers(video, [number]), None), video, number).pixels
        if self._spread is None or not self._spread.can_give(path, number):
            self._spread = _Spread(path, video, self.count)
        return self._spread.read(number)

    def seconds(self, clip: str | Path) -> list[float]:
        """Give when each frame is shown, from the first one on. Raises MissingInput, or UnreadableVideo."""
        path = Path(clip)
        if path.is_dir():
            return even_seconds(len(frame_files(path)), self.rate)
        video = _clip(path, path.stat().st_mtime_ns)
        return [video.seconds(number) for number in range(len(video.stamps))]

    def window(self, clip: str | Path, numbers: Sequence[int]) -> list[Frame]:
        """Read frames by their rising numbers, fewer where they are damaged. Raises as `read` does."""
        path = Path(clip)
        if path.is_dir():
            seconds = self.seconds(path)
            return [Frame(pixels=self.read(path, number), seconds=seconds[number]) for number in numbers]
        video = _clip(path, path.stat().st_mtime_ns)
        frames = list(read_numbers(video, numbers, threads=False))
        return frames or [_sound(None, video, numbers[0])]

    def sound(self, clip: str | Path, start: float, seconds: float) -> np.ndarray:
        """Give the sound of a video file, as `read_sound` does. Raises MissingInput."""
        path = Path(clip)
        if path.is_dir():
            raise MissingInput("a folder of frames has no sound")
        return read_sound(_clip(path, path.stat().st_mtime_ns), start, seconds)


def even_seconds(count: int, rate: float | None) -> list[float]:
    """Give when each of so many frames is shown at so many per second. Raises MissingInput where nobody knows."""
    if rate is None:
        raise MissingInput("nobody says when its frames were taken (--data.frame_rate)")
    return [number / rate for number in range(count)]


class _Spread:
    """The evenly spread frames of one video file on their way, in this process."""

    def __init__(self, path: Path, clip: Clip, count: int) -> None:
        self._owner = (os.getpid(), path)
        self._clip = clip
        self._coming = read_numbers(clip, clip.chosen(count), threads=False)
        self._number = -1
        self._frame: Frame | None = None

    def can_give(self, path: Path, number: int) -> bool:
        return self._owner == (os.getpid(), path) and number >= self._number

    def read(self, number: int) -> np.ndarray:
        wanted, self._number = self._clip.seconds(number), number
        while self._frame is None or self._frame.seconds < wanted:
            self._frame = _sound(next(self._coming, None), self._clip, number)
        return self._frame.pixels


@lru_cache(maxsize=1024)
def frame_files(folder: Path) -> tuple[Path, ...]:
    """List the pictures directly in a folder in the order of their numbers (9.png before 10.png)."""
    pictures = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    return tuple(sorted(pictures, key=lambda path: (len(path.name), path.name)))


@lru_cache(maxsize=1024)
def _clip(path: Path, changed: int) -> Clip:
    """Keep when the frames of a file are shown; `changed` makes a replaced file another one."""
    try:
        return open_clip(path)
    except UnreadableImage as error:  # its frames are too small or too large
        raise UnreadableVideo(str(error)) from error


def _sound(frame: Frame | None, clip: Clip, number: int) -> Frame:
    if frame is None:
        raise UnreadableVideo(f"{clip.name}: frame {number} is damaged, and no sound one follows it.")
    return frame
