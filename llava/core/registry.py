"""Tables of names that import what they name only when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Generic, TypeVar

LISTED_AT_MOST = 12
T = TypeVar("T")


def closest(word: str, choices: Iterable[str]) -> str | None:
    """Give the choice that `word` was probably meant to be, or None."""
    found = get_close_matches(word, sorted(choices), n=1, cutoff=0.5)
    return found[0] if found else None


def nearest(word: str, choices: Iterable[str]) -> str:
    """Say which choices exist and which one is closest to `word`, as the tail of an error message."""
    names = sorted(choices)
    close = closest(word, names)
    hint = f" Did you mean {close!r}?" if close else ""
    if len(names) > LISTED_AT_MOST:
        listed = get_close_matches(word, names, n=LISTED_AT_MOST, cutoff=0.0)
        return f"Allowed, the closest of {len(names)}: {', '.join(listed)}.{hint}"
    return f"Allowed: {', '.join(names) or 'none'}.{hint}"


class Registry(Generic[T]):
    """Map a name to `module:attribute`; the module is imported by `get`."""

    def __init__(self, kind: str, table: Mapping[str, str]) -> None:
        self.kind = kind
        self._table = dict(table)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def add(self, name: str, target: str) -> None:
        """Add one line to the table. Raises ValueError when the name is taken by something else."""
        if self._table.get(name, target) != target:
            raise ValueError(f"{self.kind} {name!r} is already {self._table[name]}; choose another name.")
        self._table[name] = target

    def get(self, name: str) -> T:
        """Import and return what `name` stands for. Raises ValueError that lists the names."""
        if name not in self._table:
            raise ValueError(f"Unknown {self.kind} {name!r}. {nearest(name, self._table)}")
        module, _, attribute = self._table[name].partition(":")
        return getattr(import_module(module), attribute)
