"""`m2f2 score`: one row for every image of a folder or list, as parquet, in this process or over Ray Data.

All machines of a cluster have to see images, model and output folder under the same paths.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias
from zipfile import ZipFile, is_zipfile

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from llava.core.cluster import ClusterSettings, connected
from llava.core.config import setting, to_dict
from llava.core.registry import nearest
from llava.core.runtime import Incomplete, setup_logging
from llava.core.terminal import text_of
from llava.core.types import STARTER
from llava.core.weights import sha256_of
from llava.data.images import IMAGE_SUFFIXES
from llava.data.inputs import expand, is_url, is_video
from llava.jobs.bulk_parts import Parts, score_part
from llava.pipeline.settings import PipelineSettings, load, model_folder

if TYPE_CHECKING:
    from llava.jobs.bulk_parts import Totals

log = logging.getLogger(__name__)

LIST_SUFFIXES = (".txt", ".csv", ".parquet")
Missing: TypeAlias = Mapping[int, Sequence[str]]  # names by number of the part
MAX_BLOCKS = 10_000
LINE_SECONDS = 30.0
MODEL_FILES = ("*.json", "*.safetensors")
# What does not change a row, so that a run may go on with another value.
FREE = ("source", "out", "model", "column", "root", "engine", "workers", "cluster")


@dataclass(frozen=True, kw_only=True)
class ImageList:
    """The names of images, each once.

    duplicates: how often a name was there again; left_out: files of a folder or zip that are not named like
    images, or are hidden in a folder (`.name`).
    """

    names: list[str]
    duplicates: int = 0
    left_out: int = 0


def list_names(source: str, column: str = "path", root: str | None = None) -> ImageList:
    """List the images of a folder (sorted), a zip, a .txt (one name per line), a .csv or a .parquet file.

    What is named like an image in a folder is listed even where it is none, so that it is reported and not passed over.
    column: of csv and parquet. root: where relative names of a list begin; None = at the folder of the list.
    Raises FileNotFoundError or ValueError for a source that is not there, of another kind, or names no image.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_dir():
        below = sorted(_in_folder(path), key=str)
        names = [str(path / name) for name in below if _is_image(name.name) and not _is_hidden(name)]
        left_out = len(below) - len(names)
    elif not path.is_file():
        raise FileNotFoundError(f"Source {source!r} does not exist; give a folder, a zip or a list of images.")
    elif suffix in LIST_SUFFIXES:
        start = str(path.parent if root is None else Path(root))
        names, left_out = [_below(start, name) for name in _in_list(path, column)], 0
    else:
        found = expand([source])
        names = [name for name in found if not is_video(name)]
        left_out = (_member_count(path) if is_zipfile(path) else len(found)) - len(names)
    if not names:
        raise ValueError(f"Source {source!r} names no image; images end in {' '.join(IMAGE_SUFFIXES)}.")
    kept = _each_once(names)
    return ImageList(names=kept, duplicates=len(names) - len(kept), left_out=left_out)


def _each_once(names: list[str]) -> list[str]:
    """Drop names that were there before; `a//b` and `./a/b` are the same name."""
    seen: dict[str, str] = {}
    for name in names:
        seen.setdefault(name if is_url(name) else os.path.abspath(name), name)  # noqa: PTH100 (follows no link)
    return list(seen.values())


def _in_folder(folder: Path) -> Iterator[Path]:
    """Yield what is below a folder, from there: files, and folders that are named like images."""
    for place, folders, files in os.walk(folder, onerror=_raise):
        below = Path(place).relative_to(folder)
        yield from (below / name for name in (*files, *filter(_is_image, folders)))


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _member_count(path: Path) -> int:
    with ZipFile(path) as archive:
        return len({member.filename for member in archive.infolist() if not member.is_dir()})


def _in_list(path: Path, column: str) -> Iterator[str]:
    """Yield the names of a list, as they stand there. Raises ValueError when it has no such column."""
    if path.suffix.lower() == ".parquet":
        yield from _in_parquet(path, column)
        return
    with path.open(newline="", encoding="utf-8-sig") as file:
        if path.suffix.lower() == ".txt":
            yield from filter(None, map(str.strip, file))
            return
        rows = csv.DictReader(file)
        _require_column(path, column, rows.fieldnames or ())
        for number, row in enumerate(rows, 2):
            if not row[column]:
                raise ValueError(f"{path}, row {number}: the column {column!r} is empty; give a name in every row.")
            yield row[column]


def _in_parquet(path: Path, column: str) -> Iterator[str]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        _require_column(path, column, file.schema_arrow.names)
        for batch in file.iter_batches(columns=[column]):
            names = batch.column(0).to_pylist()
            if not all(isinstance(name, str) and name for name in names):
                raise ValueError(f"{path}: the column {column!r} holds something else than names in some rows.")
            yield from names


def _require_column(path: Path, column: str, columns: Sequence[str]) -> None:
    if column not in columns:
        raise ValueError(f"{path} has no column {column!r}; name another with --column. {nearest(column, columns)}")


def _below(start: str, name: str) -> str:
    """Give a name of a list from where its relative names begin."""
    is_whole = is_url(name) or Path(name).is_absolute()
    return name if is_whole else str(Path(start, name))


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def _raise(error: OSError) -> None:
    raise error


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(PipelineSettings):
    """What is scored, by which model, where the rows go, and who does the work."""

    source: str = setting(help="folder, zip, image, or a list of images: .txt, .csv, .parquet", positional=True)
    out: str = setting(help="folder to write; its rows/ is one table for pandas and pyarrow")
    model: str = setting(STARTER, "detector or merged explainer: starter, folder, name in checkpoints/, or hub id")
    face: Literal["largest", "off"] = setting("largest", "largest = the largest face, off = the whole image")
    column: str = setting("path", "column of a .csv or .parquet list that holds the names")
    root: str | None = setting(None, "folder where relative names of a list begin; none = that of the list")
    engine: Literal["local", "ray"] = setting("local", "local = this process, ray = many, on one machine or a cluster")
    workers: int | None = setting(None, "processes of --engine ray; none = as many as there is room for")
    part_rows: int = setting(1000, "rows of a file; what a killed run has to do again is a file for each process")
    cluster: ClusterSettings = setting(ClusterSettings())

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be done."""
        super().__post_init__()
        if Path(self.out).is_file() or self.out.endswith((".parquet", ".csv")):
            raise ValueError(f"out: {self.out!r} is the name of a file; give a folder, its rows/ is read as one table.")
        if self.workers is not None and self.engine != "ray":
            raise ValueError("workers: only --engine ray has more than one; add it, or leave --workers out.")
        for name in ("part_rows", "workers", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value} is not usable; allowed: 1 or more.")


class PartScorer:
    """Holds the model in a process of its own and scores one part after the other."""

    def __init__(self, settings: ScoreSettings, parts: Parts, folder: str) -> None:
        setup_logging()
        os.chdir(folder)  # relative names mean here what they mean where the command was typed
        self._parts = parts
        self._pipeline = load(settings, settings.model, words=False)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Score and write parts; `batch` has their numbers and names, what comes back how many images they held."""
        images = []
        for number, names in zip(batch["number"].tolist(), batch["names"], strict=True):
            images.append(sum(score_part(self._pipeline, self._parts, number, [os.fsdecode(name) for name in names])))
        return {"images": images}


def score_with_ray(settings: ScoreSettings, parts: Parts, missing: Missing) -> Iterator[int]:
    """Score the missing parts; yields how many images were done, part by part."""
    settings = replace(settings, model=str(model_folder(settings.model).resolve()))
    with connected(settings.cluster):
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        logging.getLogger("ray.data").setLevel(logging.WARNING)
        DataContext.get_current().enable_progress_bars = False  # ours counts images, not blocks
        workers = min(settings.workers or max(settings.cluster.room(), 1), len(missing))
        # Names travel as bytes, because a file name need not be Unicode.
        items = [{"number": number, "names": [os.fsencode(n) for n in names]} for number, names in missing.items()]
        scored = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS)).map_batches(
            PartScorer,
            fn_constructor_args=(settings, parts, str(Path.cwd())),
            batch_size=1,
            compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            **settings.cluster.resources,
        )
        for row in scored.iter_rows():
            yield int(row["images"])


Engine: TypeAlias = Callable[[ScoreSettings, "Parts", Missing], Iterator[int]]


def score(settings: ScoreSettings) -> Iterator[str]:
    """Score what is not scored yet, then yield a table of the whole. Raises Incomplete when images could not be read.

    Raises ValueError when the folder holds rows of another model, other settings or other images.
    """
    listed = list_names(settings.source, settings.column, settings.root)
    from llava.jobs.bulk_parts import Parts, begin, digest_of, finish  # here, so that --help needs no pyarrow

    parts = Parts(folder=Path(settings.out), part_rows=settings.part_rows)
    asked = {name: value for name, value in to_dict(settings).items() if name not in FREE}
    images = {"images": len(listed.names), "names": digest_of(listed.names)}
    begin(parts, to_dict(settings), {"model": _model_digest(settings.model), **images, **asked})
    missing = {number: parts.names(number, listed.names) for number in parts.missing(len(listed.names))}
    todo = sum(map(len, missing.values()))
    if todo < len(listed.names):
        log.info("%s: %d of %d rows are there", parts.rows, len(listed.names) - todo, len(listed.names))
    started = time.monotonic()
    _with_progress(_engine(settings)(settings, parts, missing) if missing else (), todo)
    seconds = time.monotonic() - started
    totals = finish(parts, len(listed.names))
    yield _table(listed, totals)
    if todo:
        yield f"{todo:,} images in {seconds:.1f} s, {todo / seconds:.1f} a second, loading included\n"
    if totals.bad:
        raise Incomplete(
            f"{totals.bad:,} of {len(listed.names):,} images could not be read; {parts.bad_list} says why."
        )


def score_here(settings: ScoreSettings, parts: Parts, missing: Missing) -> Iterator[int]:
    """Score the missing parts in this process; yields how many images were done, batch by batch."""
    from llava.jobs.bulk_parts import score_part

    pipeline = load(settings, settings.model, words=False)
    for number, names in missing.items():
        yield from score_part(pipeline, parts, number, names)


def _engine(settings: ScoreSettings) -> Engine:
    if settings.engine == "local":
        return score_here

    return score_with_ray


def _model_digest(name: str) -> str:
    """Give one SHA-256 over what a model's folder says and weighs."""
    folder = model_folder(name)
    files = sorted(path for pattern in MODEL_FILES for path in folder.glob(pattern))
    return hashlib.sha256("".join(f"{path.name} {sha256_of(path)}\n" for path in files).encode()).hexdigest()


def _with_progress(done: Iterable[int], todo: int) -> None:
    """Let the work be done; with a bar on a terminal, else with a line now and then."""
    console = Console(stderr=True)
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task, last_line, count = progress.add_task("", total=todo), time.monotonic(), 0
        for more in done:
            count += more
            progress.advance(task, more)
            if not console.is_terminal and time.monotonic() - last_line > LINE_SECONDS:
                log.info("%d of %d images are scored", count, todo)
                last_line = time.monotonic()


class _Rate(ProgressColumn):
    """Shows images per second."""

    def render(self, task: Task) -> Text:
        """Give the text of the column."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} images/s")


def _table(listed: ImageList, totals: Totals) -> str:
    """Give the counts as a table."""
    table = Table("images", "count", caption=escape(f"Scope of the detector: {totals.scope}") if totals.scope else None)
    table.caption_justify = "left"
    table.columns[1].justify = "right"
    for name, count in (
        ("ok", totals.ok),
        *((f"  {label}", count) for label, count in sorted(totals.labels.items())),
        ("bad", totals.bad),
        ("named more than once", listed.duplicates),
        ("files of other kinds, left out", listed.left_out),
    ):
        table.add_row(name, f"{count:,}")
    return text_of(table)
