"""Caption scores of any answer against any item's references, each pair of texts computed once."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import numpy as np

from llava.evaluation import caption_metrics
from llava.evaluation.caption_metrics import BLEU_ORDER

T = TypeVar("T", bound=Hashable)
N_BLEU = 2 * BLEU_ORDER + 2
ROUGE_BETA = 1.2  # of pycocoevalcap
CIDER_SIGMA = 6.0  # of pycocoevalcap
PAIR_SCORES = ("bleu_4", "rouge_l", "cider")


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
