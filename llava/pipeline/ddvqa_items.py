"""Which DD-VQA questions are asked about which images, and what a row of an answer file looks like."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava.core.config import setting
from llava.data.conversations import PROMPT_HEAD, read_conversations
from llava.data.ddvqa_text import flipped_question, stated_label
from llava.data.images import IMAGE_SUFFIXES
from llava.data.storage import ImageStore, open_store
from llava.evaluation.captions import read_jsonl
from llava.pipeline.settings import ModelSettings

log = logging.getLogger(__name__)

FOLDERS = ("test", "val", "train")
_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True, kw_only=True)
class InferenceSettings(ModelSettings):
    """What both files are made from."""

    model_path: str = setting("m2f2", "merged explainer: folder, name in checkpoints/, or hub id")
    images: str = setting("utils/DDVQA_images/c40", "folder (or zip) with the image folders test and train")
    max_new_tokens: int | None = setting(None, "longest answer, in tokens; none = the explainer's own limit")
    layout: str | None = setting(None, "prompt layout by name; default: the one the model was trained with")
    limit: int | None = setting(None, "only so many questions, the first in sorted order")
    evidence_p_fake: float | None = setting(None, "tell the explainer this p_fake, whatever the detector finds")


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(InferenceSettings):
    """Answers to the question of authenticity."""

    questions: str | None = setting(
        None, "jsonl of {key: {question, answer}} or a conversation json; default: `question`, of all test images"
    )
    question: str = setting("Determine the authenticity of this image.", "what is asked without a file of questions")
    output: str = setting("outputs/DDVQA/DDVQA_det_c40.jsonl", "file to write")


@dataclass(frozen=True, kw_only=True)
class ReasonSettings(InferenceSettings):
    """Answers to the questions about reasons."""

    questions: str = setting("utils/DDVQA_conversations/test/label_free.jsonl", "jsonl of {key: {question, answer}}")
    flip_stated_label: bool = setting(
        False, "ask with the other label stated, for eval_integrity.py; questions that state none are left out"
    )
    output: str = setting("outputs/DDVQA/DDVQA_exp_c40.jsonl", "file to write")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question about one image: `name` is the image's name below the image folder, `where` its place."""

    key: str
    name: str
    where: str
    question: str


def list_items(settings: JudgeSettings | ReasonSettings) -> list[Item]:
    """List the questions, sorted by image and number. Raises when an image or a question file is missing."""
    store = open_store(settings.images)
    if settings.questions is None:
        items = list(_asked_of_all(store, settings))
    elif settings.questions.endswith(".json"):
        items = list(_asked_in_conversations(store, settings.questions))
    else:
        items = list(_asked_in_file(store, settings.questions, settings.images))
    if isinstance(settings, ReasonSettings) and settings.flip_stated_label:
        items = _flipped(items, settings.questions)
    items.sort(key=lambda item: (item.name, [int(n) if n.isdigit() else n for n in _NUMBER.split(item.key)]))
    return items if settings.limit is None else items[: settings.limit]


def _flipped(items: list[Item], path: str) -> list[Item]:
    """State the other label in every question that states one. Raises ValueError when none does."""
    stating = [item for item in items if stated_label(item.question) is not None]
    if not stating:
        raise ValueError(f"{path!r}: no question states a label, so --flip_stated_label has nothing to flip.")
    if len(stating) < len(items):
        log.warning("%d of %d questions state no label and are left out", len(items) - len(stating), len(items))
    return [replace(item, question=flipped_question(item.question)) for item in stating]


def _asked_of_all(store: ImageStore, settings: JudgeSettings | ReasonSettings) -> Iterator[Item]:
    folder = FOLDERS[0]
    names = [name for name in store.names(folder) if Path(name).suffix.lower() in IMAGE_SUFFIXES]
    if not names:
        raise FileNotFoundError(f"{settings.images!r} holds no images in {folder!r}; give --images.")
    assert isinstance(settings, JudgeSettings)
    for name in names:
        where = store.locate(f"{folder}/{name}")
        assert where is not None
        yield Item(key=Path(name).stem, name=f"{folder}/{name}", where=where, question=settings.question)


def _asked_in_file(store: ImageStore, path: str, images: str) -> Iterator[Item]:
    by_stem = {Path(name).stem: f"{folder}/{name}" for folder in reversed(FOLDERS) for name in store.names(folder)}
    missing: list[str] = []
    for where, row in read_jsonl(path):
        for key, truth in row.items():
            name = by_stem.get(key.rpartition("_")[0])
            place = store.locate(name) if name else None
            if not isinstance(truth, dict) or not truth.get("question"):
                raise ValueError(f"{where}: expected {{key: {{question, answer}}}}, got {key!r}: {truth!r}.")
            if name is None or place is None:
                missing.append(key)
                continue
            yield Item(key=key, name=name, where=place, question=truth["question"])
    if missing:
        raise FileNotFoundError(
            f"{images!r} lacks the images of {len(missing)} questions of {path!r} (first: {missing[0]}); give --images."
        )


def _asked_in_conversations(store: ImageStore, path: str) -> Iterator[Item]:
    """Ask the first question of every record of a conversation json."""
    for number, record in enumerate(read_conversations(path)):
        place = store.locate(record["image"])
        if place is None:
            raise FileNotFoundError(f"{path}, record {number}: image {record['image']!r} is not there; give --images.")
        question = record["conversations"][0]["value"].removeprefix(PROMPT_HEAD)
        yield Item(key=str(record.get("id", number)), name=record["image"], where=place, question=question)


def row_of(
    item: Item, prompt: str, text: str, metadata: dict[str, Any], images: str, is_reason: bool
) -> dict[str, Any]:
    """Give a row with the published fields: reasons name the bare image, judgements its path."""
    if is_reason:
        return {"key": item.key, "image": Path(item.name).name, "prompt": prompt, "text": text, "metadata": metadata}
    folder = Path(images).as_posix()
    is_absolute = Path(images).is_absolute() or Path(item.name).is_absolute()
    path = (Path(folder) / item.name).as_posix() if is_absolute else f"./{folder}/{item.name}"
    return {"image": path, "prompt": prompt, "text": text, "metadata": metadata}
