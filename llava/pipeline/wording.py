"""What a verdict means, in words for people who do not know the field."""

from __future__ import annotations

from bisect import bisect_right

from llava.core.types import REGIONS, Verdict, VerdictLabel, VideoVerdict

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
    "The map shows where the detector's features respond. The reasons are written by a language model. Neither proves "
    "that a place was changed; look there with your own eyes.",
)


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
    if verdict.band is None or verdict.coverage is None:
        return ""
    low, high = verdict.band
    limits = f"between {100 * low:.1f} % and {100 * high:.1f} %" if low < high else "nowhere"
    return (
        f"The verdict is UNCERTAIN {limits}. The limits were chosen so that of 100 real faces, and of 100 forged "
        f"ones, at least {100 * verdict.coverage:g} are not called the opposite."
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


def _share(verdict: Verdict) -> str:
    if isinstance(verdict, VideoVerdict):
        return ON_PICTURES
    assert verdict.p_fake is not None
    return f"Of 100 faces with such a score, {verdict.score_text.partition(' %')[0]} are expected to be forged."


def _times(ratio: float) -> str:
    return f"{ratio:.1f} times" if ratio < 10 else f"{float(f'{ratio:.2g}'):,.0f} times"
