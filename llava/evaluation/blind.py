"""What is won without the image: labels that questions state, templates, and answers that follow a stated label."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from llava.core.types import FAKE, LABEL_NAMES, REAL
from llava.data.answer_texts import stated_label
from llava.data.conversations import PROMPT_HEAD, read_conversations, read_turns
from llava.evaluation import caption_metrics
from llava.evaluation.captions import CaptionItem, ItemScores, item_scores, label_of, question_type, read_jsonl
from llava.evaluation.statistics import Interval, group_bootstraps, percentile_intervals, resampled_weights, wilson
from llava.evaluation.text import parse_verdict, strip_tags

T = TypeVar("T", bound=Hashable)
By = Literal["question", "kind"]
TIE_RULE = "the most frequent training answer; among equally frequent ones the first in the order of their characters"
BLIND = {"kind": "region asked about and label stated", "question": "whole text of the question"}
Reader = Callable[[Sequence[str]], list[int]]


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


def against_blind_guess(
    truths: Sequence[str], answers: Sequence[str], groups: Sequence[str], n_boot: int = 2000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Give the shares of right answers: of all, of the blind guess, the first minus the second, and of each truth.

    The blind guess is the most frequent truth among these; the key names it. All see the same resamples; as plain
    values with the number of `images`.
    """
    counts = Counter(truths)
    guess = min(counts, key=lambda name: (-counts[name], name))
    right, names = np.asarray(truths) == np.asarray(answers), np.asarray(truths)

    def shares(weights: np.ndarray) -> np.ndarray:
        whole, blind = (np.average(hits, weights=weights) for hits in (right, names == guess))
        drawn = [(names == name) * weights for name in sorted(counts)]
        return np.array([whole, blind, whole - blind, *(w @ right / w.sum() if w.any() else math.nan for w in drawn)])

    titles = {name: len(truths) for name in ("all", f"blind guess ({guess})", "all minus blind guess")}
    titles |= {name: counts[name] for name in sorted(counts)}
    intervals = group_bootstraps(groups, shares, n_boot, seed, jointly=False)
    return {
        title: interval.to_dict() | {"images": images}
        for (title, images), interval in zip(titles.items(), intervals, strict=True)
    }


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
    known_answers = Lookup(known)
    common = Lookup([("", value) for _, value in known]).most_frequent("", "question")
    by_question = np.array([FAKE - known_answers.most_frequent(item.question, "question") for item in items])
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
        "unseen_questions": sum(not known_answers.has(item.question, "question") for item in items),
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


def template_answers(items: Sequence[CaptionItem], training: Sequence[TrainingPair], by: By) -> list[str]:
    """Answer each question with the most frequent training answer; ties go to the first in the order of characters.

    `by`: answers to the same text, or to the same kind (region asked about, label stated). A text that training lacks
    is looked up by kind, a kind that it lacks among all answers.
    """
    lookup = Lookup((pair.question, pair.answer) for pair in training)
    return [lookup.most_frequent(item.question, by) for item in items]


def own_verdict_answers(items: Sequence[CaptionItem], training: Sequence[TrainingPair]) -> list[str] | None:
    """Answer like `template_answers` by kind, among training answers about the label that the prediction itself says.

    A model whose words add nothing to its verdict scores like this. An answer without a verdict gets the blind
    template. None when fewer than half of the answers say a verdict, or training does not know both labels.
    """
    verdicts = [parse_verdict(item.answer) for item in items]
    by_label = {label: [pair for pair in training if pair.label == label] for label in (REAL, FAKE)}
    if 2 * sum(verdict is not None for verdict in verdicts) < len(items) or not all(by_label.values()):
        return None
    choices: dict[int | None, list[str]] = {
        label: template_answers(items, pairs, "kind") for label, pairs in by_label.items()
    }
    choices[None] = template_answers(items, training, "kind")
    return [choices[verdict][number] for number, verdict in enumerate(verdicts)]


def template_report(
    items: Sequence[CaptionItem], training: Sequence[TrainingPair], n_boot: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Give every caption score of predictions and templates, and predictions minus each template, paired.

    `scores` and `difference` are by system: predictions, kind, question, own_verdict. The template by question is left
    out where it says the same as that by kind, the one by own verdict where answers say none. `unseen`: test questions
    whose text or kind training lacks.
    """
    lookup = Lookup((pair.question, pair.answer) for pair in training)
    systems = {"predictions": [item.answer for item in items]}
    systems["kind"] = template_answers(items, training, "kind")
    if (exact := template_answers(items, training, "question")) != systems["kind"]:
        systems["question"] = exact
    if (known_answers := own_verdict_answers(items, training)) not in (None, systems["kind"]):
        systems["own_verdict"] = known_answers
    groups = np.array([item.group for item in items])
    return {
        "rule": TIE_RULE,
        "unseen": {by: sum(not lookup.has(item.question, by) for item in items) for by in ("question", "kind")},
        "distinct_answers": {name: len(set(answers)) for name, answers in systems.items()},
        **compare_systems(systems, [item.references for item in items], groups, n_boot, seed),
    }


def compare_systems(
    systems: Mapping[str, Sequence[str]],
    references: Sequence[tuple[str, ...]],
    groups: np.ndarray,
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Give `scores` of every system, and as `difference` the first minus every other; all see the same resamples."""
    meteor = None if caption_metrics.why_no_java() else caption_metrics.Meteor()
    scored = [item_scores(answers, references, meteor) for answers in systems.values()]

    def statistics(weights: np.ndarray) -> np.ndarray:
        return _with_differences(np.stack([scores.of(weights) for scores in scored])).ravel()

    intervals = iter(group_bootstraps(groups, statistics, n_boot, seed))
    rows = [("scores", name) for name in systems] + [("difference", name) for name in list(systems)[1:]]
    report: dict[str, Any] = {"scores": {}, "difference": {}, "skipped": scored[0].skipped}
    for part, name in rows:
        report[part][name] = {metric: next(intervals).to_dict() for metric in scored[0].names}
    if meteor is not None:
        for (part, name), interval in zip(rows, _meteor_intervals(meteor, scored, groups, n_boot, seed), strict=True):
            report[part][name]["meteor"] = interval.to_dict()
    return report


def _with_differences(values: np.ndarray) -> np.ndarray:
    """Append the first row minus each other row: (S, ...) to (2 S - 1, ...)."""
    return np.concatenate([values, values[:1] - values[1:]])


def _meteor_intervals(
    meteor: caption_metrics.Meteor, scored: Sequence[ItemScores], groups: np.ndarray, n_boot: int, seed: int
) -> list[Interval]:
    """Score the same resamples of every system, one call of the Java process each."""
    draws = [np.ones(len(groups)), *resampled_weights(groups, n_boot, seed)]
    tables = [scores.meteor for scores in scored if scores.meteor is not None]
    values = _with_differences(np.stack([meteor.scores(np.stack([w @ table for w in draws])) for table in tables]))
    n_groups = len(set(groups))
    if n_groups < 2:
        return [Interval(float(value), math.nan, math.nan, n_groups) for value in values[:, 0]]
    return percentile_intervals(values[:, 0], values[:, 1:].T, n_groups)


def read_flipped(path: str | Path, items: Sequence[CaptionItem]) -> dict[str, str]:
    """Read the answers {key: text} of `stage_3_inference_exp.sh --flip_stated_label true` to these questions.

    Raises ValueError naming the line when a row lacks key, prompt or text, repeats a key, or its prompt does not state
    the other label than the question of that key, and when no key is known.
    """
    stated = {item.key: stated_label(item.question) for item in items}
    answers: dict[str, str] = {}
    for where, row in read_jsonl(path):
        if not {"key", "prompt", "text"} <= row.keys():
            raise ValueError(f"{where}: expected the fields key, prompt and text, got {', '.join(row)}.")
        if row["key"] in answers:
            raise ValueError(f"{where}: key {row['key']!r} is given twice.")
        label = stated.get(row["key"])
        if label is not None and stated_label(row["prompt"]) != 1 - label:
            raise ValueError(
                f"{where}: the prompt does not state {LABEL_NAMES[1 - label]!r}, the other label than the question of "
                f"{row['key']!r}; write the file with stage_3_inference_exp.sh --flip_stated_label true."
            )
        answers[row["key"]] = strip_tags(row["text"])
    if not any(stated.get(key) is not None for key in answers):
        raise ValueError(f"{str(path)!r} answers no question that states a label; give the matching pair of files.")
    return answers


def label_reader(training: Sequence[TrainingPair]) -> Reader:
    """Give a function that reads the label a text speaks for, from its verdict, else from its wording.

    Wording: logistic regression on TF-IDF of words and word pairs, fitted on the training answers and their labels.
    Raises ValueError when training does not know both labels.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    known = [(pair.answer, pair.label) for pair in training if pair.label is not None]
    if {label for _, label in known} != {REAL, FAKE}:
        raise ValueError("The label-flip test needs training answers about real and about fake images.")
    wording = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+"), LogisticRegression(max_iter=1000)
    )
    wording.fit([answer for answer, _ in known], [label for _, label in known])

    def read(texts: Sequence[str]) -> list[int]:
        verdicts = [parse_verdict(text) for text in texts]
        guesses = wording.predict(list(texts)).tolist()
        return [guess if verdict is None else verdict for verdict, guess in zip(verdicts, guesses, strict=True)]

    return read


def flip_report(
    items: Sequence[CaptionItem],
    training: Sequence[TrainingPair],
    flipped: Mapping[str, str],
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Give how often the answers speak for the label stated, before and after it is flipped.

    Items: those whose question states the image's true label and that `flipped` answers again; `left_out` counts the
    others. `follows`: answers to the flipped question that speak for the flipped label, against the image;
    `before`: answers to the original question that speak for the label it states; `both`: follows and before, so that
    the statement alone moved the answer; `unchanged`: the same text twice.
    `by_label`: follows, by the image's label. `reader`: on how many of the references the reader reads the image's
    label (Wilson); a number here is worth no more than that. Other intervals: 95 % group bootstrap.
    """
    labels = required_labels(items)
    chosen = [
        number for number, i in enumerate(items) if i.key in flipped and stated_label(i.question) == labels[number]
    ]
    if not chosen:
        raise ValueError("No question states the label of its image, so the label-flip test has nothing to look at.")
    own, truth = [items[number] for number in chosen], labels[chosen]
    read = label_reader(training)
    follows = np.array(read([flipped[item.key] for item in own])) != truth
    before = np.array(read([item.answer for item in own])) == truth
    unchanged = np.array([flipped[item.key] == item.answer for item in own])
    columns = {"follows": follows, "before": before, "both": follows & before, "unchanged": unchanged}
    table = np.stack(list(columns.values())).astype(float)
    intervals = group_bootstraps([item.group for item in own], lambda w: table @ w / w.sum(), n_boot, seed)
    return {
        "n": len(own),
        "left_out": len(items) - len(own),
        **{name: interval.to_dict() for name, interval in zip(columns, intervals, strict=True)},
        "by_label": {
            name: wilson(int(follows[truth == label].sum()), int((truth == label).sum())).to_dict()
            for label, name in enumerate(LABEL_NAMES)
        },
        "reader": _read_rightly(read, own, truth).to_dict(),
    }


def _read_rightly(read: Reader, items: Sequence[CaptionItem], labels: np.ndarray) -> Interval:
    references = [(ref, label) for item, label in zip(items, labels, strict=True) for ref in item.references]
    said = read([ref for ref, _ in references])
    return wilson(sum(s == label for s, (_, label) in zip(said, references, strict=True)), len(said))
