"""Any labelled source to verdict-only conversations, so that stages 2 and 3 can be trained without annotations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.core.config import setting
from llava.core.runtime import write_json
from llava.core.types import LABEL_NAMES, Record
from llava.data.answer_texts import VERDICT_QUESTION, verdict_sentence
from llava.data.conversations import PROMPT_HEAD
from llava.data.sources import DataConfig, open_source, split_of


@dataclass(frozen=True, kw_only=True)
class VerdictConfig:
    """Say which data, and where the conversation files go."""

    data: DataConfig = setting(help="labelled images, as for stage 1")
    output: str = setting(help="folder to write; it gets train/, val/ and test/verdict_only.json")


def build_verdicts(config: VerdictConfig) -> dict[str, int]:
    """Write {train,val,test}/verdict_only.json; image names are absolute paths, so no image folder is needed.

    Returns the number of records per file. Raises ValueError for an image that lies in a zip or has no label.
    """
    source = open_source(config.data)
    counts = {}
    for split, name in (("train", config.data.train), ("val", config.data.val), ("test", config.data.test)):
        rows = _rows(split_of(source, name))
        path = Path(config.output) / split / "verdict_only.json"
        write_json(path, rows)
        counts[f"{split}/{path.name}"] = len(rows)
    return counts


def _rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    return [
        {
            "id": record.id,
            "image": _file(record),
            "label": _label_name(record),
            "class_name": record.class_name,
            "video": record.video,
            "group": record.group,
            "conversations": [
                {"from": "human", "value": PROMPT_HEAD + VERDICT_QUESTION},
                {"from": "gpt", "value": verdict_sentence(_label_name(record))},
            ],
        }
        for record in records
    ]


def _label_name(record: Record) -> str:
    if record.label is None:
        raise ValueError(f"Record {record.id!r} has no label; a verdict needs one.")
    return LABEL_NAMES[record.label]


def _file(record: Record) -> str:
    path = Path(os.path.abspath(record.where))  # noqa: PTH100 - resolve() would follow links out of the data folder
    if not path.is_file():
        raise ValueError(f"Record {record.id!r} ({record.where}) is no file of its own; unpack the archive first.")
    return str(path)
