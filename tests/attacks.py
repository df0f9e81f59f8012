"""What a stranger may try on a server, by name: each gives the statuses that it was answered with."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import httpx
from servers import running
from test_serve_api import messages, png
from test_serve_fetch import HOST
from test_serve_uploads import BOMBS, png_of
from tiny_world import draw

from llava.serve.controller import ControllerSettings
from llava.serve.controller import build_app as build_controller
from llava.serve.keys import NewKey, OldKey, create_key, revoke_key

CHAT, DETECT = "/v1/chat/completions", "/v1/detect"
JSON = "Content-Type: application/json"
LEAKS = ("Traceback", 'File "', "site-packages", "/llava/", "TIFFReadDirectory", "root:x")
CLOSED = 0


@dataclass
class Server:
    """The attacked server. late: what the slow attacks, begun with it, will have come to."""

    address: str
    key: str
    keys: str
    log: Path
    pid: int
    client: httpx.Client
    late: dict[str, Future[list[int]]] = field(default_factory=dict)

    def post(self, path: str = CHAT, headers: dict[str, str] | None = None, **given: Any) -> int:
        known = {"Authorization": f"Bearer {self.key}"}
        return checked(self.client.post(path, headers=known | (headers or {}), **given))

    def chat(self, **changes: Any) -> int:
        return self.post(json={"model": "explainer", "messages": messages(draw(1, 3)), **changes})

    def look_at(self, url: str) -> int:
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Why?"}]
        return self.chat(messages=[{"role": "user", "content": parts}])

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", int(self.address.rpartition(":")[2])), timeout=120)

    def raw(self, *parts: bytes, pause: float = 0.0) -> int:
        """Send bytes as they are, with pauses; gives the status, CLOSED when the connection ends without one."""
        heard = b""
        with self.connect() as connection:
            try:
                for part in parts:
                    connection.sendall(part)
                    time.sleep(pause)
                while b"\r\n\r\n" not in heard and (more := connection.recv(65536)):
                    heard += more
            except (ConnectionResetError, BrokenPipeError):
                pass
        assert not any(leak.encode() in heard for leak in LEAKS), heard
        return int(heard.split()[1]) if heard else CLOSED

    def head(self, *lines: str, path: str = CHAT) -> bytes:
        known = f"Authorization: Bearer {self.key}"
        return "\r\n".join([f"POST {path} HTTP/1.1", "Host: h", known, JSON, *lines, "", ""]).encode()


Attack: TypeAlias = Callable[[Server], list[int]]


def checked(reply: Any) -> int:
    """Give the status of a reply that tells nothing of the inside and, where it refuses, is a sentence."""
    assert not any(leak in reply.text for leak in LEAKS), reply.text
    if reply.status_code >= 400:
        assert reply.json()["error"]["message"], reply.text
    return reply.status_code


def made_key(keys: str, name: str) -> str:
    return next(word for word in create_key(NewKey(name=name, file=keys)).split() if len(word) > 40)


def looks(*urls: str) -> Attack:
    return lambda server: [server.look_at(url) for url in urls]


def bombs(*kinds: str) -> Attack:
    """Send the bombs of some kinds that have to be refused, as files and as data URIs."""
    contents = [content for name, (content, status) in BOMBS.items() if name.startswith(kinds) and status]

    def attack(server: Server) -> list[int]:
        uris = [f"data:image/png;base64,{base64.b64encode(content).decode()}" for content in contents]
        sent = [server.post(DETECT, files=[("files", ("b.png", content))]) for content in contents]
        return sent + [server.look_at(uri) for uri in uris]

    return attack


def at_once(count: int, attack: Callable[[], int]) -> list[int]:
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda _: attack(), range(count)))


def huge(count: int) -> list[tuple[str, tuple[str, bytes]]]:
    content = png_of(5000, 5000, rows=bytes(15_001 * 5000))
    return [("files", ("huge.png", content))] * count


def names(server: Server) -> list[int]:
    """Upload under names of other files; the name is shown without its folders."""
    given = ["../../../etc/passwd", "/etc/passwd", "..\\..\\boot.ini", "a\0b"]
    known = {"Authorization": f"Bearer {server.key}"}
    replies = [server.client.post(DETECT, files=[("files", (name, png(draw(0, 1))))], headers=known) for name in given]
    shown = [reply.json()["verdicts"][0]["image"] for reply in replies]
    assert shown[:3] == ["passwd", "passwd", "boot.ini"] and "/" not in shown[3]
    return [checked(reply) for reply in replies]


def paths(server: Server) -> list[int]:
    places = ("/../../etc/passwd", "/docs/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc%2fpasswd")
    lines = f"Host: h\r\nAuthorization: Bearer {server.key}\r\nConnection: close\r\n\r\n"
    return [server.raw(f"GET {place} HTTP/1.1\r\n{lines}".encode()) for place in places]


def wrong_keys(server: Server) -> list[int]:
    gone = made_key(server.keys, "gone")
    assert server.post(headers={"Authorization": f"Bearer {gone}"}, json={}) == 400  # it is valid
    revoke_key(OldKey(name="gone", file=server.keys))
    shown = ["", "Bearer", "Bearer wrong", f"Basic {server.key}", f"Bearer {server.key[:-1]}", f"Bearer {gone}"]
    places = (CHAT, DETECT, "/v1/explain", "/nothing")
    return [server.post(place, headers={"Authorization": one}, json={}) for one in shown for place in places]


def forged_workers(server: Server) -> list[int]:
    """Register workers that lead elsewhere, through a proxy, from a web page; nothing is registered."""
    status = {"model_names": ["forged"], "speed": 1, "queue_length": 0}
    leads = ["http://169.254.169.254:80", "http://10.0.0.7:21002", "file:///etc/passwd", "http://[::ffff:a9fe:a9fe]:80"]
    given: list[tuple[str, dict[str, str]]] = [(lead, {}) for lead in leads]
    given += [("http://127.0.0.1:1", {"X-Forwarded-For": "8.8.8.8"}), ("http://127.0.0.1:1", {"Host": "evil.example"})]
    with running(build_controller(ControllerSettings(host="127.0.0.1"))) as url:
        place, asked = f"{url}/register_worker", {"worker_status": status}
        replies = [httpx.post(place, json=asked | {"worker_name": lead}, headers=more) for lead, more in given]
        replies.append(httpx.post(place, content=b"{}", headers={"Content-Type": "text/plain"}))
        assert httpx.post(f"{url}/list_models").json() == {"models": []}
    assert not any(leak in reply.text for reply in replies for leak in LEAKS)
    return [reply.status_code for reply in replies] + [server.post("/register_worker", json=asked)]


def many_connections(server: Server) -> list[int]:
    """Open 200 connections that say nothing, and ask beside them."""
    idle = [server.connect() for _ in range(200)]
    found = [server.chat()]
    for connection in idle:
        connection.close()
    return found


def texts(*bodies: str | bytes) -> Attack:
    kind = {"Content-Type": "application/json"}
    return lambda server: [server.post(content=body, headers=kind) for body in bodies]


def asking(field_text: str) -> str:
    """Give a sound request with one more field, as JSON text."""
    body = json.dumps({"model": "explainer", "messages": messages(draw(1, 3))})
    return body[:-1] + f", {field_text}}}"


def halves(server: Server) -> list[int]:
    """Send a lone surrogate as JSON can write it, in the question and as the model, and a form that is not UTF-8."""
    sound = json.dumps({"model": "explainer", "messages": messages(draw(1, 3), "Why?")})
    kind = {"Content-Type": "application/json"}
    sent = [server.post(content=sound.replace(word, '"\\ud800"'), headers=kind) for word in ('"Why?"', '"explainer"')]
    return [*sent, server.post("/v1/explain", data={"question": b"\xff\xfe"}, files=huge(0))]


def wide(server: Server) -> list[int]:
    long = "x" * 9000
    bodies: Sequence[dict[str, Any]] = (
        {"messages": [{"role": "user", "content": long}]},
        {"messages": [{"role": "user", "content": "a"}] * 65},
        {"model": long},
        {"max_tokens": 10**6},
    )
    return [server.chat(**body) for body in bodies] + [
        server.post("/v1/explain", data={"question": long}, files=huge(1))
    ]


IPV6 = (
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:a9fe:a9fe]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "[fe80::1]",
)
SPELLINGS = ("2130706433", "0x7f.1", "0177.0.0.1", "127.1", "localhost.", "localhost", "intranet")
ATTACKS: dict[str, tuple[Attack, set[int]]] = {
    "image address: loopback": (looks("https://127.0.0.1/", "https://localhost/", "https://127.0.0.1:8000/"), {400}),
    "image address: cloud metadata, 169.254.x": (
        looks("https://169.254.169.254/latest", "http://169.254.169.254/", "https://metadata.google.internal/"),
        {400},
    ),
    "image address: private networks": (
        looks("https://10.0.0.1/", "https://192.168.1.1/", "https://100.64.0.1/"),
        {400},
    ),
    "image address: IPv6 forms": (looks(*(f"https://{host}/" for host in (*IPV6, "[fd00::1]"))), {400}),
    "image address: other spellings": (looks(*(f"https://{host}/" for host in SPELLINGS)), {400}),
    "image address: a name of a private address": (
        looks(*(f"https://{name}.example.org/" for name in ("inside", "mixed", "mixed6"))),
        {400},
    ),
    "image address: redirect to a private address": (
        looks(*(f"https://{HOST}/{to}" for to in ("to-inside", "to-loopback", "to-http", "to-file", "to-port"))),
        {400},
    ),
    "image address: file, ftp, gopher, http": (
        looks("file:///etc/passwd", f"ftp://{HOST}/a", "gopher://127.0.0.1:6379/_x", f"http://{HOST}/good"),
        {400},
    ),
    "image address: a file path": (looks("/etc/passwd", "../../etc/passwd", "C:\\boot.ini", ""), {400}),
    "a good public address, for comparison": (looks(f"https://{HOST}/good"), {200}),
    "file names with folders": (names, {200}),
    "paths out of the server's": (paths, {404}),
    "model names with folders": (
        lambda s: [s.chat(model=name) for name in ("../../etc/passwd", "/etc")],
        {404},
    ),
    "bombs: PNG": (bombs("png"), {400, 413}),
    "bombs: GIF": (bombs("gif"), {413}),
    "bombs: huge dimensions (TIFF, BMP)": (bombs("tiff", "bmp"), {413}),
    "bombs: 5 pictures of 25 million pixels in a request": (lambda s: [s.post(DETECT, files=huge(5))], {413}),
    "6 pictures of 25 million pixels at once": (
        lambda s: at_once(6, lambda: s.post(DETECT, files=huge(1))),
        {200},
    ),
    "compressed bodies and files": (
        lambda s: [
            s.post(
                content=gzip.compress(bytes(10**8)),
                headers={"Content-Encoding": "gzip", "Content-Type": "application/json"},
            ),
            s.post(DETECT, files=[("files", ("a.png", gzip.compress(bytes(10**7))))]),
        ],
        {400, 415},
    ),
    "JSON nested 100,000 deep": (texts("[" * 100_000, '{"a":' * 100_000, asking('"user": ' + "[" * 10_000)), {400}),
    "JSON with absurd numbers": (
        texts(asking('"seed": ' + "9" * 5000), asking('"temperature": NaN'), asking('"top_p": 1e999')),
        {400},
    ),
    "half characters in a question": (halves, {400}),
    "texts and numbers beyond their limits": (wide, {400}),
    "no key, a wrong, shortened or revoked one": (wrong_keys, {401}),
    "forged worker registration": (forged_workers, {400, 403, 404, 415}),
    "150 headers": (lambda s: [s.post(headers={f"x-{n}": "y" for n in range(150)}, json={})], {431}),
    "a header of 1 MB": (lambda s: [s.raw(s.head("X: " + "x" * 1_000_000))], {400, CLOSED}),
    "an address line of 20 KB": (lambda s: [s.post(f"{CHAT}?{'q' * 20_000}", json={})], {414}),
    "an announced body of 1 TB": (lambda s: [s.raw(s.head(f"Content-Length: {10**12}"))], {413}),
    "lengths that are none, or two": (
        lambda s: [
            s.raw(s.head("Content-Length: -1")),
            s.raw(s.head("Content-Length: 1", "Content-Length: 2")),
            s.raw(s.head("Content-Length: " + "9" * 5000)),
        ],
        {400},
    ),
    "a length and chunks": (
        lambda s: [s.raw(s.head("Content-Length: 5", "Transfer-Encoding: chunked"), b"0\r\n\r\n")],
        {400},
    ),
    "a chunked body without end": (
        lambda s: [s.raw(s.head("Transfer-Encoding: chunked"), *[b"100000\r\n" + bytes(1 << 20) + b"\r\n"] * 40)],
        {413, CLOSED},
    ),
    "another protocol (WebSocket)": (
        lambda s: [s.raw(b"GET /v1/models HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")],
        {401},
    ),
    "200 silent connections beside a question": (many_connections, {200}),
}
# They wait for the real limits of the server, while the others run.
SLOW: dict[str, tuple[Attack, set[int]]] = {
    "a body that does not come": (lambda s: [s.raw(s.head("Content-Length: 9"), b"{")], {408}),
    "a chunked body without end, slowly": (
        lambda s: [s.raw(s.head("Transfer-Encoding: chunked"), *[b"1\r\n{\r\n"] * 40, pause=1.0)],
        {408, CLOSED},
    ),
    "a head that does not come, or by a byte a second": (
        lambda s: [s.raw(b"GET /health HTTP/1.1\r\nHost"), s.raw(*[b"G"] * 40, pause=1.0), s.raw(b"")],
        {CLOSED},
    ),
}
