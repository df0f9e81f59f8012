"""Load on a running server: many questions about pictures, some at a time, each answer timed, none lost."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np

from llava.core.runtime import item_rng

QUESTIONS = (
    "Determine the authenticity of this image.",
    "Does the nose look real or fake?",
    "Why?",
    "Is the skin real?",
)
PATH = "/v1/chat/completions"
LONGEST_SECONDS = 600.0
MARKS = {"start": 0.0, "10 %": 0.1, "50 %": 0.5, "end": 1.0}


@dataclass(frozen=True, kw_only=True)
class TimedAnswer:
    """What became of one request. status: of the reply, 0 = none came; seconds from sending to the verdict, the end."""

    status: int
    verdict_seconds: float | None = None
    seconds: float = 0.0
    tokens: int = 0
    is_whole: bool = False
    problem: str = ""

    @property
    def outcome(self) -> str:
        """Say `answered`, `refused 503` or `failed`."""
        if self.is_whole:
            return "answered"
        return f"refused {self.status}" if 400 <= self.status < 500 or self.status == 503 else "failed"


@dataclass(kw_only=True)
class Run:
    """All answers of one run; of a process that was watched, its CPU time and its memory at the marks of MARKS."""

    seconds: float = 0.0
    cpu_seconds: float | None = None
    answers: list[TimedAnswer] = field(default_factory=list)
    memory_mb: dict[str, float] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """Give the counts, rates per second, seconds (p50, p95, max) to verdict and end, and memory."""
        whole = [answer for answer in self.answers if answer.is_whole]
        return {
            "sent": len(self.answers),
            "outcomes": dict(Counter(answer.outcome for answer in self.answers)),
            "problems": dict(Counter(answer.problem for answer in self.answers if answer.problem)),
            "seconds": self.seconds,
            "requests_per_second": len(whole) / self.seconds,
            "tokens_per_second": sum(answer.tokens for answer in whole) / self.seconds,
            "cpu_ms_per_request": None if self.cpu_seconds is None else 1000 * self.cpu_seconds / len(self.answers),
            "tokens_per_answer": float(np.mean([answer.tokens for answer in whole])) if whole else 0.0,
            "to_verdict": _spread([a.verdict_seconds for a in whole if a.verdict_seconds is not None]),
            "to_end": _spread([answer.seconds for answer in whole]),
            "memory_mb": self.memory_mb,
        }


def picture(number: int, side: int = 224) -> bytes:
    """Draw a picture of its own for each number, as JPEG: smooth colours with noise, no face."""
    rng = item_rng(11, 0, number)
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    smooth = cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    noisy = (smooth + rng.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", noisy)[1].tobytes()


def bodies(model: str, pictures: Sequence[bytes], count: int, max_tokens: int) -> list[bytes]:
    """Give the JSON bodies of `count` requests: pictures and questions take turns, answers are streamed and greedy."""
    addresses = [f"data:image/jpeg;base64,{base64.b64encode(content).decode()}" for content in pictures]
    made = []
    for i in range(count):
        question = {"type": "text", "text": QUESTIONS[(i + i // len(addresses)) % len(QUESTIONS)]}
        shown = {"type": "image_url", "image_url": {"url": addresses[i % len(addresses)]}}
        asked = {"model": model, "messages": [{"role": "user", "content": [shown, question]}], "max_tokens": max_tokens}
        made.append(json.dumps(asked | {"stream": True, "stream_options": {"include_usage": True}}).encode())
    return made


async def send(url: str, asked: Sequence[bytes], at_a_time: int, key: str = "", pid: int | None = None) -> Run:
    """Send all requests, so many at a time; watch the memory of process `pid`. Nothing is sent twice."""
    run, waiting, started = Run(), iter(asked), time.perf_counter()
    note, cpu_before = _memory_notes(run, pid, len(asked)), None if pid is None else cpu_seconds(pid)
    note()
    limits = httpx.Limits(max_connections=at_a_time, max_keepalive_connections=at_a_time)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    async with httpx.AsyncClient(
        base_url=url, headers=headers, limits=limits, timeout=LONGEST_SECONDS, trust_env=False
    ) as client:

        async def work() -> None:
            for body in waiting:
                run.answers.append(await _ask(client, body))
                note()

        await asyncio.gather(*(work() for _ in range(at_a_time)))
    run.seconds = time.perf_counter() - started
    if pid is not None and cpu_before is not None:
        run.cpu_seconds = cpu_seconds(pid) - cpu_before
    return run


async def _ask(client: httpx.AsyncClient, body: bytes) -> TimedAnswer:
    """Ask once and read the stream to its end."""
    status, verdict, tokens, problem, is_done, started = 0, None, 0, "", False, time.perf_counter()
    try:
        async with client.stream("POST", PATH, content=body) as reply:
            status = reply.status_code
            async for line in reply.aiter_lines():
                if verdict is None and '"verdict"' in line:
                    verdict = time.perf_counter() - started
                if '"usage"' in line:
                    tokens = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
                if '"error"' in line:
                    problem = _refusal_in(line.removeprefix("data: "))
                is_done = is_done or line == "data: [DONE]"
    except httpx.HTTPError as error:
        problem = type(error).__name__
    return TimedAnswer(
        status=status,
        verdict_seconds=verdict,
        seconds=time.perf_counter() - started,
        tokens=tokens,
        is_whole=status == 200 and is_done and not problem,
        problem=problem,
    )


def _refusal_in(line: str) -> str:
    """Give the sentence of a refusal; the line itself where another server wrote it in its own way."""
    try:
        return str(json.loads(line)["error"]["message"])
    except (ValueError, TypeError, KeyError):
        return line.strip()[:200]


def resident_mb(pid: int) -> float:
    """Give the resident memory of a process in MB. Raises FileNotFoundError when there is none of this number."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def cpu_seconds(pid: int) -> float:
    """Give the CPU time of all threads of a process, which its neighbours on the machine change little."""
    behind_name = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return (int(behind_name[11]) + int(behind_name[12])) / os.sysconf("SC_CLK_TCK")


def _memory_notes(run: Run, pid: int | None, count: int) -> Callable[[], None]:
    """Give a function to be called after each answer; it notes the memory once at each mark."""
    marks: Iterator[tuple[str, float]] = iter(MARKS.items() if pid is not None else ())
    following = next(marks, None)

    def note() -> None:
        nonlocal following
        while following is not None and pid is not None and len(run.answers) >= following[1] * count:
            run.memory_mb[following[0]] = resident_mb(pid)
            following = next(marks, None)

    return note


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """Give p50, p95 and max; empty for nothing."""
    if not seconds:
        return {}
    p50, p95 = np.percentile(seconds, [50, 95])
    return {"p50": float(p50), "p95": float(p95), "max": float(max(seconds))}
