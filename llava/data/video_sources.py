"""Sources of videos: one's own in class folders or a csv table, and public sets with the frames extracted from them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from llava.core.types import Record
from llava.data.clips import ClipSource
from llava.data.frames import DRAWN, FrameReader, clip_records, drawn_number, is_drawn
from llava.data.images import MEMBER_MARK, UnreadableVideo, open_store, report_missing
from llava.data.inputs import VIDEO_FILES
from llava.data.public_sets import LISTINGS, ListedVideo, VideoTree
from llava.data.sources import DataConfig
from llava.data.stills import folder_records, table_records

log = logging.getLogger(__name__)


class VideoSource(ClipSource):
    """Single frames of video files, or of folders of frames; a subclass lists them.

    clips: one record each, its `where` without a frame. A file that cannot be opened keeps one record, whatever its
    split, so that it is counted where it is left out.
    """

    def __init__(self, config: DataConfig, clips: Iterable[Record]) -> None:
        reader = FrameReader(config.frames, config.frame_rate)
        counts = ((clip, 0 if is_drawn(clip, config) else _frame_count(reader, clip)) for clip in clips)
        super().__init__(config, [r for clip, count in counts for r in clip_records(clip, count, config)], reader)

    def why_unreadable(self, record: Record) -> str:
        """Decode the record's frame, the middle one where it is drawn, and say why that cannot be done.

        A picture in a folder of frames is a file of its own and not asked for.
        """
        clip, _, frame = record.where.rpartition(MEMBER_MARK)
        if Path(clip).is_dir():
            return ""
        try:
            self._clips.read(clip, drawn_number(self._clips.frame_count(clip), None) if frame == DRAWN else int(frame))
        except UnreadableVideo as error:
            return error.reason
        return ""


def _frame_count(reader: FrameReader, clip: Record) -> int:
    """Count the frames of a clip, 1 where it cannot be opened: whoever reads that one is told why."""
    try:
        return reader.frame_count(clip.where)
    except UnreadableVideo:
        return 1


def require_plain(config: DataConfig) -> None:
    """Refuse settings that videos have no use for. Raises ValueError."""
    for name, reason in (("masks", "videos have none that are read"), ("cache", "drawn frames would fill the memory")):
        if getattr(config, name):
            raise ValueError(f"{name}: {reason}; give --data.{name} false.")


class OwnClipSource(VideoSource):
    """Single frames of video files, listed as `FolderSource` and `CsvSource` list images; each file is one video.

    Raises FileNotFoundError or ValueError naming file, folder or row.
    """

    def __init__(self, config: DataConfig) -> None:
        require_plain(config)
        if Path(config.path).is_dir():
            listed = folder_records(config, VIDEO_FILES)
        else:
            listed, _ = table_records(config, open_store(config.root or Path(config.path).parent), VIDEO_FILES)
        packed = next((clip.where for clip in listed if MEMBER_MARK in clip.where), None)
        if packed is not None:
            raise ValueError(f"root: {packed!r} lies in a zip, where no video can be read; unpack it.")
        if not listed:
            raise ValueError(f"{config.path!r} names no video; known are {', '.join(VIDEO_FILES.suffixes)}.")
        log.info("%s: %d videos", config.path, len(listed))
        super().__init__(config, listed)


class ListingSource(VideoSource):
    """Single frames of the videos of a set of LISTINGS, which `DataConfig.source` names; `path` is its root.

    Raises FileNotFoundError or ValueError naming what is wrong or missing.
    """

    def __init__(self, config: DataConfig) -> None:
        require_plain(config)
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
        super().__init__(config, [_clip(video, places[video.place]) for video in found])


def _clip(video: ListedVideo, path: Path) -> Record:
    return Record(
        id=video.name,
        label=video.label,
        class_name=video.class_name,
        video=video.name,
        group=video.group,
        where=str(path),
        split=video.split,
    )
