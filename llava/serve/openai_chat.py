"""What OpenAI's chat clients send and expect: a conversation about one image, an answer in one piece or a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from threading import Event
from typing import Any, Literal, TypeVar
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llava.core.types import GenerationSettings, Turn, Verdict
from llava.serve.refusals import Refused

T = TypeVar("T")


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


class StopAt:
    """Gives a growing text up to the first of some texts that end it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._text = ""
        self.is_reached = False

    def feed(self, text: str) -> None:
        """Take more text in."""
        self._text += text
        found = [at for stop in self._stops if (at := self._text.find(stop)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.is_reached = True

    def shown(self, is_last: bool = False) -> str:
        """Give the text without white space at its end, and unless it is the last, without what may become a stop."""
        if is_last or self.is_reached:
            return self._text.rstrip()
        held = max((_overlap(self._text, stop) for stop in self._stops), default=0)
        return self._text[: len(self._text) - held].rstrip()


def _overlap(text: str, stop: str) -> int:
    """Count the letters at the end of a text with which a stop begins."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)


MAX_TEXT = 8_000  # characters of one message
MAX_CONVERSATION = 64_000  # characters of all messages, as for a worker; they are read in the engine's one thread
MAX_TOKENS = 1_024
SYSTEM_NOTE = "The system message was not used: the model has one of its own."


class ImageUrl(BaseModel):
    """Where a picture is: a data URI or a public https address."""

    url: str = Field(max_length=40_000_000)


class Part(BaseModel):
    """A piece of a message."""

    type: Literal["text", "image_url"]
    text: str | None = Field(None, max_length=MAX_TEXT)
    image_url: ImageUrl | None = None


class Message(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part] = Field(max_length=MAX_TEXT)


class ChatRequest(BaseModel):
    """A request to /v1/chat/completions; settings that would change the answer and are not known are refused."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(max_length=200)
    messages: list[Message] = Field(min_length=1, max_length=64)
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float = Field(0.0, ge=0, le=2, description="0, the default here, writes the same answer every time")
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=2**63)
    n: Literal[1] = 1
    user: str | None = Field(None, max_length=200)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, sent: Any) -> Any:
        """Take `null` as a setting that was not sent, as OpenAI does."""
        return {name: value for name, value in sent.items() if value is not None} if isinstance(sent, dict) else sent

    def generation(self, limit: int = 256) -> GenerationSettings:
        """Give the settings of the answer; `limit` tokens where the request says none."""
        tokens = self.max_completion_tokens or self.max_tokens or limit
        return GenerationSettings(max_new_tokens=tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed)

    def conversation(self) -> tuple[str, list[Turn], list[str]]:
        """Give the address of the one image, the turns without it, and notes on what was not used.

        Raises Refused (400) unless user and assistant alternate, a user asks last, there is exactly one image, and text
        has its limits.
        """
        notes = [SYSTEM_NOTE] if any(message.role == "system" for message in self.messages) else []
        said = [message for message in self.messages if message.role != "system"]
        images = [part.image_url.url for message in said for part in _parts(message) if part.image_url is not None]
        if len(images) != 1:
            raise Refused(400, f"The conversation holds {len(images)} images; send exactly one, as an image_url.")
        expected = ["user", "assistant"] * len(said)
        if [message.role for message in said] != expected[: len(said)] or said[-1].role != "user":
            raise Refused(400, "The messages must alternate, user first, and end with a question of the user.")
        _require_short(said)
        turns = []
        for message in said:
            text = " ".join(part.text.strip() for part in _parts(message) if part.text).strip()
            if not text:
                raise Refused(400, "A message has no text; ask something, such as: Is this image real or fake?")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise Refused(400, "A message holds half a character (a lone surrogate); send whole ones.")
            turns.append(Turn(role="human" if message.role == "user" else "assistant", text=text))
        return images[0], turns, notes


class ChatReply:
    """The pieces of one reply in the form of OpenAI's API, with the verdict as an extra key."""

    def __init__(self, model: str, notes: list[str]) -> None:
        self._head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": model}
        self._notes = notes

    def whole(self, verdict: Verdict, text: str, usage: Mapping[str, int], finish: str) -> dict[str, Any]:
        """Give the reply to a request without streaming."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return self._with_verdict("chat.completion", choice, verdict) | {"usage": dict(usage)}

    def first(self, verdict: Verdict) -> dict[str, Any]:
        """Give the first chunk of a stream: the verdict, before any word."""
        return self._with_verdict("chat.completion.chunk", _delta({"role": "assistant", "content": ""}), verdict)

    def later(self, text: str) -> dict[str, Any]:
        """Give a chunk with more words."""
        return self._head | {"object": "chat.completion.chunk", "choices": [_delta({"content": text})]}

    def last(self, finish: str, usage: Mapping[str, int] | None) -> Iterator[dict[str, Any]]:
        """Yield the chunk that says how the answer ended, and one with the usage if it was asked for."""
        yield self._head | {"object": "chat.completion.chunk", "choices": [_delta({}, finish)]}
        if usage is not None:
            yield self._head | {"object": "chat.completion.chunk", "choices": [], "usage": dict(usage)}

    def _with_verdict(self, kind: str, choice: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
        notes = {"notes": self._notes} if self._notes else {}
        return self._head | {"object": kind, "choices": [choice], "verdict": verdict.to_dict(), **notes}


def _require_short(messages: Sequence[Message]) -> None:
    """Raise Refused (400) for a message or a conversation with more text than is read, however many parts it has."""
    lengths = [sum(len(part.text or "") for part in _parts(message)) for message in messages]
    for what, count, most in (
        ("A message", max(lengths), MAX_TEXT),
        ("The conversation", sum(lengths), MAX_CONVERSATION),
    ):
        if count > most:
            raise Refused(400, f"{what} has {count:,} characters; at most {most:,} are read.")


def _parts(message: Message) -> list[Part]:
    return [Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content


def _delta(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish}
