"""Recipes of detector training: settings, the phases that override them one after another, and a phase's data."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from llava.core.config import build, setting
from llava.core.types import Record, checked_scope
from llava.data.sources import EVERY_SPLIT, DataConfig, Source, open_source, split_of
from llava.data.splits import (
    LeakError,
    check_leaks,
    divide,
    near_duplicates,
    refuse_groups,
    require_both_classes,
    summary,
)
from llava.detectors import DETECTORS
from llava.detectors.fitted import CALIBRATION
from llava.evaluation.calibration import CalibrationConfig
from llava.evaluation.metrics import ThresholdRule
from llava.ops.degrade import DegradeConfig
from llava.train.forging import ForgingConfig, ForgingSource

log = logging.getLogger(__name__)


Best: TypeAlias = Literal["auc", "macro_f1"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights are moved; the defaults are those published for M2F2-Det, with cosine instead of plateau."""

    optimizer: Literal["adam", "adamw"] = setting("adam", "adam adds weight decay to the gradient, adamw to the step")
    lr: float = setting(1e-3, "learning rate; a detector may give some weights their own")
    weight_decay: float = setting(1e-6, "weight decay")
    betas: tuple[float, float] = setting((0.9, 0.999), "Adam's moving averages")
    schedule: Literal["cosine", "plateau", "constant", "one_cycle"] = setting(
        "cosine",
        "cosine to zero, plateau (lowered when validation stalls), constant, or one_cycle: from a 25th of the rate up "
        "to it and down to nothing, Adam's first average the other way (0.95, 0.85, 0.95)",
    )
    warmup: float = setting(0.0, "part of all steps in which the rate rises (not with plateau)")
    plateau_factor: float = setting(0.4, "plateau: what the rate is multiplied by")
    plateau_patience: int = setting(6, "plateau: evaluations without a better one before it is lowered")
    plateau_cooldown: int = setting(5, "plateau: evaluations after lowering that do not count")
    max_grad_norm: float = setting(0.0, "gradients are scaled down to this norm; 0 = left alone")

    def __post_init__(self) -> None:
        """Raise ValueError for a cycle that does not rise, or does not fall."""
        if self.schedule == "one_cycle" and not 0 < self.warmup < 1:
            raise ValueError(f"warmup: {self.warmup} is not usable with one_cycle; give a part in (0, 1), such as 0.1.")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How the loss treats the classes."""

    class_balance: Literal["weights", "sampling", "pairs", "none"] = setting(
        "weights",
        "weights in the cross-entropy, equally many samples of each class, each real beside a fake made from it "
        "(tag untouched), or none of them",
    )


@dataclass(frozen=True, kw_only=True)
class CollapseConfig:
    """When a detector counts as collapsed, that is, as giving one answer to everything."""

    min_recall: float = setting(0.1, "smallest validation recall of each class at 0.5")
    min_sd: float = setting(0.02, "smallest standard deviation of p_fake over the validation split")
    grace_epochs: float = setting(5.0, "epochs during which it is not looked at; the end of training always is")


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One phase of training: what is learned from, how, and starting where."""

    name: str = setting("", "name of the phase")
    kind: Literal["train", "fit"] = setting(
        "train", "train = weights, by gradient; fit = fitted parts, on a fold that nothing was trained on"
    )
    parts: tuple[str, ...] = setting(
        (), "fit: which parts, calibration can be one; empty = all that the detector has beside it"
    )
    fold: str = setting("", "fit: the split of the data; empty = the validation split")
    data: DataConfig | None = setting(None, "where images come from")
    forge: ForgingConfig | None = setting(
        None, "forge the fakes in memory, of the data's real faces; none = data have fakes"
    )
    degrade: DegradeConfig | None = setting(DegradeConfig(), "what is done to training images; none = nothing")
    optim: OptimConfig = setting(OptimConfig())
    loss: LossConfig = setting(LossConfig())
    collapse: CollapseConfig = setting(CollapseConfig())
    epochs: int = setting(200, "times the training split is gone through")
    steps: int = setting(0, "steps of the phase whatever the size of the split; 0 = by epochs")
    batch_size: int | Literal["auto"] = setting(
        80, "images per step and process; auto = as many as fit into the memory, 128 at most"
    )
    accumulation: int = setting(1, "batches whose gradients are added up into one step")
    eval_steps: int = setting(0, "steps between two evaluations on the whole validation split; 0 = each epoch")
    best: Best = setting(
        "auc", "what the best weights have most of on validation videos; macro_f1 is for more than two classes"
    )
    patience: int = setting(0, "evaluations without a better one before the phase ends early; 0 = never")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "arithmetic; auto = best that the device has")
    init_from: str | None = setting(None, "folder of a trained detector to start from (default: the phase before)")
    freeze: tuple[str, ...] = setting((), "modules that are not trained, as patterns: backbone, vision_encoder.*")
    seed: int = setting(100, "seed of weights, order and degradations")
    workers: int | Literal["auto"] = setting(
        4, "processes that prepare images; 0 = none beside the training, auto = the cores that it leaves"
    )

    @property
    def sizes(self) -> tuple[int, int]:
        """Give batch size and workers, which are numbers once a training has begun."""
        assert self.batch_size != "auto" and self.workers != "auto", "see llava.train.sizes.settled"
        return self.batch_size, self.workers


@dataclass(frozen=True, kw_only=True)
class Recipe(PhaseConfig):
    """A training run: a detector, the settings that all phases share, and what each phase changes."""

    detector: str = setting("m2f2det", "name of the detector")
    model: dict[str, Any] = setting({}, "settings of the detector, as --model.fusion bridge")
    phases: list[dict[str, Any]] = setting([], "what each phase overrides; empty = one phase")
    scope: str = setting(
        "", "what the detector sees and what it has never seen, in a few words; stands beside each of its verdicts"
    )
    output_dir: str = setting("checkpoints/stage_1", "folder of the trained detector and its numbers")
    resume: bool = setting(True, "go on with an interrupted run in output_dir; false starts afresh")
    threshold_rule: ThresholdRule = setting("youden", "how the decision threshold is chosen on validation")
    calibration: CalibrationConfig | None = setting(
        CalibrationConfig(), "how the score is calibrated on validation; none = not at all"
    )
    calibrate_versions: bool = setting(
        False, "choose threshold and calibration on delivered versions of the validation images too (JPEG, size, crop)"
    )
    round_to_half: bool = setting(
        False, "round the finished weights to half precision before they are scored: half the bytes, the same answers"
    )
    near_duplicates: bool = setting(True, "look for near-duplicates across splits (reads every image once)")
    resamples: int = setting(2000, "bootstrap resamples behind each final interval")

    def __post_init__(self) -> None:
        self.detector_config()
        checked_scope(self.scope)
        few = len(DETECTORS.get(self.detector).classes) < 3
        if few and any(phase.best == "macro_f1" for phase in self.phase_list()):
            raise ValueError(f"best: {self.detector!r} has two classes, which macro_f1 is not for; use auc.")
        if any(CALIBRATION in phase.parts for phase in self.phase_list()[:-1]):
            raise ValueError(f"parts: {CALIBRATION} is that of the finished detector; fit it in the last phase.")
        if self.fits_calibration and self.calibration is None:
            raise ValueError(f"parts: {CALIBRATION} is to be fitted, and is switched off (calibration: none).")

    @property
    def fits_calibration(self) -> bool:
        """Whether the last phase calibrates; otherwise it is done after it, on the validation split."""
        return CALIBRATION in self.phase_list()[-1].parts

    @property
    def goes_by_machine(self) -> bool:
        """Whether a phase leaves batch size or workers to the machine, see `llava.train.sizes`."""
        return any("auto" in (phase.batch_size, phase.workers) for phase in self.phase_list())

    def detector_config(self) -> Any:
        """Give the detector's typed settings. Raises ValueError naming the setting and the nearest."""
        return build(DETECTORS.get(self.detector).Config, self.model, where="model")

    def phase_list(self) -> list[PhaseConfig]:
        """Give every phase with the shared settings filled in. Raises ValueError naming the setting."""
        fields = dataclasses.fields(PhaseConfig)
        shared = PhaseConfig(**{field.name: getattr(self, field.name) for field in fields})
        phases = [build(PhaseConfig, values, f"phases.{i}", shared) for i, values in enumerate(self.phases)]
        return phases or [shared]

    def require_data(self) -> None:
        """Refuse a recipe that does not say where its images are. Raises ValueError."""
        if any(phase.data is None for phase in self.phase_list()):
            raise ValueError("Missing setting 'data.path'; give it in the recipe or as --data.path FOLDER_OR_CSV.")


@dataclass(frozen=True)
class PhaseData:
    """A source with its training, validation and test records; test may be empty."""

    source: Source
    train: Sequence[Record]
    val: Sequence[Record]
    test: Sequence[Record]

    @property
    def parts(self) -> dict[str, Sequence[Record]]:
        """Give the records by what they are for."""
        return {"training": self.train, "validation": self.val, "test": self.test}

    def summary(self) -> dict[str, Any]:
        """Count records, labels, classes, videos and groups of each split."""
        return summary([*self.train, *self.val, *self.test])


@dataclass(frozen=True)
class Fold:
    """One split of a data set on which parts are fitted."""

    config: DataConfig
    split: str
    source: Source
    records: Sequence[Record]

    @property
    def name(self) -> str:
        """Name it as a calibration shows it."""
        return f"{data_name(self.config)}, split {self.split!r}"

    @property
    def parts(self) -> dict[str, Sequence[Record]]:
        """Give the records by what they are for."""
        return {f"fold {self.split!r}": self.records}

    @property
    def title(self) -> str:
        """Name it as a decision shows it."""
        return f"{'validation ' if self.split == self.config.val else ''}split {self.split!r}"

    def refuse(self, hashes: AbstractSet[str], use: str) -> None:
        """Raise LeakError where it has groups of these hashes; with `allow_leaks` it is a warning. use: their own."""
        refuse_groups((r.group for r in self.records), hashes, self.name, use, self.config.allow_leaks)


def data_name(data: DataConfig) -> str:
    """Name a data set without saying where it lies: its folder, also when it is given by the table in it."""
    path = Path(data.path).resolve()
    return (path.parent if path.is_file() else path).name


def open_phase(phase: PhaseConfig) -> PhaseData | Fold:
    """Open what a phase is trained on, or the fold that it fits on. Raises as `open_data`."""
    assert phase.data is not None
    if phase.kind == "train":
        return open_data(phase.data, phase.seed, phase.forge)
    if phase.fold in ("", phase.data.val):
        return validation_fold(phase, open_data(phase.data, phase.seed, phase.forge))
    source = forging_source(phase.data, phase.forge)
    records = split_of(source, phase.fold)
    require_both_classes(records, f"Split {phase.fold!r} of {phase.data.path!r}")
    return Fold(phase.data, phase.fold, source, records)


def validation_fold(phase: PhaseConfig, data: PhaseData) -> Fold:
    """Give the validation split of a phase's data as a fold."""
    assert phase.data is not None
    return Fold(phase.data, phase.data.val, data.source, data.val)


def forging_source(config: DataConfig, forge: ForgingConfig | None, only: str = EVERY_SPLIT) -> Source:
    """Open a source; with `forge`, its real faces and what is forged of them, by a seed that never changes.

    only: the split whose faces are forged.
    """
    source = open_source(config)
    return source if forge is None else ForgingSource(source, forge, config.train, seed=0, only=only)


def open_data(config: DataConfig, seed: int, forge: ForgingConfig | None = None) -> PhaseData:
    """Open a source and pick its splits; data without splits are divided by groups and classes.

    Raises LeakError when splits share a group (with `allow_leaks` it is a warning), ValueError when one lacks a class,
    is empty, or has unknown labels.
    """
    source = forging_source(config, forge)
    names = (config.train, config.val, config.test)
    if not {*names} & {r.split for r in source.records}:
        divided = divide(source.records, dict(zip(names, config.shares, strict=True)), seed)
        train, val, test = ([r for r in divided if r.split == name] for name in names)
        log.info("the data have no splits; divided by groups into %d / %d / %d images", len(train), len(val), len(test))
    else:
        train, val = split_of(source, config.train), split_of(source, config.val)
        test = [r for r in source.records if r.split == config.test]
    splits = {config.train: train, config.val: val, config.test: test}
    for name, records in splits.items():
        if records or name != config.test:
            require_both_classes(records, f"Split {name!r} of {config.path!r}")
    try:
        check_leaks(splits)
    except LeakError as error:
        if not config.allow_leaks:
            raise
        log.warning("trained all the same, by data.allow_leaks: %s", error)
    return PhaseData(source, train, val, test)


def report_near_duplicates(data: PhaseData) -> list[dict[str, Any]]:
    """Log and give pairs of look-alike images in different splits; they are reported, not refused."""
    splits = {"train": data.train, "val": data.val, "test": data.test}
    pairs = near_duplicates(data.source, {name: records for name, records in splits.items() if records})
    for first, second, distance in pairs[:5]:
        log.warning("near-duplicate across splits: %s and %s (%d of 64 bits differ)", first, second, distance)
    if len(pairs) > 5:
        log.warning("... and %d more pairs; all are in metrics.json", len(pairs) - 5)
    return [{"first": first, "second": second, "distance": distance} for first, second, distance in pairs]
