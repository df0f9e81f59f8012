"""An engine that is somewhere else: the replicas of a Ray Serve application, asked through their handle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from llava.data.inputs import NamedVideo
from llava.pipeline.findings import Finding, VideoFinding
from llava.pipeline.given import Image
from llava.serve.engine import Piece, Question
from llava.serve.refusals import Refused

log = logging.getLogger(__name__)
LOST = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError, BackPressureError)
ATTEMPTS = 2
WAIT_SECONDS = 0.1
T = TypeVar("T")


class RayEngine:
    """Answers questions as the engine of one replica does; which one, Ray Serve decides by how much they have to do.

    A replica that dies before its first piece is replaced once by another one; one that dies later ends the answer.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, name="ray-engine", daemon=True).start()

    def ask(self, question: Question, stop: Event) -> Iterator[Piece]:
        """Yield the verdict, then the text, as `Engine.ask` says. Raises Refused (503) when replicas die over it."""
        yield from _again(lambda: self._pieces(question, stop), stop)

    def findings(self, images: Sequence[Image]) -> list[Finding]:
        """Give a finding for each face, as `Engine.findings` says. Raises Refused (503) when replicas die over it."""
        return _once(lambda: self._handle.findings.remote(images).result())

    def video_finding(self, video: NamedVideo) -> VideoFinding:
        """Give the finding on a video, as `Engine.video_finding` says. Raises Refused (503) as `findings` does."""
        return _once(lambda: self._handle.video_finding.remote(video).result())

    def model_facts(self) -> dict[str, Any]:
        """Give what a case file says of the model. Raises Refused (503) as `findings` does."""
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
                    raise Refused(503, "What wrote this answer has failed; ask again in a moment.", 5.0) from None
            except RayTaskError as error:
                if isinstance(error.cause, ValueError):
                    raise ValueError(str(error.cause)) from None
                raise
    finally:
        stop.set()
