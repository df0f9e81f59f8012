"""Merges, each with a certificate: a detector into LLaVA, and a trained delta into its base."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

from llava.core.runtime import atomic_path, item_rng, write_json
from llava.core.types import Turn
from llava.core.weights import load_strictly, read_config, resolve
from llava.detectors.base import Detector
from llava.detectors.base import load as load_detector
from llava.explainer.configuration import ForgeryLlavaConfig
from llava.explainer.delta import Model, attach, fingerprint, inner, read_record
from llava.explainer.loading import load_model, load_processor
from llava.explainer.modeling import ForgeryLlava
from llava.explainer.processing import ExplainerProcessor
from llava.explainer.prompts import VERDICT_QUESTION

log = logging.getLogger(__name__)
CERTIFICATE = "certificate.json"
TOLERANCE = 1e-4
QUESTIONS = (VERDICT_QUESTION, "Do the person's eyes look real or fake? Give the reasons.", "Why?")


def merge_detector(
    base: str, detector: str | None, out: Path, *, seed: int = 0, evidence_tokens: int = 1, layout: str = "v1"
) -> dict[str, Any]:
    """Build an explainer from a LLaVA base and a stage-1 detector, with a fresh adapter N(0, 0.1) as published.

    Without `detector`, the base's config must name it (`deepfake_model_path`). Gives the certificate.
    """
    base_folder = resolve(base)
    settings = read_config(base_folder)
    check_base(settings, str(base))
    alone = load_detector(resolve(detector or named_detector(settings, base)))
    llava, report = LlavaForConditionalGeneration.from_pretrained(base_folder, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError(f"{base!r}: weights do not fit LLaVA: {sorted(report['missing_keys'])[:3]} are missing.")
    guest = share_vision(alone, llava)
    ratio = settings.get("image_aspect_ratio", "square")
    model = ForgeryLlava(_explainer_config(llava.config, guest, ratio, evidence_tokens, layout)).to(llava.dtype)
    model.detector.float()
    parts = llava.state_dict() | {f"detector.{k}": v for k, v in guest.state_dict().items()}
    parts |= {f"deepfake_projector.{k}": v for k, v in fresh_adapter(model, seed).items()}
    load_strictly(model, parts, f"{base!r} with detector {guest.name!r}")
    with atomic_path(out) as staged:
        model.eval().save_pretrained(staged)
        AutoTokenizer.from_pretrained(base_folder).save_pretrained(staged)
        certificate = _certify_detector(staged, alone, len(parts))
        write_json(staged / CERTIFICATE, certificate)
    log.info(
        "merged %s and %s into %s (max |delta p_fake| %.1e)", base, guest.name, out, certificate["max_delta_p_fake"]
    )
    return certificate


def merge_delta(base: str, delta: str, out: Path) -> dict[str, Any]:
    """Fold a trained delta (adapter, or LoRA + projectors) into the base it was trained on; gives the certificate.

    Raises ValueError for another base, for a delta that changes nothing, or when the folded model differs from
    base + delta by more than 1e-4 in any logit (float32).
    """
    base_folder, delta_folder = resolve(base), resolve(delta)
    record = read_record(delta_folder)
    check_fingerprint(record["base"], fingerprint(base_folder), str(base))
    model = load_model(base_folder)
    processor = load_processor(base_folder, model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    live = attach(model, delta_folder).eval()
    expected = sample_logits(live, processor)
    merged: ForgeryLlava = live.merge_and_unload() if isinstance(live, PeftModel) else live  # type: ignore[assignment]
    changed = [name for name, tensor in merged.state_dict().items() if not torch.equal(tensor, before[name])]
    if not changed:
        raise ValueError(f"{delta!r} changes no tensor of {base!r}: nothing was restored. Is training finished?")
    with atomic_path(out) as staged:
        merged.save_pretrained(staged)
        processor.tokenizer.save_pretrained(staged)
        difference = max_difference(expected, sample_logits(load_model(staged), processor))
        if difference > TOLERANCE:
            raise ValueError(f"Merging {delta!r} changed the logits by {difference:.1e}, more than {TOLERANCE:.0e}.")
        certificate = {
            "kind": "lora" if record["lora"] else "adapter",
            "base": record["base"],
            "max_delta_logit": difference,
            "sample_prompts": len(QUESTIONS),
            "tensors_in_delta": record["lora"] + record["others"],
            "tensors_changed": len(changed),
            "tensors_total": len(before),
            "sha256": fingerprint(staged),
        }
        write_json(staged / CERTIFICATE, certificate)
    log.info("merged %s into %s: %d tensors changed, max |delta logit| %.1e", delta, out, len(changed), difference)
    return certificate


def check_fingerprint(trained_on: dict[str, Any], found: str, name: str) -> None:
    """Refuse to fold a delta into a model that it was not trained on."""
    if trained_on["sha256"] != found:
        raise ValueError(
            f"{name!r} is not the base of this delta: it was trained on {trained_on['name']!r} "
            f"(sha256 {trained_on['sha256'][:12]}), this one is {found[:12]}. Give that base."
        )


def check_base(settings: dict[str, Any], name: str) -> None:
    """Refuse a base whose config contradicts how the detector reads CLIP features."""
    kind = settings.get("model_type")
    if kind != "llava":
        raise ValueError(f"{name!r} is a {kind!r} checkpoint; stage 2 starts from a LLaVA-1.5 base (model_type llava).")
    feature = settings.get("mm_vision_select_feature", "cls_patch")
    if feature != "cls_patch":
        raise ValueError(
            f"{name!r}: mm_vision_select_feature is {feature!r}; it must be 'cls_patch', because the detector "
            "reads the CLS feature, which 'patch' drops. Change it in config.json."
        )


def named_detector(settings: dict[str, Any], base: str) -> str:
    """Read the stage-1 folder from a base's config. Raises ValueError when it names none."""
    path = settings.get("deepfake_model_path")
    if not path:
        raise ValueError(
            f"No detector: give --deepfake-model-path, or write deepfake_model_path into {base}/config.json."
        )
    return str(path)


def fresh_adapter(model: ForgeryLlava, seed: int) -> dict[str, Tensor]:
    """Draw an adapter: matrices N(0, 0.1) as published, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.1 if tensor.ndim == 2 else torch.zeros_like(tensor)
        for name, tensor in model.deepfake_projector.state_dict().items()
    }


def share_vision(detector: Detector, llava: LlavaForConditionalGeneration) -> Detector:
    """Let a detector read the LLaVA's vision tower instead of its own; they must be the same weights."""
    own = getattr(detector, "vision_encoder", None)
    if own is None:
        return detector
    theirs = llava.model.vision_tower.state_dict()
    mine = own.model.state_dict()
    differ = [k for k in mine if k not in theirs or mine[k].shape != theirs[k].shape or not _close(mine[k], theirs[k])]
    if differ or llava.config.vision_feature_layer != -2:
        raise ValueError(
            f"The detector was trained on another vision tower ({len(differ)} of {len(mine)} tensors differ), its "
            "scores would change. Train stage 1 with --model.clip_name set to this base, or merge into its own base."
        )
    return detector.without_vision()


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


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.to(b.dtype), b) or torch.equal(a, b.to(a.dtype))


def _explainer_config(
    base: LlavaConfig, guest: Detector, aspect_ratio: str, evidence_tokens: int, layout: str
) -> ForgeryLlavaConfig:
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


@torch.inference_mode()
def _certify_detector(folder: Path, alone: Detector, tensors: int) -> dict[str, Any]:
    """Compare the detector inside the saved explainer with the detector on its own."""
    merged = load_model(folder)
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
        "tensors_total": tensors,
        "sha256": fingerprint(folder),
    }
