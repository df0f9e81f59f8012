"""Recipes of detector training: one mapping of settings, and phases that override it one after another."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from llava.core.config import build, setting
from llava.data.sources import DataConfig
from llava.detectors import DETECTORS
from llava.evaluation.calibration import CalibrationConfig
from llava.evaluation.metrics import ThresholdRule
from llava.ops.degrade import DegradeConfig


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights are moved; the defaults are those published for M2F2-Det, with cosine instead of plateau."""

    optimizer: Literal["adam", "adamw"] = setting("adam", "adam adds weight decay to the gradient, adamw to the step")
    lr: float = setting(1e-3, "learning rate; a detector may give some weights their own")
    weight_decay: float = setting(1e-6, "weight decay")
    betas: tuple[float, float] = setting((0.9, 0.999), "Adam's moving averages")
    schedule: Literal["cosine", "plateau", "constant"] = setting(
        "cosine", "cosine to zero, plateau (lowered when validation stalls) or constant"
    )
    warmup: float = setting(0.0, "part of all steps in which the rate rises from zero (not with plateau)")
    plateau_factor: float = setting(0.4, "plateau: what the rate is multiplied by")
    plateau_patience: int = setting(6, "plateau: evaluations without a better one before it is lowered")
    plateau_cooldown: int = setting(5, "plateau: evaluations after lowering that do not count")
    max_grad_norm: float = setting(0.0, "gradients are scaled down to this norm; 0 = left alone")


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
    data: DataConfig | None = setting(None, "where images come from")
    degrade: DegradeConfig | None = setting(DegradeConfig(), "what is done to training images; none = nothing")
    optim: OptimConfig = setting(OptimConfig())
    loss: LossConfig = setting(LossConfig())
    collapse: CollapseConfig = setting(CollapseConfig())
    epochs: int = setting(200, "times the training split is gone through")
    steps: int = setting(0, "steps of the phase whatever the size of the split; 0 = by epochs")
    batch_size: int = setting(80, "images per step and process")
    accumulation: int = setting(1, "batches whose gradients are added up into one step")
    eval_steps: int = setting(0, "steps between two evaluations on the whole validation split; 0 = each epoch")
    patience: int = setting(0, "evaluations without a better one before the phase ends early; 0 = never")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "arithmetic; auto = best that the device has")
    init_from: str | None = setting(None, "folder of a trained detector to start from (default: the phase before)")
    freeze: tuple[str, ...] = setting((), "modules that are not trained, as patterns: backbone, vision_encoder.*")
    seed: int = setting(100, "seed of weights, order and degradations")
    workers: int = setting(4, "processes that prepare images; 0 = none beside the training")


@dataclass(frozen=True, kw_only=True)
class Recipe(PhaseConfig):
    """A training run: a detector, the settings that all phases share, and what each phase changes."""

    detector: str = setting("m2f2det", "name of the detector")
    model: dict[str, Any] = setting({}, "settings of the detector, as --model.fusion bridge")
    phases: list[dict[str, Any]] = setting([], "what each phase overrides; empty = one phase")
    output_dir: str = setting("checkpoints/stage_1", "folder of the trained detector and its numbers")
    resume: bool = setting(True, "go on with an interrupted run in output_dir; false starts afresh")
    threshold_rule: ThresholdRule = setting("youden", "how the decision threshold is chosen on validation")
    calibration: CalibrationConfig | None = setting(
        CalibrationConfig(), "how the score is calibrated on validation; none = not at all"
    )
    near_duplicates: bool = setting(True, "look for near-duplicates across splits (reads every image once)")
    resamples: int = setting(2000, "bootstrap resamples behind each final interval")

    def __post_init__(self) -> None:
        self.detector_config()
        self.phase_list()

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
