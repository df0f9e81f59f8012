"""The swap gap: does an answer fit its own image better than other images with the same question?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava.evaluation.caption_pairs import PAIR_SCORES, PairScorer, pair_scores
from llava.evaluation.captions import CaptionItem
from llava.evaluation.statistics import group_bootstraps

# question -> (n, n, K) sums of statistics: row = whose answer, column = whose truth
PairTable = Callable[[Sequence[CaptionItem]], np.ndarray]
# summed statistics (K,) and how many pairs they are of -> scores
Score = Callable[[np.ndarray, float], np.ndarray]


@dataclass(frozen=True)
class _Block:
    """Items with one question. own: (n, K). others: (n, n * (K + 1)), row j = what item j adds to every item's sum."""

    rows: np.ndarray
    own: np.ndarray
    others: np.ndarray

    def sums(self, weights: np.ndarray) -> np.ndarray:
        """Give (2K + 1,): own statistics, mean statistics of the others, number of items that have others."""
        drawn = weights[self.rows]
        found = (drawn @ self.others).reshape(len(self.rows), -1)
        drawn = np.where(found[:, -1] > 0, drawn, 0.0)
        means = found[:, :-1] / np.maximum(found[:, -1:], 1e-300)
        return np.concatenate([drawn @ self.own, drawn @ means, [drawn.sum()]])


def caption_swap(
    items: Sequence[CaptionItem], n_boot: int = 2000, seed: int = 0, same_label: bool = False
) -> dict[str, Any] | None:
    """Give own score, mean score on other images with the same question, and their difference, per metric.

    BLEU-4 is the corpus score of the pairs' mean statistics; ROUGE-L and CIDEr are means over items, CIDEr with the
    document frequencies of all references. `same_label`: only other images of the same label, so that a right verdict
    alone makes no gap; None when that excludes nobody (every question states its label). See `swap_gap`.
    """
    scorer = PairScorer([item.references for item in items])

    def table(chosen: Sequence[CaptionItem]) -> np.ndarray:
        return scorer.table([item.answer for item in chosen], [item.references for item in chosen])

    return swap_gap(items, table, pair_scores, PAIR_SCORES, n_boot, seed, same_label)


def swap_gap(
    items: Sequence[CaptionItem],
    table: PairTable,
    score: Score,
    names: Sequence[str],
    n_boot: int = 2000,
    seed: int = 0,
    same_label: bool = False,
) -> dict[str, Any] | None:
    """Score each answer on its own truth and, on average, on those of all other images with the same question.

    Items without another image are left out and counted (`alone`). Intervals: 95 % group bootstrap in which a drawn
    group counts in both roles, as answers and as the other images; within a resample an image never meets itself.
    """
    by_question: defaultdict[str, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        by_question[item.question].append(number)
    masks = {question: _other(items, rows, same_label) for question, rows in by_question.items()}
    if same_label and all((masks[q] == _other(items, rows, False)).all() for q, rows in by_question.items()):
        return None
    blocks = [_block(items, rows, masks[q], table) for q, rows in by_question.items() if masks[q].any()]
    n = int(sum(mask.any(axis=1).sum() for mask in masks.values()))
    if not n:
        return {"n": 0, "alone": len(items)}

    def statistics(weights: np.ndarray) -> np.ndarray:
        sums = np.sum([block.sums(weights) for block in blocks], axis=0)
        if not sums[-1]:
            return np.full(3 * len(names), np.nan)
        own, swapped = (score(part, sums[-1]) for part in np.split(sums[:-1], 2))
        return np.concatenate([own, swapped, own - swapped])

    intervals = iter(group_bootstraps([item.group for item in items], statistics, n_boot, seed))
    parts = {part: {name: next(intervals).to_dict() for name in names} for part in ("own", "swapped", "gap")}
    return {"n": n, "alone": len(items) - n, **parts}


def _other(items: Sequence[CaptionItem], rows: Sequence[int], same_label: bool) -> np.ndarray:
    """Give (n, n): may item i be measured on the truth of item j?"""
    images = np.array([items[row].image for row in rows])
    mask = images[:, None] != images
    if same_label:
        labels = np.array([items[row].label for row in rows])
        mask &= labels[:, None] == labels
    return mask


def _block(items: Sequence[CaptionItem], rows: Sequence[int], mask: np.ndarray, table: PairTable) -> _Block:
    pairs = table([items[row] for row in rows])
    with_count = np.concatenate([pairs, np.ones((*mask.shape, 1))], axis=2) * mask[:, :, None]
    others = with_count.transpose(1, 0, 2).reshape(len(rows), -1)
    return _Block(np.array(rows), pairs[np.arange(len(rows)), np.arange(len(rows))], others)
