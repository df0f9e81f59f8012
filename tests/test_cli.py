"""The console command: its table, its exit codes, and that it starts fast."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from llava import __version__, cli
from llava.core.config import setting

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """Whom to greet."""

    name: str = setting(help="a name", positional=True)
    times: int = 1


def greet(config: Greeting) -> Iterator[str]:
    for _ in range(config.times):
        yield f"Hello {config.name}. "


def describe(config: Greeting) -> Greeting:
    return config


def count() -> dict[str, int]:
    return {"real": 2, "fake": 3}


def nothing() -> None:
    return None


def fail(config: Greeting) -> None:
    raise FileNotFoundError(f"No folder\n{config.name!r};  give another.")


@pytest.fixture(autouse=True)
def small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        name: cli.Command(f"{__name__}:{target}", f"{target} somebody")
        for name, target in [("greet", "greet"), ("show", "describe"), ("data count", "count"), ("fail", "fail")]
    }
    table["nothing"] = cli.Command(f"{__name__}:nothing", "do nothing")
    monkeypatch.setattr(cli, "COMMANDS", table)


def test_text_is_printed_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["greet", "Ada", "--times", "2"]) == 0
    assert capsys.readouterr().out == "Hello Ada. Hello Ada. "


def test_mappings_and_dataclasses_are_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "count"]) == 0
    assert capsys.readouterr().out == '{\n  "real": 2,\n  "fake": 3\n}\n'
    assert cli.main(["show", "Ada"]) == 0
    assert capsys.readouterr().out == '{\n  "name": "Ada",\n  "times": 1\n}\n'
    assert cli.main(["nothing"]) == 0
    assert capsys.readouterr().out == ""


def test_a_mistake_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fail", "here"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "m2f2: No folder 'here'; give another.\n")


def locked() -> None:
    raise PermissionError(13, "Permission denied", "keys.json")


def test_a_file_that_may_not_be_opened_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "locked", cli.Command(f"{__name__}:locked", "open a file"))
    assert cli.main(["locked"]) == 2
    assert capsys.readouterr() == ("", "m2f2: [Errno 13] Permission denied: 'keys.json'\n")


@pytest.mark.parametrize("words", [["--debug", "fail", "here"], ["fail", "here", "--debug"]])
def test_debug_shows_where_it_came_from(words: list[str]) -> None:
    with pytest.raises(FileNotFoundError, match="No folder"):
        cli.main(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["gret", "x"],
            "Unknown command 'gret'. Allowed: data count, fail, greet, nothing, show. Did you mean ",
        ),
        (["data", "cuont"], "Unknown command 'data cuont'. "),
        (["--times", "2"], "Unknown command '--times'. "),
    ],
)
def test_an_unknown_command_names_the_known_ones(words, message, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"m2f2: {message}") and err.count("\n") == 1


@pytest.mark.parametrize("words", [["greet"], ["greet", "Ada", "--timez", "2"], ["data", "count", "--x"]])
def test_a_wrong_setting_is_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize(("words", "shown"), [([], 5), (["--help"], 5), (["data"], 1), (["data", "--help"], 1)])
def test_help_lists_the_table(words: list[str], shown: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    assert capsys.readouterr().out.count("\n  m2f2 ") == shown


def test_the_help_of_a_command_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["data", "count", "--help"])
    assert stopped.value.code == 0 and "usage: m2f2 data count" in capsys.readouterr().out


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"m2f2 {__version__}\n"


def test_the_command_is_installed() -> None:
    command = Path(sys.executable).with_name("m2f2")
    done = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "m2f2 detectors" in done.stdout


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("m2f2 det", {"detect", "detectors"}),
        ("m2f2 keys ", {"create", "list", "revoke", "-h", "--help"}),
        ("m2f2 detect --no_such", set()),
        ("m2f2 detect --json", {"--json", "--json_file"}),
        ("m2f2 detect --json a.png --prio", {"--prior"}),
        ("m2f2 detect a.png --face l", {"largest"}),
        ("m2f2 completion z", {"zsh"}),
    ],
)
def test_bash_completes(line: str, offered: set[str], tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("m2f2")
    script = f"""eval "$({command} completion bash)"
        COMP_LINE='{line}' COMP_POINT={len(line)} COMP_TYPE=9; COMP_WORDS=({line}); COMP_CWORD=1
        _python_argcomplete {command} && printf '%s\n' "${{COMPREPLY[@]}}" """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert set(done.stdout.split()) == offered, done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "llava.cli", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_detectors_are_listed_with_their_classes() -> None:
    from llava.detectors import DETECTORS

    lines = cli.list_detectors().splitlines()
    assert [line.split()[0] for line in lines] == list(DETECTORS)
    assert all("real | fake" in line for line in lines if line.startswith("m2f2det"))


def test_a_missing_package_is_named_with_the_extras(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "limits", None)
    monkeypatch.delitem(sys.modules, "llava.serve.guard", raising=False)
    monkeypatch.setitem(cli.COMMANDS, "broken", cli.Command("llava.serve.guard:RateLimiter", "needs a package"))
    assert cli.main(["broken"]) == 2
    assert "the package 'limits' is not installed; the extras bring it: pip install" in capsys.readouterr().err
