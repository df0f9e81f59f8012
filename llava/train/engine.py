"""One phase of detector training on HF Trainer: samples, parameter groups, schedule, files, and what watches it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, Dataset
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from llava.core.runtime import last_checkpoint, write_json
from llava.core.types import REAL
from llava.data.dataset import DetectionDataset, EpochSampler, collate
from llava.data.splits import group_hashes
from llava.detectors.base import Detector
from llava.train.recipe import CollapseConfig, OptimConfig, PhaseConfig, PhaseData
from llava.train.scoring import answers_of, check_collapse, flat_metrics, predictions_of, probe_answers, usable_data

log = logging.getLogger(__name__)
HISTORY = "history.json"  # what was logged while a phase trained: losses by step, metrics by evaluation
BEST = "best"  # sub-folder of a phase with its best detector; it exists when the phase is finished
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SCHEDULES = {
    "cosine": "cosine",
    "plateau": "reduce_lr_on_plateau",
    "constant": "constant_with_warmup",
    "one_cycle": "constant",  # not by Hugging Face, see `DetectorTrainer.create_scheduler`
}


class CollapseCheck(TrainerCallback):
    """Check for collapse at each evaluation after the grace epochs."""

    def __init__(self, config: CollapseConfig, answers: Callable[[], Mapping[str, float]]) -> None:
        self.config, self.answers = config, answers

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the numbers just measured."""
        if (state.epoch or 0) > self.config.grace_epochs:
            check_collapse(metrics or {}, self.config, self.answers)


class ProgressLine(ProgressCallback):
    """The progress bar, with one short line per evaluation instead of every number."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss beside the bar and validation above it."""
        if self.training_bar is None or logs is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", lr=f"{logs['learning_rate']:.1e}")
        if "eval_video_auc" in logs:
            log.info(
                "epoch %.1f: validation AUC %.3f (frame), %.3f [%.3f, %.3f] (video), accuracy %.3f, loss %.3f",
                state.epoch or 0.0,
                logs["eval_frame_auc"],
                logs["eval_video_auc"],
                logs.get("eval_video_auc_low", float("nan")),
                logs.get("eval_video_auc_high", float("nan")),
                logs["eval_frame_accuracy"],
                logs["eval_log_loss"],
            )


class TensorBoard(TensorBoardCallback):
    """TensorBoard logs in a folder of the run; the model's settings are in run.json."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.logging_dir = str(folder)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the writer; a detector's config is no Hugging Face config and is left out."""
        kwargs.pop("model", None)
        super().on_train_begin(args, state, control, **kwargs)


class WholeBatches(EpochSampler):
    """EpochSampler without a last, smaller batch: one image alone has no batch statistics.

    Trainer's own `dataloader_drop_last` would leave images out of validation, too.
    """

    def __init__(
        self, labels: list[int], seed: int, balanced: bool, batch_size: int, origins: list[str] | None = None
    ) -> None:
        super().__init__(labels, seed, balanced, origins=origins)
        self.batch_size = batch_size

    def __len__(self) -> int:
        count = super().__len__()
        return count - count % self.batch_size if count > self.batch_size else count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return islice(super().__iter__(), len(self))


class DetectorTrainer(Trainer):
    """HF Trainer for a detector: batches carry `index`, which leads back to the record for video metrics."""

    model: Detector
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LRScheduler | None

    def __init__(
        self, detector: Detector, phase: PhaseConfig, data: PhaseData, args: TrainingArguments, goes_on: bool = False
    ) -> None:
        self.phase, self.val_records, self.goes_on = phase, data.val, goes_on
        train_set = DetectionDataset(
            data.source,
            data.train,
            detector.inputs,
            phase.degrade,
            phase.seed,
            mask_grid=detector.mask_grid,
            taught=detector.taught,
            targets=list(map(detector.target, data.train)),
            lacking=detector.lacking,
        )
        val_set = DetectionDataset(data.source, data.val, detector.inputs, with_views=True, lacking=detector.lacking)
        config, detector.config = detector.config, None  # Trainer writes `use_cache` into any config that it finds
        super().__init__(
            model=detector,
            args=args,
            data_collator=collate,
            train_dataset=train_set,
            eval_dataset=val_set,
            compute_metrics=self._metrics,
        )
        detector.config = config

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> EpochSampler:
        dataset = train_dataset or self.train_dataset
        assert isinstance(dataset, DetectionDataset)
        balance, seed, batch_size = self.phase.loss.class_balance, self.phase.seed, self.phase.sizes[0]
        if balance != "pairs":
            return WholeBatches(dataset.targets, seed, balance == "sampling", batch_size)
        labels = [int(r.label or REAL) for r in dataset.records]
        return WholeBatches(labels, seed, False, batch_size, [r.tags.get("untouched", "") for r in dataset.records])

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Give the loader of training."""
        return self._as_if_begun(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Give the loader of validation."""
        return self._as_if_begun(super().get_eval_dataloader(eval_dataset))

    def _as_if_begun(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """Let a run that goes on take no numbers from the generator of dropout, where the unbroken run takes none.

        Worker processes that stay are given a seed once, which the run before has done.
        """
        if self.goes_on and self.args.dataloader_persistent_workers:
            getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        return loader

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Use the detector's parameter groups; the largest comes first, because its rate is the one shown."""
        if self.optimizer is None:
            optim = self.phase.optim
            groups = sorted(self.model.parameter_groups(optim.lr), key=lambda group: -len(group["params"]))
            self.optimizer = OPTIMIZERS[optim.optimizer](groups, betas=optim.betas, weight_decay=optim.weight_decay)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Let one cycle span all steps of the phase, each parameter group with its own highest rate."""
        optimizer = optimizer or self.optimizer
        if self.phase.optim.schedule == "one_cycle" and self.lr_scheduler is None:
            assert optimizer is not None
            rates, share = [group["lr"] for group in optimizer.param_groups], self.phase.optim.warmup
            self.lr_scheduler = OneCycleLR(optimizer, rates, total_steps=num_training_steps, pct_start=share)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Leave `index` out of what the detector reads."""
        inputs = {name: tensor for name, tensor in inputs.items() if name != "index"}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Give no loss (`flat_metrics` has it), p_fake and class scores averaged over views, and (labels, index)."""
        inputs = self._prepare_inputs(inputs)
        labels, index = inputs.pop("labels"), inputs.pop("index")
        with torch.no_grad(), self.compute_loss_context_manager():
            answers = tuple(tensor.float().clamp(0, 1) for tensor in answers_of(self.model, inputs))
        return None, answers, (labels, index)

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        (p_fake, scores), (_, index) = prediction.predictions, prediction.label_ids
        records = [self.val_records[int(i)] for i in index]
        return flat_metrics(predictions_of(self.model, records, p_fake, scores), best=self.phase.best)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            self.accelerator.unwrap_model(self.model).save(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.model.load_weights(self.state.best_model_checkpoint)


def train_phase(detector: Detector, phase: PhaseConfig, data: PhaseData, folder: Path) -> None:
    """Train `detector` in place and leave it with its best weights, which are also written to `folder/best`.

    Goes on from the last complete checkpoint in `folder`. Raises CollapseError, or ValueError for a detector that can
    not be trained.
    """
    if not any(p.requires_grad for p in detector.parameters()):
        raise ValueError(f"Phase {phase.name!r}: every weight is frozen; freeze fewer, or fit parts (kind: fit).")
    detector.require_fitted()
    data = usable_data(detector, data)
    detector.trained_on |= group_hashes(r.group for r in data.train)
    balance_classes(detector, phase, list(map(detector.target, data.train)))
    detector.to(memory_format=torch.channels_last)
    args, checkpoint = training_arguments(phase, folder), last_checkpoint(folder)
    trainer = DetectorTrainer(detector, phase, data, args, goes_on=checkpoint is not None)
    trainer.remove_callback(PrinterCallback)

    def answers() -> dict[str, float]:
        return probe_answers(detector, args.device)

    for callback in (ProgressLine(), TensorBoard(folder / "tensorboard"), CollapseCheck(phase.collapse, answers)):
        trainer.add_callback(callback)
    if phase.patience:
        trainer.add_callback(EarlyStoppingCallback(phase.patience))
    if checkpoint:
        log.info("going on from %s", checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    check_collapse(trainer.evaluate(), phase.collapse, answers)
    if args.should_save:
        write_json(folder / HISTORY, trainer.state.log_history)
        detector.save(folder / BEST)
        for old in folder.glob("checkpoint-*"):
            shutil.rmtree(old)
    trainer.accelerator.wait_for_everyone()


def training_arguments(phase: PhaseConfig, folder: Path) -> TrainingArguments:
    """Translate a phase into Hugging Face's arguments."""
    strategy = "steps" if phase.eval_steps else "epoch"
    batch_size, workers = phase.sizes
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=phase.accumulation,
        num_train_epochs=phase.epochs,
        max_steps=phase.steps or -1,
        learning_rate=phase.optim.lr,
        lr_scheduler_type=SCHEDULES[phase.optim.schedule],
        lr_scheduler_kwargs=_schedule_options(phase.optim),
        warmup_steps=phase.optim.warmup,
        max_grad_norm=phase.optim.max_grad_norm,
        eval_strategy=strategy,
        eval_steps=phase.eval_steps or None,
        save_strategy=strategy,
        save_steps=phase.eval_steps or 1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_merit",
        greater_is_better=True,
        logging_steps=10,
        seed=phase.seed,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        remove_unused_columns=False,
        label_names=["labels", "index"],
        restore_callback_states_from_checkpoint=True,
        disable_tqdm=True,
        report_to="none",
        **_device_options(phase.precision),
    )


def _device_options(precision: str) -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    is_distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    usable = usable_precision(precision)
    return {
        "bf16": usable == "bf16",
        "fp16": usable == "fp16",
        "use_cpu": not has_gpu,
        "dataloader_pin_memory": has_gpu,
        "ddp_backend": "gloo" if is_distributed and not has_gpu else None,
        "ddp_find_unused_parameters": False,
    }


def usable_precision(wanted: str) -> str:
    """Resolve `auto` to the fastest arithmetic this device has: bf16, fp16 (older GPUs) or fp32."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"


def balance_classes(detector: Detector, phase: PhaseConfig, labels: list[int]) -> None:
    """Set the weights of the loss to n / (classes * count), so that every class weighs the same, or to one.

    labels: the class of each training record.
    """
    counts = torch.bincount(torch.tensor(labels), minlength=len(detector.classes)).clamp(min=1)
    even = torch.ones(len(detector.classes))
    weights = len(labels) / (len(detector.classes) * counts)
    detector.class_weights.copy_(weights if phase.loss.class_balance == "weights" else even)


def _schedule_options(optim: OptimConfig) -> dict[str, Any]:
    if optim.schedule != "plateau":
        return {}
    return {
        "mode": "max",  # of the merit
        "factor": optim.plateau_factor,
        "patience": optim.plateau_patience,
        "cooldown": optim.plateau_cooldown,
        "min_lr": 1e-8,
    }
