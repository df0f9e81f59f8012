"""Ask an explainer about images: encode them once, answer in batches or as a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from llava.core.types import Turn
from llava.detectors.base import DetectorOutput
from llava.explainer.decoding import Decoder, Row
from llava.explainer.modeling import Encoded, ForgeryLlava
from llava.explainer.processing import ExplainerProcessor, Pixels
from llava.explainer.sampling import GenerationSettings


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
