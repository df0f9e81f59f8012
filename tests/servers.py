"""Real servers on loopback for tests: an app in a thread, a scripted peer, a module as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from fastapi import FastAPI
from forked import Forked

from llava.serve.web import server_of

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """Give a port of loopback where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(is_so: Callable[[], object], seconds: float = 300.0) -> None:
    """Wait until something holds; an HTTP error counts as not yet."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if is_so():
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"not so after {seconds} seconds")


@contextmanager
def running(app: FastAPI, proxies: Sequence[str] = (), port: int | None = None) -> Iterator[str]:
    """Run an app in a thread; gives its address. proxies: as in `server_of`. port: None = any free one."""
    port = free_port() if port is None else port
    server = server_of(app, "127.0.0.1", port, proxies)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


class Peer:
    """A server that answers every connection with prepared bytes and closes it, or is silent; keeps what it heard."""

    def __init__(self, answer: bytes | None) -> None:
        self.answer = answer
        self.connections = 0
        self.heard = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._kept: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            self._kept.append(connection)
            if self.answer is not None:
                self._kept.pop()
                with connection:
                    self.heard = connection.recv(1 << 20)
                    connection.sendall(self.answer)

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()


class Process:
    """A module run by `python -m` with flags; its log goes to a file."""

    def __init__(self, module: str, flags: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        given = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self.log = log
        with log.open("ab") as file:
            self._process = Forked(["-m", module, *flags], file, file, log.parent, given | (environment or {}))

    @property
    def pid(self) -> int:
        """Give its number."""
        return self._process.pid

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self._process.kill()
        self._process.wait(60)

    @property
    def is_running(self) -> bool:
        """Say whether it has not ended."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Give the exit code of one that ends by itself."""
        return self._process.wait(120)

    def stop(self) -> int:
        """End it as a person would; gives the exit code."""
        self._process.send_signal(signal.SIGCONT)
        self._process.terminate()
        return self.wait()


def ready_address(server: Process, seconds: float = 180.0) -> str:
    """Wait until `m2f2 serve` says that it is ready; gives its address."""

    def said() -> list[str]:
        assert server.is_running, server.log.read_text()
        return [line.split()[1] for line in server.log.read_text().splitlines() if line.startswith("ready: ")]

    wait_for(said, seconds)
    return said()[0]
