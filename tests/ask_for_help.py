"""Run many Python programs with --help, each in a fork of one process that has loaded the large packages already.

`python tests/ask_for_help.py OUT PROGRAM...` writes {program: [exit code, stdout, stderr]} as JSON to OUT. A program is
`m2f2 ...`, `-m module` or the path of a script.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
import traceback
from pathlib import Path


def ask(program: str) -> list[int | str]:
    """Run one program with --help in this process."""
    kind, _, rest = program.partition(" ")
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if kind == "m2f2":
                from llava.cli import main

                code = main([*rest.split(), "--help"])
            else:
                sys.argv = [rest or program, "--help"]
                if kind == "-m":
                    runpy.run_module(rest, run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(program, run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            code = 1
            traceback.print_exc()
    return [code, out.getvalue(), err.getvalue()]


def ask_in_a_fork(program: str) -> list[int | str]:
    """Run one program with --help in a child, so that it leaves nothing behind."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writer, "w") as pipe:
            json.dump(ask(program), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else [1, "", "the program died"]


if __name__ == "__main__":
    import transformers  # noqa: F401  # what most programs load, once for all of them

    import llava.train.explain  # noqa: F401

    Path(sys.argv[1]).write_text(json.dumps({program: ask_in_a_fork(program) for program in sys.argv[2:]}))
