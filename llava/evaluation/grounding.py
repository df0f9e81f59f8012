"""Do words, maps and scores point at what was edited? Named regions, the pointing game, counterfactual edits.

Zhang et al. 2016, Top-down Neural Attention by Excitation Backprop. Different here: a map has few cells, so a hit is
not all or nothing within 15 pixels but the part of the highest cell that the mask covers. A cell picked at random then
hits by exactly the mean mask area.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image

from llava.core.types import LABEL_NAMES, REAL, REGIONS
from llava.data.answer_texts import SIGNS
from llava.data.sources import DataConfig
from llava.data.stills import CsvSource
from llava.evaluation.blind import Lookup, TrainingPair, template_answers
from llava.evaluation.captions import CaptionItem, question_type, read_jsonl
from llava.evaluation.statistics import group_bootstraps, wilson
from llava.evaluation.swap import swap_gap
from llava.evaluation.text import parse_verdict

NONE, SEVERAL = "none", "several"
_WORDS = re.compile(r"\b(?:(eye)s?|(?:eye)?(brow)s?|(nose)|(mouth)|(skin))\b", re.I)
_REGION_OF = {"eye": "eyes", "brow": "eyebrows", "nose": "nose", "mouth": "mouth", "skin": "skin"}
_UNTOUCHED = re.compile(r"[^.,;]*\bno signs?\b[^.,;]*", re.I)
_SIGNS = {name: re.compile(rf"\b{re.escape(sign.removeprefix('a '))}\b", re.I) for name, sign in SIGNS.items()}
RIVALS = ("chance", "centre", "other")
EDITS = {"blur": "blurred", "restore": "restored"}
_FIELDS = ("p_fake", "p_fake_named", "p_fake_random")


@dataclass(frozen=True)
class Naming:
    """One thing that words can name: the field of the truth, its values, and how it is read from a text."""

    field: Literal["region", "artefact"]
    names: tuple[str, ...]
    read: Callable[[str], str]


def named_region(text: str) -> str:
    """Give the one region a text names by whole words, `none`, or `several`; eye(s) and (eye)brow(s) count alike.

    A text that calls the image real names none, and a region that shows `no signs` of something is not named.
    """
    return _only({_REGION_OF[word.lower()] for found in _WORDS.findall(_claims(text)) for word in found if word})


def named_artefact(text: str) -> str:
    """Give the one artefact a text names in the words of `forgery_text.SIGNS`, `none`, or `several`; see above."""
    return _only({name for name, sign in _SIGNS.items() if sign.search(_claims(text))})


def _claims(text: str) -> str:
    return "" if parse_verdict(text) == REAL else _UNTOUCHED.sub("", text)


def _only(named: set[str]) -> str:
    return named.pop() if len(named) == 1 else SEVERAL if named else NONE


REGION = Naming("region", REGIONS, named_region)
ARTEFACT = Naming("artefact", tuple(SIGNS), named_artefact)


def asks_whole(item: CaptionItem) -> bool:
    """Tell whether the question is about the whole image, so that it leaves open which region is named."""
    return question_type(item.question) == "image"


def naming_report(
    naming: Naming, items: Sequence[CaptionItem], training: Sequence[TrainingPair], n_boot: int = 2000, seed: int = 0
) -> dict[str, Any] | None:
    """Give how often answers name what was edited, against blind baselines and under image swap; None without truth.

    Items: whole-image questions about images whose truth has the field. An answer that names none or several is wrong.
    `accuracy`: Wilson. `chance`: one of the values that occur, picked at random. `guess`: the one of them that
    training answers to the question name most often (ties: first in the alphabet). `template`: what the blind template
    names. `gain`: accuracy minus each of these, paired group bootstrap. `swap`: see `swap_gap`. `confusion`: {true:
    {named: count}}; `elsewhere`: {label: {named: count}} of the images whose truth lacks the field. Raises ValueError.
    """
    asked = [item for item in items if asks_whole(item)]
    own = [item for item in asked if _truth(naming, item) is not None]
    if not own:
        return None
    truths, said = [_truth(naming, item) for item in own], [naming.read(item.answer) for item in own]
    names = [name for name in naming.names if name in truths]
    baselines = {
        "guess": _guesses(naming, names, own, training),
        "template": [naming.read(answer) for answer in template_answers(own, training, "kind")],
    }
    right = _equal(said, truths)
    rivals = np.stack([np.full(len(own), 1 / len(names)), *(_equal(b, truths) for b in baselines.values())])
    gaps = group_bootstraps([i.group for i in own], lambda w: (right - rivals) @ w / w.sum(), n_boot, seed)
    return {
        "n": len(own),
        "named": {"one": sum(s in naming.names for s in said), NONE: said.count(NONE), SEVERAL: said.count(SEVERAL)},
        "accuracy": wilson(int(right.sum()), len(own)).to_dict(),
        "chance": {"of": len(names), "value": 1 / len(names)},
        **{
            name: {"names": sorted(set(answers)), "accuracy": wilson(int(hits.sum()), len(own)).to_dict()}
            for (name, answers), hits in zip(baselines.items(), rivals[1:], strict=True)
        },
        "gain": {name: gap.to_dict() for name, gap in zip(("chance", *baselines), gaps, strict=True)},
        "swap": swap_gap(own, _pairs(naming), lambda sums, n: sums / n, ("accuracy",), n_boot, seed),
        "confusion": {
            name: dict(Counter(s for s, true in zip(said, truths, strict=True) if true == name)) for name in names
        },
        "elsewhere": _elsewhere(naming, asked),
    }


def _truth(naming: Naming, item: CaptionItem) -> str | None:
    value = item.region if naming.field == "region" else item.artefact
    if value is not None and value not in naming.names:
        allowed = ", ".join(naming.names)
        raise ValueError(f"Truth {item.key!r}: {naming.field} {value!r} is unknown; allowed: {allowed}.")
    return value


def _equal(named: Sequence[str], truths: Sequence[str | None]) -> np.ndarray:
    return np.array([name == true for name, true in zip(named, truths, strict=True)], dtype=float)


def _guesses(
    naming: Naming, names: Sequence[str], items: Sequence[CaptionItem], training: Sequence[TrainingPair]
) -> list[str]:
    named = [(pair.question, naming.read(pair.answer)) for pair in training]
    seen = [(question, name) for question, name in named if name in names]
    if not seen:
        return [NONE] * len(items)
    lookup = Lookup(seen)
    return [lookup.most_frequent(item.question, "question") for item in items]


def _pairs(naming: Naming) -> Callable[[Sequence[CaptionItem]], np.ndarray]:
    """Give the function whose value (n, n, 1) says: does the answer of item i name the truth of item j?"""

    def table(items: Sequence[CaptionItem]) -> np.ndarray:
        said = np.array([naming.read(item.answer) for item in items])
        true = np.array([str(_truth(naming, item)) for item in items])
        return (said[:, None] == true)[:, :, None].astype(float)

    return table


def _elsewhere(naming: Naming, asked: Sequence[CaptionItem]) -> dict[str, dict[str, int]]:
    others = [item for item in asked if item.label is not None and _truth(naming, item) is None]
    counts = {
        name: dict(Counter(naming.read(item.answer) for item in others if item.label == label))
        for label, name in enumerate(LABEL_NAMES)
    }
    return {name: said for name, said in counts.items() if said}


@dataclass(frozen=True)
class Pointing:
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

    images: tuple[Pointing, ...]
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
        images.append(Pointing(records[name].group, tags["region"], highest(evidence), covered.ravel()))
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


def _scores(images: Sequence[Pointing], case: PointingCase, n_boot: int, seed: int) -> dict[str, Any]:
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


@dataclass(frozen=True)
class EditEffect:
    """One answer: p_fake of the image as it is, with the named region edited, and with each random region edited."""

    item: CaptionItem
    named: str
    p_fake: float
    p_fake_named: float
    p_fake_random: tuple[float, ...]


@dataclass(frozen=True)
class CounterfactualCase:
    """How regions were edited, the answers that name one, and how many answers were left out by reason."""

    edit: str
    answers: tuple[EditEffect, ...]
    left_out: Mapping[str, int]


def read_counterfactual(path: str | Path, items: Sequence[CaptionItem]) -> CounterfactualCase:
    """Read the file of `m2f2 counterfactual`: one json {key, left_out} or {key, edit, named, p_fake, ...} per line.

    Raises ValueError naming the line for a row of another kind, a key that is unknown or given twice, and scores
    outside [0, 1], and when the rows differ in their edit or in how many random regions they have.
    """
    known = {item.key: item for item in items}
    answers: dict[str, EditEffect | None] = {}
    left_out: Counter[str] = Counter()
    edits: set[str] = set()
    for where, row in read_jsonl(path):
        key = row.get("key")
        if key not in known or key in answers:
            raise ValueError(f"{where}: key {key!r} is {'given twice' if key in answers else 'no key of the truth'}.")
        if "left_out" in row:
            left_out[str(row["left_out"])] += 1
            answers[key] = None
        else:
            answers[key] = _edited(row, known[key], where)
            edits.add(row["edit"])
    read = tuple(answer for answer in answers.values() if answer is not None)
    if len({len(answer.p_fake_random) for answer in read}) > 1 or len(edits) > 1:
        raise ValueError(f"{str(path)!r}: rows differ in edit or number of random regions; write the file in one run.")
    return CounterfactualCase("".join(edits), read, dict(left_out))


def counterfactual_report(case: CounterfactualCase, n_boot: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Give how far p_fake falls when the named region is edited, and when random ones are, with paired difference.

    `drop`: p_fake of the image minus that of the edited one; `random` is the mean over the random regions of an image.
    `rank`: part of the random regions that lower p_fake less than the named one does, ties half; 0.5 by chance.
    `by_truth`: the difference where the text names the edited region (`right`), and where it names another one of a
    locally edited image (`wrong`). 95 % group bootstrap.
    """
    report: dict[str, Any] = {"edit": case.edit, "n": len(case.answers), "left_out": dict(case.left_out)}
    if not case.answers:
        return report
    return report | {
        "random_regions": len(case.answers[0].p_fake_random),
        **_drops(case.answers, n_boot, seed),
        "by_truth": {
            name: {"n": len(part), "difference": _drops(part, n_boot, seed)["drop"]["difference"]}
            for name, is_right in (("right", True), ("wrong", False))
            if (part := [a for a in case.answers if a.item.region and (a.named == a.item.region) == is_right])
        },
    }


def _drops(answers: Sequence[EditEffect], n_boot: int, seed: int) -> dict[str, Any]:
    p_fake, named = (np.array([getattr(a, field) for a in answers]) for field in _FIELDS[:2])
    random = np.array([a.p_fake_random for a in answers])  # (n, random regions)
    rank = ((random > named[:, None]) + 0.5 * (random == named[:, None])).mean(axis=1)
    rows = np.stack([p_fake - named, p_fake - random.mean(axis=1), random.mean(axis=1) - named, rank])
    groups = [a.item.group for a in answers]
    *drops, ranked = group_bootstraps(groups, lambda w: rows @ w / w.sum(), n_boot, seed)
    names = ("named", "random", "difference")
    return {"drop": {n: d.to_dict() for n, d in zip(names, drops, strict=True)}, "rank": ranked.to_dict()}


def _edited(row: Mapping[str, Any], item: CaptionItem, where: str) -> EditEffect:
    is_known = row.get("edit") in EDITS and row.get("named") in REGIONS
    if not is_known or not all(name in row for name in _FIELDS) or not row["p_fake_random"]:
        raise ValueError(
            f"{where}: expected `edit`, a region `named` and the scores {', '.join(_FIELDS)}, or `left_out`; write the "
            "file with `m2f2 counterfactual`."
        )
    scores = [row["p_fake"], row["p_fake_named"], *row["p_fake_random"]]
    if not all(isinstance(score, (int, float)) and 0 <= score <= 1 for score in scores):
        raise ValueError(f"{where}: scores must lie in [0, 1], got {scores}.")
    return EditEffect(item, row["named"], scores[0], scores[1], tuple(scores[2:]))
