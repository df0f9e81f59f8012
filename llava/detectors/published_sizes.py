"""What the names and shapes of a published detector's tensors say of its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPVisionConfig

from llava.core.weights import read_config
from llava.detectors.backbones import BACKBONES, DENSENETS, EFFICIENTNETS, make_backbone
from llava.detectors.clip_prompt import ClipTextSizes, ClipVisionSizes
from llava.detectors.m2f2det_config import M2F2DetConfig

Shapes = Mapping[str, tuple[int, ...]]
_CLIP_PARTS = {"text_config": CLIPTextConfig, "vision_config": CLIPVisionConfig}


def has_constant_bridge(shapes: Shapes) -> bool:
    """Say whether the names are those of the published stage 1."""
    return any(name.startswith("bridge_adapter_proj.") for name in shapes)


def detector_config(shapes: Shapes, clip: Mapping[str, Any] | None = None) -> M2F2DetConfig:
    """Read a published detector's settings off its tensors' names and shapes.

    clip: a CLIP config.json, for attention heads, which shapes do not show; None = those of ViT-L/14-336. Raises
    ValueError when the shapes are those of no M2F2-Det, or of another CLIP.
    """
    try:
        hidden = shapes["deepfake_proj.0.weight"][0]
        features = shapes["vision_proj.0.weight"][1]
    except KeyError as error:
        raise ValueError(f"These are not the tensors of an M2F2-Det detector: {error} is not among them.") from None
    own_vision = any(name.startswith("clip_vision_encoder.") for name in shapes)
    vision_prefix = "clip_vision_encoder.model.vision_model."
    vision = vision_sizes(shapes, vision_prefix, clip) if own_vision else _tower_of_host(shapes, features, hidden, clip)
    values: dict[str, Any] = {"vision": vision, "own_vision": own_vision, "hidden_size": hidden}
    if has_constant_bridge(shapes):
        values["fusion"] = "none"
    else:
        values |= {"text": text_sizes(shapes, clip), "prompt_tokens": shapes["clip_text_encoder.prompt_tokens"][1]}
    return M2F2DetConfig(backbone=_backbone(shapes), **values)


def vision_sizes(shapes: Shapes, prefix: str, clip: Mapping[str, Any] | None) -> ClipVisionSizes:
    """Read the sizes of a CLIP vision tower off its tensors. Raises ValueError as `detector_config` does."""
    width, _, patch, _ = shapes[f"{prefix}embeddings.patch_embedding.weight"]
    grid = round((shapes[f"{prefix}embeddings.position_embedding.weight"][0] - 1) ** 0.5)
    found = {
        **_tower(shapes, prefix, width),
        "image_size": grid * patch,
        "patch_size": patch,
    }
    return _with_heads(ClipVisionSizes, found, clip, "vision_config")


def text_sizes(shapes: Shapes, clip: Mapping[str, Any] | None) -> ClipTextSizes:
    """Read the sizes of the CLIP text transformer off its tensors. Raises ValueError as `detector_config` does."""
    prefix = "clip_text_encoder.model.text_model."
    vocabulary, width = shapes[f"{prefix}embeddings.token_embedding.weight"]
    found = {
        **_tower(shapes, prefix, width),
        "vocab_size": vocabulary,
        "max_position_embeddings": shapes[f"{prefix}embeddings.position_embedding.weight"][0],
    }
    return _with_heads(ClipTextSizes, found, clip, "text_config")


def read_clip_config(folder: str | Path) -> dict[str, Any]:
    """Read a CLIP config.json. Raises ValueError when its activation is not that of OpenAI's CLIP."""
    settings = read_config(folder)
    for part in ("text_config", "vision_config"):
        if (settings.get(part) or {}).get("hidden_act", "quick_gelu") != "quick_gelu":
            raise ValueError(
                f"{str(folder)!r}: the hidden_act of its {part} is not quick_gelu; M2F2-Det reads OpenAI's CLIP."
            )
    return settings


def _tower(shapes: Shapes, prefix: str, width: int) -> dict[str, int]:
    stem = f"{prefix}encoder.layers."
    layers = {name.removeprefix(stem).split(".")[0] for name in shapes if name.startswith(stem)}
    return {
        "hidden_size": width,
        "intermediate_size": shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": len(layers),
    }


def _with_heads(kind: type[Any], found: dict[str, int], clip: Mapping[str, Any] | None, part: str) -> Any:
    """Add what shapes do not show: from the CLIP's config, else from ViT-L/14-336 if it is that one."""
    if clip is not None:
        if not clip.get(part):
            raise ValueError(f"The CLIP's config.json has no {part}; name the folder of a whole CLIP (--clip FOLDER).")
        return kind(**found, num_attention_heads=_CLIP_PARTS[part](**clip[part]).num_attention_heads)
    known = kind()
    if any(getattr(known, name) != value for name, value in found.items()):
        raise ValueError(
            f"The CLIP here is not ViT-L/14-336 but {found}; its attention heads can not be seen in the weights: "
            "name the folder of its config.json (--clip FOLDER)."
        )
    return known


def _tower_of_host(shapes: Shapes, features: int, hidden: int, clip: Mapping[str, Any] | None) -> ClipVisionSizes:
    """Give the sizes of the tower that a detector without one expects; patches = classifier inputs - 2 * hidden."""
    known = asdict(ClipVisionSizes())
    if clip is not None:
        known |= {name: value for name, value in clip["vision_config"].items() if name in known}
    sizes = ClipVisionSizes(**known)
    patches = shapes["output.weight"][1] - 2 * hidden
    if (sizes.hidden_size, sizes.grid**2) != (features, patches):
        raise ValueError(
            f"The detector reads {patches} patches of width {features}, ViT-L/14-336 gives {sizes.grid**2} of "
            f"{sizes.hidden_size}; name the folder of its CLIP's config.json (--clip FOLDER)."
        )
    return sizes


def _backbone(shapes: Shapes) -> str:
    """Find the CNN that shares most tensors with these; the plan then names what differs."""
    prefix = "deepfake_encoder."
    found = {(name.removeprefix(prefix), shape) for name, shape in shapes.items() if name.startswith(prefix)}
    shared: dict[str, int] = {}
    for name in DENSENETS if any(key == "conv0.weight" for key, _ in found) else EFFICIENTNETS:
        with torch.device("meta"):
            own = make_backbone(name)[0].state_dict().items()
        shared[name] = len(found & {(key, tuple(tensor.shape)) for key, tensor in own})
    best = max(shared, key=lambda name: shared[name])
    if 2 * shared[best] <= len(found) or not found:
        raise ValueError(f"No CNN known here has the {len(found)} tensors deepfake_encoder.*; known: {BACKBONES}.")
    return best
