"""One configuration mechanism: a dataclass field is a YAML key is a command-line flag.

The recipe (YAML) comes first, flags override it (`--optim.lr 1e-3`), unknown keys fail and name the nearest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from enum import Enum
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import TypeAdapter

from llava.core.fields import (
    MAPPINGS,
    MISSING,
    NONE_WORDS,
    SEQUENCES,
    Leaf,
    build,
    convert,
    is_a,
    leaves,
    members,
    setting,
    to_dict,
)
from llava.core.registry import closest, nearest

__all__ = ["assign", "build", "convert", "leaves", "load_yaml", "merge", "parse", "read_values", "setting", "to_dict"]

T = TypeVar("T")
BOOLEAN_WORDS = ("true", "false", "1", "0", "yes", "no", "on", "off", *NONE_WORDS)


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    description: str = "",
    recipe: Path | None = None,
    prog: str | None = None,
) -> T:
    """Read `--config RECIPE` and flags into a `cls`; exits with a message on any mistake, like argparse."""
    argv = list(sys.argv[1:] if argv is None else argv)
    positional = "".join(f" [{_metavar(leaf)} ...]" for leaf in leaves(cls) if leaf.is_positional)
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"%(prog)s{positional} [--config RECIPE] [--setting value ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36),
    )
    try:
        return build(cls, read_values(cls, argv, parser, recipe))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def read_values(
    cls: type, argv: Sequence[str], parser: argparse.ArgumentParser, recipe: Path | None = None
) -> dict[str, Any]:
    """Merge recipe and flags into plain nested values, not yet converted. Raises ValueError or FileNotFoundError."""
    settings = list(leaves(cls))
    words = list(_normalised(argv, {leaf.path for leaf in settings if bool in members(leaf.hint)}))
    values = _recipe_values(parser, words, recipe)
    _add_flags(parser, settings, values)
    _add_free_flags(parser, settings, words)
    known, rest = parser.parse_known_intermixed_args(words)
    if rest:
        close = closest(rest[0].partition("=")[0][2:], [leaf.path for leaf in settings])
        is_flag = rest[0].startswith("--") and close
        raise ValueError(f"Unknown argument {rest[0]!r}. " + (f"Did you mean --{close}?" if is_flag else "See --help."))
    given = {path: value for path, value in vars(known).items() if path != "config"}
    for leaf in settings:
        if any(path.startswith(f"{leaf.path}.") for path in given) and not _has(values, leaf.path):
            assign(values, leaf.path, TypeAdapter(Any).dump_python(leaf.default, mode="json"))
    for path, value in given.items():
        assign(values, path, value)
    return values


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a mapping from a YAML file. Raises FileNotFoundError or ValueError naming the file."""
    path = Path(path)
    if not path.is_file():
        others = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"Recipe {str(path)!r} does not exist. {nearest(path.name, others)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"Recipe {str(path)!r} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"Recipe {str(path)!r} must be a mapping of settings, got {type(values).__name__}.")
    return values


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `override` over `base`, descending into mappings that both have."""
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def assign(values: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path inside nested values; a number steps into a list. Raises ValueError when it cannot."""
    *parents, last = path.split(".")
    node: Any = values
    for i, part in enumerate(parents):
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = _item(node, part, path) if isinstance(node, list) else node[part]
        if not isinstance(node, (dict, list)):
            raise ValueError(f"--{path}: {'.'.join(parents[: i + 1])} is {node!r}, not a group of settings.")
    if isinstance(node, list):
        _item(node, last, path)
        node[int(last)] = value
    else:
        node[last] = value


def _has(values: Mapping[str, Any], path: str) -> bool:
    first, _, rest = path.partition(".")
    return first in values and (not rest or (isinstance(values[first], Mapping) and _has(values[first], rest)))


def _item(node: list[Any], part: str, path: str) -> Any:
    if not part.isdigit() or int(part) >= len(node):
        allowed = f"0 to {len(node) - 1}" if node else "none, the list is empty"
        raise ValueError(f"--{path}: {part!r} is no index of a list of {len(node)}; allowed: {allowed}.")
    return node[int(part)]


def _normalised(argv: Iterable[str], bool_flags: set[str]) -> Iterator[str]:
    """Write `--a-b` as `--a_b`, and `--flag` as `--flag=true` unless a boolean word follows; values stay."""
    words = list(argv)
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if not word.startswith("--"):
            yield word
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        is_bare = name in bool_flags and not equals and following.lower() not in BOOLEAN_WORDS
        yield f"--{name}=true" if is_bare else f"--{name}{equals}{value}"


def _recipe_values(parser: argparse.ArgumentParser, words: Sequence[str], recipe: Path | None) -> dict[str, Any]:
    """Read the recipe before all else, so that --help shows what it sets."""
    default = f" (default: {recipe.name})" if recipe else ""
    text = f"YAML file of settings; flags override it{default}"
    parser.add_argument("--config", default=recipe, metavar="RECIPE", help=text)
    first = argparse.ArgumentParser(prog=parser.prog, usage=parser.usage, add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=recipe, metavar="RECIPE")
    chosen = first.parse_known_args(words)[0].config
    return load_yaml(chosen) if chosen else {}


def _add_flags(parser: argparse.ArgumentParser, settings: Sequence[Leaf], values: Mapping[str, Any]) -> None:
    groups: dict[str, Any] = {}
    for leaf in settings:
        if leaf.section not in groups:
            groups[leaf.section] = parser.add_argument_group(leaf.section)
        shown = "required" if leaf.default is MISSING else f"default: {_shown(leaf.default)}"
        if _has(values, leaf.path):
            shown = f"recipe: {_shown(reduce(getitem, leaf.path.split('.'), values))}"
        parts = {
            "default": argparse.SUPPRESS,
            "metavar": _metavar(leaf),
            "help": f"{leaf.help} ({shown})".strip().replace("%", "%%"),
            "action": _StoreWords if is_a(leaf.hint, SEQUENCES) else "store",
        }
        if is_a(leaf.hint, SEQUENCES) or leaf.is_positional:
            parts["nargs"] = "*" if is_a(leaf.hint, SEQUENCES) else "?"
        groups[leaf.section].add_argument(leaf.path if leaf.is_positional else f"--{leaf.path}", **parts)


def _add_free_flags(parser: argparse.ArgumentParser, settings: Sequence[Leaf], words: Iterable[str]) -> None:
    """Accept flags that step into a free mapping or a list, as given: `--model.fusion bridge`, `--phases.0.lr 1`."""
    free = tuple(f"--{leaf.path}." for leaf in settings if is_a(leaf.hint, SEQUENCES + MAPPINGS))
    for name in dict.fromkeys(word.partition("=")[0] for word in words):
        if name.startswith(free):
            parser.add_argument(name, nargs="*", action=_StoreFree, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


class _StoreWords(argparse.Action):
    """Keep the words of a list; `none` alone stays a word, so that it can mean None."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        is_none = len(values) == 1 and values[0] in NONE_WORDS
        is_unused_positional = not values and option_string is None
        if not is_unused_positional:
            setattr(namespace, self.dest, values[0] if is_none else values)


class _StoreFree(argparse.Action):
    """Keep no word as true, one word as itself, several as a list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values if len(values) > 1 else values[0] if values else "true")


def _metavar(leaf: Leaf) -> str:
    """Name what a flag takes in as few words as possible: `int`, `a|b`, `path`; a list by its items."""
    if leaf.is_positional:
        return leaf.path.upper()
    return "|".join(dict.fromkeys(_type_name(member) for member in members(leaf.hint)))


def _type_name(hint: Any) -> str:
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        return "|".join(str(a) for a in arguments)
    if kind in SEQUENCES and arguments:
        return "|".join(_type_name(member) for member in members(arguments[0]))
    if kind in MAPPINGS:
        return "mapping"
    if is_dataclass(kind):
        return "none"  # a flag can only switch a group off; its settings have their own flags
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(member.value) for member in kind)
    return str(getattr(kind, "__name__", kind)).lower()


def _shown(default: Any) -> str:
    """Give a default as one would type it, cut where it is long."""
    if is_dataclass(default) and not isinstance(default, type):
        default = to_dict(default)
    if isinstance(default, (list, tuple)):
        text = " ".join(_shown(item) for item in default) or "empty"
    elif isinstance(default, dict):
        text = "{" + ", ".join(f"{key}: {_shown(value)}" for key, value in default.items()) + "}"
    elif default is None or isinstance(default, bool):
        text = str(default).lower()
    else:
        text = str(default.value if isinstance(default, Enum) else default) or "empty"
    return text if len(text) <= 60 else f"{text[:57]}..."
