"""Tensors in files of any origin: read without running foreign code, planned by names and shapes, written in shards."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from llava.core.runtime import write_json
from llava.core.terminal import progress

PICKLED = (".bin", ".pth", ".pt")
# Classes of training state that published files carry beside tensors. They are never imported: an empty object of ours
# stands in for each. Whatever else a file asks for is refused.
_INERT_MODULES = ("torch.optim.",)
_INERT_NAMES = ("collections.defaultdict", "builtins.dict")
Shape = tuple[int, ...]
SHARD_BYTES = 1 << 30  # tensors are gathered up to this before they are written
REPORT_NAME = "conversion.json"
INDEX_NAME = "model.safetensors.index.json"
NAMED_AT_MOST = 5


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


@dataclass(frozen=True, kw_only=True)
class Move:
    """One tensor's way: `used` keeps its name, `folded` goes into others, `dropped` goes nowhere."""

    source: str
    action: Literal["used", "renamed", "folded", "dropped"]
    target: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How names map: foreign prefixes to ours, first match wins, and what is folded or dropped, each with its reason.

    A folded name is a whole one and must be there; a dropped one is a prefix, or with a leading * an ending.
    """

    prefixes: Mapping[str, str]
    folded: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)

    def move(self, name: str) -> Move | None:
        """Give the way of a tensor, or None for a name that no rule knows."""
        if name in self.folded:
            return Move(source=name, action="folded", reason=self.folded[name])
        for part, reason in self.dropped.items():
            if name.endswith(part[1:]) if part.startswith("*") else name.startswith(part):
                return Move(source=name, action="dropped", reason=reason)
        for old, new in self.prefixes.items():
            if name.startswith(old):
                target = new + name.removeprefix(old)
                return Move(source=name, action="used" if target == name else "renamed", target=target)
        return None

    def foreign(self, target: str) -> str:
        """Give the foreign name of one of our tensors."""
        fitting = [(old, new) for old, new in self.prefixes.items() if target.startswith(new)]
        if not fitting:
            return target
        old, new = max(fitting, key=lambda pair: len(pair[1]))
        return old + target.removeprefix(new)


@dataclass(frozen=True)
class Plan:
    """The moves of all tensors, and what does not fit; `computed` targets are made, not moved."""

    moves: tuple[Move, ...]
    unexpected: tuple[str, ...]
    missing: tuple[str, ...]
    misshapen: tuple[str, ...]

    def check(self, what: str) -> None:
        """Raise ValueError that counts and names missing, unexpected and misshapen tensors, if there are any."""
        problems = [
            f"{len(names)} {word} ({_few(names)})"
            for word, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("of another shape", self.misshapen),
            )
            if names
        ]
        if problems:
            raise ValueError(f"{what} can not be converted: tensors {'; '.join(problems)}. Is the download complete?")

    def lines(self) -> Iterator[str]:
        """Yield the report: one line for each tensor, then what does not fit, then the counts."""
        for move in self.moves:
            way = f" -> {move.target}" if move.action == "renamed" else ""
            yield f"{move.action:<8} {move.source}{way}{f'  ({move.reason})' if move.reason else ''}"
        for word, names in (("missing", self.missing), ("unexpected", self.unexpected), ("misshapen", self.misshapen)):
            yield from (f"{word.upper():<8} {name}" for name in names)
        yield self.counts()

    def counts(self) -> str:
        """Say in one line how many tensors go which way."""
        found = Counter(move.action for move in self.moves)
        parts = [f"{found[action]} {action}" for action in ("used", "renamed", "folded", "dropped") if found[action]]
        wrong = {"missing": self.missing, "unexpected": self.unexpected, "misshapen": self.misshapen}
        parts += [f"{len(names)} {word.upper()}" for word, names in wrong.items() if names]
        return f"{len(self.moves) + len(self.unexpected)} tensors: {', '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for the report's file."""
        return {"counts": self.counts(), "moves": [{k: v for k, v in asdict(m).items() if v} for m in self.moves]}


def plan(given: Mapping[str, Shape], wanted: Mapping[str, Shape], rules: Rules, computed: Sequence[str] = ()) -> Plan:
    """Plan the conversion of the tensors `given` into those `wanted`, both by name and shape.

    computed: wanted tensors that folding makes. Missing ones are called by their foreign names. Of two tensors with
    the same target the second is unexpected.
    """
    moves, unexpected, misshapen = [], [], []
    reached = set(computed)
    for name, shape in given.items():
        move = rules.move(name)
        if move is None or (move.target and (move.target not in wanted or move.target in reached)):
            unexpected.append(name)
            continue
        moves.append(move)
        if move.target:
            reached.add(move.target)
            if wanted[move.target] != shape:
                misshapen.append(f"{name}: {list(shape)} where {list(wanted[move.target])} is needed")
    missing = sorted({*map(rules.foreign, wanted.keys() - reached), *(rules.folded.keys() - given.keys())})
    return Plan(tuple(moves), tuple(unexpected), tuple(missing), tuple(misshapen))


def write_shards(
    folder: Path,
    moves: Sequence[Move],
    files: TensorFiles,
    extra: Mapping[str, Tensor] | None = None,
    shard_bytes: float = SHARD_BYTES,
) -> None:
    """Write the moved tensors and `extra` ones as safetensors with an index, one shard in memory at a time.

    Values and types stay as they are. `folder` must be a staged one: it is complete only at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ways = [(move.source, move.target) for move in moves if move.target]
    ways.sort(key=lambda way: str(files.file_of[way[0]]))
    waiting: dict[str, Tensor] = dict(extra or {})
    size = total = sum(tensor.nbytes for tensor in waiting.values())
    shards: list[list[str]] = []
    for source, target in progress(ways, "converting"):
        tensor = files[source]
        if waiting and size + tensor.nbytes > shard_bytes:
            shards.append(_write(folder, len(shards), waiting))
            waiting, size = {}, 0
        waiting[target] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    shards.append(_write(folder, len(shards), waiting))
    _number(folder, shards, total)


def _write(folder: Path, number: int, tensors: dict[str, Tensor]) -> list[str]:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / f"part-{number}", metadata={"format": "pt"})
    return list(tensors)


def _number(folder: Path, shards: list[list[str]], total: int) -> None:
    """Give the parts the names that transformers reads, with an index when there are several."""
    if len(shards) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    index: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{i}").rename(folder / file)
        index |= dict.fromkeys(names, file)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    write_json(folder / INDEX_NAME, content)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + more
