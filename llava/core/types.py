"""The nouns of the house: records, samples, verdicts and explanations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal, TypeAlias

import numpy as np

from llava.core.config import setting

REAL, FAKE = 0, 1
LABEL_NAMES = ("real", "fake")
Triple: TypeAlias = tuple[float, float, float]
View: TypeAlias = Literal["plain", "flip"]
# name -> mean and standard deviation of red, green and blue; none = pixels stay in [0, 1]
NORMALISATIONS: dict[str, tuple[Triple, Triple]] = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
SCOPE_LENGTH = 200
REGIONS = ("skin", "eyebrows", "eyes", "nose", "mouth")
UNFAMILIAR = "unfamiliar"  # evidence: the share of the score that was taken away, as a picture looks like none known
STARTER = "starter"  # name of the model that comes with the package: it is asked where none is named


def class_in_words(name: str) -> str:
    """Write the name of a class as in a sentence: "AI-generated", "face swap"."""
    return "AI-generated" if name == "ai_generated" else name.replace("_", " ")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One item of a data set before a pixel is read.

    label: 0 = real, 1 = fake, None = unknown. `video`: frames that share it are averaged into one score.
    `group`: what must never cross a split, and the unit of every bootstrap. `where`: how the source finds
    the item again (a path, or path::key::frame).
    """

    id: str
    label: int | None
    class_name: str
    video: str
    group: str
    where: str
    split: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One utterance of a conversation."""

    role: Literal["human", "assistant"]
    text: str


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How an answer is written; greedy unless temperature is above 0.

    Sampling depends on `seed` alone, not on torch's global generator nor on the other conversations of a batch.
    """

    max_new_tokens: int = setting(256, "longest answer, in tokens")
    temperature: float = setting(0.0, "0 = greedy; above 0 samples")
    top_p: float = setting(1.0, "nucleus for sampling")
    seed: int = setting(0, "seed of the sampling; the same seed writes the same answer")
    layout: str | None = setting(None, "prompt layout; default: the one the model was trained with")


@dataclass(frozen=True, kw_only=True)
class Content:
    """What there is to look at and to hear: `image` (H, W, 3) uint8 RGB, and of a clip what was asked for.

    face: (x, y, width, height) of the face in the image; None = the image is a face crop. frames: of one face track,
    each (H, W, 3) uint8, of any size; seconds: when each is shown; audio: mono, 16,000 Hz, from the first frame on.
    lacks: why there are no `frames` or no `sound`.
    """

    image: np.ndarray
    face: tuple[int, int, int, int] | None = None
    frames: Sequence[np.ndarray] | None = None
    seconds: Sequence[float] = ()
    audio: np.ndarray | None = None
    lacks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sample(Content):
    """A record with its content.

    mask: (H, W) uint8, above 0 where pixels were forged, all 0 for a real image; None = unknown, or not asked for.
    """

    record: Record
    mask: np.ndarray | None = None
    turns: Sequence[Turn] = ()


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """What one named tensor of a detector must look like; data code reads it, the detector declares it.

    The image is resized so that its shortest edge is `resize_size`, None = `size` (PIL resampling `interpolation`;
    unfiltered = OpenCV's bilinear, which reads four pixels however far it shrinks, and draws patterns of fine detail),
    centre-cropped to (size, size), scaled to [0, 1] and normalised by mean and std. `fit`: with squash the whole image
    is resized to (size, size) instead, whatever its shape. `views`: what is averaged at test time. Raises ValueError
    when the crop would be larger than the image, and for a resize_size that squash has no use for.
    """

    size: int
    mean: Triple
    std: Triple
    interpolation: Literal["bilinear", "bicubic", "lanczos", "unfiltered"] = "bicubic"
    views: tuple[View, ...] = ("plain",)
    resize_size: int | None = None
    fit: Literal["crop", "squash"] = "crop"

    def __post_init__(self) -> None:
        if self.fit == "squash" and self.resize_size is not None:
            raise ValueError(f"resize_size: {self.resize_size} means nothing with fit 'squash'; leave it out.")
        if self.shortest_edge < self.size:
            raise ValueError(
                f"resize_size: {self.resize_size} is below the crop of {self.size} pixels; give {self.size} or more."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Give the shape of one view."""
        return 3, self.size, self.size

    @property
    def shortest_edge(self) -> int:
        """Give the length of the shortest edge before the crop, in pixels."""
        return self.size if self.resize_size is None else self.resize_size

    @property
    def seen(self) -> float:
        """Give the side of what the crop leaves, as a share of the image's shortest edge: in (0, 1], 1 for squash."""
        return self.size / self.shortest_edge


@dataclass(frozen=True, kw_only=True)
class Decision:
    """From which p_fake on the verdict is FAKE, and what that threshold was chosen on."""

    threshold: float = 0.5
    chosen_on: str = "default"


def checked_scope(scope: Any) -> str:
    """Give a scope as it is. Raises ValueError unless it is one line that can stand beside every verdict."""
    if isinstance(scope, str) and scope.isprintable() and len(scope) <= SCOPE_LENGTH:
        return scope
    raise ValueError(
        f"scope: {str(scope)[:60]!r} can not stand beside each verdict; say in one line of at most {SCOPE_LENGTH} "
        "characters what the detector sees and what it has never seen."
    )


class VerdictLabel(StrEnum):
    """What the product says of an image."""

    REAL = "REAL"
    FAKE = "FAKE"
    UNCERTAIN = "UNCERTAIN"
    INCONCLUSIVE = "INCONCLUSIVE"

    def contradicts(self, other: VerdictLabel) -> bool:
        """Say whether one of the two is REAL and the other FAKE."""
        return {self, other} == {VerdictLabel.REAL, VerdictLabel.FAKE}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A detector's answer about one face.

    p_fake and every probability and evidence value lie in [0, 1]; p_fake is None when INCONCLUSIVE. raw_p_fake is the
    detector's own score, which p_fake is without calibration. FAKE from p_fake = threshold on.
    `calibration` names what p_fake was calibrated on, or is "not calibrated". Only when calibrated: `band`, the p_fake
    between which the verdict is UNCERTAIN, for a `coverage` of each class (of reals: `real_coverage`);
    likelihood_ratio, posterior odds over prior odds: how many times likelier such a score is from a fake than from a
    real; prior, the share of fakes expected.
    `scope`: what the detector sees and what it has never seen, in its own words; empty where nobody said.
    meanings: of each piece of evidence what it is. `stability`: p_fake of each delivered version of the face
    (`llava.ops.degrade`) by name, empty when not judged.
    `reason` says in words why there is no verdict, or what limits it. `image` is the name of what was looked at; it
    has `face_count` faces, of which this is number `face`, largest first. face_box: (x, y, width, height) in pixels.
    face_landmarks: (x, y) in pixels of both eyes, nose and both mouth corners; left before right as in
    an upright face. face_roll: degrees by which the line of the eyes is turned clockwise.
    """

    label: VerdictLabel
    p_fake: float | None
    probabilities: Mapping[str, float]
    evidence: Mapping[str, float]
    detector: str
    scope: str = ""
    meanings: Mapping[str, str] = field(default_factory=dict)
    threshold: float = 0.5
    calibration: str = "not calibrated"
    raw_p_fake: float | None = None
    band: tuple[float, float] | None = None
    coverage: float | None = None
    real_coverage: float | None = None
    likelihood_ratio: float | None = None
    prior: float | None = None
    risk_band: str | None = None
    stability: Mapping[str, float] = field(default_factory=dict)
    face_box: tuple[int, int, int, int] | None = None
    face_landmarks: tuple[tuple[float, float], ...] | None = None
    face_roll: float | None = None
    reason: str = ""
    image: str = ""
    face: int = 1
    face_count: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Say the verdict in one line: a percentage when calibrated, the bare score when not."""
        sure = "" if self.p_fake is None else f"{self.score_text} ({self.calibration})"
        which = f"face {self.face} of {self.face_count}" if self.face_count > 1 else ""
        details = ", ".join(part for part in (sure, which, self.remark) if part)
        return f"{self.label}{': ' if details else ''}{details}"

    @property
    def remark(self) -> str:
        """Say what there is to know beside label and score: the reason, and how far delivery moves the score."""
        return "; ".join(part for part in (self.reason, self.range_text) if part)

    @property
    def is_calibrated(self) -> bool:
        """Whether p_fake is a probability, and not a bare score."""
        return self.likelihood_ratio is not None

    @property
    def score_text(self) -> str:
        """Write "87 % forged" when calibrated, never 0 or 100 %; "p_fake 0.870" when not; "-" for none."""
        if self.p_fake is None:
            return "-"
        if not self.is_calibrated:
            return f"p_fake {self.p_fake:.3f}"
        return f"{_percent(self.p_fake)} forged"

    @property
    def scope_text(self) -> str:
        """Say what the detector can see, and of REAL that it means no more than that; empty where nobody said."""
        if not self.scope or self.p_fake is None:
            return ""
        limit = " REAL says nothing about what lies outside of it." if self.label == VerdictLabel.REAL else ""
        return f"Scope of the detector: {self.scope.rstrip('.')}.{limit}"

    @property
    def p_fake_range(self) -> tuple[float, float] | None:
        """Lowest and highest p_fake of the delivered versions; None when none was judged."""
        return (min(self.stability.values()), max(self.stability.values())) if self.stability else None

    @property
    def range_text(self) -> str:
        """Write "81 % to 92 % in 8 delivered versions", uncalibrated their scores; empty when none was judged."""
        if self.p_fake_range is None:
            return ""
        low, high = (_percent(p) if self.is_calibrated else f"{p:.3f}" for p in self.p_fake_range)
        return f"{low} to {high} in {len(self.stability)} delivered versions"


@dataclass(frozen=True, kw_only=True)
class FrameScore:
    """One frame of a video: seconds since its first frame, and of the followed face, where it is seen, box and scores.

    raw_p_fake and p_fake as in a verdict about this frame alone; None without the face, or without a verdict.
    """

    seconds: float
    face_box: tuple[int, int, int, int] | None = None
    face_landmarks: tuple[tuple[float, float], ...] | None = None
    face_roll: float | None = None
    raw_p_fake: float | None = None
    p_fake: float | None = None


@dataclass(frozen=True, kw_only=True)
class VideoVerdict(Verdict):
    """A detector's answer about the face that is seen longest in a video.

    raw_p_fake, probabilities and evidence are means over the frames with this face, without the share `trim` of the
    lowest and of the highest values. frames: all that were looked at; none when the video could not be read; damaged:
    how many that were wanted are damaged, so that the next sound one was taken, or none.
    spread: standard deviation (n - 1) of the frames' raw p_fake. telling: number in `frames` of the one whose score
    lies farthest on the verdict's side (for UNCERTAIN: nearest to the video's score); face_box is the box there.
    face_count: how many faces are seen in enough frames for a verdict.
    """

    frames: tuple[FrameScore, ...] = ()
    damaged: int = 0
    trim: float = 0.0
    spread: float | None = None
    telling: int | None = None

    @property
    def telling_seconds(self) -> float | None:
        """Give the time of the most telling frame."""
        return None if self.telling is None else self.frames[self.telling].seconds

    @property
    def frames_with_face(self) -> int:
        """Count the frames that show the followed face, or were judged whole."""
        return sum(frame.face_box is not None or frame.raw_p_fake is not None for frame in self.frames)

    @property
    def remark(self) -> str:
        """Say in how many frames the face is, how far their scores lie apart, and which second tells most."""
        if self.telling_seconds is None:
            return self.reason
        spread = "" if self.spread is None else f", standard deviation {self.spread:.3f}"
        count = f"{self.frames_with_face} of {len(self.frames)} frames"
        found = f"judged on {count}{spread}, most telling at {self.telling_seconds:.1f} s"
        return "; ".join(part for part in (self.reason, found) if part)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A verdict with the words that explain it.

    text_verdict: what the text itself says (0 real, 1 fake, None undecided). `agrees` is False when the text
    contradicts the verdict, None when either of them is undecided; the verdict stands in every case.
    about: which part of a video the text is about.
    """

    verdict: Verdict
    question: str
    text: str
    text_verdict: int | None
    agrees: bool | None
    about: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Say the verdict and what it can rest on, then the text, then whether that contradicts the verdict."""
        parts = (str(self.verdict), self.verdict.scope_text, self.placed_text, self.remark)
        return "\n".join(part for part in parts if part)

    @property
    def placed_text(self) -> str:
        """Give the text, after what it is about where that is not the whole image."""
        return f"[{self.about}] {self.text}" if self.about else self.text

    @property
    def remark(self) -> str:
        """Mark a text that contradicts the verdict, or takes a side where it has none, or none; else empty."""
        if self.agrees is False:
            return f"[The text says {LABEL_NAMES[self.text_verdict or REAL]}; the detector's verdict stands.]"
        if self.text_verdict is not None and self.verdict.label == VerdictLabel.UNCERTAIN:
            return f"[The text says {LABEL_NAMES[self.text_verdict]}; the verdict is UNCERTAIN.]"
        return "[The text takes no side.]" if self.text and self.text_verdict is None else ""


def _percent(p: float) -> str:
    """Write a probability as a percentage, never 0 or 100 %."""
    bound = "under " if p < 0.01 else "over " if p > 0.99 else ""
    return f"{bound}{100 * min(max(p, 0.01), 0.99):.0f} %"
