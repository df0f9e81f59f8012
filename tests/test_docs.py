"""What the documents and recipes say is there: commands, make targets, files, links, settings."""

from __future__ import annotations

import json
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import forked
import pytest
from transformers import TrainingArguments

from llava.cli import COMMANDS
from llava.core.config import assign, build, convert, load_yaml

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])
RECIPES = sorted((ROOT / "scripts" / "configs").rglob("*.yaml"))
READERS = {
    "stage_1": "llava.train.recipe:Recipe",
    "stage_2": "llava.train.arguments:ExplainArguments",
    "stage_3": "llava.train.arguments:ExplainArguments",
    "own_pictures": "llava.train.recipe:Recipe",
    "experiments": "llava.train.experiments:Plan",
    "forge": "llava.jobs.forged_faces:ForgeDataConfig",
    "edit": "llava.jobs.forged_faces:ForgeDataConfig",
    "tiny_base": "llava.train.tiny_base:TinyBaseConfig",
}
FOREIGN = {
    "cd",
    "conda",
    "cp",
    "curl",
    "docker",
    "export",
    "git",
    "ls",
    "mkdir",
    "mv",
    "pip",
    "source",
    "tensorboard",
    "unzip",
}
LAUNCHERS = {"python", "python3", "bash", "deepspeed", "torchrun", "accelerate"}
FENCE = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4}(?:python|bash|m2f2|deepspeed) (?:.*\\\n)*.*\n", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")


def commands_in(text: str) -> list[list[str]]:
    """Give the words of every single command in the bash fences and indented lines of a document."""
    found = []
    for block in [*FENCE.findall(text), *INDENTED.findall(FENCE.sub("", text))]:
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
            lexer.whitespace_split = True
            command: list[str] = []
            for word in [*lexer, ";"]:
                if word and set(word) <= set("|&;"):
                    found.append(command)
                    command = []
                elif command or not re.fullmatch(r"\w+=.*|\$|%", word):
                    command.append(word)
    return [command for command in found if command]


def program_of(words: list[str]) -> str | None:
    """Name what a command runs (`m2f2 data ddvqa`, `make test`, `eval/x.py`), None for a tool that is not ours.

    Raises ValueError when it is neither ours nor a known tool, or names something that is not there.
    """
    first = words[0]
    if first in FOREIGN:
        return None
    if first == "m2f2":
        return m2f2_program(words[1:])
    if first == "make":
        target = next((w for w in words[1:] if "=" not in w and not w.startswith("-")), "help")
        if target not in make_targets():
            raise ValueError(f"the Makefile has no target {target!r}")
        return f"make {target}"
    if first in LAUNCHERS and "-m" in words[:2]:
        return module_program(words[words.index("-m") + 1])
    script = first if first not in LAUNCHERS else next((w for w in words[1:] if w.endswith((".py", ".sh"))), None)
    if script is None or not (ROOT / script).is_file():
        raise ValueError(f"{shlex.join(words)!r} runs nothing that is there")
    return script.removeprefix("./")


def m2f2_program(words: list[str]) -> str:
    for length in (2, 1):
        if " ".join(words[:length]) in COMMANDS:
            return "m2f2 " + " ".join(words[:length])
    if words and not words[0].startswith("--"):
        raise ValueError(f"m2f2 has no command {' '.join(words)!r}")
    return "m2f2"


def module_program(name: str) -> str | None:
    if not name.startswith("llava"):
        return None
    if not (ROOT / name.replace(".", "/")).with_suffix(".py").is_file():
        raise ValueError(f"there is no module {name}")
    return f"-m {name}"


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def programs_in_documents() -> tuple[set[str], list[str]]:
    """Give the programs that the documents call, and what is wrong with the other calls."""
    programs, wrong = set(), []
    for document in DOCUMENTS:
        for words in commands_in(document.read_text(encoding="utf-8")):
            try:
                program = program_of(words)
            except ValueError as error:
                wrong.append(f"{document.relative_to(ROOT)}: {error}")
                continue
            programs |= {program} if program else set()
    return programs, wrong


def programs_in_tree() -> set[str]:
    shell = [*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh")]
    scripts = [p for p in shell if p.read_text().startswith("#!")]  # the others are sourced, not run
    scripts += [*ROOT.glob("scripts/*.py"), *ROOT.glob("eval/*.py")]
    named = {p.relative_to(ROOT).as_posix() for p in scripts}
    return named | {f"m2f2 {name}" for name in COMMANDS} | {"m2f2"} | {f"make {name}" for name in make_targets()}


CALLED, WRONG = programs_in_documents()
PROGRAMS = sorted(CALLED | programs_in_tree())


def test_every_command_in_the_documents_exists() -> None:
    assert {"README.md", "architecture.md", "quickstart.md"} <= {d.name for d in DOCUMENTS}
    assert len(CALLED) >= 3
    assert not WRONG, "\n".join(WRONG)


SHELL = [program for program in PROGRAMS if program.endswith(".sh") or program.startswith("make ")]


@pytest.mark.e2e
@pytest.mark.parametrize("program", [program for program in PROGRAMS if program not in SHELL])
def test_every_program_answers_help(program: str) -> None:
    kind, *rest = program.split()
    words = ["-m", "llava.cli", *rest] if kind == "m2f2" else [kind, *rest]
    done = forked.run([*words, "--help"], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.e2e
@pytest.mark.parametrize("program", SHELL)
def test_every_shell_program_answers_help(program: str) -> None:
    command = (
        ["make", "-n", program.removeprefix("make ")] if program.startswith("make ") else ["bash", program, "--help"]
    )
    done = forked.run_shell(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or program.startswith("make ")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    links = [link for link in LINK.findall(document.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_map_names_every_package_and_only_files_that_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:llava|eval|scripts|tests|docs|utils)/[\w/.]*)`", text))
    assert named and [name for name in sorted(named) if not (ROOT / name).exists()] == []
    packages = {f"llava/{p.parent.name}/" for p in (ROOT / "llava").glob("*/__init__.py")}
    assert packages <= named


def loaded(target: str) -> type[Any]:
    """Give the class that `module:name` stands for."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def wrong_settings(values: dict[str, Any], reader: type[Any]) -> str | None:
    """Say what is wrong with a recipe, None when nothing is; what only the command line can know may be missing."""
    check = convert if issubclass(reader, TrainingArguments) else build  # building those asks for the recipe's device
    for _ in range(20):
        try:
            check(reader, values)
            return None
        except ValueError as error:
            missing = re.match(r"Missing setting '([^']+)'", str(error))
            if missing is None:
                return str(error)
            assign(values, missing[1], "placeholder")
    return "too many settings are missing"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.relative_to(ROOT / "scripts").as_posix())
def test_every_recipe_is_read_by_its_class(recipe: Path) -> None:
    reader = recipe.stem if recipe.parent.name in ("demo", "starter") else recipe.parent.name
    assert reader in READERS, f"no class is known to read {recipe}; add it to READERS"
    assert wrong_settings(load_yaml(recipe), loaded(READERS[reader])) is None


def test_deepspeed_files_are_json() -> None:
    for path in (ROOT / "scripts").glob("*.json"):
        assert json.loads(path.read_text())


def test_a_command_that_is_not_there_is_found() -> None:
    text = "x\n```bash\n$ A=1 m2f2 dat x | head  # no\ngit clone u && make tset DATA=x\npython eval/nothing.py --a \\\n"
    text += "  b\nfrobnicate\npython -m llava.nothing\nbash .ci/nothing.sh\n```\n```\nmake nothing\n```\n"
    found = commands_in(text)
    assert found[:3] == [["m2f2", "dat", "x"], ["head"], ["git", "clone", "u"]]
    assert found[3:5] == [["make", "tset", "DATA=x"], ["python", "eval/nothing.py", "--a", "b"]]
    assert len(found) == 8
    assert program_of(found[2]) is None
    for words in (*found[:2], *found[3:]):
        with pytest.raises(ValueError):
            program_of(words)
    assert program_of(["m2f2", "data", "ddvqa", "--annotations", "x"]) == "m2f2 data ddvqa"
    assert program_of(["make", "-n", "A=b", "test"]) == "make test"


def test_indented_commands_count_too() -> None:
    text = "Say:\n\n    python eval/no.py --a \\\n        b\n    m2f2 nothing\n\n- a list\n    of words\n"
    assert commands_in(text) == [["python", "eval/no.py", "--a", "b"], ["m2f2", "nothing"]]


def test_a_wrong_recipe_is_found(tmp_path: Path) -> None:
    from llava.data.ddvqa import DdvqaConfig

    path = tmp_path / "a.yaml"
    path.write_text("seed: 3\n")
    assert wrong_settings(load_yaml(path), DdvqaConfig) is None
    path.write_text("sed: 3\n")
    assert "Did you mean 'seed'?" in str(wrong_settings(load_yaml(path), DdvqaConfig))
    path.write_text("seed: many\n")
    assert "seed: 'many' is not usable" in str(wrong_settings(load_yaml(path), DdvqaConfig))
