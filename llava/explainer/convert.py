"""Published model folders become ours: LLaVA-1.5 in its first layout, and the merged M2F2-Det explainer.

Tensors are renamed, never changed; shards stream, so memory stays near the size of the largest one. A folder in
transformers' own LLaVA layout needs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava.core.conversion import REPORT_NAME, Plan, Rules, plan, write_shards
from llava.core.runtime import atomic_path, write_json
from llava.core.tensor_files import TensorFiles, tensor_files_in
from llava.core.weights import CONFIG_NAME, read_config, resolve
from llava.detectors.clip_prompt import ClipVisionSizes
from llava.detectors.m2f2det import M2F2Det
from llava.detectors.published import POSITION_IDS, PUBLISHED_PREFIXES, converted_folder, ready_detector
from llava.detectors.published_sizes import detector_config, read_clip_config, vision_sizes
from llava.explainer.configuration import ForgeryLlavaConfig, join_config
from llava.explainer.modeling import ForgeryLlava
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
        with torch.device("meta"):
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
        with torch.device("meta"):
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
