"""One configuration mechanism: a dataclass field is a YAML key is a command-line flag.

The recipe (YAML) comes first, a further one lies over it, flags override both (`--optim.lr 1e-3`), unknown keys fail
and name the nearest. Types are checked and converted by pydantic, field by field, so any dataclass works, Hugging
Face's included. Why no library does all of this: docs/architecture.md, "Settings are our own".
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import MISSING, is_dataclass
from enum import Enum
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from llava.core.registry import closest, nearest

T = TypeVar("T")
NONE_WORDS = ("none", "null", "None")
BOOLEAN_WORDS = ("true", "false", "1", "0", "yes", "no", "on", "off", *NONE_WORDS)
SEQUENCES: tuple[Any, ...] = (list, tuple, Sequence)
MAPPINGS: tuple[Any, ...] = (dict, Mapping)


class Leaf(NamedTuple):
    """One setting as a flag: where it is, its type, what it is when nobody says, and its words."""

    path: str
    hint: Any
    default: Any
    help: str
    is_positional: bool
    section: str


def setting(default: Any = MISSING, help: str = "", *, positional: bool = False, **field_options: Any) -> Any:
    """Declare a dataclass field with its help text; mutable defaults are copied for each instance.

    positional: on the command line the value stands alone (`m2f2 detect PATH`), without `--name`.
    """
    metadata = {"help": help, "positional": positional}
    if isinstance(default, (list, dict)) or is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy(default), metadata=metadata, **field_options)
    return dataclasses.field(default=default, metadata=metadata, **field_options)


def build(cls: type[T], values: Mapping[str, Any], where: str = "", base: T | None = None) -> T:
    """Make a `cls` from plain values. Raises ValueError that names the key, what is allowed and the nearest name.

    base: what settings that are not given keep; without it, the defaults of the class.
    """
    arguments = convert(cls, values, where, base)
    if base is not None:
        return dataclasses.replace(base, **arguments)  # type: ignore[type-var]
    fields = _fields(cls)
    missing = [name for name, field in fields.items() if name not in arguments and _default(field) is MISSING]
    if missing:
        paths = [f"{where}.{name}" if where else name for name in missing]
        is_positional = fields[missing[0]].metadata.get("positional", False)
        names, flag = ", ".join(map(repr, paths)), "on the command line" if is_positional else f"as --{paths[0]}"
        raise ValueError(f"Missing setting {names}; give it in the recipe or {flag}.")
    return cls(**arguments)


def convert(cls: type[T], values: Mapping[str, Any], where: str = "", base: T | None = None) -> dict[str, Any]:
    """Give `values` in the types of `cls`, which is not built. Raises ValueError on an unknown key or a wrong value."""
    hints, fields = _hints(cls), _fields(cls)  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise ValueError(f"Unknown setting {path!r}. {nearest(str(key), fields)}")
        default = _default(fields[key]) if base is None else getattr(base, key)
        arguments[key] = _convert(hints[key], value, path, default)
    return arguments


def to_dict(config: Any) -> dict[str, Any]:
    """Give the plain JSON/YAML values of a config dataclass; `build` makes an equal one of them."""
    return TypeAdapter(dict[str, Any]).dump_python(dataclasses.asdict(config), mode="json")


def leaves(cls: type, prefix: str = "", base: Any = None) -> Iterator[Leaf]:
    """List every setting, nested ones by dotted path, inherited ones last; groups only where they may be None."""
    hints = _hints(cls)
    owners = {name: owner for owner in reversed(cls.__mro__) for name in vars(owner).get("__annotations__", ())}
    own_first = sorted(_fields(cls).items(), key=lambda item: cls.__mro__.index(owners.get(item[0], cls)))
    for name, field in own_first:
        default = _default(field) if base is None else getattr(base, name)
        nested = _dataclass_in(hints[name])
        if nested is None or NoneType in get_args(hints[name]):
            section = f"{prefix[:-1]}: {_headline(cls)}" if prefix else _headline(owners.get(name, cls))
            text, is_positional = field.metadata.get("help", ""), field.metadata.get("positional", False)
            yield Leaf(f"{prefix}{name}", hints[name], default, text, is_positional, section)
        if nested is not None:
            yield from leaves(nested, f"{prefix}{name}.", default if isinstance(default, nested) else None)


def words_of(hint: Any) -> list[str]:
    """Give the words that a type allows, where they are few: those of a Literal, an Enum or a bool."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        return [str(a) for a in arguments]
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [str(member.value) for member in kind]
    if kind is bool:
        return ["true", "false"]
    return list(dict.fromkeys(word for argument in arguments if argument is not kind for word in words_of(argument)))


def members(hint: Any) -> tuple[Any, ...]:
    """Give the alternatives of a union type, without None; any other type alone."""
    alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(m for m in alternatives if m is not NoneType)


def is_a(hint: Any, kinds: tuple[Any, ...]) -> bool:
    """Tell whether one alternative of the type is one of `kinds`, with or without parameters."""
    return any((get_origin(m) or m) in kinds for m in members(hint))


def parse(
    cls: type[T], argv: Sequence[str] | None = None, description: str = "", recipe: Path | None = None, prog: str = ""
) -> T:
    """Read `--config RECIPE` and flags into a `cls`; exits with a message on any mistake, like argparse."""
    argv = list(sys.argv[1:] if argv is None else argv)
    positional = "".join(f" [{_metavar(leaf)} ...]" for leaf in leaves(cls) if leaf.is_positional)
    parser = argparse.ArgumentParser(
        prog=prog or None,
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
        name = rest[0].partition("=")[0][2:] if rest[0].startswith("--") else ""
        close = closest(name, [leaf.path for leaf in settings if not leaf.is_positional])
        is_alone = any(leaf.is_positional and leaf.path == name for leaf in settings)
        hint = "Give its value without a name." if is_alone else f"Did you mean --{close}?" if close else "See --help."
        raise ValueError(f"Unknown argument {rest[0]!r}. {hint}")
    given = {path: value for path, value in vars(known).items() if path != "config"}
    for leaf in settings:
        if any(path.startswith(f"{leaf.path}.") for path in given) and not _has(values, leaf.path):
            assign(values, leaf.path, TypeAdapter(Any).dump_python(leaf.default, mode="json"))
    for path, value in given.items():
        assign(values, path, value)
    return values


def add_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add `--config` and every setting of `cls` to a parser that a shell asks what may come next."""
    _recipe_values(parser, (), None)
    _add_flags(parser, list(leaves(cls)), {})
    for action in parser._actions:
        action.nargs = "?" if action.metavar == "bool" else action.nargs  # `--flag` alone is true; another may follow


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


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _fields(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _headline(cls: type) -> str:
    """Give the first docstring line, or the name where there is none that a person wrote for reading."""
    first = (cls.__doc__ or "").strip().partition("\n")[0].rstrip(".")
    return cls.__name__ if not first or first.startswith(f"{cls.__name__}(") or len(first) > 100 else first


def _dataclass_in(hint: Any) -> type | None:
    """Give the dataclass of `X` or `X | None`, else None."""
    found = [m for m in members(hint) if is_dataclass(m)]
    return found[0] if len(found) == 1 else None  # type: ignore[return-value]


def _convert(hint: Any, value: Any, path: str, default: Any = None) -> Any:
    is_none_word = isinstance(value, str) and value in NONE_WORDS and value != default  # report_to's default is "none"
    if (value is None or is_none_word) and NoneType in get_args(hint):
        return None
    nested = _dataclass_in(hint)
    if nested is not None:
        if isinstance(value, nested):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}: {value!r} is no group of settings. {nearest('', _fields(nested))}")
        return build(nested, value, path, default if isinstance(default, nested) else None)
    if isinstance(value, str) and is_a(hint, SEQUENCES) and str not in members(hint):
        value = [value]
    return _validated(hint, _with_items_built(hint, value, path), path)


def _with_items_built(hint: Any, value: Any, path: str) -> Any:
    """Build the dataclasses of `list[X]`, `tuple[X, ...]` and `dict[str, X]` here: pydantic lets unknown keys pass."""
    for member in members(hint):
        kind, arguments = get_origin(member), get_args(member)
        if kind in SEQUENCES and isinstance(value, (list, tuple)) and is_dataclass(arguments[0]):
            return [_convert(arguments[0], item, f"{path}.{i}") for i, item in enumerate(value)]
        if kind in MAPPINGS and isinstance(value, Mapping) and is_dataclass(arguments[-1]):
            return {key: _convert(arguments[-1], item, f"{path}.{key}") for key, item in value.items()}
    return value


def _validated(hint: Any, value: Any, path: str) -> Any:
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([path, *(str(part) for part in first["loc"] if isinstance(part, int))])
        message = first["msg"][0].lower() + first["msg"][1:]
        raise ValueError(f"{place}: {first['input']!r} is not usable: {message}.") from None


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
    text = f"YAML file of settings; a further --config lies over it, flags over both{default}"
    parser.add_argument("--config", action="append", metavar="RECIPE", help=text)
    first = argparse.ArgumentParser(prog=parser.prog, usage=parser.usage, add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", metavar="RECIPE")
    chosen = first.parse_known_args(words)[0].config or [recipe]
    return reduce(merge, (load_yaml(path) for path in chosen if path), {})


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
        action = groups[leaf.section].add_argument(leaf.path if leaf.is_positional else f"--{leaf.path}", **parts)
        if words := words_of(leaf.hint):
            action.completer = lambda words=words, **_: words  # argcomplete offers them


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
        if values or option_string is not None:  # else a positional that is not used
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
    if kind in SEQUENCES and arguments:
        return "|".join(_type_name(member) for member in members(arguments[0]))
    if kind in MAPPINGS:
        return "mapping"
    if is_dataclass(kind):
        return "none"  # a flag can only switch a group off; its settings have their own flags
    if kind is not bool and words_of(hint):
        return "|".join(words_of(hint))
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
