"""Parts of a detector that no gradient makes: they are fitted on a fold of their own, by a phase of kind `fit`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from llava.core.score_map import fit_logistic

CALIBRATION = "calibration"  # the part that every detector has; it lies beside the weights, because it names them


class FittedPart(nn.Module):
    """Base of what is fitted: its numbers are buffers in the detector's weights file, NaN until `fit` has set them.

    A part that has a neutral default begins with that instead, and says so; it counts as fitted.
    """

    has_default: ClassVar[bool] = False

    def before_training(self) -> None:
        """Go back to the neutral default, where a detector that is trained on makes the numbers worthless."""

    @property
    def is_fitted(self) -> bool:
        """Whether it can be used: no number of it is NaN."""
        return not any(bool(buffer.isnan().any()) for buffer in self.buffers())

    def fit(self, observed: Tensor, targets: Tensor, groups: Sequence[str]) -> None:
        """Set the numbers by what the detector observed of N images (N, F) and the numbers of their classes (N,).

        observed: rows of `Detector.observe`, NaN where something is missing. groups: of each image, such as its person.
        Raises ValueError for too little of it.
        """
        raise NotImplementedError


class LogisticFusion(FittedPart):
    """Weighted sum of the log odds of M members, and an offset; the neutral default is their mean.

    Fitted by logistic regression whose weights are never negative: no member is turned round.
    """

    has_default = True
    weights: Tensor
    offset: Tensor

    def __init__(self, members: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.full((members,), 1 / members))
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, log_odds: Tensor) -> Tensor:
        """Fuse log odds (B, M), NaN where a member has none, to (B,); NaN where none has.

        Those that are there share the weight of all.
        """
        is_there = ~log_odds.isnan()
        weights = self.weights.to(log_odds)
        counted = weights * is_there  # (B, M)
        shares = counted / counted.sum(dim=1, keepdim=True).clamp(min=torch.finfo(log_odds.dtype).tiny)
        fused = (shares * log_odds.nan_to_num()).sum(dim=1) * weights.sum() + self.offset.to(log_odds)
        return torch.where(is_there.any(dim=1), fused, torch.nan)

    def fit(self, observed: Tensor, targets: Tensor, groups: Sequence[str]) -> None:
        """Fit on log odds (N, M) and targets (N,), 1 = fake; images that a member has no answer to are left out."""
        whole = ~observed.isnan().any(dim=1)
        labels, log_odds = targets[whole].cpu().numpy(), observed[whole].double().cpu().numpy()
        if len(set(labels.tolist())) < 2:
            raise ValueError(
                f"Fusion weights need real and fake images that every member answers, got {len(labels)} of "
                f"{len(observed)}; give another fold."
            )
        weights, offset = fit_logistic(labels, log_odds.T.copy(), has_offset=True)
        self.weights.copy_(torch.tensor(weights))
        self.offset.fill_(offset)
