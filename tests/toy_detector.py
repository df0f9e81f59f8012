"""A second detector, to show that one file and one table line are enough: the average high-pass energy, learned.

The same with three classes, with a fitted part, and twice in an ensemble. And one that is made by hand, whose every
score can be foreseen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.core.types import NORMALISATIONS, InputSpec
from llava.detectors.base import Detector, DetectorOutput, SharedTower
from llava.detectors.ensemble import Ensemble, EnsembleConfig, fresh
from llava.detectors.fitted import FittedPart


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
        energy = self.energy(raw)
        logits = self.classifier(self.norm((energy + 1e-6).log()))
        loss = None if labels is None else F.cross_entropy(logits, labels, weight=self.class_weights)
        p_fake, scores = self.p_fake(logits), self.class_scores(logits)
        known = {"energy": energy.mean(dim=1).tanh(), "p_real": 1 - p_fake, "p_fake": p_fake}
        known |= (
            {f"p_{name}": scores[:, number] for number, name in enumerate(self.classes)} if scores.shape[1] > 2 else {}
        )
        evidence = torch.stack([known[name] for name in self.evidence_names], dim=1)
        return DetectorOutput(loss=loss, logits=logits, evidence=evidence)

    def energy(self, raw: Tensor) -> Tensor:
        high_pass = raw - F.avg_pool2d(raw, 5, stride=1, padding=2, count_include_pad=False)
        return self.filters(high_pass).square().mean(dim=(2, 3))


class Standardiser(FittedPart):
    """Mean and deviation of each of F features; without them there is nothing to standardise by."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((features,), torch.nan))
        self.register_buffer("deviation", torch.full((features,), torch.nan))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation

    def fit(self, observed: Tensor, targets: Tensor, groups: Sequence[str]) -> None:
        self.mean.copy_(observed.mean(dim=0))
        self.deviation.copy_(observed.std(dim=0))


class FittedToy(ToyDetector):
    """The same with a fitted standardisation instead of batch statistics."""

    name = "fitted_toy"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.norm = Standardiser(config.filters)

    def observe(self, part: str, inputs: Mapping[str, Tensor]) -> Tensor:
        views = inputs["raw"].shape[1]
        return (self.energy(inputs["raw"].flatten(0, 1)) + 1e-6).log().unflatten(0, (-1, views)).mean(dim=1)


@dataclass(frozen=True, kw_only=True)
class TwoToysConfig(EnsembleConfig):
    @classmethod
    def tiny(cls) -> Self:
        toy = fresh("toy", ToyConfig.tiny())
        return cls(members={"first": toy, "second": toy})


class TrainedFusion(nn.Sequential):
    def __init__(self, members: int) -> None:
        super().__init__(nn.Linear(members, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, log_odds: Tensor) -> Tensor:
        return super().forward(log_odds.nan_to_num().to(self[0].weight)).squeeze(1)


class TwoToys(Ensemble):
    """Two frozen members, which agree on their input, under weights that are trained."""

    name = "two_toys"
    Config = TwoToysConfig

    def make_fusion(self) -> nn.Module:
        return TrainedFusion(len(self.members))

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        return super().parameter_groups(3 * lr)  # log odds are more than a sixteenth of a network


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


class LookalikeDetector(ToyDetector):
    """The toy with a layer that is called like M2F2-Det's tower, and is none."""

    name = "lookalike"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.vision_encoder = nn.Conv2d(3, 3, 1)

    def forward(self, raw: Tensor, labels: Tensor | None = None) -> DetectorOutput:
        return super().forward(self.vision_encoder(raw), labels)


@dataclass(frozen=True, kw_only=True)
class EyeConfig:
    has_eye: bool = True
    layer: int = -1

    @classmethod
    def tiny(cls) -> Self:
        return cls()


class EyeDetector(Detector):
    """Read one hidden state of a CLIP tower that is called `eye`, and may be a host's."""

    name = "eye"
    Config = EyeConfig
    config: EyeConfig

    def __init__(self, config: EyeConfig) -> None:
        super().__init__(config)
        self.eye = CLIPVisionModel(self.shared_tower().config) if config.has_eye else None
        if self.eye is not None:
            self.eye.post_layernorm.requires_grad_(False)  # behind every hidden state
        self.vision_encoder = nn.Linear(16, 16)
        self.classifier = nn.Linear(16, 2)

    @property
    def inputs(self) -> dict[str, InputSpec]:
        mean, std = NORMALISATIONS["clip"]
        return {"seen": InputSpec(size=32, mean=mean, std=std)}

    def shared_tower(self) -> SharedTower:
        sizes = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "intermediate_size": 32}
        config = CLIPVisionConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
        return SharedTower(prefix="eye.", config=config, select_layer=self.config.layer, input="seen")

    @property
    def shares_vision(self) -> bool:
        return self.eye is None

    def without_vision(self) -> Detector:
        guest = EyeDetector(EyeConfig(has_eye=False, layer=self.config.layer))
        guest.load_state_dict({k: v for k, v in self.state_dict().items() if not k.startswith("eye.")})
        return guest.train(self.training)

    def forward(
        self, seen: Tensor, clip_features: Tensor | None = None, labels: Tensor | None = None
    ) -> DetectorOutput:
        if clip_features is None:
            clip_features = self.eye(seen, output_hidden_states=True).hidden_states[self.config.layer]
        logits = self.classifier(self.vision_encoder(clip_features[:, 0]))
        loss = None if labels is None else F.cross_entropy(logits, labels, weight=self.class_weights)
        return DetectorOutput(loss=loss, logits=logits, evidence=logits.float().softmax(-1))
