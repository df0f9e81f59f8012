"""Merges, each with a certificate of what it changed: detector into LLaVA, delta into base, weights into 16 bit."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llava.core.runtime import atomic_path, item_rng, write_json
from llava.core.score_map import CALIBRATION_NAME, Calibration, read_calibration, write_calibration
from llava.core.tensor_files import INDEX_NAME
from llava.core.types import Turn
from llava.core.weights import halved, read_config, shapes_only
from llava.detectors.base import Detector, load_uncalibrated
from llava.detectors.base import load as load_detector
from llava.detectors.members import MEMBERS, own_description, read_trained_on, write_trained_on
from llava.detectors.published import ready_detector
from llava.explainer.convert import ready, ready_delta
from llava.explainer.delta import Model, attach, detector_fingerprint, fingerprint, inner, read_record
from llava.explainer.generation import load_model, load_processor
from llava.explainer.modeling import EvidenceAdapter, ForgeryLlava, ForgeryLlavaConfig, join_config
from llava.explainer.processing import ExplainerProcessor, read_tokenizer
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
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, "pt")) for file in {*old.values(), *new.values()}}
        for name, file in new.items():
            changed += not torch.equal(opened[old[name]].get_tensor(name), opened[file].get_tensor(name))
    return changed, len(new)


@torch.inference_mode()
def certify_detector(folder: Path, alone: Detector) -> dict[str, Any]:
    """Compare the detector inside the saved explainer with the detector on its own.

    stage_1_sha256 is the fingerprint of the one on its own, detector_sha256 of the one inside: they are the same but
    where the base keeps the shared tower in half precision.
    """
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
        "stage_1_sha256": own_fingerprint(alone),
        "detector_sha256": detector_fingerprint(folder, merged.detector),
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


def merge_detector(
    base: str, detector: str | None, out: Path, *, seed: int = 0, evidence_tokens: int = 1, layout: str = "v1"
) -> dict[str, Any]:
    """Build an explainer from a LLaVA base and a stage-1 detector, with a fresh adapter N(0, 0.1) as published.

    Without `detector`, the base's config must name it (`deepfake_model_path`). Gives the certificate.
    """
    base_folder = ready(base)
    settings = read_config(base_folder)
    check_base(settings, str(base))
    alone = load_detector(ready_detector(detector or named_detector(settings, base)))
    check_named(settings, alone, base)
    llava, report = LlavaForConditionalGeneration.from_pretrained(base_folder, dtype="auto", output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
        raise ValueError(f"{base!r}: {len(wrong)} tensors do not fit LLaVA, first: {wrong[0]}.")
    guest = share_vision(alone, llava)
    ratio = settings.get("image_aspect_ratio", "square")
    model = _join(llava, guest, join_config(llava.config, guest, ratio, evidence_tokens, layout), seed)
    with atomic_path(out) as staged:
        model.save_pretrained(staged)
        read_tokenizer(base_folder).save_pretrained(staged)
        del model, llava  # one model in memory at a time
        certificate = certify_detector(staged, alone)
        _stamp(staged, alone.calibration, certificate["detector_sha256"])
        write_trained_on(staged, alone.trained_on)
        write_json(staged / CERTIFICATE, certificate)
    log.info(
        "merged %s and %s into %s (max |delta p_fake| %.1e)", base, guest.name, out, certificate["max_delta_p_fake"]
    )
    return certificate


def merge_delta(base: str, delta: str, out: Path) -> dict[str, Any]:
    """Fold a trained delta (adapter, or LoRA + projectors) into the base it was trained on; gives the certificate.

    Raises ValueError for another base, for a delta that changes nothing, or when the folded model differs from base +
    delta in any logit by more than 1e-4 (float32) or 5 % of the largest logit (half precision, where folding rounds).
    """
    base_folder = ready(base)
    delta_folder = ready_delta(delta, base_folder)
    record = read_record(delta_folder)
    check_fingerprint(record["base"], fingerprint(base_folder), str(base))
    model = load_model(base_folder, dtype="stored")
    processor, detector = load_processor(base_folder, model), model.detector
    live = attach(model, delta_folder).eval()
    expected = sample_logits(live, processor)
    merged: ForgeryLlava = live.merge_and_unload() if isinstance(live, PeftModel) else live
    is_exact = merged.lm_head.weight.dtype == torch.float32
    tolerance = TOLERANCE if is_exact else 0.05 * max(float(logits.abs().max()) for logits in expected)
    with atomic_path(out) as staged:
        merged.save_pretrained(staged)
        processor.tokenizer.save_pretrained(staged)
        detector_sha256 = detector_fingerprint(staged, detector)
        _stamp(staged, detector.calibration, detector_sha256)  # the words rest on it
        write_trained_on(staged, read_trained_on(base_folder))
        del model, live, merged  # one model in memory at a time
        difference = max_difference(expected, sample_logits(load_model(staged, dtype="stored"), processor))
        if not difference <= tolerance:
            raise ValueError(f"Merging {delta!r} changed the logits by {difference:.1e}, more than {tolerance:.0e}.")
        certificate = certify_delta(base_folder, staged, record, difference, tolerance)
        certificate["detector_sha256"] = detector_sha256
        write_json(staged / CERTIFICATE, certificate)
    log.info(
        "merged %s into %s: %d tensors changed, max |delta logit| %.1e",
        delta,
        out,
        certificate["tensors_changed"],
        difference,
    )
    return certificate


def halve(name: str, out: Path) -> dict[str, Any]:
    """Store a detector or an explainer with float32 weights rounded to half precision; gives the certificate.

    It is loaded into float32 as before, with the rounded values. Its calibration goes along where the detector's
    values stayed as they were. Raises ValueError for a calibration of others, or when an explainer's logits move by
    more than 5 % of the largest one.
    """
    folder = ready(name)
    is_detector = own_description(settings := read_config(folder)) is settings
    with atomic_path(out) as staged:
        changed, total = _write_halved(folder, staged)
        model = None if is_detector else load_model(staged)
        detector = model.detector if model else load_uncalibrated(staged)
        detector_sha256 = detector_fingerprint(staged, detector) if model else own_fingerprint(detector)
        detector.calibration = read_calibration(folder)
        if detector.calibration and detector.calibration.weights_sha256 != detector_sha256:
            raise ValueError(
                f"The calibration of {name!r} is of its weights before rounding. Halve the detector alone, without its "
                f"{CALIBRATION_NAME}; then score validation with the result, run eval/calibrate.py, and merge."
            )
        _stamp(staged, detector.calibration, str(detector_sha256))
        certificate: dict[str, Any] = {"kind": "half", "base": {"name": name, "sha256": fingerprint(folder)}}
        certificate |= {} if model is None else _moved_logits(name, folder, model)
        certificate |= {"tensors_changed": changed, "tensors_total": total}
        certificate |= {"detector_sha256": detector_sha256, "sha256": fingerprint(staged)}
        write_json(staged / CERTIFICATE, certificate)
    log.info("stored %s in half precision as %s: %d of %d tensors changed", name, out, changed, total)
    return certificate


def _write_halved(folder: Path, staged: Path) -> tuple[int, int]:
    """Write a model folder with rounded weights, without calibration; gives how many tensors changed, and all.

    Members of a detector keep their precision: they have folders of their own.
    """
    staged.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != CALIBRATION_NAME:
            shutil.copyfile(path, staged / path.name)
        elif path.name == MEMBERS:
            shutil.copytree(path, staged / MEMBERS)
    changed = total = size = 0
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        rounded = halved(tensors)
        changed += sum(not torch.equal(rounded[name].to(tensor.dtype), tensor) for name, tensor in tensors.items())
        total, size = total + len(tensors), size + sum(tensor.nbytes for tensor in rounded.values())
        save_file(rounded, staged / file.name, metadata={"format": "pt"})
    if (index := staged / INDEX_NAME).is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["metadata"]["total_size"] = size
        write_json(index, content)
    return changed, total


def _moved_logits(name: str, folder: Path, model: ForgeryLlava) -> dict[str, Any]:
    """Say how far rounding moves the logits of the sample prompts. Raises ValueError where that is too far."""
    before = load_model(folder)
    processor = load_processor(folder, before)
    expected = sample_logits(before, processor)
    difference = max_difference(expected, sample_logits(model, processor))
    tolerance = 0.05 * max(float(logits.abs().max()) for logits in expected)
    if not difference <= tolerance:
        raise ValueError(f"Rounding {name!r} changes the logits by {difference:.1e}, more than {tolerance:.0e}.")
    return {"max_delta_logit": difference, "tolerance": tolerance, "sample_prompts": len(QUESTIONS)}


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


def check_named(settings: dict[str, Any], detector: Detector, base: str) -> None:
    """Refuse a detector that is not the one the base's config names, by name (published: backbone) or fingerprint."""
    named = settings.get("deepfake_model_name")
    known = (detector.name, getattr(detector.config, "backbone", None))
    if named is not None and named not in known:
        raise ValueError(f"{base!r} names the detector {named!r} (deepfake_model_name), the folder holds {known}.")
    wanted, found = settings.get("deepfake_model_sha256"), own_fingerprint(detector)
    if wanted is not None and wanted != found:
        raise ValueError(
            f"{base!r} was made for the detector {settings.get('deepfake_model_path')!r} with the fingerprint "
            f"{wanted[:12]}, this one has {(found or 'none')[:12]}; give that detector, or make a base for this one "
            "(m2f2 tiny-base --detector FOLDER); a base that is for any detector has no deepfake_model_sha256 in its "
            "config.json."
        )


def own_fingerprint(detector: Detector) -> str | None:
    """Give a detector's fingerprint, None for one that was saved without the tower it needs."""
    return None if detector.shares_vision else detector.fingerprint()


def _stamp(folder: Path, calibration: Calibration | None, detector_sha256: str) -> None:
    """Write the calibration of a detector that is inside a merged folder, as one of the tensors stored there.

    That they give the same scores, the merge has shown, or a delta can not change; the certificate names the detector
    that it was fitted for.
    """
    if calibration is not None:
        write_calibration(folder, replace(calibration, weights_sha256=detector_sha256))


def fresh_adapter(config: ForgeryLlavaConfig, seed: int) -> EvidenceAdapter:
    """Draw an adapter: matrices N(0, 0.1) as published, biases 0."""
    adapter = EvidenceAdapter(config.evidence_size, config.text_config.hidden_size, config.evidence_tokens)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.1, generator=generator)
        else:
            parameter.data.zero_()
    return adapter


def _join(llava: LlavaForConditionalGeneration, guest: Detector, config: ForgeryLlavaConfig, seed: int) -> ForgeryLlava:
    """Put the parts together without copying a weight."""
    with shapes_only():
        model = ForgeryLlava(config)
    model.model, model.lm_head = llava.model, llava.lm_head
    model.detector, model.deepfake_projector = guest, fresh_adapter(config, seed).to(llava.dtype)
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert not left, left
    return model.eval()


def share_vision(detector: Detector, llava: LlavaForConditionalGeneration) -> Detector:
    """Let a detector read the LLaVA's vision tower instead of the one it declares; they must be the same weights."""
    tower = detector.shared_tower()
    if tower is None:
        return detector
    layers = tower.select_layer, llava.config.vision_feature_layer
    if layers[0] != layers[1]:
        raise ValueError(f"The detector reads layer {layers[0]} of the vision tower, the base layer {layers[1]}.")
    if detector.shares_vision:
        return detector
    theirs, mine = llava.model.vision_tower.state_dict(), detector.tower_tensors()
    differ = [k for k in mine if k not in theirs or mine[k].shape != theirs[k].shape or not _close(mine[k], theirs[k])]
    if differ:
        raise ValueError(
            f"The detector was trained on another vision tower ({len(differ)} of {len(mine)} tensors differ), its "
            "scores would change. Train stage 1 with --model.clip_name set to this base, or merge into its own base."
        )
    guest = detector.without_vision()
    guest.decision, guest.own_scope = detector.decision, detector.own_scope
    return guest


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.to(b.dtype), b) or torch.equal(a, b.to(a.dtype))
