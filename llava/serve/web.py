"""What every HTTP door of ours shares: bodies with a limit, refusals as sentences, and how it is run."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles
from uvicorn.protocols.http.h11_impl import H11Protocol

from llava.core.runtime import setup_logging
from llava.serve.engine import Refusal
from llava.serve.guard import refusal_response

M = TypeVar("M", bound=BaseModel)
BODY_SECONDS = 30.0
MAX_CONNECTIONS = 1000
SHUTDOWN_SECONDS = 10
HEAD_SECONDS = 10.0
READING_SECONDS = 30.0
FILES = "/swagger"
OPEN_PATHS = ("/docs", "/openapi.json", *(f"{FILES}/swagger-ui{end}" for end in ("-bundle.js", ".css")))


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read a JSON body. Raises Refusal for another kind, one that is too large, and one that comes too slowly.

    Another kind is refused because a browser sends JSON to a foreign site only after asking, and we never agree.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, "Send application/json.")
    too_large = Refusal(413, f"The body is larger than {max_bytes:,} bytes, the limit.")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for data in request.stream():
                body += data
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise Refusal(408, f"The body was not there after {BODY_SECONDS:g} seconds.") from None
    except ClientDisconnect:
        raise Refusal(400, "The connection broke off within the body.") from None
    return bytes(body)


def parse_body(kind: type[M], body: bytes) -> M:
    """Read a message from JSON. Raises Refusal that names the first wrong field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "body"
        raise Refusal(422, f"{where}: {first['msg']}.") from None


async def read_json(request: Request, kind: type[M], max_bytes: int = 100_000) -> M:
    """Read a message from a request's body. Raises Refusal."""
    return parse_body(kind, await read_body(request, max_bytes))


def make_app(lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]]) -> FastAPI:
    """Give an app that answers refusals with a sentence: a chunk where clients read chunks, else JSON."""
    from llava.serve.protocol import ErrorCode, error_chunk  # here, because it imports from the explainer

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refusal)
    async def refuse(request: Request, error: Refusal) -> Response:
        if request.url.path.endswith("_stream"):
            return Response(error_chunk(ErrorCode.FAILED, str(error)), error.status)
        return JSONResponse({"detail": str(error)}, error.status)

    return app


class Protocol(H11Protocol):
    """HTTP by h11, which limits the size of a head; here its time, too: who sends none in HEAD_SECONDS is cut off.

    So is who reads nothing of an answer for READING_SECONDS. Without both, as many slow senders as there may be
    connections, and as many slow readers as there may be answers, would keep everybody else out as long as they like.
    """

    _clock: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._wait_for_head()

    def on_response_complete(self) -> None:
        """Begin to wait for the next head."""
        super().on_response_complete()
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        super().connection_lost(exc)
        for timer in (self._clock, self._reading):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        """Begin to wait for a client that does not read."""
        super().pause_writing()
        self._reading = self.loop.call_later(READING_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Wait no more for a client that reads again."""
        super().resume_writing()
        if self._reading is not None:
            self._reading.cancel()

    def _wait_for_head(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
        self._clock = self.loop.call_later(HEAD_SECONDS, self._cut_off)

    def _cut_off(self) -> None:
        """Close the connection unless a request is being answered."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class Server(uvicorn.Server):
    """A server that ends in order on Ctrl+C and SIGTERM; uvicorn's own raises the signal again when it has ended."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals over for as long as it runs; a thread beside the main one gets none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End first what the application says would never end by itself."""
        state = getattr(self.config.app, "state", None)
        getattr(state, "close_streams", lambda: None)()
        await super().shutdown(sockets)


def require_free(host: str, port: int) -> None:
    """Raise ValueError where nobody can listen, before a model is loaded or trained for it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        why = (getattr(error, "strerror", None) or str(error)).partition(" (")[0].rstrip(".")
        raise ValueError(f"port: {host}:{port} can not be listened on ({why}); give another.") from None


def server_of(app: FastAPI, host: str, port: int, proxies: Sequence[str] = ()) -> Server:
    """Give the server of an app; when it is told to stop, requests under way have a few seconds to end.

    proxies: addresses or networks whose `X-Forwarded-For` and `X-Forwarded-Proto` are believed.
    """
    return Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=Protocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(proxies),  # else who asks is the real peer, whatever a header says
            forwarded_allow_ips=list(proxies),
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
    )


def serve(app: FastAPI, host: str, port: int, proxies: Sequence[str] = ()) -> None:
    """Run an app until it is told to stop; `proxies` as in `server_of`."""
    setup_logging()
    logging.getLogger("uvicorn.error").setLevel(logging.INFO)
    server_of(app, host, port, proxies).run()


def add_refusals(app: FastAPI) -> None:
    """Answer what an API refuses with a sentence, in the form that OpenAI clients read."""
    app.add_exception_handler(Refusal, refusal_response)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Name the field that does not fit; never what was sent, which may be an image."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "model_attributes_type" and "json" not in request.headers.get("content-type", ""):
        return refusal_response(request, Refusal(400, "The body is no JSON by its header; send application/json."))
    where = ".".join(str(part) for part in first["loc"][1:]) or "body"
    if first["type"] == "extra_forbidden":
        return refusal_response(request, Refusal(400, f"{where}: no setting that is known here; leave it out."))
    return refusal_response(request, Refusal(400, f"{where}: {first['msg']}."))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    content = {"error": {"message": str(error.detail), "type": "invalid_request_error", "param": None, "code": None}}
    return JSONResponse(content, error.status_code, headers=error.headers)


def add_documentation(app: FastAPI) -> None:
    """Add /docs to an application made with `docs_url=None`; FastAPI's own loads its script from another site."""
    app.mount(FILES, StaticFiles(packages=[("fastapi_swagger", "resources")]))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=f"{app.title}: the API",
            swagger_js_url=OPEN_PATHS[2].lstrip("/"),
            swagger_css_url=OPEN_PATHS[3].lstrip("/"),
            swagger_favicon_url="data:,",
        )
