"""Published M2F2-Det detector files: which of the three generations one holds, and how it becomes ours.

In the explainer's generation everything is renamed. In stage 1's, the bridge ends in a LayerNorm over one value, whose
output is its bias whatever the image: that constant is folded into the classifier's bias, exactly. The first commit's
generation (`link_adapter_proj`) has another head and is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel

from llava.core.runtime import atomic_path, write_json
from llava.core.tensor_files import REPORT_NAME, Plan, Rules, TensorFiles, plan, write_shards
from llava.core.weights import read_config, shapes_only
from llava.detectors.backbones import BACKBONES, DENSENETS, EFFICIENTNETS, make_backbone
from llava.detectors.m2f2det import M2F2Det, M2F2DetConfig
from llava.detectors.m2f2det_parts import ClipTextSizes, ClipVisionSizes
from llava.detectors.published import PublishedFile, Unseen, detector_tensors, plan_for

log = logging.getLogger(__name__)

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
        with shapes_only():
            own = make_backbone(name)[0].state_dict().items()
        shared[name] = len(found & {(key, tuple(tensor.shape)) for key, tensor in own})
    best = max(shared, key=lambda name: shared[name])
    if 2 * shared[best] <= len(found) or not found:
        raise ValueError(f"No CNN known here has the {len(found)} tensors deepfake_encoder.*; known: {BACKBONES}.")
    return best


# published prefix -> our prefix; the inner `text_model.` / `vision_model.` level left transformers with version 5
PUBLISHED_PREFIXES: Final = {
    "clip_text_encoder.model.text_model.": "text_encoder.model.",
    "clip_text_encoder.": "text_encoder.",
    "clip_vision_encoder.model.vision_model.": "vision_encoder.model.",
    "deepfake_encoder.": "backbone.",
    "deepfake_proj.": "backbone_proj.",
    "clip_vision_alpha": "vision_alpha",
    "clip_text_alpha": "text_alpha",
    "output.": "classifier.",
    "text_proj.": "text_proj.",
    "vision_proj.": "vision_proj.",
}
TOWER_NAME: Final = "vision_tower.pth"
TOWER_PREFIX: Final = "vision_tower.vision_model."
POSITION_IDS: Final = {"*.position_ids": "a constant that transformers makes itself"}
_CONSTANT = "the bridge's output, a constant"
_BRIDGE = "bridge_adapter_proj.bridge_adapter_proj"
_REDUCTION = "bridge_adapter_proj.bridge_adapter_reduction"
_FOLDED: Final = {
    f"{_BRIDGE}.2.bias": _CONSTANT,
    **{f"{_REDUCTION}.{part}": _CONSTANT for part in ("0.weight", "0.bias", "1.weight", "1.bias")},
    "clip_text_alpha": "scales the bridge's constant",
    "output.weight": "loses the columns of the bridge",
    "output.bias": "takes the bridge's constant",
}
_ERASED = "behind it a LayerNorm over one value gives its bias whatever comes in"
_DISCARDED = "the published stage 1 computes text features and does not use them"
_DROPPED: Final = {
    **dict.fromkeys((f"{_BRIDGE}.1.", f"{_BRIDGE}.2.weight", "linear_1.", "linear_2.", "linear_3."), _ERASED),
    "clip_reduction.": _ERASED,
    "clip_text_encoder.": _DISCARDED,
    "text_proj.": _DISCARDED,
}


def rules_of(shapes: Shapes) -> Rules:
    """Give the rules of the generation that the names show. Raises ValueError for the first commit's."""
    if any(name.startswith("link_adapter_proj") for name in shapes):
        raise ValueError(
            "These are weights of M2F2-Det's first commit (link_adapter_proj), whose head exists nowhere any more; "
            "take the detector of the present release, or train stage 1."
        )
    if has_constant_bridge(shapes):
        return Rules(prefixes=PUBLISHED_PREFIXES, folded=_FOLDED, dropped=POSITION_IDS | _DROPPED)
    return Rules(prefixes=PUBLISHED_PREFIXES, dropped=POSITION_IDS)


def detector_plan(shapes: Shapes, config: M2F2DetConfig) -> Plan:
    """Plan how published tensors become those of our detector with these settings."""
    computed = ("classifier.weight", "classifier.bias") if has_constant_bridge(shapes) else ()
    return plan_for(M2F2Det, config, shapes, rules_of(shapes), computed)


def folded_classifier(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold the constant bridge of the published stage 1 into the classifier, computed in float64.

    bridge = LN(Linear(b, b, ... b)), b the bias of the LayerNorm over one value; its columns stand in the middle of
    the published classifier: [CLS (h), bridge, CNN (h)].
    """
    wide = {name: tensors[name].double() for name in tensors if name.startswith(("output.", "bridge_adapter_proj."))}
    constant = bridge_constant(wide) * tensors["clip_text_alpha"].double()
    hidden = tensors["deepfake_proj.0.weight"].shape[0]
    cls, bridge, cnn = wide["output.weight"].split([hidden, len(constant), hidden], dim=1)
    kind = tensors["output.weight"].dtype
    bias = wide["output.bias"] + bridge @ constant
    return {"classifier.weight": torch.cat([cls, cnn], dim=1).to(kind), "classifier.bias": bias.to(kind)}


def bridge_constant(tensors: Mapping[str, Tensor]) -> Tensor:
    """Give what the published bridge answers to every image, before its alpha: (128,)."""
    matrix = tensors[f"{_REDUCTION}.0.weight"]
    ones = torch.ones(matrix.shape[1], dtype=matrix.dtype)
    linear = F.linear(tensors[f"{_BRIDGE}.2.bias"] * ones, matrix, tensors[f"{_REDUCTION}.0.bias"])
    return F.layer_norm(linear, linear.shape, tensors[f"{_REDUCTION}.1.weight"], tensors[f"{_REDUCTION}.1.bias"])


class PublishedDetector(PublishedFile):
    """A published detector file: its plan, and how to write it in our layout.

    The tensors may be wrapped, as the published trainer's Saver does, and carry the `module.` of DataParallel. A file
    without a CLIP vision tower gets that of `vision_tower.pth` beside it or of `vision_tower`; with neither the
    detector can live in an explainer only. Raises ValueError or FileNotFoundError.
    """

    detector = M2F2Det
    marks = ("deepfake_proj.0.weight",)
    config: M2F2DetConfig

    def __init__(self, file: Path, vision_tower: Path | None = None, clip: Mapping[str, Any] | None = None) -> None:
        tensors = detector_tensors(file)
        beside = file.with_name(TOWER_NAME)
        has_tower = any(name.startswith("clip_vision_encoder.") for name in tensors.shapes)
        tower = vision_tower or (beside if beside.is_file() else None)
        if not has_tower and tower is not None:
            log.info("%s holds no CLIP vision tower; taking that of %s", file, tower)
            tensors.add([tower], lambda name: f"clip_vision_encoder.model.{name.removeprefix('vision_tower.')}")
        config = detector_config(tensors.shapes, clip)
        super().__init__(file, tensors, config, detector_plan(tensors.shapes, config))

    @classmethod
    def open(cls, file: Path, unseen: Unseen) -> Self:
        """Open a file with the vision tower and the CLIP's settings that are said by hand."""
        return cls(file, unseen.vision_tower, unseen.clip)

    @classmethod
    def files_of(cls, file: Path) -> list[Path]:
        """List the file and, where there is one, the vision tower beside it."""
        tower = file.with_name(TOWER_NAME)
        return [file, tower] if tower.is_file() else [file]

    @property
    def remark(self) -> str:
        """Warn of a detector without a vision tower."""
        if self.config.own_vision:
            return ""
        return (
            "it has no CLIP vision tower, so it can only be merged into a LLaVA; for use on its own put "
            f"{TOWER_NAME} beside it"
        )

    def computed(self) -> dict[str, Tensor]:
        """Give the classifier that holds the constant bridge of stage 1."""
        return folded_classifier(self.tensors) if has_constant_bridge(self.tensors.shapes) else {}


class PublishedTower:
    """A `vision_tower.pth`: CLIP's vision transformer alone, which becomes a folder that transformers reads."""

    def __init__(self, file: Path, clip: Mapping[str, Any] | None = None) -> None:
        self.file = file
        self.tensors = TensorFiles([file])
        sizes = asdict(vision_sizes(self.tensors.shapes, TOWER_PREFIX, clip))
        self.config = CLIPVisionConfig(**{name: value for name, value in sizes.items() if name != "select_layer"})
        with shapes_only():
            state = CLIPVisionModel(self.config).state_dict()
        rules = Rules(prefixes={TOWER_PREFIX: ""}, dropped=POSITION_IDS)
        self.plan: Plan = plan(self.tensors.shapes, {name: tuple(t.shape) for name, t in state.items()}, rules)

    def write(self, folder: Path) -> None:
        """Write config.json, model.safetensors and conversion.json. Raises ValueError when tensors do not fit."""
        self.plan.check(str(self.file))
        with atomic_path(folder) as staged:
            write_shards(staged, self.plan.moves, self.tensors, shard_bytes=float("inf"))
            self.config.save_pretrained(staged)
            write_json(staged / REPORT_NAME, self.plan.to_dict() | {"from": self.file.name})
