"""Four plain networks with one logit, to measure other detectors against: ViT-S, ResNet-50, EfficientNet-B0, Xception.

The first three as RADAR's repository builds them (there with ImageNet's mean and deviation for all), and Xception as
Rossler et al., ICCV 2019, use it on FaceForensics++.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import ResNet50_Weights
from torchvision.models.resnet import Bottleneck, ResNet

from llava.core.config import setting
from llava.core.types import NORMALISATIONS, InputSpec, View
from llava.detectors.backbones import timm_vit, timm_weights, torchvision_weights
from llava.detectors.base import Detector, DetectorOutput

# network -> timm's name of it (none: torchvision's), and the normalisation that its ImageNet weights want
PUBLISHED: dict[str, tuple[str | None, str]] = {
    "vit_small": ("vit_small_patch16_224", "half"),
    "resnet50": (None, "imagenet"),
    "efficientnet_b0": ("tf_efficientnet_b0", "imagenet"),
    "xception": ("legacy_xception", "half"),
}


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Settings of a plain network."""

    network: Literal["vit_small", "resnet50", "efficientnet_b0", "xception"] = setting("vit_small", "which network")
    small: bool = setting(False, "the same kind of network, narrow and short, for two CPU cores; never pretrained")
    image_size: int = setting(224, "side of the image in pixels; its shape is squashed to a square")
    pretrained: bool = setting(False, "start from ImageNet weights when training, but for the head")
    normalisation: Literal["own", "half", "imagenet", "none"] = setting(
        "own", "mean and deviation of pixels; own = those of the network's ImageNet weights"
    )
    label_smoothing: float = setting(0.0, "how much of the label is spread over both classes")
    views: tuple[View, ...] = setting(("plain",), "views averaged at test time")

    def __post_init__(self) -> None:
        if self.image_size < 32 or (self.network == "vit_small" and self.image_size % 16):
            raise ValueError(
                f"image_size: {self.image_size} is not usable; give 32 or more, for a ViT a multiple of 16."
            )
        if self.pretrained and (self.small or (self.network == "vit_small" and self.image_size != 224)):
            raise ValueError("pretrained: ImageNet weights are those of the whole network, a ViT's those at 224 px.")

    @classmethod
    def tiny(cls) -> Self:
        """Give sizes for tests: the small ViT at 32 px."""
        return cls(small=True, image_size=32)


class Baseline(Detector):
    """Say whether a face is real or fake, by a plain network. evidence = (p_real, p_fake), and no map."""

    name = "baseline"
    Config = BaselineConfig
    config: BaselineConfig

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        build = SMALL if config.small else WHOLE
        self.backbone = build[config.network](config.image_size)

    @property
    def inputs(self) -> dict[str, InputSpec]:
        """Give the one input: the whole image, squashed to a square."""
        own = self.config.normalisation == "own"
        mean, std = NORMALISATIONS[PUBLISHED[self.config.network][1] if own else self.config.normalisation]
        size, views = self.config.image_size, self.config.views
        return {
            "pixel_values": InputSpec(
                size=size, mean=mean, std=std, interpolation="bilinear", fit="squash", views=views
            )
        }

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> DetectorOutput:
        """Judge pixel_values (B, 3, S, S); labels (B,) with 0 = real, 1 = fake."""
        logit = self.backbone(pixel_values.to(next(self.backbone.parameters()).dtype))  # (B, 1)
        logits = F.pad(logit, (1, 0))  # of real: 0, so that the softmax is the logit's sigmoid
        loss = None
        if labels is not None:
            exact = logits if logits.dtype == torch.float64 else logits.float()
            smoothing, weight = self.config.label_smoothing, self.class_weights.to(exact)
            loss = F.cross_entropy(exact, labels, weight=weight, label_smoothing=smoothing)
        return DetectorOutput(loss=loss, logits=logits, evidence=logits.float().softmax(dim=1))

    def load_pretrained(self) -> None:
        """Load ImageNet weights, but for the head, if the config says so. Raises FileNotFoundError."""
        if not self.config.pretrained:
            return
        name = PUBLISHED[self.config.network][0]
        state = torchvision_weights(ResNet50_Weights.IMAGENET1K_V1) if name is None else timm_weights(name)
        own = self.backbone.state_dict()
        self.backbone.load_state_dict({key: own[key] if key.startswith(HEADS) else state[key] for key in own})


HEADS = ("head.", "fc.", "classifier.")


def _timm(name: str) -> Callable[[int], nn.Module]:
    def build(_: int) -> nn.Module:
        import timm

        network: nn.Module = timm.create_model(name, num_classes=1)
        return network

    return build


def _small_xception(_: int) -> nn.Module:
    """Build Xception with fewer, narrower blocks; timm's other Xceptions, which are built of blocks, are `aligned`."""
    from timm.models.xception_aligned import XceptionAligned

    wide: dict[str, Any] = {"in_chs": 256, "out_chs": (256, 384, 512), "stride": 1}
    ways = ((64, 64, 2), (64, 128, 2), (128, 128, 2), (128, 128, 1), (128, (128, 256, 256), 2))
    blocks = [{"in_chs": before, "out_chs": after, "stride": stride} for before, after, stride in ways]
    return XceptionAligned([*blocks, wide | {"no_skip": True, "start_with_relu": False}], num_classes=1)


WHOLE: dict[str, Callable[[int], nn.Module]] = {
    "vit_small": lambda size: timm_vit(size, 16, 384, 12, 6, classes=1),
    "resnet50": lambda _: ResNet(Bottleneck, [3, 4, 6, 3], num_classes=1),
    "efficientnet_b0": _timm("tf_efficientnet_b0"),
    "xception": _timm("legacy_xception"),
}
# ResNet-14 with a quarter of the inner channels; TinyNet-E, an EfficientNet scaled down (Han et al., NeurIPS 2020)
SMALL: dict[str, Callable[[int], nn.Module]] = {
    "vit_small": lambda size: timm_vit(size, 16, 64, 2, 2, classes=1),
    "resnet50": lambda _: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=1, width_per_group=16),
    "efficientnet_b0": _timm("tinynet_e"),
    "xception": _small_xception,
}
