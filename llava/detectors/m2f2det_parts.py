"""Parts of M2F2-Det: the bridge between patches, CNN maps and prompt, and what its map says of face regions.

Repairs the bridge adapter of M2F2-Det (Guo et al. 2025), whose published code yields a constant: blocks are registered,
norms run over features, attention runs inside a sample, patches come without CLS, and the prompt features are used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava.core.config import setting
from llava.core.types import REGIONS
from llava.ops.face_regions import face_regions


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


# A cosine times this is the logit of "this patch is forged": 0.3 gives 0.95, and a cosine can say 0.99995.
COSINE_SCALE = 10.0
# Share of forged cells in images of local edits is a few per cent; so much more does each of them weigh.
FORGED_WEIGHT = 4.0


class RegionPool(nn.Module):
    """Pool a map over skin, eyebrows, eyes, nose and mouth, where they usually lie in a face crop.

    The crop's shortest edge has `shortest_edge` pixels; the map's grid covers the central (crop, crop) of it.

    A region's value is a smooth maximum of the cells' logits, log(sum(w * exp(logit))), whose weights w, the parts of
    the region that lie in each cell, sum to 1: one forged cell is enough, and a larger region is not surer for it.
    """

    weights: Tensor

    def __init__(self, shortest_edge: int, crop: int, grid: int) -> None:
        super().__init__()
        masks = face_regions(shortest_edge, shortest_edge)
        start = (shortest_edge - crop) // 2
        seen = slice(start, start + crop)
        stacked = torch.stack([torch.from_numpy(masks[name][seen, seen]) for name in REGIONS])  # (R, S, S)
        cells = F.adaptive_avg_pool2d(stacked, grid).flatten(1)
        self.register_buffer("weights", cells / cells.sum(dim=1, keepdim=True), persistent=False)

    def forward(self, similarity: Tensor) -> Tensor:
        """Give the regions' logits (B, R) from cosines (B, cells)."""
        logits = COSINE_SCALE * similarity[:, None]  # (B, 1, cells)
        return torch.logsumexp(logits + self.weights.clamp(min=math.exp(-30)).log(), dim=-1)

    def loss(self, of_regions: Tensor, masks: Tensor) -> Tensor:
        """Give the cross-entropy between softmax(of_regions), (B, R), and where masks (B, grid, grid) say it is forged.

        The target is proportional to the squared part of each region that is forged: nearly all for the edited region,
        little for its neighbours in the same cell, alike for all when the whole face is forged. Images without a forged
        cell, or with an unknown one, are left out; without any other the loss is 0.
        """
        cells = masks.flatten(1).to(of_regions.dtype)
        covered = (cells.clamp(min=0) @ self.weights.to(of_regions.dtype).T) ** 2  # (B, R)
        total = covered.sum(dim=1)
        is_used = (total > 0) & (cells >= 0).all(dim=1)
        target = covered / total.clamp(min=torch.finfo(total.dtype).tiny)[:, None]
        losses = -(target * of_regions.log_softmax(dim=1)).sum(dim=1)
        return (losses * is_used).sum() / is_used.sum().clamp(min=1)


def map_loss(similarity: Tensor, masks: Tensor) -> Tensor:
    """Give the binary cross-entropy of cosines (B, cells) against the forged part of each cell (B, grid, grid).

    masks: in [0, 1]; below 0 = unknown, left out. Without any known cell the loss is 0.
    """
    target = masks.flatten(1).to(similarity.dtype)
    is_known = target >= 0
    weight = is_known * (1 + (FORGED_WEIGHT - 1) * target.clamp(min=0))
    losses = F.binary_cross_entropy_with_logits(COSINE_SCALE * similarity, target.clamp(min=0), weight, reduction="sum")
    return losses / weight.sum().clamp(min=1)
