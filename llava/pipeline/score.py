"""`m2f2 score`: one row for every image of a folder or list, as parquet; a run that was cut off goes on."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from llava.core.config import to_dict
from llava.core.errors import Incomplete
from llava.core.weights import sha256_of
from llava.data.image_lists import ImageList, list_names
from llava.pipeline.loading import load
from llava.pipeline.score_settings import Missing, ScoreSettings
from llava.pipeline.tables import PIPE_WIDTH

if TYPE_CHECKING:
    from llava.pipeline.score_parts import Parts, Totals

log = logging.getLogger(__name__)
Engine: TypeAlias = Callable[[ScoreSettings, "Parts", Missing], Iterator[int]]
LINE_SECONDS = 30.0
MODEL_FILES = ("*.json", "*.safetensors")
# What does not change a row, so that a run may go on with another value.
FREE = ("source", "out", "model", "column", "root", "engine", "workers", "cluster")


def score(settings: ScoreSettings) -> Iterator[str]:
    """Score what is not scored yet, then yield a table of the whole. Raises Incomplete when images could not be read.

    Raises ValueError when the folder holds rows of another model, other settings or other images.
    """
    listed = list_names(settings.source, settings.column, settings.root)
    from llava.pipeline.score_parts import Parts, begin, digest_of, finish  # here, so that --help needs no pyarrow

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
    from llava.pipeline.score_parts import score_part

    pipeline = load(settings, settings.model)
    for number, names in missing.items():
        yield from score_part(pipeline, parts, number, names)


def _engine(settings: ScoreSettings) -> Engine:
    if settings.engine == "local":
        return score_here
    from llava.pipeline.score_ray import score_with_ray

    return score_with_ray


def _model_digest(name: str) -> str:
    """Give one SHA-256 over what a model's folder says and weighs."""
    from llava.explainer.convert import ready

    folder = ready(name)
    files = sorted(path for pattern in MODEL_FILES for path in folder.glob(pattern))
    return hashlib.sha256("".join(f"{path.name} {sha256_of(path)}\n" for path in files).encode()).hexdigest()


def _with_progress(done: Iterable[int], todo: int) -> None:
    """Let the work be done; with a bar on a terminal, else with a line now and then."""
    console = Console(stderr=True)
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task, told, count = progress.add_task("", total=todo), time.monotonic(), 0
        for more in done:
            count += more
            progress.advance(task, more)
            if not console.is_terminal and time.monotonic() - told > LINE_SECONDS:
                log.info("%d of %d images are scored", count, todo)
                told = time.monotonic()


class _Rate(ProgressColumn):
    """Shows images per second."""

    def render(self, task: Task) -> Text:
        """Give the text of the column."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} images/s")


def _table(listed: ImageList, totals: Totals) -> str:
    """Give the counts as a table."""
    table = Table("images", "count")
    table.columns[1].justify = "right"
    for name, count in (
        ("ok", totals.ok),
        *((f"  {label}", count) for label, count in sorted(totals.labels.items())),
        ("bad", totals.bad),
        ("named more than once", listed.duplicates),
        ("files of other kinds, left out", listed.left_out),
    ):
        table.add_row(name, f"{count:,}")
    console = Console(width=PIPE_WIDTH)
    with console.capture() as captured:
        console.print(table)
    return captured.get()
