"""Records to batches of tensors, random only through (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from llava.core.runtime import item_rng
from llava.core.types import FAKE, REAL, InputSpec, Record
from llava.data.sources import Source

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# `llava.ops.degrade.DegradeConfig` is one: settings that can be called on an image and its mask.
Degradation = Callable[[np.ndarray, np.ndarray | None, np.random.Generator], tuple[np.ndarray, np.ndarray | None]]
UNKNOWN_CELL = -1.0


def to_tensor(image: np.ndarray, spec: InputSpec) -> Tensor:
    """Resize, crop the centre unless squashed, scale to [0, 1] and normalise: uint8 (H, W, 3) to (3, S, S)."""
    pixels = torch.from_numpy(_resize_and_crop(image, spec)).permute(2, 0, 1).float() / 255.0
    mean = torch.tensor(spec.mean).view(3, 1, 1)
    std = torch.tensor(spec.std).view(3, 1, 1)
    return (pixels - mean) / std


def view_tensors(image: np.ndarray, spec: InputSpec) -> Tensor:
    """Give every test-time view of one image, (V, 3, S, S) in the order of `spec.views`."""
    plain = to_tensor(image, spec)
    return torch.stack([plain.flip(-1) if view == "flip" else plain for view in spec.views])


def mask_cells(mask: np.ndarray, spec: InputSpec, grid: int) -> Tensor:
    """Give the forged part of each cell (grid, grid) in [0, 1]; the mask (H, W) uint8 goes the image's way."""
    picture = np.repeat((mask > 0).astype(np.uint8)[..., None] * 255, 3, axis=2)
    seen = torch.from_numpy(_resize_and_crop(picture, replace(spec, interpolation="bilinear"))[..., 0])
    return torch.nn.functional.adaptive_avg_pool2d(seen[None].float() / 255.0, grid)[0]


def _resize_and_crop(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    height, width = image.shape[:2]
    short = spec.shortest_edge
    # The long side is cut off, not rounded, as transformers and torchvision do.
    long = short if spec.fit == "squash" else int(short * max(height, width) / min(height, width))
    new_width, new_height = (short, long) if width <= height else (long, short)
    resized = np.array(Image.fromarray(image).resize((new_width, new_height), _RESAMPLING[spec.interpolation]))
    top, left = (new_height - spec.size) // 2, (new_width - spec.size) // 2
    return resized[top : top + spec.size, left : left + spec.size]


class DetectionDataset(Dataset[dict[str, Any]]):
    """What a detector's forward reads: its inputs by name, `labels` and the record's `index`.

    targets: the class of each record, as the detector numbers them, which `labels` are; None = 0 real, 1 fake.

    Each input is (3, S, S), or (V, 3, S, S) with `with_views`. mask_grid: also give `masks` (grid, grid), the forged
    part of each cell of the first input, -1 where it is unknown. An item is an index (epoch 0), or (epoch, index) as
    `EpochSampler` yields it; equal items are equal tensors on any worker. Raises ValueError when labels are unknown.
    """

    def __init__(
        self,
        source: Source,
        records: Sequence[Record],
        inputs: Mapping[str, InputSpec],
        degrade: Degradation | None = None,
        seed: int = 0,
        with_views: bool = False,
        mask_grid: int | None = None,
        targets: Sequence[int] | None = None,
    ) -> None:
        unknown = [r.id for r in records if r.label is None]
        if unknown:
            raise ValueError(f"{len(unknown)} of {len(records)} records have no label (first: {unknown[0]}); add it.")
        reserved = {"labels", "index", "masks"} & inputs.keys()
        if reserved:
            raise ValueError(f"inputs: the name {sorted(reserved)[0]!r} is taken by the data set; rename the input.")
        self.source, self.records, self.inputs = source, tuple(records), dict(inputs)
        self.degrade, self.seed, self.with_views, self.mask_grid = degrade, seed, with_views, mask_grid
        self.targets = [int(r.label or REAL) for r in records] if targets is None else list(targets)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = item if isinstance(item, tuple) else (0, item)
        record = self.records[index]
        rng = item_rng(self.seed, epoch, index)
        sample = self.source.load(record, rng)
        image, mask = sample.image, sample.mask
        if self.degrade is not None:
            image, mask = self.degrade(image, mask, rng)
        prepare = view_tensors if self.with_views else to_tensor
        tensors: dict[str, Any] = {name: prepare(image, spec) for name, spec in self.inputs.items()}
        if self.mask_grid is not None:
            tensors["masks"] = self._cells(mask, self.mask_grid)
        return {**tensors, "labels": torch.tensor(self.targets[index]), "index": torch.tensor(index)}

    def _cells(self, mask: np.ndarray | None, grid: int) -> Tensor:
        if mask is None:
            return torch.full((grid, grid), UNKNOWN_CELL)
        return mask_cells(mask, next(iter(self.inputs.values())), grid)


class EpochSampler(Sampler[tuple[int, int]]):
    """Yield (epoch, index) pairs in an order that is a function of (seed, epoch).

    One epoch has as many draws as there are records. `balanced`: every class is drawn equally often (the remainder
    goes to the lowest labels); a class is gone through completely before any of its records comes again, so the
    minority is repeated and of the majority a fresh part is drawn without replacement. A record repeated within one
    epoch has the same degradation each time. Without `shuffle` the draws are in the order of the records.

    origins: what each record was made from. One epoch then goes once through the reals from which fakes were made, each
    followed by one of these fakes, so that a batch differs in what was forged and in nothing else (Shiohara and
    Yamasaki, CVPR 2022). Raises ValueError when there is no such pair.
    """

    def __init__(
        self,
        labels: Sequence[int],
        seed: int,
        balanced: bool,
        shuffle: bool = True,
        origins: Sequence[str] | None = None,
    ) -> None:
        if not labels:
            raise ValueError("labels: nothing to draw from; give at least one record.")
        self.labels = np.asarray(labels)
        self.seed, self.balanced, self.shuffle, self.epoch = seed, balanced, shuffle, 0
        self.pairs = None if origins is None else _pairs(labels, origins)

    def __len__(self) -> int:
        return len(self.labels) if self.pairs is None else 2 * len(self.pairs)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        # The index after the last record's, so that no record shares the sampler's generator.
        rng = item_rng(self.seed, epoch, len(self.labels))
        if self.pairs is not None:
            reals = rng.permutation(len(self.pairs)) if self.shuffle else range(len(self.pairs))
            order = [i for n in reals for i in (self.pairs[n][0], rng.choice(self.pairs[n][1]))]
        else:
            drawn = self._balanced(rng) if self.balanced else np.arange(len(self.labels))
            order = list(rng.permutation(drawn) if self.shuffle else np.sort(drawn))
        return iter([(epoch, int(i)) for i in order])

    def _balanced(self, rng: np.random.Generator) -> np.ndarray:
        classes = np.unique(self.labels)
        base, extra = divmod(len(self.labels), len(classes))
        drawn = []
        for position, label in enumerate(classes):
            members = np.flatnonzero(self.labels == label)
            passes, rest = divmod(base + (position < extra), len(members))
            drawn += [np.tile(members, passes), rng.permutation(members)[:rest]]
        return np.concatenate(drawn)


def _pairs(labels: Sequence[int], origins: Sequence[str]) -> list[tuple[int, list[int]]]:
    """Give (real, fakes made from it) for every real that has any."""
    fakes: dict[str, list[int]] = {}
    for i, (label, origin) in enumerate(zip(labels, origins, strict=True)):
        if label == FAKE:
            fakes.setdefault(origin, []).append(i)
    reals = (i for i, label in enumerate(labels) if label == REAL)
    pairs = [(i, fakes[origins[i]]) for i in reals if origins[i] and origins[i] in fakes]
    if not pairs:
        raise ValueError(
            "No fake was made from a real record here: pairs need the same tag `untouched` on both, as `m2f2 data "
            "forge` writes it; balance by weights or sampling instead."
        )
    return pairs


def collate(batch: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack items along a new first axis, name by name."""
    return default_collate(list(batch))
