"""The controller over real HTTP on loopback, with peers that answer, die, keep silent or lie."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from uuid import uuid4

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import Peer, free_port, running, wait_for

from llava.serve import web
from llava.serve.controller import ControllerSettings, build_app
from llava.serve.protocol import Chunk, WorkerStatus, decode_chunk, encode_chunk, split_chunks
from llava.serve.registration import SECRET_HEADER, SECRET_VARIABLE, stay_registered

SECRET = "0123456789abcdef0123456789abcdef"
STATUS = {"model_names": ["m"], "speed": 1, "queue_length": 0}
ANSWER = encode_chunk(Chunk(text="a", error_code=0)) + encode_chunk(Chunk(text="ab", error_code=0))


def http(body: bytes, length: int | None = None, status: str = "200 OK") -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n\r\n".encode() + body


@contextmanager
def controller(expiry_seconds: float) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(SECRET_VARIABLE, raising=False)
        app = build_app(ControllerSettings(host="127.0.0.1", worker_seconds=0.5, expiry_seconds=expiry_seconds))
    with running(app) as url:
        yield url


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with controller(expiry_seconds=30) as url:
        yield url


@pytest.fixture
def impatient() -> Iterator[str]:
    with controller(expiry_seconds=4) as url:
        yield url


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    made: list[Peer] = []
    yield made
    for peer in made:
        peer.close()


def register(controller: str, worker: str, model: str, queue: int = 0, **changes: object) -> httpx.Response:
    status = {"model_names": [model], "speed": 1, "queue_length": queue}
    asked = {"worker_name": worker, "check_heart_beat": True, "worker_status": status, **changes}
    return httpx.post(f"{controller}/register_worker", json=asked)


def ask(controller: str, model: str) -> list[Chunk]:
    answer = httpx.post(f"{controller}/worker_generate_stream", json={"model": model, "prompt": "x"}, timeout=10)
    assert answer.status_code == 200
    return [decode_chunk(chunk) for chunk in split_chunks([answer.content])]


def test_an_answer_is_passed_on_as_it_is(address: str, peers: list[Peer]) -> None:
    peers.append(Peer(http(ANSWER)))
    assert register(address, peers[0].address, "plain").status_code == 200
    assert [c.text for c in ask(address, "plain")] == ["a", "ab"]
    for path, is_listed in (("list_models", True), ("list_multimodal_models", False), ("list_language_models", True)):
        assert ("plain" in httpx.post(f"{address}/{path}").json()["models"]) is is_listed
    found = httpx.post(f"{address}/get_worker_address", json={"model": "plain"}).json()
    assert found == {"address": peers[0].address}


def test_no_worker_is_one_chunk_with_code_2(address: str) -> None:
    (chunk,) = ask(address, "nobody")
    assert chunk.error_code == 2 and "'nobody'" in chunk.text
    assert httpx.post(f"{address}/get_worker_address", json={"model": "nobody"}).json() == {"address": ""}


def test_a_model_name_makes_no_log_line_of_its_own(address: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="llava"):
        ask(address, "m\nrequest id=1 model=forged outcome=done")
    assert "request id=" in caplog.text and "\nrequest id=1" not in caplog.text


@pytest.mark.parametrize("early", [b"", http(b""), http(b"", 10), http(ANSWER[:5], 100), b"no http\r\n\r\n"])
def test_a_worker_that_dies_before_its_first_chunk_is_replaced_once(
    address: str, peers: list[Peer], early: bytes
) -> None:
    peers += [Peer(early), Peer(http(ANSWER))]
    model = uuid4().hex
    register(address, peers[0].address, model)
    register(address, peers[1].address, model, queue=5)
    assert [c.text for c in ask(address, model)] == ["a", "ab"]
    assert [peer.connections for peer in peers] == [1, 1]
    assert [c.text for c in ask(address, model)] == ["a", "ab"]
    assert [peer.connections for peer in peers] == [1, 2]  # the dead one was forgotten


def test_a_request_is_retried_no_more_than_once(address: str, peers: list[Peer]) -> None:
    peers += [Peer(b"") for _ in range(3)]
    for peer in peers:
        register(address, peer.address, "thrice")
    (chunk,) = ask(address, "thrice")
    assert chunk.error_code == 3
    assert sum(peer.connections for peer in peers) == 2


def test_the_only_worker_dying_is_one_chunk(address: str) -> None:
    register(address, f"http://127.0.0.1:{free_port()}", "lonely")
    (chunk,) = ask(address, "lonely")
    assert chunk.error_code == 2 and "no other" in chunk.text


def test_a_worker_that_dies_within_an_answer_ends_it_with_one_error(address: str, peers: list[Peer]) -> None:
    peers += [Peer(http(ANSWER[:-3], 1000)), Peer(http(ANSWER))]
    register(address, peers[0].address, "half")
    register(address, peers[1].address, "half", queue=5)
    said = ask(address, "half")
    assert [(c.text, c.error_code) for c in said[:-1]] == [("a", 0)]
    assert said[-1].error_code == 3 and "ask again" in said[-1].text


def test_a_silent_worker_is_one_chunk_with_code_3(address: str, peers: list[Peer]) -> None:
    peers.append(Peer(None))
    register(address, peers[0].address, "silent")
    started = time.monotonic()
    (chunk,) = ask(address, "silent")
    assert chunk.error_code == 3 and "silent for 0.5 seconds" in chunk.text
    assert time.monotonic() - started < 2


def test_a_redirect_of_a_worker_is_not_followed(address: str, peers: list[Peer]) -> None:
    target = Peer(http(ANSWER))
    moved = f"HTTP/1.1 307 Moved\r\nLocation: {target.address}/x\r\nContent-Length: 0\r\n\r\n".encode()
    peers += [Peer(moved), target]
    register(address, peers[0].address, "moved")
    (chunk,) = ask(address, "moved")
    assert chunk.error_code == 2 and target.connections == 0


def test_a_worker_is_called_by_its_name_at_the_address_that_was_checked(address: str, peers: list[Peer]) -> None:
    peers.append(Peer(http(ANSWER)))
    name = peers[0].address.replace("127.0.0.1", "localhost")
    assert register(address, name, "named").status_code == 200
    assert [c.text for c in ask(address, "named")] == ["a", "ab"]
    head = peers[0].heard.partition(b"\r\n\r\n")[0].lower().decode()
    assert f"host: {name.removeprefix('http://')}\r\n" in head and "x-request-id: " in head


def test_a_silent_heart_is_forgotten_and_comes_back(impatient: str, peers: list[Peer]) -> None:
    peers.append(Peer(http(json.dumps(STATUS).encode())))
    name = peers[0].address

    def beat() -> bool:
        sent = {"worker_name": name, "queue_length": 3}
        return bool(httpx.post(f"{impatient}/receive_heart_beat", json=sent).json()["exist"])

    assert not beat()
    register(impatient, name, "heart")
    assert beat()
    wait_for(lambda: "heart" not in httpx.post(f"{impatient}/list_models").json()["models"], 60)
    assert not beat()
    register(impatient, name, "heart")
    assert beat()


def test_a_refresh_asks_only_who_is_registered_and_forgets_who_is_gone(address: str, peers: list[Peer]) -> None:
    status = {"model_names": ["renamed"], "speed": 1, "queue_length": 2}
    peers += [Peer(http(json.dumps(status).encode())), Peer(http(b"[]")), Peer(http(b"x" * 200_000))]
    stranger = Peer(http(b"{}"))
    peers.append(stranger)
    for peer in peers[:3]:
        register(address, peer.address, "fresh", check_heart_beat=False)
    assert httpx.post(f"{address}/refresh_all_workers", timeout=10).status_code == 200
    models = httpx.post(f"{address}/list_models").json()["models"]
    assert "renamed" in models and "fresh" not in models
    assert stranger.connections == 0
    assert "renamed" in httpx.post(f"{address}/worker_get_status").json()["model_names"]


def test_without_a_status_the_worker_is_asked_for_it(address: str, peers: list[Peer]) -> None:
    peers += [Peer(http(json.dumps(STATUS).encode())), Peer(http(b"{}"))]
    assert register(address, peers[0].address, "-", worker_status=None).status_code == 200
    refused = register(address, peers[1].address, "-", worker_status=None)
    assert refused.status_code == 400 and "gives no status" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("worker", "headers", "status"),
    [
        ("http://169.254.169.254:80", {}, 400),
        ("http://10.0.0.7:21002", {}, 400),
        ("http://[::ffff:169.254.169.254]:80", {}, 400),
        ("file:///etc/passwd", {}, 400),
        ("http://user@127.0.0.1:1", {}, 400),
        ("http://127.0.0.1:1", {"X-Forwarded-For": "8.8.8.8"}, 403),
        ("http://127.0.0.1:1", {"Host": "evil.example"}, 403),
        ("http://127.0.0.1:1", {"Host": "[::1"}, 403),
        ("x" * 257, {}, 422),
    ],
)
def test_a_forged_registration_is_refused(address: str, worker: str, headers: dict[str, str], status: int) -> None:
    asked = {"worker_name": worker, "check_heart_beat": False, "worker_status": {**STATUS, "model_names": ["forged"]}}
    answer = httpx.post(f"{address}/register_worker", json=asked, headers=headers)
    assert answer.status_code == status and "Traceback" not in answer.text
    assert "forged" not in httpx.post(f"{address}/list_models").json()["models"]


def test_the_controller_does_not_register_itself(address: str) -> None:
    assert "the controller itself" in register(address, address, "loop").json()["detail"]


def test_a_page_in_a_browser_can_not_register_a_worker(address: str) -> None:
    simple = httpx.post(f"{address}/register_worker", content=b"{}", headers={"content-type": "text/plain"})
    assert simple.status_code == 415
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(f"{address}/register_worker", headers=asked)
    assert preflight.status_code == 405 and "access-control-allow-origin" not in preflight.headers


def test_the_secret_is_asked_of_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    app = build_app(ControllerSettings(host="0.0.0.0"))
    with running(app) as url:
        asked = {"worker_name": "http://127.0.0.1:1", "worker_status": STATUS}
        beat = {"worker_name": "http://127.0.0.1:1", "queue_length": 0}
        codes = []
        for shown in ({}, {SECRET_HEADER: "wrong" * 8}, {SECRET_HEADER: SECRET}):
            for path, body in (("register_worker", asked), ("receive_heart_beat", beat)):
                codes.append(httpx.post(f"{url}/{path}", json=body, headers=shown).status_code)
        assert codes == [403, 403, 403, 403, 200, 200]
        assert httpx.post(f"{url}/list_models").json() == {"models": ["m"]}


def test_a_worker_registers_again_until_it_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    status = WorkerStatus(model_names=["m"])

    async def live(url: str, secret: str, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await stay_registered(url, "http://127.0.0.1:1", secret, lambda: status, 0.05)

    with running(build_app(ControllerSettings(host="127.0.0.1", expiry_seconds=0.5))) as url:
        asyncio.run(live(url, "wrong" * 8, 0.3))
        assert httpx.post(f"{url}/list_models").json() == {"models": []}
        assert "refuses this worker: 403" in caplog.text
        asyncio.run(live(url, SECRET, 1.0))  # longer than a worker without heartbeats would be known
        assert httpx.post(f"{url}/list_models").json() == {"models": ["m"]}
    asyncio.run(live(f"http://127.0.0.1:{free_port()}", SECRET, 0.2))
    assert "does not answer (ConnectError); trying again" in caplog.text
    assert SECRET not in caplog.text


def test_an_open_controller_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="need a secret"):
        build_app(ControllerSettings(host="0.0.0.0"))
    build_app(ControllerSettings(host="0.0.0.0", allow_unauthenticated=True))
    assert "--allow-unauthenticated" in caplog.text
    with pytest.raises(ValueError, match=r"10\.0\.3\.0/99"):
        ControllerSettings(worker_networks=["10.0.3.0/99"])


PATHS = ["register_worker", "receive_heart_beat", "get_worker_address", "worker_generate_stream", "refresh_all_workers"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from(["worker_name", "check_heart_beat", "worker_status", "queue_length", "model", "multimodal"])


@given(
    st.sampled_from(PATHS), st.dictionaries(fields, json_values) | json_values, st.booleans(), st.binary(max_size=40)
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_gives_a_traceback(address: str, path: str, asked: object, is_json: bool, raw: bytes) -> None:
    body = json.dumps(asked).encode() if is_json else raw
    kind = {"content-type": "application/json"}
    answer = httpx.post(f"{address}/{path}", content=body, headers=kind, timeout=10)
    assert answer.status_code in (200, 400, 422) and "Traceback" not in answer.text


def test_too_large_a_body_and_head_are_refused(address: str) -> None:
    big = {"worker_name": "x" * 200_000, "queue_length": 0}
    assert httpx.post(f"{address}/receive_heart_beat", json=big).status_code == 413
    parts = (b"x" * 10_000 for _ in range(11))  # its length is not announced
    kind = {"content-type": "application/json"}
    assert httpx.post(f"{address}/receive_heart_beat", content=parts, headers=kind).status_code == 413
    with suppress(httpx.NetworkError):  # refused while it was still being sent
        assert httpx.post(f"{address}/list_models", headers={"X": "x" * 2_000_000}).status_code == 400
    assert httpx.post(f"{address}/list_models").status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "BODY_SECONDS", 0.2)
    kind = "Content-Type: application/json\r\nContent-Length: 9"
    head = f"POST /receive_heart_beat HTTP/1.1\r\nHost: localhost\r\n{kind}\r\n\r\n{{"
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=5) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
