"""A setting is a dataclass field: declared with help, listed by path, built from plain values and given back.

Types are checked and converted by pydantic, field by field, so any dataclass works, Hugging Face's included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from llava.core.registry import nearest

T = TypeVar("T")
MISSING = dataclasses.MISSING
NONE_WORDS = ("none", "null", "None")
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
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: _copied(default), metadata=metadata, **field_options)
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
        prefix = f"{where}." if where else ""
        names = ", ".join(repr(prefix + name) for name in missing)
        is_positional = fields[missing[0]].metadata.get("positional", False)
        flag = "on the command line" if is_positional else f"as --{prefix}{missing[0]}"
        raise ValueError(f"Missing setting {names}; give it in the recipe or {flag}.")
    return cls(**arguments)


def convert(cls: type[T], values: Mapping[str, Any], where: str = "", base: T | None = None) -> dict[str, Any]:
    """Give `values` in the types of `cls`, which is not built. Raises ValueError on an unknown key or a wrong value."""
    hints, fields = _hints(cls), _fields(cls)
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


def members(hint: Any) -> tuple[Any, ...]:
    """Give the alternatives of a union type, without None; any other type alone."""
    alternatives = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(m for m in alternatives if m is not NoneType)


def is_a(hint: Any, kinds: tuple[Any, ...]) -> bool:
    """Tell whether one alternative of the type is one of `kinds`, with or without parameters."""
    return any((get_origin(m) or m) in kinds for m in members(hint))


def _hints(cls: Any) -> dict[str, Any]:
    return _cached_hints(cls)


@cache
def _cached_hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _fields(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _copied(default: Any) -> Any:
    if dataclasses.is_dataclass(default):
        return dataclasses.replace(default)  # type: ignore[type-var]
    return default.copy()


def _headline(cls: type) -> str:
    """Give the first docstring line, or the name where there is none that a person wrote for reading."""
    first = (cls.__doc__ or "").strip().partition("\n")[0].rstrip(".")
    return cls.__name__ if not first or first.startswith(f"{cls.__name__}(") or len(first) > 100 else first


def _dataclass_in(hint: Any) -> type | None:
    """Give the dataclass of `X` or `X | None`, else None."""
    found = [m for m in members(hint) if dataclasses.is_dataclass(m)]
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
        if kind in SEQUENCES and isinstance(value, (list, tuple)) and dataclasses.is_dataclass(arguments[0]):
            return [_convert(arguments[0], item, f"{path}.{i}") for i, item in enumerate(value)]
        if kind in MAPPINGS and isinstance(value, Mapping) and dataclasses.is_dataclass(arguments[-1]):
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
