"""What watches a phase of detector training: collapse, the progress bar, TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback

from llava.train.recipe import CollapseConfig
from llava.train.scoring import check_collapse

log = logging.getLogger(__name__)


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
