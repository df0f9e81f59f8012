"""One thread that owns the model: questions that wait together are answered together, token by token.

A question may join while others are being answered. An image is looked at once, however many questions come about it;
the newest images are kept in memory for the next question. Of a detector alone verdicts are all there is to answer.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from queue import Empty, SimpleQueue
from threading import Event, Lock, Semaphore, Thread
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from llava.core.config import setting
from llava.core.types import GenerationSettings, Turn
from llava.data.inputs import Image, NamedVideo
from llava.pipeline.crops import Face, prepared
from llava.pipeline.pipeline import Pipeline
from llava.pipeline.verdict import Finding, VideoFinding
from llava.serve.engine import Call, Piece, Question, Refusal, plain_pieces

if TYPE_CHECKING:
    from llava.explainer.generation import Prefix, Row
    from llava.explainer.modeling import Encoded

log = logging.getLogger(__name__)
T = TypeVar("T")
WAIT_SECONDS = 0.1
ENDING = "The server ends; ask again when it is back."
READING = Semaphore(2)  # videos whose frames are read at a time in a process, for all its models
# Images at a time in a process, for all its models: the delivered versions of a large one take hundreds of megabytes.
PREPARING = Semaphore(2)


@dataclass(eq=False)
class Observation:
    """An image that was looked at: the finding, what the words need, and the prefixes that were run for it."""

    finding: Finding
    encoded: Encoded | None
    prefixes: dict[tuple[int, ...], Prefix] = field(default_factory=dict)


@dataclass(eq=False)
class Inquiry:
    """An image that is asked about.

    is_crop: it is judged whole. face: found and made ready in the thread that asks; None = it was seen before.
    """

    image: np.ndarray
    is_crop: bool
    name: str
    face: Future[Face] | None


class Observations:
    """Looks at images with a pipeline and keeps the newest `most` of them, and as many faces, in memory.

    `inquiry` and `ready` may be called from any thread, `at` and `judged` from the one that owns the model.
    """

    def __init__(self, pipeline: Pipeline, most: int) -> None:
        self._pipeline, self._most = pipeline, most
        self.images: OrderedDict[str, Observation] = OrderedDict()
        self._faces: OrderedDict[str, Observation] = OrderedDict()
        self._coming: WeakValueDictionary[str, Future[Face]] = WeakValueDictionary()
        self._entry = Lock()

    def inquiry(self, image: np.ndarray, is_crop: bool = False) -> Inquiry:
        """Find the face and make it ready, once for all who ask about the same new image."""
        name = f"{_digest(image)} {is_crop}"
        with self._entry:
            if name in self.images:
                return Inquiry(image, is_crop, name, None)
            face = self._coming.get(name)
            is_first = face is None
            if face is None:
                face = self._coming[name] = Future()
        if is_first:
            try:
                with PREPARING:
                    face.set_result(self._ready(image, is_crop))
            except Exception as error:
                face.set_exception(error)
        face.result()
        return Inquiry(image, is_crop, name, face)

    def at(self, inquiries: Sequence[Inquiry]) -> list[Observation]:
        """Give what was seen of the largest face of each image; new ones are looked at as one batch."""
        new = {each.name: each for each in inquiries if each.name not in self.images}
        faces = {
            name: each.face.result() if each.face else self._ready(each.image, each.is_crop)
            for name, each in new.items()
        }
        self.images |= zip(faces, self._observed(list(faces.values())), strict=True)
        known = [self.images[each.name] for each in inquiries]
        for each in inquiries:
            each.face = None  # what was made ready takes memory
        _keep_newest(self.images, [each.name for each in inquiries], self._most)
        return known

    def ready(self, images: Sequence[Image]) -> Iterator[list[Face]]:
        """Yield the faces of images, found and made ready, batch by batch; few callers hold one at a time."""
        faces = self._pipeline.faces_in(images)
        while True:
            with PREPARING:
                batch = [self._prepared(face) for face in islice(faces, self._pipeline.batch_size)]
                if not batch:
                    return
                yield batch

    def judged(self, faces: Sequence[Face]) -> list[Finding]:
        """Give the findings of faces, and keep what was seen for questions about them."""
        return [sight.finding for sight in self._observed(faces)]

    def _ready(self, image: np.ndarray, is_crop: bool) -> Face:
        return self._prepared(Face(image="image 0", pixels=image) if is_crop else self._pipeline.face_of(image))

    def _prepared(self, face: Face) -> Face:
        """Give a face with all that the model reads of it, unless the same pixels were judged before."""
        if face.pixels is not None and _digest(face.pixels) in self._faces:
            return face
        return prepared(face, self._pipeline.pixels, self._pipeline.stability)

    def _observed(self, faces: Sequence[Face]) -> list[Observation]:
        """Give what was seen of faces, and keep it; those that are new are looked at as one batch."""
        known = [self._known(face) for face in faces]
        new = [face for face, before in zip(faces, known, strict=True) if before is None]
        looked = _pairs(*self._pipeline.look(new, self._pipeline.stability)) if new else iter(())
        observations = [before or Observation(*next(looked)) for before in known]
        for each in observations:
            if each.finding.pixels is not None:
                name = _digest(each.finding.pixels)
                self._faces[name] = each
                _keep_newest(self._faces, [name], self._most)
        return observations

    def _known(self, face: Face) -> Observation | None:
        """Give what was seen when the same pixels were judged before, under the name and place of this face."""
        before = None if face.pixels is None else self._faces.get(_digest(face.pixels))
        if before is None:
            return None
        verdict = replace(
            before.finding.verdict, image=face.image, face=face.number, face_count=face.count, **face.place
        )
        return Observation(replace(before.finding, verdict=verdict), before.encoded, before.prefixes)


def _pairs(found: Sequence[Finding], encoded: Encoded | None) -> Iterator[tuple[Finding, Encoded | None]]:
    """Yield each finding with its own row of what the explainer made of those that have pixels."""
    rows = iter(range(len(found)))
    for finding in found:
        yield finding, None if encoded is None or finding.pixels is None else encoded.take([next(rows)])


def _keep_newest(kept: OrderedDict[str, Observation], used: Sequence[str], most: int) -> None:
    """Count what was used as newest, and let go of the oldest beyond `most`."""
    for name in used:
        kept.move_to_end(name)
    while len(kept) > most:
        kept.popitem(last=False)


def _digest(image: np.ndarray) -> str:
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How much is done at once."""

    rows: int = setting(16, "answers that are written side by side; further questions wait")
    images: int = setting(8, "newest images kept in memory for the next question, with what the model read of them")


@dataclass(eq=False)
class _Job:
    """A question on its way, and where its pieces go; `None` ends them, an exception is raised at the reader's."""

    about: Inquiry
    turns: Sequence[Turn]
    settings: GenerationSettings
    stop: Event
    pieces: SimpleQueue[Piece | BaseException | None] = field(default_factory=SimpleQueue)
    row: Row | None = None

    def end(self, *pieces: Piece) -> None:
        """Hand over the last pieces."""
        for piece in (*pieces, None):
            self.pieces.put(piece)


class BatchingEngine:
    """Answers questions about images; `ask` may be called from any thread. Close it to end its own thread.

    model: its name, for the log. decoder: writes the words; a detector alone has none.
    """

    def __init__(self, pipeline: Pipeline, config: BatchConfig | None = None, model: str = "model") -> None:
        self.pipeline, self.config, self.model = pipeline, config or BatchConfig(), model
        self.has_words, self.scope = pipeline.explainer is not None, pipeline.detector.scope
        if pipeline.explainer is not None:
            from llava.explainer.generation import Decoder  # here, because a detector needs no language model

            self.decoder = Decoder(pipeline.explainer.model, pipeline.explainer.processor)
        self._waiting: SimpleQueue[_Job | Call[Any] | None] = SimpleQueue()
        self._active: list[_Job] = []
        self._entry, self._is_closing = Lock(), False
        self.observations = Observations(pipeline, self.config.images)
        self._thread = Thread(target=self._run, name=f"engine of {model}", daemon=True)
        self._thread.start()

    def ask(self, question: Question, stop: Event) -> Iterator[Piece]:
        """Yield the verdict, then the text, as `Engine.ask` says; a reader that goes away ends it, too."""
        about = self.observations.inquiry(question.pixels(), question.is_crop)
        job = _Job(about, question.turns, question.settings, stop)
        self._wait(job)
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
        for faces in self.observations.ready(images):
            found += self._call(partial(self.observations.judged, faces))
        return found

    def video_finding(self, video: NamedVideo) -> VideoFinding:
        """Give the finding on a video, as `Engine.video_finding` says; the engine's thread sees its faces alone."""
        with READING:
            return self.pipeline.video_finding(video, look=lambda faces: self._call(partial(self.pipeline.look, faces)))

    def model_facts(self) -> dict[str, Any]:
        """Give what a case file says of the model; its weight files are read at the first call alone."""
        return self._facts

    @cached_property
    def _facts(self) -> dict[str, Any]:
        from llava.jobs.case_file import model_facts  # here, because only a case file needs matplotlib and Jinja

        return model_facts(self.pipeline)

    def close(self) -> None:
        """End the thread soon; what is on its way, waits or is asked afterwards ends with an error."""
        with self._entry:
            self._is_closing = True
            self._waiting.put(None)  # wakes it
        self._thread.join()

    def _wait(self, work: _Job | Call[Any]) -> None:
        """Put something to do behind all else. Raises Refusal (503) when the engine ends."""
        with self._entry:
            if self._is_closing:
                raise Refusal(503, ENDING, 10.0)
            self._waiting.put(work)

    def _call(self, work: Callable[[], T]) -> T:
        """Have the engine's thread do something between two tokens, and wait for what it gives or raises."""
        call = Call(work)
        self._wait(call)
        return call.result.result()

    def _run(self) -> None:
        while (jobs := self._take()) is not None:
            try:
                self._begin(jobs)
                self._tell()
                if self._active:
                    self.decoder.step()
                    self._tell()
            except Exception as error:
                log.exception("the batch of %d answers of %s failed", len(self._active), self.model)
                self._fail([*jobs, *self._active], error)
        self._turn_away()

    def _turn_away(self) -> None:
        """Tell everyone who is answered or waits that the engine ends."""
        error = Refusal(503, ENDING, 10.0)
        self._fail(self._active, error)
        while True:
            try:
                left = self._waiting.get_nowait()
            except Empty:
                return
            if isinstance(left, Call):
                left.result.set_exception(error)
            elif left is not None:
                left.pieces.put(error)

    def _take(self) -> list[_Job] | None:
        """Give the questions that may join now, waiting only when there is nothing to do; None = close."""
        jobs: list[_Job] = []
        while not self._is_closing and len(self._active) + len(jobs) < self.config.rows:
            try:
                job = self._waiting.get(block=not (self._active or jobs))
            except Empty:
                break
            if isinstance(job, Call):
                job.run()
            elif job is not None and not job.stop.is_set():
                jobs.append(job)
        return None if self._is_closing and not jobs else jobs

    def _begin(self, jobs: Sequence[_Job]) -> None:
        """Look at the images of new questions, tell their verdicts, and let those that get words into the batch."""
        seen = zip(jobs, self.observations.at([job.about for job in jobs]), strict=True)
        if not self.has_words:
            for job, sight in seen:
                job.end(*plain_pieces(sight.finding, job.turns))
            return
        from llava.explainer.generation import Row

        begun = []
        for job, sight in seen:
            try:
                ids, suffix = self.decoder.split(job.turns, job.settings)
                read = len(ids) + len(suffix)
                row = Row(settings=self._within_context(job.settings, read), suffix=suffix, prefix=None)
            except (ValueError, TypeError) as error:  # a tokeniser raises TypeError for what is no text
                job.pieces.put(error)
                continue
            found = sight.finding
            first = Piece(verdict=found.verdict, evidence_map=found.evidence_map, seen=found.seen, prompt_tokens=read)
            if sight.encoded is None or not found.has_grounds:
                why = "" if found.verdict.p_fake is None else f"No reasons can be given: {found.verdict.reason}."
                job.end(replace(first, prompt_tokens=0), *([Piece(text=why)] if why else []))
                continue
            job.pieces.put(first)
            begun.append((job, sight, ids, row))
        self._run_prefixes([(sight, ids) for _, sight, ids, _ in begun])
        for job, sight, ids, row in begun:
            row.prefix, job.row = sight.prefixes[ids], row
        self.decoder.join([job.row for job, *_ in begun if job.row is not None])
        self._active += [job for job, *_ in begun]

    def _within_context(self, settings: GenerationSettings, length: int) -> GenerationSettings:
        """Shorten an answer to what the model has room for. Raises ValueError when the conversation fills it."""
        room = self.decoder.model.config.text_config.max_position_embeddings - length
        if room < 1:
            raise ValueError(f"The conversation has {length} tokens, more than the model reads; begin a new one.")
        return replace(settings, max_new_tokens=min(settings.max_new_tokens, room))

    def _run_prefixes(self, wanted: Sequence[tuple[Observation, tuple[int, ...]]]) -> None:
        """Run the prefixes that no earlier question needed."""
        new = list(dict.fromkeys((sight, ids) for sight, ids in wanted if ids not in sight.prefixes))
        images = [sight.encoded for sight, _ in new if sight.encoded is not None]
        for (sight, ids), prefix in zip(new, self.decoder.prefixes_of([ids for _, ids in new], images), strict=True):
            sight.prefixes[ids] = prefix

    def _tell(self) -> None:
        """Hand out what was written, and let go of answers that are done or that nobody waits for."""
        finished = []
        for job in self._active:
            assert job.row is not None
            if (new := self.decoder.news(job.row)) or job.row.is_done:  # the last tokens count, shown or not
                is_cut = len(job.row.ids) >= job.row.settings.max_new_tokens
                job.pieces.put(Piece(text=new, tokens=len(job.row.ids), is_cut=is_cut))
            if job.row.is_done or job.stop.is_set():
                finished.append(job)
        if finished:
            self._active = [job for job in self._active if job not in finished]
            self.decoder.leave([job.row for job in finished if job.row is not None])
        for job in finished:
            job.end()

    def _fail(self, jobs: Sequence[_Job], error: Exception) -> None:
        """Tell everyone in the batch what went wrong, and begin with an empty one."""
        self._active = []
        if self.has_words:
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
