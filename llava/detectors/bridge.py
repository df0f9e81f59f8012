"""The bridge: CLIP patches and CNN maps of several stages, read by the prompt through attention.

Repairs the bridge adapter of M2F2-Det (Guo et al. 2025), whose published code yields a constant: blocks are registered,
norms run over features, attention runs inside a sample, patches come without CLS, and the prompt features are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava.core.config import setting


class Projection(nn.Sequential):
    """Linear and LayerNorm, the projection that M2F2-Det uses everywhere."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__(nn.Linear(size_in, size_out), nn.LayerNorm(size_out))

    @property
    def linear(self) -> nn.Linear:
        """Give the linear layer."""
        layer = self[0]
        assert isinstance(layer, nn.Linear)
        return layer


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """Sizes of the bridge."""

    width: int = setting(64, "width of its tokens")
    heads: int = setting(4, "attention heads; must divide the width")
    mlp_width: int = setting(128, "width inside the MLP")
    grid: int = setting(12, "maps larger than this (tokens per side) are averaged down to it")
    output_size: int = setting(128, "features given to the classifier")
    dropout: float = setting(0.1, "dropout inside the blocks")


class Bridge(nn.Module):
    """One attention block per CNN stage; a token that starts as the prompt collects what it finds."""

    def __init__(self, config: BridgeConfig, channels: Sequence[int], clip_width: int, prompt_width: int) -> None:
        super().__init__()
        width = config.width
        self.grid = config.grid
        self.from_prompt = Projection(prompt_width, width)
        self.from_clip = Projection(clip_width, width)
        self.from_stages = nn.ModuleList(Projection(c, width) for c in channels)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, config.heads, config.mlp_width, config.dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in channels
        )
        self.to_output = Projection(width, config.output_size)

    def forward(self, stage_maps: Sequence[Tensor], patches: Tensor, prompt: Tensor) -> Tensor:
        """Fuse stage maps [(B, C_i, h_i, w_i)], CLIP patches (B, P, D) and prompt (1, H) into (B, output_size)."""
        clip = self.from_clip(_shrink_patches(patches, self.grid))  # (B, g * g, width)
        query = self.from_prompt(prompt).expand(patches.shape[0], -1)[:, None]  # (B, 1, width)
        for block, project, stage in zip(self.blocks, self.from_stages, stage_maps, strict=True):
            cnn = project(_shrink(stage, self.grid).flatten(2).transpose(1, 2))  # (B, h * w, width)
            query = block(torch.cat([query, cnn, clip], dim=1))[:, :1]
        return self.to_output(query[:, 0])


def _shrink(maps: Tensor, grid: int) -> Tensor:
    """Average maps (B, C, h, w) down to at most (grid, grid)."""
    height, width = maps.shape[-2:]
    return F.adaptive_avg_pool2d(maps, (min(height, grid), min(width, grid)))


def _shrink_patches(patches: Tensor, grid: int) -> Tensor:
    side = round(patches.shape[1] ** 0.5)
    if side <= grid:
        return patches
    square = patches.transpose(1, 2).unflatten(2, (side, side))
    return _shrink(square, grid).flatten(2).transpose(1, 2)
