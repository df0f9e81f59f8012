"""CLIP's two towers as M2F2-Det uses them: text with learned prompt tokens, vision at its second-last layer.

Radford et al. 2021 (CLIP); forgery prompt learning: Guo et al. 2025 (M2F2-Det), section 3.2.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from llava.core.config import setting
from llava.core.weights import load_strictly, resolve

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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
