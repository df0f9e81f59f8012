"""A folder of parity fixtures: what it holds, its regenerated weights and inputs, and the differences found."""

from __future__ import annotations

import importlib.util
import json
import shutil
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

DEFAULT = Path(__file__).parents[2] / "shared" / "golden" / "dev"
RADAR = DEFAULT.parent / "radar" / "dev"
DIFFERENCES = pytest.StashKey[dict[tuple[str, str], tuple[float, float]]]()


def generator(root: Path, name: str) -> ModuleType:
    """Load the generator `name`, which lies in the folder, above it, or beside the development fixtures."""
    for folder in (root, *root.resolve().parents[:2], DEFAULT.parent, RADAR.parent):
        if (folder / name).is_file():
            spec = importlib.util.spec_from_file_location(Path(name).stem, folder / name)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise FileNotFoundError(f"{name} lies neither in {root} nor in the two folders above it; copy it there.")


class Fixture:
    """One sub-folder: manifest.json, expected.npz, and what the seed gives."""

    def __init__(self, folder: Path, config: pytest.Config) -> None:
        self.folder, self.name = folder, folder.name
        self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.seed = self.manifest["seed"]
        self.make = generator(folder.parent, self.manifest.get("generator", "gen_weights.py"))
        self._differences = config.stash[DIFFERENCES]

    @property
    def kind(self) -> str:
        """Tell the fixtures apart by what they say of themselves, not by their names."""
        manifest = self.manifest
        if "system" in manifest:
            return f"{manifest['system']}/{manifest['test']}"
        if "constructor" in manifest:
            return "stage_1" if "bridge_adapter_dim" in manifest["constructor"] else "detector"
        return next(
            k
            for k, mark in (("llm", "llm_config"), ("train", "stage"), ("preprocess", "processor"))
            if mark in manifest
        )

    @cached_property
    def expected(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "expected.npz") as arrays:
            return dict(arrays)

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.make.gen_state_dict(self.manifest["weights"], self.seed)

    def image(self, entry: dict[str, Any]) -> np.ndarray:
        if "constant_rgb" in entry:
            width, height = entry["size_wh"]
            return np.full((height, width, 3), entry["constant_rgb"], np.uint8)
        return self.make.gen_image(entry["gen_image_name"], *entry["size_wh"], self.seed)

    def input(self, name: str) -> torch.Tensor:
        entry = self.manifest["inputs"][name]
        return torch.from_numpy(self.make.gen_input(entry["gen_input_name"], entry["shape"], self.seed, entry["kind"]))

    def compare(self, name: str, actual: Any, atol: float, rtol: float = 0.0, kept: np.ndarray | None = None) -> None:
        """Compare with expected[name], a subsample where it is one, and note the largest difference.

        kept: which elements of the full tensor count.
        """
        wanted = self.expected[name]
        found = np.asarray(actual.detach() if isinstance(actual, torch.Tensor) else actual, dtype=np.float64)
        if f"{name}@idx" in self.expected:
            index = self.expected[f"{name}@idx"]
            found = found.reshape(-1)[index]
            if kept is not None:
                chosen = np.asarray(kept).reshape(-1)[index]
                assert chosen.any()
                found, wanted = found[chosen], wanted[chosen]
        assert found.size == wanted.size, (name, found.shape, wanted.shape)
        self.close(name, found.reshape(wanted.shape), wanted, atol, rtol)

    def close(self, name: str, found: Any, wanted: Any, atol: float, rtol: float = 0.0) -> None:
        """Compare two arrays of numbers and note the largest difference."""
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        assert found.size
        self._differences[self.name, name] = (float(np.abs(found - wanted).max()), atol)
        np.testing.assert_allclose(found, wanted, rtol=rtol, atol=atol, err_msg=f"{self.name}: {name}")

    def clip_folder(self, folder: Path) -> Path:
        """Write the CLIP's config.json, which says the attention heads."""
        folder.mkdir(parents=True, exist_ok=True)
        clip = self.manifest["clip_config"]
        parts = {"text_config": clip["text"], "vision_config": clip["vision"]}
        (folder / "config.json").write_text(json.dumps({"model_type": "clip", **parts}))
        return folder

    def publish(self, folder: Path, settings: dict[str, Any]) -> Path:
        """Write the weights as the published model folder that they came from, in two shards."""
        folder.mkdir(parents=True)
        tensors = {k: v.contiguous() for k, v in self.weights.items() if ".lora_" not in k}
        half = sorted(tensors)[len(tensors) // 2]
        for i, part in enumerate(({k for k in tensors if k < half}, {k for k in tensors if k >= half})):
            save_file({k: tensors[k] for k in part}, folder / f"model-{i + 1:05d}-of-00002.safetensors")
        own = {
            "model_type": "llava_llama",
            "torch_dtype": "float32",
            "mm_vision_tower": str(self.clip_folder(folder / "clip")),
        }
        (folder / "config.json").write_text(json.dumps(settings | own))
        for file in (self.folder / self.manifest["tokenizer"]).iterdir():
            shutil.copy(file, folder)
        return folder


def find(root: Path, config: pytest.Config, *kinds: str) -> list[Fixture]:
    """List the fixtures of some kinds."""
    manifests = sorted(root.glob("*/manifest.json"))
    return [fixture for path in manifests if (fixture := Fixture(path.parent, config)).kind in kinds]


def table(config: pytest.Config) -> list[str]:
    """Give the largest differences found, a line each."""
    rows = [
        (case, name, f"{worst:.1e}", f"{atol:.0e}") for (case, name), (worst, atol) in config.stash[DIFFERENCES].items()
    ]
    rows.insert(0, ("fixture", "quantity", "max |difference|", "allowed"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
