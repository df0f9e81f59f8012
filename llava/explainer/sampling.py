"""How the next token of an answer is chosen: greedily, or by a sample that depends on a seed alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from llava.core.config import setting


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

    def processors(self) -> LogitsProcessorList:
        """Give what changes the scores of one answer, none when greedy. Raises ValueError for a temperature below 0."""
        if self.temperature < 0:
            raise ValueError(f"temperature: {self.temperature} is not usable; allowed: 0 (greedy) or more.")
        if self.temperature == 0:
            return LogitsProcessorList()
        warpers = [TemperatureLogitsWarper(float(self.temperature)), TopPLogitsWarper(self.top_p)]
        return LogitsProcessorList([*warpers, GumbelNoise(self.seed)])


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
