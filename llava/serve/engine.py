"""What answers questions behind every door of the server, the answer that a door makes of it, and the refusal."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from threading import Event
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from llava.core.types import Explanation, Turn, Verdict
from llava.pipeline.verdict import explanation, meaning

if TYPE_CHECKING:
    import numpy as np

    from llava.core.types import GenerationSettings
    from llava.data.inputs import Image, NamedVideo
    from llava.pipeline.verdict import Finding, VideoFinding

T = TypeVar("T")
WORDLESS = "This model gives verdicts and no words; a merged explainer (the output of stage 3) answers questions."
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    408: "request_timeout",
    413: "request_too_large",
    414: "request_too_large",
    415: "unsupported_media_type",
    422: "invalid_request_error",
    429: "rate_limit_exceeded",
    431: "request_too_large",
    500: "server_error",
    503: "overloaded",
}


class Refusal(ValueError):
    """A request that is not answered; `status` is one of KINDS, retry_after in seconds where waiting helps.

    parameter, code: what OpenAI's clients call the part that is wrong, and the mistake; None = as the status says.
    """

    def __init__(
        self,
        status: int,
        message: str,
        retry_after: float | None = None,
        parameter: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.parameter, self.code = parameter, code

    @property
    def content(self) -> dict[str, Any]:
        """Give the JSON reply, in the form that OpenAI clients read."""
        kind = KINDS[self.status]
        return {"error": {"message": str(self), "type": kind, "param": self.parameter, "code": self.code or kind}}

    @property
    def headers(self) -> dict[str, str]:
        """Give the headers of the reply."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        return headers


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """A conversation that ends with a question about one image, uint8 RGB (H, W, 3), None where none was sent.

    is_crop: the image is what a finding was made of (`Finding.pixels`), and is judged whole.
    """

    image: np.ndarray | None
    turns: Sequence[Turn]
    settings: GenerationSettings
    is_crop: bool = False

    def pixels(self) -> np.ndarray:
        """Give the image. Raises ValueError where there is none."""
        if self.image is None:
            raise ValueError("This model answers questions about one face image, and there is none; send one.")
        return self.image


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of an answer: the verdict, before any text; then text to append.

    evidence_map, seen: with the verdict, as `Finding` has them. tokens: written so far. prompt_tokens: read, with the
    verdict; 0 where there is nothing to be asked about. is_cut: with the last token, whether the answer ends there
    because of its limit, or because the model reads no more.
    """

    text: str = ""
    verdict: Verdict | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    is_cut: bool = False
    evidence_map: np.ndarray | None = None
    seen: float = 1.0


def joined(pieces: Sequence[Piece]) -> Piece:
    """Give pieces that follow each other as one."""
    first = next((piece for piece in pieces if piece.verdict is not None), pieces[0])
    text, tokens = "".join(piece.text for piece in pieces), max(piece.tokens for piece in pieces)
    return replace(first, text=text, tokens=tokens, is_cut=any(piece.is_cut for piece in pieces))


class Engine(Protocol):
    """Answers one conversation about one face image; may be asked from several threads at once."""

    @property
    def has_words(self) -> bool | None:
        """Say whether it writes words; a detector alone does not, and is asked for its verdicts in the same way.

        None where that is not known before its first verdict.
        """
        ...

    @property
    def scope(self) -> str:
        """Say what the model sees and what it has never seen; empty where nobody said, or not before a verdict."""
        ...

    def ask(self, question: Question, stop: Event) -> Iterator[Piece]:
        """Yield the verdict on the image's largest face, then the text; `stop` ends it soon.

        Where there is no verdict, there is no text, or that of `plain_pieces`. Raises ValueError for what can not be
        answered.
        """
        ...

    def findings(self, images: Sequence[Image]) -> list[Finding]:
        """Give a finding for each face of images, largest first, without words."""
        ...

    def video_finding(self, video: NamedVideo) -> VideoFinding:
        """Give the finding on the face that a video shows longest, without words. Raises ValueError where it cannot."""
        ...

    def model_facts(self) -> dict[str, Any]:
        """Give what a case file says of the model; see `llava.jobs.case_file.model_facts`."""
        ...


def plain_pieces(finding: Finding, turns: Sequence[Turn]) -> Iterator[Piece]:
    """Yield what a detector alone answers: the verdict, then a sentence that repeats it, or says why there is none.

    Further questions are told what answers questions. No token is read or written for any of it.
    """
    verdict = finding.verdict
    yield Piece(verdict=verdict, evidence_map=finding.evidence_map, seen=finding.seen)
    if verdict.p_fake is None:
        yield Piece(text=meaning(verdict))
    elif len(turns) > 1:
        yield Piece(text=WORDLESS)
    else:
        said = f"The detector's verdict is {verdict}; no language model wrote this. {verdict.scope_text}"
        yield Piece(text=said.rstrip())


class Answer:
    """One answer as it grows, put together from an engine's pieces in the same way for every door.

    verdict: of the finding that is asked about; None = the one that the engine begins with, about an image called
    `name` (None = as the engine calls it). stops: texts that end the answer before they are shown.
    """

    def __init__(
        self, question: str, verdict: Verdict | None = None, name: str | None = None, stops: Sequence[str] = ()
    ) -> None:
        self._question, self._name, self._stops = question, name, stops
        self._verdict, self._text = verdict, ""
        self._is_cut = False
        self.tokens = self.prompt_tokens = 0
        self.is_ended = False

    def add(self, piece: Piece) -> None:
        """Take the next piece."""
        if self._verdict is None and piece.verdict is not None:
            self._verdict = replace(piece.verdict, image=self._name or piece.verdict.image)
        self.tokens = max(self.tokens, piece.tokens)
        self.prompt_tokens = max(self.prompt_tokens, piece.prompt_tokens)
        self._is_cut = self._is_cut or piece.is_cut
        self._text += piece.text
        places = [place for stop in self._stops if (place := self._text.find(stop)) >= 0]
        if places:
            self._text, self.is_ended = self._text[: min(places)], True

    @property
    def verdict(self) -> Verdict:
        """Give the verdict. Raises ValueError before it is there: every answer begins with it."""
        if self._verdict is None:
            raise ValueError("The model gave no verdict; ask again, and look into the log of the server.")
        return self._verdict

    @property
    def text(self) -> str:
        """Give the words, without white space around them."""
        return self._text.strip()

    @property
    def shown(self) -> str:
        """Give `text` while it grows: without what may become a stop."""
        held = 0 if self.is_ended else max((_overlap(self._text, stop) for stop in self._stops), default=0)
        return self._text[: len(self._text) - held].strip()

    @property
    def explanation(self) -> Explanation:
        """Give the words beside the verdict."""
        return explanation(self.verdict, self._question, self.text)

    @property
    def usage(self) -> dict[str, int]:
        """Count tokens as OpenAI's clients expect it."""
        read, written = self.prompt_tokens, self.tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    @property
    def finish(self) -> str:
        """Say why the answer ended, as OpenAI's clients expect it."""
        return "length" if self._is_cut else "stop"


def _overlap(text: str, stop: str) -> int:
    """Count the letters at the end of a text with which a stop begins."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(eq=False)
class Call(Generic[T]):
    """Work for the thread that owns a model, and what becomes of it."""

    work: Callable[[], T]
    result: Future[T] = field(default_factory=Future)

    def run(self) -> None:
        """Do it, unless nobody waits for it any more, and hand over what it gives or raises."""
        if self.result.set_running_or_notify_cancel():
            try:
                self.result.set_result(self.work())
            except Exception as error:
                self.result.set_exception(error)


async def from_thread(
    produce: Callable[[], Iterator[T]], threads: Executor, stop: Event, seconds: float | None = None
) -> AsyncGenerator[list[T], None]:
    """Yield what `produce` yields in a thread, as it comes; what came while nobody looked comes together.

    Raises what is raised there, and TimeoutError after `seconds` (None = never). A reader that leaves sets `stop`,
    which the thread is to look at, and does not wait for it.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    items: list[T] = []

    def run() -> None:
        for item in produce():
            items.append(item)
            loop.call_soon_threadsafe(arrived.set)
            if stop.is_set():
                return

    ended = loop.run_in_executor(threads, run)
    ended.add_done_callback(lambda _: arrived.set())
    deadline = None if seconds is None else loop.time() + seconds
    try:
        while not ended.done() or items:
            async with asyncio.timeout_at(deadline):
                await arrived.wait()
            arrived.clear()
            if items:
                came = items[:]
                del items[: len(came)]  # the thread may have put in more since
                yield came
        ended.result()
    finally:
        stop.set()
        ended.cancel()
