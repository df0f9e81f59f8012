"""The console command `m2f2`: a table of sub-commands, each imported only when it is called.

A command is a function of one config dataclass (or of nothing). What it returns is printed: text as it is, pieces of
text as they come, a mapping or dataclass as JSON.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal, NamedTuple, get_type_hints

from llava import __version__
from llava.core.runtime import Incomplete


class Command(NamedTuple):
    """Where the function of a sub-command is (`module:function`) and what it does, in a line."""

    target: str
    help: str


COMMANDS = {
    "detect": Command("llava.jobs.commands:detect", "say of faces whether they are real or forged"),
    "explain": Command("llava.jobs.commands:explain", "say it with the reasons in words"),
    "chat": Command("llava.jobs.commands:chat", "talk about one face: the verdict, then your questions"),
    "completion": Command("llava.cli:shell_completion", "print what makes a shell complete commands and settings"),
    "detectors": Command("llava.cli:list_detectors", "list the detectors that can be trained and asked"),
    "evaluate": Command(
        "llava.train.evaluate:evaluate",
        "score a detector on a split: AUC, calibration, robustness; or several on several sets",
    ),
    "compare": Command(
        "llava.jobs.compare:compare_runs", "compare trained runs on their test split: table, tests, pictures"
    ),
    "diagnose": Command(
        "llava.jobs.diagnose:diagnose", "say whether a detector looks at faces and knows every class: healthy or not"
    ),
    "ablate": Command(
        "llava.train.experiments:ablate", "train variants of a recipe by a plan, each with the same seeds"
    ),
    "maps": Command("llava.jobs.maps:write_maps", "write a detector's maps of forged images into a file"),
    "counterfactual": Command(
        "llava.jobs.maps:write_counterfactual", "change what the words name and write how far the score falls"
    ),
    "data verdicts": Command(
        "llava.data.conversations:build_verdicts", "turn labelled images into verdict-only conversations"
    ),
    "data ddvqa": Command("llava.data.ddvqa:build_ddvqa", "turn DD-VQA annotation files into training files"),
    "data frames": Command(
        "llava.data.frame_folders:write_frames", "write evenly spread, face-cropped frames of videos, and their table"
    ),
    "data kaggle140k": Command(
        "llava.data.kaggle:build_kaggle", "copy (or download) Kaggle's 140k real and fake faces into class folders"
    ),
    "data forge": Command(
        "llava.jobs.forged_faces:build_forgeries", "forge real faces so that region and artefact are known"
    ),
    "score": Command("llava.jobs.bulk:score", "score a folder or list of images into parquet, millions of them"),
    "serve": Command("llava.serve.command:serve", "serve a model: an HTTP API that OpenAI's clients speak"),
    "keys create": Command("llava.serve.keys:create_key", "make an API key for a server and show it, once"),
    "keys list": Command("llava.serve.keys:list_keys", "list the API keys by name, without the keys"),
    "keys revoke": Command("llava.serve.keys:revoke_key", "withdraw an API key; a running server follows at once"),
    "causality": Command(
        "llava.jobs.causality:causality", "say whether an explainer's words follow its evidence, class by class"
    ),
    "reasoning": Command(
        "llava.jobs.reasoning:show_reasoning", "draw what RADAR's reasoning attends to, round by round"
    ),
    "tiny-base": Command(
        "llava.train.tiny_base:make_tiny_base", "make a tiny LLaVA from training data, for two CPU cores"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and give its exit code: 2 for a mistake in what was asked, 1 for a result with gaps."""
    words = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        if "_ARGCOMPLETE" in os.environ:
            _complete(os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split()[1:])
        code = _run(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe went away, as in `m2f2 ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:  # OSError: a file that is not there, or may not be read or written
        if is_debug:
            raise
        print(f"m2f2: {_one_line(error)}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if is_debug or (error.name or "").partition(".")[0] == "llava":
            raise
        extras = "pip install 'm2f2-det[train,eval,serve,cluster]'"
        print(f"m2f2: the package {error.name!r} is not installed; the extras bring it: {extras}", file=sys.stderr)
        return 2
    except Incomplete as error:
        print(f"m2f2: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def list_detectors() -> str:
    """Give a table of the detectors: name, classes, first line of their documentation."""
    from llava.detectors import DETECTORS

    lines = []
    for name in DETECTORS:
        detector = DETECTORS.get(name)
        lines.append(
            f"{name:<12} {' | '.join(detector.classes):<12} {(inspect.getdoc(detector) or '').splitlines()[0]}"
        )
    return "\n".join(lines)


def _run(words: list[str]) -> int:
    if words and words[0] == "--version":
        print(f"m2f2 {__version__}")
        return 0
    name, rest = _split(words)
    if name not in COMMANDS:
        return _help_or_complain(name, rest)
    from llava.core.config import parse
    from llava.core.runtime import setup_logging

    setup_logging()
    function, config_class = _imported(name)
    config: Any = parse(config_class or NoSettings, rest, description=COMMANDS[name].help, prog=f"m2f2 {name}")
    for piece in _pieces(function(config) if config_class else function()):
        print(piece, end="", flush=True)
    return 0


@dataclass(frozen=True)
class NoSettings:
    """What a command without settings takes."""


def _imported(name: str) -> tuple[Any, type | None]:
    """Give the function of a sub-command and the class of its settings, if it takes any."""
    from llava.core.registry import Registry

    function = Registry[Any]("command", {name: COMMANDS[name].target}).get(name)
    hints = {key: hint for key, hint in get_type_hints(function).items() if key != "return"}
    return function, next(iter(hints.values()), None)


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """Which shell is to complete."""

    shell: Literal["bash", "zsh"] = field(metadata={"help": "the shell that reads it", "positional": True})


def shell_completion(config: CompletionConfig) -> str:
    """Give the lines that a shell reads once, to ask `m2f2` at every TAB."""
    from argcomplete import shellcode

    return shellcode(["m2f2"], shell=config.shell)


def _complete(words: list[str]) -> None:
    """Tell the shell that asks (argcomplete's protocol) what may come next, and exit; imports one command at most."""
    from argcomplete import autocomplete

    parser = argparse.ArgumentParser(prog="m2f2", allow_abbrev=False)
    below = {"": parser.add_subparsers()}
    for name, command in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if group not in below:
            below[group] = below[""].add_parser(group).add_subparsers()
        leaf = below[group].add_parser(last, help=command.help, allow_abbrev=False)
        if name == _split(words)[0]:
            from llava.core.config import add_flags

            add_flags(leaf, _imported(name)[1] or NoSettings)
    autocomplete(parser)


def _split(words: list[str]) -> tuple[str, list[str]]:
    """Give the longest sub-command (of one or two words) that `words` begin with, and what follows it."""
    for length in (2, 1):
        if " ".join(words[:length]) in COMMANDS:
            return " ".join(words[:length]), words[length:]
    return (words[0], words[1:]) if words and not words[0].startswith("-") else ("", words)


def _help_or_complain(name: str, rest: list[str]) -> int:
    """Print the commands of a group (all without a name). Raises ValueError for a command that does not exist."""
    below = {key: command for key, command in COMMANDS.items() if not name or key.startswith(f"{name} ")}
    wrong = next((word for word in rest if word not in ("-h", "--help")), None)
    if not below or wrong:
        from llava.core.registry import nearest

        asked = f"{name} {wrong}".strip() if below else name
        raise ValueError(f"Unknown command {asked!r}. {nearest(asked, COMMANDS)}")
    width = max(map(len, below))
    lines = [f"  m2f2 {key:<{width}}  {command.help}" for key, command in below.items()]
    print("Is this face real or forged, how sure are we, and why?\n\n" + "\n".join(lines))
    print("\nm2f2 COMMAND --help lists its settings; --debug shows where an error came from; --version the version.")
    return 0


def _pieces(result: Any) -> Iterator[str]:
    """Turn what a command returned into text to print."""
    if result is None:
        return
    if is_dataclass(result) and not isinstance(result, type):
        from llava.core.config import to_dict

        result = to_dict(result)
    if isinstance(result, Mapping):
        yield json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    elif isinstance(result, Iterable) and not isinstance(result, str):
        yield from map(str, result)
    else:
        yield f"{result}\n"


def _one_line(error: Exception) -> str:
    """Give an error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
