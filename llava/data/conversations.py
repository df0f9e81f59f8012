"""LLaVA conversation files: a json list of {id, image, conversations: [{from, value}]}."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from llava.core.registry import nearest
from llava.core.types import FAKE, LABEL_NAMES, Record, Sample, Turn
from llava.data.image_source import ImageSource
from llava.data.sources import DataConfig, parse_label
from llava.data.storage import open_store, require_files

IMAGE_MARK = "<image>"
DEEPFAKE_MARK = "<deepfake>"
PROMPT_HEAD = f"{IMAGE_MARK}\n{DEEPFAKE_MARK}\n"
SPLIT_FILE = "verdict_only.json"
_ROLES: dict[str, Literal["human", "assistant"]] = {"human": "human", "gpt": "assistant"}


class ConversationSource(ImageSource):
    """Images with a conversation each; `root` is the image folder (or zip), by default the json's own folder.

    `path` is one json, or a folder with {train,val,test}/verdict_only.json as `m2f2 data` writes it: its records
    carry their split, so a detector trains on the same images as the explainer.

    `label` (real, fake, 0, 1), `class_name`, `group`, `video`, `split` and `tags` are read where a record has them;
    without, the label is None, and video and group are the image. An id that repeats gets `#2`, `#3` … so that ids are
    unique. The text of the turns is left as it is. Raises ValueError naming the record's index, FileNotFoundError for
    images.
    """

    def __init__(self, config: DataConfig) -> None:
        path = Path(config.path)
        items = _read_splits(path) if path.is_dir() else read_conversations(path)
        turns = [read_turns(item, f"{path}, record {i}") for i, item in enumerate(items)]
        store = open_store(config.root or path.parent)
        places = require_files([item["image"] for item in items], store, str(path))
        names = _unique([str(item.get("id", item["image"])) for item in items])
        records = [
            _record(item, name, place, f"{path}, record {i}")
            for i, (item, name, place) in enumerate(zip(items, names, places, strict=True))
        ]
        super().__init__(config, records, store)
        self._turns = dict(zip(names, turns, strict=True))

    def load(self, record: Record, rng: np.random.Generator | None = None) -> Sample:
        """Read the record's image and give its turns."""
        sample = super().load(record, rng)
        return replace(sample, turns=self._turns[record.id])

    def turns(self, record: Record) -> Sequence[Turn]:
        """Give a record's conversation without reading its image."""
        return self._turns[record.id]


def open_conversations(path: str, image_folder: str) -> ConversationSource:
    """Open one conversation file whose image names start from `image_folder` (empty: from the file's own folder)."""
    return ConversationSource(DataConfig(source="conversations", path=path, root=image_folder or None))


def read_conversations(path: str | Path) -> list[dict[str, Any]]:
    """Read the json list. Raises FileNotFoundError, or ValueError naming file and record."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Conversation file {str(path)!r} does not exist; `m2f2 data ddvqa` writes such files.")
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid json ({error}); expected a list of conversations.") from None
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path}: expected a list of conversations, got {'an empty one' if items == [] else 'none'}.")
    for index, item in enumerate(items):
        if not isinstance(item, dict) or not isinstance(item.get("image"), str):
            raise ValueError(f"{path}, record {index}: no `image`; every conversation here is about one image file.")
    return items


def _read_splits(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"*/{SPLIT_FILE}"))
    if not files:
        raise FileNotFoundError(f"{str(folder)!r} holds no */{SPLIT_FILE}; `m2f2 data ddvqa` and `data verdicts` do.")
    return [item | {"split": path.parent.name} for path in files for item in read_conversations(path)]


def read_turns(item: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
    """Give the turns of one record. Raises ValueError naming `where` for what is no conversation about an image."""
    said = item.get("conversations")
    if not isinstance(said, list) or not said:
        raise ValueError(f"{where}: no `conversations`; expected a list of {{from, value}}.")
    turns = []
    for position, one in enumerate(said):
        if not isinstance(one, dict) or not isinstance(one.get("value"), str):
            raise ValueError(f"{where}, turn {position}: expected {{from: human or gpt, value: text}}.")
        if one.get("from") not in _ROLES:
            raise ValueError(f"{where}, turn {position}: unknown `from` {one.get('from')!r}. {nearest('', _ROLES)}")
        if one["from"] != ("human", "gpt")[position % 2]:
            raise ValueError(f"{where}, turn {position}: `from` is {one['from']!r}; human and gpt must alternate.")
        turns.append(Turn(role=_ROLES[one["from"]], text=one["value"]))
    if IMAGE_MARK not in turns[0].text:
        raise ValueError(
            f"{where}: the first human turn has no {IMAGE_MARK}, so the model would not see the image; "
            f"let its value begin with {PROMPT_HEAD!r}."
        )
    return tuple(turns)


def _record(item: Mapping[str, Any], name: str, place: str, where: str) -> Record:
    label = parse_label(item.get("label"), where)
    stem = str(PurePosixPath(item["image"]).with_suffix(""))
    class_name = str(item.get("class_name") or "") if label == FAKE else ""
    tags = item.get("tags") or {}
    if not isinstance(tags, dict):
        raise ValueError(f"{where}: `tags` is {tags!r}; expected a mapping of names to values.")
    return Record(
        id=name,
        label=label,
        class_name=class_name or ("unknown" if label is None else LABEL_NAMES[label]),
        video=str(item.get("video") or stem),
        group=str(item.get("group") or item.get("video") or stem),
        where=place,
        split=str(item.get("split") or ""),
        tags={**{str(key): str(value) for key, value in tags.items()}, "image": item["image"]},
    )


def _unique(names: Sequence[str]) -> list[str]:
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    if len(set(unique)) != len(unique):
        raise ValueError("Two ids become the same after numbering repeats; let no id end in #2, #3 ….")
    return unique
