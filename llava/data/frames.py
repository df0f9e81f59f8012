"""Which frames of a clip stand for it, and the records of these frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from llava.core.types import Record
from llava.data.sources import DataConfig
from llava.data.storage import MEMBER_MARK

DRAWN = "*"  # instead of a frame's number: any frame of the clip


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


def drawn_number(frame: str, frames: int, rng: np.random.Generator | None) -> int:
    """Give a frame's number; where it is to be drawn, each is equally likely, and it is the middle one without rng."""
    if frame != DRAWN:
        return int(frame)
    return frames // 2 if rng is None else int(rng.integers(frames))
