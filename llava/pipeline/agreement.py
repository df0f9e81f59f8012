"""Whether words say what the verdict says; the verdict is never changed by them."""

from __future__ import annotations

from llava.core.types import FAKE, REAL, Explanation, Verdict, VerdictLabel
from llava.evaluation.text import parse_verdict

LABELS = {REAL: VerdictLabel.REAL, FAKE: VerdictLabel.FAKE}


def explanation(verdict: Verdict, question: str, text: str) -> Explanation:
    """Put words beside a verdict and note whether they say the same; undecided ones neither agree nor disagree."""
    said = parse_verdict(text) if text else None
    agrees = None if said is None or verdict.label not in LABELS.values() else LABELS[said] == verdict.label
    return Explanation(verdict=verdict, question=question, text=text, text_verdict=said, agrees=agrees)
