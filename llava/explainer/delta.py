"""What training changed, in a folder of its own: LoRA, projector and adapter tensors, and which base they fit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeAlias

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava.core.runtime import atomic_path, write_json
from llava.core.tensor_files import TensorFiles, tensor_files_in
from llava.core.weights import sha256_of, sha256_of_tensors
from llava.detectors.base import Detector
from llava.detectors.members import HOST
from llava.explainer.modeling import ForgeryLlava

VISION_TOWER = "model.vision_tower."  # how the names of its tensors begin in an explainer
LORA_WEIGHTS = "adapter_model.safetensors"
OTHER_WEIGHTS = "non_lora_trainables.safetensors"
RECORD = "delta.json"
# Only the language model's linear layers; the published suffix match also wrapped both CLIP towers.
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
Model: TypeAlias = ForgeryLlava | PeftModel


def add_lora(model: ForgeryLlava, rank: int, alpha: int, dropout: float) -> PeftModel:
    """Wrap the language model's linear layers with fresh LoRA weights (Hu et al. 2021)."""
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", target_modules=LORA_TARGETS, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)  # type: ignore[return-value]


def inner(model: Model) -> ForgeryLlava:
    """Give the explainer itself, without PEFT's wrapping."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


def other_trainables(model: Model) -> dict[str, Tensor]:
    """Give the trainable tensors that are not LoRA, by their name in the explainer."""
    return {n: p for n, p in inner(model).named_parameters() if p.requires_grad and ".lora_" not in n}


def fingerprint(folder: str | Path) -> str:
    """Give one SHA-256 over all weight files of a model folder, so that a delta knows its base."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{str(folder)!r} holds no *.safetensors; give a model folder.")
    return hashlib.sha256("".join(sha256_of(f) for f in files).encode()).hexdigest()


def detector_fingerprint(folder: str | Path, detector: Detector) -> str:
    """Give one SHA-256 of all that computes the scores of an explainer's detector, as its folder stores it.

    The host's vision tower is counted where the detector shares it. Where both are stored with the values of stage 1,
    it is `Detector.fingerprint()` of the detector alone; how the model is loaded makes no difference.
    """
    own = [(HOST, "")]
    if (tower := detector.shared_tower()) is not None and detector.shares_vision:
        own.append((VISION_TOWER, tower.prefix))
    stored = TensorFiles(tensor_files_in(folder))  # a map of the files, so nothing is copied into memory
    return sha256_of_tensors(
        {to + name.removeprefix(start): stored[name] for name in stored for start, to in own if name.startswith(start)}
    )


def save_delta(model: Model, folder: str | Path, base: dict[str, Any], state: dict[str, Tensor] | None = None) -> None:
    """Write every trained tensor into `folder`. `base`: name and fingerprint of the model that was trained on.

    state: a gathered full state dict where parameters are sharded; else the model's own.
    """
    folder = Path(folder)
    source = state if state is not None else model.state_dict()
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    others = {name: source[prefix + name] for name in other_trainables(model)}
    lora: dict[str, Tensor] = {}
    if isinstance(model, PeftModel):
        lora = get_peft_model_state_dict(model, state_dict=source)
        model.peft_config["default"].save_pretrained(str(folder))
        save_tensors(folder / LORA_WEIGHTS, lora)
    save_tensors(folder / OTHER_WEIGHTS, others)
    write_record(folder, base, len(others), len(lora))


def write_record(folder: Path, base: dict[str, Any], others: int, lora: int) -> None:
    """Write what a delta folder says of itself: its base (name and sha256) and how many tensors it holds."""
    write_json(folder / RECORD, {"base": base, "others": others, "lora": lora})


def load_delta(model: Model, folder: str | Path) -> int:
    """Put a delta into a model that is already wrapped like it; gives the number of tensors restored.

    Raises ValueError when a tensor is missing or left over: nothing is restored in part.
    """
    record = read_record(folder)
    others = load_file(Path(folder) / OTHER_WEIGHTS)
    own = dict(inner(model).named_parameters())
    unknown = sorted(others.keys() - own.keys())
    if unknown or len(others) != record["others"]:
        raise ValueError(
            f"{str(folder)!r}: {len(others)} tensors, {record['others']} recorded, unknown: {unknown[:3]}."
        )
    lora = load_file(Path(folder) / LORA_WEIGHTS) if record["lora"] else {}
    if bool(lora) != isinstance(model, PeftModel) or len(lora) != record["lora"]:
        raise ValueError(f"{str(folder)!r}: {len(lora)} LoRA tensors, {record['lora']} recorded; the file is damaged.")
    if judging := [name for name in (*others, *lora) if HOST in name or "vision_tower." in name]:
        raise ValueError(
            f"{str(folder)!r} would change the detector or the vision tower (first: {judging[0]}), and with them every "
            "score; no training of ours writes such a delta."
        )
    if lora:
        wanted = get_peft_model_state_dict(model).keys()  # type: ignore[arg-type]
        if wanted != lora.keys():
            raise ValueError(f"{str(folder)!r}: LoRA tensors do not fit: {sorted(wanted ^ lora.keys())[:3]}.")
        set_peft_model_state_dict(model, lora)
    for name, tensor in others.items():
        own[name].data.copy_(tensor)
    return len(lora) + len(others)


def attach(model: ForgeryLlava, folder: str | Path) -> Model:
    """Wrap a base as the delta in `folder` needs it and restore the delta."""
    wrapped: Model = model
    if read_record(folder)["lora"]:
        wrapped = get_peft_model(model, LoraConfig.from_pretrained(str(folder)))  # type: ignore[assignment]
    load_delta(wrapped, folder)
    return wrapped


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read what a delta folder says of itself. Raises FileNotFoundError for a folder that is none."""
    path = Path(folder) / RECORD
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is no delta: it has no {RECORD}. Give the stage's output folder.")
    return json.loads(path.read_text(encoding="utf-8"))


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically."""
    with atomic_path(path) as staged:
        save_file({n: t.detach().contiguous().cpu().clone() for n, t in tensors.items()}, staged)
