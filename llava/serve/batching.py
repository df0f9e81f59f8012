"""One thread that owns the model: questions that wait together are answered together, token by token.

A question may join while others are being answered. An image is looked at once, however many questions come about it;
the newest images are kept in memory for the next question.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from queue import Empty, SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Any, TypeVar

from llava.core.config import setting
from llava.core.types import Turn
from llava.data.inputs import NamedVideo
from llava.explainer.decoding import Decoder, Row
from llava.explainer.sampling import GenerationSettings
from llava.pipeline.findings import Finding, VideoFinding
from llava.pipeline.given import Image
from llava.pipeline.pipeline import Pipeline
from llava.serve.engine import Piece, Question
from llava.serve.looks import Asked, Looks, Seen

T = TypeVar("T")
log = logging.getLogger(__name__)
WAIT_SECONDS = 0.1
VIDEOS_TOGETHER = 2  # whose frames are read at a time


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How much is done at once."""

    rows: int = setting(16, "answers that are written side by side; further questions wait")
    images: int = setting(8, "newest images kept in memory for the next question, with what the model read of them")


@dataclass(eq=False)
class _Job:
    """A question on its way, and where its pieces go; `None` ends them, an exception is raised at the reader's."""

    about: Asked
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


class BatchingEngine:
    """Answers questions about images; `ask` may be called from any thread. Close it to end its own thread."""

    def __init__(self, pipeline: Pipeline, config: BatchConfig | None = None) -> None:
        self.pipeline, self.config = pipeline, config or BatchConfig()
        explainer = pipeline.needed_explainer()
        self.decoder = Decoder(explainer.model, explainer.processor)
        self._waiting: SimpleQueue[_Job | _Call | None] = SimpleQueue()
        self._active: list[_Job] = []
        self.looks = Looks(pipeline, self.config.images)
        self._videos = Semaphore(VIDEOS_TOGETHER)
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def ask(self, question: Question, stop: Event) -> Iterator[Piece]:
        """Yield the verdict, then the text, as `Engine.ask` says; a reader that goes away ends it, too."""
        about = self.looks.asked(question.pixels(), question.is_crop)
        job = _Job(about, question.turns, question.settings, stop)
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
        found: list[Finding] = []
        for faces in self.looks.ready(images):
            found += self._call(partial(self.looks.judged, faces))
        return found

    def video_finding(self, video: NamedVideo) -> VideoFinding:
        """Give the finding on a video, as `Engine.video_finding` says; the engine's thread sees its faces alone."""
        with self._videos:
            return self.pipeline.video_finding(video, look=lambda faces: self._call(partial(self.pipeline.look, faces)))

    def model_facts(self) -> dict[str, Any]:
        """Give what a case file says of the model; its weight files are read at the first call alone."""
        return self._facts

    @cached_property
    def _facts(self) -> dict[str, Any]:
        from llava.pipeline.cases import model_facts  # here, because only a case file needs matplotlib and Jinja

        return model_facts(self.pipeline)

    def close(self) -> None:
        """End the thread; questions on their way are not finished."""
        self._waiting.put(None)
        self._thread.join()

    def _call(self, work: Callable[[], T]) -> T:
        """Have the engine's thread do something between two tokens, and wait for what it gives or raises."""
        call = _Call(work)
        self._waiting.put(call)
        result: T = call.result.result()
        return result

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
        for job, seen in zip(jobs, self.looks.at([job.about for job in jobs]), strict=True):
            try:
                ids, suffix = self.decoder.split(job.turns, job.settings)
                row = Row(
                    settings=self._within_context(job.settings, len(ids) + len(suffix)), suffix=suffix, prefix=None
                )
            except (ValueError, TypeError) as error:  # a tokeniser raises TypeError for what is no text
                job.pieces.put(error)
                continue
            found = seen.finding
            if seen.encoded is None:
                job.pieces.put(Piece(verdict=found.verdict))
                job.pieces.put(None)
                continue
            read = len(ids) + len(suffix)
            told = Piece(verdict=found.verdict, evidence_map=found.evidence_map, seen=found.seen, prompt_tokens=read)
            job.pieces.put(told)
            asked.append((job, seen, ids, row))
        self._run_prefixes([(seen, ids) for _, seen, ids, _ in asked])
        for job, seen, ids, row in asked:
            row.prefix, job.row = seen.prefixes[ids], row
        self.decoder.join([job.row for job, *_ in asked if job.row is not None])
        self._active += [job for job, *_ in asked]

    def _within_context(self, settings: GenerationSettings, length: int) -> GenerationSettings:
        """Shorten an answer to what the model has room for. Raises ValueError when the conversation fills it."""
        room = self.decoder.model.config.text_config.max_position_embeddings - length
        if room < 1:
            raise ValueError(f"The conversation has {length} tokens, more than the model reads; begin a new one.")
        return replace(settings, max_new_tokens=min(settings.max_new_tokens, room))

    def _run_prefixes(self, wanted: Sequence[tuple[Seen, tuple[int, ...]]]) -> None:
        """Run the prefixes that no earlier question needed."""
        new = list(dict.fromkeys((seen, ids) for seen, ids in wanted if ids not in seen.prefixes))
        images = [seen.encoded for seen, _ in new if seen.encoded is not None]
        for (seen, ids), prefix in zip(new, self.decoder.prefixes_of([ids for _, ids in new], images), strict=True):
            seen.prefixes[ids] = prefix

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
