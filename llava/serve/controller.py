"""The controller: workers register here, clients learn of them here or are passed on to the least busy one."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from llava.core.config import parse, setting
from llava.core.runtime import setup_logging
from llava.serve.engine import Refusal
from llava.serve.protocol import (
    END,
    MAX_IMAGE_BYTES,
    ErrorCode,
    HeartBeat,
    ModelQuestion,
    Registration,
    error_chunk,
)
from llava.serve.registration import SecretSettings, checked_address, is_admitted, read_secret, require_secret
from llava.serve.web import make_app, parse_body, read_body, read_json, serve
from llava.serve.workers import Dispatch, Pool, WorkerClient

log = logging.getLogger(__name__)
MAX_REQUEST_BYTES = MAX_IMAGE_BYTES * 4 // 3 + 500_000


@dataclass(frozen=True, kw_only=True)
class ControllerSettings(SecretSettings):
    """Where the controller listens and how it treats workers."""

    host: str = setting("localhost", "address to listen on; 0.0.0.0 = every one")
    port: int = setting(21001, "port to listen on")
    dispatch_method: Dispatch = setting("shortest_queue", "how the worker of a request is chosen")
    expiry_seconds: float = setting(30.0, "a worker that was not heard of for so long is forgotten")
    worker_seconds: float = setting(100.0, "longest silence of a worker within an answer")
    worker_networks: list[str] = setting(
        [], "networks in which workers may be registered by others, such as 10.0.3.0/24"
    )

    def __post_init__(self) -> None:
        """Raise ValueError for a network that is none."""
        for network in self.worker_networks:
            ip_network(network)


class Controller:
    """Keeps the workers and passes requests on; every request ends with an answer or exactly one error chunk."""

    def __init__(self, settings: ControllerSettings, secret: str | None) -> None:
        self.settings = settings
        self.secret = secret
        self.pool = Pool(settings.dispatch_method, settings.expiry_seconds)
        self.client = WorkerClient(settings.worker_seconds)
        self._refreshing = asyncio.Lock()

    def admit(self, request: Request) -> None:
        """Raise Refusal unless the request may speak for a worker."""
        server, peer = _ends(request)
        free = self.settings.allow_unauthenticated
        if not is_admitted(self.secret, request.headers, server[0], peer, free):
            log.warning("refused path=%s peer=%s reason=secret", request.url.path, peer)
            raise Refusal(403, "Only workers that show the shared secret may do this.")

    async def register(self, request: Request, query: Registration) -> None:
        """Take a worker in. Raises Refusal for an address where no worker may be, or one that does not answer."""
        server, peer = _ends(request)
        try:
            address = await asyncio.to_thread(
                checked_address, query.worker_name, peer, server, self.settings.worker_networks
            )
            status = query.worker_status or await self.client.status(address)
            if status is None:
                raise ValueError(f"worker address {query.worker_name!r}: /worker_get_status gives no status there.")
            self.pool.add(address, status, query.check_heart_beat, query.multimodal)
        except ValueError as error:
            log.warning("refused path=%s peer=%s reason=%s", request.url.path, peer, error)
            raise Refusal(400, str(error)) from None
        log.info("registered worker=%s models=%s", query.worker_name, ",".join(status.model_names))

    async def refresh(self) -> None:
        """Ask every worker for its status; those that give none are forgotten."""
        async with self._refreshing:  # anybody may ask for this, and each time every worker is called
            await self._refresh()

    async def _refresh(self) -> None:
        workers = self.pool.workers()
        said = await asyncio.gather(*(self.client.status(worker.address) for worker in workers))
        for worker, status in zip(workers, said, strict=True):
            if status is None:
                log.warning("dropped worker=%s reason=no status", worker.address.name)
                self.pool.drop(worker.address.name)
            else:
                worker.status, worker.queue = status, status.queue_length

    def status(self) -> dict[str, Any]:
        """Give the sum of all workers, as one worker would say it."""
        workers = self.pool.workers()
        return {
            "model_names": self.pool.models(),
            "speed": sum(worker.status.speed for worker in workers),
            "queue_length": sum(worker.queue for worker in workers),
        }

    async def relay(self, model: str, body: bytes) -> AsyncIterator[bytes]:
        """Pass a request on and its answer back; it ends with the worker's last chunk or with one error chunk.

        A worker that dies before its first chunk is replaced once.
        """
        request_id, started = uuid4().hex[:12], time.monotonic()
        tried: list[str] = []
        outcome = "client left"
        try:
            while True:
                worker = self.pool.choose(model, tried)
                if worker is None:
                    outcome = "no worker"
                    yield error_chunk(ErrorCode.NO_WORKER, _no_worker(model, tried))
                    return
                tried.append(worker.address.name)
                has_begun = False
                try:
                    async with aclosing(self.client.answer(worker.address, body, request_id)) as chunks:
                        async for chunk in chunks:
                            has_begun = True
                            yield chunk + END
                    outcome = "done"
                    return
                except (TimeoutError, ConnectionError) as error:
                    log.warning("request id=%s worker=%s failed: %s", request_id, worker.address.name, error)
                    if isinstance(error, ConnectionError):
                        self.pool.drop(worker.address.name)
                        if not has_begun and len(tried) == 1:
                            continue
                    outcome = str(error)
                    yield error_chunk(ErrorCode.LOST, f"No answer: {error}. Please ask again.")
                    return
                finally:
                    self.pool.done(worker.address.name)
        finally:
            seconds = time.monotonic() - started
            line = "request id=%s model=%r workers=%s seconds=%.2f outcome=%s"
            log.info(line, request_id, model, ",".join(tried) or "-", seconds, outcome)


def build_app(settings: ControllerSettings) -> FastAPI:
    """Give the controller's HTTP API. Raises ValueError for settings that would leave it open."""
    secret = read_secret(settings)
    require_secret(secret, settings, {"--host": settings.host})
    if settings.allow_unauthenticated:
        log.warning("--allow-unauthenticated: whoever reaches %s:%d may register", settings.host, settings.port)
    controller = Controller(settings, secret)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with aclosing(controller.client):
            yield

    app = make_app(lifespan)
    _add_worker_side(app, controller)
    _add_client_side(app, controller)
    return app


def _add_worker_side(app: FastAPI, controller: Controller) -> None:
    @app.post("/register_worker")
    async def register_worker(request: Request) -> None:
        controller.admit(request)
        await controller.register(request, await read_json(request, Registration))

    @app.post("/receive_heart_beat")
    async def receive_heart_beat(request: Request) -> dict[str, bool]:
        controller.admit(request)
        beat = await read_json(request, HeartBeat)
        return {"exist": controller.pool.beat(beat.worker_name, beat.queue_length)}


def _add_client_side(app: FastAPI, controller: Controller) -> None:
    pool = controller.pool

    @app.post("/refresh_all_workers")
    async def refresh_all_workers() -> None:
        await controller.refresh()

    @app.post("/list_models")
    async def list_models() -> dict[str, list[str]]:
        return {"models": pool.models()}

    @app.post("/list_multimodal_models")
    async def list_multimodal_models() -> dict[str, list[str]]:
        return {"models": pool.models(is_multimodal=True)}

    @app.post("/list_language_models")
    async def list_language_models() -> dict[str, list[str]]:
        return {"models": pool.models(is_multimodal=False)}

    @app.post("/get_worker_address")
    async def get_worker_address(request: Request) -> dict[str, str]:
        worker = pool.choose((await read_json(request, ModelQuestion)).model)
        return {"address": worker.address.name if worker else ""}

    @app.post("/worker_get_status")
    async def worker_get_status() -> dict[str, Any]:
        return controller.status()

    @app.post("/worker_generate_stream")
    async def worker_generate_stream(request: Request) -> StreamingResponse:
        body = await read_body(request, MAX_REQUEST_BYTES)
        query = parse_body(ModelQuestion, body)
        return StreamingResponse(controller.relay(query.model, body))


def _no_worker(model: str, tried: Sequence[str]) -> str:
    if tried:
        return f"No answer: the worker broke off, and there is no other for {model!r}. Please ask again."
    return f"There is no worker for the model {model!r} now."


def _ends(request: Request) -> tuple[tuple[str, int], str]:
    """Give the connection's own end (address, port) and the peer's address."""
    server, client = request.scope.get("server"), request.client
    if not server or server[1] is None or client is None:
        raise Refusal(400, "Only connections over TCP are served.")
    return (server[0], server[1]), client.host


def main() -> None:
    """Run the controller."""
    setup_logging()
    settings = parse(ControllerSettings, description=__doc__ or "")
    try:
        app = build_app(settings)
    except (ValueError, OSError) as error:
        sys.exit(f"controller: {error}")
    serve(app, settings.host, settings.port)


if __name__ == "__main__":
    main()
