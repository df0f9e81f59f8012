"""A verdict beside the pixels and the map that it rests on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llava.core.types import Explanation, Verdict, VideoVerdict


@dataclass(frozen=True, kw_only=True, eq=False)
class Finding:
    """What was found about one face.

    explanation: the verdict with its words, None where no words were asked for. pixels: the crop that was judged, uint8
    RGB (H, W, 3), None when there was nothing to judge. evidence_map: float32 (h, w) in [0, 1] over the crop's central
    square, which is what a detector sees; None for a detector without a map. seen: that square's side as a share of the
    crop's shorter side.
    """

    verdict: Verdict
    explanation: Explanation | None = None
    pixels: np.ndarray | None = None
    evidence_map: np.ndarray | None = None
    seen: float = 1.0

    @property
    def answer(self) -> Verdict | Explanation:
        """Give the explanation where there is one, else the verdict."""
        return self.explanation or self.verdict


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoFinding(Finding):
    """What was found about a video; words, pixels and map are those of its most telling frame."""

    verdict: VideoVerdict
