"""Records to batches of tensors, random only through (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial, singledispatch
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from llava.core.input_specs import (
    SILENT_BELOW,
    STILL,
    FramesSpec,
    Input,
    MissingInput,
    NativeSpec,
    SoundSpec,
    TimesSpec,
    TrackSpec,
    Wants,
    all_reasons,
)
from llava.core.runtime import item_rng
from llava.core.types import FAKE, REAL, Content, InputSpec, Record, Sample, View
from llava.data.faces import FaceBox, Place, face_square
from llava.data.images import UnreadableVideo
from llava.data.sources import Source

_RESAMPLING = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# `llava.ops.degrade.DegradeConfig` is one: settings that can be called on an image and its mask.
Degradation = Callable[[np.ndarray, np.ndarray | None, np.random.Generator], tuple[np.ndarray, np.ndarray | None]]
UNKNOWN_CELL, UNKNOWN_TAG = -1.0, -1
DRAWS = 4  # windows of a training clip that are drawn, as long as each lacks something


def to_tensor(image: np.ndarray, spec: InputSpec | NativeSpec) -> Tensor:
    """Resize, crop the centre unless squashed, scale to [0, 1] and normalise: uint8 (H, W, 3) to (3, S, S).

    For a NativeSpec the image has its size already.
    """
    seen = _resize_and_crop(image, spec) if isinstance(spec, InputSpec) else image
    pixels = torch.from_numpy(seen).permute(2, 0, 1).float() / 255.0
    mean = torch.tensor(spec.mean).view(3, 1, 1)
    std = torch.tensor(spec.std).view(3, 1, 1)
    return (pixels - mean) / std


def view_tensors(image: np.ndarray, spec: InputSpec) -> Tensor:
    """Give every test-time view of one image, (V, 3, S, S) in the order of `spec.views`."""
    return _seen(to_tensor(image, spec), spec.views)


@singledispatch
def input_tensor(spec: Input, content: Content) -> Tensor:
    """Give what a detector reads of a sample, one view: a tensor of `spec.shape`. Raises MissingInput."""
    raise TypeError(f"{type(spec).__name__} is no kind of input that is known; register one with `input_tensor`.")


@input_tensor.register
def _(spec: InputSpec, content: Content) -> Tensor:
    return to_tensor(content.image, spec)


@input_tensor.register
def _(spec: NativeSpec, content: Content) -> Tensor:
    height, width = content.image.shape[:2]
    x, y, *sides = content.face or (0, 0, width, height)
    box = FaceBox(x=x, y=y, width=sides[0], height=sides[1], score=1.0)
    left, top, side = face_square(box, height, width, 0.0 if content.face is None else spec.ring)
    if side < spec.size:
        raise MissingInput(
            f"the face is too small: with what is around it {side} pixels wide, and {spec.size} are needed"
        )
    top, left = (start + (side - spec.size) // 2 for start in (top, left))
    return to_tensor(np.ascontiguousarray(content.image[top : top + spec.size, left : left + spec.size]), spec)


@input_tensor.register
def _(spec: FramesSpec, content: Content) -> Tensor:
    if not content.frames:
        raise MissingInput(content.lacks.get("frames", STILL))
    return torch.stack([to_tensor(content.frames[n], spec.image) for n in spec.numbers(content.seconds)])


@input_tensor.register
def _(spec: TimesSpec, content: Content) -> Tensor:
    if not content.frames:
        raise MissingInput(content.lacks.get("frames", STILL))
    return torch.tensor([content.seconds[n] - content.seconds[0] for n in spec.numbers(content.seconds)])


@input_tensor.register
def _(spec: SoundSpec, content: Content) -> Tensor:
    if content.audio is None:
        raise MissingInput(content.lacks.get("sound", STILL))
    heard = content.audio[: spec.shape[0]]
    if np.abs(heard).max() < SILENT_BELOW:
        raise MissingInput("its sound is silent")
    return torch.from_numpy(heard)


def input_tensors(
    content: Content, inputs: Mapping[str, Input], with_views: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Give each input of a sample by its name, and why inputs are missing; the tensor of one that is missing is NaN.

    with_views: (V, ...), V as many as the input with the most views has; one with fewer repeats its own in turn.
    """
    most = _most_views(inputs)
    tensors, reasons = {}, {}
    for name, spec in inputs.items():
        try:
            plain = input_tensor(spec, content)
        except MissingInput as missing:
            plain, reasons[name] = torch.full(spec.shape, torch.nan), str(missing)
        views = [spec.views[i % len(spec.views)] for i in range(most)]
        tensors[name] = _seen(plain, views) if with_views else plain
    return tensors, reasons


def missing_tensors(inputs: Mapping[str, Input], with_views: bool = False) -> dict[str, Tensor]:
    """Give NaN for each input by its name, as `input_tensors` does where all are missing."""
    views = (_most_views(inputs),) if with_views else ()
    return {name: torch.full((*views, *spec.shape), torch.nan) for name, spec in inputs.items()}


def _most_views(inputs: Mapping[str, Input]) -> int:
    return max((len(spec.views) for spec in inputs.values()), default=1)


def wants_of(inputs: Mapping[str, Input]) -> Wants | None:
    """Give what inputs need of a clip; None when a single image has all of it."""
    tracks = [spec for spec in inputs.values() if isinstance(spec, TrackSpec)]
    sounds = [spec.seconds for spec in inputs.values() if isinstance(spec, SoundSpec)]
    if not tracks and not sounds:
        return None
    return Wants(
        moments=tuple(sorted({0.0, *(moment for spec in tracks for moment in spec.moments)})),
        sound_seconds=max(sounds, default=0.0),
    )


def image_of(inputs: Mapping[str, Input]) -> InputSpec | None:
    """Give how the first input that shows whole faces prepares them; None where none does."""
    specs = (spec.image if isinstance(spec, FramesSpec) else spec for spec in inputs.values())
    return next((spec for spec in specs if isinstance(spec, InputSpec)), None)


def _seen(plain: Tensor, views: Sequence[View]) -> Tensor:
    return torch.stack([plain.flip(-1) if view == "flip" else plain for view in views])


def degraded(sample: Sample, degrade: Degradation, rng: np.random.Generator) -> Sample:
    """Degrade a sample's image and frames, each in the same way; the sound is left as it is.

    Where the image's size changes, it is a crop whose face's place is no longer known.
    """
    before = deepcopy(rng)
    image, mask = degrade(sample.image, sample.mask, rng)
    frames = sample.frames and [degrade(frame, None, deepcopy(before))[0] for frame in sample.frames]
    is_same_size = image.shape == sample.image.shape
    face = sample.face and _moved(sample.face, sample.image, degrade, before) if is_same_size else None
    return replace(sample, image=image, mask=mask, frames=frames, face=face)


def _moved(face: Place, image: np.ndarray, degrade: Degradation, rng: np.random.Generator) -> Place:
    """Give where a face lies in the degraded image: its box goes the way of a mask."""
    box = FaceBox(x=face[0], y=face[1], width=face[2], height=face[3], score=1.0)
    inside = box.clipped(*image.shape[:2])
    assert inside is not None, "a crop shows its face"
    mask = np.zeros(image.shape[:2], np.uint8)
    mask[inside.y : inside.y + inside.height, inside.x : inside.x + inside.width] = 1
    _, moved = degrade(image, mask, rng)
    assert moved is not None
    rows, columns = (np.flatnonzero(moved.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)


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
    if spec.interpolation == "unfiltered":
        resized = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    else:
        resized = np.array(Image.fromarray(image).resize((new_width, new_height), _RESAMPLING[spec.interpolation]))
    top, left = (new_height - spec.size) // 2, (new_width - spec.size) // 2
    return resized[top : top + spec.size, left : left + spec.size]


class DetectionDataset(Dataset[dict[str, Any]]):
    """What a detector's forward reads: its inputs by name, `labels` and the record's `index`.

    targets: the class of each record, as the detector numbers them, which `labels` are; None = 0 real, 1 fake.

    A fake whose tag `untouched` is that of a real record here shares its generator, and so what is done to both is the
    same. taught: tags that are given too, each as the number of its value among those listed, -1 for any other.

    Each input has its spec's shape, or (V, ...) with `with_views`. mask_grid: also give `masks` (grid, grid), the
    forged part of each cell of the image, -1 where it is unknown. An item is an index (epoch 0), or (epoch, index) as
    `EpochSampler` yields it; equal items are equal tensors on any worker. Raises ValueError when labels are unknown.

    lacking: says of the reasons of missing inputs why an item cannot be used, as `Detector.lacking` does; a clip that
    cannot be decoded never can. Of a clip another window is then drawn, at last the middle one; when that cannot be
    used either (`why_unusable`) it raises ValueError. With `with_reasons` nothing is drawn again: the item has that
    sentence, often empty, as `lacks`, and inputs that are missing are NaN.
    """

    def __init__(
        self,
        source: Source,
        records: Sequence[Record],
        inputs: Mapping[str, Input],
        degrade: Degradation | None = None,
        seed: int = 0,
        with_views: bool = False,
        mask_grid: int | None = None,
        taught: Mapping[str, Sequence[str]] | None = None,
        targets: Sequence[int] | None = None,
        lacking: Callable[[Mapping[str, str]], str] = all_reasons,
        with_reasons: bool = False,
    ) -> None:
        unknown = [r.id for r in records if r.label is None]
        if unknown:
            raise ValueError(f"{len(unknown)} of {len(records)} records have no label (first: {unknown[0]}); add it.")
        self.taught = dict(taught or {})
        reserved = {"labels", "index", "masks", "lacks", *self.taught} & inputs.keys()
        if reserved:
            raise ValueError(f"inputs: the name {sorted(reserved)[0]!r} is taken by the data set; rename the input.")
        self.source, self.records, self.inputs = source, tuple(records), dict(inputs)
        self.degrade, self.seed, self.with_views, self.mask_grid = degrade, seed, with_views, mask_grid
        self.targets = [int(r.label or REAL) for r in records] if targets is None else list(targets)
        self.lacking, self.with_reasons = lacking, with_reasons
        self._origins = _origins(records)
        wants = wants_of(inputs)
        self._load = source.load if wants is None else partial(source.load, wants=wants)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = item if isinstance(item, tuple) else (0, item)
        rng = item_rng(self.seed, epoch, self._origins[index])
        for draw in range(1 if self.with_reasons else DRAWS + 1):
            tensors, told, why = self._read(index, None if draw == DRAWS else rng, rng)
            if not why:
                break
        if why and not self.with_reasons:
            raise ValueError(f"{self.records[index].id!r} cannot be used: {why}; leave such records out.")
        others = {"lacks": why} if self.with_reasons else {}
        return {**tensors, **told, **others, "labels": torch.tensor(self.targets[index]), "index": torch.tensor(index)}

    def why_unusable(self, index: int) -> str:
        """Say why a record cannot be used in any epoch; empty when it can."""
        return self._read(index, None)[-1]

    def _read(
        self, index: int, rng: np.random.Generator | None, noise: np.random.Generator | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
        """Give a record's inputs and what is told beside them, and why they cannot be used.

        noise: degrades it; None = nothing does.
        """
        try:
            sample = self._load(self.records[index], rng)
        except UnreadableVideo as error:
            return missing_tensors(self.inputs, self.with_views), self._told(None, {}), error.reason
        if self.degrade is not None and noise is not None:
            sample = degraded(sample, self.degrade, noise)
        tensors, reasons = input_tensors(sample, self.inputs, self.with_views)
        told = self._told(sample.mask, sample.record.tags)
        return tensors, told, self.lacking(reasons) if reasons else ""

    def _told(self, mask: np.ndarray | None, tags: Mapping[str, str]) -> dict[str, Tensor]:
        """Give the mask's cells and the numbers of the tags' values, as far as they are asked for."""
        told = {} if self.mask_grid is None else {"masks": self._cells(mask, self.mask_grid)}
        for name, values in self.taught.items():
            number = values.index(tags[name]) if tags.get(name) in values else UNKNOWN_TAG
            told[name] = torch.tensor(number)
        return told

    def _cells(self, mask: np.ndarray | None, grid: int) -> Tensor:
        spec = next((spec for spec in self.inputs.values() if isinstance(spec, InputSpec)), None)
        if mask is None or spec is None:
            return torch.full((grid, grid), UNKNOWN_CELL)
        return mask_cells(mask, spec, grid)


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


def _origins(records: Sequence[Record]) -> list[int]:
    """Give the number of each record, but to a fake that of the real record that it was made from, where it is here."""
    reals = {r.tags["untouched"]: i for i, r in enumerate(records) if r.label == REAL and r.tags.get("untouched")}
    return [reals.get(r.tags.get("untouched", ""), i) for i, r in enumerate(records)]


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
