"""A worker: one model behind the protocol of FastChat and LLaVA, known to a controller by its heartbeats."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from llava.core.config import parse, setting
from llava.core.runtime import setup_logging
from llava.core.types import GenerationSettings, Turn
from llava.pipeline.settings import PipelineSettings, Quantization, load
from llava.pipeline.verdict import meaning
from llava.serve.engine import Answer, Engine, Piece, Question, Refusal, from_thread, joined
from llava.serve.protocol import (
    GREEDY_UP_TO,
    MAX_IMAGE_BYTES,
    MAX_NEW_TOKENS,
    REQUEST_HEADER,
    Chunk,
    ErrorCode,
    GenerateRequest,
    WorkerStatus,
    encode_chunk,
    error_chunk,
)
from llava.serve.registration import SecretSettings, read_secret, require_secret, stay_registered
from llava.serve.uploads import read_still
from llava.serve.web import make_app, read_json, require_free, serve

log = logging.getLogger(__name__)
BUSY = "Too many requests wait here; please try again in a minute."
MAX_REQUEST_BYTES = MAX_IMAGE_BYTES * 4 // 3 + 500_000
REQUEST_ID = re.compile(r"[\w-]{1,64}")
# How the published command lines and FastChat write two flags.
ALIASES = {"--controller": "--controller-address", "--worker": "--worker-address"}
REFUSED = {"--model-base": "a merged explainer (the output of stage 3) is served; merge base and LoRA first"}


def translated(argv: Sequence[str], aliases: Mapping[str, str], refused: Mapping[str, str]) -> Iterator[str]:
    """Write flags as they are called here. Raises ValueError with the reason for one that is refused."""
    for word in argv:
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        if dashed in refused:
            raise ValueError(f"{name} is not accepted: {refused[dashed]}.")
        yield f"{aliases.get(dashed, name)}{equals}{value}"


class Answers:
    """Answers requests with an engine: some at a time, some waiting, the rest refused."""

    def __init__(self, engine: Engine, model: str, at_a_time: int, waiting: int, seconds: float) -> None:
        self.queue_length = 0
        self._engine = engine
        self._model = model
        self._most = at_a_time + waiting
        self._seconds = seconds
        self._slots = asyncio.Semaphore(at_a_time)
        self._threads = ThreadPoolExecutor(at_a_time, thread_name_prefix="answer")

    def close(self) -> None:
        """Let go of what waits."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def require_room(self) -> None:
        """Raise Refusal when so many requests run and wait that there is no room for one more."""
        if self.queue_length >= self._most:
            raise Refusal(503, BUSY)

    async def answer(self, query: GenerateRequest, turns: Sequence[Turn], request_id: str) -> AsyncIterator[bytes]:
        """Yield the chunks of an answer: the verdict, then the text as it grows; an error is the last chunk."""
        if self.queue_length >= self._most:  # asked again, because others came while the body was read
            yield error_chunk(ErrorCode.FAILED, BUSY)
            return
        started = time.monotonic()
        writer = _Writer(query, turns[-1].text, bool(self._engine.has_words))
        outcome = "client left"
        self.queue_length += 1
        try:
            async with aclosing(self._chunks(query, turns, writer, started)) as chunks:
                async for chunk in chunks:
                    yield encode_chunk(chunk)
            outcome = "done"
        except TimeoutError:
            outcome = "too slow"
            yield error_chunk(ErrorCode.LOST, f"The answer took longer than {self._seconds:g} seconds.")
        except ValueError as error:
            outcome = "refused"
            yield error_chunk(ErrorCode.FAILED, str(error))
        except Exception:
            outcome = "failed"
            log.exception("request id=%s failed", request_id)
            yield error_chunk(ErrorCode.FAILED, "The model failed on this request; the log of the worker says more.")
        finally:
            self.queue_length -= 1
            seconds = time.monotonic() - started
            line = "request id=%s model=%s seconds=%.2f tokens=%d outcome=%s"
            log.info(line, request_id, self._model, seconds, writer.answer.tokens, outcome)

    async def _chunks(
        self, query: GenerateRequest, turns: Sequence[Turn], writer: _Writer, started: float
    ) -> AsyncGenerator[Chunk, None]:
        """Wait for a slot, then yield what the engine says. Raises TimeoutError when all of it takes too long."""
        stop = Event()
        async with asyncio.timeout(self._seconds):
            await self._slots.acquire()
        try:
            left = self._seconds - (time.monotonic() - started)
            async with aclosing(
                from_thread(lambda: self._pieces(query, turns, stop), self._threads, stop, left)
            ) as said:
                async for pieces in said:
                    for chunk in writer.take(joined(pieces)):
                        yield chunk
                    if writer.answer.is_ended:
                        break
        finally:
            self._slots.release()
        for chunk in writer.finish():
            yield chunk

    def _pieces(self, query: GenerateRequest, turns: Sequence[Turn], stop: Event) -> Iterator[Piece]:
        """Read the image, then ask the engine; runs in a thread."""
        content = query.image()
        image = None if content is None else read_still(content, "the image").pixels
        settings = GenerationSettings(
            max_new_tokens=min(query.max_new_tokens, MAX_NEW_TOKENS),
            temperature=query.temperature if query.temperature > GREEDY_UP_TO else 0.0,
            top_p=query.top_p,
            seed=secrets.randbits(63) if query.seed is None else query.seed,
        )
        question = Question(image=image, turns=turns, settings=settings, is_crop=query.is_crop)
        return self._engine.ask(question, stop)


class _Writer:
    """Writes an answer as chunks, each with the whole text so far after `prefix`."""

    def __init__(self, query: GenerateRequest, question: str, has_words: bool) -> None:
        self.answer = Answer(question, stops=query.stops)
        self._prefix = query.prompt if query.echo else ""
        self._has_map, self._has_words = query.evidence_map, has_words
        self._sent = ""

    def take(self, piece: Piece) -> Iterator[Chunk]:
        """Yield the chunk of one piece, if it has anything new to show."""
        self.answer.add(piece)
        if piece.verdict is not None:
            beside = self._map(piece) if self._has_words else self._map(piece) | {"has_words": False}
            yield Chunk(text=self._prefix, error_code=ErrorCode.OK, verdict=piece.verdict.to_dict(), **beside)
        shown = self.answer.shown
        if shown != self._sent:
            self._sent = shown
            yield Chunk(text=self._prefix + shown, error_code=ErrorCode.OK)

    def _map(self, piece: Piece) -> dict[str, Any]:
        """Give the detector's map as a chunk holds it, nothing where it was not asked for."""
        if not self._has_map or piece.evidence_map is None:
            return {}
        return {"evidence_map": piece.evidence_map.astype(float).round(4).tolist(), "seen": piece.seen}

    def finish(self) -> Iterator[Chunk]:
        """Yield the last chunk, if there is more to say: held back text, or what there is to know beside it."""
        verdict = self.answer.verdict
        text, remark = self.answer.text, self.answer.explanation.remark if self._has_words else ""
        if verdict.p_fake is None:
            text, remark = meaning(verdict), ""
        if remark:
            yield Chunk(text=self._prefix + text, error_code=ErrorCode.OK, remark=remark)
        elif text != self._sent:
            yield Chunk(text=self._prefix + text, error_code=ErrorCode.OK)


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(SecretSettings, PipelineSettings):
    """Where the worker listens, which controller it belongs to, and what it serves."""

    model_path: str = setting(
        help="merged explainer, or a detector for verdicts alone: folder, name in checkpoints/, or hub id"
    )
    model_name: str | None = setting(None, "name that clients ask for; none = the name of the folder")
    host: str = setting("localhost", "address to listen on; 0.0.0.0 = every one")
    port: int = setting(21002, "port to listen on")
    worker_address: str | None = setting(None, "address given to the controller; none = http://localhost:PORT")
    controller_address: str = setting("http://localhost:21001", "address of the controller")
    no_register: bool = setting(False, "serve without a controller")
    limit_model_concurrency: int = setting(5, "requests that are served at the same time; others wait")
    limit_waiting: int = setting(32, "requests that may wait; more are refused")
    limit_seconds: float = setting(300.0, "longest time for one request, its waiting included")
    heartbeat_seconds: float = setting(15.0, "time between two heartbeats")
    load_8bit: bool = setting(False, "published spelling of --quantization 8bit")
    load_4bit: bool = setting(False, "published spelling of --quantization 4bit")
    multi_modal: bool = setting(True, "accepted; the model always sees the image")
    stream_interval: int = setting(1, "accepted; words are sent as they are written")
    use_flash_attn: bool = setting(False, "accepted; torch picks the fastest attention that is there")

    def __post_init__(self) -> None:
        """Raise ValueError for what can not be served."""
        super().__post_init__()
        chosen = {f"--load-{bits}bit" for bits in (8, 4) if getattr(self, f"load_{bits}bit")}
        if len(chosen) + (self.quantization != "none") > 1:
            raise ValueError("Give one of --load-8bit, --load-4bit and --quantization.")
        least = {"limit_model_concurrency": 1, "limit_waiting": 0, "limit_seconds": 1e-3, "heartbeat_seconds": 1e-3}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}: {getattr(self, name)} is not usable; allowed: {bound} or more.")
        require_address(self.controller_address)

    @property
    def name(self) -> str:
        """Give the model's name, as clients ask for it."""
        return self.model_name or Path(self.model_path).name

    @property
    def address(self) -> str:
        """Give the address under which the worker registers."""
        return self.worker_address or f"http://localhost:{self.port}"

    @property
    def bits(self) -> Quantization:
        """Give the quantisation, however it was spelled."""
        return "8bit" if self.load_8bit else "4bit" if self.load_4bit else self.quantization


def require_address(controller: str) -> None:
    """Raise ValueError for what is no address of a controller; its heartbeat would end, or try for ever."""
    try:
        url = httpx.URL(controller)
    except httpx.InvalidURL as error:
        raise ValueError(f"controller_address: {controller!r} is no address ({error}); http://HOST:PORT is.") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"controller_address: {controller!r} is not of the form http://HOST:PORT.")


def build_app(settings: WorkerSettings, engine: Engine) -> FastAPI:
    """Give the worker's HTTP API, which registers itself. Raises ValueError for settings that ask for a secret."""

    secret = read_secret(settings)
    controller = settings.controller_address.rstrip("/")
    if not settings.no_register:
        require_secret(secret, settings, {"--controller-address": urlsplit(controller).hostname or ""})
    answers = Answers(
        engine, settings.name, settings.limit_model_concurrency, settings.limit_waiting, settings.limit_seconds
    )

    def status() -> WorkerStatus:
        return WorkerStatus(model_names=[settings.name], queue_length=answers.queue_length)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if settings.no_register:
            yield
        else:
            beats = stay_registered(controller, settings.address, secret, status, settings.heartbeat_seconds)
            task = asyncio.create_task(beats)
            yield
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        answers.close()

    app = make_app(lifespan)
    _add_routes(app, answers, status)
    return app


def _add_routes(app: FastAPI, answers: Answers, status: Callable[[], WorkerStatus]) -> None:
    @app.post("/worker_get_status")
    async def worker_get_status() -> WorkerStatus:
        return status()

    @app.post("/worker_generate_stream")
    async def worker_generate_stream(request: Request) -> StreamingResponse:
        answers.require_room()
        query = await read_json(request, GenerateRequest, MAX_REQUEST_BYTES)
        try:
            turns = query.turns()
        except ValueError as error:
            raise Refusal(400, str(error)) from None
        given = request.headers.get(REQUEST_HEADER, "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid4().hex[:12]
        return StreamingResponse(answers.answer(query, turns, request_id))


def load_engine(settings: WorkerSettings) -> Engine:
    """Load the model behind an engine of this process."""
    from llava.serve.batching import BatchConfig, BatchingEngine

    pipeline = load(settings, settings.model_path, settings.bits)
    return BatchingEngine(pipeline, BatchConfig(rows=settings.limit_model_concurrency), settings.name)


def main() -> None:
    """Run a worker."""
    setup_logging()
    try:
        settings = parse(WorkerSettings, list(translated(sys.argv[1:], ALIASES, REFUSED)), description=__doc__ or "")
        require_free(settings.host, settings.port)
        app = build_app(settings, load_engine(settings))
    except (ValueError, OSError) as error:
        sys.exit(f"model_worker: {error}")
    serve(app, settings.host, settings.port)


if __name__ == "__main__":
    main()
