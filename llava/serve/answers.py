"""One request of a worker: the image is read, the engine asked, its pieces become chunks."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from threading import Event
from typing import Any

from llava.core.types import Turn, Verdict
from llava.explainer.sampling import GenerationSettings
from llava.pipeline.agreement import explanation
from llava.pipeline.wording import meaning
from llava.serve.engine import Engine, Piece, Question, joined
from llava.serve.protocol import (
    GREEDY_UP_TO,
    MAX_NEW_TOKENS,
    Chunk,
    ErrorCode,
    GenerateRequest,
    encode_chunk,
    error_chunk,
)
from llava.serve.refusals import Refused
from llava.serve.streams import StopAt, from_thread
from llava.serve.uploads import read_still

log = logging.getLogger(__name__)
BUSY = "Too many requests wait here; please try again in a minute."


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
        """Raise Refused when so many requests run and wait that there is no room for one more."""
        if self.queue_length >= self._most:
            raise Refused(503, BUSY)

    async def answer(self, asked: GenerateRequest, turns: Sequence[Turn], request_id: str) -> AsyncIterator[bytes]:
        """Yield the chunks of an answer: the verdict, then the text as it grows; an error is the last chunk."""
        if self.queue_length >= self._most:  # asked again, because others came while the body was read
            yield error_chunk(ErrorCode.FAILED, BUSY)
            return
        started = time.monotonic()
        writer = _Writer(asked, turns[-1].text)
        outcome = "client left"
        self.queue_length += 1
        try:
            async with aclosing(self._chunks(asked, turns, writer, started)) as chunks:
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
            log.info(line, request_id, self._model, seconds, writer.tokens, outcome)

    async def _chunks(
        self, asked: GenerateRequest, turns: Sequence[Turn], writer: _Writer, started: float
    ) -> AsyncGenerator[Chunk, None]:
        """Wait for a slot, then yield what the engine says. Raises TimeoutError when all of it takes too long."""
        stop = Event()
        async with asyncio.timeout(self._seconds):
            await self._slots.acquire()
        try:
            left = self._seconds - (time.monotonic() - started)
            async with aclosing(
                from_thread(lambda: self._pieces(asked, turns, stop), self._threads, stop, left)
            ) as said:
                async for pieces in said:
                    for chunk in writer.take(joined(pieces)):
                        yield chunk
                    if writer.is_ended:
                        break
        finally:
            self._slots.release()
        for chunk in writer.finish():
            yield chunk

    def _pieces(self, asked: GenerateRequest, turns: Sequence[Turn], stop: Event) -> Iterator[Piece]:
        """Read the image, then ask the engine; runs in a thread."""
        content = asked.image()
        image = None if content is None else read_still(content, "the image").pixels
        settings = GenerationSettings(
            max_new_tokens=min(asked.max_new_tokens, MAX_NEW_TOKENS),
            temperature=asked.temperature if asked.temperature > GREEDY_UP_TO else 0.0,
            top_p=asked.top_p,
            seed=secrets.randbits(63) if asked.seed is None else asked.seed,
        )
        question = Question(image=image, turns=turns, settings=settings, is_crop=asked.is_crop)
        return self._engine.ask(question, stop)


class _Writer:
    """Turns the pieces of an answer into chunks, each with the whole text so far after `prefix`."""

    def __init__(self, asked: GenerateRequest, question: str) -> None:
        self.tokens = 0
        self._prefix = asked.prompt if asked.echo else ""
        self._has_map = asked.evidence_map
        self._question = question
        self._text = StopAt(asked.stops)
        self._sent = ""
        self._verdict: Verdict | None = None

    @property
    def is_ended(self) -> bool:
        """Whether a text was written that ends the answer."""
        return self._text.is_reached

    def take(self, piece: Piece) -> Iterator[Chunk]:
        """Yield the chunk of one piece, if it has anything new to show."""
        self.tokens = max(self.tokens, piece.tokens)
        if piece.verdict is not None:
            self._verdict = piece.verdict
            yield Chunk(text=self._prefix, error_code=ErrorCode.OK, verdict=piece.verdict.to_dict(), **self._map(piece))
        self._text.feed(piece.text)
        shown = self._text.shown()
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
        text, remark = self._text.shown(is_last=True), ""
        if self._verdict is not None and self._verdict.p_fake is None:
            text = meaning(self._verdict)
        elif self._verdict is not None:
            remark = explanation(self._verdict, self._question, text).remark
        if remark:
            yield Chunk(text=self._prefix + text, error_code=ErrorCode.OK, remark=remark)
        elif text != self._sent:
            yield Chunk(text=self._prefix + text, error_code=ErrorCode.OK)
