"""Predictions: one p_fake per item with its label, checked strictly, kept as csv."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from llava.core.runtime import atomic_path
from llava.core.types import Record

NAMED_AT_MOST = 5
VIDEO_COLUMNS = ("id", "label", "group", "class_name", "split", "frames", "mean", "trimmed_mean")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The score of one item: label 0 = real, 1 = fake; p_fake in [0, 1]; other fields as in Record."""

    id: str
    label: int
    p_fake: float
    video: str
    group: str
    class_name: str
    split: str = ""


@dataclass(frozen=True)
class Predictions:
    """Checked predictions. Raises ValueError naming bad labels, scores and repeated ids."""

    items: tuple[Prediction, ...]

    def __post_init__(self) -> None:
        _refuse("label other than 0 or 1", [p.id for p in self.items if p.label not in (0, 1)])
        _refuse("p_fake missing or outside [0, 1]", [p.id for p in self.items if not 0 <= p.p_fake <= 1])
        _refuse("id given more than once", [i for i, n in Counter(p.id for p in self.items).items() if n > 1])
        if not self.items:
            raise ValueError("No predictions: expected at least one; check the split and the data path.")

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.items)

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels (N,) of int, 1 = fake."""
        return np.array([p.label for p in self.items])

    @cached_property
    def p_fake(self) -> np.ndarray:
        """Scores (N,) in [0, 1]."""
        return np.array([p.p_fake for p in self.items], dtype=float)

    @cached_property
    def videos(self) -> np.ndarray:
        """Names of videos (N,)."""
        return np.array([p.video for p in self.items])

    @cached_property
    def groups(self) -> np.ndarray:
        """Names of groups (N,)."""
        return np.array([p.group for p in self.items])

    @cached_property
    def class_names(self) -> np.ndarray:
        """Names of classes (N,): `real` or the kind of fake."""
        return np.array([p.class_name for p in self.items])


def from_records(records: Iterable[Record], p_fake: Iterable[float]) -> Predictions:
    """Join records with their scores, in order. Raises ValueError when a label is unknown or the lengths differ."""
    pairs = list(zip(records, p_fake, strict=True))
    _refuse("label other than 0 or 1", [r.id for r, _ in pairs if r.label is None])
    return Predictions(
        tuple(
            Prediction(
                id=r.id,
                label=int(r.label or 0),
                p_fake=float(score),
                video=r.video,
                group=r.group,
                class_name=r.class_name,
                split=r.split,
            )
            for r, score in pairs
        )
    )


def by_video(predictions: Predictions, trim: float = 0.0) -> Predictions:
    """Average the frames of each video into one prediction whose id is the video.

    trim: fraction of the frames dropped at each end before averaging, in [0, 0.5); the published score drops the
    10 lowest and 10 highest of 100 frames, trim = 0.1. Raises ValueError when the frames of a video differ in
    label, group or class.
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim: expected a fraction in [0, 0.5), got {trim}.")
    frames: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        frames.setdefault(prediction.video, []).append(prediction)
    _refuse(
        "frames that differ in label, group or class",
        [v for v, ps in frames.items() if len({(p.label, p.group, p.class_name) for p in ps}) > 1],
        what="video",
    )
    return Predictions(tuple(_video_score(video, ps, trim) for video, ps in frames.items()))


def _video_score(video: str, frames: list[Prediction], trim: float) -> Prediction:
    from scipy.stats import trim_mean  # here, because it loads for half a second

    mean = float(trim_mean([p.p_fake for p in frames], trim))
    values = asdict(frames[0]) | {"id": video, "p_fake": min(1.0, max(0.0, mean))}
    return Prediction(**values)


def write_csv(path: str | Path, predictions: Predictions) -> None:
    """Write predictions as csv, atomically; scores keep every digit."""
    names = [f.name for f in fields(Prediction)]
    with atomic_path(path) as staged, staged.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(asdict(p) for p in predictions)


def write_videos_csv(path: str | Path, predictions: Predictions, trim: float) -> None:
    """Write one row per video: its fields, how many frames it has, their mean p_fake and the mean trimmed by `trim`."""
    frames = Counter(predictions.videos.tolist())
    pairs = zip(by_video(predictions), by_video(predictions, trim), strict=True)
    with atomic_path(path) as staged, staged.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(VIDEO_COLUMNS)
        writer.writerows(
            (v.id, v.label, v.group, v.class_name, v.split, frames[v.id], v.p_fake, trimmed.p_fake)
            for v, trimmed in pairs
        )


def read_csv(path: str | Path) -> Predictions:
    """Read what `write_csv` wrote. Raises FileNotFoundError, or ValueError naming file, line and column."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Predictions {str(path)!r} do not exist; score a split first.")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [f.name for f in fields(Prediction) if f.name != "split" and f.name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{str(path)!r} lacks the column(s) {', '.join(missing)}.")
        items = tuple(_from_row(row, f"{str(path)!r}, line {reader.line_num}") for row in reader)
    return Predictions(items)


def _from_row(row: dict[str, str], where: str) -> Prediction:
    try:
        label, p_fake = int(row["label"]), float(row["p_fake"] or math.nan)
    except (TypeError, ValueError):
        raise ValueError(
            f"{where}: label {row['label']!r} must be 0 or 1 and p_fake {row['p_fake']!r} a number in [0, 1]."
        ) from None
    texts = {name: row[name] for name in ("id", "video", "group", "class_name")}
    _refuse("empty field", [where for value in texts.values() if not value], what="row")
    return Prediction(label=label, p_fake=p_fake, split=row.get("split") or "", **texts)


def refuse_shared_groups(validation: Predictions, test: Predictions) -> None:
    """Raise ValueError when what is chosen on validation would be measured on the same groups."""
    shared = sorted(set(validation.groups) & set(test.groups))
    if shared:
        raise ValueError(
            f"Validation and test share {len(shared)} groups ({', '.join(shared[:5])}); choose on other groups."
        )


def _refuse(problem: str, names: list[str], what: str = "prediction") -> None:
    if names:
        more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
        shown = ", ".join(repr(n) for n in names[:NAMED_AT_MOST])
        raise ValueError(f"{len(names)} {what}(s) with {problem}: {shown}{more}.")
