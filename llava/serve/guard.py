"""The guard in front of an ASGI application: head, key, rate, place, body and time are checked before it is asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava.serve.keys import KeyRing
from llava.serve.limits import Gate, RateLimiter, RequestLimits, address_identity, check_head, too_long
from llava.serve.refusals import Refused

log = logging.getLogger(__name__)


def refusal_response(request: Request | None, error: Exception) -> JSONResponse:
    """Give the JSON reply of a refusal; fits `app.add_exception_handler(Refused, refusal_response)`."""
    assert isinstance(error, Refused)
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
        except Refused as error:
            await reply.instead(scope, receive, error)
        except Exception:
            log.exception("A request to %s failed", scope["path"])
            await reply.instead(scope, receive, Refused(500, "Something went wrong here; the server's log says what."))

    def _let_in(self, scope: Scope) -> None:
        """Count the request for its key, or for its address when it has no valid one. Raises Refused (401, 429)."""
        key = self._keys.find(_presented(scope)) if self._keys else None
        if key is not None:
            self._rates.hit(f"key {key.sha256}", key.requests_per_minute or self._limits.requests_per_minute)
            return
        host = (scope.get("client") or ("unknown",))[0]
        self._rates.hit(address_identity(host), self._limits.requests_per_minute)
        if self._keys is not None:
            raise Refused(401, "A valid API key is needed: send the header Authorization: Bearer <key>.")

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
                raise Refused(503, "The answer took too long and was broken off.", 10.0) from None

    async def _body(self, receive: Receive) -> bytes:
        """Read the whole body. Raises Refused (408) when it arrives too slowly."""
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
            raise Refused(408, f"The request took longer than {self._limits.body_seconds:g} s to arrive.") from None
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

    async def instead(self, scope: Scope, receive: Receive, error: Refused) -> None:
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
