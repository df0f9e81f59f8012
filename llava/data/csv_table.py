"""A csv table with one row per image."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava.core.registry import nearest
from llava.core.types import LABEL_NAMES, REAL, Record
from llava.data.image_source import ImageSource
from llava.data.images import IMAGE_SUFFIXES
from llava.data.sources import DataConfig, label_of_class, parse_label
from llava.data.splits import connected_groups, require_both_classes
from llava.data.storage import open_store, require_files

log = logging.getLogger(__name__)

FIELDS = ("file", "label", "split", "video", "group", "class_name")
Row = Mapping[str, str]


class CsvSource(ImageSource):
    """Images of a csv table; `DataConfig.columns` maps our fields to its columns.

    Needed: file, and label (real, fake, 0, 1, or empty for unknown) or class_name, from which the label then follows
    as in a class folder. Video defaults to the file, group to the video. Other columns become the record's tags. Rows
    whose file has no image suffix are left out and counted in `rows_left_out`. Raises FileNotFoundError or ValueError
    naming file and row.
    """

    def __init__(self, config: DataConfig) -> None:
        table = Path(config.path)
        rows = _read(table)
        columns = _columns(config, list(rows[0]), table)
        images = [(i, row) for i, row in enumerate(rows, start=2) if _is_image(row[columns["file"]])]
        self.rows_left_out = len(rows) - len(images)
        if self.rows_left_out:
            log.info("%s: %d of %d rows name no image and are left out", table, self.rows_left_out, len(rows))
        store = open_store(config.root or table.parent)
        places = require_files([row[columns["file"]] for _, row in images], store, str(table))
        groups = _groups([row for _, row in images], columns, config.group_ids)
        records = [
            _record(row, columns, config, where=place, group=group, line=f"{table}, line {i}")
            for (i, row), place, group in zip(images, places, groups, strict=True)
        ]
        _require_unique(records, table)
        training = [r for r in records if r.split == config.train]
        if training:
            require_both_classes(training, f"Training split {config.train!r} of {str(table)!r}")
        super().__init__(config, records, store)


def _read(table: Path) -> list[dict[str, str]]:
    if not table.is_file():
        raise FileNotFoundError(f"Table {str(table)!r} does not exist; give a csv file with one row per image.")
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"Table {str(table)!r} has no rows; expected a header and one row per image.")
    ragged = next((i for i, row in enumerate(rows, start=2) if None in row or None in row.values()), None)
    if ragged is not None:
        raise ValueError(f"{table}, line {ragged}: not as many values as the header has names; quote commas in values.")
    return rows


def _columns(config: DataConfig, header: Sequence[str], table: Path) -> dict[str, str]:
    """Give the column of each field that the table has. A column named in the settings must exist."""
    for field, column in config.columns.items():
        if field not in FIELDS:
            raise ValueError(f"columns: unknown field {field!r}. {nearest(field, FIELDS)}")
        if column not in header:
            raise ValueError(f"{table} has no column {column!r} for {field}. {nearest(column, list(header))}")
    columns = dict(config.columns)
    for field in FIELDS:
        if field not in columns and field in header:
            columns[field] = field
    if columns.get("class_name") == columns.get("label"):
        # One column for both holds class names: the label follows from them.
        columns.pop("label", None)
    for needed in ({"file"}, {"label", "class_name"}):
        if not needed & columns.keys():
            wanted = " or ".join(sorted(needed))
            raise ValueError(f"{table} has no column {wanted}; name it in `columns`. {nearest(wanted, list(header))}")
    return columns


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _groups(rows: Sequence[Row], columns: Mapping[str, str], are_ids: bool) -> list[str]:
    values = [row[columns["group"]] if "group" in columns else "" for row in rows]
    own = [row[columns.get("video", columns["file"])] or row[columns["file"]] for row in rows]
    if not are_ids:
        return [value or fallback for value, fallback in zip(values, own, strict=True)]
    return connected_groups([v.split("_") if v else [fallback] for v, fallback in zip(values, own, strict=True)])


def _record(row: Row, columns: Mapping[str, str], config: DataConfig, where: str, group: str, line: str) -> Record:
    given = {field: row[column].strip() for field, column in columns.items()}
    tags = {name: value.strip() for name, value in row.items() if name not in columns.values()}
    class_name = given.get("class_name", "")
    try:
        label = parse_label(given["label"], line) if "label" in given else None
    except ValueError as error:
        raise ValueError(f"{error} If the column holds class names, set columns.class_name to it.") from None
    if class_name:
        named = label_of_class(class_name, config.real_names)
        label = named if "label" not in given else label
        if label is not None and label != named:
            raise ValueError(
                f"{line}: label {LABEL_NAMES[label]} but class {class_name!r}; correct one of them, "
                f"or `real_names` (now: {', '.join(config.real_names)})."
            )
    if label == REAL or not class_name:
        class_name = "unknown" if label is None else LABEL_NAMES[label]
    return Record(
        id=given["file"],
        label=label,
        class_name=class_name,
        video=given.get("video") or given["file"],
        group=group,
        where=where,
        split=given.get("split", ""),
        tags=tags,
    )


def _require_unique(records: Sequence[Record], table: Path) -> None:
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise ValueError(f"{table} lists {record.id!r} more than once; keep one row per image.")
        seen.add(record.id)
