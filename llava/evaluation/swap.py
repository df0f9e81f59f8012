"""The swap gap: does an answer fit its own image better than other images with the same question?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

import numpy as np

from llava.evaluation import caption_metrics
from llava.evaluation.caption_metrics import BLEU_ORDER
from llava.evaluation.captions import CaptionItem
from llava.evaluation.statistics import group_bootstraps

T = TypeVar("T", bound=Hashable)
N_BLEU = 2 * BLEU_ORDER + 2
ROUGE_BETA = 1.2  # of pycocoevalcap
CIDER_SIGMA = 6.0  # of pycocoevalcap
PAIR_SCORES = ("bleu_4", "rouge_l", "cider")
# question -> (n, n, K) sums of statistics: row = whose answer, column = whose truth
PairTable = Callable[[Sequence[CaptionItem]], np.ndarray]
# summed statistics (K,) and how many pairs they are of -> scores
Score = Callable[[np.ndarray, float], np.ndarray]


@dataclass(frozen=True)
class _Vector:
    """TF-IDF weights of a text's n-grams, one mapping and one norm per order; `length` counts its bigrams."""

    weights: tuple[Mapping[tuple[str, ...], float], ...]
    norms: tuple[float, ...]
    length: int


class PairScorer:
    """BLEU statistics, ROUGE-L and CIDEr as pycocoevalcap computes them, with document frequencies held fixed.

    references: those of all items; CIDEr's document frequencies and number of documents come from them, whatever
    pairs are scored. Vedantam et al. 2015 (CIDEr-D, as the library); Lin 2004.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._library = caption_metrics.library("cider.cider_scorer")
        documents = self._library.CiderScorer()
        for refs in references:
            documents += (None, list(refs))
        documents.compute_doc_freq()
        self._frequency = documents.document_frequency
        self._log_documents = math.log(len(references))
        self._vectors: dict[str, _Vector] = {}

    def table(self, answers: Sequence[str], references: Sequence[tuple[str, ...]]) -> np.ndarray:
        """Give (len(answers), len(references), 12): ten BLEU statistics, ROUGE-L and CIDEr of every pair."""
        texts, text_of = _distinct(answers)
        truths, truth_of = _distinct(references)
        pairs = list(product(texts, truths))
        bleu = caption_metrics.bleu_statistics([text for text, _ in pairs], [refs for _, refs in pairs])
        masks = {ref: _positions(ref) for refs in truths for ref in refs}
        means = [(_rouge(text, refs, masks), self._cider(text, refs)) for text, refs in pairs]
        distinct = np.hstack([bleu, np.array(means)]).reshape(len(texts), len(truths), -1)
        return distinct[np.ix_(text_of, truth_of)]

    def _cider(self, text: str, references: Sequence[str]) -> float:
        own = self._vector(text)
        return 10 * sum(_similarity(own, self._vector(ref)) for ref in references) / len(references)

    def _vector(self, text: str) -> _Vector:
        if text not in self._vectors:
            weights: tuple[dict[tuple[str, ...], float], ...] = tuple({} for _ in range(BLEU_ORDER))
            for ngram, count in self._library.precook(text, BLEU_ORDER).items():
                rarity = self._log_documents - math.log(max(1.0, self._frequency.get(ngram, 0.0)))
                weights[len(ngram) - 1][ngram] = count * rarity
            norms = tuple(math.sqrt(sum(w * w for w in order.values())) for order in weights)
            self._vectors[text] = _Vector(weights, norms, max(0, len(text.split()) - 1))
        return self._vectors[text]


def pair_scores(sums: np.ndarray, n: float) -> np.ndarray:
    """Turn the summed columns (12,) of `n` pairs into BLEU-4 of the corpus, mean ROUGE-L and mean CIDEr."""
    return np.array([caption_metrics.bleu(sums[:N_BLEU])[-1], *(sums[N_BLEU:] / n)])


def _distinct(values: Sequence[T]) -> tuple[list[T], list[int]]:
    """Give the distinct values in order of appearance, and where each value stands among them."""
    places: dict[T, int] = {}
    order = [places.setdefault(value, len(places)) for value in values]
    return list(places), order


def _similarity(own: _Vector, other: _Vector) -> float:
    """Give the mean over n-gram orders of the clipped cosine, damped by the difference in length."""
    total = 0.0
    for mine, theirs, norm, other_norm in zip(own.weights, other.weights, own.norms, other.norms, strict=True):
        if norm and other_norm:
            shared = sum(min(mine[g], theirs[g]) * theirs[g] for g in mine.keys() & theirs.keys())
            total += shared / (norm * other_norm)
    return total / BLEU_ORDER * math.exp(-((own.length - other.length) ** 2) / (2 * CIDER_SIGMA**2))


def _positions(text: str) -> tuple[dict[str, int], int]:
    """Give each token's positions as a bit mask, and the number of tokens."""
    tokens = text.split(" ")
    masks: dict[str, int] = {}
    for place, token in enumerate(tokens):
        masks[token] = masks.get(token, 0) | 1 << place
    return masks, len(tokens)


def _rouge(text: str, references: Sequence[str], masks: Mapping[str, tuple[dict[str, int], int]]) -> float:
    """Give ROUGE-L: F of the best precision and the best recall over the references."""
    tokens = text.split(" ")
    common = [(_common_length(tokens, *masks[ref]), masks[ref][1]) for ref in references]
    precision = max(length for length, _ in common) / len(tokens)
    recall = max(length / total for length, total in common)
    if not precision:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _common_length(tokens: Sequence[str], masks: Mapping[str, int], total: int) -> int:
    """Give the length of the longest common subsequence, a whole row of the table as one integer. Hyyro 2004."""
    everything = (1 << total) - 1
    row = everything
    for token in tokens:
        matches = row & masks.get(token, 0)
        row = ((row + matches) | (row - matches)) & everything
    return total - row.bit_count()


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
