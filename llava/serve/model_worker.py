"""A worker: one model behind the protocol of FastChat and LLaVA, known to a controller by its heartbeats."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import uuid4

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from llava.core.config import parse, setting
from llava.core.logs import setup_logging
from llava.pipeline.loading import load
from llava.pipeline.settings import PipelineSettings, Quantization
from llava.serve.flags import translated
from llava.serve.heartbeat import stay_registered
from llava.serve.protocol import MAX_IMAGE_BYTES, REQUEST_HEADER, GenerateRequest, WorkerStatus
from llava.serve.refusals import Refused
from llava.serve.registration import SecretSettings, read_secret, require_secret
from llava.serve.web import make_app, read_json, require_free, serve

if TYPE_CHECKING:
    from llava.serve.answers import Answers
    from llava.serve.engine import Engine

MAX_REQUEST_BYTES = MAX_IMAGE_BYTES * 4 // 3 + 500_000
REQUEST_ID = re.compile(r"[\w-]{1,64}")
# How the published command lines and FastChat write two flags.
ALIASES = {"--controller": "--controller-address", "--worker": "--worker-address"}
REFUSED = {"--model-base": "a merged explainer (the output of stage 3) is served; merge base and LoRA first"}


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(SecretSettings, PipelineSettings):
    """Where the worker listens, which controller it belongs to, and what it serves."""

    model_path: str = setting(help="merged explainer: folder, name in checkpoints/, or hub id")
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
    from llava.serve.answers import Answers  # here, because torch comes with it

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
        asked = await read_json(request, GenerateRequest, MAX_REQUEST_BYTES)
        try:
            turns = asked.turns()
        except ValueError as error:
            raise Refused(400, str(error)) from None
        given = request.headers.get(REQUEST_HEADER, "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid4().hex[:12]
        return StreamingResponse(answers.answer(asked, turns, request_id))


def load_engine(settings: WorkerSettings) -> Engine:
    """Load the model behind an engine of this process."""
    from llava.serve.batching import BatchConfig, BatchingEngine

    pipeline = load(settings, settings.model_path, settings.bits)
    return BatchingEngine(pipeline, BatchConfig(rows=settings.limit_model_concurrency))


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
