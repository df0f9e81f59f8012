"""Folders of face crops, or videos, into one HDF5 file of clips; an interrupted run goes on where it was."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import h5py
import numpy as np
from PIL import Image

from llava.core.config import setting
from llava.core.runtime import Incomplete
from llava.core.terminal import progress
from llava.core.types import FAKE, LABEL_NAMES, REAL
from llava.data.clips import HDF5_SUFFIXES, clips_in
from llava.data.faces import OVERLAP, SHIFT, crop_face, find_faces, link_faces
from llava.data.frames import frame_files, open_clip, read_frames, spread_frames
from llava.data.images import UnreadableImage, list_images, read_image
from llava.data.inputs import VIDEO_SUFFIXES
from llava.data.public_sets import LISTINGS, ORIGINAL, Kind, ListedVideo, VideoTree, file_name
from llava.data.sources import DataConfig

log = logging.getLogger(__name__)

ENCODED = {"jpeg": (".jpg", ".jpeg", ".jfif"), "png": (".png",)}
SETTINGS = "settings"  # attribute of an unfinished file: how it is packed


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
class KeptFrames:
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


def keep_frames(path: Path, config: FrameConfig) -> KeptFrames:
    """Read the frames of a folder of pictures or of a video file; what cannot be read is among the problems."""
    problems: list[str] = []
    pictures = _from_folder(path, config, problems) if path.is_dir() else _from_video(path, config, problems)
    if not config.face_crop:
        return KeptFrames([_encoded(picture, config) for picture in pictures], problems)
    crops, seen = _face_crops(pictures, config.margin)
    if seen and not crops:
        problems.append(f"{path}: no face was found in {seen} frames")
    return KeptFrames([_encoded(crop, config) for crop in crops], problems, seen - len(crops))


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


@dataclass(frozen=True, kw_only=True)
class PackConfig(FrameConfig):
    """What is packed, where it goes, and what is written beside each clip."""

    folder: str = setting(help="folder with one sub-folder of pictures per clip, or with video files", positional=True)
    output: str = setting(help="file to write, such as faces.h5; with --kind its folder")
    listing: Literal["ffpp", "celebdf_v2", "dfdc", "dfdcp"] | None = setting(
        None, "folder is the root of this public set, whose lists say label, class name, split and group of each clip"
    )
    splits: str | None = setting(None, "with --listing ffpp: folder of the official train.json, val.json and test.json")
    kind: Kind | None = setting(None, "kind of FF++ video: the file is named FF++_KIND_COMPRESSION.h5")
    compression: Literal["raw", "c23", "c40"] = setting("c40", "of FF++: part of the file's name, or which videos")
    label: Literal["real", "fake"] | None = setting(None, "written beside every clip (default: follows from --kind)")
    class_name: str | None = setting(None, "written beside every clip: the manipulation (default: follows from --kind)")
    split: str | None = setting(None, "written beside every clip: train, val or test")
    group: str | None = setting(None, "written beside every clip: what must never cross a split, if they share it")
    skip_unreadable: bool = setting(False, "finish without what cannot be read; it is named all the same")

    def target(self) -> Path:
        """Give the path of the finished file. Raises ValueError for a name that does not end in .h5 or .hdf5."""
        if self.kind:
            return Path(self.output) / file_name(self.kind, self.compression)
        if not self.output.endswith(HDF5_SUFFIXES):
            raise ValueError(f"output: {self.output!r} must end in {' or '.join(HDF5_SUFFIXES)}, or give --kind.")
        return Path(self.output)

    def attributes(self) -> dict[str, str]:
        """Give what is written beside each clip: label (real, fake), class_name, split and group, where known."""
        by_kind = LABEL_NAMES[REAL if self.kind == ORIGINAL else FAKE] if self.kind else None
        given = {
            "label": self.label or by_kind,
            "class_name": self.class_name or self.kind,
            "split": self.split,
            "group": self.group,
        }
        return {name: value for name, value in given.items() if value}


class PackItem(NamedTuple):
    """One clip to pack: its name in the file, where it lies, and the attributes written beside it."""

    name: str
    path: Path
    attributes: Mapping[str, str]


def pack(config: PackConfig) -> Path:
    """Pack the folder into the file that `config` names and give its path.

    It works into `FILE.part`, where a clip has a name only when it is complete, and goes on with one that is there.
    Raises ValueError or FileNotFoundError; Incomplete, which names what cannot be read, when that is not to be skipped
    (then only whole clips are in `FILE.part`).
    """
    target = config.target()
    if target.exists():
        raise ValueError(f"{str(target)!r} exists already; delete it, or give another --output.")
    items, absent = listed_items(config) if config.listing else (folder_items(config), [])
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    problems = _pack_into(part, items, absent, config)
    for problem in problems:
        log.warning("%s", problem)
    if problems and not config.skip_unreadable:
        raise Incomplete(
            f"{len(problems)} pictures or videos cannot be read (first: {problems[0]}); mend them and run this again, "
            f"or give --skip_unreadable true. Complete clips are kept in {str(part)!r}."
        )
    part.replace(target)
    log.info("wrote %s: %.1f MB%s", target, target.stat().st_size / 1e6, _left_out(problems))
    return target


def listed_items(config: PackConfig) -> tuple[list[PackItem], list[str]]:
    """List the clips of a public set that are there, with what it says of them; and name those that are not there.

    Raises FileNotFoundError or ValueError naming file and entry.
    """
    tree = VideoTree(config.folder)
    data = DataConfig(path=config.folder, splits=config.splits, compression=config.compression)
    videos = LISTINGS[config.listing or ""](tree, data)
    places = tree.locate([video.place for video in videos])
    items = [PackItem(v.name, places[v.place], _said(v) | config.attributes()) for v in videos if v.place in places]
    absent = [f"{v.name}: listed, but not there" for v in videos if v.place not in places]
    return checked(items, config.folder), absent


def _said(video: ListedVideo) -> dict[str, str]:
    names = ("class_name", "split", "group")
    return {"label": LABEL_NAMES[video.label]} | {name: getattr(video, name) for name in names}


def folder_items(config: PackConfig) -> list[PackItem]:
    """List the clips of a folder: every folder that holds pictures, every video file (its name without suffix).

    Raises FileNotFoundError, or ValueError for pictures outside sub-folders and for names that are not unique.
    """
    folder, attributes = Path(config.folder), config.attributes()
    if not folder.is_dir():
        raise FileNotFoundError(f"Folder {str(folder)!r} does not exist; give one with a sub-folder or video per clip.")
    places = {path.parent: path.parent for path in list_images(folder)}
    places |= {path: path.with_suffix("") for path in list_images(folder, VIDEO_SUFFIXES)}
    if folder in places:
        raise ValueError(
            f"Pictures lie directly in {str(folder)!r}; put the frames of each clip into a folder of its own."
        )
    items = [PackItem(name.relative_to(folder).as_posix(), path, attributes) for path, name in places.items()]
    return checked(items, str(folder))


def checked(items: Iterable[PackItem], where: str) -> list[PackItem]:
    """Sort clips by name. Raises ValueError when there are none, two share a name, or one lies inside another."""
    ordered = sorted(items, key=lambda item: item.name)
    names = {item.name for item in ordered}
    if not ordered:
        raise ValueError(f"{where!r} holds neither pictures nor videos.")
    twice = [a.name for a, b in pairwise(ordered) if a.name == b.name]
    nested = [name for name in names if any(str(parent) in names for parent in Path(name).parents)]
    for name in (*twice, *sorted(nested)):
        raise ValueError(f"{where}: the clip {name!r} stands for two things or lies inside another clip; rename one.")
    return ordered


def _pack_into(part: Path, items: Sequence[PackItem], absent: Sequence[str], config: PackConfig) -> list[str]:
    """Add the clips that are not there yet; gives all problems, those of `absent` clips first."""
    problems, without_face, frames = list(absent), 0, 0
    with _opened(part) as file:
        _claim(file, config, part)
        done = clips_in(file).keys()
        waiting = [item for item in items if item.name not in done]
        foreign = done - {item.name for item in items}
        if foreign:
            raise ValueError(
                f"{str(part)!r} holds clips that {config.folder!r} lacks (first: {min(foreign)}); delete it."
            )
        if done:
            log.info("going on: %d of %d clips are packed already", len(done), len(items))
        for item in progress(waiting, "packing", is_kept=True):
            kept = keep_frames(item.path, config)
            problems += kept.problems
            without_face += kept.without_face
            if kept.frames and (config.skip_unreadable or not kept.problems):
                frames += len(kept.frames)
                _store(file, item, kept)
        if not len(clips_in(file)):
            raise Incomplete(f"Nothing could be packed from {config.folder!r} (first: {problems[0]}).")
        if not problems or config.skip_unreadable:
            del file.attrs[SETTINGS]
    log.info("packed %d frames of %d clips; %d frames do not show the face", frames, len(waiting), without_face)
    return problems


def _opened(part: Path) -> h5py.File:
    try:
        return h5py.File(part, "a")
    except OSError as error:
        raise ValueError(f"{str(part)!r} is in use or damaged ({error}); delete it to pack afresh.") from error


def _claim(file: h5py.File, config: PackConfig, part: Path) -> None:
    """Write into a new file how it is packed. Raises ValueError when an unfinished one was packed otherwise."""
    places = ("folder", "output", "skip_unreadable")
    settings = {name: value for name, value in asdict(config).items() if name not in places}
    old = json.loads(file.attrs.get(SETTINGS, "{}"))
    other = sorted(name for name in settings if old and old.get(name) != settings[name])
    if other:
        raise ValueError(f"{str(part)!r} was begun with other settings ({', '.join(other)}); keep them, or delete it.")
    file.attrs[SETTINGS] = json.dumps(settings)
    file.flush()


def _store(file: h5py.File, item: PackItem, kept: KeptFrames) -> None:
    """Write a clip, and name it only then: a name in the file says that the clip is complete."""
    shapes = {frame.shape for frame in kept.frames}
    if kept.frames[0].ndim == 1:
        clip = file.create_dataset(None, (len(kept.frames),), h5py.vlen_dtype(np.uint8))
        for number, frame in enumerate(kept.frames):
            clip[number] = frame
    elif len(shapes) == 1:
        clip = file.create_dataset(None, data=np.stack(kept.frames), chunks=(1, *kept.frames[0].shape))
    else:
        raise ValueError(f"{item.path}: frames of {len(shapes)} sizes; give --size, or another --form than raw.")
    clip.attrs.update(item.attributes)
    file.flush()
    file[item.name] = clip
    file.flush()


def _left_out(problems: Sequence[str]) -> str:
    return f"; {len(problems)} pictures or videos could not be read and are left out" if problems else ""
