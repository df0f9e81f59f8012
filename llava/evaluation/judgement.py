"""Score answers to "real or fake?": text verdicts against the truth, with intervals and per manipulation."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava.core.types import FAKE, LABEL_NAMES, REAL
from llava.data.conversations import read_conversations
from llava.data.ddvqa import MANIPULATIONS
from llava.evaluation.captions import image_groups, read_jsonl
from llava.evaluation.metrics import Confusion, confusion
from llava.evaluation.statistics import group_bootstrap, wilson
from llava.evaluation.text import parse_verdict, parse_verdict_published

PUBLISHED_REAL_PREFIX = "./utils/DDVQA_images/c40/test/5"
_LABELS = {"0": REAL, "1": FAKE} | {name: label for label, name in enumerate(LABEL_NAMES)}
_COLUMNS = {
    "image": ("image", "file"),
    "label": ("label",),
    "class_name": ("class_name", "manipulation"),
    "group": ("group",),
}
_LABELS_OF = {"REAL": REAL, "FAKE": FAKE}


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One answer: `verdict` is what its text says (0 real, 1 fake, None undecided), `label` the truth."""

    image: str
    text: str
    verdict: int | None
    label: int
    class_name: str
    group: str


@dataclass(frozen=True, kw_only=True)
class JudgementSet:
    """Answers, and what did not match the truth file; a missing answer is among the items, undecided."""

    items: tuple[Judgement, ...]
    parser: str
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Truth:
    image: str
    label: int
    class_name: str
    group: str | None = None


def read_judgements(
    predict_path: str | Path, gt_path: str | Path | None = None, published: bool = False
) -> JudgementSet:
    """Read rows {image, text} and find the truth of each image.

    Truth: `gt_path`, a csv, a jsonl or a conversation json (`verdict_only.json`) with image (or file), label (0/1 or
    real/fake) and perhaps class_name (or manipulation) and group; without it the DD-VQA file name (5_... real, 0, 1,
    2, 3, 6 manipulated), whatever its folder. `published`: the original parser, and its truth by the start of the path.
    Raises FileNotFoundError or ValueError naming the file, the line or the image.
    """
    if published and gt_path:
        raise ValueError("--published takes the truth from the image path, as the original does; leave out --gt_path.")
    texts: dict[str, str] = {}
    for where, row in read_jsonl(predict_path):
        if not {"image", "text"} <= row.keys():
            raise ValueError(f"{where}: expected the fields image and text, got {', '.join(row)}.")
        if row["image"] in texts:
            raise ValueError(f"{where}: image {row['image']!r} is answered twice.")
        texts[row["image"]] = row["text"]
    if not texts:
        raise ValueError(f"{str(predict_path)!r} holds no answers; run the inference script first.")
    if published:
        return _published_set(texts)
    if gt_path is None:
        return _judged(texts, {image: _truth_by_name(image) for image in texts}, "whole words")
    return _matched(texts, _read_truths(Path(gt_path)), gt_path)


def judgement_report(judgements: JudgementSet, n_boot: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Give accuracy, precision, recall and F1 (positive = fake) with 95 % intervals, and the same per manipulation.

    An undecided answer counts as the wrong one of the two; the published way drops it instead. Intervals are
    Wilson's for proportions and a group bootstrap for F1.
    """
    is_published = judgements.parser == "published"
    items = [j for j in judgements.items if not (is_published and j.verdict is None)]
    if not items:
        raise ValueError("No answer could be read as real or fake, so nothing is left to score the published way.")
    labels, answers = np.array([j.label for j in items]), np.array([_counted_answer(j) for j in items])
    counts = confusion(labels, answers)
    undecided = [j for j in judgements.items if j.verdict is None]
    f1 = group_bootstrap([j.group for j in items], lambda w: confusion(labels, answers, w).f1, n_boot, seed)
    return {
        "parser": judgements.parser,
        "n": {
            "answers": len(judgements.items) - len(judgements.missing),
            "scored": len(items),
            "real": int((labels == REAL).sum()),
            "fake": int((labels == FAKE).sum()),
            "groups": f1.n,
            "undecided": len(undecided),
            "missing": list(judgements.missing),
            "extra": list(judgements.extra),
        },
        "undecided_are": "dropped" if is_published else "wrong",
        "confusion": {name: int(getattr(counts, name)) for name in ("tn", "fp", "fn", "tp")},
        **_proportions(counts),
        "f1": f1.to_dict(),
        "classes": {name: _class_row(name, judgements.items) for name in sorted({j.class_name for j in items})},
        "undecided": [{"image": j.image, "text": j.text} for j in undecided],
        "notes": list(judgements.notes),
    }


def _published_set(texts: dict[str, str]) -> JudgementSet:
    found = {image: image.startswith(PUBLISHED_REAL_PREFIX) for image in texts}
    notes = () if any(found.values()) else (f"no image path starts with {PUBLISHED_REAL_PREFIX}: all count as fake",)
    truths = {i: _Truth(i, REAL if real else FAKE, _class_by_name(i, real)) for i, real in found.items()}
    return _judged(texts, truths, "published", notes=notes)


def _judged(
    texts: dict[str, str],
    truths: dict[str, _Truth],
    parser: str,
    missing: tuple[str, ...] = (),
    extra: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> JudgementSet:
    read = parse_verdict_published if parser == "published" else parse_verdict
    groups = image_groups([Path(image).stem for image in truths])
    items = (
        Judgement(
            image=image,
            text=texts.get(image, ""),
            verdict=read(texts.get(image, "")),
            label=truth.label,
            class_name=truth.class_name,
            group=truth.group or group,
        )
        for (image, truth), group in zip(truths.items(), groups, strict=True)
    )
    return JudgementSet(items=tuple(items), parser=parser, missing=missing, extra=extra, notes=notes)


def _matched(texts: dict[str, str], truths: list[_Truth], gt_path: str | Path) -> JudgementSet:
    """Match by path, else by file name; refuses a file name that two rows of the truth share."""
    by_path = {truth.image: truth for truth in truths}
    by_name: dict[str, list[_Truth]] = {}
    for truth in truths:
        by_name.setdefault(Path(truth.image).name, []).append(truth)
    found: dict[str, _Truth] = {}
    for image in texts:
        rows = [by_path[image]] if image in by_path else by_name.get(Path(image).name, [])
        if len(rows) > 1:
            raise ValueError(f"{str(gt_path)!r} has {len(rows)} rows for {Path(image).name!r}; answer by full path.")
        if rows:
            found[image] = rows[0]
    if not found:
        raise ValueError(f"{str(gt_path)!r} knows none of the {len(texts)} answered images; give the matching file.")
    answered = {truth.image for truth in found.values()}
    missing = tuple(truth.image for truth in truths if truth.image not in answered)
    every = found | {truth.image: truth for truth in truths if truth.image not in answered}
    return _judged(texts, every, "whole words", missing, tuple(i for i in texts if i not in found))


def _read_truths(path: Path) -> list[_Truth]:
    if path.suffix == ".csv" and path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows: Sequence[tuple[str, dict[str, Any]]] = [(f"{str(path)!r}, line {reader.line_num}", r) for r in reader]
    elif path.suffix == ".json":
        rows = [(f"{str(path)!r}, record {i}", item) for i, item in enumerate(read_conversations(path))]
    else:
        rows = read_jsonl(path)
    truths = [_truth_of_row(row, where) for where, row in rows]
    if len({t.image for t in truths}) < len(truths):
        raise ValueError(f"{str(path)!r} gives an image more than once.")
    return truths


def _truth_of_row(row: dict[str, Any], where: str) -> _Truth:
    values = {name: next((row[c] for c in columns if c in row), None) for name, columns in _COLUMNS.items()}
    label = _LABELS.get(str(values["label"]))
    if not values["image"] or label is None:
        raise ValueError(f"{where}: expected image (or file) and label (0, 1, real or fake), got {row!r}.")
    return _Truth(values["image"], label, values["class_name"] or LABEL_NAMES[label], values["group"])


def _truth_by_name(image: str) -> _Truth:
    first = Path(image).stem.split("_")[0]
    if first not in MANIPULATIONS:
        raise ValueError(
            f"{image!r} does not follow the DD-VQA names (5_... real; 0, 1, 2, 3, 6 manipulated); give --gt_path."
        )
    is_real = MANIPULATIONS[first] == LABEL_NAMES[REAL]
    return _Truth(image, REAL if is_real else FAKE, MANIPULATIONS[first])


def _class_by_name(image: str, is_real: bool) -> str:
    return LABEL_NAMES[REAL] if is_real else MANIPULATIONS.get(Path(image).stem.split("_")[0], LABEL_NAMES[FAKE])


def _counted_answer(judgement: Judgement) -> int:
    return 1 - judgement.label if judgement.verdict is None else judgement.verdict


def _proportions(counts: Confusion) -> dict[str, Any]:
    tn, fp, fn, tp = (int(c) for c in (counts.tn, counts.fp, counts.fn, counts.tp))
    parts = {
        "accuracy": (tn + tp, tn + fp + fn + tp),
        "precision": (tp, tp + fp),
        "recall": (tp, tp + fn),
        "recall_real": (tn, tn + fp),
    }
    return {name: wilson(k, n).to_dict() for name, (k, n) in parts.items()}


def _class_row(name: str, items: Sequence[Judgement]) -> dict[str, Any]:
    own = [j for j in items if j.class_name == name]
    said = {text: sum(j.verdict == v for j in own) for text, v in (("real", REAL), ("fake", FAKE), ("undecided", None))}
    return {"said": said, "accuracy": wilson(sum(j.verdict == j.label for j in own), len(own)).to_dict()}


def agreement(
    text_verdicts: Sequence[int | None], found: Sequence[int | None], groups: Sequence[str]
) -> dict[str, Any]:
    """Give the part of items whose text says what was found, with Wilson's interval whose trials are the groups.

    An undecided text does not agree. Items on which nothing was found (None) are left out and counted; when no item is
    left, the agreement has no value.
    """
    pairs = [(t, f, g) for t, f, g in zip(text_verdicts, found, groups, strict=True) if f is not None]
    n_groups = len({group for _, _, group in pairs})
    share = sum(t == f for t, f, _ in pairs) / max(len(pairs), 1)
    return {
        "agreement": wilson(share * n_groups, n_groups).to_dict(),
        "n": len(pairs),
        "text_undecided": sum(t is None for t, _, _ in pairs),
        "left_out": len(found) - len(pairs),
    }


def read_agreement(predict_path: str | Path, judged: JudgementSet | None = None) -> dict[str, Any] | None:
    """Compare each answer with its row's metadata; None where rows do not say what the detector found.

    judged: the same answers with the groups of their truth; without, groups are those of DD-VQA's file names.

    What was found is the side of `p_fake`, of the detector or told (`evidence_p_fake`, the causality test): fake from
    0.5 on, or as a clear label (REAL, FAKE) says. `clear`: the same over clear labels only, without UNCERTAIN ones.
    `told` in the result names the evidence told.
    """
    rows = [row for _, row in read_jsonl(predict_path)]
    notes = [row.get("metadata") or {} for row in rows]
    if not any("label" in note for note in notes):
        return None
    choices = {note.get("evidence_p_fake") for note in notes}
    if len(choices) > 1:
        raise ValueError(f"{str(predict_path)!r} mixes answers to different evidence: {sorted(map(str, choices))}.")
    texts = [parse_verdict(row["text"]) for row in rows]
    known = {item.image: item.group for item in judged.items} if judged else {}
    named = image_groups([Path(row["image"]).stem for row in rows])
    groups = [known.get(row["image"], group) for row, group in zip(rows, named, strict=True)]
    p_fake = choices.pop()
    if p_fake is not None:
        return {"told": p_fake, **agreement(texts, [int(p_fake >= 0.5)] * len(rows), groups)}
    labels = [_LABELS_OF.get(note.get("label", "")) for note in notes]
    sides = [_side(note) if label is None else label for note, label in zip(notes, labels, strict=True)]
    clear = agreement(texts, labels, groups)
    return {"told": None, **agreement(texts, sides, groups), "clear": clear}


def _side(note: dict[str, Any]) -> int | None:
    p_fake = note.get("p_fake")
    return None if p_fake is None else int(p_fake >= 0.5)
