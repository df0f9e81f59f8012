"""What people see in a terminal: tables, and bars of progress; plain and wide where the output goes elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table

T = TypeVar("T")
PIPE_WIDTH = 120
PATHS_WIDTH = 200  # of tables that name files, so that other programs find a path on one line
NO_LIMIT = 10_000


def progress(items: Sequence[T] | Iterable[T], title: str, is_kept: bool = False) -> Iterable[T]:
    """Give items with a bar on standard error, where that is a terminal; is_kept: it stays when all is done."""
    console = Console(stderr=True)
    return track(items, title, console=console, transient=not is_kept, disable=not console.is_terminal)


def console() -> Console:
    """Give a console that is wide enough for every table, also when its output goes into a file."""
    return Console(width=max(Console().width, PIPE_WIDTH), highlight=False)


def window() -> Console:
    """Give a console as wide as the window on a terminal, and wide enough for paths in a file or pipe."""
    return Console(width=None if sys.stdout.isatty() else PATHS_WIDTH, highlight=False)


def text_of(*parts: Any, on: Console | None = None) -> str:
    """Give tables and lines as they would be printed; on: where, None = `console`."""
    out = on or console()
    with out.capture() as captured:
        for part in parts:
            out.print(part)
    return captured.get()


def titled_table(title: str, *columns: str) -> Table:
    """Give an empty table with a title and these columns."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column)
    return table


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Give rows as lines with aligned columns and without a frame, for a log or another program."""
    grid = Table.grid(padding=(0, 2))
    for row in rows:
        grid.add_row(*row)
    plain = Console(width=NO_LIMIT, markup=False, highlight=False, color_system=None)
    return [line.rstrip() for line in text_of(grid, on=plain).splitlines()]
