"""`m2f2 maps` and `m2f2 counterfactual`: what a model says of forged images, in files that eval_integrity.py reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llava.core.config import setting, to_dict
from llava.core.runtime import atomic_path, batched, item_rng, write_run
from llava.core.terminal import progress
from llava.core.types import REGIONS, STARTER, Record
from llava.data.sources import DataConfig, split_of
from llava.data.stills import CsvSource
from llava.evaluation.captions import CaptionItem, read_caption_set
from llava.evaluation.grounding import NONE, asks_whole, named_region
from llava.jobs.forged_faces import regions_by_eyes
from llava.ops.face_regions import FACE
from llava.ops.forge import blur_region, random_region
from llava.pipeline.settings import ModelSettings

if TYPE_CHECKING:
    from llava.pipeline.pipeline import Pipeline
    from llava.pipeline.verdict import Finding


@dataclass(frozen=True, kw_only=True)
class ForgedSettings(ModelSettings):
    """Which model is asked about which forged images."""

    manifest: str = setting(help="manifest.csv that `m2f2 data forge` wrote", positional=True)
    model: str = setting(STARTER, "detector or explainer: starter, folder, name in checkpoints/, or hub id")
    split: str = setting("test", "split to look at; all = every image")


@dataclass(frozen=True, kw_only=True)
class MapSettings(ForgedSettings):
    """Where the maps go."""

    output: str = setting("outputs/integrity/maps.npz", "file to write: ids (n,), maps (n, h, w) in [0, 1], seen")


@dataclass(frozen=True, kw_only=True)
class CounterfactualSettings(ForgedSettings):
    """Which answers are tested, and how."""

    predict_path: str = setting(help="answers, one json {key, text} per line, as stage_3_inference_exp.sh writes them")
    gt_path: str = setting(help="the questions, one json {key: {question, answer: [...]}} per line")
    edit: Literal["blur", "restore"] = setting(
        "blur", "what is done to a region: blur it, or restore the pixels of the untouched photo"
    )
    random_regions: int = setting(8, "random regions of the face, of the same area, that are edited for comparison")
    blur: float = setting(4.0, "sigma of the blur, in percent of the image's shorter side")
    seed: int = setting(0, "seed of the random regions")
    output: str = setting("outputs/integrity/counterfactual.jsonl", "file to write, a line per answer")

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be done."""
        if self.random_regions < 1:
            raise ValueError(f"random_regions: {self.random_regions} is not usable; allowed: 1 or more.")
        if not 0 < self.blur <= 50:
            raise ValueError(f"blur: {self.blur} is not usable; allowed: above 0, at most 50 percent.")


def write_maps(settings: MapSettings) -> str:
    """Write the evidence map of every image of a split, and say what was written.

    Raises ValueError for a detector without a map.
    """
    source = _source(settings)
    records = split_of(source, settings.split)
    pipeline = _begin(settings, settings.output, None)
    maps: list[np.ndarray] = []
    for batch in _with_progress(list(batched(records, settings.batch_size))):
        for finding in _look(pipeline, [source.load(record).image for record in batch]):
            if finding.evidence_map is None:
                raise ValueError(f"{settings.model!r}: detector {pipeline.detector.name!r} has no map; give another.")
            maps.append(finding.evidence_map)
            seen = finding.seen
    with atomic_path(settings.output) as staged, staged.open("wb") as file:
        np.savez_compressed(file, ids=np.array([record.id for record in records]), maps=np.stack(maps), seen=seen)
    return f"{len(maps)} maps of {maps[0].shape[0]} x {maps[0].shape[1]} cells are in {settings.output}"


def write_counterfactual(settings: CounterfactualSettings) -> str:
    """Write how p_fake changes when what an answer names is blurred or restored, and when as much elsewhere is.

    A line {key, edit, named, p_fake, p_fake_named, p_fake_random} for each answer to a whole-image question that names
    one region, {key, left_out} for the others. p_fake is the detector's own, before calibration. Raises ValueError for
    an answer about an image that the split lacks, and for a table that does not know untouched photos to restore.
    """
    source = _source(settings)
    by_stem = {Path(record.id).stem: record for record in split_of(source, settings.split)}
    items = [item for item in read_caption_set(settings.predict_path, settings.gt_path).items if asks_whole(item)]
    if not items:
        raise ValueError(f"{settings.gt_path!r} has no question about a whole image; give label_free.jsonl.")
    asked = [(item, _record_of(item, by_stem, settings)) for item in items]
    pipeline = _begin(settings, settings.output, settings.seed)
    rows = []
    for item, record in _with_progress(asked):
        named = named_region(item.answer)
        if named not in REGIONS:
            reason = "names no region" if named == NONE else "names several regions"
            rows.append({"key": item.key, "left_out": reason})
            continue
        scores = [
            finding.verdict.raw_p_fake
            for batch in batched(versions(source, record, named, settings), settings.batch_size)
            for finding in _look(pipeline, batch)
        ]
        found = {"p_fake": scores[0], "p_fake_named": scores[1], "p_fake_random": scores[2:]}
        rows.append({"key": item.key, "edit": settings.edit, "named": named, **found})
    with atomic_path(settings.output) as staged:
        staged.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tested = sum("named" in row for row in rows)
    return f"{tested} of {len(rows)} answers name one region; all are in {settings.output}"


def versions(source: CsvSource, record: Record, named: str, settings: CounterfactualSettings) -> Iterator[np.ndarray]:
    """Yield the image as it is, with the named region edited, then with random regions of the face edited."""
    image, number = source.load(record).image, source.records.index(record)
    regions = regions_by_eyes(image, None)
    region = regions[named] > 0
    face = (regions[FACE] > 0) | region
    untouched = _untouched(source, record) if settings.edit == "restore" else None
    yield image
    for n in range(-1, settings.random_regions):
        if n >= 0:
            region = random_region(face, int(region.sum()), item_rng(settings.seed, n, number))
        if untouched is None:
            yield blur_region(image, region, settings.blur / 100 * min(image.shape[:2]))
        else:
            yield np.where(region[..., None], untouched, image)


def _untouched(source: CsvSource, record: Record) -> np.ndarray:
    """Read the photo that was forged, as it was before; an untouched photo is its own."""
    name = record.tags.get("untouched")
    found = next((each for each in source.records if each.id == name), None)
    if found is None:
        raise ValueError(f"{record.id}: the table does not know its untouched photo ({name!r}); use --edit blur.")
    return source.load(found).image


def _source(settings: ForgedSettings) -> CsvSource:
    return CsvSource(DataConfig(source="csv", path=settings.manifest))


def _record_of(item: CaptionItem, by_stem: dict[str, Record], settings: CounterfactualSettings) -> Record:
    if item.image not in by_stem:
        raise ValueError(
            f"{settings.gt_path!r}: {item.key!r} is about an image that split {settings.split!r} of "
            f"{settings.manifest!r} lacks; give the manifest and split of the questions."
        )
    return by_stem[item.image]


def _begin(settings: ForgedSettings, output: str, seed: int | None) -> Pipeline:
    """Write the record of the run and load the model."""
    from transformers.utils.logging import disable_progress_bar

    from llava.pipeline.pipeline import Pipeline

    write_run(Path(output).with_name(f"{Path(output).stem}_run"), to_dict(settings), seed)
    disable_progress_bar()
    return Pipeline.from_pretrained(
        settings.model,
        settings.device,
        settings.precision,
        settings.quantization,
        batch_size=settings.batch_size,
        words=False,
    )


def _look(pipeline: Pipeline, images: Sequence[np.ndarray]) -> list[Finding]:
    """Judge images whole: a forged image is a face crop already. Raises ValueError where there is no verdict."""
    from llava.pipeline.crops import Face

    found = pipeline.look([Face(image="", pixels=image) for image in images])[0]
    none = next((finding.verdict.reason for finding in found if finding.verdict.p_fake is None), None)
    if none is not None:
        raise ValueError(f"{pipeline.name!r} gives no verdict: {none}; give a model that judges single images.")
    return found


def _with_progress(work: Sequence[Any]) -> Iterable[Any]:
    return progress(work, "looking")
