"""M2F2-Det: CLIP features, a learned forgery prompt and a CNN decide together whether a face is forged.

Guo et al., "Rethinking Vision-Language Model in Face Forensics: Multi-Modal Interpretable Forged Face Detector",
CVPR 2025. `fusion="similarity"` is the head inside the published explainer. What differs: the text transformer and the
vision tower are really frozen, the prompt vector is kept in eval mode only, `fusion="bridge"` is a bridge that works.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig

from llava.core.config import setting
from llava.core.types import REGIONS, InputSpec
from llava.core.weights import load_strictly
from llava.detectors.backbones import let_see_residual, make_backbone, stage_channels
from llava.detectors.base import Detector, DetectorOutput, SharedTower
from llava.detectors.cnn import cell_loss
from llava.detectors.m2f2det_parts import (
    CLIP_MEAN,
    CLIP_STD,
    COSINE_SCALE,
    Bridge,
    BridgeConfig,
    ClipTextSizes,
    ClipVisionSizes,
    Projection,
    PromptEncoder,
    RegionPool,
    VisionEncoder,
    load_clip,
)


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


class M2F2Det(Detector):
    """Classify a face from CLIP features, patch-prompt similarities and CNN features.

    evidence = (p_real, p_fake), the softmax of the logits, and with `region_evidence` for which face region the map
    speaks most: shares of sum 1, the softmax of its pooled cosines, alike where the whole face does. evidence_map =
    patch-prompt similarity (B, h, w), cosine moved from [-1, 1] to [0, 1], None for `fusion="none"`.
    """

    name = "m2f2det"
    Config = M2F2DetConfig
    config: M2F2DetConfig
    own_meanings: ClassVar[Mapping[str, str]] = {name: f"Map: {name}" for name in REGIONS}

    def __init__(self, config: M2F2DetConfig) -> None:
        super().__init__(config)
        hidden, patches, spec = config.hidden_size, config.vision.grid**2, self.inputs["pixel_values"]
        self.vision_encoder = VisionEncoder(config.vision, config.freeze_vision) if config.own_vision else None
        self.backbone, channels = make_backbone(config.backbone)
        if config.residual:
            let_see_residual(self.backbone)
        self.vision_proj = Projection(config.vision.hidden_size, hidden)
        self.backbone_proj = Projection(channels, hidden)
        self.vision_alpha = nn.Parameter(torch.tensor(config.vision_alpha))
        fused = 0
        if config.fusion != "none":
            self.text_encoder = PromptEncoder(config.text, config.prompt_tokens, config.freeze_text)
            self.text_proj = Projection(config.text.hidden_size, hidden)
            self.text_alpha = nn.Parameter(torch.tensor(config.text_alpha))
            fused = patches
        if config.fusion == "bridge":
            self.bridge = Bridge(config.bridge, stage_channels(self.backbone), config.vision.hidden_size, hidden)
            fused = config.bridge.output_size
        if config.local_features:
            self.local_projs = nn.ModuleList(nn.Linear(size, hidden) for size in stage_channels(self.backbone))
        if config.region_evidence:
            self.region_pool = RegionPool(spec.shortest_edge, spec.size, config.vision.grid)
            self.evidence_names = (*self.evidence_names, *REGIONS)
            fused += len(REGIONS)
        self.classifier = nn.Linear(fused + 2 * hidden, len(self.classes))
        self._init_weights()

    def _init_weights(self) -> None:
        """Draw the published initial weights: N(0, 0.01) for the CLIP projections and the classifier."""
        projections = [self.vision_proj] if self.config.fusion == "none" else [self.vision_proj, self.text_proj]
        for linear in (self.classifier, *(p.linear for p in projections)):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)

    @property
    def inputs(self) -> dict[str, InputSpec]:
        """Give the one input: the CLIP-normalised image, which tower and CNN share."""
        config = self.config
        spec = InputSpec(
            size=config.vision.image_size,
            mean=CLIP_MEAN,
            std=CLIP_STD,
            views=config.views,
            resize_size=config.resize_size,
        )
        return {"pixel_values": spec}

    @property
    def mask_grid(self) -> int | None:
        """Ask for masks on the grid of the patches when map or regions are trained."""
        return self.config.vision.grid if self.config.map_weight or self.config.region_weight else None

    def forward(
        self,
        pixel_values: Tensor,
        clip_features: Tensor | None = None,
        labels: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> DetectorOutput:
        """Classify pixel_values (B, 3, S, S); labels (B,) with 0 = real, 1 = fake.

        clip_features: (B, 1 + patches, D) selected hidden state of a CLIP tower, CLS first; the own tower is then not
        run. masks: (B, grid, grid) forged part of each patch, -1 = unknown. Raises ValueError when clip_features are
        missing without an own tower, or have another shape.
        """
        clip = self._clip_features(pixel_values, clip_features)
        cls, patches = clip[:, 0], clip[:, 1:]
        features, stages = self.backbone.forward_stages(pixel_values.to(self.classifier.weight.dtype))
        parts = [
            self.vision_alpha * self.vision_proj(cls),
            self.backbone_proj(features.mean(dim=(2, 3))),
        ]
        evidence_map, similarity, of_regions = None, None, None
        if self.config.fusion != "none":
            prompt = self.text_proj(self.text_encoder())  # (1, hidden)
            similarity = F.cosine_similarity(self._local(patches, stages), prompt[:, None], dim=-1)  # (B, patches)
            evidence_map = (similarity + 1).div(2).unflatten(1, (self.config.vision.grid, -1))
            fused = similarity if self.config.fusion == "similarity" else self.bridge(stages, patches, prompt)
            parts.insert(0, self.text_alpha * fused)
            if self.config.region_evidence:
                of_regions = self.region_pool(similarity)  # (B, regions)
                parts.append(of_regions)
        logits = self.classifier(torch.cat(parts, dim=-1))
        evidence = [part.float().softmax(dim=-1) for part in (logits, of_regions) if part is not None]
        losses = self._losses(logits, labels, similarity, of_regions, masks)
        return DetectorOutput(
            loss=torch.stack(list(losses.values())).sum() if losses else None,
            logits=logits,
            evidence=torch.cat(evidence, dim=1),
            evidence_map=evidence_map,
            losses=losses or None,
        )

    def _local(self, patches: Tensor, stages: list[Tensor]) -> Tensor:
        """Give what meets the prompt (B, patches, hidden): projected patches, with the CNN's maps there if asked."""
        projected = self.vision_proj(patches)
        if self.config.local_features:
            grid = self.config.vision.grid
            for proj, stage in zip(self.local_projs, stages, strict=True):
                projected = projected + proj(F.adaptive_avg_pool2d(stage, grid).flatten(2).transpose(1, 2))
        return projected

    def _clip_features(self, pixel_values: Tensor, clip_features: Tensor | None) -> Tensor:
        if clip_features is None:
            if self.vision_encoder is None:
                raise ValueError("This detector has no CLIP tower of its own (own_vision=false): pass clip_features.")
            clip_features = self.vision_encoder(pixel_values)
        vision = self.config.vision
        expected = (len(pixel_values), 1 + vision.grid**2, vision.hidden_size)
        if clip_features.shape != expected:
            raise ValueError(f"clip_features: expected {expected}, got {tuple(clip_features.shape)}.")
        return clip_features.to(self.classifier.weight.dtype)

    def _losses(
        self,
        logits: Tensor,
        labels: Tensor | None,
        similarity: Tensor | None,
        of_regions: Tensor | None,
        masks: Tensor | None,
    ) -> dict[str, Tensor]:
        """Give the losses by name, weighted as they are added up; none without labels."""
        if labels is None:
            return {}
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        losses = {"class": F.cross_entropy(logits, labels, weight=self.class_weights.to(logits.dtype))}
        if masks is not None and similarity is not None and self.config.map_weight:
            losses["map"] = self.config.map_weight * cell_loss(COSINE_SCALE * similarity.to(logits.dtype), masks)
        if masks is not None and of_regions is not None and self.config.region_weight:
            losses["region"] = self.config.region_weight * self.region_pool.loss(of_regions.to(logits.dtype), masks)
        return losses

    def soften(self, evidence: Tensor, exponent: Tensor) -> Tensor:
        """Take the shares of the regions to the power of `exponent` (B,), and their sum to 1 again."""
        if not self.config.region_evidence:
            return evidence
        whole, regions = evidence.split([len(self.classes), len(REGIONS)], dim=1)
        softer = regions ** exponent.to(regions)[:, None]
        return torch.cat([whole, softer / softer.sum(dim=1, keepdim=True)], dim=1)

    def shared_tower(self) -> SharedTower:
        """Declare the CLIP vision tower."""
        sizes = asdict(self.config.vision)
        layer = sizes.pop("select_layer")
        return SharedTower(prefix="vision_encoder.model.", config=CLIPVisionConfig(**sizes), select_layer=layer)

    @property
    def shares_vision(self) -> bool:
        """Say whether the CLIP features come from outside."""
        return self.vision_encoder is None

    def without_vision(self) -> Detector:
        """Give the same detector without its own CLIP tower."""
        guest = M2F2Det(replace(self.config, own_vision=False))
        prefix = self.shared_tower().prefix
        own = {k: v for k, v in self.state_dict().items() if not k.startswith(prefix)}
        load_strictly(guest, own, "the detector without its tower")
        return guest.train(self.training)

    def frozen_modules(self) -> list[nn.Module]:
        """List the CLIP towers that are not trained."""
        frozen: list[nn.Module] = []
        if self.config.freeze_vision and self.vision_encoder is not None:
            frozen.append(self.vision_encoder)
        if self.config.freeze_text and self.config.fusion != "none":
            frozen.append(self.text_encoder.model)
        return frozen

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Give the two alphas their own rates and the rest `lr`, as published."""
        own = {"vision_alpha": self.config.vision_alpha_lr, "text_alpha": self.config.text_alpha_lr}
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = [{"params": [p], "lr": own[name]} for name, p in trained if name in own]
        return [*groups, {"params": [p for name, p in trained if name not in own], "lr": lr}]

    def load_pretrained(self) -> None:
        """Load the CLIP and ImageNet weights that the config names. Raises FileNotFoundError when they are nowhere."""
        if self.config.clip_name is not None:
            text = None if self.config.fusion == "none" else self.text_encoder
            load_clip(self.config.clip_name, text, self.vision_encoder)
        if self.config.backbone_pretrained:
            source, _ = make_backbone(self.config.backbone, pretrained=True)
            if self.config.residual:
                let_see_residual(source)
            load_strictly(self.backbone, source.state_dict(), f"ImageNet weights of {self.config.backbone}")
