"""Does a picture look like those that a detector knows? Where it does not, its score is no evidence either way.

Mahalanobis distance in what the network sees first (Lee et al., NeurIPS 2018, take later layers too): there, a face
that was edited lies among the others, and another camera, compression or format does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from llava.core.score_map import fit_logistic
from llava.detectors.fitted import FittedPart

SHRINKAGE = 0.3  # of correlations towards none, for few people have few of them
LEAST_DEVIATION = 0.05  # added to a channel's deviation, of which the logarithm is taken
KNOWN = 0.95  # share of the fold, each person judged by the others, that is to be within the limit
FOLDS = 5
STRANGE = 1.5  # times the limit: from here on next to nothing of the score counts
LEFT = 0.02  # of it that always does: too little for a verdict, enough to put strange pictures in order


class Familiarity(FittedPart):
    """Takes log odds of pictures beyond the limit to the point where they speak for neither side.

    The neutral default knows every picture.
    """

    has_default: ClassVar[bool] = True
    mean: Tensor
    whitening: Tensor
    limit: Tensor
    centre: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("whitening", torch.zeros(features, features))
        self.register_buffer("limit", torch.ones(()))
        self.register_buffer("centre", torch.zeros(()))

    def before_training(self) -> None:
        """Know every picture again: what is seen first is about to change."""
        self.whitening.zero_()

    def strangeness(self, features: Tensor) -> Tensor:
        """Give how far features (B, F) are from those known (B,), the limit being 1."""
        away = features.float() - self.mean.float()
        return (away @ self.whitening.float().T).square().sum(dim=1) / self.limit.float()

    def forward(self, features: Tensor, log_odds: Tensor) -> tuple[Tensor, Tensor]:
        """Give log odds (B,), as they are within the limit and less of them beyond it, and the share that went (B,)."""
        gone = ((self.strangeness(features) - 1) / (STRANGE - 1)).clamp(0, 1 - LEFT).to(log_odds)
        return log_odds + gone * (self.centre.to(log_odds) - log_odds), gone

    def fit(self, observed: Tensor, targets: Tensor, groups: Sequence[str]) -> None:
        """Fit on features and log odds (N, F + 1); each person's distance is measured by what the others taught."""
        values = observed.double().cpu().numpy()
        features, log_odds, labels = values[:, :-1], values[:, -1], targets.cpu().numpy()
        numbers = np.unique(np.array(groups), return_inverse=True)[1] % FOLDS
        if len(set(groups)) < 2 * FOLDS or len(set(labels.tolist())) < 2:
            raise ValueError(
                f"What is familiar needs {2 * FOLDS} groups with real and fake images, got {len(set(groups))}; give "
                "another fold."
            )
        distances = np.empty(len(features))
        for fold in range(FOLDS):
            mean, whitening = _spread(features[numbers != fold])
            distances[numbers == fold] = (((features[numbers == fold] - mean) @ whitening.T) ** 2).sum(axis=1)
        mean, whitening = _spread(features)
        (scale,), offset = fit_logistic(labels, log_odds[None], has_offset=True)
        self.mean.copy_(torch.tensor(mean))
        self.whitening.copy_(torch.tensor(whitening))
        self.limit.fill_(float(np.quantile(distances, KNOWN)))
        self.centre.fill_(-offset / max(scale, 1e-6))


def first_look(maps: Tensor) -> Tensor:
    """Give means and log deviations (B, 2 C) of the channels of maps (B, C, H, W)."""
    maps = maps.float()
    return torch.cat([maps.mean(dim=(2, 3)), (maps.std(dim=(2, 3)) + LEAST_DEVIATION).log()], dim=1)


def _spread(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give mean (F,) and a matrix (F, F) that makes features (N, F) of variance 1 and without correlation."""
    covariance = np.cov(features.T)
    own = np.diag(np.diag(covariance) + 1e-6)
    return features.mean(axis=0), np.linalg.inv(np.linalg.cholesky((1 - SHRINKAGE) * covariance + SHRINKAGE * own))
