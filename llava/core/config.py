"""One configuration mechanism: a dataclass field is a YAML key is a command-line flag.

The recipe (YAML) comes first, flags override it (`--optim.lr 1e-3`), unknown keys fail and name the nearest.
Types are checked and converted by pydantic, field by field, so any dataclass works, Hugging Face's included.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from llava.core.registry import nearest

T = TypeVar("T")


def setting(default: Any = dataclasses.MISSING, help: str = "", **field_options: Any) -> Any:
    """Declare a dataclass field with its help text; mutable defaults are copied for each instance."""
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: _copied(default), metadata={"help": help}, **field_options)
    return dataclasses.field(default=default, metadata={"help": help}, **field_options)


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Make a `cls` from plain values. Raises ValueError that names the key, what is allowed and the nearest name."""
    hints = _hints(cls)  # type: ignore[arg-type]
    names = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in names:
            raise ValueError(f"Unknown setting {path!r}. {nearest(str(key), names)}")
        arguments[key] = _convert(hints[key], value, path)
    missing = [n for n, f in names.items() if n not in arguments and _is_required(f)]
    if missing:
        prefix = f"{where}." if where else ""
        names_missing = ", ".join(repr(prefix + n) for n in missing)
        raise ValueError(f"Missing setting {names_missing}; give it in the recipe or as --{prefix}{missing[0]}.")
    return cls(**arguments)


def parse(cls: type[T], argv: Sequence[str] | None = None, description: str = "", recipe: Path | None = None) -> T:
    """Read `--config RECIPE` and flags into a `cls`; exits with a message on any mistake, like argparse."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    try:
        return build(cls, read_values(cls, argv, parser, recipe))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def read_values(
    cls: type, argv: Sequence[str], parser: argparse.ArgumentParser, recipe: Path | None = None
) -> dict[str, Any]:
    """Merge recipe and flags into plain nested values, not yet converted."""
    parser.add_argument(
        "--config",
        default=None if recipe is None else str(recipe),
        metavar="RECIPE",
        help=f"YAML recipe (default: {recipe})",
    )
    for path, field, hint in leaves(cls):
        _add_flag(parser, path, field, hint)
    known, rest = parser.parse_known_args([_underscored(a) for a in argv])
    given = vars(known)
    chosen = given.pop("config")
    values = load_yaml(chosen) if chosen else {}
    for path, text in given.items():
        assign(values, path, text)
    for path, text in _free_flags(rest, cls):
        assign(values, path, text)
    return values


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a mapping from a YAML file. Raises FileNotFoundError or ValueError naming the file."""
    path = Path(path)
    if not path.is_file():
        others = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"Recipe {str(path)!r} does not exist. {nearest(path.name, others)}")
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
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


def to_dict(config: Any) -> dict[str, Any]:
    """Give the plain JSON/YAML values of a config dataclass."""
    return TypeAdapter(dict[str, Any]).dump_python(dataclasses.asdict(config), mode="json")


def leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """List (dotted path, field, type) of every setting that is not itself a dataclass."""
    hints = _hints(cls)  # type: ignore[arg-type]
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        nested = _dataclass_in(hint)
        if not field.init:
            continue
        if nested is not None:
            yield from leaves(nested, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, hint


def assign(values: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path inside nested values; a number steps into a list. Raises ValueError when it cannot."""
    *parents, last = path.split(".")
    node: Any = values
    for i, part in enumerate(parents):
        if isinstance(node, list):
            node = _item(node, part, path)
        else:
            child = node.get(part)
            if not isinstance(child, (dict, list)):
                child = node[part] = {}
            node = child
        if not isinstance(node, (dict, list)):
            raise ValueError(f"--{path}: {'.'.join(parents[: i + 1])} is a value, not a group of settings.")
    if isinstance(node, list):
        _item(node, last, path)
        node[int(last)] = value
    else:
        node[last] = value


def _item(node: list[Any], part: str, path: str) -> Any:
    if not part.isdigit() or int(part) >= len(node):
        raise ValueError(f"--{path}: {part!r} is not an index of a list of {len(node)}; allowed: 0 to {len(node) - 1}.")
    return node[int(part)]


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _copied(default: Any) -> Any:
    if dataclasses.is_dataclass(default):
        return dataclasses.replace(default)  # type: ignore[type-var]
    return default.copy()


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _dataclass_in(hint: Any) -> type | None:
    """Give the dataclass of `X` or `X | None`, else None."""
    found = [m for m in _members(hint) if dataclasses.is_dataclass(m)]
    return found[0] if len(found) == 1 else None  # type: ignore[return-value]


def _convert(hint: Any, value: Any, path: str) -> Any:
    nested = _dataclass_in(hint)
    if nested is not None and isinstance(value, Mapping):
        return build(nested, value, path)
    if nested is not None and isinstance(value, nested):
        return value
    if value in ("null", "none", "None") and type(None) in _members(hint):
        return None
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {value!r} is not usable: {first['msg'][0].lower()}{first['msg'][1:]}.") from None


def _add_flag(parser: argparse.ArgumentParser, path: str, field: dataclasses.Field[Any], hint: Any) -> None:
    kinds = _members(hint)
    is_list = any((get_origin(k) or k) in (list, tuple, Sequence) for k in kinds)
    options: dict[str, Any] = {"nargs": "*"} if is_list else {}
    if bool in kinds:
        options = {"nargs": "?", "const": "true"}
    names = " | ".join(
        getattr(k, "__name__", str(k)) if not get_args(k) else str(k).replace("typing.", "") for k in kinds
    )
    default = "required" if _is_required(field) else f"default: {_shown_default(field)}"
    text = f"{field.metadata.get('help', '')} ({default})".strip().replace("%", "%%")
    parser.add_argument(f"--{path}", default=argparse.SUPPRESS, metavar=names, help=text, **options)


def _shown_default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory in (list, dict, tuple) else "per recipe"  # type: ignore[misc]


def _underscored(argument: str) -> str:
    """Let `--save-model-path` mean `--save_model_path`; values are left alone."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _free_flags(rest: list[str], cls: type) -> Iterator[tuple[str, str]]:
    """Give flags that step into a free mapping or list field (`--model.fusion bridge`); reject all others."""
    free = {
        path
        for path, _, hint in leaves(cls)
        if any((get_origin(m) or m) in (dict, list, Mapping) for m in _members(hint))
    }
    words = iter(rest)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not any(name.startswith(f"{prefix}.") for prefix in free):
            known = [path for path, _, _ in leaves(cls)]
            close = nearest(name, known).rpartition("Did you mean ")[2] if word.startswith("--") else ""
            hint = f" Did you mean --{close.strip(chr(39) + '?')}?" if close and len(close) < 60 else " See --help."
            raise ValueError(f"Unknown argument {word!r}.{hint}")
        text = value if equals else next(words, None)
        if text is None:
            raise ValueError(f"--{name} needs a value.")
        yield name, text
