"""The guard in front of an ASGI application: head, key, rate, place, body and time are checked before it is asked."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from ipaddress import IPv6Address, ip_address, ip_network

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.core.config import setting
from llava.serve.engine import Refusal
from llava.serve.keys import KeyRing

log = logging.getLogger(__name__)

MAX_IDLE = 10_000


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """What requests may cost."""

    requests_per_minute: int = setting(60, "of one API key, and of one address without a key")
    max_body_bytes: int = setting(30_000_000, "largest request body, in bytes (base64 takes 4/3 of a file)")
    max_header_bytes: int = setting(16_384, "address line and headers together, in bytes")
    max_headers: int = setting(100, "headers of a request")
    body_seconds: float = setting(30.0, "longest time for a request body to arrive, in seconds")
    max_active: int = setting(8, "requests that are worked on together")
    max_waiting: int = setting(32, "requests that wait for those")
    wait_seconds: float = setting(30.0, "longest wait for a turn, in seconds")
    work_seconds: float = setting(300.0, "longest answer, in seconds")

    def __post_init__(self) -> None:
        """Raise ValueError for limits that let nothing in."""
        for field in fields(self):
            least = 0 if field.name == "max_waiting" else 1e-3
            if getattr(self, field.name) < least:
                raise ValueError(f"{field.name}: {getattr(self, field.name)} is not usable; allowed: more than 0.")


class RateLimiter:
    """Requests per minute of each key or address, in a moving window, in this process."""

    def __init__(self) -> None:
        self._storage = MemoryStorage()
        self._windows = MovingWindowRateLimiter(self._storage)

    def hit(self, identity: str, per_minute: int) -> None:
        """Count one request. Raises Refusal (429) with the seconds to wait when there were too many."""
        self._forget_idle()
        item = RateLimitItemPerMinute(per_minute)
        if not self._windows.hit(item, identity):
            wait = self._windows.get_window_stats(item, identity).reset_time - time.time()
            raise Refusal(429, f"More than {per_minute} requests in a minute; wait and ask again.", max(wait, 1.0))

    def _forget_idle(self) -> None:
        """Drop who has not asked for a minute: the library empties their lists, but keeps their names."""
        if len(self._storage.events) > MAX_IDLE:
            for name in [name for name, events in list(self._storage.events.items()) if not events]:
                self._storage.clear(name)


def address_identity(host: str) -> str:
    """Name who an address belongs to: an IPv4 address, or the /64 of an IPv6 one, which one customer holds."""
    try:
        address = ip_address(host)
    except ValueError:
        return f"address {host}"
    if isinstance(address, IPv6Address):
        return f"address {address.ipv4_mapped or ip_network((int(address), 64), strict=False)}"
    return f"address {address}"


def check_head(headers: Iterable[tuple[bytes, bytes]], target: bytes, limits: RequestLimits) -> None:
    """Raise Refusal where the address line is too long (414), or the headers are too many or too long (431)."""
    sizes = [len(name) + len(value) for name, value in headers]
    if len(target) > limits.max_header_bytes:
        raise Refusal(414, f"The address of the request is longer than {limits.max_header_bytes:,} bytes.")
    if len(sizes) > limits.max_headers or sum(sizes) + len(target) > limits.max_header_bytes:
        allowed = f"{limits.max_headers} headers and {limits.max_header_bytes:,} bytes"
        raise Refusal(431, f"The headers are more than is taken: {allowed} at most.")


def too_long(limits: RequestLimits) -> Refusal:
    """Give the refusal for a body that is too long."""
    return Refusal(413, f"The request is larger than {limits.max_body_bytes:,} bytes, the limit.")


class Gate:
    """Lets a few requests in at a time; a few more wait for a limited time, and the others are told to come back."""

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits
        self._turns = asyncio.Semaphore(limits.max_active)
        self._inside = 0

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Hold a place, active or waiting. Raises Refusal (503) when all are taken."""
        if self._inside >= self._limits.max_active + self._limits.max_waiting:
            raise self._busy()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn and hold it. Raises Refusal (503) when it does not come in time."""
        try:
            async with asyncio.timeout(self._limits.wait_seconds):
                await self._turns.acquire()
        except TimeoutError:
            raise self._busy() from None
        try:
            yield
        finally:
            self._turns.release()

    def _busy(self) -> Refusal:
        return Refusal(503, "The server is busy; ask again in a moment.", min(self._limits.wait_seconds, 10.0))


def refusal_response(request: Request | None, error: Exception) -> JSONResponse:
    """Give the JSON reply of a refusal; fits `app.add_exception_handler(Refused, refusal_response)`."""
    assert isinstance(error, Refusal)
    return JSONResponse(error.content, error.status, headers=error.headers)


class Guard:
    """ASGI middleware that answers 401, 408, 413, 414, 429, 431, 500 and 503 in JSON and lets the rest through.

    keys: None lets everybody in. is_guarded: tells by path what needs a key, a place and a turn (default: everything);
    head and body are limited everywhere. The body is read before a turn is taken, so that slow senders hold up nobody;
    a client that hangs up loses its place or turn at once.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing | None = None,
        limits: RequestLimits | None = None,
        is_guarded: Callable[[str], bool] = lambda path: True,
    ) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits or RequestLimits()
        self._is_guarded = is_guarded
        self._rates = RateLimiter()
        self._gate = Gate(self._limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reply = _Reply(send)
        try:
            check_head(scope["headers"], scope.get("raw_path", b"") + scope["query_string"], self._limits)
            if self._is_guarded(scope["path"]):
                self._let_in(scope)
                await self._in_turn(scope, self._counted(scope, receive), reply)
            else:
                await self._app(scope, self._counted(scope, receive), reply)
        except _HungUp:
            return
        except Refusal as error:
            await reply.instead(scope, receive, error)
        except Exception:
            log.exception("A request to %s failed", scope["path"])
            await reply.instead(scope, receive, Refusal(500, "Something went wrong here; the server's log says what."))

    def _let_in(self, scope: Scope) -> None:
        """Count the request for its key, or for its address when it has no valid one. Raises Refusal (401, 429)."""
        key = self._keys.find(_presented(scope)) if self._keys else None
        if key is not None:
            self._rates.hit(f"key {key.sha256}", key.requests_per_minute or self._limits.requests_per_minute)
            return
        host = (scope.get("client") or ("unknown",))[0]
        self._rates.hit(address_identity(host), self._limits.requests_per_minute)
        if self._keys is not None:
            raise Refusal(401, "A valid API key is needed: send the header Authorization: Bearer <key>.")

    async def _in_turn(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        """Read the body, wait for a turn and answer; stop when the client hangs up."""
        async with self._gate.admitted():
            body = await self._body(receive)
            gone = asyncio.create_task(_until_gone(receive))
            work = asyncio.create_task(self._work(scope, _replay(body, gone), reply))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done() and not reply.is_complete:
                    raise _HungUp
                await work
            finally:
                work.cancel()
                gone.cancel()
                await asyncio.gather(work, gone, return_exceptions=True)

    async def _work(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        async with self._gate.turn():
            try:
                async with asyncio.timeout(self._limits.work_seconds) as clock:
                    await self._app(scope, receive, reply)
            except TimeoutError:
                if not clock.expired():
                    raise
                raise Refusal(503, "The answer took too long and was broken off.", 10.0) from None

    async def _body(self, receive: Receive) -> bytes:
        """Read the whole body. Raises Refusal (408) when it arrives too slowly."""
        body, is_whole = bytearray(), False
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while not is_whole:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _HungUp
                    body += message.get("body", b"")
                    is_whole = not message.get("more_body", False)
        except TimeoutError:
            raise Refusal(408, f"The request took longer than {self._limits.body_seconds:g} s to arrive.") from None
        return bytes(body)

    def _counted(self, scope: Scope, receive: Receive) -> Receive:
        """Give a `receive` that raises Refused (413) when the body is too long; at once, when its header says so."""
        announced = dict(scope["headers"]).get(b"content-length", b"")
        if announced.isdigit() and int(announced[:20]) > self._limits.max_body_bytes:
            raise too_long(self._limits)
        byte_count = 0

        async def counted() -> Message:
            nonlocal byte_count
            message = await receive()
            byte_count += len(message.get("body", b""))
            if byte_count > self._limits.max_body_bytes:
                raise too_long(self._limits)
            return message

        return counted


class _HungUp(Exception):
    """The client went away before it had its answer."""


class _Reply:
    """Sends what the application answers, and knows how far the answer has come."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._has_begun = False
        self.is_complete = False

    async def __call__(self, message: Message) -> None:
        self._has_begun = True
        self.is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def instead(self, scope: Scope, receive: Receive, error: Refusal) -> None:
        """Send a refusal; once an answer has begun, only breaking off is left, which the server does on an error."""
        if self._has_begun:
            raise ConnectionAbortedError(str(error)) from None
        await refusal_response(None, error)(scope, receive, self._send)


def _presented(scope: Scope) -> str:
    kind, _, secret = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1").partition(" ")
    return secret.strip() if kind.lower() == "bearer" else ""


async def _until_gone(receive: Receive) -> Message:
    """Wait until the client hangs up, or the server has sent the whole answer."""
    while (message := await receive())["type"] != "http.disconnect":
        continue
    return message


def _replay(body: bytes, gone: asyncio.Task[Message]) -> Receive:
    """Give the body as one message, then, when it comes to that, that the client has gone."""
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replayed() -> Message:
        message = next(messages, None)
        return await asyncio.shield(gone) if message is None else message

    return replayed
