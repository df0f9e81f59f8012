"""Train an explainer: the adapter alone (stage 2), or LoRA with projector and adapter (stage 3), on HF Trainer."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from llava.core.config import parse
from llava.core.runtime import item_rng, last_checkpoint, other_settings, setup_logging, write_run
from llava.core.types import FAKE, REAL, Record
from llava.core.weights import sha256_of
from llava.data.answer_texts import KIND_TAG
from llava.data.conversations import ConversationSource, open_conversations
from llava.data.splits import check_leaks
from llava.explainer.convert import ready
from llava.explainer.delta import Model, add_lora, fingerprint, inner, load_delta, read_record, save_delta
from llava.explainer.generation import load_model, load_processor
from llava.explainer.processing import IGNORE, ExplainerProcessor
from llava.train.arguments import ExplainArguments, translate

log = logging.getLogger("llava.train.explain")  # run as a file, __name__ is another

SOFTEST = 0.5  # least exponent of spread evidence: shares of 0.95 and 0.0125 become 0.69 and 0.08
# Settings that must be the same when an interrupted run goes on.
SETTINGS_OF_A_RUN = (
    *("lora_enable", "lora_r", "lora_alpha", "lora_dropout", "learning_rate", "mm_projector_lr", "lr_scheduler_type"),
    *("num_train_epochs", "max_steps", "seed", "balance_classes", "freeze_backbone", "tune_deepfake_mlp_adapter"),
    *("tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "model_max_length", "warmup_steps", "weight_decay"),
    "spread_evidence",
)


class ExplainDataset(Dataset[dict[str, Any]]):
    """Conversations about images as ids, labels and pixels; every item is the same in every epoch.

    is_balanced: records of the rarer class come again until both classes weigh the same; otherwise the words learn
    the data's share of fakes beside the evidence, and tip over at another p_fake than the detector. spread_seed: each
    item is told a p_fake drawn evenly from its label's side of 0.5, and its other evidence softened by an
    exponent drawn evenly from SOFTEST to 1, both functions of (seed, item): a detector is surest of what it was
    trained on. kinds: the detector's; where an answer says the kind of fake, their shares are drawn evenly from all
    that make the right one the greatest, for a real one from all.
    """

    def __init__(
        self,
        source: ConversationSource,
        processor: ExplainerProcessor,
        max_length: int,
        is_balanced: bool = False,
        spread_seed: int | None = None,
        kinds: Sequence[str] = (),
    ) -> None:
        self.kinds = list(kinds)
        self.source, self.spread_seed = source, spread_seed
        self.processor = processor
        self.max_length = max_length
        self.rows = balanced_rows([r.label for r in source.records]) if is_balanced else range(len(source.records))
        cut = sum(len(processor.encode(source.turns(record))[0]) > max_length for record in source.records)
        if cut:
            log.warning(
                "%d of %d conversations have more than %d tokens and are cut: what stands behind is not learned; "
                "raise --model_max_length",
                *(cut, len(source.records), max_length),
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Give input_ids, labels, pixel_values and detector_inputs of one record."""
        record = self.source.records[self.rows[index]]
        sample = self.source.load(record)
        ids, labels = self.processor.encode(sample.turns)
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORE for label in labels):
            raise ValueError(self._no_answer(record))
        spread = {} if self.spread_seed is None else {"spread": self._spread(record, index, self.spread_seed)}
        return {"input_ids": ids, "labels": labels, **spread, **self.processor.pixels(sample.image)}

    def _spread(self, record: Record, index: int, seed: int) -> tuple[float, ...]:
        """Give (p_fake, exponent, shares of the kinds) that one item is told with; shares of 0 are the detector's."""
        if record.label is None:
            raise ValueError(f"--spread_evidence needs labels, {record.id!r} has none; give `label`, or leave it off.")
        rng = item_rng(seed, 0, index)
        side, softness = rng.random(2).tolist()
        return (record.label + side) / 2, SOFTEST + (1 - SOFTEST) * softness, *self._shares(record, rng)

    def _shares(self, record: Record, rng: np.random.Generator) -> list[float]:
        if not self.kinds or KIND_TAG not in record.tags:
            return [0.0] * len(self.kinds)
        shares: list[float] = rng.dirichlet(np.ones(len(self.kinds))).tolist()
        if record.label == FAKE:
            if (kind := record.tags[KIND_TAG]) not in self.kinds:
                raise ValueError(
                    f"{record.id!r} is said to be {kind!r}, which the detector's evidence does not tell; it tells "
                    f"{', '.join(self.kinds)}. Name it so (m2f2 data verdicts --data.class_names.NAME CLASS)."
                )
            right, greatest = self.kinds.index(kind), int(np.argmax(shares))
            shares[right], shares[greatest] = shares[greatest], shares[right]
        return shares

    def _no_answer(self, record: Record) -> str:
        return (
            f"Record {record.id!r} has no answer within {self.max_length} tokens; "
            "give it one, or raise --model_max_length."
        )


class DetectorInFloat32(TrainerCallback):
    """Give the detector its own weights back after DeepSpeed has rounded the whole model to bf16 or fp16."""

    def __init__(self, model: Model) -> None:
        self.detector = inner(model).detector
        self.weights = {name: tensor.clone() for name, tensor in self.detector.state_dict().items()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore it; DeepSpeed's optimiser holds no frozen weights."""
        self.detector.float().load_state_dict(self.weights)


def balanced_rows(labels: Sequence[int | None]) -> list[int]:
    """Give every row once, and evenly spread rows of the rarer class again until both classes are equally long.

    Raises ValueError when a record has no label or a class is missing.
    """
    rows = {label: [i for i, found in enumerate(labels) if found == label] for label in (REAL, FAKE)}
    if len(rows[REAL]) + len(rows[FAKE]) < len(labels) or not all(rows.values()):
        raise ValueError(
            f"--balance_classes needs labelled records of both classes, got {len(rows[REAL])} real and "
            f"{len(rows[FAKE])} fake of {len(labels)}; give `label` in the file, or --balance_classes False."
        )
    rarer, wanted = min(rows.values(), key=len), max(map(len, rows.values()))
    extra = wanted - len(rarer)
    return [*range(len(labels)), *(rarer[k * len(rarer) // extra % len(rarer)] for k in range(extra))]


class ExplainTrainer(Trainer):
    """HF Trainer that saves and restores exactly what is trained, LoRA included, in every checkpoint."""

    def __init__(self, *, base: dict[str, Any], projector_lr: float | None, **options: Any) -> None:
        super().__init__(**options)
        self.base = base
        self.projector_lr = projector_lr

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Give projector and adapter their own learning rate, and weight decay to matrices only."""
        if self.optimizer is None:  # type: ignore[has-type]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(self._groups(), **options)
        return self.optimizer

    def _groups(self) -> list[dict[str, Any]]:
        decaying = set(self.get_decay_parameter_names(self.model))
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                key = ("projector" in name and ".lora_" not in name, name in decaying)
                groups.setdefault(key, []).append(parameter)
        slow = self.args.learning_rate
        rates = {True: slow if self.projector_lr is None else self.projector_lr, False: slow}
        return [
            {"params": params, "lr": rates[is_projector], "weight_decay": self.args.weight_decay if decays else 0.0}
            for (is_projector, decays), params in groups.items()
        ]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            save_delta(self._model(), output_dir or self.args.output_dir, self.base, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        count = load_delta(self._model(), resume_from_checkpoint)
        log.info("restored %d trained tensors from %s", count, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _prepare_input(self, data: Any) -> Any:
        """Move a batch; unlike the parent under DeepSpeed, leave the detector's pixels in float32."""
        return send_to_device(data, self.args.device)

    def _model(self) -> Model:
        return self.accelerator.unwrap_model(self.model)


def prepare(args: ExplainArguments) -> tuple[Model, ExplainerProcessor]:
    """Load the merged explainer and open for training exactly what the flags ask for."""
    model = load_model(args.model_name_or_path, dtype="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32")
    model.set_attn_implementation({"text_config": args.attn_implementation})
    _check_against_model(args, model.config)
    processor = load_processor(args.model_name_or_path, model)
    model.requires_grad_(False)
    for parameter in model.detector.parameters():
        if parameter.ndim == 0:  # DeepSpeed broadcasts bytes, which a scalar parameter cannot give; frozen, not saved
            parameter.data = parameter.data.reshape(1)
    wrapped = add_lora(model, args.lora_r, args.lora_alpha, args.lora_dropout) if args.lora_enable else model
    parts: list[nn.Module] = []
    if args.tune_deepfake_mlp_adapter:
        parts.append(model.deepfake_projector)
    if args.trains_projector:
        parts.append(model.model.multi_modal_projector)
    if not args.freeze_backbone:
        parts += [model.model.language_model, model.lm_head]
    for part in parts:
        part.float().requires_grad_(True)
    if not parts and not args.lora_enable:
        raise ValueError(
            "Nothing to train: give --tune_deepfake_mlp_adapter True, --tune_mm_mlp_adapter True or --lora_enable True."
        )
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    log.info("training %s weights of %s", f"{trained:,}", f"{sum(p.numel() for p in wrapped.parameters()):,}")
    return wrapped, processor


def leave_out_inference_kernels() -> None:
    """Keep DeepSpeed on CPUs from compiling kernels that only its inference uses: a minute, and a compiler needed."""
    from deepspeed import ops  # here, because only a run with --deepspeed has it loaded

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def train(args: ExplainArguments) -> dict[str, float]:
    """Run one stage; resumes from the last checkpoint in output_dir when there is one. Gives the metrics."""
    if not args.output_dir or not args.model_name_or_path or not args.data_path:
        raise ValueError("Give --model_name_or_path, --data_path and --output_dir.")
    train_source = open_conversations(args.data_path, args.image_folder)
    eval_source = open_conversations(args.eval_data_path, args.image_folder) if args.eval_data_path else None
    if eval_source:
        check_leaks({"data_path": train_source.records, "eval_data_path": eval_source.records})
    base = _origin(args)
    checkpoint = _checkpoint(args, base)
    set_seed(args.seed)  # LoRA's fresh weights
    if args.should_save:
        write_run(args.output_dir, {k: v for k, v in args.to_dict().items() if v is not None}, args.seed)
    model, processor = prepare(args)
    trainer = ExplainTrainer(
        base=base,
        projector_lr=args.mm_projector_lr,
        model=model,
        args=args,
        data_collator=processor.collate,
        train_dataset=ExplainDataset(
            train_source,
            processor,
            args.model_max_length,
            is_balanced(args, train_source),
            args.seed if args.spread_evidence else None,
            inner(model).detector.kinds,
        ),
        eval_dataset=ExplainDataset(eval_source, processor, args.model_max_length) if eval_source else None,
    )
    trainer.add_callback(DetectorInFloat32(model))
    if args.deepspeed:
        leave_out_inference_kernels()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    return result.metrics


def _origin(args: ExplainArguments) -> dict[str, str]:
    """Name what a delta belongs to: the model it was trained on, and the data."""
    model = fingerprint(ready(args.model_name_or_path))
    return {"name": args.model_name_or_path, "sha256": model, "data_sha256": sha256_of(args.data_path)}


def is_balanced(args: ExplainArguments, source: ConversationSource) -> bool:
    """Decide whether rarer records are repeated: as the flag says, without it where every record has a label."""
    if args.balance_classes is not None:
        return args.balance_classes
    labels = {record.label for record in source.records}
    if labels != {REAL, FAKE}:
        log.warning("classes are not balanced: %s has records without a label, or one class only", args.data_path)
    return labels == {REAL, FAKE}


def _checkpoint(args: ExplainArguments, base: dict[str, Any]) -> str | None:
    """Give the checkpoint to go on from. Raises ValueError when the folder holds a run of something else."""
    folder, asked = Path(args.output_dir), str(args.resume_from_checkpoint)
    if asked.lower() == "false":
        if args.should_save:
            for old in folder.glob("checkpoint-*"):
                shutil.rmtree(old)
        return None
    last = last_checkpoint(folder) if asked.lower() in ("true", "none") else Path(asked)
    if last is None:
        return None
    other = other_settings(folder, args.to_dict(), SETTINGS_OF_A_RUN)
    if read_record(last)["base"] != base:
        other.append("model or data file")
    if other:
        raise ValueError(
            f"{args.output_dir!r} holds a run with another {', '.join(other)}; give another --output_dir, or "
            "--resume_from_checkpoint False to train afresh there."
        )
    log.info("going on from %s (--resume_from_checkpoint False starts afresh)", last)
    return str(last)


def _check_against_model(args: ExplainArguments, config: Any) -> None:
    fixed = {
        "mm_vision_select_layer": config.vision_feature_layer,
        "image_aspect_ratio": config.image_aspect_ratio,
        "version": config.layout,
    }
    for name, value in fixed.items():
        given = getattr(args, name)
        if given is not None and given != value:
            raise ValueError(
                f"--{name} {given}: {args.model_name_or_path!r} was merged with {value}; merge again to change it."
            )
    for name in ("vision_tower", "deepfake_ckpt_path"):
        if getattr(args, name):
            log.info("--%s %s: the merged model holds its own; the flag is not used", name, getattr(args, name))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the flags, train, and leave the process group cleanly; gives 2 for a mistake in what was asked."""
    setup_logging()
    try:
        words = list(translate(sys.argv[1:] if argv is None else argv))
        train(parse(ExplainArguments, words, description=__doc__ or ""))
    except (ValueError, FileNotFoundError, ImportError) as error:
        log.error("%s", error)
        return 2
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
