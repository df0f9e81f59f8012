"""Tables of names: lazy, closed to double entries, helpful about misspelt names."""

import sys

import pytest

from llava.core.registry import Registry, closest, nearest


def test_a_name_is_imported_only_when_asked_for() -> None:
    sys.modules.pop("this", None)
    table = Registry[object]("poem", {"zen": "this:s", "missing": "no_such_module:x", "root": "math:sqrt"})
    assert list(table) == ["zen", "missing", "root"] and "zen" in table and "poem" not in table
    assert "this" not in sys.modules
    assert table.get("root")(9) == 3
    with pytest.raises(ModuleNotFoundError):
        table.get("missing")


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    table = Registry[object]("detector", {"m2f2det": "math:pi", "radar": "math:e"})
    with pytest.raises(ValueError, match=r"Unknown detector 'm2f2'. Allowed: m2f2det, radar. Did you mean 'm2f2det'\?"):
        table.get("m2f2")


def test_one_line_adds_an_entry_but_never_replaces_one() -> None:
    entries = {"a": "math:pi"}
    table = Registry[float]("number", entries)
    table.add("b", "math:e")
    table.add("b", "math:e")
    assert table.get("b") == pytest.approx(2.718281828)
    with pytest.raises(ValueError, match="number 'a' is already math:pi; choose another name"):
        table.add("a", "math:e")
    assert table.get("a") == pytest.approx(3.141592654)
    assert entries == {"a": "math:pi"}


def test_long_lists_of_names_are_cut_to_the_closest() -> None:
    names = [f"setting_{i}" for i in range(100)] + ["learning_rate"]
    text = nearest("learning_rat", names)
    assert text.startswith("Allowed, the closest of 101: learning_rate, ") and text.endswith("'learning_rate'?")
    assert text.count(",") == 12
    assert nearest("x", []) == "Allowed: none."
    assert closest("zzz", ["a"]) is None
