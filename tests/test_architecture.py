"""The house rules, checked on the source: floors, sizes, forbidden calls, and what an import may pull in."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "core": 0,
    "ops": 1,
    "data": 1,
    "detectors": 2,
    "evaluation": 2,
    "explainer": 2.5,
    "train": 3,
    "pipeline": 4,
    "serve": 5,
    "cli": 5,
    "": 6,  # llava/__init__.py, which may offer what lies below
}
WALLS = {("explainer", "evaluation")}
OUTSIDE = {"eval", "scripts", "tests", "utils"}
LAZY_TARGET = re.compile(r"llava(\.\w+)+:\w+")
MAX_FILE, MAX_FUNCTION = 400, 40

SOURCES = sorted(p for folder in ("llava", "eval", "scripts") for p in (ROOT / folder).rglob("*.py"))
PACKAGE = [p for p in SOURCES if p.is_relative_to(ROOT / "llava")]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def floor_name(dotted: str) -> str:
    """Give `detectors` for `llava.detectors.base`; "" for `llava` and for its plain attributes."""
    name = [*dotted.split("."), ""][1]
    return name if name in FLOORS else ""


def dotted_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported(tree: ast.AST, path: str) -> Iterator[tuple[int, str, bool]]:
    """List (line, dotted module, is_lazy) of every import, wherever it stands, and of every `module:name` string."""
    package = dotted_name(path).split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = node.level - path.endswith("__init__.py")
                base = ".".join(part for part in (*package[: len(package) - parents], base) if part)
            if base == "llava":
                yield from ((node.lineno, f"llava.{alias.name}", False) for alias in node.names)
            else:
                yield node.lineno, base, False
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and LAZY_TARGET.fullmatch(node.value):
            yield node.lineno, node.value.partition(":")[0], True


def floor_violations(source: str, path: str) -> list[str]:
    """List the imports of one file of the package that go up, sideways, or out of the house."""
    own = floor_name(dotted_name(path))
    found = []
    for line, module, is_lazy in imported(ast.parse(source), path):
        top = module.partition(".")[0]
        if top in OUTSIDE:
            found.append(f"{path}:{line} imports {module} from outside the package")
        if top != "llava":
            continue
        other = floor_name(module)
        is_plain = module in ("llava", "llava.__version__")
        is_below = FLOORS[other] < FLOORS[own] or (is_lazy and FLOORS[other] == FLOORS[own])
        if other != own and not is_plain and (not is_below or (own, other) in WALLS):
            found.append(f"{path}:{line} ({own}, floor {FLOORS[own]}) imports {module} (floor {FLOORS[other]})")
    return found


def size_violations(source: str, path: str) -> list[str]:
    """List what is too long."""
    found = []
    lines = source.count("\n") + (not source.endswith("\n"))
    if lines > MAX_FILE:
        found.append(f"{path} has {lines} lines, allowed are {MAX_FILE}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                found.append(f"{path}:{node.lineno} {node.name} has {length} lines, allowed are {MAX_FUNCTION}")
    return found


def habit_violations(source: str, path: str) -> list[str]:
    """List prints, sys.path, star imports, unsafe torch.load and trust_remote_code."""
    may_print = path == "llava/cli.py" or path.startswith("eval/")
    found = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called == "print" and not may_print:
            found.append(f"{path}:{line} prints; only llava/cli.py and eval/ may")
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
            found.append(f"{path}:{line} touches sys.path")
        if isinstance(node, ast.ImportFrom) and node.module == "sys" and any(a.name == "path" for a in node.names):
            found.append(f"{path}:{line} touches sys.path")
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            found.append(f"{path}:{line} imports *")
        if called == "torch.load" and not is_weights_only(node):
            found.append(f"{path}:{line} calls torch.load without weights_only=True")
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and any(a.name == "load" for a in node.names):
            found.append(f"{path}:{line} imports torch.load by another name")
        words = (getattr(node, "arg", None), getattr(node, "id", None), getattr(node, "value", None))
        if "trust_remote_code" in [word for word in words if isinstance(word, str)]:
            found.append(f"{path}:{line} uses trust_remote_code")
    return found


def is_weights_only(call: ast.AST) -> bool:
    keywords = call.keywords if isinstance(call, ast.Call) else []
    return any(
        k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True for k in keywords
    )


def violations(check, paths: list[Path]) -> list[str]:
    return [line for path in paths for line in check(path.read_text(encoding="utf-8"), relative(path))]


def test_every_package_has_a_floor() -> None:
    names = {p.stem for p in (ROOT / "llava").iterdir() if (p.is_dir() and any(p.glob("*.py"))) or p.suffix == ".py"}
    assert len(PACKAGE) > 10
    assert names - {"__init__"} <= set(FLOORS)


def test_imports_go_down_the_floors_only() -> None:
    found = violations(floor_violations, PACKAGE)
    assert not found, "\n".join(found)


def test_no_file_and_no_function_is_too_long() -> None:
    found = violations(size_violations, SOURCES)
    assert not found, "\n".join(found)


def test_no_forbidden_habits() -> None:
    found = violations(habit_violations, SOURCES)
    assert not found, "\n".join(found)


def test_utils_holds_no_python() -> None:
    assert list((ROOT / "utils").rglob("*.py")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("llava/core/x.py", "from llava.data import sources"),
        ("llava/core/x.py", "import llava.ops.degrade"),
        ("llava/core/x.py", "from ..data import sources"),
        ("llava/core/x.py", "TABLE = {'a': 'llava.data.sources:Folder'}"),
        ("llava/core/__init__.py", "from ..train import config"),
        ("llava/ops/x.py", "from llava import data"),
        ("llava/data/x.py", "def f():\n    from llava.ops import degrade"),
        ("llava/detectors/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import llava.evaluation"),
        ("llava/evaluation/x.py", "from llava.detectors.base import load"),
        ("llava/explainer/x.py", "from llava.evaluation import metrics"),
        ("llava/explainer/x.py", "from llava import train"),
        ("llava/train/x.py", "import os, llava.pipeline"),
        ("llava/pipeline.py", "from llava.serve import api"),
        ("llava/pipeline.py", "from .cli import main"),
        ("llava/cli.py", "from llava.serve import api"),
        ("llava/data/x.py", "from scripts import pack"),
        ("llava/serve/x.py", "from llava import load"),
    ],
)
def test_an_import_upwards_or_sideways_is_found(path: str, source: str) -> None:
    assert len(floor_violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "llava/core/x.py",
            "import numpy\nfrom llava.core import types\nfrom . import registry\nfrom .types import Record",
        ),
        ("llava/detectors/base.py", "def create():\n    from llava.detectors import DETECTORS"),
        ("llava/detectors/x.py", "from llava.ops import degrade\nfrom llava.data.faces import crop"),
        ("llava/explainer/x.py", "from llava.detectors.base import load"),
        (
            "llava/cli.py",
            "from llava import __version__\nT = 'llava.serve.api:run'\nfrom llava.pipeline import Pipeline",
        ),
        ("llava/core/x.py", "text = 'see llava.data.sources: folders'"),
    ],
)
def test_an_import_downwards_is_allowed(path: str, source: str) -> None:
    assert floor_violations(source, path) == []


def test_lengths_are_counted() -> None:
    function = "def f():\n" + "    x = 1\n" * MAX_FUNCTION
    assert len(size_violations(function, "llava/x.py")) == 1
    assert size_violations(function.replace("    x = 1\n", "", 1), "llava/x.py") == []
    assert len(size_violations("x = 1\n" * (MAX_FILE + 1), "llava/x.py")) == 1
    assert size_violations("x = 1\n" * MAX_FILE, "llava/x.py") == []
    assert len(size_violations("class A:\n    async " + function.replace("\n", "\n    "), "llava/x.py")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "print('x')",
        "import sys\nsys.path.insert(0, '.')",
        "import sys\nsys.path += ['.']",
        "from sys import path",
        "from os import *",
        "import torch\ntorch.load('a')",
        "import torch\ntorch.load('a', weights_only=False)",
        "import torch\ntorch.load('a', weights_only=flag)",
        "from torch import load",
        "f(trust_remote_code=False)",
        "f(**{'trust_remote_code': True})",
        "trust_remote_code = True",
        "def f(trust_remote_code): ...",
    ],
)
def test_a_forbidden_habit_is_found(source: str) -> None:
    assert len(habit_violations(source, "llava/data/x.py")) == 1


def test_allowed_habits_pass() -> None:
    assert habit_violations("print('x')", "llava/cli.py") == habit_violations("print('x')", "eval/x.py") == []
    assert habit_violations("import torch\ntorch.load('a', weights_only=True)\nblueprint()", "llava/data/x.py") == []


IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module({name!r})
if {deep}:
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
print(*sys.modules)
"""
LLM_STACK = ("peft", "deepspeed", "transformers.models.llava", "transformers.models.llama")


@pytest.mark.parametrize(
    ("name", "deep", "forbidden"),
    [
        ("llava", False, ("torch", "numpy", "transformers", "pydantic")),
        ("llava.cli", False, ("torch", "numpy", "transformers", "pydantic", "rich")),
        ("llava.core", True, ("transformers", "cv2", *LLM_STACK)),
        ("llava.ops", True, ("transformers", *LLM_STACK)),
        ("llava.data", False, ("torch", "transformers", "cv2", *LLM_STACK)),
        ("llava.data", True, ("transformers", *LLM_STACK)),
        ("llava.detectors", True, LLM_STACK),
        ("llava.evaluation", False, ("transformers", *LLM_STACK)),
        ("llava.evaluation", True, LLM_STACK),
    ],
)
def test_an_import_stays_light(name: str, deep: bool, forbidden: tuple[str, ...]) -> None:
    code = IMPORT_ALL.format(name=name, deep=deep)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert name in loaded
    assert loaded.isdisjoint(forbidden), f"import of {name} pulls in {sorted(loaded & set(forbidden))}"
