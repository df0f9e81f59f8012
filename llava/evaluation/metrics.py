"""Numbers of a detector: AUC, AP, EER, accuracy and the rest, per frame and per video, with intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from llava.core.registry import nearest
from llava.core.types import FAKE, REAL
from llava.evaluation.predictions import Predictions, by_video, refuse_shared_groups
from llava.evaluation.statistics import Interval, group_bootstrap, group_bootstraps

ThresholdRule = Literal["youden", "eer", "accuracy"]
LEVELS = ("frame", "video", "video_trimmed")
TRIM = 0.1  # as published, which drops the 10 lowest and the 10 highest of 100 frames
CLASS_METRICS = ("recall", "precision", "f1", "auc")
MULTICLASS_METRICS = ("accuracy", "balanced_accuracy", "macro_f1")
METRICS = ("auc", "ap", "eer", "accuracy", "balanced_accuracy", "recall_real", "recall_fake", "precision", "f1")


@dataclass(frozen=True)
class RocCurve:
    """Cumulated weights of reals (`false_fakes`) and fakes (`true_fakes`) at or above each distinct score.

    All are (M + 1,), highest score first; entry 0 is "nothing is called fake", with threshold infinity.
    """

    thresholds: np.ndarray
    false_fakes: np.ndarray
    true_fakes: np.ndarray

    @property
    def is_defined(self) -> bool:
        """Whether both classes are there."""
        return bool(self.false_fakes[-1] > 0 and self.true_fakes[-1] > 0)

    @property
    def fpr(self) -> np.ndarray:
        """Rate of reals called fake."""
        return self.false_fakes / self.false_fakes[-1]

    @property
    def tpr(self) -> np.ndarray:
        """Rate of fakes called fake."""
        return self.true_fakes / self.true_fakes[-1]

    def auc(self) -> float:
        """Give the area under the ROC curve (ties count half); NaN with one class."""
        return float(np.trapezoid(self.tpr, self.fpr)) if self.is_defined else math.nan

    def average_precision(self) -> float:
        """Give the step-wise area under precision over recall, as scikit-learn does; NaN with one class."""
        if not self.is_defined:
            return math.nan
        called_fake = self.true_fakes[1:] + self.false_fakes[1:]
        precision = self.true_fakes[1:] / np.maximum(called_fake, np.finfo(float).tiny)
        return float(np.diff(self.tpr) @ precision)

    def eer(self) -> float:
        """Give the equal error rate: where the linearly interpolated ROC has FPR = 1 - TPR; NaN with one class."""
        if not self.is_defined:
            return math.nan
        excess = self.fpr - (1 - self.tpr)  # from -1 up to 1
        after = int(np.argmax(excess >= 0))
        part = -excess[after - 1] / (excess[after] - excess[after - 1])
        return float(self.fpr[after - 1] + part * (self.fpr[after] - self.fpr[after - 1]))


class RankedScores:
    """Scores sorted once, so that ROC curves of many weightings (a bootstrap) are cheap."""

    def __init__(self, labels: np.ndarray, p_fake: np.ndarray) -> None:
        self._order = np.argsort(-p_fake, kind="stable")
        ranked = p_fake[self._order]
        self._fake = labels[self._order] == 1
        self._ends = np.flatnonzero(np.append(np.diff(ranked) != 0, True))  # last item of each run of ties
        self._thresholds = np.concatenate([[np.inf], ranked[self._ends]])

    def curve(self, weights: np.ndarray | None = None) -> RocCurve:
        """Give the ROC curve; weights (N,) say how often each item counts."""
        ranked = np.ones(len(self._order)) if weights is None else weights[self._order]
        sums = [np.cumsum(ranked * chosen)[self._ends] for chosen in (~self._fake, self._fake)]
        return RocCurve(self._thresholds, *(np.concatenate([[0.0], s]) for s in sums))


@dataclass(frozen=True)
class Confusion:
    """Counts (or sums of weights) of answers; fake is the positive class. A ratio of nothing is NaN."""

    tn: float
    fp: float
    fn: float
    tp: float

    @property
    def accuracy(self) -> float:
        """Part of all answers that are right."""
        return _ratio(self.tn + self.tp, self.tn + self.fp + self.fn + self.tp)

    @property
    def recall_real(self) -> float:
        """Part of the reals that are called real (specificity)."""
        return _ratio(self.tn, self.tn + self.fp)

    @property
    def recall_fake(self) -> float:
        """Part of the fakes that are called fake (recall)."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def balanced_accuracy(self) -> float:
        """Mean of the recalls of both classes."""
        return (self.recall_real + self.recall_fake) / 2

    @property
    def precision(self) -> float:
        """Part of the answers "fake" that are right."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall of fake."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)


def confusion(labels: np.ndarray, answers: np.ndarray, weights: np.ndarray | None = None) -> Confusion:
    """Count answers (N,) of 0/1 against labels (N,) of 0/1."""
    cells = np.bincount(2 * np.asarray(labels) + np.asarray(answers), weights=weights, minlength=4)
    return Confusion(*(float(c) for c in cells))


@dataclass(frozen=True)
class ClassConfusion:
    """Counts (K, K), or sums of weights, of answers: rows = truth, columns = answer. A ratio of nothing is NaN."""

    counts: np.ndarray

    @property
    def accuracy(self) -> float:
        """Part of all answers that are right."""
        return _ratio(self.counts.trace(), self.counts.sum())

    @property
    def recall(self) -> np.ndarray:
        """Part of each class's items that are called so (K,)."""
        return _ratios(self.counts.diagonal(), self.counts.sum(axis=1))

    @property
    def precision(self) -> np.ndarray:
        """Part of the answers of each class that are right (K,)."""
        return _ratios(self.counts.diagonal(), self.counts.sum(axis=0))

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall of each class (K,)."""
        return _ratios(2 * self.counts.diagonal(), self.counts.sum(axis=0) + self.counts.sum(axis=1))

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that have items."""
        return float(np.nanmean(self.recall))

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that have items or answers, as scikit-learn takes it."""
        return float(np.nanmean(self.f1))


def class_confusion(
    targets: np.ndarray, answers: np.ndarray, n_classes: int, weights: np.ndarray | None = None
) -> ClassConfusion:
    """Count answers (N,) in 0 to K - 1 against targets (N,)."""
    cells = np.bincount(n_classes * targets + answers, weights=weights, minlength=n_classes**2)
    return ClassConfusion(cells.reshape(n_classes, n_classes))


def choose_threshold(labels: np.ndarray, p_fake: np.ndarray, rule: ThresholdRule = "youden") -> float:
    """Choose from which p_fake on an item is called fake; to be used on validation data only.

    youden: largest TPR - FPR; eer: smallest |FPR - FNR|; accuracy: most right answers. The threshold lies midway
    between neighbouring scores; of equally good ones the nearest to 0.5. Raises ValueError with one class.
    """
    if rule not in get_args(ThresholdRule):
        raise ValueError(f"Unknown threshold rule {rule!r}. {nearest(rule, get_args(ThresholdRule))}")
    curve = RankedScores(labels, p_fake).curve()
    if not curve.is_defined:
        raise ValueError("A threshold needs validation items of both classes, got one class; use another split.")
    merit = {
        "youden": curve.tpr - curve.fpr,
        "eer": -np.abs(curve.fpr - (1 - curve.tpr)),
        "accuracy": curve.true_fakes - curve.false_fakes,
    }[rule]
    scores = curve.thresholds[1:]
    above = np.nextafter(scores[0], np.inf) if scores[0] >= 1 else (1 + scores[0]) / 2
    midway = np.concatenate([[above], (scores[:-1] + scores[1:]) / 2, scores[-1:] / 2])
    best = midway[np.isclose(merit, merit.max(), rtol=0, atol=1e-12)]
    return float(best[np.argmin(np.abs(best - 0.5))])


def threshold_from_validation(validation: Predictions, test: Predictions, rule: ThresholdRule = "youden") -> float:
    """Choose the threshold on validation frames. Raises ValueError when they share a group with the test items."""
    refuse_shared_groups(validation, test)
    return choose_threshold(validation.labels, validation.p_fake, rule)


def detection_report(
    predictions: Predictions, threshold: float = 0.5, n_boot: int = 2000, seed: int = 0, trim: float = TRIM
) -> dict[str, Any]:
    """Give every number of METRICS on each of LEVELS, with 95 % group-bootstrap intervals, as plain values.

    A video's score is the mean of its frames, or (`video_trimmed`) that without the share `trim` at each end.
    `classes`: AUC of each kind of fake against all reals, and its recall. Fake is what has p_fake >= threshold.
    `multiclass`, where the detector has more than two classes: how it tells them apart on each of LEVELS.
    """
    levels = dict(zip(LEVELS, (predictions, by_video(predictions), by_video(predictions, trim)), strict=True))
    return {
        "threshold": threshold,
        "trim": trim,
        "bootstrap": {"n_boot": n_boot, "seed": seed, "level": 0.95, "unit": "group"},
        "n": {
            "frames": len(predictions),
            "videos": len(levels["video"]),
            "groups": len(set(predictions.groups)),
            "real": int((predictions.labels == 0).sum()),
            "fake": int((predictions.labels == 1).sum()),
            "classes": dict(sorted(Counter(predictions.class_names.tolist()).items())),
        },
        **{level: _level_report(items, threshold, n_boot, seed) for level, items in levels.items()},
        "classes": {
            str(name): _class_report(str(name), levels, threshold, n_boot, seed)
            for name in sorted(set(predictions.class_names[predictions.labels == 1]))
        },
        **(
            {"multiclass": {level: _multiclass_report(items, n_boot, seed) for level, items in levels.items()}}
            if len(predictions.classes) > 2
            else {}
        ),
    }


def _level_report(items: Predictions, threshold: float, n_boot: int, seed: int) -> dict[str, Any]:
    ranked = RankedScores(items.labels, items.p_fake)
    answers = (items.p_fake >= threshold).astype(int)

    def all_metrics(weights: np.ndarray) -> np.ndarray:
        curve, counts = ranked.curve(weights), confusion(items.labels, answers, weights)
        ranking = [curve.auc(), curve.average_precision(), curve.eer()]
        return np.array(ranking + [getattr(counts, name) for name in METRICS[3:]])

    intervals = group_bootstraps(items.groups, all_metrics, n_boot, seed)
    counts = confusion(items.labels, answers)
    cells = {name: int(getattr(counts, name)) for name in ("tn", "fp", "fn", "tp")}
    return {name: i.to_dict() for name, i in zip(METRICS, intervals, strict=True)} | {"confusion": cells}


def _class_report(
    name: str, levels: Mapping[str, Predictions], threshold: float, n_boot: int, seed: int
) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for level, items in levels.items():
        is_class = (items.class_names == name) & (items.labels == 1)
        kept = is_class | (items.labels == 0)
        auc = auc_interval(items.labels[kept], items.p_fake[kept], items.groups[kept], n_boot, seed)
        recall = _mean_interval(items.p_fake[is_class] >= threshold, items.groups[is_class], n_boot, seed)
        report[level] = {"n": int(is_class.sum()), "auc": auc.to_dict(), "recall": recall.to_dict()}
    return report


def _multiclass_report(items: Predictions, n_boot: int, seed: int) -> dict[str, Any]:
    """Give MULTICLASS_METRICS and, of each class against the rest, CLASS_METRICS; the answer is the highest score.

    One pass of resamples for all; each number's interval is conditional on that number alone being defined.
    """
    classes, targets, answers = items.classes, items.targets, items.scores.argmax(axis=1)
    ranked = [RankedScores((targets == k).astype(int), items.scores[:, k]) for k in range(len(classes))]

    def all_metrics(weights: np.ndarray) -> np.ndarray:
        counts = class_confusion(targets, answers, len(classes), weights)
        auc = [scores.curve(weights).auc() for scores in ranked]
        whole = [getattr(counts, name) for name in MULTICLASS_METRICS]
        return np.concatenate([whole, *zip(counts.recall, counts.precision, counts.f1, auc, strict=True)])

    intervals = (i.to_dict() for i in group_bootstraps(items.groups, all_metrics, n_boot, seed, jointly=False))
    counts = class_confusion(targets, answers, len(classes)).counts
    return {
        **{name: next(intervals) for name in MULTICLASS_METRICS},
        "classes": {
            name: {"n": int(n), **{metric: next(intervals) for metric in CLASS_METRICS}}
            for name, n in zip(classes, counts.sum(axis=1), strict=True)
        },
        "confusion": {"classes": list(classes), "counts": counts.tolist()},
    }


def auc_interval(
    labels: np.ndarray, p_fake: np.ndarray, groups: np.ndarray, n_boot: int = 2000, seed: int = 0
) -> Interval:
    """Give the AUC of items (N,) with its 95 % group-bootstrap interval."""
    ranked = RankedScores(labels, p_fake)
    return group_bootstrap(groups, lambda weights: ranked.curve(weights).auc(), n_boot, seed)


def class_aucs(
    predictions: Predictions, means: Mapping[str, Sequence[str]], n_boot: int = 2000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Give the AUC of every class of fakes, and of the means over some of them, each against all reals.

    means: name -> classes. All see the same resamples; as plain values, with the numbers of images, `real` and `fake`.
    """
    labels, names, groups = predictions.labels, predictions.class_names, predictions.groups
    chosen = {str(name): (labels == FAKE) & (names == name) for name in sorted(set(names[labels == FAKE]))}
    kept = {name: is_class | (labels == REAL) for name, is_class in chosen.items()}
    ranked = {name: RankedScores(labels[kept[name]], predictions.p_fake[kept[name]]) for name in chosen}

    def statistics(weights: np.ndarray) -> np.ndarray:
        areas = {name: scores.curve(weights[kept[name]]).auc() for name, scores in ranked.items()}
        return np.array([*areas.values(), *(np.mean([areas[name] for name in some]) for some in means.values())])

    counts = {name: int(is_class.sum()) for name, is_class in chosen.items()}
    counts |= {name: sum(counts[each] for each in some) for name, some in means.items()}
    intervals = group_bootstraps(groups, statistics, n_boot, seed, jointly=False)
    reals = int((labels == REAL).sum())
    return {
        name: interval.to_dict() | {"real": reals, "fake": count}
        for (name, count), interval in zip(counts.items(), intervals, strict=True)
    }


def _mean_interval(values: np.ndarray, groups: np.ndarray, n_boot: int, seed: int) -> Interval:
    return group_bootstrap(groups, lambda weights: float(np.average(values, weights=weights)), n_boot, seed)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def _ratios(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    return np.divide(parts, wholes, out=np.full(len(parts), math.nan), where=wholes > 0)
