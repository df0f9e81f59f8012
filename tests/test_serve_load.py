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

ROOT = Path(__file__).parents[1]


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


def test_a_refusal_of_another_server_is_told_as_it_stands() -> None:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat() -> Response:
        return Response('{\n "error": {\n  "text": "no"}}\n', 503)

    with running(app) as url:
        found = asyncio.run(send(url, bodies("m", [picture(0)], 2, 5), 1)).numbers()
    assert found["outcomes"] == {"refused 503": 2} and found["problems"] == {'"error": {': 2}


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


@pytest.mark.e2e
def test_settings_are_compared_on_servers_of_its_own(
    tiny_explainer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model_path", str(tiny_explainer), "--serve.face", "off", "--serve.stability", "off"]
    words += ["--compare", "rows=2", "--requests", "8", "--at_a_time", "4", "--json", str(tmp_path / "a.json")]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("sys.argv", ["load_test.py", *words])
    runpy.run_path(str(ROOT / "eval" / "load_test.py"), run_name="__main__")
    (run,) = json.loads((tmp_path / "a.json").read_text())["runs"]["rows=2"]
    assert run["outcomes"] == {"answered": 8} and run["tokens_per_answer"] > 3 and run["memory_mb"]["end"] > 100
    assert "rows=2" in capsys.readouterr().out


def test_one_image_and_many_are_measured_with_the_same_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--width 32 --heads 2 --layers 1 --tiny_detector true --repeats 1 --questions 3 --max_tokens 4 --side 64"
    monkeypatch.setattr("sys.argv", ["measure_prefix.py", *words.split(), "--json", str(tmp_path / "a.json")])
    runpy.run_path(str(ROOT / "eval" / "measure_prefix.py"), run_name="__main__")
    one, many = (runs[0] for runs in json.loads((tmp_path / "a.json").read_text())["runs"].values())
    assert one["tokens"] == many["tokens"] == 12
    assert min(one[step] for step in ("look", "prefixes_of", "join", "step")) > 0
    assert "times as fast" in capsys.readouterr().out


def test_only_this_machine_is_asked_unless_one_says_so() -> None:
    settings: Any = runpy.run_path(str(ROOT / "eval" / "load_test.py"))["Settings"]
    with pytest.raises(ValueError, match="is another machine"):
        settings(url="http://faces.example.org")
    assert settings(url="http://faces.example.org", allow_remote=True).requests == 500
    with pytest.raises(ValueError, match="needs --model_path"):
        settings(compare="rows=1,2")
    for name in ("at_a_time", "distinct"):
        with pytest.raises(ValueError, match=name):
            settings(**{name: 0})


def test_the_table_counts_the_pictures_that_there_are(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "eval" / "load_test.py"))
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number))
    settings = script["Settings"](pictures=str(tmp_path), requests=10)
    contents = script["contents_of"](settings)
    assert "10 requests, 32 at a time, 3 different pictures" in script["table_of"]({}, settings, len(contents)).title
    with pytest.raises(ValueError, match="holds 3 pictures; fewer than 4"):
        script["contents_of"](script["Settings"](pictures=str(tmp_path), requests=10, distinct=4))
    assert len(script["contents_of"](script["Settings"](pictures=str(tmp_path), requests=2, distinct=5))) == 2
