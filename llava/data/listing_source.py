"""Frames of the videos that a public set lists, in face crops extracted before or in the video files themselves."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from llava.core.types import Record, Sample
from llava.data.frame_reader import FrameReader
from llava.data.frames import clip_records, drawn_number, is_drawn
from llava.data.image_source import ImageSource
from llava.data.listings import LISTINGS, ListedVideo
from llava.data.sources import DataConfig
from llava.data.storage import MEMBER_MARK, report_missing
from llava.data.video_tree import VideoTree

log = logging.getLogger(__name__)


class ListingSource(ImageSource):
    """Single frames of a set of LISTINGS, which `DataConfig.source` names; `path` is its root.

    A video of the training split is one record, of which `load` draws a frame; any other is `frames` records, evenly
    spread frames, the same every time. Raises FileNotFoundError or ValueError naming what is wrong or missing.
    """

    def __init__(self, config: DataConfig) -> None:
        for name, reason in (
            ("masks", "public sets are read without"),
            ("cache", "drawn frames would fill the memory"),
        ):
            if getattr(config, name):
                raise ValueError(f"{name}: {reason}; give --data.{name} false.")
        self._reader = FrameReader(config.frames)
        tree = VideoTree(config.path)
        videos = LISTINGS[config.source](tree, config)
        places = tree.locate([video.place for video in videos])
        report_missing({config.path: [v.name for v in videos if v.place not in places]}, config.allow_missing)
        found = [video for video in videos if video.place in places]
        if not found:
            raise FileNotFoundError(f"{config.path!r} holds none of the {len(videos)} videos that are listed there.")
        counts = Counter(video.split for video in found)
        form = "folders of frames" if places[found[0].place].is_dir() else "video files"
        log.info("%s, %s: %s", config.source, form, ", ".join(f"{n} {split}" for split, n in counts.items()))
        super().__init__(config, [r for v in found for r in self._records_of(v, places[v.place], config)])

    def _records_of(self, video: ListedVideo, path: Path, config: DataConfig) -> Iterator[Record]:
        clip = Record(
            id=video.name,
            label=video.label,
            class_name=video.class_name,
            video=video.name,
            group=video.group,
            where=str(path),
            split=video.split,
        )
        return clip_records(clip, 0 if is_drawn(clip, config) else self._reader.frames(path), config)

    def load(self, record: Record, rng: np.random.Generator | None = None) -> Sample:
        """Read one frame; of a training record any frame of the clip, each as likely, the middle one without `rng`.

        The sample's record says in its tag `frame` which one it is. Raises UnreadableImage naming the file.
        """
        path, _, frame = record.where.rpartition(MEMBER_MARK)
        number = drawn_number(frame, self._reader.frames(Path(path)), rng)
        tags = {**record.tags, "frame": str(number)}
        return super().load(replace(record, where=f"{path}{MEMBER_MARK}{number}", tags=tags))

    def _read(self, where: str) -> np.ndarray:
        path, _, number = where.rpartition(MEMBER_MARK)
        return self._reader.read(Path(path), int(number))
