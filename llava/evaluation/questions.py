"""What a question alone tells: the label it states, and what training answers to the same question say."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from llava.core.types import FAKE
from llava.data.conversations import PROMPT_HEAD, read_conversations, read_turns
from llava.data.ddvqa_text import stated_label
from llava.evaluation.captions import CaptionItem, label_of, question_type
from llava.evaluation.statistics import group_bootstraps
from llava.evaluation.text import strip_tags

T = TypeVar("T", bound=Hashable)
By = Literal["question", "kind"]
TIE_RULE = "the most frequent training answer; among equally frequent ones the first in the order of their characters"


@dataclass(frozen=True, kw_only=True)
class TrainingPair:
    """One question with its answer from the training file; `label` is the image's, None where the file is silent."""

    question: str
    answer: str
    label: int | None


class Lookup(Generic[T]):
    """Count what was seen in training with each question, by its whole text and by its kind.

    Kind: the region asked about and the label stated. A text that training lacks is looked up by kind, a kind that it
    lacks among everything. Raises ValueError when there is nothing to count.
    """

    def __init__(self, seen: Iterable[tuple[str, T]]) -> None:
        self._by_text: defaultdict[str, Counter[T]] = defaultdict(Counter)
        for question, value in seen:
            self._by_text[question][value] += 1
        if not self._by_text:
            raise ValueError("The training file holds nothing to look up; give --train_path a file with answers.")
        self._by_kind: defaultdict[tuple[str, int | None], Counter[T]] = defaultdict(Counter)
        for question, counts in self._by_text.items():
            self._by_kind[_kind(question)].update(counts)
        self._all = sum(self._by_kind.values(), Counter[T]())

    def has(self, question: str, by: By) -> bool:
        """Tell whether training has the question's text, or its kind."""
        return question in self._by_text if by == "question" else _kind(question) in self._by_kind

    def most_frequent(self, question: str, by: By) -> T:
        """Give the most frequent value; among equally frequent ones the first in sorted order."""
        counts = next(
            (table[key] for table, key in self._tables(question, by) if key in table),
            self._all,
        )
        return min(counts, key=lambda value: (-counts[value], value))

    def _tables(self, question: str, by: By) -> list[tuple[dict[Any, Counter[T]], Any]]:
        kind = (self._by_kind, _kind(question))
        return [(self._by_text, question), kind] if by == "question" else [kind]


def read_training(path: str | Path) -> list[TrainingPair]:
    """Read every question and answer of a conversation json. Raises FileNotFoundError or ValueError."""
    pairs = []
    for index, record in enumerate(read_conversations(path)):
        where = f"{path}, record {index}"
        turns = read_turns(record, where)
        answers = [strip_tags(turn.text) for turn in turns[1::2]]
        label = label_of(Path(record["image"]).stem, answers, record.get("label"), where)
        pairs += [
            TrainingPair(question=question.text.removeprefix(PROMPT_HEAD), answer=answer, label=label)
            for question, answer in zip(turns[::2], answers, strict=False)
        ]
    return pairs


def leak_report(
    items: Sequence[CaptionItem], training: Sequence[TrainingPair], n_boot: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Give how many questions state a label, and how well the question text alone tells the label.

    A question states a label when it holds exactly one of the whole words `real` and `fake`. `predictability`: say of
    each test question the label that is more frequent for its text in training (ties: fake), with 95 %
    group-bootstrap interval; `prior`: say the label that is more frequent in all of training; `gain`: their difference.
    """
    labels = required_labels(items)
    known = [(pair.question, FAKE - pair.label) for pair in training if pair.label is not None]  # fake sorts first
    if not known:
        raise ValueError("No training record tells its label (a field `label`, or a DD-VQA image name).")
    told = Lookup(known)
    common = Lookup([("", value) for _, value in known]).most_frequent("", "question")
    by_question = np.array([FAKE - told.most_frequent(item.question, "question") for item in items])
    right = np.stack([by_question == labels, np.full(len(items), FAKE - common) == labels]).astype(float)

    def statistics(weights: np.ndarray) -> np.ndarray:
        question, prior = right @ weights / weights.sum()
        return np.array([question, prior, question - prior])

    intervals = group_bootstraps([item.group for item in items], statistics, n_boot, seed)
    return {
        "test": count_stated([item.question for item in items], labels.tolist()),
        "training": count_stated([pair.question for pair in training], [pair.label for pair in training]),
        "predictability": {
            name: interval.to_dict() for name, interval in zip(("question", "prior", "gain"), intervals, strict=True)
        },
        "distinct_questions": len({item.question for item in items}),
        "unseen_questions": sum(not told.has(item.question, "question") for item in items),
    }


def required_labels(items: Sequence[CaptionItem]) -> np.ndarray:
    """Give the labels (N,). Raises ValueError naming the first item without one."""
    for item in items:
        if item.label is None:
            raise ValueError(
                f"Truth {item.key!r}: the label is unknown; give the row a field `label` (real or fake), a DD-VQA "
                "name, or answers that state one verdict."
            )
    return np.array([item.label for item in items])


def count_stated(questions: Sequence[str], labels: Sequence[int | None]) -> dict[str, int]:
    """Count questions, those that state a label, and those whose statement is (not) the image's label."""
    pairs = [(stated_label(question), label) for question, label in zip(questions, labels, strict=True)]
    return {
        "n": len(pairs),
        "stated": sum(stated is not None for stated, _ in pairs),
        "true": sum(stated is not None and stated == label for stated, label in pairs),
        "false": sum(None not in (stated, label) and stated != label for stated, label in pairs),
    }


def _kind(question: str) -> tuple[str, int | None]:
    return question_type(question), stated_label(question)
