"""What becomes of each tensor of a foreign checkpoint: planned by names and shapes, checked, written in shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from llava.core.runtime import write_json
from llava.core.tensor_files import TensorFiles

Shape = tuple[int, ...]
SHARD_BYTES = 1 << 30  # tensors are gathered up to this before they are written
REPORT_NAME = "conversion.json"
NAMED_AT_MOST = 5


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
    for source, target in track(ways, "converting", console=Console(stderr=True), transient=True):
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
    write_json(folder / "model.safetensors.index.json", content)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
    return ", ".join(names[:NAMED_AT_MOST]) + more
