"""Sources of clips: what all have in common, and HDF5 files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from llava.core.input_specs import MissingInput, Wants
from llava.core.types import FAKE, LABEL_NAMES, REAL, Record, Sample
from llava.data.frames import DRAWN, Frame, clip_records, drawn_number, even_seconds
from llava.data.images import MEMBER_MARK, UnreadableImage, read_image, report_missing
from llava.data.public_sets import KINDS, ORIGINAL, Pair, file_name, group_names, keys_of, read_pairs
from llava.data.sources import DataConfig, parse_label
from llava.data.stills import ImageSource
from llava.data.windows import ClipStore, read_window, sound_fields

log = logging.getLogger(__name__)

HDF5_SUFFIXES = (".h5", ".hdf5")
# Frames are read in random order, so a chunk kept in memory would hardly ever be asked for again.
NO_CHUNK_CACHE = {"rdcc_nbytes": 0}
NAMED_AT_MOST = 5


class UnreadableClip(UnreadableImage):
    """A clip or file of clips that is refused; the message names it and the reason."""


@contextmanager
def open_clips(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading. Raises FileNotFoundError, or UnreadableClip for a damaged file."""
    with _open(str(path)) as file:
        yield file


def clips_in(file: h5py.File) -> dict[str, h5py.Dataset]:
    """Give every data set of a file by its name, those in groups too (`group/name`); no pixel is read."""
    found: dict[str, h5py.Dataset] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item

    file.visititems(visit)
    return found


def frame_count(clip: h5py.Dataset) -> int:
    """Count the frames of a clip: uint8 (T, H, W, 3) RGB, or (T,) of encoded pictures, bytes of a JPEG or PNG each.

    Raises UnreadableClip for a data set of another form, or without frames.
    """
    is_raw = clip.dtype == np.uint8 and clip.ndim == 4 and clip.shape[-1] == 3
    is_encoded = h5py.check_vlen_dtype(clip.dtype) == np.uint8 and clip.ndim == 1
    if not is_raw and not is_encoded:
        raise UnreadableClip(
            f"{_name(clip)}: {clip.dtype} {clip.shape} is no clip; expected uint8 (frames, height, width, 3) RGB, or "
            "(frames,) of encoded pictures as scripts/pack_hdf5.py writes them."
        )
    if not len(clip):
        raise UnreadableClip(f"{_name(clip)}: a clip without frames; pack or download it again.")
    return len(clip)


def read_frame(clip: h5py.Dataset, number: int) -> np.ndarray:
    """Read one frame, uint8 RGB (H, W, 3), and nothing else of the clip. Raises UnreadableClip or UnreadableImage."""
    try:
        stored = clip[number]
    except OSError as error:
        raise UnreadableClip(
            f"{_name(clip)}: frame {number} is damaged ({error}); pack or download it again."
        ) from error
    return read_image(stored.tobytes(), f"{_name(clip)}, frame {number}") if stored.ndim == 1 else stored


class ClipFiles:
    """HDF5 files that stay open, one handle for each file and process, opened in the process that reads.

    A handle that a worker inherits by fork is closed there and opened anew; one is never pickled. rate: frames per
    second; None = not known, so that nothing can be in step.
    """

    def __init__(self, rate: float | None = None) -> None:
        self._rate = rate
        self._process = os.getpid()
        self._files: dict[str, h5py.File] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_rate": self._rate, "_process": -1, "_files": {}}

    def frame_count(self, clip: str) -> int:
        """Count the frames of a clip, FILE::KEY. Raises FileNotFoundError or UnreadableClip."""
        return frame_count(self.dataset(clip))

    def read(self, clip: str, number: int) -> np.ndarray:
        """Read one frame of a clip, FILE::KEY, uint8 RGB (H, W, 3). Raises UnreadableClip naming file and frame."""
        return read_frame(self.dataset(clip), number)

    def seconds(self, clip: str) -> list[float]:
        """Give when each frame is shown. Raises MissingInput where nobody says, FileNotFoundError or UnreadableClip."""
        return even_seconds(self.frame_count(clip), self._rate)

    def window(self, clip: str, numbers: Sequence[int]) -> list[Frame]:
        """Read frames by their numbers. Raises as `read` does."""
        seconds = self.seconds(clip)
        return [Frame(pixels=self.read(clip, number), seconds=seconds[number]) for number in numbers]

    def sound(self, clip: str, start: float, seconds: float) -> np.ndarray:
        """Raise MissingInput: these files hold pictures."""
        raise MissingInput("clips in HDF5 files have no sound")

    def dataset(self, clip: str) -> h5py.Dataset:
        """Give the data set of a clip, FILE::KEY. Raises FileNotFoundError or UnreadableClip."""
        path, key = clip.rsplit(MEMBER_MARK, 1)
        if self._process != os.getpid():
            for inherited in self._files.values():
                inherited.close()
            self._process, self._files = os.getpid(), {}
        if path not in self._files:
            self._files[path] = _open(path)
        try:
            return self._files[path][key]
        except KeyError as error:
            raise UnreadableClip(f"{path}: clip {key!r} is not there or damaged ({error}).") from error


def _open(path: str) -> h5py.File:
    if not Path(path).is_file():
        raise FileNotFoundError(f"HDF5 file {path!r} does not exist.")
    try:
        return h5py.File(path, "r", **NO_CHUNK_CACHE)
    except OSError as error:
        raise UnreadableClip(f"{path}: damaged, or no HDF5 file ({error}); pack or download it again.") from error


def _name(clip: h5py.Dataset) -> str:
    return f"{clip.file.filename}{clip.name}"


class ClipSource(ImageSource):
    """Single frames of the clips of a store.

    A clip of the training split is one record, of which `load` draws a frame; any other clip is `frames` records,
    evenly spread frames, the same every time.
    """

    def __init__(self, config: DataConfig, records: Sequence[Record], clips: ClipStore) -> None:
        super().__init__(config, records)
        self._clips = clips

    def load(self, record: Record, rng: np.random.Generator | None = None, wants: Wants | None = None) -> Sample:
        """Read one frame; of a training record any frame of the clip, each as likely, the middle one without `rng`.

        wants: read the frames and the sound from there on, too; then the frames that are drawn from, or spread over,
        are those from which on the clip has all of it. The sample's record says in its tag `frame` which one it is.
        Raises UnreadableImage naming clip and frame.
        """
        clip, _, frame = record.where.rpartition(MEMBER_MARK)
        count = self._clips.frame_count(clip) if frame == DRAWN or wants is not None else 0
        if wants is None:
            number = int(frame) if frame != DRAWN else drawn_number(count, rng)
            return super().load(_at(record, clip, number))
        try:
            seconds = self._clips.seconds(clip)
        except MissingInput as missing:
            lacks = dict.fromkeys(("frames", "sound"), str(missing))
            silent = sound_fields(partial(self._clips.sound, clip), 0.0, wants).get("lacks", {})
            return replace(self.load(record, rng), lacks=lacks | silent)
        starts = wants.starts(seconds)
        start = starts[drawn_number(len(starts), rng) if frame == DRAWN else int(frame) * len(starts) // count]
        found, face = read_window(self._clips, clip, wants.chosen(seconds, start), wants, self.config.face_crop)
        record = _at(record, clip, start)
        if face:
            self.face_counts[face] += 1
            record = replace(record, tags={**record.tags, "face": face})
        return Sample(record=record, **found)

    def _read(self, where: str) -> np.ndarray:
        clip, _, number = where.rpartition(MEMBER_MARK)
        return self._clips.read(clip, int(number))


def _at(record: Record, clip: str, number: int) -> Record:
    """Give the record of one frame of a clip."""
    return replace(record, where=f"{clip}{MEMBER_MARK}{number}", tags={**record.tags, "frame": str(number)})


class Hdf5Source(ClipSource):
    """Single frames of clips in HDF5 files, one data set for each clip.

    With `splits`, `path` is the folder of the FF++ files of one `compression`; without, an .h5 file or a folder of
    them, whose clips carry the attribute label, and may carry class_name, split and group. Raises FileNotFoundError or
    ValueError naming files and clips.
    """

    def __init__(self, config: DataConfig) -> None:
        for name in ("masks", "face_crop", "cache"):
            if getattr(config, name):
                raise ValueError(
                    f"{name}: clips in HDF5 files have none and are read as they are; give --data.{name} false "
                    "(scripts/pack_hdf5.py --face_crop true packs crops)."
                )
        records = _ffpp_records(config) if config.splits else _pack_records(config)
        super().__init__(config, list(records), ClipFiles(config.frame_rate))


def _record(path: Path, key: str, label: int, class_name: str, video: str, group: str, split: str) -> Record:
    return Record(
        id=video,
        label=label,
        class_name=LABEL_NAMES[REAL] if label == REAL else class_name,
        video=video,
        group=group,
        where=f"{path}{MEMBER_MARK}{key}",
        split=split,
    )


# ---- FaceForensics++ ------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """The videos of one kind in one split, and the file that serves them."""

    split: str
    kind: str
    path: Path
    keys: Sequence[str]


def _ffpp_records(config: DataConfig) -> Iterator[Record]:
    splits = {name: read_pairs(Path(config.splits or "") / f"{name}.json") for name in _split_names(config)}
    groups = group_names(splits)
    parts = _parts(config, splits)
    named = {kind: {key for pairs in splits.values() for key in keys_of(kind, pairs)} for kind in KINDS}
    missing: dict[Path, list[str]] = {}
    for path in dict.fromkeys(part.path for part in parts):
        with open_clips(path) as file:
            present = set(file)
            served = [part for part in parts if part.path == path]
            missing[path] = [key for part in served for key in part.keys if key not in present]
            unnamed = len(present - named[served[0].kind])
            if unnamed:
                log.info("%s: no split names %d of its %d videos", path.name, unnamed, len(present))
            for part in served:
                yield from _part_records(part, file, groups, config)
    report_missing({path.name: keys for path, keys in missing.items()}, config.allow_missing)


def _split_names(config: DataConfig) -> list[str]:
    return list(dict.fromkeys((config.train, config.val, config.test)))


def _part_records(part: _Part, file: h5py.File, groups: Mapping[str, str], config: DataConfig) -> Iterator[Record]:
    label = REAL if part.kind == ORIGINAL else FAKE
    for key in part.keys:
        if key in file:
            video, group = f"{part.kind}/{key}", groups[key.split("_")[0]]
            clip = _record(part.path, key, label, part.kind, video, group, part.split)
            yield from clip_records(clip, frame_count(file[key]), config)


def _parts(config: DataConfig, splits: Mapping[str, Sequence[Pair]]) -> list[_Part]:
    """Find the file of each kind in each split; a file `..._test_only` serves the test split where it is there.

    Raises FileNotFoundError when there is none, or a split has fakes and no originals.
    """
    folder, parts = Path(config.path), []
    for split, pairs in splits.items():
        places = {kind: _place(folder, kind, config, split) for kind in KINDS}
        found = {kind: path for kind, path in places.items() if path is not None}
        absent = [kind for kind in KINDS if kind not in found]
        log.info("split %s: found %s; absent: %s", split, ", ".join(found) or "nothing", ", ".join(absent) or "none")
        if found and ORIGINAL not in found:
            raise FileNotFoundError(
                f"{str(folder)!r} lacks {file_name(ORIGINAL, config.compression)!r}: no real faces."
            )
        parts += [_Part(split, kind, path, keys_of(kind, pairs)) for kind, path in found.items()]
    if not parts:
        here = ", ".join(sorted(path.name for path in _hdf5_files(folder))[:NAMED_AT_MOST]) or "no HDF5 file"
        raise FileNotFoundError(
            f"{str(folder)!r} holds no {file_name(ORIGINAL, config.compression)!r} but {here}; give --data.path, the "
            "folder of the FF++ files, and --data.compression."
        )
    return parts


def _place(folder: Path, kind: str, config: DataConfig, split: str) -> Path | None:
    plain, test_only = (folder / file_name(kind, config.compression, is_test_only) for is_test_only in (False, True))
    if split == config.test and test_only.is_file():
        return test_only
    return plain if plain.is_file() else None


# ---- packs that describe themselves ---------------------------------------------------------------------------------


def _pack_records(config: DataConfig) -> Iterator[Record]:
    paths = _hdf5_files(Path(config.path))
    if not paths:
        raise FileNotFoundError(f"{config.path!r} is no HDF5 file and no folder that holds one (*.h5).")
    for path in paths:
        with open_clips(path) as file:
            clips = clips_in(file)
            for key, clip in clips.items():
                record = _pack_record(path, key, clip.attrs)
                yield from clip_records(record, frame_count(clip), config)
            log.info("%s: %d videos", path.name, len(clips))


def _pack_record(path: Path, key: str, attributes: Mapping[str, object]) -> Record:
    label = parse_label(attributes.get("label"), f"{path}/{key}")
    if label is None:
        raise ValueError(
            f"{path}/{key} carries no attribute `label`; give --data.splits for FF++ files, or pack it with --label."
        )
    given = {name: str(attributes.get(name, "")) for name in ("class_name", "group", "split")}
    video = f"{path.stem}/{key}"
    class_name = given["class_name"] or LABEL_NAMES[label]
    return _record(path, key, label, class_name, video, given["group"] or video, given["split"])


def _hdf5_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix in HDF5_SUFFIXES)
    return [path] if path.is_file() else []
