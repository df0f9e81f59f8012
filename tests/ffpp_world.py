"""A tiny FaceForensics++ in its published HDF5 layout: noise faces, forged ones with a checkerboard."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from llava.data.public_sets import file_name, keys_of

Pairs = Sequence[tuple[str, str]]
SPLITS = {"train": [("071", "054"), ("087", "081")], "val": [("720", "672")], "test": [("953", "974")]}


def numbered(kind: str, key: str, frames: int = 5, side: int = 16) -> np.ndarray:
    """Draw a clip whose frame n has the grey level n."""
    return np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, side, side, 3))


def write_splits(folder: Path, splits: Mapping[str, Pairs] = SPLITS) -> Path:
    """Write train.json, val.json and test.json, lists of [id, id]."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in splits.items():
        (folder / f"{name}.json").write_text(json.dumps(pairs), encoding="utf-8")
    return folder


def write_kind(
    folder: Path,
    kind: str,
    keys: Sequence[str],
    draw: Callable[[str, str], np.ndarray] = numbered,
    is_test_only: bool = False,
) -> Path:
    """Write FF++_KIND_c40.h5 as published: one uint8 data set (frames, H, W, 3) for each video."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(kind, "c40", is_test_only)
    with h5py.File(path, "w") as file:
        for key in keys:
            file.create_dataset(key, data=draw(kind, key))
    return path


def write_ffpp(
    folder: Path,
    kinds: Sequence[str],
    splits: Mapping[str, Pairs] = SPLITS,
    draw: Callable[[str, str], np.ndarray] = numbered,
) -> Path:
    """Write the files of some kinds with every video of the splits; gives the folder, `splits` in it."""
    pairs = [pair for part in splits.values() for pair in part]
    for kind in kinds:
        write_kind(folder, kind, keys_of(kind, pairs), draw)
    write_splits(folder / "splits", splits)
    return folder
