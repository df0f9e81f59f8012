"""Sources of single images: class folders, and csv tables with one row per image."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from llava.core.input_specs import Wants
from llava.core.registry import nearest
from llava.core.types import LABEL_NAMES, REAL, Record, Sample
from llava.data.faces import Place, crop_face, find_faces, place_in_crop
from llava.data.images import (
    IMAGE_FILES,
    FileKind,
    ImageStore,
    list_images,
    open_store,
    read_image,
    require_files,
    stored_image,
)
from llava.data.sources import DataConfig, label_of_class, parse_label
from llava.data.splits import connected_groups

log = logging.getLogger(__name__)
FIELDS = ("file", "label", "split", "video", "group", "class_name")
Row = Mapping[str, str]


class ImageSource:
    """Records with one image each; a subclass lists the records.

    With `face_crop`, a sample's record says in its tag `face` whether the largest of `one` or `several` faces was
    cut out, or there was `none` and the image is whole; `face_counts` adds these up within this process.
    """

    def __init__(self, config: DataConfig, records: Sequence[Record], store: ImageStore | None = None) -> None:
        self.config = config
        self._records = tuple(records)
        self._store = store
        self._cache: dict[str, tuple[np.ndarray, str, Place | None]] = {}
        self.face_counts: Counter[str] = Counter()

    @property
    def records(self) -> Sequence[Record]:
        """Give every record; no pixel is read for it."""
        return self._records

    def load(self, record: Record, rng: np.random.Generator | None = None, wants: Wants | None = None) -> Sample:
        """Read the record's image, uint8 RGB (H, W, 3), which has no frames and no sound, whatever is wanted.

        Raises UnreadableImage naming the file.
        """
        image, face, place = self._image(record)
        if face:
            record = replace(record, tags={**record.tags, "face": face})
        mask = self._mask(record, image) if self.config.masks else None
        return Sample(record=record, image=image, mask=mask, face=place)

    def why_unreadable(self, record: Record) -> str:
        """Say nothing: an image that cannot be read is an error of its own, which names the file."""
        return ""

    def _mask(self, record: Record, image: np.ndarray) -> np.ndarray | None:
        """Read the mask of forged pixels that the record's tag names; nothing is forged in a real image."""
        if record.label == REAL:
            return np.zeros(image.shape[:2], np.uint8)
        name = record.tags.get("mask")
        if not name:
            return None
        place = self._store.locate(name) if self._store else None
        if place is None:
            raise FileNotFoundError(f"{record.id}: its mask {name!r} does not exist; correct it, or leave `masks` off.")
        mask = read_image(stored_image(place), name=place)[..., 0]
        if mask.shape != image.shape[:2]:
            raise ValueError(f"{place}: the mask is {mask.shape}, its image {image.shape[:2]}; they must be alike.")
        return mask

    def _read(self, where: str) -> np.ndarray:
        """Read the pixels of one image, uint8 RGB (H, W, 3)."""
        return read_image(stored_image(where), name=where)

    def _image(self, record: Record) -> tuple[np.ndarray, str, Place | None]:
        if record.where in self._cache:
            return self._cache[record.where]
        image, face, place = self._read(record.where), "", None
        if self.config.face_crop:
            image, face, place = _largest_face(image)
            self.face_counts[face] += 1
        if self.config.cache:
            # Shared by every later sample, so nobody may write into it.
            image.setflags(write=False)
            self._cache[record.where] = (image, face, place)
        return image, face, place


def _largest_face(image: np.ndarray) -> tuple[np.ndarray, str, Place | None]:
    faces = find_faces(image)
    if not faces:
        return image, "none", None
    count = "one" if len(faces) == 1 else "several"
    return crop_face(image, faces[0]), count, place_in_crop(faces[0], *image.shape[:2])


class FolderSource(ImageSource):
    """Images in class folders.

    When the root holds a folder with the name of a split (train, val, test as configured), every folder of the root
    is a split; else every folder of the root is a class and the records carry no split. A class folder named in
    `real_names` is real, any other is fake with its name as class name. Images that share a folder *below* the class
    folder are frames of one video; an image alone is its own video. Group = video: folders say nothing of identity.
    Raises FileNotFoundError or ValueError naming the folder.
    """

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config, folder_records(config))


def folder_records(config: DataConfig, kind: FileKind = IMAGE_FILES) -> list[Record]:
    """List the files of class folders, see `FolderSource`. Raises FileNotFoundError or ValueError naming the folder."""
    root = Path(config.path)
    if not root.is_dir():
        raise FileNotFoundError(f"Folder {config.path!r} does not exist; give one that holds class folders.")
    folders = _split_folders(root, config)
    records = [r for split, folder in folders for r in _records(root, folder, split, config, kind)]
    if not records:
        raise ValueError(
            f"Folder {config.path!r} holds no {kind.plural}; expected <split>/<class>/*{kind.suffixes[0]} or "
            f"<class>/*{kind.suffixes[0]}."
        )
    return records


def _split_folders(root: Path, config: DataConfig) -> list[tuple[str, Path]]:
    names = {config.train, config.val, config.test}
    if not any((root / name).is_dir() for name in names):
        return [("", root)]
    return [(folder.name, folder) for folder in _folders(root)]


def _folders(parent: Path) -> list[Path]:
    return sorted(p for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))


def _records(root: Path, folder: Path, split: str, config: DataConfig, kind: FileKind) -> Iterator[Record]:
    files = list_images(folder, kind.suffixes)
    loose = [p for p in files if p.parent == folder]
    if loose:
        raise ValueError(
            f"{len(loose)} {kind.plural} lie directly in {str(folder)!r} (first: {loose[0].name}), outside any "
            "class folder; move them into a folder such as real or fake."
        )
    neighbours = Counter(p.parent for p in files)
    for path in files:
        class_name = path.relative_to(folder).parts[0]
        label = label_of_class(class_name, config.real_names)
        is_frame = kind.are_frames and neighbours[path.parent] > 1 and path.parent.parent != folder
        video = (path.parent if is_frame else path).relative_to(root).as_posix()
        yield Record(
            id=path.relative_to(root).as_posix(),
            label=label,
            class_name="real" if label == REAL else class_name,
            video=video,
            group=video,
            where=str(path),
            split=split,
        )


class CsvSource(ImageSource):
    """Images of a csv table; `DataConfig.columns` maps our fields to its columns.

    Needed: file, and label (real, fake, 0, 1, or empty for unknown) or class_name, from which the label then follows
    as in a class folder. Video defaults to the file, group to the video. Other columns become the record's tags. Rows
    whose file has no image suffix are left out and counted in `rows_left_out`. Raises FileNotFoundError or ValueError
    naming file and row.
    """

    def __init__(self, config: DataConfig) -> None:
        store = open_store(config.root or Path(config.path).parent)
        records, self.rows_left_out = table_records(config, store)
        super().__init__(config, records, store)


def table_records(config: DataConfig, store: ImageStore, kind: FileKind = IMAGE_FILES) -> tuple[list[Record], int]:
    """List the files of a csv table, see `CsvSource`, and count the rows that name others. Raises as that does."""
    table = Path(config.path)
    rows = _read(table)
    columns = _columns(config, list(rows[0]), table)
    chosen = [(i, row) for i, row in enumerate(rows, start=2) if row[columns["file"]].lower().endswith(kind.suffixes)]
    left_out = len(rows) - len(chosen)
    if left_out:
        log.info("%s: %d of %d rows name no %s and are left out", table, left_out, len(rows), kind.name)
    places = require_files([row[columns["file"]] for _, row in chosen], store, str(table))
    groups = _groups([row for _, row in chosen], columns, config.group_ids)
    records = [
        _record(row, columns, config, where=place, group=group, line=f"{table}, line {i}")
        for (i, row), place, group in zip(chosen, places, groups, strict=True)
    ]
    _require_unique(records, table)
    return records, left_out


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
