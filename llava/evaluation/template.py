"""The image-blind template: answers looked up in the training file by the question alone, scored like predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llava.core.types import FAKE, REAL
from llava.evaluation import caption_metrics
from llava.evaluation.captions import CaptionItem, ItemScores, item_scores
from llava.evaluation.questions import TIE_RULE, By, Lookup, TrainingPair
from llava.evaluation.statistics import Interval, group_bootstraps, percentile_intervals, resampled_weights
from llava.evaluation.text import parse_verdict

BLIND = {"kind": "region asked about and label stated", "question": "whole text of the question"}


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
    if (told := own_verdict_answers(items, training)) not in (None, systems["kind"]):
        systems["own_verdict"] = told
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
