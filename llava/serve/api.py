"""The application of `m2f2 serve`: OpenAI-compatible chat, `/v1/detect`, `/v1/explain`, health, documentation, page."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from llava import __version__
from llava.core.types import GenerationSettings, Turn, Verdict
from llava.data.inputs import NamedImage
from llava.explainer.prompts import VERDICT_QUESTION
from llava.pipeline.verdict import explanation
from llava.pipeline.video import in_order
from llava.serve.engine import Engine, Piece, Question, joined
from llava.serve.fetch import Fetcher
from llava.serve.guard import Guard, RequestLimits, refusal_response
from llava.serve.keys import KeyRing
from llava.serve.measures import MeasuredEngine, Measures
from llava.serve.openai_chat import MAX_TOKENS, ChatReply, ChatRequest, from_thread
from llava.serve.options import ServeSettings
from llava.serve.refusals import Refused
from llava.serve.uploads import UploadLimits, decode_data_uri, is_data_uri, read_files, read_still, read_upload

if TYPE_CHECKING:
    from llava.serve.page.door import PageDoor

log = logging.getLogger(__name__)

FILES = "/swagger"
OPEN_PATHS = ("/docs", "/openapi.json", *(f"{FILES}/swagger-ui{end}" for end in ("-bundle.js", ".css")))


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


MAX_FILES = 16


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the API works with. measures: the counters that /metrics shows; those of the engine, where it counts."""

    engine: Engine
    model: str
    measures: Measures = field(default_factory=Measures)
    keys: KeyRing | None = None
    limits: RequestLimits = field(default_factory=RequestLimits)
    uploads: UploadLimits = field(default_factory=UploadLimits)
    fetcher: Fetcher | None = None
    page: PageDoor | None = None

    def is_guarded(self, path: str) -> bool:
        """Say whether a path needs a key and a turn; the page has a login and rates of its own."""
        return path not in ("/health", *OPEN_PATHS) and not (self.page is not None and self.page.owns(path))

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        """Give the threads that wait for the engine, one for each request that is worked on."""
        return ThreadPoolExecutor(self.limits.max_active, thread_name_prefix="answer")


def build_app(service: Service) -> FastAPI:
    """Make the application; it holds no other state than `service` and its counters."""
    fetcher = service.fetcher or Fetcher()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.page.lifespan() if service.page else nullcontext():
            yield
        await fetcher.aclose()
        service.threads.shutdown(wait=False, cancel_futures=True)

    keyed = [Depends(HTTPBearer(auto_error=False))] if service.keys else []  # for the documentation; `Guard` checks
    settings: dict[str, Any] = {"docs_url": None, "redoc_url": None, "dependencies": keyed}
    app = FastAPI(title="M2F2-Det", version=__version__, lifespan=lifespan, **settings)
    app.add_middleware(Guard, keys=service.keys, limits=service.limits, is_guarded=service.is_guarded)
    app.add_middleware(service.measures.middleware)
    app.add_exception_handler(Refused, refusal_response)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    add_documentation(app)
    _add_basics(app, service)
    _add_faces(app, service)
    _add_chat(app, service, fetcher)
    if service.page is not None:
        app.mount("/", service.page)
        app.state.close_streams = service.page.close
    return app


def _add_basics(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that the server answers."""
        return {"status": "ok", "model": service.model, "version": __version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """Give the counters in Prometheus' text form."""
        return generate_latest(service.measures.registry).decode()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [{"id": service.model, "object": "model", "created": 0, "owned_by": "m2f2"}]}


def _add_faces(app: FastAPI, service: Service) -> None:
    @app.post("/v1/detect", dependencies=[_known_fields("files")])
    async def detect(files: Annotated[list[UploadFile], File(max_length=MAX_FILES)]) -> dict[str, Any]:
        """Give a verdict for every face of the images that are sent, largest first, and one for each video."""
        sent = await read_files(files, read_upload, service.uploads)
        engine = service.engine
        found = await asyncio.to_thread(lambda: list(in_order(sent, engine.findings, engine.video_finding)))
        return {"model": service.model, "verdicts": [finding.verdict.to_dict() for finding in found]}

    @app.post("/v1/explain", dependencies=[_known_fields("files", "question", "max_tokens")])
    async def explain(
        files: Annotated[list[UploadFile], File(max_length=MAX_FILES)],
        question: Annotated[str, Form(max_length=2000)] = VERDICT_QUESTION,
        max_tokens: Annotated[int, Form(ge=1, le=MAX_TOKENS)] = 256,
    ) -> dict[str, Any]:
        """Give the verdict on the largest face of each image, and the answer to one question about it."""
        images = await read_files(files, read_still, service.uploads)
        settings, turns = GenerationSettings(max_new_tokens=max_tokens), [Turn(role="human", text=question)]
        answers = await asyncio.gather(*(_answer(service, image, turns, settings) for image in images))
        said = [explanation(one.verdict, question, one.text) for one in answers]
        return {"model": service.model, "explanations": [one.to_dict() for one in said]}


def _known_fields(*names: str) -> Any:
    """Give what refuses a form with other fields, so that a misspelt one is not left out in silence."""

    async def check(request: Request) -> None:
        unknown = sorted(set(await request.form()).difference(names))
        if unknown:
            raise Refused(400, f"{unknown[0][:80]}: there is no such field here; allowed: {', '.join(names)}.")

    return Depends(check)


def _add_chat(app: FastAPI, service: Service, fetcher: Fetcher) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(asked: ChatRequest) -> dict[str, Any] | StreamingResponse:
        """Answer a conversation about one image, as OpenAI's clients ask it; `verdict` is an extra key."""
        if asked.model != service.model:
            raise Refused(400, f"There is no model {asked.model[:80]!r} here; ask {service.model!r}.")
        address, turns, notes = asked.conversation()
        image = await _fetched(address, service, fetcher)
        settings, reply = asked.generation(), ChatReply(service.model, notes)
        if asked.stream:
            wants_usage = bool((asked.stream_options or {}).get("include_usage"))
            lines = _lines(service, image, turns, settings, reply, wants_usage)
            return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        said = await _answer(service, image, turns, settings)
        return reply.whole(said.verdict, said.text, said.usage, said.finish)


async def _lines(
    service: Service,
    image: NamedImage,
    turns: Sequence[Turn],
    settings: GenerationSettings,
    reply: ChatReply,
    wants_usage: bool,
) -> AsyncIterator[str]:
    """Yield the events of a stream; a failure after the first one is the last event, in a sentence."""
    said = _Said()
    try:
        async for piece in _pieces(service, image, turns, settings):
            said.add(piece)
            if piece.verdict is not None:
                yield _event(reply.first(piece.verdict))
            if piece.text:
                yield _event(reply.later(piece.text))
    except ValueError as error:
        yield _event(_refusal(error).content)
    else:
        for event in reply.last(said.finish, said.usage if wants_usage else None):
            yield _event(event)
    yield "data: [DONE]\n\n"


class _Said:
    """What an answer has come to."""

    def __init__(self) -> None:
        self._verdict: Verdict | None = None
        self._texts: list[str] = []
        self._tokens = self._prompt_tokens = 0
        self._is_cut = False

    def add(self, piece: Piece) -> None:
        """Take the next piece."""
        self._verdict = piece.verdict or self._verdict
        self._texts.append(piece.text)
        self._tokens = max(self._tokens, piece.tokens)
        self._prompt_tokens = max(self._prompt_tokens, piece.prompt_tokens)
        self._is_cut = self._is_cut or piece.is_cut

    @property
    def verdict(self) -> Verdict:
        """Give the verdict, which every answer begins with."""
        assert self._verdict is not None
        return self._verdict

    @property
    def text(self) -> str:
        """Give the words."""
        return "".join(self._texts).strip()

    @property
    def usage(self) -> dict[str, int]:
        """Count tokens as OpenAI's clients expect it."""
        read, written = self._prompt_tokens, self._tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    @property
    def finish(self) -> str:
        """Say why the answer ended."""
        return "length" if self._is_cut else "stop"


async def _answer(service: Service, image: NamedImage, turns: Sequence[Turn], settings: GenerationSettings) -> _Said:
    """Give the whole answer. Raises Refused for what can not be answered."""
    said = _Said()
    try:
        async for piece in _pieces(service, image, turns, settings):
            said.add(piece)
    except ValueError as error:
        raise _refusal(error) from None
    return said


def _refusal(error: ValueError) -> Refused:
    """Give what an engine raised as a refusal; it may be one."""
    return error if isinstance(error, Refused) else Refused(400, str(error))


async def _pieces(
    service: Service, image: NamedImage, turns: Sequence[Turn], settings: GenerationSettings
) -> AsyncIterator[Piece]:
    """Ask the engine from this event loop, and name what it judged; a client that leaves stops the answer."""
    stop = Event()
    question = Question(image=image.pixels, turns=turns, settings=settings)
    said = from_thread(lambda: service.engine.ask(question, stop), service.threads, stop)
    async with aclosing(said) as came:
        async for pieces in came:
            piece = joined(pieces)
            named = piece.verdict and replace(piece.verdict, image=image.name)
            yield replace(piece, verdict=named)


async def _fetched(address: str, service: Service, fetcher: Fetcher) -> NamedImage:
    """Read the image of a data URI or a public https address. Raises Refused."""
    if is_data_uri(address):
        content = decode_data_uri(address, "image", service.uploads)
    else:
        content = await fetcher.fetch(address)
    return await asyncio.to_thread(read_still, content, "image", service.uploads)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Name the field that does not fit; never what was sent, which may be an image."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "model_attributes_type" and "json" not in request.headers.get("content-type", ""):
        return refusal_response(request, Refused(400, "The body is no JSON by its header; send application/json."))
    where = ".".join(str(part) for part in first["loc"][1:]) or "body"
    if first["type"] == "extra_forbidden":
        return refusal_response(request, Refused(400, f"{where}: no setting that is known here; leave it out."))
    return refusal_response(request, Refused(400, f"{where}: {first['msg']}."))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    content = {"error": {"message": str(error.detail), "type": "invalid_request_error", "param": None, "code": None}}
    return JSONResponse(content, error.status_code, headers=error.headers)


def build(settings: ServeSettings, engine: Engine) -> FastAPI:
    """Give the application of these settings. Raises ValueError for a file of keys that can not be used."""
    measures = Measures()
    engine = MeasuredEngine(engine, measures)
    keys = KeyRing(settings.keys) if settings.keys else None
    at_once = settings.rows * settings.replica_range[1]
    limits = RequestLimits(
        requests_per_minute=settings.requests_per_minute,
        max_active=at_once,
        max_waiting=4 * at_once if settings.waiting is None else settings.waiting,
    )
    page = None
    if settings.page:
        from llava.serve.page.door import open_page

        page = open_page({settings.name: engine}, limits, keys=keys, examples=settings.examples)
    return build_app(
        Service(engine=engine, model=settings.name, measures=measures, keys=keys, limits=limits, page=page)
    )
