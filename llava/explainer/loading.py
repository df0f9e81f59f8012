"""Load an explainer folder: strictly, on a device, in a precision, with or without quantisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from llava.core.weights import read_config
from llava.explainer.configuration import ForgeryLlavaConfig
from llava.explainer.convert import ready
from llava.explainer.modeling import ForgeryLlava
from llava.explainer.processing import ExplainerProcessor

DTYPES: dict[str, Any] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "stored": "auto"}
# Never quantised: p_fake is the same whether the words are written in 4, 8 or 16 bit.
FULL_PRECISION = ["detector", "model.vision_tower", "model.multi_modal_projector", "deepfake_projector", "lm_head"]


def is_explainer(folder: str | Path) -> bool:
    """Say whether a folder holds a merged explainer (and not, say, a detector)."""
    return read_config(folder).get("model_type") == ForgeryLlavaConfig.model_type


def load_model(
    name: str | Path,
    device: torch.device | str = "cpu",
    dtype: Literal["fp32", "bf16", "fp16", "stored"] = "fp32",
    quantization: Literal["none", "8bit", "4bit"] = "none",
) -> ForgeryLlava:
    """Load a merged explainer in eval mode; the detector stays in float32, whatever `dtype` (stored = as saved).

    Raises ValueError when the folder holds something else, when a tensor is missing or left over, or when its
    calibration.json is of another detector.
    """
    folder = ready(name)
    if not is_explainer(folder):
        kind = read_config(folder)
        found = kind.get("model_type") or kind.get("detector") or "something else"
        raise ValueError(
            f"{str(name)!r} holds {found!r}, not a merged explainer; run stage 2 and 3 or give their output."
        )
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if quantization != "none":
        options |= {"quantization_config": _quantization(quantization, DTYPES[dtype]), "device_map": {"": str(device)}}
    model, report = ForgeryLlava.from_pretrained(folder, output_loading_info=True, **options)
    for kind_of_problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(kind_of_problem):
            some = sorted(map(str, report[kind_of_problem]))
            raise ValueError(f"{str(name)!r}: {len(some)} {kind_of_problem.replace('_', ' ')}, first: {some[0]}.")
    model.detector.load_calibration(folder)
    return model.eval() if quantization != "none" else model.to(device).eval()  # type: ignore[arg-type]


def load_processor(name: str | Path, model: ForgeryLlava) -> ExplainerProcessor:
    """Load the tokeniser and picture preparation that go with a model."""
    return ExplainerProcessor.from_pretrained(ready(name), model.config, model.detector.inputs)


def _quantization(kind: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=FULL_PRECISION)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=FULL_PRECISION
    )
