"""How tensors of the published M2F2-Det are called here: the rename table, and nothing else changes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# published prefix -> our prefix; the inner `text_model.` / `vision_model.` level left transformers with version 5
PUBLISHED_PREFIXES = {
    "clip_text_encoder.model.text_model.": "text_encoder.model.",
    "clip_text_encoder.": "text_encoder.",
    "clip_vision_encoder.model.vision_model.": "vision_encoder.model.",
    "deepfake_encoder.": "backbone.",
    "deepfake_proj.": "backbone_proj.",
    "clip_vision_alpha": "vision_alpha",
    "clip_text_alpha": "text_alpha",
    "output.": "classifier.",
    "text_proj.": "text_proj.",
    "vision_proj.": "vision_proj.",
}


def our_key(published: str) -> str:
    """Give our name of a published tensor. Raises ValueError for a name that the table does not cover."""
    for old, new in PUBLISHED_PREFIXES.items():
        if published.startswith(old):
            return new + published.removeprefix(old)
    raise ValueError(f"Unknown published tensor {published!r}; allowed prefixes: {', '.join(PUBLISHED_PREFIXES)}.")


def rename_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a published detector state dict (flat, no wrapper) to our keys."""
    return {our_key(name): tensor for name, tensor in state.items()}
