"""The HTTP API as a Ray Serve application: an ingress with the guards, replicas that hold the model, one command.

`serve run llava.serve.ray_app:app model_path=... keys=...`; `m2f2 serve --ray true` runs the same on a Ray of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, NamedTuple, TypeVar

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from llava.core.cluster import keep_replicas_private
from llava.core.config import build as build_settings
from llava.core.runtime import log_json, setup_logging
from llava.core.weights import read_config
from llava.data.inputs import Image, NamedVideo
from llava.pipeline.settings import is_detector, load, model_folder
from llava.pipeline.verdict import Finding, VideoFinding
from llava.serve.engine import Piece, Question, Refusal, from_thread, joined
from llava.serve.options import ServeSettings
from llava.serve.options import build as build_api
from llava.serve.web import SHUTDOWN_SECONDS

log = logging.getLogger(__name__)

LOST = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError, BackPressureError)
ATTEMPTS = 2
WAIT_SECONDS = 0.1
T = TypeVar("T")
ANYWHERE = "0.0.0.0"  # `serve run` does not tell where Ray listens


class RayEngine:
    """Answers questions as the engine of one replica does; which one, Ray Serve decides by how much they have to do.

    A replica that dies before its first piece is replaced once by another one; one that dies later ends the answer.
    has_words, scope: of the replicas' model, as `Engine` says.
    """

    def __init__(self, handle: DeploymentHandle, has_words: bool, scope: str) -> None:
        self._handle, self.has_words, self.scope = handle, has_words, scope
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, name="ray-engine", daemon=True).start()

    def ask(self, question: Question, stop: Event) -> Iterator[Piece]:
        """Yield the verdict, then the text, as `Engine.ask` says. Raises Refusal (503) when replicas die over it."""
        yield from _again(lambda: self._pieces(question, stop), stop)

    def findings(self, images: Sequence[Image]) -> list[Finding]:
        """Give a finding for each face, as `Engine.findings` says. Raises Refusal (503) when replicas die over it."""
        return _once(lambda: self._handle.findings.remote(images).result())

    def video_finding(self, video: NamedVideo) -> VideoFinding:
        """Give the finding on a video, as `Engine.video_finding` says. Raises Refusal (503) as `findings` does."""
        return _once(lambda: self._handle.video_finding.remote(video).result())

    def model_facts(self) -> dict[str, Any]:
        """Give what a case file says of the model. Raises Refusal (503) as `findings` does."""
        return _once(lambda: self._handle.model_facts.remote().result())

    def _pieces(self, question: Question, stop: Event) -> Iterator[Piece]:
        """Yield what one replica says; `stop` frees its place there at once, also before the first piece."""
        said: SimpleQueue[Piece | None] = SimpleQueue()

        async def read() -> None:
            response = self._handle.options(stream=True).ask.remote(question)
            try:
                async for piece in response:
                    said.put(piece)
            except asyncio.CancelledError:
                response.cancel()
                raise

        reading = asyncio.run_coroutine_threadsafe(read(), self._loop)
        reading.add_done_callback(lambda _: said.put(None))
        try:
            while not stop.is_set():
                try:
                    piece = said.get(timeout=WAIT_SECONDS)
                except Empty:
                    continue
                if piece is None:
                    reading.result()
                    return
                yield piece
        finally:
            reading.cancel()


def _once(call: Callable[[], T]) -> T:
    """Give what a call gives, tried again as `_again` does."""
    (given,) = _again(lambda: iter([call()]), Event())
    return given


def _again(attempt: Callable[[], Iterator[T]], stop: Event) -> Iterator[T]:
    """Yield what an attempt yields; where a replica was lost before it yielded anything, of one more attempt.

    What a replica raised is raised here: a ValueError with its own words. A reader that goes away sets `stop`.
    """
    has_begun = False
    try:
        for left in reversed(range(ATTEMPTS)):
            try:
                for item in attempt():
                    has_begun = True
                    yield item
                return
            except LOST as error:
                log.warning("a replica was lost: %s", type(error).__name__)
                if has_begun or not left:
                    raise Refusal(503, "What wrote this answer has failed; ask again in a moment.", 5.0) from None
            except RayTaskError as error:
                if isinstance(error.cause, ValueError):
                    raise ValueError(str(error.cause)) from None
                raise
    finally:
        stop.set()


ENGINE, INGRESS = "engine", "ingress"  # a second model's is engine-2, and so on
COMMON: dict[str, Any] = {
    "logging_config": {"enable_access_log": False},
    "graceful_shutdown_timeout_s": SHUTDOWN_SECONDS,
    "graceful_shutdown_wait_loop_s": 0.5,
}


class EngineReplica:
    """Holds a model in a process of its own. Questions that arrive together are answered together by its engine."""

    def __init__(self, settings: ServeSettings, model: str) -> None:
        from llava.serve.batching import BatchConfig, BatchingEngine  # here, because only a replica needs PyTorch

        _set_up(settings)
        pipeline = load(settings, settings.models[model])
        self._engine, self._model = BatchingEngine(pipeline, BatchConfig(rows=settings.rows), model), model
        self._threads = ThreadPoolExecutor(_most_at_once(settings), thread_name_prefix="answer")

    async def ask(self, question: Question) -> AsyncIterator[Piece]:
        """Yield the pieces of an answer; a caller that goes away ends it."""
        stop, outcome = Event(), "caller left"
        pieces = from_thread(lambda: self._engine.ask(question, stop), self._threads, stop)
        try:
            async with aclosing(pieces) as said:
                async for together in said:
                    yield joined(together)
            outcome = "done"
        except Exception:
            outcome = "failed"
            raise
        finally:
            log.info("answer model=%s outcome=%s", self._model, outcome)

    async def findings(self, images: Sequence[Image]) -> list[Finding]:
        """Give a finding for each face of images."""
        return await asyncio.to_thread(self._engine.findings, images)

    async def video_finding(self, video: NamedVideo) -> VideoFinding:
        """Give the finding on a video."""
        return await asyncio.to_thread(self._engine.video_finding, video)

    async def model_facts(self) -> dict[str, Any]:
        """Give what a case file says of the model."""
        return await asyncio.to_thread(self._engine.model_facts)


def app(args: dict[str, Any]) -> Application:
    """Build the application for `serve run` and for Serve's config files, from settings of `m2f2 serve` by name.

    Raises ValueError without `keys` unless `allow_unauthenticated` is true: Ray decides where it listens, not we.
    """
    unfit = sorted({"host", "port", "cluster"} & args.keys())
    if unfit:
        raise ValueError(f"{unfit[0]}: this is a setting of Ray here; give it to `serve start` or `ray start`.")
    theirs = {"ray": True, "host": ANYWHERE, "cluster": {"address": "auto"}}
    return application(build_settings(ServeSettings, {**args, **theirs}))


def application(settings: ServeSettings) -> Application:
    """Give the application: a deployment for each model, and the ingress.

    The models' folders and the file of keys have to be there on every machine.
    """
    found = {name: _model_of(path) for name, path in settings.models.items()}
    settings = replace(
        settings,
        model_path=[str(each.folder.resolve()) for each in found.values()],
        model_name=list(found),
        keys=str(Path(settings.keys).resolve()) if settings.keys else None,
    )
    places = {name: f"{ENGINE}-{number + 1}" if number else ENGINE for number, name in enumerate(found)}

    def make_api() -> FastAPI:
        _set_up(settings)
        handles = {name: serve.get_deployment_handle(place) for name, place in places.items()}
        return build_api(settings, {n: RayEngine(handles[n], each.has_words, each.scope) for n, each in found.items()})

    engine = serve.deployment(EngineReplica).options(
        max_ongoing_requests=_most_at_once(settings),
        ray_actor_options=settings.cluster.resources,
        **_scale(settings),
        **COMMON,
    )
    engines = [engine.options(name=place).bind(settings, name) for name, place in places.items()]
    most = 10 * _most_at_once(settings) * settings.replica_range[1] * len(engines)
    ingress = serve.deployment(serve.ingress(make_api)()).options(
        name=INGRESS,
        num_replicas=1,  # it counts requests by key; more of them would each let the whole rate in
        max_ongoing_requests=most,  # its own gate says no earlier
        ray_actor_options={"num_cpus": 0},
        **COMMON,
    )
    return ingress.bind(*engines)


class _Model(NamedTuple):
    """A model that is served: its folder, whether it writes words, and what its detector says that it can see."""

    folder: Path
    has_words: bool
    scope: str


def _model_of(path: str) -> _Model:
    """Look into the folder of a model; a published one is converted first."""
    from llava.core.weights import shapes_only  # here, because the ingress needs no PyTorch
    from llava.detectors.base import from_description
    from llava.detectors.members import own_description

    folder = model_folder(path)
    config = read_config(folder)
    with shapes_only():
        return _Model(folder, not is_detector(config), from_description(own_description(config)).scope)


def _set_up(settings: ServeSettings) -> None:
    """Prepare the process of a replica."""
    setup_logging()
    if settings.log_json:
        log_json()
    if settings.cluster.is_private:
        keep_replicas_private()


def _scale(settings: ServeSettings) -> dict[str, Any]:
    """Say how many replicas there are, as Ray Serve names it."""
    fewest, most = settings.replica_range
    if fewest == most:
        return {"num_replicas": most}
    load = {"target_ongoing_requests": settings.rows, "upscale_delay_s": settings.upscale_seconds}
    return {"autoscaling_config": {"min_replicas": fewest, "max_replicas": most, **load}}


def _most_at_once(settings: ServeSettings) -> int:
    """Give how many questions one replica takes: those of its batch, and as many to fill the places that get free."""
    return 2 * settings.rows
