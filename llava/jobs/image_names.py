"""Millions of images by name: a folder, a zip, a list, a csv or parquet file; no image is opened."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile, is_zipfile

from llava.core.registry import nearest
from llava.data.images import IMAGE_SUFFIXES
from llava.data.inputs import expand, is_url, is_video

LIST_SUFFIXES = (".txt", ".csv", ".parquet")


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
