"""A folder of parquet parts, a row an image, that is filled part by part; a run that was cut off goes on."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llava.core.runtime import atomic_path, batched, write_run
from llava.data.inputs import NamedImage, NamedInput, is_video, open_input

if TYPE_CHECKING:
    from llava.core.types import Verdict
    from llava.detectors.base import Detector
    from llava.pipeline.pipeline import Pipeline

OK, BAD = "ok", "bad"
A_VIDEO = "a video; one row is one image, and `m2f2 detect` judges videos."
TEXTS = ("label", "risk_band", "reason", "detector", "calibration")
NUMBERS = ("p_fake", "low", "high", "raw_p_fake", "threshold", "likelihood_ratio", "prior")
BOX = ("box_x", "box_y", "box_width", "box_height")
MARKS = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")
LANDMARKS = tuple(f"{mark}_{axis}" for mark in MARKS for axis in "xy")
COMPRESSION = "zstd"
SCOPE = "scope"


def schema_of(detector: Detector) -> pa.Schema:
    """Give the columns; all but path, sha256, status and problem are empty where an image could not be read.

    The metadata hold the detector's scope.
    """
    named = [f"probability_{name}" for name in detector.classes]
    named += [f"evidence_{name}" for name in detector.evidence_names]
    return pa.schema(
        [
            *((name, pa.string()) for name in ("path", "sha256", "status", "problem")),
            ("faces", pa.int32()),
            *((name, pa.string()) for name in TEXTS),
            *((name, pa.float64()) for name in (*NUMBERS, *named)),
            *((name, pa.int32()) for name in BOX),
            *((name, pa.float64()) for name in (*LANDMARKS, "face_roll")),
        ],
        metadata={SCOPE: detector.scope},
    )


def score_names(pipeline: Pipeline, names: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the rows of images in their order, a batch of the pipeline's size at a time.

    The pipeline is to judge one face of each image: `face` is "largest" or "off".
    """
    schema = schema_of(pipeline.detector)
    for batch in batched(names, pipeline.batch_size):
        yield pa.Table.from_pylist(list(_rows(pipeline, batch)), schema)


def _rows(pipeline: Pipeline, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    images = [_opened(name) for name in names]
    found = pipeline.findings([image for image in images if image.pixels is not None])
    for image in images:
        known = {"path": _storable(image.name), "sha256": image.sha256 or None, "problem": image.problem or None}
        if image.pixels is None:
            yield known | {"status": BAD}
        else:
            yield known | {"status": OK} | _columns(next(found).verdict)
    assert next(found, None) is None, "more than one finding for an image"


def _opened(name: str) -> NamedImage:
    """Read an image; what is none comes back with its problem."""
    image: NamedInput = NamedImage(name=name, pixels=None, problem=A_VIDEO) if is_video(name) else open_input(name)
    assert isinstance(image, NamedImage)
    return image


def _storable(name: str) -> str:
    """Give a name as UTF-8 can hold it: bytes of a file name that are no UTF-8 as `\\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _columns(verdict: Verdict) -> dict[str, Any]:
    low, high = verdict.p_fake_range or (None, None)
    box = verdict.face_box or (None,) * len(BOX)
    points = chain.from_iterable(verdict.face_landmarks or ((None, None),) * len(MARKS))
    return {
        **{name: getattr(verdict, name) for name in NUMBERS if name not in ("low", "high")},
        **{name: getattr(verdict, name) for name in TEXTS},
        **{f"probability_{name}": value for name, value in verdict.probabilities.items()},
        **{f"evidence_{name}": value for name, value in verdict.evidence.items()},
        **dict(zip(BOX, box, strict=True)),
        **dict(zip(LANDMARKS, points, strict=True)),
        "face_roll": verdict.face_roll,
        "reason": verdict.reason or None,
        "low": low,
        "high": high,
        "faces": verdict.face_count,
    }


RUN_NAME, ROWS_NAME, BAD_NAME = "run.json", "rows", "bad_files.csv"


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Where rows go: `rows/part-00000.parquet` and so on, of `part_rows` rows each, the last one of fewer.

    What exists under its name is complete. Other processes may write other parts at the same time.
    """

    folder: Path
    part_rows: int

    @property
    def rows(self) -> Path:
        """Give the folder that pandas and pyarrow read as one table."""
        return self.folder / ROWS_NAME

    def path(self, number: int) -> Path:
        """Give the file of a part."""
        return self.rows / f"part-{number:05d}.parquet"

    @property
    def bad_list(self) -> Path:
        """Give the file that names what could not be read."""
        return self.folder / BAD_NAME

    def names(self, number: int, names: Sequence[str]) -> Sequence[str]:
        """Give the share of the names that a part holds."""
        return names[number * self.part_rows : (number + 1) * self.part_rows]

    def missing(self, image_count: int) -> list[int]:
        """List the parts that are not there yet."""
        return [number for number in range(-(-image_count // self.part_rows)) if not self.path(number).is_file()]

    def write(self, number: int, tables: Sequence[pa.Table]) -> None:
        """Write a part; it appears complete."""
        with atomic_path(self.path(number)) as staged:
            pq.write_table(pa.concat_tables(tables), staged, compression=COMPRESSION)


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What a finished folder holds: images that were read, and those that were not; labels of the former.

    scope: of the detector that judged them.
    """

    ok: int
    bad: int
    labels: Counter[str]
    scope: str = ""


def score_part(pipeline: Pipeline, parts: Parts, number: int, names: Sequence[str]) -> Iterator[int]:
    """Score the images of one part and write it; yields how many were done, batch by batch."""
    tables = []
    for table in score_names(pipeline, names):
        tables.append(table)
        yield table.num_rows
    parts.write(number, tables)


def begin(parts: Parts, config: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Write run.json, or find the one of the same run. Raises ValueError when it is of another one, and says how.

    identity: everything that the rows depend on.
    """
    path = parts.folder / RUN_NAME
    if not path.is_file():
        if parts.folder.is_dir() and any(parts.folder.iterdir()):
            raise ValueError(f"out: {str(parts.folder)!r} holds other files and no {RUN_NAME}; give a new folder.")
        write_run(parts.folder, {**config, "identity": dict(identity)}, None)
        return
    before = json.loads(path.read_text(encoding="utf-8"))["config"]["identity"]
    now = json.loads(json.dumps(identity))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        differences = "; ".join(
            f"{name} was {_short(before.get(name))}, now {_short(now.get(name))}" for name in changed
        )
        raise ValueError(
            f"out: {str(parts.folder)!r} was begun with other settings, and its rows would not fit together "
            f"({differences}). "
            "Give a new folder, or the settings in its run.json."
        )


def finish(parts: Parts, image_count: int) -> Totals:
    """Count what is there, write the list of bad files, and clear away what killed runs left behind."""
    status: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    scope = ""
    with atomic_path(parts.bad_list) as staged, staged.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "problem"))
        for path in sorted(parts.rows.glob("part-*.parquet")):
            table = pq.read_table(path, columns=["path", "status", "problem", "label"])
            scope = (table.schema.metadata or {}).get(SCOPE.encode(), b"").decode()
            status.update(table["status"].to_pylist())
            labels.update(table["label"].drop_null().to_pylist())
            bad = table.filter(pc.equal(table["status"], BAD))
            writer.writerows(zip(bad["path"].to_pylist(), bad["problem"].to_pylist(), strict=True))
    if status.total() != image_count:
        counts = f"{status.total():,} rows for {image_count:,} images"
        raise ValueError(f"{str(parts.rows)!r} holds {counts}; something else wrote there. Remove it and begin anew.")
    for left in parts.rows.glob(".part-*"):
        shutil.rmtree(left, ignore_errors=True)
    return Totals(ok=status[OK], bad=status[BAD], labels=labels, scope=scope)


def digest_of(names: Iterable[str]) -> str:
    """Give one SHA-256 in hexadecimal over names and their order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _short(value: Any) -> str:
    """Give a value as it stands in a message: a hash by its beginning."""
    text = json.dumps(value)
    return f"{text[:12]}…" if len(text) > 40 else text
