"""A clip on disk, a folder of pictures or a video file, to the frames that are kept of it, cropped and encoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from llava.core.config import setting
from llava.data.faces import crop_face, find_faces
from llava.data.frame_reader import frame_files
from llava.data.frames import spread_frames
from llava.data.images import UnreadableImage, read_image
from llava.data.tracks import link_faces
from llava.data.video import open_clip, read_frames

# From this overlap (IoU) on, or within this many face widths, two boxes are the same face; so it is in `m2f2 detect`.
OVERLAP, SHIFT = 0.3, 1.0
ENCODED = {"jpeg": (".jpg", ".jpeg", ".jfif"), "png": (".png",)}


@dataclass(frozen=True, kw_only=True)
class FrameConfig:
    """Which frames are kept of a clip, and in which form."""

    form: Literal["jpeg", "png", "raw"] = setting(
        "jpeg", "how a frame is kept; files that have this form already are kept byte for byte; raw = uint8 pixels"
    )
    quality: int = setting(95, "JPEG quality of what is not kept as it is, chroma at full size")
    frames: int | None = setting(None, "evenly spread frames of each clip; none = all")
    face_crop: bool = setting(False, "cut out the face that is seen longest, of equally long ones the largest")
    margin: float = setting(0.3, "face crop: how much wider than the face on every side, in widths of the face")
    size: int | None = setting(None, "shrink or enlarge the shorter side to this many pixels; none = as it is")

    def __post_init__(self) -> None:
        for name, low, high in (("quality", 1, 100), ("frames", 1, None), ("size", 16, None), ("margin", 0, None)):
            value = getattr(self, name)
            if value is not None and (value < low or (high is not None and value > high)):
                allowed = f"{low} to {high}" if high else f"{low} or more"
                raise ValueError(f"{name}: {value} is not usable; allowed: {allowed}.")


@dataclass(frozen=True)
class Kept:
    """What was kept of a clip: frames, uint8 (H, W, 3) or (bytes,) of an encoded picture; problems in words.

    without_face: frames that were left out because they do not show the face.
    """

    frames: list[np.ndarray] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    without_face: int = 0


@dataclass(frozen=True)
class _Picture:
    """A frame as it was read: pixels (H, W, 3), and the bytes that are kept instead of encoding it anew, if any."""

    pixels: np.ndarray
    content: bytes = b""


def keep_frames(path: Path, config: FrameConfig) -> Kept:
    """Read the frames of a folder of pictures or of a video file; what cannot be read is among the problems."""
    problems: list[str] = []
    pictures = _from_folder(path, config, problems) if path.is_dir() else _from_video(path, config, problems)
    if not config.face_crop:
        return Kept([_encoded(picture, config) for picture in pictures], problems)
    crops, seen = _face_crops(pictures, config.margin)
    if seen and not crops:
        problems.append(f"{path}: no face was found in {seen} frames")
    return Kept([_encoded(crop, config) for crop in crops], problems, seen - len(crops))


def _from_folder(folder: Path, config: FrameConfig, problems: list[str]) -> Iterator[_Picture]:
    files = frame_files(folder)
    is_changed = config.face_crop or config.size is not None
    for number in spread_frames(len(files), config.frames or len(files)):
        path = files[number]
        try:
            content = path.read_bytes()
            pixels = read_image(content, str(path))
        except (OSError, UnreadableImage) as error:
            problems.append(str(error))
            continue
        is_kept = path.suffix.lower() in ENCODED.get(config.form, ()) and not is_changed
        yield _Picture(pixels, content if is_kept else b"")


def _from_video(path: Path, config: FrameConfig, problems: list[str]) -> Iterator[_Picture]:
    try:
        clip = open_clip(path)
        count, read = config.frames or len(clip.stamps), 0
        for frame in read_frames(clip, count):
            read += 1
            yield _Picture(frame.pixels)
    except (OSError, UnreadableImage) as error:
        problems.append(str(error))
        return
    wanted = len(clip.chosen(count))
    if clip.note or read < wanted:
        problems.append(f"{path}: {clip.note or 'damaged frames'}; {read} of {wanted} frames were read")


def _face_crops(pictures: Iterable[_Picture], margin: float) -> tuple[list[_Picture], int]:
    """Give the crops of one face over the frames, and how many frames were looked at; no whole frame is kept."""
    boxes, crops = [], []
    for picture in pictures:
        boxes.append(find_faces(picture.pixels))
        crops.append([crop_face(picture.pixels, box, margin) for box in boxes[-1]])
    tracks = link_faces(boxes, OVERLAP, SHIFT)
    return [_Picture(crops[n][i]) for n, i in tracks[0].items()] if tracks else [], len(boxes)


def _encoded(picture: _Picture, config: FrameConfig) -> np.ndarray:
    if picture.content:
        return np.frombuffer(picture.content, np.uint8)
    image = Image.fromarray(picture.pixels)
    if config.size is not None:
        scale = config.size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    if config.form == "raw":
        return np.array(image)
    buffer = BytesIO()
    options = {"quality": config.quality, "subsampling": 0} if config.form == "jpeg" else {}
    image.save(buffer, config.form, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)
