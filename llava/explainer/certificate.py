"""What a merge proves: samples to compare on, largest differences, and how many tensors changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from llava.core.runtime import item_rng
from llava.core.types import Turn
from llava.detectors.base import Detector
from llava.explainer.delta import Model, fingerprint, inner
from llava.explainer.loading import load_model, load_processor
from llava.explainer.processing import ExplainerProcessor
from llava.explainer.prompts import VERDICT_QUESTION

CERTIFICATE = "certificate.json"
TOLERANCE = 1e-4
QUESTIONS = (VERDICT_QUESTION, "Do the person's eyes look real or fake? Give the reasons.", "Why?")


def sample_images(count: int, size: int) -> list[np.ndarray]:
    """Draw pictures of coloured noise, the same ones every time: uint8 (size, size, 3)."""
    return [item_rng(0, 0, i).integers(0, 256, (size, size, 3), dtype=np.uint8) for i in range(count)]


@torch.inference_mode()
def sample_logits(model: Model, processor: ExplainerProcessor) -> list[Tensor]:
    """Give the logits of every position of the sample prompts, for comparison."""
    explainer = inner(model)
    size = explainer.config.vision_config.image_size
    results = []
    for question, image in zip(QUESTIONS, sample_images(len(QUESTIONS), size), strict=True):
        ids, _ = processor.encode([Turn(role="human", text=question)])
        batch = processor.collate([{"input_ids": ids, **processor.pixels(image)}])
        results.append(model(**batch).logits.float())
    return results


def max_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Give the largest absolute difference between two lists of tensors."""
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def changed_tensors(before: Path, after: Path) -> tuple[int, int]:
    """Count the tensors that differ between two model folders, and all of them; one tensor in memory at a time."""
    old, new = _tensor_files(before), _tensor_files(after)
    if old.keys() != new.keys():
        raise ValueError(f"{str(after)!r} has other tensors than its base: {sorted(old.keys() ^ new.keys())[:3]}.")
    changed = 0
    for name, file in new.items():
        with safe_open(old[name], "pt") as first, safe_open(file, "pt") as second:
            changed += not torch.equal(first.get_tensor(name), second.get_tensor(name))
    return changed, len(new)


@torch.inference_mode()
def certify_detector(folder: Path, alone: Detector) -> dict[str, Any]:
    """Compare the detector inside the saved explainer with the detector on its own."""
    merged = load_model(folder, dtype="stored")
    processor = load_processor(folder, merged)
    pixels = [processor.pixels(i) for i in sample_images(4, merged.config.vision_config.image_size)]
    batch = processor.collate([{"input_ids": [0], **p} for p in pixels])
    inside = merged.encode(batch["pixel_values"], batch["detector_inputs"]).detection
    outside = alone.over_views(batch["detector_inputs"])
    difference = max_difference([alone.p_fake(inside.logits)], [alone.p_fake(outside.logits)])  # type: ignore[arg-type]
    if merged.dtype == torch.float32 and difference > TOLERANCE:
        raise ValueError(f"The merged detector differs from stage 1 by {difference:.1e} in p_fake.")
    return {
        "kind": "detector",
        "detector": alone.name,
        "max_delta_p_fake": difference,
        "sample_images": 4,
        "tensors_total": len(merged.state_dict()),
        "sha256": fingerprint(folder),
    }


def _tensor_files(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found
