"""The load test counts every request: answered, refused by status, failed; and reads times, tokens and memory."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from servers import free_port, running

from llava.serve.load import bodies, cpu_seconds, picture, resident_mb, send


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Run a server that answers in turn: whole, refused 503, broken off, an error in the stream."""
    app, numbers = FastAPI(), count()
    end = 'data: {"choices": [], "usage": {"completion_tokens": 7}}\n\ndata: [DONE]\n\n'

    async def lines(number: int) -> AsyncIterator[str]:
        yield 'data: {"verdict": {"label": "FAKE"}}\n\n'
        await asyncio.sleep(0.05)
        yield {0: end, 2: "", 3: 'data: {"error": {"message": "too long"}}\n\ndata: [DONE]\n\n'}[number]

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        assert (await request.json())["stream"]
        number = next(numbers) % 4
        if number == 1:
            return JSONResponse({"error": {"message": "busy"}}, 503)
        return StreamingResponse(lines(number))

    with running(app) as url:
        yield url


def test_no_request_is_lost_from_the_count(address: str) -> None:
    asked = bodies("m", [picture(0), picture(1)], 40, 5)
    found = asyncio.run(send(address, asked, 8, pid=os.getpid())).numbers()
    assert found["sent"] == 40
    assert found["outcomes"] == {"answered": 10, "refused 503": 10, "failed": 20}
    assert found["problems"] == {"busy": 10, "too long": 10}
    assert found["tokens_per_answer"] == 7 and found["requests_per_second"] == pytest.approx(10 / found["seconds"])
    assert 0 < found["to_verdict"]["p50"] <= found["to_end"]["p50"] - 0.04 <= found["to_end"]["max"]
    assert list(found["memory_mb"]) == ["start", "10 %", "50 %", "end"] and found["memory_mb"]["end"] > 50
    assert found["cpu_ms_per_request"] > 0


def test_a_server_that_is_not_there_is_a_failure() -> None:
    found = asyncio.run(send(f"http://127.0.0.1:{free_port()}", bodies("m", [picture(0)], 3, 5), 2)).numbers()
    assert found["outcomes"] == {"failed": 3} and found["problems"] == {"ConnectError": 3}
    assert found["to_end"] == {} and found["memory_mb"] == {} and found["cpu_ms_per_request"] is None


def test_pictures_and_questions_take_turns() -> None:
    first, second = picture(0), picture(1)
    assert first != second and first == picture(0)
    decoded = cv2.imdecode(np.frombuffer(first, np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None and decoded.shape == (224, 224, 3)
    parts = [json.loads(body)["messages"][0]["content"] for body in bodies("m", [first, second], 8, 5)]
    assert len({(shown["image_url"]["url"], question["text"]) for shown, question in parts}) == 8


def test_memory_and_time_of_a_process_are_read() -> None:
    assert resident_mb(os.getpid()) > 20 and cpu_seconds(os.getpid()) > 0
    with pytest.raises(FileNotFoundError):
        resident_mb(2**30)


def test_only_this_machine_is_asked_unless_one_says_so() -> None:
    settings: Any = runpy.run_path(str(Path(__file__).parents[1] / "eval" / "load_test.py"))["Settings"]
    with pytest.raises(ValueError, match="is another machine"):
        settings(url="http://faces.example.org")
    assert settings(url="http://faces.example.org", allow_remote=True).requests == 500
    with pytest.raises(ValueError, match="needs --model_path"):
        settings(compare="rows=1,2")
    with pytest.raises(ValueError, match="at_a_time"):
        settings(at_a_time=0)
