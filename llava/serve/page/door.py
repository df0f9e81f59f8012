"""What stands between the network and the page: only its own routes, its own files and so many requests pass."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from gradio.utils import get_upload_folder
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from llava.serve.engine import Engine, Refusal
from llava.serve.guard import RateLimiter, RequestLimits, address_identity
from llava.serve.keys import KeyRing
from llava.serve.uploads import UploadLimits

FILES = ("/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/logout", "/manifest.json")
FILE_FOLDERS = ("/assets/", "/static/")
STREAMS = ("/gradio_api/queue/data", "/gradio_api/upload_progress")
UPLOAD, JOIN, LOGIN = "/gradio_api/upload", "/gradio_api/queue/join", "/login"
SMALL = ("/gradio_api/cancel", "/gradio_api/reset")
FILES_PER_MINUTE = 1200  # of one address; the page has about a hundred, which a browser then keeps
MAX_STREAMS = 500  # a page holds one while something is going on there
MAX_STEP_BYTES = 100_000
MAX_PATH = 250  # bytes; no file of the page has a longer one, and a file system has limits of its own
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "media-src 'self' blob:; connect-src 'self' data: blob:; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
FONTS = ("system-ui", "Segoe UI", "Helvetica Neue", "Arial", "DejaVu Sans", "sans-serif")
CLOSED: dict[str, Any] = {  # what Gradio would offer beside the page, and that it has a dark side, too
    "footer_links": [],
    "run_history": False,
    "show_error": False,
    "ssr_mode": False,
    "mcp_server": False,
    "pwa": False,
    "enable_monitoring": False,
    "head": '<meta name="color-scheme" content="light dark">',
}
MONO = ("ui-monospace", "DejaVu Sans Mono", "Menlo", "Consolas", "monospace")


class PageDoor:
    """ASGI application: lets the routes through that the page needs and answers 404 to all others that Gradio has.

    So no file of the server is read, no address fetched and nothing proxied. Steps of the page (uploads, questions,
    logins) count against `requests_per_minute` of their address, its files and streams have limits of their own.
    steps: the numbers of what a person can do on the page.
    """

    def __init__(self, app: FastAPI, limits: RequestLimits, steps: Collection[int]) -> None:
        self._app, self._limits, self._steps, self._folder = app, limits, steps, Path(get_upload_folder()).resolve()
        self._rates, self._streams, self._closing = RateLimiter(), 0, asyncio.Event()

    def owns(self, path: str) -> bool:
        """Say whether a path is the page's, and so has its own login and rates."""
        known = (*FILES, *STREAMS, UPLOAD, JOIN, LOGIN, *SMALL)
        return path in known or path.startswith(FILE_FOLDERS)

    def close(self) -> None:
        """End the streams, which would go on for as long as somebody listens."""
        self._closing.set()

    def lifespan(self) -> AbstractAsyncContextManager[Any]:
        """Start and end what belongs to the page."""
        return self._app.router.lifespan_context(self._app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises HTTPException (404) for a path or method that is not the page's."""
        if scope["type"] != "http":
            raise HTTPException(404)
        path, method = scope["path"], scope["method"]
        try:
            if method in ("GET", "HEAD") and (path in FILES or _is_file(path)):
                self._count(scope, "files", FILES_PER_MINUTE)
                await self._app(_without_links(scope), receive, _with_headers(send))
            elif method == "GET" and path in STREAMS:
                await self._stream(scope, receive, send)
            elif method == "POST" and path in (UPLOAD, JOIN, LOGIN, *SMALL):
                await self._step(scope, receive, send)
            else:
                raise HTTPException(404, f"There is no {method} {path[:80]} here.")
        except Refusal as error:
            await _refusal(error, path)(scope, receive, send)

    async def _step(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let something through that a person does. Raises Refusal (400, 403, 408, 413, 429)."""
        request = Request(scope, receive)
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise Refusal(403, "Another site may not send anything to this page.")
        if scope["path"] in SMALL:
            self._count(scope, "files", FILES_PER_MINUTE)
        else:
            self._count(scope, "steps", self._limits.requests_per_minute)
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                if scope["path"] == JOIN:
                    receive = _again(await self._checked(request))
                await self._app(scope, receive, _with_headers(send))
        except TimeoutError:
            raise Refusal(408, f"The request took longer than {self._limits.body_seconds:g} s to arrive.") from None

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a stream through until it ends or the server does. Raises Refusal (429, 503)."""
        self._count(scope, "files", FILES_PER_MINUTE)
        if self._streams >= MAX_STREAMS:
            raise Refusal(503, "Too many pages are open here; try again in a minute.", 60.0)
        self._streams += 1
        answer = asyncio.ensure_future(self._app(scope, receive, send))
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait({answer, closing}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                await answer
            else:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._streams -= 1
            answer.cancel()
            closing.cancel()
            await asyncio.gather(answer, closing, return_exceptions=True)

    async def _checked(self, request: Request) -> bytes:
        """Read a step. Raises Refusal where it is too long, none of the page's, or names another file (400, 413)."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_STEP_BYTES:
                raise Refusal(413, f"A question is larger than {MAX_STEP_BYTES:,} bytes, the limit.")
        try:
            content = json.loads(body)
            is_harmless = _is_harmless(content, self._folder)
        except (ValueError, RecursionError):  # a path with a zero byte or half a character raises ValueError, too
            raise Refusal(400, "The request is no JSON that this page sends.") from None
        if not is_harmless:
            raise Refusal(400, "The request names a file or an address that was not uploaded here.")
        number = content.get("fn_index") if isinstance(content, Mapping) else None
        if number is not None and not (isinstance(number, int) and number in self._steps):
            raise Refusal(400, "The page has no such step; load it again.")
        return bytes(body)

    def _count(self, scope: Scope, what: str, per_minute: int) -> None:
        host = (scope.get("client") or ("unknown",))[0]
        self._rates.hit(f"{what} {address_identity(host)}", per_minute)


def _is_file(path: str) -> bool:
    return path.startswith(FILE_FOLDERS) and len(path.encode()) <= MAX_PATH


def _is_harmless(content: Any, folder: Path) -> bool:
    """Say whether every file in JSON lies in the folder of uploads: Gradio would fetch or copy any other."""
    if isinstance(content, Mapping):
        path = content.get("path")
        if path is not None and not (isinstance(path, str) and Path(path).resolve().is_relative_to(folder)):
            return False
        return all(_is_harmless(value, folder) for value in content.values())
    return not isinstance(content, list) or all(_is_harmless(value, folder) for value in content)


def _without_links(scope: Scope) -> Scope:
    """Leave out what an address may ask the page to load; only its look, and who is logged out, may be chosen."""
    known = (b"__theme=", b"vite", b"v=", b"all_session=")
    kept = [part for part in scope["query_string"].split(b"&") if part.startswith(known)]
    return {**scope, "query_string": b"&".join(kept)}


def _with_headers(send: Send) -> Send:
    async def headed(message: Message) -> None:
        if message["type"] == "http.response.start":
            added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            message["headers"] = [*message["headers"], *added]
        await send(message)

    return headed


def _again(body: bytes) -> Receive:
    """Give a body that was read."""

    async def received() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return received


def _refusal(error: Refusal, path: str) -> Response:
    """Give the reply that Gradio's page shows as a sentence."""
    if path == UPLOAD:
        return PlainTextResponse(str(error), error.status, headers=error.headers)
    return JSONResponse({"detail": str(error), **error.content}, error.status, headers=error.headers)


def open_page(
    engines: Mapping[str, Engine],
    limits: RequestLimits | None = None,
    uploads: UploadLimits | None = None,
    keys: KeyRing | None = None,
    examples: str | Path | None = None,
    is_remote: bool = False,
) -> PageDoor:
    """Give the page behind its door; with keys it asks for the name of one and the key.

    engines, examples, is_remote: see `build_page`. Uploads go to a folder that is gone at the end.
    """
    limits, uploads = limits or RequestLimits(), uploads or UploadLimits()
    folder = tempfile.TemporaryDirectory(prefix="m2f2-uploads-")
    os.environ |= {"GRADIO_TEMP_DIR": folder.name, "GRADIO_ANALYTICS_ENABLED": "False"}  # read by Gradio alone
    import gradio as gr

    from llava.serve.page.layout import build_page

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with folder:
            yield

    shell = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    may_ask = None if keys is None else partial(_may_ask, keys)
    page = build_page(engines, uploads, examples, may_ask, limits.max_active, is_remote)
    gr.mount_gradio_app(
        shell,
        page,
        path="/",
        auth=None if keys is None else lambda name, secret: keys.is_of(secret, name),
        auth_message=None if keys is None else "Log in with the name of a key and the key.",
        max_file_size=uploads.max_bytes,
        theme=gr.themes.Base(font=FONTS, font_mono=MONO, primary_hue="slate", secondary_hue="slate"),
        css=_own("page.css"),
        js=_own("page.js"),
        **CLOSED,
    )
    return PageDoor(shell, limits, page.fns)


def _may_ask(keys: KeyRing, user: str | None) -> bool:
    return user is not None and keys.has(user)


def _own(name: str) -> str:
    return resources.files("llava.serve.page").joinpath(name).read_text("utf-8")
