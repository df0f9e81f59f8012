"""Where image files lie: a folder, or a zip archive that stands for one."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol
from zipfile import BadZipFile, ZipFile, is_zipfile

log = logging.getLogger(__name__)
MEMBER_MARK = "::"
NAMED_AT_MOST = 5


class ImageStore(Protocol):
    """Finds image files by the relative names that tables and conversations use."""

    def locate(self, name: str) -> str | None:
        """Give where `name` lies, for `stored_image`, or None when it is absent."""

    def names(self, folder: str) -> list[str]:
        """List the file names directly in `folder`, sorted."""


class FolderStore:
    """Image files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def locate(self, name: str) -> str | None:
        """Give the path of `name` below the root, or None."""
        path = self.root / name
        return str(path) if path.is_file() else None

    def names(self, folder: str) -> list[str]:
        """List the files of a sub-folder; none when it does not exist."""
        path = self.root / folder
        return sorted(p.name for p in path.iterdir() if p.is_file()) if path.is_dir() else []


class ZipStore:
    """Image files in a zip archive; one leading folder inside the archive (`c40/train/…`) is looked through."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with ZipFile(path) as archive:
            members = [m.filename for m in archive.infolist() if not m.is_dir()]
        self._members = set(members)
        tops = {m.split("/", 1)[0] for m in members}
        nested = len(tops) == 1 and all("/" in m for m in members)
        self._prefix = f"{tops.pop()}/" if nested else ""

    def _member(self, name: str) -> str | None:
        for candidate in (name, self._prefix + name):
            if candidate in self._members:
                return candidate
        return None

    def locate(self, name: str) -> str | None:
        """Give `archive::member` of `name`, or None."""
        member = self._member(name)
        return f"{self.path}{MEMBER_MARK}{member}" if member else None

    def names(self, folder: str) -> list[str]:
        """List the files of a folder inside the archive."""
        starts = {f"{folder}/", f"{self._prefix}{folder}/"}
        split = (m.rpartition("/") for m in self._members)
        return sorted({name for parent, slash, name in split if parent + slash in starts})


def open_store(root: str | Path) -> ImageStore:
    """Open a folder or a zip; a missing folder `x` is looked for as `x.zip`. Raises FileNotFoundError."""
    path = Path(root)
    if path.is_dir():
        return FolderStore(path)
    for archive in (path, path.with_name(path.name + ".zip")):
        if archive.is_file() and is_zipfile(archive):
            return ZipStore(archive)
    raise FileNotFoundError(
        f"Image folder {str(root)!r} does not exist, nor {path.name + '.zip'!r}; give a folder or zip."
    )


def stored_image(where: str) -> Path | bytes:
    """Give what `read_image` reads: the path of a file, or the bytes of an archive's member.

    Raises KeyError, OSError or BadZipFile for a member that is not there or cannot be unpacked.
    """
    archive, mark, member = where.partition(MEMBER_MARK)
    if not mark:
        return Path(where)
    try:
        return _open_zip(archive, os.getpid()).read(member)
    except (RuntimeError, zlib.error) as error:
        raise BadZipFile(f"{where}: locked, damaged or packed in an unknown way ({error}).") from error


def require_files(names: Sequence[str], store: ImageStore, what: str) -> list[str]:
    """Locate every name. Raises FileNotFoundError that counts the missing ones and lists the first five."""
    places = [store.locate(name) for name in names]
    missing = [name for name, place in zip(names, places, strict=True) if place is None]
    if missing:
        first = ", ".join(missing[:5])
        raise FileNotFoundError(
            f"{what}: {len(missing)} of {len(names)} image files are missing (first: {first}); "
            "check `root`, the folder that relative names start from."
        )
    return [place for place in places if place is not None]


def report_missing(missing: Mapping[str, Sequence[str]], is_allowed: bool) -> None:
    """Name the videos that splits name and a place lacks: all of them in a warning, or some in a ValueError."""
    lacking = {place: names for place, names in missing.items() if names}
    if is_allowed:
        for place, names in lacking.items():
            log.warning("%s lacks %d videos that the splits name: %s", place, len(names), ", ".join(names))
    elif lacking:
        places = "; ".join(f"{p}: {len(n)} ({', '.join(n[:NAMED_AT_MOST])})" for p, n in lacking.items())
        raise ValueError(
            f"{sum(map(len, lacking.values()))} videos that the splits name are missing. First of each place: "
            f"{places}. Complete the files, or leave these videos out by --data.allow_missing true."
        )


@lru_cache(maxsize=8)
def _open_zip(path: str, process: int) -> ZipFile:
    """Keep an archive open per process: a file handle shared after a fork would mix up reads."""
    return ZipFile(path)
