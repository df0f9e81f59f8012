"""Published model folders become ours: LLaVA-1.5, the merged M2F2-Det explainer, and outputs of stages 2 and 3.

Tensors are renamed, never changed; shards stream, so memory stays near the size of the largest one. A folder in
transformers' own LLaVA layout needs nothing.

Stage 2 is `mm_projector.bin` with the adapter. Stage 3 is `adapter_model.safetensors` (LoRA) beside
`non_lora_trainables.bin` (projector and adapter). The published LoRA was also wrapped round both CLIP towers, where it
was not trained: those tensors are dropped, after a look that they change nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from peft import get_peft_model_state_dict
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava.core.runtime import atomic_path, write_json
from llava.core.tensor_files import REPORT_NAME, Plan, Rules, TensorFiles, plan, tensor_files_in, write_shards
from llava.core.weights import CONFIG_NAME, read_config, resolve, shapes_only
from llava.detectors.m2f2det import M2F2Det
from llava.detectors.m2f2det_parts import ClipVisionSizes
from llava.detectors.m2f2det_published import (
    POSITION_IDS,
    PUBLISHED_PREFIXES,
    detector_config,
    read_clip_config,
    vision_sizes,
)
from llava.detectors.published import converted_folder, ready_detector
from llava.explainer.delta import LORA_WEIGHTS, OTHER_WEIGHTS, RECORD, add_lora, fingerprint, save_tensors, write_record
from llava.explainer.modeling import ForgeryLlava, ForgeryLlavaConfig, join_config
from llava.explainer.processing import read_tokenizer

log = logging.getLogger(__name__)

TOKENISER_FILES: Final = ("tokenizer.model", "tokenizer.json")
TOWER: Final = "model.vision_tower.vision_tower.vision_model."
DETECTOR: Final = "deepfake_encoder."
LAYOUT: Final = "published_train"  # what the published explainer was trained with
_LLAVA_PREFIXES: Final = {
    TOWER: "model.vision_tower.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
    "lm_head.": "lm_head.",
}
_DROPPED: Final = {
    **POSITION_IDS,
    "*.rotary_emb.inv_freq": "computed from the config",
    "clip.": "of the CLIP, LLaVA uses the vision tower only",
}
RULES: Final = Rules(
    prefixes=_LLAVA_PREFIXES
    | {"deepfake_projector.": "deepfake_projector."}
    | {DETECTOR + old: "detector." + new for old, new in PUBLISHED_PREFIXES.items()},
    dropped=_DROPPED,
)
_LLAMA_KEYS: Final = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
WRAPPED: Final = "base_model.model."
LORA_FILES: Final = (LORA_WEIGHTS, "adapter_model.bin")
_LEAKED: Final = dict.fromkeys(
    (f"{WRAPPED}model.vision_tower.", f"{WRAPPED}deepfake_encoder."),
    "LoRA round a frozen CLIP tower, never trained: its B is zero",
)
_LORA_RULES: Final = Rules(
    prefixes={f"{WRAPPED}model.layers.": f"{WRAPPED}model.language_model.layers."}, dropped=_LEAKED
)
_TRAINED: Final = ("deepfake_projector.", "model.multi_modal_projector.")


def is_published(settings: Mapping[str, Any]) -> bool:
    """Say whether a config.json is that of the first LLaVA layout, with or without a detector."""
    return settings.get("model_type") in ("llava", "llava_llama") and "vision_config" not in settings


class PublishedFolder:
    """A published model folder: its plan, and how to write it in our layout.

    vision_tower: a file, folder or hub id with the CLIP vision tower, for a LLaVA that comes without one (None = what
    its config names). clip: folder of the CLIP's config.json (None = `mm_vision_tower` of the config if that is a
    folder, else ViT-L/14-336). Raises ValueError or FileNotFoundError.
    """

    def __init__(self, folder: Path, vision_tower: str | None = None, clip: str | None = None) -> None:
        self.folder, self.settings = folder, read_config(folder)
        if not is_published(self.settings):
            held = self.settings.get("model_type") or self.settings.get("detector")
            raise ValueError(f"{str(folder)!r} holds {held!r} in a layout that needs no conversion; use it as it is.")
        self.tensors = TensorFiles(tensor_files_in(folder))
        named = str(self.settings.get("mm_vision_tower", ""))
        if f"{TOWER}embeddings.patch_embedding.weight" not in self.tensors:
            tower = vision_tower or named
            log.info("%s holds no CLIP vision tower; taking %s", folder, tower)
            self.tensors.add(_tower_files(tower), _tower_name)
        clip = clip or (named if (Path(named) / CONFIG_NAME).is_file() else None)
        self.config = self._config(None if clip is None else read_clip_config(clip))
        with shapes_only():
            kind = ForgeryLlava if isinstance(self.config, ForgeryLlavaConfig) else LlavaForConditionalGeneration
            wanted = {name: tuple(tensor.shape) for name, tensor in kind(self.config).state_dict().items()}
        self.plan: Plan = plan(self.tensors.shapes, wanted, RULES)

    def write(self, out: Path) -> None:
        """Write config, tokeniser, weights and conversion.json.

        Raises ValueError when tensors do not fit and FileNotFoundError without a tokeniser, before anything is written.
        """
        self.plan.check(str(self.folder))
        if not any((self.folder / name).is_file() for name in TOKENISER_FILES):
            raise FileNotFoundError(
                f"{str(self.folder)!r} holds no tokeniser ({' or '.join(TOKENISER_FILES)}); copy that of the LLaVA or "
                "Vicuna it was made from into it."
            )
        with atomic_path(out) as staged:
            write_shards(staged, self.plan.moves, self.tensors)
            self.config.save_pretrained(staged)
            read_tokenizer(self.folder, config=self.config.text_config).save_pretrained(staged)
            write_json(staged / REPORT_NAME, self.plan.to_dict() | {"from": self.folder.name})

    def _config(self, clip: Mapping[str, Any] | None) -> LlavaConfig:
        shapes = self.tensors.shapes
        _refuse_unknown(self.settings, str(self.folder))
        base = _llava_config(self.settings, vision_sizes(shapes, TOWER, clip))
        own = {name.removeprefix(DETECTOR): shape for name, shape in shapes.items() if name.startswith(DETECTOR)}
        if not own:
            return base
        with shapes_only():
            detector = M2F2Det(detector_config(own, clip))
        ratio = "pad" if self.settings.get("image_aspect_ratio") == "pad" else "square"
        return join_config(base, detector, ratio, evidence_tokens=1, layout=LAYOUT)


def ready(name: str | Path) -> Path:
    """Give the folder of a model that our loaders read: as `resolve`, and a published one is converted first.

    The converted copy is kept in `checkpoints/converted/`. Raises FileNotFoundError or ValueError.
    """
    folder = ready_detector(name)
    if not (folder / CONFIG_NAME).is_file() or not is_published(read_config(folder)):
        return folder
    target = converted_folder(folder, [folder / CONFIG_NAME, *tensor_files_in(folder)])
    if not target.is_dir():
        published = PublishedFolder(folder)
        log.info("%s has the published layout (%s); writing %s", folder, published.plan.counts(), target)
        published.write(target)
    return target


def _tower_files(tower: str) -> list[Path]:
    """Find the files of a CLIP vision tower. Raises FileNotFoundError that says how to name another."""
    if Path(tower).is_file():
        return [Path(tower)]
    try:
        return tensor_files_in(resolve(tower))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"These weights come without a CLIP vision tower. {error} With such a copy, or a vision_tower.pth, run: "
            "python scripts/convert_m2f2.py --model_path FOLDER --vision_tower COPY --save_path OUT"
        ) from error


def _tower_name(stored: str) -> str:
    """Give a CLIP vision tensor the name that it has inside a LLaVA."""
    name = stored.removeprefix("vision_tower.")
    return TOWER + name.removeprefix("vision_model.") if name.startswith("vision_model.") else f"clip.{stored}"


def _llava_config(settings: Mapping[str, Any], vision: ClipVisionSizes) -> LlavaConfig:
    tower = {name: value for name, value in vision.__dict__.items() if name != "select_layer"}
    text = {name: settings[name] for name in _LLAMA_KEYS if name in settings}
    kept = ("image_aspect_ratio", "deepfake_model_name", "deepfake_model_path")
    return LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**tower),
        image_token_index=settings["vocab_size"],
        vision_feature_layer=vision.select_layer,
        vision_feature_select_strategy="default",
        image_seq_length=vision.grid**2,
        tie_word_embeddings=False,
        dtype=settings.get("torch_dtype", "float32"),
        **{name: settings[name] for name in kept if name in settings},
    )


def _refuse_unknown(settings: Mapping[str, Any], folder: str) -> None:
    """Refuse a published config that this layout can not express."""
    wanted = {
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_vision_select_layer": -2,
    }
    for name, value in wanted.items():
        if settings.get(name, value) != value:
            raise ValueError(
                f"{folder!r}: {name} is {settings[name]!r}; only {value!r}, as in LLaVA-1.5, is known here."
            )


ADAPTER_FILE, PROJECTOR_FILE, OTHERS_FILE = "adapter_config.json", "mm_projector.bin", "non_lora_trainables.bin"


def ready_delta(name: str | Path, base: Path) -> Path:
    """Give a delta folder that `merge_delta` reads; a published one is converted for `base` first.

    The converted copy is kept in `checkpoints/converted/`. Raises FileNotFoundError or ValueError.
    """
    folder = resolve(name)
    if (folder / RECORD).is_file():
        return folder
    files = [folder / name for name in (PROJECTOR_FILE, OTHERS_FILE, *LORA_FILES) if (folder / name).is_file()]
    if not files:
        return folder
    target = converted_folder(folder, [*files, *sorted(base.glob("*.safetensors"))])
    if not target.is_dir():
        PublishedDelta(folder, base).write(target)
        log.info("%s is a published delta; written for %s to %s", folder, base, target)
    return target


class PublishedDelta:
    """A published stage-2 or stage-3 folder, and the base (an explainer of ours) that it is for.

    Raises ValueError when a tensor is missing, left over or of another shape, and for a LoRA that was not saved.
    """

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base = folder, base
        self.config = ForgeryLlavaConfig.from_pretrained(base)
        self.lora = self._lora_files()
        others = TensorFiles([folder / (OTHERS_FILE if self.lora else PROJECTOR_FILE)])
        if not self.lora and any(name.startswith(WRAPPED) for name in others):
            raise ValueError(
                f"{str(folder)!r} is a checkpoint of a LoRA run that holds the projectors alone: the published trainer "
                "does not save LoRA there. Give the folder of the finished run, with adapter_model.safetensors."
            )
        self.others = {name.removeprefix(WRAPPED): tensor for name, tensor in others.items()}
        self.adapter = read_adapter(folder) if self.lora else {}
        self.plans = self._plans()

    def write(self, out: Path) -> None:
        """Write the delta as our own training would, with a report. Raises ValueError when tensors do not fit."""
        for what, found in self.plans.items():
            found.check(f"{self.folder} ({what})")
        with atomic_path(out) as staged:
            staged.mkdir()
            lora = self._moved("lora", self.lora)
            if lora:
                self._wrapped().peft_config["default"].save_pretrained(str(staged))
                save_tensors(staged / LORA_WEIGHTS, lora)
            others = self._moved("others", self.others)
            save_tensors(staged / OTHER_WEIGHTS, others)
            base = {"name": str(self.base), "sha256": fingerprint(self.base)}
            write_record(staged, base, len(others), len(lora))
            write_json(staged / REPORT_NAME, {what: found.to_dict() for what, found in self.plans.items()})

    def _lora_files(self) -> Mapping[str, Tensor]:
        files = [self.folder / name for name in LORA_FILES]
        present = [file for file in files if file.is_file()]
        return TensorFiles(present[:1]) if present else {}

    def _plans(self) -> dict[str, Plan]:
        with shapes_only():
            own = {name: tuple(tensor.shape) for name, tensor in ForgeryLlava(self.config).named_parameters()}
        given = {name: tuple(tensor.shape) for name, tensor in self.others.items()}
        parts = _TRAINED if self.lora else _TRAINED[:1]
        plans = {"others": plan(given, {n: shape for n, shape in own.items() if n.startswith(parts)}, RULES)}
        if self.lora:
            wanted = {n: tuple(t.shape) for n, t in get_peft_model_state_dict(self._wrapped()).items()}
            plans["lora"] = plan({n: tuple(t.shape) for n, t in self.lora.items()}, wanted, _LORA_RULES)
            self._refuse_trained_leaks(plans["lora"])
        return plans

    def _refuse_trained_leaks(self, found: Plan) -> None:
        leaks = [move.source for move in found.moves if move.action == "dropped" and ".lora_B" in move.source]
        trained = [name for name in leaks if bool(self.lora[name].any())]
        if trained:
            raise ValueError(
                f"{str(self.folder)!r}: {len(trained)} LoRA tensors round a CLIP tower are not zero (first: "
                f"{trained[0]}); folding them would change the tower that the detector was trained with."
            )

    def _wrapped(self) -> Any:
        """Give an empty explainer with LoRA of these sizes."""
        with shapes_only():
            return add_lora(
                ForgeryLlava(self.config),
                self.adapter["r"],
                self.adapter["lora_alpha"],
                self.adapter.get("lora_dropout", 0.0),
            )

    def _moved(self, what: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if what not in self.plans:
            return {}
        return {move.target: tensors[move.source] for move in self.plans[what].moves if move.target}


def read_adapter(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises FileNotFoundError when it is not beside the LoRA tensors."""
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds LoRA tensors but no {ADAPTER_FILE}; copy it, too.")
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return settings
