"""Frames of a clip on disk by their numbers; the clip is a folder of pictures or a video file."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from llava.data.images import IMAGE_SUFFIXES, read_image
from llava.data.video import Clip, Frame, UnreadableVideo, open_clip, read_numbers


class FrameReader:
    """Reads single frames. `count` evenly spread ones of a video file are decoded in one go, if asked for in order."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._spread: _Spread | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "_spread": None}

    def frames(self, path: Path) -> int:
        """Count the frames of a clip. Raises UnreadableVideo."""
        return len(frame_files(path)) if path.is_dir() else len(_clip(path, path.stat().st_mtime_ns).stamps)

    def read(self, path: Path, number: int) -> np.ndarray:
        """Read one frame, uint8 RGB (H, W, 3). Raises UnreadableImage or UnreadableVideo naming file and frame.

        A damaged frame of a video file is replaced by the next sound one.
        """
        if path.is_dir():
            return read_image(frame_files(path)[number])
        clip = _clip(path, path.stat().st_mtime_ns)
        if number not in clip.chosen(self.count):
            return _sound(next(read_numbers(clip, [number]), None), clip, number).pixels
        if self._spread is None or not self._spread.can_give(path, number):
            self._spread = _Spread(path, clip, self.count)
        return self._spread.read(number)


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
    return open_clip(path)


def _sound(frame: Frame | None, clip: Clip, number: int) -> Frame:
    if frame is None:
        raise UnreadableVideo(f"{clip.name}: frame {number} is damaged, and no sound one follows it.")
    return frame
