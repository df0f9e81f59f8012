"""Where weights are found, and how a module is saved and loaded: config.json + model.safetensors, strictly."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, bfloat16, device, float16, float32, nn, uint8
from torch.overrides import TorchFunctionMode

from llava.core.registry import nearest
from llava.core.runtime import atomic_path, write_json
from llava.core.types import STARTER

log = logging.getLogger(__name__)

STARTER_DIR = Path(__file__).parents[1] / "starter"
CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
_RANDOM = {"normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_"}
_RANDOM |= {"xavier_uniform_", "orthogonal_"}
_CONSTANT = {"constant_", "ones_", "zeros_", "fill_", "zero_"}


def checkpoints_dir() -> Path:
    """Give the folder where trained models live: $M2F2_CHECKPOINTS, or `checkpoints` below the current folder."""
    return Path(os.environ.get("M2F2_CHECKPOINTS", "checkpoints"))


def resolve(name: str | Path) -> Path:
    """Turn `starter`, a path, the name of a folder in `checkpoints/` or a hub id into a local folder.

    The word `starter` is the model in the package; a folder of that name is meant by its path, as ./starter or a Path.
    Raises FileNotFoundError that says what was tried.
    """
    root = checkpoints_dir()
    if name == STARTER:
        return _starter((Path(STARTER), root / STARTER))
    for candidate in (Path(name), root / name):
        if str(name) and candidate.is_dir():
            return candidate
    if Path(name).is_file():
        raise FileNotFoundError(f"{str(name)!r} is a file; give the folder that holds it.")
    known = [p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")] if root.is_dir() else []
    there = nearest(Path(name).name, {STARTER, *known})
    tried = f"No model at {str(name)!r}: not a folder, not in {str(root)!r} ({there})"
    owner, _, model = str(name).partition("/")
    if not model or "/" in model or owner in ("", "~") or owner.startswith("."):
        raise FileNotFoundError(f"{tried} Give a folder, such a name, or a hub id like owner/model.")
    if Path(owner).is_dir() or owner == root.name:  # a mistyped path should not become a question to the hub
        raise FileNotFoundError(f"{tried} The hub was not asked, because {owner!r} is a folder here.")
    try:
        return Path(snapshot_download(str(name)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        why = "is switched off by HF_HUB_OFFLINE" if is_offline_mode() else f"gave nothing ({type(error).__name__})"
        raise FileNotFoundError(f"{tried} and the model hub {why}. Give the folder of a downloaded copy.") from error


def _starter(namesakes: Sequence[Path]) -> Path:
    """Give the folder of the model in the package. Raises FileNotFoundError where the package came without it.

    namesakes: folders that somebody may have meant; one that is there is named in a warning.
    """
    if not (STARTER_DIR / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"This installation holds no model {STARTER!r} ({str(STARTER_DIR)!r} has no {CONFIG_NAME}); install the "
            "package again, or name a model of yours."
        )
    for other in namesakes:
        if other.is_dir() and not other.samefile(STARTER_DIR):
            log.warning("%r is the model in the package; to mean the other one, give %s", STARTER, other.resolve())
    return STARTER_DIR


def save_module(folder: str | Path, module: nn.Module, config: dict[str, Any], apart: str | None = None) -> None:
    """Write config and weights of `module` into `folder`; each file is moved into place complete.

    apart: tensors whose names begin so are left out, because they are saved elsewhere.
    """
    state = {k: v for k, v in module.state_dict().items() if apart is None or not k.startswith(apart)}
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    with atomic_path(Path(folder) / WEIGHTS_NAME) as staged:
        save_file(tensors, staged, metadata={"format": "pt"})
    write_json(Path(folder) / CONFIG_NAME, config)


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the config.json of a saved module. Raises FileNotFoundError when the folder has none."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        pickled = sorted(Path(folder).glob("*.pth"))
        also = f", or the published file itself, such as {str(pickled[0])!r}" if pickled else ""
        raise FileNotFoundError(f"{str(folder)!r} holds no {CONFIG_NAME}; give the folder that training wrote{also}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); copy the folder again.") from error


class _Unfilled(TorchFunctionMode):
    """Leave new tensors zero, or without memory as they are, instead of filling them by functions of these names."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self._names = names  # not the functions: transformers puts its own in their place

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function of PyTorch, unless it fills a tensor."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self._names:
            tensor = args[0] if args else kwargs["tensor"]
            if not tensor.is_meta:
                tensor.detach().zero_()  # trunc_normal_ draws again until all values lie in bounds
            return tensor
        return func(*args, **kwargs)


def without_random_weights() -> TorchFunctionMode:
    """Build modules whose random weights are left zero, because all are loaded next: seconds for a real size."""
    return _Unfilled(_RANDOM)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build modules without memory for their weights, and without the seconds in which PyTorch would "fill" them."""
    with device("meta"), _Unfilled(_RANDOM | _CONSTANT):
        yield


def load_strictly(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load `state` into `module`. Raises ValueError that counts and names missing, extra and misshapen tensors."""
    own = module.state_dict()
    missing = sorted(own.keys() - state.keys())
    extra = sorted(state.keys() - own.keys())
    shapes = [k for k in sorted(own.keys() & state.keys()) if own[k].shape != state[k].shape]
    if missing or extra or shapes:
        parts = [
            f"{len(keys)} {word} (first: {keys[0]})"
            for word, keys in (("missing", missing), ("unexpected", extra), ("of another shape", shapes))
            if keys
        ]
        raise ValueError(f"{what} does not fit {type(module).__name__}: tensors {', '.join(parts)}.")
    module.load_state_dict(state, strict=True)


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Read model.safetensors of `folder`. Raises ValueError or FileNotFoundError."""
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no {WEIGHTS_NAME}; give the folder that training wrote.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged or incomplete ({error}); copy the folder again.") from error


def halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Round float32 tensors to half precision; all others stay. Raises ValueError for values beyond its range."""
    rounded = {name: tensor.half() if tensor.dtype == float32 else tensor for name, tensor in tensors.items()}
    beyond = [name for name, tensor in rounded.items() if not tensor.isfinite().equal(tensors[name].isfinite())]
    if beyond:
        raise ValueError(f"{len(beyond)} tensors hold values beyond 65504, the range of half precision: {beyond[0]}.")
    return rounded


def sha256_of(path: str | Path) -> str:
    """Give the SHA-256 of a file in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Give one SHA-256 in hexadecimal over names, types, shapes and values, in the order of the names.

    Floats of 16 bit count as the same values in float32, into which they are loaded.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        tensor = tensor.float() if tensor.dtype in (bfloat16, float16) else tensor
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()
