"""`m2f2 serve --ray true` as real processes: the same answers, a killed replica, a caller that leaves, an end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import openai
import pytest
from processes import listening_beyond_loopback, processes_with
from test_serve_api import messages
from tiny_world import SCOPE, draw

from llava.pipeline import Pipeline
from llava.pipeline.settings import FaceSettings
from llava.serve.options import ServeSettings

ROOT = Path(__file__).parents[1]
START_SECONDS, END_SECONDS = 300, 90


@dataclass(kw_only=True)
class Running:
    """A server on a Ray of its own; `mark` is in the environment of all its processes."""

    address: str
    process: subprocess.Popen[str]
    mark: str
    log: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=120)

    def said(self, text: str) -> int:
        return self.log.read_text().count(text)

    @property
    def replicas(self) -> list[int]:
        """List the processes that hold the explainer and have loaded it; those of the detector are `engine-2`."""
        words_of = {pid: words for pid, words in processes_with(self.mark).items() if "m2f2:engine" in words}
        return [pid for pid, words in words_of.items() if "engine-2" not in words and "__init__" not in words]

    @property
    def answering(self) -> int:
        """Give the process of the explainer that has written the last answer: Ray knows that it is ready."""
        return int(re.findall(r"m2f2:engine pid=(\d+)\)[^\n]*answer model=", self.log.read_text())[-1])


@contextmanager
def serving(models: Sequence[Path], folder: Path, *flags: str) -> Iterator[Running]:
    """Start `m2f2 serve --ray true` and wait until it is ready."""
    words = [sys.executable, "-m", "llava.cli", "serve", "--ray", "true", "--cluster.cpus", "4", "--port", "0", *flags]
    words += [
        "--model_path",
        *map(str, models),
        "--face",
        "off",
        "--stability",
        "false",
        "--requests_per_minute",
        "100000",
    ]
    place = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "M2F2_TEST": str(folder)}
    out, log = folder / "out", folder / "log"
    with out.open("w") as stdout, log.open("w") as stderr:
        process = subprocess.Popen(words, stdout=stdout, stderr=stderr, text=True, env=place)
    try:
        deadline = time.monotonic() + START_SECONDS
        while "ready:" not in out.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        address = re.findall(r"ready: (\S+)", out.read_text())[0]
        yield Running(address=address, process=process, mark=f"M2F2_TEST={folder}", log=log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tiny_explainer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    flags = ["--min_replicas", "1", "--max_replicas", "2", "--rows", "1", "--upscale_seconds", "2"]
    models = [tiny_explainer, tiny_explainer.parent / "detector"]
    with serving(models, tmp_path_factory.mktemp("ray"), *flags) as started:
        yield started


@pytest.mark.e2e
def test_a_second_replica_comes_when_there_is_more_to_do(server: Running) -> None:
    assert len(server.replicas) == 1
    answered: Counter[str | None] = Counter()
    deadline, is_enough = time.monotonic() + START_SECONDS, Event()

    def ask(number: int) -> None:
        while not is_enough.is_set():
            reply = server.client.chat.completions.create(model="explainer", messages=messages(draw(1, number)))
            answered[reply.choices[0].message.content] += 1

    with ThreadPoolExecutor(3) as threads:
        asking = [threads.submit(ask, number) for number in range(3)]
        try:
            while len(server.replicas) < 2 and time.monotonic() < deadline:
                time.sleep(1)
        finally:
            is_enough.set()
        for each in asking:
            each.result(timeout=120)
    assert len(server.replicas) == 2 and set(answered) == {"The image is fake."}


@pytest.mark.e2e
def test_answers_are_those_of_one_process(server: Running, tiny_explainer: Path) -> None:
    pipeline = Pipeline.from_pretrained(tiny_explainer, faces=FaceSettings(face="off"), stability=False)
    for label in (0, 1):
        alone = pipeline.explain(draw(label, 3))
        whole = server.client.chat.completions.create(model="explainer", messages=messages(draw(label, 3)))
        assert whole.choices[0].message.content == alone.text
        assert whole.verdict["label"] == str(alone.verdict.label)
        assert whole.verdict["p_fake"] == pytest.approx(alone.verdict.p_fake, abs=1e-5)
        stream = server.client.chat.completions.create(
            model="explainer", messages=messages(draw(label, 3)), stream=True
        )
        chunks = list(stream)
        assert chunks[0].verdict == whole.verdict and not chunks[0].choices[0].delta.content
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == alone.text


@pytest.mark.e2e
def test_a_detector_beside_it_gives_the_verdict_of_one_process(server: Running, tiny_explainer: Path) -> None:
    listed = [(model.id, model.capabilities, model.scope) for model in server.client.models.list()]
    assert listed == [("explainer", ["detect", "explain"], SCOPE), ("detector", ["detect"], SCOPE)]
    detector = tiny_explainer.parent / "detector"
    (alone,) = Pipeline.from_pretrained(detector, faces=FaceSettings(face="off"), stability=False).detect(draw(1, 3))
    reply = server.client.chat.completions.create(model="detector", messages=messages(draw(1, 3)))
    assert reply.verdict["label"] == str(alone.label) == "FAKE"
    assert reply.verdict["p_fake"] == pytest.approx(alone.p_fake, abs=1e-5)
    assert (reply.choices[0].message.content or "").startswith("The detector's verdict is FAKE: p_fake ")
    content = {"files": b"anything"}
    refused = httpx.post(f"{server.address}/v1/explain", files=content, data={"model": "detector"})
    assert refused.status_code == 400 and "ask for the model 'explainer'" in refused.json()["error"]["message"]


@pytest.mark.e2e
def test_guards_stand_in_front_and_nothing_listens_beyond_loopback(server: Running) -> None:
    assert httpx.get(f"{server.address}/health").json()["model"] == "explainer"
    refused = httpx.post(f"{server.address}/v1/detect", files={"files": b"no image at all"})
    assert refused.status_code == 415 and refused.json()["error"]["type"] == "unsupported_media_type"
    wrong = httpx.post(f"{server.address}/v1/chat/completions", content=b"{" * 50)
    assert wrong.status_code == 400 and wrong.json()["error"]["type"] == "invalid_request_error"
    assert status_of_announced(server.address, 999_999_999) == 413
    assert len(processes_with(server.mark)) > 5
    assert listening_beyond_loopback(processes_with(server.mark)) == []


def status_of_announced(address: str, byte_count: int) -> int:
    """Announce a long body, send none of it, and give the status of the answer."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 60) as line:
        head = f"POST /v1/detect HTTP/1.1\r\nHost: {host}\r\nContent-Length: {byte_count}\r\n\r\n"
        line.sendall(head.encode())
        return int(line.recv(1000).split()[1])


@pytest.mark.e2e
def test_a_caller_that_leaves_frees_its_place_in_the_replica(server: Running) -> None:
    before = server.said("outcome=caller left")
    for seed in range(5):  # at this temperature an answer goes on until it happens to end; one of five is long
        asked: dict[str, Any] = {"temperature": 2.0, "seed": seed, "max_tokens": 1000, "stream": True}
        stream = server.client.chat.completions.create(model="explainer", messages=messages(draw(1, 5)), **asked)
        next(iter(stream))
        stream.close()
    deadline = time.monotonic() + 60
    while server.said("outcome=caller left") == before:
        assert time.monotonic() < deadline, "nobody noticed that the caller left"
        time.sleep(0.1)


@pytest.mark.e2e
def test_a_replica_that_is_killed_under_load_hangs_nobody(server: Running) -> None:
    answered: Counter[str] = Counter()

    def ask(index: int) -> None:
        picture = messages(draw(index % 2, index))
        try:
            reply = server.client.chat.completions.create(model="explainer", messages=picture)
            answered[str(reply.choices[0].message.content)] += 1
        except openai.APIStatusError as error:
            answered[f"{error.status_code} {error.body['message']}"] += 1

    with ThreadPoolExecutor(6) as threads:
        asking = [threads.submit(ask, index) for index in range(60)]
        while not answered:
            time.sleep(0.01)
        os.kill(server.answering, signal.SIGKILL)
        for each in asking:
            each.result(timeout=120)
    refused = [said for said in answered if said.startswith("503 What wrote this answer has failed")]
    clean = {"The image is real.", "The image is fake.", *refused}
    assert answered.total() == 60 and set(answered) <= clean, answered
    ask(1)
    assert answered["The image is fake."] > 0 and answered.total() == 61


@pytest.mark.e2e
def test_sigterm_ends_every_process(server: Running) -> None:
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(END_SECONDS) == 0
    deadline = time.monotonic() + 60
    while alive := processes_with(server.mark):
        assert time.monotonic() < deadline, alive
        time.sleep(0.2)
    assert "Traceback" not in server.log.read_text()


def test_replicas_need_ray_and_make_sense() -> None:
    assert ServeSettings().replica_range == (1, 1)
    assert ServeSettings(ray=True, replicas=3).replica_range == (3, 3)
    assert ServeSettings(ray=True, max_replicas=4).replica_range == (1, 4)
    assert ServeSettings(ray=True, min_replicas=2, max_replicas=4).replica_range == (2, 4)
    with pytest.raises(ValueError, match="replicas: 2 need Ray; add --ray true"):
        ServeSettings(replicas=2)
    with pytest.raises(ValueError, match="replicas: 3 to 1 is not usable"):
        ServeSettings(ray=True, min_replicas=3)
    with pytest.raises(ValueError, match="upscale_seconds: -1"):
        ServeSettings(ray=True, upscale_seconds=-1)


@pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # Ray Serve's own
def test_replicas_are_a_number_or_a_range_for_ray() -> None:
    from llava.serve.ray_app import _scale

    assert _scale(ServeSettings(ray=True, replicas=2)) == {"num_replicas": 2}
    scaling = _scale(ServeSettings(ray=True, min_replicas=1, max_replicas=2, rows=3))["autoscaling_config"]
    load = {"target_ongoing_requests": 3, "upscale_delay_s": 30}
    assert scaling == {"min_replicas": 1, "max_replicas": 2, **load}


@pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # Ray Serve's own
def test_serve_run_needs_keys_because_ray_decides_where_it_listens() -> None:
    from llava.serve.ray_app import app

    with pytest.raises(ValueError, match="can be reached from other machines; give --keys FILE"):
        app({"model_path": "anything"})
    with pytest.raises(ValueError, match="host: this is a setting of Ray"):
        app({"host": "127.0.0.1"})
    with pytest.raises(ValueError, match="Did you mean 'model_path'"):
        app({"model_pat": "x", "allow_unauthenticated": "true"})
