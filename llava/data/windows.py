"""A clip to what inputs want of it: frames of one face track with their times, and the sound from the first one on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from llava.core.input_specs import MissingInput, Wants
from llava.data.faces import OVERLAP, SHIFT, crop_face, find_faces, link_faces, place_in_crop
from llava.data.frames import Frame


class ClipStore(Protocol):
    """Where clips lie: `clip` names one as a record's `where` does, without the frame."""

    def frame_count(self, clip: str) -> int:
        """Count the frames of a clip. Raises what `read` raises."""
        ...

    def read(self, clip: str, number: int) -> np.ndarray:
        """Read one frame, uint8 RGB (H, W, 3). Raises UnreadableImage naming clip and frame."""
        ...

    def seconds(self, clip: str) -> Sequence[float]:
        """Give when each frame is shown, from the first one on. Raises MissingInput where nobody knows."""
        ...

    def window(self, clip: str, numbers: Sequence[int]) -> list[Frame]:
        """Read frames by their rising numbers, one at least, fewer where they are damaged. Raises as `read` does."""
        ...

    def sound(self, clip: str, start: float, seconds: float) -> np.ndarray:
        """Give mono sound, float32 (N,) at 16,000 Hz, from so long after the first frame on. Raises MissingInput."""
        ...


def read_window(
    store: ClipStore, clip: str, numbers: Sequence[int], wants: Wants, face_crop: bool
) -> tuple[dict[str, Any], str]:
    """Read frames of a clip and the sound that goes with them, as fields of a Content whose image is the first frame.

    face_crop: cut out the face that is in most of the frames, and leave out those without it; without any face they
    stay whole. The second value says, as `ImageSource` does, whether there were one, several or none.
    """
    frames, face, place = store.window(clip, numbers), "", None
    if face_crop:
        frames, face, place = _crops(frames)
    found = {
        "image": frames[0].pixels,
        "face": place,
        "frames": [frame.pixels for frame in frames],
        "seconds": [frame.seconds for frame in frames],
    }
    return found | sound_fields(partial(store.sound, clip), frames[0].seconds, wants), face


def sound_fields(read: Callable[[float, float], np.ndarray], start: float, wants: Wants) -> dict[str, Any]:
    """Read the sound that is wanted from `start` on, as fields of a Content: the sound, or why there is none.

    read: gives the sound from a second on, for so many seconds. Raises MissingInput.
    """
    if not wants.sound_seconds:
        return {}
    try:
        return {"audio": read(start, wants.sound_seconds)}
    except MissingInput as missing:
        return {"lacks": {"sound": str(missing)}}


def _crops(frames: Sequence[Frame]) -> tuple[list[Frame], str, tuple[int, int, int, int] | None]:
    """Give the crops of one face over frames, whether there were others, and where it lies in the first crop."""
    boxes = [find_faces(frame.pixels) for frame in frames]
    tracks = link_faces(boxes, OVERLAP, SHIFT)
    if not tracks:
        return list(frames), "none", None
    track = sorted(tracks[0].items())
    crops = [Frame(pixels=crop_face(frames[n].pixels, boxes[n][i]), seconds=frames[n].seconds) for n, i in track]
    first, index = track[0]
    place = place_in_crop(boxes[first][index], *frames[first].pixels.shape[:2])
    return crops, "one" if len(tracks) == 1 else "several", place
