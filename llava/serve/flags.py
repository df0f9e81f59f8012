"""Published command lines, written as the settings here are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence


def translated(argv: Sequence[str], aliases: Mapping[str, str], refused: Mapping[str, str]) -> Iterator[str]:
    """Write flags as they are called here. Raises ValueError with the reason for one that is refused."""
    for word in argv:
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        if dashed in refused:
            raise ValueError(f"{name} is not accepted: {refused[dashed]}.")
        yield f"{aliases.get(dashed, name)}{equals}{value}"
