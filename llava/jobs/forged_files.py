"""The files of a forged data set: images, masks, the table of records and the conversations."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava.core.runtime import atomic_path, other_settings
from llava.core.types import LABEL_NAMES, Record
from llava.data.answer_texts import VERDICT_QUESTION, Truth, truthful_pairs, verdict_sentence
from llava.data.conversations import (
    Row,
    Subject,
    cut_dialogues,
    shuffled_dialogue,
    single_questions,
    write_conversations,
    write_ground_truth,
)
from llava.data.splits import check_leaks

SPLITS = ("train", "val", "test")
IMAGES, MASKS, LEAVES, TABLE = "images", "masks", "leaves", "manifest.csv"
TAGS = ("region", "artefact", "mask", "original", "untouched")
SUFFIXES = {"png": ".png", "jpeg": ".jpg"}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One written image: its record, and what was done to it (None: untouched)."""

    record: Record
    truth: Truth | None


def claim_folder(output: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder that holds something else than an earlier run of the same settings. Raises ValueError."""
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not (output / "run.json").is_file():
        raise ValueError(f"{str(output)!r} is not empty and was not written by `m2f2 data forge`; give a new folder.")
    # Where it lies changes nothing that is written; which photos they hold is compared by their digest.
    other = other_settings(output, settings, [name for name in settings if name != "output"])
    if other:
        raise ValueError(
            f"{str(output)!r} holds another forged data set (different: {', '.join(other)}); give a new folder, "
            "or delete that one."
        )


def write_image(path: Path, image: np.ndarray, jpeg_quality: int) -> None:
    """Write one image, uint8 (H, W, 3), as its suffix says; real and forged ones go the same way."""
    with atomic_path(path) as staged:
        if path.suffix == SUFFIXES["jpeg"]:
            Image.fromarray(image).save(staged, quality=jpeg_quality)
        else:
            Image.fromarray(image).save(staged)


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Write a mask (H, W) in [0, 1] as an 8-bit PNG, rounded up, so that what is above 0 stays above 0."""
    with atomic_path(path) as staged:
        Image.fromarray(np.ceil(mask * 255).astype(np.uint8)).save(staged)


def write_lists(output: Path, items: Sequence[Item], leaves: Sequence[Item], seed: int) -> dict[str, int]:
    """Write conversations of every split that has images, then manifest.csv; gives the number of rows of each file.

    leaves: pictures that only the table names, because there is nothing to say about them. Raises LeakError when two
    splits share a group.
    """
    by_split = {split: [item for item in items if item.record.split == split] for split in SPLITS}
    check_leaks({split: [item.record for item in part] for split, part in by_split.items()})
    counts: dict[str, int] = {}
    for split, part in by_split.items():
        if part:
            counts |= {f"{split}/{name}": rows for name, rows in _write_split(output / split, part, seed).items()}
    listed = [*items, *leaves]
    _write_table(output / TABLE, [item.record for item in listed])
    return {**counts, TABLE: len(listed)}


def _write_split(folder: Path, items: Sequence[Item], seed: int) -> dict[str, int]:
    verdicts: list[Row] = []
    reasons: list[Row] = []
    dialogues: list[Row] = []
    for item in items:
        subject, pairs = _subject(item.record), truthful_pairs(item.truth)
        verdict = (VERDICT_QUESTION, verdict_sentence(subject.label_name))
        verdicts += single_questions(subject, [verdict])
        reasons += single_questions(subject, pairs)
        dialogues += cut_dialogues(shuffled_dialogue(subject, [verdict, *pairs], 0, seed), seed)
    styles = {"verdict_only": verdicts, "label_free": reasons, "dialogue": dialogues}
    counts = {f"{style}.json": write_conversations(folder / f"{style}.json", rows) for style, rows in styles.items()}
    for style in ("verdict_only", "label_free"):
        counts[f"{style}.jsonl"] = write_ground_truth(folder / f"{style}.jsonl", styles[style], merge=True)
    return counts


def _subject(record: Record) -> Subject:
    file = Path(record.id).relative_to(IMAGES)
    return Subject(file.stem, file.as_posix(), record.class_name, record.group, tags=record.tags)


def _write_table(path: Path, records: Sequence[Record]) -> None:
    with atomic_path(path) as staged, staged.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "label", "class_name", "split", "video", "group", *TAGS))
        for record in records:
            assert record.label is not None
            label, tags = LABEL_NAMES[record.label], [record.tags[name] for name in TAGS]
            writer.writerow((record.id, label, record.class_name, record.split, record.video, record.group, *tags))
