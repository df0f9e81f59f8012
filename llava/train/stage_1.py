"""Stage 1: train a detector by a recipe, calibrate it on validation, and say how good it is on test."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from llava.core.config import parse, to_dict
from llava.core.registry import nearest
from llava.core.runtime import other_settings, pick_device, setup_logging, write_json, write_run
from llava.core.types import Decision, Record
from llava.core.weights import CONFIG_NAME, halved, load_strictly, shapes_only
from llava.data.splits import group_hashes
from llava.detectors.base import Detector, create, load, load_uncalibrated
from llava.detectors.fitted import CALIBRATION
from llava.detectors.members import read_trained_on
from llava.detectors.published import ready_detector
from llava.evaluation.metrics import LEVELS, choose_threshold, detection_report
from llava.evaluation.predictions import Predictions, write_csv
from llava.evaluation.tables import multiclass_lines
from llava.ops.degrade import VERSIONS
from llava.train.engine import BEST, train_phase
from llava.train.recipe import (
    Fold,
    PhaseConfig,
    PhaseData,
    Recipe,
    open_data,
    open_phase,
    report_near_duplicates,
    validation_fold,
)
from llava.train.scoring import (
    CollapseError,
    answers_over,
    calibrate,
    changed,
    has_enough_groups,
    measured,
    plain_text,
    probe_answers,
    score,
    with_versions,
)
from llava.train.sizes import SIZES, settled

log = logging.getLogger("llava.train.stage_1")  # run with -m, __name__ is another
DEFAULT_RECIPE = Path(__file__).resolve().parents[2] / "scripts" / "configs" / "stage_1" / "m2f2.yaml"
RESULTS = "metrics.json"
FIT_FIRST = "add a phase `kind: fit` to the recipe (docs/training.md)."
IMBALANCE = 2.0  # a class with so many times the records of another is warned about
# Settings that may differ between an interrupted run and the one that goes on with it.
FREE_TO_CHANGE = ("resume", "output_dir", "workers", "near_duplicates", "resamples")


def main(argv: Sequence[str] | None = None) -> int:
    """Train by `--config RECIPE` and flags; gives 0, or 1 after a collapse, or 2 for a mistake in what was asked.

    `--debug` shows where an error came from.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in words
    setup_logging(is_debug)
    recipe = parse(
        Recipe,
        [word for word in words if word != "--debug"],
        "Train a detector (stage 1).",
        DEFAULT_RECIPE,
        prog="stage_1_train.sh",
    )
    try:
        train(recipe)
    except CollapseError as error:
        log.error("%s", error)
        return 1
    except (ValueError, FileNotFoundError) as error:
        log.error("%s", error, exc_info=is_debug)
        return 2
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def train(recipe: Recipe) -> dict[str, Any]:
    """Run all phases, write detector and numbers into `recipe.output_dir`, and give the numbers.

    Raises ValueError, FileNotFoundError or CollapseError.
    """
    recipe.require_data()
    phases = recipe.phase_list()
    data = [open_phase(phase) for phase in phases]
    last, splits = last_training(phases, data)
    folder = Path(recipe.output_dir)
    finished = prepare_folder(recipe, folder)
    if finished is not None:
        return finished
    with shapes_only():
        detector = create(recipe.detector, recipe.model)
    for each in data:
        if each is not splits:
            class_counts(detector, each)
    counts = class_counts(detector, splits)
    check_phases(detector, recipe, data, validation_fold(last, splits), splits.test)
    started = time.monotonic()
    duplicates = report_near_duplicates(splits) if recipe.near_duplicates else None
    if _is_main():
        write_run(folder, to_dict(recipe), recipe.seed)
    phases = settled(recipe, phases, data, folder) if recipe.goes_by_machine else phases
    last = last_training(phases, data)[0]
    previous = None
    for i, (phase, phase_data) in enumerate(zip(phases, data, strict=True)):
        previous = _run_phase(recipe, phase, phase_data, folder / "phases" / str(i), previous)
    assert previous is not None
    detector = load(previous, expected=recipe.detector)
    if recipe.round_to_half:
        load_strictly(detector, halved(detector.state_dict()), "the rounded weights")
    results = finish(detector, recipe, last, splits, folder)
    minutes = round((time.monotonic() - started) / 60, 2)
    results |= {"targets": counts, "near_duplicates": duplicates, "minutes": minutes}
    if _is_main():
        write_json(folder / RESULTS, results)
    log_results(results, folder)
    return results


def last_training(phases: Sequence[PhaseConfig], data: Sequence[PhaseData | Fold]) -> tuple[PhaseConfig, PhaseData]:
    """Give the phase whose data the finished detector is judged by, and these: the last that trains, or the last."""
    for phase, each in zip(reversed(phases), reversed(data), strict=True):
        if isinstance(each, PhaseData):
            return phase, each
    assert phases[-1].data is not None
    return phases[-1], open_data(phases[-1].data, phases[-1].seed, phases[-1].forge)


def class_counts(detector: Detector, data: PhaseData | Fold) -> dict[str, dict[str, int]]:
    """Count, and log, the records of each split by the class that the detector is to answer.

    Raises ValueError for class names that it does not know, and for a class without a training record.
    """
    counts = {}
    for split, records in data.parts.items():
        found = Counter(map(detector.target, records))
        counts[split] = {name: found[number] for number, name in enumerate(detector.classes)}
        shares = (f"{name} {count} ({count / max(len(records), 1):.1%})" for name, count in counts[split].items())
        log.info("%s: %s", split, ", ".join(shares))
    train = counts.get("training")
    if train is None:
        return counts
    fewest, most = min(train, key=lambda name: train[name]), max(train, key=lambda name: train[name])
    if not train[fewest]:
        raise ValueError(
            f"No training record is {fewest!r}, one of the classes of {detector.name!r}; add some to that split."
        )
    if train[most] >= IMBALANCE * train[fewest]:
        log.warning(
            "of the training records, %d are %s and %d %s: unless that is balanced (--loss.class_balance weights or "
            "sampling), the rare class may never be answered",
            *(train[most], most, train[fewest], fewest),
        )
    return counts


def prepare_folder(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """Clear the folder, or keep an interrupted run of the same recipe; gives the numbers of a finished one.

    Raises ValueError when the folder holds a run with other settings.
    """
    record = folder / "run.json"
    if not recipe.resume or not record.is_file():
        if _is_main():
            shutil.rmtree(folder / "phases", ignore_errors=True)
            for name in (RESULTS, SIZES):
                (folder / name).unlink(missing_ok=True)
        return None
    settings = to_dict(recipe)
    other = other_settings(folder, settings, settings.keys() - set(FREE_TO_CHANGE))
    if other:
        raise ValueError(
            f"{recipe.output_dir!r} holds a run with other settings ({', '.join(sorted(other))}); "
            "give another --output_dir, or --resume false to train afresh there."
        )
    if not (folder / RESULTS).is_file():
        return None
    log.info("%s is trained already by this recipe; --resume false trains it again", folder)
    return json.loads((folder / RESULTS).read_text(encoding="utf-8"))


def start(recipe: Recipe, phase: PhaseConfig, previous: Path | None) -> Detector:
    """Build the detector of a phase: weights of `init_from`, of the phase before, or fresh ones; then freeze parts."""
    set_seed(phase.seed)
    detector = create(recipe.detector, recipe.model)
    origin = ready_detector(phase.init_from) if phase.init_from else previous
    if origin is None:
        detector.load_pretrained()
    else:
        detector.take_over(load_uncalibrated(origin, expected=recipe.detector), str(origin))
    if phase.kind == "train":
        for part in detector.fitted_parts().values():
            part.before_training()
    detector.freeze(phase.freeze)
    detector.own_scope = scope_after(phase, recipe.scope, detector.own_scope)
    return detector


def scope_after(phase: PhaseConfig, said: str, before: str) -> str:
    """Give the scope that holds after a phase: what the recipe says, or, where nothing is trained, what held before."""
    if before and not said and phase.kind == "train":
        log.warning(
            "what is trained here starts from a detector whose scope is %r; it may see other things afterwards, so "
            "nothing is said of them: say it with --scope",
            before,
        )
        return ""
    return said or before


def finish(detector: Detector, recipe: Recipe, phase: PhaseConfig, data: PhaseData, folder: Path) -> dict[str, Any]:
    """Save the detector with threshold and calibration, the last fitted parts, and score validation and test.

    They are fitted on validation, unless the last phase has fitted them on a fold of its own.
    """
    device = pick_device()
    score_val = partial(score, detector, data.source, data.val, device, *phase.sizes)
    scored = {"val": score_val()}
    if not recipe.fits_calibration:
        settle(detector, fitted_on(recipe, scored["val"], score_val), recipe, validation_fold(phase, data))
    if data.test:
        scored["test"] = score(detector, data.source, data.test, device, *phase.sizes)
    if _is_main():
        detector.save(folder)
        for name, predictions in scored.items():
            write_csv(folder / f"{name}.csv", predictions)
    threshold = detector.decision.threshold
    reports = {name: detection_report(p, threshold, recipe.resamples) for name, p in scored.items()}
    return {
        "detector": detector.name,
        "decision": dataclasses.asdict(detector.decision),
        "scope": detector.scope,
        "data": data.summary(),
        "calibration": measured(detector.calibration, scored.get("test"), recipe.resamples),
        "plain_images": probe_answers(detector, device),
        **reports,
    }


def check_phases(
    detector: Detector, recipe: Recipe, data: Sequence[PhaseData | Fold], validation: Fold, test: Sequence[Record]
) -> None:
    """Refuse, before anything is trained, a fit that is missing or could not be trusted.

    data: of each phase; validation, test: by which the finished detector is calibrated and judged. Raises LeakError
    when a fold shares groups with what the detector's members, what it starts from or an earlier phase was trained on,
    or with the test split; ValueError for a part that there is not, and for one that is needed before it is fitted.
    """
    trained_on, tested_on = detector.trained_on, group_hashes(r.group for r in test)
    needed = {name for name, part in detector.fitted_parts().items() if not part.has_default}
    for phase, each in zip(recipe.phase_list(), data, strict=True):
        if phase.init_from:
            trained_on |= read_trained_on(ready_detector(phase.init_from))
            needed = set()  # whether it has them is seen when it is loaded
        if isinstance(each, Fold):
            needed -= set(part_names(detector, phase))
            each.refuse(trained_on, "trained on")
            each.refuse(tested_on, "tested on")
        elif needed:
            raise ValueError(f"Phase {phase.name!r} trains before {', '.join(sorted(needed))} is fitted; {FIT_FIRST}")
        else:
            trained_on |= group_hashes(r.group for r in each.train)
    if needed:
        raise ValueError(f"No phase fits {', '.join(sorted(needed))} of {detector.name!r}; {FIT_FIRST}")
    if not recipe.fits_calibration:
        validation.refuse(trained_on, "trained on")


def part_names(detector: Detector, phase: PhaseConfig) -> list[str]:
    """List the parts that a phase fits, in order. Raises ValueError for one that the detector has not."""
    known = list(detector.fitted_parts())
    wrong = sorted(set(phase.parts) - {*known, CALIBRATION})
    if wrong or not (phase.parts or known):
        problem = f"{wrong[0]!r} is no part of" if wrong else "nothing but its calibration can be fitted of"
        raise ValueError(
            f"parts: {problem} {detector.name!r}. {nearest(wrong[0] if wrong else '', [*known, CALIBRATION])}"
        )
    return [name for name in (*known, CALIBRATION) if name in (phase.parts or known)]


def fit_phase(detector: Detector, phase: PhaseConfig, fold: Fold, recipe: Recipe, folder: Path) -> None:
    """Fit the parts that a phase names, one after another, in place, and write the detector into `folder`.

    Raises LeakError when the detector was trained on groups of the fold.
    """
    fold.refuse(detector.trained_on, "trained on")
    device = pick_device()
    run = (fold.source, fold.records, device, *phase.sizes)
    for name in part_names(detector, phase):
        if name == CALIBRATION:
            score_fold = partial(score, detector, *run)
            settle(detector, fitted_on(recipe, score_fold(), score_fold), recipe, fold)
            continue
        part = detector.fitted_parts()[name]
        look = partial(answers_over, detector, *run, partial(_observed, detector, name))
        versions = VERSIONS.values() if recipe.calibrate_versions else ()
        seen = [look(), *(look(partial(changed, each)) for each in versions)]
        records = [record for kept, _ in seen for record in kept]
        observed = torch.cat([observed for _, (observed,) in seen])
        part.fit(observed, torch.tensor(list(map(detector.target, records))), [record.group for record in records])
        assert part.is_fitted, name
        log.info("%s is fitted on %s, n = %d", name, fold.name, len(records))
    detector.save(folder)


def _observed(detector: Detector, part: str, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
    return (detector.observe(part, inputs),)


def fitted_on(recipe: Recipe, plain: Predictions, score_degraded: Callable[..., Predictions]) -> Predictions:
    """Give what threshold and calibration are fitted on: predictions of a fold, and of its delivered versions if asked.

    score_degraded: `score` of that fold, but for `degrade`.
    """
    return with_versions(plain, score_degraded) if recipe.calibrate_versions else plain


def settle(detector: Detector, predictions: Predictions, recipe: Recipe, fold: Fold) -> None:
    """Choose a detector's threshold on predictions of a fold, and calibrate it where there are enough groups."""
    threshold = choose_threshold(predictions.labels, predictions.p_fake, recipe.threshold_rule)
    chosen_on = f"{fold.title}, {len(predictions)} images, {recipe.threshold_rule}"
    detector.decision = Decision(threshold=threshold, chosen_on=chosen_on)
    config = recipe.calibration
    if config is None or not has_enough_groups(predictions, config):
        detector.calibration = None
        return
    detector.calibration = calibrate(detector, predictions, config, fold.name, fold.config.allow_leaks)


def log_results(results: dict[str, Any], folder: Path) -> None:
    """Log the numbers of validation and test, one line per level."""
    for split in ("val", "test"):
        for level in LEVELS if split in results else ():
            log.info("%s", describe_level(f"{split} {level}", results[split][level]))
        for line in multiclass_lines(results.get(split, {})):
            log.info("%s", line)
    log.info("p_fake of plain images: %s", plain_text(results["plain_images"]))
    decision = results["decision"]
    log.info("threshold %.3f, chosen on %s", decision["threshold"], decision["chosen_on"])
    log.info("%.1f minutes; detector and numbers are in %s", results["minutes"], folder)


def describe_level(title: str, numbers: dict[str, Any]) -> str:
    """Put AUC, AP, EER and accuracy with their intervals into one line."""
    parts = []
    for name in ("auc", "ap", "eer", "accuracy"):
        interval = numbers[name]
        bounds = "" if interval["low"] is None else f" [{interval['low']:.3f}, {interval['high']:.3f}]"
        parts.append(f"{name.upper() if len(name) < 4 else name} {interval['value']:.3f}{bounds}")
    return f"{title.replace('_', ' '):<18} {'  '.join(parts)}  ({numbers['auc']['n']} groups)"


def _run_phase(recipe: Recipe, phase: PhaseConfig, data: PhaseData | Fold, folder: Path, previous: Path | None) -> Path:
    best = folder / BEST
    if (best / CONFIG_NAME).is_file():
        log.info("phase %s is finished already", phase.name or folder.name)
        return best
    detector = start(recipe, phase, previous)
    if isinstance(data, Fold):
        fit_phase(detector, phase, data, recipe, best)
        return best
    trained = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    total = sum(p.numel() for p in detector.parameters())
    log.info(
        "phase %s: %d training, %d validation, %d test images; %s of %s weights are trained",
        phase.name or folder.name,
        *(len(part) for part in (data.train, data.val, data.test)),
        f"{trained:,}",
        f"{total:,}",
    )
    train_phase(detector, phase, data, folder)
    return best


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


if __name__ == "__main__":
    sys.exit(main())
