"""What OpenAI's clients send to `/v1/chat/completions`, and what they are answered; `verdict` is an extra key."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llava.core.types import GenerationSettings, Turn, Verdict
from llava.serve.engine import Answer, Refusal

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

    model: str | None = Field(None, max_length=200, description="none = the first of /v1/models")
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

        Raises Refusal (400) unless user and assistant alternate, a user asks last, there is exactly one image, and text
        has its limits.
        """
        notes = [SYSTEM_NOTE] if any(message.role == "system" for message in self.messages) else []
        said = [message for message in self.messages if message.role != "system"]
        images = [part.image_url.url for message in said for part in _parts(message) if part.image_url is not None]
        if len(images) != 1:
            raise Refusal(400, f"The conversation holds {len(images)} images; send exactly one, as an image_url.")
        expected = ["user", "assistant"] * len(said)
        if [message.role for message in said] != expected[: len(said)] or said[-1].role != "user":
            raise Refusal(400, "The messages must alternate, user first, and end with a question of the user.")
        _require_short(said)
        turns = []
        for message in said:
            text = " ".join(part.text.strip() for part in _parts(message) if part.text).strip()
            if not text:
                raise Refusal(400, "A message has no text; ask something, such as: Is this image real or fake?")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise Refusal(400, "A message holds half a character (a lone surrogate); send whole ones.")
            turns.append(Turn(role="human" if message.role == "user" else "assistant", text=text))
        return images[0], turns, notes


class ChatReply:
    """The pieces of one reply in the form of OpenAI's API, with the verdict as an extra key."""

    def __init__(self, model: str, notes: list[str]) -> None:
        self._head = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": model}
        self._notes = notes

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Give the reply to a request without streaming."""
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish}
        return self._with_verdict("chat.completion", choice, answer.verdict) | {"usage": answer.usage}

    def first(self, verdict: Verdict) -> dict[str, Any]:
        """Give the first chunk of a stream: the verdict, before any word."""
        return self._with_verdict("chat.completion.chunk", _delta({"role": "assistant", "content": ""}), verdict)

    def later(self, text: str) -> dict[str, Any]:
        """Give a chunk with more words."""
        return self._head | {"object": "chat.completion.chunk", "choices": [_delta({"content": text})]}

    def last(self, answer: Answer, wants_usage: bool) -> Iterator[dict[str, Any]]:
        """Yield the chunk that says how the answer ended, and one with the usage if it was asked for."""
        yield self._head | {"object": "chat.completion.chunk", "choices": [_delta({}, answer.finish)]}
        if wants_usage:
            yield self._head | {"object": "chat.completion.chunk", "choices": [], "usage": answer.usage}

    def _with_verdict(self, kind: str, choice: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
        notes = {"notes": self._notes} if self._notes else {}
        return self._head | {"object": kind, "choices": [choice], "verdict": verdict.to_dict(), **notes}


def _require_short(messages: Sequence[Message]) -> None:
    """Raise Refusal (400) for a message or a conversation with more text than is read, however many parts it has."""
    lengths = [sum(len(part.text or "") for part in _parts(message)) for message in messages]
    for what, count, most in (
        ("A message", max(lengths), MAX_TEXT),
        ("The conversation", sum(lengths), MAX_CONVERSATION),
    ):
        if count > most:
            raise Refusal(400, f"{what} has {count:,} characters; at most {most:,} are read.")


def _parts(message: Message) -> list[Part]:
    return [Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content


def _delta(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish}
