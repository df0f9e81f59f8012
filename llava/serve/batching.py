"""One thread that owns the model: questions that wait together are answered together, token by token.

A question may join while others are being answered. An image is looked at once, however many questions come about it;
the newest images are kept in memory for the next question.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from threading import Event, Lock, Semaphore, Thread
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from llava.core.config import setting
from llava.core.types import Turn, Verdict
from llava.explainer.decoding import Decoder, Prefix, Row
from llava.explainer.modeling import Encoded
from llava.explainer.sampling import GenerationSettings
from llava.pipeline.faces import Face, prepared
from llava.pipeline.findings import Finding
from llava.pipeline.pipeline import Image, Pipeline
from llava.serve.engine import Piece

log = logging.getLogger(__name__)
WAIT_SECONDS = 0.1
PREPARED_TOGETHER = 2  # images; the delivered versions of a large one take hundreds of megabytes


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How much is done at once."""

    rows: int = setting(16, "answers that are written side by side; further questions wait")
    images: int = setting(8, "newest images kept in memory for the next question, with what the model read of them")


@dataclass(eq=False)
class _Job:
    """A question on its way, and where its pieces go; `None` ends them, an exception is raised at the reader's.

    name: of the image. face: what was found in it and made ready, unless the image was looked at before.
    """

    image: np.ndarray
    name: str
    face: Future[Face] | None
    turns: Sequence[Turn]
    settings: GenerationSettings
    stop: Event
    pieces: SimpleQueue[Piece | BaseException | None] = field(default_factory=SimpleQueue)
    row: Row | None = None


@dataclass(eq=False)
class _Call:
    """Something else to do with the model between two tokens."""

    work: Callable[[], Any]
    result: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        """Do it, unless nobody waits for it any more, and hand over what it gives or raises."""
        if self.result.set_running_or_notify_cancel():
            try:
                self.result.set_result(self.work())
            except Exception as error:
                self.result.set_exception(error)


@dataclass(eq=False)
class _Seen:
    """An image that was looked at: its verdict, what the words need, and the prefixes that were run for it."""

    verdict: Verdict
    encoded: Encoded | None
    prefixes: dict[tuple[int, ...], Prefix] = field(default_factory=dict)


class BatchingEngine:
    """Answers questions about images; `ask` may be called from any thread. Close it to end its own thread."""

    def __init__(self, pipeline: Pipeline, config: BatchConfig | None = None) -> None:
        self.pipeline, self.config = pipeline, config or BatchConfig()
        explainer = pipeline.needed_explainer()
        self.decoder = Decoder(explainer.model, explainer.processor)
        self._waiting: SimpleQueue[_Job | _Call | None] = SimpleQueue()
        self._active: list[_Job] = []
        self._seen: OrderedDict[str, _Seen] = OrderedDict()
        self._faces: WeakValueDictionary[str, Future[Face]] = WeakValueDictionary()
        self._preparing, self._few = Lock(), Semaphore(PREPARED_TOGETHER)
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def ask(
        self, image: np.ndarray | None, turns: Sequence[Turn], settings: GenerationSettings, stop: Event
    ) -> Iterator[Piece]:
        """Yield the verdict, then the text, as `Engine.ask` says; a reader that goes away ends it, too."""
        if image is None:
            raise ValueError("This model answers questions about one face image, and there is none; send one.")
        name = _digest(image)
        job = _Job(image, name, self._prepared(name, image), turns, settings, stop)
        self._waiting.put(job)
        try:
            while (piece := _next(job)) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            stop.set()

    def findings(self, images: Sequence[Image]) -> list[Finding]:
        """Give a finding for each face of images, without words, as `Engine.findings` says."""
        call = _Call(lambda: list(self.pipeline.findings(images)))
        self._waiting.put(call)
        result: list[Finding] = call.result.result()
        return result

    def close(self) -> None:
        """End the thread; questions on their way are not finished."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (jobs := self._take()) is not None:
            try:
                self._begin(jobs)
                self._tell()
                if self._active:
                    self.decoder.step()
                    self._tell()
            except Exception as error:
                log.exception("the batch of %d answers failed", len(self._active))
                self._fail([*jobs, *self._active], error)

    def _take(self) -> list[_Job] | None:
        """Give the questions that may join now, waiting only when there is nothing to do; None = close."""
        jobs: list[_Job] = []
        while len(self._active) + len(jobs) < self.config.rows:
            try:
                job = self._waiting.get(block=not (self._active or jobs))
            except Empty:
                break
            if job is None:
                return None
            if isinstance(job, _Call):
                job.run()
            elif not job.stop.is_set():
                jobs.append(job)
        return jobs

    def _begin(self, jobs: Sequence[_Job]) -> None:
        """Look at the images of new questions, tell their verdicts, and let them into the batch."""
        asked = []
        for job, seen in zip(jobs, self._look(jobs), strict=True):
            try:
                ids, suffix = self.decoder.split(job.turns, job.settings)
                row = Row(
                    settings=self._within_context(job.settings, len(ids) + len(suffix)), suffix=suffix, prefix=None
                )
            except (ValueError, TypeError) as error:  # a tokeniser raises TypeError for what is no text
                job.pieces.put(error)
                continue
            if seen.encoded is None:
                job.pieces.put(Piece(verdict=seen.verdict))
                job.pieces.put(None)
                continue
            job.pieces.put(Piece(verdict=seen.verdict, prompt_tokens=len(ids) + len(suffix)))
            asked.append((job, seen, ids, row))
        self._run_prefixes([(seen, ids) for _, seen, ids, _ in asked])
        for job, seen, ids, row in asked:
            row.prefix, job.row = seen.prefixes[ids], row
        self.decoder.join([job.row for job, *_ in asked if job.row is not None])
        self._active += [job for job, *_ in asked]

    def _prepared(self, name: str, image: np.ndarray) -> Future[Face] | None:
        """Find the face and make it ready in the thread that asks, once for all who ask about the same new image."""
        with self._preparing:
            if name in self._seen:
                return None
            face = self._faces.get(name)
            is_first = face is None
            if face is None:
                face = self._faces[name] = Future()
        if is_first:
            try:
                face.set_result(self._face(image))
            except Exception as error:
                face.set_exception(error)
        face.result()
        return face

    def _face(self, image: np.ndarray) -> Face:
        with self._few:
            return prepared(self.pipeline.face_of(image), self.pipeline.needed_explainer(), self.pipeline.stability)

    def _within_context(self, settings: GenerationSettings, length: int) -> GenerationSettings:
        """Shorten an answer to what the model has room for. Raises ValueError when the conversation fills it."""
        room = self.decoder.model.config.text_config.max_position_embeddings - length
        if room < 1:
            raise ValueError(f"The conversation has {length} tokens, more than the model reads; begin a new one.")
        return replace(settings, max_new_tokens=min(settings.max_new_tokens, room))

    def _run_prefixes(self, wanted: Sequence[tuple[_Seen, tuple[int, ...]]]) -> None:
        """Run the prefixes that no earlier question needed."""
        new = list(dict.fromkeys((seen, ids) for seen, ids in wanted if ids not in seen.prefixes))
        images = [seen.encoded for seen, _ in new if seen.encoded is not None]
        for (seen, ids), prefix in zip(new, self.decoder.prefixes_of([ids for _, ids in new], images), strict=True):
            seen.prefixes[ids] = prefix

    def _look(self, jobs: Sequence[_Job]) -> list[_Seen]:
        """Give what was seen in each question's image; new images are looked at as one batch."""
        new = {job.name: job for job in jobs if job.name not in self._seen}
        if new:
            faces = [job.face.result() if job.face else self._face(job.image) for job in new.values()]
            found, encoded = self.pipeline.look(faces, self.pipeline.stability)
            places = iter(range(len(new)))
            for name, finding in zip(new, found, strict=True):
                row = encoded.take([next(places)]) if encoded is not None and finding.pixels is not None else None
                self._seen[name] = _Seen(finding.verdict, row)
        seen = [self._seen[job.name] for job in jobs]
        for job in jobs:
            job.face = None
            self._seen.move_to_end(job.name)
        while len(self._seen) > self.config.images:
            self._seen.popitem(last=False)
        return seen

    def _tell(self) -> None:
        """Hand out what was written, and let go of answers that are done or that nobody waits for."""
        finished = []
        for job in self._active:
            assert job.row is not None
            if (new := self.decoder.news(job.row)) or job.row.is_done:  # the last tokens count, shown or not
                job.pieces.put(Piece(text=new, tokens=len(job.row.ids)))
            if job.row.is_done or job.stop.is_set():
                finished.append(job)
        if finished:
            self._active = [job for job in self._active if job not in finished]
            self.decoder.leave([job.row for job in finished if job.row is not None])
        for job in finished:
            job.pieces.put(None)

    def _fail(self, jobs: Sequence[_Job], error: Exception) -> None:
        """Tell everyone in the batch what went wrong, and begin with an empty one."""
        self._active = []
        self.decoder.leave(list(self.decoder.rows))
        for job in jobs:
            job.pieces.put(error)


def _next(job: _Job) -> Piece | BaseException | None:
    """Wait for a question's next piece; None also when it is given up before it was begun."""
    while True:
        try:
            return job.pieces.get(timeout=WAIT_SECONDS)
        except Empty:
            if job.stop.is_set() and job.row is None:
                return None


def _digest(image: np.ndarray) -> str:
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()
