"""The server opens public https addresses and nothing else; every packet of these tests stays on this machine."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import httpx
import numpy as np
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llava.serve.engine import Refusal
from llava.serve.fetch import (
    NOT_PUBLIC_V4,
    NOT_PUBLIC_V6,
    PUBLIC_V6,
    Fetcher,
    ServerFetchLimits,
    check_url,
    is_public,
    resolve,
)

HOST = "faces.example.org"
PUBLIC = "93.184.215.14"
NAMES = {
    HOST: [PUBLIC],
    "both.example.org": ["2606:2800:21f:cb07:6820:80da:af6b:8b2c", PUBLIC],
    "other.example.org": [PUBLIC],
    "inside.example.org": ["10.0.0.7"],
    "mixed.example.org": [PUBLIC, "127.0.0.1"],
    "mixed6.example.org": [PUBLIC, "::1"],
    "metadata.google.internal": ["169.254.169.254"],
    "localhost.localdomain": ["127.0.0.1"],
    "scoped.example.org": ["fe80::1%eth0"],
    "empty.example.org": [],
}


def png() -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


async def fake_resolver(host: str, port: int) -> Sequence[str]:
    if host not in NAMES:
        raise OSError(f"unknown host {host}")
    return NAMES[host]


class Untouched(httpx.AsyncBaseTransport):
    """A wire that must not be used."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        raise AssertionError(f"a connection to {request.url} was opened")


def refused(url: str, **options: object) -> Refusal:
    options = {"resolver": fake_resolver, "transport": Untouched()} | options
    with pytest.raises(Refusal) as caught:
        asyncio.run(Fetcher(**options).fetch(url))
    return caught.value


# Every spelling leads to this machine, its neighbours, or nowhere.
INSIDE = [
    *("https://127.0.0.1/", "https://127.1.2.3/", "https://0.0.0.0/", "https://10.1.2.3/", "https://172.16.0.1/"),
    *("https://172.31.255.255/", "https://192.168.1.1/", "https://169.254.169.254/latest/meta-data/"),
    *("https://100.64.0.1/", "https://100.100.100.200/", "https://192.0.0.192/", "https://168.63.129.16/"),
    *("https://198.18.0.1/", "https://192.0.2.1/", "https://192.88.99.1/", "https://224.0.0.1/", "https://240.0.0.1/"),
    *("https://255.255.255.255/", "https://[::1]/", "https://[::]/", "https://[fe80::1]/", "https://[fc00::1]/"),
    *("https://[fd00:ec2::254]/", "https://[fec0::1]/", "https://[ff02::1]/", "https://[2001:db8::1]/"),
    *("https://[::ffff:127.0.0.1]/", "https://[::ffff:a9fe:a9fe]/", "https://[::127.0.0.1]/"),
    *("https://[64:ff9b::7f00:1]/", "https://[64:ff9b:1::a00:1]/", "https://[2002:7f00:1::]/", "https://[100::1]/"),
    *("https://[2001:0:4136:e378:8000:63bf:80ff:fffe]/", "https://[3fff::1]/", "https://[5f00::1]/"),
    *("https://2130706433/", "https://0x7f000001/", "https://017700000001/", "https://0x7f.1/", "https://127.1/"),
    *(
        "https://0177.0.0.1/",
        "https://127.0.0.0x1/",
        "https://127.0.0.1./",
        "https://localhost/",
        "https://localhost./",
    ),
    *("https://faces.example.org./", "https://intranet/", "https://①②⑦.0.0.1/", "https://127。0。0。1/"),
    *("https://%31%32%37.0.0.1/", "https://[fe80::1%25eth0]/", "https://[::ffff:7f00:1%25lo]/"),
    *(f"https://{name}/face.png" for name in NAMES if NAMES[name] == [] or NAMES[name][-1] != PUBLIC),
    "https://unknown.example.org/",
]


@pytest.mark.parametrize("url", INSIDE)
def test_what_is_not_public_is_not_asked(url: str) -> None:
    error = refused(url)
    assert error.status == 400
    assert "public internet" in str(error) or "not an address" in str(error)


def test_an_unknown_host_and_an_inner_one_cannot_be_told_apart() -> None:
    first, second = (str(refused(f"https://{name}.example.org/x")) for name in ("unknown", "inside"))
    assert first.replace("unknown", "") == second.replace("inside", "") and "10.0.0.7" not in second


@pytest.mark.parametrize(
    "host", ["134744072", "0x08080808", "8.8.2056", "010.8.8.8", f"{HOST}.", "intranet", "8.8.8.8."]
)
def test_odd_spellings_are_refused_wherever_they_lead(host: str) -> None:
    async def anywhere(host: str, port: int) -> Sequence[str]:
        return [PUBLIC]

    assert refused(f"https://{host}/a.png", resolver=anywhere).status == 400


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"http://{HOST}/a.png", "only https://"),
        ("file:///etc/passwd", "only https://"),
        (f"ftp://{HOST}/a.png", "only https://"),
        ("gopher://127.0.0.1:6379/_x", "only https://"),
        ("//faces.example.org/a.png", "only https://"),
        ("a.png", "only https://"),
        ("", "only https://"),
        (f"https://{HOST}@127.0.0.1/", "user name or password"),
        (f"https://user:secret@{HOST}/", "user name or password"),
        (f"https://{HOST}:22/", "port 22 is not opened; allowed: 443"),
        (f"https://{HOST}:0/", "port 0 is not opened|not an address"),
        (f"https://{HOST}:8443/", "port 8443"),
        (f"https://{HOST}:99999/", "port 99999|not an address"),
        (f"https://127.0.0.1\\@{HOST}/", "not an address"),
        (f"https://{HOST}/a\r\nX-Injected: 1", "not an address"),
        (f"https://{HOST}\t.evil.org/", "not an address"),
        ("https://[::1", "not an address"),
        ("https://", "public internet"),
        ("https://a..b.org/", "public internet"),
        ("https://" + "a" * 64 + ".org/", "public internet"),
        (f"https://{HOST}/" + "a" * 3000, "2048 characters"),
    ],
)
def test_what_is_not_a_plain_https_address_is_refused(url: str, words: str) -> None:
    error = refused(url)
    assert error.status == 400 and re.search(words, str(error)) and "secret" not in str(error)


@given(st.one_of(st.ip_addresses(), *(st.ip_addresses(network=str(n)) for n in (*NOT_PUBLIC_V4, *NOT_PUBLIC_V6))))
def test_what_python_calls_not_global_is_never_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    assert not is_public(str(address)) or (address.is_global and not address.is_multicast)
    assert not any(address in n for n in (*NOT_PUBLIC_V4, *NOT_PUBLIC_V6) if n.version == address.version) or not (
        is_public(str(address))
    )


@given(st.ip_addresses(v=4))
def test_an_address_inside_another_is_never_public(address: ipaddress.IPv4Address) -> None:
    for prefix in ("::ffff:0:0", "::", "64:ff9b::"):
        assert not is_public(str(ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) + int(address))))
    assert not is_public(str(ipaddress.IPv6Address((0x2002 << 112) + (int(address) << 80))))
    assert not is_public(str(ipaddress.IPv6Address((0x20010000 << 96) + (0xFFFFFFFF ^ int(address)))))


def test_ordinary_addresses_are_public() -> None:
    assert all(map(is_public, ("8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1")))
    assert ipaddress.ip_address("2606:4700::1111") in PUBLIC_V6
    assert not any(map(is_public, ("", "localhost", "8.8.8", "8.8.8.8 ", "08.8.8.8", "2606:4700::1111%eth0")))


@given(st.text(max_size=60))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    for url in (text, f"https://{text}", f"https://{HOST}/{text}", f"https://{HOST}:{text}"):
        try:
            assert check_url(url).scheme == "https"
        except Refusal as error:
            assert error.status == 400


class Site(BaseHTTPRequestHandler):
    """A site with a good picture and several kinds of trouble; it notes what it was asked."""

    protocol_version = "HTTP/1.1"
    asked: list[tuple[str, str]] = []  # noqa: RUF012 (reset by the fixture)
    targets = {  # noqa: RUF012
        "/to-good": "/good",
        "/to-name": "https://other.example.org/good",
        "/to-inside": "https://inside.example.org/secret",
        "/to-loopback": "https://127.0.0.1/secret",
        "/to-http": f"http://{HOST}/good",
        "/to-file": "file:///etc/passwd",
        "/to-port": f"https://{HOST}:6379/",
        "/to-self": "/to-self",
        "/to-nowhere": "https://[::",
    }

    def do_GET(self) -> None:
        Site.asked.append((self.headers["Host"], self.path))
        body = {"/good": png(), "/page": b"<html>hello</html>" * 100, "/large": png() * 20, "/tiny": b"hi"}.get(
            self.path, b""
        )
        status = 302 if self.path in self.targets else 404 if self.path.startswith("/gone") else 200
        self.send_response(status)
        if status == 302:
            self.send_header("Location", self.targets[self.path])
        self.send_header("Content-Type", "image/png")
        self.send_header("Set-Cookie", "track=1")
        if self.path == "/zipped":
            self.send_header("Content-Encoding", "gzip")
            body = b"\x1f\x8b\x08" + bytes(300)
        if self.path in ("/endless", "/slow"):
            self.end_headers()
            self._drip()
            return
        self.send_header("Content-Length", str(len(body) + (1000 if self.path == "/short" else 0)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def _drip(self) -> None:
        self.close_connection = True
        try:
            self.wfile.write(png()[:200])
            for _ in range(200):
                self.wfile.write(bytes(50 if self.path == "/slow" else 1000))
                time.sleep(0.02 if self.path == "/slow" else 0)
        except OSError:
            return

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Loopback(httpx.AsyncBaseTransport):
    """Takes every connection to the server of this test, wherever it was to go; name and certificate are checked."""

    def __init__(self, port: int, authority: trustme.CA) -> None:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        self.port, self.hosts = port, []
        self.dead: set[str] = set()
        self.inner = httpx.AsyncHTTPTransport(verify=context, trust_env=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.hosts.append(request.url.host)
        if request.url.host in self.dead:
            raise httpx.ConnectError("unreachable")
        assert is_public(request.url.host) and "cookie" not in request.headers
        request.url = request.url.copy_with(host="127.0.0.1", port=self.port)
        return await self.inner.handle_async_request(request)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def port(authority: trustme.CA) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(HOST, "other.example.org").configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def wire(port: int, authority: trustme.CA) -> Loopback:
    Site.asked.clear()
    return Loopback(port, authority)


def fetched(wire: Loopback, url: str, limits: ServerFetchLimits | None = None) -> bytes:
    async def run() -> bytes:
        fetcher = Fetcher(limits, fake_resolver, wire)
        try:
            return await fetcher.fetch(url)
        finally:
            await fetcher.aclose()

    return asyncio.run(run())


def test_a_picture_is_fetched_from_the_address_that_was_checked(wire: Loopback) -> None:
    assert fetched(wire, f"https://{HOST}/good") == png()
    assert wire.hosts == [PUBLIC] and Site.asked == [(HOST, "/good")]


def test_a_second_answer_of_the_name_server_changes_nothing(wire: Loopback) -> None:
    answers = iter([[PUBLIC], ["127.0.0.1"]])

    async def rebinding(host: str, port: int) -> Sequence[str]:
        return next(answers)

    assert asyncio.run(Fetcher(None, rebinding, wire).fetch(f"https://{HOST}/good")) == png()
    assert wire.hosts == [PUBLIC] and next(answers) == ["127.0.0.1"]


def test_the_next_address_is_tried_when_one_does_not_answer(wire: Loopback) -> None:
    NAMES["other.example.org"], old = NAMES["both.example.org"], NAMES["other.example.org"]
    wire.dead.add(NAMES["both.example.org"][0])
    try:
        assert fetched(wire, "https://other.example.org/good") == png()
    finally:
        NAMES["other.example.org"] = old
    assert wire.hosts == NAMES["both.example.org"]


def test_the_certificate_has_to_be_that_of_the_name(wire: Loopback) -> None:
    with pytest.raises(Refusal, match="cannot be downloaded over https"):
        fetched(wire, "https://both.example.org/good")
    assert Site.asked == []


def test_the_system_s_connection_trusts_no_stranger_and_uses_no_proxy(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def here(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    Site.asked.clear()
    monkeypatch.setattr("llava.serve.fetch.is_public", lambda address: address == "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        with pytest.raises(Refusal, match="cannot be downloaded over https"):
            asyncio.run(Fetcher(resolver=here, ports=(port,)).fetch(f"https://{HOST}:{port}/good"))
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()
    assert Site.asked == []


def test_redirects_to_public_addresses_are_followed(wire: Loopback) -> None:
    assert fetched(wire, f"https://{HOST}/to-good") == fetched(wire, f"https://{HOST}/to-name") == png()
    assert Site.asked[-2:] == [(HOST, "/to-name"), ("other.example.org", "/good")]


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/to-inside", 400, "inside.example.org/secret: does not lead to a host on the public internet"),
        ("/to-loopback", 400, "public internet"),
        ("/to-http", 400, "only https"),
        ("/to-file", 400, "only https"),
        ("/to-port", 400, "port 6379"),
        ("/to-self", 400, "redirected more than 3 times"),
        ("/to-nowhere", 400, "not an address"),
        ("/gone", 400, "answers with status 404"),
        ("/short", 400, "cannot be downloaded"),
        ("/slow", 400, "took longer than 0.5 s"),
        ("/page", 415, "not an image or video"),
        ("/tiny", 415, "not an image or video"),
        ("/zipped", 415, "not an image or video"),
        ("/large", 413, "larger than 20,000 bytes"),
        ("/endless", 413, "larger than 20,000 bytes"),
    ],
)
def test_a_download_that_goes_wrong_says_why(wire: Loopback, path: str, status: int, words: str) -> None:
    limits = ServerFetchLimits(max_bytes=20_000, seconds=0.5)
    with pytest.raises(Refusal) as caught:
        fetched(wire, f"https://{HOST}{path}", limits)
    assert caught.value.status == status and words in str(caught.value)
    assert all(asked != "/secret" for _, asked in Site.asked)


def test_a_message_shows_no_query(wire: Loopback) -> None:
    with pytest.raises(Refusal, match=r"/gone: the host answers") as caught:
        fetched(wire, f"https://{HOST}/gone?token=secret")
    assert "secret" not in str(caught.value)


def test_a_slow_name_server_counts_as_time() -> None:
    async def slow(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(5)
        return [PUBLIC]

    start = time.perf_counter()
    error = refused(f"https://{HOST}/", limits=ServerFetchLimits(seconds=0.1), resolver=slow)
    assert "took longer than 0.1 s" in str(error) and time.perf_counter() - start < 2


def test_the_system_s_resolver_gives_plain_addresses() -> None:
    assert asyncio.run(resolve("127.0.0.1", 443)) == ["127.0.0.1"]  # numbers ask no name server
    assert asyncio.run(resolve("::1", 443)) == ["::1"]


def test_silent_name_servers_leave_the_threads_of_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **options: gate.wait(20) and [])

    async def run() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        lookups = [asyncio.create_task(resolve(HOST, 443)) for _ in range(4)]
        await asyncio.sleep(0.05)
        try:
            async with asyncio.timeout(5):
                await asyncio.to_thread(int)
        finally:
            gate.set()
        assert await asyncio.gather(*lookups) == [[]] * 4

    asyncio.run(run())
