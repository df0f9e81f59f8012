"""A worker asked over HTTP within the process, with an engine whose words are known."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import count, pairwise
from threading import Event

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from servers import running, wait_for

from llava.core.types import GenerationSettings, Turn, Verdict, VerdictLabel
from llava.serve import web
from llava.serve.engine import Answer, Piece, Question, from_thread
from llava.serve.gradio_web_server import Controller, RemoteEngine
from llava.serve.model_worker import ALIASES, REFUSED, WorkerSettings, build_app, translated
from llava.serve.protocol import Chunk, decode_chunk, split_chunks

PROMPT = "A chat. USER: <image>\n<deepfake>\nIs it real? ASSISTANT:"
VERDICT = Verdict(
    label=VerdictLabel.FAKE, p_fake=0.9, raw_p_fake=0.9, probabilities={"fake": 0.9}, evidence={}, detector="m2f2det"
)
NOTHING = Verdict(
    label=VerdictLabel.INCONCLUSIVE, p_fake=None, probabilities={}, evidence={}, detector="m2f2det", reason="no face"
)


class Reader:
    """An engine that says prepared words, and keeps what it was asked."""

    has_words = True

    def __init__(self, words: Sequence[str] = ("The image", " is", " fake."), verdict: Verdict = VERDICT) -> None:
        self.words = words
        self.verdict = verdict
        self.asked: list[tuple[np.ndarray | None, tuple[Turn, ...], GenerationSettings]] = []

    def ask(self, question: Question, stop: Event) -> Iterator[Piece]:
        self.asked.append((question.image, tuple(question.turns), question.settings))
        yield Piece(verdict=self.verdict)
        for number, word in enumerate(self.words, 1):
            yield Piece(text=word, tokens=number)


class Broken:
    """An engine that fails."""

    has_words = True

    def __init__(self, error: Exception) -> None:
        self.error = error

    def ask(self, question: Question, stop: Event) -> Iterator[Piece]:
        yield Piece(verdict=VERDICT)
        raise self.error


class Endless:
    """An engine that writes until it is stopped; counts how many requests it is at."""

    has_words = True

    def __init__(self) -> None:
        self.active = 0

    def ask(self, question: Question, stop: Event) -> Iterator[Piece]:
        self.active += 1
        try:
            yield Piece(verdict=VERDICT)
            for number in count(1):
                if stop.wait(0.01):
                    return
                yield Piece(text="a ", tokens=number)
        finally:
            self.active -= 1


def picture(width: int = 32, height: int = 32) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (10, 200, 30)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def body(**changes: object) -> dict[str, object]:
    return {"model": "m", "prompt": PROMPT, "images": [picture()], "temperature": 0, **changes}


@asynccontextmanager
async def client_of(engine: object, **changes: object) -> AsyncIterator[httpx.AsyncClient]:
    worker = WorkerSettings(model_path="checkpoints/m", no_register=True, **changes)  # type: ignore[arg-type]
    app = build_app(worker, engine)  # type: ignore[arg-type]
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://worker") as client,
    ):
        yield client


def post(engine: object, asked: object, **changes: object) -> httpx.Response:
    async def run() -> httpx.Response:
        async with client_of(engine, **changes) as client:
            return await client.post("/worker_generate_stream", json=asked)

    return asyncio.run(run())


def chunks(response: httpx.Response) -> list[Chunk]:
    return [decode_chunk(chunk) for chunk in split_chunks([response.content])]


def test_the_verdict_comes_first_and_the_text_grows_after_the_prompt() -> None:
    engine = Reader()
    first, *rest = chunks(post(engine, body()))
    assert (first.text, first.error_code, first.verdict) == (PROMPT, 0, VERDICT.to_dict())
    grown = [c.text.removeprefix(PROMPT) for c in rest]  # what is written faster than it is sent comes together
    assert grown[-1] == "The image is fake." and all(b.startswith(a) for a, b in pairwise(grown))
    assert all(c.error_code == 0 and c.verdict is None for c in rest)
    image, turns, words = engine.asked[0]
    assert image is not None and image.shape == (32, 32, 3) and image[0, 0].tolist() == [10, 200, 30]
    assert turns == (Turn(role="human", text="Is it real?"),)
    assert words == GenerationSettings(max_new_tokens=256, temperature=0.0, seed=words.seed)


def test_settings_are_read_as_published() -> None:
    engine = Reader()
    post(engine, body(temperature=0.001, max_new_tokens=5000, seed=0))
    post(engine, body(temperature=0.2, top_p=0.7, max_new_tokens=7, seed=5))
    (_, _, greedy), (_, _, sampled) = engine.asked
    assert greedy == GenerationSettings(max_new_tokens=1024, temperature=0.0)
    assert sampled == GenerationSettings(max_new_tokens=7, temperature=0.2, top_p=0.7, seed=5)


def test_a_request_without_a_seed_is_sampled_anew() -> None:
    engine = Reader()
    for _ in range(2):
        post(engine, body(temperature=0.7))
    assert len({settings.seed for *_, settings in engine.asked}) == 2


def test_the_page_of_a_controller_sends_its_seed() -> None:
    engine, image = Reader(), np.zeros((32, 32, 3), np.uint8)
    turns = [Turn(role="human", text="Why?")]
    asked = Question(image=image, turns=turns, settings=GenerationSettings(seed=3), is_crop=True)
    with running(build_app(WorkerSettings(model_path="m", no_register=True), engine)) as url:  # type: ignore[arg-type]
        assert list(RemoteEngine(Controller(url), "m").ask(asked, Event()))
    assert engine.asked[0][2].seed == 3


def test_without_echo_the_text_is_the_answer_alone() -> None:
    assert chunks(post(Reader(), body(echo=False)))[-1].text == "The image is fake."


def test_a_text_that_contradicts_the_verdict_is_marked_at_the_end() -> None:
    *_, last = chunks(post(Reader(words=["The image is real."]), body(echo=False)))
    assert last.text == "The image is real." and "the detector's verdict stands" in last.remark


def test_no_verdict_is_said_in_words_for_clients_that_read_only_text() -> None:
    first, last = chunks(post(Reader(words=[], verdict=NOTHING), body(echo=False)))
    assert first.verdict is not None and first.verdict["label"] == "INCONCLUSIVE"
    assert last.text == "There is no verdict: no face." and last.error_code == 0


def test_a_stop_text_ends_the_answer_and_is_never_shown() -> None:
    for words in (["fake", " #", "##", " Human"], ["fake ###", "x"], ["fake", " ###x"]):
        texts = [c.text for c in chunks(post(Reader(words=words), body(echo=False, stop="###")))]
        assert texts[-1] == "fake" and not any("#" in text for text in texts)
    assert chunks(post(Reader(words=["a #", " b"]), body(echo=False, stop=["###"])))[-1].text == "a # b"
    assert chunks(post(Endless(), body(echo=False, stop=["a a"])))[-1].text == ""


def test_growing_text_is_cut_at_the_first_stop() -> None:
    answer = Answer("Why?", stops=["END", "###"])
    for letter in "one E two ## E":
        answer.add(Piece(text=letter))
        assert not answer.is_ended
    assert (answer.shown, answer.text) == ("one E two ##", "one E two ## E")
    answer.add(Piece(text="ND ###"))
    assert answer.is_ended and answer.shown == answer.text == "one E two ##"


@pytest.mark.parametrize(
    ("asked", "status", "reason"),
    [
        (body(images=[]), 400, "send one image and one <image>"),
        (body(prompt="Is it real?", images=[]), 400, "no turn found"),
        (body(prompt=7), 422, "prompt: "),
        (body(temperature="hot"), 422, "temperature: "),
        (body(images=["!!!"]), 200, "not base64"),
        (body(images=[base64.b64encode(b"GIF89a, or not").decode()]), 200, "not an image in a format"),
        (body(images=[picture(8, 8)]), 200, "too small"),
        (body(images=[picture(9000, 6000)]), 200, "too large"),
        ([], 422, "body: "),
    ],
)
def test_what_can_not_be_answered_gets_one_chunk_that_says_why(asked: object, status: int, reason: str) -> None:
    response = post(Reader(), asked)
    (chunk,) = chunks(response)
    assert (response.status_code, chunk.error_code) == (status, 1)
    assert reason in chunk.text and "Traceback" not in chunk.text


def test_an_error_in_the_engine_is_the_last_chunk_and_tells_no_secrets(caplog: pytest.LogCaptureFixture) -> None:
    *_, last = chunks(post(Broken(ValueError("The conversation is too long.")), body()))
    assert (last.error_code, last.text) == (1, "The conversation is too long.")
    *_, last = chunks(post(Broken(RuntimeError("at 0x7f: /secret/place")), body()))
    assert last.error_code == 1 and "/secret/place" not in last.text
    assert "/secret/place" in caplog.text


def test_the_log_names_request_seconds_and_tokens_but_no_words(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="llava"):
        post(Reader(), body(prompt=PROMPT.replace("Is it real?", "A very private question?")))
    (line,) = [r.getMessage() for r in caplog.records if r.name == "llava.serve.model_worker"]
    assert line.startswith("request id=") and "model=m seconds=0." in line and line.endswith("tokens=3 outcome=done")
    assert "private" not in caplog.text and picture()[:40] not in caplog.text


def test_only_json_of_limited_size_is_read() -> None:
    async def run() -> list[tuple[int, int]]:
        async with client_of(Reader()) as client:
            kinds = [
                await client.post("/worker_generate_stream", content=b"{}", headers={"content-type": "text/plain"}),
                await client.post("/worker_generate_stream", data={"prompt": "x"}),
                await client.post("/worker_generate_stream", content=b"{}"),
                await client.post("/worker_generate_stream", json={"images": ["x" * 28_000_000]}),
            ]
            return [(answer.status_code, chunks(answer)[0].error_code) for answer in kinds]

    assert asyncio.run(run()) == [(415, 1), (415, 1), (415, 1), (413, 1)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(["model", "prompt", "images", "temperature", "top_p", "max_new_tokens", "stop", "echo"])


@given(st.dictionaries(fields, json_values) | json_values, st.binary(max_size=60))
@settings(max_examples=60, deadline=None)
def test_no_body_gives_a_traceback(asked: object, raw: bytes) -> None:
    good = body()
    wanted = {**good, **asked} if isinstance(asked, dict) else asked

    async def run() -> list[httpx.Response]:
        async with client_of(Reader()) as client:
            kind = {"content-type": "application/json"}
            sent = [json.dumps(asked).encode(), json.dumps(wanted).encode(), raw]
            return [await client.post("/worker_generate_stream", content=each, headers=kind) for each in sent]

    for response in asyncio.run(run()):
        assert response.status_code in (200, 400, 422)
        *_, last = chunks(response)
        assert last.error_code in (0, 1) and "Traceback" not in response.text


def test_requests_beyond_the_limit_wait_and_beyond_that_are_refused() -> None:
    async def run() -> tuple[int, int, list[int]]:
        engine = Endless()
        worker = {"limit_model_concurrency": 2, "limit_waiting": 1, "limit_seconds": 0.6}
        async with client_of(engine, **worker) as client:
            tasks = [asyncio.create_task(client.post("/worker_generate_stream", json=body())) for _ in range(5)]
            await asyncio.sleep(0.3)
            active = engine.active
            status = (await client.post("/worker_get_status")).json()
            answers = await asyncio.gather(*tasks)
        return active, status["queue_length"], sorted(chunks(answer)[-1].error_code for answer in answers)

    active, queue_length, codes = asyncio.run(run())
    assert (active, queue_length) == (2, 3)
    assert codes == [1, 1, 3, 3, 3]  # two refused at once, three ended by the time limit


def test_a_client_that_does_not_read_loses_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "READING_SECONDS", 0.3)
    settings = WorkerSettings(model_path="m", no_register=True, limit_model_concurrency=1, limit_waiting=0)
    asked = json.dumps(body(prompt=PROMPT.replace("Is it", "Is it " * 9_000))).encode()  # comes back in every chunk
    kind = f"Content-Type: application/json\r\nContent-Length: {len(asked)}"
    with running(build_app(settings, Endless())) as url, socket.socket() as client:  # type: ignore[arg-type]
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        client.sendall(f"POST /worker_generate_stream HTTP/1.1\r\nHost: w\r\n{kind}\r\n\r\n".encode() + asked)

        def waiting() -> int:
            return int(httpx.post(f"{url}/worker_get_status").json()["queue_length"])

        wait_for(lambda: waiting() == 1, 30)
        wait_for(lambda: waiting() == 0, 60)


def test_a_reader_that_leaves_stops_the_thread_at_once() -> None:
    engine = Endless()

    async def run() -> float:
        stop = Event()
        with ThreadPoolExecutor(1) as threads:
            question = Question(image=None, turns=(), settings=GenerationSettings())
            stream = from_thread(lambda: engine.ask(question, stop), threads, stop, 10)
            async for pieces in stream:
                if pieces[-1].tokens >= 3:
                    break
            started = time.monotonic()
            await stream.aclose()
            while engine.active:
                await asyncio.sleep(0.01)
            return time.monotonic() - started

    assert asyncio.run(run()) < 0.5


def test_published_flags_are_taken_mapped_or_refused() -> None:
    words = ["--controller", "http://c:1", "--worker=http://w:2", "--model-path", "p", "--load-4bit", "--multi-modal"]
    assert list(translated(words, ALIASES, REFUSED))[:3] == [
        "--controller-address",
        "http://c:1",
        "--worker-address=http://w:2",
    ]
    with pytest.raises(ValueError, match="--model-base is not accepted"):
        list(translated(["--model-base", "x"], ALIASES, REFUSED))
    assert WorkerSettings(model_path="a/b", load_4bit=True).bits == "4bit"
    assert WorkerSettings(model_path="a/b", load_8bit=True).bits == "8bit"
    assert WorkerSettings(model_path="a/b").name == "b"
    assert WorkerSettings(model_path="a/b", port=7).address == "http://localhost:7"
    with pytest.raises(ValueError, match="Give one of"):
        WorkerSettings(model_path="a", load_4bit=True, quantization="8bit")
    for name in ("limit_model_concurrency", "limit_seconds", "heartbeat_seconds"):
        with pytest.raises(ValueError, match=f"{name}: 0 is not usable"):
            WorkerSettings(model_path="a", **{name: 0})
    for address in ("http://localhost:abc", "localhost:21001", "http://"):
        with pytest.raises(ValueError, match=r"http://HOST:PORT"):
            WorkerSettings(model_path="a", controller_address=address)


def test_a_worker_of_a_distant_controller_needs_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("M2F2_WORKER_SECRET", raising=False)
    with pytest.raises(ValueError, match="--controller-address"):
        build_app(WorkerSettings(model_path="a", controller_address="http://10.0.0.1:21001"), Reader())
