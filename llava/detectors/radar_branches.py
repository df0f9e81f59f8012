"""RADAR's parts: a branch that reads a map beside the ViT's tokens, and the reasoning over what branches found.

github.com/GruheshKurra/RADAR. There the branches are called BADM (boundary) and AADM (frequency), the reasoning ERM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

CHANNELS = (32, 64, 128)  # of the layers that read a map
CELL = 16  # pixels of the map for each cell that they leave


@dataclass(frozen=True)
class Found:
    """What one branch says: evidence (B, E) without bounds, and its logit for fake (B,)."""

    evidence: Tensor
    logit: Tensor


@dataclass(frozen=True)
class Reasons:
    """What the reasoning says after each of T rounds: logits (B, T), attention to the n branches (B, T, n), sum 1."""

    logits: Tensor
    attention: Tensor

    @property
    def last_step(self) -> Tensor:
        """Give how far the last round moved the probability (B,); 0 for a single round."""
        probabilities = self.logits.sigmoid()
        return (probabilities[:, -1:] - probabilities[:, -2:][:, :1]).abs()[:, 0]


class Branch(nn.Module):
    """A map and tokens of the ViT to evidence and a logit."""

    def __init__(self, token_mlp: nn.Sequential, tokens: int, evidence_dim: int, dropout: float) -> None:
        super().__init__()
        self.map_encoder = map_encoder()
        self.token_mlp = token_mlp
        self.fusion = nn.Sequential(
            nn.Linear(CHANNELS[-1] + tokens, 2 * evidence_dim),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(2 * evidence_dim, evidence_dim),
        )
        self.classifier = nn.Linear(evidence_dim, 1)
        self.apply(start)

    def judge(self, of_map: Tensor, of_tokens: Tensor) -> Found:
        """Judge features of a map (..., 128) and of tokens (..., D): evidence (..., E), logit (...)."""
        evidence = self.fusion(torch.cat([of_map, self.token_mlp(of_tokens)], dim=-1))
        return Found(evidence, self.classifier(evidence)[..., 0])


class BoundaryBranch(Branch):
    """Edges, and what patches have in common (mean) and at most (maximum)."""

    def __init__(self, width: int, evidence_dim: int, dropout: float) -> None:
        first, second = nn.Linear(2 * width, width), nn.Linear(width, width // 2)
        mlp = nn.Sequential(first, nn.ReLU(), nn.Dropout(dropout), second, nn.ReLU())
        super().__init__(mlp, width // 2, evidence_dim, dropout)

    def forward(self, edges: Tensor, patches: Tensor) -> tuple[Found, Tensor]:
        """Judge edges (B, 1, H, W) and patches (B, P, D); also gives a logit for each cell of the edges (B, h, w).

        A cell's is what the branch would say of an image that is like this cell everywhere.
        """
        cells = self.map_encoder(edges)  # (B, 128, h, w)
        pooled = torch.cat([patches.mean(dim=1), patches.amax(dim=1)], dim=-1)
        found = self.judge(cells.mean(dim=(2, 3)), pooled)
        side = round(patches.shape[1] ** 0.5)
        tokens = patches.transpose(1, 2).unflatten(2, (side, side))
        tokens = nn.functional.interpolate(tokens, size=cells.shape[-2:], mode="nearest").permute(0, 2, 3, 1)
        alone = self.judge(cells.permute(0, 2, 3, 1), torch.cat([tokens, tokens], dim=-1))
        return found, alone.logit


class FrequencyBranch(Branch):
    """A spectrum, and the class token."""

    def __init__(self, width: int, evidence_dim: int, dropout: float) -> None:
        mlp = nn.Sequential(nn.Linear(width, width // 2), nn.ReLU(), nn.Dropout(dropout))
        super().__init__(mlp, width // 2, evidence_dim, dropout)

    def forward(self, spectrum: Tensor, class_token: Tensor) -> Found:
        """Judge a spectrum (B, S, S) and a class token (B, D)."""
        return self.judge(self.map_encoder(spectrum[:, None]).mean(dim=(2, 3)), class_token)


class CrossAttention(nn.Module):
    """What a state asks of n pieces of evidence; of one alone there is nothing to ask: it gets all attention."""

    def __init__(self, width: int, heads: int, sources: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        if sources > 1:
            self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.sources = sources
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, state: Tensor, evidence: Tensor) -> tuple[Tensor, Tensor]:
        """Give the answer (B, E) to a state (B, E), and the attention to evidence (B, n, E): (B, n), with sum 1."""
        values = self.v_proj(evidence).unflatten(2, (self.heads, -1))  # (B, n, heads, E / heads)
        attention = torch.ones_like(values[..., 0])
        if self.sources > 1:
            keys = self.k_proj(evidence).unflatten(2, (self.heads, -1))
            query = self.q_proj(state).unflatten(1, (self.heads, -1))
            attention = (torch.einsum("bhe,bnhe->bnh", query, keys) * keys.shape[-1] ** -0.5).softmax(dim=1)
        answer = torch.einsum("bnh,bnhe->bhe", self.dropout(attention), values).flatten(1)
        return self.out_proj(answer), attention.mean(dim=2)


class Reasoning(nn.Module):
    """Asks the evidence again and again, by attention from a state that a GRU keeps."""

    def __init__(self, width: int, heads: int, sources: int, iterations: int, dropout: float) -> None:
        super().__init__()
        self.iterations = iterations
        self.start = nn.Sequential(nn.Linear(sources * width, width), nn.ReLU())
        self.attention = CrossAttention(width, heads, sources, dropout)
        self.predictor = nn.Linear(width, 1)
        self.apply(start)
        self.gru = nn.GRUCell(width, width)

    def forward(self, evidence: Tensor) -> Reasons:
        """Reason over evidence (B, n, E)."""
        state = self.start(evidence.flatten(1))
        logits, attention = [], []
        for _ in range(self.iterations):
            answer, looked_at = self.attention(state, evidence)
            state = self.gru(answer, state)
            logits.append(self.predictor(state)[:, 0])
            attention.append(looked_at)
        return Reasons(torch.stack(logits, dim=1), torch.stack(attention, dim=1))


def map_encoder() -> nn.Sequential:
    """Give the layers that make (B, 128, H / 16, W / 16) of a map (B, 1, H, W)."""
    layers: list[nn.Module] = []
    before = 1
    for after, (kernel, stride) in zip(CHANNELS, ((7, 4), (5, 2), (3, 2)), strict=True):
        layers += [nn.Conv2d(before, after, kernel, stride, kernel // 2), nn.BatchNorm2d(after), nn.ReLU()]
        before = after
    return nn.Sequential(*layers)


def head(inputs: int, hidden: int, dropout: float) -> nn.Sequential:
    """Give a classifier with one hidden layer and one logit."""
    layers = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1))
    return layers.apply(start)


def start(module: nn.Module) -> None:
    """Draw the weights of a layer as published: linear ones by Xavier, convolutions by Kaiming, both without bias."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
