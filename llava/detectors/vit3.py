"""The three-class ViT: torchvision's ViT-B/16 tells faces made by AI, deepfakes and real ones apart.

github.com/nithins7676/AI_Deepfake_v2, which cites no paper. The network is the published one, tensor by tensor. What
differs: one normalisation in training and use (the repository has three), imbalance is corrected once, and there is no
heat map, as the published one is a gradient stretched to full scale whatever its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer, ViT_B_16_Weights

from llava.core.config import setting
from llava.core.tensor_files import Rules, Shape
from llava.core.types import NORMALISATIONS, InputSpec
from llava.detectors.backbones import torchvision_weights
from llava.detectors.base import Detector, DetectorOutput
from llava.detectors.published import PublishedFile, Unseen, detector_tensors, plan_for

WIDTH_OF_HEAD = 64  # of every ViT that torchvision publishes
_SIZES = ("image_size", "patch_size", "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")


@dataclass(frozen=True, kw_only=True)
class ViT3Config:
    """Settings of the three-class ViT; the defaults are the published sizes, ViT-B/16 at 224 pixels."""

    image_size: int = setting(224, "side of the image in pixels; its shape is squashed to a square")
    patch_size: int = setting(16, "side of a patch in pixels")
    num_hidden_layers: int = setting(12, "layers")
    num_attention_heads: int = setting(12, "attention heads")
    hidden_size: int = setting(768, "width")
    intermediate_size: int = setting(3072, "width inside the MLPs")
    dropout: float = setting(0.0, "chance of dropping a value, in training")
    normalisation: Literal["half", "imagenet", "none"] = setting(
        "half", "half = mean and deviation 0.5, as the published weights need it; imagenet; none = pixels in [0, 1]"
    )
    pretrained: bool = setting(False, "start from torchvision's ImageNet weights when training, but for the head")
    views: tuple[Literal["plain", "flip"], ...] = setting(("plain",), "views averaged at test time")

    def __post_init__(self) -> None:
        for name, part in (("image_size", "patch_size"), ("hidden_size", "num_attention_heads")):
            if getattr(self, name) % getattr(self, part):
                raise ValueError(f"{name}: {getattr(self, name)} is no multiple of {part} ({getattr(self, part)}).")
        if self.pretrained and any(getattr(self, name) != getattr(ViT3Config, name) for name in _SIZES):
            raise ValueError(
                "pretrained: ImageNet weights are those of ViT-B/16 at 224 px; leave the sizes as they are."
            )

    @classmethod
    def tiny(cls) -> Self:
        """Give sizes for tests: 32 px, some forty thousand weights."""
        return cls(
            image_size=32,
            patch_size=8,
            num_hidden_layers=2,
            num_attention_heads=3,
            hidden_size=48,
            intermediate_size=96,
        )


class ViT3(Detector):
    """Classify a face as made by AI, deepfake or real.

    evidence = (p_real, p_fake, p_ai_generated, p_deepfake): the softmax of the logits, p_fake = 1 - p_real.
    """

    name = "vit3"
    Config = ViT3Config
    config: ViT3Config
    classes = ("ai_generated", "deepfake", "real")  # the order of the published head
    evidence_names = ("p_real", "p_fake", "p_ai_generated", "p_deepfake")

    def __init__(self, config: ViT3Config) -> None:
        super().__init__(config)
        self.vit = VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            hidden_dim=config.hidden_size,
            mlp_dim=config.intermediate_size,
            dropout=config.dropout,
            num_classes=len(self.classes),
        )
        # As published: PyTorch's own initial weights. torchvision's head starts at zero.
        self.vit.heads.head = nn.Linear(config.hidden_size, len(self.classes))

    @property
    def inputs(self) -> dict[str, InputSpec]:
        """Give the one input: the whole image, squashed to a square."""
        mean, std = NORMALISATIONS[self.config.normalisation]
        spec = InputSpec(
            size=self.config.image_size,
            mean=mean,
            std=std,
            interpolation="bilinear",
            fit="squash",
            views=self.config.views,
        )
        return {"pixel_values": spec}

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> DetectorOutput:
        """Classify pixel_values (B, 3, S, S); labels (B,) are places in `classes`."""
        logits = self.vit(pixel_values.to(self.vit.class_token.dtype))
        loss = None
        if labels is not None:
            exact = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
            loss = F.cross_entropy(exact, labels, weight=self.class_weights.to(exact.dtype))
        probabilities = dict(zip(self.classes, logits.float().softmax(dim=-1).unbind(dim=1), strict=True))
        p_real = probabilities["real"]
        evidence = [p_real, 1 - p_real, probabilities["ai_generated"], probabilities["deepfake"]]
        return DetectorOutput(loss=loss, logits=logits, evidence=torch.stack(evidence, dim=1))

    def load_pretrained(self) -> None:
        """Load torchvision's ImageNet weights, but for the head, if the config says so.

        Raises FileNotFoundError when they are out of reach.
        """
        if not self.config.pretrained:
            return
        state = torchvision_weights(ViT_B_16_Weights.IMAGENET1K_V1)
        own = {f"heads.{name}": tensor for name, tensor in self.vit.heads.state_dict().items()}
        self.vit.load_state_dict({**state, **own})  # torchvision renames what it wrote before version 0.13


class PublishedViT3(PublishedFile):
    """A published file of the three-class ViT, such as vit3class.pth.

    heads: attention heads, which shapes do not show; None = width / 64, as in every ViT of torchvision. Raises
    ValueError when there are none of that width.
    """

    detector = ViT3
    marks = ("conv_proj.weight", "heads.head.weight")
    config: ViT3Config

    def __init__(self, file: Path, heads: int | None = None) -> None:
        tensors = detector_tensors(file)
        config = config_of(tensors.shapes, heads)
        super().__init__(file, tensors, config, plan_for(ViT3, config, tensors.shapes, rules_of(tensors.shapes)))

    @classmethod
    def open(cls, file: Path, unseen: Unseen) -> Self:
        """Open a file with the attention heads that are said by hand."""
        return cls(file, unseen.heads)


def config_of(shapes: Mapping[str, Shape], heads: int | None = None) -> ViT3Config:
    """Read the settings off the tensors' shapes. Raises ValueError as `PublishedViT3` does."""
    try:
        width, _, patch, _ = shapes["conv_proj.weight"]
        tokens, mlp = shapes["encoder.pos_embedding"][1], _mlp_bias(shapes)[0]
    except KeyError as error:
        raise ValueError(f"These are not the tensors of a three-class ViT: {error} is not among them.") from None
    if heads is None and width % WIDTH_OF_HEAD:
        raise ValueError(
            f"The attention heads can not be seen in the weights, and {width} channels are no multiple of "
            f"{WIDTH_OF_HEAD}; say how many there are (scripts/convert_m2f2.py --heads NUMBER)."
        )
    return ViT3Config(
        image_size=round((tokens - 1) ** 0.5) * patch,
        patch_size=patch,
        num_hidden_layers=len(_layers(shapes)),
        num_attention_heads=width // WIDTH_OF_HEAD if heads is None else heads,
        hidden_size=width,
        intermediate_size=mlp,
    )


def rules_of(shapes: Mapping[str, Shape]) -> Rules:
    """Give the rules: all goes below `vit.`; torchvision before 0.13 called the MLP's layers linear_1 and linear_2."""
    old = {
        f"{layer}.mlp.{before}.": f"vit.{layer}.mlp.{after}."
        for layer in _layers(shapes)
        for before, after in (("linear_1", "0"), ("linear_2", "3"))
        if f"{layer}.mlp.{before}.weight" in shapes
    }
    return Rules(prefixes=old | {"": "vit."})


def _layers(shapes: Mapping[str, Shape]) -> list[str]:
    """List the dotted names of the encoder's layers."""
    return sorted({".".join(name.split(".")[:3]) for name in shapes if name.startswith("encoder.layers.")})


def _mlp_bias(shapes: Mapping[str, Shape]) -> Shape:
    first = "encoder.layers.encoder_layer_0.mlp."
    return shapes.get(f"{first}linear_1.bias") or shapes[f"{first}0.bias"]
