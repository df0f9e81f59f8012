"""Published folders with random weights, at any size: `python tests/published_weights.py OUT` makes the 7B one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava.core.weights import shapes_only
from llava.detectors.m2f2det import M2F2Det, M2F2DetConfig
from llava.detectors.m2f2det_parts import ClipVisionSizes
from llava.explainer.convert import RULES
from llava.explainer.modeling import ForgeryLlava, join_config

VICUNA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
TINY_LLAMA = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
TINY_CLIP = {
    "text_config": {"num_attention_heads": 2, "hidden_act": "quick_gelu"},
    "vision_config": {
        "num_attention_heads": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "image_size": 56,
        "patch_size": 14,
    },
}
MM = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "cls_patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "deepfake_model_name": "densenet121",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def tiny_detector_config(own_vision: bool = False) -> M2F2DetConfig:
    """Give a detector of published form that fits `TINY_CLIP`: a real DenseNet-121, the rest small."""
    vision = ClipVisionSizes(**{k: v for k, v in TINY_CLIP["vision_config"].items() if k != "hidden_act"})
    return M2F2DetConfig(
        text=M2F2DetConfig.tiny().text, vision=vision, hidden_size=16, prompt_tokens=3, own_vision=own_vision
    )


def published_shapes(
    llama: dict[str, Any], detector: M2F2DetConfig | None, vision: ClipVisionSizes
) -> dict[str, tuple[int, ...]]:
    """Give the published names and shapes of a LLaVA, with this detector in it if there is one."""
    tower = CLIPVisionConfig(**{k: v for k, v in vision.__dict__.items() if k != "select_layer"})
    config = LlavaConfig(text_config=LlamaConfig(**llama), vision_config=tower, image_token_index=llama["vocab_size"])
    with shapes_only():
        if detector is None:
            model = LlavaForConditionalGeneration(config)
        else:
            model = ForgeryLlava(join_config(config, M2F2Det(detector), "pad", 1, "published_train"))
    return {RULES.foreign(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def random_tensors(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Draw one tensor at a time; norms and BatchNorm statistics keep near 1, so that outputs are finite."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            yield name, torch.zeros(shape, dtype=torch.int64)
        elif name.endswith(("running_var", "norm.weight", "norm1.weight", "norm2.weight")):
            yield name, torch.ones(shape, dtype=dtype)
        else:
            yield name, torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=generator)


def write_folder(
    folder: Path,
    llama: dict[str, Any],
    detector: M2F2DetConfig | None,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: float = 1 << 62,
    missing: str = "",
    extra: str = "",
    vision: ClipVisionSizes | None = None,
) -> dict[str, tuple[int, ...]]:
    """Write a published model folder without its tokeniser, one tensor in memory after another up to a shard's size."""
    folder.mkdir(parents=True)
    shapes = published_shapes(llama, detector, vision or (detector or M2F2DetConfig()).vision)
    if missing:
        del shapes[missing]
    if extra:
        shapes[extra] = (2, 2)
    waiting: dict[str, Tensor] = {}
    parts: list[Path] = []
    for name, tensor in random_tensors(shapes, dtype):
        if waiting and sum(t.nbytes for t in waiting.values()) + tensor.nbytes > shard_bytes:
            parts.append(_save(folder, len(parts), waiting))
            waiting = {}
        waiting[name] = tensor
    parts.append(_save(folder, len(parts), waiting))
    for i, part in enumerate(parts):
        part.rename(folder / f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors")
    kind = {
        "model_type": "llava" if detector is None else "llava_llama",
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    feature = {} if detector else {"mm_vision_select_feature": "patch"}  # as LLaVA-1.5's own config says
    (folder / "config.json").write_text(json.dumps(MM | llama | kind | feature))
    return shapes


def _save(folder: Path, number: int, tensors: dict[str, Tensor]) -> Path:
    path = folder / f"part-{number}"
    save_file(tensors, path, metadata={"format": "pt"})
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--missing", default="", help="leave this tensor out")
    parser.add_argument("--extra", default="", help="add a tensor of this name")
    given = parser.parse_args()
    made = write_folder(
        given.out, VICUNA_7B, M2F2DetConfig(own_vision=False), shard_bytes=5e9, missing=given.missing, extra=given.extra
    )
    print(f"{len(made)} tensors in {given.out}")
