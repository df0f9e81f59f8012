"""The application of `m2f2 serve`: OpenAI-compatible chat, `/v1/detect`, `/v1/explain`, health, documentation, page."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import uuid4

from fastapi import Depends, FastAPI, File, Form, Request, UploadFile
from fastapi.responses import PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import generate_latest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from llava import __version__
from llava.core.types import GenerationSettings, Turn, Verdict
from llava.data.answer_texts import VERDICT_QUESTION
from llava.data.inputs import NamedImage, in_order
from llava.serve.engine import WORDLESS, Answer, Engine, Piece, Question, Refusal, from_thread, joined
from llava.serve.fetch import Fetcher
from llava.serve.guard import Guard, RequestLimits
from llava.serve.keys import KeyRing
from llava.serve.measures import Measures
from llava.serve.uploads import UploadLimits, decode_data_uri, is_data_uri, read_files, read_still, read_upload
from llava.serve.web import OPEN_PATHS, add_documentation, add_refusals

if TYPE_CHECKING:
    from llava.serve.page.door import PageDoor

log = logging.getLogger(__name__)

MAX_TEXT = 8_000  # characters of one message
MAX_CONVERSATION = 64_000  # characters of all messages, as for a worker; they are read in the engine's one thread
MAX_TOKENS = 1_024
SYSTEM_NOTE = "The system message was not used: the model has one of its own."
MAX_FILES = 16


class ImageUrl(BaseModel):
    """Where a picture is: a data URI or a public https address."""

    url: str = Field(max_length=40_000_000)


class Part(BaseModel):
    """A piece of a message."""

    type: Literal["text", "image_url"]
    text: str | None = Field(None, max_length=MAX_TEXT)
    image_url: ImageUrl | None = None


class Message(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part] = Field(max_length=MAX_TEXT)


class ChatRequest(BaseModel):
    """A request to /v1/chat/completions; settings that would change the answer and are not known are refused."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, max_length=200, description="none = the first of /v1/models")
    messages: list[Message] = Field(min_length=1, max_length=64)
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float = Field(0.0, ge=0, le=2, description="0, the default here, writes the same answer every time")
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=2**63)
    n: Literal[1] = 1
    user: str | None = Field(None, max_length=200)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, sent: Any) -> Any:
        """Take `null` as a setting that was not sent, as OpenAI does."""
        return {name: value for name, value in sent.items() if value is not None} if isinstance(sent, dict) else sent

    def generation(self, limit: int = 256) -> GenerationSettings:
        """Give the settings of the answer; `limit` tokens where the request says none."""
        tokens = self.max_completion_tokens or self.max_tokens or limit
        return GenerationSettings(max_new_tokens=tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed)

    def conversation(self) -> tuple[str, list[Turn], list[str]]:
        """Give the address of the one image, the turns without it, and notes on what was not used.

        Raises Refusal (400) unless user and assistant alternate, a user asks last, there is exactly one image, and text
        has its limits.
        """
        notes = [SYSTEM_NOTE] if any(message.role == "system" for message in self.messages) else []
        said = [message for message in self.messages if message.role != "system"]
        images = [part.image_url.url for message in said for part in _parts(message) if part.image_url is not None]
        if len(images) != 1:
            raise Refusal(400, f"The conversation holds {len(images)} images; send exactly one, as an image_url.")
        expected = ["user", "assistant"] * len(said)
        if [message.role for message in said] != expected[: len(said)] or said[-1].role != "user":
            raise Refusal(400, "The messages must alternate, user first, and end with a question of the user.")
        _require_short(said)
        turns = []
        for message in said:
            text = " ".join(part.text.strip() for part in _parts(message) if part.text).strip()
            if not text:
                raise Refusal(400, "A message has no text; ask something, such as: Is this image real or fake?")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise Refusal(400, "A message holds half a character (a lone surrogate); send whole ones.")
            turns.append(Turn(role="human" if message.role == "user" else "assistant", text=text))
        return images[0], turns, notes


class ChatReply:
    """The pieces of one reply in the form of OpenAI's API, with the verdict as an extra key."""

    def __init__(self, model: str, notes: list[str]) -> None:
        self._head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": model}
        self._notes = notes

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Give the reply to a request without streaming."""
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish}
        return self._with_verdict("chat.completion", choice, answer.verdict) | {"usage": answer.usage}

    def first(self, verdict: Verdict) -> dict[str, Any]:
        """Give the first chunk of a stream: the verdict, before any word."""
        return self._with_verdict("chat.completion.chunk", _delta({"role": "assistant", "content": ""}), verdict)

    def later(self, text: str) -> dict[str, Any]:
        """Give a chunk with more words."""
        return self._head | {"object": "chat.completion.chunk", "choices": [_delta({"content": text})]}

    def last(self, answer: Answer, wants_usage: bool) -> Iterator[dict[str, Any]]:
        """Yield the chunk that says how the answer ended, and one with the usage if it was asked for."""
        yield self._head | {"object": "chat.completion.chunk", "choices": [_delta({}, answer.finish)]}
        if wants_usage:
            yield self._head | {"object": "chat.completion.chunk", "choices": [], "usage": answer.usage}

    def _with_verdict(self, kind: str, choice: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
        notes = {"notes": self._notes} if self._notes else {}
        return self._head | {"object": kind, "choices": [choice], "verdict": verdict.to_dict(), **notes}


def _require_short(messages: Sequence[Message]) -> None:
    """Raise Refusal (400) for a message or a conversation with more text than is read, however many parts it has."""
    lengths = [sum(len(part.text or "") for part in _parts(message)) for message in messages]
    for what, count, most in (
        ("A message", max(lengths), MAX_TEXT),
        ("The conversation", sum(lengths), MAX_CONVERSATION),
    ):
        if count > most:
            raise Refusal(400, f"{what} has {count:,} characters; at most {most:,} are read.")


def _parts(message: Message) -> list[Part]:
    return [Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content


def _delta(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish}


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the API works with.

    engines: of each model by its name; who names none asks the first. measures: the counters that /metrics shows; those
    of the engines, where they count.
    """

    engines: Mapping[str, Engine]
    measures: Measures = field(default_factory=Measures)
    keys: KeyRing | None = None
    limits: RequestLimits = field(default_factory=RequestLimits)
    uploads: UploadLimits = field(default_factory=UploadLimits)
    fetcher: Fetcher | None = None
    page: PageDoor | None = None

    def chosen(self, model: str | None, request: Request) -> tuple[str, Engine]:
        """Give name and engine of the model that a request names, and note the name for its line in the log.

        Raises Refusal (404) for one that is not here.
        """
        name = next(iter(self.engines)) if model is None else model
        if name not in self.engines:
            message = f"There is no model {name[:80]!r} here; ask {' or '.join(map(repr, self.engines))}."
            raise Refusal(404, message, parameter="model", code="model_not_found")
        request.state.model = name
        return name, self.engines[name]

    def is_guarded(self, path: str) -> bool:
        """Say whether a path needs a key and a turn; the page has a login and rates of its own."""
        return path not in ("/health", *OPEN_PATHS) and not (self.page is not None and self.page.owns(path))

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        """Give the threads that wait for the engines, one for each request that is worked on."""
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
    add_refusals(app)
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
    async def health() -> dict[str, Any]:
        """Say that the server answers; `model` is the first of the models."""
        names = list(service.engines)
        return {"status": "ok", "model": names[0], "models": names, "version": __version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        """Give the counters in Prometheus' text form."""
        return generate_latest(service.measures.registry).decode()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the models, first the one that is asked where none is named; `capabilities`, `scope` are extra keys."""
        common = {"object": "model", "created": 0, "owned_by": "m2f2"}
        extra = {
            name: {"capabilities": ["detect", *["explain"] * bool(each.has_words)], "scope": each.scope}
            for name, each in service.engines.items()
        }
        return {"object": "list", "data": [{"id": name, **common, **known} for name, known in extra.items()]}


def _add_faces(app: FastAPI, service: Service) -> None:
    @app.post("/v1/detect", dependencies=[_known_fields("files", "model")])
    async def detect(
        request: Request,
        files: Annotated[list[UploadFile], File(max_length=MAX_FILES)],
        model: Annotated[str | None, Form(max_length=200)] = None,
    ) -> dict[str, Any]:
        """Give a verdict for every face of the images that are sent, largest first, and one for each video."""
        name, engine = service.chosen(model, request)
        sent = await read_files(files, read_upload, service.uploads)
        found = await asyncio.to_thread(lambda: list(in_order(sent, engine.findings, engine.video_finding)))
        return {"model": name, "verdicts": [finding.verdict.to_dict() for finding in found]}

    @app.post("/v1/explain", dependencies=[_known_fields("files", "model", "question", "max_tokens")])
    async def explain(
        request: Request,
        files: Annotated[list[UploadFile], File(max_length=MAX_FILES)],
        model: Annotated[str | None, Form(max_length=200)] = None,
        question: Annotated[str, Form(max_length=2000)] = VERDICT_QUESTION,
        max_tokens: Annotated[int, Form(ge=1, le=MAX_TOKENS)] = 256,
    ) -> dict[str, Any]:
        """Give the verdict on the largest face of each image, and the answer to one question about it."""
        name, engine = service.chosen(model, request)
        if not engine.has_words:
            raise Refusal(400, f"{WORDLESS} Send the files to /v1/detect, or {_who_writes(service)}.")
        images = await read_files(files, read_still, service.uploads)
        settings, turns = GenerationSettings(max_new_tokens=max_tokens), [Turn(role="human", text=question)]
        answers = await asyncio.gather(*(_answer(service, engine, image, turns, settings) for image in images))
        return {"model": name, "explanations": [answer.explanation.to_dict() for answer in answers]}


def _known_fields(*names: str) -> Any:
    """Give what refuses a form with other fields, and fields in the address, so that none is left out in silence."""

    async def check(request: Request) -> None:
        unknown = sorted(set(await request.form()).difference(names))
        if unknown:
            raise Refusal(400, f"{unknown[0][:80]}: there is no such field here; allowed: {', '.join(names)}.")
        for name in request.query_params:
            raise Refusal(400, f"{name[:80]}: nothing is read from the address; send it as a field of the form.")

    return Depends(check)


def _who_writes(service: Service) -> str:
    """Say what to do for words."""
    writers = [repr(name) for name, engine in service.engines.items() if engine.has_words]
    return f"ask for the model {' or '.join(writers)}" if writers else "serve such an explainer"


def _add_chat(app: FastAPI, service: Service, fetcher: Fetcher) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, chat_request: ChatRequest) -> dict[str, Any] | StreamingResponse:
        """Answer a conversation about one image, as OpenAI's clients ask it; `verdict` is an extra key."""
        name, engine = service.chosen(chat_request.model, request)
        address, turns, notes = chat_request.conversation()
        image = await _fetched(address, service, fetcher)
        settings, reply = chat_request.generation(), ChatReply(name, notes)
        if chat_request.stream:
            wants_usage = bool((chat_request.stream_options or {}).get("include_usage"))
            lines = _lines(service, engine, image, turns, settings, reply, wants_usage)
            return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return reply.whole(await _answer(service, engine, image, turns, settings))


async def _lines(
    service: Service,
    engine: Engine,
    image: NamedImage,
    turns: Sequence[Turn],
    settings: GenerationSettings,
    reply: ChatReply,
    wants_usage: bool,
) -> AsyncIterator[str]:
    """Yield the events of a stream; a failure after the first one is the last event, in a sentence."""
    answer = Answer(turns[-1].text, name=image.name)
    try:
        async for piece in _pieces(service, engine, image, turns, settings):
            answer.add(piece)
            if piece.verdict is not None:
                yield _event(reply.first(answer.verdict))
            if piece.text:
                yield _event(reply.later(piece.text))
    except ValueError as error:
        yield _event(_refusal(error).content)
    else:
        for event in reply.last(answer, wants_usage):
            yield _event(event)
    yield "data: [DONE]\n\n"


async def _answer(
    service: Service, engine: Engine, image: NamedImage, turns: Sequence[Turn], settings: GenerationSettings
) -> Answer:
    """Give the whole answer. Raises Refusal for what can not be answered."""
    answer = Answer(turns[-1].text, name=image.name)
    try:
        async for piece in _pieces(service, engine, image, turns, settings):
            answer.add(piece)
    except ValueError as error:
        raise _refusal(error) from None
    return answer


def _refusal(error: ValueError) -> Refusal:
    """Give what an engine raised as a refusal; it may be one."""
    return error if isinstance(error, Refusal) else Refusal(400, str(error))


async def _pieces(
    service: Service, engine: Engine, image: NamedImage, turns: Sequence[Turn], settings: GenerationSettings
) -> AsyncIterator[Piece]:
    """Ask the engine from this event loop; a client that leaves stops the answer."""
    stop = Event()
    question = Question(image=image.pixels, turns=turns, settings=settings)
    async with aclosing(from_thread(lambda: engine.ask(question, stop), service.threads, stop)) as arrivals:
        async for pieces in arrivals:
            yield joined(pieces)


async def _fetched(address: str, service: Service, fetcher: Fetcher) -> NamedImage:
    """Read the image of a data URI or a public https address. Raises Refusal."""
    if is_data_uri(address):
        content = decode_data_uri(address, "image", service.uploads)
    else:
        content = await fetcher.fetch(address)
    return await asyncio.to_thread(read_still, content, "image", service.uploads)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
