"""Predictions: p_fake and class scores of each item with its truth, checked strictly, kept as csv."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from llava.core.runtime import atomic_path
from llava.core.types import FAKE, LABEL_NAMES, REAL, Record

NAMED_AT_MOST = 5
ROUNDING = 1e-6  # by which P(fake) in float32 may miss p_fake
CLASS_COLUMN = "p_"  # in front of a class's name
VIDEO_COLUMNS = ("id", "label", "group", "class_name", "split", "frames", "mean", "trimmed_mean")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The score of one item: label 0 = real, 1 = fake; p_fake in [0, 1]; other fields as in Record.

    target: the detector's class that is the right answer. scores: probability of every class of the detector, in its
    order; empty where only p_fake is known.
    """

    id: str
    label: int
    p_fake: float
    video: str
    group: str
    class_name: str
    split: str = ""
    target: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)


REQUIRED_COLUMNS = tuple(f.name for f in fields(Prediction) if f.default is MISSING and f.default_factory is MISSING)
TEXT_COLUMNS = tuple(name for name in REQUIRED_COLUMNS if name not in ("label", "p_fake"))


@dataclass(frozen=True)
class Predictions:
    """Checked predictions. Raises ValueError naming bad labels, scores, targets and repeated ids.

    Either all items have scores, of the same classes, or none. A class `real` is the target of label 0 and of no
    other. A class `fake` is all that is not real: it stands in (real, fake) only, and its score is p_fake.
    """

    items: tuple[Prediction, ...]

    def __post_init__(self) -> None:
        _refuse("label other than 0 or 1", [p.id for p in self.items if p.label not in (0, 1)])
        _refuse("p_fake missing or outside [0, 1]", [p.id for p in self.items if not 0 <= p.p_fake <= 1])
        _refuse("id given more than once", [i for i, n in Counter(p.id for p in self.items).items() if n > 1])
        if not self.items:
            raise ValueError("No predictions: expected at least one; check the split and the data path.")
        _check_scores(self.items, self.classes)

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

    @property
    def classes(self) -> tuple[str, ...]:
        """The detector's K classes, in its order; () without scores."""
        return tuple(self.items[0].scores)

    @cached_property
    def scores(self) -> np.ndarray:
        """Probabilities of the classes (N, K) in [0, 1]."""
        return np.array([[p.scores[name] for name in self.classes] for p in self.items], dtype=float)

    @cached_property
    def targets(self) -> np.ndarray:
        """Right answers (N,) of int, as places in `classes`. Raises ValueError without scores."""
        if not self.classes:
            raise ValueError("These predictions hold p_fake only: targets need the scores of a detector's classes.")
        place = {name: k for k, name in enumerate(self.classes)}
        return np.array([place[p.target] for p in self.items])


def _check_scores(items: Sequence[Prediction], classes: tuple[str, ...]) -> None:
    names, known = ", ".join(classes) or "none", set(classes)
    _refuse(f"scores of other classes than ({names})", [p.id for p in items if set(p.scores) != known])
    if not classes:
        return
    if len(classes) < 2 or ("fake" in classes and classes != LABEL_NAMES):
        raise ValueError(
            f"Classes ({names}): expected two or more, and `fake` in ({', '.join(LABEL_NAMES)}) only: "
            "name the kinds of fake."
        )
    _refuse("class scores missing or outside [0, 1]", [p.id for p in items if not _are_shares(p.scores.values())])
    _refuse(f"target outside the classes ({names})", [p.id for p in items if p.target not in known])
    if "real" in classes:
        wrong = [p.id for p in items if (p.target == "real") != (p.label == REAL)]
        _refuse("target that contradicts the label (real is 0)", wrong)
    if classes == LABEL_NAMES:
        wrong = [p.id for p in items if abs(p.scores[LABEL_NAMES[FAKE]] - p.p_fake) > ROUNDING]
        _refuse("a score of the class fake that is not p_fake", wrong)


def _are_shares(values: Iterable[float]) -> bool:
    return all(0 <= value <= 1 for value in values)


def from_records(
    records: Iterable[Record],
    p_fake: Iterable[float],
    targets: Sequence[int] | np.ndarray | None = None,
    scores: np.ndarray | None = None,
    classes: Sequence[str] = (),
) -> Predictions:
    """Join records with their scores, in order.

    targets: (N,) of int, places in `classes`; scores: (N, K) of the K classes; all three are given, or none. Raises
    ValueError when a label or target is unknown or the lengths differ.
    """
    pairs = list(zip(records, p_fake, strict=True))
    _refuse("label other than 0 or 1", [r.id for r, _ in pairs if r.label is None])
    given = _class_fields([r.id for r, _ in pairs], targets, scores, classes)
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
                target=target,
                scores=of_classes,
            )
            for (r, score), (target, of_classes) in zip(pairs, given, strict=True)
        )
    )


def _class_fields(
    ids: Sequence[str], targets: Sequence[int] | np.ndarray | None, scores: np.ndarray | None, classes: Sequence[str]
) -> list[tuple[str, dict[str, float]]]:
    """Give target and scores by name of each item; empty ones where all three are missing."""
    if targets is None and scores is None and not classes:
        return [("", {}) for _ in ids]
    if targets is None or scores is None or not classes:
        raise ValueError("targets, scores and classes belong together: expected all three or none.")
    places, values = np.asarray(targets), np.asarray(scores, dtype=float)
    if places.shape != (len(ids),) or values.shape != (len(ids), len(classes)):
        raise ValueError(
            f"expected targets ({len(ids)},) and scores ({len(ids)}, {len(classes)}) of {len(ids)} records and "
            f"classes {', '.join(classes)}, got {places.shape} and {values.shape}."
        )
    outside = [i for i, k in zip(ids, places, strict=True) if not 0 <= k < len(classes)]
    _refuse(f"target outside 0 to {len(classes) - 1} ({', '.join(classes)})", outside)
    rows = zip(places, values.tolist(), strict=True)
    return [(classes[int(k)], dict(zip(classes, row, strict=True))) for k, row in rows]


def by_video(predictions: Predictions, trim: float = 0.0) -> Predictions:
    """Average the frames of each video into one prediction whose id is the video.

    trim: fraction of the frames dropped at each end before averaging, in [0, 0.5); the published score drops the
    10 lowest and 10 highest of 100 frames, trim = 0.1. The score of each class is averaged by itself, each without
    its own extremes, so trimmed scores need not sum to one. They are left so: dividing by their sum would change no
    answer, and P(real) + p_fake would miss one. Raises ValueError when the frames of a video differ in label, group,
    class or target.
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim: expected a fraction in [0, 0.5), got {trim}.")
    frames: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        frames.setdefault(prediction.video, []).append(prediction)
    _refuse(
        "frames that differ in label, group, class or target",
        [v for v, ps in frames.items() if len({(p.label, p.group, p.class_name, p.target) for p in ps}) > 1],
        what="video",
    )
    return Predictions(tuple(_video_score(video, ps, trim) for video, ps in frames.items()))


def _video_score(video: str, frames: Sequence[Prediction], trim: float) -> Prediction:
    scores = {name: _mean([p.scores[name] for p in frames], trim) for name in frames[0].scores}
    return replace(frames[0], id=video, p_fake=_mean([p.p_fake for p in frames], trim), scores=scores)


def _mean(values: Sequence[float], trim: float) -> float:
    from scipy.stats import trim_mean  # here, because it loads for half a second

    return min(1.0, max(0.0, float(trim_mean(values, trim))))


def write_csv(path: str | Path, predictions: Predictions) -> None:
    """Write predictions as csv, atomically; scores keep every digit.

    Columns: the fields of Prediction; `target` where an item has one; `p_<class>` per class where there are scores. The
    class `fake` has no column of its own: its score is p_fake.
    """
    names = [*REQUIRED_COLUMNS, "split", *(["target"] if any(p.target for p in predictions) else [])]
    classes = [name for name in predictions.classes if name != "fake"]
    with atomic_path(path) as staged, staged.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, *(CLASS_COLUMN + name for name in classes)])
        writer.writerows(
            [*(getattr(p, name) for name in names), *(p.scores[name] for name in classes)] for p in predictions
        )


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
    """Read what `write_csv` wrote; `split`, and `target` with its scores, may be missing.

    `p_<class>` columns are read beside a `target` only. One of them, p_real, is that of the classes (real, fake).
    Raises FileNotFoundError, or ValueError naming file, line and column.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Predictions {str(path)!r} do not exist; score a split first.")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or ())
        missing = [name for name in REQUIRED_COLUMNS if name not in columns]
        if missing:
            raise ValueError(f"{str(path)!r} lacks the column(s) {', '.join(missing)}.")
        classes = _classes_of(columns)
        items = tuple(_from_row(row, classes, f"{str(path)!r}, line {reader.line_num}") for row in reader)
    return Predictions(items)


def _classes_of(columns: Sequence[str]) -> tuple[str, ...]:
    """Give the classes that a csv has scores of."""
    if "target" not in columns:
        return ()
    scored = [c for c in columns if c.startswith(CLASS_COLUMN) and c != "p_fake"]
    classes = tuple(column.removeprefix(CLASS_COLUMN) for column in scored)
    return LABEL_NAMES if classes == ("real",) else classes


def _from_row(row: dict[str, str], classes: Sequence[str], where: str) -> Prediction:
    try:
        label, p_fake = int(row["label"]), float(row["p_fake"] or math.nan)
    except (TypeError, ValueError):
        raise ValueError(
            f"{where}: label {row['label']!r} must be 0 or 1 and p_fake {row['p_fake']!r} a number in [0, 1]."
        ) from None
    texts = {name: row[name] for name in TEXT_COLUMNS}
    _refuse("empty field", [where for value in texts.values() if not value], what="row")
    texts |= {name: row.get(name) or "" for name in ("split", "target")}
    scores = {name: _class_score(row, CLASS_COLUMN + name, where) for name in classes}
    return Prediction(label=label, p_fake=p_fake, scores=scores, **texts)


def _class_score(row: dict[str, str], column: str, where: str) -> float:
    try:
        return float(row[column] or math.nan)
    except ValueError:
        raise ValueError(f"{where}: {column} {row[column]!r} must be a number in [0, 1].") from None


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
