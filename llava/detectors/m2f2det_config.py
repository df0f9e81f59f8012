"""Settings of M2F2-Det."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from llava.core.config import setting
from llava.detectors.bridge import BridgeConfig
from llava.detectors.clip_prompt import ClipTextSizes, ClipVisionSizes


@dataclass(frozen=True, kw_only=True)
class M2F2DetConfig:
    """Settings of M2F2-Det; the defaults are the published detector with DenseNet-121 and CLIP ViT-L/14-336."""

    fusion: Literal["similarity", "bridge", "none"] = setting(
        "similarity", "similarity = patch-prompt cosines, bridge = attention between them, none = CLS and CNN only"
    )
    backbone: str = setting(
        "densenet121", "CNN: densenet121/161/169/201, efficientnet_b0..b7, or a small one: densenet_*, conv_tiny"
    )
    backbone_pretrained: bool = setting(False, "start the CNN from torchvision's ImageNet weights when training")
    residual: bool = setting(False, "show the CNN the image's high-pass residual beside the image")
    hidden_size: int = setting(1024, "width of the projected CLIP, prompt and CNN features")
    prompt_tokens: int = setting(7, "learned prompt tokens")
    clip_name: str | None = setting(None, "CLIP checkpoint to start training from (folder or hub id)")
    text: ClipTextSizes = setting(ClipTextSizes())
    vision: ClipVisionSizes = setting(ClipVisionSizes())
    bridge: BridgeConfig = setting(BridgeConfig())
    own_vision: bool = setting(True, "has its own CLIP vision tower; false = features are always passed in")
    freeze_vision: bool = setting(True, "keep the CLIP vision tower as it is")
    freeze_text: bool = setting(True, "keep the CLIP text transformer as it is; prompt tokens are always learned")
    vision_alpha: float = setting(0.5, "initial weight of the CLS features")
    text_alpha: float = setting(4.0, "initial weight of the patch-prompt cosines")
    local_features: bool = setting(False, "add the CNN's inner maps to the patches that meet the prompt")
    region_evidence: bool = setting(
        False, "give as evidence for which face region the map speaks most, and the pooled cosines to the classifier"
    )
    map_weight: float = setting(
        0.0, "weight of the loss between cosines and masks of forged pixels (--data.masks true)"
    )
    region_weight: float = setting(
        0.0, "weight of the loss between that evidence and the region that was forged (--data.masks true)"
    )
    resize_size: int | None = setting(
        None, "shortest edge in pixels before the central vision.image_size is cropped (default: that size, no crop)"
    )
    vision_alpha_lr: float = setting(1e-3, "learning rate of vision_alpha, as published")
    text_alpha_lr: float = setting(3e-3, "learning rate of text_alpha, as published")
    views: tuple[Literal["plain", "flip"], ...] = setting(("plain",), "views averaged at test time")

    def __post_init__(self) -> None:
        if self.fusion == "none" and (self.local_features or self.region_evidence or self.map_weight):
            raise ValueError(
                "fusion: 'none' has no patch-prompt cosines; local_features, region_evidence and map_weight need them: "
                "use 'similarity' or 'bridge'."
            )
        if self.region_weight and not self.region_evidence:
            raise ValueError(
                f"region_weight: {self.region_weight} teaches the evidence of regions; set region_evidence."
            )

    @classmethod
    def tiny(cls) -> Self:
        """Give sizes for tests: 32 px, a few thousand weights."""
        return cls(
            backbone="densenet_micro",
            hidden_size=16,
            prompt_tokens=3,
            text=ClipTextSizes(
                vocab_size=8,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=8,
            ),
            vision=ClipVisionSizes(
                image_size=32,
                patch_size=8,
                hidden_size=24,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=2,
            ),
            bridge=BridgeConfig(width=16, heads=2, mlp_width=16, grid=3, output_size=8),
        )
