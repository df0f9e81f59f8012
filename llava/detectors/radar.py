"""RADAR: a ViT, a branch that looks at edges, one that looks at the spectrum, and reasoning over what both found.

github.com/GruheshKurra/RADAR, which cites no paper. Repaired here (docs/detectors/radar.md): each image gets its own
spectrum, and what passes is high frequencies; edges are not those of a frame of zeros; pixels are normalised as the ViT
was pretrained with; a run with one branch keeps that branch's own loss; gradients reach the image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava.core.config import setting
from llava.core.types import NORMALISATIONS, InputSpec, View
from llava.core.weights import load_strictly
from llava.detectors.backbones import timm_vit, timm_weights
from llava.detectors.base import Detector, DetectorOutput
from llava.detectors.radar_branches import CELL, BoundaryBranch, Found, FrequencyBranch, Reasoning, Reasons, head
from llava.ops.edges import sobel_magnitude
from llava.ops.spectrum import high_spectrum, published_spectrum

VIT = "vit_small_patch16_224"  # of timm; the encoder at its published size
LEAST_NORM = 1e-6  # evidence that is shorter has no direction
_SIZES = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True, kw_only=True)
class RadarConfig:
    """Settings of RADAR; the defaults are the published sizes: ViT-S/16 at 224 pixels."""

    image_size: int = setting(224, "side of the image in pixels, a multiple of 16; its shape is squashed to a square")
    patch_size: int = setting(16, "side of a patch in pixels")
    hidden_size: int = setting(384, "width of the ViT")
    num_hidden_layers: int = setting(12, "layers of the ViT")
    num_attention_heads: int = setting(6, "attention heads of the ViT")
    pretrained: bool = setting(False, "start the ViT from timm's ImageNet weights when training")
    normalisation: Literal["half", "imagenet", "none"] = setting(
        "half", "mean and deviation of pixels; half = 0.5, as timm's ViT was pretrained with; imagenet = as published"
    )
    boundary: bool = setting(True, "look at edges")
    frequency: bool = setting(True, "look at the spectrum")
    reasoning: bool = setting(True, "reason over the evidence; without it a classifier alone decides")
    iterations: int = setting(3, "rounds of the reasoning")
    reasoning_heads: int = setting(4, "attention heads of the reasoning")
    evidence_dim: int = setting(64, "numbers that a branch passes on")
    spectrum_size: int = setting(112, "side of the spectrum in bins, at most image_size")
    operators: Literal["repaired", "published", "published_batches"] = setting(
        "repaired",
        "how edges and spectra are made; published = as published for one image at a time, which its weights need; "
        "published_batches = and of a batch each image gets the spectrum of another one",
    )
    dropout: float = setting(0.1, "chance of dropping a value, in training")
    branch_weight: float = setting(0.3, "weight of the branches' own losses")
    orthogonal_weight: float = setting(0.1, "weight of the loss on evidence of both branches that points the same way")
    orthogonal_margin: float = setting(0.1, "cosine up to which it costs nothing")
    deep_weight: float = setting(0.05, "weight of the losses of all rounds of the reasoning, the later ones more")
    label_smoothing: float = setting(0.1, "how much of the label is spread over both classes")
    views: tuple[View, ...] = setting(("plain",), "views averaged at test time")

    def __post_init__(self) -> None:
        multiples = (("patch_size", self.patch_size), ("a cell of the edges", CELL))
        for name, part in multiples:
            if self.image_size % part:
                raise ValueError(f"image_size: {self.image_size} is no multiple of {name} ({part}).")
        for name, heads in (("hidden_size", self.num_attention_heads), ("evidence_dim", self.reasoning_heads)):
            if getattr(self, name) % heads:
                raise ValueError(f"{name}: {getattr(self, name)} can not be shared among {heads} attention heads.")
        if not (self.boundary or self.frequency):
            raise ValueError("boundary, frequency: one of them must be on; the ViT alone is the detector `baseline`.")
        if self.iterations < 1:
            raise ValueError(f"iterations: {self.iterations} is not usable; give 1 or more, or reasoning: false.")
        if self.operators == "repaired" and self.frequency and self.spectrum_size > self.image_size:
            raise ValueError(f"spectrum_size: {self.spectrum_size} is above image_size ({self.image_size}); give less.")
        if self.pretrained and any(getattr(self, name) != getattr(RadarConfig, name) for name in _SIZES):
            raise ValueError(f"pretrained: ImageNet weights are those of {VIT}; leave the ViT's sizes as they are.")

    @classmethod
    def tiny(cls) -> Self:
        """Give sizes for tests: 32 px, some hundred and eighty thousand weights, nearly all of the two map encoders."""
        return cls(
            image_size=32,
            patch_size=8,
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=3,
            evidence_dim=8,
            reasoning_heads=2,
            spectrum_size=32,
        )


@dataclass(frozen=True)
class Answer:
    """All that RADAR says of B images: logit for fake (B,), and where it comes from.

    found: of each branch by name; external: the classifier's logit (B,); reasons and alpha, the share of the reasoning
    in the logit (0 to 1), where there is reasoning; cells (B, h, w): logits of the boundary branch where it is on.
    """

    logit: Tensor
    found: Mapping[str, Found]
    external: Tensor
    reasons: Reasons | None
    alpha: Tensor | None
    cells: Tensor | None


class Radar(Detector):
    """Say whether a face is real or fake, by its edges, its spectrum, and reasoning over both.

    evidence: p_real, p_fake, then what is switched on of: `boundary` and `frequency`, the branches' own scores;
    `reasoning`, the score that the last round of reasoning gives; `attention_boundary`, the share of attention that it
    pays to the boundary branch (the rest is paid to the other one). evidence_map: see `BoundaryBranch.forward`.
    """

    name = "radar"
    Config = RadarConfig
    config: RadarConfig
    own_meanings: ClassVar[Mapping[str, str]] = {
        "boundary": "Score of edges and patches alone",
        "frequency": "Score of the spectrum and the whole alone",
        "reasoning": "Score after reasoning over both",
        "attention_boundary": "Attention of the reasoning to edges",
    }

    def __init__(self, config: RadarConfig) -> None:
        super().__init__(config)
        width, evidence, dropout = config.hidden_size, config.evidence_dim, config.dropout
        self.encoder = timm_vit(
            config.image_size, config.patch_size, width, config.num_hidden_layers, config.num_attention_heads
        )
        self.branches = [name for name in ("boundary", "frequency") if getattr(config, name)]
        if config.boundary:
            self.boundary = BoundaryBranch(width, evidence, dropout)
        if config.frequency:
            self.frequency = FrequencyBranch(width, evidence, dropout)
        sources = len(self.branches)
        self.external = head(sources * evidence, sources * evidence // 2, dropout)
        self.evidence_names = (*Detector.evidence_names, *self.branches)
        if config.reasoning:
            self.reasoning = Reasoning(evidence, config.reasoning_heads, sources, config.iterations, dropout)
            self.gate_logit = nn.Parameter(torch.zeros(()))
            self.evidence_names += ("reasoning", *(["attention_boundary"] if sources > 1 else []))

    @property
    def inputs(self) -> dict[str, InputSpec]:
        """Give the one input: the whole image, squashed to a square."""
        mean, std = NORMALISATIONS[self.config.normalisation]
        spec = InputSpec(
            size=self.config.image_size,
            mean=mean,
            std=std,
            interpolation="bilinear" if self.config.operators == "repaired" else "unfiltered",
            fit="squash",
            views=self.config.views,
        )
        return {"pixel_values": spec}

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> DetectorOutput:
        """Judge pixel_values (B, 3, S, S); labels (B,) with 0 = real, 1 = fake."""
        answer = self.answer(pixel_values)
        losses = {} if labels is None else self.losses(answer, labels)
        return DetectorOutput(
            loss=torch.stack(list(losses.values())).sum() if losses else None,
            logits=F.pad(answer.logit[:, None], (1, 0)),  # of real: 0, so that the softmax is the logit's sigmoid
            evidence=self._evidence(answer),
            evidence_map=None if answer.cells is None else answer.cells.float().sigmoid(),
            losses=losses or None,
        )

    def answer(self, pixel_values: Tensor) -> Answer:
        """Give all that there is to know of images (B, 3, S, S)."""
        pixel_values = pixel_values.to(self.encoder.cls_token.dtype)
        return self.judge(self.encoder.forward_features(pixel_values), *self.maps(pixel_values))

    def maps(self, pixel_values: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Give edges (B, 1, S, S) and spectra (B, s, s) of images (B, 3, S, S); None for what is switched off."""
        size, kind = self.config.spectrum_size, self.config.operators
        border: Literal["reflect", "zero"] = "reflect" if kind == "repaired" else "zero"
        rolled = partial(published_spectrum, rolled=kind == "published_batches")
        spectrum: Callable[[Tensor, int], Tensor] = high_spectrum if kind == "repaired" else rolled
        edges = sobel_magnitude(pixel_values, border) if self.config.boundary else None
        return edges, spectrum(pixel_values, size).to(pixel_values) if self.config.frequency else None

    def judge(self, tokens: Tensor, edges: Tensor | None, spectra: Tensor | None) -> Answer:
        """Judge the ViT's tokens (B, 1 + P, D) and the maps of the branches that are on."""
        found: dict[str, Found] = {}
        cells = reasons = alpha = None
        if edges is not None:
            found["boundary"], cells = self.boundary(edges, tokens[:, 1:])
        if spectra is not None:
            found["frequency"] = self.frequency(spectra, tokens[:, 0])
        evidence = torch.stack([each.evidence for each in found.values()], dim=1)  # (B, n, E)
        logit = external = self.external(evidence.flatten(1))[:, 0]
        if self.config.reasoning:
            reasons, alpha = self.reasoning(evidence), self.gate_logit.sigmoid()
            logit = alpha * reasons.logits[:, -1] + (1 - alpha) * external
        return Answer(logit, found, external, reasons, alpha, cells)

    def losses(self, answer: Answer, labels: Tensor) -> dict[str, Tensor]:
        """Give the losses by name, weighted as they are added up.

        main: of the logit. branch: mean of the branches'. orthogonal: how far the cosine of their evidence is beyond
        the margin; 0 where a batch has evidence of no length. deep: of the rounds, weighted 1 to T with sum 1.
        """
        own = partial(smoothed_loss, labels=labels, smoothing=self.config.label_smoothing, weights=self.class_weights)
        branches = torch.stack([own(each.logit) for each in answer.found.values()])
        losses = {"main": own(answer.logit), "branch": self.config.branch_weight * branches.mean()}
        if len(answer.found) > 1:
            first, second = (each.evidence.float() for each in answer.found.values())
            beyond = alike(first, second, self.config.orthogonal_margin)
            losses["orthogonal"] = self.config.orthogonal_weight * beyond
        if answer.reasons is not None:
            rounds = torch.stack([own(logit) for logit in answer.reasons.logits.unbind(dim=1)])
            weights = torch.arange(1, len(rounds) + 1).to(rounds)
            losses["deep"] = self.config.deep_weight * (weights / weights.sum() * rounds).sum()
        return losses

    def _evidence(self, answer: Answer) -> Tensor:
        p_fake = answer.logit.float().sigmoid()
        known = {"p_real": 1 - p_fake, "p_fake": p_fake}
        known |= {name: each.logit.float().sigmoid() for name, each in answer.found.items()}
        if answer.reasons is not None:
            known["reasoning"] = answer.reasons.logits[:, -1].float().sigmoid()
            known["attention_boundary"] = answer.reasons.attention[:, -1, 0].float()
        return torch.stack([known[name] for name in self.evidence_names], dim=1)

    def load_pretrained(self) -> None:
        """Load timm's ImageNet weights of the ViT, if the config says so. Raises FileNotFoundError."""
        if self.config.pretrained:
            load_strictly(self.encoder, dict(timm_weights(VIT)), f"timm's {VIT}")


def smoothed_loss(logits: Tensor, labels: Tensor, smoothing: float, weights: Tensor) -> Tensor:
    """Give the binary cross-entropy of logits (B,) against smoothed labels, as a mean weighted by class (2,)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    targets = labels.to(logits) * (1 - smoothing) + smoothing / 2
    each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    weight = weights.to(logits)[labels]
    return (each * weight).sum() / weight.sum()


def alike(first: Tensor, second: Tensor, margin: float) -> Tensor:
    """Give the mean of how far |cosine| of two kinds of evidence (B, E) is beyond a margin; 0 if one has no length."""
    norms = torch.stack([first.norm(dim=1), second.norm(dim=1)])
    cosine = (first / (norms[0, :, None] + 1e-8) * second / (norms[1, :, None] + 1e-8)).sum(dim=1)
    return (cosine.abs() - margin).relu().mean() * (norms > LEAST_NORM).all()
