"""Configuration of the explainer: LLaVA-1.5 plus the detector it owns and the evidence tokens it reads."""

from __future__ import annotations

from typing import Any

from transformers import LlavaConfig

from llava.core.types import InputSpec
from llava.detectors.base import Detector
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


def join_config(
    base: LlavaConfig, guest: Detector, aspect_ratio: str, evidence_tokens: int, layout: str
) -> ForgeryLlavaConfig:
    """Give the configuration of an explainer: that of its LLaVA base, and what its detector needs."""
    values = {k: v for k, v in base.to_dict().items() if k not in ("model_type", "architectures", "dtype")}
    own = {
        "detector": guest.describe(),
        "evidence_size": len(guest.evidence_names),
        "evidence_tokens": evidence_tokens,
        "deepfake_token_index": max(base.image_token_index, base.text_config.vocab_size) + 1,
        "image_aspect_ratio": aspect_ratio,
        "layout": layout,
    }
    return ForgeryLlavaConfig(**values | own)
