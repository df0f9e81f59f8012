"""Toys that read more than an image crop: two frames and their times, sound, native pixels; each learns an energy."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava.core.input_specs import FramesSpec, Input, NativeSpec, SoundSpec, TimesSpec
from llava.core.types import InputSpec
from llava.detectors import DETECTORS
from llava.detectors.base import Detector, DetectorOutput

BLACK_AND_WHITE = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
NAMES = ("two_frame", "sound", "native")


def add_to_table() -> None:
    """Give the toys their lines in the table of detectors."""
    for name, class_name in zip(NAMES, ("TwoFrameDetector", "SoundDetector", "NativeDetector"), strict=True):
        DETECTORS.add(name, f"clip_detectors:{class_name}")


@dataclass(frozen=True, kw_only=True)
class EnergyConfig:
    size: int = 16
    filters: int = 4
    flip: bool = False

    @classmethod
    def tiny(cls) -> Self:
        return cls(size=8)


class EnergyDetector(Detector):
    """The energy behind learned filters, by class; a subclass says of what."""

    Config = EnergyConfig
    dims = 2

    def __init__(self, config: EnergyConfig) -> None:
        super().__init__(config)
        kind = nn.Conv1d if self.dims == 1 else nn.Conv2d
        self.filters = kind(1 if self.dims == 1 else 3, config.filters, 3, bias=False)
        self.norm = nn.BatchNorm1d(config.filters)
        self.head = nn.Linear(config.filters, 2)

    def answer(self, seen: Tensor, labels: Tensor | None) -> DetectorOutput:
        energy = self.filters(seen).square().flatten(2).mean(dim=2)
        logits = self.head(self.norm((energy + 1e-6).log()))
        loss = None if labels is None else F.cross_entropy(logits, labels, weight=self.class_weights)
        return DetectorOutput(loss=loss, logits=logits, evidence=logits.softmax(-1))


class TwoFrameDetector(EnergyDetector):
    """What changes from one frame to the next, per second."""

    name = "two_frame"

    @property
    def inputs(self) -> dict[str, Input]:
        views = ("plain", "flip") if self.config.flip else ("plain",)
        image = InputSpec(size=self.config.size, views=views, **BLACK_AND_WHITE)
        return {"frames": FramesSpec(count=2, rate_hz=5, image=image), "times": TimesSpec(count=2, rate_hz=5)}

    def forward(self, frames: Tensor, times: Tensor, labels: Tensor | None = None) -> DetectorOutput:
        seconds = (times[:, 1] - times[:, 0]).abs() + 0.01
        return self.answer((frames[:, 1] - frames[:, 0]) / seconds[:, None, None, None], labels)


class SoundDetector(EnergyDetector):
    """The fine detail of what is heard."""

    name = "sound"
    dims = 1

    @property
    def inputs(self) -> dict[str, Input]:
        return {"sound": SoundSpec(seconds=0.25)}

    def forward(self, sound: Tensor, labels: Tensor | None = None) -> DetectorOutput:
        return self.answer(sound[:, None], labels)


class NativeDetector(EnergyDetector):
    """The pixels of the face as they are."""

    name = "native"

    @property
    def inputs(self) -> dict[str, Input]:
        return {"pixels": NativeSpec(size=self.config.size, ring=0.1, **BLACK_AND_WHITE)}

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> DetectorOutput:
        return self.answer(pixels, labels)


class EitherDetector(EnergyDetector):
    """Two frames, or sound where it is there: the mean of the answers that can be given."""

    name = "either"

    def __init__(self, config: EnergyConfig) -> None:
        super().__init__(config)
        self.of_frames, self.of_sound = TwoFrameDetector(config), SoundDetector(config)

    @property
    def inputs(self) -> dict[str, Input]:
        return {**self.of_frames.inputs, **self.of_sound.inputs}

    def lacking(self, reasons: dict[str, str]) -> str:
        return super().lacking(reasons) if {"frames", "sound"} <= reasons.keys() else ""

    def forward(self, frames: Tensor, times: Tensor, sound: Tensor, labels: Tensor | None = None) -> DetectorOutput:
        answers = torch.stack([self.of_frames(frames, times).logits, self.of_sound(sound).logits])
        logits = answers.nanmean(dim=0)
        return DetectorOutput(logits=logits, evidence=logits.softmax(-1))
