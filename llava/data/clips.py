"""Clips kept in HDF5 files, one data set each, that are read frame by frame."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from llava.data.images import UnreadableImage, read_image

HDF5_SUFFIXES = (".h5", ".hdf5")
# Frames are read in random order, so a chunk kept in memory would hardly ever be asked for again.
NO_CHUNK_CACHE = {"rdcc_nbytes": 0}


class UnreadableClip(UnreadableImage):
    """A clip or file of clips that is refused; the message names it and the reason."""


@contextmanager
def open_clips(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading. Raises FileNotFoundError, or UnreadableClip for a damaged file."""
    with _open(str(path)) as file:
        yield file


def clips_in(file: h5py.File) -> dict[str, h5py.Dataset]:
    """Give every data set of a file by its name, those in groups too (`group/name`); no pixel is read."""
    found: dict[str, h5py.Dataset] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item

    file.visititems(visit)
    return found


def frame_count(clip: h5py.Dataset) -> int:
    """Count the frames of a clip: uint8 (T, H, W, 3) RGB, or (T,) of encoded pictures, bytes of a JPEG or PNG each.

    Raises UnreadableClip for a data set of another form, or without frames.
    """
    is_raw = clip.dtype == np.uint8 and clip.ndim == 4 and clip.shape[-1] == 3
    is_encoded = h5py.check_vlen_dtype(clip.dtype) == np.uint8 and clip.ndim == 1
    if not is_raw and not is_encoded:
        raise UnreadableClip(
            f"{_name(clip)}: {clip.dtype} {clip.shape} is no clip; expected uint8 (frames, height, width, 3) RGB, or "
            "(frames,) of encoded pictures as scripts/pack_hdf5.py writes them."
        )
    if not len(clip):
        raise UnreadableClip(f"{_name(clip)}: a clip without frames; pack or download it again.")
    return len(clip)


def read_frame(clip: h5py.Dataset, number: int) -> np.ndarray:
    """Read one frame, uint8 RGB (H, W, 3), and nothing else of the clip. Raises UnreadableClip or UnreadableImage."""
    try:
        stored = clip[number]
    except OSError as error:
        raise UnreadableClip(
            f"{_name(clip)}: frame {number} is damaged ({error}); pack or download it again."
        ) from error
    return read_image(stored.tobytes(), f"{_name(clip)}, frame {number}") if stored.ndim == 1 else stored


class ClipFiles:
    """HDF5 files that stay open, one handle for each file and process, opened in the process that reads.

    A handle that a worker inherits by fork is closed there and opened anew; one is never pickled.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._files: dict[str, h5py.File] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_process": -1, "_files": {}}

    def clip(self, path: str, key: str) -> h5py.Dataset:
        """Give a clip for `read_frame`. Raises FileNotFoundError or UnreadableClip."""
        if self._process != os.getpid():
            for inherited in self._files.values():
                inherited.close()
            self._process, self._files = os.getpid(), {}
        if path not in self._files:
            self._files[path] = _open(path)
        try:
            return self._files[path][key]
        except KeyError as error:
            raise UnreadableClip(f"{path}: clip {key!r} is not there or damaged ({error}).") from error


def _open(path: str) -> h5py.File:
    if not Path(path).is_file():
        raise FileNotFoundError(f"HDF5 file {path!r} does not exist.")
    try:
        return h5py.File(path, "r", **NO_CHUNK_CACHE)
    except OSError as error:
        raise UnreadableClip(f"{path}: damaged, or no HDF5 file ({error}); pack or download it again.") from error


def _name(clip: h5py.Dataset) -> str:
    return f"{clip.file.filename}{clip.name}"
