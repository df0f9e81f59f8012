"""Parts of M2F2-Det: CLIP's towers with a learned prompt, and the bridge between patches, CNN maps and prompt.

Radford et al. 2021 (CLIP); forgery prompt learning: Guo et al. 2025 (M2F2-Det), section 3.2.

Repairs the bridge adapter of M2F2-Det (Guo et al. 2025), whose published code yields a constant: blocks are registered,
norms run over features, attention runs inside a sample, patches come without CLS, and the prompt features are used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from llava.core.config import setting
from llava.core.types import NORMALISATIONS, REGIONS
from llava.core.weights import load_strictly, resolve
from llava.ops.face_regions import face_regions

CLIP_MEAN, CLIP_STD = NORMALISATIONS["clip"]
# A cosine times this is the logit of "this patch is forged": 0.3 gives 0.95, and a cosine can say 0.99995.
COSINE_SCALE = 10.0


@dataclass(frozen=True, kw_only=True)
class ClipTextSizes:
    """Sizes of the CLIP text transformer; the defaults are those of ViT-L/14."""

    vocab_size: int = setting(49408, "rows of the token table, which is stored but not used by learned prompts")
    hidden_size: int = setting(768, "width")
    intermediate_size: int = setting(3072, "width inside the MLP")
    num_hidden_layers: int = setting(12, "layers")
    num_attention_heads: int = setting(12, "attention heads")
    max_position_embeddings: int = setting(77, "positions; at least the number of prompt tokens")


@dataclass(frozen=True, kw_only=True)
class ClipVisionSizes:
    """Sizes of the CLIP vision transformer; the defaults are those of ViT-L/14-336."""

    image_size: int = setting(336, "side of the square input in pixels")
    patch_size: int = setting(14, "side of a patch in pixels")
    hidden_size: int = setting(1024, "width")
    intermediate_size: int = setting(4096, "width inside the MLP")
    num_hidden_layers: int = setting(24, "layers")
    num_attention_heads: int = setting(16, "attention heads")
    select_layer: int = setting(-2, "which hidden state is read; -2 = before the last layer, as LLaVA")

    @property
    def grid(self) -> int:
        """Give the number of patches along one side."""
        return self.image_size // self.patch_size


class PromptEncoder(nn.Module):
    """CLIP text transformer over learned prompt tokens; gives one vector that does not depend on the image.

    In eval mode the vector is computed once; `train()`, loading weights and device or dtype moves drop it.
    """

    def __init__(self, sizes: ClipTextSizes, tokens: int, frozen: bool) -> None:
        super().__init__()
        if not 1 <= tokens <= sizes.max_position_embeddings:
            raise ValueError(f"prompt_tokens: {tokens}; allowed: 1 to {sizes.max_position_embeddings} positions.")
        self.model = CLIPTextModel(CLIPTextConfig(**asdict(sizes), bos_token_id=None, eos_token_id=None))
        self.model.requires_grad_(not frozen)
        self.model.embeddings.token_embedding.requires_grad_(False)  # prompts are learned directly: never looked up
        self.prompt_tokens = nn.Parameter(torch.randn(1, tokens, sizes.hidden_size))
        self._cached: Tensor | None = None

    def forward(self) -> Tensor:
        """Give the hidden state of the last prompt token after the final norm, (1, D)."""
        needs_graph = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if self.training or needs_graph:
            return self._encode()
        if self._cached is None:
            with torch.inference_mode(False), torch.no_grad():  # a plain tensor, usable in any later mode
                self._cached = self._encode()
        return self._cached

    def _encode(self) -> Tensor:
        tokens = self.prompt_tokens
        n = tokens.shape[1]
        lowest = torch.finfo(tokens.dtype).min
        causal = torch.full((1, 1, n, n), lowest, dtype=tokens.dtype, device=tokens.device).triu(1)
        with torch.autocast(tokens.device.type, enabled=False):  # so that the kept vector is the same in any precision
            hidden = self.model.embeddings(inputs_embeds=tokens)
            hidden = self.model.encoder(inputs_embeds=hidden, attention_mask=causal).last_hidden_state
            return self.model.final_layer_norm(hidden)[:, -1]

    def train(self, mode: bool = True) -> Self:
        """Switch mode and drop the kept vector."""
        self._cached = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._cached = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cached = None
        super()._load_from_state_dict(*args, **kwargs)


class VisionEncoder(nn.Module):
    """CLIP vision transformer up to the selected hidden state; layers behind it are kept but not run."""

    def __init__(self, sizes: ClipVisionSizes, frozen: bool) -> None:
        super().__init__()
        layers = sizes.num_hidden_layers
        if not -layers - 1 <= sizes.select_layer <= layers:
            raise ValueError(f"vision.select_layer: {sizes.select_layer}; allowed: {-layers - 1} to {layers}.")
        values = asdict(sizes)
        select = values.pop("select_layer")
        self.depth = select if select >= 0 else layers + 1 + select
        self.frozen = frozen
        self.model = CLIPVisionModel(CLIPVisionConfig(**values))
        self.model.requires_grad_(not frozen)
        for unused in [*self.model.encoder.layers[self.depth :], self.model.post_layernorm]:
            unused.requires_grad_(False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Give the selected hidden state of pixel_values (B, 3, S, S): (B, 1 + patches, D), CLS first."""
        with torch.no_grad() if self.frozen else nullcontext():
            hidden = self.model.pre_layrnorm(self.model.embeddings(pixel_values))
            for layer in self.model.encoder.layers[: self.depth]:
                hidden = layer(hidden, attention_mask=None)
        return hidden


def load_clip(name: str, text: PromptEncoder | None, vision: VisionEncoder | None) -> None:
    """Copy a CLIP checkpoint (folder, name in checkpoints/ or hub id) into the towers, strictly.

    Raises FileNotFoundError when there is none and ValueError when sizes differ.
    """
    folder = resolve(name)
    for encoder, kind in ((text, CLIPTextModel), (vision, CLIPVisionModel)):
        if encoder is None:
            continue
        loaded: Any = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
        source, info = loaded
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(f"{name!r} lacks {len(missing)} {kind.__name__} tensors (first: {missing[0]}).")
        load_strictly(encoder.model, source.state_dict(), f"CLIP {name!r}")
        if isinstance(encoder, PromptEncoder):
            encoder.train(encoder.training)  # drops the kept vector


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
