"""Settings of stages 2 and 3: the published flags beside Hugging Face's, every one accepted, mapped or refused."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from llava.core.config import setting

# What transformers renamed since the published scripts were written.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",
    "no_cuda": "use_cpu",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# What is gone, and why that is no loss.
REFUSED = {
    "overwrite_output_dir": "runs go on where they stopped; for a fresh run give another --output_dir",
    "group_by_length": "use --train_sampling_strategy group_by_length",
    "group_by_modality_length": "every record has an image; use --train_sampling_strategy group_by_length",
    "logging_dir": "TensorBoard logs go below --output_dir",
    "save_safetensors": "weights are always written as safetensors",
    "bits": "training in 4 or 8 bit is not offered; inference is (--quantization)",
    "lora_bias": "biases are not trained",
    "lora_weight_path": "resume with --resume_from_checkpoint",
    "mpt_attn_impl": "the language model is a Llama; use --attn_implementation",
}


@dataclass(kw_only=True)
class MergeConfig:
    """What the stage scripts merge before and after training."""

    base: str | None = setting(None, "stage 2: the LLaVA base; stage 3: not used")
    detector: str | None = setting(None, "stage 2: the stage-1 folder (default: deepfake_model_path of the base)")
    start: str = setting("", "folder of the model that training starts from; written by the merge before it")
    base_of_delta: str | None = setting(None, "stage 3: the model that the stage-2 delta was trained on")
    delta: str | None = setting(None, "stage 3: the stage-2 delta")
    final: str | None = setting(None, "stage 3: folder of the finished explainer")
    evidence_tokens: int = setting(1, "tokens that stand for the detector's evidence")


@dataclass(kw_only=True)
class ExplainArguments(TrainingArguments):
    """Flags of stages 2 and 3. Fields that the merged model already fixes are checked against it, not applied."""

    merge: MergeConfig = setting(MergeConfig(), "merges around the training (stage scripts only)")
    model_name_or_path: str = setting("", "merged explainer to start from")
    data_path: str = setting("", "LLaVA conversation json")
    eval_data_path: str | None = setting(None, "conversation json for the evaluation loss")
    image_folder: str = setting("", "folder or zip that image names start from")
    version: str | None = setting(None, "prompt layout; must be the merged model's when given")
    model_max_length: int = setting(2048, "longest conversation in tokens, image tokens included")
    balance_classes: bool | None = setting(
        None, "let real and fake records weigh the same, by repeating the rarer ones (default: where all have a label)"
    )
    spread_evidence: bool = setting(
        False,
        "tell each record a p_fake drawn evenly from its label's side of 0.5, and other evidence less surely; "
        "shares of the kinds of fake where its answer names one",
    )
    tune_deepfake_mlp_adapter: bool = setting(False, "train the adapter from evidence to tokens")
    tune_mm_mlp_adapter: bool = setting(False, "train the projector from vision features to tokens")
    freeze_mm_mlp_adapter: bool = setting(False, "leave the projector as it is, whatever else is said")
    freeze_backbone: bool = setting(True, "leave the language model as it is (LoRA is added beside it)")
    lora_enable: bool = setting(False, "add LoRA to the language model's linear layers")
    lora_r: int = setting(128, "rank")
    lora_alpha: int = setting(256, "scale; the update is multiplied by alpha / r")
    lora_dropout: float = setting(0.05, "dropout on LoRA's input")
    mm_projector_lr: float | None = setting(None, "learning rate of projector and adapter (default: learning_rate)")
    attn_implementation: str = setting("sdpa", "sdpa, eager or flash_attention_2 (where installed)")
    vision_tower: str | None = setting(None, "accepted; the merged model holds its tower")
    deepfake_ckpt_path: str | None = setting(None, "accepted; the merged model holds its detector")
    mm_projector_type: str = setting("mlp2x_gelu", "the only projector of LLaVA-1.5")
    mm_vision_select_layer: int = setting(-2, "must be the merged model's")
    mm_vision_select_feature: str = setting("cls_patch", "must be cls_patch: the detector reads CLS")
    mm_use_im_start_end: bool = setting(False, "must be False")
    mm_use_im_patch_token: bool = setting(False, "must be False")
    image_aspect_ratio: str | None = setting(None, "must be the merged model's when given")
    lazy_preprocess: bool = setting(True, "accepted; images are always read when needed")

    def __post_init__(self) -> None:
        """Check what can be checked without the model. Raises ValueError naming the flag."""
        required = {
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_feature": "cls_patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
        }
        for name, value in required.items():
            if getattr(self, name) != value:
                raise ValueError(f"--{name} {getattr(self, name)}: only {value} is possible here.")
        if self.lora_enable and not self.freeze_backbone:
            raise ValueError("--lora_enable True trains beside a frozen language model; leave --freeze_backbone True.")
        if not torch.cuda.is_available():
            if self.tf32:
                raise ValueError(
                    "--tf32 True needs a GPU, and here is none; give --tf32 False, or the small recipe for a CPU: "
                    "--config scripts/configs/stage_2/m2f2_tiny.yaml (or stage_3)."
                )
            self.use_cpu = True
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                self.ddp_backend = "gloo"
        self.remove_unused_columns = False
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, for run.json and the loggers."""
        return super().to_dict() | {"merge": asdict(self.merge)}

    @property
    def trains_projector(self) -> bool:
        """Say whether the vision projector is trained."""
        return self.tune_mm_mlp_adapter and not self.freeze_mm_mlp_adapter


def translate(argv: Sequence[str]) -> Iterator[str]:
    """Map flags of older transformers and LLaVA to today's. Raises ValueError for one that has no successor."""
    for word in argv:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if word.startswith("--") and name in REFUSED:
            raise ValueError(f"--{name} is not accepted: {REFUSED[name]}.")
        yield f"--{RENAMED[name]}{equals}{value}" if word.startswith("--") and name in RENAMED else word
