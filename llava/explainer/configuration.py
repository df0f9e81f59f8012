"""Configuration of the explainer: LLaVA-1.5 plus the detector it owns and the evidence tokens it reads."""

from __future__ import annotations

from typing import Any

from transformers import LlavaConfig

from llava.core.types import InputSpec
from llava.detectors.clip_prompt import CLIP_MEAN, CLIP_STD


class ForgeryLlavaConfig(LlavaConfig):
    """LLaVA configuration with a detector.

    detector: what `Detector.describe()` gives. evidence_size (E) and evidence_tokens (T): the adapter maps the
    detector's (B, E) evidence to T tokens at `<deepfake>`. image_aspect_ratio: `pad` puts the image on a square
    canvas for the vision tower, `square` centre-crops it. layout: the prompt layout of training.
    """

    model_type = "m2f2_llava"

    detector: dict[str, Any] | None = None
    deepfake_token_index: int = 32001
    evidence_size: int = 2
    evidence_tokens: int = 1
    image_aspect_ratio: str = "square"
    layout: str = "v1"

    @property
    def image_tokens(self) -> int:
        """Count the patch tokens that stand for one image."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def vision_input(self) -> InputSpec:
        """Say what the vision tower's pixels look like."""
        return InputSpec(size=self.vision_config.image_size, mean=CLIP_MEAN, std=CLIP_STD)
