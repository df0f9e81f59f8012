"""How many questions does a server answer, how fast, in how much memory? One running server, or settings compared."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from rich.table import Table

from llava.core.config import parse, setting
from llava.core.runtime import software, write_json
from llava.core.terminal import console, titled_table
from llava.data.images import list_images
from llava.evaluation.tables import run_script
from llava.serve.fetch import is_loopback
from llava.serve.load import Run, bodies, picture, send

KEY_VARIABLE = "M2F2_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked, of whom, and how often; an API key is read from the environment variable M2F2_API_KEY."""

    url: str = setting("http://127.0.0.1:8000", "running server")
    allow_remote: bool = setting(False, "let the load go to another machine; only ever to one of your own")
    requests: int = setting(500, "requests in all")
    at_a_time: int = setting(32, "requests on their way together")
    distinct: int | None = setting(None, "different pictures, asked about in turn; none = one for each request")
    pictures: str | None = setting(None, "folder of pictures; none = drawn ones, without faces (serve with --face off)")
    max_tokens: int = setting(64, "longest answer")
    pid: int | None = setting(None, "process whose memory is watched; that of --model_path is known")
    model_path: str | None = setting(None, "start a server for this model instead of asking one that runs")
    serve: dict[str, str] = field(default_factory=dict, metadata={"help": "its settings, as in --serve.face off"})
    compare: str | None = setting(None, "start a server for each value of one setting: rows=1,16,32")
    repeats: int = setting(1, "runs of each, in turn and back; medians are shown")
    json: str | None = setting(None, "write the numbers to this file as well")

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be asked."""
        if not (self.allow_remote or is_loopback(httpx.URL(self.url).host)):
            raise ValueError(f"url: {self.url!r} is another machine; give --allow_remote true if it is yours.")
        for name in ("requests", "at_a_time", "repeats", "max_tokens", "distinct"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not usable; allowed: 1 or more.")
        if self.compare and not (self.model_path and "=" in self.compare):
            raise ValueError(f"compare: {self.compare!r} needs --model_path, and the form NAME=VALUE,VALUE.")


def main() -> None:
    """Ask, print the table, write the numbers."""
    settings = parse(Settings, description=(__doc__ or "").splitlines()[0])
    found: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(place) for name, place in places(settings)}
        contents = contents_of(settings)
        for repeat in range(settings.repeats):
            # In turn and back, so that none always profits from what the others left behind.
            for name, (url, pid) in list(servers.items())[:: -1 if repeat % 2 else 1]:
                found.setdefault(name, []).append(one_run(settings, contents, url, pid).numbers())
    out = console()
    out.print(table_of({name: found[name] for name in servers}, settings, len(contents)))
    if settings.json:
        write_json(settings.json, {"settings": settings.__dict__, **software(), "runs": found})


def places(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Yield the servers to be asked: a name, and what gives address and process while it is open."""
    if settings.model_path is None:
        yield settings.url, running(settings)
        return
    name, _, values = (settings.compare or "").partition("=")
    for value in values.split(",") if name else [""]:
        yield (f"{name}={value}" if name else "as set"), started(settings, {name: value} if name else {})


@contextmanager
def running(settings: Settings) -> Iterator[tuple[str, int | None]]:
    """Give the address of the server that runs already."""
    yield settings.url, settings.pid


@contextmanager
def started(settings: Settings, changes: Mapping[str, str]) -> Iterator[tuple[str, int | None]]:
    """Start a server that refuses nothing for its number, and give its address and process."""
    generous = {"requests_per_minute": str(10**6), "waiting": str(settings.at_a_time)}
    words = {"model_path": settings.model_path, "port": "0", **generous, **settings.serve, **changes}
    command = [sys.executable, "-m", "llava.cli", "serve", *(f"--{name}={value}" for name, value in words.items())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline().split()
            if not ready:
                raise ValueError(f"The server did not start; see what this says: {' '.join(command)}")
            yield ready[1].removesuffix("/docs"), process.pid
        finally:
            process.terminate()


def contents_of(settings: Settings) -> list[bytes]:
    """Give the pictures to ask about. Raises ValueError for a folder with too few."""
    count = min(settings.distinct or settings.requests, settings.requests)
    if settings.pictures is None:
        return [picture(number) for number in range(count)]
    paths = list_images(Path(settings.pictures))[:count]
    if len(paths) < (count if settings.distinct else 1):
        raise ValueError(f"pictures: {settings.pictures!r} holds {len(paths)} pictures; fewer than {count}.")
    return [path.read_bytes() for path in paths]


def one_run(settings: Settings, contents: Sequence[bytes], url: str, pid: int | None) -> Run:
    """Ask all questions once, after one that is not counted."""
    key = os.environ.get(KEY_VARIABLE, "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    model = httpx.get(f"{url}/v1/models", headers=headers, trust_env=False).raise_for_status().json()["data"][0]["id"]
    asked = bodies(model, contents, settings.requests, settings.max_tokens)
    asyncio.run(send(url, asked[:1], 1, key))
    return asyncio.run(send(url, asked, settings.at_a_time, key, pid))


def table_of(found: Mapping[str, Sequence[Mapping[str, Any]]], settings: Settings, pictures: int) -> Table:
    """Give the table: a column for each server, medians over its runs."""
    many = f"{settings.requests} requests, {settings.at_a_time} at a time, "
    asked = f"{pictures} different pictures, {settings.repeats} runs of each"
    table = titled_table(many + asked, "", *found)

    def row(name: str, *keys: str) -> None:
        table.add_row(name, *(number(runs, keys) for runs in found.values()))

    outcomes = sorted({outcome for runs in found.values() for run in runs for outcome in run["outcomes"]})
    for outcome in outcomes:
        table.add_row(outcome, *(str(sum(run["outcomes"].get(outcome, 0) for run in runs)) for runs in found.values()))
    row("requests a second", "requests_per_second")
    row("tokens a second", "tokens_per_second")
    row("tokens an answer", "tokens_per_answer")
    row("CPU of the server, ms a request", "cpu_ms_per_request")
    for title, key in (("verdict", "to_verdict"), ("end", "to_end")):
        for part in ("p50", "p95", "max"):
            row(f"seconds to {title}, {part}", key, part)
    for mark in ("start", "10 %", "50 %", "end"):
        row(f"memory at {mark}, MB", "memory_mb", mark)
    return table


def number(runs: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """Write the median over runs, with least and most where there are several."""
    values = []
    for run in runs:
        value: Any = run
        for key in keys:
            value = value.get(key) if value is not None else None
        if value is not None:
            values.append(value)
    if not values:
        return "-"
    return f"{median(values):.2f}" + (f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else "")


if __name__ == "__main__":
    run_script(main)
