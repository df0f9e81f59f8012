"""Ask an explainer about images: encode them once, answer in batches or as a stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from llava.core.config import setting
from llava.core.types import Turn
from llava.explainer.modeling import Encoded, ForgeryLlava
from llava.explainer.processing import ExplainerProcessor


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How an answer is written; greedy unless temperature is above 0."""

    max_new_tokens: int = setting(256, "longest answer, in tokens")
    temperature: float = setting(0.0, "0 = greedy; above 0 samples")
    top_p: float = setting(1.0, "nucleus for sampling")
    layout: str | None = setting(None, "prompt layout; default: the one the model was trained with")

    def for_generate(self) -> dict[str, Any]:
        """Give the arguments of transformers' generate."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_p": self.top_p}
        return options


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
    def encode(self, images: Sequence[np.ndarray]) -> Encoded:
        """Run tower and detector once for each uint8 image (H, W, 3)."""
        if not images:
            raise ValueError("images: expected at least one uint8 (H, W, 3) array, got none.")
        prepared = [self.processor.pixels(image) for image in images]
        device = self.model.device
        pixels = torch.stack([p["pixel_values"] for p in prepared]).to(device)
        names = prepared[0]["detector_inputs"]
        inputs = {n: torch.stack([p["detector_inputs"][n] for p in prepared]).to(device) for n in names}
        return self.model.encode(pixels, inputs)

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
