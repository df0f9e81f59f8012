"""Python programs as processes of their own, each a fork of one that has loaded the large packages already.

A program that loads PyTorch and transformers itself spends seven seconds of a processor on that, and the tests start
some sixty. A fork differs from a start in /proc alone: command line and environment are those of its source.
"""

from __future__ import annotations

import array
import atexit
import fcntl
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

VARIABLE = "FORKED_FROM"  # where the source listens
PYTHON = Path(__file__).with_name("forked_python")
LOADED = (
    "deepspeed.launcher.runner",
    "gradio",
    "llava.evaluation.calibration",
    "llava.evaluation.pictures",
    "llava.explainer.generation",
    "llava.pipeline.pipeline",
    "llava.serve.api",
    "llava.serve.batching",
    "llava.train.explain",
    "llava.train.stage_1",
    "transformers.models.auto.modeling_auto",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
)


class Forked:
    """A program as `python WORDS` runs it (`-m MODULE ...` or `SCRIPT ...`), with the methods of `subprocess.Popen`."""

    def __init__(
        self,
        words: Sequence[str],
        stdout: IO[Any] | int = subprocess.DEVNULL,
        stderr: IO[Any] | int = subprocess.DEVNULL,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        start_new_session: bool = False,
    ) -> None:
        self.args = list(words)
        self.returncode: int | None = None
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        place = dict(os.environ if env is None else env)
        asked = {"words": self.args, "cwd": str(cwd or Path.cwd()), "env": place, "is_leader": start_new_session}
        with theirs, Path(os.devnull).open("wb") as nowhere:
            files = [nowhere if file == subprocess.DEVNULL else file for file in (stdout, stderr)]
            numbers = [file if isinstance(file, int) else file.fileno() for file in files]
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno(), *numbers]))
            _source().sendmsg([json.dumps(asked).encode()], [rights])
        self.pid = int(self._line.recv(100))

    def poll(self) -> int | None:
        """Give the exit code, None while it runs."""
        if self.returncode is None and select.select([self._line], [], [], 0)[0]:
            self.returncode = int(self._line.recv(100))
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            select.select([self._line], [], [], 0.1)
        return int(self.returncode or 0)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def run(
    words: Sequence[str],
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    check: bool = False,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; gives what `subprocess.run` gives with captured text. Raises as that does."""
    with _memory_file() as out, _memory_file() as err:
        process = Forked(words, out, err, cwd, env)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        said = [_text(file) for file in (out, err)]
    done = subprocess.CompletedProcess(list(words), code, *said)
    if check:
        done.check_returncode()
    return done


def run_shell(
    words: Sequence[str], cwd: str | Path | None = None, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a shell script to its end whose `$PYTHON` is a fork; gives what `subprocess.run` gives with captured text."""
    _source()
    place = os.environ | {"PYTHON": str(PYTHON), "FORKED_BY": sys.executable, **environment}
    return subprocess.run(words, cwd=cwd, env=place, capture_output=True, text=True, timeout=timeout)


def _memory_file() -> IO[bytes]:
    return os.fdopen(os.memfd_create("said"), "w+b")


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


def share() -> None:
    """Let this process and those that it starts have forks of one source."""
    folder = TemporaryDirectory(prefix="m2f2-forks-")
    os.environ[VARIABLE] = str(Path(folder.name) / "source")
    atexit.register(folder.cleanup)


@cache
def _source() -> socket.socket:
    """Connect to the process that is forked; whoever comes first starts it. It ends when nobody is connected."""
    if VARIABLE not in os.environ:
        share()
    address = Path(os.environ[VARIABLE])
    source = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with address.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not address.exists():
            _start(address)
        source.connect(str(address))
    return source


def _start(address: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    place = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(str(address))
        door.listen()
        command = [sys.executable, __file__, "--fork", str(door.fileno())]
        process = subprocess.Popen(command, env=place, pass_fds=[door.fileno()], stdin=subprocess.DEVNULL)

    def end() -> None:
        _source().close()
        process.wait()

    atexit.register(end)


def _serve(door: socket.socket) -> dict[str, Any]:
    """Fork for every program that is asked for; comes back in the fork alone, with what to run."""
    callers = {door.accept()[0]}
    lines: dict[int, tuple[int, socket.socket]] = {}  # by the file that tells of its end: process, who is told
    while callers:
        for file in select.select([door, *callers, *lines], [], [])[0]:
            if file is door:
                callers.add(door.accept()[0])
            elif isinstance(file, int):
                number, line = lines.pop(file)
                os.close(file)
                with line:
                    _tell(line, os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]))
            elif asked := _heard(file):
                number = os.fork()
                if number == 0:
                    for other in (door, *callers, *(line for _, line in lines.values())):
                        other.close()
                    return asked
                line, *files = asked["files"]
                for other in files:
                    os.close(other)
                told = socket.socket(fileno=line)
                lines[os.pidfd_open(number)] = number, told
                _tell(told, number)
            else:
                callers.remove(file)
                file.close()
    for number, _ in lines.values():
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
    os._exit(0)


def _heard(caller: socket.socket) -> dict[str, Any]:
    """Give what is asked for, nothing when the caller has gone."""
    try:
        message, files, _, _ = socket.recv_fds(caller, 1 << 20, 3)
    except ConnectionError:
        return {}
    return json.loads(message) | {"files": files} if message else {}


def _tell(line: socket.socket, number: int) -> None:
    with suppress(OSError):  # nobody asks any more
        line.send(str(number).encode())


def _become(words: list[str], cwd: str, env: dict[str, str], files: list[int], is_leader: bool) -> None:
    """Take on what a process has from its start, and run the program."""
    if is_leader:
        os.setsid()
    for file, number in zip(files[1:], (1, 2), strict=True):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if "FORKED_BY" in env:  # what a shell script's Python starts is forked, too
        sys.executable = str(PYTHON)
    sys.path[:] = [*env.get("PYTHONPATH", "").split(os.pathsep), *sys.path]
    _use_threads(env.get("OMP_NUM_THREADS", "1"))
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, cwd)
        sys.modules.pop(words[1], None)  # a module that runs is not one that was imported
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def _use_threads(count: str) -> None:
    import torch

    if int(count) != torch.get_num_threads():
        torch.set_num_threads(int(count))


def _end(program: Callable[[], None]) -> None:
    """Run a program and end as Python does, but for taking apart all that was loaded, which takes three seconds."""
    code: object = 0
    try:
        program()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _main() -> None:
    if sys.argv[1] != "--fork":  # this is the Python of a shell script
        process = Forked([word for word in sys.argv[1:] if word != "-u"], 1, 2)
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        sys.exit(process.wait())
    sys.path.pop(0)  # the folder of this file, which no program has but by its own PYTHONPATH
    for name in LOADED:
        import_module(name)
    gc.freeze()  # what is not looked at stays shared
    asked = _serve(socket.socket(fileno=int(sys.argv[2])))
    _end(partial(_become, **asked))


if __name__ == "__main__":
    _main()
