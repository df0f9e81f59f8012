"""Load an explainer and ask it about images: encode them once, answer in batches or as a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from llava.core.types import GenerationSettings, Turn
from llava.core.weights import read_config
from llava.detectors.base import DetectorOutput
from llava.explainer.convert import is_published, ready
from llava.explainer.decoding import Decoder, Row
from llava.explainer.modeling import Encoded, ForgeryLlava, ForgeryLlavaConfig
from llava.explainer.processing import ExplainerProcessor, Pixels

DTYPES: dict[str, Any] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "stored": "auto"}
# Never quantised: p_fake is the same whether the words are written in 4, 8 or 16 bit.
FULL_PRECISION = ["detector", "model.vision_tower", "model.multi_modal_projector", "deepfake_projector", "lm_head"]


def load_model(
    name: str | Path,
    device: torch.device | str = "cpu",
    dtype: Literal["fp32", "bf16", "fp16", "stored"] = "fp32",
    quantization: Literal["none", "8bit", "4bit"] = "none",
    settings: Mapping[str, Any] | None = None,
) -> ForgeryLlava:
    """Load a merged explainer in eval mode; the detector stays in float32, whatever `dtype` (stored = as saved).

    settings: what the config.json of the folder `name` says, where that was read already. Raises ValueError when the
    folder holds something else, when a tensor is missing or left over, or when its calibration.json is of another
    detector.
    """
    folder = Path(name) if settings else ready(name)
    settings = settings or read_config(folder)
    if settings.get("model_type") != ForgeryLlavaConfig.model_type:
        found = settings.get("model_type") or settings.get("detector") or "something else"
        raise ValueError(
            f"{str(name)!r} holds {found!r}, not a merged explainer; run stage 2 and 3 or give their output."
        )
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "config": ForgeryLlavaConfig.from_dict(dict(settings))}
    if quantization != "none":
        options |= {"quantization_config": _quantization(quantization, DTYPES[dtype]), "device_map": {"": str(device)}}
    model, report = ForgeryLlava.from_pretrained(folder, output_loading_info=True, **options)
    for kind_of_problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(kind_of_problem):
            some = sorted(map(str, report[kind_of_problem]))
            raise ValueError(f"{str(name)!r}: {len(some)} {kind_of_problem.replace('_', ' ')}, first: {some[0]}.")
    model.detector.load_calibration(folder)
    return model.eval() if quantization != "none" else model.to(device).eval()  # type: ignore[arg-type]


def load_processor(name: str | Path, model: ForgeryLlava) -> ExplainerProcessor:
    """Load the tokeniser and picture preparation that go with a model."""
    return ExplainerProcessor.from_pretrained(ready(name), model.config, model.detector.inputs)


def load_explainer(
    folder: Path,
    settings: Mapping[str, Any],
    device: torch.device,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    quantization: Literal["none", "8bit", "4bit"] = "none",
) -> Explainer:
    """Load a merged explainer, ours or a published one, whose config.json says `settings`.

    precision `auto` is bf16 on a GPU and fp32 elsewhere. Raises ValueError when the folder holds something else.
    """
    if is_published(settings):
        folder = ready(folder)
        settings = read_config(folder)
    if (kind := settings.get("model_type")) != ForgeryLlavaConfig.model_type:
        raise ValueError(
            f"{str(folder)!r} holds model type {kind!r}, neither a detector nor an explainer; give what stage 1 wrote, "
            "or what stage 3 merged."
        )
    dtype = ("bf16" if device.type == "cuda" else "fp32") if precision == "auto" else precision
    model = load_model(folder, device, dtype, quantization, settings)
    return Explainer(model, ExplainerProcessor.from_pretrained(folder, model.config, model.detector.inputs))


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=FULL_PRECISION)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=FULL_PRECISION
    )


class Explainer:
    """A loaded model with its processor."""

    def __init__(self, model: ForgeryLlava, processor: ExplainerProcessor) -> None:
        self.model = model
        self.processor = processor

    @torch.no_grad()
    def encode(self, images: Sequence[np.ndarray | Pixels], prior: float | None = None) -> Encoded:
        """Run tower and detector once for each uint8 image (H, W, 3), or what the processor made of it."""
        return self.model.encode(*self._pixels(images), prior)

    @torch.no_grad()
    def detect(self, images: Sequence[np.ndarray | Pixels]) -> DetectorOutput:
        """Run tower and detector, as `encode` does, for images that nobody is going to be asked about."""
        pixels, inputs = self._pixels(images)
        return self.model.detect(self.model.vision_features(pixels), inputs)

    def answer(
        self,
        encoded: Encoded,
        conversations: Sequence[Sequence[Turn]],
        settings: GenerationSettings | None = None,
        evidence: Tensor | None = None,
    ) -> list[str]:
        """Answer one conversation (ending with a question) for each encoded image, as one batch.

        evidence (N, E) in [0, 1] replaces the detector's own, for causality tests.
        """
        chosen = encoded if evidence is None else replace(encoded, evidence=evidence.to(encoded.evidence))
        decoder, rows = self._begin(chosen, conversations, settings)
        while decoder.rows:
            decoder.leave([row for row in decoder.rows if row.is_done])
            decoder.step()
        return [self.processor.decode(row.ids) for row in rows]

    def stream(
        self, encoded: Encoded, turns: Sequence[Turn], settings: GenerationSettings | None = None
    ) -> Iterator[str]:
        """Yield the answer to one conversation piece by piece; a reader that stops early stops the writing."""
        decoder, (row,) = self._begin(encoded, [turns], settings)
        while True:
            if piece := decoder.news(row):
                yield piece
            if row.is_done:
                return
            decoder.step()

    def _begin(
        self, encoded: Encoded, conversations: Sequence[Sequence[Turn]], settings: GenerationSettings | None
    ) -> tuple[Decoder, list[Row]]:
        """Read one conversation for each image and write the first token of each answer."""
        if len(conversations) != len(encoded.evidence):
            raise ValueError(
                f"{len(conversations)} conversations for {len(encoded.evidence)} images; give one for each."
            )
        decoder, settings = Decoder(self.model, self.processor), settings or GenerationSettings()
        split = [decoder.split(turns, settings) for turns in conversations]
        images = [encoded.take([n]) for n in range(len(split))]
        prefixes = decoder.prefixes_of([ids for ids, _ in split], images)
        rows = [Row(settings=settings, suffix=suffix, prefix=p) for (_, suffix), p in zip(split, prefixes, strict=True)]
        decoder.join(rows)
        return decoder, rows

    def _pixels(self, images: Sequence[np.ndarray | Pixels]) -> tuple[Tensor, dict[str, Tensor]]:
        """Give the tower's pixels (N, 3, S, S) and the detector's inputs (N, V, 3, S, S) on the model's device."""
        if not images:
            raise ValueError("images: expected at least one uint8 (H, W, 3) array, got none.")
        prepared = [self.processor.pixels(image) if isinstance(image, np.ndarray) else image for image in images]
        device = self.model.device
        pixels = torch.stack([p["pixel_values"] for p in prepared]).to(device)
        names = prepared[0]["detector_inputs"]
        return pixels, {n: torch.stack([p["detector_inputs"][n] for p in prepared]).to(device) for n in names}
