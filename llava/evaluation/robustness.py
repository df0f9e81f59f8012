"""How a detector's ranking and verdicts outlast degradations, and what the stability rule makes of its verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from llava.core.types import FAKE, VerdictLabel
from llava.evaluation.metrics import auc_interval
from llava.evaluation.predictions import Predictions
from llava.evaluation.statistics import wilson
from llava.ops.degrade import DEGRADATIONS, VERSIONS, Change

Judge: TypeAlias = Callable[[np.ndarray], list[VerdictLabel]]
CLEAR = (VerdictLabel.REAL, VerdictLabel.FAKE)


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """Verdicts on the images of a split, undegraded and by change; `clear` and `stable` (N,) are what the rule keeps.

    clear: REAL or FAKE without the rule. stable: those of them that no version of the rule turns round.
    """

    predictions: Predictions
    labels: np.ndarray
    changed: Mapping[Change, np.ndarray]

    @property
    def clear(self) -> np.ndarray:
        """Where the verdict is REAL or FAKE without the rule."""
        return np.isin(self.labels, CLEAR)

    @property
    def stable(self) -> np.ndarray:
        """Where it is REAL or FAKE and no delivered version turns it round."""
        return self.clear & ~self.flip(list(VERSIONS.values()))

    def flip(self, changes: list[Change]) -> np.ndarray:
        """Say which verdicts at least one of the changes turns round, (N,)."""
        return np.any([_contradict(self.labels, self.changed[change]) for change in changes], axis=0)

    def share(self, chosen: np.ndarray, among: np.ndarray) -> dict[str, Any]:
        """Give the share of `chosen` among some images, with Wilson's interval whose trials are their groups.

        A bootstrap would give no width to a share of 0 or 1. None where there are no images.
        """
        groups = len(set(self.predictions.groups[among]))
        part = float(chosen[among].mean()) if groups else math.nan
        interval = wilson(part * groups, groups) if groups else wilson(0, 0)
        return interval.to_dict() | {"images": int(among.sum())}

    def flip_rates(self, changes: list[Change]) -> dict[str, Any]:
        """Give the share that the changes turn round, of clear verdicts and of those that the rule keeps.

        differs: the share of all images whose verdict is another one in any way, to or from UNCERTAIN as well.
        """
        turned = self.flip(changes)
        other = np.any([self.labels != self.changed[change] for change in changes], axis=0)
        return {
            "flips_before": self.share(turned, self.clear),
            "flips_after": self.share(turned, self.stable),
            "differs": self.share(other, np.ones(len(turned), dtype=bool)),
        }


def robustness_report(
    predictions: Predictions, degraded: Mapping[Change, np.ndarray], judge: Judge, n_boot: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Give AUC and flip rates at every strength, and what the stability rule costs and brings, as plain values.

    degraded: raw p_fake (N,) of the same images after each change, those of VERSIONS among them; judge: verdicts on raw
    p_fake. The changed image is judged without the rule, so `flips_after` is an upper bound for one that is judged with
    it. At the strengths of VERSIONS it is 0 by construction; `any` is over all strengths of a degradation.
    """
    labels = {change: np.array(judge(p_fake)) for change, p_fake in degraded.items()}
    verdicts = Verdicts(predictions=predictions, labels=np.array(judge(predictions.p_fake)), changed=labels)

    def auc(p_fake: np.ndarray) -> dict[str, Any]:
        return auc_interval(predictions.labels, p_fake, predictions.groups, n_boot, seed).to_dict()

    kinds: dict[str, Any] = {}
    for kind, degradation in DEGRADATIONS.items():
        changes = [Change(kind, strength) for strength in degradation.strengths]
        kinds[kind] = {
            "unit": degradation.unit,
            "points": [{"strength": c.strength, "auc": auc(degraded[c]), **verdicts.flip_rates([c])} for c in changes],
            "any": verdicts.flip_rates(changes),
        }
    return {
        "n": {"images": len(predictions), "groups": len(set(predictions.groups))},
        "bootstrap": {"n_boot": n_boot, "seed": seed, "level": 0.95, "unit": "group"},
        "undegraded": {"auc": auc(predictions.p_fake)},
        "rule": _rule_report(verdicts),
        "degradations": kinds,
    }


def _rule_report(verdicts: Verdicts) -> dict[str, Any]:
    """Say how many clear verdicts become UNCERTAIN, by which version, and how many clear ones are right."""
    is_fake = verdicts.predictions.labels == FAKE
    right = verdicts.labels == np.where(is_fake, VerdictLabel.FAKE, VerdictLabel.REAL)
    clear, stable = verdicts.clear, verdicts.stable
    return {
        "clear_before": verdicts.share(clear, np.ones(len(clear), dtype=bool)),
        "clear_after": verdicts.share(stable, np.ones(len(clear), dtype=bool)),
        "become_uncertain": verdicts.share(~stable, clear),
        "by_version": {name: verdicts.share(verdicts.flip([change]), clear) for name, change in VERSIONS.items()},
        "right_before": verdicts.share(right, clear),
        "right_after": verdicts.share(right, stable),
    }


def _contradict(before: np.ndarray, after: np.ndarray) -> list[bool]:
    pairs = zip(before, after, strict=True)
    return [VerdictLabel(first).contradicts(VerdictLabel(second)) for first, second in pairs]
