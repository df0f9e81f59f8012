"""Score explanations against references: BLEU, ROUGE-L, CIDEr, METEOR, SPICE, per question type, with intervals."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llava.core.types import FAKE, LABEL_NAMES, REAL
from llava.data.ddvqa import MANIPULATIONS
from llava.data.sources import parse_label
from llava.data.splits import connected_groups
from llava.evaluation import caption_metrics
from llava.evaluation.statistics import Interval, group_bootstraps, percentile_intervals, resampled_weights
from llava.evaluation.text import parse_verdict, strip_tags

QUESTION_TYPES = ("image", "skin", "eyebrows", "eyes", "nose", "mouth")
_REGION_QUESTION = re.compile(
    r"\s*(?:do(?:es)?|is|are|why)?\s*the (?:person's )?(skin|eyebrows|eyes|nose|mouth)\b", re.I
)
_DDVQA_IMAGE = re.compile(r"[0-6](?:_\d+)+")


@dataclass(frozen=True, kw_only=True)
class CaptionItem:
    """One answer with its references. `group`: unit of the bootstrap; items of one image share it.

    label: the image's, None where the files do not tell. region, artefact: where and how a forged image was edited, if
    the truth says.
    """

    key: str
    question: str
    answer: str
    references: tuple[str, ...]
    group: str
    label: int | None = None
    region: str | None = None
    artefact: str | None = None

    @property
    def image(self) -> str:
        """Give the image's name: the key without the number of the question."""
        return self.key.rpartition("_")[0]


@dataclass(frozen=True, kw_only=True)
class CaptionSet:
    """Items in the order of the ground truth, and what did not match. A missing answer is scored as an empty one."""

    items: tuple[CaptionItem, ...]
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


@dataclass
class ItemScores:
    """What the bootstrap sums: one row per item, one column per additive statistic, and METEOR's own statistics."""

    means: list[str]
    columns: np.ndarray
    meteor: np.ndarray | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Name what `of` gives: BLEU-1 to 4, their mean, and the scores that are means over items."""
        return [*(f"bleu_{i + 1}" for i in range(caption_metrics.BLEU_ORDER)), "bleu_mean", *self.means]

    def of(self, weights: np.ndarray) -> np.ndarray:
        """Give the scores `names` of items drawn `weights` (N,) times."""
        n_bleu = 2 * caption_metrics.BLEU_ORDER + 2
        sums = weights @ self.columns
        bleus = caption_metrics.bleu(sums[:n_bleu])
        return np.concatenate([bleus, [bleus.mean()], sums[n_bleu:] / weights.sum()])

    def take(self, rows: np.ndarray) -> ItemScores:
        """Give the chosen rows (N,), a mask or indices, as scores of their own."""
        return replace(self, columns=self.columns[rows], meteor=None if self.meteor is None else self.meteor[rows])


def question_type(question: str) -> str:
    """Give the region a question is about (skin, eyebrows, eyes, nose, mouth), else `image`."""
    found = _REGION_QUESTION.match(question)
    return found.group(1).lower() if found else "image"


def read_caption_set(predict_path: str | Path, gt_path: str | Path) -> CaptionSet:
    """Pair the rows {key, text} of a prediction file with the rows {key: {question, answer: [...]}} of a truth file.

    A truth may carry `label` (real, fake, 0, 1), `region`, `artefact` and `group`. Without a label it is the one in a
    DD-VQA file name, else what the references say. Raises FileNotFoundError, or ValueError naming the line, for
    unreadable rows and repeated keys, and when no key of the two files is the same.
    """
    answers: dict[str, str] = {}
    for where, row in read_jsonl(predict_path):
        if not {"key", "text"} <= row.keys():
            raise ValueError(f"{where}: expected the fields key and text, got {', '.join(row)}.")
        _add(answers, row["key"], strip_tags(row["text"]), where)
    truths: dict[str, dict[str, Any]] = {}
    for where, row in read_jsonl(gt_path):
        for key, truth in row.items():
            if not isinstance(truth, dict) or not truth.get("question") or not truth.get("answer"):
                raise ValueError(f"{where}: expected {{key: {{question, answer: [...]}}}}, got key {key!r}: {truth!r}.")
            _add(truths, key, truth, where)
    if not truths.keys() & answers.keys():
        raise ValueError(f"{str(predict_path)!r} answers no key of {str(gt_path)!r}; give the matching pair of files.")
    groups = image_groups([key.rpartition("_")[0] for key in truths])
    return CaptionSet(
        items=tuple(
            _item(key, truth, answers.get(key, ""), group)
            for (key, truth), group in zip(truths.items(), groups, strict=True)
        ),
        missing=tuple(k for k in truths if k not in answers),
        extra=tuple(k for k in answers if k not in truths),
    )


def label_of(image: str, answers: Sequence[str], stated: object = None, where: str = "") -> int | None:
    """Give an image's label: the one stated, else by its DD-VQA name, else what all answers about it say; else None."""
    if (label := parse_label(stated, where)) is not None:
        return label
    number = image.partition("_")[0]
    if _DDVQA_IMAGE.fullmatch(image) and number in MANIPULATIONS:
        return REAL if MANIPULATIONS[number] == LABEL_NAMES[REAL] else FAKE
    said = {verdict for a in answers if (verdict := parse_verdict(a)) is not None}
    return said.pop() if len(said) == 1 else None


def read_jsonl(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Read (place, object) of each line. Raises FileNotFoundError or ValueError naming file and line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist; run the inference script first or give another path.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{str(path)!r}, line {number}"
        try:
            row = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg}).") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}.")
        rows.append((where, row))
    return [(where, row) for where, row in rows if row]


def image_groups(images: Sequence[str]) -> list[str]:
    """Give each image name its group: images that share a FaceForensics++ video id; other names stand alone."""
    return connected_groups([n.split("_")[1:] if _DDVQA_IMAGE.fullmatch(n) else [f"image {n}"] for n in images])


def score_captions(captions: CaptionSet, ptb: bool = False, n_boot: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Give every score as value and 95 % group-bootstrap interval, over all questions and per question type.

    `ptb`: the PTB tokeniser of the literature (Java); default is the published way: whitespace tokens, case kept.
    BLEU and METEOR of a resample are corpus scores from summed statistics; ROUGE-L, CIDEr and SPICE are means
    over items, with CIDEr's document frequencies taken from all references. `skipped` says what is missing and why.
    """
    answers = [item.answer for item in captions.items]
    references = [item.references for item in captions.items]
    if ptb:
        answers, references = _ptb(answers, references)
    meteor = None if caption_metrics.why_no_java() else caption_metrics.Meteor()
    scores = item_scores(answers, references, meteor)
    types = np.array([question_type(item.question) for item in captions.items])
    groups = np.array([item.group for item in captions.items])
    chosen = {"all": np.ones(len(types), dtype=bool)} | {t: types == t for t in QUESTION_TYPES if t in types}
    return {
        "tokenisation": "ptb" if ptb else "whitespace, case kept (as published)",
        "bootstrap": {"n_boot": n_boot, "seed": seed, "level": 0.95, "unit": "group"},
        "n": {
            "items": len(types),
            "groups": len(set(groups)),
            "missing": list(captions.missing),
            "extra": list(captions.extra),
            "verbatim": sum(i.answer in i.references for i in captions.items),
            "types": dict(Counter(types.tolist())),
        },
        "scores": {name: _report(scores, rows, groups, meteor, n_boot, seed) for name, rows in chosen.items()},
        "skipped": scores.skipped,
    }


def _ptb(answers: list[str], references: list[tuple[str, ...]]) -> tuple[list[str], list[tuple[str, ...]]]:
    if reason := caption_metrics.why_no_java():
        raise ValueError(f"The PTB tokeniser needs Java: {reason}, or leave out --ptb.")
    texts = caption_metrics.ptb_tokenised([*answers, *(r for refs in references for r in refs)])
    rest = iter(texts[len(answers) :])
    return texts[: len(answers)], [tuple(next(rest) for _ in refs) for refs in references]


def item_scores(
    answers: Sequence[str], references: Sequence[tuple[str, ...]], meteor: caption_metrics.Meteor | None = None
) -> ItemScores:
    """Score every answer; what cannot run here is in `skipped` with the reason."""
    columns = [
        caption_metrics.bleu_statistics(answers, references),
        caption_metrics.rouge_scores(answers, references)[:, None],
        caption_metrics.cider_scores(answers, references)[:, None],
    ]
    scores = ItemScores(["rouge_l", "cider"], np.empty(0))
    if reason := caption_metrics.why_no_spice():
        scores.skipped["spice"] = reason
    else:
        scores.means.append("spice")
        columns.append(caption_metrics.spice_scores(answers, references)[:, None])
    if meteor is None:
        scores.skipped["meteor"] = caption_metrics.why_no_java() or ""
    else:
        scores.meteor = meteor.statistics(answers, references)
    scores.columns = np.hstack(columns)
    return scores


def _report(
    scores: ItemScores,
    rows: np.ndarray,
    groups: np.ndarray,
    meteor: caption_metrics.Meteor | None,
    n_boot: int,
    seed: int,
) -> dict[str, Any]:
    own, own_groups = scores.take(rows), groups[rows]
    report = dict(zip(own.names, group_bootstraps(own_groups, own.of, n_boot, seed), strict=True))
    if meteor is not None and own.meteor is not None:
        report["meteor"] = _meteor_interval(meteor, own.meteor, own_groups, n_boot, seed)
    return {name: interval.to_dict() for name, interval in report.items()} | {"n": int(rows.sum())}


def _meteor_interval(
    meteor: caption_metrics.Meteor, rows: np.ndarray, groups: np.ndarray, n_boot: int, seed: int
) -> Interval:
    """Score every resample in one call of the Java process."""
    n_groups = len(set(groups))
    draws = [weights @ rows for weights in resampled_weights(groups, n_boot, seed)]
    value, *replicates = meteor.scores(np.stack([rows.sum(axis=0), *draws]))
    if n_groups < 2:
        return Interval(float(value), float("nan"), float("nan"), n_groups)
    return percentile_intervals(np.array([value]), np.array(replicates)[:, None], n_groups)[0]


def _item(key: str, truth: dict[str, Any], answer: str, group: str) -> CaptionItem:
    references = tuple(strip_tags(a) for a in truth["answer"])
    return CaptionItem(
        key=key,
        question=truth["question"],
        answer=answer,
        references=references,
        group=str(truth.get("group") or group),
        label=label_of(key.rpartition("_")[0], references, truth.get("label"), f"Truth {key!r}"),
        region=truth.get("region") or None,
        artefact=truth.get("artefact") or None,
    )


def _add(found: dict[str, Any], key: str, value: Any, where: str) -> None:
    if key in found:
        raise ValueError(f"{where}: key {key!r} is given twice.")
    found[key] = value
