"""A second detector, to show that one file and one table line are enough: the average high-pass energy, learned.

And one that is made by hand, whose every score can be foreseen.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava.core.types import InputSpec
from llava.detectors.base import Detector, DetectorOutput


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    size: int = 32
    filters: int = 8

    @classmethod
    def tiny(cls) -> Self:
        return cls(size=16, filters=4)


class ToyDetector(Detector):
    name = "toy"
    Config = ToyConfig
    evidence_names: tuple[str, ...] = ("energy", "p_real", "p_fake")
    own_meanings: ClassVar[Mapping[str, str]] = {"energy": "Energy of fine detail"}

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.filters = nn.Conv2d(3, config.filters, 3, bias=False)
        self.norm = nn.BatchNorm1d(config.filters)
        self.classifier = nn.Linear(config.filters, len(self.classes))

    @property
    def inputs(self) -> dict[str, InputSpec]:
        return {"raw": InputSpec(size=self.config.size, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear")}

    def forward(self, raw: Tensor, labels: Tensor | None = None) -> DetectorOutput:
        high_pass = raw - F.avg_pool2d(raw, 5, stride=1, padding=2, count_include_pad=False)
        energy = self.filters(high_pass).square().mean(dim=(2, 3))
        logits = self.classifier(self.norm((energy + 1e-6).log()))
        loss = None if labels is None else F.cross_entropy(logits, labels, weight=self.class_weights)
        p_fake, scores = self.p_fake(logits), self.class_scores(logits)
        known = {"energy": energy.mean(dim=1).tanh(), "p_real": 1 - p_fake, "p_fake": p_fake}
        known |= (
            {f"p_{name}": scores[:, number] for number, name in enumerate(self.classes)} if scores.shape[1] > 2 else {}
        )
        evidence = torch.stack([known[name] for name in self.evidence_names], dim=1)
        return DetectorOutput(loss=loss, logits=logits, evidence=evidence)


class ThreeClassDetector(ToyDetector):
    """The same with three classes, real in the middle."""

    name = "three_class"
    classes = ("ai_generated", "real", "deepfake")
    evidence_names = ("p_ai_generated", "energy", "p_real", "p_fake", "p_deepfake")


@dataclass(frozen=True, kw_only=True)
class HandMadeConfig:
    measure: Literal["brightness", "detail"] = "brightness"
    turning_point: float = 0.5
    size: int = 32


class HandMadeDetector(Detector):
    """Call fake what is brighter, or has more fine detail, than the turning point; p_fake is 0.5 there."""

    name = "hand_made"
    Config = HandMadeConfig

    def __init__(self, config: HandMadeConfig) -> None:
        super().__init__(config)
        self.steepness = nn.Parameter(torch.tensor(20.0))

    @property
    def inputs(self) -> dict[str, InputSpec]:
        return {"raw": InputSpec(size=self.config.size, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear")}

    def forward(self, raw: Tensor, labels: Tensor | None = None) -> DetectorOutput:
        seen = raw
        if self.config.measure == "detail":
            seen = (raw - F.avg_pool2d(raw, 3, stride=1, padding=1, count_include_pad=False)).abs()
        score = self.steepness * (seen.mean(dim=(1, 2, 3)) - self.config.turning_point)
        logits = torch.stack([torch.zeros_like(score), score], dim=1)
        return DetectorOutput(logits=logits, evidence=logits.softmax(-1))
