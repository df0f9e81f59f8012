"""What a detector may read beside an image crop: native pixels, frames of one face track, their times, sound.

Each kind says its whole preparation, so that training and asking cannot differ; `llava.data.dataset.input_tensor` does
it. What there is not is a MissingInput with its reason, never a tensor of zeros.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from llava.core.types import InputSpec, Triple, View

SAMPLE_RATE_HZ = 16_000
STILL = "it is a still image, not a video"
# Loudest sample of what counts as silent, full scale = 1: 60 dB below it, where a codec's own noise lies.
SILENT_BELOW = 1e-3
CLOSE = 1e-6  # seconds; times that differ by less are the same
SHORT_BY = 0.1  # seconds; sound may begin so much later or end so much earlier: a block of AAC at 16 kHz is 0.064 s


class MissingInput(Exception):
    """A sample lacks what an input needs; the message is the reason, as a person reads it behind "no verdict:"."""


@dataclass(frozen=True, kw_only=True)
class NativeSpec:
    """The middle (size, size) of the square around a face, (3, size, size), without resampling.

    The square is wider than the face by `ring` of the face's longer side on every side, as far as there are pixels; of
    an image that is a face crop already it is the whole. Missing where it is smaller than `size`.
    """

    size: int
    mean: Triple
    std: Triple
    ring: float = 0.3
    views: tuple[View, ...] = ("plain",)

    def __post_init__(self) -> None:
        if self.size < 1 or self.ring < 0:
            raise ValueError(f"size: {self.size}, ring: {self.ring}: give a size of 1 or more, a ring of 0 or more.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Give the shape of one view."""
        return 3, self.size, self.size


@dataclass(frozen=True, kw_only=True)
class TrackSpec:
    """`count` frames of one face track, `rate_hz` of them in a second, whatever the clip's own rate.

    Of each moment the nearest frame is taken. Missing where one lies more than half a step from its moment, and where
    two moments have the same frame: nothing is shown twice.
    """

    count: int
    rate_hz: float

    def __post_init__(self) -> None:
        if self.count < 2 or self.rate_hz <= 0:
            raise ValueError(
                f"count: {self.count}, rate_hz: {self.rate_hz}: give 2 frames or more (for one, InputSpec), and a rate "
                "above 0."
            )

    @property
    def moments(self) -> tuple[float, ...]:
        """Give the seconds of the frames, from the first one on."""
        return tuple(i / self.rate_hz for i in range(self.count))

    def numbers(self, seconds: Sequence[float]) -> list[int]:
        """Give the numbers of the frames to be taken of those shown at `seconds`, the first of them first.

        Raises MissingInput.
        """
        numbers = [nearest(seconds, seconds[0] + moment) for moment in self.moments]
        off = max(abs(seconds[n] - seconds[0] - m) for n, m in zip(numbers, self.moments, strict=True))
        if off > 0.5 / self.rate_hz + CLOSE or len(set(numbers)) < self.count:
            raise MissingInput(
                f"too few frames: {self.count} of one face are needed, {1 / self.rate_hz:.2g} s from one to the next"
            )
        return numbers


@dataclass(frozen=True, kw_only=True)
class FramesSpec(TrackSpec):
    """The pictures of a track, each prepared as `image` says: (count, 3, S, S); a view is one of all pictures."""

    image: InputSpec

    @property
    def shape(self) -> tuple[int, ...]:
        """Give the shape of one view."""
        return self.count, *self.image.shape

    @property
    def views(self) -> tuple[View, ...]:
        """Give what is averaged at test time."""
        return self.image.views


@dataclass(frozen=True, kw_only=True)
class TimesSpec(TrackSpec):
    """When the frames of a track are shown, in seconds since the first of them: (count,), which is 0 at first."""

    views: ClassVar[tuple[View, ...]] = ("plain",)

    @property
    def shape(self) -> tuple[int, ...]:
        """Give the shape of one view."""
        return (self.count,)


@dataclass(frozen=True, kw_only=True)
class SoundSpec:
    """Mono sound in [-1, 1] at 16,000 Hz, from the first frame on: (16,000 * seconds,). Missing where it is silent."""

    seconds: float
    views: ClassVar[tuple[View, ...]] = ("plain",)

    def __post_init__(self) -> None:
        if self.seconds <= SHORT_BY:
            raise ValueError(f"seconds: {self.seconds} of sound are not usable; give more than {SHORT_BY}.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Give the shape of one view."""
        return (round(self.seconds * SAMPLE_RATE_HZ),)


Input: TypeAlias = InputSpec | NativeSpec | FramesSpec | TimesSpec | SoundSpec


@dataclass(frozen=True, kw_only=True)
class Wants:
    """What inputs need of a clip: frames at `moments`, in seconds from the first one on, and seconds of sound."""

    moments: tuple[float, ...] = (0.0,)
    sound_seconds: float = 0.0

    def starts(self, seconds: Sequence[float]) -> list[int]:
        """List the frames, of those shown at `seconds`, from which on a clip has all of it; the first one if none."""
        step = (seconds[-1] - seconds[0]) / max(len(seconds) - 1, 1)
        needed = max(self.moments[-1] - step / 2, self.sound_seconds - step)  # the last frame is shown for a step
        return [n for n, start in enumerate(seconds) if seconds[-1] - start >= needed - CLOSE] or [0]

    def chosen(self, seconds: Sequence[float], start: int) -> list[int]:
        """Give the numbers, rising, of the frames nearest to the moments when frame `start` is the first."""
        return sorted({nearest(seconds, seconds[start] + moment) for moment in self.moments})


def all_reasons(reasons: Mapping[str, str]) -> str:
    """Join the reasons of missing inputs, each once; empty where none is missing."""
    return "; ".join(dict.fromkeys(reasons.values()))


def nearest(seconds: Sequence[float], moment: float) -> int:
    """Give the number of the value, of rising ones, that is nearest to a moment; of two the earlier."""
    after = bisect_left(seconds, moment)
    around = [n for n in (after - 1, after) if 0 <= n < len(seconds)]
    return min(around, key=lambda n: abs(seconds[n] - moment))
