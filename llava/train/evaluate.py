"""Score a split with a detector, or several sets with several; the threshold comes from validation only.

`m2f2 evaluate`, which `stage_1_inference.sh` starts.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llava.core.config import build, setting, to_dict
from llava.core.runtime import Incomplete, atomic_path, pick_device, write_json, write_run
from llava.core.terminal import aligned, progress, text_of
from llava.core.types import Record
from llava.data.sources import DataConfig, Source, split_of
from llava.data.splits import require_both_classes, shared_groups
from llava.detectors.base import Detector, load
from llava.detectors.published import ready_detector
from llava.evaluation.metrics import LEVELS, TRIM, auc_interval, detection_report
from llava.evaluation.pictures import draw_class_confusion, draw_matrix, draw_robustness, draw_roc
from llava.evaluation.predictions import Predictions, by_video, write_csv, write_videos_csv
from llava.evaluation.published_csv import published_ids, write_published
from llava.evaluation.robustness import robustness_report
from llava.evaluation.tables import matrix_markdown, matrix_table, multiclass_lines
from llava.ops.degrade import Change, every_change
from llava.train.forging import ForgingConfig
from llava.train.recipe import PhaseConfig, data_name, forging_source
from llava.train.scoring import changed, kept_scores, measured, score, scored_records
from llava.train.stage_1 import describe_level

log = logging.getLogger(__name__)


def degraded_scores(score_degraded: Callable[..., Predictions]) -> dict[Change, np.ndarray]:
    """Give the raw p_fake (N,) after each change; noise is a function of (seed, index).

    score_degraded: `score` of everything but `degrade`.
    """
    return {
        change: score_degraded(degrade=partial(changed, change)).p_fake
        for change in progress(every_change(), "degrading")
    }


def write_robustness(
    folder: Path,
    detector: Detector,
    predictions: Predictions,
    degraded: dict[Change, np.ndarray],
    n_boot: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Write robustness.json and robustness.png into `folder` and give the report.

    Raises ValueError where a change takes away what the detector reads: a face may get too small for it.
    """
    for change, p_fake in degraded.items():
        if len(p_fake) != len(predictions):
            raise ValueError(f"robustness: {change} leaves {len(p_fake)} of {len(predictions)} images to be scored.")
    calibration = detector.calibration
    by = f"threshold {detector.decision.threshold:.3f}, not calibrated" if calibration is None else str(calibration)
    report = {"verdicts": by, **robustness_report(predictions, degraded, detector.labels, n_boot, seed)}
    write_json(folder / "robustness.json", report)
    draw_robustness(folder / "robustness.png", report)
    return report


def rule_lines(report: dict[str, Any]) -> list[str]:
    """Give a table of the flip rates over all strengths of each degradation, and what the stability rule does."""
    rows = [["verdicts by " + report["verdicts"], "REAL <-> FAKE", "after the rule", "any other verdict"]]
    for kind, numbers in report["degradations"].items():
        mild, strong = numbers["points"][0]["strength"], numbers["points"][-1]["strength"]
        rates = (_share_text(numbers["any"][name]) for name in ("flips_before", "flips_after", "differs"))
        rows.append([f"{kind} {mild:g} to {strong:g} ({numbers['unit']})", *rates])
    rule = report["rule"]
    return [
        *aligned(rows),
        f"the rule makes UNCERTAIN {_share_text(rule['become_uncertain'])} clear verdicts; right of the clear ones: "
        f"{_share_text(rule['right_before'])} before, {_share_text(rule['right_after'])} after",
    ]


def _share_text(share: dict[str, Any]) -> str:
    if share["value"] is None:
        return "none to look at"
    value, low, high = (100 * share[name] for name in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}] of {share['images']}"


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """Which records a detector is asked about, and how."""

    data: DataConfig | None = setting(None, "where images come from (default: what the detector was trained on)")
    forge: ForgingConfig | None = setting(
        None,
        "forge fakes in memory, of the data's real faces (default: as in its training, on the data of its training)",
    )
    split: str = setting("test", "split to look at; all = every image")
    batch_size: int = setting(32, "images per batch")
    workers: int = setting(0, "processes that prepare images; 0 = none beside the scoring")
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "where it runs")
    seed: int = setting(0, "seed of the bootstrap and of all noise")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(SplitConfig):
    """What is scored with which detector, and where the results go."""

    model: str = setting(
        "checkpoints/stage_1/m2f2_tiny", "folder, name in checkpoints/ or hub id of a trained detector"
    )
    models: tuple[str, ...] = setting(
        (),
        "detectors, each to be tested on each of `sets`: a matrix of AUC (default: that of --model)",
        positional=True,
    )
    sets: dict[str, DataConfig] = setting(
        {}, "sets by name, each with settings as --data has: --sets.NAME.path FOLDER, --sets.NAME.source csv"
    )
    output_dir: str = setting("outputs/stage_1", "folder of predictions.csv, videos.csv, report.json and roc.png")
    trim: float = setting(TRIM, "part of a video's frames dropped at each end for the trimmed mean")
    published: bool = setting(
        False, "write published.csv too, of FaceForensics++: image_id, ground_truth (1 = real), prediction (P(real))"
    )
    resamples: int = setting(2000, "bootstrap resamples behind each interval")
    robustness: bool = setting(
        False, "score JPEG, resized, cropped, blurred and noisy copies too, 30 times the work: robustness.json and .png"
    )


def evaluate(config: ScoreConfig) -> str | Iterator[str]:
    """Score a split and give what was found in a few lines; several detectors, or sets, give a matrix."""
    if len(config.models) > 1 or config.sets:
        return _matrix_pieces(config)
    config = replace(config, model=config.models[0], models=()) if config.models else config
    return "\n".join(_lines(score_split(config), Path(config.output_dir)))


def _matrix_pieces(config: ScoreConfig) -> Iterator[str]:
    report = score_matrix(config)
    yield text_of(matrix_table(report))
    missing = [cell for cell in report["cells"] if "problem" in cell]
    for cell in missing:
        yield f"{cell['model']} on {cell['set']}: {cell['problem']}\n"
    yield f"matrix.json, matrix.csv, matrix.md, matrix.png and all scores are in {config.output_dir}\n"
    if missing:
        raise Incomplete(f"{len(missing)} of {len(report['cells'])} cells have no score.")


def score_matrix(config: ScoreConfig) -> dict[str, Any]:
    """Test each detector on each set, write matrix.json, .csv, .md and .png into `config.output_dir`; gives the report.

    Scores are kept in its folder scores/. A cell without scores has a `problem` instead. Raises ValueError or
    FileNotFoundError before anything is scored for a model, or a set, that cannot be opened.
    """
    if config.robustness or config.published:
        raise ValueError("robustness and published are for one detector on one set; leave them out, or ask one by one.")
    folders = {title: ready_detector(name) for title, name in short_names(config.models or (config.model,)).items()}
    sets = sets_of(config)
    output = Path(config.output_dir)
    write_run(output, to_dict(config), config.seed)
    about, cells = {}, []
    for name, folder in folders.items():
        detector = load(folder)
        about[name] = {"detector": detector.name, "trained_on": _training_data(detector, folder)}
        for title, (source, records) in progress(list(sets.items()), name):
            cells.append({"model": name, "set": title, **_cell(config, detector, title, source, records)})
    sizes = {name: {"images": len(r), "groups": len({x.group for x in r})} for name, (_, r) in sets.items()}
    report = {"split": config.split, "models": about, "sets": sizes, "cells": cells}
    write_json(output / "matrix.json", report)
    write_matrix_csv(output / "matrix.csv", report)
    with atomic_path(output / "matrix.md") as staged:
        staged.write_text(matrix_markdown(report), encoding="utf-8")
    draw_matrix(output / "matrix.png", report)
    return report


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Give each of some paths by as few of its last parts as tell them apart. Raises ValueError for one given twice."""
    if len(set(paths)) < len(paths):
        raise ValueError(f"models: {', '.join(paths)}: one is named twice; name each once.")
    parts = [Path(path).parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return dict(zip(names, paths, strict=True))
    return {path: path for path in paths}


def sets_of(config: ScoreConfig) -> dict[str, tuple[Source, list[Record]]]:
    """Open the sets of a matrix, and give the records of the split of each. Raises ValueError or FileNotFoundError."""
    named = config.sets or ({} if config.data is None else {data_name(config.data): config.data})
    if not named:
        raise ValueError("Say what the detectors are tested on: --sets.NAME.path FOLDER, or a recipe with `sets`.")
    return {name: split_to_score(replace(config, data=data), Path()) for name, data in named.items()}


def _training_data(detector: Detector, folder: Path) -> str:
    """Name what a detector was trained on, and say so where its groups are not known: no leak can be seen then."""
    data = training_of(folder).data
    name = "unknown" if data is None else data_name(data)
    return name if detector.trained_on else f"{name} (groups unknown)"


def _cell(
    config: ScoreConfig, detector: Detector, title: str, source: Source, records: Sequence[Record]
) -> dict[str, Any]:
    """Give the AUC of frames and videos, and how many of the groups the detector was trained on; or the problem."""
    data = config.sets.get(title, config.data)
    forge = None if config.forge is None else to_dict(config.forge)
    described = [(r.id, r.label, r.video, r.group, r.class_name) for r in records]
    depends = [detector.fingerprint(), to_dict(detector.config), to_dict(data), forge, described]
    digest = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "_", title)
    path = Path(config.output_dir) / "scores" / f"{name}_{digest}.csv"
    device = pick_device(config.device)
    try:
        make = partial(score, detector, source, records, device, config.batch_size, config.workers)
        predictions = kept_scores(path, records, make)
    except ValueError as error:
        return {"problem": str(error)}
    levels = {"frame": predictions, "video": by_video(predictions)}
    aucs = {
        level: auc_interval(items.labels, items.p_fake, items.groups, config.resamples, config.seed).to_dict()
        for level, items in levels.items()
    }
    shared = shared_groups((r.group for r in records), detector.trained_on)
    return {**aucs, **{f"{name}s": len(items) for name, items in levels.items()}, "shared_groups": len(shared)}


def write_matrix_csv(path: Path, report: Mapping[str, Any]) -> None:
    """Write a row per model and set: sizes, AUC of frames and of videos with bounds, shared groups, the problem."""
    bounds = [f"{level}_{name}" for level in ("frame", "video") for name in ("value", "low", "high")]
    heads = ["model", "trained_on", "set", "frames", "videos", *bounds, "shared_groups", "problem"]
    with atomic_path(path) as staged, staged.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, heads, extrasaction="ignore")
        writer.writeheader()
        for cell in report["cells"]:
            levels = {level: cell[level] for level in ("frame", "video") if level in cell}
            flat = {f"{level}_{name}": value for level, auc in levels.items() for name, value in auc.items()}
            writer.writerow({"trained_on": report["models"][cell["model"]]["trained_on"], **cell, **flat})


def score_split(config: ScoreConfig) -> dict[str, Any]:
    """Write predictions.csv, videos.csv, report.json and roc.png into `config.output_dir` and give the report.

    Of a detector with more than two classes also confusion.png, with `published` also published.csv, with `robustness`
    robustness.json and robustness.png. Raises ValueError or FileNotFoundError.
    """
    folder = ready_detector(config.model)
    source, records = split_to_score(config, folder)
    if config.published:
        published_ids(records)  # what has none is refused before anything is scored
    detector = load(folder)
    output = Path(config.output_dir)
    write_run(output, asdict(config), config.seed)
    device, batches = pick_device(config.device), (config.batch_size, config.workers)
    predictions = score(detector, source, records, device, *batches)
    report = {
        "model": config.model,
        "detector": detector.name,
        "decision": asdict(detector.decision),
        "scope": detector.scope,
        "split": config.split,
        **detection_report(predictions, detector.decision.threshold, config.resamples, config.seed, config.trim),
        "calibration": measured(detector.calibration, predictions, config.resamples),
    }
    write_csv(output / "predictions.csv", predictions)
    write_videos_csv(output / "videos.csv", predictions, config.trim)
    if config.published:
        write_published(output / "published.csv", predictions)
    write_json(output / "report.json", report)
    draw_roc(output / "roc.png", predictions, config.resamples, config.seed, threshold=detector.decision.threshold)
    if "multiclass" in report:
        draw_class_confusion(output / "confusion.png", report)
    if config.robustness:
        kept = scored_records(records, predictions)
        degraded = degraded_scores(partial(score, detector, source, kept, device, *batches, seed=config.seed))
        settings = (config.resamples, config.seed)
        report["robustness"] = write_robustness(output, detector, predictions, degraded, *settings)
    return report


def split_to_score(config: SplitConfig, folder: Path) -> tuple[Source, list[Record]]:
    """Open the data that a detector, in `folder`, is to be asked about, and give the records of the split.

    Without data of one's own: those that it was trained on, with fakes forged in memory where it was trained on such.
    Raises ValueError or FileNotFoundError.
    """
    data, forge = config.data, config.forge
    if data is None:
        data, forge = data_of_training(folder), forge or training_of(folder).forge
    split = {"train": data.train, "val": data.val, "test": data.test}.get(config.split, config.split)
    source = forging_source(data, forge, split)
    records = split_of(source, split)
    require_both_classes(records, f"Split {config.split!r} of {data.path!r}")
    return source, records


def data_of_training(folder: Path) -> DataConfig:
    """Give the data settings of the last phase that trained the detector. Raises ValueError when unknown."""
    data = training_of(folder).data
    if data is None:
        raise ValueError(f"{str(folder)!r} does not say what it was trained on; give --data.path FOLDER_OR_CSV.")
    return data


def training_of(folder: Path) -> PhaseConfig:
    """Give `data` and `forge` of the last phase that trained the detector, as far as its run.json says; no others."""
    record = folder / "run.json"
    recipe = json.loads(record.read_text(encoding="utf-8")).get("config", {}) if record.is_file() else {}
    phases = recipe.get("phases", [])
    trained = [phase for phase in phases if phase.get("kind", recipe.get("kind")) != "fit"] or phases
    shared, last = (
        {name: settings[name] for name in ("data", "forge") if name in settings}
        for settings in (recipe, (trained or [{}])[-1])
    )
    return build(PhaseConfig, last, base=build(PhaseConfig, shared))


def _lines(report: dict[str, Any], output: Path) -> Iterator[str]:
    """Yield the main numbers of a report, and where the rest of it is."""
    for level in LEVELS:
        yield describe_level(f"{report['split']} {level}", report[level])
    for name, numbers in report["classes"].items():
        auc, recall = (numbers["frame"][metric]["value"] for metric in ("auc", "recall"))
        yield f"{name}: AUC {auc:.3f}, recall {recall:.3f}"
    yield from multiclass_lines(report)
    decision = report["decision"]
    yield f"threshold {decision['threshold']:.3f}, chosen on {decision['chosen_on']}"
    if report["scope"]:
        yield f"scope: {report['scope']}"
    if decision["chosen_on"] == "default":
        log.warning("no threshold was chosen on validation: 0.5 is only a convention")
    files = ["predictions.csv", "videos.csv", "report.json", "roc.png"]
    if "multiclass" in report:
        files.append("confusion.png")
    if (output / "published.csv").is_file():
        files.append("published.csv")
    if "robustness" in report:
        yield from rule_lines(report["robustness"])
        files += ["robustness.json", "robustness.png"]
    yield f"{', '.join(files)} are in {output}"
