"""Tensors in files of any origin: names and shapes first, values when asked for, and never foreign code."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

PICKLED = (".bin", ".pth", ".pt")
# Classes of training state that published files carry beside tensors. They are never imported: an empty object of ours
# stands in for each. Whatever else a file asks for is refused.
_INERT_MODULES = ("torch.optim.",)
_INERT_NAMES = ("collections.defaultdict", "builtins.dict")


class Inert:
    """Stands for an object that is not wanted; it forgets what it is given."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class TensorFiles(Mapping[str, Tensor]):
    """All tensors of some files by name; a value is read, from a memory map, when it is asked for.

    `shapes` are known without reading; `file_of` says where each lies; `besides` names what a pickled file holds beside
    them (epoch, optimiser). A pickled file may wrap its tensors under `model_state_dict` or `state_dict`. Raises
    FileNotFoundError, or ValueError for a file that is damaged, unsafe, or repeats a name.
    """

    def __init__(self, files: Sequence[Path], rename: Callable[[str], str] = str) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.file_of: dict[str, Path] = {}
        self.besides: list[str] = []
        self._stored_as: dict[str, str] = {}
        self._opened: tuple[Path, Mapping[str, Tensor]] | None = None
        self.add(files, rename)

    def add(self, files: Sequence[Path], rename: Callable[[str], str] = str) -> None:
        """Add the tensors of more files; `rename` gives each the name by which it is known here."""
        for file in files:
            tensors, besides = _open(file)
            self.besides += besides
            for stored in tensors:
                name = rename(stored)
                if name in self.file_of:
                    raise ValueError(f"{file}: {name!r} is also in {self.file_of[name].name}; remove one of the files.")
                self.file_of[name], self._stored_as[name] = file, stored
                self.shapes[name] = _shape(tensors, stored)

    def __getitem__(self, name: str) -> Tensor:
        file = self.file_of[name]
        if self._opened is None or self._opened[0] != file:
            self._opened = None  # the map of the file before goes first: one shard at a time
            self._opened = (file, _open(file)[0])
        return self._opened[1][self._stored_as[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)


def tensor_files_in(folder: str | Path) -> list[Path]:
    """List the shards of a model folder: its *.safetensors, else its *.bin. Raises FileNotFoundError for none."""
    folder = Path(folder)
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        found = sorted(folder.glob(pattern))
        if found:
            return found
    raise FileNotFoundError(f"{str(folder)!r} holds no *.safetensors and no pytorch_model*.bin; give a model folder.")


def read_pickled(path: Path) -> Any:
    """Read what torch.save wrote, running none of its code; tensors stay on disk until they are used.

    Optimisers and schedulers become empty objects. Raises ValueError naming whatever else the file asks for.
    """
    is_zip = is_zipfile(path)
    try:
        asked = get_unsafe_globals_in_checkpoint(path) if is_zip else []
        refused = sorted(name for name in asked if not (name in _INERT_NAMES or name.startswith(_INERT_MODULES)))
        if refused:
            raise ValueError(
                f"{path} is refused: loading it would call {', '.join(refused)}, which no weights need. Do not open it "
                "elsewhere either; get the file from its authors, or as safetensors."
            )
        stand_ins: list[Any] = [(_empty if name == "collections.defaultdict" else Inert, name) for name in asked]
        with safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, AssertionError) as error:
        raise ValueError(f"{path} holds no readable tensors ({_first_line(error)}); copy the file again.") from error


class _Safetensors(Mapping[str, Tensor]):
    """One safetensors file."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, "pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Give the shape of a tensor from the file's header."""
        return tuple(self._file.get_slice(name).get_shape())


def _empty(*_: Any) -> dict[Any, Any]:
    """Stands for collections.defaultdict: only a plain dict may be filled while a file is read."""
    return {}


def _open(path: Path) -> tuple[Mapping[str, Tensor], list[str]]:
    if not path.is_file():
        raise FileNotFoundError(f"Weights {str(path)!r} do not exist.")
    if path.suffix == ".safetensors":
        try:
            return _Safetensors(path), []
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or incomplete ({error}); copy the file again.") from error
    content = read_pickled(path)
    besides: list[str] = []
    for key in ("model_state_dict", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            besides = [str(other) for other in content if other != key]
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(f"{path} holds no table of tensors by name; give a state dict, or a file that wraps one.")
    return content, besides


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return tensors.shape(name) if isinstance(tensors, _Safetensors) else tuple(tensors[name].shape)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
