"""The pointing game: does the maximum of a detector's evidence map lie where the face was edited?

Zhang et al. 2016, Top-down Neural Attention by Excitation Backprop. Different here: a map has few cells, so a hit is
not all or nothing within 15 pixels but the part of the highest cell that the mask covers. A cell picked at random then
hits by exactly the mean mask area.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from llava.core.types import REGIONS
from llava.data.csv_table import CsvSource
from llava.data.sources import DataConfig
from llava.evaluation.statistics import group_bootstraps

RIVALS = ("chance", "centre", "other")


@dataclass(frozen=True)
class Pointed:
    """One edited image: its group, the region, where its map points (h * w,), sum 1, and what the mask covers there.

    covered: (h * w,) in [0, 1], the part of each cell that the mask covers.
    """

    group: str
    region: str
    points: np.ndarray
    covered: np.ndarray


@dataclass(frozen=True)
class PointingCase:
    """The edited images, where the mean of all maps points (h * w,), and how many images were left out and why."""

    images: tuple[Pointed, ...]
    centre: np.ndarray
    left_out: Mapping[str, int]


def read_pointing(maps_path: str | Path, manifest_path: str | Path) -> PointingCase:
    """Pair the maps of `m2f2 maps` with the masks of the manifest.csv that `m2f2 data forge` wrote.

    Raises FileNotFoundError, or ValueError for another kind of file, a map of an image that the manifest lacks, and
    when no image of the maps has a mask.
    """
    ids, maps, seen = _read_maps(maps_path)
    records = {record.id: record for record in CsvSource(DataConfig(source="csv", path=str(manifest_path))).records}
    unknown = next((name for name in ids if name not in records), None)
    if unknown is not None:
        raise ValueError(f"{str(maps_path)!r}: image {unknown!r} is not in {str(manifest_path)!r}; give its manifest.")
    splits = {records[name].split for name in ids}
    left_out: Counter[str] = Counter()
    left_out["without map"] = sum(
        bool(r.tags.get("mask")) and r.id not in set(ids) for r in records.values() if r.split in splits
    )
    images = []
    for name, evidence in zip(ids, maps, strict=True):
        tags = records[name].tags
        if not tags.get("mask"):
            left_out["without mask"] += 1
            continue
        covered = cell_coverage(_read_mask(Path(manifest_path).parent / tags["mask"]), evidence.shape, seen)
        images.append(Pointed(records[name].group, tags["region"], highest(evidence), covered.ravel()))
    if not images:
        raise ValueError(f"No image of {str(maps_path)!r} has a mask in {str(manifest_path)!r}; give forged images.")
    return PointingCase(tuple(images), highest(maps.mean(axis=0)), dict(left_out))


def highest(evidence: np.ndarray) -> np.ndarray:
    """Give where a map (h, w) is highest, as weights (h * w,) of sum 1; equally high cells share them alike."""
    is_highest = (evidence == evidence.max()).ravel()
    return is_highest / is_highest.sum()


def cell_coverage(mask: np.ndarray, grid: tuple[int, ...], seen: float = 1.0) -> np.ndarray:
    """Give the part of each of `grid` (h, w) cells where a mask (H, W) is above 0.

    The map sees the central square whose side is the share `seen` of the shorter side.
    """
    (height, width), side = mask.shape, round(seen * min(mask.shape))
    top, left = (height - side) // 2, (width - side) // 2
    square = (mask[top : top + side, left : left + side] > 0).astype(np.float32)
    if side < max(grid):
        raise ValueError(f"mask: {mask.shape} has fewer pixels than the map {grid} has cells; give larger images.")
    return cv2.resize(square, (grid[1], grid[0]), interpolation=cv2.INTER_AREA)


def pointing_report(case: PointingCase, n_boot: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Give how often the map points into the mask, over locally edited images, and the blind rivals beside it.

    `hit`: the part of the highest cell that the mask covers. `best`: the same of the best cell, what a perfect map of
    that grid reaches. `chance`: a cell at random, the mean mask area. `centre`: the cell where the mean of all maps is
    highest, whatever the image. `other`: the maps of all edited images of other groups, on this mask. `gain`: hit minus
    each of the three. `by_region`: also of whole faces, whose mask is large. All: 95 % group bootstrap.
    """
    local = [image for image in case.images if image.region in REGIONS]
    left_out = {**case.left_out, "edited as a whole": len(case.images) - len(local)}
    return {
        "n": len(local),
        "groups": len({image.group for image in local}),
        "left_out": left_out,
        **(_scores(local, case, n_boot, seed) if local else {}),
        "by_region": {
            region: {"n": len(part), **_scores(part, case, n_boot, seed)}
            for region in sorted({image.region for image in case.images})
            if (part := [image for image in case.images if image.region == region])
        },
    }


def _scores(images: Sequence[Pointed], case: PointingCase, n_boot: int, seed: int) -> dict[str, Any]:
    covered = np.stack([image.covered for image in images])  # (n, cells)
    hits = (np.stack([image.points for image in images]) * covered).sum(axis=1)
    groups = np.array([image.group for image in images])
    others = (np.array([image.group for image in case.images]) != groups[:, None]).astype(float)  # (n, all images)
    with np.errstate(invalid="ignore"):  # a single group has no others: undefined
        points = others @ np.stack([image.points for image in case.images]) / others.sum(axis=1, keepdims=True)
    other = (points * covered).sum(axis=1)
    columns = np.stack([hits, covered.max(axis=1), covered.mean(axis=1), covered @ case.centre, other])
    rows = np.concatenate([columns, columns[0] - columns[2:]])
    intervals = [i.to_dict() for i in group_bootstraps(groups, lambda w: rows @ w / w.sum(), n_boot, seed)]
    scores = dict(zip(("hit", "best", *RIVALS), intervals[: len(columns)], strict=True))
    return scores | {"gain": dict(zip(RIVALS, intervals[len(columns) :], strict=True))}


def _read_maps(path: str | Path) -> tuple[list[str], np.ndarray, float]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"Maps {str(path)!r} do not exist; write them with `m2f2 maps`.")
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, maps, seen = file["ids"].tolist(), file["maps"], float(file["seen"])
    except (KeyError, ValueError, AttributeError):
        raise ValueError(f"{str(path)!r} does not hold `ids`, `maps` and `seen`; write it with `m2f2 maps`.") from None
    if maps.ndim != 3 or len(maps) != len(ids) or not len(ids) or not np.isfinite(maps).all():
        raise ValueError(f"{str(path)!r}: expected one finite map (h, w) for each of the ids; got maps {maps.shape}.")
    return ids, maps, seen


def _read_mask(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"Mask {str(path)!r} does not exist; the manifest names it: keep masks/ beside it.")
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))
