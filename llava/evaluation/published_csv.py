"""The published result csv to and from our predictions, and its video scores as they were computed and corrected."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Context, Decimal, InvalidOperation
from itertools import groupby
from pathlib import Path
from typing import TextIO

import numpy as np

from llava.core.registry import nearest
from llava.core.runtime import atomic_path
from llava.core.types import FAKE, REAL, Record
from llava.data.splits import connected_groups
from llava.evaluation.metrics import RankedScores
from llava.evaluation.predictions import Prediction, Predictions, read_csv

COLUMNS = ("image_id", "ground_truth", "prediction")
KINDS = ("real", "Deepfakes", "FaceSwap", "NeuralTextures", "Face2Face")  # in the order of the files' numbers
CUT_FRAMES = 10
THRESHOLDS = np.arange(0, 1.1, 1e-4)
# image_id: number of the file, key of the video (an original's id, or target and source of a fake), frame
_IMAGE_ID = re.compile(r"(?P<video>(?P<file>\d)_(?P<key>\d+|\d+_\d+))_(?P<frame>\d+)")
_KEYS = (re.compile(r"(?<!\d)\d{3}$"), re.compile(r"(?<!\d)\d{3}_\d{3}$"))
_FRAME = re.compile(r"(\d+)(\.\w+)?$")
_EXACT = Context(prec=400)  # 1 - p keeps every digit of the smallest float


@dataclass(frozen=True)
class VideoScores:
    """AUC of trimmed video means, and the accuracy at the best threshold, which is sought on these same videos."""

    auc: float
    best_accuracy: float
    videos: int


def read_predictions(path: str | Path) -> Predictions:
    """Read our csv or the published one, told apart by the header. Raises as `read_csv` and `read_published` do."""
    return read_published(path) if is_published(path) else read_csv(path)


def is_published(path: str | Path) -> bool:
    """Say whether a csv has the published header. Raises FileNotFoundError."""
    with _opened(path) as file:
        return set(COLUMNS) <= set(next(csv.reader(file), []))


def read_published(path: str | Path) -> Predictions:
    """Read image_id, ground_truth (1 = real) and prediction (P(real)) as label (1 = fake) and p_fake.

    A video is an image_id without its frame; videos that share an id (071, 054, 071_054), directly or through others,
    form one group. Raises FileNotFoundError, or ValueError naming line and column.
    """
    with _opened(path) as file:
        reader = csv.DictReader(file, strict=True)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{str(path)!r} lacks the column(s) {', '.join(missing)}.")
        rows = [_parsed(row, f"{str(path)!r}, line {reader.line_num}") for row in reader]
    groups = connected_groups([row.group.split("_") for row in rows])
    return Predictions(tuple(replace(row, group=group) for row, group in zip(rows, groups, strict=True)))


def write_published(path: str | Path, predictions: Predictions) -> None:
    """Write predictions on FaceForensics++ in the published form, atomically; read again they are equal, bit by bit.

    Raises ValueError as `published_ids` does.
    """
    ids = published_ids(predictions)
    with atomic_path(path) as staged, staged.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(
            (name, int(p.label == REAL), _EXACT.subtract(Decimal(1), Decimal(repr(p.p_fake))))
            for name, p in zip(ids, predictions, strict=True)
        )


def published_ids(items: Iterable[Record | Prediction]) -> list[str]:
    """Give the image_id of each item: number of its class_name, key that `video` and frame that `id` ends with.

    Raises ValueError when one of them is missing, or two items would get the same image_id.
    """
    ids = [_image_id(item) for item in items]
    twice = next((name for name, count in Counter(ids).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"image_id {twice!r} would be given twice; write one compression and one set per file.")
    return ids


def published_scores(predictions: Predictions) -> dict[str, VideoScores]:
    """Score videos as M2F2-Det's stage_1_detection_inference.py does ("published"), and without its slip ("corrected").

    Both average P(real) over a video's frames without the 10 lowest and the 10 highest, and give the accuracy at the
    best threshold on these very videos. As published, each run of frames of one video gets the truth of the next
    run, and the last run is dropped. Raises ValueError when a video has too few frames, or a class none.
    """
    runs = [list(run) for _, run in groupby(predictions, key=lambda p: p.video)]
    whole: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        whole.setdefault(prediction.video, []).append(prediction)
    truths = [run[0].label for run in runs]
    return {
        "published": _video_scores(runs[:-1], truths[1:]),
        "corrected": _video_scores(list(whole.values()), [frames[0].label for frames in whole.values()]),
    }


def _video_scores(videos: Sequence[list[Prediction]], truths: Sequence[int]) -> VideoScores:
    short = [frames[0].video for frames in videos if len(frames) <= 2 * CUT_FRAMES]
    if short:
        raise ValueError(
            f"{len(short)} of {len(videos)} videos have {2 * CUT_FRAMES} frames or fewer (first: {short[0]!r}); "
            f"the published score drops the {CUT_FRAMES} lowest and the {CUT_FRAMES} highest."
        )
    if len(set(truths)) < 2:
        raise ValueError("The published score needs videos of both classes, got one class; give another csv.")
    labels = np.array(truths)
    p_real = np.array([np.sort([1 - f.p_fake for f in v])[CUT_FRAMES:-CUT_FRAMES].mean() for v in videos])  # (V,)
    is_right = (p_real[:, None] >= THRESHOLDS) == (labels[:, None] == REAL)  # (V, thresholds)
    auc = RankedScores(labels, 1 - p_real).curve().auc()
    return VideoScores(auc, float(is_right.mean(axis=0).max()), len(videos))


def _opened(path: str | Path) -> TextIO:
    if not Path(path).is_file():
        raise FileNotFoundError(f"Predictions {str(path)!r} do not exist; score a split first.")
    return Path(path).open(newline="", encoding="utf-8")


def _parsed(row: dict[str, str], where: str) -> Prediction:
    """Give a row's prediction, its group still the key of its video. Raises ValueError naming `where`."""
    if None in row or None in row.values():
        raise ValueError(f"{where}: not as many values as the header has names.")
    found = _IMAGE_ID.fullmatch(row["image_id"])
    if found is None or int(found["file"]) >= len(KINDS):
        raise ValueError(
            f"{where}: image_id {row['image_id']!r} must be FILE_KEY_FRAME, as 0_071_5 or 1_071_054_5; files: "
            f"{', '.join(f'{i} {name}' for i, name in enumerate(KINDS))}."
        )
    kind, key = KINDS[int(found["file"])], found["key"]
    label = REAL if kind == "real" else FAKE
    if ("_" in key) != (label == FAKE):
        raise ValueError(f"{where}: image_id {row['image_id']!r}: an original has one id in its key, a fake two.")
    if row["ground_truth"] != str(int(label == REAL)):
        raise ValueError(
            f"{where}: ground_truth {row['ground_truth']!r} of {row['image_id']!r}; 1 is real (file 0), 0 is fake."
        )
    p_fake = _p_fake(row["prediction"], where)
    return Prediction(id=row["image_id"], label=label, p_fake=p_fake, video=found["video"], group=key, class_name=kind)


def _p_fake(prediction: str, where: str) -> float:
    try:
        p_fake = float(_EXACT.subtract(Decimal(1), Decimal(prediction)))
    except InvalidOperation:
        p_fake = float("nan")
    if not 0 <= p_fake <= 1:
        raise ValueError(f"{where}: prediction {prediction!r} must be P(real), a number in [0, 1].")
    return p_fake


def _image_id(item: Record | Prediction) -> str:
    if item.class_name not in KINDS:
        raise ValueError(
            f"{item.id!r}: the published csv has no kind {item.class_name!r}. {nearest(item.class_name, KINDS)}"
        )
    # An original's key is its last id, also behind the number of its file, as in 0_071.
    key, frame = _KEYS[item.label == FAKE].search(item.video), _FRAME.search(item.id)
    if key is None or frame is None or item.id == item.video:
        raise ValueError(
            f"{item.id!r} of video {item.video!r}: a video must end with its FaceForensics++ key (071, of a fake "
            "071_054), and an id with the number of its frame."
        )
    return f"{KINDS.index(item.class_name)}_{key[0]}_{int(frame[1])}"
