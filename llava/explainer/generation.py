"""Ask an explainer about images: encode them once, answer in batches or as a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopPLogitsWarper,
)

from llava.core.config import setting
from llava.core.types import Turn
from llava.detectors.base import DetectorOutput
from llava.explainer.modeling import Encoded, ForgeryLlava
from llava.explainer.processing import ExplainerProcessor, Pixels


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How an answer is written; greedy unless temperature is above 0.

    Sampling depends on `seed` alone, not on torch's global generator nor on the other conversations of a batch.
    """

    max_new_tokens: int = setting(256, "longest answer, in tokens")
    temperature: float = setting(0.0, "0 = greedy; above 0 samples")
    top_p: float = setting(1.0, "nucleus for sampling")
    seed: int = setting(0, "seed of the sampling; the same seed writes the same answer")
    layout: str | None = setting(None, "prompt layout; default: the one the model was trained with")

    def for_generate(self) -> dict[str, Any]:
        """Give the arguments of transformers' generate. Raises ValueError for a temperature below 0."""
        if self.temperature < 0:
            raise ValueError(f"temperature: {self.temperature} is not usable; allowed: 0 (greedy) or more.")
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        if self.temperature > 0:
            warpers = [TemperatureLogitsWarper(float(self.temperature)), TopPLogitsWarper(self.top_p)]
            options["logits_processor"] = LogitsProcessorList([*warpers, GumbelNoise(self.seed)])
        return options


class GumbelNoise(LogitsProcessor):
    """Add Gumbel noise to scores, so that their greatest is a sample of their softmax (the Gumbel-max trick).

    The noise of a step is a function of (seed, step), the same for every row of a batch and on every device:
    transformers' own sampling takes no generator and would read and move the global one.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Give scores (B, vocabulary) with noise."""
        waits = torch.empty(scores.shape[-1]).exponential_(generator=self.generator)
        return scores - waits.log().to(scores)


class _ReaderLeft(StoppingCriteria):
    """Ends generation when nobody reads any more."""

    def __init__(self, left: Event) -> None:
        self.left = left

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.left.is_set(), device=input_ids.device)


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

    @torch.no_grad()
    def answer(
        self,
        encoded: Encoded,
        conversations: Sequence[Sequence[Turn]],
        settings: GenerationSettings | None = None,
        evidence: Tensor | None = None,
    ) -> list[str]:
        """Answer one conversation (ending with a question) for each encoded image, as one left-padded batch.

        evidence (N, E) in [0, 1] replaces the detector's own, for causality tests.
        """
        settings = settings or GenerationSettings()
        inputs = self._inputs(encoded, conversations, settings, evidence)
        ids = self.model.generate(**inputs, **settings.for_generate(), **self._ends())
        start = inputs["input_ids"].shape[1]
        return [self.processor.decode(row[start:]) for row in ids]

    def stream(
        self, encoded: Encoded, turns: Sequence[Turn], settings: GenerationSettings | None = None
    ) -> Iterator[str]:
        """Yield the answer to one conversation piece by piece; a reader that stops early stops the writing.

        An error in the model is raised here.
        """
        settings = settings or GenerationSettings()
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failure: list[BaseException] = []
        left = Event()

        def run() -> None:
            try:
                with torch.no_grad():
                    inputs = self._inputs(encoded, [turns], settings, None)
                    stop = StoppingCriteriaList([_ReaderLeft(left)])
                    options = {**settings.for_generate(), **self._ends()}
                    self.model.generate(**inputs, **options, streamer=streamer, stopping_criteria=stop)
            except BaseException as error:
                failure.append(error)
                streamer.end()

        thread = Thread(target=run, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            left.set()
            thread.join()
        if failure:
            raise failure[0]

    def _pixels(self, images: Sequence[np.ndarray | Pixels]) -> tuple[Tensor, dict[str, Tensor]]:
        """Give the tower's pixels (N, 3, S, S) and the detector's inputs (N, V, 3, S, S) on the model's device."""
        if not images:
            raise ValueError("images: expected at least one uint8 (H, W, 3) array, got none.")
        prepared = [self.processor.pixels(image) if isinstance(image, np.ndarray) else image for image in images]
        device = self.model.device
        pixels = torch.stack([p["pixel_values"] for p in prepared]).to(device)
        names = prepared[0]["detector_inputs"]
        return pixels, {n: torch.stack([p["detector_inputs"][n] for p in prepared]).to(device) for n in names}

    def _inputs(
        self,
        encoded: Encoded,
        conversations: Sequence[Sequence[Turn]],
        settings: GenerationSettings,
        evidence: Tensor | None,
    ) -> dict[str, Any]:
        if len(conversations) != len(encoded.evidence):
            raise ValueError(
                f"{len(conversations)} conversations for {len(encoded.evidence)} images; give one for each."
            )
        rows = [{"input_ids": self.processor.encode(turns, settings.layout)[0]} for turns in conversations]
        batch = {k: v.to(self.model.device) for k, v in self.processor.collate(rows, side="left").items()}
        chosen = encoded.evidence if evidence is None else evidence.to(encoded.evidence)
        return {**batch, "image_features": encoded.image_features, "evidence": chosen}

    def _ends(self) -> dict[str, int]:
        return {"eos_token_id": self.processor.tokenizer.eos_token_id, "pad_token_id": self.processor.pad_id}
