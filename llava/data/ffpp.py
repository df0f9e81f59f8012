"""FaceForensics++ as published for training: names of files and keys, and the official splits (Rössler et al. 2019)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from llava.data.splits import connected_groups

ORIGINAL = "original"
Kind = Literal["original", "Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures", "FaceShifter"]
KINDS: tuple[str, ...] = get_args(Kind)
Pair = tuple[str, str]


def file_name(kind: str, compression: str, is_test_only: bool = False) -> str:
    """Give the name of the HDF5 file that holds one kind of video."""
    return f"FF++_{kind}_{compression}{'_test_only' if is_test_only else ''}.h5"


def keys_of(kind: str, pairs: Sequence[Pair]) -> list[str]:
    """Give the videos of one kind that pairs of ids stand for, each once.

    Originals are `071` and `054`; fakes `071_054` and `054_071`, the first id the target, the second the source.
    """
    if kind == ORIGINAL:
        return list(dict.fromkeys(name for pair in pairs for name in pair))
    return list(dict.fromkeys(key for a, b in pairs for key in (f"{a}_{b}", f"{b}_{a}")))


def read_pairs(path: Path) -> list[Pair]:
    """Read an official split file, a list of [id, id]. Raises FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"Split file {str(path)!r} does not exist; give `splits`, the folder of the official train.json, val.json "
            "and test.json."
        )
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}).") from None
    wrong = [pair for pair in pairs if not _is_pair(pair)] if isinstance(pairs, list) else [pairs]
    if wrong:
        raise ValueError(
            f"{path}: {str(wrong[0])[:60]!r} is no pair of video ids; expected a list of [id, id], ids without _."
        )
    return [(a, b) for a, b in pairs]


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(v, str) and v and "_" not in v for v in pair)


def group_names(splits: Mapping[str, Sequence[Pair]]) -> dict[str, str]:
    """Give the group of each id: ids that share a pair, directly or through others, in any split, are one group."""
    pairs = [pair for part in splits.values() for pair in part]
    groups = connected_groups(pairs)
    return {name: group for pair, group in zip(pairs, groups, strict=True) for name in pair}
