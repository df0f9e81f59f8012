"""A CNN that says of a face whether it was edited, in which cells, in which region, and by which trace.

Beside the class it learns from what is known of a forgery made in training: the mask of forged pixels, the region, the
artefact (`llava.ops.forge`). Learning from blends of a face with itself: Shiohara and Yamasaki, CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava.core.config import setting, to_dict
from llava.core.types import NORMALISATIONS, REGIONS, UNFAMILIAR, InputSpec, View
from llava.data.answer_texts import SIGNS
from llava.detectors.backbones import LITE_EFFICIENTNETS, load_lite_weights, make_backbone, stage_channels
from llava.detectors.base import Detector, DetectorOutput
from llava.detectors.familiarity import Familiarity, first_look
from llava.ops.face_regions import FACE
from llava.ops.forge import ARTEFACTS

# The forged cells of a local edit are a few per cent; so much more does each of them weigh.
FORGED_WEIGHT = 4.0


@dataclass(frozen=True, kw_only=True)
class FaceCnnConfig:
    """Settings of the CNN; the defaults are the starter's."""

    backbone: str = setting(
        "efficientnet_lite0", "CNN: efficientnet_lite0..4, another EfficientNet or DenseNet, conv_tiny"
    )
    weights: str | None = setting(None, "file of ImageNet weights to start an efficientnet_lite from")
    normalisation: str = setting("half", "mean and deviation of pixels: half, imagenet, clip or none")
    image_size: int = setting(224, "side of the input in pixels, a multiple of 32")
    width: int = setting(128, "channels of the map's features")
    dropout: float = setting(0.2, "dropout before the classifiers")
    map_weight: float = setting(1.0, "weight of the loss between map and masks of forged pixels")
    region_weight: float = setting(0.3, "weight of the loss between region evidence and the region that was forged")
    trace_weight: float = setting(0.3, "weight of the loss between trace evidence and the artefact")
    knows_strangers: bool = setting(
        False, "what looks like nothing it knows has a score that speaks for neither side (made by a phase `kind: fit`)"
    )
    views: tuple[View, ...] = setting(("plain",), "views averaged at test time")

    def __post_init__(self) -> None:
        if self.image_size % 32 or self.image_size < 32:
            raise ValueError(f"image_size: {self.image_size} is not usable; allowed: multiples of 32, such as 224.")
        if self.weights is not None and self.backbone not in LITE_EFFICIENTNETS:
            raise ValueError(f"weights: a file is for {', '.join(LITE_EFFICIENTNETS)}, not for {self.backbone!r}.")

    @classmethod
    def tiny(cls) -> Self:
        """Give sizes for tests: 64 px, a small plain CNN."""
        return cls(backbone="conv_tiny", image_size=64, width=16)


class FaceCnn(Detector):
    """Say whether a face was edited, and if so in which cells and region and by which trace.

    evidence = (p_real, p_fake), then, provided that it was edited, the share of each region (alike where the whole face
    was) and of each trace; both sum to 1; last, with `knows_strangers`, the share of the score that was taken away,
    as the picture looks like none it knows. evidence_map (B, grid, grid) in [0, 1]: was this cell edited?
    """

    name = "cnn"
    Config = FaceCnnConfig
    config: FaceCnnConfig
    evidence_names = ("p_real", "p_fake", *REGIONS, *SIGNS)
    own_meanings: ClassVar[Mapping[str, str]] = {
        **{name: f"If edited: {name}" for name in REGIONS},
        **{name: f"If edited: {words}" for name, words in SIGNS.items()},
        UNFAMILIAR: "Looks like none it knows",
    }
    taught: ClassVar[Mapping[str, tuple[str, ...]]] = {"region": (*REGIONS, FACE), "artefact": ARTEFACTS}

    def __init__(self, config: FaceCnnConfig) -> None:
        super().__init__(config)
        self.backbone, channels = make_backbone(config.backbone)
        fine = stage_channels(self.backbone)[-2:]
        self.lateral = nn.Sequential(
            nn.Conv2d(sum(fine), config.width, 1, bias=False), nn.BatchNorm2d(config.width), nn.ReLU()
        )
        self.map_head = nn.Conv2d(config.width, 1, 1)
        self.dropout = nn.Dropout(config.dropout)
        seen = channels + config.width
        self.classifier = nn.Linear(seen + 1, len(self.classes))
        self.region_head = nn.Linear(config.width, len(REGIONS))
        self.trace_head = nn.Linear(seen, len(SIGNS))
        if config.knows_strangers:
            self.evidence_names = (*self.evidence_names, UNFAMILIAR)
            self.familiarity = Familiarity(2 * stage_channels(self.backbone)[0])

    @property
    def inputs(self) -> dict[str, InputSpec]:
        """Give the one input: the face crop."""
        mean, std = NORMALISATIONS[self.config.normalisation]
        return {"pixel_values": InputSpec(size=self.config.image_size, mean=mean, std=std, views=self.config.views)}

    @property
    def mask_grid(self) -> int | None:
        """Ask for masks on the map's grid."""
        return self.config.image_size // 16

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        masks: Tensor | None = None,
        region: Tensor | None = None,
        artefact: Tensor | None = None,
    ) -> DetectorOutput:
        """Classify pixel_values (B, 3, S, S); labels (B,) with 0 = real, 1 = fake.

        masks: (B, grid, grid) forged part of each cell, -1 = unknown. region, artefact: (B,) numbers of the values in
        `taught`, -1 = unknown or nothing was edited.
        """
        logits, of_cells, shares, first = self._look(pixel_values)
        grid = self.config.image_size // 16
        losses = self._losses(logits, of_cells, shares, labels, masks, region, artefact)
        strange: tuple[Tensor, ...] = ()
        if self.config.knows_strangers:
            logits, gone = self._as_far_as_known(logits, first)
            strange = (gone.float()[:, None],)
        told = [each.float().softmax(dim=1) for each in (logits, *shares)]
        return DetectorOutput(
            loss=torch.stack(list(losses.values())).sum() if losses else None,
            logits=logits,
            evidence=torch.cat([*told, *strange], dim=1),
            evidence_map=of_cells.sigmoid().unflatten(1, (grid, grid)),
            losses=losses or None,
        )

    def _look(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
        """Give logits (B, 2), those of cells (B, cells), of regions and traces, and the maps of the first stage."""
        last, stages = self.backbone.forward_stages(pixel_values)
        grid = self.config.image_size // 16
        stacked = [F.interpolate(stage, size=(grid, grid), mode="nearest") for stage in stages[-2:]]
        local = self.lateral(torch.cat(stacked, dim=1))  # (B, width, grid, grid)
        of_cells = self.map_head(local).flatten(1).float()  # (B, cells)
        where = (local.flatten(2) * of_cells.softmax(dim=1).to(local)[:, None]).sum(dim=2)  # (B, width)
        whole = torch.cat([last.mean(dim=(2, 3)), where], dim=1)
        seen = self.dropout(whole)
        strongest = of_cells.amax(dim=1, keepdim=True).to(seen)
        logits = self.classifier(torch.cat([seen, strongest], dim=1))
        shares = (self.region_head(where), self.trace_head(seen))
        return logits, of_cells, shares, stages[0]

    def _as_far_as_known(self, logits: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Give logits (B, 2), which speak for neither class where the first maps are strange, and how strange (B,)."""
        middle = logits.mean(dim=1)
        log_odds, gone = self.familiarity(first_look(first), logits[:, 1] - logits[:, 0])
        return torch.stack([middle - log_odds / 2, middle + log_odds / 2], dim=1), gone

    def observe(self, part: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """Give the first look at an image and the log odds as if it were familiar, of the first view."""
        logits, _, _, first = self._look(inputs["pixel_values"][:, 0])
        return torch.cat([first_look(first), (logits[:, 1:] - logits[:, :1]).float()], dim=1)

    def _losses(
        self,
        logits: Tensor,
        of_cells: Tensor,
        shares: tuple[Tensor, Tensor],
        labels: Tensor | None,
        masks: Tensor | None,
        region: Tensor | None,
        artefact: Tensor | None,
    ) -> dict[str, Tensor]:
        """Give the losses by name, weighted as they are added up; none without labels."""
        if labels is None:
            return {}
        losses = {"class": F.cross_entropy(logits.float(), labels, weight=self.class_weights.float())}
        if masks is not None:
            losses["map"] = self.config.map_weight * cell_loss(of_cells, masks)
        of_regions, of_traces = (each.float() for each in shares)
        if region is not None:
            losses["region"] = self.config.region_weight * region_loss(of_regions, region)
        if artefact is not None:
            known = artefact >= 0
            trace = F.cross_entropy(of_traces, artefact.clamp(min=0), reduction="none") * known
            losses["trace"] = self.config.trace_weight * trace.sum() / known.sum().clamp(min=1)
        return losses

    def soften(self, evidence: Tensor, exponent: Tensor) -> Tensor:
        """Take the shares of regions and of traces to the power of `exponent` (B,), and the sum of each to 1 again."""
        parts = [len(self.classes), len(REGIONS), len(SIGNS)]
        whole, *shares, rest = evidence.split([*parts, evidence.shape[1] - sum(parts)], dim=1)
        softer = [share ** exponent.to(share)[:, None] for share in shares]
        return torch.cat([whole, *(share / share.sum(dim=1, keepdim=True) for share in softer), rest], dim=1)

    def evidence_for_words(self, output: DetectorOutput, prior: float | None = None) -> Tensor:
        """Give the evidence that words rest on; of strange pictures they know nothing, for they learn from none."""
        evidence = super().evidence_for_words(output, prior)
        return evidence * torch.tensor([name != UNFAMILIAR for name in self.evidence_names]).to(evidence)

    def describe(self) -> dict[str, Any]:
        """Leave out where the ImageNet weights lay: a trained detector needs them no more."""
        return {**super().describe(), "config": to_dict(replace(self.config, weights=None))}

    def load_pretrained(self) -> None:
        """Load the ImageNet weights that the config names. Raises FileNotFoundError or ValueError."""
        if self.config.weights is not None:
            load_lite_weights(self.backbone, self.config.weights)


def cell_loss(of_cells: Tensor, masks: Tensor) -> Tensor:
    """Give the binary cross-entropy of logits (B, cells) against the forged part of each cell (B, grid, grid).

    masks: in [0, 1]; below 0 = unknown, left out. Without any known cell the loss is 0.
    """
    masks = masks.flatten(1).to(of_cells.dtype)
    target = masks.clamp(min=0)
    weight = (masks >= 0) * (1 + (FORGED_WEIGHT - 1) * target)
    return F.binary_cross_entropy_with_logits(of_cells, target, weight, reduction="sum") / weight.sum().clamp(min=1)


def region_loss(of_regions: Tensor, region: Tensor) -> Tensor:
    """Give the cross-entropy of logits (B, R) against regions (B,); R = the whole face, which is all of them alike.

    Images of -1 are left out; without any other the loss is 0.
    """
    known = region >= 0
    target = F.one_hot(region.clamp(min=0), of_regions.shape[1] + 1).to(of_regions.dtype)
    target = target[:, :-1] + target[:, -1:] / of_regions.shape[1]
    losses = -(target * of_regions.log_softmax(dim=1)).sum(dim=1)
    return (losses * known).sum() / known.sum().clamp(min=1)
