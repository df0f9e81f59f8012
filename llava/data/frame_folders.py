"""`m2f2 data frames`: evenly spread frames of videos as pictures, a folder a video, with a table of them all."""

from __future__ import annotations

import csv
import logging
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llava.core.config import setting
from llava.core.runtime import Incomplete, atomic_path, other_settings, write_run
from llava.core.terminal import progress
from llava.data.hdf5_pack import PackConfig, PackItem, folder_items, keep_frames, listed_items
from llava.data.sources import REAL_NAMES

log = logging.getLogger(__name__)
SUFFIXES = {"jpeg": "jpg", "png": "png"}
TABLE = "manifest.csv"
COLUMNS = ("file", "label", "class_name", "split", "group", "video")
FREE_TO_CHANGE = ("workers", "skip_unreadable")


@dataclass(frozen=True, kw_only=True)
class FramesConfig(PackConfig):
    """Which videos, where their frames go, and how many processes read them."""

    output: str = setting(help="folder to write: CLASS/VIDEO/NUMBER.jpg and manifest.csv")
    frames: int | None = setting(10, "evenly spread frames of each video; none = all")
    face_crop: bool = setting(True, "cut out the face that is seen longest, of equally long ones the largest")
    workers: int = setting(2, "processes that read videos")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "raw":
            raise ValueError("form: raw pixels are no pictures; give jpeg or png.")
        if self.workers < 1:
            raise ValueError(f"workers: {self.workers} is not usable; give 1 or more.")


@dataclass(frozen=True)
class Written:
    """What became of a video: pictures that were written, frames without its face, and problems in words."""

    frames: int
    without_face: int
    problems: list[str]


def write_frames(config: FramesConfig) -> str:
    """Write the frames of every video, and then the table that `source: csv` opens; says what was written.

    A video is a folder of its own, moved into place when it is complete: a call that was interrupted is gone on with.
    Its class is what the lists of a public set, `label` or the first folder of its name say. Raises ValueError or
    FileNotFoundError; Incomplete, which counts what cannot be read, unless that is to be skipped.
    """
    output, settings = Path(config.output), asdict(config)
    other = other_settings(output, settings, settings.keys() - set(FREE_TO_CHANGE))
    if other:
        raise ValueError(
            f"{config.output!r} was begun with other settings ({', '.join(sorted(other))}); keep them, or give another "
            "--output."
        )
    items, absent = listed_items(config) if config.listing else (folder_items(config), [])
    rows = {item.name: row_of(item) for item in items}
    write_run(output, settings, None)
    waiting = [item for item in items if not (output / item.name).is_dir()]
    if len(waiting) < len(items):
        log.info("going on: %d of %d videos are there already", len(items) - len(waiting), len(items))
    problems, without_face = list(absent), 0
    for _, written in zip(progress(waiting, "videos"), _written(waiting, config), strict=True):
        problems += written.problems
        without_face += written.without_face
    for problem in problems:
        log.warning("%s", problem)
    if problems and not config.skip_unreadable:
        raise Incomplete(
            f"{len(problems)} videos or pictures cannot be read (first: {problems[0]}); mend them and run this again, "
            f"or give --skip_unreadable true. Complete videos are in {config.output!r}, which has no {TABLE} yet."
        )
    count, videos = _write_table(output, rows)
    left = f"; {len(problems)} problems, named above, were skipped" if problems else ""
    faces = f"; {without_face} frames do not show the face" if config.face_crop else ""
    return f"{count} frames of {videos} videos are in {output / TABLE}{faces}{left}"


def row_of(item: PackItem) -> dict[str, str]:
    """Give what the table says of a video, as far as it is known. Raises ValueError where nothing says the class."""
    known: Mapping[str, str] = item.attributes
    parts = Path(item.name).parts
    class_name = known.get("class_name") or (parts[0] if len(parts) > 1 else known.get("label", ""))
    if not class_name:
        raise ValueError(
            f"{item.name!r}: nothing says whether it is real; put videos into class folders, or give --label or "
            "--listing."
        )
    label = known.get("label") or ("real" if class_name.lower() in REAL_NAMES else "fake")
    group, split = known.get("group") or item.name, known.get("split", "")
    return {"label": label, "class_name": class_name, "split": split, "group": group, "video": item.name}


def write_video(item: PackItem, config: FramesConfig) -> Written:
    """Write the frames of one video into its folder; nothing of one with problems, unless they are skipped."""
    kept = keep_frames(item.path, config)
    if not kept.frames or (kept.problems and not config.skip_unreadable):
        return Written(0, kept.without_face, kept.problems)
    with atomic_path(Path(config.output) / item.name) as staged:
        staged.mkdir()
        for number, frame in enumerate(kept.frames):
            (staged / f"{number:04}.{SUFFIXES[config.form]}").write_bytes(frame.tobytes())
    return Written(len(kept.frames), kept.without_face, kept.problems)


def _written(items: Sequence[PackItem], config: FramesConfig) -> Iterator[Written]:
    write = partial(write_video, config=config)
    if config.workers == 1 or len(items) < 2:
        yield from map(write, items)
        return
    with ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(write, items)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_table(output: Path, rows: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
    """Write a row per picture; gives how many there are, and of how many videos. Raises Incomplete for none."""
    files = [(path, rows[name]) for name in sorted(rows) for path in sorted((output / name).glob("*.*"))]
    if not files:
        raise Incomplete(f"No frame of {len(rows)} videos could be read.")
    with atomic_path(output / TABLE) as staged, staged.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({"file": path.relative_to(output).as_posix(), **row} for path, row in files)
    return len(files), len({row["video"] for _, row in files})
