"""What the guard turns away, with which status; a real server on the loopback answers, and slots are freed at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from servers import running
from starlette.types import Receive, Scope, Send

from llava.serve.engine import KINDS, Refusal
from llava.serve.guard import Gate, Guard, RateLimiter, RequestLimits, address_identity, check_head, refusal_response
from llava.serve.keys import KeyRing, NewKey, create_key

App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def read(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def answer(send: Send, body: bytes, more: bool = False) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send, str(len(await read(receive))).encode())


async def asked(
    app: App, *chunks: bytes, path: str = "/v1/detect", client: str = "192.0.2.9", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Ask an application as a server does, and give status, headers and body."""
    messages = [{"type": "http.request", "body": c, "more_body": True} for c in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    sent: list[Any] = []

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(60)
        raise AssertionError("waited for a client that does not hang up")

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": raw,
        "client": (client, 1),
    }
    await app(scope, receive, send)
    body = b"".join(m.get("body", b"") for m in sent[1:])
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}, body


def ask(app: App, *chunks: bytes, **options: Any) -> tuple[int, dict[str, str], bytes]:
    return asyncio.run(asked(app, *chunks, **options))


def message_of(body: bytes) -> str:
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"] and "/" not in error["message"]
    return error["message"]


@pytest.fixture
def keys(tmp_path: Path) -> tuple[KeyRing, str, str]:
    file = str(tmp_path / "keys.json")
    slow, fast = (
        create_key(NewKey(file=file, name=name, requests_per_minute=rate)).splitlines()[0]
        for name, rate in (("slow", 2), ("fast", None))
    )
    return KeyRing(file), slow, fast


def test_a_request_goes_through_whole() -> None:
    status, _, body = ask(Guard(echo), b"abc", b"de")
    assert (status, body) == (200, b"5")


def test_a_key_is_asked_for(keys: tuple[KeyRing, str, str]) -> None:
    guard = Guard(echo, keys[0])
    for headers in (
        {},
        {"authorization": "Bearer x"},
        {"authorization": keys[1]},
        {"authorization": f"Basic {keys[1]}"},
    ):
        status, replied, body = ask(guard, **headers)
        assert status == 401 and replied["www-authenticate"] == "Bearer" and "API key" in message_of(body)
    for word in ("Bearer", "bearer"):
        assert ask(guard, authorization=f"{word} {keys[1]}")[0] == 200


def test_rates_are_counted_by_key_and_by_address(keys: tuple[KeyRing, str, str]) -> None:
    ring, slow, fast = keys
    guard = Guard(echo, ring, RequestLimits(requests_per_minute=3))
    assert [ask(guard, authorization=f"Bearer {slow}")[0] for _ in range(3)] == [200, 200, 429]
    status, headers, body = ask(guard, authorization=f"Bearer {slow}", client="192.0.2.10")
    assert status == 429 and 50 <= int(headers["retry-after"]) <= 60 and "2 requests in a minute" in message_of(body)
    assert [ask(guard, authorization="Bearer no")[0] for _ in range(5)] == [401, 401, 401, 429, 429]
    assert ask(guard, authorization="Bearer no", client="192.0.2.11")[0] == 401
    assert [ask(guard, authorization=f"Bearer {fast}")[0] for _ in range(4)] == [200, 200, 200, 429]  # not the address


def test_without_keys_the_address_counts() -> None:
    guard = Guard(echo, None, RequestLimits(requests_per_minute=1))
    clients = ("192.0.2.1", "192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::ffff", "2001:db8:0:1::1")
    assert [ask(guard, client=client)[0] for client in clients] == [200, 429, 200, 200, 429, 200]


@pytest.mark.parametrize(
    ("proxies", "wanted"),
    [((), [200, 429, 429]), (["127.0.0.0/8"], [200, 200, 429]), (["192.0.2.0/24"], [200, 429, 429])],
)
def test_behind_a_proxy_that_is_trusted_its_clients_are_counted(proxies: list[str], wanted: list[int]) -> None:
    app = FastAPI()
    app.add_middleware(Guard, limits=RequestLimits(requests_per_minute=1))

    @app.get("/health")
    async def health() -> None:
        """Answer nothing."""

    with running(app, proxies) as url:
        clients = ("192.0.2.1", "192.0.2.2", "192.0.2.2")
        found = [httpx.get(f"{url}/health", headers={"X-Forwarded-For": client}).status_code for client in clients]
    assert found == wanted


def test_an_ipv6_customer_is_one_address() -> None:
    assert address_identity("2001:db8::1") == address_identity("2001:db8::2") != address_identity("2001:db8:0:1::1")
    assert address_identity("::ffff:192.0.2.1") == address_identity("192.0.2.1")
    assert address_identity("testclient") == "address testclient"


def test_the_window_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    rates = RateLimiter()
    for at, is_taken in ((0, True), (40, True), (59, False), (61, True), (62, False), (99, False), (101, True)):
        now[0] = 1000.0 + at
        if is_taken:
            rates.hit("a", 2)
        else:
            with pytest.raises(Refusal) as caught:
                rates.hit("a", 2)
            oldest = 0 if at < 60 else 40
            assert caught.value.status == 429 and caught.value.retry_after == pytest.approx(oldest + 60 - at, abs=1.01)


def test_many_addresses_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llava.serve.guard.MAX_IDLE", 50)
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    rates = RateLimiter()
    for number in range(400):
        now[0] += 1.0
        rates.hit(f"address {number}", 5)
        if number % 100 == 99:
            time.sleep(0.03)  # the library sweeps in a thread of its own
    assert len(rates._storage.events) < 250


@pytest.mark.parametrize("sizes", [(11,), (5, 6), (1,) * 11])
def test_a_body_that_is_too_long_is_refused_while_it_comes(sizes: tuple[int, ...]) -> None:
    guard = Guard(echo, None, RequestLimits(max_body_bytes=10))
    for path in ("/v1/detect", "/page"):
        status, _, body = ask(guard, *(bytes(size) for size in sizes), path=path)
        assert status == 413 and "larger than 10 bytes" in message_of(body)
    assert ask(guard, bytes(10))[0] == 200
    assert ask(guard, content_length="11")[0] == ask(guard, content_length="9" * 5000)[0] == 413
    assert ask(guard, content_length="-1")[0] == ask(guard, content_length="x")[0] == 200  # the server refuses those


def test_an_announced_body_is_refused_before_it_is_read() -> None:
    async def run() -> int:
        async def receive() -> Any:
            raise AssertionError("the body was read")

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "path": "/", "query_string": b"", "headers": [(b"content-length", b"99999999999")]}
        await Guard(echo)(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(run()) == 413


def test_heads_have_a_size() -> None:
    limits = RequestLimits(max_header_bytes=100, max_headers=3)
    check_head([(b"a", b"b" * 90)], b"/", limits)
    for headers, target, status in (
        ([(b"a", b"b" * 100)], b"/", 431),
        ([(b"a", b"b")] * 4, b"/", 431),
        ([(b"a", b"b" * 60)], b"/" * 60, 431),
        ([], b"/" * 101, 414),
    ):
        with pytest.raises(Refusal) as caught:
            check_head(headers, target, limits)
        assert caught.value.status == status
    assert ask(Guard(echo, None, limits), x="y" * 200)[0] == 431


def test_only_what_is_guarded_needs_a_key(keys: tuple[KeyRing, str, str]) -> None:
    guard = Guard(echo, keys[0], RequestLimits(max_body_bytes=10), lambda path: path not in ("/health",))
    assert ask(guard, path="/health")[0] == 200
    for path in ("/v1/detect", "/health/", "/health/../v1/detect", "//health", "", "/HEALTH"):
        assert ask(guard, path=path)[0] == 401


def test_what_goes_wrong_inside_is_told_without_details(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("secret of /srv/models")

    for is_guarded in (True, False):
        status, _, body = ask(Guard(broken, is_guarded=lambda path, g=is_guarded: g))
        assert status == 500 and b"secret" not in body and "went wrong" in message_of(body)
    assert "secret of /srv/models" in caplog.text

    async def refusing(scope: Scope, receive: Receive, send: Send) -> None:
        raise Refusal(415, "face.txt: not an image.")

    assert ask(Guard(refusing))[0] == 415


def test_an_answer_that_breaks_in_the_middle_is_cut_off() -> None:
    async def half(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, b"half", more=True)
        raise RuntimeError("broken")

    with pytest.raises(ConnectionAbortedError):
        ask(Guard(half))


def test_a_few_work_a_few_wait_and_the_others_come_back_later() -> None:
    at_work, most = 0, 0

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await asyncio.sleep(0.05)
        at_work -= 1
        await answer(send, b"done")

    async def run(count: int, **limits: Any) -> list[tuple[int, dict[str, str], bytes]]:
        guard = Guard(slow, None, RequestLimits(max_active=2, requests_per_minute=1000, **limits))
        return await asyncio.gather(*(asked(guard) for _ in range(count)))

    replies = asyncio.run(run(10, max_waiting=3))
    assert sorted(status for status, _, _ in replies) == [200] * 5 + [503] * 5 and most == 2
    refusal = next(r for r in replies if r[0] == 503)
    assert int(refusal[1]["retry-after"]) >= 1 and "busy" in message_of(refusal[2])
    waited = asyncio.run(run(6, max_waiting=9, wait_seconds=0.07))
    assert sorted(status for status, _, _ in waited) == [200] * 4 + [503] * 2
    assert [status for status, _, _ in asyncio.run(run(3, max_waiting=0))] == [200, 200, 503]


def test_places_and_turns_come_back_whatever_happens() -> None:
    async def run() -> None:
        gate = Gate(RequestLimits(max_active=1, max_waiting=0))
        for error in (ValueError, asyncio.CancelledError):
            with contextlib.suppress(error):
                async with gate.admitted(), gate.turn():
                    raise error
        async with gate.admitted(), gate.turn():
            with pytest.raises(Refusal):
                async with gate.admitted():
                    raise AssertionError("admitted one too many")

    asyncio.run(run())


def test_work_and_sending_have_a_time_limit() -> None:
    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)

    async def own_timeout(scope: Scope, receive: Receive, send: Send) -> None:
        raise TimeoutError("some other clock")

    limits = RequestLimits(work_seconds=0.05, body_seconds=0.05)
    status, headers, body = ask(Guard(endless, None, limits))
    assert status == 503 and headers["retry-after"] and "took too long" in message_of(body)
    assert ask(Guard(own_timeout, None, limits))[0] == 500

    async def drip() -> int:
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        await Guard(echo, None, limits)(
            {"type": "http", "path": "/", "query_string": b"", "headers": []}, receive, send
        )
        return sent[0]["status"]

    assert asyncio.run(drip()) == 408


@pytest.mark.parametrize("field", [f for f in RequestLimits.__dataclass_fields__ if f != "max_waiting"])
def test_limits_that_let_nothing_in_are_an_error(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        RequestLimits(**{field: 0})


def test_every_status_has_a_kind() -> None:
    for status in KINDS:
        assert Refusal(status, "x").content["error"]["type"]
    assert Refusal(503, "x", 0.2).headers == {"Retry-After": "1"} and Refusal(400, "x").headers == {}


@contextlib.contextmanager
def served(app: App) -> Iterator[int]:
    """Run an application in a real server on the loopback."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()


def test_a_client_that_hangs_up_frees_its_slot_at_once() -> None:
    seen: list[str] = []

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/long":
            seen.append("begun")
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                seen.append("stopped")
                raise
        await answer(send, b"done")
        await asyncio.sleep(0.05)
        seen.append("after the answer")

    def sent(port: int, path: str) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
        time.sleep(0.1)
        return client

    with served(Guard(work, None, RequestLimits(max_active=1, max_waiting=1, wait_seconds=5))) as port:
        working, waiting = sent(port, "/long"), sent(port, "/long")
        assert seen == ["begun"]
        assert httpx.get(f"http://127.0.0.1:{port}/short", trust_env=False).status_code == 503
        waiting.close()
        time.sleep(0.1)
        with sent(port, "/short") as last:  # takes the place of the one that waited
            assert seen == ["begun"]
            working.close()
            start = time.perf_counter()
            assert last.recv(99).startswith(b"HTTP/1.1 200 ") and time.perf_counter() - start < 2
            time.sleep(0.2)
    assert seen == ["begun", "stopped", "after the answer"]


def test_fastapi_behind_the_guard_reads_streams_and_refuses() -> None:
    api, closed = FastAPI(), []

    @api.post("/json")
    async def count(request: Request) -> int:
        return len(await request.json())

    @api.post("/refuse")
    def refuse() -> None:
        raise Refusal(415, "face.txt: not an image.")

    @api.get("/stream")
    def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            try:
                for number in range(1000):
                    yield f"{number} "
                    await asyncio.sleep(0.01)
            finally:
                closed.append(True)

        return StreamingResponse(pieces())

    api.add_exception_handler(Refusal, refusal_response)
    with (
        served(Guard(api, None, RequestLimits(max_active=1, max_waiting=1))) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
    ):
        assert client.post("/json", json=list(range(30_000))).json() == 30_000
        refusal = client.post("/refuse")
        assert refusal.status_code == 415 and refusal.json()["error"]["message"] == "face.txt: not an image."
        with client.stream("GET", "/stream") as reply:
            assert next(reply.iter_text()).startswith("0 ") and not closed
        deadline = time.monotonic() + 2
        while not closed and time.monotonic() < deadline:
            time.sleep(0.01)
        assert closed and client.post("/json", json=[1]).json() == 1  # the only slot is free again


def test_a_real_server_refuses_floods_and_goes_on(keys: tuple[KeyRing, str, str]) -> None:
    limits = RequestLimits(max_body_bytes=10_000, requests_per_minute=1000)
    with served(Guard(echo, keys[0], limits)) as port:
        url = f"http://127.0.0.1:{port}/v1/detect"
        known = {"Authorization": f"Bearer {keys[2]}"}
        with httpx.Client(trust_env=False) as client:
            assert client.post(url, headers=known, content=b"x" * 10_000).text == "10000"
            assert client.post(url, headers=known, content=b"x" * 10_001).status_code == 413
            assert client.post(url, headers=known, content=iter([b"x" * 6000] * 2)).status_code == 413  # chunked
            assert client.post(url, headers={f"x-{n}": "y" for n in range(150)} | known).status_code == 431
            assert client.get(f"{url}?{'q' * 20_000}").status_code == 414
            assert client.get(url).status_code == 401
            assert client.post(url, headers=known, content=b"ok").text == "2"
