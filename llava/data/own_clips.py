"""Videos of one's own: class folders of video files, or a csv table with one row per video."""

from __future__ import annotations

import logging
from pathlib import Path

from llava.data.clips import ClipSource, require_plain
from llava.data.frames import FrameReader, clip_records, is_drawn
from llava.data.images import MEMBER_MARK, open_store
from llava.data.inputs import VIDEO_FILES
from llava.data.sources import DataConfig
from llava.data.stills import folder_records, table_records

log = logging.getLogger(__name__)


class OwnClipSource(ClipSource):
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
        reader = FrameReader(config.frames, config.frame_rate)
        counts = {clip.where: 0 if is_drawn(clip, config) else reader.frame_count(clip.where) for clip in listed}
        log.info("%s: %d videos", config.path, len(listed))
        super().__init__(config, [r for c in listed for r in clip_records(c, counts[c.where], config)], reader)
