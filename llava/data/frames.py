"""Which frames of a clip stand for it."""

from __future__ import annotations


def spread_frames(total: int, count: int) -> list[int]:
    """Give the numbers of `count` evenly spread frames, the middle of each of `count` equal parts; all if fewer.

    Raises ValueError when count is below 1.
    """
    if count < 1:
        raise ValueError(f"frames: {count} is not usable; allowed: 1 or more, such as 16.")
    return [(2 * i + 1) * total // (2 * count) for i in range(count)] if total > count else list(range(total))
