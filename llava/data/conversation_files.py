"""Conversation files for training and what to score answers by, from questions and answers about images."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llava.core.runtime import atomic_path, item_rng, write_json
from llava.core.types import LABEL_NAMES, REAL, REGIONS
from llava.data.conversations import PROMPT_HEAD

Pair = tuple[str, str]  # question and answer


@dataclass(frozen=True)
class Subject:
    """One image that is talked about: its name without suffix, file, class, group and tags."""

    key: str
    file: str
    class_name: str
    group: str
    tags: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    @property
    def label_name(self) -> str:
        """Give `real` or `fake`, as the class name says."""
        return LABEL_NAMES[REAL] if self.class_name == LABEL_NAMES[REAL] else "fake"


@dataclass(frozen=True)
class Row:
    """One conversation about an image: its id, and what is asked and answered."""

    id: str
    subject: Subject
    pairs: Sequence[Pair]


def single_questions(subject: Subject, pairs: Sequence[Pair]) -> list[Row]:
    """Give one conversation for each pair."""
    return [Row(f"{subject.key}_{number}", subject, [pair]) for number, pair in enumerate(pairs)]


def shuffled_dialogue(subject: Subject, pairs: Sequence[Pair], number: int, seed: int) -> Row:
    """Give one conversation of all pairs; their order is a function of (seed, image, number of the dialogue)."""
    order = item_rng(seed, number, zlib.crc32(subject.key.encode())).permutation(len(pairs))
    return Row(f"{subject.key}_d{number}", subject, [pairs[i] for i in order])


def cut_dialogues(row: Row, seed: int) -> list[Row]:
    """Cut a dialogue into several: behind every turn but the last with probability 1/2, a function of (seed, row).

    In a whole one nearly every answer can be learned from the answers before it, and few need the image.
    """
    ends = np.flatnonzero(item_rng(seed, 0, zlib.crc32(row.id.encode())).random(len(row.pairs) - 1) < 0.5) + 1
    bounds = zip((0, *ends), (*ends, len(row.pairs)), strict=True)
    return [Row(f"{row.id}_{number}", row.subject, row.pairs[a:b]) for number, (a, b) in enumerate(bounds)]


def write_conversations(path: Path, rows: Sequence[Row]) -> int:
    """Write the json list that LLaVA trains on; gives the number of conversations."""
    write_json(path, [_conversation(row) for row in rows])
    return len(rows)


def write_ground_truth(path: Path, rows: Sequence[Row], merge: bool) -> int:
    """Write rows of the published test.jsonl, {key: {question, answer: [...]}}, from rows of one question each.

    `merge`: one row per image and question, with every answer as a reference; its key is the first's. Images with tags
    also give `label`, `group` and, where one of REGIONS was edited, `region` and `artefact`. Gives the number of rows.
    """
    truths: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        ((question, answer),) = row.pairs
        place = (row.subject.key, question if merge else row.id)
        truth = truths.setdefault(place, {row.id: {"question": question, "answer": [], **_known(row.subject)}})
        next(iter(truth.values()))["answer"].append(answer)
    with atomic_path(path) as staged:
        lines = [json.dumps(truth, ensure_ascii=False) + "\n" for truth in truths.values()]
        staged.write_text("".join(lines), encoding="utf-8")
    return len(truths)


def _known(subject: Subject) -> dict[str, str]:
    if not subject.tags:
        return {}
    is_local = subject.tags.get("region") in REGIONS
    edit = {name: subject.tags[name] for name in ("region", "artefact") if is_local and subject.tags.get(name)}
    return {"label": subject.label_name, "group": subject.group, **edit}


def _conversation(row: Row) -> dict[str, Any]:
    turns: list[dict[str, str]] = []
    for question, answer in row.pairs:
        head = "" if turns else PROMPT_HEAD
        turns += [{"from": "human", "value": head + question}, {"from": "gpt", "value": answer}]
    subject = row.subject
    return {
        "id": row.id,
        "image": subject.file,
        "label": subject.label_name,
        "class_name": subject.class_name,
        "group": subject.group,
        **({"tags": dict(subject.tags)} if subject.tags else {}),
        "conversations": turns,
    }
