"""What every data source is, its settings, and how records of one split are picked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from llava.core.config import setting
from llava.core.input_specs import Wants
from llava.core.registry import nearest
from llava.core.types import FAKE, REAL, Record, Sample
from llava.data import SOURCES

REAL_NAMES = ("real", "0_real", "original", "originals", "pristine", "authentic")
EVERY_SPLIT = "all"
_LABELS = {"0": REAL, "real": REAL, "1": FAKE, "fake": FAKE}


class Source(Protocol):
    """Where samples come from: a cheap list of records, and pixels on request."""

    @property
    def records(self) -> Sequence[Record]:
        """Give every record; no pixel is read for it."""

    def load(self, record: Record, rng: np.random.Generator | None = None, wants: Wants | None = None) -> Sample:
        """Read one record's content. `rng` serves sources that choose a frame at random.

        wants: frames and sound of a clip, in step; what a record has not is None in the sample, which says why. Raises
        UnreadableVideo for a video file that cannot be decoded.
        """

    def why_unreadable(self, record: Record) -> str:
        """Say why a record's video file cannot be decoded; empty when it can, and at once where it has none."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Say which source, where it lies and how its names map to ours."""

    source: str = setting(
        "folder", "kind of source: folder, csv, clips, conversations, hdf5, ffpp, celebdf_v2, dfdc or dfdcp"
    )
    path: str = setting(
        help="the class folder (of videos for clips), csv table, conversation json, HDF5 file or its folder, root of a "
        "public set"
    )
    root: str | None = setting(None, "folder or zip that relative file names start from (default: folder of the table)")
    train: str = setting("train", "name of the training split")
    val: str = setting("val", "name of the validation split")
    test: str = setting("test", "name of the test split")
    shares: tuple[float, float, float] = setting(
        (0.7, 0.15, 0.15), "of images, for training, validation and test, when the data come without splits"
    )
    columns: dict[str, str] = setting({}, "csv column of file, label, split, video, group, class_name (default: same)")
    group_ids: bool = setting(False, "the group column holds ids joined by _; records that share an id form one group")
    real_names: tuple[str, ...] = setting(REAL_NAMES, "class names that mean real; any other class name means fake")
    class_names: dict[str, str] = setting(
        {}, "class names of fakes -> those that the detector knows, as --data.class_names.aifake ai_generated"
    )
    face_crop: bool = setting(False, "crop each image to its largest face (an image without a face stays whole)")
    masks: bool = setting(
        False, "read masks of forged pixels: column or tag `mask`, files like the images; not for crops"
    )
    cache: bool = setting(False, "keep decoded images in memory (per worker process)")
    splits: str | None = setting(
        None, "hdf5, ffpp: folder of the official FF++ train.json, val.json and test.json (ffpp: default is the path)"
    )
    compression: Literal["raw", "c23", "c40"] = setting(
        "c40", "ffpp, hdf5 with splits: which videos, of files FF++_*_c23.h5 or FF++_*_c40.h5"
    )
    frames: int = setting(32, "videos: evenly spread frames of each clip outside the training split")
    frame_rate: float | None = setting(
        None, "frames per second of clips that tell no times (HDF5, folders of frames), for detectors that read several"
    )
    allow_missing: bool = setting(
        False, "videos: leave out those that the splits name and the files lack, with a warning"
    )
    allow_leaks: bool = setting(
        False, "train although splits share groups, as the official test list of Celeb-DF makes them, with a warning"
    )

    def __post_init__(self) -> None:
        if self.frame_rate is not None and self.frame_rate <= 0:
            raise ValueError(f"frame_rate: {self.frame_rate} is not usable; allowed: above 0, such as 25.")
        if self.masks and self.face_crop:
            raise ValueError("masks: they belong to whole images, face_crop cuts them; leave one of the two off.")


def open_source(config: DataConfig) -> Source:
    """Open the source that `config` names. Raises ValueError or FileNotFoundError naming what is wrong."""
    source: Source = SOURCES.get(config.source)(config)
    return RenamedSource(source, config.class_names) if config.class_names else source


class RenamedSource:
    """A source whose fakes have other class names; real records are called real by every source."""

    def __init__(self, source: Source, class_names: Mapping[str, str]) -> None:
        self._source = source
        self._records = tuple(
            r if r.label == REAL else replace(r, class_name=class_names.get(r.class_name, r.class_name))
            for r in source.records
        )

    @property
    def records(self) -> Sequence[Record]:
        """Give every record, renamed."""
        return self._records

    def load(self, record: Record, rng: np.random.Generator | None = None, wants: Wants | None = None) -> Sample:
        """Read one record's content, as the source does."""
        return self._source.load(record, rng, wants)

    def why_unreadable(self, record: Record) -> str:
        """Say what the source says."""
        return self._source.why_unreadable(record)


def split_of(source: Source, name: str) -> list[Record]:
    """Give the records of one split, or every record for the name `all`.

    Raises ValueError that lists the splits and their sizes when there is no record in it.
    """
    found = [r for r in source.records if name in (r.split, EVERY_SPLIT)]
    if found:
        return found
    sizes = Counter(r.split for r in source.records)
    known = ", ".join(f"{split!r} ({count})" for split, count in sorted(sizes.items())) or "none"
    hint = nearest(name, sorted(split for split in sizes if split)).partition(" Did you mean")[2]
    also = f" Did you mean{hint}" if hint else ""
    raise ValueError(f"Split {name!r} has no records. Splits here: {known}; {EVERY_SPLIT!r} takes every record.{also}")


def parse_label(value: object, where: str) -> int | None:
    """Turn real/fake/0/1 into 0 = real, 1 = fake, and an empty value into None. Raises ValueError naming `where`."""
    text = "" if value is None else str(value).strip().lower()
    if not text:
        return None
    if text not in _LABELS:
        raise ValueError(f"{where}: label {value!r} is unknown; allowed: real, fake, 0 (real), 1 (fake), or empty.")
    return _LABELS[text]


def label_of_class(class_name: str, real_names: Sequence[str]) -> int:
    """Give 0 when the class name is one of `real_names` (case does not matter), else 1."""
    return REAL if class_name.strip().lower() in {name.lower() for name in real_names} else FAKE
