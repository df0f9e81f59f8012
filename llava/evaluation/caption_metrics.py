"""Caption scores of pycocoevalcap, item by item, as statistics that can be summed over any resample.

A summed statistic is turned into the score that the library gives for those items: BLEU and METEOR are scores of the
whole corpus, not means over items.
"""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

BLEU_ORDER = 4
METEOR_TEST_LENGTH, METEOR_REFERENCE_LENGTH, METEOR_CHUNKS, METEOR_TEST_MATCHES, METEOR_REFERENCE_MATCHES = (
    0,
    1,
    20,
    21,
    22,
)
SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def library(name: str) -> ModuleType:
    """Import a module of pycocoevalcap. Raises ValueError that names the extra to install."""
    try:
        return importlib.import_module(f"pycocoevalcap.{name}")
    except ModuleNotFoundError as error:
        raise ValueError(f"Caption scores need {error.name}: pip install 'm2f2-det[eval]'.") from error


def why_no_java() -> str | None:
    """Say why Java programs cannot run here; None when they can."""
    return None if shutil.which("java") else "no `java` on the PATH; install a Java runtime (8 or newer)"


def why_no_spice() -> str | None:
    """Say why SPICE cannot run here; None when it can. Nothing is ever downloaded."""
    folder = Path(library("spice.spice").__file__ or "").parent / "lib"
    missing = [name for name in SPICE_MODELS if not (folder / name).is_file()]
    if missing:
        return f"its models are not on disk: put {' and '.join(missing)} into pycocoevalcap's spice/lib"
    return why_no_java()


def bleu_statistics(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Give (N, 10): matches and n-grams of order 1 to 4, answer length, length of the closest reference."""
    scorer = library("bleu.bleu_scorer")
    counts = {refs: scorer.cook_refs(refs, n=BLEU_ORDER) for refs in set(map(tuple, references))}
    rows = []
    for answer, refs in zip(answers, references, strict=True):
        cooked = scorer.cook_test(answer, counts[tuple(refs)], n=BLEU_ORDER)
        length = cooked["testlen"]
        closest = min((abs(ref - length), ref) for ref in cooked["reflen"])[1]
        rows.append([*cooked["correct"], *cooked["guess"], length, closest])
    return np.array(rows, dtype=float)


def bleu(sums: np.ndarray) -> np.ndarray:
    """Turn summed statistics (10,) into BLEU-1 to BLEU-4. Papineni et al. 2002."""
    correct, guess, (length, reference) = sums[:BLEU_ORDER], sums[BLEU_ORDER : 2 * BLEU_ORDER], sums[2 * BLEU_ORDER :]
    precision = (correct + 1e-15) / (guess + 1e-9)  # the library's guards against 0 / 0
    ratio = (length + 1e-15) / (reference + 1e-9)
    brevity = np.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return np.cumprod(precision) ** (1 / np.arange(1, BLEU_ORDER + 1)) * brevity


def rouge_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Give ROUGE-L of each item (N,); its mean is the score. Lin 2004."""
    scorer = library("rouge.rouge").Rouge()
    return np.array([scorer.calc_score([a], list(refs)) for a, refs in zip(answers, references, strict=True)])


def cider_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Give CIDEr of each item (N,) with the document frequencies of all references; its mean is the score."""
    truths, results = _keyed(answers, references)
    return np.asarray(library("cider.cider").Cider().compute_score(truths, results)[1])


def spice_scores(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """Give SPICE (F) of each item (N,); its mean is the score. Needs `why_no_spice()` to be None."""
    truths, results = _keyed(answers, references)
    items = library("spice.spice").Spice().compute_score(truths, results)[1]
    return np.array([item["All"]["f"] for item in items])


class Meteor:
    """METEOR 1.5 through the library's Java process."""

    def __init__(self) -> None:
        self._process = library("meteor.meteor").Meteor()

    def statistics(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """Give (N, 23) statistics whose sums over items give the corpus score.

        An answer equal to its reference has one chunk and no fragmentation; METEOR's own sum leaves that chunk
        out, so it is left out here.
        """
        lines = [
            self._process._stat(_one_line(answer), [_one_line(r) for r in refs])
            for answer, refs in zip(answers, references, strict=True)
        ]
        rows = np.array([[float(number) for number in line.split()] for line in lines])
        whole = (
            (rows[:, METEOR_CHUNKS] == 1)
            & (rows[:, METEOR_TEST_MATCHES] == rows[:, METEOR_TEST_LENGTH])
            & (rows[:, METEOR_REFERENCE_MATCHES] == rows[:, METEOR_REFERENCE_LENGTH])
        )
        rows[whole, METEOR_CHUNKS] = 0
        return rows

    def scores(self, sums: np.ndarray) -> np.ndarray:
        """Turn summed statistics (K, 23) into METEOR scores (K,)."""
        line = "EVAL" + "".join(" ||| " + " ".join(str(float(x)) for x in row) for row in sums)
        pipe = self._process.meteor_p
        pipe.stdin.write(f"{line}\n".encode())
        pipe.stdin.flush()
        found = [float(pipe.stdout.readline()) for _ in range(len(sums) + 1)]
        return np.array(found[:-1])  # the last one is the score of all rows together


def ptb_tokenised(texts: Sequence[str]) -> list[str]:
    """Tokenise, lower-case and drop punctuation as COCO's caption evaluation does (Java)."""
    tokeniser = library("tokenizer.ptbtokenizer").PTBTokenizer()
    found = tokeniser.tokenize({i: [{"caption": _one_line(text)}] for i, text in enumerate(texts)})
    if len(found) != len(texts):
        raise ValueError(f"The PTB tokeniser gave {len(found)} lines for {len(texts)} texts; check `java -version`.")
    return [found[i][0] for i in range(len(texts))]


def _keyed(
    answers: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Key items so that their sorted order is their own order, which SPICE relies on."""
    keys = [f"{i:09d}" for i in range(len(answers))]
    return dict(zip(keys, map(list, references), strict=True)), {k: [a] for k, a in zip(keys, answers, strict=True)}


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("|||", " ")).strip()
