"""A detector's numbers about a face become a verdict, what it rests on, and what it means in words."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from llava.core.score_map import Calibration
from llava.core.types import (
    FAKE,
    LABEL_NAMES,
    REAL,
    REGIONS,
    UNFAMILIAR,
    Explanation,
    Verdict,
    VerdictLabel,
    VideoVerdict,
    class_in_words,
)
from llava.evaluation.text import parse_verdict
from llava.pipeline.crops import Face

if TYPE_CHECKING:
    from llava.detectors.base import Detector

IN_THE_BAND = "real and forged faces both get such scores"
UNKNOWN_LOOK = "it looks like none of the pictures that the detector knows, so that its score counts for little"
LITTLE = 0.5  # a score of which this much was taken away counts for little
NO_NUMBER = "the detector gives no number for it"
CONTRADICTED = "the score alone would decide, but not with the share of forgeries expected"
LABELS = {REAL: VerdictLabel.REAL, FAKE: VerdictLabel.FAKE}
# Verbal scale of the ENFSI guideline for evaluative reporting in forensic science (2015).
SUPPORT_FROM = (2, 10, 100, 1_000, 10_000, 1_000_000)
SUPPORT = ("weak", "moderate", "moderately strong", "strong", "very strong", "extremely strong")
# The mean of many frames spreads less than the scores of single pictures, which a calibration is fitted on.
ON_PICTURES = (
    "The calibration was fitted on single pictures. The score of a video is a mean over frames, so the percentage does "
    "not say how many of 100 such videos are forged."
)
ONE_HALF = (
    "One half is no border here: the threshold was chosen where the detector tells its validation faces apart best."
)
LIMITS = (
    "This is no evidence by itself. It says what one program found in one picture; a person who knows the field has to "
    "look at the picture, where it came from, and what else is known.",
    "REAL means that the detector found none of the traces of forgery that it knows. Forgeries of another kind, strong "
    "compression, screenshots and filters can escape it.",
    "FAKE does not say who changed the picture, why, or with what; ordinary retouching can leave the same traces.",
    "Only faces that were found are judged, and nothing else in the picture.",
    "A percentage holds for pictures like those the detector was calibrated on. A score without calibration is no "
    "percentage at all.",
    "The map shows where the detector's features respond. It does not prove that a place was changed; look there with "
    "your own eyes.",
)
WORDS_LIMIT = (
    "Reasons in words are written by a language model. They prove nothing by themselves, and may name a place that "
    "looks fine."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Finding:
    """What was found about one face.

    explanation: the verdict with its words, None where no words were asked for. pixels: the crop that was judged, uint8
    RGB (H, W, 3), None when there was nothing to judge. evidence_map: float32 (h, w) in [0, 1] over the crop's central
    square, which is what a detector sees; None for a detector without a map. seen: that square's side as a share of the
    crop's shorter side. lacks: which inputs of the detector are missing, and why.
    """

    verdict: Verdict
    explanation: Explanation | None = None
    pixels: np.ndarray | None = None
    evidence_map: np.ndarray | None = None
    seen: float = 1.0
    lacks: str = ""

    @property
    def has_grounds(self) -> bool:
        """Whether there is anything that words could rest on: a face, and a score that counts."""
        return self.pixels is not None and not is_strange(self.verdict.label, self.verdict.evidence)

    @property
    def answer(self) -> Verdict | Explanation:
        """Give the explanation where there is one, else the verdict."""
        return self.explanation or self.verdict


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoFinding(Finding):
    """What was found about a video; words, pixels and map are those of its most telling frame."""

    verdict: VideoVerdict


def outlasting(
    detector: Detector, label: VerdictLabel, versions: Mapping[str, float], prior: float | None = None
) -> dict[str, Any]:
    """Give what the delivered versions of a face change about its verdict, as fields of a Verdict.

    versions: raw p_fake by name. Always `stability`, their p_fake as the verdict shows it; where one of them turns
    REAL to FAKE or FAKE to REAL also the label UNCERTAIN and the reason, which names what turned it.
    """
    raw = np.array(list(versions.values()))
    p_fake = raw if detector.calibration is None else detector.calibration.posterior(raw, prior)
    found: dict[str, Any] = {"stability": dict(zip(versions, p_fake.tolist(), strict=True))}
    labels = zip(versions, detector.labels(raw, prior), strict=True)
    turned = {name: other for name, other in labels if label.contradicts(other)}
    if turned:
        reason = f"the verdict turns to {next(iter(turned.values()))} after {_listed(list(turned))}"
        found |= {"label": VerdictLabel.UNCERTAIN, "reason": reason}
    return found


def is_strange(label: VerdictLabel, evidence: Mapping[str, float]) -> bool:
    """Say whether nothing can be said because the picture looks like none that the detector knows."""
    return label == VerdictLabel.UNCERTAIN and evidence.get(UNFAMILIAR, 0.0) >= LITTLE


def _listed(names: list[str]) -> str:
    """Write "a", "a and b", "a, b and c"."""
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def judge(detector: Detector, face: Face, scores: Mapping[str, Any] | None, prior: float | None = None) -> Verdict:
    """Give the verdict on a face from its p_fake, probabilities and evidence; without a number, INCONCLUSIVE.

    scores may hold `versions`, raw p_fake of delivered versions by name: see `outlasting`. The face's reason stands
    behind that of the score: of a face with a verdict it tells which inputs are missing.

    prior: share of fakes expected, for a calibrated detector; None = the calibration's own.
    """
    numbers = (scores["p_fake"], *scores["probabilities"].values(), *scores["evidence"].values()) if scores else ()
    if not all(map(isfinite, numbers)):
        scores, face = None, replace(face, reason=NO_NUMBER)
    found = _found(detector, scores["p_fake"], prior) if scores else _nothing()
    if scores and is_strange(found["label"], scores["evidence"]):
        found["reason"] = UNKNOWN_LOOK
    if scores and scores.get("versions"):
        found |= outlasting(detector, found["label"], scores["versions"], prior)
    found["reason"] = "; ".join(part for part in (found.get("reason", ""), face.reason) if part)
    return Verdict(
        **found,
        probabilities=scores["probabilities"] if scores else {},
        evidence=scores["evidence"] if scores else {},
        meanings=detector.evidence_meanings if scores else {},
        detector=detector.name,
        scope=detector.scope,
        **face.place,
        image=face.image,
        face=face.number,
        face_count=face.count,
    )


def _nothing() -> dict[str, Any]:
    return {"label": VerdictLabel.INCONCLUSIVE, "p_fake": None}


def _found(detector: Detector, raw: float, prior: float | None) -> dict[str, Any]:
    """Give label, p_fake and what goes with them."""
    (label,) = detector.labels(np.array([raw]), prior)
    if detector.calibration is not None:
        return _calibrated(detector.calibration, label, raw, prior)
    return {"label": label, "p_fake": raw, "raw_p_fake": raw, "threshold": detector.decision.threshold}


def _calibrated(calibration: Calibration, label: VerdictLabel, raw: float, prior: float | None) -> dict[str, Any]:
    is_in_band = calibration.real_below <= raw <= calibration.fake_above
    doubt = IN_THE_BAND if is_in_band else CONTRADICTED
    told = "" if prior is None else f", {100 * prior:g} % forgeries expected"
    return {
        "label": label,
        "reason": doubt if label == VerdictLabel.UNCERTAIN else "",
        "p_fake": float(calibration.posterior(raw, prior)),
        "raw_p_fake": raw,
        "threshold": 0.5,
        "calibration": f"{calibration}{told}",
        "band": calibration.band(prior),
        "coverage": calibration.coverage,
        "real_coverage": calibration.coverages[REAL],
        "likelihood_ratio": float(np.exp(calibration.score_map.log_likelihood_ratio(raw))),
        "prior": calibration.prior if prior is None else prior,
    }


def explanation(verdict: Verdict, question: str, text: str) -> Explanation:
    """Put words beside a verdict and note whether they say the same; undecided ones neither agree nor disagree.

    Of a video, words are about its most telling frame.
    """
    said = parse_verdict(text) if text else None
    agrees = None if said is None or verdict.label not in LABELS.values() else LABELS[said] == verdict.label
    about = ""
    if isinstance(verdict, VideoVerdict) and verdict.telling_seconds is not None:
        about = f"the frame at {verdict.telling_seconds:.1f} s"
    return Explanation(verdict=verdict, question=question, text=text, text_verdict=said, agrees=agrees, about=about)


def meaning(verdict: Verdict) -> str:
    """Say what a verdict means and what it does not."""
    if verdict.p_fake is None:
        return f"There is no verdict: {_reason(verdict)}."
    says = {
        VerdictLabel.FAKE: "The detector's score lies on the side of forged faces.",
        VerdictLabel.REAL: "The detector's score lies on the side of real faces. This does not prove that the face is "
        "real.",
        VerdictLabel.UNCERTAIN: f"The detector cannot tell: {_reason(verdict)}. Take this as no answer either way.",
        VerdictLabel.INCONCLUSIVE: f"There is no verdict: {_reason(verdict)}.",
    }[verdict.label]
    says += _kind(verdict)
    if verdict.is_calibrated:
        return f"{says} {_share(verdict)}"
    side = "reaches" if verdict.p_fake >= verdict.threshold else "stays under"
    half = "" if (verdict.p_fake >= 0.5) == (verdict.p_fake >= verdict.threshold) else f" {ONE_HALF}"
    return (
        f"{says} {verdict.p_fake:.3f} {side} the threshold of {verdict.threshold:.3f}.{half} The detector is not "
        "calibrated: the score is no probability, and how often such a verdict is right is not known."
    )


def ratio_in_words(likelihood_ratio: float) -> str:
    """Say how many times likelier such a score is from one kind of face, and how strong that is (ENFSI 2015)."""
    is_fake = likelihood_ratio >= 1
    ratio = likelihood_ratio if is_fake else 1 / likelihood_ratio
    kinds = ("forged", "real") if is_fake else ("real", "forged")
    step = bisect_right(SUPPORT_FROM, ratio)
    supports = f"{SUPPORT[step - 1]} support for “{kinds[0]}”" if step else "no support for either"
    return (
        f"Such a score is {_times(ratio)} likelier to come from a {kinds[0]} face than from a {kinds[1]} one: "
        f"on its own, {supports}."
    )


def band_in_words(verdict: Verdict) -> str:
    """Say where a calibrated verdict abstains, and what that promises."""
    if verdict.band is None or verdict.coverage is None or verdict.real_coverage is None:
        return ""
    low, high = verdict.band
    limits = f"between {100 * low:.1f} % and {100 * high:.1f} %" if low < high else "nowhere"
    return (
        f"The verdict is UNCERTAIN {limits}. The limits were chosen so that, among faces like those that the detector "
        "was calibrated on, of 100 real faces at least "
        f"{100 * verdict.real_coverage:g} are not called FAKE, and of 100 forged ones at least "
        f"{100 * verdict.coverage:g} are not called REAL."
    )


def regions_in_words(verdict: Verdict) -> str:
    """Say what the evidence of face regions means, and which leads; empty for a detector that has none."""
    shares = {name: verdict.evidence[name] for name in REGIONS if name in verdict.evidence}
    if not shares:
        return ""
    highest = max(shares, key=lambda name: shares[name])
    return (
        "Skin, eyebrows, eyes, nose and mouth share what the map has to say: their values sum to 1, whether or not "
        f"anything was forged, and are alike where the whole face is. The largest share, {shares[highest]:.2f}, has "
        f"the {highest}."
    )


def prior_in_words(prior: float) -> str:
    """Say what was expected before anything was looked at."""
    return f"Before looking, {100 * prior:g} % of such pictures were expected to be forged."


def _reason(verdict: Verdict) -> str:
    return verdict.reason.rstrip(".")


def _kind(verdict: Verdict) -> str:
    """Say which kind of forgery has the highest score; empty unless it is FAKE and the detector knows several."""
    kinds = {name: p for name, p in verdict.probabilities.items() if name != LABEL_NAMES[REAL]}
    if verdict.label != VerdictLabel.FAKE or len(kinds) < 2:
        return ""
    first, *others = sorted(kinds, key=lambda name: -kinds[name])
    rest = ", ".join(f"{class_in_words(name)} {kinds[name]:.2f}" for name in others)
    return (
        f" Of the kinds of forgery that it knows, it scores {class_in_words(first)} highest: {kinds[first]:.2f} "
        f"({rest}), before any calibration."
    )


def _share(verdict: Verdict) -> str:
    if isinstance(verdict, VideoVerdict):
        return ON_PICTURES
    assert verdict.p_fake is not None
    return f"Of 100 faces with such a score, {verdict.score_text.partition(' %')[0]} are expected to be forged."


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio < 10 else f"{float(f'{ratio:.2g}'):,.0f} times"
