"""The label-flip test: the same image asked with the other label stated; does the answer follow image or statement?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava.core.types import FAKE, LABEL_NAMES, REAL
from llava.data.ddvqa_text import stated_label
from llava.evaluation.captions import CaptionItem, read_jsonl
from llava.evaluation.questions import TrainingPair, required_labels
from llava.evaluation.statistics import Interval, group_bootstraps, wilson
from llava.evaluation.text import parse_verdict, strip_tags

Reader = Callable[[Sequence[str]], list[int]]


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
