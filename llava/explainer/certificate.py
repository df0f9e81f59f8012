"""What a merge proves: samples to compare on, largest differences, and how many tensors changed."""

from __future__ import annotations

import logging
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

log = logging.getLogger(__name__)
CERTIFICATE = "certificate.json"
TOLERANCE = 1e-4
HALF_PRECISION_TOLERANCE = 0.01  # of p_fake, when the base's vision tower is in half precision
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
    """Give the largest absolute difference between two lists of tensors; NaN when any of them is."""
    return float(torch.stack([(a - b).abs().max() for a, b in zip(first, second, strict=True)]).max())


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
    shared = merged.vision_features(batch["pixel_values"]) if alone.shares_vision else None
    outside = alone.over_views(batch["detector_inputs"], clip_features=shared)
    difference = max_difference([alone.p_fake(inside.logits)], [alone.p_fake(outside.logits)])  # type: ignore[arg-type]
    tolerance = TOLERANCE if merged.model.vision_tower.dtype == torch.float32 else HALF_PRECISION_TOLERANCE
    if not difference <= tolerance:
        raise ValueError(f"The merged detector differs from stage 1 by {difference:.1e} in p_fake.")
    return {
        "kind": "detector",
        "detector": alone.name,
        "max_delta_p_fake": difference,
        "tolerance": tolerance,
        "sample_images": 4,
        "tensors_total": len(merged.state_dict()),
        "sha256": fingerprint(folder),
    }


def certify_delta(
    base: Path, merged: Path, record: dict[str, Any], difference: float, tolerance: float
) -> dict[str, Any]:
    """Compare a merged folder with its base; `record` is the delta's own. Raises ValueError when nothing changed."""
    changed, total = changed_tensors(base, merged)
    if not changed:
        raise ValueError(f"The delta changes no tensor of {str(base)!r}: nothing was restored. Is training finished?")
    expected = record["lora"] // 2 + record["others"]
    if changed < expected:
        log.warning("only %d of %d trained tensors differ from the base", changed, expected)
    return {
        "kind": "lora" if record["lora"] else "adapter",
        "base": record["base"],
        "max_delta_logit": difference,
        "tolerance": tolerance,
        "sample_prompts": len(QUESTIONS),
        "tensors_in_delta": record["lora"] + record["others"],
        "tensors_changed": changed,
        "tensors_total": total,
        "sha256": fingerprint(merged),
    }


def _tensor_files(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found
