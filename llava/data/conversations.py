"""LLaVA conversation files: a json list of {id, image, conversations}, read as a source, written from labels."""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from llava.core.config import setting
from llava.core.input_specs import Wants
from llava.core.registry import nearest
from llava.core.runtime import atomic_path, item_rng, write_json
from llava.core.types import FAKE, LABEL_NAMES, REAL, REGIONS, Record, Sample, Turn
from llava.data.answer_texts import KIND_TAG, VERDICT_QUESTION, Pair, class_sentence
from llava.data.images import open_store, require_files
from llava.data.sources import DataConfig, open_source, parse_label, split_of
from llava.data.stills import ImageSource

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

    def load(self, record: Record, rng: np.random.Generator | None = None, wants: Wants | None = None) -> Sample:
        """Read the record's image and give its turns."""
        sample = super().load(record, rng, wants)
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


@dataclass(frozen=True, kw_only=True)
class VerdictConfig:
    """Say which data, and where the conversation files go."""

    data: DataConfig = setting(help="labelled images, as for stage 1")
    output: str = setting(help="folder to write; it gets train/, val/ and test/verdict_only.json")
    kinds: bool = setting(False, "answers say which kind of fake it is, by class name: a deepfake, AI-generated")


def build_verdicts(config: VerdictConfig) -> dict[str, int]:
    """Write {train,val,test}/verdict_only.json; image names are absolute paths, so no image folder is needed.

    Returns the number of records per file. Raises ValueError for an image that lies in a zip or has no label.
    """
    source = open_source(config.data)
    counts = {}
    for split, name in (("train", config.data.train), ("val", config.data.val), ("test", config.data.test)):
        rows = _rows(split_of(source, name), config.kinds)
        path = Path(config.output) / split / "verdict_only.json"
        write_json(path, rows)
        counts[f"{split}/{path.name}"] = len(rows)
    return counts


def _rows(records: Sequence[Record], says_kind: bool) -> list[dict[str, Any]]:
    return [
        {
            "id": record.id,
            "image": _file(record),
            "label": _label_name(record),
            "class_name": record.class_name,
            "video": record.video,
            "group": record.group,
            **({"tags": {KIND_TAG: _kind(record)}} if says_kind else {}),
            "conversations": [
                {"from": "human", "value": PROMPT_HEAD + VERDICT_QUESTION},
                {"from": "gpt", "value": class_sentence((says_kind and _kind(record)) or _label_name(record))},
            ],
        }
        for record in records
    ]


def _kind(record: Record) -> str:
    """Give the class of a fake that has one beside `fake`, else an empty name."""
    return record.class_name if record.class_name not in LABEL_NAMES else ""


def _label_name(record: Record) -> str:
    if record.label is None:
        raise ValueError(f"Record {record.id!r} has no label; a verdict needs one.")
    return LABEL_NAMES[record.label]


def _file(record: Record) -> str:
    path = Path(os.path.abspath(record.where))  # noqa: PTH100 - resolve() would follow links out of the data folder
    if not path.is_file():
        raise ValueError(f"Record {record.id!r} ({record.where}) is no file of its own; unpack the archive first.")
    return str(path)
